"""The progress bar of a run: loss, headline metric, tokens per second, time left."""

from __future__ import annotations

import time
from collections import deque
from typing import Any

import lightning.pytorch as pl
from lightning.pytorch.callbacks import Callback
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn
from rich.table import Column

from ..tasks import Task, shown

LABELS = {"bits_per_byte": "bits/byte", "accuracy": "accuracy", "loss": "loss"}
_QUIET = 10.0  # seconds between lines where there is no terminal


class ProgressReport(Callback):
    """A bar on a terminal; elsewhere (a log file) a plain line every ten seconds.

    Args:
        console: where to write; nothing is written by other processes than the first.
        tokens_per_step: over all devices.
    """

    def __init__(self, console: Console, task: Task, tokens_per_step: int) -> None:
        self.console, self.tokens = console, tokens_per_step
        self.names = list(task.metrics)
        self.bar: Progress | None = None
        self._times: deque[float] = deque(maxlen=50)
        self._smooth: dict[str, float] = {}
        self._validation = ""
        self._last_line = 0.0

    def on_train_start(self, trainer: pl.Trainer, _: Any) -> None:
        self._times.append(time.monotonic())
        self._last_line = time.monotonic()
        if not trainer.is_global_zero or not self.console.is_terminal:
            return
        self.bar = Progress(
            MofNCompleteColumn(table_column=Column(no_wrap=True, min_width=2 * len(str(trainer.max_steps)) + 1)),
            BarColumn(bar_width=None, table_column=Column(ratio=1)),
            TextColumn("{task.fields[metrics]}", table_column=Column(no_wrap=True)),
            TimeRemainingColumn(compact=True, table_column=Column(no_wrap=True, min_width=5)),
            TextColumn("left", table_column=Column(no_wrap=True)),
            console=self.console,
            expand=True,
            speed_estimate_period=20,
        )
        self.bar.add_task("train", total=trainer.max_steps, completed=trainer.global_step, metrics="")
        self.bar.start()

    def _metrics(self) -> str:
        elapsed = self._times[-1] - self._times[0]
        rate = self.tokens * (len(self._times) - 1) / elapsed if elapsed > 0 else 0.0
        # On a narrow terminal the headline metric is enough.
        names = self.names[-1:] if self.bar is not None and self.console.width < 100 else self.names
        parts = [f"{LABELS.get(n, n)} {self._smooth[n]:.3f}" for n in names]
        return "  ".join([*parts, *([self._validation] if self._validation else []), f"{rate:,.0f} tokens/s"])

    def on_train_batch_end(self, trainer: pl.Trainer, task: Any, outputs: Any, *_: Any) -> None:
        if not trainer.is_global_zero:
            return
        now = time.monotonic()
        self._times.append(now)
        for name, value in shown(self.names, outputs).items():
            self._smooth[name] = value + 0.95 * (self._smooth.get(name, value) - value)
        if self.bar is not None:
            self.bar.update(self.bar.task_ids[0], completed=trainer.global_step, metrics=self._metrics())
        elif now - self._last_line > _QUIET:
            self._last_line = now
            self.console.print(f"step {trainer.global_step}/{trainer.max_steps}  {self._metrics()}")

    def on_validation_end(self, trainer: pl.Trainer, task: Any) -> None:
        value = float(trainer.callback_metrics[f"val_{task.headline}"])
        self._validation = f"held out {value:.3f}"
        self._times.clear()  # the time of the validation is not training time
        self._times.append(time.monotonic())

    def _stop(self) -> None:
        if self.bar is not None:
            self.bar.stop()
            self.bar = None

    def on_train_end(self, *_: Any) -> None:
        self._stop()

    def on_exception(self, *_: Any) -> None:
        self._stop()
