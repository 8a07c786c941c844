"""What a state file must be to be loaded."""

import json
import struct

import pytest
import torch

from statewise import state
from statewise.inference import read
from statewise.inference.store import StateError, StateStore, load_context, save_context

from ..conftest import V, make_model

TEXT = torch.randint(0, V, (60,), generator=torch.Generator().manual_seed(0))


@pytest.fixture
def saved(tmp_path):
    model = make_model("hybrid")
    path = tmp_path / "s.safetensors"
    save_context(model, read(model, TEXT), path)
    return model, path


def _rewrite(path, change):
    """Write the file again with a changed metadata and tensors, properly sealed where `change` says nothing else."""
    from safetensors import safe_open
    from safetensors.torch import save_file

    with safe_open(str(path), "pt") as f:
        sealed = json.loads(f.metadata()["statewise.state"])
        tensors = {name: f.get_tensor(name).clone() for name in f.keys()}  # noqa: SIM118
    content = json.loads(sealed["body"])
    change(content, tensors)
    from hashlib import sha256

    from statewise.inference.store._fingerprint import digests

    content["digests"] = digests(tensors)
    body = json.dumps(content)
    meta = json.dumps({"body": body, "seal": sha256(body.encode()).hexdigest()})
    save_file(tensors, str(path), metadata={"statewise.state": meta})


def _no_leaf(content, tensors):
    del tensors["state.layers.1.k"]


def _shape(content, tensors):
    tensors["state.layers.0.ssm"] = tensors["state.layers.0.ssm"][:, :-1].contiguous()


def _dtype(content, tensors):
    tensors["state.layers.0.ssm"] = tensors["state.layers.0.ssm"].double()


def _cache(content, tensors):
    tensors["state.layers.1.k"] = tensors["state.layers.1.k"][:, 1:].contiguous()


def _logits(content, tensors):
    tensors["logits"] = tensors["logits"][1:].contiguous()


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda c, t: c.update(format=2), "want format 1, got 2; a newer version"),
        (lambda c, t: c.update(format="x"), "want format 1, got 'x'"),
        (lambda c, t: c.update(length=59), "tokens: want int32"),
        (lambda c, t: c.pop("key"), "header is damaged"),
        (lambda c, t: t["tokens"].add_(1), "tokens are not those of the key"),
        (lambda c, t: c.update(fingerprint="0" * 64), "is a state of another model"),
        (_no_leaf, r"missing \['state.layers.1.k'\]"),
        (_shape, r"state.layers.0.ssm: want torch.float32 \(1, 4, 16, 16\), got torch.float32 \(1, 3, 16, 16\)"),
        (_dtype, "state.layers.0.ssm: want torch.float32 .* got torch.float64"),
        (_cache, "state.layers.1.v: want"),
        (_logits, r"logits: want \(40,\)"),
    ],
)
def test_what_does_not_fit_is_named(saved, change, message):
    model, path = saved
    _rewrite(path, change)
    with pytest.raises(StateError, match=message) as info:
        load_context(model, path)
    assert str(path) in str(info.value)


def test_a_state_of_another_model(saved):
    _, path = saved
    for other in (make_model("hybrid", seed=1), make_model("mamba"), make_model("hybrid").double()):
        with pytest.raises(StateError, match="is a state of another model"):
            load_context(other, path)


def test_files_of_another_kind(tmp_path, saved):
    model, _ = saved
    model.save_pretrained(tmp_path / "m")
    (tmp_path / "text.safetensors").write_text("what is this" * 50)
    (tmp_path / "empty.safetensors").touch()
    state.save(model.init_state(1), tmp_path / "bare.safetensors")
    for name, message in [
        ("m/model.safetensors", "not a state saved with its tokens"),
        ("bare.safetensors", "not a state saved with its tokens"),
        ("text.safetensors", "cut short or is of another format"),
        ("empty.safetensors", "cut short or is of another format"),
        ("nowhere", "there is no such state file"),
        ("m", "cut short or is of another format"),
    ]:
        with pytest.raises(StateError, match=message):
            load_context(model, tmp_path / name)


def test_a_truncated_file_is_never_loaded(saved):
    model, path = saved
    data = path.read_bytes()
    for size in [0, 1, 7, 8, 9, 100, *range(1000, len(data), 997), len(data) - 1]:
        path.write_bytes(data[:size])
        with pytest.raises(StateError, match="cut short"):
            load_context(model, path)
    path.write_bytes(data + b"x")
    with pytest.raises(StateError):
        load_context(model, path)


def test_a_single_changed_byte_is_found(saved):
    """Anywhere in the header or in the numbers."""
    model, path = saved
    data = bytearray(path.read_bytes())
    header = 8 + struct.unpack("<Q", data[:8])[0]
    places = [*range(0, header, max(1, header // 60)), *range(header, len(data), max(1, (len(data) - header) // 60))]
    passed = []
    for at in places:
        changed = bytearray(data)
        changed[at] ^= 1
        path.write_bytes(changed)
        try:
            load_context(model, path)
        except StateError:
            continue
        passed.append(at)
    # Blanks that pad the header mean nothing.
    assert all(data[at : at + 1] == b" " for at in passed)


def test_a_poisoned_state_is_not_stored(tmp_path):
    model = make_model()
    context = read(model, TEXT)
    context.state.layers[0].ssm[0, 0, 0, 0] = float("nan")
    with pytest.raises(ValueError, match=r"layers\.0\.ssm holds NaN"):
        StateStore(tmp_path, model).save(context)
    assert not list(tmp_path.iterdir())


def test_several_rows_are_refused(tmp_path):
    model = make_model()
    context = read(model, TEXT)
    with pytest.raises(ValueError, match="one row, got 2"):
        save_context(model, context._replace(state=state.expand(context.state, 2)), tmp_path / "s")
