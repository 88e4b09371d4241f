"""What the layers with weights share: z = w a + b itself, its arguments, and samples as rows."""

from functools import reduce
from typing import Any, NoReturn, cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn, strided

from manual_bp import _require
from manual_bp._function import is_watched


def as_rows(t: Tensor) -> Tensor:
    """(..., features) as (samples, features): BP3 and BP4 sum over every sample alike."""
    return t if t.ndim == 2 else t.reshape(t.shape[:-1].numel(), t.shape[-1])


def affine(a: Tensor, w: Tensor, b: Tensor | None) -> Tensor:
    """Compute z = a @ w.mT + b, as a Function may return it."""
    z = F.linear(a, w, b)
    if a.ndim == 2:
        return z
    # Here z may be a view, which nobody could change in place afterwards (as ReLU(inplace) or
    # += do): PyTorch forbids that for views made inside a Function. So, no view of it.
    if is_watched():
        return z.clone()
    return cast("Tensor", torch.ops.aten._unsafe_view(z, z.shape))


def weight_and_bias(module: nn.Module, kind: type[nn.Module]) -> tuple[Tensor, Tensor | None]:
    """`module.weight, module.bias`, mostly past `nn.Module.__getattr__`: it takes 1.4 µs for both.

    Where it may have something else to say, it is asked after all: for subclasses of the kind, and
    for weights that are not the module's own parameters (pruned, a replica's, buffers).
    """
    attributes = vars(module)
    if type(module) is kind and "weight" not in attributes and "bias" not in attributes:
        own = attributes["_parameters"]
        try:
            return own["weight"], own["bias"]
        except KeyError:
            pass  # one of them is a buffer
    return cast("Tensor", module.weight), cast("Tensor | None", module.bias)


def affine_tangent(
    a: Tensor, w: Tensor, da: Tensor | None, dw: Tensor | None, db: Tensor | None
) -> Tensor:
    """From tangents da, dw, db, at least one, to dz = da @ w.mT + a @ dw.mT + db."""
    terms = []
    if da is not None:
        terms.append(da @ w.mT)
    if dw is not None:
        terms.append(a @ dw.mT)
    if db is not None:
        # A copy: where it is the only term, a view would share memory with the caller's db.
        terms.append(db.expand(*a.shape[:-1], -1).clone())
    return reduce(torch.add, terms)


def fit(a: Any, w: Any, b: Any) -> bool:
    """Whether the three are dense and fit together; if not, `refuse` says why.

    Asked at every call, hence in as few steps as will do, in a fifth of the time of `refuse`.
    """
    try:
        (out_features, in_features), dtype, device = w.shape, w.dtype, w.device
        if isinstance(in_features, Tensor):
            return True  # under torch.jit.trace, to which asking is a part of the computation
        return (
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
        )
    except (AttributeError, IndexError, RuntimeError, ValueError):
        return False  # no tensor, no dimension, nested and hence without a shape, no matrix


def refuse(a: Any, w: Any, b: Any, names: tuple[str, str, str]) -> NoReturn:
    """Raise the error that says what does not fit, in the caller's names."""
    name_a, name_w, name_b = names
    _require.tensor(name_w, w)
    _require.matrix(name_w, w, "(out, in)")
    _require.like(name_a, a, name_w, w)
    _require.components(name_a, a, w.shape[1], f"the second size of {name_w}")
    if b is not None:
        _require.like(name_b, b, name_w, w)
        _require.shape(name_b, b, w.shape[:1], f"the first size of {name_w}")
    raise AssertionError("refuse was called for what fits")
