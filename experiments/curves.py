"""A table as curves in TensorBoard."""

import math
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from torch.utils.tensorboard.writer import SummaryWriter

Row = dict[str, Any]  # of a table: texts, integers and floats by the names of their columns


def log_curves(folder: Path, rows: Iterable[Row], over: str) -> None:
    """Log a table: a chart for each column of floats, in it a curve for each combination of texts.

    Numbers that are not finite are left out.

    Args:
        folder: Where the event file is written.
        rows: The table. The texts of a row name its curves.
        over: The column of integers that are the steps of the curves.
    """
    charts: dict[str, dict[str, None]] = {}
    with SummaryWriter(str(folder)) as writer:
        for row in rows:
            curve = "-".join(text for text in row.values() if isinstance(text, str))
            for column, value in row.items():
                if isinstance(value, float) and math.isfinite(value):
                    tag = f"{column}/{curve}"
                    writer.add_scalar(tag, value, row[over])
                    charts.setdefault(column, {})[tag] = None
        layout = {
            column: ["Multiline", [f"^{tag}$" for tag in tags]] for column, tags in charts.items()
        }
        writer.add_custom_scalars({f"over {over}": layout})
