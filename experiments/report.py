"""What a run logged, as one page that needs no server and no network."""

import base64
import re
from collections.abc import Mapping, Sequence
from io import StringIO
from pathlib import Path
from typing import Any

import jinja2
from markupsafe import Markup, escape
from matplotlib import rc_context
from matplotlib.figure import Figure
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from experiments.board import CHARTS

NAME = "report.html"
_TEMPLATE = Path(__file__).with_suffix(".html")

# Figures have no background, and their grey can be read on white and on black.
_STYLE: Any = {
    "axes.edgecolor": "#808890",
    "axes.grid": True,
    "axes.labelcolor": "#808890",
    "axes.spines.right": False,
    "axes.spines.top": False,
    "font.size": 12,
    "grid.alpha": 0.3,
    "legend.frameon": False,
    "legend.labelcolor": "#808890",
    "svg.fonttype": "none",
    "svg.hashsalt": "report",  # so that the same curves make the same page
    "xtick.color": "#808890",
    "ytick.color": "#808890",
}

Curve = tuple[Sequence[int], Sequence[float]]  # steps, values


def write_report(folder: Path, config: Mapping[str, Any], lines: Sequence[str]) -> Path:
    """Write report.html to the folder of a run, from what it logged; return its path.

    Args:
        folder: The folder of the run, with the event files of a `Board`.
        config: Every option of the run.
        lines: What the run concluded, one line each.
    """
    curves, images = _logged(folder)
    parts: dict[str, list[dict[str, str]]] = {}
    for tag, description in CHARTS:
        group, _, title = tag.partition("/")
        part: dict[str, str] = {"title": title, "description": _markup(description)}
        if tag in curves:
            part["svg"] = _chart(curves[tag])
        elif tag in images:
            part["png"] = base64.b64encode(images[tag]).decode()
        else:
            continue
        parts.setdefault(group.lstrip("0123456789. "), []).append(part)
    environment = jinja2.Environment(autoescape=True, undefined=jinja2.StrictUndefined)
    template = environment.from_string(_TEMPLATE.read_text("utf-8"))
    page = template.render(name=folder.name, lines=lines, parts=parts, config=config)
    path = folder / NAME
    path.write_text(page, "utf-8")
    return path


def _markup(description: str) -> Markup:
    """A description as HTML, with raised and lowered letters."""
    text = str(escape(description.replace("**", "")))
    for sign, element in (("\\^", "sup"), ("_", "sub")):
        text = re.sub(rf"{sign}(\w|\([^)]*\))", rf"<{element}>\1</{element}>", text)
    return Markup(text)


def _logged(folder: Path) -> tuple[dict[str, dict[str, Curve]], dict[str, bytes]]:
    """The curves of each chart, by the names of their folders, and the last image of each."""
    curves: dict[str, dict[str, Curve]] = {}
    images: dict[str, bytes] = {}
    for place in sorted({path.parent for path in folder.rglob("events.out.tfevents.*")}):
        found: Any = EventAccumulator(str(place), size_guidance={"scalars": 0, "images": 1})
        found.Reload()
        for tag in found.Tags()["scalars"]:
            points = found.Scalars(tag)
            curve = [p.step for p in points], [p.value for p in points]
            curves.setdefault(tag, {})[place.name] = curve
        for tag in found.Tags()["images"]:
            images[tag] = found.Images(tag)[-1].encoded_image_string
    return curves, images


def _chart(curves: Mapping[str, Curve]) -> str:
    """An SVG element with a line for each curve."""
    with rc_context(_STYLE):
        figure = Figure(figsize=(6, 3.4), layout="constrained")
        axes = figure.add_subplot(xlabel="updates")
        for name, (steps, values) in curves.items():
            axes.plot(steps, values, label=name)
        axes.legend()
        file = StringIO()
        figure.savefig(file, format="svg", transparent=True, metadata={"Date": None})
    return re.sub(r"^.*?(?=<svg)", "", file.getvalue(), flags=re.DOTALL)
