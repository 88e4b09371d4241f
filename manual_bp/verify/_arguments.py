"""Nested arguments as the flat ones that checks see, and their names in messages."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from torch import Tensor

from manual_bp._torch import flatten_tree, tree_leaves, tree_paths, unflatten_tree
from manual_bp.verify._case import Call, Sample


@dataclass(frozen=True)
class Structure:
    """How the arguments of a case are nested in lists, tuples, dicts and registered classes.

    spec: PyTorch's description of it; None if no argument is nested.
    paths: For each leaf, the position of its argument and where in that it is, such as `['h']`.
    """

    spec: Any = None
    paths: tuple[tuple[int, str], ...] = ()

    def flatten(self, sample: Sample) -> Sample:
        """The leaves of a sample. Raises a ValueError if it is nested in another way."""
        if self.spec is None:
            return sample
        flat, spec = flatten_tree(sample)
        if spec != self.spec:
            raise ValueError(
                f"samples with nested arguments must all be nested alike; got {self.spec} and "
                f"{spec}"
            )
        return tuple(flat)

    def unflatten(self, arguments: Sample) -> Sample:
        """A sample from its leaves."""
        if self.spec is None:
            return arguments
        rebuilt: Sample = unflatten_tree(arguments, self.spec)
        return rebuilt

    def call(self, fn: Call) -> Call:
        """A function of the leaves."""
        if self.spec is None:
            return fn
        return lambda *arguments: fn(*self.unflatten(arguments))

    def labels(self, names: Sequence[str]) -> tuple[str, ...]:
        """The names of the leaves, from those of the arguments, as far as there are any."""
        if self.spec is None:
            return tuple(names)
        return tuple(
            (names[i] if i < len(names) else f"argument {i}") + path for i, path in self.paths
        )

    def owners(self, count: int) -> list[int]:
        """The position of the argument in which each of the first tensors is."""
        nested = [i for i, _ in self.paths]
        following = nested[-1] + 1 if nested else 0
        return nested + list(range(following, following + count - len(nested)))


def structure_of(samples: Sequence[Sample]) -> Structure:
    """The structure that all samples have. Raises a TypeError for arguments in other classes."""
    for sample in samples:
        for leaf in tree_leaves(sample):
            if name := hides_tensors(leaf):
                raise TypeError(
                    f"samples must hold tensors in lists, tuples, dicts or classes registered as "
                    f"pytrees, since only those are judged; got some in a {name}"
                )
    nested = [s for s in samples if [path for _, path in tree_paths(s)] != [""] * len(s)]
    if not nested:
        return Structure()
    _, spec = flatten_tree(nested[0])
    structure = Structure(spec, tuple(tree_paths(nested[0])))
    for sample in samples:
        structure.flatten(sample)
    return structure


def hides_tensors(value: object) -> str:
    """The name of the class, if it holds tensors where PyTorch does not look for them."""
    if isinstance(value, Tensor | type):
        return ""
    names = [*getattr(value, "__dict__", ()), *getattr(type(value), "__slots__", ())]
    holds = any(isinstance(getattr(value, str(name), None), Tensor) for name in names)
    return type(value).__name__ if holds else ""


def per_leaf(name: str, entries: Any, sample: Sample) -> tuple[Any, ...]:
    """An entry for every leaf of a sample, from one for each argument.

    It may be nested as the argument is; if not, it holds for the whole argument.
    """
    if not isinstance(entries, tuple) or len(entries) != len(sample):
        raise ValueError(
            f"{name} must be a tuple with an entry for each argument, {len(sample)} in all; "
            f"got {entries}"
        )
    return tuple(
        entry
        for i, (value, of_value) in enumerate(zip(sample, entries, strict=True))
        for entry in _spread(f"{name}[{i}]", of_value, value)
    )


def dims_of(name: str, dims: Any, samples: Sequence[Sample]) -> Any:
    """A dimension or None for each tensor in a sample. Some sample must have all of them."""
    if dims is None:
        return None
    found = per_leaf(name, dims, samples[0])
    if not all(d is None or isinstance(d, int) for d in found):
        raise ValueError(f"{name} must have a dimension or None for each argument; got {dims}")
    missing = [
        [
            (d, tuple(leaf.shape))
            for d, leaf in zip(found, tree_leaves(sample), strict=True)
            if isinstance(leaf, Tensor) and d is not None and not -leaf.ndim <= d < leaf.ndim
        ]
        for sample in samples
    ]
    if all(missing):
        d, shape = missing[0][0]
        raise ValueError(
            f"{name} must have dimensions of the arguments; got {d} for a tensor of shape {shape}"
        )
    first = zip(found, tree_leaves(samples[0]), strict=True)
    return tuple(d if isinstance(leaf, Tensor) else None for d, leaf in first)


def _spread(name: str, entry: Any, value: Any) -> list[Any]:
    if not isinstance(entry, list | tuple | Mapping):
        return [entry] * len(tree_leaves(value))
    pairs: list[tuple[Any, Any]] | None = None
    if isinstance(value, Mapping) and isinstance(entry, Mapping) and value.keys() == entry.keys():
        pairs = [(entry[key], part) for key, part in value.items()]
    elif type(value) is type(entry) and isinstance(value, list | tuple):
        pairs = list(zip(entry, value, strict=True)) if len(value) == len(entry) else None
    if pairs is None:
        raise ValueError(f"{name} must be one entry, or nested as its argument; got {entry!r}")
    return [leaf for of_part, part in pairs for leaf in _spread(name, of_part, part)]
