"""The decorator, tried in a pytest run of its own."""

import subprocess
import sys
from pathlib import Path

TESTS = """
import torch
from manual_bp.verify import function_case, parametrize_with_checks

def wrong(x):
    return x.detach() * x

samples = [(torch.randn(5, 3),)]
CASES = [
    function_case(torch.tanh, samples, torch.tanh, name="good"),
    function_case(wrong, samples, torch.square, name="bad"),
    function_case(wrong, samples, torch.square, name="known",
                  expected_failures={"gradients_match_reference": "half of it is missing"}),
    function_case(torch.tanh, samples, torch.tanh, name="there", device="cuda"),
]

@parametrize_with_checks(CASES, slow=False)
def test_layers(check):
    check()
"""


def pytest_says(tmp_path: Path, *options: str) -> str:
    (tmp_path / "test_layers.py").write_text(TESTS)
    command = [sys.executable, "-m", "pytest", "-p", "no:cacheprovider", "-rA", *options]
    done = subprocess.run(
        [*command, "test_layers.py"],
        cwd=tmp_path,
        env={"PYTHONPATH": str(Path(__file__).parents[2]), "PATH": "/usr/bin:/bin"},
        capture_output=True,
        text=True,
        check=False,
    )
    return done.stdout


def test_one_test_for_each_case_and_check(tmp_path: Path) -> None:
    said = pytest_says(tmp_path, "-k", "gradients_match_reference")
    assert "PASSED test_layers.py::test_layers[good-gradients_match_reference]" in said
    assert "FAILED test_layers.py::test_layers[bad-gradients_match_reference]" in said
    assert "XFAIL test_layers.py::test_layers[known-gradients_match_reference]" in said
    assert "bad, gradients_match_reference, seed 0: gradient of x, at index" in said
    assert "diagnosis: 0.5 times the right one, everywhere" in said


def test_what_does_not_apply_is_skipped_with_its_reason(tmp_path: Path) -> None:
    said = pytest_says(tmp_path, "-k", "good-vmap or good-compile")
    assert "in_dims was not given: which dimension counts the samples?" in said
    assert "compile" not in said.split("short test summary")[1]
