"""What is said of the package outside of its code."""

import re
from pathlib import Path

import manual_bp

ROOT = Path(__file__).parents[2]


def test_the_citation_has_the_version_of_the_package() -> None:
    citation = (ROOT / "CITATION.cff").read_text("utf-8")
    assert re.findall(r"^version: (.+)$", citation, flags=re.MULTILINE) == [manual_bp.__version__]
