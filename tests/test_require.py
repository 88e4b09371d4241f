from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from manual_bp import _require

ROW = torch.ones(1, 3)


class BytesPath:
    def __fspath__(self) -> bytes:
        return b"a"


@pytest.mark.parametrize(
    ("check", "arguments", "error", "message"),
    [
        ("tensor", ("a", 1), TypeError, "a must be a torch.Tensor; got int"),
        ("tensor", ("a", ROW.to_sparse()), TypeError, "a must be a dense tensor; got layout torch"),
        ("ordered", ("a", ROW > 0), TypeError, "a must have a real or integer dtype; got torch.b"),
        ("ordered", ("a", ROW + 1j), TypeError, "a must have a real or integer dtype; got"),
        ("at_least", ("s", -0.1, 0), ValueError, "s must be at least 0; got -0.1"),
        ("at_least", ("s", float("nan"), 0), ValueError, "s must be at least 0; got nan"),
        ("at_least", ("s", None, 0), TypeError, "s must be a number; got NoneType"),
        ("at_least", ("s", 1j, 0), TypeError, "s must be a number; got complex"),
        ("not_zero", ("beta", 0.0), ValueError, "beta must not be 0; got 0.0"),
        (
            "real",
            ("a", ROW + 1j),
            TypeError,
            "a must have a real floating-point dtype; got torch.c",
        ),
        (
            "like",
            ("a", ROW.double(), "w", ROW),
            TypeError,
            "a must have the dtype of w, torch.float32; got torch.float64",
        ),
        ("like", ("a", ROW.to("meta"), "w", ROW), ValueError, "a must be on the device of w, cpu"),
        (
            "same_device",
            ("a", ROW.to("meta"), "w", ROW),
            ValueError,
            "a must be on the device of w",
        ),
        (
            "shape",
            ("a", ROW, (3,), "why"),
            ValueError,
            r"a must have shape \(3,\), why; got \(1, 3",
        ),
        ("matrix", ("a", ROW[0], "(m, n)"), ValueError, r"a must have shape \(m, n\); got \(3,\)"),
        ("components", ("a", ROW[0, 0]), ValueError, "a must have at least one dimension"),
        ("components", ("a", ROW, 4, "why"), ValueError, "a must have last dimension 4, why; got"),
        ("count", ("n", 0), ValueError, "n must be at least 1; got 0"),
        ("count", ("n", 2.0), TypeError, "n must be an integer; got float"),
        ("count", ("n", True), TypeError, "n must be an integer; got bool"),
        ("path", ("p", b"a"), TypeError, r"p must be a str or a pathlib\.Path; got bytes"),
        (
            "path",
            ("p", BytesPath()),
            TypeError,
            r"p must be a str or a pathlib\.Path; got BytesPath",
        ),
        ("one_of", ("a", "c", ("a", "b")), ValueError, "a must be one of 'a', 'b'; got 'c'"),
        ("indices", ("y", ROW[0].bool(), "z", ROW), TypeError, "y must hold integers or prob"),
        ("indices", ("y", torch.tensor([3]), "z", ROW), ValueError, "class indices from 0 to 2"),
        ("indices", ("y", torch.tensor([-1]), "z", ROW), ValueError, "class indices from 0 to 2"),
    ],
)
def test_a_bad_argument_is_refused_by_its_name(
    check: str, arguments: Any, error: type[Exception], message: str
) -> None:
    with pytest.raises(error, match=message):
        getattr(_require, check)(*arguments)


@pytest.mark.parametrize(
    ("check", "arguments"),
    [
        ("tensor", ("a", ROW)),
        ("ordered", ("a", ROW.int())),
        ("ordered", ("a", ROW)),
        ("at_least", ("s", 0, 0)),
        ("not_zero", ("beta", -2.0)),
        ("real", ("a", ROW.half())),
        ("like", ("a", ROW, "w", ROW)),
        ("shape", ("a", ROW, (1, 3), "why")),
        ("matrix", ("a", ROW, "(m, n)")),
        ("components", ("a", ROW, 3, "why")),
        ("count", ("n", np.int64(1))),
        ("path", ("p", "a")),
        ("path", ("p", Path("a"))),
        ("one_of", ("a", "b", ("a", "b"))),
        ("indices", ("y", torch.tensor([2]), "z", ROW)),
        ("indices", ("y", torch.tensor([], dtype=torch.int64), "z", ROW[:0])),
        # Values that cannot be read.
        ("indices", ("y", torch.tensor([7], device="meta"), "z", ROW.to("meta"))),
    ],
)
def test_a_good_argument_passes(check: str, arguments: Any) -> None:
    getattr(_require, check)(*arguments)
