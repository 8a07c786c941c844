"""Checkpoints of `mamba_ssm`: against transformers where it has the model, else against a plain definition."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from torch.nn.functional import conv1d, linear, scaled_dot_product_attention

import statewise
from statewise.interop.checkpoints import convert
from statewise.models._tensors import open_tensors
from statewise.models.language import LanguageModel
from statewise.testing.parity import assert_close, sharpen


def write_theirs(folder: Path, config: dict[str, Any], tensors: dict[str, torch.Tensor], pickle: bool = False) -> Path:
    from safetensors.torch import save_file

    folder.mkdir(exist_ok=True)
    (folder / "config.json").write_text(json.dumps(config))
    tensors = {name: t.detach().clone() for name, t in tensors.items()}
    if pickle:
        torch.save(tensors, folder / "pytorch_model.bin")
    else:
        save_file(tensors, folder / "model.safetensors")
    return folder


def published(layer: str | None) -> tuple[dict[str, Any], Any, int]:
    """A config.json as the published ones are, the transformers model of the same sizes, and the rows."""
    transformers = pytest.importorskip("transformers", reason="the parity tests need transformers (extra: hf)")
    config: dict[str, Any] = {
        "d_model": 32, "n_layer": 2, "vocab_size": 99, "ssm_cfg": {}, "rms_norm": True, "residual_in_fp32": True,
        "fused_add_norm": True, "pad_vocab_size_multiple": 8,
    }  # fmt: skip
    sizes = {"vocab_size": 104, "hidden_size": 32, "num_hidden_layers": 2}
    if layer is None:  # the first published files have no more than these fields
        return config, transformers.MambaForCausalLM(transformers.MambaConfig(**sizes)), 104
    config |= {
        "d_intermediate": 0, "attn_layer_idx": [], "attn_cfg": {}, "tie_embeddings": True,
        "ssm_cfg": {"layer": layer, "headdim": 16, "d_state": 8},
    }  # fmt: skip
    theirs = transformers.Mamba2Config(
        **sizes, head_dim=16, num_heads=4, state_size=8, n_groups=1, chunk_size=16, tie_word_embeddings=True
    )
    return config, transformers.Mamba2ForCausalLM(theirs), 104


@pytest.mark.parametrize("layer", [None, "Mamba2"])
@pytest.mark.parametrize("pickle", [False, True])
def test_published_kinds(layer, pickle, tmp_path):
    config, theirs, _ = published(layer)
    sharpen(theirs.eval(), torch.Generator().manual_seed(1))
    tensors = {name.replace("embeddings.", "embedding."): t for name, t in theirs.state_dict().items()}
    assert "lm_head.weight" in tensors  # mamba_ssm writes a tied head as well
    folder = write_theirs(tmp_path / "theirs", config, tensors, pickle)
    ours = statewise.load(folder, unsafe_pickle=pickle)
    assert ours.vocab_size == 99
    tokens = torch.randint(0, 99, (2, 21))
    with torch.no_grad():
        assert_close(ours(tokens), theirs(tokens, use_cache=False).logits[..., :99], "logits")

    convert(folder, tmp_path / "ours", to="statewise", unsafe_pickle=pickle)
    convert(tmp_path / "ours", tmp_path / "back", to="mamba_ssm", write_pickle=pickle)
    back = open_tensors(tmp_path / "back", unsafe_pickle=pickle)
    assert set(back) == set(tensors)
    assert all(torch.equal(back[name], t) for name, t in tensors.items())
    again = json.loads((tmp_path / "back/config.json").read_text())
    assert {**again, "ssm_cfg": None} == {
        "d_intermediate": 0, "attn_layer_idx": [], "attn_cfg": {}, "tie_embeddings": True, **config, "ssm_cfg": None,
    }  # fmt: skip

    convert(folder, tmp_path / "hf", to="transformers", unsafe_pickle=pickle)
    with torch.no_grad():
        logits = type(theirs).from_pretrained(tmp_path / "hf").eval()(tokens, use_cache=False).logits
        assert_close(logits, theirs(tokens, use_cache=False).logits, "logits in transformers")


ATTENTION = {
    "causal": True, "d_conv": 4, "head_dim": 10, "num_heads": 4, "num_heads_kv": 2, "out_proj_bias": False,
    "qkv_proj_bias": True, "rotary_emb_dim": 6,
}  # fmt: skip


def hybrid(**ssm: Any) -> dict[str, Any]:
    return {
        "d_model": 32, "d_intermediate": 100, "n_layer": 3, "vocab_size": 50, "attn_layer_idx": [1],
        "ssm_cfg": {"layer": "Mamba2", "headdim": 16, "d_state": 8, **ssm}, "attn_cfg": ATTENTION,
        "rms_norm": True, "residual_in_fp32": True, "pad_vocab_size_multiple": 16, "tie_embeddings": False,
    }  # fmt: skip


def attention_by_definition(x: torch.Tensor, t: dict[str, torch.Tensor]) -> torch.Tensor:
    """mamba_ssm's MHA, written out: one projection, a convolution, a part of each head turned, grouped heads."""
    (b, n, _), heads, groups, dim, turned = x.shape, 4, 2, 10, 6
    qkv = linear(x, t["in_proj.weight"], t["in_proj.bias"])
    channels = qkv.shape[-1]
    qkv = conv1d(qkv.mT, t["conv1d.weight"], t["conv1d.bias"], padding=3, groups=channels)[..., :n].mT
    q, kv = qkv.split([heads * dim, 2 * groups * dim], -1)
    q = q.view(b, n, heads, dim)
    k, v = kv.view(b, n, 2, groups, dim).unbind(2)
    angle = torch.arange(n)[:, None] * 10000.0 ** (-torch.arange(0, turned, 2) / turned)
    cos, sin = angle.cos()[:, None], angle.sin()[:, None]

    def turn(y: torch.Tensor) -> torch.Tensor:
        first, second, rest = y[..., : turned // 2], y[..., turned // 2 : turned], y[..., turned:]
        return torch.cat([first * cos - second * sin, first * sin + second * cos, rest], -1)

    q, k = turn(q), turn(k)
    k, v = (y.repeat_interleave(heads // groups, 2) for y in (k, v))
    y = scaled_dot_product_attention(*(s.transpose(1, 2) for s in (q, k, v)), is_causal=True)
    return linear(y.transpose(1, 2).flatten(2), t["out_proj.weight"])


@pytest.mark.parametrize("ssm", [{}, {"D_has_hdim": True, "rmsnorm": False}, {"norm_before_gate": True, "ngroups": 2}])
def test_hybrids(ssm, tmp_path):
    """The attention layer against its definition, and the whole to the bit."""
    mixer = {
        "name": "mamba2", "head_dim": 16, "d_state": 8, "skip_per_channel": ssm.get("D_has_hdim", False),
        "rmsnorm": ssm.get("rmsnorm", True), "norm_before_gate": ssm.get("norm_before_gate", False),
        "n_groups": ssm.get("ngroups", 1),
    }  # fmt: skip
    attention = {
        "name": "attention", "n_heads": 4, "n_kv_heads": 2, "head_dim": 10, "rope_dim": 6, "d_conv": 4, "bias": True,
        "out_bias": False,
    }  # fmt: skip
    ours = LanguageModel(
        50, 32, 3, mixer=[mixer, attention, mixer], d_intermediate=100, tie_embeddings=False, pad_vocab_to=16
    ).eval()
    sharpen(ours, torch.Generator().manual_seed(1))
    ours.save_pretrained(tmp_path / "ours")
    convert(tmp_path / "ours", tmp_path / "theirs", to="mamba_ssm")
    config = json.loads((tmp_path / "theirs/config.json").read_text())
    assert config["attn_cfg"] == {**ATTENTION, "rotary_emb_base": 10000.0, "softmax_scale": None}
    assert (config["vocab_size"], config["pad_vocab_size_multiple"]) == (50, 16)
    theirs = open_tensors(tmp_path / "theirs")
    assert theirs["backbone.layers.1.mixer.in_proj.weight"].shape == (80, 32)
    assert theirs["backbone.layers.0.mixer.D"].shape == ((64,) if mixer["skip_per_channel"] else (4,))

    # As another hand would write the configuration.
    again = statewise.load(write_theirs(tmp_path / "own", hybrid(**ssm), {name: theirs[name] for name in theirs}))
    tokens = torch.randint(0, 50, (2, 17))
    assert torch.equal(again(tokens), ours(tokens))
    prefix = "backbone.layers.1.mixer."
    t = {name.removeprefix(prefix): theirs[name] for name in theirs if name.startswith(prefix)}
    x = torch.randn(2, 13, 32)
    assert_close(ours.blocks[1].mixer(x), attention_by_definition(x, t), "attention")


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"rms_norm": False}, "rms_norm: want True"),
        ({"ssm_cfg": {"layer": "Mamba3"}}, "layer: want 'Mamba1' or 'Mamba2' .*got 'Mamba3'"),
        ({"ssm_cfg": {"layer": "Mamba2", "head_dim": 16}}, "unknown field 'head_dim'; did you mean 'headdim'"),
        ({"ssm_cfg": {"layer": "Mamba2", "d_ssm": 32, "headdim": 16}}, "d_ssm: want None or 64"),
        ({"ssm_cfg": [1]}, "ssm_cfg: want an object"),
        ({"attn_cfg": {**ATTENTION, "causal": False}}, "causal: want True"),
        ({"attn_cfg": {**ATTENTION, "rotary_emb_interleaved": True}}, "rotary_emb_interleaved: want False"),
        ({"attn_layer_idx": [3]}, "attn_layer_idx: want a list of integers from 0 to 2"),
        ({"n_layer": 10**9}, "n_layer: want an integer from 0 to 10000"),
        ({"d_model": -32}, "d_model: want an integer from 1"),
        ({"vocab_size": 1e3}, "vocab_size: want an integer"),
    ],
)
def test_configurations_that_cannot_be_served(change, message, tmp_path):
    folder = write_theirs(tmp_path / "theirs", hybrid() | change, {"x": torch.zeros(1)})
    with pytest.raises(ValueError, match=message):
        statewise.load(folder)
