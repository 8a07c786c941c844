"""The language stack: published sizes, hybrids, bad input, saving and loading."""

from __future__ import annotations

import json

import pytest
import torch

import statewise
from statewise.models import create_model, list_models, load, model_card, parameter_count
from statewise.models.language import LanguageModel
from statewise.state import leaves
from statewise.testing import assert_agree


def tiny(**changes) -> LanguageModel:
    config = {"vocab_size": 61, "d_model": 16, "n_layer": 2, "mixer": {"name": "mamba2", "d_state": 8, "head_dim": 8}}
    return LanguageModel(**{**config, **changes})


@pytest.mark.parametrize("name", list_models())
def test_published_parameter_counts(name):
    assert parameter_count(name) == model_card(name).parameters


def test_hybrid_pattern_repeats():
    model = tiny(n_layer=4, mixer=["mamba", "attention"])
    kinds = [type(block.mixer).__name__ for block in model.blocks]
    assert kinds == ["Mamba", "Attention", "Mamba", "Attention"]


def test_prefill_is_the_end_of_extend():
    model = tiny().eval()
    tokens = torch.randint(0, 61, (3, 9))
    state = model.extend(tokens[:, :4], model.init_state(3))[1]
    with torch.no_grad():
        logits, want = model.extend(tokens[:, 4:], state)
        last, got = model.prefill(tokens[:, 4:], state)
    assert_agree(last, logits[:, -1], "logits", 9)
    for (name, a), (_, b) in zip(leaves(got), leaves(want)):
        assert_agree(a, b, name, 9)


def test_residual_outputs_shrink_with_depth():
    torch.manual_seed(0)
    shallow, deep = tiny(n_layer=1), tiny(n_layer=16)
    ratio = shallow.blocks[0].mixer.out_proj.weight.std() / deep.blocks[0].mixer.out_proj.weight.std()
    assert 3.5 < ratio < 4.5  # sqrt(16)


def test_step_size_bias_survives_model_initialisation():
    model = tiny(mixer={"name": "mamba", "bias": True})
    mixer = model.blocks[0].mixer
    assert mixer.dt_proj.bias.abs().min() > 0
    assert not mixer.in_proj.bias.any()
    step = torch.nn.functional.softplus(mixer.dt_proj.bias)
    assert step.min() >= 0.99e-4
    assert step.max() <= 0.101


def test_padded_vocabulary_is_never_seen():
    model = tiny(pad_vocab_to=16)
    assert model.embedding.weight.shape[0] == 64
    assert model(torch.zeros(1, 3, dtype=torch.long)).shape[-1] == 61


def test_half_precision_weights_keep_the_stream_in_float32():
    model = tiny().to(torch.bfloat16)
    tokens = torch.randint(0, 61, (2, 9))
    logits, state = model.extend(tokens, model.init_state(2))
    assert logits.dtype == torch.bfloat16
    assert state.layers[0].ssm.dtype == torch.float32
    full = tiny()
    full.load_state_dict(model.state_dict())
    assert (full(tokens) - logits.float()).abs().max() < 0.1 * full(tokens).abs().max()


@pytest.mark.parametrize("changes", [{}, {"mixer": ["mamba", "attention"]}, {"tie_embeddings": False}])
def test_save_and_load(tmp_path, changes):
    model = tiny(**changes)
    tokens = torch.randint(0, 61, (2, 11))
    model.save_pretrained(tmp_path / "model")
    again = load(tmp_path / "model")
    assert type(again) is LanguageModel
    assert again.config == json.loads(json.dumps(model.config))
    assert torch.equal(again(tokens), model(tokens))
    assert torch.equal(LanguageModel.from_pretrained(tmp_path / "model")(tokens), model(tokens))
    assert load(tmp_path / "model", dtype=torch.float64)(tokens).dtype == torch.float64


def test_bad_names_propose_the_nearest():
    with pytest.raises(ValueError, match=r"unknown model 'mambo-130m'; did you mean 'mamba-130m'"):
        create_model("mambo-130m")
    with pytest.raises(TypeError, match=r"unknown option of mamba-130m 'n_layers'; did you mean 'n_layer'"):
        create_model("mamba-130m", n_layers=2)
    with pytest.raises(ValueError, match=r"unknown mixer 'mamba3'; did you mean"):
        tiny(mixer="mamba3")
    with pytest.raises(TypeError, match=r"unknown option of mamba2 'dstate'; did you mean 'd_state'"):
        tiny(mixer={"name": "mamba2", "dstate": 3})


def test_bad_configurations():
    with pytest.raises(ValueError, match="does not divide n_layer = 2"):
        tiny(mixer=["mamba", "mamba2", "attention"])
    with pytest.raises(ValueError, match="'bidirectional' is not causal"):
        tiny(mixer={"name": "bidirectional", "mixer": "mamba"})
    with pytest.raises(ValueError, match="n_layer: want an integer >= 0, got -1"):
        tiny(n_layer=-1)
    with pytest.raises(ValueError, match=r"head_dim: want a divisor of expand \* d_model = 32, got 5"):
        tiny(mixer={"name": "mamba2", "head_dim": 5})
    with pytest.raises(ValueError, match="tokens: want integers"):
        tiny()(torch.zeros(2, 3))


def test_bad_checkpoints(tmp_path):
    from safetensors.torch import load_file, save_file

    folder = tmp_path / "model"
    tiny().save_pretrained(folder)
    weights, good = folder / "model.safetensors", (folder / "model.safetensors").read_bytes()

    weights.write_bytes(good[: len(good) // 2])
    with pytest.raises(ValueError, match="truncated or not a safetensors file"):
        load(folder)

    weights.write_bytes(good)
    tensors = load_file(weights)
    tensors["norm_f.weight"] = tensors["norm_f.weight"][:-1]
    tensors["extra"] = torch.zeros(1)
    del tensors["layers.0.mixer.D"]
    tensors["layers.1.mixer.D"] = torch.full_like(tensors["layers.1.mixer.D"], torch.nan)
    save_file(tensors, weights)
    with pytest.raises(ValueError) as error:
        load(folder)
    for part in ("missing layers.0.mixer.D", "unexpected extra", "norm_f.weight: want shape (16,), got (15,)", "NaN"):
        assert part in str(error.value)

    weights.unlink()
    torch.save({}, folder / "pytorch_model.bin")
    with pytest.raises(FileNotFoundError, match=r"pytorch_model.bin is a pickle, which could run code"):
        load(folder)

    (folder / "config.json").write_text("{")
    with pytest.raises(ValueError, match="not valid JSON"):
        load(folder)
    (folder / "config.json").write_text('{"architecture": "languages"}')
    with pytest.raises(ValueError, match="unknown architecture 'languages'; did you mean 'language'"):
        load(folder)
    with pytest.raises(FileNotFoundError, match="no such directory"):
        load(tmp_path / "missing")


def test_full_disk_keeps_the_old_checkpoint(tmp_path, monkeypatch):
    model = tiny()
    model.save_pretrained(tmp_path)
    before = (tmp_path / "model.safetensors").read_bytes()

    def full(tensors, path, metadata=None):
        with open(path, "wb") as file:
            file.write(b"half")
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("safetensors.torch.save_file", full)
    with pytest.raises(OSError, match="No space left"):
        tiny().save_pretrained(tmp_path)
    assert (tmp_path / "model.safetensors").read_bytes() == before
    assert sorted(p.name for p in tmp_path.iterdir()) == ["config.json", "model.safetensors"]


def test_top_level_names():
    assert statewise.list_models("mamba2")[0] == "mamba2-130m"
    assert statewise.create_model("mamba-130m", n_layer=0, d_model=8).config["d_model"] == 8
