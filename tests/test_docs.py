"""README and docs: their code runs as printed, their options exist, their links have targets."""

import dataclasses
import importlib
import importlib.util
import re
import tomllib
from pathlib import Path
from typing import Any

import pytest
import torch

from experiments.__main__ import experiments
from experiments.benchmark import __main__ as benchmark
from experiments.walk import __main__ as walk
from manual_bp.exercises import __main__ as exercises
from manual_bp.verify import __main__ as verify
from manual_bp.verify._global_state import restored

ROOT = Path(__file__).parents[1]
PAGES = [ROOT / "README.md", ROOT / "CONTRIBUTING.md", *sorted((ROOT / "docs").rglob("*.md"))]
TEXTS = {page.relative_to(ROOT).as_posix(): page.read_text("utf-8") for page in PAGES}
PROJECT: dict[str, Any] = tomllib.loads((ROOT / "pyproject.toml").read_text("utf-8"))
NOTES = "http://neuralnetworksanddeeplearning.com/chap2.html"

BLOCK = re.compile(r"^```([^\n]*)\n(.*?)^```$", re.DOTALL | re.MULTILINE)


def blocks(page: str, *languages: str) -> list[tuple[list[str], str]]:
    """The words after the backticks, and the code, of all blocks in these languages.

    A second word says what the code needs (```python cuda), or that it takes long (compiles).
    """
    found = [(kind.split() or [""], code) for kind, code in BLOCK.findall(TEXTS[page])]
    return [(kind, code) for kind, code in found if kind[0] in languages]


def can_run(kind: list[str], code: str) -> bool:
    imported = re.findall(r"^(?:from|import) (\w+)", code, flags=re.MULTILINE)
    if "compiles" in kind:  # tests/training_step/test_compiled.py runs it
        return False
    return ("cuda" not in kind or torch.cuda.is_available()) and all(
        importlib.util.find_spec(name) for name in imported
    )


@pytest.fixture
def _opacus_forgets(monkeypatch: pytest.MonkeyPatch) -> None:
    """Undo what a page registers in Opacus, so that it affects no other page."""
    if importlib.util.find_spec("opacus"):
        from opacus import grad_sample

        for kind, name in (
            (grad_sample.GradSampleModule, "GRAD_SAMPLERS"),
            (grad_sample.GradSampleModuleFastGradientClipping, "NORM_SAMPLERS"),
        ):
            monkeypatch.setattr(kind, name, dict(getattr(kind, name)))


# What each page's names are after its code has run.
def _readme(names: dict[str, Any], _: Path) -> None:
    assert names["trace"]["0"].delta.shape == (5, 30)


def _compatibility(names: dict[str, Any], _: Path) -> None:
    assert str(names["report"]).startswith("3 changed, 0 left as they are\n")


def _trace(names: dict[str, Any], folder: Path) -> None:
    assert names["trace"]["0"].per_sample_grad_w().shape == (32, 30, 64)
    assert list((folder / "runs" / "mine").iterdir())


def _training_step(names: dict[str, Any], folder: Path) -> None:
    assert names["cost"].shape == ()
    assert names["step"].lr == 3.0 * 0.9**3
    if "session" in names:
        assert (folder / "step.onnx").exists()
        assert len(names["new"]) == 4


AFTERWARDS = {
    "README.md": _readme,
    "docs/compatibility.md": _compatibility,
    "docs/trace.md": _trace,
    "docs/training_step.md": _training_step,
}


@pytest.mark.parametrize("page", [page for page in TEXTS if blocks(page, "python")])
@pytest.mark.usefixtures("_opacus_forgets")
def test_every_block_of_python_runs(
    page: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """In order, in one namespace, in an empty folder: as a reader would paste them."""
    monkeypatch.chdir(tmp_path)
    names: dict[str, Any] = {"__name__": "__main__"}
    with restored():  # a page may set the default dtype
        for kind, code in blocks(page, "python"):
            if can_run(kind, code):
                exec(compile(code, page, "exec"), names)
    AFTERWARDS.get(page, lambda *_: None)(names, tmp_path)


@pytest.mark.parametrize("page", TEXTS)
def test_code_blocks_name_their_language(page: str) -> None:
    """Blocks in other languages are not run, so they must not contain Python."""
    others = blocks(page, "bash", "cpp", "diff", "text")
    assert len(others) + len(blocks(page, "python")) == TEXTS[page].count("\n```") / 2
    for _, code in others:
        assert not re.search(r"^(from|import|with|for|def) |^\w+ = ", code, re.MULTILINE)


def options_of(page: str) -> set[str]:
    """The long options in blocks and inline code, except those of other programs."""
    code = [line for _, lines in blocks(page, "bash") for line in lines.splitlines()]
    code += re.findall(r"`([^`]+)`", BLOCK.sub("", TEXTS[page]))
    ours = [c for c in code if re.match(r"--|python -m (experiments|manual_bp)", c)]
    return {option for line in ours for option in re.findall(r"--[a-z][a-z-]*", line)}


@pytest.fixture
def options(capsys: pytest.CaptureFixture[str]) -> set[str]:
    for main, arguments in ((verify.main, ["--help"]), (exercises.main, ["start", "--help"])):
        with pytest.raises(SystemExit):
            main(arguments)
    found = set(re.findall(r"--[a-z][a-z-]*", capsys.readouterr().out))
    modules: list[Any] = [importlib.import_module(command.split()[-1]) for command in experiments()]
    configs = [module.Config for module in modules if hasattr(module, "Config")]
    for config in (benchmark.Config, walk.Config, *configs):
        found |= {f"--{field.name.replace('_', '-')}" for field in dataclasses.fields(config)}
    return found


def test_every_option_named_in_a_page_exists(options: set[str]) -> None:
    named = {page: options_of(page) for page in TEXTS}
    assert {"--hidden", "--dry-run"} <= named["docs/train.md"]
    assert {"--threads", "--matmul-precision"} <= named["docs/training_step.md"]
    for page, found in named.items():
        assert found <= options, page


@pytest.mark.parametrize("page", TEXTS)
def test_every_extra_and_module_in_a_command_exists(page: str) -> None:
    extras = PROJECT["project"]["optional-dependencies"]
    for named in re.findall(r"""\.\[([\w,]+)\]""", TEXTS[page]):
        assert set(named.split(",")) <= set(extras)
    for module in re.findall(r"python -m ((?:experiments|manual_bp)[\w.]*)", TEXTS[page]):
        assert importlib.util.find_spec(module), module


def anchors(text: str) -> set[str]:
    """The anchors of a page's headings, as GitHub forms them."""
    headings = re.findall(r"^#+ (.*)$", BLOCK.sub("", text), flags=re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-") for heading in headings}


@pytest.mark.parametrize("page", TEXTS)
def test_every_link_has_a_target(page: str) -> None:
    for target in re.findall(r"\]\(([^)]+)\)", BLOCK.sub("", TEXTS[page])):
        if "://" in target:
            continue
        path, _, anchor = target.partition("#")
        place = (ROOT / page).parent / path if path else ROOT / page
        assert place.exists(), target
        assert not anchor or anchor in anchors(place.read_text("utf-8")), target


@pytest.mark.parametrize("page", [p for p, text in TEXTS.items() if "the notes" in text.lower()])
def test_a_page_that_mentions_the_notes_links_to_them(page: str) -> None:
    assert NOTES in TEXTS[page]


def test_the_package_description_has_no_relative_links_and_no_pictures() -> None:
    """A package index shows it without the files that such links lead to."""
    settings = PROJECT["tool"]["hatch"]["metadata"]["hooks"]["fancy-pypi-readme"]
    (fragment,) = settings["fragments"]
    shown = (ROOT / fragment["path"]).read_text("utf-8")
    for change in settings["substitutions"]:
        shown = re.sub(change["pattern"], change["replacement"], shown)
    assert shown.startswith("# manual_bp\n\nBackpropagation written out by hand")
    assert "![" not in shown
    assert "experiments.vanishing" not in shown  # the caption
    links = re.findall(r"\]\(([^)]+)\)", shown)
    assert NOTES in links
    assert all("://" in link for link in links)
    assert "| The four equations, derived |" in shown
