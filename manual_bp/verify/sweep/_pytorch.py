"""Cases from the samples with which PyTorch tests its own operators and modules."""

import random
import re
import warnings
import zlib
from collections.abc import Callable, Iterator
from functools import partial
from typing import Any

import numpy as np
import torch
from torch import Tensor

from manual_bp._torch import own_test_samples
from manual_bp.verify._case import Case, Sample
from manual_bp.verify._make_case import function_case, module_case
from manual_bp.verify.sweep._arranged import Arrangement, FlatModule, flat
from manual_bp.verify.sweep._exceptions import KNOWN, SKIPPED, UNBATCHED

_MOST_ELEMENTS = 500  # of a sample; finite differences call the function for each
_SAMPLES = 2  # of a case


def pytorch_cases(seed: int) -> Iterator[Callable[[], Case | None]]:
    """What makes a case of each operator and module that PyTorch tests, except those skipped.

    It makes none of an operator whose samples are all too large. Each seed takes other samples of
    those that PyTorch has, and other random numbers.
    """
    operators, modules = own_test_samples()
    for operator in operators:
        if is_judged(operator):
            yield partial(_operator_case, operator, seed)
    for module in modules:
        if module.name not in SKIPPED:
            yield partial(_module_case, module, seed)


def _operator_case(operator: Any, seed: int) -> Case | None:
    name = name_of(operator)
    _seed_all(name, seed)
    with warnings.catch_warnings(action="ignore"):
        drawn = operator.sample_inputs("cpu", torch.float64, requires_grad=True, set_seed=False)
        arrangements = [
            Arrangement((sample.input, *sample.args), sample.kwargs, sample.output_process_fn_grad)
            for sample in drawn
        ]
    samples = _chosen([a for a in arrangements if a.is_small(_MOST_ELEMENTS)], seed)
    if not samples:
        return None
    # PyTorch's own wrapper makes a matrix symmetric first, for instance.
    call = flat(partial(operator.gradcheck_wrapper, operator.op))
    first = samples[0][0]
    has_rows = isinstance(first, Tensor) and first.ndim > 0
    rows = (0, *[None] * (len(samples[0]) - 1))
    return function_case(
        call,
        samples,
        call,
        name=name,
        seed=seed,
        in_dims=rows if has_rows and name not in UNBATCHED else None,
        expected_failures=KNOWN.get(name),
    )


def _module_case(info: Any, seed: int) -> Case:
    _seed_all(info.name, seed)
    with warnings.catch_warnings(action="ignore"):
        drawn = info.module_inputs_func(
            info, device="cpu", dtype=torch.float64, requires_grad=True, training=True
        )
    judged = [(m.constructor_input, m.forward_input) for m in drawn if m.forward_input is not None]
    constructor, given = judged[seed % len(judged)]

    def factory() -> FlatModule:
        return FlatModule(info.module_cls(*constructor.args, **constructor.kwargs))

    return module_case(
        factory,
        [Arrangement(given.args, given.kwargs).sample],
        factory,
        name=info.name,
        seed=seed,
        expected_failures=KNOWN.get(info.name),
    )


def name_of(operator: Any) -> str:
    """The name of an operator, with that of its variant, such as std/unbiased."""
    variant = operator.variant_test_name
    return f"{operator.name}/{variant}" if variant else str(operator.name)


def is_judged(operator: Any) -> bool:
    """Whether it is public and differentiable, and not skipped."""
    return (
        name_of(operator) not in SKIPPED
        and re.search(r"(^|\.)_[a-z]", operator.name) is None
        and operator.supports_autograd
        and torch.float64 in operator.supported_backward_dtypes("cpu")
    )


def _chosen(arrangements: list[Arrangement], seed: int) -> list[Sample]:
    """Some of the samples, in turn; all with the same number of tensors."""
    count = len(arrangements)
    turns = [(seed * _SAMPLES + i) % count for i in range(min(_SAMPLES, count))]
    samples = [arrangements[turn].sample for turn in turns]
    return [sample for sample in samples if len(sample) == len(samples[0])]


def _seed_all(name: str, seed: int) -> None:
    """PyTorch's samples use all three generators."""
    number = zlib.crc32(f"{name} {seed}".encode())
    torch.manual_seed(number)
    np.random.seed(number)  # noqa: NPY002 (theirs)
    random.seed(number)
