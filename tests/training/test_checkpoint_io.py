import math
import os
import pickle
import resource
import signal

import pytest
import torch

from statewise.training.checkpoint_io import CheckpointError, load_checkpoint, save_checkpoint


def _tree():
    shared = torch.randn(3, 4)
    return {
        "state_dict": {"a": shared, "tied": shared, "row": shared[1], "turned": shared.T, "half": shared.bfloat16()},
        "optimizer": {"state": {0: {"step": torch.tensor(3.0)}, 7: {}}, "betas": (0.9, 0.95), "names": ["x", None]},
        "empty": torch.zeros(0, 3),
        "whole": torch.tensor([True, False]),
        "number": 0.1 + 0.2,
        "large": 2**62,
        "infinite": math.inf,
        "yes": True,
    }


def _same(a, b):
    if isinstance(a, torch.Tensor):
        return isinstance(b, torch.Tensor) and a.dtype == b.dtype and torch.equal(a, b)
    if isinstance(a, dict):
        return type(a) is type(b) and list(a) == list(b) and all(_same(a[k], b[k]) for k in a)
    if isinstance(a, (list, tuple)):
        return type(a) is type(b) and len(a) == len(b) and all(map(_same, a, b))
    return type(a) is type(b) and a == b


def test_round_trip(tmp_path):
    tree = _tree()
    save_checkpoint(tree, tmp_path / "sub" / "c.safetensors")
    back = load_checkpoint(tmp_path / "sub" / "c.safetensors")
    assert _same(tree, back)
    assert back["state_dict"]["a"].data_ptr() == back["state_dict"]["tied"].data_ptr()
    assert os.listdir(tmp_path / "sub") == ["c.safetensors"]


def test_a_value_without_a_form_says_where(tmp_path):
    with pytest.raises(TypeError, match="/loops/x is a set"):
        save_checkpoint({"loops": {"x": {1}}}, tmp_path / "c")
    assert not (tmp_path / "c").exists()


def test_broken_files(tmp_path):
    path = tmp_path / "c.safetensors"
    with pytest.raises(CheckpointError, match="no checkpoint"):
        load_checkpoint(path)
    save_checkpoint(_tree(), path)
    whole = path.read_bytes()
    for size in (0, 5, 100, len(whole) - 1):
        path.write_bytes(whole[:size])
        with pytest.raises(CheckpointError, match="cut short"):
            load_checkpoint(path)
    path.write_bytes(pickle.dumps({"a": 1}))
    with pytest.raises(CheckpointError, match="another format"):
        load_checkpoint(path)


def test_a_file_of_weights_is_not_a_checkpoint(tmp_path):
    from safetensors.torch import save_file

    save_file({"a": torch.zeros(2)}, tmp_path / "c")
    with pytest.raises(CheckpointError, match="not a training checkpoint"):
        load_checkpoint(tmp_path / "c")


@pytest.mark.parametrize("value", [math.nan, -math.inf])
def test_weights_that_are_not_finite_are_refused(tmp_path, value):
    save_checkpoint({"state_dict": {"w": torch.tensor([1.0, value])}}, tmp_path / "c")
    with pytest.raises(CheckpointError, match="weight w holds NaN"):
        load_checkpoint(tmp_path / "c")


@pytest.fixture
def small_disk():
    """Files of this process may not grow past 100 kB; writing more fails as on a full disk."""
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    handler = signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    resource.setrlimit(resource.RLIMIT_FSIZE, (100_000, before[1]))
    yield
    resource.setrlimit(resource.RLIMIT_FSIZE, before)
    signal.signal(signal.SIGXFSZ, handler)


def test_a_full_disk_leaves_the_old_checkpoint(tmp_path, small_disk):
    path = tmp_path / "c.safetensors"
    save_checkpoint({"state_dict": {"w": torch.ones(10)}}, path)
    old = path.read_bytes()
    with pytest.raises(CheckpointError, match=r"c\.safetensors: no space left \(4\.0 MB needed"):
        save_checkpoint({"state_dict": {"w": torch.ones(1_000_000)}}, path)
    assert path.read_bytes() == old
    assert os.listdir(tmp_path) == ["c.safetensors"]
