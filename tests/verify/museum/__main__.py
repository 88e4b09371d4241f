"""Writes the table of docs/museum.md anew: python -m tests.verify.museum."""

import re

from tests.verify.museum import EXHIBITS
from tests.verify.museum._table import PAGE, as_text, judge


def main() -> None:
    """Judge every exhibit, and put the table into the page in place of the old one."""
    text = as_text([judge(exhibit) for exhibit in EXHIBITS])
    kept = re.split(r"^\| Exhibit", PAGE.read_text("utf-8"), maxsplit=1, flags=re.MULTILINE)[0]
    PAGE.write_text(kept + text, encoding="utf-8")
    print(text)


if __name__ == "__main__":
    main()
