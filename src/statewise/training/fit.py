"""Run a task on its data, on Lightning, inside a run directory."""

from __future__ import annotations

import logging
import os
import warnings
from dataclasses import dataclass

import lightning.pytorch as pl
import torch
from lightning.pytorch.callbacks import Callback, EMAWeightAveraging
from lightning.pytorch.strategies import DDPStrategy, Strategy
from rich.console import Console

from ..data.steps import StepData
from ..tasks import NonFinite, Task
from .callbacks import Checkpoints, Recorder, StepSeed, StopInOrder, ValidateAtEnd
from .checkpoint_io import CheckpointError, SafeCheckpointIO, is_no_space, load_checkpoint
from .directory import RunDirectory
from .groups import adamw
from .options import Training
from .progress import ProgressReport


class TrainingError(RuntimeError):
    """Training cannot go on; the message says why and which checkpoint is the last good one."""


@dataclass(frozen=True)
class Outcome:
    """How a call of `fit` ended.

    Args:
        step: optimiser steps done, over all resumptions.
        finished: all steps are done.
        signal: number of the signal that ended it early, or None.
        first_process: only this process reports and writes files.
    """

    step: int
    finished: bool
    signal: int | None = None
    first_process: bool = True


def processes(training: Training) -> tuple[int, int]:
    """(processes on this machine, machines): torchrun's if it started us, otherwise `devices` on one machine."""
    if "TORCHELASTIC_RUN_ID" in os.environ:
        local = int(os.environ["LOCAL_WORLD_SIZE"])
        return local, int(os.environ["WORLD_SIZE"]) // local
    return training.devices, 1


def is_first_process() -> bool:
    """False in the copies of this program that Lightning or torchrun start for further devices."""
    return int(os.environ.get("RANK", os.environ.get("LOCAL_RANK", 0))) == 0


def check(training: Training) -> None:
    """Raise ValueError for options that do not go together, or with this machine."""
    local, machines = processes(training)
    world = local * machines
    if training.batch_size % world:
        raise ValueError(
            f"batch_size: {training.batch_size} rows do not divide over {world} devices; want a multiple of {world}"
        )
    gpus = torch.cuda.device_count()
    if training.accelerator == "gpu" and gpus < local:
        raise ValueError(
            f"accelerator: {local} GPU(s) were asked for but PyTorch sees {gpus}; "
            f"want --accelerator cpu or fewer --devices"
        )
    if training.accelerator == "mps" and not torch.backends.mps.is_available():
        raise ValueError("accelerator: 'mps' was asked for but PyTorch sees no Apple GPU; want --accelerator cpu")
    if training.ema and training.strategy == "fsdp2":
        raise ValueError("ema: the moving average is not sharded, so it does not go with --strategy fsdp2")


def _strategy(training: Training, world: int) -> Strategy | str:
    if training.strategy == "fsdp2":
        from .fsdp2 import FSDP2

        return FSDP2(world)
    if world == 1 and training.strategy == "auto":
        return "auto"
    on_cpu = training.accelerator == "cpu" or not torch.cuda.is_available()
    return DDPStrategy(process_group_backend="gloo" if on_cpu else "nccl")


def _quieten() -> None:
    """Lightning's notes are for people who wrote the Trainer call; here they would bury the progress bar."""
    for name in ("lightning.pytorch", "lightning.fabric", "lightning.pytorch.utilities.rank_zero"):
        logging.getLogger(name).setLevel(logging.ERROR)
    for text in (
        ".*does not have many workers.*",
        ".*overrides the configure_model.*",
        ".*litlogger.*",
        ".*Checkpoint directory.*",
        ".*GPU available but not used.*",
        ".*lr_scheduler.step.*before.*optimizer.step.*",
        ".*isinstance.treespec, LeafSpec.*",
        ".*IterableDataset.*__len__.*",
    ):
        warnings.filterwarnings("ignore", message=text)


def latest_checkpoint(run: RunDirectory, console: Console) -> int:
    """Step of the newest checkpoint that can be read; 0 if there is none. Says so when it passes over a broken one."""
    for step in reversed(run.saved_steps()):
        try:
            load_checkpoint(run.checkpoint(step))
            return step
        except CheckpointError as error:
            console.print(f"[yellow]skipped:[/] {error}", highlight=False, soft_wrap=True)
    return 0


def fit(
    task: Task,
    data: StepData,
    training: Training,
    run: RunDirectory,
    *,
    resume: bool = False,
    console: Console | None = None,
    callbacks: list[Callback] | None = None,
) -> Outcome:
    """Train `task` for `training.steps` steps, writing metrics.csv and checkpoints into `run`.

    Args:
        task: its `optimize` and `clip` are set from `training`.
        resume: go on from the newest checkpoint in `run` (from the start if there is none).
        console: for progress; silent if None.

    Raises:
        TrainingError: the loss or a gradient is not finite, or a file cannot be written.
        ValueError: see `check`.
    """
    check(training)
    local, machines = processes(training)
    world = local * machines
    quiet = Console(quiet=True)
    console = console or quiet
    task.clip = training.clip
    task.optimize = adamw(
        steps=training.steps,
        lr=training.lr,
        weight_decay=training.weight_decay,
        warmup=training.warmup,
        dynamics_lr=training.dynamics_lr,
        beta2=training.beta2,
        final_lr=training.final_lr,
        groups=training.groups,
    )
    if training.strategy == "fsdp2":
        from .fsdp2 import shard

        task.shard = shard
    first = is_first_process()
    start = latest_checkpoint(run, console if first else quiet) if resume else 0
    if first:
        run.clean()
    tokens = data.tokens_per_step
    checkpoints = Checkpoints(run, task, training.checkpoint_every, training.eval_every)
    stop = StopInOrder(checkpoints, training.max_minutes)
    # The order matters: metrics are on the disk before the checkpoint that counts them as done.
    own: list[Callback] = [
        StepSeed(training.seed),
        ValidateAtEnd(),
        Recorder(run, task, training.log_every, tokens),
        ProgressReport(console, task, tokens),
        *([EMAWeightAveraging(decay=training.ema)] if training.ema else []),
        *(callbacks or []),
        checkpoints,
        stop,
    ]
    with warnings.catch_warnings():
        _quieten()
        trainer = pl.Trainer(
            max_steps=training.steps,
            max_epochs=-1,
            accelerator=training.accelerator,
            devices=local,
            num_nodes=machines,
            strategy=_strategy(training, world),
            precision="bf16-mixed" if training.precision == "bf16-mixed" else "32-true",
            val_check_interval=training.eval_every,
            check_val_every_n_epoch=None,
            num_sanity_val_steps=0,
            callbacks=own,
            plugins=[SafeCheckpointIO()],
            logger=False,
            enable_checkpointing=False,
            enable_progress_bar=False,
            enable_model_summary=False,
            use_distributed_sampler=False,
            default_root_dir=str(run.path),
        )
        try:
            trainer.fit(task, datamodule=data, ckpt_path=str(run.checkpoint(start)) if start else None)
        except (NonFinite, CheckpointError) as error:
            raise TrainingError(_where_to_go_on(error, run)) from error
        except OSError as error:
            if not is_no_space(error):
                raise
            raise TrainingError(_where_to_go_on(f"cannot write {run.metrics}: no space left", run)) from error
        except SystemExit:
            # Lightning turns KeyboardInterrupt (here: a second Ctrl-C) into exit code 1.
            raise KeyboardInterrupt from None
        finally:
            stop.restore()
    step = trainer.global_step
    outcome = Outcome(step, step >= training.steps, stop.signal, trainer.is_global_zero)
    _leave(task)
    return outcome


def _where_to_go_on(error: Exception | str, run: RunDirectory) -> str:
    steps = run.saved_steps()
    last = f"last good checkpoint: {run.checkpoint(steps[-1])}" if steps else "no checkpoint was saved yet"
    advice = "; try a smaller --lr or --clip, or --precision 32" if isinstance(error, NonFinite) else ""
    return f"{error}; {last}{advice}"


def _leave(task: Task) -> None:
    """End the process group, so that the processes that are done can exit, and put the weights on the CPU."""
    if torch.distributed.is_available() and torch.distributed.is_initialized():
        torch.distributed.barrier()
        torch.distributed.destroy_process_group()
    if task.shard is None:
        task.cpu()
