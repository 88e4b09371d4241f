"""What the layers with weights share: z = w a + b, its arguments, and samples as rows."""

from collections.abc import Callable
from functools import reduce
from typing import Any, NoReturn, cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn, strided
from torch.overrides import has_torch_function_variadic

from manual_bp import _require
from manual_bp._autocast import autocast
from manual_bp._function import as_callable, hand_over, is_nested, is_watched
from manual_bp._torch import any_autocast_is_on, as_no_view, parameters_for_reading


def as_rows(t: Tensor) -> Tensor:
    """(..., features) as (samples, features), for BP3 and BP4, which sum over all samples."""
    return t if t.ndim == 2 else t.reshape(t.shape[:-1].numel(), t.shape[-1])


def affine(a: Tensor, w: Tensor, b: Tensor | None) -> Tensor:
    """Compute z = a @ w.mT + b, never as a view."""
    z = F.linear(a, w, b)
    if a.ndim == 2:
        return z
    # Here z may be a view, and PyTorch forbids in-place changes (ReLU(inplace), +=) of views that
    # a Function returns.
    if is_watched():
        return z.clone()
    return as_no_view(z)


def weight_and_bias(module: nn.Module, kind: type[nn.Module]) -> tuple[Tensor, Tensor | None]:
    """`module.weight, module.bias`, without `nn.Module.__getattr__` where possible.

    That takes 1.4 µs for both. It is called only where it may give something else: for subclasses
    of the kind, and for weights that are not parameters of the module (pruned, a replica's,
    buffers).
    """
    attributes = vars(module)
    if type(module) is kind and "weight" not in attributes and "bias" not in attributes:
        own = parameters_for_reading(module)
        try:
            return own["weight"], own["bias"]
        except KeyError:
            pass  # one of them is a buffer
    return cast("Tensor", module.weight), cast("Tensor | None", module.bias)


def affine_tangent(
    a: Tensor, w: Tensor, da: Tensor | None, dw: Tensor | None, db: Tensor | None
) -> Tensor:
    """From tangents da, dw, db, at least one of them, to dz = da @ w.mT + a @ dw.mT + db."""
    terms = []
    if da is not None:
        terms.append(da @ w.mT)
    if dw is not None:
        terms.append(a @ dw.mT)
    if db is not None:
        # A copy: if it is the only term, a view would share memory with the caller's db.
        terms.append(db.expand(*a.shape[:-1], -1).clone())
    return reduce(torch.add, terms)


def entry_point(
    public: Callable[..., Tensor], function: Any, *, only_real: bool = False
) -> Callable[..., Tensor]:
    """What the functional form and the module both call: it checks the arguments, then computes.

    Each passes its own names of the arguments for error messages.

    Args:
        public: The functional form, which is passed to a `__torch_function__`. A nested tensor has
            one too, but goes on to the checks, which refuse it in our words.
        function: The Function.
        only_real: Whether complex numbers are refused.

    Returns:
        `enter(names, a, w, b)`.
    """
    call = as_callable(function)

    def enter(names: tuple[str, str, str], a: Tensor, w: Tensor, b: Tensor | None) -> Tensor:
        if has_torch_function_variadic(a, w, b) and not is_nested(a):
            return hand_over(public, a, w, b)
        if any_autocast_is_on():
            a, w, b = autocast(a, w, b)
        _check(names, a, w, b)
        if only_real and not w.is_floating_point():
            _require.real(names[1], w)
        return call(a, w, b)

    return enter


def _check(names: tuple[str, str, str], a: Any, w: Any, b: Any) -> None:
    """Raise an error, in the caller's names, unless the three are dense and fit together.

    It runs at every call, so it takes few steps where they fit: a fifth of the time of `_refuse`.
    """
    try:
        (out_features, in_features), dtype, device = w.shape, w.dtype, w.device
        if isinstance(in_features, Tensor):
            return  # under torch.jit.trace, which would record each question as an operation
        if (
            a.shape[-1] == in_features
            and a.dtype is dtype
            and a.device == device
            and a.layout is w.layout is strided
            and (
                b is None
                or (
                    b.shape == (out_features,)
                    and b.dtype is dtype
                    and b.device == device
                    and b.layout is strided
                )
            )
        ):
            return
    except (AttributeError, IndexError, RuntimeError, ValueError):
        pass  # not a tensor, no dimension, nested and so without a shape, or not a matrix
    _refuse(names, a, w, b)


def _refuse(names: tuple[str, str, str], a: Any, w: Any, b: Any) -> NoReturn:
    name_a, name_w, name_b = names
    _require.tensor(name_w, w)
    _require.matrix(name_w, w, "(out, in)")
    _require.like(name_a, a, name_w, w)
    _require.components(name_a, a, w.shape[1], f"the second size of {name_w}")
    if b is not None:
        _require.like(name_b, b, name_w, w)
        _require.shape(name_b, b, w.shape[:1], f"the first size of {name_w}")
    raise AssertionError("the arguments fit")
