"""`python -m manual_bp.exercises`: the list, `start FILE`, and `check FILE [N]`.

The exit code is 0 if everything that was asked is right, 1 if not, and 2 for unusable input.
"""

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path
from textwrap import wrap
from typing import TYPE_CHECKING, NoReturn

from manual_bp.exercises._answers import Answers, UnusableError, load
from manual_bp.exercises._judge import Verdict, judge
from manual_bp.exercises._stubs import stubs
from manual_bp.exercises.course import COURSE

if TYPE_CHECKING:
    from manual_bp.exercises._exercise import Exercise

PROGRAM = "python -m manual_bp.exercises"
USUAL = Path("answers.py")


class _Parser(argparse.ArgumentParser):
    def error(self, message: str) -> NoReturn:
        refuse(message)


def refuse(reason: str) -> NoReturn:
    """Print one line that says what is wrong, and exit with code 2."""
    print(f"{PROGRAM}: {' '.join(reason.split())}", file=sys.stderr)
    sys.exit(2)


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command line; the exit code."""
    parser = _Parser(PROGRAM, description="Twelve exercises: backpropagation, written by you.")
    commands = parser.add_subparsers(dest="command", parser_class=_Parser)
    first = commands.add_parser("start", help="write a file with twelve functions to fill in")
    first.add_argument("file", type=Path, help="the file to write, such as answers.py")
    first.add_argument(
        "--columns", action="store_true", help="one sample a column, as in the notes; else a row"
    )
    check = commands.add_parser("check", help="say what is right, and what is wrong with the rest")
    check.add_argument("file", type=Path, help="your file")
    check.add_argument("number", type=int, nargs="?", help="only this exercise, 1 to 12")
    options = parser.parse_args(arguments)
    if options.command == "start":
        return _start(options.file, columns=options.columns)
    if options.command == "check":
        return _check(options.file, options.number)
    return _list()


def _list() -> int:
    """All exercises; those that are done, if there is a file with the usual name."""
    verdicts = (
        _judged(load_or_refuse(USUAL)) if USUAL.exists() else [Verdict("to do")] * len(COURSE)
    )
    _print_table(verdicts)
    to_do = f"check {USUAL}" if USUAL.exists() else f"start {USUAL}"
    print(f"\nGo on with: {PROGRAM} {to_do}")
    return 0


def _start(file: Path, *, columns: bool) -> int:
    try:
        with file.open("x", encoding="utf-8") as opened:
            opened.write(stubs(COURSE, file.name, columns=columns))
    except FileExistsError:
        refuse(f"{file} is there already, and is not overwritten; give another name")
    except OSError as error:
        refuse(f"{file} cannot be written: {error}")
    print(f"{file} has twelve functions to write. When the first is done:")
    print(f"{PROGRAM} check {file}")
    return 0


def _check(file: Path, number: int | None) -> int:
    if number is not None and not 1 <= number <= len(COURSE):
        refuse(f"number must be from 1 to {len(COURSE)}; got {number}")
    answers = load_or_refuse(file)
    if number is not None:
        verdict = judge(COURSE[number - 1], answers)
        _print_verdict(number, verdict)
        _print_printed(answers)
        return 0 if verdict.state == "done" else 1
    verdicts = _judged(answers)
    _print_table(verdicts)
    wrong = [i for i, verdict in enumerate(verdicts, start=1) if verdict.state == "wrong"]
    to_do = [i for i, verdict in enumerate(verdicts, start=1) if verdict.state == "to do"]
    if wrong:
        print()
        _print_verdict(wrong[0], verdicts[wrong[0] - 1])
    _print_printed(answers)
    if len(wrong) > 1:
        others = ", ".join(map(str, wrong[1:]))
        print(f"\nThen {others}. Of one alone: {PROGRAM} check {file} {wrong[1]}")
    elif not wrong:
        print(
            f"\nNext is {to_do[0]}, {COURSE[to_do[0] - 1].function}."
            if to_do
            else "\nAll is right."
        )
    return 1 if wrong or to_do else 0


def load_or_refuse(file: Path) -> Answers:
    """The learner's file; one line and exit code 2 if it cannot be used."""
    try:
        return load(file)
    except UnusableError as error:
        refuse(str(error))


def _judged(answers: Answers) -> list[Verdict]:
    """All verdicts. Only the first wrong answer is explained: others may come from it."""
    verdicts: list[Verdict] = []
    for exercise in COURSE:
        is_first = all(verdict.state != "wrong" for verdict in verdicts)
        verdicts.append(judge(exercise, answers, explains=is_first))
    return verdicts


def _print_table(verdicts: Sequence[Verdict]) -> None:
    width = max(len(exercise.function) for exercise in COURSE)
    for number, (exercise, verdict) in enumerate(zip(COURSE, verdicts, strict=True), start=1):
        print(f"{number:2}  {verdict.state:5}  {exercise.function:{width}}  {exercise.title}")


def _print_verdict(number: int, verdict: Verdict) -> None:
    exercise: Exercise = COURSE[number - 1]
    if verdict.state == "done":
        print(f"{number} {exercise.function}: right. The same in this package: {exercise.where}")
        return
    if verdict.state == "to do":
        print(f"{number} {exercise.function}: to do: {exercise.title}")
        return
    end = "" if verdict.says.endswith("?") else "."
    print("\n".join(wrap(f"{number} {exercise.function}: {verdict.says}{end}", 100)))
    for note in verdict.notes:
        print("\n".join(wrap(note, 100)))
    for line in verdict.lines:
        print(f"    {line}")


def _print_printed(answers: Answers) -> None:
    """What the learner's code printed."""
    lines = answers.printed.getvalue().splitlines()
    if lines:
        print("\nYour code printed:")
        print("\n".join(f"    {line}" for line in lines[:10]))
    if len(lines) > 10:
        print("    ...")


if __name__ == "__main__":
    sys.exit(main())
