"""A table as curves in TensorBoard."""

import math
from collections.abc import Iterable, Mapping
from contextlib import ExitStack, closing
from pathlib import Path
from typing import Any

from torch.utils.tensorboard.writer import FileWriter

from manual_bp.board import add

Row = dict[str, Any]  # of a table: texts, integers and floats by the names of their columns


def log_curves(folder: Path, rows: Iterable[Row], over: str, charts: Mapping[str, str]) -> None:
    """Log a table: a chart for each column of floats, in it a curve for each combination of texts.

    Numbers that are not finite are left out. Each curve is in a folder of its own, since that is
    what TensorBoard gives a colour.

    Args:
        folder: Where the folders are made.
        rows: The table. The texts of a row name its curves.
        over: The column of integers that are the steps of the curves.
        charts: For each column of floats what it is, and over what.
    """
    with ExitStack() as stack:
        writers: dict[str, FileWriter] = {}
        for row in rows:
            curve = "-".join(text for text in row.values() if isinstance(text, str))
            if curve not in writers:
                new: Any = FileWriter(str(folder / curve))
                writers[curve] = stack.enter_context(closing(new))
            for column, value in row.items():
                if isinstance(value, float) and math.isfinite(value):
                    add(writers[curve], (column, charts[column]), row[over], simple_value=value)
