"""A learner's file: how it is run, and what is said where it cannot be."""

import re
import sys
from collections.abc import Callable
from pathlib import Path
from textwrap import dedent, indent

import pytest

from manual_bp.exercises import _answers
from manual_bp.exercises._answers import Answers, UnusableError, load
from manual_bp.exercises._judge import Verdict, judge
from tests.exercises.test_mistakes import EXERCISES

Write = Callable[[str], Answers]


@pytest.fixture
def written(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Write:
    monkeypatch.setattr(sys, "path", sys.path[:])  # to which the folder of the file is added

    def write(text: str) -> Answers:
        path = tmp_path / "answers.py"
        path.write_text(dedent(text), "utf-8")
        return load(path)

    return write


def grad_b(body: str, head: str = "import numpy as np, torch") -> str:
    return f"{head}\n\n\ndef grad_b(delta):\n{indent(dedent(body), '    ')}\n"


def on_grad_b(answers: Answers) -> Verdict:
    return judge(EXERCISES["grad_b"], answers)


AUTOGRAD = {
    "backward": """
        b = torch.zeros(delta.shape[1], dtype=delta.dtype, requires_grad=True)
        (delta * b).sum().backward()
        return b.grad
        """,
    "grad": """
        b = torch.zeros(delta.shape[1]).double().requires_grad_()
        return torch.autograd.grad((delta * b).sum(), b)[0]
        """,
    "func_grad": "return torch.func.grad(lambda b: (delta * b).sum())(delta[0])",
    "imported": """
        from torch.func import vjp
        return vjp(lambda b: (delta * b).sum(), delta[0])[1](torch.ones(()).double())[0]
        """,
    "jacobian": """
        call = lambda b: (delta * b).sum()
        return torch.autograd.functional.jacobian(call, delta[0])
        """,
    "enabled": """
        with torch.inference_mode(False), torch.enable_grad():
            b = torch.zeros(delta.shape[1], dtype=torch.float64, requires_grad=True)
            (torch.tensor(delta.tolist()).double() * b).sum().backward()
        return b.grad
        """,
}


@pytest.mark.parametrize("body", AUTOGRAD.values(), ids=AUTOGRAD)
def test_a_gradient_by_autograd_is_refused_with_a_request(body: str, written: Write) -> None:
    verdict = on_grad_b(written(grad_b(body)))
    assert verdict.state == "wrong"
    assert "by hand" in verdict.says


def test_autograd_is_found_in_a_function_that_another_one_calls(written: Write) -> None:
    head = """
import torch
def helper(b, delta):
    return torch.autograd.grad((delta * b).sum(), b)[0]
"""
    body = "return helper(delta[0].clone().requires_grad_(), delta)"
    assert "by hand" in on_grad_b(written(grad_b(body, head))).says


def test_words_of_autograd_in_functions_of_ones_own_are_no_autograd(written: Write) -> None:
    head = """
import torch
class Layer:
    grad = None
    def backward(self, delta):
        self.grad = delta.sum(0)
        return self.grad
"""
    assert on_grad_b(written(grad_b("return Layer().backward(delta)", head))).state == "done"


@pytest.mark.parametrize(
    ("head", "body"),
    [
        ("import numpy as np", "return np.add.reduce(delta)"),
        ("import torch", "return torch.sum(delta, 0)"),
        ("import torch", "return delta.sum(dim=0)"),
        ("import numpy as np, torch", "return delta.sum(dim=0)"),
        ("import numpy as np", "import torch\nreturn torch.as_tensor(delta).sum(dim=0)"),
        ("import torch", "return torch.as_tensor(delta).sum(0).numpy()"),
        ("import torch", "return delta.sum(0).numpy()"),
        ("", "return delta.sum(dim=0)"),
        ("import numpy as np, torch", "return delta.astype(float).sum(0)"),
        ("from torch import einsum", "return einsum('nj->j', delta)"),
        ("", "return [sum(column) for column in zip(*delta.tolist())]"),
        ("import torch\ndef total(x):\n    return torch.sum(x, 0)", "return total(delta)"),
    ],
)
def test_each_function_gets_the_arrays_of_the_library_it_uses(
    head: str, body: str, written: Write
) -> None:
    assert on_grad_b(written(grad_b(body, head))).state == "done"


BROKEN = {
    "return": "it returns None: is the return missing?",
    "return delta.sum(0), 1": "must be an array of numbers; got a tuple",
    "return 'delta'": "must be an array of numbers; got a str",
    "return [[1.0], [1.0, 2.0]]": "must be an array of numbers; got a list",
    "return delta.sum(0) + 1j": "real numbers; got complex ones",
    "return {}": "must be an array of numbers; got a dict",
    "delta *= 2\nreturn delta.sum(0) / 2": "changes its argument delta",
}


@pytest.mark.parametrize(("body", "says"), BROKEN.items())
def test_what_is_no_result_is_called_that(body: str, says: str, written: Write) -> None:
    verdict = on_grad_b(written(grad_b(body)))
    assert verdict.state == "wrong"
    assert says in verdict.says


@pytest.mark.parametrize(
    ("head", "body", "says"),
    [
        ("import numpy as np", "return delta.sum(dim=0)", "TypeError"),
        ("import numpy.linalg as la", "return delta.sum(dim=0)", "TypeError"),
        ("from numpy import exp", "return delta.sum(dim=0)", "TypeError"),
        ("import torch", "return delta.astype(float).sum(0)", "AttributeError"),
        ("from torch import exp", "return delta.astype(float).sum(0)", "AttributeError"),
    ],
)
def test_a_file_with_one_library_is_judged_with_its_arrays_alone(
    head: str, body: str, says: str, written: Write
) -> None:
    verdict = on_grad_b(written(grad_b(body, head)))
    assert verdict.state == "wrong"
    assert says in verdict.lines[0]


HINTED = {
    "s = sigmoid(delta)\nreturn s": "write σ yourself",
    "return np.sigmoid(delta)": "write σ yourself",
    "return delta (1 - delta)": "is a * missing before the bracket?",
    "return delta[0, 0] (1 - delta)": "is a * missing before the bracket?",
    "return sum(d if d > 0 else 0 for d in delta)": "one number only",
    "return float(delta)": "one number only",
    "return delta ^ 2": "write a ** 2 for a²",
    "return sum(other(d) for d in delta)": "calls a function that is still to do",
}


@pytest.mark.parametrize(("body", "says"), HINTED.items())
@pytest.mark.parametrize("library", ["numpy", "torch"])
def test_an_error_of_a_known_kind_gets_its_hint(
    body: str, says: str, library: str, written: Write
) -> None:
    head = f"import {library}, numpy as np\ndef other(x):\n    raise NotImplementedError"
    verdict = on_grad_b(written(grad_b(f"{library}.e\n{body}", head)))
    assert says in verdict.says
    assert verdict.lines[0].startswith("line ")


NOT_WRITTEN = {
    "the stub": ("import numpy as np", "raise NotImplementedError"),
    "with a message": ("import torch", 'raise NotImplementedError("later")'),
    "begun": ("import numpy as np", "total = delta.sum(0)\nraise NotImplementedError"),
}
WRITTEN = {
    "in NumPy": ("import numpy as np", "return delta - delta ^ 2"),
    "in PyTorch": ("import torch", "return delta ^ 2"),
    "in both": ("import numpy as np, torch", "return delta ^ 2"),
    "by a helper": (
        "def total(x):\n    raise NotImplementedError",
        "return total(delta)",
    ),
}


@pytest.mark.parametrize(("head", "body"), NOT_WRITTEN.values(), ids=NOT_WRITTEN)
def test_what_raises_as_the_stub_does_is_to_do(head: str, body: str, written: Write) -> None:
    assert on_grad_b(written(grad_b(body, head))).state == "to do"


@pytest.mark.parametrize(("head", "body"), WRITTEN.values(), ids=WRITTEN)
def test_a_written_function_in_which_something_is_not_implemented_is_wrong(
    head: str, body: str, written: Write
) -> None:
    verdict = on_grad_b(written(grad_b(body, head)))
    assert verdict.state == "wrong"
    assert re.match(r"line \d+, `.*`: (TypeError|NotImplementedError)", verdict.lines[0])


def test_too_few_results_and_lists_are_counted(written: Write) -> None:
    answers = written("""
        def cross_entropy(z, y):
            return z

        def backprop(x, y, weights, biases):
            return [weights[0]], biases
    """)
    says = judge(EXERCISES["cross_entropy"], answers).says
    assert says == "it must return 2 results, (cost, delta); it returns an ndarray"
    says = judge(EXERCISES["backprop"], answers).says
    assert says == "grads_w must be a list of 3, one for each layer; got a list of 1"


def test_an_error_is_shown_with_the_line_of_the_learners_own_file(written: Write) -> None:
    body = """
        def helper(x):
            return x.total(0)
        return helper(delta)
        """
    verdict = on_grad_b(written(grad_b(body, "import numpy as np")))
    assert verdict.says == "your function raised an error"
    assert verdict.lines[0] == (
        "line 7, `return x.total(0)`: AttributeError: 'numpy.ndarray' object has no attribute "
        "'total'"
    )


def test_an_endless_loop_ends_even_within_except(
    written: Write, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(_answers, "SECONDS", 0.1)
    body = """
        while True:
            try:
                print("again")
            except Exception:
                pass
        """
    answers = written(grad_b(body))
    verdict = on_grad_b(answers)
    assert verdict.says == "it was not done after computing for 0.1 s: an endless loop?"
    assert len(answers.printed.getvalue()) < 3000


def test_what_a_function_prints_is_kept_and_its_exit_is_an_error(
    written: Write, capsys: pytest.CaptureFixture[str]
) -> None:
    answers = written(grad_b("print(len(delta)); raise SystemExit"))
    verdict = on_grad_b(answers)
    assert "SystemExit" in verdict.lines[0]
    assert answers.printed.getvalue()
    assert capsys.readouterr().out == ""


UNUSABLE = {
    "def grad_b(delta:\n    pass": "SyntaxError: '(' was never closed (answers.py, line 1)",
    "\nx = = 1": "answers.py cannot be run: SyntaxError: invalid syntax (answers.py, line 2)",
    "import numpy\nnumpy.zeros(3)[5]": "cannot be run: line 2, `numpy.zeros(3)[5]`: IndexError",
    "import no_such_module": "cannot be run: line 1, `import no_such_module`: ModuleNotFoundError",
    'SAMPLES = "diagonals"': 'must be "rows" or "columns"; got \'diagonals\'',
}


@pytest.mark.parametrize(("text", "says"), UNUSABLE.items())
def test_a_file_that_cannot_be_run_is_refused_with_its_line(
    text: str, says: str, written: Write
) -> None:
    with pytest.raises(UnusableError) as caught:
        written(text)
    assert says in str(caught.value)


def test_a_file_may_define_dataclasses_and_import_its_neighbours(
    written: Write, tmp_path: Path
) -> None:
    (tmp_path / "neighbour.py").write_text("def total(x):\n    return x.sum(0)\n", "utf-8")
    head = """
from __future__ import annotations
from dataclasses import dataclass
from neighbour import total

@dataclass
class Layer:
    size: int
"""
    assert on_grad_b(written(grad_b("return total(delta)", head))).state == "done"
    del sys.modules["neighbour"]


def test_a_function_right_for_equal_sizes_only_is_called_that(written: Write) -> None:
    verdict = on_grad_b(written(grad_b("return np.eye(3)[0] * 0 + delta.sum(0)")))
    assert "right only if all sizes are equal" in verdict.says
