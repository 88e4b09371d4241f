"""Wrong modules."""

from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from manual_bp.verify.mutants._mutant import mutant
from manual_bp.verify.mutants._right import Linear
from manual_bp.verify.mutants._samples import IN, OUT, elementwise

_REFERENCE = partial(nn.Linear, IN, OUT)


class _Layer(nn.Linear):
    """A right linear layer, from which the wrong ones inherit."""

    def __init__(self, **options: Any) -> None:
        super().__init__(IN, OUT, **options)

    def forward(self, input: Tensor) -> Any:  # noqa: A002
        apply: Any = Linear.apply
        return apply(input, self.weight, self.bias)


class _DoubledWeight(Linear):
    """∂C/∂w doubled."""

    @staticmethod
    def backward(ctx: Any, delta: Any) -> Any:
        a, w = ctx.saved_tensors
        return delta @ w, 2 * delta.mT @ a, delta.sum(0)


@mutant("finite_differences", elementwise, name="doubled_module_unreferenced")
@mutant("gradients_match_reference", elementwise, _REFERENCE)
class DoubledModule(_Layer):
    """The weight gradient is doubled; gradcheck of the input does not see it."""

    def forward(self, input: Tensor) -> Any:  # noqa: A002
        return _DoubledWeight.apply(input, self.weight, self.bias)


@mutant("state_dict", elementwise)
class UnsavedBuffer(_Layer):
    """A buffer is missing from the state_dict."""

    shift: Tensor

    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("shift", torch.randn(IN), persistent=False)

    def forward(self, input: Tensor) -> Any:  # noqa: A002
        return super().forward(input - self.shift)


@mutant("pickle", elementwise, _REFERENCE)
class HoldsLambda(_Layer):
    """A lambda attribute makes the module impossible to pickle."""

    def __init__(self) -> None:
        super().__init__()
        self.activation: Any = lambda z: z

    def forward(self, input: Tensor) -> Any:  # noqa: A002
        return self.activation(super().forward(input))


@mutant("deepcopy", elementwise, _REFERENCE)
class ClosesOverItself(_Layer):
    """A copy of the module still computes with the weights of the original."""

    def __init__(self) -> None:
        super().__init__()
        self.call: Any = lambda a: Linear.apply(a, self.weight, self.bias)

    def forward(self, input: Tensor) -> Any:  # noqa: A002
        return self.call(input)


@mutant("deepcopy", elementwise, _REFERENCE)
class ForgetsTraining(_Layer):
    """A copy of the module starts with new weights."""

    def __deepcopy__(self, memo: dict[int, Any]) -> "ForgetsTraining":
        copied = ForgetsTraining().to(self.weight)
        memo[id(self)] = copied
        return copied


@mutant("to_dtype", elementwise)
class PlainOffset(_Layer):
    """A plain tensor attribute stays in float64 when the module is cast."""

    def __init__(self) -> None:
        super().__init__()
        self.offset = torch.full((OUT,), 0.5, dtype=torch.float64)

    def forward(self, input: Tensor) -> Any:  # noqa: A002
        return super().forward(input) + self.offset


@mutant("factory_kwargs", elementwise, _REFERENCE, supports=("factory_kwargs",))
class IgnoresDtype(_Layer):
    """The module takes a dtype and ignores it."""

    def __init__(self, device: Any = None, dtype: Any = None) -> None:
        del dtype
        super().__init__(device=device)


@mutant("factory_kwargs", elementwise, _REFERENCE, supports=("factory_kwargs",))
class TakesNoDtype(_Layer):
    """The module takes no dtype, although factory_kwargs is declared."""

    def __init__(self) -> None:
        super().__init__()


@mutant("frozen_parameters", elementwise, _REFERENCE)
class Thaws(_Layer):
    """Forward sets requires_grad of a frozen weight to True."""

    def forward(self, input: Tensor) -> Any:  # noqa: A002
        if isinstance(self.weight, nn.Parameter):
            self.weight.requires_grad = True
        return super().forward(input)


@mutant("frozen_parameters", elementwise, _REFERENCE)
class FrozenCutsInput(_Layer):
    """A frozen weight cuts off the gradient of the input as well."""

    def forward(self, input: Tensor) -> Any:  # noqa: A002
        with torch.set_grad_enabled(self.weight.requires_grad and torch.is_grad_enabled()):
            return super().forward(input)


class _Halves(nn.Linear):
    """A right layer that halves its output in training."""

    def forward(self, input: Tensor) -> Any:  # noqa: A002
        z = super().forward(input)
        return z / 2 if self.training else z


@mutant("train_eval", elementwise, partial(_Halves, IN, OUT))
class TrainingByGradMode(_Layer):
    """The module looks at grad mode, not at self.training, so eval() changes nothing."""

    def forward(self, input: Tensor) -> Any:  # noqa: A002
        z = super().forward(input)
        return z / 2 if torch.is_grad_enabled() else z
