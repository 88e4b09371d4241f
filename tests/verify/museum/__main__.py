"""Writes the table of docs/museum.md anew: python -m tests.verify.museum."""

import re

from manual_bp.verify import run
from tests.verify.museum import EXHIBITS
from tests.verify.museum._table import PAGE, as_text, judge


def main() -> None:
    """Judge every exhibit, and put the table into the page in place of the old one.

    Raises:
        AssertionError: The kit finds something wrong with a correction.
    """
    for exhibit in EXHIBITS:
        run(exhibit.fixed, slow=False).raise_if_failed()
    text = as_text([judge(exhibit) for exhibit in EXHIBITS])
    old = re.compile(r"^\| Exhibit.*^Of \d+ exhibits.*?\n(?=\n|\Z)", re.MULTILINE | re.DOTALL)
    page, tables = old.subn(lambda _: text, PAGE.read_text("utf-8"))
    if tables != 1:
        raise ValueError(f"{PAGE} must have one table of exhibits; got {tables}")
    PAGE.write_text(page, encoding="utf-8")
    print(text)


if __name__ == "__main__":
    main()
