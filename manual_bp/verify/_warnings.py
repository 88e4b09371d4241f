"""Which warnings are the candidate's, and which are PyTorch's about itself."""

import os
import sys
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from types import FrameType
from typing import Any

import torch

_PYTORCHS = tuple(f"{Path(file).parent}{os.sep}" for file in (torch.__file__, __file__))
# They warn on behalf of their callers: the frame below theirs is the one that raised.
_WARNERS = {"warnings", "_py_warnings", "typing_extensions"}


@contextmanager
def pytorchs_own_left_out() -> Iterator[None]:
    """Drop the warnings of PyTorch about its own code, whatever their class and text.

    Those are raised by a line of PyTorch (or of this kit, which calls it), and name such a line. A
    candidate's own may name one too: by stacklevel=2 they name the caller, and PyTorch calls
    forward and backward. They meet the filters in force outside, and are shown once each or raised.
    """
    filters, show = list(warnings.filters), warnings.showwarning
    shown: set[tuple[object, ...]] = set()

    def show_once(
        message: Any, category: Any, filename: str, lineno: int, file: Any = None, line: Any = None
    ) -> None:
        # One that names its caller names another line of the kit for each check.
        place = () if _is_pytorchs(filename) else (filename, lineno)
        key = (str(message), category, *place)
        if key not in shown:
            shown.add(key)
            show(message, category, filename, lineno, file, line)

    def judge(
        message: Any, category: Any, filename: str, lineno: int, file: Any = None, line: Any = None
    ) -> None:
        del file, line
        frames = list(_frames(sys._getframe(1)))
        raised_in = next((f.f_code.co_filename for f in frames if not _is_warner(f)), filename)
        if _is_pytorchs(raised_in) and _is_pytorchs(filename):
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


def _is_pytorchs(filename: str) -> bool:
    return filename.startswith(_PYTORCHS)
