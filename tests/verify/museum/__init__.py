"""Published wrong gradients, each written anew on the CPU: wrong, and fixed."""

import importlib
import pkgutil

from tests.verify.museum._exhibit import DECLARED, Exhibit

__all__ = ["EXHIBITS", "MISSED", "Exhibit"]

_ROOMS = [
    importlib.import_module(f"{__name__}.{found.name}")
    for found in pkgutil.iter_modules(__path__)
    if not found.name.startswith(("_", "test_"))
]

EXHIBITS: tuple[Exhibit, ...] = tuple(
    exhibit
    for room in _ROOMS
    for exhibit in DECLARED
    if exhibit.room == room.__name__ and exhibit.name not in getattr(room, "NOT_YET", ())
)
"""All exhibits that the kit catches, by the file that holds them. NOT_YET names the others."""

MISSED: tuple[Exhibit, ...] = tuple(exhibit for exhibit in DECLARED if exhibit not in EXHIBITS)
"""The others."""
