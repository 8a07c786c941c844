"""Models, configurations and files: what transformers writes Statewise reads, and the other way round."""

from __future__ import annotations

import copy
import json
import pickle

import pytest
import torch
from transformers import AutoConfig, AutoModel, AutoModelForCausalLM

import statewise
from statewise import state as trees
from statewise.hf import StatewiseCache, StatewiseConfig, StatewiseForCausalLM, StatewiseModel
from statewise.testing import assert_agree


def tokens(*shape: int) -> torch.Tensor:
    return torch.randint(0, 61, shape)


def test_logits_are_those_of_the_model_inside(model):
    x = tokens(2, 11)
    assert torch.equal(model(x).logits, model.core(x))
    assert torch.equal(model(inputs_embeds=model.get_input_embeddings()(x)).logits, model.core(x))


@pytest.mark.parametrize("options", [{}, {"tie_embeddings": False}, {"pad_vocab_to": 8}, {"d_intermediate": 16}])
def test_files_are_read_by_both_sides(build, options, tmp_path):
    model, x = build("hybrid", **options), tokens(2, 7)
    model.save_pretrained(tmp_path / "theirs")
    assert torch.equal(statewise.load(tmp_path / "theirs")(x), model(x).logits)
    model.core.save_pretrained(tmp_path / "ours")
    assert torch.equal(statewise.load(tmp_path / "ours")(x), model(x).logits)
    for directory in ("theirs", "ours"):
        again = AutoModelForCausalLM.from_pretrained(tmp_path / directory)
        assert isinstance(again, StatewiseForCausalLM)
        assert torch.equal(again(x).logits, model(x).logits)
        base = AutoModel.from_pretrained(tmp_path / directory)
        assert isinstance(base, StatewiseModel)
        assert torch.equal(base(x).last_hidden_state, model.model(x).last_hidden_state)
        assert again.config.options == model.config.options
        assert AutoConfig.from_pretrained(tmp_path / directory).tie_word_embeddings == options.get(
            "tie_embeddings", True
        )


def test_shards_and_dtype(build, tmp_path):
    model = build("mamba2").to(torch.bfloat16)
    model.save_pretrained(tmp_path, max_shard_size="20KB")
    assert len(list(tmp_path.glob("model-*.safetensors"))) > 1
    again, x = AutoModelForCausalLM.from_pretrained(tmp_path), tokens(1, 5)
    assert again.dtype == torch.bfloat16
    assert torch.equal(again(x).logits, model(x).logits)
    assert AutoModelForCausalLM.from_pretrained(tmp_path, dtype=torch.float32).dtype == torch.float32


def test_wrap_shares_everything(build):
    core = statewise.create_model(
        "mamba2-130m", vocab_size=61, d_model=32, n_layer=2, mixer={"name": "mamba", "d_state": 4}
    )
    model = StatewiseForCausalLM.wrap(core.eval())
    x = tokens(2, 5)
    assert not model.training
    assert torch.equal(model(x).logits, core(x))
    with torch.no_grad():
        model.get_input_embeddings().weight.mul_(2)
    assert torch.equal(model(x).logits, core(x))
    assert {id(p) for p in model.parameters()} == {id(p) for p in core.parameters()}
    model.train()
    assert core.training
    with pytest.raises(TypeError, match=r"model: want a model of statewise\.load"):
        StatewiseForCausalLM.wrap(torch.nn.Linear(2, 2))


def test_a_module_replaced_in_one_is_replaced_in_the_other(build):
    model = build("mamba", tie_embeddings=False)
    head = torch.nn.Linear(32, 61, bias=False)
    model.set_output_embeddings(head)
    assert model.core.lm_head is model.model.lm_head is model.get_output_embeddings() is head
    embedding = torch.nn.Embedding(61, 32)
    model.core.embedding = embedding
    assert model.get_input_embeddings() is model.model.embedding is embedding


def test_the_head_as_a_linear_layer_gives_the_logits(build):
    # Fused losses multiply features by its weight and never call the model's head.
    for options in ({}, {"pad_vocab_to": 8}, {"pad_vocab_to": 8, "tie_embeddings": False}, {"tie_embeddings": False}):
        model, x = build("mamba", **options), tokens(2, 5)
        head = model.get_output_embeddings()
        assert head.weight.shape == (61, 32)
        assert_agree(head(model.base_model(x).last_hidden_state), model(x).logits, str(options), 32)
    # What comes after it has the names that fused losses look for.
    model = build("parallel")
    logits = model.get_output_embeddings()(model.base_model(x).last_hidden_state) * model.config.logit_scale
    cap = model.config.final_logit_softcapping
    assert_agree(cap * torch.tanh(logits / cap), model(x).logits, "scaled and capped", 32)


@pytest.mark.parametrize("options", [{}, {"pad_vocab_to": 8}, {"tie_embeddings": False}])
def test_new_tokens(build, options, tmp_path):
    model, x = build("mamba", **options), tokens(2, 5)
    before = model(x).logits
    model.resize_token_embeddings(64)
    after = model(x).logits
    assert after.shape == (2, 5, 64)
    assert torch.equal(after[..., :61], before)
    model.save_pretrained(tmp_path)
    assert torch.equal(statewise.load(tmp_path)(x), after)


def test_hidden_states_loss_and_tuples(model):
    x = tokens(2, 9)
    out = model(x, labels=x, output_hidden_states=True)
    assert len(out.hidden_states) == model.config.num_hidden_layers + 1
    scale = model.config.options.get("embedding_scale", 1)
    assert torch.equal(out.hidden_states[0], scale * model.get_input_embeddings()(x))
    assert torch.equal(model.core.head(out.hidden_states[-1]), out.logits)
    want = torch.nn.functional.cross_entropy(out.logits[:, :-1].flatten(0, 1), x[:, 1:].flatten())
    assert_agree(out.loss, want, "loss", 18)
    assert torch.equal(model(x, labels=x, return_dict=False)[0], out.loss)
    masked = x.clone()
    masked[:, :4] = -100
    want = torch.nn.functional.cross_entropy(out.logits[:, 3:-1].flatten(0, 1), x[:, 4:].flatten(), reduction="sum") / 7
    assert_agree(model(x, labels=masked, num_items_in_batch=7).loss, want, "loss over a global count", 18)


def test_logits_to_keep(model):
    x = tokens(2, 9)
    whole = model(x).logits
    assert torch.equal(model(x, logits_to_keep=3).logits, whole[:, -3:])
    assert torch.equal(model(x, logits_to_keep=torch.tensor([0, 4])).logits, whole[:, [0, 4]])


@pytest.mark.parametrize("reentrant", [True, False])
def test_checkpointing_recomputes_and_changes_nothing(build, reentrant):
    model, x = build("hybrid", d_intermediate=16).train(), tokens(2, 9)
    ran = []
    for block in model.core.layers:
        block._run = lambda *args, run=block._run: (ran.append(1), run(*args))[1]

    def gradients():
        model.zero_grad()
        ran.clear()
        model(x, labels=x).loss.backward()
        return len(ran), [p.grad.clone() for p in model.parameters()]

    plain, wanted = gradients()
    model.activation_checkpointing_enable({"use_reentrant": reentrant})
    twice, got = gradients()
    assert (plain, twice) == (2, 4)
    assert all(torch.equal(a, b) for a, b in zip(got, wanted))


def test_missing_weights_are_drawn_as_the_constructor_draws_them(build, tmp_path):
    model = build("mamba2")
    model.save_pretrained(tmp_path)
    from safetensors.torch import load_file, save_file

    weights = load_file(tmp_path / "model.safetensors")
    del weights["layers.0.mixer.dt_bias"], weights["layers.1.norm.weight"]
    weights["layers.0.mixer.D"] = torch.ones(3)
    weights["surplus"] = torch.ones(1)
    save_file(weights, tmp_path / "model.safetensors", metadata={"format": "pt"})
    drawn = AutoModelForCausalLM.from_pretrained(tmp_path, ignore_mismatched_sizes=True)
    step = torch.nn.functional.softplus(drawn.core.layers[0].mixer.dt_bias)
    assert step.min() >= 1e-4
    assert step.max() <= 0.1 + 1e-4
    assert (drawn.core.layers[1].norm.weight == 1).all()
    assert (drawn.core.layers[0].mixer.D == 1).all()
    assert torch.equal(drawn.core.layers[0].mixer.A_log, model.core.layers[0].mixer.A_log)
    del weights["layers.0.mixer.D"]
    save_file(weights, tmp_path / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(
        ValueError, match=r"do not fit this model:\n  missing .*layers\.0\.mixer\.D\n(.*\n)*  unexpected .*surplus"
    ):
        AutoModelForCausalLM.from_pretrained(tmp_path)


def test_pickles_are_not_read(build, tmp_path):
    model, x = build("mamba"), tokens(1, 5)
    model.config.save_pretrained(tmp_path)
    torch.save(model.core.state_dict(), tmp_path / "pytorch_model.bin")
    with pytest.raises(OSError, match="safetensors"):
        AutoModelForCausalLM.from_pretrained(tmp_path)
    asked = AutoModelForCausalLM.from_pretrained(tmp_path, use_safetensors=False)
    assert torch.equal(asked(x).logits, model(x).logits)


def test_copies_keep_their_two_faces(build):
    model, x = build("hybrid"), tokens(1, 5)
    for twin in (copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
        assert twin.core is not model.core
        assert twin.core.embedding is twin.model.embedding
        assert torch.equal(twin(x).logits, model(x).logits)
        assert torch.equal(twin.core(x), model(x).logits)


def test_wrong_shapes_raise(build, tmp_path):
    build("mamba").save_pretrained(tmp_path)
    config = json.loads((tmp_path / "config.json").read_text())
    config["options"]["d_model"] = 48
    (tmp_path / "config.json").write_text(json.dumps(config))
    with pytest.raises(RuntimeError, match="mismatch"):
        AutoModelForCausalLM.from_pretrained(tmp_path)
    config["options"]["d_model"] = 32
    config["options"]["d_modle"] = 32
    (tmp_path / "config.json").write_text(json.dumps(config))
    with pytest.raises(TypeError, match=r"unknown option of language 'd_modle'; did you mean 'd_model'"):
        AutoModelForCausalLM.from_pretrained(tmp_path)


def test_configuration():
    config = StatewiseConfig(vocab_size=61, d_model=32, n_layer=2, pad_token_id=3)
    assert (config.vocab_size, config.hidden_size, config.num_hidden_layers) == (61, 32, 2)
    assert config.tie_word_embeddings is True
    config.tie_word_embeddings = False
    assert config.options["tie_embeddings"] is False
    assert StatewiseConfig.from_dict(config.to_dict()).to_dict() == config.to_dict()
    assert StatewiseConfig.preset("mamba-130m", n_layer=3).num_hidden_layers == 3
    assert isinstance(AutoModel.from_config(config), StatewiseModel)


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: StatewiseConfig("langauge"), "unknown architecture 'langauge'; did you mean 'language'"),
        (lambda: StatewiseConfig("sequence_classifier"), "is no language model; load it with statewise.load"),
        (lambda: StatewiseConfig(options={"d_modle": 3}), "unknown option of language 'd_modle'"),
        (lambda: StatewiseConfig(vocab_size=3, d_model=4, n_layers=1), "unknown option of language 'n_layers'"),
        (lambda: StatewiseConfig(options=[1]), "options: want a dict"),
        (lambda: StatewiseConfig.preset("mamba-131m"), "unknown model 'mamba-131m'"),
        (lambda: StatewiseConfig.from_dict({"model_type": "mamba"}), "describes a 'mamba' model"),
        (lambda: StatewiseConfig.from_dict({"model_type": "statewise"}), "want 'architecture'"),
        (lambda: StatewiseForCausalLM(StatewiseConfig(d_model=4)), "options of 'language': .*vocab_size"),
        (
            lambda: StatewiseForCausalLM(StatewiseConfig(vocab_size=4, d_model=4, n_layer=-1)),
            "n_layer: want an integer",
        ),
    ],
)
def test_wrong_configurations(make, message):
    with pytest.raises((ValueError, TypeError), match=message):
        make()


def test_wrong_arguments(build):
    model, x = build("mamba"), tokens(2, 5)
    cases = [
        (TypeError, "unexpected argument 'token_typ_ids'", {"input_ids": x, "token_typ_ids": x}),
        (TypeError, "cache: want a StatewiseCache, got tuple", {"input_ids": x, "cache": ()}),
        (ValueError, "exactly one of the two", {}),
        (ValueError, "exactly one of the two", {"input_ids": x, "inputs_embeds": torch.zeros(2, 5, 32)}),
        (
            ValueError,
            r"attention_mask: want shape \(2, 5\), got \(2, 4\)",
            {"input_ids": x, "attention_mask": x[:, :4]},
        ),
        (ValueError, r"tokens: want integers \(B, L\)", {"input_ids": x.float()}),
    ]
    for error, message, arguments in cases:
        with pytest.raises(error, match=message):
            model(**arguments)


def test_a_chunk_goes_on_from_the_cache(model):
    x = tokens(2, 11)
    whole = model(x).logits
    first = model(x[:, :4], use_cache=True)
    assert isinstance(first.cache, StatewiseCache)
    second = model(x[:, 4:], cache=first.cache)
    assert_agree(torch.cat([first.logits, second.logits], 1), whole, "two chunks", 11)
    assert (second.cache.get_seq_length(), second.cache.batch_size) == (11, 2)
    assert [n for n, _ in trees.leaves(second.cache.state)] == [n for n, _ in trees.leaves(model.init_state(1))]
