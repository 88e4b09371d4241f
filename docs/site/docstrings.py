"""How the reference shows our code, where it is not what griffe reads in the source."""

import importlib
import inspect
import re
from typing import Any

import griffe
from torch import nn

PROMISES = re.compile(r"^(Shapes|Units|Saves|Errors|Source): ", re.MULTILINE)


class Promises(griffe.Extension):
    """Each promise of a Function is a paragraph, which begins with its name in bold."""

    def on_instance(self, *, obj: griffe.Object, **_: Any) -> None:
        """Change the docstring of an object."""
        if obj.docstring is not None:
            obj.docstring.value = PROMISES.sub(r"\n**\1:** ", obj.docstring.value)


class Inherited(griffe.Extension):
    """A module whose `__init__` is that of PyTorch's is shown with its arguments."""

    def on_class(self, *, cls: griffe.Class, **_: Any) -> None:
        """Give a class the `__init__` that it inherits."""
        kind = getattr(importlib.import_module(cls.module.path), cls.name, None)
        is_module = isinstance(kind, type) and issubclass(kind, nn.Module)
        if not is_module or "__init__" in cls.members:
            return
        parameters = griffe.Parameters(
            *(
                griffe.Parameter(
                    parameter.name,
                    annotation=None
                    if parameter.annotation is parameter.empty
                    else inspect.formatannotation(parameter.annotation),
                    kind=griffe.ParameterKind.positional_or_keyword,
                    default=None
                    if parameter.default is parameter.empty
                    else str(parameter.default),
                )
                for parameter in inspect.signature(kind).parameters.values()
                if parameter.kind is parameter.POSITIONAL_OR_KEYWORD
            )
        )
        cls.set_member("__init__", griffe.Function("__init__", parameters=parameters))
