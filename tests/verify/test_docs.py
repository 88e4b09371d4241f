"""docs/verify.md works as printed, on a Function that is defined outside this repository."""

import re
import subprocess
import sys
from pathlib import Path

import pytest

from manual_bp.verify.checks import CHECKS

ROOT = Path(__file__).parents[2]
PAGE = (ROOT / "docs" / "verify.md").read_text("utf-8")


def blocks(language: str) -> list[str]:
    found: list[str] = re.findall(rf"```{language}\n(.*?)```", PAGE, flags=re.DOTALL)
    return found


(LAYER,) = blocks("python")
MISTAKES = list(
    zip(blocks("diff"), [text for text in blocks("text") if "diagnosis" in text], strict=True)
)


def verify(folder: Path, layer: str, *options: str) -> subprocess.CompletedProcess[str]:
    (folder / "my_layer.py").write_text(layer, encoding="utf-8")
    command = [sys.executable, "-m", "manual_bp.verify", "my_layer:SCALE", *options]
    return subprocess.run(
        command,
        cwd=folder,
        env={"PYTHONPATH": str(ROOT), "PATH": "/usr/bin:/bin"},
        capture_output=True,
        text=True,
        check=False,
    )


def words(line: str) -> str:
    """A line without its numbers, which may differ in the last digits elsewhere."""
    return re.sub(r"-?\d[\d.e-]*", "#", re.sub(r" +\d+ +\d+\.\d\d s  ", "  ", line)).strip()


def test_the_function_from_scratch_is_right(tmp_path: Path) -> None:
    (command,) = blocks("bash")
    assert command == "python -m manual_bp.verify my_layer:SCALE\n"
    done = verify(tmp_path, LAYER)
    assert done.returncode == 0, done.stdout + done.stderr
    assert done.stdout.splitlines()[-1] in PAGE
    assert [line.split()[0] for line in done.stdout.splitlines()[1:-1]] == [
        check.name for check in CHECKS if not check.is_for_modules
    ]


@pytest.mark.parametrize(("diff", "said"), MISTAKES, ids=["mean", "detached", "on_ctx"])
def test_the_planted_mistakes(diff: str, said: str, tmp_path: Path) -> None:
    lines = diff.splitlines()
    layer = LAYER
    for old, new in zip(
        [line[1:] for line in lines if line.startswith("-")],
        [line[1:] for line in lines if line.startswith("+")],
        strict=True,
    ):
        assert old in layer
        layer = layer.replace(old, new)
    done = verify(tmp_path, layer, "--no-compiler")
    assert done.returncode == 1
    printed = {words(line) for line in done.stdout.splitlines()}
    assert {words(line) for line in said.splitlines()} <= printed


def test_the_reproduction_can_be_typed_as_printed(tmp_path: Path) -> None:
    done = verify(tmp_path, LAYER.replace(".sum(0)", ".mean(0)"), "--no-compiler", "--seed", "5")
    again = re.findall(r"again: python -m manual_bp.verify my_layer:SCALE (.*)", done.stdout)[0]
    assert again == "--check finite_differences --seed 5"
    repeated = verify(tmp_path, (tmp_path / "my_layer.py").read_text("utf-8"), *again.split())
    assert repeated.returncode == 1
    (told,) = re.findall(r"slope along .*", repeated.stdout)
    assert told in done.stdout


def test_the_table_of_checks_is_the_list_of_checks() -> None:
    rows = re.findall(r"^\| `(\w+)` \| (.*?) \| (capability)? ?\|", PAGE, flags=re.MULTILINE)
    described = [
        (check.name, (check.run.__doc__ or "").splitlines()[0], check.is_capability)
        for check in CHECKS
    ]
    assert [(name, text, bool(capability)) for name, text, capability in rows] == described
