"""The command line of the benchmark: `python -m experiments.benchmark QUESTION`."""

if __name__ == "__main__":  # first, so that it can be interrupted while everything else is imported
    from importlib import import_module

    from experiments.command_line import run

    run(lambda: import_module("experiments.benchmark.__main__").main())

import sys
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Literal

import torch
import tyro

from experiments.benchmark import backward, growth, layers, per_sample, step
from experiments.benchmark.measure import Conditions, limited_to
from experiments.benchmark.report import Table, heading, save
from experiments.command_line import parse
from experiments.run_folder import can_be_made

PROGRAM = "python -m experiments.benchmark"


@dataclass(frozen=True)
class Config(Conditions):
    """Compare speed and memory with the alternatives."""

    question: Annotated[
        Literal["step", "growth", "backward", "layers", "per-sample"], tyro.conf.Positional
    ] = "step"
    """step: a training step of whole networks: ours, PyTorch, NumPy, JAX, onnxruntime, and the bare
    matrix products. growth: how its cost grows with depth and with samples. backward: how a
    backward pass compares with a forward pass. layers: the cost of calling each layer, and of
    forward and backward of whole networks through autograd. per-sample: the cost of every sample's
    gradient, of its norm, and of clipping by it: ours, torch.func, Opacus, BackPACK."""
    matmul_precision: Literal["highest", "high", "medium"] = "highest"
    """The precision of float32 matrix products, as torch.set_float32_matmul_precision takes it; JAX
    gets the same."""
    folder: Path = Path("runs/benchmark")
    """Where <question>.md, .csv and .png are written; existing ones are replaced."""

    def __post_init__(self) -> None:
        super().__post_init__()
        if not can_be_made(self.folder):
            raise ValueError(f"--folder must be a place to write to; got {str(self.folder)!r}")


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the benchmark; the exit code.

    A contender that raises, or whose result is further off than rounding explains, is not timed:
    its row says why, and the others go on. If it is our own, its figures are what the benchmark is
    for: the tables are still written, and the exit code is 1.
    """
    config = parse(Config, arguments, PROGRAM)
    words = sys.argv[1:] if arguments is None else arguments
    lines = [
        *heading([*PROGRAM.split(), *words], config.device),
        f"threads: {config.threads}; float32 matrix products: {config.matmul_precision}",
    ]
    tables_of, left_out = _QUESTIONS[config.question]
    if missing := left_out(config.device):
        lines.append(f"left out, not available: {', '.join(missing)}")
    print("\n".join(lines), flush=True)
    torch.manual_seed(0)
    precision = torch.get_float32_matmul_precision()
    torch.set_float32_matmul_precision(config.matmul_precision)
    tables: list[Table] = []
    try:
        with limited_to(config.threads):
            for table in tables_of(config):
                print(f"\n{table.caption}\n\n{table}", flush=True)
                tables.append(table)
    finally:
        torch.set_float32_matmul_precision(precision)
    paths = save(config.folder, config.question, lines, tables)
    print(f"\nwritten: {', '.join(map(str, paths))}")
    faults = [fault for table in tables for fault in table.faults]
    for fault in faults:
        print(f"our own code failed: {fault}", file=sys.stderr)
    return 1 if faults else 0


# For each question its tables, and what it leaves out on a device.
_QUESTIONS: dict[str, tuple[Callable[[Conditions], Iterator[Table]], Callable[[str], list[str]]]]
_QUESTIONS = {
    "step": (step.tables, step.left_out),
    "growth": (growth.tables, lambda _: []),
    "backward": (backward.tables, lambda _: []),
    "layers": (layers.tables, lambda _: []),
    "per-sample": (per_sample.tables, per_sample.left_out),
}
