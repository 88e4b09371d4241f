"""What is wrong with some results, in the learner's terms."""

import re
from collections.abc import Iterator
from itertools import chain, permutations
from typing import Any

import torch
from torch import Tensor

from manual_bp.exercises._exercise import Exercise, Values, each, flat, is_one, together
from manual_bp.exercises._values import fitted, labels
from manual_bp.verify._budget import Budget, largest
from manual_bp.verify._diagnose import diagnose, diagnose_shape, is_like

UNKNOWN = (
    "not right, and like none of the mistakes that this course knows: work out the example below "
    "by hand"
)

# What is wrong where an error, as "Type: message", matches.
_HINTS = {
    r"only .*(scalar|one element)|(truth|Boolean) value of .* is ambiguous": (
        "what is for one number got an array: math.exp, float(...) and `if` take one number only; "
        "np.exp and np.where, or torch.exp and torch.where, take an array"
    ),
    r"'(numpy\.\w+|Tensor|float|int)' object is not callable": (
        "an array or a number is called like a function: is a * missing before the bracket?"
    ),
    r"name 'sigmoid' is not defined|module 'numpy' has no attribute 'sigmoid'": (
        "there is no such function: write σ yourself: 1 / (1 + np.exp(-z)), or with torch.exp"
    ),
    r"bitwise_xor|for \^: ": "^ is no power in Python: write a ** 2 for a²",
    "NotImplementedError$": "it calls a function that is still to do",
}

# Numerical gradients are this good, and sums in float32.
_RTOL = {torch.float32: 1e-4, torch.float16: 2e-2, torch.bfloat16: 5e-2}


def budget_for(got: Tensor, expected: Tensor) -> Budget:
    """How far a learner's result may be from the right one: far less than a mistake changes."""
    rtol = _RTOL.get(got.dtype, 1e-5)
    return Budget(rtol, rtol * largest(expected))


def is_right(got: Tensor, expected: Tensor) -> bool:
    """Whether a result is right, up to rounding."""
    got = fitted(got, expected)
    if got.shape != expected.shape:
        return False
    return not budget_for(got, expected).wrong(got.double(), expected).any()


def fields(values: Values, *, columns: bool) -> dict[str, Any]:
    """What a sentence may name."""
    w, wt = ("wᵀ", "w") if columns else ("w", "wᵀ")
    axes = {"over_samples": int(columns), "over_neurons": int(not columns)}
    sizes: dict[str, Any] = values.sizes
    return sizes | axes | {"w": w, "wt": wt}


def diagnosis(exercise: Exercise, values: Values, got: list[Tensor], expected: list[Tensor]) -> str:
    """The sentence for the mistake that some results look like, as a format of `fields`.

    A mistake that gives all results comes before one that gives only the first wrong one.
    """
    single = list(_known(exercise, values, is_single=True))
    several = _known(exercise, values, is_single=False)
    orders = _in_another_order(exercise, expected)
    for says, found in chain(single, orders, several, _with_another(exercise, values, single)):
        if _gives_all(got, found, expected):
            return says
    pairs = list(zip(got, expected, strict=True))
    first = next(i for i, pair in enumerate(pairs) if not is_right(*pair))
    known = [*single, *_known(exercise, values, is_single=False)]
    clues = [(says, found[first]) for says, found in known if len(found) == len(got)]
    text = _of_one(*pairs[first], clues, list(values.sizes.values()))
    names = labels(exercise)
    if not text or len(names) == 1 or text in [says for says, _ in clues]:
        return text
    return f"{names[first]}: {text}"


def hint(error: BaseException) -> str:
    """What is wrong where a function raised this error; empty if nothing is known of it."""
    text = f"{type(error).__name__}: {error}".removesuffix(": ")
    return next((says for pattern, says in _HINTS.items() if re.search(pattern, text)), "")


def words(says: str) -> str:
    """A sentence without its numbers."""
    return re.sub(r"-?\d+(\.\d+)?(e-?\d+)?", "#", says)


def _known(
    exercise: Exercise, values: Values, *, is_single: bool
) -> Iterator[tuple[str, list[Tensor]]]:
    """What each mistake would give, if these sizes allow it; far out, if it is right nearby."""
    for mistake in exercise.mistakes:
        if is_one(mistake.says) != is_single:
            continue
        try:
            found = flat(mistake.gives(values))
        except (RuntimeError, IndexError):
            continue
        if values.nearby is None or all(
            map(is_right, flat(mistake.gives(values.nearby)), flat(values.nearby.right))
        ):
            yield mistake.says, found


def _in_another_order(
    exercise: Exercise, expected: list[Tensor]
) -> Iterator[tuple[str, list[Tensor]]]:
    rest = iter(expected)
    parts = {name: [next(rest) for _ in each(spec)] for name, spec in exercise.results.items()}
    wanted = ", ".join(parts)
    for order in permutations(parts):
        if order != tuple(parts):
            says = f"the results are swapped: the order asked for is ({wanted})"
            yield says, [t for name in order for t in parts[name]]
    if any(len(part) > 1 for part in parts.values()):
        says = "the lists are in the reverse order: that of the first layer comes first"
        yield says, [t for part in parts.values() for t in reversed(part)]


def _with_another(
    exercise: Exercise, values: Values, known: list[tuple[str, list[Tensor]]]
) -> Iterator[tuple[str, list[Tensor]]]:
    """Each known mistake together with a wrong order or a wrong factor."""
    extra = "there is an extra factor of"
    factors = {"the sign is wrong": -1.0, f"{extra} 2": 2.0, f"{extra} ½": 0.5}
    if "N" in values.sizes:
        n = values.sizes["N"]
        factors |= {f"{extra} N = {{N}}": n, f"{extra} 1/N = 1/{{N}}": 1 / n}
    for says, found in known:
        for besides, factor in factors.items():
            yield together([says, besides]), [factor * t for t in found]
        if len(found) == len(labels(exercise)):
            for besides, moved in _in_another_order(exercise, found):
                yield together([says, besides]), moved


def _gives_all(got: list[Tensor], found: list[Tensor], expected: list[Tensor]) -> bool:
    """Whether a mistake gives all results, those that it leaves right included."""
    if len(found) != len(got):
        return False
    return all(
        _is_like(g, f, e) or (is_right(g, e) and is_right(f, e))
        for g, f, e in zip(got, found, expected, strict=True)
    )


def _is_like(got: Tensor, found: Tensor, expected: Tensor) -> bool:
    budget = budget_for(got, expected)
    return is_like(fitted(got, found).double(), found, fitted(expected, found), budget)


def _of_one(
    got: Tensor, expected: Tensor, clues: list[tuple[str, Tensor]], sizes: list[int]
) -> str:
    for says, found in clues:
        if _is_like(got, found, expected):
            return says
    got = fitted(got, expected)
    budget = budget_for(got, expected)
    got = got.double()
    if got.shape == expected.shape:
        wrong = budget.wrong(got, expected)
        return _escaped(diagnose(got, expected, wrong, tuple, sizes, budget))
    why = diagnose_shape(got, expected) or _lost(got, expected)
    return f"the shape is wrong: {why}" if why else "the shape is wrong"


def _lost(got: Tensor, expected: Tensor) -> str:
    """What a shape with too few dimensions looks like."""
    if got.numel() == 1:
        return "is everything summed or averaged to one number?"
    is_part = any(
        got.shape == expected.shape[:dim] + expected.shape[dim + 1 :]
        for dim in range(expected.ndim)
    )
    return "is there one sum or mean too many?" if is_part else ""


def _escaped(text: str) -> str:
    return text.replace("{", "{{").replace("}", "}}")
