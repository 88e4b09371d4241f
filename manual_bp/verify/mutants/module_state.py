"""Modules whose buffers, mode or parameters are not what backward takes them for."""

from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd import Function
from torch.autograd.function import once_differentiable

from manual_bp._torch import version_of
from manual_bp.verify.mutants._mutant import mutant, twin
from manual_bp.verify.mutants._right import Linear
from manual_bp.verify.mutants._samples import IN, OUT, elementwise

_REFERENCE = partial(nn.BatchNorm1d, IN)


class _Normalize(Function):
    """(x - mean) r w + b, where mean and r = 1/√(variance + eps) are the batch's or constants."""

    @staticmethod
    def forward(
        ctx: Any, x: Tensor, w: Tensor, b: Tensor, mean: Tensor, r: Tensor, is_batch: Any
    ) -> Any:
        h = (x - mean) * r
        ctx.save_for_backward(h, w, r)
        ctx.is_batch = is_batch
        return (h * w + b).to(x.dtype)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, delta: Any) -> Any:
        h, w, r = ctx.saved_tensors
        dtype, delta = delta.dtype, delta.to(h.dtype)
        grad_x = grad_h = delta * w
        if ctx.is_batch():
            grad_x = grad_h - grad_h.mean(0) - h * (grad_h * h).mean(0)
        found = grad_x * r, (delta * h).sum(0), delta.sum(0)
        return *(g.to(dtype) for g in found), None, None, None


class _BatchNorm(nn.BatchNorm1d):
    """A right batch norm, from which the wrong ones inherit."""

    def __init__(self) -> None:
        super().__init__(IN)

    def forward(self, input: Tensor) -> Any:  # noqa: A002
        mean, variance = self.running_mean, self.running_var
        assert mean is not None
        assert variance is not None
        # In at least float32, as PyTorch does.
        x = input.detach().to(torch.promote_types(input.dtype, torch.float32))
        if self.training:
            self.update(x)
            mean, variance = x.mean(0), x.var(0, correction=0)
        mean, variance = mean.to(x.dtype), variance.to(x.dtype)
        r = (variance + self.eps).rsqrt()
        return _Normalize.apply(input, self.weight, self.bias, mean.clone(), r, self.is_batch())

    def update(self, x: Tensor) -> None:
        """Update the buffers."""
        assert self.running_mean is not None
        assert self.running_var is not None
        assert self.num_batches_tracked is not None
        with torch.no_grad():
            self.num_batches_tracked.add_(1)
            self.running_mean.lerp_(x.mean(0).to(self.running_mean), 0.1)
            self.running_var.lerp_(self.variance(x).to(self.running_var), 0.1)

    def variance(self, x: Tensor) -> Tensor:
        """The variance that the buffer follows: that of the population, estimated."""
        return x.var(0) if len(x) > 1 else x.var(0, correction=0)

    def is_batch(self) -> Any:
        """Makes what tells backward whether the statistics were the batch's."""
        training = self.training
        return lambda: training


@twin("train_eval", elementwise, _REFERENCE)
@twin("mode_switch", elementwise, _REFERENCE, name="batch_norm_by_hand_switched")
class BatchNormByHand(_BatchNorm):
    """A batch norm with running statistics and a counter."""


@mutant("train_eval", elementwise, _REFERENCE)
class RunningVarianceOfBatch(_BatchNorm):
    """The running variance follows that of the batch, not the estimate for the population."""

    def variance(self, x: Tensor) -> Tensor:
        return x.var(0, correction=0)


@mutant("train_eval", elementwise, _REFERENCE)
class CountsNoBatches(_BatchNorm):
    """The number of batches stays 0."""

    def update(self, x: Tensor) -> None:
        super().update(x)
        assert self.num_batches_tracked is not None
        self.num_batches_tracked.zero_()


@mutant("train_eval", elementwise, _REFERENCE)
class TrainsInEvaluation(_BatchNorm):
    """Backward takes running statistics for those of the batch."""

    def is_batch(self) -> Any:
        return lambda: True


@mutant("mode_switch", elementwise, _REFERENCE)
@mutant("mode_switch", elementwise, name="reads_mode_in_backward_unreferenced")
class ReadsModeInBackward(_BatchNorm):
    """Backward asks for the mode, which may have changed since forward."""

    def is_batch(self) -> Any:
        return lambda: self.training


class _WithTransposed(Function):
    """z = a @ wt + b, where wt is the transposed weight w."""

    @staticmethod
    def forward(ctx: Any, a: Tensor, w: Tensor, b: Tensor, wt: Tensor) -> Any:  # noqa: ARG004
        ctx.save_for_backward(a, wt)
        return a @ wt + b

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, delta: Any) -> Any:
        a, wt = ctx.saved_tensors
        return delta @ wt.mT, delta.mT @ a, delta.sum(0), None


class _Cached(nn.Linear):
    """A linear layer that keeps its transposed weight in evaluation mode."""

    kept: Any = (None, None, None)

    def __init__(self) -> None:
        super().__init__(IN, OUT)

    def forward(self, input: Tensor) -> Any:  # noqa: A002
        if self.training:
            return Linear.apply(input, self.weight, self.bias)
        if not self.is_fresh():
            # Not self.kept: it would register the parameter a second time.
            state = self.weight, self.state(), self.weight.detach().mT.contiguous()
            object.__setattr__(self, "kept", state)
        return _WithTransposed.apply(input, self.weight, self.bias, self.kept[2])

    def state(self) -> Any:
        """What changes if the weight does."""
        return version_of(self.weight), self.weight.data_ptr()

    def is_fresh(self) -> bool:
        """Whether what is kept belongs to the weight as it is."""
        return self.kept[0] is self.weight and self.kept[1] == self.state()


@twin("optimizer_step", elementwise, partial(nn.Linear, IN, OUT))
class RenewsTransposed(_Cached):
    """The transposed weight is made anew after each change of the weight."""


@mutant("optimizer_step", elementwise, partial(nn.Linear, IN, OUT))
class KeepsTransposed(_Cached):
    """The transposed weight is kept for as long as the parameter is the same object."""

    def is_fresh(self) -> bool:
        return self.kept[0] is self.weight


@mutant("module_left_alone", elementwise, partial(nn.Linear, IN, OUT))
class ClearsGradients(_Cached):
    """Forward drops the gradients that earlier backwards added up in .grad."""

    def forward(self, input: Tensor) -> Any:  # noqa: A002
        self.zero_grad()
        return Linear.apply(input, self.weight, self.bias)


@mutant("module_left_alone", elementwise, partial(nn.Linear, IN, OUT))
class EndsTraining(_Cached):
    """Forward switches the module to evaluation mode."""

    def forward(self, input: Tensor) -> Any:  # noqa: A002
        self.eval()
        return Linear.apply(input, self.weight, self.bias)


@twin("module_left_alone", elementwise, partial(nn.Linear, IN, OUT))
class EvaluatesForAWhile(_Cached):
    """Forward switches the module to evaluation mode, and back."""

    def forward(self, input: Tensor) -> Any:  # noqa: A002
        was_training = self.training
        self.eval()
        z = Linear.apply(input, self.weight, self.bias)
        self.train(was_training)
        return z
