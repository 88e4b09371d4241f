"""Each test runs in two processes: our layers train like PyTorch's, wrapped in the same way.

Each process draws different samples, so results are right only if gradients are exchanged.
"""

import multiprocessing
from collections.abc import Callable, Iterator
from functools import partial
from itertools import count, pairwise
from multiprocessing.pool import IMapIterator, Pool
from typing import Any, NamedTuple
from warnings import catch_warnings, simplefilter

import pytest
import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel
from torch.testing import assert_close

from manual_bp import QuadraticCost, TrainingStep, backprop, convert, record, restore
from tests.activations import TABLE
from tests.helpers import ATOL, RTOL, nodes

if dist.is_available():  # some builds of PyTorch have none of these
    from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
    from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard
    from torch.distributed.tensor import (
        DTensor,
        Placement,
        Replicate,
        Shard,
        distribute_module,
        distribute_tensor,
    )
    from torch.distributed.tensor.parallel import (
        ColwiseParallel,
        RowwiseParallel,
        parallelize_module,
    )

pytestmark = pytest.mark.skipif(
    not (dist.is_available() and dist.is_gloo_available()),
    reason="this PyTorch was built without torch.distributed or without gloo",
)

RANKS = 2
STEPS = 4
IN, HIDDEN, OUT = 6, 8, 4

# Seconds for a test, and for the other rank to end once one has failed.
TIMEOUT, GRACE = 120, 5

Assert = Callable[[Any, Any], None]
Wrap = Callable[[nn.Module], Any]
Backward = Callable[[Any, int], Tensor]
Ranks = Callable[..., None]

assert_equal: Assert = partial(assert_close, rtol=0, atol=0)
assert_equal_but_for_rounding: Assert = partial(assert_close, rtol=RTOL, atol=ATOL)


def assert_equal_in_bfloat16(ours: Any, theirs: Any) -> None:
    """Compares each tensor on its own scale: gradients of the first layers are small."""
    if isinstance(theirs, Tensor):
        assert_close(ours, theirs, rtol=0, atol=float(2**-3 * theirs.abs().max()))
        return
    keys = theirs.keys() if isinstance(theirs, dict) else range(len(theirs))
    for key in keys:
        assert_equal_in_bfloat16(ours[key], theirs[key])


def run_as_rank(work: tuple[int, str, Callable[..., None], tuple[object, ...]]) -> None:
    rank, url, scenario, arguments = work
    dist.init_process_group("gloo", init_method=url, rank=rank, world_size=RANKS)
    try:
        with catch_warnings():
            simplefilter("error")  # as pytest does, whose settings a worker does not get
            scenario(*arguments)
    except Exception as error:
        error.add_note(f"This was on rank {rank}.")
        raise
    finally:
        dist.destroy_process_group()


def start_workers() -> Pool:
    return multiprocessing.get_context("spawn").Pool(RANKS, torch.set_num_threads, (1,))


def failures(answers: "IMapIterator[None]") -> list[Exception]:
    """In order of arrival. A TimeoutError stands for a result that did not arrive."""
    errors: list[Exception] = []
    for _ in range(RANKS):
        try:
            answers.next(GRACE if errors else TIMEOUT)
        except Exception as error:
            errors.append(error)
    return errors


@pytest.fixture(scope="module")
def ranks(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Ranks]:
    """Runs a scenario on all ranks. The first failure there is raised here, with its traceback.

    The processes serve all tests, because they take seconds to start. No process can get
    two ranks: it is busy with one until the other has joined.
    """
    folder = tmp_path_factory.mktemp("rendezvous")
    numbers = count()
    workers = start_workers()

    def run(scenario: Callable[..., None], *arguments: object) -> None:
        nonlocal workers
        url = (folder / str(next(numbers))).as_uri()
        work = [(rank, url, scenario, arguments) for rank in range(RANKS)]
        errors = failures(workers.imap_unordered(run_as_rank, work))
        if any(isinstance(error, multiprocessing.TimeoutError) for error in errors):
            workers.terminate()  # one may still wait for the other, which has failed
            workers = start_workers()
        if errors:
            raise errors[0]

    yield run
    workers.terminate()


class Net(NamedTuple):
    """A multilayer perceptron, and the nodes that our layers leave in its graph.

    exact: Whether our backwards compute exactly what PyTorch's do, in the same order.
    """

    activations: tuple[Callable[[], nn.Module], ...]
    nodes: tuple[str, ...]
    exact: bool = False
    fuse: bool = False
    frozen: tuple[str, ...] = ()

    def build(self) -> nn.Sequential:
        """PyTorch's network, with the same numbers each time, on every rank."""
        torch.manual_seed(1)
        widths = [IN, *[HIDDEN] * len(self.activations), OUT]
        first, *others = [nn.Linear(*sizes) for sizes in pairwise(widths)]
        pairs = zip(self.activations, others, strict=True)
        rest = [module for make, linear in pairs for module in (make(), linear)]
        net = nn.Sequential(first, *rest).double()
        for name in self.frozen:
            net.get_parameter(name).requires_grad_(False)
        return net

    def convert(self, model: nn.Module) -> None:
        convert(model, fuse=self.fuse)

    @property
    def assert_same(self) -> Assert:
        return assert_equal if self.exact else assert_equal_but_for_rounding


relu_in_place = partial(nn.ReLU, inplace=True)

NETS = {
    "relu": Net((relu_in_place, relu_in_place), ("Linear", "ReLU"), exact=True),
    "frozen": Net(
        (relu_in_place, relu_in_place),
        ("Linear", "ReLU"),
        exact=True,
        frozen=("0.weight", "2.bias", "4.weight"),
    ),
    "every activation": Net(
        (*(activation.reference_module for activation in TABLE), relu_in_place),
        ("Linear", *(activation.module.__name__ for activation in TABLE)),
    ),
    "not in place": Net((nn.ReLU, nn.Sigmoid), ("Linear", "ReLU", "Sigmoid")),
    "fused": Net((nn.Sigmoid, nn.Sigmoid), ("Linear", "LinearSigmoid"), fuse=True),
    "one relu": Net((nn.ReLU,), ("Linear", "ReLU"), exact=True),
    "one sigmoid": Net((nn.Sigmoid,), ("Linear", "Sigmoid")),
}

each_net = pytest.mark.parametrize("net", ["relu", "frozen", "every activation", "fused"])


class Trained(NamedTuple):
    """The state of this rank after training, with sharded tensors gathered."""

    gradients: list[dict[str, Tensor]]
    parameters: dict[str, Tensor]
    nodes: set[str]


def samples(step: int, *leading: int, rank: int | None = None) -> Tensor:
    seed = 1000 * (dist.get_rank() if rank is None else rank) + step
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(*leading, IN, generator=generator, dtype=torch.float64)


def cost(a: Tensor, x: Tensor) -> Tensor:
    """The distance of the net's output from the first of its inputs."""
    return (a - x[..., :OUT]).square().mean()


def backward(model: Any, step: int) -> Tensor:
    x = samples(step, 5)
    loss = cost(model(x), x)
    loss.backward()
    return loss


def whole(tensor: Tensor) -> Tensor:
    tensor = tensor.detach()
    return (tensor.full_tensor() if isinstance(tensor, DTensor) else tensor).clone()


def train(model: Any, run_backward: Backward = backward) -> Trained:
    optimizer = torch.optim.SGD(model.parameters(), lr=0.5)
    gradients = []
    names: set[str] = set()
    for step in range(STEPS):
        optimizer.zero_grad()
        names |= set(nodes(run_backward(model, step)))
        named = model.named_parameters()
        gradients.append({name: whole(p.grad) for name, p in named if p.grad is not None})
        optimizer.step()
    return Trained(gradients, {name: whole(p) for name, p in model.named_parameters()}, names)


def assert_same_training(
    ours: Trained, theirs: Trained, net: Net, assert_same: Assert | None = None
) -> None:
    assert_same = assert_same or net.assert_same
    assert_same(ours.gradients, theirs.gradients)
    assert_same(ours.parameters, theirs.parameters)
    of_ours = {f"{name}FunctionBackward" for name in net.nodes}
    assert of_ours <= ours.nodes, f"{of_ours} should all be in {ours.nodes}"
    assert not of_ours & theirs.nodes, f"{of_ours} should none be in {theirs.nodes}"
    learn = {name for step in theirs.gradients for name, grad in step.items() if grad.any()}
    assert len(learn) == len(theirs.parameters) - len(net.frozen), f"none but {learn} learn"


def compare(
    net: Net,
    wrap: Wrap,
    run_backward: Backward = backward,
    build: Callable[[Net], nn.Module] = Net.build,
    assert_same: Assert | None = None,
) -> tuple[Trained, Trained]:
    """Train PyTorch's and ours, wrapped in the same way: the results must be the same."""
    theirs, ours = build(net), build(net)
    net.convert(ours)
    expected = train(wrap(theirs), run_backward)
    found = train(wrap(ours), run_backward)
    assert_same_training(found, expected, net, assert_same)
    return found, expected


def assert_ranks_agree(parameters: dict[str, Tensor]) -> None:
    first = {name: parameter.clone() for name, parameter in parameters.items()}
    for parameter in first.values():
        dist.broadcast(parameter, src=0)
    assert_equal(parameters, first)


# DistributedDataParallel


def ddp(name: str, **options: Any) -> None:
    ours, _ = compare(NETS[name], partial(DistributedDataParallel, **options))
    assert_ranks_agree(ours.parameters)


@each_net
def test_ddp(ranks: Ranks, net: str) -> None:
    ranks(ddp, net)


def ddp_static_graph(name: str) -> None:
    ddp(name, static_graph=True, gradient_as_bucket_view=True)


@each_net
def test_ddp_static_graph(ranks: Ranks, net: str) -> None:
    ranks(ddp_static_graph, net)


def accumulate(model: Any, step: int) -> Tensor:
    with model.no_sync():
        for batch in range(2):
            backward(model, 10 * step + batch)
    return backward(model, 10 * step + 2)


def ddp_no_sync(name: str) -> None:
    ours, _ = compare(NETS[name], DistributedDataParallel, accumulate)
    assert_ranks_agree(ours.parameters)


@each_net
def test_ddp_no_sync(ranks: Ranks, net: str) -> None:
    ranks(ddp_no_sync, net)


# For each step, the ranks whose loss includes the branch.
BRANCH_COUNTS_ON = [set[int](), {0}, {1}, {0, 1}]


class Branching(nn.Module):
    """A trunk and a branch, which runs always, or only where the loss includes it."""

    def __init__(self, net: Net, *, runs_always: bool) -> None:
        super().__init__()
        self.trunk = net.build()
        self.branch = net.build()
        self.runs_always = runs_always

    def forward(self, x: Tensor, counts: bool) -> list[Tensor]:
        run = [self.trunk, self.branch] if counts or self.runs_always else [self.trunk]
        return [net(x) for net in run]


def backward_from_branches(model: Any, step: int) -> Tensor:
    counts = dist.get_rank() in BRANCH_COUNTS_ON[step]
    x = samples(step, 5)
    trunk, *branch = model(x, counts)
    loss = cost(trunk, x)
    if counts:
        loss = loss + cost(branch[0], x)
    loss.backward()
    return loss


def ddp_unused_parameters(name: str, runs_always: bool) -> None:
    wrap = partial(DistributedDataParallel, find_unused_parameters=True)
    build = partial(Branching, runs_always=runs_always)
    ours, _ = compare(NETS[name], wrap, backward_from_branches, build)
    assert_ranks_agree(ours.parameters)
    has_gradient = [any("branch" in parameter for parameter in step) for step in ours.gradients]
    assert has_gradient == [False, True, True, True], has_gradient


@pytest.mark.parametrize("net", ["relu", "every activation", "fused"])
def test_ddp_unused_parameters(ranks: Ranks, net: str) -> None:
    ranks(ddp_unused_parameters, net, False)


@pytest.mark.parametrize("net", ["relu", "every activation", "fused"])
def test_ddp_with_an_output_that_is_not_in_the_loss(ranks: Ranks, net: str) -> None:
    """DDP sends an undefined gradient through the branch to its parameters."""
    ranks(ddp_unused_parameters, net, True)


def classes(model: nn.Module) -> list[type[nn.Module]]:
    return [type(module) for module in model.modules()]


def ddp_restored(name: str) -> None:
    net = NETS[name]
    theirs, ours = net.build(), net.build()
    net.convert(ours)
    wrapped_theirs, wrapped_ours = DistributedDataParallel(theirs), DistributedDataParallel(ours)
    assert_same_training(train(wrapped_ours), train(wrapped_theirs), net)
    assert classes(ours) != classes(theirs)
    restore(wrapped_ours)
    assert classes(wrapped_ours) == classes(wrapped_theirs)
    again, expected = train(wrapped_ours), train(wrapped_theirs)
    net.assert_same(again.parameters, expected.parameters)
    assert again.nodes == expected.nodes


@each_net
def test_a_ddp_model_can_be_restored(ranks: Ranks, net: str) -> None:
    ranks(ddp_restored, net)


def converted_while_training(name: str, wrap: Wrap) -> None:
    net = NETS[name]
    theirs, ours = wrap(net.build()), wrap(net.build())
    before = classes(ours)
    assert_same_training(train(ours), train(theirs), net._replace(nodes=()), assert_equal)
    net.convert(ours)
    assert_same_training(train(ours), train(theirs), net)
    restore(ours)
    assert classes(ours) == before


def ddp_converted_while_training(name: str) -> None:
    converted_while_training(name, DistributedDataParallel)


@each_net
def test_ddp_converted_while_training(ranks: Ranks, net: str) -> None:
    ranks(ddp_converted_while_training, net)


# FSDP2


def mesh() -> "DeviceMesh":
    return init_device_mesh("cpu", (RANKS,))


def shard(model: nn.Module, **options: Any) -> nn.Module:
    """Layer by layer, and the whole."""
    for module in model.children():
        if list(module.parameters()):
            fully_shard(module, mesh=mesh(), **options)
    fully_shard(model, mesh=mesh(), **options)
    return model


def sharded(name: str, **options: Any) -> None:
    compare(NETS[name], partial(shard, **options))


@each_net
def test_fully_shard(ranks: Ranks, net: str) -> None:
    ranks(sharded, net)


def sharded_in_bfloat16(name: str) -> None:
    policy = MixedPrecisionPolicy(param_dtype=torch.bfloat16, reduce_dtype=torch.float32)
    assert_same = assert_equal if NETS[name].exact else assert_equal_in_bfloat16
    compare(NETS[name], partial(shard, mp_policy=policy), assert_same=assert_same)


@each_net
def test_fully_shard_mixed_precision(ranks: Ranks, net: str) -> None:
    ranks(sharded_in_bfloat16, net)


def sharded_converted_while_training(name: str) -> None:
    converted_while_training(name, shard)


@pytest.mark.parametrize("net", ["relu", "frozen", "every activation"])
def test_fully_shard_converted_while_training(ranks: Ranks, net: str) -> None:
    ranks(sharded_converted_while_training, net)


def sharded_and_refused(whole: bool) -> None:
    net = nn.Sequential(nn.Linear(IN, HIDDEN), nn.Sigmoid(), nn.Linear(HIDDEN, OUT))
    x, y = torch.rand(3, IN), torch.rand(3, OUT)
    fully_shard(net if whole else net[2], mesh=mesh())
    place = "all of it" if whole else "module '2'"
    with pytest.raises(TypeError, match=f"model must not be sharded .* got one with {place} shard"):
        record(net)
    cost, reason = QuadraticCost(), "must have no hooks, which would not run; got a FSDP"
    with pytest.raises(TypeError, match=reason):
        backprop(net, x, y, cost)
    with pytest.raises(TypeError, match=reason):
        TrainingStep(net, cost, 0.1)


@pytest.mark.parametrize("whole", [True, False])
def test_what_reads_whole_weights_refuses_sharded_ones(ranks: Ranks, whole: bool) -> None:
    ranks(sharded_and_refused, whole)


# Tensor parallel


def placement_of(split: str) -> "Placement":
    return {"replicated": Replicate(), "batch": Shard(0), "sequence": Shard(1)}[split]


def parallelize(model: nn.Module, split: str, local: bool = True) -> nn.Module:
    """Split samples as given, the first weight by rows, the second by columns.

    local: Whether the activation in between gets an ordinary tensor or a DTensor.
    """
    placement = placement_of(split)
    first = ColwiseParallel(input_layouts=placement, use_local_output=local)
    second = RowwiseParallel(output_layouts=placement)
    return parallelize_module(model, mesh(), {"0": first, "2": second})


def tensor_parallel(name: str, split: str, local: bool) -> None:
    rank = 0 if split == "replicated" else None

    def backward_from_sequences(model: Any, step: int) -> Tensor:
        x = samples(step, 4, 2, rank=rank)
        loss = cost(model(x), x)
        loss.backward()
        return loss

    wrap = partial(parallelize, split=split, local=local)
    compare(NETS[name], wrap, backward_from_sequences)


@pytest.mark.parametrize("local", [True, False], ids=["local", "distributed"])
@pytest.mark.parametrize("split", ["replicated", "batch", "sequence"])
@pytest.mark.parametrize("net", ["one relu", "one sigmoid"])
def test_tensor_parallel(ranks: Ranks, net: str, split: str, local: bool) -> None:
    ranks(tensor_parallel, net, split, local)


def tensor_parallel_converted_while_training(name: str) -> None:
    converted_while_training(name, partial(parallelize, split="batch"))


@pytest.mark.parametrize("net", ["one relu", "one sigmoid"])
def test_tensor_parallel_converted_while_training(ranks: Ranks, net: str) -> None:
    ranks(tensor_parallel_converted_while_training, net)


def tensor_parallel_of_what_is_fused() -> None:
    net = NETS["fused"]
    model = net.build()
    net.convert(model)
    parallelize(model, split="batch")


def test_tensor_parallel_refuses_what_is_fused(ranks: Ranks) -> None:
    """PyTorch requires an nn.Linear, which LinearSigmoid is not."""
    with pytest.raises(NotImplementedError, match=r"only support nn\.Linear"):
        ranks(tensor_parallel_of_what_is_fused)


def distribute(model: nn.Module, dims: dict[str, int]) -> nn.Module:
    """What `parallelize_module` does for an nn.Linear, by hand: split weights along a dimension."""

    def place(name: str, module: nn.Module, mesh: "DeviceMesh") -> None:
        if name in dims:
            splits = {"weight": Shard(dims[name]), "bias": Replicate() if dims[name] else Shard(0)}
            for key, split in splits.items():
                tensor = distribute_tensor(module.get_parameter(key).detach(), mesh, [split])
                module.register_parameter(key, nn.Parameter(tensor))

    def enter(_: nn.Module, inputs: Any, mesh: "DeviceMesh") -> Any:
        return DTensor.from_local(inputs[0], mesh, [Shard(0)])

    def leave(_: nn.Module, output: Any, mesh: "DeviceMesh") -> Any:
        return output.redistribute(mesh, [Shard(0)]).to_local()

    return distribute_module(model, mesh(), place, enter, leave)


def distributed_by_hand(name: str, dims: dict[str, int]) -> None:
    compare(NETS[name], partial(distribute, dims=dims))


@pytest.mark.parametrize("net", ["relu", "fused"])
def test_distributed_by_rows(ranks: Ranks, net: str) -> None:
    ranks(distributed_by_hand, net, {"0": 0, "2": 0, "4": 0})


@pytest.mark.parametrize("net", ["not in place", "fused"])
def test_distributed_by_columns(ranks: Ranks, net: str) -> None:
    """Here the output of a Linear is a partial sum, which the activation must add up."""
    ranks(distributed_by_hand, net, {"0": 0, "2": 1, "4": 0})
