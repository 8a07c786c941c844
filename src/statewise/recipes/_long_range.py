"""Which model and which training each classification recipe takes, if nothing else is said. Data only.

"full" holds what the papers publish as their best: S4 and S4D from the S4 repository, S5 from its paper, Transformers
from "Never Train from Scratch". Rows without a source are ours, and say so. "small" is sized for two CPU cores.
"""

from __future__ import annotations

from dataclasses import replace
from typing import Any

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
MASKED = {"listops": 0.1, "speech": 0.25}
MASKED_PIXELS, MASKED_TOKENS = 0.5, 0.15
# Tasks whose values are restored as one of 256 grey levels instead of as numbers.
LEVELS = {"pathfinder": 256, "pathx": 256}


def config(task: str, family: str, profile: str) -> dict[str, Any]:
    """Arguments of `SequenceClassifier` but for what the data decides.

    Args:
        family: one of FAMILIES, or a mixer that has no row of its own.
    """
    return _full_config(task, family) if profile == "full" else _small_config(task, family)


def training(task: str, family: str, profile: str, pretrain: str = "none") -> Training:
    """How that model is trained.

    Args:
        pretrain: the objective of a training without labels that comes before, if any.
    """
    if profile != "full":
        return _small_training(task, family)
    found = _full_training(task, family, causal=pretrain == "causal")
    if pretrain == "none" or family not in ("s4", "s4d"):
        return found
    lr, warmup = _S4_AFTER.get(task, 1e-3), min(found.warmup, 5_000)
    return replace(found, lr=lr, dynamics_lr=min(1e-3 / lr, 1.0), warmup=warmup, final_lr=1.0)


def pretrain_lr(task: str, family: str, profile: str) -> float:
    """Its learning rate before labels."""
    if profile != "full":
        return _small_training(task, family).lr
    if family == "transformer":
        return _TRANSFORMER[task][0]
    return _S4_BEFORE.get(task, 1e-3) if family in ("s4", "s4d") else 1e-3


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

# Learning rates before labels and with them, batch, epochs, warm-up ("Never Train from Scratch": the rates from the
# paper, the rest from configs/experiment/lra of its code).
_TRANSFORMER = {
    "listops": (1e-3, 1e-4, 32, 100, 2_000),
    "text": (5e-4, 1e-4, 32, 65, 2_000),
    "retrieval": (5e-3, 5e-4, 32, 32, 5_000),
    "image": (1e-3, 1e-3, 50, 200, 2_000),
    "pathfinder": (1e-3, 5e-4, 32, 200, 5_000),
    "pathx": (5e-4, 5e-4, 32, 200, 5_000),
    # Ours.
    "cifar": (1e-3, 1e-3, 50, 200, 2_000),
    "fashion": (1e-3, 1e-3, 50, 100, 2_000),
    "mnist": (1e-3, 1e-3, 50, 100, 2_000),
    "digits": (1e-3, 1e-3, 50, 80, 100),
    "speech": (5e-4, 5e-4, 16, 40, 2_000),
}
# S4 around pre-training: its rate, and that of what follows, constant after the warm-up; 1e-3 elsewhere.
_S4_BEFORE = {"text": 5e-4, "retrieval": 5e-4}
_S4_AFTER = {"text": 5e-4, "retrieval": 5e-4}


def _protocol(**options: Any) -> Training:
    """What all rows share: no clipping, AdamW's own betas, a cosine down to zero."""
    return Training(**{"clip": 0.0, "beta2": 0.999, "final_lr": 0.0, "log_every": 10, **options})


def _full_config(task: str, family: str) -> dict[str, Any]:
    # Not at the top: it needs PyTorch, and the command line prints help without.
    from ..models import _long_range as published

    like = _LIKE.get(task, task)
    if family in ("s4", "s4d", "s5", "transformer"):
        return published.config(family, like)
    # Ours: the width and depth of S4, with the norm of language models.
    base = published.config("s4", like)
    kept: dict[str, Any] = {name: base[name] for name in ("d_model", "n_layer", "dropout", "head") if name in base}
    return {**kept, "mixer": family, "norm": "rms"}


def _full_training(task: str, family: str, *, causal: bool) -> Training:
    if family == "s5":
        return _s5_training(task, causal=causal)
    if family == "transformer":
        return _transformer_training(task)
    lr, batch, warmup, steps = _S4[task]
    every = max(steps // 100, 1)
    common = _protocol(
        batch_size=batch, warmup=warmup, steps=steps, eval_every=every, checkpoint_every=every, weight_decay=0.05
    )
    if family in ("s4", "s4d"):
        groups = {"log_dt": {"lr": 1.0}} if task in _GLOBAL_DT else {}
        return replace(common, lr=lr, dynamics_lr=1e-3 / lr, groups=groups)
    # Ours: the steps of S4, and the habits of language models.
    return replace(common, lr=1e-3, clip=1.0, beta2=0.95)


def _transformer_training(task: str) -> Training:
    _, lr, batch, epochs, warmup = _TRANSFORMER[task]
    steps = SAMPLES[task] // batch * epochs
    every = max(steps // 100, 1)
    return _protocol(
        lr=lr, batch_size=batch, steps=steps, warmup=warmup, final_lr=1.0, weight_decay=0.1 if task == "text" else 0.0,
        eval_every=every, checkpoint_every=every,
    )  # fmt: skip


def _s5_training(task: str, *, causal: bool) -> Training:
    batch, epochs, rate, factor, decay, rule = _S5[task]
    epoch = SAMPLES[task] // batch
    readouts = ("C",) if causal else ("C1", "C2")
    groups: dict[str, dict[str, float]] = {
        "B like weights": {"B": {"lr": 1.0, "weight_decay": decay}},
        "steps like weights": {"log_step": {"lr": 1.0, "weight_decay": decay}},
        "B decays": {"B": {"weight_decay": decay}},
        "C like states": {name: {"lr": 1 / factor, "weight_decay": 0.0} for name in readouts},
        "": {},
    }[rule]
    return _protocol(
        lr=rate * factor, dynamics_lr=1 / factor, weight_decay=decay, groups=groups, batch_size=batch,
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


def _small_config(task: str, family: str) -> dict[str, Any]:
    from ..models import _long_range as published

    width, layers, _, _ = _SIZES[task]
    made: dict[str, Any] = {"d_model": width, "n_layer": layers}
    if task == "retrieval":
        made["head"] = "pair"
    if family in ("s4", "s4d"):
        return {**made, "mixer": {"name": f"bidirectional_{family}", "d_state": _STATE}, "norm": "batch"}
    if family == "s5":
        return {**made, "mixer": {"name": "bidirectional_s5", "d_state": width, "blocks": 4}, "norm": "batch"}
    if family == "transformer":
        block = 512 if task == "pathx" else None  # of 16,384 tokens a tenth is seen
        return {**made, **published.transformer(layers, width, max(width // 16, 1), 2 * width, block)}
    options = {"mamba": {"d_state": _STATE}, "mamba2": {"d_state": 32, "head_dim": 16}}.get(family, {})
    return {**made, "mixer": {"name": family, **options}, "norm": "rms"}


def _small_training(task: str, family: str) -> Training:
    _, _, batch, steps = _SIZES[task]
    lr = _RATES.get(family, 2e-3)
    every = max(steps // 10, 1)  # validating costs minutes too
    own = {"dynamics_lr": 1e-3 / lr} if family in ("s4", "s4d", "s5") else {"clip": 1.0}
    return _protocol(
        lr=lr, weight_decay=0.05, steps=steps, batch_size=batch, warmup=steps // 20, eval_every=every,
        checkpoint_every=every, **own,
    )  # fmt: skip
