"""GGUF files in llama.cpp: the same greedy tokens, with a vocabulary or without."""

from __future__ import annotations

import json

import pytest
import torch

from statewise.interop.export import ExportError, _folder, _gguf, to_gguf
from statewise.models.language import LanguageModel

from .conftest import build, greedy, tokens


@pytest.fixture(autouse=True, scope="module")
def _library():
    pytest.importorskip("gguf", reason="gguf is not installed: pip install statewise[gguf]")


MODELS = {
    "mamba": ({"name": "mamba", "d_state": 8}, {}),
    "mamba2": ({"name": "mamba2", "d_state": 16, "head_dim": 8, "n_groups": 2}, {}),
    "odd": ({"name": "mamba2", "d_state": 16, "head_dim": 16, "conv_bias": False}, {"pad_vocab_to": 16}),
    "untied": ({"name": "mamba", "d_state": 4, "dt_rank": 3}, {"tie_embeddings": False}),
}


def small(name: str, vocab: int = 250) -> LanguageModel:
    torch.manual_seed(0)
    mixer, options = MODELS[name]
    return LanguageModel(vocab, 32, 2, mixer=mixer, **options).eval()


@pytest.fixture
def llama():
    """Opens a file in llama.cpp."""
    pytest.importorskip("llama_cpp", reason="llama-cpp-python is not installed")
    from statewise.interop.export._llama import Llama

    return Llama


@pytest.mark.parametrize("name", MODELS)
def test_the_same_greedy_tokens(name, tmp_path, llama):
    model, path = small(name), tmp_path / "model.gguf"
    assert to_gguf(model, path)["logits"] <= 1e-4
    prompt, made = tokens(1, 21), []
    theirs = llama(path)
    logits = theirs.decode(prompt[0].tolist())
    for _ in range(20):
        made.append(int(logits[:250].argmax()))
        logits = theirs.decode(made[-1:])
    assert made == greedy(model, prompt, 20)


@pytest.mark.parametrize("dtype", ["f16", "bf16"])
@pytest.mark.parametrize("name", ["mamba", "mamba2"])
def test_half_precision(name, dtype, tmp_path, llama):
    path, whole = tmp_path / "half.gguf", tmp_path / "whole.gguf"
    assert to_gguf(small(name), path, dtype=dtype)["logits"] <= _gguf._LIMITS[dtype]
    to_gguf(small(name), whole, check=False)
    assert path.stat().st_size < 0.75 * whole.stat().st_size
    # A model in half precision is written in its own dtype.
    again = small(name).to(_gguf.DTYPES[dtype])
    to_gguf(again, path, force=True, check=False)
    assert path.stat().st_size < 0.75 * whole.stat().st_size


def test_a_wrong_file_is_found_and_not_left_behind(tmp_path, llama, monkeypatch):
    monkeypatch.setitem(_gguf._SMALL, "mixer.D", "ssm_dt.bias")
    monkeypatch.setitem(_gguf._SMALL, "mixer.dt_proj.bias", "ssm_d")
    with pytest.raises(ExportError, match="nothing was written"):
        to_gguf(small("mamba"), tmp_path / "model.gguf")
    assert not list(tmp_path.iterdir())


# ---- vocabularies ----------------------------------------------------------------------------------------------------

TEXT = "Hé, wörld!\n\tIt's 12 o'clock; \\x41 \"quoted\" €\x00 done"


def test_bytes(tmp_path, llama):
    path = tmp_path / "model.gguf"
    to_gguf(small("mamba", 256), path)
    assert llama(path).tokenize(TEXT) == list(TEXT.encode())


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory):
    tokenizers = pytest.importorskip("tokenizers", reason="tokenizers is not installed")
    folder = tmp_path_factory.mktemp("tokenizer")
    made = tokenizers.Tokenizer(tokenizers.models.BPE())
    made.pre_tokenizer = tokenizers.pre_tokenizers.ByteLevel(add_prefix_space=False)
    made.decoder = tokenizers.decoders.ByteLevel()
    alphabet = tokenizers.pre_tokenizers.ByteLevel.alphabet()
    trainer = tokenizers.trainers.BpeTrainer(
        vocab_size=300, special_tokens=["<|end|>"], initial_alphabet=alphabet, show_progress=False
    )
    made.train_from_iterator(["the quick brown fox jumps over the lazy dog, it's done"] * 20, trainer)
    made.save(str(folder / "tokenizer.json"))
    (folder / "tokenizer_config.json").write_text(json.dumps({"eos_token": "<|end|>"}))
    return folder, made


def test_byte_pairs(tmp_path, llama, tokenizer):
    import gguf

    folder, made = tokenizer
    path, rows = tmp_path / "model.gguf", made.get_vocab_size() + 5
    to_gguf(small("mamba2", rows), path, tokenizer=folder)
    theirs = llama(path)
    for text in ("the lazy dog, it's done", "the  quick<|end|>brown", TEXT.replace("\x00", "")):
        assert theirs.tokenize(text) == made.encode(text).ids
    fields = gguf.GGUFReader(path).fields
    assert len(fields["tokenizer.ggml.tokens"].data) == small("mamba2", rows).embedding.weight.shape[0]
    assert int(fields["tokenizer.ggml.eos_token_id"].contents()) == made.token_to_id("<|end|>")


def test_tokenizers_that_will_not_do(tmp_path, tokenizer):
    folder, _ = tokenizer
    out = tmp_path / "model.gguf"
    with pytest.raises(ValueError, match="want tokens from 0 to 249"):
        to_gguf(small("mamba"), out, tokenizer=folder, check=False)
    with pytest.raises(FileNotFoundError, match=r"no tokenizer\.json"):
        to_gguf(small("mamba"), out, tokenizer=tmp_path, check=False)
    other = tmp_path / "other"
    other.mkdir()
    for text, message in [
        ("{", "is not a tokenizer"),
        ("[]", "is not a tokenizer"),
        (json.dumps({"model": {"type": "WordPiece", "vocab": {}}, "pre_tokenizer": None}), "got WordPiece"),
        (json.dumps({"model": {"type": "BPE", "vocab": {}}, "pre_tokenizer": {"type": "Metaspace"}}), "Metaspace"),
    ]:
        (other / "tokenizer.json").write_text(text)
        with pytest.raises(ValueError, match=message):
            to_gguf(small("mamba"), out, tokenizer=other, check=False)
    assert not out.exists()


# ---- what goes wrong -------------------------------------------------------------------------------------------------


def test_models_that_llama_cpp_has_not(tmp_path):
    out = tmp_path / "model.gguf"
    for layers, found in [
        (["mamba2", "attention"], "Attention, Mamba2"),
        (["s4d"], "S4D"),
        (["mamba", "mamba2"], "Mamba"),
    ]:
        with pytest.raises(ValueError, match=f"all 'mamba', or all 'mamba2', got {found}.*ONNX and torch-export"):
            to_gguf(build(*layers), out)
    for mixer, options, message in [
        ({"name": "mamba", "expand": 4}, {}, "expand: want 2, got 4"),
        ({"name": "mamba", "bias": True}, {}, "bias: want False"),
        ({"name": "mamba2", "head_dim": 8, "dt_limit": [0.01, 0.1]}, {}, "dt_limit: want None"),
        ({"name": "mamba2", "head_dim": 8, "skip_per_channel": True}, {}, "skip_per_channel: want False"),
        ({"name": "mamba2", "head_dim": 8}, {"norm_eps": 1e-6}, "norm_eps: want 1e-05"),
        ("mamba", {"d_intermediate": 16}, "d_intermediate: want 0"),
    ]:
        with pytest.raises(ValueError, match=message):
            to_gguf(LanguageModel(20, 16, 1, mixer=mixer, **options), out)
    assert not out.exists()


def test_what_cannot_be_asked(tmp_path, monkeypatch):
    model, out = small("mamba"), tmp_path / "model.gguf"
    with pytest.raises(ValueError, match="want f32, f16 or bf16, got 'q4_0'"):
        to_gguf(model, out, dtype="q4_0", check=False)
    with pytest.raises(IsADirectoryError, match="want a file"):
        to_gguf(model, tmp_path, check=False)
    to_gguf(model, out, check=False)
    with pytest.raises(FileExistsError, match="--force"):
        to_gguf(model, out, check=False)
    with torch.no_grad():
        model.embedding.weight[0, 0] = 1e6
    with pytest.raises(ValueError, match=r"token_embd\.weight holds numbers that f16 has not"):
        to_gguf(model, out, dtype="f16", force=True, check=False)
    monkeypatch.setattr(_folder, "find_spec", lambda name: None)
    with pytest.raises(ImportError, match=r"gguf.*pip install statewise\[gguf\]"):
        to_gguf(model, out, force=True)
    monkeypatch.undo()
    monkeypatch.setattr(_gguf, "find_spec", lambda name: None)
    with pytest.raises(ImportError, match=r"pip install llama-cpp-python.*--no-check"):
        to_gguf(model, out, force=True)
