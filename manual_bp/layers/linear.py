"""The linear layer: z = w a + b, with its factors of BP2, BP3 and BP4."""

from typing import Any

from torch import Tensor, nn
from torch.autograd import Function

from manual_bp._function import save_for_forward_ad
from manual_bp.layers._affine import affine, affine_tangent, as_rows, entry_point, weight_and_bias


class LinearFunction(Function):
    """z = w a + b for a batch of samples, with its gradients written by hand.

    Forward, one sample a row:

        z = a @ w.mT + b            z_xj = Σ_k w_jk a_xk + b_j

    Backward, from delta = ∂C/∂z, the error of this layer:

        ∂C/∂a = delta @ w           Σ_j delta_xj w_jk      BP2, its factor wᵀδ
        ∂C/∂b = Σ_x delta_x         Σ_x delta_xj           BP3
        ∂C/∂w = delta.mT @ a        Σ_x delta_xj a_xk      BP4

    The other factor of BP2, ⊙ σ'(z), belongs to the activation below this layer and is in its
    backward. For complex tensors w and a are conjugated, as in PyTorch.

    Shapes: a (..., in), w (out, in), b (out,) or None, z and delta (..., out).
    Units: delta is the error of whatever cost is differentiated, so ∂C/∂w and ∂C/∂b are summed
    over samples, and averaged only if the cost is.
    Saves: a, only if ∂C/∂w is required; w, only if ∂C/∂a is. Nothing else is used above.
    Errors: none; `linear` checks the arguments.
    Source: Nielsen, Neural Networks and Deep Learning, chapter 2, BP2 to BP4.

    Examples:
        >>> a, w = torch.tensor([[1.0, 2.0]]), torch.tensor([[3.0, 4.0]], requires_grad=True)
        >>> LinearFunction.apply(a, w, None).backward()
        >>> w.grad  # δ is 1, so this is a
        tensor([[1., 2.]])
    """

    generate_vmap_rule = True

    @staticmethod
    def forward(a: Tensor, w: Tensor, b: Tensor | None) -> Tensor:
        """Compute z = a @ w.mT + b."""
        return affine(a, w, b)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Tensor, Tensor, Tensor | None], output: Any) -> None:
        """Save what the required gradients need."""
        del output
        a, w, _ = inputs
        needs_a, needs_w, _ = ctx.needs_input_grad
        ctx.set_materialize_grads(False)
        all_of_them = save_for_forward_ad(ctx, a, w)
        ctx.save_for_backward(
            a if needs_w or all_of_them else None, w if needs_a or all_of_them else None
        )

    @staticmethod
    def backward(
        ctx: Any, delta: Tensor | None
    ) -> tuple[Tensor | None, Tensor | None, Tensor | None]:
        """From delta = ∂C/∂z to ∂C/∂a, ∂C/∂w and ∂C/∂b."""
        if delta is None:
            return None, None, None
        a, w = ctx.saved_tensors
        needs_a, needs_w, needs_b = ctx.needs_input_grad
        grad_a = delta @ w.conj() if needs_a else None  # BP2: the factor wᵀδ
        grad_b = as_rows(delta).sum(0) if needs_b else None  # BP3
        grad_w = as_rows(delta).mT @ as_rows(a).conj() if needs_w else None  # BP4
        return grad_a, grad_w, grad_b

    @staticmethod
    def jvp(ctx: Any, da: Tensor | None, dw: Tensor | None, db: Tensor | None) -> Tensor:
        """From tangents da, dw, db to dz = da @ w.mT + a @ dw.mT + db."""
        a, w = ctx.saved_tensors
        return affine_tangent(a, w, da, dw, db)


def linear(a: Tensor, w: Tensor, b: Tensor | None = None) -> Tensor:
    """Compute z = w a + b: `torch.nn.functional.linear`, differentiated by hand.

    Args:
        a: Activations of the layer below, shape (..., in): one sample a row, or one sample alone.
        w: Weights, shape (out, in); w_jk leads from neuron k below to neuron j.
        b: Biases, shape (out,), or None.

    Returns:
        z, the weighted inputs, shape (..., out).

    Raises:
        TypeError: An argument is not a dense tensor, or its dtype differs from that of w.
        ValueError: A shape does not fit w, or a device differs from that of w.

    See `LinearFunction` for the gradients.

    Examples:
        >>> a, w = torch.tensor([[1.0, 2.0]]), torch.tensor([[3.0, 4.0]])
        >>> linear(a, w, torch.tensor([5.0]))
        tensor([[16.]])
    """
    return _linear(("a", "w", "b"), a, w, b)


_linear = entry_point(linear, LinearFunction)


class Linear(nn.Linear):
    """`torch.nn.Linear`, differentiated by hand: identical except for its backward.

    Parameters, initialisation from a given seed, state_dict and repr are those of `nn.Linear`. This
    is a subclass of it, so that `isinstance(module, nn.Linear)` holds.

    Args:
        in_features: The number of neurons below, the last dimension of the input.
        out_features: The number of neurons of this layer.
        bias: Whether z has a bias; if not, `bias` is None.
        device: The device of the parameters.
        dtype: The dtype of the parameters.

    Shapes: input (..., in_features), output (..., out_features), weight (out_features,
    in_features), bias (out_features,).

    See `linear` for the errors raised and `LinearFunction` for the gradients.

    Examples:
        >>> layer = Linear(3, 2)
        >>> layer(torch.rand(5, 3)).sum().backward()
        >>> layer.bias.grad  # the sum of δ, which is 1 for each of the five samples
        tensor([5., 5.])
    """

    def forward(self, input: Tensor) -> Tensor:  # noqa: A002 (the name nn.Linear gives it)
        """From activations (..., in_features) to weighted inputs z (..., out_features)."""
        return _linear(("input", "weight", "bias"), input, *weight_and_bias(self, Linear))
