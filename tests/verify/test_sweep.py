"""PyTorch's own functions and modules, judged against themselves, raise no alarm.

The command `--self-test --sweep` judges all of them. Here each seed takes every 36th case, from the
one of its own number on, so all kinds of functions are covered.
"""

import importlib
from collections import Counter
from functools import partial
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from manual_bp import _torch
from manual_bp.verify import Case, function_case, sweep
from manual_bp.verify.__main__ import main
from manual_bp.verify.checks import CHECKS
from manual_bp.verify.sweep._arranged import Arrangement, FlatModule, flat
from manual_bp.verify.sweep._exceptions import KNOWN, SKIPPED, UNBATCHED
from manual_bp.verify.sweep._own import own_cases
from manual_bp.verify.sweep._pytorch import is_judged, name_of

EVERY = 36


@pytest.mark.parametrize("seed", [7, 17])
def test_no_alarm_on_pytorchs_functions(seed: int) -> None:
    reports = list(sweep.judge(sweep.sweep_cases(seed, EVERY)))
    assert not [alarm for report in reports for alarm in sweep.alarms_of(report)]
    groups = Counter(sweep.group_of(report.case) for report in reports)
    assert {"torch", "nn.functional", "nn", "linalg"} <= groups.keys()
    assert sum(report.ran for report in reports) > 10 * len(reports)


def test_several_hundred_names_are_judged_and_every_exception_is_one() -> None:
    operators, modules = _torch.own_test_samples()
    judged = [name_of(operator) for operator in operators if is_judged(operator)]
    judged += [module.name for module in modules if module.name not in SKIPPED]
    judged += [make().name for make in own_cases(0)]
    assert max(Counter(judged).values()) == 1
    assert len(judged) > 600
    every = {*map(name_of, operators), *(module.name for module in modules)}
    # An earlier PyTorch has no samples of some.
    if tuple(map(int, torch.__version__.split(".")[:2])) >= (2, 13):
        assert {*KNOWN, *UNBATCHED} <= set(judged)
        assert every >= SKIPPED.keys()
    for failures in KNOWN.values():
        assert failures.keys() <= {check.name for check in CHECKS}


def test_as_many_seeds_as_parts_take_every_case(monkeypatch: pytest.MonkeyPatch) -> None:
    def named(name: str) -> Case:
        return function_case(torch.tanh, [(torch.ones(2),)], name=name)

    def makers(_: int) -> list[Any]:
        return [*(partial(named, name) for name in "abcdefg"), lambda: None]

    monkeypatch.setattr(sweep, "own_cases", makers)
    monkeypatch.setattr(sweep, "pytorch_cases", lambda _: [partial(named, "h")])
    taken = ["".join(case.name for case in sweep.sweep_cases(seed, 3)) for seed in (4, 5, 6)]
    assert sorted("".join(taken)) == list("abcdefgh")
    assert min(map(len, taken)) >= 2
    assert "".join(case.name for case in sweep.sweep_cases()) == "habcdefg"


def test_a_wrong_function_is_an_alarm(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def wrong(x: Tensor) -> Tensor:
        return x.detach() * x

    case = function_case(wrong, [(torch.randn(5, 3),)], wrong, name="fft.wrong")
    monkeypatch.setattr(sweep, "sweep_cases", lambda _: [case])
    assert main(["--self-test", "--sweep", "--seeds", "2"]) == 1
    printed = capsys.readouterr().out
    assert "fft.wrong, seed 0, finite_differences" in printed
    assert "2 seeds" in printed


def test_constants_follow_the_dtype_and_are_not_changed() -> None:
    x, mean = torch.randn(5, 3, requires_grad=True), torch.zeros(3)
    arrangement = Arrangement((x,), {"running": [mean, None], "dim": 1})

    def call(x: Tensor, running: list[Tensor], dim: int) -> Tensor:
        running[0].add_(1)
        return x.sum(dim) + running[0].dtype.itemsize

    *tensors, last = arrangement.sample
    assert last is arrangement
    assert [t.requires_grad for t in tensors] == [False]
    assert torch.equal(flat(call)(x.double(), arrangement), x.double().sum(1) + 8)
    assert not mean.any()
    module = FlatModule(nn.Linear(3, 2))
    plain = Arrangement((x,), {})
    assert torch.equal(module(x, plain), module.inner(x))


def test_a_missing_package_is_named(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def missing(name: str) -> Any:
        raise ModuleNotFoundError(f"No module named 'expecttest', for {name}", name="expecttest")

    monkeypatch.setattr(importlib, "import_module", missing)
    with pytest.raises(SystemExit) as left:
        main(["--self-test", "--sweep"])
    assert left.value.code == 2
    assert "expecttest must be installed" in capsys.readouterr().err


def test_without_pytorchs_test_samples_the_sweep_refuses(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(_torch, "_testing", lambda _: None)
    with pytest.raises(RuntimeError, match="torch must have the private name op_db"):
        list(sweep.sweep_cases())


def test_sweep_is_a_part_of_the_self_test(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        main(["package.module:Name", "--sweep"])
    assert "--sweep is a part of --self-test" in capsys.readouterr().err
