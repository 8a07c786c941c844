"""Byte-level language models."""

from __future__ import annotations

from ..data.text import TextOptions
from ..training.options import Training
from .models import ModelChoice, build_language_model
from .recipe import Recipe

# The default of 128 suits models a hundred times larger; here the time goes further in width and steps.
SMALL = {"mamba2": {"d_state": 64}}


def language_bytes(
    *,
    model: ModelChoice = "mamba2",
    d_model: int | None = None,
    n_layer: int | None = None,
    length: int = 256,
    data: TextOptions = TextOptions(),  # noqa: B008
    training: Training = Training(steps=600, batch_size=8, lr=4e-3, weight_decay=0.5),  # noqa: B008
) -> Recipe:
    """Language model over the bytes of a text; with no options about three minutes on two CPU cores.

    Args:
        model: a mixer (see `statewise list`), a preset such as mamba2-130m, or a comma-separated pattern of mixers
            for a hybrid, e.g. mamba2,mamba2,attention
        d_model: width; 192, or the preset's own, if not given
        n_layer: number of layers; 4, or the preset's own, if not given
        length: bytes per row
    """
    from dataclasses import asdict

    import torch

    from ..data.language import N_BYTES, ByteData
    from ..tasks import CausalLM
    from .report import finish_language

    # Data first: a mistake in a path should not wait for a large model to be built.
    text = ByteData.from_options(data, training.batch_size, length, training.seed)
    torch.manual_seed(training.seed)
    net = build_language_model(
        model, N_BYTES, d_model=d_model, n_layer=n_layer, default_width=192, default_depth=4, small=SMALL
    )
    options = {"model": model, "d_model": d_model, "n_layer": n_layer, "length": length, "data": asdict(data)}
    return Recipe("language.bytes", net, text, CausalLM(net, N_BYTES), training, options, finish_language)
