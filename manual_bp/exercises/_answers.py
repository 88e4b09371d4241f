"""The learner's file: how it is loaded, and how its functions are called."""

import contextlib
import io
import linecache
import signal
import sys
import threading
import traceback
import types
import warnings
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch

SECONDS = 2.0
_SHOWN = 2000
_MODULE = "__answers__"
_AUTOGRAD = {"autograd", "func", "functorch", "requires_grad", "requires_grad_"}
# What PyTorch says to a backward() where nothing is recorded.
_NOT_RECORDED = "does not require grad"


class UnusableError(Exception):
    """The file cannot be used. The message says why in one line."""


class UnwrittenError(Exception):
    """The function is still as `start` wrote it."""


class ByAutogradError(Exception):
    """The function has autograd compute the gradient."""


class RaisedError(Exception):
    """The learner's function raised an error, `cause`, or took too long."""

    def __init__(self, cause: BaseException, place: str) -> None:
        super().__init__(place)
        self.cause, self.place = cause, place


class TooLongError(BaseException):
    """Not an Exception, so that the learner's `except Exception` does not catch it."""

    def __str__(self) -> str:
        return f"it was not done after computing for {SECONDS:g} s: an endless loop?"


class Printed(io.StringIO):
    """The beginning of what a learner's code prints."""

    def write(self, text: str) -> int:
        """Keep the text, unless there is enough already."""
        if self.tell() < _SHOWN:
            super().write(text[:_SHOWN])
        return len(text)


@dataclass(frozen=True)
class Answers:
    """The names in a learner's file, and whether its samples are columns.

    printed: What its code printed.
    """

    path: Path
    names: dict[str, Any]
    columns: bool = False
    printed: Printed = field(default_factory=Printed)

    def call(self, name: str, arguments: Callable[[bool], list[Any]]) -> tuple[Any, list[Any]]:
        """The result of a function, and its arguments afterwards.

        Args:
            name: The name of the function.
            arguments: Makes them, given whether they are torch's tensors or NumPy's arrays.

        Raises:
            UnwrittenError: There is no such function, or only its stub.
            ByAutogradError: It uses autograd.
            RaisedError: It raises an error, or does not end.
        """
        function = self.names.get(name)
        if not callable(function):
            raise UnwrittenError
        tries, uses_autograd = self._looked_up(function)
        if uses_autograd:
            raise ByAutogradError
        first = None
        for as_torch in tries:
            values = arguments(as_torch)
            try:
                return self._run(function, values), values
            except RaisedError as error:
                first = first or error
                if not isinstance(error.cause, TypeError | AttributeError):
                    break
        raise first or UnwrittenError

    def _run(self, function: Callable[..., Any], arguments: list[Any]) -> Any:
        with guarded(self.printed):
            try:
                # Nothing is recorded here, so that backward() cannot give the answer.
                with time_limit(SECONDS), torch.inference_mode():
                    return function(*arguments)
            except KeyboardInterrupt:
                raise
            except BaseException as error:
                if _is_from_stub(error):
                    raise UnwrittenError from None
                if _NOT_RECORDED in str(error):
                    raise ByAutogradError from None
                raise RaisedError(error, place_of(error, self.path)) from None

    def _looked_up(self, function: Any) -> tuple[list[bool], bool]:
        """Whether to try a function with tensors, likeliest first, and whether it uses autograd."""
        todo, seen = [function], set()
        names: set[str] = set()
        modules: set[str] = set()
        while todo:
            code = getattr(todo.pop(), "__code__", None)
            if code is None or code in seen:
                continue
            seen.add(code)
            inner = [c for c in code.co_consts if isinstance(c, types.CodeType)]
            used = {n for c in (code, *inner) for n in c.co_names}
            names |= {part for name in used for part in name.split(".")}
            names |= {name for c in (code, *inner) for name in _keywords(c)}
            found = [self.names[name] for name in used if name in self.names]
            modules |= set(map(_module_of, found))
            todo += [f for f in found if isinstance(f, types.FunctionType)]
        libraries = names | {module.partition(".")[0] for module in modules}
        imported = {_module_of(value).partition(".")[0] for value in self.names.values()}
        known = {"torch", "numpy"}
        uses_torch = "torch" in libraries or (
            not libraries & known and imported & known == {"torch"}
        )
        # The error of another library's arrays would be no help, nor a right answer by them.
        is_only_one = len((libraries | imported) & known) == 1
        tries = [uses_torch] if is_only_one else [uses_torch, not uses_torch]
        of_autograd = any(m.startswith(("torch.autograd", "torch._functorch")) for m in modules)
        return tries, of_autograd or (uses_torch and bool(names & _AUTOGRAD))


def _module_of(value: Any) -> str:
    return str(getattr(value, "__module__", None) or getattr(value, "__name__", ""))


def _is_from_stub(error: BaseException) -> bool:
    """Whether the called function itself, and nothing that it uses, says it is not written."""
    _, *frames = traceback.extract_tb(error.__traceback__)
    stub_line = "raise NotImplementedError"
    return (
        isinstance(error, NotImplementedError)
        and len(frames) == 1
        and (frames[0].line or "").startswith(stub_line)
    )


def _keywords(code: types.CodeType) -> set[str]:
    tuples = [c for c in code.co_consts if isinstance(c, tuple)]
    return {name for c in tuples for name in c if isinstance(name, str)}


def load(path: Path) -> Answers:
    """Run a learner's file.

    Raises:
        UnusableError: It cannot be read or run, or its SAMPLES is neither "rows" nor "columns".
    """
    try:
        source = path.read_text("utf-8")
    except FileNotFoundError:
        raise UnusableError(f"{path} does not exist; `start {path}` writes it") from None
    except (OSError, UnicodeDecodeError) as error:
        raise UnusableError(f"{path} cannot be read: {error}") from None
    module = types.ModuleType(_MODULE)
    module.__file__ = str(path)
    sys.modules[_MODULE] = module  # where dataclasses look for it
    sys.path.insert(0, str(path.parent.resolve()))
    printed = Printed()
    with guarded(printed):
        try:
            with time_limit(10 * SECONDS):
                exec(compile(source, str(path), "exec"), module.__dict__)
        except KeyboardInterrupt:
            raise
        except BaseException as error:
            place = place_of(error, path)
            raise UnusableError(f"{path} cannot be run: {place}{one_line(error)}") from None
    samples = module.__dict__.get("SAMPLES", "rows")
    if samples not in ("rows", "columns"):
        raise UnusableError(f'SAMPLES in {path} must be "rows" or "columns"; got {samples!r}')
    return Answers(path, module.__dict__, samples == "columns", printed)


@contextlib.contextmanager
def guarded(printed: Printed) -> Iterator[None]:
    """Keep what is printed, and the warnings of NumPy to ourselves."""
    with contextlib.redirect_stdout(printed), warnings.catch_warnings(), np.errstate(all="ignore"):
        warnings.simplefilter("ignore")
        yield


@contextlib.contextmanager
def time_limit(seconds: float) -> Iterator[None]:
    """Raise a TooLongError in the code within if it computes for longer, where the system can."""
    is_possible = hasattr(signal, "setitimer")
    if not is_possible or threading.current_thread() is not threading.main_thread():
        yield
        return

    def stop(*_: object) -> None:
        raise TooLongError

    before = signal.signal(signal.SIGVTALRM, stop)
    signal.setitimer(signal.ITIMER_VIRTUAL, seconds)
    try:
        yield
    finally:
        signal.setitimer(signal.ITIMER_VIRTUAL, 0)
        signal.signal(signal.SIGVTALRM, before)


def place_of(error: BaseException, path: Path) -> str:
    """The line of the learner's file where an error comes from; empty if it has none."""
    frames = [f for f in traceback.extract_tb(error.__traceback__) if f.filename == str(path)]
    if not frames:
        return ""
    line = linecache.getline(str(path), frames[-1].lineno or 0).strip()
    return f"line {frames[-1].lineno}, `{line}`: "


def one_line(error: BaseException) -> str:
    """An error in one short line."""
    text = " ".join(str(error).split())
    text = text if len(text) <= 160 else f"{text[:157]}..."
    if isinstance(error, TooLongError):
        return text
    return f"{type(error).__name__}: {text}" if text else type(error).__name__
