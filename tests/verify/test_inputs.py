"""Nested arguments and results, which checks see as flat ones."""

from dataclasses import dataclass
from functools import partial
from typing import Any, NamedTuple

import pytest
import torch
from torch import Tensor, nn
from torch.autograd import Function
from torch.autograd.function import once_differentiable

from manual_bp.verify import check_function, check_module, function_case
from tests.verify.test_run import Square, message, status

X = torch.randn(5, 3, dtype=torch.float64)
Y = torch.rand(5, 3, dtype=torch.float64) + 1


class Product(Function):
    """scale · x · y"""

    @staticmethod
    def forward(ctx: Any, x: Tensor, y: Tensor, scale: float) -> Tensor:
        ctx.save_for_backward(x, y)
        ctx.scale = scale
        return scale * x * y

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> Any:
        x, y = ctx.saved_tensors
        return ctx.scale * grad * y, ctx.scale * grad * x, None


class WrongForTheSecond(Product):
    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> Any:
        x, y = ctx.saved_tensors
        return ctx.scale * grad * y, 2 * ctx.scale * grad * x, None


def nested(function: Any) -> Any:
    def call(pair: list[Tensor], options: dict[str, Any]) -> Any:
        product = function(*pair, options["scale"])
        return {"product": product, "more": (product.sum(), options["mask"])}

    return call


def reference(pair: list[Tensor], options: dict[str, Any]) -> Any:
    product = options["scale"] * pair[0] * pair[1]
    return {"more": [product.sum(), options["mask"]], "product": product}


OPTIONS = {"scale": 2.0, "mask": None, "name": "product"}
NESTED = [([X, Y], OPTIONS)]


def test_nested_arguments_and_results_are_judged() -> None:
    options: Any = {"in_dims": (0, None), "slow": False}
    right = nested(lambda x, y, scale: scale * x * y)
    check_function(nested(Product.apply), NESTED, right, **options).raise_if_failed()
    report = check_function(nested(WrongForTheSecond.apply), NESTED, reference, **options)
    text = message(report, "gradients_match_reference")
    assert text.startswith("gradient of pair[1], at index")
    assert "2 times the right one" in text


def test_a_dict_in_the_result_may_have_its_keys_in_any_order() -> None:
    check_function(nested(Product.apply), NESTED, reference, slow=False).raise_if_failed()


def test_without_a_reference_slopes_by_nested_arguments_are_judged() -> None:
    report = check_function(nested(WrongForTheSecond.apply), NESTED, only=["finite_differences"])
    assert "slope along a direction of pair[1]" in message(report, "finite_differences")
    check_function(nested(Product.apply), NESTED, only=["finite_differences"]).raise_if_failed()


@pytest.mark.parametrize("in_dims", [(0, None), ([0, 0], None), ([0, None], {"s": None})])
def test_in_dims_may_be_nested(in_dims: Any) -> None:
    row = Y if in_dims[0] != [0, None] else Y[0]
    case = function_case(lambda p, s: p[0] * p[1] * s["s"], [([X, row], {"s": 1})], in_dims=in_dims)
    assert case.in_dims == (0, None if row is not Y else 0, None)
    assert case.labels == ("p[0]", "p[1]", "s['s']")


class Pair(NamedTuple):
    first: Tensor
    second: Tensor


def test_vmap_compile_and_export_take_nested_arguments() -> None:
    def call(pair: Pair, factor: dict[str, Any]) -> Any:
        return {"a": pair.first.sin() * pair.second, "b": factor["x"]}

    only = ["vmap", "per_sample_gradients", "compile", "export"]
    samples = [(Pair(X, Y), {"x": X, "n": None})]
    report = check_function(call, samples, call, only=only, supports=only, in_dims=(0, 0))
    report.raise_if_failed()


def test_a_module_may_take_and_return_nested_tensors() -> None:
    class Cell(nn.Linear):
        factor = 1.0

        def forward(self, state: Any) -> Any:
            h = torch.tanh(super().forward(state["x"])) * state["h"][0]
            return {"h": [h * self.factor], "x": state["x"]}

    class Wrong(Cell):
        factor = 2.0

    samples = [({"x": X, "h": [torch.randn(5, 4)]},)]
    options: Any = {"in_dims": (0,), "slow": False}
    check_module(lambda: Cell(3, 4), samples, lambda: Cell(3, 4), **options).raise_if_failed()
    report = check_module(lambda: Wrong(3, 4), samples, lambda: Cell(3, 4), **options)
    only = {outcome.check for outcome in report.failures}
    assert {"forward_matches_reference", "train_eval"} <= only
    text = message(report, "gradients_match_reference")
    assert text.startswith("gradient of input 0['x'], at index")


@dataclass
class Box:
    tensor: Tensor


class Slotted:
    __slots__ = ("tensor",)

    def __init__(self, tensor: Tensor) -> None:
        self.tensor = tensor


@pytest.mark.parametrize(
    ("samples", "options", "error", "text"),
    [
        ([(X, Box(X))], {}, TypeError, r"samples must hold tensors in lists, .* got some in a Box"),
        ([(X, [Slotted(X)])], {}, TypeError, r"samples must hold .* got some in a Slotted"),
        ([([X],), ([X, X],)], {}, ValueError, r"nested arguments must all be nested alike; got"),
        ([([X],), (X,)], {}, ValueError, r"nested arguments must all be nested alike; got"),
        (
            [([X],)],
            {"in_dims": ([0, 0],)},
            ValueError,
            r"in_dims\[0\] must be one entry, or nested",
        ),
        ([({"a": X},)], {"in_dims": ({"b": 0},)}, ValueError, r"in_dims\[0\] must be .*'b': 0"),
        ([([X],)], {"in_dims": (0, 0)}, ValueError, r"in_dims must be a tuple with an entry for"),
        ([([X],)], {"varying": [(["a"],)]}, ValueError, r"varying must have a dimension or None"),
        ([([X],)], {"dtypes": [([1],)]}, ValueError, r"dtypes must list float64, "),
    ],
)
def test_what_cannot_be_flattened_is_refused(
    samples: Any, options: Any, error: type[Exception], text: str
) -> None:
    with pytest.raises(error, match=text):
        function_case(lambda *_: X, samples, **options)


def test_a_later_draw_must_be_nested_as_the_first() -> None:
    lengths = iter([1, 2])
    case = function_case(torch.cat, lambda _: [([X] * next(lengths),)])
    with pytest.raises(ValueError, match="must all be nested alike"):
        case.draw(torch.Generator())


def test_integers_none_and_strings_stay_arguments() -> None:
    def call(x: Tensor, index: Tensor, mode: str, bias: Tensor | None, flag: bool) -> Tensor:
        taken = x[index] if flag and mode == "take" else x
        return taken if bias is None else taken + bias

    samples = [(X, torch.tensor([4, 0, 0]), "take", None, True), (X, X > 0, "all", Y, False)]
    check_function(call, samples, call, slow=False).raise_if_failed()


def test_a_square_in_a_list_is_judged_as_one_outside() -> None:
    def squares(xs: list[Tensor]) -> list[Tensor]:
        return [Square.apply(x) for x in xs]

    report = check_function(squares, [([X, Y],)], lambda xs: tuple(x * x for x in xs), slow=False)
    report.raise_if_failed()
    assert status(report, "saves_nothing_on_ctx") == "passed"


@pytest.mark.parametrize(
    "options", [{"in_dims": (3,)}, {"in_dims": (-3,)}, {"varying": [(5,)]}], ids=str
)
def test_dimensions_that_no_argument_has_are_refused(options: dict[str, Any]) -> None:
    with pytest.raises(ValueError, match=r"must have dimensions of the arguments; got -?\d for a"):
        function_case(torch.tanh, [(torch.randn(5, 3),)], **options)


@pytest.mark.parametrize("first", [0, 1])
def test_a_sample_without_the_sample_dimension_is_judged_by_the_other_checks(first: int) -> None:
    samples = [(torch.randn(5, 3),), (torch.tensor(0.3),)]
    report = check_function(
        torch.exp,
        samples[first:] + samples[:first],
        torch.exp,
        in_dims=(0,),
        supports=["vmap", "no_rows", "sizes"],
        slow=False,
    )
    report.raise_if_failed()
    with pytest.raises(ValueError, match=r"in_dims must have .*; got 0 for a tensor of shape \(\)"):
        function_case(torch.exp, samples[1:], in_dims=(0,))


def test_an_operator_may_take_a_list_of_tensors() -> None:
    @torch.library.custom_op("manual_bp_test::joined", mutates_args=())
    def joined(parts: list[Tensor], factor: float) -> Tensor:
        return torch.cat(parts, -1) * factor

    def setup(ctx: Any, inputs: Any, output: Any) -> None:
        del output
        ctx.sizes, ctx.factor = [t.shape[-1] for t in inputs[0]], inputs[1]

    def backward(ctx: Any, grad: Tensor) -> Any:
        return [t.contiguous() for t in (grad * ctx.factor).split(ctx.sizes, -1)], None

    joined.register_fake(lambda parts, factor: torch.cat(parts, -1) * factor)
    joined.register_autograd(backward, setup_context=setup)
    samples = [([torch.randn(5, 3), torch.randn(5, 2)], 2.0)]
    report = check_function(joined, samples, lambda p, f: torch.cat(p, -1) * f, slow=False)
    assert report.ok, report


def test_a_float32_weight_beside_bfloat16_is_linear_in_the_upstream_gradient() -> None:
    class Scale(Function):
        @staticmethod
        def forward(ctx: Any, x: Tensor, w: Tensor) -> Tensor:
            ctx.save_for_backward(x, w)
            return (x.float() * w).to(x.dtype)

        @staticmethod
        @once_differentiable
        def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, Tensor]:
            x, w = ctx.saved_tensors
            return (grad.float() * w).to(x.dtype), (grad.float() * x.float()).sum(0)

    report = check_function(
        Scale,
        lambda g: [(torch.randn(9, 16, generator=g), torch.randn(16, generator=g))],
        lambda x, w: (x * w).to(x.dtype),
        in_dims=(0, None),
        dtypes=[(torch.bfloat16, torch.float32)],
        slow=False,
    )
    assert report.ok, report


def test_a_batch_norm_without_a_reference_is_right() -> None:
    def rows(generator: torch.Generator) -> list[tuple[Tensor]]:
        return [(torch.randn(5, 3, generator=generator),)]

    report = check_module(lambda: nn.BatchNorm1d(3), rows, slow=False)
    assert "argument_layouts" not in {outcome.check for outcome in report.failures}


def test_what_cancels_for_tied_arguments_may_be_rounding() -> None:
    class Cosine(Function):
        @staticmethod
        def forward(ctx: Any, a: Tensor, b: Tensor) -> Tensor:
            u, v = (t / t.norm(dim=-1, keepdim=True) for t in (a, b))
            c = (u * v).sum(-1, keepdim=True)
            ctx.save_for_backward(a, b, u, v, c)
            result: Tensor = c.squeeze(-1)
            return result

        @staticmethod
        @once_differentiable
        def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, Tensor]:
            a, b, u, v, c = ctx.saved_tensors
            g, (na, nb) = grad[..., None], (t.norm(dim=-1, keepdim=True) for t in (a, b))
            return g * (v - c * u) / na, g * (u - c * v) / nb

    samples = [(torch.randn(5, 7), torch.randn(5, 7))]
    right = partial(nn.functional.cosine_similarity, dim=-1)
    report = check_function(Cosine, samples, right, only=["tied_inputs"])
    assert report.ok, report
