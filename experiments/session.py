"""One session of a run: it trains, from wherever the run is, to the end or until it is stopped."""

import sys
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from functools import partial
from typing import Any

from tqdm import tqdm

from experiments import checkpoint
from experiments.board import Board
from experiments.checkpoint import BEST, LAST
from experiments.regions import draw_regions
from experiments.run_folder import RunFolder
from experiments.training import Config, Training
from experiments.verdicts import is_good, line, origin


def state_of(
    config: Config,
    training: Training,
    best: float = -1.0,
    events: Mapping[str, int] | None = None,
    curves: dict[int, dict[str, float]] | None = None,
) -> dict[str, Any]:
    """What is in a checkpoint. Everything logged before its last update is in the run folder.

    Args:
        config: The options.
        training: As it is now.
        best: The best test accuracy so far.
        events: How many bytes of events TensorBoard had by now, in each folder.
        curves: The `history` of the TraceBoard.
    """
    options = asdict(config) | {
        "run_folder": str(config.run_folder),
        "data_dir": None if config.data_dir is None else str(config.data_dir.absolute()),
        "device": str(training.device),
    }
    for name in ("dry_run", "resume", "name", "shard"):
        del options[name]
    return {
        "config": options,
        "training": training.state_dict(),
        "best": best,
        "events": dict(events or {}),
        "curves": curves,
    }


class Session:
    """Trains, logs and writes checkpoints.

    A checkpoint is made before anything is logged for the number of updates that it has, so that
    whoever goes on from it logs that, too.

    Args:
        config: The options.
        training: What is trained, in the state that the run is in.
        folder: The run folder, where last.pt is of this state.
        state: The contents of last.pt.

    Attributes:
        training, folder: As given.
        total: How many updates the run has in the end.
        saved: After how many updates last.pt was written.
        is_stopped: Whether training was stopped because a cost was not finite.
        began: Where the first cost that was not finite came from; "" if there was none.
    """

    def __init__(
        self, config: Config, training: Training, folder: RunFolder, state: dict[str, Any]
    ) -> None:
        self.training, self.folder = training, folder
        self.total = config.epochs * training.updates_per_epoch
        self.saved = training.updates
        self.is_stopped = False
        self.began = ""
        self._config = config
        self._best: float = state["best"]
        self._best_to_write: bytes | None = None
        # On a terminal a progress bar; elsewhere a line for each epoch.
        self._on_terminal = all(s and s.isatty() for s in (sys.stdout, sys.stderr))

    def train(
        self, board: Board, received: Sequence[KeyboardInterrupt]
    ) -> tuple[dict[str, float], float]:
        """Train for the remaining epochs, or until the cost is not finite.

        Args:
            board: Logs from the present number of updates on.
            received: Once this is not empty, in any of several processes, a last checkpoint is
                written, and its first is raised.

        Returns:
            The last metrics, and the cost of the last batch.
        """
        if self.training.updates:
            self._save(board)  # options may have changed
        cost = 0.0
        with tqdm(
            total=self.total,
            initial=self.training.updates,
            unit=" updates",
            disable=not self._on_terminal,
        ) as bar:
            if self.training.updates % self.training.updates_per_epoch == 0:
                metrics = self._end_epoch(board, bar)
            while self.training.updates < self.total and not self.is_stopped:
                cost = self._rest_of_epoch(board, bar, received)
                metrics = self._end_epoch(board, bar)
        draw(board, self.training)
        board.log_config(self.folder.config)
        self._save_best()
        self.folder.remove_unused()
        return metrics, cost

    def _rest_of_epoch(
        self, board: Board, bar: "tqdm[Any]", received: Sequence[KeyboardInterrupt]
    ) -> float:
        training, config = self.training, self._config
        for x, y in training.epoch():
            step = training.updates
            look = partial(board.traces.log, step=step, learning_rate=config.learning_rate)
            cost = training.update(x, y, look if step % config.log_every == 0 else None)
            bar.update()
            self._judge(cost)
            if self.is_stopped:
                break
            step += 1
            stop = training.agreed(received)
            if stop or step % config.checkpoint_every == 0 or step == self.total:
                self._save(board)
            if stop:
                raise stop
        return cost

    def _end_epoch(self, board: Board, bar: "tqdm[Any]") -> dict[str, float]:
        """Log and print what is known at the end of an epoch, or before the first."""
        step, epochs = self.training.updates, self._config.epochs
        events = board.sizes()
        metrics = observe(board, self.training)
        if step == 0:
            return metrics
        epoch = -(-step // self.training.updates_per_epoch)
        self.folder.add_metrics({"epoch": epoch, "step": step} | metrics)
        bar.set_postfix_str(f"test accuracy {metrics['test_accuracy']:.2%}")
        if not self._on_terminal:
            print(f"epoch {epoch:{len(str(epochs))}}/{epochs}  {line(metrics)}")
        self._judge(metrics["train_cost"])
        if metrics["test_accuracy"] > self._best and not self.is_stopped:
            self._best_to_write = self._packed(board, events)
            self._best = metrics["test_accuracy"]
        return metrics

    def _judge(self, cost: float) -> None:
        if is_good(cost):
            return
        self.is_stopped = self._config.on_nan == "stop"
        self._explain(f"the cost is {cost} at update {self.training.updates}")

    def _explain(self, symptom: str) -> None:
        """Find out where numbers stopped being finite; say so, unless that stops the run."""
        if self.began:
            return
        self.began = self._origin()
        if not self.is_stopped:
            reason = f"warning: {symptom}; {self.began}; going on, as --on-nan says"
            print(reason, file=sys.stderr)

    def _origin(self) -> str:
        """Where numbers stopped being finite, and what there is from before that."""
        last, until = self.folder.path / LAST, self.training.updates
        try:
            before = checkpoint.read(last, whole=self.training.processes == 1)["training"]
        except (OSError, ValueError) as error:
            return str(error)
        with self.training.restored_afterwards():
            began = origin(self.training, before, until)
        if not self.is_stopped:
            return began
        return f"{began}; {last} is from before that, after update {before['updates']}"

    def _packed(self, board: Board, events: Mapping[str, int]) -> bytes:
        history = board.traces.history
        state = state_of(self._config, self.training, self._best, events, history)
        return self.training.pack(state, self.folder.path)

    def _save(self, board: Board) -> None:
        """Write last.pt, unless a cost that is no number would be sure to follow from it."""
        if not self.training.is_finite():
            if self._config.on_nan == "stop":
                return
            self._explain(f"weights are not finite after update {self.training.updates}")
        packed = self._packed(board, board.sizes())
        self.folder.sync()
        board.sync()
        self._save_best()
        self.folder.write(LAST, packed)
        self.folder.remove_unused()
        self.saved = self.training.updates

    def _save_best(self) -> None:
        """Write best.pt if it has changed; not each time that it does, because that takes time."""
        if self._best_to_write is not None:
            self.folder.write(BEST, self._best_to_write)
            self._best_to_write = None


def observe(board: Board, training: Training) -> dict[str, float]:
    """Log what is logged once per epoch; return the metrics."""
    step = training.updates
    metrics = training.metrics()
    board.log_metrics(metrics, step)
    trace = training.trace(training.data.x_test, training.y_test)
    board.traces.log_histograms(trace, step)
    if training.data.image_shape is not None:
        board.log_weight_image(trace.layers[0].w, training.data.image_shape, step)
    return metrics


def draw(board: Board, training: Training) -> None:
    """Log the pictures that are drawn only at the end; each takes as long as a small epoch."""
    board.traces.log_heat_map(training.updates)
    data = training.data
    predictions = training.trace(data.x_test, training.y_test).output.argmax(-1)
    board.log_confusion(data.label_test, predictions, data.class_names, training.updates)
    if data.features == 2:
        board.log_figure("regions", draw_regions(training.net, data), training.updates)
