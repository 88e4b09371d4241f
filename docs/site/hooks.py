"""What the site does besides mkdocs: each function `on_...` is called by mkdocs at that event.

- The README is the first page, and what `experiments.walk` writes is a file of the site.
- A notebook is a page, with the outputs that it has kept.
- Links from the docs into the repository work on GitHub as they are. Here they lead to copies of
  the files, in `repository/`.
- KaTeX turns the formulas into HTML, so that readers need only its style and its fonts. It is not a
  Python package, so npm fetches it.
"""

import ast
import html
import json
import posixpath
import re
import subprocess
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from mkdocs.exceptions import PluginError
from mkdocs.structure.files import File, Files, InclusionLevel
from nbconvert import MarkdownExporter

ROOT = Path(__file__).parents[2]
MODULES = ROOT / "build" / "npm" / "node_modules"
# The second makes the search of mkdocs-material work in pages that no server sends.
PACKAGES = ("katex@0.16.47", "iframe-worker@1.0.4")

FENCE = re.compile(r"(^```.*?^```$)", re.DOTALL | re.MULTILINE)
LINK = re.compile(r"\]\((?!\w+:|#)([^)#\s]+)")
FORMULA = re.compile(r'<(span|div) class="arithmatex">\\[(\[](.*?)\\[)\]]</\1>', re.DOTALL)


# The page itself, in place of its picture.
WALK = """<iframe class="walk" src="assets/walk.html" title="One step of learning"></iframe>

<a href="assets/walk.html">The same page, with more room</a>
"""


def on_config(config: Any) -> Any:
    """Fetch what npm has, and say which of it all pages use."""
    command = ["npm", "install", "--no-save", "--no-audit", "--no-fund", *PACKAGES]
    try:
        subprocess.run(
            [*command, "--prefix", str(MODULES.parent)], check=True, capture_output=True, text=True
        )
    except FileNotFoundError:
        raise PluginError("the site needs npm, to fetch KaTeX; it is not installed") from None
    except subprocess.CalledProcessError as error:
        raise PluginError(f"npm could not fetch {' and '.join(PACKAGES)}: {error.stderr}") from None
    config.extra["polyfills"] = ["assets/iframe-worker.js"]
    config.extra_css.insert(0, "assets/katex/katex.min.css")
    return config


def on_files(files: Files, config: Any) -> Files:
    """Add what is not in docs/."""
    from experiments.walk.__main__ import Config, invent, write

    notebooks = [file for file in files if file.src_uri.endswith(".ipynb")]
    docs = [f"docs/{file.src_uri}" for file in (*files.documentation_pages(), *notebooks)]
    for notebook in notebooks:
        files.remove(notebook)
        for file in _pages_of(notebook, config):
            files.append(file)
    readme = (ROOT / "README.md").read_text("utf-8")
    files.append(File.generated(config, "index.md", content=readme))
    walk, _ = write(Config(), invent(Config()))
    files.append(File.generated(config, "assets/walk.html", content=walk))
    katex, worker = MODULES / "katex" / "dist", MODULES / "iframe-worker" / "shim" / "index.js"
    for path in (katex / "katex.min.css", *(katex / "fonts").glob("*.woff2")):
        name = f"assets/katex/{path.relative_to(katex).as_posix()}"
        files.append(File.generated(config, name, abs_src_path=str(path)))
    files.append(File.generated(config, "assets/iframe-worker.js", abs_src_path=str(worker)))
    for target in _repository_files(["README.md", *docs]):
        files.append(_copy(target, config))
    return files


def on_page_markdown(markdown: str, page: Any, **_: Any) -> str:
    """Let links lead to the copies, and take from code blocks what only our tests read."""
    place = _place_in_repository(page.file.src_uri)
    if place.endswith((".py", "/walk.md")):
        page.meta["hide"] = ["navigation", "toc"]  # code and the walk need the room
    elif not place.startswith("docs/"):
        page.meta["hide"] = ["navigation"]
    if place.startswith("docs/reference/"):
        page.meta["search"] = {"boost": 4}  # who looks for a name finds it first
    if place == "docs/walk.md":
        markdown = re.sub(r"!\[.*\]\(pictures/walk.png\)", WALK, markdown)
    if not place.endswith((".md", ".ipynb")):
        return markdown
    here = posixpath.dirname(page.file.src_uri)

    def lead(link: re.Match[str]) -> str:
        target = posixpath.normpath(posixpath.join(posixpath.dirname(place), link[1]))
        return f"]({posixpath.relpath(_place_in_site(target), here or '.')}"

    parts = FENCE.split(markdown)
    parts[::2] = [LINK.sub(lead, text) for text in parts[::2]]
    parts[1::2] = [re.sub(r"\A```(\w+) \w+$", r"```\1", p, flags=re.M) for p in parts[1::2]]
    return "".join(parts)


def on_page_content(html_: str, page: Any, **_: Any) -> str:
    """Make HTML of the formulas.

    Raises:
        PluginError: KaTeX cannot read one of them.
    """
    found = [(html.unescape(f[2]), f[1] == "div") for f in FORMULA.finditer(html_)]
    if not found:
        return html_
    run = subprocess.run(
        ["node", str(Path(__file__).with_name("katex.js")), str(MODULES / "katex")],
        input=json.dumps(found),
        capture_output=True,
        encoding="utf-8",
        check=False,
    )
    if run.returncode:
        raise PluginError(f"{page.file.src_uri}: {run.stderr}")
    made = iter(json.loads(run.stdout))
    return FORMULA.sub(lambda f: f"<{f[1]} data-search-exclude>{next(made)}</{f[1]}>", html_)


def _pages_of(notebook: File, config: Any) -> Iterator[File]:
    """A notebook as a page, and its pictures."""
    path = Path(notebook.src_uri)
    names = {"unique_key": path.stem, "output_files_dir": "."}
    text, made = MarkdownExporter().from_filename(str(notebook.abs_src_path), resources=names)
    yield File.generated(config, path.with_suffix(".md").as_posix(), content=text)
    for name, picture in made["outputs"].items():
        yield File.generated(config, (path.parent / name).as_posix(), content=picture)


def _repository_files(pages: list[str]) -> Iterator[str]:
    """The files and folders outside of docs/ that these pages link to, and those that they do."""
    known = set(pages)
    while pages:
        page = pages.pop()
        text = "".join(FENCE.split((ROOT / page).read_text("utf-8"))[::2])
        for link in LINK.findall(text):
            target = posixpath.normpath(posixpath.join(posixpath.dirname(page), link))
            if target in known or target.startswith("docs/") or not (ROOT / target).exists():
                continue
            known.add(target)
            yield target
            if target.endswith(".md"):
                pages.append(target)


def _place_in_site(path: str) -> str:
    """Where the site has a file or folder of the repository."""
    if path == "README.md":
        return "index.md"
    if path.startswith("docs/"):
        return re.sub(r"\.ipynb$", ".md", path.removeprefix("docs/"))
    is_shown = path.endswith((".md", ".png"))
    return f"repository/{path}" if is_shown else f"repository/{path}.md"


def _place_in_repository(path: str) -> str:
    """Which file of the repository a page of the site shows."""
    if path == "index.md":
        return "README.md"
    if not path.startswith("repository/"):
        notebook = f"docs/{path.removesuffix('.md')}.ipynb"
        return notebook if (ROOT / notebook).exists() else f"docs/{path}"
    place = path.removeprefix("repository/")
    return place if (ROOT / place).exists() else place.removesuffix(".md")


def _copy(path: str, config: Any) -> File:
    """A file of the repository as a page; of a folder, the list of its files."""
    place, source = _place_in_site(path), ROOT / path
    if path.endswith(".png"):
        return File.generated(config, place, abs_src_path=str(source))
    if path.endswith(".md"):
        text = source.read_text("utf-8")
    elif source.is_dir():
        rows = [f"| `{f.relative_to(source)}` | {_summary(f)} |" for f in _modules(source)]
        text = "\n".join([f"# `{path}/`", "", "| File | Contents |", "|---|---|", *rows])
    else:
        language = "python" if path.endswith(".py") else "text"
        text = f"# `{path}`\n\n````{language}\n{source.read_text('utf-8')}````\n"
    hidden = "---\nsearch:\n  exclude: true\n---\n\n"
    return File.generated(config, place, content=hidden + text, inclusion=InclusionLevel.NOT_IN_NAV)


def _modules(folder: Path) -> list[Path]:
    return sorted(path for path in folder.rglob("*.py") if path.stat().st_size)


def _summary(module: Path) -> str:
    """The first line of its docstring."""
    docstring = ast.get_docstring(ast.parse(module.read_text("utf-8"))) or ""
    return docstring.partition("\n")[0].replace("|", r"\|")
