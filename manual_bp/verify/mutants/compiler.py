"""Wrong or refused when compiled or exported."""

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from manual_bp.verify.mutants._mutant import mutant
from manual_bp.verify.mutants._right import Cube, Linear, Sigmoid, cube
from manual_bp.verify.mutants._samples import elementwise, linear


@mutant("compile", elementwise, torch.sigmoid, supports=("compile",))
class LooksAtValues(Sigmoid):
    """Forward branches on a value, which the compiler refuses."""

    @staticmethod
    def forward(z: Tensor) -> Any:
        if z.sum().item() > 0:
            return 1 / (1 + torch.exp(-z))
        return torch.sigmoid(z)


@mutant("compile", elementwise, cube, supports=("forward_ad", "compile"))
class JvpWhenCompiled(Cube):
    """The Function defines a jvp, which the compiler refuses."""

    @staticmethod
    def backward(ctx: Any, delta: Any) -> Any:
        (x,) = ctx.saved_tensors
        return 3 * x.square() * delta


@mutant("compile", linear, F.linear, supports=("compile",))
def other_when_compiled(a: Tensor, w: Tensor, b: Tensor) -> Any:
    """The branch for the compiler forgets b."""
    apply: Any = Linear.apply
    return F.linear(a, w) if torch.compiler.is_compiling() else apply(a, w, b)


@mutant("compile", linear, F.linear, supports=("compile",))
def cut_when_compiled(a: Tensor, w: Tensor, b: Tensor) -> Any:
    """Compiled outputs are right, but the gradient of w is cut."""
    apply: Any = Linear.apply
    return F.linear(a, w.detach(), b) if torch.compiler.is_compiling() else apply(a, w, b)


@mutant(
    "compile_dynamic",
    elementwise,
    lambda x: torch.sigmoid(x).mean(0),
    supports=("compile", "compile_dynamic"),
    in_dims=(0,),
)
def five_rows_when_compiled(x: Tensor) -> Any:
    """Compiled code has the number of rows of the first sample built in."""
    apply: Any = Sigmoid.apply
    rows = 5 if torch.compiler.is_compiling() else len(x)
    return apply(x).sum(0) / rows


@mutant("export", linear, F.linear, supports=("export",))
def other_when_exported(a: Tensor, w: Tensor, b: Tensor) -> Any:
    """The branch for export forgets b."""
    apply: Any = Linear.apply
    return F.linear(a, w) if torch.compiler.is_exporting() else apply(a, w, b)
