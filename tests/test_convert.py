import copy
import gc
import io
import pickle
import sys
import weakref
from collections.abc import Callable
from functools import partial
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.utils import parametrizations, parametrize

import manual_bp
from manual_bp import ConversionReport, LinearSigmoid, convert, restore
from tests.activations import TABLE
from tests.helpers import assert_same, nodes

PAIRS = [
    (nn.Linear(3, 4), manual_bp.Linear),
    *((activation.make_reference(), activation.module) for activation in TABLE),
    (nn.ReLU(inplace=True), manual_bp.ReLU),
]


class Renamed(nn.Linear):
    """A subclass with an addition, and PyTorch's forward."""

    def norm(self) -> Tensor:
        return self.weight.square().sum()


class Doubled(nn.Linear):
    def forward(self, input: Tensor) -> Tensor:  # noqa: A002
        return 2 * super().forward(input)


class Called(nn.Linear):
    def __call__(self, *arguments: Any) -> Any:
        return super().__call__(*arguments)


class Watched(nn.Linear):
    classes: list[str] = []  # noqa: RUF012

    def __init_subclass__(cls) -> None:
        Watched.classes.append(cls.__name__)


class TwoAtOnce(nn.Sigmoid, nn.Tanh):
    pass


class Quantised(nn.Linear):
    """Its weight attribute gives something other than the parameter."""

    def __getattr__(self, name: str) -> Any:
        value: Any = super().__getattr__(name)
        return (value * 8).round() / 8 if name == "weight" else value


class Named(nn.LeakyReLU):
    """Has methods with names that ours has too: LeakyReLU itself, and its base Activation."""

    def __init__(self, name: str) -> None:
        super().__init__(0.25)
        self.name = name

    def sigma_prime(self) -> str:
        return f"{self.name}'"

    def require_slope_from_a(self) -> str:
        return f"{self.name} slope"


class Frozen(nn.Linear):
    def __setattr__(self, name: str, value: Any) -> None:
        if name == "__class__":
            raise AttributeError("frozen")
        super().__setattr__(name, value)


class Net(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.body: Any = nn.Sequential(
            nn.Linear(5, 4), nn.Sigmoid(), nn.LayerNorm(4), nn.Linear(4, 4), nn.Tanh()
        )
        self.heads: Any = nn.ModuleDict({"one": Renamed(4, 3), "two": Doubled(4, 3)})
        self.again: Any = self.body[3]

    def forward(self, x: Tensor) -> Tensor:
        x = self.again(self.body(x))
        return self.heads["one"](x) + self.heads["two"](x)  # type: ignore[no-any-return]


def network() -> Net:
    torch.manual_seed(1)
    return Net()


def classes(model: nn.Module) -> dict[str, type[Any]]:
    return {name: type(module) for name, module in model.named_modules()}


def everything(model: nn.Module) -> dict[str, Any]:
    """Each module's class and all that it holds: what must be as before."""
    return {name: (type(m), dict(vars(m))) for name, m in model.named_modules()}


def train(model: nn.Module, steps: int = 5, features: int = 5) -> list[Tensor]:
    torch.manual_seed(2)
    model.double()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    losses = []
    for _ in range(steps):
        loss = model(torch.randn(6, features).double()).square().mean()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.detach())
    return losses


@pytest.mark.parametrize(("module", "ours"), PAIRS, ids=lambda v: repr(v))
def test_a_layer_by_itself(module: nn.Module, ours: type[Any]) -> None:
    module, theirs = copy.deepcopy(module), type(module)
    before = everything(module)
    report = convert(module)
    assert type(module) is ours
    assert report.changed == (("", theirs, ours),)
    assert report.left == ()
    restore(module)
    assert everything(module) == before


def test_a_model_keeps_all_its_objects() -> None:
    model = network()
    before = everything(model)
    parameters = list(model.parameters())
    keys = list(model.state_dict())
    report = convert(model)
    assert [(c.name, c.after.__mro__[:2]) for c in report.changed[:1]] == [
        ("body.0", (manual_bp.Linear, nn.Linear))
    ]
    assert [change.name for change in report.changed] == [
        "body.0", "body.1", "body.3", "body.4", "heads.one"
    ]  # fmt: skip
    assert [(left.name, left.reason) for left in report.left] == [
        ("body.2", "there is no such layer among ours"),
        ("heads.two", "its class overrides forward"),
    ]
    assert model.again is model.body[3]
    assert all(one is two for one, two in zip(model.parameters(), parameters, strict=True))
    assert list(model.state_dict()) == keys
    assert type(model.heads["one"]).__name__ == "Renamed"
    assert isinstance(model.heads["one"], Renamed)
    assert isinstance(model.heads["one"], manual_bp.Linear)
    assert convert(model).changed == ()
    assert len(restore(model).changed) == 5
    assert everything(model) == before
    assert restore(model) == ConversionReport((), ())


def test_the_numbers_stay() -> None:
    theirs, ours = network(), network()
    convert(ours)
    assert_same(train(ours), train(theirs))
    restore(ours)
    assert_same(train(ours), train(theirs))
    assert_same(list(ours.parameters()), list(theirs.parameters()))


def test_it_is_our_backward_that_runs() -> None:
    model = network()
    convert(model)
    names = nodes(model(torch.randn(2, 5)))
    assert {
        "LinearFunctionBackward",
        "SigmoidFunctionBackward",
        "TanhFunctionBackward",
    } <= names.keys()


def test_hooks_mode_and_the_optimiser_stay() -> None:
    model = network().eval()
    seen = []
    model.body[0].register_forward_hook(lambda *_: seen.append("forward"))
    model.body[0].register_full_backward_hook(lambda *_: seen.append("backward"))
    model.body[0].weight.register_hook(lambda _: seen.append("weight"))
    optimizer = torch.optim.SGD(model.parameters(), lr=1.0)
    convert(model)
    assert not any(module.training for module in model.modules())
    before = model.body[0].weight.clone()
    model(torch.randn(2, 5, requires_grad=True)).sum().backward()
    optimizer.step()
    assert sorted(seen) == ["backward", "forward", "weight"]
    assert not torch.equal(model.body[0].weight, before)


def test_a_module_that_occurs_twice_is_converted_once() -> None:
    shared = nn.Linear(4, 4)
    model = nn.Sequential(shared, nn.ReLU(), shared)
    assert [change.name for change in convert(model).changed] == ["0", "1"]
    assert model[0] is model[2] is shared


def test_tied_weights_stay_tied() -> None:
    model = nn.Sequential(nn.Linear(4, 4), nn.Tanh(), nn.Linear(4, 4))
    model[2].weight = model[0].weight
    theirs = copy.deepcopy(model)
    convert(model)
    assert model[2].weight is model[0].weight
    assert_same(train(model, features=4), train(theirs, features=4))


@pytest.mark.parametrize(
    ("module", "reason"),
    [
        (Doubled(3, 4), "its class overrides forward"),
        (Called(3, 4), "its class overrides __call__"),
        (Watched(3, 4), "its class defines __init_subclass__"),
        (TwoAtOnce(), "it inherits from several layers at once"),
        (nn.LazyLinear(4), "it is lazy and has seen no input yet"),
        (nn.LeakyReLU(-0.1), "its negative_slope must be at least 0; got -0.1"),
        (nn.Softplus(0), "its beta must not be 0; got 0"),
        (nn.GELU(), "there is no such layer among ours"),
        (nn.ReLU6(), "there is no such layer among ours"),
    ],
)
def test_what_is_left_alone(module: nn.Module, reason: str) -> None:
    before = everything(module)
    report = convert(nn.Sequential(module))
    assert report == ConversionReport((), (("0", type(module), reason),))  # type: ignore[arg-type]
    assert everything(module) == before


def test_a_forward_replaced_on_the_object_is_left_alone() -> None:
    module = nn.Linear(3, 4)
    module.forward = lambda input: input  # type: ignore[method-assign]  # noqa: A006
    (left,) = convert(module).left
    assert left.reason == "its forward was replaced on the object"


class Packed(Tensor):
    """Counts as twice its values, but only PyTorch's linear knows."""

    @classmethod
    def __torch_function__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func is F.linear:
            plain = [2 * a.as_subclass(Tensor) if isinstance(a, Packed) else a for a in args]
            return F.linear(*plain, **(kwargs or {}))
        return super().__torch_function__(func, types, args, kwargs or {})


class Tagged(Tensor):
    """Leaves its functions to PyTorch."""


class Silent(Tensor):
    """Does not override functions, as a DTensor does not."""

    __torch_function__: Any = torch._C._disabled_torch_function_impl


def with_parameter(name: str, made: Callable[[Tensor], Tensor]) -> nn.Linear:
    layer = nn.Linear(3, 4)
    layer._parameters[name] = made(layer.get_parameter(name).detach()).requires_grad_()  # type: ignore[assignment]
    return layer


@pytest.mark.filterwarnings("ignore:Sparse CS. tensor support is in beta state")
@pytest.mark.parametrize(
    ("name", "made", "reason"),
    [
        ("weight", Tensor.to_sparse_csr, "its weight is not a dense tensor"),
        (
            "weight",
            lambda t: t.as_subclass(Packed),
            "its weight is a Packed, which may override",
        ),
        (
            "bias",
            lambda t: t.as_subclass(Packed),
            "its bias is a Packed, which may override",
        ),
    ],
)
@pytest.mark.parametrize("fuse", [False, True])
def test_weights_that_ours_cannot_use_are_left_to_pytorch(
    name: str, made: Callable[[Tensor], Tensor], reason: str, fuse: bool
) -> None:
    model = nn.Sequential(with_parameter(name, made), nn.Sigmoid())
    x = torch.randn(2, 3)
    expected = model(x)
    report = convert(model, fuse=fuse)
    assert [(left.name, left.reason[: len(reason)]) for left in report.left] == [("0", reason)]
    assert type(model[0]) is nn.Linear
    assert torch.equal(model(x), expected)


@pytest.mark.parametrize("name", ["weight", "bias"])
def test_attributes_that_ours_cannot_use_are_left_to_pytorch(name: str) -> None:
    layer = nn.Linear(3, 4)
    value = layer.get_parameter(name).detach().as_subclass(Packed)
    delattr(layer, name)
    setattr(layer, name, value)
    (left,) = convert(layer).left
    assert left.reason.startswith(f"its {name} is a Packed")


@pytest.mark.parametrize("kind", [Tagged, Silent])
def test_weights_of_other_tensor_subclasses_are_converted(kind: Any) -> None:
    layer = with_parameter("weight", lambda t: t.as_subclass(kind))
    x = torch.randn(2, 3)
    expected = layer(x)
    assert convert(layer).left == ()
    assert torch.equal(layer(x), expected)
    layer(x).sum().backward()
    assert layer.weight.grad is not None


@pytest.mark.parametrize("name", ["weight", "bias"])
@pytest.mark.parametrize("fuse", [False, True])
def test_weights_and_biases_that_are_buffers(name: str, fuse: bool) -> None:
    theirs = sigmoid_net()
    value = theirs[0].get_parameter(name).detach()
    delattr(theirs[0], name)
    theirs[0].register_buffer(name, value)
    model = copy.deepcopy(theirs)
    before = everything(model)
    convert(model, fuse=fuse)
    assert type(model[0]) is (LinearSigmoid if fuse else manual_bp.Linear)
    for one in (model, copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
        assert_same(train(one), train(copy.deepcopy(theirs)))
        assert torch.equal(getattr(one[0], name), value)
    assert restore(model).left == ()
    assert classes(model) == classes(theirs)
    assert list(everything(model)) == list(before)


def test_converting_computes_no_weight() -> None:
    model = nn.Sequential(parametrizations.spectral_norm(nn.Linear(4, 4)), nn.Sigmoid())
    before = {key: value.clone() for key, value in model.state_dict().items()}
    report = convert(model, fuse=True)
    assert any(left.reason.startswith("not fused: its weight is comp") for left in report.left)
    for key, value in model.state_dict().items():  # spectral norm takes a step when it is asked
        assert torch.equal(value, before[key])


def test_forwards_that_are_replaced_after_converting() -> None:
    """As accelerate does, to move weights between devices: what it wraps is our forward."""
    model = sigmoid_net()
    x = torch.randn(2, 5)
    expected = model(x)
    convert(model, fuse=True)
    inner = model[0].forward
    model[0].forward = lambda *args: inner(*args)
    assert torch.equal(model(x), expected)
    report = restore(model)
    assert [(left.name, left.reason) for left in report.left] == [
        ("0", "its forward was replaced on the object"),
        ("1", "it was fused with one that cannot be restored"),
    ]
    assert torch.equal(model(x), expected)
    del model[0].forward
    assert restore(model).left == ()
    assert classes(model) == classes(sigmoid_net())
    assert torch.equal(model(x), expected)


def test_a_lazy_linear_that_has_seen_its_input_is_converted() -> None:
    module: Any = nn.LazyLinear(4)
    module(torch.randn(2, 3))
    convert(module)
    assert type(module) is manual_bp.Linear


def test_attention_uses_its_projection_without_calling_it() -> None:
    model = nn.TransformerEncoderLayer(8, 2, 16, batch_first=True, dropout=0.0)
    theirs = copy.deepcopy(model)
    report = convert(model)
    assert {change.name for change in report.changed} == {"linear1", "linear2"}
    reasons = {left.name: left.reason for left in report.left}
    assert reasons["self_attn.out_proj"].startswith("nn.MultiheadAttention computes with its weig")
    x = torch.randn(2, 3, 8)
    upstream = torch.randn(2, 3, 8)
    for module in (model, theirs):
        module(x).backward(upstream)
    for one, two in zip(model.parameters(), theirs.parameters(), strict=True):
        torch.testing.assert_close(one.grad, two.grad)
    with torch.no_grad():  # PyTorch's fast path for inference
        torch.testing.assert_close(model.eval()(x), theirs.eval()(x))


def roundtrip(model: Any) -> Any:
    file = io.BytesIO()
    torch.save(model, file)
    file.seek(0)
    return torch.load(file, weights_only=False)


@pytest.mark.parametrize(
    "copied",
    [copy.deepcopy, lambda m: pickle.loads(pickle.dumps(m)), roundtrip],
    ids=["deepcopy", "pickle", "torch.save"],
)
def test_a_copy_is_converted_and_can_be_restored(copied: Callable[[Any], Any]) -> None:
    model = network()
    before = classes(model)
    convert(model)
    twin = copied(model)
    assert classes(twin) == classes(model)
    x = torch.randn(2, 5)
    assert torch.equal(twin(x), model(x))
    assert twin.heads["one"].norm() == model.heads["one"].norm()
    restore(twin)
    assert classes(twin) == before
    assert torch.equal(twin(x), model(x))
    assert type(model.body[0]) is manual_bp.Linear


def test_joined_classes_are_freed_when_unused() -> None:
    model = parametrizations.weight_norm(nn.Linear(3, 4))
    convert(model)
    watch = weakref.ref(type(model))
    del model
    gc.collect()
    assert watch() is None


def test_reparametrised_before_and_after() -> None:
    x = torch.randn(2, 3)
    before: Any = parametrizations.weight_norm(nn.Linear(3, 4))
    expected = before(x)
    convert(before)
    assert isinstance(before, manual_bp.Linear)
    assert torch.equal(before(x), expected)
    assert type(before(x).grad_fn).__name__ == "LinearFunctionBackward"
    restore(before)
    assert type(before).__bases__ == (nn.Linear,)
    assert torch.equal(before(x), expected)
    convert(before)
    parametrize.remove_parametrizations(before, "weight")
    assert type(before) is manual_bp.Linear
    restore(before)
    assert type(before) is nn.Linear
    torch.testing.assert_close(before(x), expected)

    after = nn.Linear(3, 4)
    convert(after)
    parametrizations.weight_norm(after)
    parametrize.register_parametrization(after, "bias", nn.Softplus())
    expected = after(x)
    assert restore(after).left == ()
    assert type(after).__bases__ == (nn.Linear,)
    assert torch.equal(after(x), expected)
    parametrize.remove_parametrizations(after, "weight")
    parametrize.remove_parametrizations(after, "bias")
    assert type(after) is nn.Linear


def test_subclasses_keep_all_but_their_backward() -> None:
    x = torch.randn(2, 3)
    quantised, frozen = Quantised(3, 4), Frozen(3, 4)
    for module in (quantised, frozen):
        expected = module(x)
        convert(module)
        assert isinstance(module, manual_bp.Linear)
        assert torch.equal(module(x), expected)
    named: Any = Named("leaky")
    convert(named)
    assert named.sigma_prime() == "leaky'"
    assert named.require_slope_from_a() == "leaky slope"
    assert type(named)("other").name == "other"
    assert torch.equal(named(x), nn.functional.leaky_relu(x, 0.25))


def test_an_error_half_way_leaves_nothing_half_converted(monkeypatch: pytest.MonkeyPatch) -> None:
    model = network()
    before = everything(model)
    given = []

    def fail(module: nn.Module, after: type[Any]) -> None:
        given.append(module)
        if len(given) == 3:
            raise KeyboardInterrupt
        give(module, after)

    module = sys.modules["manual_bp.convert"]  # the package has the function by this name
    give = vars(module)["_give"]
    monkeypatch.setattr(module, "_give", fail)
    with pytest.raises(KeyboardInterrupt):
        convert(model)
    assert everything(model) == before


def test_a_module_whose_class_was_set_back_by_hand_can_be_converted() -> None:
    module = nn.Linear(3, 4)
    convert(module)
    object.__setattr__(module, "__class__", nn.Linear)
    assert restore(module) == ConversionReport((), ())
    assert len(convert(module).changed) == 1
    restore(module)
    assert type(module) is nn.Linear


def test_no_half_of_a_fused_pair_is_restored() -> None:
    model = nn.Sequential(nn.Linear(4, 4), nn.Sigmoid(), nn.Linear(4, 4), nn.Sigmoid())
    model[3] = model[1]
    x = torch.randn(2, 4)
    expected = model(x)
    convert(model, fuse=True)
    object.__setattr__(model[2], "__class__", type("Changed", (LinearSigmoid,), {}))
    reasons = {left.name: left.reason for left in restore(model).left}
    assert reasons == {
        "0": "it was fused with one that cannot be restored",
        "1": "it was fused with one that cannot be restored",
        "2": "its class has changed since",
    }
    torch.testing.assert_close(model(x), expected)
    object.__setattr__(model[2], "__class__", LinearSigmoid)
    assert restore(model).left == ()
    assert torch.equal(model(x), expected)


def test_layers_that_were_ours_before_stay_ours_when_restored() -> None:
    model = nn.Sequential(
        manual_bp.Linear(3, 4), nn.Sigmoid(), manual_bp.Linear(4, 4), nn.Sigmoid()
    )
    convert(model, fuse=True)
    assert [type(m) for m in model] == [LinearSigmoid, nn.Identity] * 2
    restore(model)
    assert [type(m) for m in model] == [manual_bp.Linear, nn.Sigmoid] * 2


def sigmoid_net() -> nn.Sequential:
    torch.manual_seed(1)
    return nn.Sequential(
        nn.Linear(5, 4), nn.Sigmoid(), nn.Sequential(nn.Linear(4, 4), nn.Sigmoid()), nn.Linear(4, 3)
    )


@pytest.mark.parametrize("converted_before", [True, False])
def test_fuse(converted_before: bool) -> None:
    model: Any = sigmoid_net()
    theirs = sigmoid_net()
    before, objects = everything(model), list(model.modules())
    if converted_before:
        convert(model)
    report = convert(model, fuse=True)
    assert [type(m) for m in (*model[:2], *model[2], model[3])] == [
        LinearSigmoid, nn.Identity, LinearSigmoid, nn.Identity, manual_bp.Linear
    ]  # fmt: skip
    assert len(report.changed) == (4 if converted_before else 5)
    assert list(model.modules()) == objects
    assert list(model.state_dict()) == list(theirs.state_dict())
    assert_same(train(model), train(theirs))
    assert repr(model[0]) == "LinearSigmoid(in_features=5, out_features=4, bias=True)"
    assert convert(model, fuse=True).changed == ()
    twin = copy.deepcopy(model)
    restore(model)
    assert everything(model) == before
    restore(twin)
    assert classes(twin) == classes(model)


def hooked(model: nn.Sequential, where: int, hook: str) -> nn.Sequential:
    getattr(model[where], f"register_{hook}")(lambda *_: None)
    return model


def replaced(model: nn.Sequential) -> nn.Sequential:
    """As libraries do that hook into modules."""
    convert(model)
    model[0].forward = partial(type(model[0]).forward, model[0])
    return model


class Reversed(nn.Sequential):
    def forward(self, input: Tensor) -> Tensor:  # noqa: A002
        return self[0](self[1](input))  # type: ignore[no-any-return]


class WithAct(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.act = nn.Sigmoid()
        self.net = nn.Sequential(nn.Linear(4, 4), self.act)
        self.linear = nn.Linear(4, 4)

    def forward(self, x: Tensor) -> Tensor:
        return self.act(self.linear(self.net(x)))  # type: ignore[no-any-return]


@pytest.mark.parametrize(
    ("model", "reason"),
    [
        (hooked(sigmoid_net(), 0, "forward_hook"), "there are hooks, which would not see z"),
        (hooked(sigmoid_net(), 1, "forward_pre_hook"), "there are hooks, which would not see z"),
        (
            hooked(sigmoid_net(), 0, "full_backward_hook"),
            "hooks, which would not see delta",
        ),
        (hooked(sigmoid_net(), 1, "full_backward_pre_hook"), "hooks, which would not see delta"),
        (replaced(sigmoid_net()), "a forward was replaced on the object"),
        (WithAct(), "it or its Sigmoid also occurs elsewhere"),
        (
            nn.Sequential(nn.Linear(4, 4, dtype=torch.complex64), nn.Sigmoid()),
            "its weight is computed from others, or is not real",
        ),
    ],
)
def test_what_is_not_fused(model: Any, reason: str) -> None:
    report = convert(model, fuse=True)
    reasons = [left.reason for left in report.left if left.reason.startswith("not fused: ")]
    assert len(reasons) == 1
    assert reasons[0].endswith(reason)
    assert manual_bp.Linear in classes(model).values()


def test_pairs_are_not_fused_behind_the_back_of_global_hooks() -> None:
    seen: list[str] = []
    handle = nn.modules.module.register_module_forward_hook(
        lambda module, _, __: seen.append(type(module).__name__)
    )
    model: Any = sigmoid_net()
    try:
        report = convert(model, fuse=True)
        model(torch.randn(2, 5))
    finally:
        handle.remove()
    reasons = {left.reason for left in report.left}
    assert reasons == {"not fused: there are global hooks, which would not see z"}
    assert seen == ["Linear", "Sigmoid", "Linear", "Sigmoid", "Sequential", "Linear", "Sequential"]
    assert [type(module) for module in model[:2]] == [manual_bp.Linear, manual_bp.Sigmoid]
    convert(model, fuse=True)
    assert [type(module) for module in model[:2]] == [LinearSigmoid, nn.Identity]


@pytest.mark.parametrize(
    "model",
    [
        Reversed(nn.Linear(4, 4), nn.Sigmoid()),
        nn.Sequential(Renamed(4, 4), nn.Sigmoid()),
        nn.Sequential(nn.Linear(4, 4), nn.Dropout(), nn.Sigmoid()),
        nn.ModuleList([nn.Linear(4, 4), nn.Sigmoid()]),
    ],
    ids=lambda model: type(model).__name__,
)
def test_modules_that_are_not_a_pair_are_not_fused(model: nn.Module) -> None:
    convert(model, fuse=True)
    assert LinearSigmoid not in classes(model).values()
    assert nn.Identity not in classes(model).values()


def test_a_sigmoid_that_is_shared_by_pairs_alone_is_fused() -> None:
    act = nn.Sigmoid()
    model = nn.Sequential(nn.Linear(4, 4), act, nn.Linear(4, 4), act)
    x = torch.randn(2, 4)
    expected = model(x)
    convert(model, fuse=True)
    assert [type(m) for m in model] == [LinearSigmoid, nn.Identity] * 2
    torch.testing.assert_close(model(x), expected)
    restore(model)
    assert torch.equal(model(x), expected)
    assert model[1] is model[3] is act


def test_if_one_place_cannot_be_fused_none_that_shares_its_modules_is() -> None:
    act, norm = nn.Sigmoid(), nn.LayerNorm(4)
    shared = nn.Linear(4, 4)
    model = nn.Sequential(shared, act, nn.Linear(4, 4), act, norm, act, nn.Sequential(shared))
    x = torch.randn(2, 4)
    expected = model(x)
    convert(model, fuse=True)
    assert LinearSigmoid not in classes(model).values()
    assert torch.equal(model(x), expected)


def test_a_linear_that_is_used_elsewhere_as_well_is_not_fused() -> None:
    shared = nn.Linear(4, 4)
    model = nn.Sequential(shared, nn.Sigmoid(), shared)
    x = torch.randn(2, 4)
    expected = model(x)
    convert(model, fuse=True)
    assert [type(m) for m in model] == [manual_bp.Linear, manual_bp.Sigmoid, manual_bp.Linear]
    assert torch.equal(model(x), expected)


def test_the_report_is_printed_by_kinds() -> None:
    model = nn.Sequential(
        nn.Linear(3, 4), nn.ReLU(), nn.Linear(4, 4), nn.Dropout(), nn.Dropout(), Doubled(4, 4)
    )
    assert str(convert(model)) == (
        "3 changed, 3 left as they are\n"
        "  2 Linear -> Linear\n"
        "  1 ReLU -> ReLU\n"
        "  2 Dropout left: there is no such layer among ours\n"
        "  1 Doubled left: its class overrides forward"
    )


@pytest.mark.parametrize("call", [convert, restore])
def test_bad_input(call: Callable[[Any], Any]) -> None:
    with pytest.raises(TypeError, match=r"model must be an nn\.Module; got function"):
        call(nn.functional.relu)
