"""The site: its pages are all in its menu, and those that were built are whole, without a network.

The tests marked `site` look at what `mkdocs build --strict` wrote, as `.ci/run` does.
"""

import json
import re
import subprocess
from html import unescape
from html.parser import HTMLParser
from pathlib import Path
from urllib.parse import quote, unquote, urlsplit

import pytest

from tests.experiments.walk.browser import CHROMIUM, needs_chromium

ROOT = Path(__file__).parents[1]
SITE = ROOT / "site"


def test_the_menu_has_every_page_once() -> None:
    settings = (ROOT / "mkdocs.yml").read_text("utf-8")
    menu = re.findall(r"^ +- (?:\w+: )?(\S+\.md)$", settings, flags=re.MULTILINE)
    docs = ROOT / "docs"
    pages = [page.relative_to(docs) for kind in ("*.md", "*.ipynb") for page in docs.rglob(kind)]
    shown = [page.with_suffix(".md").as_posix() for page in pages]
    assert sorted(menu) == sorted(["index.md", *shown])


class Elements(HTMLParser):
    """The ids in a page, and the addresses that it leads to or loads."""

    def __init__(self, page: Path) -> None:
        super().__init__()
        self.ids: set[str] = set()
        self.links: list[str] = []
        self.loaded: list[str] = []
        self.feed(page.read_text("utf-8"))

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        found = dict(attrs)
        self.ids.add(found.get("id") or "")
        if tag == "a" and found.get("href"):
            self.links.append(found["href"] or "")
        elif tag == "link" and found.get("rel") not in ("canonical", "next", "prev"):
            self.loaded.append(found.get("href") or "")
        elif found.get("src"):
            self.loaded.append(found["src"] or "")


@pytest.fixture(scope="module")
def pages() -> dict[Path, Elements]:
    assert SITE.exists(), "build it first: mkdocs build --strict"
    found = {path: Elements(path) for path in SITE.rglob("*.html") if path.name != "404.html"}
    assert len(found) > 20
    return found


@pytest.mark.site
def test_everything_that_a_page_loads_or_leads_to_is_there(pages: dict[Path, Elements]) -> None:
    for page, elements in pages.items():
        elsewhere = [a for a in elements.loaded if urlsplit(a).scheme not in ("", "data")]
        assert not elsewhere, page
        for address in (*elements.loaded, *elements.links):
            parts = urlsplit(address)
            if parts.scheme:
                continue
            target = (page.parent / unquote(parts.path)).resolve() if parts.path else page
            assert target.is_file(), (page, address)
            if parts.fragment and target.suffix == ".html" and not parts.fragment.startswith("__"):
                assert unquote(parts.fragment) in pages[target].ids, (page, address)


@pytest.mark.site
def test_no_style_loads_from_elsewhere() -> None:
    styles = list(SITE.rglob("*.css"))
    assert len(styles) > 3
    for style in styles:
        assert not re.search(r"(url\(|@import)\s*[\"']?(https?:)?//", style.read_text("utf-8")), (
            style
        )


# Loads one page after the other in a frame, and says what is wrong in each.
LOOK = r"""
const fits = (element) => {
  for (let e = element.parentElement; e.tagName !== "ARTICLE"; e = e.parentElement) {
    if (getComputedStyle(e).overflowX !== "visible") return true;  // it scrolls in there
  }
  return element.getBoundingClientRect().right <= WIDTH;
};
const faults = (inside) => {
  const article = inside.querySelector("article");
  const wide = [...article.querySelectorAll("*")].filter((element) => !fits(element));
  const broken = [...inside.images].filter((image) => image.complete && !image.naturalWidth);
  const prose = article.cloneNode(true);
  for (const code of prose.querySelectorAll("pre, code, .katex")) code.remove();
  const raw = prose.textContent.match(/\\[a-z]+|\$.*|^ *:::.*|.{9}\]\(|`.*|\*\*.*/gm) ?? [];
  return [
    ...(inside.documentElement.scrollWidth > WIDTH ? ["wider than the window"] : []),
    ...wide.slice(0, 3).map((element) => `too wide: ${element.outerHTML.slice(0, 80)}`),
    ...broken.map((image) => `no picture: ${image.src}`),
    ...raw.map((text) => `not rendered: ${text}`),
  ];
};
(async () => {
  const frame = document.createElement("iframe");
  frame.style.cssText = "border: 0; height: 900px; width: WIDTHpx";
  document.body.append(frame);
  const found = {};
  for (const page of PAGES) {
    await new Promise((done) => { frame.onload = done; frame.src = page; });
    await new Promise((done) => setTimeout(done, 300));
    found[page] = faults(frame.contentDocument);
  }
  const said = document.createElement("pre");
  said.id = "found";
  said.textContent = JSON.stringify(found);
  document.body.append(said);
})();
"""


def browse(address: str, folder: Path) -> str:
    """The document that Chromium has at an address, without a network, after its scripts ran."""
    assert CHROMIUM is not None
    options = [
        *("--headless", "--no-sandbox", "--disable-gpu", "--allow-file-access-from-files"),
        *("--host-resolver-rules=MAP * ~NOTFOUND", "--virtual-time-budget=300000"),
        f"--user-data-dir={folder / 'profile'}",
    ]
    run = subprocess.run(
        [CHROMIUM, *options, "--window-size=1400,1000", "--dump-dom", address],
        capture_output=True,
        encoding="utf-8",
        timeout=300,
        check=True,
    )
    return run.stdout


@pytest.mark.site
@needs_chromium
@pytest.mark.parametrize("width", [1280, 390])
def test_a_page_fits_a_monitor_and_a_phone(
    width: int, pages: dict[Path, Elements], tmp_path: Path
) -> None:
    shown = [page.as_uri() for page in pages if page.name != "walk.html" or page.parent == SITE]
    script = LOOK.replace("WIDTH", str(width)).replace("PAGES", json.dumps(shown))
    looking = tmp_path / "look.html"
    looking.write_text(f"<meta charset=utf-8><body><script>{script}</script>", encoding="utf-8")
    found = re.search(
        r'<pre id="found">(.*?)</pre>', browse(looking.as_uri(), tmp_path), flags=re.DOTALL
    )
    assert found is not None
    wrong = json.loads(unescape(found[1]))
    assert set(wrong) == set(shown)
    assert {page: faults for page, faults in wrong.items() if faults} == {}


@pytest.mark.site
@needs_chromium
@pytest.mark.parametrize(
    ("words", "first"),
    [("TrainingStep", "reference/training_step.html"), ("common mistakes", "derivation.html")],
)
def test_the_search_works_without_a_server(words: str, first: str, tmp_path: Path) -> None:
    shown = browse(f"{(SITE / 'index.html').as_uri()}?q={quote(words)}", tmp_path)
    results = re.findall(r'<a href="([^"]+)" class="md-search-result__link', shown)
    assert (SITE / first).as_uri() == results[0].partition("?")[0].partition("#")[0]
