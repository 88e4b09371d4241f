"""Options from a dataclass, through tyro; a wrong option ends the program with one line and code 2.

This module imports quickly, so that a program can import it first and `run` the rest: from then on
an interrupt ends the program cleanly.
"""

import atexit
import contextlib
import io
import os
import re
import signal
import sys
import threading
from collections.abc import Callable, Iterator, Sequence
from types import FrameType
from typing import Any, NoReturn, TypeVar

Config = TypeVar("Config")

LARGEST_FLOAT32 = (2 - 2**-23) * 2.0**127

_SIGHUP: int = getattr(signal, "SIGHUP", 0)  # Windows has none


def parse(
    config: type[Config],
    arguments: Sequence[str] | None,
    program: str,
    default: Config | None = None,
) -> Config:
    """Parse the options of a dataclass; a ValueError that it raises counts as a wrong option.

    Options that are not among the arguments have the values of `default`, if it is given.

    Raises:
        SystemExit: With code 2, after one line on stderr, if an option is unknown or a value
            impossible; with code 0 after --help.
    """
    import tyro  # takes a while

    given: list[str] = []
    for argument in sys.argv[1:] if arguments is None else arguments:
        given += argument.split("=", 1) if argument.startswith("--") else [argument]
    if "" in given:  # such as an unset variable of the shell
        place = given.index("")
        refuse(program, f"{given[place - 1] if place else 'an argument'} must not be empty")
    said = io.StringIO()
    try:
        with contextlib.redirect_stderr(said):
            return tyro.cli(
                config,
                args=given,
                prog=program,
                default=tyro.MISSING_NONPROP if default is None else default,
                config=(tyro.conf.FlagCreatePairsOff,),
            )
    except SystemExit as stop:
        if not stop.code:
            raise
        refuse(program, _reason(said.getvalue(), config))


def require_counts(config: object, *names: str) -> None:
    """Check that options are at least 1. This and the next three are for a `__post_init__`.

    Raises:
        ValueError: One of them is less.
    """
    for name in names:
        value = getattr(config, name)
        if value < 1:
            raise ValueError(f"--{name.replace('_', '-')} must be at least 1; got {value}")


def require_sizes(sizes: Sequence[int]) -> None:
    """Check that every hidden layer has neurons; raise a ValueError otherwise."""
    if any(size < 1 for size in sizes):
        raise ValueError(f"--hidden must be sizes of at least 1; got {sizes}")


def require_rate(rate: float) -> None:
    """Check that a learning rate is above 0 and fits into float32; raise a ValueError otherwise."""
    if not 0 < rate <= LARGEST_FLOAT32:
        raise ValueError(
            f"--learning-rate must be above 0 and at most {LARGEST_FLOAT32:.1e}; got {rate}"
        )


def require_seed(seed: int) -> None:
    """Check that PyTorch's generators take a seed; raise a ValueError otherwise."""
    if not 0 <= seed < 2**63:
        raise ValueError(f"--seed must be from 0 to 2^63 - 1; got {seed}")


def refuse(program: str, reason: object) -> NoReturn:
    """Say in one line what is wrong, and exit with code 2."""
    print(f"{program}: {' '.join(str(reason).split())}", file=sys.stderr)
    sys.exit(2)


def run(main: Callable[[], int]) -> NoReturn:
    """Run a program as a command: if it is stopped from outside, it ends without a traceback.

    One of several processes that `torchrun` starts ends as soon as its exit handlers have run.
    Python's shutdown would come after that. A thread of Gloo may still hold tensors of the last
    message then, and aborts the process when it releases them (PyTorch's issue 190489).
    """
    received: list[KeyboardInterrupt] = []
    code: object = 1  # after any other exception
    if os.environ.get("WORLD_SIZE", "1") != "1":
        atexit.register(lambda: _end(code))  # the first handler is the last to run

    def stop(number: int, frame: FrameType | None) -> NoReturn:  # noqa: ARG001
        received.append(_interrupt(number))
        raise received[-1]

    signal.signal(signal.SIGTERM, stop)
    if signal.getsignal(signal.SIGINT) is signal.default_int_handler:  # not where it is ignored
        signal.signal(signal.SIGINT, stop)
    if _SIGHUP and signal.getsignal(_SIGHUP) is signal.SIG_DFL:  # nohup ignores it
        signal.signal(_SIGHUP, stop)
    threading.excepthook = _in_a_thread
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(errors="backslashreplace")  # so that any terminal can show it
    try:
        code = main()
        if sys.stdout is not None:
            sys.stdout.flush()
    except SystemExit as leave:
        code = leave.code
    except KeyboardInterrupt as interrupt:
        code = stopped(interrupt)
    except Exception as error:
        # An interrupted import may go on and fail because something is missing: NumPy's does.
        if received:
            code = stopped(received[0])
        elif isinstance(error, OSError):
            code = _failed(error)
        else:
            raise
    sys.exit(code)


def _end(code: object) -> NoReturn:
    for stream in (sys.stdout, sys.stderr):
        if stream is not None:
            with contextlib.suppress(OSError, ValueError):
                stream.flush()
    os._exit(code if isinstance(code, int) else int(code is not None))


class Terminated(KeyboardInterrupt):
    """The signal SIGTERM, which ends a program in the same way as Ctrl-C."""


class HungUp(KeyboardInterrupt):
    """The signal SIGHUP, which does so as well: the terminal was closed."""


_STOPS: dict[type[KeyboardInterrupt], tuple[str, int]] = {
    Terminated: ("terminated", signal.SIGTERM),
    HungUp: ("hung up", _SIGHUP),
}


def _interrupt(number: int) -> KeyboardInterrupt:
    """What to raise for a signal."""
    if number == _SIGHUP:
        signal.signal(_SIGHUP, signal.SIG_IGN)  # the shell and the system each send one
        _leave_closed_terminal()
        return HungUp()
    return Terminated() if number == signal.SIGTERM else KeyboardInterrupt()


def _leave_closed_terminal() -> None:
    """Let what is written to a terminal that is gone vanish; it would be an error."""
    for descriptor in (1, 2):
        try:
            os.write(descriptor, b"")
        except OSError:
            os.dup2(os.open(os.devnull, os.O_WRONLY), descriptor)


@contextlib.contextmanager
def finish_first(every_time: bool = False) -> Iterator[list[KeyboardInterrupt]]:
    """Let the body finish what it is doing when SIGINT, SIGTERM or SIGHUP arrives.

    Yields an empty list, to which the first signal is added instead of being raised. A second one
    is raised at once, unless both are SIGHUP. Signals that are ignored still are.

    Args:
        every_time: Whether later signals are added to the list, too, also after the body: for a
            process that `torchrun` stops, which is about to end then, and has said why.
    """
    received: list[KeyboardInterrupt] = []
    before: dict[int, Any] = {}

    def note(number: int, frame: FrameType | None) -> None:  # noqa: ARG001
        if not every_time:
            restore()
        received.append(_interrupt(number))

    def restore() -> None:
        for number, handler in before.items():
            signal.signal(number, handler)

    if threading.current_thread() is threading.main_thread():  # others cannot set handlers
        for number in filter(None, (signal.SIGINT, signal.SIGTERM, _SIGHUP)):
            if signal.getsignal(number) is not signal.SIG_IGN:
                before[number] = signal.signal(number, note)
    try:
        yield received
    finally:
        if not every_time:
            restore()


def stopped(stop: KeyboardInterrupt, kept: str = "") -> int:
    """Say in one line that the program was stopped, and what is kept; return the exit code."""
    word, number = _STOPS.get(type(stop), ("interrupted", signal.SIGINT))
    print("; ".join([word, *([kept] if kept else [])]), file=sys.stderr)
    return 128 + number  # as a shell reports it


def _failed(error: OSError) -> int:
    """Say what could not be read or written, unless a reader just left; return the exit code."""
    if sys.stdout is not None:
        with contextlib.suppress(OSError):
            sys.stdout.flush()
        # Python flushes stdout again at exit, and that must succeed.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
    if isinstance(error, BrokenPipeError):
        return 128 + 13  # as a shell reports the signal SIGPIPE
    print(f"stopped: {error}", file=sys.stderr)
    return 1


def _in_a_thread(failed: threading.ExceptHookArgs) -> None:
    # What TensorBoard's writer thread fails to write makes the next call of the writer raise, too.
    is_raised_again = type(failed.thread).__module__.startswith("tensorboard.")
    if not (is_raised_again and issubclass(failed.exc_type, OSError)):
        threading.__excepthook__(failed)


def _reason(box: str, config: type) -> str:
    """What tyro says in its box: the first paragraph below the title, and its suggestions.

    If the terminal can show a border, the title is in the border; otherwise it is above a rule.
    """
    has_border = box.lstrip().startswith("╭")
    text = "\n".join(line.strip("│ ") for line in box.splitlines() if line[:1] not in "╭╰")
    paragraphs = re.split(r"^[─-]{2,}$", text, flags=re.MULTILINE)
    if not has_border and len(paragraphs) > 1:
        del paragraphs[0]
    words = " ".join(paragraphs[0].split())
    reason = re.sub(r" ([.,])", r"\1", words)  # a line was broken before the full stop
    reason = reason.removeprefix(f"Error parsing {config.__name__}: ")
    several = re.fullmatch(r"Error parsing (--\S+): Could not find valid parse .*\[(.*)\]", reason)
    if several:
        option, values = several.groups()
        return f"{option} must be whole numbers, separated by spaces; got {values}"
    number = re.fullmatch(r"Error parsing (--\S+): (invalid literal|could not) .*?: ('.*')", reason)
    if number:
        option, kind, value = number.groups()
        wanted = "a whole number" if kind == "invalid literal" else "a number"
        return f"{option} must be {wanted}; got {value}"
    meant = [
        option
        for paragraph in paragraphs[1:]
        if paragraph.strip().startswith("Perhaps you meant")
        for option in re.findall(r"^(--[\w-]+)", paragraph, flags=re.MULTILINE)
    ]
    return f"{reason}. Perhaps you meant {' or '.join(meant)}?" if meant else reason
