"""The decorator, in a separate run of pytest."""

import subprocess
import sys
from pathlib import Path

import pytest
import torch
from torch import Tensor

from manual_bp.verify import function_case, parametrize_with_checks

TESTS = """
import warnings
import torch
from manual_bp.verify import function_case, parametrize_with_checks

def wrong(x):
    return x.detach() * x

def warns(x):
    warnings.warn("slow", stacklevel=1)
    return torch.tanh(x)

samples = [(torch.randn(5, 3),)]
CASES = [
    function_case(torch.tanh, samples, torch.tanh, name="good"),
    function_case(wrong, samples, torch.square, name="bad"),
    function_case(wrong, samples, torch.square, name="known",
                  expected_failures={"gradients_match_reference": "half of it is missing"}),
    function_case(torch.tanh, [(torch.ones(0, 3),)], torch.tanh, name="blind"),
    function_case(warns, samples, torch.tanh, name="warns"),
    function_case(torch.tanh, samples, torch.tanh, name="there", device="cuda"),
]

@parametrize_with_checks(CASES, slow=False)
def test_layers(check):
    check()
"""


@pytest.fixture(scope="module")
def output(tmp_path_factory: pytest.TempPathFactory) -> str:
    """The output of pytest with warnings turned into errors."""
    folder = tmp_path_factory.mktemp("layers")
    (folder / "test_layers.py").write_text(TESTS)
    (folder / "pytest.ini").write_text("[pytest]\nfilterwarnings = error\n")
    chosen = "gradients_match_reference or forward_ad or compile or good-vmap or blind-informative"
    command = [sys.executable, "-m", "pytest", "-p", "no:cacheprovider", "-rA", "-k", chosen]
    done = subprocess.run(
        [*command, "test_layers.py"],
        cwd=folder,
        env={"PYTHONPATH": str(Path(__file__).parents[2]), "PATH": "/usr/bin:/bin"},
        capture_output=True,
        text=True,
        check=False,
    )
    return done.stdout


def test_one_test_for_each_case_and_check(output: str) -> None:
    assert "PASSED test_layers.py::test_layers[good-gradients_match_reference]" in output
    assert "FAILED test_layers.py::test_layers[bad-gradients_match_reference]" in output
    assert "XFAIL test_layers.py::test_layers[known-gradients_match_reference]" in output
    assert "bad, gradients_match_reference, seed 0: gradient of x, at index" in output
    assert "diagnosis: 0.5 times the right one, everywhere" in output


def test_checks_that_do_not_apply_are_skipped_with_the_reason(output: str) -> None:
    assert "in_dims was not given: which dimension counts the samples?" in output
    assert "compile" not in output.split("short test summary")[1]


def test_uninformative_samples_are_a_failure(output: str) -> None:
    assert "FAILED test_layers.py::test_layers[blind-informative_samples]" in output
    assert "inconclusive: the gradient of" in output


def test_warnings_are_errors_except_those_of_pytorch(output: str) -> None:
    assert "PASSED test_layers.py::test_layers[good-forward_ad]" in output
    assert "FAILED test_layers.py::test_layers[warns-gradients_match_reference]" in output
    assert "a warning that the current filters turn into an error: UserWarning: slow" in output


def test_whether_calls_agree_is_found_out_once_for_each_case() -> None:
    calls: list[Tensor] = []

    def counted(x: Tensor) -> Tensor:
        calls.append(x)
        return torch.tanh(x)

    cases = [function_case(counted, [(torch.randn(5, 3),)], torch.tanh, name=n) for n in "ab"]
    counts = []
    for parameter in parametrize_with_checks(cases).args[1]:
        if parameter.id.endswith("-gradients_match_reference"):
            for _ in range(2):
                calls.clear()
                parameter.values[0]()
                counts.append(len(calls))
    first, again, of_other, again_of_other = counts
    assert first >= again + 2  # more if there is time
    assert of_other >= again_of_other + 2
    assert again == again_of_other
