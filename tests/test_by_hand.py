"""By hand means by hand: what the package must not call, checked in its source."""

import ast
import re
from pathlib import Path

import pytest

import manual_bp
from manual_bp.layers._activation import ACTIVATIONS

PACKAGE = Path(manual_bp.__file__).parent
# verify judges backwards, with autograd among other means; it computes no gradients for users.
FILES = sorted(f for f in PACKAGE.rglob("*.py") if "verify" not in f.parts)
FORBIDDEN = {"backward", "enable_grad", "grad", "jacobian", "vjp", "requires_grad_"}


def calls(source: str) -> list[str]:
    functions = [node.func for node in ast.walk(ast.parse(source)) if isinstance(node, ast.Call)]
    return [
        function.attr if isinstance(function, ast.Attribute) else getattr(function, "id", "")
        for function in functions
    ]


def is_forbidden(name: str) -> bool:
    is_kernel = name.endswith("_backward") and name != "save_for_backward"
    return is_kernel or name in FORBIDDEN


@pytest.mark.parametrize("file", FILES, ids=[str(f.relative_to(PACKAGE)) for f in FILES])
def test_no_file_calls_a_derivative_kernel_or_autograd(file: Path) -> None:
    assert not [name for name in calls(file.read_text("utf-8")) if is_forbidden(name)]


def test_forbidden_calls_are_found() -> None:
    source = "torch.sigmoid_backward(g, a); torch.autograd.grad(y, x); ctx.save_for_backward(a)"
    assert [name for name in calls(source) if is_forbidden(name)] == ["sigmoid_backward", "grad"]


def test_every_layer_and_cost_tags_its_equations() -> None:
    rooms = [file for file in FILES if file.parent.name in ("layers", "costs")]
    written = [file for file in rooms if "(Function)" in file.read_text("utf-8")]
    assert len(written) >= 5
    assert not [file for file in written if "# BP" not in file.read_text("utf-8")]


@pytest.mark.parametrize("equation", ["BP1", "BP2", "BP3", "BP4"])
def test_each_equation_is_tagged_once_whole_and_once_for_each_factor(equation: str) -> None:
    tagged = {
        str(file.relative_to(PACKAGE)): len(re.findall(rf"# .*{equation}", file.read_text("utf-8")))
        for file in FILES
    }
    assert tagged["backprop.py"] == 1
    # BP4 is added to a parameter as it is computed, or computed block by block.
    assert tagged["training_step/_pass.py"] == (1 if equation == "BP3" else 2)
    assert tagged["layers/linear.py"] == (equation != "BP1")
    for activation in (kind.function.__name__ for kind in ACTIVATIONS):
        # In the Function's backward, and in place.
        assert tagged[f"layers/{activation}.py"] == (2 if equation in ("BP1", "BP2") else 0)
    assert tagged["layers/linear_sigmoid.py"] == (2 if equation == "BP2" else 1)
    for cost in ("quadratic", "sigmoid_cross_entropy", "softmax_cross_entropy"):
        ways = 3 if cost.startswith("softmax") else 2  # indices and probabilities separately
        assert tagged[f"costs/{cost}.py"] == (ways if equation == "BP1" else 0)
