"""Warnings of the code under test count; PyTorch's warnings about its own code do not."""

import json
import subprocess
import sys
import warnings
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.autograd import Function

from manual_bp.verify import (
    Report,
    check_function,
    check_module,
    function_case,
    parametrize_with_checks,
)

ROOT = Path(__file__).parents[2]
SAMPLES = [(torch.randn(5, 3, dtype=torch.float64),)]


class Square(Function):
    """x ⊙ x, from which the Functions that warn inherit."""

    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        ctx.save_for_backward(x)
        return x * x

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> Any:
        (x,) = ctx.saved_tensors
        return 2 * x * grad


def checked(fn: Any, action: Any = "error") -> Report:
    with warnings.catch_warnings(action=action):
        return check_function(fn, SAMPLES, torch.square, slow=False)


def pytorch_call(source: str) -> Any:
    """`call` of a module that PyTorch might add one day."""
    names: dict[str, Any] = {"__name__": "torch.one_day"}
    file = Path(torch.__file__).parent / "one_day.py"
    exec(compile(f"import torch, typing_extensions, warnings\n{source}", str(file), "exec"), names)
    return names["call"]


CLASSES = ["DeprecationWarning", "FutureWarning", "UserWarning", "torch.jit.TracerWarning"]
OWN = [
    *[f"def call():\n    warnings.warn('x', {name})" for name in CLASSES],
    "def old():\n    warnings.warn('x', FutureWarning, stacklevel=2)\ndef call():\n    old()",
    "@typing_extensions.deprecated('x')\ndef old():\n    pass\ndef call():\n    old()",
    "@typing_extensions.deprecated('x', category=FutureWarning)\ndef old():\n    pass\n"
    "def call():\n    old()",
]


@pytest.mark.parametrize("source", OWN)
@pytest.mark.parametrize("action", ["error", "always"])
def test_pytorchs_own_warnings_are_dropped(source: str, action: str) -> None:
    call = pytorch_call(source)

    class Calls(Square):
        @staticmethod
        def backward(ctx: Any, grad: Tensor) -> Any:
            call()
            return Square.backward(ctx, grad)

    with warnings.catch_warnings(record=True) as caught:
        report = checked(Calls, action)
    assert report.ok, report
    assert not caught


def test_warnings_of_pytorch_caused_by_the_kit_are_dropped(monkeypatch: pytest.MonkeyPatch) -> None:
    """With stacklevel=2 a warning of PyTorch names its caller, which is the kit."""
    stack = torch.stack
    call = pytorch_call("def call():\n    warnings.warn('x', FutureWarning, stacklevel=3)")

    def deprecated(*arguments: Any) -> Tensor:
        call()
        return stack(*arguments)

    monkeypatch.setattr(torch, "stack", deprecated)
    report = checked(Square)
    assert report.ok, report


def test_a_deprecated_call_in_the_code_under_test_counts() -> None:
    call = pytorch_call("def call():\n    warnings.warn('x', FutureWarning, stacklevel=2)")
    report = checked(lambda x: call() or x * x)
    assert "FutureWarning: x" in report.failures[0].message


class WarnsInForward(Square):
    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        warnings.warn("a slow path", stacklevel=1)
        return Square.forward(ctx, x)


class NamesItsCaller(Square):
    """As ruff and flake8 demand. The caller is PyTorch."""

    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        warnings.warn("a slow path", stacklevel=2)
        return Square.forward(ctx, x)


class WarnsInBackward(Square):
    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> Any:
        warnings.warn("a slow path", stacklevel=2)
        return Square.backward(ctx, grad)


WARNING = [WarnsInForward, NamesItsCaller, WarnsInBackward]


@pytest.mark.parametrize("candidate", WARNING)
def test_a_warning_is_a_failure_if_the_filters_make_it_an_error(candidate: Any) -> None:
    report = checked(candidate)
    assert not report.ok
    (message,) = [o.message for o in report.failures if o.check == "gradients_match_reference"]
    assert message.startswith(
        "raised a warning that the current filters turn into an error: UserWarning: a slow path"
    )
    assert not any("two calls" in outcome.message for outcome in report.outcomes)


@pytest.mark.parametrize("candidate", WARNING)
def test_a_warning_is_shown_once(candidate: Any) -> None:
    with pytest.warns(UserWarning, match="a slow path") as caught:
        report = checked(candidate, "always")
    assert report.ok, report
    assert len(caught) == 1


@pytest.mark.parametrize("candidate", WARNING)
def test_a_warning_fails_a_test_made_for_a_case(candidate: Any) -> None:
    tests = parametrize_with_checks([function_case(candidate, SAMPLES, torch.square)]).args[1]
    (test,) = (t.values[0] for t in tests if t.id.endswith("-gradients_match_reference"))
    with warnings.catch_warnings(action="error"), pytest.raises(pytest.fail.Exception) as failed:
        test()
    assert "UserWarning: a slow path" in str(failed.value)


def test_a_warning_is_ignored_if_the_filters_say_so() -> None:
    with warnings.catch_warnings(record=True) as caught:
        assert checked(WarnsInForward, "ignore").ok
    assert not caught
    with warnings.catch_warnings(action="error"):
        warnings.filterwarnings("ignore", module=f"{__name__}$")
        assert check_function(WarnsInForward, SAMPLES, torch.square, slow=False).ok


def test_a_warning_of_a_module_that_names_its_caller_counts() -> None:
    class Warns(nn.Linear):
        def forward(self, input: Tensor) -> Tensor:  # noqa: A002
            warnings.warn("a slow path", stacklevel=2)
            return super().forward(input)

    def judged() -> Report:
        return check_module(lambda: Warns(3, 4), SAMPLES, lambda: nn.Linear(3, 4), slow=False)

    assert "UserWarning: a slow path" in judged().failures[0].message
    with pytest.warns(UserWarning, match="a slow path"):
        assert judged().ok


def test_the_filters_are_restored() -> None:
    filters, show = list(warnings.filters), warnings.showwarning
    checked(WarnsInForward)
    assert (list(warnings.filters), warnings.showwarning) == (filters, show)


CASES = """
import warnings
import torch
from torch.autograd import Function
from manual_bp.verify import function_case

class Cube(Function):
    generate_vmap_rule = True

    @staticmethod
    def forward(x):
        return x ** 3

    @staticmethod
    def setup_context(ctx, inputs, output):
        ctx.save_for_backward(*inputs)
        ctx.save_for_forward(*inputs)

    @staticmethod
    def backward(ctx, grad):
        return 3 * ctx.saved_tensors[0] ** 2 * grad

    @staticmethod
    def jvp(ctx, tangent):
        return 3 * ctx.saved_tensors[0] ** 2 * tangent

class Warns(Cube):
    @staticmethod
    def backward(ctx, grad):
        warnings.warn("a slow path", stacklevel=2)
        return Cube.backward(ctx, grad)

def samples(g):
    return [(torch.randn(5, 3, generator=g),)]

LATE = ["forward_ad", "forward_over_reverse", "vmap", "per_sample_gradients", "autocast"]
CASES = [
    function_case(torch.tanh, samples, torch.tanh, in_dims=(0,), supports=[*LATE, "compile"]),
    function_case(Cube, samples, lambda x: x ** 3, in_dims=(0,), supports=LATE),
    function_case(Warns, samples, lambda x: x ** 3, in_dims=(0,)),
]
"""


def test_the_command_in_a_new_process_with_warnings_as_errors(tmp_path: Path) -> None:
    """There PyTorch loads some modules for the first time, and warns."""
    late = ["forward_ad", "forward_over_reverse", "vmap", "per_sample_gradients", "autocast"]
    checks = [f"--check={name}" for name in ("finite_differences", *late, "compile")]
    (tmp_path / "cases.py").write_text(CASES)
    command = [sys.executable, "-W", "error", "-m", "manual_bp.verify", "cases:CASES", "--json"]
    command += checks
    done = subprocess.run(
        command,
        cwd=tmp_path,
        env={"PYTHONPATH": str(ROOT), "PATH": "/usr/bin:/bin", "OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        check=False,
    )
    *right, warns = json.loads(done.stdout)
    assert [report["ok"] for report in right] == [True] * 2, done.stdout
    assert not warns["ok"]
    assert any("UserWarning: a slow path" in o["message"] for o in warns["outcomes"])
    assert not done.stderr
