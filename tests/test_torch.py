"""Private names of PyTorch: all in one file, and without any of them no number is wrong."""

import ast
import re
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.autograd import Function

import manual_bp
from tests import hidden_names

PACKAGE = Path(manual_bp.__file__).parent
FILES = sorted(PACKAGE.rglob("*.py"))
# Names of the standard library.
ALLOWED = {"_asdict", "_fields", "_make", "_replace", "_DummyThread", "_getframe"}

# The private names of PyTorch's modules, tensors, classes and nodes.
PYTORCHS = {
    name
    for owner in (
        torch, torch._C, torch.nn.Linear(1, 1), Tensor, Function, nn.modules.module,
        torch.ones(1, requires_grad=True).sum().grad_fn,
    )
    for name in dir(owner)
    if re.fullmatch("_[A-Za-z].*", name)
}  # fmt: skip


def is_private(name: str) -> bool:
    return re.fullmatch("_[A-Za-z].*", name) is not None


def names_given(tree: ast.AST) -> set[str]:
    """The private names that a file gives to functions, classes, variables and attributes."""
    names = set()
    for node in ast.walk(tree):
        if isinstance(node, ast.FunctionDef | ast.ClassDef):
            names.add(node.name)
        elif isinstance(node, ast.Name) and isinstance(node.ctx, ast.Store):
            names.add(node.id)
        elif isinstance(node, ast.Attribute) and isinstance(node.ctx, ast.Store):
            names.add(node.attr)
        elif isinstance(node, ast.arg):
            names.add(node.arg)
    return set(filter(is_private, names))


PACKAGES = {file.stem for file in FILES}.union(
    *(names_given(ast.parse(file.read_text("utf-8"))) for file in FILES)
)


def names_of_others(source: str) -> Iterator[str]:
    """The private names in a file that are PyTorch's, or at least not the package's.

    They are found in imports, attributes and strings. If both have a name, such as `_parameters`,
    an attribute of self or cls that the same file sets is the package's; any other is PyTorch's.
    """
    tree = ast.parse(source)
    here = names_given(tree)
    for node in ast.walk(tree):
        if isinstance(node, ast.Import | ast.ImportFrom):
            module = getattr(node, "module", None) or ""
            for alias in node.names:
                path = f"{module}.{alias.name}".strip(".").split(".")
                if path[0] == "torch":
                    yield from filter(is_private, path)
        elif isinstance(node, ast.Attribute) and is_private(node.attr):
            is_of_self = isinstance(node.value, ast.Name) and node.value.id in ("self", "cls")
            is_pytorchs = node.attr in PYTORCHS and not (is_of_self and node.attr in here)
            if is_pytorchs or node.attr not in PACKAGES | here | ALLOWED:
                yield node.attr
        elif isinstance(node, ast.Constant):
            name = str(node.value)
            if name in PYTORCHS - here or re.fullmatch(r"_saved_\w+", name):
                yield name


OTHER_FILES = sorted({str(file.relative_to(PACKAGE)) for file in FILES} - {"_torch.py"})


@pytest.mark.parametrize("file", OTHER_FILES)
def test_no_other_file_uses_a_private_name(file: str) -> None:
    assert not list(names_of_others((PACKAGE / file).read_text("utf-8")))


def test_private_names_are_looked_up_where_a_test_can_hide_them() -> None:
    """By getattr or _need, never as a plain attribute."""
    tree = ast.parse(hidden_names.FILE.read_text("utf-8"))
    attributes = {node.attr for node in ast.walk(tree) if isinstance(node, ast.Attribute)}
    assert attributes & PYTORCHS == {"_C"}
    assert len(hidden_names.names()) > 20


@pytest.mark.parametrize(
    ("source", "names"),
    [
        ("from torch.utils._pytree import tree_leaves", ["_pytree"]),
        ("from torch import _C", ["_C"]),
        ("import torch._dynamo", ["_dynamo"]),
        ("torch._C._is_tracing()", ["_is_tracing", "_C"]),
        ("torch.autograd.forward_ad._current_level", ["_current_level"]),
        ("t._version + module._parameters", ["_version", "_parameters"]),
        ("self._parameters", ["_parameters"]),
        ("self._parameters = {}; self._parameters", []),
        ("self._parameters = {}; net._parameters", ["_parameters"]),
        ("getattr(node, '_saved_dim', ())", ["_saved_dim"]),
        ("vars(module)['_forward_hooks']", ["_forward_hooks"]),
        ("from manual_bp import _torch; _torch.version(t); _own(self.__dict__)", []),
    ],
)
def test_private_names_are_found_in_source(source: str, names: list[str]) -> None:
    assert list(names_of_others(source)) == names


def without(*names: str) -> dict[tuple[str, str], str]:
    """The outcome of each question with one name hidden: right, refused or wrong."""
    run = subprocess.run(
        [sys.executable, "-m", "tests.hidden_names", *names],
        capture_output=True, text=True, check=True, cwd=PACKAGE.parent,
    )  # fmt: skip
    outcomes = {}
    for name, question, outcome in map(str.split, run.stdout.splitlines()):
        outcomes[name, question] = outcome
    assert "wrong" not in outcomes.values(), run.stderr
    return outcomes


def in_groups(size: int) -> list[list[str]]:
    names = hidden_names.names()
    return [names[start : start + size] for start in range(0, len(names), size)]


@pytest.mark.parametrize("names", in_groups(25))
def test_without_a_private_name_nothing_is_wrong(names: list[str]) -> None:
    """Each question is answered right, or by an error with the name; layers never refuse."""
    outcomes = without(*names)
    layers = {question.__name__ for question in hidden_names.LAYERS}
    others = {question.__name__ for question in hidden_names.OTHERS}
    assert set(outcomes) == {(name, question) for name in names for question in layers | others}
    assert {
        question for (_, question), outcome in outcomes.items() if outcome == "refused"
    } <= others


def test_with_all_private_names_everything_is_right() -> None:
    assert set(without("none").values()) == {"right"}


def nothing(*_: object) -> Any:
    return None


# Wrong replacements for what `_torch.py` provides.
WRONG = {
    "any_autocast_is_on": nothing,
    "as_no_view": lambda t: t,
    "count_dispatch_modes": lambda: 0,
    "forward_ad_level": lambda: -1,
    "functorch_transforms": list,
    "has_backward_hooks": nothing,
    "has_forward_hooks": nothing,
    "has_global_hooks": nothing,
    "has_tensor_hooks": nothing,
    "is_mapped_by_autograd": nothing,
    "is_tracing": nothing,
    "own_modules": lambda _: {},
    "transforms_are_active": nothing,
    "version": lambda _: 0,
}


def test_each_wrong_fallback_makes_an_answer_wrong() -> None:
    run = subprocess.run(
        [sys.executable, "-c", "from tests import test_torch; test_torch.print_found()"],
        capture_output=True, text=True, check=True, cwd=PACKAGE.parent,
    )  # fmt: skip
    assert set(run.stdout.split()) == set(WRONG), run.stderr


def print_found() -> None:
    """Print each wrong replacement that makes the answer to some question wrong."""
    torch.set_num_threads(1)
    questions = (*hidden_names.LAYERS, *hidden_names.OTHERS)
    for name, replacement in WRONG.items():
        package = hidden_names.load(wrong={name: replacement})
        if any(hidden_names.ask(question, package) == "wrong" for question in questions):
            print(name)
