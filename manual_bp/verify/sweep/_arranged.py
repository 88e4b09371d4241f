"""Calls with nested arguments as calls with a flat list of tensors, which a case needs."""

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

from torch import Tensor, nn

from manual_bp._torch import map_tensors, tree_leaves
from manual_bp.verify._case import Sample


@dataclass(frozen=True, eq=False)
class Arrangement:
    """How tensors become the arguments of a call. It is the last argument of a sample.

    args, kwargs: The arguments. Those of their tensors that require a gradient are the ones to
        replace; the others are constants.
    finish: Applied to the result, such as to remove the freedom of phase of eigenvectors.
    """

    args: tuple[Any, ...]
    kwargs: dict[str, Any]
    finish: Callable[[Any], Any] | None = None

    @property
    def tensors(self) -> list[Tensor]:
        """All tensors in the arguments."""
        return [t for t in tree_leaves((self.args, self.kwargs)) if isinstance(t, Tensor)]

    @property
    def sample(self) -> Sample:
        """The tensors to replace, followed by this arrangement."""
        return (*[t.detach() for t in self.tensors if t.requires_grad], self)

    def is_small(self, elements: int) -> bool:
        """Whether its tensors have at most so many elements, and one of them is to be replaced."""
        is_wanted = any(t.requires_grad for t in self.tensors)
        return is_wanted and sum(t.numel() for t in self.tensors) <= elements

    def apply(self, call: Callable[..., Any], tensors: tuple[Any, ...]) -> Any:
        """Call with these tensors in the places of those that require a gradient."""
        remaining: Iterator[Any] = iter(tensors)
        dtypes = [t.dtype for t in tensors if t.is_floating_point()]

        def replaced(value: Tensor) -> Any:
            if value.requires_grad:
                return next(remaining)
            # A copy of a constant, since some functions change running averages.
            dtype = dtypes[0] if dtypes and value.is_floating_point() else value.dtype
            return value.to(dtype, copy=True)

        args, kwargs = map_tensors(replaced, (self.args, self.kwargs))
        result = call(*args, **kwargs)
        return result if self.finish is None else self.finish(result)


def flat(call: Callable[..., Any]) -> Callable[..., Any]:
    """The call as one of tensors and their arrangement."""

    def arranged(*arguments: Any) -> Any:
        *tensors, arrangement = arguments
        return arrangement.apply(call, tuple(tensors))

    return arranged


class FlatModule(nn.Module):
    """A module that is called with tensors and their arrangement."""

    def __init__(self, inner: nn.Module) -> None:
        super().__init__()
        self.inner = inner

    def forward(self, *arguments: Any) -> Any:
        """What the inner module returns."""
        return flat(self.inner)(*arguments)
