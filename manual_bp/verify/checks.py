"""The checks, each a function of its own; `CHECKS` at the end is the list of them.

A check compares through its bench, raises a `Mismatch` for what is wrong and `NotApplicable` where
it has nothing to compare. Any other exception is the case's own: a refusal, if the check is of a
capability that nobody declared, else a failure.
"""

import copy
import gc
import pickle
import warnings
import weakref
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd import Function
from torch.autograd import forward_ad as forward_ad_module
from torch.autograd.graph import saved_tensors_hooks

from manual_bp.verify._bench import (
    Bench,
    Call,
    Gradients,
    Products,
    custom_nodes,
    gradients,
    gradients_of,
    leaves,
    outputs_of,
    positions,
    subsets,
)
from manual_bp.verify._case import Sample, is_differentiable
from manual_bp.verify._compare import Mismatch, NotApplicable

# ----- the value, and the first derivative


def forward_matches_reference(bench: Bench) -> None:
    """The value is the reference's, for contiguous and for transposed arguments."""
    for sample in bench.samples:
        bench.same_outputs(bench.case.call(*sample), bench.reference(*sample))
        turned = tuple(_turned(t) for t in sample)
        bench.same_outputs(
            bench.case.call(*turned), bench.reference(*turned), " of transposed arguments"
        )


def finite_differences(bench: Bench) -> None:
    """The gradient is the slope: in random directions, and along every axis of small arguments."""
    for sample in bench.samples:
        upstream = bench.upstream(bench.case.call, sample)
        _, found = gradients(bench.case.call, leaves(sample), upstream)
        for i in positions(sample):
            gradient = found[i]
            if gradient is None:
                gradient = torch.zeros_like(sample[i])
            for direction in _directions(bench, sample[i]):
                _compare_slope(bench, sample, i, direction, upstream, gradient)


def gradients_match_reference(bench: Bench) -> None:
    """The gradients are those that autograd finds through the reference."""
    for sample in bench.samples:
        upstream = bench.upstream(bench.reference, sample)
        _, found = gradients(bench.case.call, leaves(sample), upstream)
        _, expected = gradients(bench.reference, leaves(sample), upstream)
        clues = _clues(bench.reference, sample, upstream, expected)
        bench.same_gradients(sample, found, expected, clues=clues)


def requires_grad_subsets(bench: Bench) -> None:
    """Whichever arguments want gradients, each gets the same one."""
    for sample in bench.samples:
        upstream = bench.upstream(bench.case.call, sample)
        _, expected = gradients(bench.case.call, leaves(sample), upstream)
        for wanted in subsets(positions(sample)):
            names = ", ".join(bench.case.label(i) for i in wanted)
            _, found = gradients(bench.case.call, leaves(sample, wanted), upstream)
            right = {i: expected[i] for i in wanted}
            bench.same_gradients(sample, found, right, f" when only {names} want one")


def frugal(bench: Bench) -> None:
    """For no choice of arguments more matrix products or more memory than the reference."""
    for sample in bench.samples:
        upstream = bench.upstream(bench.reference, sample)
        for wanted in subsets(positions(sample)):
            names = ", ".join(bench.case.label(i) for i in wanted)
            for what, measure in (
                ("matrix products in backward", _products),
                ("bytes kept for backward", _saved_bytes),
            ):
                ours = measure(bench.case.call, leaves(sample, wanted), upstream)
                theirs = measure(bench.reference, leaves(sample, wanted), upstream)
                bench.comparisons += 1
                if ours > theirs:
                    raise Mismatch(
                        f"{what} when only {names} want gradients: expected at most {theirs}, as "
                        f"the reference, got {ours}\n"
                        f"diagnosis: ctx.needs_input_grad is not asked"
                    )


# ----- what comes from above


def upstream_layouts(bench: Bench) -> None:
    """The strides of the upstream gradient do not matter, nor that it is expanded or zero."""
    for sample in bench.samples:
        for name, layout in _LAYOUTS.items():
            upstream = [layout(u) for u in bench.upstream(bench.case.call, sample)]
            plain = [u.clone(memory_format=torch.contiguous_format) for u in upstream]
            _, found = gradients(bench.case.call, leaves(sample), upstream)
            _, expected = gradients(bench.case.call, leaves(sample), plain)
            bench.same_gradients(
                sample,
                found,
                expected,
                f" for a {name} upstream gradient",
                story="right only for contiguous upstream gradients",
            )
        zero = [torch.zeros_like(u) for u in bench.upstream(bench.case.call, sample)]
        _, found = gradients(bench.case.call, leaves(sample), zero)
        nothing: Gradients = dict.fromkeys(found)
        bench.same_gradients(sample, found, nothing, " for an upstream gradient of zeros")


def upstream_undefined(bench: Bench) -> None:
    """Where no gradient comes from above, none goes down, and nothing breaks."""
    for sample in bench.samples:
        arguments = leaves(sample)
        for output in outputs_of(bench.case.call(*arguments)):
            if not output.requires_grad:
                continue
            cut = _Cut.apply(output)
            found = gradients_of(cut, arguments, [torch.ones_like(cut)])
            nothing: Gradients = dict.fromkeys(found)
            bench.same_gradients(sample, found, nothing, " for an undefined upstream gradient")


def linear_in_upstream(bench: Bench) -> None:
    """Twice one upstream gradient plus another gives twice the one result plus the other."""
    for sample in bench.samples:
        one = bench.upstream(bench.case.call, sample)
        other = bench.upstream(bench.case.call, sample)
        both = [2 * u + v for u, v in zip(one, other, strict=True)]
        of_one, of_other, of_both = (
            gradients(bench.case.call, leaves(sample), u)[1] for u in (one, other, both)
        )
        expected: Gradients = {}
        for i, gradient in of_one.items():
            more = of_other[i]
            if gradient is not None and more is not None:
                expected[i] = 2 * gradient + more
        bench.same_gradients(sample, of_both, expected, story="not linear in the upstream gradient")


# ----- shapes


def no_rows(bench: Bench) -> None:
    """A batch of no samples, as the reference."""
    _compare_variant(bench, lambda t, d: t.narrow(d, 0, 0), " of no rows")


def one_row(bench: Bench) -> None:
    """A batch of one sample, as the reference."""
    _compare_variant(bench, lambda t, d: t.narrow(d, 0, 1), " of one row")


def one_dimensional(bench: Bench) -> None:
    """One sample without a batch dimension, as the reference."""
    _compare_variant(bench, lambda t, d: t.select(d, 0), " of one sample without a batch")


def three_dimensional(bench: Bench) -> None:
    """Two batch dimensions, as the reference."""
    _compare_variant(
        bench, lambda t, d: torch.stack([t, t.flip(d)], d), " with two batch dimensions"
    )


# ----- the manners of a backward


def raw_backward(bench: Bench) -> None:
    """What a backward returns has the shape, dtype and device of its argument, before any cast."""
    for sample in bench.samples:
        arguments = leaves(sample)
        result = bench.case.call(*arguments)
        if not custom_nodes(result):
            raise NotApplicable("no hand-written Function in the graph")
        _compare_raw(bench, arguments, result)


def writes_nothing(bench: Bench) -> None:
    """Neither forward nor backward changes an argument, an output or the upstream gradient."""
    for sample in bench.samples:
        arguments = leaves(sample)
        upstream = bench.upstream(bench.case.call, sample)
        before = {bench.case.label(i): arguments[i].detach().clone() for i in positions(sample)}
        result = bench.case.call(*arguments)
        now = {bench.case.label(i): arguments[i] for i in positions(sample)}
        _compare_unchanged(bench, before, now, "forward")
        for i, (u, output) in enumerate(zip(upstream, outputs_of(result), strict=True)):
            before |= {f"upstream gradient {i}": u.clone(), f"output {i}": output.detach().clone()}
            now |= {f"upstream gradient {i}": u, f"output {i}": output}
        gradients_of(result, arguments, upstream)
        _compare_unchanged(bench, before, now, "backward")


def saves_nothing_on_ctx(bench: Bench) -> None:
    """Tensors are kept by save_for_backward, never as attributes of ctx."""
    for sample in bench.samples:
        nodes = custom_nodes(bench.case.call(*leaves(sample)))
        if not nodes:
            raise NotApplicable("no hand-written Function in the graph")
        for node in nodes:
            bench.comparisons += 1
            kept = [name for name, value in vars(node).items() if _holds_tensor(value)]
            if kept:
                raise Mismatch(
                    f"{_node_name(node)} keeps a tensor as ctx.{kept[0]}: expected "
                    f"ctx.save_for_backward\n"
                    f"diagnosis: hidden from saved-tensor hooks and checkpointing, and a change "
                    f"in place goes unnoticed"
                )


def stale_inputs_raise(bench: Bench) -> None:
    """An argument changed in place after forward is noticed in backward, or does not matter."""
    for sample in bench.samples:
        upstream = bench.upstream(bench.case.call, sample)
        _, expected = gradients(bench.case.call, leaves(sample), upstream)
        for i in positions(sample):
            arguments = leaves(sample)
            result = bench.case.call(*arguments)
            with torch.no_grad():
                arguments[i].mul_(2).add_(1)
            try:
                found = gradients_of(result, arguments, upstream)
            except RuntimeError:
                bench.comparisons += 1
                continue
            bench.same_gradients(
                sample,
                found,
                expected,
                f" after {bench.case.label(i)} was changed in place",
                story="kept by .data or on ctx: the change went unnoticed",
            )


def no_leak(bench: Bench) -> None:
    """Without the garbage collector's help, nothing outlives the last use."""
    collects = gc.isenabled()
    gc.disable()
    try:
        for sample in bench.samples:
            for with_backward in (True, False):
                arguments = leaves(sample)
                result = bench.case.call(*arguments)
                upstream = [bench.random_like(t) for t in outputs_of(result)]
                if with_backward:
                    gradients_of(result, arguments, upstream)
                watched = [weakref.ref(t) for t in (*outputs_of(result), *outputs_of(arguments))]
                del result, arguments, upstream
                bench.comparisons += 1
                if any(watch() is not None for watch in watched):
                    raise Mismatch(
                        "a tensor is still there after its last use: expected it to be freed\n"
                        "diagnosis: a reference cycle, such as an output kept on ctx, or a "
                        "tensor kept in a global"
                    )
    finally:
        if collects:
            gc.enable()


def repeatable_backward(bench: Bench) -> None:
    """Backward twice through one graph gives the same twice, and `.grad` adds up."""
    for sample in bench.samples:
        arguments = leaves(sample)
        result = bench.case.call(*arguments)
        upstream = [bench.random_like(t) for t in outputs_of(result)]
        first = gradients_of(result, arguments, upstream, retain_graph=True)
        kept = {i: None if g is None else g.clone() for i, g in first.items()}
        second = gradients_of(result, arguments, upstream, retain_graph=True)
        bench.same_gradients(sample, second, kept, " the second time")
        gradients_of(result, arguments, [2 * u for u in upstream], retain_graph=True)
        bench.same_gradients(
            sample,
            first,
            kept,
            " of the first time, looked at after another backward",
            story="a buffer is returned, and overwritten by the next backward",
        )
        if not all(output.requires_grad for output in outputs_of(result)):
            continue
        for _ in range(2):
            torch.autograd.backward(outputs_of(result), upstream, retain_graph=True)
        added = {i: arguments[i].grad for i in positions(sample)}
        twice: Gradients = {i: None if g is None else 2 * g for i, g in kept.items()}
        bench.same_gradients(sample, added, twice, " added up in .grad by two calls")


def deterministic(bench: Bench) -> None:
    """Two calls with the same arguments agree."""
    for sample in bench.samples:
        upstream = bench.upstream(bench.case.call, sample)
        one, of_one = gradients(bench.case.call, leaves(sample), upstream)
        other, of_other = gradients(bench.case.call, leaves(sample), upstream)
        bench.same_outputs(other, one, " of a second call")
        bench.same_gradients(sample, of_other, of_one, " of a second call")


def tied_inputs(bench: Bench) -> None:
    """One tensor in the place of two arguments gets the sum of both gradients."""
    for sample, i, j in _pairs(bench):
        upstream = bench.upstream(bench.case.call, sample)

        def tied(call: Call, *, sample: Sample = sample, i: int = i, j: int = j) -> Call:
            places = range(len(sample))
            return lambda *args: call(*(args[i] if place == j else args[place] for place in places))

        wanted = [place for place in positions(sample) if place != j]
        _, found = gradients(tied(bench.case.call), leaves(sample, wanted), upstream)
        _, expected = gradients(tied(bench.reference), leaves(sample, wanted), upstream)
        both = f" which is also {bench.case.label(j)}"
        bench.same_gradients(sample, {i: found[i]}, {i: expected[i]}, both)


# ----- higher orders, and the other mode


def double_backward(bench: Bench) -> None:
    """Second derivatives, by the arguments and by the upstream gradient, as the reference."""
    _compare_order(bench, 2)


def third_order(bench: Bench) -> None:
    """Third derivatives as the reference."""
    _compare_order(bench, 3)


def forward_ad(bench: Bench) -> None:
    """Forward-mode derivatives, by all arguments and by each alone, as the reference."""
    for sample in bench.samples:
        places = positions(sample)
        for moved in [places, *([i] for i in places if len(places) > 1)]:
            tangents = {i: bench.random_like(sample[i]) for i in moved}
            found = _tangents(bench.case.call, sample, tangents)
            expected = _tangents(bench.reference, sample, tangents)
            names = ", ".join(bench.case.label(i) for i in moved)
            for one, other in zip(found, expected, strict=True):
                bench.same(f"tangent of the output along {names}", one, other)


def forward_over_reverse(bench: Bench) -> None:
    """The gradient's own forward-mode derivative, as the reference."""
    for sample in bench.samples:
        upstream = bench.upstream(bench.reference, sample)
        tangents = {i: bench.random_like(sample[i]) for i in positions(sample)}
        found = _tangents_of_gradients(bench.case.call, sample, tangents, upstream)
        expected = _tangents_of_gradients(bench.reference, sample, tangents, upstream)
        bench.same_gradients(
            sample, found, expected, ", its tangent", story="second-order term missing"
        )


# ----- batches of calls


def vmap(bench: Bench) -> None:
    """Under vmap as in a loop over the samples."""
    for sample in bench.samples:
        in_dims = _dims(bench.in_dims, sample)
        batched = torch.func.vmap(bench.case.call, in_dims)(*sample)
        rows = [bench.case.call(*row) for row in _rows(sample, in_dims)]
        looped = tuple(torch.stack(parts) for parts in zip(*map(outputs_of, rows), strict=True))
        bench.same_outputs(batched, looped, " under vmap")


def per_sample_gradients(bench: Bench) -> None:
    """The gradient of every sample by vmap(grad), as in a loop."""
    for sample in bench.samples:
        in_dims = _dims(bench.in_dims, sample)
        places = positions(sample)

        def total(*arguments: Any) -> Tensor:
            return torch.stack(
                [t.pow(2).sum().real for t in outputs_of(bench.case.call(*arguments))]
            ).sum()

        derivative = torch.func.grad(total, tuple(places))
        found = torch.func.vmap(derivative, in_dims)(*sample)
        looped = []
        for row in _rows(sample, in_dims):
            arguments = leaves(row)
            wanted = [arguments[i] for i in places]
            looped.append(torch.autograd.grad(total(*arguments), wanted, allow_unused=True))
        for i, one, others in zip(places, found, zip(*looped, strict=True), strict=True):
            expected = torch.stack([torch.zeros_like(one[0]) if g is None else g for g in others])
            bench.same(f"per-sample gradient of {bench.case.label(i)}", one, expected)


# ----- precision


def float32(bench: Bench) -> None:
    """In float32 no further from float64 than twice the reference."""
    _compare_precision(bench, torch.float32)


def bfloat16(bench: Bench) -> None:
    """In bfloat16 no further from float64 than twice the reference."""
    _compare_precision(bench, torch.bfloat16)


def float16(bench: Bench) -> None:
    """In float16 no further from float64 than twice the reference."""
    _compare_precision(bench, torch.float16)


def autocast(bench: Bench) -> None:
    """Under autocast the reference's dtypes, and a backward that works outside the region."""
    device = bench.case.device.type
    for sample in bench.samples:
        if any(isinstance(t, Tensor) and t.is_complex() for t in sample):
            continue
        low = _cast(sample, torch.float32)
        results = []
        for call in (bench.case.call, bench.reference):
            arguments = leaves(low)
            with torch.autocast(device, torch.bfloat16):
                result = call(*arguments)
            ones = [torch.ones_like(t) for t in outputs_of(result)]
            if call is bench.case.call:
                _compare_raw(bench, arguments, result)
            results.append((outputs_of(result), gradients_of(result, arguments, ones)))
        (ours, our_gradients), (theirs, their_gradients) = results
        for one, other in zip(ours, theirs, strict=True):
            _compare_close(bench, "output under autocast", one, other)
        for i, other_gradient in their_gradients.items():
            one_gradient = our_gradients[i]
            if one_gradient is not None and other_gradient is not None:
                name = f"gradient of {bench.case.label(i)} under autocast"
                _compare_close(bench, name, one_gradient, other_gradient)


# ----- the compiler


def compile(bench: Bench) -> None:  # noqa: A001 (the capability has PyTorch's name for it)
    """Compiled in one graph: values and gradients as in eager code."""
    _compare_compiled(bench, [bench.samples[0]], dynamic=False)


def compile_dynamic(bench: Bench) -> None:
    """Compiled with dynamic shapes: right for another number of rows too."""
    in_dims = _dims(bench.in_dims, bench.samples[0])
    fewer = tuple(
        t if d is None else t.narrow(d, 0, t.shape[d] - 1)
        for t, d in zip(bench.samples[0], in_dims, strict=True)
    )
    _compare_compiled(bench, [bench.samples[0], fewer], dynamic=True)


def export(bench: Bench) -> None:
    """Exported by torch.export: the same values."""
    sample = bench.samples[0]

    class Exported(nn.Module):
        def forward(self, *arguments: Any) -> Any:
            return bench.case.call(*arguments)

    with warnings.catch_warnings(action="ignore"):
        program = torch.export.export(Exported(), sample)
    bench.same_outputs(program.module()(*sample), bench.case.call(*sample), " of the export")


# ----- values at the edge


def at_zero(bench: Bench) -> None:
    """At 0, where slopes may jump, the reference's gradient."""
    for sample in bench.samples:
        for share in (0.5, 1.0):
            arguments = tuple(
                torch.where(torch.rand_like(t.real) < share, 0.0, t) if is_differentiable(t) else t
                for t in sample
            )
            _compare_with_reference(bench, arguments, " at zero")


def large_values(bench: Bench) -> None:
    """Far out, where functions saturate, the reference's gradient, relative to its own size."""
    for sample in bench.samples:
        for factor in (30.0, 1e4):
            for i in positions(sample):
                scaled = tuple(factor * t if j == i else t for j, t in enumerate(sample))
                _compare_with_reference(bench, scaled, f" at {factor:g} times the sample")


def infinite_values(bench: Bench) -> None:
    """For inf, -inf and nan the reference's value and gradient."""
    for sample in bench.samples:
        i = positions(sample)[0]
        for value in (torch.inf, -torch.inf, torch.nan):
            if not sample[i].numel() or sample[i].is_complex():
                continue
            planted = sample[i].clone()
            planted.view(-1)[0] = value
            arguments = tuple(planted if j == i else t for j, t in enumerate(sample))
            _compare_with_reference(bench, arguments, f" with {value} in {bench.case.label(i)}")


def device_parity(bench: Bench) -> None:
    """On an accelerator the same numbers as on the CPU."""
    if bench.case.device.type == "cpu":
        raise NotApplicable("the case runs on the CPU")
    for sample in bench.samples:
        upstream = bench.upstream(bench.case.call, sample)
        result, found = gradients(bench.case.call, leaves(sample), upstream)
        there = tuple(t.cpu() if isinstance(t, Tensor) else t for t in sample)
        expected_result, expected = gradients(
            bench.case.call, leaves(there), [u.cpu() for u in upstream]
        )
        moved: Gradients = {i: None if g is None else g.cpu() for i, g in found.items()}
        for one, other in zip(outputs_of(result), outputs_of(expected_result), strict=True):
            bench.same("output", one.detach().cpu(), other.detach())
        bench.same_gradients(there, moved, expected, " on the accelerator")


# ----- modules


def state_dict(bench: Bench) -> None:
    """A second module given the first one's state_dict computes the same."""
    module, inputs = _module(bench)
    torch.manual_seed(bench.case.seed + 1)
    other = _factory(bench)().to(bench.case.device).double()
    other.load_state_dict(module.state_dict())
    bench.same_outputs(other(*inputs), module(*inputs), " after load_state_dict")
    if bench.case.reference_factory is not None:
        theirs = bench.case.reference_factory()
        bench.comparisons += 1
        if set(theirs.state_dict()) != set(module.state_dict()):
            raise Mismatch(
                f"keys of state_dict: expected {sorted(theirs.state_dict())}, as the reference, "
                f"got {sorted(module.state_dict())}"
            )


def pickled(bench: Bench) -> None:
    """A pickled module computes the same."""
    module, inputs = _module(bench)
    copied = pickle.loads(pickle.dumps(module))
    bench.same_outputs(copied(*inputs), module(*inputs), " after pickling")


def deepcopied(bench: Bench) -> None:
    """A deepcopy computes the same, and gives its own parameters the gradients."""
    module, inputs = _module(bench)
    copied = copy.deepcopy(module)
    bench.same_outputs(copied(*inputs), module(*inputs), " after deepcopy")
    theirs = {name: p.shape for name, p in module.named_parameters()}
    ours = {name: p.shape for name, p in copied.named_parameters()}
    bench.comparisons += 1
    if ours != theirs:
        raise Mismatch(f"parameters of the deepcopy: expected {theirs}, got {ours}")
    before = [t.detach().clone() for t in outputs_of(module(*inputs))]
    with torch.no_grad():
        for parameter in copied.parameters():
            parameter.add_(1)
    for was, now, there in zip(
        before, outputs_of(module(*inputs)), outputs_of(copied(*inputs)), strict=True
    ):
        bench.same("output of the original after its copy was changed", now.detach(), was)
        if theirs and torch.equal(there, was):
            raise Mismatch(
                "output of the copy: expected it to follow the copy's parameters, got the "
                "original's output\ndiagnosis: the copy still computes with the original"
            )


def to_dtype(bench: Bench) -> None:
    """After .to(dtype) parameters and outputs have it, in float32 and in bfloat16."""
    for dtype in (torch.float32, torch.bfloat16):
        module, inputs = _module(bench)
        module.to(dtype)
        result = module(*_cast(inputs, dtype))
        for name, tensor in (*module.named_parameters(), *_numbered(outputs_of(result))):
            bench.comparisons += 1
            if tensor.dtype is not dtype:
                raise Mismatch(f"{name} after .to({dtype}): got {tensor.dtype}")


def factory_kwargs(bench: Bench) -> None:
    """The factory takes device and dtype, and its parameters heed them."""
    made: Any = _factory(bench)
    module = made(device="meta", dtype=torch.float16)
    for name, parameter in module.named_parameters():
        bench.comparisons += 1
        if parameter.dtype is not torch.float16 or parameter.device.type != "meta":
            raise Mismatch(
                f"{name}, made with device='meta', dtype=torch.float16: got {parameter.dtype} "
                f"on {parameter.device}"
            )


def frozen_parameters(bench: Bench) -> None:
    """A frozen parameter stays frozen and gets no gradient; the others get theirs."""
    module, inputs = _module(bench)
    if not any(True for _ in module.parameters()):
        raise NotApplicable("the module has no parameters")
    upstream = bench.upstream(module, inputs)
    torch.autograd.backward(outputs_of(module(*inputs)), upstream)
    expected = {name: p.grad for name, p in module.named_parameters()}
    for frozen in expected:
        for name, parameter in module.named_parameters():
            parameter.grad = None
            parameter.requires_grad_(name != frozen)
        result = outputs_of(module(*leaves(inputs)))
        torch.autograd.backward(result, upstream)
        for name, parameter in module.named_parameters():
            if name != frozen:
                bench.same(
                    f"gradient of {name} with {frozen} frozen", parameter.grad, expected[name]
                )
                continue
            bench.comparisons += 1
            if parameter.requires_grad or parameter.grad is not None:
                raise Mismatch(f"{name}: expected it to stay frozen, without a gradient")


def train_eval(bench: Bench) -> None:
    """In training and in evaluation mode as the reference."""
    if bench.case.reference_factory is None:
        raise NotApplicable("no reference was given")
    module, inputs = _module(bench)
    trusted = bench.case.reference_factory().to(bench.case.device).double()
    trusted.load_state_dict(module.state_dict(), strict=False)
    for mode in (True, False):
        module.train(mode)
        trusted.train(mode)
        torch.manual_seed(bench.case.seed)
        ours = module(*inputs)
        torch.manual_seed(bench.case.seed)
        bench.same_outputs(ours, trusted(*inputs), f" in mode train({mode})")


# ----- what the checks share

_LAYOUTS: dict[str, Callable[[Tensor], Tensor]] = {
    "transposed": lambda t: t.mT.contiguous().mT if t.ndim > 1 else t,
    "strided": lambda t: torch.stack([t, t + 1], -1)[..., 0],
    "shifted": lambda t: torch.cat([t[:1], t])[1:] if t.ndim else t,
    "expanded": lambda t: t[:1].expand(t.shape) if t.ndim and t.shape[0] else t,
    "constant (stride 0)": lambda t: t.flatten()[0].expand(t.shape) if t.numel() else t,
}


class _Cut(Function):
    """Passes its input on, and no gradient back."""

    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:  # noqa: ARG004
        return x.clone()

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> None:  # noqa: ARG004
        return None


def _turned(value: Any) -> Any:
    return value.mT.contiguous().mT if isinstance(value, Tensor) and value.ndim > 1 else value


def _directions(bench: Bench, value: Tensor) -> list[Tensor]:
    directions = [bench.random_like(value) for _ in range(3)]
    if value.numel() <= 24:
        for i in range(value.numel()):
            axis = torch.zeros_like(value)
            axis.view(-1)[i] = 1
            directions.append(axis)
    return directions


def _compare_slope(
    bench: Bench,
    sample: Sample,
    i: int,
    direction: Tensor,
    upstream: Sequence[Tensor],
    gradient: Tensor,
) -> None:
    """Compare <gradient, direction> with the difference quotient, unless the slope jumps there."""
    step = 1e-6

    def value(shift: float) -> Tensor:
        arguments = tuple(t + shift * direction if j == i else t for j, t in enumerate(sample))
        with torch.no_grad():
            results = outputs_of(bench.case.call(*arguments))
        weighted = [(u.conj() * t).real.sum() for u, t in zip(upstream, results, strict=True)]
        return torch.stack(weighted).sum()

    here, ahead, behind = value(0.0), value(step), value(-step)
    right, left = (ahead - here) / step, (here - behind) / step
    numeric = (ahead - behind) / (2 * step)
    slope = (gradient.conj() * direction).real
    size = slope.abs().sum() + numeric.abs()
    rounding = 1e-9 * here.abs() + 1e-9
    if (right - left).abs() > 1e-3 * size + 1e3 * rounding:
        return  # a kink between both sides: at_zero asks the reference about those
    bench.comparisons += 1
    if (slope.sum() - numeric).abs() > 1e-6 * size + rounding:
        ratio = (slope.sum() / numeric).item()
        raise Mismatch(
            f"slope along a direction of {bench.case.label(i)}: expected {numeric.item():.10g} by "
            f"finite differences, got {slope.sum().item():.10g}, ratio {ratio:.6g}"
        )


def _clues(
    reference: Call, sample: Sample, upstream: Sequence[Tensor], expected: Gradients
) -> dict[str, Gradients]:
    """What known mistakes would give."""
    first = [u if not u.ndim else torch.cat([u[:1], torch.zeros_like(u[1:])]) for u in upstream]
    scale = upstream[0].flatten()[0] if upstream[0].numel() else 1.0
    clues: dict[str, Gradients] = {
        "everything is scaled by the first element of the upstream gradient": {
            i: None if g is None else g * scale for i, g in expected.items()
        }
    }
    if upstream[0].ndim and upstream[0].shape[0] > 1:
        _, only_first = gradients(reference, leaves(sample), first)
        clues["only the first row of the batch counts: missing a sum over the batch"] = only_first
    return clues


def _compare_with_reference(bench: Bench, arguments: Sample, where: str) -> None:
    upstream = bench.upstream(bench.reference, arguments)
    result, found = gradients(bench.case.call, leaves(arguments), upstream)
    right, expected = gradients(bench.reference, leaves(arguments), upstream)
    bench.same_outputs(result, right, where)
    bench.same_gradients(arguments, found, expected, where)


def _dims(in_dims: tuple[int | None, ...], sample: Sample) -> tuple[int | None, ...]:
    if len(in_dims) != len(sample):
        raise NotApplicable(f"in_dims has {len(in_dims)} entries, the sample {len(sample)}")
    return in_dims


def _compare_variant(bench: Bench, change: Callable[[Tensor, int], Tensor], where: str) -> None:
    for sample in bench.samples:
        in_dims = _dims(bench.in_dims, sample)
        changed = tuple(
            t if d is None else change(t, d) for t, d in zip(sample, in_dims, strict=True)
        )
        try:
            bench.reference(*changed)
        except Exception as error:
            raise NotApplicable(f"the reference itself refuses it: {_line(error)}") from None
        _compare_with_reference(bench, changed, where)


def _compare_raw(bench: Bench, arguments: Sample, result: Any) -> None:
    """Call every hand-written backward once more, by itself, with what came to it from above."""
    nodes = custom_nodes(result)
    above: dict[Any, Any] = {}
    for node in nodes:
        node.register_prehook(partial(above.__setitem__, node))
    upstream = [bench.random_like(t) for t in outputs_of(result)]
    gradients_of(result, arguments, upstream, retain_graph=True)
    for node in nodes:
        with torch.no_grad():
            returned = node.apply(*above[node])
        returned = returned if isinstance(returned, tuple) else (returned,)
        edges = iter([edge for edge in node.next_functions if edge[0] is not None])
        for i, (gradient, needed) in enumerate(zip(returned, node.needs_input_grad, strict=True)):
            if not needed:
                continue
            next_node, slot = next(edges)
            if gradient is not None:
                bench.comparisons += 1
                _compare_kind(node, i, gradient, next_node._input_metadata[slot])


def _compare_kind(node: Any, i: int, gradient: Tensor, wanted: Any) -> None:
    for what, got, expected in (
        ("shape", tuple(gradient.shape), tuple(wanted.shape)),
        ("dtype", gradient.dtype, wanted.dtype),
        ("device", gradient.device, wanted.device),
    ):
        if got != expected:
            story = "dtype demoted" if what == "dtype" else "missing a sum over the batch"
            raise Mismatch(
                f"{what} of gradient {i} as {_node_name(node)} returned it: expected {expected}, "
                f"got {got}\ndiagnosis: {story}; the engine hides it by a cast"
            )


def _compare_unchanged(
    bench: Bench, before: dict[str, Tensor], now: dict[str, Tensor], when: str
) -> None:
    for name, was in before.items():
        bench.comparisons += 1
        if not torch.equal(now[name].detach().nan_to_num(), was.nan_to_num()):
            raise Mismatch(f"{name}: expected it untouched, got it changed in place by {when}")


def _holds_tensor(value: Any) -> bool:
    if isinstance(value, dict):
        return any(map(_holds_tensor, value.values()))
    if isinstance(value, tuple | list | set):
        return any(map(_holds_tensor, value))
    return isinstance(value, Tensor)


def _node_name(node: Any) -> str:
    return type(node).__name__.removesuffix("Backward")


def _products(call: Call, arguments: Sample, upstream: Sequence[Tensor]) -> int:
    result = call(*arguments)
    products = Products()
    with products:
        gradients_of(result, arguments, upstream)
    return products.count


def _saved_bytes(call: Call, arguments: Sample, upstream: Sequence[Tensor]) -> int:
    del upstream
    saved: dict[int, int] = {}

    def pack(tensor: Tensor) -> Tensor:
        saved[tensor.data_ptr()] = tensor.numel() * tensor.element_size()
        return tensor

    with saved_tensors_hooks(pack, lambda tensor: tensor):
        result = call(*arguments)
    del result
    return sum(saved.values())


def _pairs(bench: Bench) -> list[tuple[Sample, int, int]]:
    pairs = []
    for sample in bench.samples:
        places = positions(sample)
        pairs += [
            (sample, i, j)
            for n, i in enumerate(places)
            for j in places[n + 1 :]
            if sample[i].shape == sample[j].shape and sample[i].dtype == sample[j].dtype
        ]
    if not pairs:
        raise NotApplicable("no sample has two arguments of the same shape")
    return pairs


def _compare_order(bench: Bench, order: int) -> None:
    for sample in bench.samples:
        upstream = bench.upstream(bench.reference, sample)
        weights = [
            [bench.random_like(t) for t in (*outputs_of(sample), *upstream)]
            for _ in range(order - 1)
        ]
        found = _higher(bench.case.call, sample, upstream, weights)
        expected = _higher(bench.reference, sample, upstream, weights)
        names = [bench.case.label(i) for i in positions(sample)] + ["the upstream gradient"]
        for i, (one, other) in enumerate(zip(found, expected, strict=True)):
            name = names[min(i, len(names) - 1)]
            try:
                bench.same(f"derivative of order {order} by {name}", one, other)
            except Mismatch as mismatch:
                if "diagnosis" in str(mismatch):
                    raise
                raise Mismatch(
                    f"{mismatch}\ndiagnosis: a term of order {order} is missing"
                ) from None


def _higher(
    call: Call, sample: Sample, upstream: Sequence[Tensor], weights: Sequence[Sequence[Tensor]]
) -> list[Tensor | None]:
    """Differentiate again and again: by arguments and upstream gradient, weighted at random."""
    arguments = leaves(sample)
    above = [u.detach().clone().requires_grad_() for u in upstream]
    by_arguments = [arguments[i] for i in positions(sample)]
    by = [*by_arguments, *above]
    values = [t for t in outputs_of(call(*arguments)) if t.requires_grad]
    given: list[Tensor] = above[: len(values)]
    for order, weight in enumerate(weights):
        wanted = by if order else by_arguments
        found = torch.autograd.grad(values, wanted, given, create_graph=True, allow_unused=True)
        if any(g is not None and "Error" in str(g.grad_fn) for g in found):
            raise RuntimeError("a derivative is marked as not differentiable again")
        values, given = [], []
        for value, random in zip(found, weight, strict=False):
            if value is not None and value.requires_grad:
                values.append(value)
                given.append(random)
        if not values:
            raise RuntimeError("a derivative does not require a gradient: it has no graph")
    return list(torch.autograd.grad(values, by, given, allow_unused=True))


def _tangents(call: Call, sample: Sample, tangents: dict[int, Tensor]) -> list[Tensor | None]:
    with forward_ad_module.dual_level():
        arguments = tuple(
            forward_ad_module.make_dual(t, tangents[i]) if i in tangents else t
            for i, t in enumerate(sample)
        )
        return [forward_ad_module.unpack_dual(t).tangent for t in outputs_of(call(*arguments))]


def _tangents_of_gradients(
    call: Call, sample: Sample, tangents: dict[int, Tensor], upstream: Sequence[Tensor]
) -> Gradients:
    with forward_ad_module.dual_level():
        arguments = tuple(
            forward_ad_module.make_dual(t, tangents[i]) if i in tangents else t
            for i, t in enumerate(leaves(sample))
        )
        _, found = gradients(call, arguments, upstream, create_graph=True)
        unpacked: Gradients = {}
        for i, gradient in found.items():
            tangent = None if gradient is None else forward_ad_module.unpack_dual(gradient).tangent
            unpacked[i] = None if tangent is None else tangent.detach()
        return unpacked


def _rows(sample: Sample, in_dims: tuple[int | None, ...]) -> list[Sample]:
    count = next(t.shape[d] for t, d in zip(sample, in_dims, strict=True) if d is not None)
    return [
        tuple(t if d is None else t.select(d, row) for t, d in zip(sample, in_dims, strict=True))
        for row in range(count)
    ]


def _cast(sample: Sample, dtype: torch.dtype) -> Sample:
    return tuple(
        t.detach().to(dtype) if is_differentiable(t) and not t.is_complex() else t for t in sample
    )


def _compare_precision(bench: Bench, dtype: torch.dtype) -> None:
    for sample in bench.samples:
        if any(isinstance(t, Tensor) and t.is_complex() for t in sample):
            raise NotApplicable("the samples are complex")
        low = _cast(sample, dtype)
        upstream = [u.to(dtype) for u in bench.upstream(bench.reference, low)]
        wide, wide_upstream = _cast(low, torch.float64), [u.double() for u in upstream]
        ours, our_gradients = gradients(bench.case.call, leaves(low), upstream)
        theirs, their_gradients = gradients(bench.reference, leaves(low), upstream)
        right, right_gradients = gradients(bench.reference, leaves(wide), wide_upstream)
        triples = [
            ("output", *found)
            for found in zip(*map(outputs_of, (ours, theirs, right)), strict=True)
        ]
        for i in positions(sample):
            one, other, exact = our_gradients[i], their_gradients[i], right_gradients[i]
            if one is not None and other is not None and exact is not None:
                triples.append((f"gradient of {bench.case.label(i)}", one, other, exact))
        for name, got, peer, exact in triples:
            _compare_error(bench, f"{name} in {dtype}", got, peer, exact, dtype)


def _compare_error(
    bench: Bench, what: str, got: Tensor, peer: Tensor, exact: Tensor, dtype: torch.dtype
) -> None:
    bench.comparisons += 1
    if got.dtype is not dtype:
        raise Mismatch(f"{what}: expected dtype {dtype}, got {got.dtype}\ndiagnosis: wrong dtype")
    got, peer, exact = got.detach().double(), peer.detach().double(), exact.detach()
    error, allowed = (got - exact).norm(), 2 * (peer - exact).norm()
    allowed = allowed + torch.finfo(dtype).eps * exact.norm()
    if not error <= allowed and bool(peer.isfinite().all()):
        raise Mismatch(
            f"{what}: expected an error against float64 of at most {allowed.item():.3g}, twice the "
            f"reference's and one rounding, got {error.item():.3g}"
        )


def _compare_close(bench: Bench, what: str, got: Tensor, expected: Tensor) -> None:
    bench.comparisons += 1
    if got.dtype is not expected.dtype:
        raise Mismatch(
            f"{what}: expected {expected.dtype}, as the reference, got {got.dtype}\n"
            f"diagnosis: wrong dtype"
        )
    got, expected = got.detach().double(), expected.detach().double()
    if (got - expected).norm() > 2e-2 * expected.norm() + 1e-6:
        raise Mismatch(f"{what}: further from the reference than bfloat16 explains")


def _compare_compiled(bench: Bench, samples: Sequence[Sample], *, dynamic: bool) -> None:
    torch._dynamo.reset()
    with warnings.catch_warnings(action="ignore"):
        compiled = torch.compile(
            bench.case.call, fullgraph=True, dynamic=dynamic, backend="aot_eager"
        )
        for sample in samples:
            upstream = bench.upstream(bench.case.call, sample)
            result, found = gradients(compiled, leaves(sample), upstream)
            expected_result, expected = gradients(bench.case.call, leaves(sample), upstream)
            bench.same_outputs(result, expected_result, " when compiled")
            bench.same_gradients(sample, found, expected, " when compiled")


def _factory(bench: Bench) -> Callable[[], nn.Module]:
    if bench.case.factory is None:
        raise NotApplicable("the case is a function")
    return bench.case.factory


def _module(bench: Bench) -> tuple[nn.Module, Sample]:
    torch.manual_seed(bench.case.seed)
    module = _factory(bench)().to(bench.case.device).double()
    count = len(bench.samples[0]) - sum(1 for _ in module.named_parameters())
    return module, bench.samples[0][:count]


def _numbered(results: Sequence[Tensor]) -> list[tuple[str, Tensor]]:
    return [(f"output {i}", t) for i, t in enumerate(results)]


def _line(error: BaseException) -> str:
    text = str(error).strip().splitlines()
    line = f"{type(error).__name__}: {text[0] if text else ''}"
    return line if len(line) <= 100 else f"{line[:97]}..."


@dataclass(frozen=True)
class Check:
    """A check by its name.

    A capability must work only where it was declared; elsewhere a refusal is no failure, a wrong
    answer is. Thrift is no matter of right and wrong: where it was not declared, it is reported.
    """

    name: str
    run: Callable[[Bench], None]
    is_capability: bool = False
    is_thrift: bool = False
    is_slow: bool = False
    is_for_modules: bool = False


CHECKS: tuple[Check, ...] = (
    Check("forward_matches_reference", forward_matches_reference),
    Check("finite_differences", finite_differences),
    Check("gradients_match_reference", gradients_match_reference),
    Check("requires_grad_subsets", requires_grad_subsets),
    Check("frugal", frugal, is_capability=True, is_thrift=True),
    Check("upstream_layouts", upstream_layouts),
    Check("upstream_undefined", upstream_undefined),
    Check("linear_in_upstream", linear_in_upstream),
    Check("no_rows", no_rows, is_capability=True),
    Check("one_row", one_row, is_capability=True),
    Check("one_dimensional", one_dimensional, is_capability=True),
    Check("three_dimensional", three_dimensional, is_capability=True),
    Check("raw_backward", raw_backward),
    Check("writes_nothing", writes_nothing),
    Check("saves_nothing_on_ctx", saves_nothing_on_ctx),
    Check("stale_inputs_raise", stale_inputs_raise),
    Check("no_leak", no_leak),
    Check("repeatable_backward", repeatable_backward),
    Check("deterministic", deterministic),
    Check("tied_inputs", tied_inputs),
    Check("double_backward", double_backward, is_capability=True),
    Check("third_order", third_order, is_capability=True),
    Check("forward_ad", forward_ad, is_capability=True),
    Check("forward_over_reverse", forward_over_reverse, is_capability=True),
    Check("vmap", vmap, is_capability=True),
    Check("per_sample_gradients", per_sample_gradients, is_capability=True),
    Check("float32", float32, is_capability=True),
    Check("bfloat16", bfloat16, is_capability=True),
    Check("float16", float16, is_capability=True),
    Check("autocast", autocast, is_capability=True),
    Check("compile", compile, is_capability=True, is_slow=True),
    Check("compile_dynamic", compile_dynamic, is_capability=True, is_slow=True),
    Check("export", export, is_capability=True, is_slow=True),
    Check("at_zero", at_zero),
    Check("large_values", large_values),
    Check("infinite_values", infinite_values),
    Check("device_parity", device_parity),
    Check("state_dict", state_dict, is_for_modules=True),
    Check("pickle", pickled, is_for_modules=True),
    Check("deepcopy", deepcopied, is_for_modules=True),
    Check("to_dtype", to_dtype, is_for_modules=True),
    Check("factory_kwargs", factory_kwargs, is_capability=True, is_for_modules=True),
    Check("frozen_parameters", frozen_parameters, is_for_modules=True),
    Check("train_eval", train_eval, is_for_modules=True),
)
