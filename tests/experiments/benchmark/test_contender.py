from collections.abc import Iterator, Sequence
from dataclasses import replace

import pytest
import torch
from torch import Tensor

from experiments.benchmark.contender import (
    Contender,
    InexactError,
    Result,
    allowance,
    attempt,
    gather,
    is_installed,
    notes_of,
    spread,
)


def test_torch_is_installed_and_a_made_up_library_is_not() -> None:
    assert is_installed("torch")
    assert not is_installed("no_such_library")


@pytest.fixture
def precision() -> Iterator[str]:
    before = torch.get_float32_matmul_precision()
    yield before
    torch.set_float32_matmul_precision(before)


ROUNDED = [("highest", torch.float32), ("high", torch.float16), ("medium", torch.bfloat16)]


@pytest.mark.parametrize(("name", "dtype"), ROUNDED)  # float16 has as many digits as TF32
@pytest.mark.usefixtures("precision")
def test_allowance_follows_the_precision_of_products(name: str, dtype: torch.dtype) -> None:
    """Products of rounded factors pass; those with two digits fewer do not."""
    torch.set_float32_matmul_precision(name)
    w = torch.randn(4, 256, 256, dtype=torch.float64) / 16
    right = w[0] @ w[1] @ w[2] @ w[3]
    errors = []
    for factors in (w.to(dtype).double(), w * (1 + 100 * torch.finfo(dtype).eps)):
        found = factors[0] @ factors[1] @ factors[2] @ factors[3]
        errors.append(((found - right).abs().max() / right.abs().max()).item())
    assert errors[0] <= allowance(4, 256) < errors[1]


def judged(found: Tensor, right: Tensor) -> Contender:
    return Contender("one", results=lambda: [Result(found, right, 0.1)])


def test_a_result_within_its_allowance_passes() -> None:
    judged(torch.tensor([1.0, 2.05]), torch.tensor([1.0, 2.0])).check()


@pytest.mark.parametrize("value", [2.2, 1.8, torch.nan, torch.inf])
def test_a_result_beyond_its_allowance_is_inexact(value: float) -> None:
    wrong = judged(torch.tensor([1.0, value]), torch.tensor([1.0, 2.0]))
    with pytest.raises(
        InexactError, match=r"^inexact: off by (2\.0e-01|nan|inf), 1\.0e-01 allowed$"
    ):
        wrong.check()


@pytest.mark.parametrize("found", [torch.ones(1), torch.ones(2, dtype=torch.float64)])
def test_a_result_of_another_shape_or_dtype_is_refused(found: Tensor) -> None:
    with pytest.raises(TypeError, match="a result is torch"):
        judged(found, torch.ones(2)).check()


REASONS = [
    (ValueError("first\nsecond"), "ValueError: first"),
    (ValueError("a | b"), "ValueError: a / b"),  # a bar would end the cell of a table
    (MemoryError(), "out of memory"),
    (torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2 GiB"), "out of memory"),
    (RuntimeError("[enforce fail] DefaultCPUAllocator: can't allocate memory"), "out of memory"),
    (NotImplementedError("x " * 100), "NotImplementedError: " + "x " * 28 + "..."),
]


@pytest.mark.parametrize(("error", "note"), REASONS, ids=[note[:20] for _, note in REASONS])
def test_a_contender_that_raises_drops_out_and_the_others_go_on(
    error: Exception, note: str
) -> None:
    def do(contender: Contender) -> None:
        done.append(contender.name)
        if contender is contenders[1]:
            raise error

    contenders = [Contender(name) for name in "abc"]
    done: list[str] = []
    for _ in range(2):
        attempt(do, contenders)
    assert done == ["a", "b", "c", "a", "c"]
    assert [contender.note for contender in contenders] == ["", note, ""]


def test_an_interrupt_is_not_taken_for_a_failure() -> None:
    def do(_: Contender) -> None:
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        attempt(do, [Contender("one")])


def test_a_maker_that_raises_leaves_a_contender_with_a_note() -> None:
    def fails(_: str) -> Sequence[Contender]:
        raise RuntimeError("no")

    def works(task: str) -> Sequence[Contender]:
        return [Contender(task), Contender("other")]

    found = gather({"peer": fails, "works": works, "ours, too": fails}, "task")
    assert [contender.name for contender in found] == ["peer", "task", "other", "ours, too"]
    assert [contender.note for contender in found] == [
        "RuntimeError: no",
        "",
        "",
        "RuntimeError: no",
    ]
    assert [contender.is_ours for contender in found] == [False, False, False, True]


def test_a_row_has_cells_or_a_note() -> None:
    one = Contender("one")
    assert one.row({"a": "1"}, lambda c: {"b": c.name}) == {"a": "1", "b": "one"}
    assert notes_of([one]) == {}
    other = replace(one, name="other", note="out of memory")
    assert other.row({"a": "1"}, lambda c: {"b": c.name}) == {"a": "1", "note": "out of memory"}
    assert notes_of([one, other, other]) == {"note": "other: out of memory; other: out of memory"}


def test_ratios_are_taken_round_by_round() -> None:
    assert spread([1.0, 2.0, 3.0, 4.0, 5.0], 0) == ("3", "2 to 4")
    assert spread([2.0], 1) == ("2.0", "2.0 to 2.0")
    one, other = (
        Contender("one", seconds=[2.0, 9.0, 8.0]),
        Contender("other", seconds=[1.0, 3.0, 2.0]),
    )
    assert one.ratio(other) == ("3.000", "2.500 to 3.500")
    assert one.micros == 8e6


def test_there_is_no_ratio_to_a_contender_that_dropped_out() -> None:
    one, other = Contender("one", seconds=[2.0]), Contender("other", seconds=[1.0], note="no")
    assert one.ratio(other) == other.ratio(one) == ("", "")
