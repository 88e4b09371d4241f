"""Runs a page in headless Chromium, with a script that plays the user and reports what it sees."""

import html
import json
import re
import shutil
import subprocess
from pathlib import Path
from typing import Any

import pytest

CHROMIUM = shutil.which("chromium") or shutil.which("chromium-browser")

needs_chromium = pytest.mark.skipif(CHROMIUM is None, reason="needs Chromium")

# What a user does and sees. `report` is defined by each test, and returns what is to be reported.
USER = """
const at = (selector) => document.querySelector(selector);
const all = (selector, inside = document) => [...inside.querySelectorAll(selector)];
const text = (selector) => at(selector).textContent;
const press = (key, others = {}) => (document.activeElement ?? document.body).dispatchEvent(
  new KeyboardEvent("keydown", { key, bubbles: true, cancelable: true, ...others }));
// The pointer at the cell (i, j) of a matrix of the given shape.
const pointAt = (figure, i, j, rows, columns) => {
  const box = figure.querySelector(".picture").getBoundingClientRect();
  figure.querySelector(".picture").dispatchEvent(new PointerEvent("pointermove", {
    clientX: box.left + ((j + 0.5) / columns) * box.width,
    clientY: box.top + ((i + 0.5) / rows) * box.height,
  }));
};
const shapeOf = (figure) => {
  const numbers = figure.querySelector("figcaption span").textContent.match(/\\d+/g).map(Number);
  return numbers.length === 1 ? [1, ...numbers] : numbers;
};
// The range of cells that is marked: the rows from and to, the columns from and to.
const marked = (figure) => {
  const mark = figure.querySelector(".mark");
  if (mark.hidden) return null;
  const [rows, columns] = shapeOf(figure);
  const [top, height, left, width] = ["top", "height", "left", "width"]
    .map((side) => Number.parseFloat(mark.style[side]) / 100);
  return [top * rows, (top + height) * rows, left * columns, (left + width) * columns]
    .map(Math.round);
};
"""


def watch(page: str, report: str, folder: Path, address: str = "") -> Any:
    """What the body of `report`, a function of JavaScript, returns in a page, from its JSON.

    Errors of any script of the page are errors here.
    """
    driver = (
        "<script>window.errors = []; addEventListener('error', (e) => errors.push(e.message));"
        "addEventListener('securitypolicyviolation', (e) => errors.push(e.blockedURI));</script>"
    )
    ending = (
        f"<script>{USER}\nconst report = () => {{{report}}};\n"
        "addEventListener('load', () => { const found = report();"
        "const said = document.createElement('pre'); said.id = 'said';"
        "said.textContent = JSON.stringify({ found, errors }); document.body.append(said); });"
        "</script>"
    )
    file = folder / "watched.html"
    watched = page.replace("<title>", f"{driver}<title>", 1)
    watched = watched.replace("</body>", f"{ending}</body>", 1)
    file.write_text(watched, encoding="utf-8")
    assert CHROMIUM is not None
    run = subprocess.run(
        [
            CHROMIUM,
            *("--headless", "--no-sandbox", "--disable-gpu", "--window-size=1280,800"),
            "--allow-file-access-from-files",  # to look into a frame
            f"--user-data-dir={folder / 'profile'}",
            *("--dump-dom", f"{file.as_uri()}{address}"),
        ],
        capture_output=True,
        text=True,
        encoding="utf-8",
        timeout=60,
        check=True,
    )
    said = re.search(r'<pre id="said">(.*?)</pre>', run.stdout, flags=re.DOTALL)
    assert said is not None, run.stderr
    answer = json.loads(html.unescape(said[1]))
    assert answer["errors"] == []
    return answer["found"]
