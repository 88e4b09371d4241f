"""Copies and pickles of a model that are made within a block."""

import copy
import io
import pickle
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import nn
from torch.nn.utils import parametrizations

from manual_bp import (
    Linear,
    LinearSigmoid,
    Sigmoid,
    record,
)
from tests.helpers import assert_same
from tests.record.recording import (
    Named,
    assert_same_traces,
    converted,
    cost,
    net_of,
    recorded,
    samples,
    two,
)


def through_pickle(model: Any) -> Any:
    return pickle.loads(pickle.dumps(model))


def through_a_file(model: Any) -> Any:
    file = io.BytesIO()
    torch.save(model, file)
    file.seek(0)
    return torch.load(file, weights_only=False)


class WithAState(nn.Linear):
    """A module with an additional entry in its state."""

    def __getstate__(self) -> Any:
        return {**super().__getstate__(), "is_loaded": True}


class WithAnOddState(nn.Linear):
    """A module with a state that is not the dictionary of its attributes."""

    def __getstate__(self) -> Any:
        return list(vars(self).items())

    def __setstate__(self, state: Any) -> None:
        super().__setstate__(dict(state))


class WithACopy(nn.Linear):
    """A module that copies itself."""

    def __deepcopy__(self, memo: Any) -> Any:
        twin = WithACopy(self.in_features, self.out_features, dtype=self.weight.dtype)
        twin.load_state_dict(self.state_dict())
        for key, hook in self._forward_hooks.items():
            twin._forward_hooks[key] = copy.deepcopy(hook, memo)
        return twin


class Shared(nn.Linear):
    """A module that all copies share."""

    def __deepcopy__(self, memo: Any) -> Any:
        return self


MODELS: dict[str, Callable[[], nn.Module]] = {
    "torch": lambda: two(nn.Linear(4, 3)),
    "one layer": lambda: nn.Linear(4, 3).double(),
    "ours": lambda: net_of(Linear(4, 3), Sigmoid(), LinearSigmoid(3, 2)),
    "converted": lambda: converted(two(nn.Linear(4, 3))),
    "fused": lambda: converted(two(nn.Linear(4, 3)), fuse=True),
    "subclass": lambda: two(Named(4, 3)),
    "converted subclass": lambda: converted(two(Named(4, 3))),
    "state": lambda: two(WithAState(4, 3)),
}


# PyTorch refuses to pickle parametrized modules.
COPIED_ONLY: dict[str, Callable[[], nn.Module]] = {
    "weight norm": lambda: two(parametrizations.weight_norm(nn.Linear(4, 3))),
    "spectral norm": lambda: two(parametrizations.spectral_norm(nn.Linear(4, 3))),
    "converted weight norm": lambda: converted(two(parametrizations.weight_norm(nn.Linear(4, 3)))),
    "copies itself": lambda: two(WithACopy(4, 3)),
    "shared": lambda: two(Shared(4, 3)),
}


COPIES: dict[str, Callable[[Any], Any]] = {
    "deepcopy": copy.deepcopy,
    "pickle": through_pickle,
    "torch.save": through_a_file,
    "averaged": lambda model: torch.optim.swa_utils.AveragedModel(model).module,
}


def attributes(module: nn.Module) -> dict[str, Any]:
    """The attributes of all modules, and how many hooks there are."""
    return {
        f"{name}.{key}": len(value) if "hooks" in key and hasattr(value, "__len__") else None
        for name, part in module.named_modules()
        for key, value in vars(part).items()
    }


class TestCopiesMadeWithinABlock:
    @pytest.mark.parametrize(
        ("model", "copied"),
        [(model, copied) for model in MODELS for copied in COPIES]
        + [(model, copied) for model in COPIED_ONLY for copied in ("deepcopy", "averaged")],
    )
    def test_copies_equal_those_made_outside(self, model: str, copied: str) -> None:
        net = (MODELS | COPIED_ONLY)[model]()
        copy_of = COPIES[copied]
        x = samples()
        outside = attributes(copy_of(net))
        before = attributes(net)
        expected = recorded(net, x)
        copies = []
        with record(net) as trace:
            copies.append(copy_of(net))
            output = net(x)
            copies.append(copy_of(net))
            cost(output).backward()
            copies.append(copy_of(net))
            if model != "shared":
                for one in copies:
                    assert attributes(one) == outside
                    assert_same([one(x)], [output], rtol=1e-6)  # spectral norm has taken a step
                    cost(one(x)).backward()
        if "spectral" not in model:
            assert_same_traces(trace, expected)
        assert attributes(net) == before
        for one in copies:
            assert attributes(one) == outside

    def test_shallow_copies_have_no_hooks(self) -> None:
        layer = nn.Linear(4, 3)
        with record(layer):
            twin = copy.copy(layer)
            assert not twin._forward_hooks
            cost(layer(torch.randn(5, 4))).backward()
        assert not layer._forward_hooks

    def test_a_state_that_is_not_a_dictionary_is_kept(self) -> None:
        net = two(WithAnOddState(4, 3))
        x = samples()
        with record(net) as trace:
            output = net(x)
            twin = through_pickle(net)
            twin = copy.deepcopy(twin)
            assert_same([twin(x)], [output])
            cost(output).backward()
        assert len(trace["0"].calls) == 1
        assert not net[0]._forward_hooks
        assert_same([twin(x)], [output])

    def test_a_pickle_can_be_loaded_without_this_package(self) -> None:
        net = two(nn.Linear(4, 3))
        with record(net):
            assert b"manual_bp" not in pickle.dumps(net)
            cost(net(samples())).backward()

    def test_copies_made_in_nested_blocks_have_no_hooks(self) -> None:
        net = two(nn.Linear(4, 3))
        outside = attributes(net)
        x = samples()
        with record(net) as outer:
            with record(net[0]) as inner:
                assert attributes(copy.deepcopy(net)) == outside
                cost(net(x)).backward()
            assert attributes(copy.deepcopy(net)) == outside
            assert attributes(through_pickle(net)) == outside
        assert attributes(net) == outside
        assert_same([inner[""].delta], [outer["0"].delta])

    def test_copies_keep_the_hooks_of_others(self) -> None:
        net = two(nn.Linear(4, 3))
        seen: list[str] = []
        handle = net[0].register_forward_hook(lambda *_: seen.append("called"))
        with record(net):
            twin = copy.deepcopy(net)
            cost(net(samples())).backward()
        seen.clear()
        twin(samples())
        assert seen == ["called"]
        handle.remove()
        assert not net[0]._forward_hooks
        assert len(twin[0]._forward_hooks) == 1
