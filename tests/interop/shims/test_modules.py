"""The modules of mamba_ssm: parameter names, inference states, documents, weights on the disk."""

from __future__ import annotations

import copy
import json

import pytest
import shim_definitions as plain
import torch
from shim_definitions import assert_near, check, randn
from torch import nn
from torch.nn.functional import layer_norm

from statewise import mixers

D = 16
MAMBA = {
    "A_log", "D", "in_proj.weight", "conv1d.weight", "conv1d.bias", "x_proj.weight", "dt_proj.weight", "dt_proj.bias",
    "out_proj.weight",
}  # fmt: skip
BACKWARDS = {"A_b_log", "D_b", "conv1d_b.weight", "conv1d_b.bias", "x_proj_b.weight", "dt_proj_b.weight",
             "dt_proj_b.bias"}  # fmt: skip
MAMBA2 = {"A_log", "D", "dt_bias", "in_proj.weight", "conv1d.weight", "conv1d.bias", "norm.weight", "out_proj.weight"}


def build(kind, **options):
    torch.manual_seed(0)
    if kind == "Mamba":
        from mamba_ssm import Mamba as cls
    elif kind == "Mamba2":
        from mamba_ssm import Mamba2 as cls

        options = {"headdim": 8, "d_state": 8, **options}
    else:
        from mamba_ssm.modules.mamba2_simple import Mamba2Simple as cls

        options = {"headdim": 8, "d_state": 8, **options}
    module = cls(D, **options)
    with torch.no_grad():
        for p in module.parameters():
            if p.ndim == 1:
                p.add_(0.1 * torch.randn_like(p))
    return module


@pytest.mark.parametrize(
    ("kind", "options", "names"),
    [
        ("Mamba", {}, MAMBA),
        ("Mamba", {"bias": True}, MAMBA | {"in_proj.bias", "out_proj.bias"}),
        ("Mamba", {"bimamba_type": "v1"}, MAMBA | {"A_b_log"}),
        ("Mamba", {"bimamba_type": "v2", "init_layer_scale": 0.1}, MAMBA | BACKWARDS | {"gamma"}),
        ("Mamba2", {}, MAMBA2),
        ("Mamba2", {"rmsnorm": False, "conv_bias": False}, MAMBA2 - {"norm.weight", "conv1d.bias"}),
        ("Mamba2Simple", {"learnable_init_states": True}, MAMBA2 | {"init_states"}),
    ],
)
def test_names_of_parameters_and_a_gradient_for_each(kind, options, names):
    module = build(kind, **options)
    assert set(module.state_dict()) == names
    assert module.conv1d.weight.shape[1] == 1  # (D, 1, K), as nn.Conv1d has it
    module(randn(2, 9, D)).square().sum().backward()
    assert all(p.grad is not None and p.grad.abs().sum() > 0 for p in module.parameters())
    assert module.A_log._no_weight_decay
    assert module.D._no_weight_decay


@pytest.mark.parametrize(("kind", "ours"), [("Mamba", mixers.Mamba), ("Mamba2", mixers.Mamba2)])
def test_the_same_as_our_mixers(kind, ours):
    module = build(kind)
    mixer = ours(D) if kind == "Mamba" else ours(D, head_dim=8, d_state=8)
    mixer.load_state_dict(
        {n: t.squeeze(1) if n == "conv1d.weight" else t for n, t in module.state_dict().items()}, strict=True
    )
    x = randn(2, 13, D)
    assert_near(module(x), mixer(x).double(), kind)


@pytest.mark.parametrize(
    ("kind", "options"),
    [
        ("Mamba", {}),
        ("Mamba2", {}),
        ("Mamba2", {"ngroups": 2, "rmsnorm": False}),
        ("Mamba2", {"d_ssm": 24, "D_has_hdim": True, "norm_before_gate": True}),
        ("Mamba2", {"dt_limit": (0.01, 0.5)}),
    ],
)
def test_prompt_and_steps_give_the_whole(kind, options):
    from mamba_ssm.utils.generation import InferenceParams

    module, x = build(kind, layer_idx=3, **options), randn(2, 12, D)
    want = module(x).double()
    for prompt in (1, 2, 9):  # also shorter than the convolution
        params = InferenceParams(max_seqlen=12, max_batch_size=2)
        with torch.no_grad():
            found = [module(x[:, :prompt], inference_params=params)]
            conv, ssm = params.key_value_memory_dict[3]
            for t in range(prompt, 12):
                params.seqlen_offset = t
                found.append(module(x[:, t : t + 1], inference_params=params))
        assert params.key_value_memory_dict[3][0] is conv, "the states are written in place"
        assert params.key_value_memory_dict[3][1] is ssm
        assert_near(torch.cat(found, 1), want, f"prompt of {prompt}")
    shapes = [tuple(t.shape) for t in module.allocate_inference_cache(2, 99)]
    assert shapes == [tuple(conv.shape), tuple(ssm.shape)]


def test_mamba2_takes_documents_in_a_row():
    from mamba_ssm.utils.generation import InferenceParams

    module, lengths = build("Mamba2", layer_idx=0), (5, 1, 7)
    xs = [randn(1, n, D, seed=n) for n in lengths]
    seq_idx = torch.repeat_interleave(torch.arange(3), torch.tensor(lengths))[None].int()
    packed = torch.cat(xs, 1)
    want = torch.cat([module(x) for x in xs], 1).double()
    assert_near(module(packed, seq_idx=seq_idx), want, "seq_idx")
    flat = module(packed[0], seqlen=13, seq_idx=seq_idx)
    assert_near(flat, want[0], "(B L, D) with seqlen")
    params = InferenceParams(max_seqlen=20, max_batch_size=3)
    with torch.no_grad():
        borders = torch.tensor([0, 5, 6, 13], dtype=torch.int32)
        y = module(packed, seq_idx=seq_idx, cu_seqlens=borders, inference_params=params)
        assert_near(y, want, "prompts in a row")
        params.seqlen_offset = 1
        more = randn(3, 1, D)
        y = module(more, inference_params=params)
        alone = [module(torch.cat([x, more[i : i + 1]], 1))[:, -1:] for i, x in enumerate(xs)]
        assert_near(y, torch.cat(alone).double(), "a token more for each")


def test_vision_mamba_scans_both_ways():
    x = randn(2, 9, D)
    for halve in (False, True):
        module = build("Mamba", bimamba_type="v2", if_divide_out=halve)
        forwards, backwards = build("Mamba"), build("Mamba")
        own = module.state_dict()
        forwards.load_state_dict({n: own[n] for n in MAMBA})
        renamed = {"A_b_log": "A_log", "D_b": "D"}
        back = {renamed.get(n, n.replace("_b.", ".")): own[n] for n in BACKWARDS}
        backwards.load_state_dict({**forwards.state_dict(), **back})
        want = forwards(x) + backwards(x.flip(1)).flip(1)
        assert_near(module(x), (want / 2 if halve else want).double(), "v2")
    with pytest.raises(ValueError, match="want 'none', 'v1' or 'v2', got 'v3'"):
        build("Mamba", bimamba_type="v3")


@pytest.mark.parametrize("rms", [False, True])
def test_layer_norm_fn(rms):
    from mamba_ssm.ops.triton.layernorm import layer_norm_fn

    inputs = {"x": randn(2, 5, D), "residual": randn(2, 5, D, seed=1), "weight": randn(D), "bias": randn(D)}

    def definition(x, residual, weight, bias):
        total = x + residual
        if rms:
            return plain.rms(total, weight, bias, eps=1e-6), total
        return layer_norm(total, (D,), weight, bias, eps=1e-6), total

    check(lambda **i: layer_norm_fn(**i, prenorm=True, is_rms_norm=rms), definition, inputs, "layer_norm_fn")
    half = inputs["x"].bfloat16()
    y, total = layer_norm_fn(half, inputs["weight"], None, prenorm=True, residual_in_fp32=True, is_rms_norm=rms)
    assert (y.dtype, total.dtype) == (torch.bfloat16, torch.float32)


@pytest.mark.parametrize("first", [False, True])
@pytest.mark.parametrize("group", [None, 4])
@pytest.mark.parametrize("with_bias", [False, True])
def test_gated_norm(first, group, with_bias):
    from mamba_ssm.ops.triton.layernorm_gated import _layer_norm_bwd, _layer_norm_fwd, rmsnorm_fn

    options = {"eps": 1e-5, "group_size": group, "norm_before_gate": first}
    inputs = {"x": randn(6, D), "weight": randn(D), "bias": randn(D) if with_bias else None, "z": randn(6, D, seed=1)}
    check(lambda **i: rmsnorm_fn(**i, **options), lambda **i: plain.rms(**i, **options), inputs, "rmsnorm_fn")
    leaves = {n: t.double().requires_grad_() for n, t in inputs.items() if t is not None}
    want = plain.rms(**leaves, **options)
    dy = randn(6, D, seed=2)
    grads = dict(zip(leaves, torch.autograd.grad(want, list(leaves.values()), dy.double())))
    y, _, _ = _layer_norm_fwd(**inputs, is_rms_norm=True, **options)
    assert_near(y, want, "_layer_norm_fwd")
    *found, y = _layer_norm_bwd(dy, **inputs, mean=None, rstd=None, is_rms_norm=True, recompute_output=True, **options)
    assert_near(y, want, "recomputed")
    for name, got in zip(("x", "weight", "bias", "z"), found):
        assert got is None if name not in grads else assert_near(got, grads[name], name) is None


# ---- the language model ----------------------------------------------------------------------------------------------

CONFIGS = {
    "mamba": {},
    "mamba2": {"ssm_cfg": {"layer": "Mamba2", "headdim": 8, "d_state": 8}},
    "hybrid": {
        "ssm_cfg": {"layer": "Mamba2", "headdim": 8, "d_state": 8}, "d_intermediate": 24, "attn_layer_idx": [1],
        "attn_cfg": {"num_heads": 4, "num_heads_kv": 2, "causal": True, "rotary_emb_dim": 4, "d_conv": 3,
                     "mlp_dim": 100},
    },
    "plain norm": {"rms_norm": False, "fused_add_norm": False, "residual_in_fp32": False},
}  # fmt: skip


def model(name):
    from mamba_ssm import MambaLMHeadModel
    from mamba_ssm.models.config_mamba import MambaConfig

    torch.manual_seed(0)
    return MambaLMHeadModel(MambaConfig(d_model=D, n_layer=3, vocab_size=29, **CONFIGS[name]))


@pytest.mark.parametrize("name", CONFIGS)
def test_generation_continues_the_whole(name):
    lm, ids = model(name), torch.randint(0, 29, (2, 11), generator=torch.Generator().manual_seed(0))
    want = lm(ids).logits
    assert want.shape == (2, 11, 32)  # the vocabulary is rounded up
    assert torch.equal(lm(ids, num_last_tokens=2).logits, want[:, -2:])
    out = lm.generate(ids[:, :4], 11, teacher_outputs=ids, output_scores=True, return_dict_in_generate=True)
    assert_near(torch.stack(out.scores, 1), want[:, 3:-1].double(), "scores")
    greedy = lm.generate(ids[:, :4], 9, vocab_size=29)
    again = ids[:, :4]
    for _ in range(5):
        again = torch.cat([again, lm(again).logits[:, -1:, :29].argmax(-1)], 1)
    assert torch.equal(greedy, again)


def test_sampling_and_stopping():
    from mamba_ssm.utils.generation import sample

    logits = torch.tensor([[0.0, 3.0, 2.0, -9.0]]).repeat(200, 1)
    torch.manual_seed(0)
    assert set(sample(logits, top_k=1).tolist()) == {1}
    assert set(sample(logits, top_k=2).tolist()) == {1, 2}
    assert set(sample(logits, top_k=0, top_p=0.5).tolist()) == {1}
    assert len(set(sample(logits, top_k=0, temperature=100.0).tolist())) == 4
    lm, ids = model("mamba"), torch.randint(0, 29, (1, 4), generator=torch.Generator().manual_seed(0))
    first = lm.generate(ids, 12)[0, 4]
    assert lm.generate(ids, 12, eos_token_id=int(first)).shape == (1, 5)


@pytest.mark.parametrize("name", CONFIGS)
def test_weights_on_the_disk(name, tmp_path):
    from mamba_ssm import MambaLMHeadModel

    lm, ids = model(name), torch.randint(0, 29, (1, 7))
    lm.save_pretrained(tmp_path)
    assert {p.name for p in tmp_path.iterdir()} == {"config.json", "model.safetensors"}
    assert json.loads((tmp_path / "config.json").read_text())["n_layer"] == 3
    again = MambaLMHeadModel.from_pretrained(str(tmp_path))
    assert torch.equal(again(ids).logits, lm(ids).logits)
    assert again.lm_head.weight is again.backbone.embedding.weight


def test_a_pickle_is_read_only_if_allowed(tmp_path):
    from mamba_ssm import MambaLMHeadModel

    from statewise.interop import install_shims

    lm = model("mamba")
    lm.save_pretrained(tmp_path)
    (tmp_path / "model.safetensors").unlink()
    torch.save(lm.state_dict(), tmp_path / "pytorch_model.bin")
    with pytest.raises(FileNotFoundError, match="is a pickle, which could run code"):
        MambaLMHeadModel.from_pretrained(str(tmp_path))
    install_shims(allow_pickle=True)
    MambaLMHeadModel.from_pretrained(str(tmp_path))
    torch.save({"weights": print}, tmp_path / "pytorch_model.bin")  # code, not tensors
    with pytest.raises(Exception, match=r"[Ww]eights"):
        MambaLMHeadModel.from_pretrained(str(tmp_path))
    (tmp_path / "pytorch_model.bin").unlink()
    with pytest.raises(FileNotFoundError, match="holds neither"):
        MambaLMHeadModel.from_pretrained(str(tmp_path))


def test_the_block_of_both_releases():
    from mamba_ssm.modules.block import Block
    from mamba_ssm.modules.mamba_simple import Block as OldBlock
    from mamba_ssm.modules.mamba_simple import Mamba
    from mamba_ssm.ops.triton.layer_norm import RMSNorm

    torch.manual_seed(0)
    old = OldBlock(D, Mamba, norm_cls=RMSNorm, fused_add_norm=True, residual_in_fp32=True)
    new = Block(D, Mamba, nn.Identity, norm_cls=RMSNorm)
    new.load_state_dict(old.state_dict(), strict=True)
    x, residual = randn(2, 5, D), randn(2, 5, D, seed=1)
    for got, want in zip(old(x, residual), new(x, residual)):
        assert_near(got, want.double(), "block")
    assert torch.equal(copy.deepcopy(old)(x)[1], x), "the first block hands its input on"
    with pytest.raises(TypeError, match="want norm_cls LayerNorm or RMSNorm, got Identity"):
        OldBlock(D, Mamba, norm_cls=nn.Identity, fused_add_norm=True)


def test_a_mixer_that_there_is_not():
    from mamba_ssm.models.mixer_seq_simple import create_block

    with pytest.raises(ValueError, match=r"want one of Mamba1, Mamba2, got 'Mamba3'"):
        create_block(D, 0, ssm_cfg={"layer": "Mamba3"})
