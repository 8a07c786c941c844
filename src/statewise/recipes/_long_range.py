"""Which model and which training each classification recipe takes, if nothing else is said. Data only.

"full" holds what the papers publish as their best: S4 and S4D from the S4 repository, S5 from its paper, Transformers
from "Never Train from Scratch". Rows without a source are ours, and say so. "small" is sized for two CPU cores.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any

from ..models import _long_range as published
from ..training.options import Training

FAMILIES = ("s4", "s4d", "s5", "transformer", "mamba", "mamba2", "lstm")
SAMPLES = {  # training rows of the full sets, for epochs
    "listops": 96_000, "text": 25_000, "retrieval": 147_086, "image": 45_000, "pathfinder": 160_000, "pathx": 160_000,
    "cifar": 45_000, "fashion": 54_000, "mnist": 54_000, "speech": 84_843,
    "digits": 1_258,
}  # fmt: skip
# Which published model serves a task that the papers do not have.
_LIKE = {"fashion": "image", "mnist": "image", "digits": "image"}
# Share of positions that are hidden ("Never Train from Scratch", section 4 and appendix).
MASKED = {"listops": 0.1, "text": 0.15, "retrieval": 0.15, "speech": 0.25}
MASKED_PIXELS = 0.5
# Tasks whose values are restored as one of 256 grey levels instead of as numbers.
LEVELS = {"pathfinder": 256, "pathx": 256}


@dataclass(frozen=True)
class Setting:
    """Arguments of `SequenceClassifier` (but for what the data decides), training, and learning rate before labels."""

    config: dict[str, Any]
    training: Training
    pretrain_lr: float = 1e-3


def setting(task: str, family: str, profile: str, pretrain: str = "none") -> Setting:
    """The row of a table; `family` is one of FAMILIES, or anything else for a mixer with options of its own.

    Args:
        pretrain: the objective of a training without labels that comes before, if any.
    """
    if profile != "full":
        return _small(task, family)
    row = _full(task, family, causal=pretrain == "causal")
    if pretrain == "none" or family not in ("s4", "s4d"):
        return row
    lr = _S4_AFTER.get(task, 1e-3)
    warmup = min(row.training.warmup, 5_000)
    training = replace(row.training, lr=lr, dynamics_lr=min(1e-3 / lr, 1.0), warmup=warmup, final_lr=1.0)
    return replace(row, training=training)


# ---- full ----------------------------------------------------------------------------------------------------------

# lr, batch, warm-up, steps; every rate of the state space is 1e-3 (S4 repository, configs/experiment/lra).
_S4 = {
    "listops": (0.01, 32, 12_000, 120_000),
    "text": (0.01, 16, 5_000, 50_000),
    "retrieval": (0.01, 64, 5_000, 50_000),
    "image": (0.01, 50, 18_000, 180_000),
    "pathfinder": (0.004, 64, 50_000, 500_000),
    "pathx": (0.001, 16, 50_000, 500_000),
    "cifar": (0.01, 50, 900, 180_000),
    "speech": (0.01, 16, 1_000, 200_000),
    # Ours.
    "fashion": (0.01, 50, 1_000, 100_000),
    "mnist": (0.01, 50, 1_000, 100_000),
    "digits": (0.01, 50, 100, 2_000),
}
# Here the steps learn at the rate of the other weights.
_GLOBAL_DT = ("listops", "text", "retrieval")

# batch, epochs, rate of the state space, factor for the rest, weight decay, and which parameters are treated as others
# (S5, tables 11 and 12); the warm-up is one epoch but for Text.
_S5: dict[str, tuple[int, int, float, float, float, str]] = {
    "listops": (50, 40, 1e-3, 3, 0.04, "B like weights"),
    "text": (50, 35, 1e-3, 4, 0.07, "steps like weights"),
    "retrieval": (32, 20, 1e-3, 2, 0.05, "steps like weights"),
    "image": (50, 250, 1e-3, 4.5, 0.07, "B like weights"),
    "pathfinder": (64, 200, 9e-4, 5, 0.03, ""),
    "pathx": (32, 75, 6e-4, 3, 0.06, "B decays"),
    "speech": (16, 40, 2e-3, 4, 0.04, "C like states"),
    # Ours.
    "cifar": (50, 250, 1e-3, 4.5, 0.07, "B like weights"),
    "fashion": (50, 100, 1e-3, 4.5, 0.07, "B like weights"),
    "mnist": (50, 100, 1e-3, 4.5, 0.07, "B like weights"),
    "digits": (50, 100, 1e-3, 4.5, 0.07, "B like weights"),
}

# Learning rates of Transformers, before labels and with them.
_TRANSFORMER = {
    "listops": (1e-3, 1e-4),
    "text": (5e-4, 1e-4),
    "retrieval": (5e-3, 5e-4),
    "image": (1e-3, 1e-3),
    "pathfinder": (1e-3, 5e-4),
    "pathx": (5e-4, 5e-4),
    # Ours.
    "cifar": (1e-3, 1e-3),
    "fashion": (1e-3, 1e-3),
    "mnist": (1e-3, 1e-3),
    "digits": (1e-3, 1e-3),
    "speech": (5e-4, 5e-4),
}
# S4 around pre-training: its rate, and that of what follows, constant after the warm-up; 1e-3 elsewhere.
_S4_BEFORE = {"text": 5e-4, "retrieval": 5e-4}
_S4_AFTER = {"text": 5e-4, "retrieval": 5e-4}


def _protocol(**options: Any) -> Training:
    """What all rows share: no clipping, AdamW's own betas, a cosine down to zero."""
    return Training(**{"clip": 0.0, "beta2": 0.999, "final_lr": 0.0, "log_every": 10, **options})


def _full(task: str, family: str, *, causal: bool) -> Setting:
    like = _LIKE.get(task, task)
    lr, batch, warmup, steps = _S4[task]
    every = {"eval_every": max(steps // 100, 1), "checkpoint_every": max(steps // 100, 1)}
    common = {"batch_size": batch, "warmup": warmup, "steps": steps, **every}
    if family in ("s4", "s4d"):
        special = {"log_dt": {"lr": 1.0}} if task in _GLOBAL_DT else {}
        training = _protocol(lr=lr, weight_decay=0.05, dynamics_lr=1e-3 / lr, special=special, **common)
        return Setting(published.config(family, like), training, _S4_BEFORE.get(task, 1e-3))
    if family == "s5":
        return Setting(published.config("s5", like), _s5_training(task, causal=causal))
    if family == "transformer":
        before, rate = _TRANSFORMER[task]
        decay = 0.1 if task == "text" else 0.0
        training = _protocol(lr=rate, weight_decay=decay, **{**common, "warmup": 5_000, "final_lr": 1.0})
        return Setting(published.config("transformer", like), training, before)
    # Ours: the width and depth of S4, and the habits of language models.
    config = {**_plain(published.config("s4", like)), "mixer": family, "norm": "rms"}
    training = _protocol(lr=1e-3, weight_decay=0.05, **common)
    return Setting(config, replace(training, clip=1.0, beta2=0.95))


def _plain(config: dict[str, Any]) -> dict[str, Any]:
    return {name: config[name] for name in ("d_model", "n_layer", "dropout", "head") if name in config}


def _s5_training(task: str, *, causal: bool) -> Training:
    batch, epochs, rate, factor, decay, rule = _S5[task]
    epoch = SAMPLES[task] // batch
    readouts = ("C",) if causal else ("C1", "C2")
    special: dict[str, dict[str, float]] = {
        "B like weights": {"B": {"lr": 1.0, "weight_decay": decay}},
        "steps like weights": {"log_step": {"lr": 1.0, "weight_decay": decay}},
        "B decays": {"B": {"weight_decay": decay}},
        "C like states": {name: {"lr": 1 / factor, "weight_decay": 0.0} for name in readouts},
        "": {},
    }[rule]
    return _protocol(
        lr=rate * factor, dynamics_lr=1 / factor, weight_decay=decay, special=special, batch_size=batch,
        steps=epoch * epochs, warmup=0 if task == "text" else epoch, eval_every=epoch, checkpoint_every=epoch,
    )  # fmt: skip


# ---- small (ours) --------------------------------------------------------------------------------------------------

# Width, layers, batch, steps.
_SIZES = {
    "listops": (64, 4, 32, 8_000),
    "text": (64, 2, 16, 2_000),
    "retrieval": (64, 2, 8, 2_000),
    "image": (64, 4, 32, 4_000),
    "pathfinder": (64, 4, 32, 6_000),
    "pathx": (32, 4, 4, 4_000),
    "cifar": (64, 4, 32, 4_000),
    "fashion": (64, 4, 32, 4_000),
    "mnist": (64, 4, 32, 4_000),
    "speech": (32, 4, 8, 3_000),
    "digits": (32, 2, 32, 600),
}
_STATE = 16
_RATES = {"s4": 0.01, "s4d": 0.01, "s5": 4e-3, "transformer": 1e-3}


def _small(task: str, family: str) -> Setting:
    width, layers, batch, steps = _SIZES[task]
    config: dict[str, Any] = {"d_model": width, "n_layer": layers}
    if task == "retrieval":
        config["head"] = "pair"
    lr = _RATES.get(family, 2e-3)
    if family in ("s4", "s4d"):
        config |= {"mixer": {"name": f"bidirectional_{family}", "d_state": _STATE}, "norm": "batch"}
    elif family == "s5":
        config |= {"mixer": {"name": "bidirectional_s5", "d_state": width, "blocks": 4}, "norm": "batch"}
    elif family == "transformer":
        config |= published.transformer(layers, width, max(width // 16, 1), 2 * width)
    else:
        options = {"mamba": {"d_state": _STATE}, "mamba2": {"d_state": 32, "head_dim": 16}}.get(family, {})
        config |= {"mixer": {"name": family, **options}, "norm": "rms"}
    every = max(steps // 10, 1)  # validating costs minutes too
    own = {"dynamics_lr": 1e-3 / lr} if family in ("s4", "s4d", "s5") else {"clip": 1.0}
    training = _protocol(
        lr=lr, weight_decay=0.05, steps=steps, batch_size=batch, warmup=steps // 20, eval_every=every,
        checkpoint_every=every, **own,
    )  # fmt: skip
    return Setting(config, training, lr)
