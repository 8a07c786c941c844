"""AdamW with the parameter groups that state space models need, linear warm-up and a cosine."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from functools import partial
from typing import Any

import torch
from torch import nn

FLOOR = 0.1  # the cosine ends at this share of the peak, if nothing else is said


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
    model: nn.Module,
    *,
    lr: float,
    weight_decay: float = 0.1,
    dynamics_lr: float = 1.0,
    groups: Mapping[str, Mapping[str, float]] | None = None,
) -> list[dict[str, Any]]:
    """Groups for an optimizer; groups without parameters are left out.

    - "weights": matrices and larger tensors; the only ones with weight decay.
    - "vectors": biases, norms and whatever else has at most one dimension.
    - "dynamics": what modules list in `dynamics` (A, dt, D, ...), at `lr * dynamics_lr`. Decay would pull time scales
      towards a value that means nothing.
    - one for each entry of `groups`, the parameters of that name: {"B": {"lr": 1.0, "weight_decay": 0.05}} with "lr" a
      factor on `lr`. What an entry leaves out is as in the group that the parameters would be in.

    Raises:
        ValueError: no parameter has a name in `groups`.
    """
    named = {} if groups is None else groups
    dynamics = _dynamics(model)
    made: dict[str, dict[str, Any]] = {
        "weights": {"lr": lr, "weight_decay": weight_decay},
        "vectors": {"lr": lr, "weight_decay": 0.0},
        "dynamics": {"lr": lr * dynamics_lr, "weight_decay": 0.0},
    }
    found: dict[str, list[nn.Parameter]] = {}
    used = set()
    for name, p in model.named_parameters():
        if not p.requires_grad:
            continue
        kind = "dynamics" if name in dynamics else "weights" if p.ndim > 1 else "vectors"
        # An entry may name the parameter itself, or a module around it.
        entry = next((part for part in reversed(name.split(".")) if part in named), None)
        if entry is not None:
            used.add(entry)
            told, home = named[entry], made[kind]
            kind = f"{kind}: {entry}"
            made[kind] = {
                "lr": lr * told["lr"] if "lr" in told else home["lr"],
                "weight_decay": told.get("weight_decay", home["weight_decay"]),
            }
        found.setdefault(kind, []).append(p)
    if missing := set(named) - used:
        raise ValueError(f"groups: no parameter that is trained is called {sorted(missing)[0]!r}")
    return [{"name": name, **group, "params": found[name]} for name, group in made.items() if name in found]


def warmup_cosine(step: int, *, steps: int, warmup: int, floor: float = FLOOR) -> float:
    """Factor on the learning rate of optimiser step `step` (0, 1, ...): up in a line, then a half cosine to `floor`."""
    if step < warmup:
        return (step + 1) / warmup
    done = min((step - warmup) / max(steps - warmup, 1), 1.0)
    return floor + (1 - floor) * 0.5 * (1 + math.cos(math.pi * done))


def _adamw(
    model: nn.Module, *, steps: int, lr: float, warmup: int, beta2: float, final_lr: float, **options: Any
) -> dict:
    made = parameter_groups(model, lr=lr, **options)
    # One fused call over all parameters where PyTorch has it; the plain loop is several times slower on small models.
    fused = all(p.device.type in ("cpu", "cuda") and p.is_floating_point() for g in made for p in g["params"])
    optimizer = torch.optim.AdamW(made, lr=lr, betas=(0.9, beta2), fused=fused)
    factor = partial(warmup_cosine, steps=steps, warmup=warmup, floor=final_lr)
    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, factor)
    return {"optimizer": optimizer, "lr_scheduler": {"scheduler": schedule, "interval": "step"}}


def adamw(
    *,
    steps: int,
    lr: float = 2e-3,
    weight_decay: float = 0.1,
    warmup: int = 50,
    dynamics_lr: float = 1.0,
    beta2: float = 0.95,
    final_lr: float = FLOOR,
    groups: Mapping[str, Mapping[str, float]] | None = None,
) -> Callable[[nn.Module], dict]:
    """`optimize` of a task: AdamW (betas 0.9 and beta2) over `parameter_groups`, with `warmup_cosine` over `steps`."""
    return partial(
        _adamw, steps=steps, lr=lr, weight_decay=weight_decay, warmup=warmup, dynamics_lr=dynamics_lr,
        beta2=beta2, final_lr=final_lr, groups=groups,
    )  # fmt: skip
