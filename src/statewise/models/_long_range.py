"""Classifiers of the Long Range Arena and its neighbours, as their papers have them.

`config(family, task)` is the constructor's arguments but for what the data decides (number of classes, vocabulary or
channels). Presets are those of which a parameter count is known.
"""

from __future__ import annotations

from typing import Any

from ._cards import Card, Preset

TASKS = ("listops", "text", "retrieval", "image", "pathfinder", "pathx", "cifar", "speech")


def _s4(name: str, width: int, n_state: int, n_ssm: int, prenorm: bool, dropout: float = 0.0, **rest: Any) -> dict:
    mixer = {"name": name, "d_state": n_state, "n_ssm": n_ssm, "dropout": dropout}
    mixer |= {key: rest.pop(key) for key in ("dt_min",) if key in rest}
    return {
        "d_model": width, "n_layer": 6, "mixer": mixer, "norm": "batch", "prenorm": prenorm, "dropout": dropout, **rest,
    }  # fmt: skip


# Width, N, number of different systems, pre-norm, ... (S4: state-spaces/s4, configs/experiment/lra; the same for S4D).
_S4: dict[str, tuple[tuple, dict[str, Any]]] = {
    "listops": ((256, 4, 1, False), {}),
    "text": ((256, 4, 1, True), {}),
    "retrieval": ((256, 4, 1, True), {"head": "pair"}),
    "image": ((512, 64, 1, False, 0.1), {}),
    "pathfinder": ((256, 64, 256, True), {}),
    "pathx": ((256, 64, 256, True), {"dt_min": 1e-4}),
    "cifar": ((512, 64, 2, False, 0.1), {"norm": "layer"}),
    "speech": ((128, 64, 2, True), {}),
}


def _s5(layers: int, width: int, P: int, J: int, c_init: str, act: str, dropout: float = 0.0, **rest: Any) -> dict:
    mixer = {
        "name": "bidirectional_s5", "d_state": P, "blocks": J, "c_init": c_init, "activation": act, "dropout": dropout,
    }  # fmt: skip
    mixer |= {key: rest.pop(key) for key in ("dt_min", "clip_eigs") if key in rest}
    return {"d_model": width, "n_layer": layers, "mixer": mixer, "norm": "batch", "final_norm": False, **rest}


_LECUN, _TRUNC = "lecun_normal", "trunc_standard_normal"
# Layers, width, P, J, C init, activation, dropout (S5, tables 11 and 12). Tokens enter a dense layer with a bias.
_S5: dict[str, tuple[tuple, dict[str, Any]]] = {
    "listops": ((8, 128, 16, 8, _LECUN, "half_glu2"), {"token_bias": True}),
    "text": ((6, 256, 192, 12, _LECUN, "half_glu2", 0.1), {"token_bias": True}),
    "retrieval": ((6, 128, 256, 16, _TRUNC, "half_glu1"), {"token_bias": True, "head": "pair"}),
    "image": ((6, 512, 384, 3, _LECUN, "half_glu1", 0.1), {"clip_eigs": True}),
    "pathfinder": ((6, 192, 256, 8, _TRUNC, "half_glu1", 0.05), {}),
    "pathx": ((6, 128, 256, 16, "complex_normal", "half_glu1"), {"dt_min": 1e-4}),
    # Not in the paper's tables: as Image.
    "cifar": ((6, 512, 384, 3, _LECUN, "half_glu1", 0.1), {"clip_eigs": True}),
    "speech": ((6, 96, 128, 16, _LECUN, "half_glu1", 0.1), {}),
}

# Layers, width, heads, hidden over width ("Never Train from Scratch", arXiv 2310.02980, appendix; rotary positions).
_TRANSFORMER: dict[str, tuple[int, int, int, int]] = {
    "listops": (6, 512, 8, 4),
    "text": (6, 512, 8, 4),
    "retrieval": (4, 128, 4, 4),
    "image": (3, 64, 4, 2),
    "pathfinder": (4, 128, 8, 1),
    "pathx": (4, 128, 4, 1),
    "cifar": (3, 64, 4, 2),
    "speech": (4, 128, 4, 4),
}


# What is particular to a task: two layers after pooling, or blocks of attention where a row is too long for all pairs.
_OWN: dict[str, dict[str, Any]] = {
    "text": {"head": "mlp"},
    "retrieval": {"head": "pair"},
    "image": {"head": "mlp"},
    "pathx": {"block": 4096, "pool": "max"},
}


def transformer(
    layers: int, width: int, heads: int, hidden: int, block: int | None = None, **rest: Any
) -> dict[str, Any]:
    """A Transformer encoder with rotary positions; `hidden` is the width of its MLPs, `block` of its attention."""
    return {
        "d_model": width,
        "n_layer": layers,
        "mixer": {"name": "bidirectional_attention", "n_heads": heads, **({"block": block} if block else {})},
        "mlp": {"name": "mlp", "hidden": hidden, "bias": True, "activation": "gelu"},
        **rest,
    }


def config(family: str, task: str) -> dict[str, Any]:
    """Arguments of `SequenceClassifier` for "s4", "s4d", "s5" or "transformer" on one of TASKS."""
    if family in ("s4", "s4d"):
        row, rest = _S4[task]
        made = _s4(f"bidirectional_{family}", *row, **rest)
        # S4 always trains B; in S4D it is an option, which the authors' experiments take.
        return made if family == "s4" else {**made, "mixer": {**made["mixer"], "train_b": True}}
    if family == "s5":
        row, rest = _S5[task]
        return _s5(*row, **rest)
    if family == "transformer":
        layers, width, heads, times = _TRANSFORMER[task]
        return transformer(layers, width, heads, times * width, **_OWN.get(task, {}))
    raise KeyError(family)


_ABOUT = {
    "s4": ("arXiv 2111.00396", 2021, "S4"),
    "s5": ("arXiv 2208.04933", 2022, "S5"),
}
# What the data decides: number of classes, then vocabulary or channels.
_LISTOPS, _LISTOPS_S5 = {"n_outputs": 10, "vocab_size": 18}, {"n_outputs": 10, "vocab_size": 20}
_IMAGE, _TWO = {"n_outputs": 10, "channels": 1}, {"n_outputs": 2, "channels": 1}
_COLOUR, _WORDS = {"n_outputs": 10, "channels": 3}, {"n_outputs": 35, "channels": 1}

_COUNTS: tuple[tuple[str, str, str, int, dict[str, Any]], ...] = (
    ("s4", "listops", "ListOps", 815_186, _LISTOPS),
    ("s4", "image", "grey CIFAR-10, pixel by pixel", 3_564_682, _IMAGE),
    ("s4", "pathfinder", "Pathfinder", 1_288_706, _TWO),
    ("s4", "pathx", "Path-X", 1_288_706, _TWO),
    ("s4", "cifar", "colour CIFAR-10, pixel by pixel", 3_566_858, _COLOUR),
    ("s4", "speech", "Speech Commands 35", 306_851, _WORDS),
    ("s5", "listops", "ListOps", 188_490, _LISTOPS_S5),
    ("s5", "text", "IMDB, character by character", 1_321_154, {"n_outputs": 2, "vocab_size": 135}),
    ("s5", "image", "grey CIFAR-10, pixel by pixel", 5_133_706, _IMAGE),
    ("s5", "pathfinder", "Pathfinder", 1_113_602, _TWO),
    ("s5", "pathx", "Path-X", 694_018, _TWO),
    ("s5", "speech", "Speech Commands 35", 283_523, _WORDS),
)


def _presets() -> dict[str, Preset]:
    found = {}
    for family, task, what, parameters, sizes in _COUNTS:
        paper, year, name = _ABOUT[family]
        card = Card(paper, year, parameters, "Apache-2.0" if family == "s4" else "MIT", f"{name} classifier: {what}")
        found[f"{family}-{task}"] = Preset("sequence_classifier", card, {**sizes, **config(family, task)})
    example = {
        **_COLOUR,
        "d_model": 128, "n_layer": 4, "mixer": {"name": "s4d", "init": "lin", "dropout": 0.1}, "prenorm": False,
        "dropout": 0.1,
    }  # fmt: skip
    card = Card("arXiv 2206.11893", 2022, 201_482, "Apache-2.0", "S4D classifier: colour CIFAR-10, the small example")
    return {**found, "s4d-example": Preset("sequence_classifier", card, example)}


PRESETS = _presets()
