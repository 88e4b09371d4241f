"""What PyTorch does with modules: state, copies, devices, parametrisation, pruning."""

import copy
import io
import pickle
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn.utils import parametrizations, parametrize, prune, skip_init

from manual_bp import Linear, LinearSigmoid, convert, restore
from tests.compatibility.subjects import (
    IN,
    OUT,
    Subject,
    every_layer,
    every_layer_with_weights,
    every_subject,
)
from tests.helpers import assert_same

OURS = {"linear": Linear, "linear_sigmoid": LinearSigmoid}


def step(module: nn.Module, inputs: tuple[Tensor, ...]) -> list[Tensor]:
    """The output and the gradients of all parameters in one training step."""
    output = module(*inputs)
    if output.requires_grad:
        output.pow(2).sum().backward()
    return [output.detach(), *[p.grad for p in module.parameters() if p.grad is not None]]


@every_subject
def test_pickle_and_deepcopy(subject: Subject) -> None:
    module, theirs = subject.modules()
    inputs = subject.inputs()
    file = io.BytesIO()
    torch.save(module, file)
    file.seek(0)
    for copied in (
        copy.deepcopy(module),
        pickle.loads(pickle.dumps(module)),
        torch.load(file, weights_only=False),
    ):
        assert type(copied) is type(module)
        assert_same(step(copied, inputs), step(copy.deepcopy(theirs), inputs))


@every_layer
def test_state_dict_loads_safely_in_both_directions(subject: Subject) -> None:
    ours, theirs = subject.modules()
    for source, target in ((ours, subject.make_theirs()), (theirs, subject.make())):
        file = io.BytesIO()
        torch.save(source.state_dict(), file)
        file.seek(0)
        state = torch.load(file, weights_only=True)
        target.double().load_state_dict(state, strict=True)
        inputs = subject.inputs()
        assert_same(step(target, inputs), step(copy.deepcopy(source), inputs))


@every_layer_with_weights
def test_meta_device_and_skip_init(subject: Subject) -> None:
    kind: Any = OURS[subject.name]
    with torch.device("meta"):
        module = kind(IN, OUT)
    assert {p.device.type for p in module.parameters()} == {"meta"}
    assert module(torch.empty(5, IN, device="meta")).shape == (5, OUT)
    uninitialised = skip_init(kind, IN, OUT)
    assert {p.device.type for p in uninitialised.parameters()} == {"cpu"}
    for made in (module.to_empty(device="cpu"), uninitialised):
        torch.manual_seed(3)
        made.reset_parameters()
        torch.manual_seed(3)
        assert_same(list(made.parameters()), list(nn.Linear(IN, OUT).parameters()))


@every_layer_with_weights
def test_default_device_and_dtype_are_followed(subject: Subject) -> None:
    kind: Any = OURS[subject.name]
    torch.set_default_dtype(torch.float64)
    try:
        with torch.device("cpu"):  # a mode that sees every call
            module = kind(IN, OUT)
            assert module(torch.randn(5, IN)).dtype is torch.float64
    finally:
        torch.set_default_dtype(torch.float32)


@every_layer_with_weights
@pytest.mark.parametrize("how", ["weight_norm", "spectral_norm", "orthogonal", "old_weight_norm"])
def test_parametrize(subject: Subject, how: str, device: torch.device) -> None:
    ours, theirs = subject.modules(device=device)
    for module in (ours, theirs):
        torch.manual_seed(4)
        if how == "old_weight_norm":
            with pytest.warns(FutureWarning, match="weight_norm. is deprecated"):
                torch.nn.utils.weight_norm(module)
        else:
            getattr(parametrizations, how)(module)
    inputs = subject.inputs(device=device)
    assert_same(step(ours, inputs), step(theirs, inputs))
    if how != "old_weight_norm":
        ours.eval()
        expected = ours(*inputs)
        parametrize.remove_parametrizations(ours, "weight")
        assert_same([ours(*inputs)], [expected])
        assert type(ours) is OURS[subject.name]


@every_layer_with_weights
def test_pruning(subject: Subject, device: torch.device) -> None:
    ours, theirs = subject.modules(device=device)
    for module in (ours, theirs):
        prune.l1_unstructured(module, "weight", 0.5)
        prune.ln_structured(module, "weight", 0.25, n=2, dim=0)
    inputs = subject.inputs(device=device)
    assert_same(step(ours, inputs), step(theirs, inputs))
    prune.remove(ours, "weight")
    assert (ours.get_parameter("weight") == 0).sum() >= OUT * IN / 2
    assert_same(step(ours, inputs)[:1], step(theirs, inputs)[:1])


@every_layer
def test_share_memory_and_data_parallel_replicas(subject: Subject) -> None:
    ours, theirs = subject.modules()
    ours.share_memory()
    replica = ours._replicate_for_data_parallel()
    for name, value in list(ours.named_parameters()):  # as nn.DataParallel fills its replicas
        replica._parameters.pop(name, None)
        setattr(replica, name, value * 1)
    inputs = subject.inputs()
    assert_same([replica(*inputs)], [theirs(*inputs)])


@pytest.mark.filterwarnings("ignore:`torch.jit")  # TorchScript is deprecated
@pytest.mark.parametrize("fuse", [True, False])
def test_jit_trace(fuse: bool) -> None:
    """Traced as TensorBoard's add_graph does it."""
    net = nn.Sequential(nn.Linear(3, 4), nn.Sigmoid(), nn.Linear(4, 4), nn.ReLU(True), nn.Tanh())
    convert(net, fuse=fuse)
    file = io.BytesIO()
    torch.jit.save(torch.jit.trace(net, torch.randn(5, 3)), file)
    file.seek(0)
    traced = torch.jit.load(file)
    for x in (torch.randn(5, 3), torch.randn(7, 3)):
        assert torch.equal(traced(x), net(x))
    net(torch.randn(5, 3)).sum().backward()


@pytest.mark.filterwarnings("ignore:`torch.jit")
def test_script_refuses_a_converted_model() -> None:
    net = nn.Sequential(nn.Linear(3, 4), nn.Sigmoid())
    convert(net)
    with pytest.raises(RuntimeError, match=r"Torchscript|Unknown type name"):
        torch.jit.script(net)
    restore(net)
    x = torch.randn(5, 3)
    assert torch.equal(torch.jit.script(net)(x), net(x))


# PyTorch's quantization is deprecated.
@pytest.mark.filterwarnings("ignore:torch.ao.quantization is deprecated")
@pytest.mark.filterwarnings("ignore:torch.quantize_per_tensor:UserWarning")
def test_tools_that_check_for_the_exact_class_skip_ours() -> None:
    net = nn.Sequential(nn.Linear(3, 4), nn.Sigmoid())
    convert(net)
    quantized = torch.ao.quantization.quantize_dynamic(net, {nn.Linear}, torch.qint8)
    assert type(quantized[0]) is Linear
    restore(net)
    quantized = torch.ao.quantization.quantize_dynamic(net, {nn.Linear}, torch.qint8)
    assert not isinstance(quantized[0], nn.Linear)


@every_layer
def test_a_nested_input_is_refused_by_its_name(subject: Subject) -> None:
    nested = torch.nested.nested_tensor([torch.ones(2, 3), torch.ones(1, 3)], layout=torch.jagged)
    with pytest.raises(TypeError, match=r"^input must be a dense tensor; got a nested tensor"):
        subject.make()(nested)
