"""Global state, and state that outlives a call."""

import random
import warnings
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from manual_bp.verify import check_function, check_module
from manual_bp.verify._global_state import STATES, changed, filled_memory, random_numbers, restored

SAMPLES = [(torch.arange(1.0, 7.0).view(2, 3),)]


def changes_everything() -> None:
    torch.set_default_dtype(torch.float64)
    torch.set_grad_enabled(False)
    torch.set_autocast_enabled("cpu", True)
    torch.use_deterministic_algorithms(True)
    torch.set_anomaly_enabled(True)
    torch.manual_seed(5)
    random.seed(5)
    np.random.seed(5)  # noqa: NPY002 (the code under test may use it)
    np.seterr(all="raise")
    warnings.simplefilter("ignore")


def test_all_global_state_is_restored() -> None:
    states = STATES | random_numbers(torch.device("cpu"))
    before = {name: state.get() for name, state in states.items()}
    with restored():
        changes_everything()
        assert sum(changed(was, states[name].get()) for name, was in before.items()) == 10
    assert {name for name, was in before.items() if changed(was, states[name].get())} == set()


def test_new_memory_is_filled_with_nan() -> None:
    with filled_memory():
        assert torch.empty(3).isnan().all()
    assert not torch.are_deterministic_algorithms_enabled()


def test_one_check_does_not_spoil_the_next() -> None:
    def leaves_grad_mode_off(x: Tensor) -> Any:
        y = x.sigmoid()
        torch.set_grad_enabled(False)
        return y

    report = check_function(leaves_grad_mode_off, SAMPLES, torch.sigmoid, slow=False)
    assert "global_state" in {outcome.check for outcome in report.failures}
    assert torch.is_grad_enabled()


def test_what_the_reference_does_to_global_state_is_excused() -> None:
    def draws(x: Tensor) -> Any:
        torch.rand(1)
        return x.sigmoid()

    only = ["global_state"]
    assert check_function(draws, SAMPLES, draws, only=only).ok
    assert not check_function(draws, SAMPLES, torch.sigmoid, only=only).ok
    assert not check_function(draws, SAMPLES, only=only).ok


def test_a_module_of_pytorch_may_share_its_flaws() -> None:
    def made() -> nn.Module:
        return nn.Embedding(7, 4, max_norm=0.5)

    indices = [(torch.tensor([1, 2, 2, 5]),)]
    assert check_module(made, indices, made, only=["module_left_alone"]).ok
    report = check_module(made, indices, only=["module_left_alone"])
    assert "weight in mode train(True): expected no change by a call" in str(report)


def test_a_parameter_written_in_forward_is_one_cause_even_if_the_reference_writes_it_too() -> None:
    def made() -> nn.Module:
        return nn.Embedding(7, 4, max_norm=0.5)

    indices = [(torch.tensor([1, 2, 2, 5]),)]
    report = check_module(made, indices, made, slow=False)
    assert [outcome.check for outcome in report.causes] == ["writes_nothing"]
    assert report.verdict.startswith("NOT OK: weight – changed in place, by the reference too")
    (alone,) = check_module(made, indices, only=["writes_nothing"]).failures
    assert "by the reference too" not in alone.diagnosis


def test_a_function_that_is_random_by_nature_may_draw_but_not_seed() -> None:
    def seeds(x: Tensor) -> Any:
        torch.manual_seed(3)
        return torch.nn.functional.dropout(x)

    only = ["global_state"]
    assert check_function(torch.nn.functional.dropout, SAMPLES, only=only).ok
    assert check_function(torch.nn.functional.dropout, SAMPLES, torch.sigmoid, only=only).ok
    assert "it seeds a global generator" in str(check_function(seeds, SAMPLES, only=only))
