"""AdamW with the parameter groups that state space models need, linear warm-up and a cosine."""

from __future__ import annotations

import math
from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from torch import nn

FLOOR = 0.1  # the cosine ends at this share of the peak


def _dynamics(model: nn.Module) -> set[str]:
    """Names of the parameters that some module lists in its class attribute `dynamics`."""
    found = set()
    for prefix, module in model.named_modules():
        declared: frozenset[str] = getattr(type(module), "dynamics", frozenset())
        for name, _ in module.named_parameters():
            # A declared name is a parameter of the module, or a child that holds such parameters.
            if name in declared or name.split(".", 1)[0] in declared:
                found.add(f"{prefix}.{name}" if prefix else name)
    return found


def parameter_groups(
    model: nn.Module, *, lr: float, weight_decay: float = 0.1, dynamics_lr: float = 1.0
) -> list[dict[str, Any]]:
    """Three groups for an optimizer; groups without parameters are left out.

    - "weights": matrices and larger tensors; the only ones with weight decay.
    - "vectors": biases, norms and whatever else has at most one dimension.
    - "dynamics": what modules list in `dynamics` (A, dt, D, ...), at `lr * dynamics_lr`. Decay would pull time scales
      towards a value that means nothing.
    """
    dynamics = _dynamics(model)
    groups: dict[str, dict[str, Any]] = {
        "weights": {"lr": lr, "weight_decay": weight_decay},
        "vectors": {"lr": lr, "weight_decay": 0.0},
        "dynamics": {"lr": lr * dynamics_lr, "weight_decay": 0.0},
    }
    for group in groups.values():
        group["params"] = []
    for name, p in model.named_parameters():
        if not p.requires_grad:
            continue
        kind = "dynamics" if name in dynamics else "weights" if p.ndim > 1 else "vectors"
        groups[kind]["params"].append(p)
    return [{"name": name, **group} for name, group in groups.items() if group["params"]]


def warmup_cosine(step: int, *, steps: int, warmup: int) -> float:
    """Factor on the learning rate of optimiser step `step` (0, 1, ...): up in a line, then a half cosine to FLOOR."""
    if step < warmup:
        return (step + 1) / warmup
    done = min((step - warmup) / max(steps - warmup, 1), 1.0)
    return FLOOR + (1 - FLOOR) * 0.5 * (1 + math.cos(math.pi * done))


def _adamw(model: nn.Module, steps: int, lr: float, weight_decay: float, warmup: int, dynamics_lr: float) -> dict:
    groups = parameter_groups(model, lr=lr, weight_decay=weight_decay, dynamics_lr=dynamics_lr)
    # One fused call over all parameters where PyTorch has it; the plain loop is several times slower on small models.
    fused = all(p.device.type in ("cpu", "cuda") and p.is_floating_point() for g in groups for p in g["params"])
    optimizer = torch.optim.AdamW(groups, lr=lr, betas=(0.9, 0.95), fused=fused)
    factor = partial(warmup_cosine, steps=steps, warmup=warmup)
    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, factor)
    return {"optimizer": optimizer, "lr_scheduler": {"scheduler": schedule, "interval": "step"}}


def adamw(
    *, steps: int, lr: float = 2e-3, weight_decay: float = 0.1, warmup: int = 50, dynamics_lr: float = 1.0
) -> Callable[[nn.Module], dict]:
    """`optimize` of a task: AdamW (betas 0.9 and 0.95) over `parameter_groups`, with `warmup_cosine` over `steps`."""
    return partial(_adamw, steps=steps, lr=lr, weight_decay=weight_decay, warmup=warmup, dynamics_lr=dynamics_lr)
