"""What a run logged, as one page that needs no server and no network."""

import base64
import re
from collections.abc import Mapping, Sequence
from io import StringIO
from pathlib import Path
from typing import Any

import jinja2
from markupsafe import Markup, escape
from matplotlib import colormaps, rc_context
from matplotlib.figure import Figure
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from experiments import checkpoint
from experiments.board import CHARTS, event_files

NAME = "report.html"
_TEMPLATE = Path(__file__).with_suffix(".html")

# Figures have no background, and their grey can be read on white and on black.
_STYLE: Any = {
    "axes.edgecolor": "#808890",
    "axes.formatter.limits": (-3, 4),  # what is wider would not fit
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

_MOST_IN_LEGEND = 8
_MOST_NUMBERS = 5000  # in a chart; each takes about 25 bytes

# Steps and values; for a distribution its median, and the lower and the upper end of a band.
Curve = tuple[Sequence[float], ...]
_MEDIAN_ONLY = " The line is the median."
_WITH_BAND = " The line is the median; the band has the middle two thirds."
# In hundredths of a percent: a normal distribution has its standard deviation at the outer two.
_MEDIAN, _LOW, _HIGH = 5000, 1587, 8413


def write_report(folder: Path, config: Mapping[str, Any], lines: Sequence[str]) -> Path:
    """Write report.html to the folder of a run, from what it logged; return its path.

    Args:
        folder: The folder of the run, with the event files of a `Board`.
        config: Every option of the run.
        lines: What the run concluded, one line each.

    Raises:
        OSError: It cannot be written; an earlier one is still there.
    """
    curves, images = _logged(folder)
    parts: dict[str, list[dict[str, str]]] = {}
    for tag, description in CHARTS:
        group, _, title = tag.partition("/")
        about = _markup(description + _about_lines(curves.get(tag, {})))
        part: dict[str, str] = {"title": title, "description": about}
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
    checkpoint.write(path, page.encode())
    return path


def _about_lines(curves: Mapping[str, Curve]) -> str:
    """What the lines of a chart are if they are distributions; many bands would hide each other."""
    if not any(len(curve) > 2 for curve in curves.values()):
        return ""
    return _MEDIAN_ONLY if len(curves) > _MOST_IN_LEGEND else _WITH_BAND


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
    for place in sorted(map(folder.joinpath, event_files(folder)), key=_in_order):
        found: Any = EventAccumulator(str(place), size_guidance={"scalars": 0, "images": 1})
        found.Reload()
        for tag in found.Tags()["scalars"]:
            points = found.Scalars(tag)
            curve = [p.step for p in points], [p.value for p in points]
            curves.setdefault(tag, {})[place.name] = curve
        for tag in found.Tags()["distributions"]:
            curves.setdefault(tag, {})[place.name] = _distribution(found.CompressedHistograms(tag))
        for tag in found.Tags()["images"]:
            images[tag] = found.Images(tag)[-1].encoded_image_string
    return curves, images


def _distribution(events: Sequence[Any]) -> Curve:
    found = [(event.step, dict(event.compressed_histogram_values)) for event in events]
    parts = ([values[part] for _, values in found] for part in (_MEDIAN, _LOW, _HIGH))
    return [step for step, _ in found], *parts


def _in_order(folder: Path) -> list[tuple[int, str]]:
    """A key that puts layer 2 before layer 10."""
    return [
        (int(part or 0), "") if k % 2 else (0, part)
        for k, part in enumerate(re.split(r"(\d+)", folder.name))
    ]


def _thinned(curves: Mapping[str, Curve]) -> dict[str, Curve]:
    """The curves with so few of their points, the last among them, that a page stays small."""
    numbers = sum(len(part) for _, *parts in curves.values() for part in parts)
    every = -(-numbers // _MOST_NUMBERS) or 1
    return {name: tuple(part[::-every][::-1] for part in curve) for name, curve in curves.items()}


def _chart(curves: Mapping[str, Curve]) -> str:
    """An SVG element with a line for each curve."""
    colours = _colours(len(curves))
    with rc_context(_STYLE):
        figure = Figure(figsize=(6, 3.4))
        # Not by a layout engine, which takes as long as drawing.
        axes = figure.add_axes((0.12, 0.16, 0.86, 0.76), xlabel="updates")
        for (name, curve), colour in zip(_thinned(curves).items(), colours, strict=True):
            steps, values, *band = curve
            axes.plot(steps, values, label=name, color=colour)
            if band and len(curves) <= _MOST_IN_LEGEND:
                low, high = band
                axes.fill_between(steps, low, high, color=colour, alpha=0.25, linewidth=0)
        if len(curves) <= _MOST_IN_LEGEND:
            axes.legend()
        else:  # it would cover the curves; the colours are in the order of the layers
            first, *_, last = curves
            axes.legend(axes.lines[:: len(curves) - 1], [first, last])
        file = StringIO()
        figure.savefig(file, format="svg", transparent=True, metadata={"Date": None})
    return re.sub(r"^.*?(?=<svg)", "", file.getvalue(), flags=re.DOTALL)


def _colours(count: int) -> list[Any]:
    """A colour for each curve: those of many go from one end of a scale to the other."""
    if count <= _MOST_IN_LEGEND:
        return [f"C{k}" for k in range(count)]
    scale = colormaps["turbo"]
    return [scale(0.08 + 0.84 * k / (count - 1)) for k in range(count)]
