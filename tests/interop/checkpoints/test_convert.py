"""`convert` and its command: refusals, files beside the weights, and nothing half-written."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch

import statewise
from statewise import cli
from statewise.interop.checkpoints import convert
from statewise.models.language import LanguageModel

MAMBA = {"name": "mamba", "d_state": 4}
MAMBA2 = {"name": "mamba2", "d_state": 4, "head_dim": 8}


@pytest.fixture
def own(tmp_path: Path) -> Path:
    LanguageModel(61, 16, 2, mixer=MAMBA, pad_vocab_to=16).save_pretrained(tmp_path / "own")
    return tmp_path / "own"


def test_the_command(own, tmp_path, capsys):
    assert cli.main(["convert", str(own), str(tmp_path / "hf"), "--to", "transformers"]) == 0
    assert "hf: mamba, " in capsys.readouterr().out
    tokens = torch.arange(7)[None]
    assert torch.equal(statewise.load(tmp_path / "hf")(tokens)[..., :61], statewise.load(own)(tokens))
    for argv, message in (
        ([str(own), str(tmp_path / "hf"), "--to", "transformers"], "is not empty"),
        ([str(own), str(own), "--to", "statewise", "--overwrite", "true"], "is the source"),
        ([str(own), str(tmp_path / "x")], "--to is missing"),
        ([str(own), str(tmp_path / "x"), "--to", "gguf"], "--to: want statewise|transformers|mamba_ssm, got 'gguf'"),
        (
            [str(own), str(tmp_path / "x"), "--to", "transformers", "--family", "mamba3"],
            "unknown model family 'mamba3'",
        ),
        (
            [str(own), str(tmp_path / "x"), "--to", "transformers", "--family", "mamba_ssm"],
            "not a format of transformers",
        ),
        ([str(tmp_path / "no"), str(tmp_path / "x"), "--to", "statewise"], "no such directory"),
        ([str(own), str(tmp_path / "x"), "--to", "transformers", "--write-pickle", "true"], "to='mamba_ssm' only"),
        ([str(own), str(tmp_path / "x"), "--to", "statewise", "--max-shard-gb", "0"], "--max-shard-gb: want a number"),
    ):
        assert cli.main(["convert", *argv]) == 2
        assert message in capsys.readouterr().err
    assert sorted(p.name for p in tmp_path.iterdir()) == ["hf", "own"]


def test_a_format_without_words_for_a_model_says_which(tmp_path):
    LanguageModel(61, 16, 4, mixer=[MAMBA, MAMBA2]).save_pretrained(tmp_path / "own")
    with pytest.raises(ValueError) as error:
        convert(tmp_path / "own", tmp_path / "out", to="transformers")
    for part in ("no family of transformers can say this model", "mamba: layers.1.mixer.name: 'mamba2', there 'mamba'"):
        assert part in str(error.value)
    with pytest.raises(ValueError, match=r"mamba_ssm: layers.0.mixer"):
        convert(tmp_path / "own", tmp_path / "out", to="mamba_ssm")
    assert not (tmp_path / "out").exists()


def test_overwriting_leaves_other_files_and_no_stale_weights(own, tmp_path):
    out = tmp_path / "out"
    convert(own, out, to="transformers", max_shard=4000)
    (out / "README.md").write_text("mine")
    with pytest.raises(FileExistsError, match="is not empty"):
        convert(own, out, to="mamba_ssm")
    convert(own, out, to="mamba_ssm", overwrite=True)
    assert sorted(p.name for p in out.iterdir()) == ["README.md", "config.json", "model.safetensors"]
    assert statewise.load(out).vocab_size == 61


def test_a_failure_leaves_what_was_there(own, tmp_path, monkeypatch):
    out = tmp_path / "out"
    convert(own, out, to="transformers")
    before = {p.name: p.read_bytes() for p in out.iterdir()}

    def full(tensors, path, metadata=None):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("safetensors.torch.save_file", full)
    with pytest.raises(OSError, match="No space left"):
        convert(own, out, to="mamba_ssm", overwrite=True)
    assert {p.name: p.read_bytes() for p in out.iterdir()} == before
    assert sorted(p.name for p in tmp_path.iterdir()) == ["out", "own"]


def test_tokenizer_and_special_tokens_travel(own, tmp_path):
    hf, back = tmp_path / "hf", tmp_path / "back"
    convert(own, hf, to="transformers")
    config = json.loads((hf / "config.json").read_text()) | {"eos_token_id": 7, "pad_token_id": None}
    (hf / "config.json").write_text(json.dumps(config))
    (hf / "tokenizer.json").write_text("{}")
    (hf / "code.py").write_text("raise SystemExit")
    convert(hf, tmp_path / "middle", to="statewise")
    assert sorted(p.name for p in (tmp_path / "middle").iterdir()) == [
        "config.json", "generation_config.json", "model.safetensors", "tokenizer.json",
    ]  # fmt: skip
    convert(tmp_path / "middle", back, to="transformers")
    assert json.loads((back / "config.json").read_text())["eos_token_id"] == 7


def test_progress_counts_every_byte(own, tmp_path):
    seen: list[tuple[int, int]] = []
    done = convert(own, tmp_path / "out", to="transformers", progress=lambda d, t: seen.append((d, t)))
    assert seen == sorted(seen)
    assert seen[-1] == (done.nbytes, done.nbytes)
    assert done.parameters == sum(p.numel() for p in statewise.load(own).parameters())


def test_another_dtype(own, tmp_path):
    convert(own, tmp_path / "half", to="statewise", dtype=torch.bfloat16)
    want = statewise.load(own).embedding.weight.bfloat16()
    assert torch.equal(statewise.load(tmp_path / "half").embedding.weight, want)


def test_bad_arguments(own, tmp_path):
    with pytest.raises(ValueError, match="unknown format 'transformer'; did you mean 'transformers'"):
        convert(own, tmp_path / "x", to="transformer")  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="max_shard: want at least 1 byte"):
        convert(own, tmp_path / "x", to="statewise", max_shard=0)
    with pytest.raises(ValueError, match="family: want None with to='statewise'"):
        convert(own, tmp_path / "x", to="statewise", family="mamba")
    (tmp_path / "file").write_text("")
    with pytest.raises(FileExistsError, match="is a file; want a folder"):
        convert(own, tmp_path / "file", to="statewise")
