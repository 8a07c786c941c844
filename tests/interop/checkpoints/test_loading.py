"""Loading: what is refused and how it is said, shards, dtypes, and memory."""

from __future__ import annotations

import json
import os
import pickle
import shutil
import subprocess
import sys
import textwrap
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

import statewise
from statewise.interop.checkpoints import convert, family_names
from statewise.models._tensors import open_tensors
from statewise.models.language import LanguageModel


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """A small Mamba checkpoint as transformers writes it."""
    model = LanguageModel(61, 16, 2, mixer={"name": "mamba", "d_state": 4})
    model.save_pretrained(tmp_path / "own")
    convert(tmp_path / "own", tmp_path / "hf", to="transformers")
    return tmp_path / "hf"


def change(folder: Path, **fields: Any) -> None:
    config = json.loads((folder / "config.json").read_text()) | fields
    (folder / "config.json").write_text(json.dumps({k: v for k, v in config.items() if v is not ...}))


def refused(folder: Path, *messages: str, kind: type[Exception] = ValueError) -> None:
    with pytest.raises(kind) as error:
        statewise.load(folder)
    for message in messages:
        assert message in str(error.value)


def test_an_unknown_family_is_named_with_what_is_close(folder):
    change(folder, model_type="mamba3")
    refused(folder, "unknown model family 'mamba3'; did you mean 'mamba")
    change(folder, model_type="xlstm")
    refused(folder, "unknown model family 'xlstm'", *family_names())
    change(folder, model_type=...)
    refused(folder, "want 'architecture'", "'model_type'", "'d_model' and 'n_layer'")


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"num_hidden_layers": -1}, "num_hidden_layers: want an integer from 0 to 10000, got -1"),
        ({"num_hidden_layers": 10**12}, "num_hidden_layers: want an integer from 0 to 10000"),
        ({"hidden_size": 0}, "hidden_size: want an integer from 1"),
        ({"hidden_size": "16"}, "hidden_size: want an integer from 1 to 2147483647, got '16'"),
        ({"vocab_size": True}, "vocab_size: want an integer"),
        ({"vocab_size": ...}, "vocab_size is missing"),
        ({"conv_kernel": 99}, "d_conv: want a width from 1 to 8, got 99"),
        ({"layer_norm_epsilon": float("nan")}, "layer_norm_epsilon: want a finite number above 0, got nan"),
        ({"layer_norm_epsilon": 0}, "layer_norm_epsilon: want a finite number above 0"),
        ({"expand": float("inf")}, "expand: want a finite number"),
        ({"use_bias": "yes"}, "use_bias: want true or false"),
        ({"hidden_act": "gelu"}, "hidden_act: want 'silu' (nothing else can be read), got 'gelu'"),
        ({"quantization_config": {"bits": 4}}, "quantization_config: quantised weights cannot be read"),
    ],
)
def test_values_that_cannot_be_served(folder, fields, message):
    change(folder, **fields)
    refused(folder, "config.json", message)


def test_every_problem_is_in_one_error(folder):
    tensors = load_file(folder / "model.safetensors")
    tensors["backbone.layers.0.mixer.conv1d.weight"] = torch.zeros(32, 4)
    tensors["backbone.layers.7.mixer.D"] = torch.zeros(32)
    del tensors["backbone.norm_f.weight"]
    save_file(tensors, folder / "model.safetensors")
    refused(
        folder,
        "as a mamba checkpoint: does not fit this model",
        "missing backbone.norm_f.weight (16,)",
        "unexpected backbone.layers.7.mixer.D",
        "backbone.layers.0.mixer.conv1d.weight: want shape (32, 1, 4), got (32, 4)",
    )


def test_a_checkpoint_that_is_not_what_its_config_says(folder):
    change(folder, state_size=8)
    refused(folder, "mixer.x_proj.weight: want shape (17, 32), got (9, 32)")


def test_not_finite_numbers(folder):
    tensors = load_file(folder / "model.safetensors")
    tensors["backbone.layers.1.mixer.D"][3] = torch.inf
    tensors["backbone.layers.0.mixer.A_log"][0, 0] = torch.nan
    save_file(tensors, folder / "model.safetensors")
    refused(folder, "layers.1.mixer.D: holds NaN or infinity", "layers.0.mixer.A_log: holds NaN or infinity")
    with pytest.raises(ValueError, match="holds NaN or infinity"):
        convert(folder, folder.parent / "out", to="statewise")
    assert not (folder.parent / "out").exists()


def test_a_tied_head_must_equal_the_embedding(folder):
    tensors = load_file(folder / "model.safetensors")
    tensors["lm_head.weight"] = tensors["backbone.embeddings.weight"].clone()
    save_file(tensors, folder / "model.safetensors")
    assert statewise.load(folder).lm_head is None
    tensors["lm_head.weight"][0, 0] += 1
    save_file(tensors, folder / "model.safetensors")
    refused(
        folder, "lm_head.weight: the configuration ties it to backbone.embeddings.weight, but it holds other numbers"
    )


def test_truncated_and_tampered_files(folder):
    weights = folder / "model.safetensors"
    good = weights.read_bytes()
    for bad in (
        good[: len(good) // 2],
        good[:4],
        b"",
        b"\xff" * 64,
        good[:8] + good[8:200].replace(b"[0,", b"[9,") + good[200:],
    ):
        weights.write_bytes(bad)
        refused(folder, "truncated or not a safetensors file")
    weights.write_bytes(good)
    for text in ("{", "[]", '{"a": ' * 10_000):
        (folder / "config.json").write_text(text)
        refused(folder, "config.json", "JSON")


class Trap:
    """What a hostile pickle may hold."""

    def __reduce__(self):
        return os.mkdir, ("sprung",)


def test_pickles(folder, monkeypatch):
    monkeypatch.chdir(folder)
    tensors = load_file(folder / "model.safetensors")
    (folder / "model.safetensors").unlink()
    torch.save(tensors, folder / "pytorch_model.bin")
    refused(folder, "pytorch_model.bin is a pickle, which could run code", "unsafe_pickle", kind=FileNotFoundError)
    want = {name.replace("embeddings", "embedding") for name in tensors}
    assert len(statewise.load(folder, unsafe_pickle=True).state_dict()) == len(want)
    for bad in (torch.nn.Linear(2, 2), {"x": Trap()}, Trap()):
        torch.save(bad, folder / "pytorch_model.bin")
        with pytest.raises(ValueError, match="holds more than tensors, so it is not loaded"):
            statewise.load(folder, unsafe_pickle=True)
    (folder / "pytorch_model.bin").write_bytes(pickle.dumps(Trap(), protocol=2))
    with pytest.raises(ValueError, match=r"pytorch_model.bin: (holds more than tensors|is truncated)"):
        statewise.load(folder, unsafe_pickle=True)
    assert not (folder / "sprung").exists()
    torch.save({"x": torch.zeros(2, dtype=torch.int8)}, folder / "pytorch_model.bin")
    with pytest.raises(ValueError, match=r"want a dense floating tensor, got torch.int8"):
        statewise.load(folder, unsafe_pickle=True)


def test_quantised_safetensors_are_refused(folder):
    tensors = load_file(folder / "model.safetensors")
    tensors["backbone.norm_f.weight"] = tensors["backbone.norm_f.weight"].to(torch.int8)
    save_file(tensors, folder / "model.safetensors")
    refused(folder, "backbone.norm_f.weight: want F16, BF16, F32, F64, got I8; quantised weights cannot be read")


def test_from_the_hub_only_what_is_needed_is_fetched(folder, monkeypatch):
    asked: list[tuple[str, list[str]]] = []

    def snapshot(name, allow_patterns):
        asked.append((name, allow_patterns))
        return str(folder)

    monkeypatch.setattr("huggingface_hub.snapshot_download", snapshot)
    statewise.load("owner/name", unsafe_pickle=True)
    patterns = ["config.json", "model.safetensors", "model.safetensors.index.json", "model-*-of-*.safetensors"]
    assert asked == [("owner/name", patterns)]
    torch.save(load_file(folder / "model.safetensors"), folder / "pytorch_model.bin")
    (folder / "model.safetensors").unlink()
    statewise.load("owner/name", unsafe_pickle=True)
    assert asked[2] == ("owner/name", ["config.json", "pytorch_model.bin"])


# ---- shards ----------------------------------------------------------------------------------------------------------


@pytest.fixture
def shards(folder: Path, tmp_path: Path) -> Path:
    convert(folder, tmp_path / "shards", to="transformers", max_shard=4000)
    assert len(list((tmp_path / "shards").glob("model-*-of-*.safetensors"))) > 3
    return tmp_path / "shards"


def test_shards_give_the_same(folder, shards, tmp_path):
    one, many = open_tensors(folder), open_tensors(shards)
    assert set(one) == set(many)
    assert all(torch.equal(one[name], many[name]) for name in one)
    tokens = torch.arange(9)[None]
    assert torch.equal(statewise.load(folder)(tokens), statewise.load(shards)(tokens))
    statewise.load(shards).save_pretrained(tmp_path / "again", max_shard=4000)
    assert (tmp_path / "again/model.safetensors.index.json").exists()
    assert torch.equal(statewise.load(tmp_path / "again")(tokens), statewise.load(shards)(tokens))


def test_bad_shards(shards, tmp_path):
    index = shards / "model.safetensors.index.json"
    good = json.loads(index.read_text())

    def write(**weight_map: Any) -> None:
        index.write_text(json.dumps({"weight_map": good["weight_map"] | weight_map}))

    # A name that leads out of the folder is never opened.
    shutil.copy(next(shards.glob("*.safetensors")), tmp_path / "outside.safetensors")
    for name in ("../outside.safetensors", str(tmp_path / "outside.safetensors"), "sub\\x.safetensors", "a.bin"):
        write(x=name)
        refused(shards, "want plain names of .safetensors files in 'weight_map'")
    write(x=3)
    refused(shards, "want 'weight_map', an object from tensor names to file names")
    write(x=next(iter(good["weight_map"].values())))
    refused(shards, "does not list what its shards hold: x")
    write()
    first = sorted(shards.glob("*.safetensors"))[0]
    shutil.copy(first, shards / "model-00002-of-00002.safetensors")
    write(**{next(iter(good["weight_map"])): "model-00002-of-00002.safetensors"})
    refused(shards, "which another shard holds too")
    first.unlink()
    write()
    refused(shards, "shards, 1 are missing: model-00001-of-", kind=FileNotFoundError)


# ---- dtype, device, memory -------------------------------------------------------------------------------------------


def test_dtypes_are_kept_unless_asked(folder):
    tensors = load_file(folder / "model.safetensors")
    mixed = {name: t if name.endswith(("A_log", ".D")) else t.bfloat16() for name, t in tensors.items()}
    save_file(mixed, folder / "model.safetensors")
    model = statewise.load(folder)
    assert model.blocks[0].mixer.A_log.dtype == torch.float32
    assert model.blocks[0].mixer.in_proj.weight.dtype == torch.bfloat16
    assert model(torch.arange(5)[None]).dtype == torch.bfloat16
    convert(folder, folder.parent / "own2", to="statewise")
    convert(folder.parent / "own2", folder.parent / "back", to="transformers")
    back = load_file(folder.parent / "back/model.safetensors")
    assert {name: t.dtype for name, t in back.items()} == {name: t.dtype for name, t in mixed.items()}
    assert json.loads((folder.parent / "back/config.json").read_text())["dtype"] == "bfloat16"
    assert {p.dtype for p in statewise.load(folder, dtype=torch.float64).parameters()} == {torch.float64}


def test_training_a_loaded_model_does_not_touch_its_file(folder):
    before = (folder / "model.safetensors").read_bytes()
    model = statewise.load(folder)
    with torch.no_grad():
        for p in model.parameters():
            p.zero_()
    assert (folder / "model.safetensors").read_bytes() == before
    assert statewise.load(folder).embedding.weight.any()


@pytest.mark.skipif(sys.platform != "linux", reason="peak memory is read from Linux's /proc")
@pytest.mark.parametrize("to", ["bfloat16", "float32"])
def test_a_model_is_not_held_twice(tmp_path, to):
    """Peak of memory that is the process's own: mapped files are the system's, to be dropped whenever it likes."""
    model = LanguageModel(40_000, 256, 4, mixer="mamba", tie_embeddings=False)
    model.save_pretrained(tmp_path / "own")
    size = sum(p.nbytes for p in model.parameters())
    assert size > 80e6
    convert(tmp_path / "own", tmp_path / "hf", to="transformers")
    code = f"""
        import threading, time, torch, statewise

        def own():
            with open("/proc/self/status") as file:
                return next(int(line.split()[1]) * 1024 for line in file if line.startswith("RssAnon"))

        def watch():
            global peak
            while not done:
                peak = max(peak, own())
                time.sleep(0.0005)

        statewise.load({str(tmp_path / "own")!r})  # everything is imported
        start, peak, done = own(), 0, False
        thread = threading.Thread(target=watch)
        thread.start()
        model = statewise.load({str(tmp_path / "hf")!r}, dtype=torch.{to})
        done = True
        thread.join()
        print(peak - start)
    """
    out = subprocess.run([sys.executable, "-c", textwrap.dedent(code)], capture_output=True, text=True, check=True)
    # As stored nothing is copied; as bfloat16 half is new. Beyond that, one tensor and what the allocator keeps.
    new = size / 2 if to == "bfloat16" else 0
    assert int(out.stdout) < new + 0.3 * size
