import io
import os
import pty
import signal
import subprocess
import sys
import textwrap
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import pytest

from experiments.command_line import finish_first, parse, refuse


@dataclass(frozen=True)
class Options:
    """A program for the test."""

    kind: Literal["plain", "fancy"] = "plain"
    """Which kind."""
    count: int = 3
    """How many."""
    rate: float = 0.5
    """How fast."""
    loud: bool = False
    """Whether to shout."""
    sizes: tuple[int, ...] = (3, 2)
    """Some sizes. --count is something else."""
    folder: Path = Path("runs")
    """Where to write."""

    def __post_init__(self) -> None:
        if self.count < 1:
            raise ValueError(f"--count must be at least 1; got {self.count}")


def test_options_are_parsed_into_the_dataclass() -> None:
    assert parse(Options, [], "prog") == Options()
    assert parse(Options, ["--count", "5"], "prog", Options("fancy", 4)) == Options("fancy", 5)
    arguments = ["--kind", "fancy", "--count", "5", "--loud"]
    assert parse(Options, arguments, "prog") == Options("fancy", 5, loud=True)
    assert parse(Options, ["--sizes", "5", "4"], "prog").sizes == (5, 4)
    assert parse(Options, ["--sizes"], "prog").sizes == ()
    assert parse(Options, ["--folder=a=b"], "prog").folder == Path("a=b")


def test_the_help_shows_all_docstrings(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as stop:
        parse(Options, ["--help"], "prog")
    assert stop.value.code == 0
    shown = capsys.readouterr().out
    assert all(
        word in shown for word in ("A program for the test", "Which kind", "How many", "shout")
    )


@pytest.mark.parametrize("encoding", ["utf-8", "ascii"])
@pytest.mark.parametrize(
    ("arguments", "reason"),
    [
        (["--count", "many"], "prog: --count must be a whole number; got 'many'"),
        (["--count", "1e3"], "prog: --count must be a whole number; got '1e3'"),
        (["--rate", "fast: 3"], "prog: --rate must be a number; got 'fast: 3'"),
        (["--count", "0"], "prog: --count must be at least 1; got 0"),
        (["--count"], "Missing value for argument '--count'"),
        (["--kind", "odd"], "invalid choice 'odd' for argument '--kind'. Expected one of ('plain'"),
        (["--colour", "red"], "Unrecognized options: --colour"),
        (["stray"], "Unrecognized options: stray"),
        (["--coun", "3"], "Unrecognized options: --coun, 3. Perhaps you meant --count?"),
        (["--coun=3"], "Unrecognized options: --coun, 3. Perhaps you meant --count?"),
        (["--szies", "3"], "Unrecognized options: --szies, 3. Perhaps you meant --sizes?"),
        (["--sizes", "5,4"], "--sizes must be whole numbers, separated by spaces; got '5,4'"),
        (["--sizes", "5", "a"], "--sizes must be whole numbers, separated by spaces; got '5', 'a'"),
        (["--sizes=5.5"], "--sizes must be whole numbers, separated by spaces; got '5.5'"),
        (["--folder", ""], "prog: --folder must not be empty"),
        (["--folder="], "prog: --folder must not be empty"),
        (["--count", "3", "--sizes", ""], "prog: --sizes must not be empty"),
        ([""], "prog: an argument must not be empty"),
    ],
)
def test_a_wrong_option_gives_one_line_and_exit_code_2(
    arguments: list[str],
    reason: str,
    encoding: str,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(sys, "stdout", io.TextIOWrapper(io.BytesIO(), encoding))
    with pytest.raises(SystemExit) as stop:
        parse(Options, arguments, "prog")
    assert stop.value.code == 2
    said = capsys.readouterr()
    assert said.err.count("\n") == 1
    assert said.err.startswith("prog: ")
    assert reason in said.err


def test_a_reason_of_several_lines_becomes_one(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        refuse("prog", "first\n   second")
    assert capsys.readouterr().err == "prog: first second\n"


PROGRAM = """
import os, signal, sys, threading, time
from experiments.command_line import finish_first, run
assert not {"torch", "tyro", "numpy"} & set(sys.modules)
signal.signal(signal.SIGINT, signal.default_int_handler)  # background jobs of a shell ignore it

def main():
    print("started", flush=True)
"""
ROOT = Path(__file__).parents[2]


def started(main: str, *, first: str = "") -> "subprocess.Popen[str]":
    """A program that has started to run."""
    body = textwrap.indent(textwrap.dedent(main), "    ")
    program = f"import signal\n{first}\n{PROGRAM}{body}\nrun(main)"
    return subprocess.Popen(
        [sys.executable, "-c", program],
        cwd=ROOT,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )


IMPORTS = """
try:
    time.sleep(60)
except KeyboardInterrupt:
    raise RecursionError("half a module")
"""


STOPS = [
    (signal.SIGINT, "interrupted", 130),
    (signal.SIGTERM, "terminated", 143),
    (signal.SIGHUP, "hung up", 129),
]


@pytest.mark.parametrize("main", ["time.sleep(60)", IMPORTS])
@pytest.mark.parametrize(
    ("number", "word", "code"),
    STOPS,
)
def test_a_signal_ends_a_program_in_one_line(
    number: signal.Signals, word: str, code: int, main: str
) -> None:
    """Even while it imports a module that turns the interrupt into another error."""
    with started(main) as run:
        assert run.stdout is not None
        assert run.stdout.readline() == "started\n"
        run.send_signal(number)
        assert run.communicate() == ("", f"{word}\n")
    assert run.returncode == code


FINISHES = """
from experiments.command_line import finish_first
with finish_first() as received:
    print("ready", flush=True)
    while not received: time.sleep(0.01)
    print("finishing", flush=True)
    time.sleep(60 if "twice" in sys.argv else 0)
    print("finished", flush=True)
raise received[0]
"""


@pytest.mark.parametrize(
    ("number", "word", "code"),
    STOPS,
)
def test_what_must_be_finished_first_is_finished(
    number: signal.Signals, word: str, code: int
) -> None:
    with started(FINISHES) as run:
        assert run.stdout is not None
        assert [run.stdout.readline() for _ in range(2)] == ["started\n", "ready\n"]
        run.send_signal(number)
        assert run.communicate() == ("finishing\nfinished\n", f"{word}\n")
    assert run.returncode == code


def test_a_second_signal_does_not_wait() -> None:
    with started(f"sys.argv.append('twice')\n{FINISHES}") as run:
        assert run.stdout is not None
        assert [run.stdout.readline() for _ in range(2)] == ["started\n", "ready\n"]
        run.send_signal(signal.SIGTERM)
        assert run.stdout.readline() == "finishing\n"
        run.send_signal(signal.SIGINT)
        assert run.communicate() == ("", "interrupted\n")
    assert run.returncode == 130


def test_a_second_hangup_is_one_with_the_first() -> None:
    """When a terminal is closed, the shell and the system each send one."""
    with started(FINISHES.replace("else 0", "else 0.5")) as run:
        assert run.stdout is not None
        assert [run.stdout.readline() for _ in range(2)] == ["started\n", "ready\n"]
        run.send_signal(signal.SIGHUP)
        assert run.stdout.readline() == "finishing\n"
        run.send_signal(signal.SIGHUP)
        assert run.communicate() == ("finished\n", "hung up\n")
    assert run.returncode == 129


def test_a_program_finishes_when_its_terminal_is_closed(tmp_path: Path) -> None:
    """Whatever it writes there would fail from then on."""
    kept = tmp_path / "kept"
    main = textwrap.dedent(f"""
        import fcntl, pathlib, termios
        fcntl.ioctl(1, termios.TIOCSCTTY, 0)
        {{}}
        pathlib.Path({str(kept)!r}).write_text("finished")
        raise received[0]
    """).format(FINISHES[: FINISHES.rindex("raise")])
    program = f"{PROGRAM}{textwrap.indent(main, '    ')}\nrun(main)"
    terminal, its = pty.openpty()
    command = [sys.executable, "-c", program]
    with subprocess.Popen(
        command, cwd=ROOT, stdin=its, stdout=its, stderr=its, start_new_session=True
    ) as run:
        os.close(its)
        said = b""
        while b"ready" not in said:
            said += os.read(terminal, 1000)
        os.close(terminal)
        assert run.wait(timeout=60) == 129
    assert kept.read_text() == "finished"


def test_a_program_that_ignores_hangups_is_not_stopped_by_one() -> None:
    """As nohup starts it."""
    ignores = "signal.signal(signal.SIGHUP, signal.SIG_IGN)"
    goes_on = "os.kill(os.getpid(), signal.SIGHUP); print('goes on'); return 0"
    with started(goes_on, first=ignores) as r:
        assert r.communicate() == ("started\ngoes on\n", "")
    assert r.returncode == 0


def test_a_program_runs_where_there_are_no_hangups() -> None:
    """As on Windows."""
    terminates = "with finish_first(): pass\nos.kill(os.getpid(), signal.SIGTERM)"
    with started(terminates, first="del signal.SIGHUP") as r:
        assert r.communicate() == ("started\n", "terminated\n")
    assert r.returncode == 143


def test_signals_that_are_ignored_stay_ignored_and_others_are_restored() -> None:
    handler = signal.getsignal(signal.SIGTERM)
    before = signal.signal(signal.SIGINT, signal.SIG_IGN)
    try:
        with finish_first() as received:
            assert signal.getsignal(signal.SIGTERM) is not handler
            signal.raise_signal(signal.SIGINT)
        assert received == []
        assert signal.getsignal(signal.SIGINT) is signal.SIG_IGN
        assert signal.getsignal(signal.SIGTERM) is handler
    finally:
        signal.signal(signal.SIGINT, before)


def test_other_threads_leave_the_signals_alone() -> None:
    with ThreadPoolExecutor() as pool:
        assert pool.submit(lambda: list(finish_first().__enter__())).result() == []


@pytest.mark.parametrize(
    ("main", "said"),
    [
        ("sys.stdout = open('/dev/full', 'w'); print(1); return 0", "[Errno 28] No space left on"),
        ("open('/dev/null/x')", "[Errno 20] Not a directory: '/dev/null/x'"),
    ],
)
def test_a_failed_write_ends_a_program_in_one_line(main: str, said: str) -> None:
    with started(main) as run:
        out, err = run.communicate()
    assert run.returncode == 1
    assert out == "started\n"
    assert err.startswith(f"stopped: {said}")
    assert err.count("\n") == 1


LAST = """
import atexit, os
os.environ["WORLD_SIZE"] = "{size}"
class Lasting:
    def __del__(self):
        print("shut down", flush=True)
lasting = Lasting()
"""


@pytest.mark.parametrize(
    ("size", "main", "code", "said"),
    [
        (1, "return 3", 3, ""),
        (2, "return 3", 3, ""),
        (2, "sys.exit(2)", 2, ""),
        (2, "raise KeyboardInterrupt", 130, "interrupted"),
        (2, "1 / 0", 1, "ZeroDivisionError: division by zero"),
    ],
)
def test_one_of_several_processes_ends_without_the_shutdown_of_python(
    size: int, main: str, code: int, said: str
) -> None:
    """In which threads of Gloo abort the process; its own exit handlers run."""
    handler = "atexit.register(print, 'handled'); print('unflushed', end=' ')\n"
    with started(handler + main, first=LAST.format(size=size)) as run:
        out, err = run.communicate()
    assert run.returncode == code
    assert out == "started\nunflushed handled\n" + ("shut down\n" if size == 1 else "")
    assert err.strip().endswith(said)
    assert said or not err


@pytest.mark.parametrize("name", ["train", "train_onnx", "benchmark"])
def test_a_program_can_be_interrupted_while_it_imports(name: str) -> None:
    """Slow imports come after `run`."""
    program = f"""
import runpy, sys
from experiments import command_line
command_line.run = lambda main: sys.exit(sorted({{"torch", "tyro", "numpy"}} & set(sys.modules)))
runpy.run_module("experiments.{name}", run_name="__main__")
sys.exit("run was not called")
"""
    ended = subprocess.run(
        [sys.executable, "-c", program], cwd=ROOT, capture_output=True, text=True, check=False
    )
    assert ended.stderr == "[]\n"


def test_an_oserror_in_a_thread_of_tensorboard_is_left_to_the_main_thread() -> None:
    main = """
        Writer = type("Writer", (threading.Thread,), {"__module__": "tensorboard.writer"})
        for kind, error in ((Writer, OSError), (Writer, KeyError), (threading.Thread, OSError)):
            def fail(error=error): raise error(kind.__name__)
            thread = kind(target=fail)
            thread.start()
            thread.join()
        return 0
    """
    with started(main) as run:
        err = run.communicate()[1]
    assert run.returncode == 0
    raised = [line for line in err.splitlines() if not line.startswith(("Exc", "Tr", " "))]
    assert raised == ["KeyError: 'Writer'", "OSError: Thread"]
