"""The processes that train one network together, as `torchrun` starts them.

Every process runs the same program. What must be the same in all of them is agreed on here, and the
first process alone prints and writes.
"""

import contextlib
import gc
import io
import os
import sys
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any, TypeVar, cast

import torch
import torch.distributed as dist
from torch import Tensor

from experiments.command_line import stopped

T = TypeVar("T")


class Processes:
    """All processes of a run; a context manager that connects them, and keeps all but one silent.

    Without the variables of the environment that `torchrun` sets, there is one process, and nothing
    is communicated.

    Attributes:
        rank: The number of this process, from 0 on.
        size: How many there are.
        local_size: How many of them are on this machine.
    """

    def __init__(self) -> None:
        self.rank, self.size, self.local_size = (
            int(os.environ.get(name, default))
            for name, default in (("RANK", "0"), ("WORLD_SIZE", "1"), ("LOCAL_WORLD_SIZE", "1"))
        )
        self._context = contextlib.ExitStack()

    def __enter__(self) -> "Processes":
        if self.size > 1:
            _connect()
        if self.rank > 0:
            nowhere = self._context.enter_context(Path(os.devnull).open("w", encoding="utf-8"))
            self._context.enter_context(contextlib.redirect_stdout(nowhere))
            self._context.enter_context(contextlib.redirect_stderr(nowhere))
        return self

    def __exit__(self, _: object, error: object, __: object) -> None:
        if self.rank > 0 and isinstance(error, KeyboardInterrupt | ConnectionError):
            sys.exit(stopped(error) if isinstance(error, KeyboardInterrupt) else 1)  # silently
        self._context.close()
        # Not after an error: others may wait for this process, and the traceback refers to DDP. If
        # that is the last to hold the group, it keeps Python's lock while it waits for Gloo's
        # threads, which may need the lock. So it must go first; it is in a cycle.
        if self.size > 1 and error is None:
            gc.collect()
            dist.destroy_process_group()

    @property
    def are_several(self) -> bool:
        """Whether there is more than this process."""
        return self.size > 1

    def require_restartable(self, finds_run: bool) -> None:
        """Check that `torchrun` can start the program again, with the same options, if it would.

        Args:
            finds_run: Whether the program then goes on with the same run.

        Raises:
            ValueError: It cannot.
        """
        if int(os.environ.get("TORCHELASTIC_MAX_RESTARTS", "0")) == 0:
            return
        if not finds_run:
            raise ValueError("--name must be given with --max-restarts: a restart needs it")
        # The machines do not agree on which restart it is, so what `_connect` does is not enough.
        is_shared = os.environ.get("TORCHELASTIC_USE_AGENT_STORE") == "True"
        if self.size > self.local_size and is_shared:
            raise ValueError(
                "--max-restarts with several machines needs TORCH_DISABLE_SHARE_RDZV_TCP_STORE=1 "
                "in the environment of torchrun"
            )

    @property
    def launcher(self) -> list[str]:
        """The command that starts a module in as many processes."""
        if not self.are_several:
            return [Path(sys.executable).name, "-m"]
        nodes = self.size // self.local_size
        on_nodes = ["--nnodes", str(nodes)] if nodes > 1 else []
        return ["torchrun", *on_nodes, "--nproc-per-node", str(self.local_size), "-m"]

    def device(self, name: str) -> str:
        """The device of this process, from the option: each on a machine has a GPU of its own."""
        if not self.are_several or name == "cpu":
            return name
        if name == "auto" and not torch.cuda.is_available():
            return name
        return f"cuda:{os.environ.get('LOCAL_RANK', '0')}"

    def share(self, samples: Tensor) -> Tensor:
        """This process's part of the samples of a batch, in order; it may be empty."""
        return samples.tensor_split(self.size)[self.rank]

    def alike(self, work: Callable[[], T]) -> T:
        """Do the same work in every process; if one of them refuses, all end, after one line.

        Returns:
            What the work returns here.

        Raises:
            SystemExit: The work did, in any of the processes.
        """
        if not self.are_several:
            return work()
        said, code = io.StringIO(), None
        result = cast("T", None)
        try:
            with contextlib.redirect_stderr(said):
                result = work()
        except SystemExit as stop:
            code = stop.code
        outcomes = self.gather((code, said.getvalue()))
        ended = [outcome for outcome in outcomes if outcome[0] is not None]
        code, text = (ended or outcomes)[0]
        print(text, end="", file=sys.stderr)
        if ended:
            sys.exit(code)
        return result

    def in_turn(self, work: Callable[[], T]) -> T:
        """Do the same work in every process, in the first before the others: it may fetch files.

        Returns and raises the same as `alike`.
        """
        first = self.alike(lambda: work() if self.rank == 0 else None)
        return cast("T", self.alike(lambda: first if self.rank == 0 else work()))

    def from_first(self, work: Callable[[], T]) -> T:
        """What the work returns in the first process, which alone does it.

        Raises:
            SystemExit: The work did.
        """
        mine = self.alike(lambda: work() if self.rank == 0 else None)
        return cast("T", self.gather(mine)[0])

    def only_first(self, make: Callable[[], T], path: Path) -> T:
        """What the first process writes to; in the others something that does nothing.

        Args:
            make: Gives it; called only in the first process.
            path: Where it is.
        """
        return make() if self.rank == 0 else cast("T", Silent(path))

    def gather(self, value: T) -> list[T]:
        """The values of all processes, in their order."""
        if not self.are_several:
            return [value]
        values: list[Any] = [None] * self.size
        with self.connected():
            dist.all_gather_object(values, value)
        return values

    def wait(self) -> None:
        """Wait until every process has come to this point."""
        self.gather(None)

    def add(self, *values: float) -> list[float]:
        """The sum of each value over all processes, in float64."""
        total = torch.tensor(values, dtype=torch.float64)
        if self.are_several:
            with self.connected():
                dist.all_reduce(total)
        return cast("list[float]", total.tolist())

    def add_up(self, tensors: Sequence[Tensor]) -> None:
        """Replace tensors by their sums over all processes: one message for all of them."""
        flat = torch.cat([tensor.flatten() for tensor in tensors])
        with self.connected():
            dist.all_reduce(flat)
        parts = torch.split(flat, [tensor.numel() for tensor in tensors])
        for tensor, part in zip(tensors, parts, strict=True):
            tensor.copy_(part.view_as(tensor))

    @contextlib.contextmanager
    def connected(self) -> Iterator[None]:
        """Let the loss of another process be a ConnectionError.

        Raises:
            ConnectionError: Another process has ended while this one communicated with it.
        """
        try:
            yield
        except RuntimeError as error:
            # Gloo's errors have no class of their own.
            if isinstance(error, dist.DistError) or "/gloo/" in str(error):
                raise ConnectionError("another process has ended") from error
            raise


def _connect() -> None:
    # Some builds of PyTorch have none of these.
    from torch.distributed.distributed_c10d import PrefixStore
    from torch.distributed.rendezvous import rendezvous

    # Gloo also for what is not on a GPU: numbers, objects and checkpoints.
    backend = "cpu:gloo,cuda:nccl" if torch.cuda.is_available() else "gloo"
    store, rank, size = next(rendezvous("env://"))
    # When torchrun restarts processes, its store still has the addresses of those that have ended,
    # and new ones may try to reach them (PyTorch's issue 135712).
    attempt = os.environ.get("TORCHELASTIC_RESTART_COUNT", "0")
    fresh = PrefixStore(f"attempt {attempt}", store)
    dist.init_process_group(backend, store=fresh, rank=rank, world_size=size)


class Silent:
    """The folder and the board of a silent process: takes any call, does nothing, is empty."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def __getattr__(self, name: str) -> "Silent":
        return self

    def __call__(self, *_: object, **__: object) -> "Silent":  # noqa: D102
        return self

    def __enter__(self) -> "Silent":
        return self

    def __exit__(self, *_: object) -> None:
        pass

    def __format__(self, _: str) -> str:
        return ""

    def __bool__(self) -> bool:
        return False
