"""Wrong Functions get the diagnosis that fits; where nothing fits, they get none."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Generator, Tensor
from torch.autograd import Function

from manual_bp.verify import Report, check_function
from manual_bp.verify._budget import exact_budget
from manual_bp.verify._diagnose import is_like

Shapes = tuple[tuple[int, ...], ...]
EPS = 1e-5


def function(forward: Callable[..., Any], backward: Callable[..., Any]) -> type[Function]:
    """A Function with this forward and this backward, of the upstream gradients and arguments."""

    class Wrong(Function):
        @staticmethod
        def forward(ctx: Any, *arguments: Tensor) -> Any:
            ctx.save_for_backward(*arguments)
            return forward(*arguments)

        @staticmethod
        def backward(ctx: Any, *upstream: Tensor) -> Any:
            return backward(*upstream, *ctx.saved_tensors)

    return Wrong


def judged(
    shapes: Shapes,
    forward: Callable[..., Any],
    backward: Callable[..., Any],
    *,
    reference: bool = True,
    **options: Any,
) -> Report:
    def draw(g: Generator) -> list[tuple[Tensor, ...]]:
        return [tuple(torch.randn(*shape, generator=g) for shape in shapes)]

    only = options.pop("only", ["gradients_match_reference" if reference else "finite_differences"])
    wrong = function(forward, backward)
    return check_function(wrong, draw, forward if reference else None, only=only, **options)


def diagnosis(*arguments: Any, **options: Any) -> str:
    report = judged(*arguments, **options)
    assert not report.ok
    return report.failures[0].diagnosis


def product(x: Tensor, y: Tensor) -> Tensor:
    return x * y


def scaled(x: Tensor, s: Tensor) -> Tensor:
    return x * s


def permuted(x: Tensor) -> Tensor:
    return x.sin()


def normed(x: Tensor) -> Tensor:
    return x - x.mean(-1, keepdim=True)


def standard(x: Tensor, eps: float = EPS) -> Tensor:
    return (x.square().mean(-1, keepdim=True) + eps).rsqrt()


def rms(x: Tensor) -> Tensor:
    return x * standard(x)


def rms_backward(g: Tensor, x: Tensor, factor: Tensor) -> Tensor:
    return factor * (g - x * factor**2 * (g * x).mean(-1, keepdim=True))


def variance(x: Tensor) -> Tensor:
    return x.var(-1, unbiased=False)


def two(x: Tensor) -> tuple[Tensor, Tensor]:
    return x.sin(), x.exp()


def masked(x: Tensor) -> Tensor:
    return torch.where(x.abs() < 1, x.square(), 0.0)


def clamped(x: Tensor) -> Tensor:
    return x.clamp(-1, 1)


def constant_slope(x: Tensor) -> Tensor:
    return 3 * x


def remainder_wrong(g: Tensor, x: Tensor) -> Tensor:
    slope = g * x.cos()
    slope[16:] = x[16:]
    return slope


def remainder_not_added(g: Tensor, x: Tensor, s: Tensor) -> tuple[Tensor, Tensor]:
    return g * s, (g * x)[:16].sum(0)


def sign_of_one(g: Tensor, x: Tensor) -> Tensor:
    return (g * x.cos()).abs()


def nan_in_one(g: Tensor, x: Tensor) -> Tensor:
    slope = g * x.cos()
    slope[0] = (slope[0] - slope[0]) / 0
    return slope


PAIR, ROWS, ONE, CUBE, SCALE = (
    ((5, 3), (5, 3)),
    ((20, 3),),
    ((5, 3),),
    ((3, 3, 3),),
    ((5, 3), (3,)),
)
WRONG: dict[str, tuple[Any, ...]] = {
    "two gradients are swapped": (PAIR, product, lambda g, x, y: (g * x, g * y)),
    "-1 times the right one: a sign error": (PAIR, product, lambda g, x, y: (g * y, -g * x)),
    "the upstream gradient is ignored, as if it were 1": (ONE, torch.sin, lambda _, x: x.cos()),
    "the upstream gradient is applied twice": (ONE, torch.sin, lambda g, x: g * g * x.cos()),
    "only the first element of the upstream gradient is used, for all": (
        ONE,
        torch.sin,
        lambda g, x: g[0, 0] * x.cos(),
    ),
    "scaled by the first element of the upstream gradient": (
        ONE,
        torch.sin,
        lambda g, x: g[0, 0] * g * x.cos(),
    ),
    "not linear in the upstream gradient": (
        ONE,
        torch.sin,
        lambda g, x: g.clamp(-1, 1) * x.cos(),
    ),
    "only the first row of the batch counts": (
        SCALE,
        scaled,
        lambda g, x, s: (g * s, (g * x)[0]),
    ),
    "only the last row of the batch counts": (
        SCALE,
        scaled,
        lambda g, x, s: (g * s, (g * x)[-1]),
    ),
    "1/5 of the right one: a mean over 5": (
        SCALE,
        scaled,
        lambda g, x, s: (g * s, (g * x).mean(0)),
    ),
    "the rows from 16 on do not count: the remainder of a block of 16": (
        ((20, 3), (3,)),
        scaled,
        remainder_not_added,
    ),
    "right before row 16, wrong from there on": (ROWS, torch.sin, remainder_wrong),
    "what output 1 contributes is missing": (ONE, two, lambda g, _, x: g * x.cos()),
    "with its dimensions in the order (1, 0, 2)": (
        CUBE,
        torch.sin,
        lambda g, x: (g * x.cos()).permute(1, 0, 2),
    ),
    "equal to the transpose": (((4, 4),), torch.sin, lambda g, x: (g * x.cos()).mT),
    "the transpose, reshaped": (ONE, torch.sin, lambda g, x: (g * x.cos()).mT.reshape(5, 3)),
    "reversed along dimension 1": (ONE, torch.sin, lambda g, x: (g * x.cos()).flip(1)),
    "shifted by one along dimension 0": (ONE, torch.sin, lambda g, x: (g * x.cos()).roll(1, 0)),
    "the same for every row: that of the first one is used for all": (
        ONE,
        torch.sin,
        lambda g, x: (g * x.cos())[:1].expand(5, 3),
    ),
    "the same for every index of dimension 1: summed over dimension 1": (
        ONE,
        torch.sin,
        lambda g, x: (g * x.cos()).sum(1, keepdim=True).expand(5, 3),
    ),
    "were transposed: a transpose is missing or too much": (
        ((5, 3), (3, 3)),
        torch.matmul,
        lambda g, x, y: (g @ y, x.mT @ g),
    ),
    "a factor of its own for each row": (
        ONE,
        rms,
        lambda g, x: rms_backward(g, x, standard(x)) / standard(x),
    ),
    "a factor of its own for each index of dimension 1": (
        SCALE,
        scaled,
        lambda g, x, _: (g, (g * x).sum(0)),
    ),
    "off by the same amount along dimension 1": (ONE, normed, lambda g, _: g),
    "0.01 too much everywhere": (ONE, torch.sin, lambda g, x: g * x.cos() + 0.01),
    "right to about 3 digits: a wrong digit in a constant, an eps in the wrong place": (
        ONE,
        rms,
        lambda g, x: rms_backward(g, x, 1 / (x.square().mean(-1, keepdim=True).sqrt() + EPS * 9)),
    ),
    "times the right one, everywhere: a division by 3 where 2 belongs": (
        ONE,
        variance,
        lambda g, x: g[:, None] * 2 * normed(x) / 2,
    ),
    "2 times the right one, everywhere: a factor 2 too much": (
        ONE,
        torch.sin,
        lambda g, x: 2 * g * x.cos(),
    ),
    "0.5 times the right one, everywhere: a factor 2 is missing": (
        ONE,
        torch.square,
        lambda g, x: g * x,
    ),
    "not zero where it should be: a mask or a threshold is missed": (ONE, clamped, lambda g, _: g),
    "zero where it should not be": (ONE, torch.sin, lambda g, x: g * x.cos() * (x > 0)),
    "of 15 elements is wrong": (ONE, torch.sin, sign_of_one),
    "nan where the right one is finite": (ONE, torch.sin, nan_in_one),
    "zero everywhere": (ONE, torch.sin, lambda g, _: 0 * g),
    "right to float32 precision only": (
        ONE,
        torch.sin,
        lambda g, x: (g.float() * x.float().cos()).double(),
    ),
    "1 +1e-06 times the right one, everywhere: a digit of a constant": (
        ONE,
        torch.sin,
        lambda g, x: (1 + 1e-6) * g * x.cos(),
    ),
}


@pytest.mark.parametrize("expected", WRONG)
def test_a_wrong_function_gets_the_diagnosis_that_fits(expected: str) -> None:
    assert expected in diagnosis(*WRONG[expected])


# What finite differences cannot see: the last two are smaller than their error.
UNSEEN = ("nan where", "float32 precision", "1 +1e-06 times")
SEEN = [name for name in WRONG if not any(words in name for words in UNSEEN)]


@pytest.mark.parametrize("expected", SEEN)
def test_finite_differences_give_the_same_diagnosis(expected: str) -> None:
    assert expected in diagnosis(*WRONG[expected], reference=False)


LOW: dict[str, tuple[Any, ...]] = {
    name: WRONG[name]
    for name in (
        "two gradients are swapped",
        "-1 times the right one: a sign error",
        "the upstream gradient is ignored, as if it were 1",
        "only the first row of the batch counts",
        "1/5 of the right one: a mean over 5",
        "the rows from 16 on do not count: the remainder of a block of 16",
        "equal to the transpose",
        "2 times the right one, everywhere: a factor 2 too much",
        "zero where it should not be",
    )
}


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("expected", LOW)
def test_a_low_precision_leaves_the_diagnosis_as_it_is(expected: str, dtype: torch.dtype) -> None:
    assert expected in diagnosis(*LOW[expected], dtypes=[dtype])


def unlike_any(g: Tensor, x: Tensor) -> Tensor:
    return g * x.cos() + x.exp()


def nearly_right(g: Tensor, x: Tensor) -> Tensor:
    return g * x.cos() * (1 + 0.1 * torch.linspace(-1, 1, x.numel(), dtype=x.dtype).view_as(x))


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16])
@pytest.mark.parametrize("backward", [unlike_any, nearly_right])
@pytest.mark.parametrize("seed", range(3))
def test_a_mistake_that_is_like_none_gets_no_diagnosis(
    backward: Any, dtype: torch.dtype, seed: int
) -> None:
    assert diagnosis(ONE, torch.sin, backward, dtypes=[dtype], seed=seed) in (
        "",
        "not linear in the upstream gradient",
    )


def test_a_known_mistake_is_recognized_in_another_shape_and_where_it_is_infinite() -> None:
    right = torch.tensor([0.5, 2.0], dtype=torch.float64)
    budget = exact_budget(right)
    total = right.sum()
    assert is_like(total, total.clone(), right, budget)
    assert not is_like(total, 2 * total, right, budget)
    assert not is_like(total, right, right, budget)
    overflown = torch.tensor([0.5, torch.inf], dtype=torch.float64)
    assert is_like(overflown, overflown.clone(), right, budget)
    assert not is_like(overflown, right, right, budget)
