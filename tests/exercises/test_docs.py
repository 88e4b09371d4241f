"""docs/exercises.md works as printed."""

import re
from pathlib import Path

import pytest

from manual_bp.exercises.__main__ import main
from manual_bp.exercises._stubs import stubs
from manual_bp.exercises.course import COURSE
from tests.exercises import mistakes, variants
from tests.exercises.answer import MISTAKES, VARIANTS

assert mistakes.__all__
assert variants.__all__

ROOT = Path(__file__).parents[2]
PAGE = (ROOT / "docs" / "exercises.md").read_text("utf-8")


def blocks(language: str) -> list[str]:
    found: list[str] = re.findall(rf"```{language}\n(.*?)```", PAGE, flags=re.DOTALL)
    return found


START, CHECK = blocks("bash")
SHOWN = blocks("text")
# Number of the exercise, and the code that is in the file by then, for each output of the page.
STEPS = [("1", [0]), ("1", [1]), ("", [1, 2]), ("3", [1, 3])]


@pytest.mark.parametrize(("step", "shown"), list(zip(STEPS, SHOWN, strict=True)))
def test_each_check_prints_what_the_page_shows(
    step: tuple[str, list[int]],
    shown: str,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.chdir(tmp_path)
    assert main(START.split()[3:]) == 0
    path = tmp_path / "answers.py"
    number, codes = step
    code = "\n\n".join(blocks("python")[i] for i in codes)
    path.write_text(path.read_text("utf-8") + "\n\n" + code, "utf-8")
    capsys.readouterr()
    assert CHECK.split()[3:] == ["check", "answers.py", "1"]
    main(["check", "answers.py", *([number] if number else [])])
    assert capsys.readouterr().out.startswith(shown)


def test_the_table_has_the_functions_of_the_course_in_order() -> None:
    rows = re.findall(r"^\| (\d+) \| `(\w+)` \|", PAGE, flags=re.MULTILINE)
    assert rows == [(str(i), e.function) for i, e in enumerate(COURSE, start=1)]


def test_the_numbers_of_mistakes_and_right_answers_are_those_of_the_tests() -> None:
    assert f"{len(MISTAKES)} mistakes from courses" in PAGE
    assert f"{len(VARIANTS)} right answers" in PAGE


def test_the_page_tells_the_line_that_a_file_begins_with() -> None:
    for columns, form in ((False, "rows"), (True, "columns")):
        assert f'\nSAMPLES = "{form}"\n' in stubs(COURSE, "answers.py", columns=columns)
    assert '`SAMPLES = "rows"`' in PAGE
