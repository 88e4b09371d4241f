"""The linear and the sigmoid layer as one: a = σ(w a_prev + b), with BP1 to BP4."""

from typing import Any, cast

import torch
from torch import Tensor, nn
from torch.autograd import Function

from manual_bp._function import (
    is_watched,
    may_overwrite_results_of,
    release_saved,
    save_for_forward_ad,
)
from manual_bp._torch import transforms_are_active
from manual_bp.layers._affine import affine, affine_tangent, as_rows, entry_point, weight_and_bias


def times_sigmoid_prime(grad_a: Tensor, a: Tensor) -> Tensor:
    """grad_a ⊙ σ'(z), written in terms of a = σ(z): σ' = a (1 − a). Shape as a.

    Not as grad_a a − grad_a a², which cancels to a third of its size where a neuron is saturated.
    """
    if may_overwrite_results_of(grad_a):
        return (1 - a).mul_(a).mul_(grad_a)  # the same, in one new tensor
    return grad_a * (a * (1 - a))


class LinearSigmoidFunction(Function):
    """a = σ(w a_prev + b) for a batch of samples, with its gradients written by hand.

    Forward, one sample a row, σ in the memory of z:

        a = σ(a_prev @ w.mT + b)

    Backward, from grad_a = ∂C/∂a, what the cost or the layer above sends down:

        delta = grad_a * a * (1 - a)    δ_xj = ∂C/∂a_xj σ'(z_xj)    BP1, BP2: the factor ⊙ σ'(z)
        ∂C/∂a_prev = delta @ w          Σ_j δ_xj w_jk               BP2: the factor wᵀδ
        ∂C/∂b = Σ_x delta_x             Σ_x δ_xj                    BP3
        ∂C/∂w = delta.mT @ a_prev       Σ_x δ_xj a_prev_xk          BP4

    One backward replaces two and can free memory halfway: it peaks no higher than autograd's two.

    Shapes: a_prev (..., in), w (out, in), b (out,) or None, a and grad_a (..., out).
    Units: grad_a belongs to whatever cost is differentiated, so ∂C/∂w and ∂C/∂b are summed over
    samples, and averaged only if the cost is.
    Saves: a; a_prev, only if ∂C/∂w is required; w, only if ∂C/∂a_prev is. z is overwritten.
    Errors: none; `linear_sigmoid` checks the arguments.
    Source: Nielsen, Neural Networks and Deep Learning, chapter 2, BP1 to BP4.

    Examples:
        >>> a, w = torch.tensor([[1.0, 2.0]]), torch.zeros(1, 2, requires_grad=True)
        >>> LinearSigmoidFunction.apply(a, w, None).backward()
        >>> w.grad  # δ a, where δ is σ'(0) = 1/4
        tensor([[0.2500, 0.5000]])
    """

    generate_vmap_rule = True

    @staticmethod
    def forward(a_prev: Tensor, w: Tensor, b: Tensor | None) -> Tensor:
        """Compute a = σ(a_prev @ w.mT + b)."""
        z = affine(a_prev, w, b)
        # Some subclasses cannot do this in place, such as a DTensor of partial sums; and
        # functionalize makes a copy of it that has no derivative.
        is_its_own = type(z) is Tensor and not is_watched() and not transforms_are_active()
        return torch.sigmoid_(z) if is_its_own else torch.sigmoid(z)

    @staticmethod
    def setup_context(
        ctx: Any, inputs: tuple[Tensor, Tensor, Tensor | None], output: Tensor
    ) -> None:
        """Save what the required gradients need."""
        a_prev, w, _ = inputs
        needs_a_prev, needs_w, _ = ctx.needs_input_grad
        ctx.set_materialize_grads(False)
        all_of_them = save_for_forward_ad(ctx, a_prev, w, output)
        ctx.save_for_backward(
            a_prev if needs_w or all_of_them else None,
            w if needs_a_prev or all_of_them else None,
            output,
        )

    @staticmethod
    def backward(
        ctx: Any, grad_a: Tensor | None
    ) -> tuple[Tensor | None, Tensor | None, Tensor | None]:
        """From grad_a = ∂C/∂a to ∂C/∂a_prev, ∂C/∂w and ∂C/∂b."""
        return LinearSigmoidFunction.backward_boxed(ctx, [grad_a])

    @staticmethod
    def backward_boxed(
        ctx: Any, grads: list[Tensor | None]
    ) -> tuple[Tensor | None, Tensor | None, Tensor | None]:
        """The same, with grad_a in a list, from which it is removed so that it can be freed."""
        grad_a = grads.pop()
        if grad_a is None:
            return None, None, None
        a_prev, w, a = ctx.saved_tensors
        needs_a_prev, needs_w, needs_b = ctx.needs_input_grad
        delta = times_sigmoid_prime(grad_a, a)  # BP1, BP2: the factor ⊙ σ'(z)
        # Memory peaks below, where these two are no longer needed: free them first.
        del grad_a, a
        release_saved(ctx)
        grad_a_prev = delta @ w if needs_a_prev else None  # BP2: the factor wᵀδ
        grad_b = as_rows(delta).sum(0) if needs_b else None  # BP3
        grad_w = as_rows(delta).mT @ as_rows(a_prev) if needs_w else None  # BP4
        return grad_a_prev, grad_w, grad_b

    @staticmethod
    def jvp(ctx: Any, da_prev: Tensor | None, dw: Tensor | None, db: Tensor | None) -> Tensor:
        """From tangents da_prev, dw, db to da = σ'(z) (da_prev @ w.mT + a_prev @ dw.mT + db)."""
        a_prev, w, a = ctx.saved_tensors
        return times_sigmoid_prime(affine_tangent(a_prev, w, da_prev, dw, db), a)


def linear_sigmoid(a: Tensor, w: Tensor, b: Tensor | None = None) -> Tensor:
    """Compute σ(w a + b) in one step, differentiated by hand: `linear`, then `sigmoid`.

    The same numbers as the two, from one node of the graph instead of two; z is not kept.

    Args:
        a: Activations of the layer below, shape (..., in): one sample a row, or one sample alone.
        w: Weights, shape (out, in); w_jk leads from neuron k below to neuron j.
        b: Biases, shape (out,), or None.

    Returns:
        The activations, shape (..., out), each between 0 and 1.

    Raises:
        TypeError: An argument is not a dense tensor of w's dtype, or w is not real floating-point.
        ValueError: A shape does not fit w, or a device differs from that of w.

    See `LinearSigmoidFunction` for the gradients.

    Examples:
        >>> a, w = torch.tensor([[1.0, 2.0]]), torch.tensor([[3.0, -1.0]])
        >>> linear_sigmoid(a, w, torch.tensor([-1.0]))
        tensor([[0.5000]])
    """
    return _linear_sigmoid(("a", "w", "b"), a, w, b)


_linear_sigmoid = entry_point(linear_sigmoid, LinearSigmoidFunction, only_real=True)


class LinearSigmoid(nn.Module):
    """`nn.Linear` and `nn.Sigmoid` in one, differentiated by hand.

    Parameters, their names and their initialisation from a given seed are those of `nn.Linear`.
    It is not a subclass of it: code that looks for an `nn.Linear` would take its output for z.

    Args:
        in_features: The number of neurons below, the last dimension of the input.
        out_features: The number of neurons of this layer.
        bias: Whether z has a bias; if not, `bias` is None.
        device: The device of the parameters.
        dtype: The dtype of the parameters.

    Shapes: input (..., in_features), output (..., out_features), weight (out_features,
    in_features), bias (out_features,).

    See `linear_sigmoid` for the errors raised and `LinearSigmoidFunction` for the gradients.

    Examples:
        >>> layer = LinearSigmoid(3, 2)
        >>> layer(torch.rand(5, 3)).shape, sorted(layer.state_dict())
        (torch.Size([5, 2]), ['bias', 'weight'])
    """

    bias: nn.Parameter | None

    def __init__(
        self,
        in_features: int,
        out_features: int,
        bias: bool = True,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        self.in_features = in_features
        self.out_features = out_features
        options: Any = {"device": device, "dtype": dtype}
        self.weight = nn.Parameter(torch.empty(out_features, in_features, **options))
        self.register_parameter(
            "bias", nn.Parameter(torch.empty(out_features, **options)) if bias else None
        )
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """Draw weight and bias again, as `nn.Linear` does."""
        nn.Linear.reset_parameters(cast("nn.Linear", self))

    def forward(self, input: Tensor) -> Tensor:  # noqa: A002 (the name nn.Linear gives it)
        """From activations (..., in_features) to activations (..., out_features)."""
        weight, bias = weight_and_bias(self, LinearSigmoid)
        return _linear_sigmoid(("input", "weight", "bias"), input, weight, bias)

    def extra_repr(self) -> str:
        """The sizes, as `nn.Linear` shows them."""
        return nn.Linear.extra_repr(cast("nn.Linear", self))
