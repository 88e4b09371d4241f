import json
import re
from dataclasses import replace
from pathlib import Path

import pytest

from manual_bp.verify import Case, self_test
from manual_bp.verify.__main__ import main
from manual_bp.verify.mutants import MUTANTS, Mutant, Twin

CASES = """
from dataclasses import replace
import torch
from manual_bp.verify import function_case

def wrong(x):
    return x.detach() * x

samples = [(torch.randn(5, 3),)]
GOOD = function_case(torch.tanh, samples, torch.tanh)
BAD = function_case(wrong, samples, torch.square)
BOTH = [GOOD, BAD]
ELSEWHERE = replace(GOOD, device=torch.device("meta"))
MISNAMED = replace(GOOD, expected_failures={"vmpa": "a slip of the pen"})
NONE = []
NUMBER = 3
"""


@pytest.fixture
def module(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> str:
    name = f"cases_{tmp_path.name}"
    (tmp_path / f"{name}.py").write_text(CASES)
    (tmp_path / f"broken_{name}.py").write_text("1 / 0")
    (tmp_path / f"leaving_{name}.py").write_text("raise SystemExit(0)")
    monkeypatch.syspath_prepend(tmp_path)
    return name


def test_the_exit_code_tells_right_from_wrong(
    module: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main([f"{module}:GOOD", "--no-compiler"]) == 0
    assert "tanh on cpu in float64, seed 0" in capsys.readouterr().out
    assert main([f"{module}:BAD", "--check", "gradients_match_reference", "--seed", "5"]) == 1
    printed = capsys.readouterr().out
    assert "wrong on cpu in float64, seed 5" in printed
    assert "NOT OK: 1 checks ran (1 failed), 0 not applicable" in printed


def test_a_list_of_cases_is_printed_as_json(
    module: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main([f"{module}:BOTH", "--json", "--check", "finite_differences"]) == 1
    found = json.loads(capsys.readouterr().out)
    assert [report["ok"] for report in found] == [True, False]


def test_a_run_without_any_applicable_check_is_not_ok(module: str) -> None:
    assert main([f"{module}:GOOD", "--check", "pickle"]) == 1


def test_self_test_prints_its_figures_and_fails_for_a_missed_mistake(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Some mutants only; `test_self_test.py` judges all of them."""
    some = [MUTANTS[0], next(m for m in MUTANTS if m.caught_by == "compile")]
    monkeypatch.setattr(self_test, "MUTANTS", some)
    twin = Twin("right", "deterministic", self_test.pytorch_cases()[0], "")
    monkeypatch.setattr(self_test, "TWINS", [twin, twin])
    cases = self_test.pytorch_cases()[:2]
    monkeypatch.setattr(self_test, "pytorch_cases", lambda: cases)
    assert main(["--self-test", "--seeds", "2"]) == 0
    *_, mutants, twins, layers = capsys.readouterr().out.splitlines()
    assert mutants.startswith("2 mistakes: the kit caught 2, default gradcheck ")
    alarms = r"2 cases, 2 seeds, \d+ checks, 0 false alarms"
    assert re.fullmatch(f"Right twins: {alarms}", twins)
    assert re.fullmatch(f"PyTorch's own layers: {alarms}", layers)

    def fails(mutants: list[Mutant], twins: list[Twin], layers: list[Case]) -> str:
        monkeypatch.setattr(self_test, "MUTANTS", mutants)
        monkeypatch.setattr(self_test, "TWINS", twins)
        monkeypatch.setattr(self_test, "pytorch_cases", lambda: layers)
        assert main(["--self-test", "--seeds", "1"]) == 1
        return capsys.readouterr().out

    right, wrong = some[:1], some[0].case
    assert "MISSED" in fails([replace(some[0], caught_by="pickle")], [], [])
    assert fails(right, [], [wrong]).endswith(" 1 false alarms\n")
    for accused in (replace(twin, case=wrong), replace(twin, passed_by="pickle")):
        assert "Right twins: 1 cases, 1 seeds" in fails(right, [accused], [])


@pytest.mark.parametrize(
    ("arguments", "reason"),
    [
        ([], "give either package.module:Name of a Case or --self-test"),
        (["{}:GOOD", "--self-test"], "give either package.module:Name of a Case or"),
        (["{}"], "the case must be package.module:Name; got"),
        (["no_such_module:CASE"], "no_such_module cannot be imported: ModuleNotFoundError"),
        (["broken_{}:CASE"], "cannot be imported: ZeroDivisionError"),
        (["leaving_{}:CASE"], "cannot be imported: SystemExit"),
        (["{}:MISSING"], "has no MISSING"),
        (["{}:NUMBER"], "must be a Case (function_case, module_case) or a list of them; got int"),
        (["{}:NONE"], "must be a Case (function_case, module_case) or a list of them; got list"),
        (["{}:ELSEWHERE"], "tanh: device must be one that PyTorch can use here; got meta"),
        (["{}:MISNAMED"], "tanh: only and expected_failures must name checks of "),
        (["{}:GOOD", "--check", "vmpa"], "--check must be one of "),
        (["{}:GOOD", "--seed", "x"], "argument --seed: invalid int value: 'x'"),
        (["--self-test", "--seeds", "0"], "--seeds must be at least 1; got 0"),
        (["--colour"], "unrecognized arguments: --colour"),
    ],
)
def test_unusable_input_is_one_line(
    arguments: list[str], reason: str, module: str, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit) as stop:
        main([argument.format(module) for argument in arguments])
    assert stop.value.code == 2
    printed = capsys.readouterr().err
    assert printed.startswith("python -m manual_bp.verify: ")
    assert reason in printed
    assert printed.count("\n") == 1
