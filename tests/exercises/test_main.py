"""The command: the list, a new file, and what is right in it."""

import re
from collections.abc import Sequence
from pathlib import Path

import pytest

from manual_bp.exercises.__main__ import main
from manual_bp.exercises._answers import load
from manual_bp.exercises._judge import judge
from manual_bp.exercises.course import COURSE


class Command:
    def __init__(self, capsys: pytest.CaptureFixture[str]) -> None:
        self.capsys = capsys

    def __call__(self, *arguments: str, code: int = 0) -> list[str]:
        assert main(arguments) == code
        return self.capsys.readouterr().out.splitlines()

    def refused(self, *arguments: str) -> str:
        with pytest.raises(SystemExit) as stopped:
            main(arguments)
        assert stopped.value.code == 2
        printed = self.capsys.readouterr()
        assert printed.out == ""
        (line,) = printed.err.splitlines()
        assert line.startswith("python -m manual_bp.exercises: ")
        return line


@pytest.fixture
def command(
    capsys: pytest.CaptureFixture[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> Command:
    monkeypatch.chdir(tmp_path)
    return Command(capsys)


def states(lines: Sequence[str]) -> list[str]:
    rows = [re.match(r"^ ?\d+  (done|wrong|to do) ", line) for line in lines]
    return [row[1] for row in rows if row]


def test_the_list_has_twelve_exercises_and_says_how_to_begin(command: Command) -> None:
    lines = command()
    assert states(lines) == ["to do"] * 12
    assert lines[-1].endswith("python -m manual_bp.exercises start answers.py")


@pytest.mark.parametrize("form", ["rows", "columns"])
def test_a_new_file_is_all_to_do_and_tells_the_shapes(form: str, command: Command) -> None:
    command("start", "answers.py", *(["--columns"] if form == "columns" else []))
    answers = load(Path("answers.py"))
    assert answers.columns == (form == "columns")
    assert {judge(exercise, answers).state for exercise in COURSE} == {"to do"}
    for exercise in COURSE:
        text = answers.names[exercise.function].__doc__
        assert exercise.title in text
        assert all(f"    {name}: " in text for name in (*exercise.arguments, *exercise.results))
        assert max(map(len, text.splitlines())) <= 100
    shapes = {"rows": ("(N, in)", "(out,)"), "columns": ("(in, N)", "(out, 1)")}
    for shape in shapes[form]:
        assert shape in answers.names["linear_sigmoid_backward"].__doc__


def test_a_file_is_never_overwritten(command: Command) -> None:
    Path("answers.py").write_text("mine", "utf-8")
    assert "answers.py is there already" in command.refused("start", "answers.py")
    assert Path("answers.py").read_text("utf-8") == "mine"


SIGMOID = """
import numpy as np
def sigmoid_prime(z):
    print("here")
    a = 1 / (1 + np.exp(-z))
    return a * (1 - a)
"""
WRONG = """
def grad_b(delta):
    return delta.mean(axis=0)
def grad_w(delta, a_prev):
    return a_prev.T @ delta
"""


def test_check_lists_all_and_explains_the_first_wrong_one(command: Command) -> None:
    Path("answers.py").write_text(SIGMOID + WRONG, "utf-8")
    lines = command("check", "answers.py", code=1)
    assert states(lines) == ["done", "to do", "to do", "wrong", "wrong", *["to do"] * 7]
    text = "\n".join(lines[12:])
    assert text.startswith("\n4 grad_b: averaged over the 2 samples")
    assert "transpose" not in text
    assert "Your code printed:\n    here" in text
    assert lines[-1].endswith("check answers.py 5")
    assert "transpose" in "\n".join(command("check", "answers.py", "5", code=1))
    assert states(command()) == states(lines)  # the list knows answers.py


def test_a_right_answer_is_told_where_the_package_does_the_same(command: Command) -> None:
    Path("answers.py").write_text(SIGMOID, "utf-8")
    assert command("check", "answers.py", "1")[0] == (
        "1 sigmoid_prime: right. The same in this package: manual_bp/layers/sigmoid.py"
    )
    assert command("check", "answers.py", code=1)[-1] == "Next is 2, output_delta."


def test_every_place_that_is_named_exists() -> None:
    root = Path(__file__).parents[2]
    for exercise in COURSE:
        places = re.findall(r"[\w/]+\.(?:py|md)", exercise.where)
        assert places
        assert all((root / place).exists() for place in places)


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        (["check", "nothing.py"], "nothing.py does not exist; `start nothing.py` writes it"),
        (["check", "."], ". cannot be read"),
        (["check", "answers.py", "13"], "number must be from 1 to 12; got 13"),
        (["check", "answers.py", "two"], "invalid int value: 'two'"),
        (["check"], "file"),
        (["start", "no/folder/answers.py"], "cannot be written"),
        (["finish"], "finish"),
    ],
)
def test_unusable_input_gets_one_line(
    arguments: Sequence[str], says: str, command: Command
) -> None:
    assert says in command.refused(*arguments)
