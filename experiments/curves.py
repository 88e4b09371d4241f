"""A table as curves in TensorBoard."""

import math
from collections.abc import Iterable
from contextlib import ExitStack
from pathlib import Path
from typing import Any

from torch.utils.tensorboard.writer import SummaryWriter

Row = dict[str, Any]  # of a table: texts, integers and floats by the names of their columns


def log_curves(folder: Path, rows: Iterable[Row], over: str) -> None:
    """Log a table: a chart for each column of floats, in it a curve for each combination of texts.

    Numbers that are not finite are left out. Each curve is in a folder of its own, since that is
    what TensorBoard gives a colour.

    Args:
        folder: Where the folders are made.
        rows: The table. The texts of a row name its curves.
        over: The column of integers that are the steps of the curves.
    """
    with ExitStack() as stack:
        writers: dict[str, SummaryWriter] = {}
        for row in rows:
            curve = "-".join(text for text in row.values() if isinstance(text, str))
            if curve not in writers:
                writers[curve] = stack.enter_context(SummaryWriter(str(folder / curve)))
            for column, value in row.items():
                if isinstance(value, float) and math.isfinite(value):
                    writers[curve].add_scalar(column, value, row[over])
