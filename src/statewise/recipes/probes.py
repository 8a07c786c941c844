"""Small generated tasks that show what a mixer can and cannot do."""

from __future__ import annotations

from typing import Any

from ..training.options import Training
from .models import ModelChoice, build_language_model
from .recipe import Recipe

SMALL = {"mamba2": {"d_state": 64, "head_dim": 32}}


def _probe(
    name: str, data: Any, model: ModelChoice, d_model: int, n_layer: int, training: Training, options: Any
) -> Recipe:
    import torch

    from ..tasks import Recall
    from .report import finish_probe

    torch.manual_seed(training.seed)
    net = build_language_model(
        model, data.vocab_size, d_model=d_model, n_layer=n_layer, default_width=64, default_depth=2, small=SMALL
    )
    options = {"model": model, "d_model": d_model, "n_layer": n_layer, **options}
    return Recipe(name, net, data, Recall(net, data.vocab_size), training, options, finish_probe)


def selective_copying(
    *,
    model: ModelChoice = "mamba",
    d_model: int = 64,
    n_layer: int = 2,
    length: int = 64,
    n_copy: int = 8,
    n_symbols: int = 16,
    training: Training = Training(steps=2000, batch_size=32, lr=3e-3, warmup=100),  # noqa: B008
) -> Recipe:
    """Selective copying: give back, in order, the symbols that stood among noise (needs selection).

    Args:
        model: a mixer (see `statewise list`), or a comma-separated pattern of mixers for a hybrid
        d_model: width
        n_layer: number of layers
        length: positions with symbols and noise
        n_copy: symbols to give back
        n_symbols: different symbols
    """
    from ..data.probes import SelectiveCopyingData

    data = SelectiveCopyingData(training.batch_size, length, n_copy, n_symbols, seed=training.seed)
    options = {"length": length, "n_copy": n_copy, "n_symbols": n_symbols}
    return _probe("probes.selective_copying", data, model, d_model, n_layer, training, options)


def mqar(
    *,
    model: ModelChoice = "mamba2",
    d_model: int = 64,
    n_layer: int = 2,
    length: int = 64,
    n_pairs: int = 8,
    vocab_size: int = 256,
    gap_power: float | None = None,
    training: Training = Training(steps=1000, batch_size=64, lr=1e-2, warmup=100),  # noqa: B008
) -> Recipe:
    """Multi-query associative recall: pairs of key and value, then each key asks for its value.

    Args:
        model: a mixer (see `statewise list`), or a comma-separated pattern of mixers for a hybrid
        d_model: width
        n_layer: number of layers
        length: tokens of a row, at least three per pair
        n_pairs: pairs to remember
        vocab_size: keys and values, half of each
        gap_power: queries follow the power law of the papers, with this exponent (0.01 there); anywhere if not given
    """
    from ..data.probes import MQARData

    data = MQARData(training.batch_size, length, n_pairs, vocab_size, gap_power, seed=training.seed)
    options = {"length": length, "n_pairs": n_pairs, "vocab_size": vocab_size, "gap_power": gap_power}
    return _probe("probes.mqar", data, model, d_model, n_layer, training, options)
