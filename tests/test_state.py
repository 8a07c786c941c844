"""Trees of tensors: rows are picked, merged, copied and stored alike in every leaf."""

from __future__ import annotations

from typing import NamedTuple

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from statewise import state as S


class Leaf(NamedTuple):
    conv: Tensor
    ssm: Tensor


class Tree(NamedTuple):
    layers: tuple
    count: Tensor


def tree(batch: int = 3, seed: int = 0) -> Tree:
    g = torch.Generator().manual_seed(seed)
    layers = tuple(
        Leaf(torch.randn(batch, 2, 4, generator=g), torch.randn(batch, 5, generator=g).to(torch.complex64))
        for _ in range(2)
    )
    return Tree((*layers, None), torch.arange(batch) + 10 * seed)


def equal(a, b) -> bool:
    one, two = S.leaves(a), S.leaves(b)
    return [n for n, _ in one] == [n for n, _ in two] and all(torch.equal(x, y) for (_, x), (_, y) in zip(one, two))


def test_leaves_have_names():
    names = [name for name, _ in S.leaves(tree())]
    assert names == ["layers.0.conv", "layers.0.ssm", "layers.1.conv", "layers.1.ssm", "count"]
    assert [name for name, _ in S.leaves(torch.zeros(1))] == ["state"]
    assert S.leaves(None) == []


def test_map_keeps_the_tree():
    got = S.map_state(lambda a, b: a + b, tree(), tree())
    assert type(got) is Tree
    assert type(got.layers[0]) is Leaf
    assert got.layers[2] is None
    assert torch.equal(got.count, 2 * tree().count)


@given(st.lists(st.integers(0, 2), max_size=6))
def test_select(rows):
    got = S.select(tree(), rows)
    for (_, a), (_, b) in zip(S.leaves(got), S.leaves(tree())):
        assert torch.equal(a, b[rows])


def test_select_takes_slices_and_tensors():
    assert equal(S.select(tree(), slice(1, None)), S.select(tree(), torch.tensor([1, 2])))


@given(st.integers(1, 4))
def test_expand_puts_copies_side_by_side(copies):
    got = S.expand(tree(), copies)
    assert S.batch_size(got) == 3 * copies
    for b in range(3):
        for c in range(copies):
            assert equal(S.select(got, [b * copies + c]), S.select(tree(), [b]))


def test_merge_undoes_select():
    parts = [S.select(tree(), [b]) for b in range(3)]
    assert equal(S.merge(parts), tree())


def test_merge_pads_shorter_caches_on_the_left():
    short, long = Leaf(torch.ones(1, 2, 4), torch.ones(1)), Leaf(torch.ones(2, 3, 4), torch.ones(2))
    got = S.merge([short, long])
    assert got.conv.shape == (3, 3, 4)
    assert not got.conv[0, 0].any()
    assert got.conv[0, 1:].all()
    assert got.conv[1:].all()


def test_clone_has_its_own_memory_and_its_gradient():
    a = tree()
    b = S.clone(a)
    b.count.zero_()
    assert not torch.equal(a.count, b.count)
    x = torch.ones(2, requires_grad=True)
    S.clone((x,))[0].sum().backward()
    assert x.grad is not None


def test_detach():
    x = torch.ones(2, requires_grad=True)
    assert not S.detach((x * 2,))[0].requires_grad


def test_to_changes_floating_and_complex_leaves_only():
    got = S.to(tree(), torch.float64)
    assert got.layers[0].conv.dtype == torch.float64
    assert got.layers[0].ssm.dtype == torch.complex128
    assert got.count.dtype == torch.int64
    got = S.to(tree(), dtype=torch.float64, device="meta")
    assert {t.device.type for _, t in S.leaves(got)} == {"meta"}
    assert got.layers[0].ssm.dtype == torch.complex128
    assert {t.device.type for _, t in S.leaves(S.to(tree(), "meta"))} == {"meta"}


def test_to_half_keeps_complex_leaves_in_single_precision():
    got = S.to(tree(), torch.bfloat16)
    assert got.layers[0].conv.dtype == torch.bfloat16
    assert got.layers[0].ssm.dtype == torch.complex64


def test_nbytes():
    assert S.nbytes(tree(3)) == 2 * (3 * 8 * 4 + 3 * 5 * 8) + 3 * 8
    assert S.nbytes(None) == 0


def test_batch_size():
    assert S.batch_size(tree(2)) == 2
    with pytest.raises(ValueError, match="disagree"):
        S.batch_size((torch.zeros(1), torch.zeros(2)))
    with pytest.raises(ValueError, match="no tensors"):
        S.batch_size(None)


# ---- on disk ---------------------------------------------------------------------------------------------------------


def test_save_and_load(tmp_path):
    path = tmp_path / "state.safetensors"
    strided = S.map_state(lambda t: torch.stack([t, t], -1)[..., 0], tree())
    S.save(strided, path)
    got = S.load(path, tree(1))
    assert equal(got, tree())
    assert type(got) is Tree
    assert got.layers[2] is None


def test_shared_memory_is_saved_twice(tmp_path):
    t = torch.ones(2, 3)
    S.save(Leaf(t, t), tmp_path / "state")
    assert equal(S.load(tmp_path / "state", Leaf(t, t)), Leaf(t, t))


@pytest.mark.parametrize(
    ("like", "message"),
    [
        (lambda: tree().layers[0], "missing .*conv.*unexpected"),
        (lambda: tree()._replace(count=torch.zeros(1)), "count: want torch.float32"),
        (lambda: S.map_state(lambda t: t[..., None], tree()), "want"),
        (lambda: S.map_state(lambda t: torch.cat([t, t], -1), tree()), "layers.0.conv: want"),
    ],
)
def test_a_state_of_another_model_is_refused(tmp_path, like, message):
    S.save(tree(), tmp_path / "state")
    with pytest.raises(ValueError, match=message):
        S.load(tmp_path / "state", like())


@pytest.mark.parametrize("content", [b"", b"\x80\x04.", b"x" * 200])
def test_a_file_that_is_not_safetensors_is_refused(tmp_path, content):
    (tmp_path / "state").write_bytes(content)
    with pytest.raises(ValueError, match="not a safetensors file"):
        S.load(tmp_path / "state", tree())


def test_a_truncated_file_is_refused(tmp_path):
    S.save(tree(), tmp_path / "state")
    data = (tmp_path / "state").read_bytes()
    (tmp_path / "state").write_bytes(data[:-8])
    with pytest.raises(ValueError, match="not a safetensors file"):
        S.load(tmp_path / "state", tree())


# ---- errors ----------------------------------------------------------------------------------------------------------


def test_errors():
    with pytest.raises(TypeError, match="state: want tensors"):
        S.map_state(torch.clone, [torch.zeros(1)])
    with pytest.raises(TypeError, match="state: want tensors"):
        S.leaves({"h": torch.zeros(1)})
    with pytest.raises(ValueError, match="trees differ"):
        S.map_state(torch.add, (torch.zeros(1),), (torch.zeros(1), torch.zeros(1)))
    with pytest.raises(ValueError, match="trees differ"):
        S.merge([(torch.zeros(1), None), (torch.zeros(1), torch.zeros(1))])
    with pytest.raises(ValueError, match="trees differ"):
        S.merge([(torch.zeros(1),), (None,)])
    with pytest.raises(ValueError, match="at least one"):
        S.merge([])
