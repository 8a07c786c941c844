"""LoRA on every projection and on parts of fused ones; a learned initial state."""

from __future__ import annotations

import pytest
import torch
from torch import nn

import statewise
from statewise import state as trees
from statewise.hf import StatewiseForCausalLM, join_projections, lora_targets, split_projections
from statewise.testing import assert_agree

peft = pytest.importorskip("peft", reason="LoRA needs peft (extra: peft)")

TARGETS = {
    "mamba": ["dt_proj", "fc1", "fc2", "in_proj", "out_proj", "x_proj"],
    "mamba2": ["fc1", "fc2", "in_proj", "out_proj"],
    "hybrid": ["fc1", "fc2", "in_proj", "k_proj", "out_proj", "q_proj", "v_proj"],
    "parallel": ["in_proj", "k_proj", "out_proj", "q_proj", "v_proj"],
    "rglru": ["fc1", "fc2", "gate_proj", "out_proj", "x_proj"],
    "zamba2": [
        "down",
        "fc1.shared",
        "fc2",
        "from_shared",
        "in_proj",
        "k_proj.shared",
        "out_proj",
        "q_proj.shared",
        "up",
        "v_proj.shared",
    ],
}
PLAIN = ("mamba", "mamba2", "hybrid", "rglru")  # have a gated MLP beside


def shaped(kind: str) -> dict:
    return {"d_intermediate": 16} if kind in PLAIN else {}


def tokens(*shape: int) -> torch.Tensor:
    return torch.randint(0, 61, shape)


def adapted(model, targets, **options):
    config = peft.LoraConfig(r=3, lora_alpha=6, target_modules=targets, init_lora_weights=False, **options)
    return peft.get_peft_model(model, config)


@pytest.mark.parametrize("kind", list(TARGETS))
def test_default_targets(build, kind):
    model = build(kind, **shaped(kind), tie_embeddings=False)
    assert lora_targets(model) == lora_targets(model.core) == TARGETS[kind]
    with pytest.raises(ValueError, match=r"unknown projection 'out_porj'; did you mean 'out_proj'"):
        lora_targets(model, TARGETS[kind][0], "out_porj")


@pytest.mark.parametrize("kind", list(TARGETS))
def test_every_target_takes_part(build, kind):
    """Each adapter changes the output and gets a gradient, in training, in `step` and in `generate`."""
    x = tokens(2, 7)
    for target in [*TARGETS[kind], "lm_head"]:
        model = build(kind, **shaped(kind), tie_embeddings=False)
        core, plain = model.core, model(x).logits
        wrapped = adapted(model, [target])
        out = wrapped(x, labels=x)
        assert not torch.allclose(out.logits, plain), target
        out.loss.backward()
        for name, p in wrapped.named_parameters():
            assert (p.grad is not None and bool(p.grad.any())) == ("lora_" in name), (target, name)
        # The model inside has the adapter too: it is the same modules.
        assert_agree(core(x), out.logits, target, 7)
        state, steps = core.init_state(2), []
        for t in range(7):
            y, state = core.step(x[:, t], state)
            steps.append(y)
        assert_agree(torch.stack(steps, 1), out.logits, f"{target}, step by step", 7)


@pytest.mark.parametrize("kind", list(TARGETS))
def test_merged_weights_equal_unmerged(build, kind, tmp_path):
    model, x = build(kind, **shaped(kind)), tokens(2, 7)
    wrapped = adapted(model, lora_targets(model)).eval()
    want = wrapped(x).logits
    wrapped.save_pretrained(tmp_path / "adapter")
    again = peft.PeftModel.from_pretrained(build(kind, **shaped(kind)), tmp_path / "adapter")
    # Without gradients other kernels serve, which round differently.
    assert_agree(again(x).logits, want, "loaded", 32)
    merged = wrapped.merge_and_unload()
    assert isinstance(merged, StatewiseForCausalLM)
    assert_agree(merged(x).logits, want, "merged", 32)
    merged.save_pretrained(tmp_path / "merged")
    # Where weights lie in memory decides how a matrix product is rounded, and a file puts them elsewhere.
    assert_agree(statewise.load(tmp_path / "merged")(x), merged(x).logits, "loaded", 32)


def test_parameters_of_a_target(build):
    wrapped = adapted(build("mamba"), ["x_proj"])
    trained = sum(p.numel() for p in wrapped.parameters() if p.requires_grad)
    assert trained == 2 * 3 * (64 + 2 + 2 * 4)  # layers, rank, in + out


@pytest.mark.parametrize(
    ("kind", "parts"),
    [
        ("mamba", ["x_proj.dt", "x_proj.B", "x_proj.C", "in_proj.z"]),
        ("mamba2", ["in_proj.dt", "in_proj.B", "in_proj.x"]),
    ],
)
def test_parts_of_fused_projections(build, kind, parts, tmp_path):
    model, x = build(kind), tokens(2, 7)
    names, plain = set(model.state_dict()), model(x).logits
    split_projections(model)
    assert_agree(model(x).logits, plain, "split", 32)
    assert set(parts) <= set(lora_targets(model))
    for part in parts:
        one = adapted(split_projections(build(kind)), lora_targets(model, part))
        one(x, labels=x).loss.backward()
        grads = {n: p.grad for n, p in one.named_parameters() if p.requires_grad}
        assert len(grads) == 4
        assert all(f".{part}.lora_" in n and bool(g.any()) for n, g in grads.items())
    wrapped = adapted(model, lora_targets(model, *parts)).eval()
    want = wrapped(x).logits
    assert not torch.allclose(want, plain)
    with pytest.raises(ValueError, match="carries a Linear; merge adapters first"):
        join_projections(model)
    whole = join_projections(wrapped.merge_and_unload())
    assert set(whole.state_dict()) == names
    assert_agree(whole(x).logits, want, "joined", 32)
    # Rows of parts that were not adapted are what they were.
    before, mixer = build(kind).core.layers[0].mixer, whole.core.layers[0].mixer
    for projection, rows in mixer.fused().items():
        old, new = (getattr(m, projection).weight.split(list(rows.values())) for m in (before, mixer))
        for name, a, b in zip(rows, old, new):
            assert torch.equal(a, b) == (f"{projection}.{name}" not in parts)


def test_wrong_splits(build):
    model = build("mamba")
    with pytest.raises(ValueError, match="unknown fused projection 'out_proj'"):
        split_projections(model, "out_proj")
    with pytest.raises(ValueError, match="in_proj: want a plain linear layer, got Linear; split before adapters"):
        split_projections(adapted(model, ["in_proj"]), "in_proj")


def test_rows_of_a_split_must_add_up():
    from statewise.hf.adapters import SplitLinear

    with pytest.raises(ValueError, match="rows: want parts of 5 rows"):
        SplitLinear(nn.Linear(3, 5), {"a": 2, "b": 2})
    linear = nn.Linear(3, 5)
    split = SplitLinear(linear, {"a": 2, "b": 3})
    x = torch.randn(4, 3)
    assert_agree(split(x), linear(x), "split with a bias", 3)
    assert torch.equal(split.join().weight, linear.weight)
    assert torch.equal(split.join().bias, linear.bias)


def test_whole_modules_are_trained(build):
    """The weight of the convolution is read as it is, so a LoRA cannot stand there; a trained copy can."""
    model, x = build("mamba"), tokens(2, 7)
    with pytest.raises(ValueError, match="ShortConv"):
        adapted(build("mamba"), ["conv1d"])
    wrapped = adapted(model, ["x_proj"], modules_to_save=["conv1d"])
    wrapped(x, labels=x).loss.backward()
    copies = [
        p
        for n, p in wrapped.named_parameters()
        if "modules_to_save" in n and n.endswith("conv1d.modules_to_save.default.weight")
    ]
    assert len(copies) == 2
    assert all(bool(p.grad.any()) for p in copies)


@pytest.mark.parametrize("kind", ["mamba", "hybrid", "s5"])
def test_state_tuning(build, kind, tmp_path):
    model, x = build(kind), tokens(3, 9)
    before = model(x, labels=x)
    model.tune_state()
    assert torch.equal(model(x).logits, before.logits)  # from zeros
    trained = [n for n, p in model.named_parameters() if p.requires_grad]
    assert trained
    assert all(n.startswith("initial_state.") for n in trained)
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=0.1)
    for _ in range(8):
        optimizer.zero_grad()
        loss = model(x, labels=x).loss
        loss.backward()
        optimizer.step()
    after = model(x, labels=x)
    assert after.loss < before.loss - 0.005
    # The learned state is a state like any other.
    trees.save(model.learned_state(), tmp_path / "state.safetensors")
    state = trees.load(tmp_path / "state.safetensors", like=model.core.init_state(1))
    logits, _ = model.core.extend(x, trees.expand(state, 3))
    assert_agree(logits, after.logits, "from the state in a file", 9)
    # It survives padding, caches, files and generation.
    padded = torch.cat([x.new_zeros(3, 2), x], 1)
    mask = torch.cat([x.new_zeros(3, 2), torch.ones_like(x)], 1)
    assert_agree(model(padded, attention_mask=mask).logits[:, 2:], after.logits, "left padding", 11)
    first = model(x[:, :4], use_cache=True)
    assert_agree(model(x[:, 4:], cache=first.cache).logits, after.logits[:, 4:], "in chunks", 9)
    model.save_pretrained(tmp_path / "model")
    again = StatewiseForCausalLM.from_pretrained(tmp_path / "model")
    assert torch.equal(again(x).logits, after.logits)
    options = {"max_new_tokens": 6, "do_sample": False, "pad_token_id": 0}
    got = again.generate(x[:1], **options)
    assert torch.equal(got, model.generate(x[:1], use_cache=False, **options))
    with pytest.raises(ValueError, match="several documents"):
        model(x[:1], seq_idx=torch.tensor([[0] * 4 + [1] * 5]))


def test_state_tuning_from_a_given_state(build):
    model, x = build("mamba"), tokens(2, 5)
    _, state = model.core.extend(tokens(1, 8), None)
    want, _ = model.core.extend(x, trees.expand(state, 2))
    with pytest.raises(ValueError, match="no state was tuned"):
        model.learned_state()
    assert_agree(model.tune_state(state)(x).logits, want, "given", 5)
    with pytest.raises(ValueError, match="want a state of one row, got 2"):
        model.tune_state(trees.expand(state, 2))
