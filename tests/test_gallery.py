"""docs/experiments.md: its commands are real, its pictures are there, its conclusions true."""

import importlib
import re
import shlex
from pathlib import Path
from typing import Any

import pytest

from experiments.__main__ import experiments
from experiments.command_line import parse

ROOT = Path(__file__).parents[1]
PAGE = ROOT / "docs" / "experiments.md"
SECTION = re.compile(
    r"""^\#\#\ (?P<question>[^\n]+\?)\n\n
    ```bash\n(?P<command>[^\n]+)\n```\n\n
    !\[(?P<described>[^]]+)\]\((?P<picture>[^)]+)\)\n\n
    ```text\n(?P<conclusion>.+?\n)```\n\n
    (?P<explanation>\w.+)\Z""",
    re.DOTALL | re.VERBOSE,
)


def sections() -> dict[str, dict[str, str]]:
    """The parts of each section, by the name of its experiment."""
    _, *texts = re.split(r"^(?=## )", PAGE.read_text("utf-8"), flags=re.MULTILINE)
    found = {}
    for text in texts:
        parts = SECTION.match(text)
        assert parts is not None, text.splitlines()[0]
        module = shlex.split(parts["command"])[2]
        found[module.removeprefix("experiments.")] = parts.groupdict()
    return found


SECTIONS = sections()


@pytest.mark.parametrize("name", SECTIONS)
def test_a_command_runs_a_listed_experiment_with_options_that_it_takes(name: str) -> None:
    command = SECTIONS[name]["command"]
    python, m, module, *options = shlex.split(command)
    assert f"{python} {m} {module}" in experiments()
    experiment: Any = importlib.import_module(module)
    if hasattr(experiment, "__path__"):  # a package has its options where it has its command line
        experiment = importlib.import_module(f"{module}.__main__")
    assert isinstance(parse(experiment.Config, options, command), experiment.Config)


@pytest.mark.parametrize("name", SECTIONS)
def test_a_picture_is_a_small_png_of_that_experiment(name: str) -> None:
    assert SECTIONS[name]["picture"] == f"pictures/{name}.png"
    picture = (PAGE.parent / SECTIONS[name]["picture"]).read_bytes()
    assert picture.startswith(b"\x89PNG\r\n\x1a\n")
    assert 10_000 < len(picture) < 150_000


def test_all_pictures_are_shown_and_all_claims_have_a_section() -> None:
    pages = [path.read_text("utf-8") for path in PAGE.parent.glob("*.md")]
    shown = {name for page in pages for name in re.findall(r"\]\(pictures/(\w+\.png)\)", page)}
    assert {path.name for path in (PAGE.parent / "pictures").iterdir()} == shown
    claims = {
        path.stem
        for path in (ROOT / "experiments").glob("*.py")
        if re.search(r"^from experiments.findings import Findings", path.read_text("utf-8"), re.M)
    }
    assert len(claims) >= 6
    assert claims | {"train", "walk"} == set(SECTIONS)


@pytest.mark.parametrize("name", ["slow_learning", "vanishing"])
def test_a_conclusion_is_what_the_command_prints(
    name: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Those that depend on no clock, and are computed in float64."""
    options = shlex.split(SECTIONS[name]["command"])[3:]
    experiment: Any = importlib.import_module(f"experiments.{name}")
    assert experiment.main([*options, "--run-folder", str(tmp_path)]) == 0
    assert SECTIONS[name]["conclusion"] in capsys.readouterr().out
