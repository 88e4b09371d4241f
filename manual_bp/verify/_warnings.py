"""Tells warnings of the code under test from those of PyTorch about itself."""

import os
import sys
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from types import FrameType
from typing import Any

import torch

# The code that is not under test: PyTorch, this kit, and the file that calls PyTorch for it.
_NOT_JUDGED = (
    *(f"{Path(file).parent}{os.sep}" for file in (torch.__file__, __file__)),
    str(Path(__file__).parents[1] / "_torch.py"),
)
# Modules that warn for their callers: the frame below them raised the warning.
_WARNERS = {"warnings", "_py_warnings", "typing_extensions"}


@contextmanager
def without_pytorch_warnings() -> Iterator[None]:
    """Drop PyTorch's warnings about its own code, of any class and with any text.

    Those are raised by a line of PyTorch, or of this kit, which calls it, and name such a line. A
    warning of the code under test may name one too: with stacklevel=2 it names the caller, and
    PyTorch calls forward and backward. Such warnings meet the filters that were set outside, and
    are shown once each or raised.

    Not to be entered twice: the inner one would take the outer one for PyTorch.
    """
    filters, show = list(warnings.filters), warnings.showwarning
    shown: set[tuple[object, ...]] = set()

    def show_once(
        message: Any, category: Any, filename: str, lineno: int, *more: Any, **_: Any
    ) -> None:
        # One that names its caller names a different line of the kit in each check.
        place = () if _is_pytorch(filename) else (filename, lineno)
        key = (str(message), category, *place)
        if key not in shown:
            shown.add(key)
            show(message, category, filename, lineno, *more)

    def judge(message: Any, category: Any, filename: str, lineno: int, *_: Any, **__: Any) -> None:
        frames = list(_frames(sys._getframe(1)))
        raised_in = next((f.f_code.co_filename for f in frames if not _is_warner(f)), filename)
        if _is_pytorch(raised_in) and _is_pytorch(filename):
            return
        names = [f.f_globals.get("__name__") for f in frames if f.f_code.co_filename == filename]
        with warnings.catch_warnings():
            warnings.filters[:] = filters  # type: ignore[index]
            warnings.showwarning = show_once
            warnings.warn_explicit(message, category, filename, lineno, next(iter(names), None))

    with warnings.catch_warnings(action="always"):
        warnings.showwarning = judge
        yield


def _frames(frame: FrameType | None) -> Iterator[FrameType]:
    while frame is not None:
        yield frame
        frame = frame.f_back


def _is_warner(frame: FrameType) -> bool:
    return frame.f_globals.get("__name__") in _WARNERS


def _is_pytorch(filename: str) -> bool:
    return filename.startswith(_NOT_JUDGED)
