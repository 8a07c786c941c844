"""accelerate(): transformers' models give what they gave, on our ops, and afterwards everything is as it was."""

from __future__ import annotations

import importlib
import sys

import pytest
import torch

import statewise
from statewise.interop import accelerate, decelerate
from statewise.interop._hooks import HOOKS

tf = pytest.importorskip("transformers", reason="accelerate() is about transformers (extra: hf)")

BOUND = 1e-5  # relative, float32
ATTENTION = {"intermediate_size": 48, "num_attention_heads": 4}
GROUPED = {**ATTENTION, "num_key_value_heads": 2}
MAMBA2 = {"mamba_n_heads": 4, "mamba_d_head": 16, "mamba_d_state": 8, "mamba_chunk_size": 8}
# Tiny models of every family with a state space core, and one with short convolutions only. Chunks are shorter than the
# sequences, so that states are passed on.
CONFIGS = {
    "mamba": {"state_size": 8, "num_hidden_layers": 2},
    "mamba2": {"state_size": 8, "num_hidden_layers": 2, "head_dim": 16, "num_heads": 4, "n_groups": 2, "chunk_size": 8},
    "falcon_mamba": {"state_size": 8, "num_hidden_layers": 2},
    "jamba": {
        "num_hidden_layers": 4, "attn_layer_period": 2, "attn_layer_offset": 1, "expert_layer_period": 2,
        "expert_layer_offset": 1, "num_experts": 2, "num_experts_per_tok": 1, "mamba_d_state": 8, "mamba_dt_rank": 4,
        **GROUPED,
    },
    "bamba": {
        "num_hidden_layers": 3, "attn_layer_indices": [1], "mamba_n_groups": 2, "mamba_expand": 2, **GROUPED, **MAMBA2,
    },
    "zamba": {
        "num_hidden_layers": 6, "num_key_value_heads": 4, "n_mamba_heads": 2, "mamba_d_state": 8, "mamba_dt_rank": 4,
        "attn_layer_period": 3, "attn_layer_offset": 1, **ATTENTION,
    },
    "zamba2": {
        "num_hidden_layers": 3, "num_key_value_heads": 4, "attention_head_dim": 16, "mamba_d_state": 8,
        "mamba_headdim": 16, "n_mamba_heads": 4, "mamba_ngroups": 2, "mamba_expand": 2, "chunk_size": 8,
        "num_mem_blocks": 1, "adapter_rank": 4, "layers_block_type": ["mamba", "hybrid", "mamba"], **ATTENTION,
    },
    "falcon_h1": {
        "num_hidden_layers": 2, "head_dim": 8, "mamba_d_ssm": 64, "mamba_n_groups": 1, **GROUPED, **MAMBA2,
    },
    "granitemoehybrid": {
        "shared_intermediate_size": 48, "num_hidden_layers": 3, "layer_types": ["mamba", "attention", "mamba"],
        "mamba_n_groups": 1, "num_local_experts": 2, "num_experts_per_tok": 1, **GROUPED, **MAMBA2,
    },
    "nemotron_h": {
        "layers_block_type": ["mamba", "attention", "moe", "mamba"], "head_dim": 8, "mamba_num_heads": 4,
        "mamba_head_dim": 16, "n_groups": 2, "ssm_state_size": 8, "chunk_size": 8, "n_routed_experts": 2,
        "num_experts_per_tok": 2, "moe_intermediate_size": 16, "moe_shared_expert_intermediate_size": 16, **GROUPED,
    },
    "lfm2": {"num_hidden_layers": 3, "layer_types": ["conv", "full_attention", "conv"], **GROUPED},
}  # fmt: skip
# Marked in its modeling file, but not called there.
NEVER_CALLED = {("jamba", "mamba_inner_fn")}
# transformers restarts their state where a prompt is continued by several tokens: wrong, and so not compared.
ONE_BY_ONE = ("mamba", "falcon_mamba", "jamba", "zamba")


@pytest.fixture(autouse=True)
def as_before():
    yield
    decelerate()


def build(family: str):
    torch.manual_seed(0)
    config = tf.AutoConfig.for_model(family, vocab_size=101, hidden_size=32, pad_token_id=0, **CONFIGS[family])
    config.eos_token_id = None
    model = tf.AutoModelForCausalLM.from_config(config)
    with torch.no_grad():  # biases and norms that are not zeros and ones make the comparison sharper
        for parameter in model.parameters():
            if parameter.ndim == 1:
                parameter.add_(0.1 * torch.randn_like(parameter))
    return model.eval()


def results(model, family: str) -> dict[str, torch.Tensor]:
    """All that a user does with a language model."""
    torch.manual_seed(2)  # with 1 the two best tokens of one model differ by rounding only
    ids = torch.randint(1, 101, (2, 21))
    mask = torch.ones_like(ids)
    mask[0, :5] = 0
    found = {}
    with torch.no_grad():
        found["forward"] = model(ids).logits
        found["left padded"] = model(ids, attention_mask=mask).logits[:, 5:]
        prompt = model(ids[:, :17], use_cache=True)
        cache = prompt["cache" if "cache" in prompt else "past_key_values"]
        found["prompt"] = prompt.logits
        for at in (17, 18):
            found[f"token {at}"] = model(ids[:, at : at + 1], cache=cache, use_cache=True).logits
        if family not in ONE_BY_ONE:
            found["two tokens more"] = model(ids[:, 19:], cache=cache, use_cache=True).logits
        found["greedy"] = model.generate(ids, attention_mask=mask, max_new_tokens=4, do_sample=False).double()
    for mode in (model.train, model.eval):  # transformers takes another way in training
        mode()
        model.zero_grad()
        loss = model(ids, labels=ids, use_cache=False).loss
        loss.backward()
        found[f"loss, {mode.__name__}"] = loss.detach()
        found |= {f"gradient of {name}, {mode.__name__}": p.grad for name, p in model.named_parameters()
                  if p.grad is not None}  # fmt: skip
    return {name: t.clone() for name, t in found.items()}


@pytest.mark.filterwarnings("ignore::FutureWarning")
@pytest.mark.parametrize("family", CONFIGS)
def test_outputs_are_unchanged(family, monkeypatch):
    calls = []
    for name, (make, op) in HOOKS.items():
        monkeypatch.setitem(HOOKS, name, (counting(make, name, calls), op))
    model = build(family)
    before = results(model, family)
    assert not calls
    with accelerate(family, quiet=True) as done:
        assert done.families == (family,)
        during = results(model, family)
    assert during.keys() == before.keys()
    for name, want in before.items():
        scale = want.abs().max()
        error = (during[name] - want).abs().max() / scale if scale else during[name].abs().max()
        assert error <= BOUND, f"{name}: relative error {error:.2g}"
    # The functions of the family were really called: none is there for nothing.
    functions = {r.function for r in done.replacements if r.function in HOOKS}
    assert functions - {name for of, name in NEVER_CALLED if of == family} == set(calls)


def counting(make, name, calls):
    """What makes a replacement, made to note that it was used."""

    def wrapped(original, packs):
        ours = make(original, packs)

        def noted(*args, **kwargs):
            calls.append(name)
            return ours(*args, **kwargs)

        noted.__wrapped__ = ours
        return noted

    return wrapped


def test_undone_to_the_very_objects():
    module = importlib.import_module("transformers.models.mamba2.modeling_mamba2")
    before, norm = dict(vars(module)), module.Mamba2RMSNorm.forward
    done = accelerate("mamba2", quiet=True)
    changed = {name for name in before if vars(module)[name] is not before[name]}
    assert changed == {name for name in before if name in HOOKS}
    assert changed | {"Mamba2RMSNorm", "MambaRMSNormGated"} == {r.function for r in done.replacements}
    assert module.Mamba2RMSNorm.forward is not norm
    again = accelerate("mamba2", quiet=True)
    assert vars(module)["mamba2_chunk_scan"].__wrapped__ is before["mamba2_chunk_scan"], "wrapped twice"
    again.undo()
    assert vars(module)["mamba2_chunk_scan"] is not before["mamba2_chunk_scan"], "undid what it had not done"
    for undo in (done.undo, decelerate):
        undo()
        assert all(vars(module)[name] is before[name] for name in before)
        assert module.Mamba2RMSNorm.forward is norm
        accelerate("mamba2", quiet=True)


def test_whoever_replaces_after_us_is_left_alone():
    module = importlib.import_module("transformers.models.mamba2.modeling_mamba2")
    original = module.mamba2_chunk_scan
    done = accelerate("mamba2", quiet=True)
    module.mamba2_chunk_scan = theirs = object()
    done.undo()
    assert module.mamba2_chunk_scan is theirs
    module.mamba2_chunk_scan = original


def test_the_table(capsys):
    done = accelerate("mamba", "mamba2", "qwen3_next")
    printed = capsys.readouterr().out.splitlines()
    assert printed == str(done).splitlines()
    assert printed[0] == "mamba       runs on short_conv, selective_scan_step, selective_scan, rms_norm"
    assert printed[1] == "mamba2      runs on short_conv, ssd_step, ssd, gated_rms_norm, rms_norm"
    assert "not replaced: torch_chunk_gated_delta_rule (no op)" in printed[2]


def test_all_families_by_looking():
    done = accelerate(quiet=True)
    assert set(CONFIGS) <= set(done.families)
    left = [r.function for r in done.replacements if r.family in CONFIGS and r.op is None]
    assert left == ["FalconMambaWeightlessRMSNorm"]


def test_a_norm_that_is_something_else_is_not_replaced(monkeypatch):
    module = importlib.import_module("transformers.models.mamba2.modeling_mamba2")

    class OffsetRMSNorm(module.Mamba2RMSNorm):
        def forward(self, hidden_states):
            return super().forward(hidden_states) + hidden_states

    OffsetRMSNorm.__module__ = module.__name__
    monkeypatch.setattr(module, "OffsetRMSNorm", OffsetRMSNorm, raising=False)
    forward = OffsetRMSNorm.forward
    done = accelerate("mamba2", quiet=True)
    assert OffsetRMSNorm.forward is forward
    assert [r.why for r in done.replacements if r.function == "OffsetRMSNorm"] == ["unknown form"]


def test_wrong_family():
    with pytest.raises(ValueError, match=r"want families among .*mamba2.* got 'bert'"):
        accelerate("bert", quiet=True)


def test_other_dtypes_take_the_path_of_transformers(monkeypatch):
    from statewise.interop import _hooks

    for kernel in ("conv", "ssd", "selective", "step"):
        monkeypatch.setattr(_hooks, kernel, None)  # whoever calls it fails
    for family in ("mamba", "mamba2"):
        model = build(family).double()
        ids = torch.randint(1, 101, (1, 9))
        want = model(ids).logits
        with accelerate(family, quiet=True):
            assert torch.equal(model(ids).logits, want)
            with pytest.raises(TypeError, match="NoneType"):
                model.float()(ids)


def test_an_activation_that_kernels_do_not_know():
    torch.manual_seed(0)
    config = tf.MambaConfig(vocab_size=50, hidden_size=16, state_size=4, num_hidden_layers=1, hidden_act="gelu")
    model = tf.MambaForCausalLM(config)
    ids = torch.randint(0, 50, (2, 9))
    for mode in (model.train, model.eval):
        mode()
        want = model(ids, use_cache=False).logits
        with accelerate("mamba", quiet=True):
            got = model(ids, use_cache=False).logits
        assert (got - want).abs().max() <= BOUND * want.abs().max()


def test_packed_rows_become_possible():
    """transformers refuses them without mamba_ssm; here two documents in a row give what they give alone.

    The models without a head are asked, since Mamba2ForCausalLM does not hand seq_idx on.
    """
    model = build("mamba2").backbone
    one, two = torch.randint(1, 101, (1, 9)), torch.randint(1, 101, (1, 14))
    packed = torch.cat([one, two], 1)
    packing = {"seq_idx": torch.tensor([[0] * 9 + [1] * 14], dtype=torch.int32), "use_cache": False}
    with pytest.raises(ValueError, match="packed"):
        model(packed, **packing)
    for mode in (model.train, model.eval):
        mode()
        want = torch.cat([model(ids, use_cache=False).last_hidden_state for ids in (one, two)], 1)
        with accelerate("mamba2", quiet=True):
            got = model(packed, **packing).last_hidden_state
        assert (got - want).abs().max() <= BOUND * want.abs().max()
    # In Mamba-1 the scan would not get to know of the documents, so it is still refused.
    mixer = build("falcon_mamba").backbone.layers[0].mixer
    with accelerate("falcon_mamba", quiet=True), pytest.raises(ValueError, match="packed"):
        mixer(torch.randn(1, 23, 32), seq_idx=packing["seq_idx"])


def test_half_precision():
    model = build("mamba2")
    ids = torch.randint(1, 101, (2, 21))
    truth = model(ids).logits
    model = model.bfloat16()
    theirs = model(ids).logits
    with accelerate("mamba2", quiet=True):
        ours = model(ids).logits
    assert ours.dtype == theirs.dtype
    assert (ours - truth).abs().max() <= 2 * (theirs - truth).abs().max()


def tokenizer():
    from tokenizers import Tokenizer, models, pre_tokenizers

    words = {word: i for i, word in enumerate(["<pad>", "<eos>", *"abcdefghijklmnopqrstuvwxyz"])}
    plain = Tokenizer(models.WordLevel(words, unk_token="<pad>"))
    plain.pre_tokenizer = pre_tokenizers.Whitespace()
    return tf.PreTrainedTokenizerFast(tokenizer_object=plain, pad_token="<pad>", eos_token="<eos>")


@pytest.mark.parametrize("family", ["mamba", "mamba2"])
def test_pipeline_is_unmodified(family):
    generate = tf.pipeline("text-generation", model=build(family), tokenizer=tokenizer(), device="cpu")
    prompts = ["a b c d e", "x y"]
    options = {"max_new_tokens": 5, "do_sample": False, "batch_size": 2, "return_tensors": True}
    want = generate(prompts, **options)
    with accelerate(family, quiet=True):
        assert generate(prompts, **options) == want


@pytest.mark.parametrize("family", ["mamba", "mamba2"])
def test_trainer_is_unmodified(family, tmp_path):
    pytest.importorskip("accelerate", reason="transformers.Trainer needs the package accelerate")
    rows = [{"input_ids": row, "labels": row} for row in torch.randint(1, 101, (8, 12)).tolist()]

    def losses() -> list[float]:
        options = tf.TrainingArguments(
            str(tmp_path), per_device_train_batch_size=4, max_steps=3, logging_steps=1, report_to=[], use_cpu=True,
            learning_rate=1e-2, save_strategy="no", seed=0, disable_tqdm=True, dataloader_pin_memory=False,
        )  # fmt: skip
        trainer = tf.Trainer(build(family), options, train_dataset=rows)
        trainer.train()
        return [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]

    want = losses()
    with accelerate(family, quiet=True):
        got = losses()
    assert len(got) == 3
    assert got == pytest.approx(want, rel=1e-4)


def test_compiles_without_a_break():
    model = build("mamba2")
    ids = torch.randint(1, 101, (1, 21))
    with accelerate("mamba2", quiet=True):
        want = model(ids, use_cache=False).logits
        compiled = torch.compile(model, fullgraph=True, backend="aot_eager")
        got = compiled(ids, use_cache=False).logits
    assert (got - want).abs().max() <= BOUND * want.abs().max()


def test_nothing_is_imported_before_it_is_asked_for():
    assert "statewise.interop" in sys.modules
    assert statewise.interop.accelerate is accelerate
