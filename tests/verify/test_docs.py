"""docs/verify.md works as printed, on a Function defined outside this repository."""

import re
import subprocess
import sys
from pathlib import Path

import pytest

from manual_bp.verify.__main__ import main
from manual_bp.verify.checks import CHECKS
from manual_bp.verify.mutants import MUTANTS
from manual_bp.verify.self_test import default_gradcheck, pytorch_cases

ROOT = Path(__file__).parents[2]
PAGE = (ROOT / "docs" / "verify.md").read_text("utf-8")
README = (ROOT / "README.md").read_text("utf-8")


def blocks(language: str) -> list[str]:
    found: list[str] = re.findall(rf"```{language}\n(.*?)```", PAGE, flags=re.DOTALL)
    return found


LAYER = blocks("python")[0]
RIGHT, *WRONG = [text for text in blocks("text") if "checks ran" in text]
MISTAKES = list(zip(blocks("diff"), WRONG, strict=True))


class Printed:
    """What the command prints for a layer, run in this process, which has loaded PyTorch."""

    def __init__(
        self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
    ) -> None:
        monkeypatch.syspath_prepend(tmp_path)
        self.folder, self.capsys = tmp_path, capsys

    def __call__(self, layer: str, *options: str, code: int) -> list[str]:
        sys.modules.pop("my_layer", None)
        (self.folder / "my_layer.py").write_text(layer, encoding="utf-8")
        assert main(["my_layer:SCALE", *options]) == code
        return self.capsys.readouterr().out.splitlines()


@pytest.fixture
def printed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> Printed:
    monkeypatch.setattr(sys, "dont_write_bytecode", True)
    return Printed(tmp_path, monkeypatch, capsys)


def steady(line: str) -> str:
    """A line without counts and seconds, its numbers rounded to digits that no machine changes."""
    line = re.sub(r" +\d+ +\d+\.\d\d s  ", "  ", line).strip()
    return re.sub(r"-?\d+\.\d+", lambda number: f"{float(number[0]):.5g}", line)


def with_mistake(diff: str) -> str:
    layer = LAYER
    lines = diff.splitlines()
    for old, new in zip(
        [line[1:] for line in lines if line.startswith("-")],
        [line[1:] for line in lines if line.startswith("+")],
        strict=True,
    ):
        assert old in layer
        layer = layer.replace(old, new)
    return layer


def beside_the_layer(folder: Path, *arguments: str) -> list[str]:
    """What a separate Python process prints, in a folder with the page's layer."""
    (folder / "my_layer.py").write_text(LAYER, encoding="utf-8")
    done = subprocess.run(
        [sys.executable, *arguments],
        cwd=folder,
        env={"PYTHONPATH": str(ROOT), "PATH": "/usr/bin:/bin"},
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout.splitlines()


def test_the_function_from_scratch_is_right(tmp_path: Path) -> None:
    (command,) = blocks("bash")
    assert command == "python -m manual_bp.verify my_layer:SCALE\n"
    lines = beside_the_layer(tmp_path, *command.split()[1:])
    assert f"{lines[-1]}\n" == RIGHT
    assert [line.split()[0] for line in lines[3:-1]] == [
        check.name for check in CHECKS if not (check.for_modules or check.for_operators)
    ]


@pytest.mark.parametrize(("diff", "shown"), MISTAKES, ids=["mean", "detached", "on_ctx"])
def test_the_planted_mistakes_print_what_the_page_shows(
    diff: str, shown: str, printed: Printed
) -> None:
    lines = printed(with_mistake(diff), code=1)
    assert shown.splitlines()[-1] == lines[-1]
    assert set(map(steady, shown.splitlines())) <= set(map(steady, lines))


def test_the_reproduction_can_be_typed_as_printed(printed: Printed) -> None:
    layer = LAYER.replace(".sum(0)", ".mean(0)")
    lines = printed(layer, "--no-compiler", "--seed", "5", code=1)
    again = re.findall(r"again: python -m manual_bp.verify my_layer:SCALE (.*)", "\n".join(lines))
    assert again[0] == "--check gradients_match_reference --seed 5"
    repeated = "\n".join(printed(layer, *again[0].split(), code=1))
    (message,) = set(re.findall(r"gradient of s, at .*", repeated))
    assert message in "\n".join(lines)


def test_the_table_of_checks_is_the_list_of_checks() -> None:
    rows = re.findall(r"^\| `(\w+)` \| (.*?) \| (capability)? ?\|", PAGE, flags=re.MULTILINE)
    described = [
        (check.name, (check.run.__doc__ or "").splitlines()[0], check.capability)
        for check in CHECKS
    ]
    assert [(name, text, bool(capability)) for name, text, capability in rows] == described


def test_the_figures_of_the_self_test_are_current() -> None:
    """`test_self_test.py` tests that every mistake is caught."""
    count = len(MUTANTS)
    theirs = sum(default_gradcheck(mutant.case) == "caught" for mutant in MUTANTS)
    assert theirs < count / 2
    shown = re.findall(
        rf"{count} mistakes: the kit caught {count}, default gradcheck (\d+)\n", PAGE
    )
    # What stale caches give depends on where in memory new tensors lie.
    assert [abs(int(number) - theirs) <= 2 for number in shown] == [True]
    assert f"PyTorch's own layers: {len(pytorch_cases())} cases, 10 seeds, " in PAGE
    words = " ".join(README.split())
    assert f"Of {count} planted mistakes it catches {count}; `gradcheck` with its" in words
    assert f"defaults catches {shown[0]} |" in words


ALONE = """
import importlib.metadata, re, sys

def needed(name, seen):
    if name in seen:
        return
    seen.add(name)
    try:
        requires = importlib.metadata.requires(name) or []
    except importlib.metadata.PackageNotFoundError:
        return
    for line in requires:
        if "extra ==" not in line:
            needed(re.match(r"[\\w.-]+", line)[0].lower().replace("_", "-"), seen)

allowed = set()
for name in ("torch", "numpy", "tabulate"):
    needed(name, allowed)
installed = importlib.metadata.packages_distributions()
others = {
    top for top, names in installed.items()
    if not any(name.lower().replace("_", "-") in allowed for name in names)
}

class Without:
    # Raising would not work: PyTorch looks for some of them by find_spec, and runs without them.
    def __init__(self, finder):
        self.finder = finder

    def __getattr__(self, name):
        return getattr(self.finder, name)

    def find_spec(self, name, path=None, target=None):
        if name.partition(".")[0] in others - {"manual_bp"}:
            return None
        return self.finder.find_spec(name, path, target)

sys.meta_path[:] = map(Without, sys.meta_path)
from manual_bp.verify.__main__ import main
assert "numpy" not in others and "pytest" in others
sys.exit(main(["my_layer:SCALE", "--no-compiler"]))
"""


def test_it_needs_only_the_packages_that_the_page_names(tmp_path: Path) -> None:
    """The kit judges a case although no other installed package can be imported."""
    assert "PyTorch, NumPy and tabulate" in " ".join(PAGE.split())
    assert "PyTorch, NumPy and tabulate" in " ".join(README.split())
    beside_the_layer(tmp_path, "-c", ALONE)
