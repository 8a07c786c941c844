"""How to train, whatever is trained. No import of torch: the command line reads this to print its help."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, Literal


@dataclass(frozen=True)
class Training:
    """Training.

    Args:
        steps: optimiser steps of the whole run
        batch_size: rows per step, over all devices
        lr: peak learning rate of AdamW
        dynamics_lr: factor on the learning rate of the state space parameters (A, dt, D, ...)
        weight_decay: of matrices; never of state space parameters, biases, norms and vectors
        groups: settings for parameters of these names, such as {"log_dt": {"lr": 1, "weight_decay": 0}}; "lr"
            is a factor on lr
        beta2: how slowly AdamW forgets squared gradients
        warmup: steps of linear warm-up, before the cosine
        final_lr: where the cosine ends, as a share of lr; 1 for a constant rate
        clip: largest norm of the gradient; 0 for no clipping
        ema: decay of an exponential moving average of the weights, e.g. 0.999; 0 for none
        seed: of weights, data order and sampling
        precision: arithmetic
        accelerator: where to compute
        devices: number of processes, one per device
        strategy: how devices share the work; fsdp2 shards the weights
        eval_every: steps between two validations
        checkpoint_every: steps between two checkpoints
        log_every: steps between two rows of metrics.csv
        max_minutes: stop after this long, checkpoint saved; such a run is not reproducible
    """

    steps: int = 1000
    batch_size: int = 16
    lr: float = 2e-3
    dynamics_lr: float = 1.0
    weight_decay: float = 0.1
    groups: dict[str, dict[str, float]] = field(default_factory=dict)
    beta2: float = 0.95
    warmup: int = 50
    final_lr: float = 0.1
    clip: float = 1.0
    ema: float = 0.0
    seed: int = 0
    precision: Literal["32", "bf16-mixed"] = "32"
    accelerator: Literal["auto", "cpu", "gpu", "mps"] = "auto"
    devices: int = 1
    strategy: Literal["auto", "ddp", "fsdp2"] = "auto"
    eval_every: int = 100
    checkpoint_every: int = 100
    log_every: int = 1
    max_minutes: float | None = None

    def __post_init__(self) -> None:
        for name in ("steps", "batch_size", "devices", "eval_every", "checkpoint_every", "log_every"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name}: want at least 1, got {getattr(self, name)}")
        for name in ("lr", "dynamics_lr"):
            if not getattr(self, name) > 0:
                raise ValueError(f"{name}: want a positive number, got {getattr(self, name)}")
        for name in ("weight_decay", "warmup", "clip"):
            if not getattr(self, name) >= 0:
                raise ValueError(f"{name}: want 0 or more, got {getattr(self, name)}")
        for name, settings in self.groups.items():
            if set(settings) - {"lr", "weight_decay"} or min(settings.values(), default=0) < 0:
                raise ValueError(f'groups: {name}: want "lr", "weight_decay" or both, 0 or more, got {settings!r}')
        for name in ("beta2", "final_lr"):
            if not 0 <= getattr(self, name) <= 1 or self.beta2 == 1:
                raise ValueError(f"{name}: want a share from 0 to 1 (beta2 below 1), got {getattr(self, name)}")
        if not 0 <= self.ema < 1:
            raise ValueError(f"ema: want a decay of at least 0 and below 1, got {self.ema}")
        if self.max_minutes is not None and not self.max_minutes > 0:
            raise ValueError(f"max_minutes: want a positive number, got {self.max_minutes}")


def shares(options: Mapping[str, Any], steps: int) -> dict[str, Any]:
    """`steps`, and the warm-up and the distances of validations and checkpoints that keep their share of them.

    Distances are rounded up, so there are no more validations than before. If one distance was a multiple of the other
    it still is, so that no validation loses its checkpoint.

    Args:
        options: steps, warmup, eval_every and checkpoint_every, as in `Training`.
    """
    before, distances = options["steps"], {name: options[name] for name in ("eval_every", "checkpoint_every")}
    least = min(distances.values())
    if all(every % least == 0 for every in distances.values()):
        unit = -(-least * steps // before)
        scaled = {name: every // least * unit for name, every in distances.items()}
    else:
        scaled = {name: -(-every * steps // before) for name, every in distances.items()}
    return {"steps": steps, "warmup": round(options["warmup"] * steps / before), **scaled}
