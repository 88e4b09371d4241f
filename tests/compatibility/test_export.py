"""torch.export, and ONNX compared by the output of onnxruntime."""

import io
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from manual_bp import convert
from tests.compatibility.subjects import Subject, every_subject
from tests.helpers import assert_same

DYNAMIC = {"rows": torch.export.Dim("rows", min=2)}


# A warning of PyTorch's own loading, before 2.13.
@pytest.mark.filterwarnings("ignore:The given buffer is not writable")
@every_subject
@pytest.mark.parametrize("strict", [True, False], ids=["strict", "non-strict"])
def test_export(subject: Subject, strict: bool) -> None:
    """The exported program gives the same for another number of rows, after saving and loading."""
    module, theirs = subject.modules()
    inputs = subject.inputs()
    shapes = tuple({0: DYNAMIC["rows"]} for _ in inputs)
    # PyTorch names the arguments of *args; other names are the module's own.
    program = torch.export.export(module, inputs, dynamic_shapes=shapes, strict=strict)
    file = io.BytesIO()
    torch.export.save(program, file)
    file.seek(0)
    for exported in (program, torch.export.load(file)):
        for rows in (5, 8):
            given = subject.inputs(rows)
            assert_same([exported.module()(*given)], [theirs(*given)])


@pytest.mark.parametrize("fuse", [True, False])
@pytest.mark.parametrize("decomposed", [True, False])
@pytest.mark.filterwarnings(
    "ignore:.*LeafSpec:FutureWarning"
)  # a warning of the exporter about itself
def test_an_exported_model_can_be_trained(decomposed: bool, fuse: bool) -> None:
    net = nn.Sequential(nn.Linear(3, 4), nn.Sigmoid(), nn.Linear(4, 2), nn.ReLU(True)).double()
    convert(net, fuse=fuse)
    x = torch.randn(5, 3).double()
    exported_program = torch.export.export(net, (x,))
    if decomposed:
        exported_program = exported_program.run_decompositions()
    program = exported_program.module()
    for model in (program, net):
        model.zero_grad()
        model(x).square().sum().backward()
        found = {name: p.grad for name, p in model.named_parameters()}
        if model is program:
            exported: dict[str, Any] = {k: v.clone() for k, v in found.items() if v is not None}
    assert exported.keys() == found.keys()
    assert_same(list(exported.values()), [g for g in found.values() if g is not None])


@every_subject
# Warnings of the exporter about packages that it uses.
@pytest.mark.filterwarnings("ignore::DeprecationWarning")
@pytest.mark.filterwarnings("ignore::FutureWarning")
@pytest.mark.filterwarnings("ignore::UserWarning")
def test_onnx(subject: Subject, tmp_path: Any) -> None:
    needs = "needs the extra onnx: pip install -e '.[onnx]'"
    pytest.importorskip("onnxscript", reason=needs)
    onnxruntime = pytest.importorskip("onnxruntime", reason=needs)
    module, _ = subject.modules(dtype=torch.float32)
    inputs = subject.inputs(dtype=torch.float32)
    path = tmp_path / "model.onnx"
    shapes = tuple({0: DYNAMIC["rows"]} for _ in inputs)
    torch.onnx.export(
        module.eval(), inputs, path, dynamo=True, dynamic_shapes=shapes, verbose=False
    )
    session = onnxruntime.InferenceSession(path, providers=["CPUExecutionProvider"])
    for rows in (5, 8):
        given = subject.inputs(rows, dtype=torch.float32)
        names = [i.name for i in session.get_inputs()]
        assert len(names) == len(given)
        feeds = {name: t.numpy() for name, t in zip(names, given, strict=True)}
        (found,) = session.run(None, feeds)
        torch.testing.assert_close(torch.from_numpy(found), module(*given).detach())


def test_an_exported_model_casts_under_autocast() -> None:
    """Under autocast, an exported model casts like the eager one."""
    net = nn.Sequential(nn.Linear(3, 4), nn.Sigmoid())
    convert(net)

    class UnderAutocast(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.net = net

        def forward(self, x: Tensor) -> Tensor:
            with torch.autocast("cpu", torch.bfloat16):
                return self.net(x)  # type: ignore[no-any-return]

    x = torch.randn(5, 3)
    program = torch.export.export(UnderAutocast(), (x,)).module()
    assert program(x).dtype is torch.bfloat16
    assert torch.equal(program(x), UnderAutocast()(x))
