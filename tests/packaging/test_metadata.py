"""What is said of the package outside of its code."""

import re
import tomllib
from pathlib import Path

import manual_bp

ROOT = Path(__file__).parents[2]


def test_the_citation_has_the_version_of_the_package() -> None:
    citation = (ROOT / "CITATION.cff").read_text("utf-8")
    assert re.findall(r"^version: (.+)$", citation, flags=re.MULTILINE) == [manual_bp.__version__]


def test_the_table_of_versions_in_the_readme_is_what_changes_are_tested_with() -> None:
    project = tomllib.loads((ROOT / "pyproject.toml").read_text("utf-8"))["project"]
    (pinned,) = re.findall(r"^torch==(.+)$", (ROOT / "constraints.txt").read_text("utf-8"), re.M)
    (oldest,) = [need.partition(">=")[2] for need in project["dependencies"] if "torch" in need]
    classifiers = "\n".join(project["classifiers"])
    (python,) = re.findall(r"^Programming Language :: Python :: (3\..+)$", classifiers, re.M)
    readme = (ROOT / "README.md").read_text("utf-8")
    assert f"| {python} | {pinned}, {oldest}.0 | all, before a change lands |\n" in readme
    assert project["requires-python"] == f">={python}"
    assert f"Python {python} and later with PyTorch {oldest} to " in readme
