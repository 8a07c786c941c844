"""Lightning callbacks of a run: seeds, metrics.csv, checkpoints, and stopping in good order."""

from __future__ import annotations

import signal
import threading
import time
from typing import Any

import lightning.pytorch as pl
import torch
from lightning.pytorch.callbacks import Callback

from ..tasks import Task, shown
from .directory import Metrics, RunDirectory


class StepSeed(Callback):
    """The random numbers of a step (dropout, say) are a function of (seed, step, process): resuming changes nothing."""

    def __init__(self, seed: int) -> None:
        self.seed = seed

    def on_train_batch_start(self, trainer: pl.Trainer, *_: Any) -> None:
        mixed = 0
        for part in (self.seed, trainer.global_step, trainer.global_rank):
            # A large odd multiplier keeps neighbouring triples apart.
            mixed = (mixed * 6364136223846793005 + part + 1) % 2**63
        torch.manual_seed(mixed)


class ValidateAtEnd(Callback):
    """The last step is validated, whether or not it is a multiple of the interval."""

    def on_train_batch_end(self, trainer: pl.Trainer, *_: Any) -> None:
        if trainer.global_step == trainer.max_steps:
            trainer.val_check_batch = 1


class Recorder(Callback):
    """Writes metrics.csv: a row every `log_every` steps, and for each validation."""

    def __init__(self, run: RunDirectory, task: Task, log_every: int, tokens_per_step: int) -> None:
        names = list(task.metrics)
        columns = ["step", "seconds", "tokens", *names, *(f"val_{n}" for n in names), "lr", "gradient_norm"]
        self.metrics = Metrics(run.metrics, columns)
        self.log_every, self.tokens_per_step = log_every, tokens_per_step
        self.seconds = 0.0  # spent training in earlier processes
        self._began = 0.0
        self._lr = 0.0

    def _time(self) -> float:
        return self.seconds + time.monotonic() - self._began

    def state_dict(self) -> dict[str, Any]:
        return {"seconds": self._time()}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.seconds = state["seconds"]

    def on_train_start(self, trainer: pl.Trainer, task: pl.LightningModule) -> None:
        self._began = time.monotonic()
        if trainer.is_global_zero:
            self.metrics.open(trainer.global_step)

    def on_train_batch_start(self, trainer: pl.Trainer, *_: Any) -> None:
        # At the end of the step the schedule has moved on already.
        self._lr = float(trainer.lr_scheduler_configs[0].scheduler.get_last_lr()[0])

    def _row(self, trainer: pl.Trainer) -> dict[str, Any]:
        step = trainer.global_step
        return {"step": step, "seconds": self._time(), "tokens": step * self.tokens_per_step}

    def on_train_batch_end(self, trainer: pl.Trainer, task: Any, outputs: Any, *_: Any) -> None:
        step = trainer.global_step
        if not trainer.is_global_zero or not (step % self.log_every == 0 or step == trainer.max_steps):
            return
        row = self._row(trainer) | shown(task.metrics, outputs)
        row |= {"lr": self._lr, "gradient_norm": task.gradient_norm}
        self.metrics.add(row)

    def on_validation_end(self, trainer: pl.Trainer, task: Any) -> None:
        if trainer.is_global_zero:
            names = [f"val_{n}" for n in task.metrics]
            self.metrics.add(self._row(trainer) | {n: float(trainer.callback_metrics[n]) for n in names})


class Checkpoints(Callback):
    """Saves every `every` steps and at the end; keeps the last two and the best by the task's headline metric."""

    def __init__(self, run: RunDirectory, task: Task, every: int, eval_every: int) -> None:
        self.run, self.every, self.eval_every = run, every, eval_every
        self.metric, self.sign = f"val_{task.headline}", 1 if task.lower_is_better else -1
        self.best_step: int | None = None
        self.best: float | None = None
        self.last_step: int | None = None

    def state_dict(self) -> dict[str, Any]:
        return {"best_step": self.best_step, "best": self.best}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.best_step, self.best = state["best_step"], state["best"]

    def _due(self, trainer: pl.Trainer) -> bool:
        return trainer.global_step % self.every == 0 or trainer.global_step == trainer.max_steps

    def _validates(self, trainer: pl.Trainer) -> bool:
        return trainer.global_step % self.eval_every == 0 or trainer.global_step == trainer.max_steps

    def on_train_batch_end(self, trainer: pl.Trainer, *_: Any) -> None:
        # Where a validation follows, the checkpoint waits for it, to know whether it is the best.
        if self._due(trainer) and not self._validates(trainer):
            self.save(trainer)

    def on_validation_end(self, trainer: pl.Trainer, _: Any) -> None:
        if trainer.state.fn != "fit":
            return
        if self._due(trainer):
            value = float(trainer.callback_metrics[self.metric])
            if self.best is None or self.sign * value < self.sign * self.best:
                self.best, self.best_step = value, trainer.global_step
            self.save(trainer)

    def save(self, trainer: pl.Trainer) -> None:
        """Save now, on all processes, and remove what is no longer kept."""
        step = trainer.global_step
        if self.last_step == step:
            return
        trainer.save_checkpoint(self.run.checkpoint(step))
        self.last_step = step
        if trainer.is_global_zero:
            steps = [s for s in self.run.saved_steps() if s <= step]
            for old in set(self.run.saved_steps()) - set(steps[-2:]) - {self.best_step}:
                self.run.checkpoint(old).unlink(missing_ok=True)


class StopInOrder(Callback):
    """Ctrl-C, SIGTERM and a time limit end the run after the step under way, with a checkpoint.

    A second Ctrl-C stops at once.
    """

    def __init__(self, checkpoints: Checkpoints, max_minutes: float | None = None) -> None:
        self.checkpoints, self.limit = checkpoints, max_minutes
        self.signal: int | None = None
        self.out_of_time = False
        self._previous: dict[int, Any] = {}
        self._began = 0.0

    def on_train_start(self, trainer: pl.Trainer, _: Any) -> None:
        self._began = time.monotonic()
        if threading.current_thread() is threading.main_thread():
            for number in (signal.SIGINT, signal.SIGTERM):
                self._previous[number] = signal.signal(number, self._caught)

    def _caught(self, number: int, frame: Any) -> None:
        if self.signal is not None and number == signal.SIGINT:
            raise KeyboardInterrupt
        self.signal = number

    def restore(self) -> None:
        while self._previous:
            number, handler = self._previous.popitem()
            signal.signal(number, handler)

    def on_train_batch_end(self, trainer: pl.Trainer, *_: Any) -> None:
        late = self.limit is not None and time.monotonic() - self._began > 60 * self.limit
        # All processes must stop at the same step, or the next exchange waits for ever.
        wants = self.signal is not None or late
        if trainer.strategy.reduce_boolean_decision(wants, all=False) if trainer.world_size > 1 else wants:
            self.out_of_time = late and self.signal is None
            self.checkpoints.save(trainer)
            trainer.should_stop = True
            if trainer.global_step < trainer.max_steps:
                # Whoever pressed Ctrl-C does not want to wait for a validation. A finished run reports its last one.
                trainer.limit_val_batches = 0

    def on_train_end(self, *_: Any) -> None:
        self.restore()

    def on_exception(self, *_: Any) -> None:
        self.restore()
