"""torch.export of language models: any batch and length, states in and out, saved and read back."""

from __future__ import annotations

import pytest
import torch
from torch import nn
from torch.export import Dim
from torch.utils import _pytree

from statewise import state
from statewise.models.language import LanguageModel
from statewise.testing import assert_agree

V, D = 32, 16
MAMBA2 = {"name": "mamba2", "d_state": 8, "head_dim": 8}
KINDS = {
    "mamba": {"name": "mamba", "d_state": 4},
    "mamba2": MAMBA2,
    "s4d": {"name": "s4d", "d_state": 8},
    "s5": {"name": "s5", "d_state": 8},
    "attention": {"name": "attention", "n_heads": 2},
    "hybrid": [MAMBA2, {"name": "attention", "n_heads": 2, "n_kv_heads": 1}],
    "window": [{"name": "mamba", "d_state": 4}, {"name": "attention", "n_heads": 2, "window": 5}],
}
BATCH, LENGTH = Dim("batch", min=1, max=64), Dim("length", min=1, max=4096)
CAPACITY = 300
# Around the window, the tiles of kernels and the chunks, and one token.
SHAPES = [(3, 13), (1, 1), (2, 4), (2, 64), (5, 65), (1, 130)]


class Verb(nn.Module):
    """`extend` or `step` as the forward of a module, which is what torch.export takes."""

    def __init__(self, model: LanguageModel, verb: str):
        super().__init__()
        self.model, self.verb = model, verb

    def forward(self, x, now):
        return getattr(self.model, self.verb)(x, now)


def build(kind: str) -> LanguageModel:
    torch.manual_seed(0)
    return LanguageModel(V, D, 2, mixer=KINDS[kind]).eval()


def tokens(batch: int, length: int) -> torch.Tensor:
    return torch.randint(0, V, (batch, length))


def hold(got, want, length: int) -> None:
    for (name, g), (_, w) in zip(state.leaves(got), state.leaves(want), strict=True):
        if g.is_floating_point() or g.is_complex():
            assert_agree(g, w, name, length)
        else:
            assert torch.equal(g, w), name


def reread(program, path) -> nn.Module:
    torch.export.save(program, path)
    return torch.export.load(path).module()


@pytest.mark.parametrize("kind", KINDS)
def test_forward(kind, tmp_path):
    model = build(kind)
    program = torch.export.export(model, (tokens(3, 13),), dynamic_shapes=({0: BATCH, 1: LENGTH},))
    for run in (program.module(), reread(program, tmp_path / "model.pt2")):
        for shape in SHAPES:
            x = tokens(*shape)
            hold(run(x), model(x), shape[1])


@pytest.mark.parametrize("verb", ["extend", "step"])
@pytest.mark.parametrize("kind", KINDS)
def test_from_state_to_state(kind, verb, tmp_path):
    model = build(kind)
    start = model.init_state(3, capacity=CAPACITY)
    of_state = _pytree.tree_map(lambda _: {0: BATCH}, start)
    x, of_x = (tokens(3, 13), {0: BATCH, 1: LENGTH}) if verb == "extend" else (tokens(3, 1)[:, 0], {0: BATCH})
    program = torch.export.export(Verb(model, verb), (x, start), dynamic_shapes=(of_x, of_state))
    for run in (program.module(), reread(program, tmp_path / "model.pt2")):
        for batch, length in SHAPES:
            before = model.extend(tokens(batch, 7), model.init_state(batch, capacity=CAPACITY))[1]
            x = tokens(batch, length) if verb == "extend" else tokens(batch, 1)[:, 0]
            got = run(x, state.clone(before))
            hold(got, getattr(model, verb)(x, before), length)
            assert type(got[1]) is type(before)


def test_a_length_that_was_not_made_dynamic_is_refused():
    model = build("mamba2")
    program = torch.export.export(model, (tokens(3, 13),))
    with pytest.raises(Exception, match="13"):
        program.module()(tokens(3, 14))


def test_gradients_of_an_exported_program():
    # An exported program keeps nothing for the backward pass: it is made again there.
    model = build("hybrid")
    mixed = LanguageModel(V, D, 2, mixer=[KINDS["mamba"], KINDS["s4d"]]).eval()
    for owner in (model, mixed):
        run = torch.export.export(owner, (tokens(3, 13),), dynamic_shapes=({0: BATCH, 1: LENGTH},)).module()
        x = tokens(2, 70)
        want = torch.autograd.grad(owner(x).square().sum(), list(owner.parameters()))
        got = torch.autograd.grad(run(x).square().sum(), [run.get_parameter(n) for n, _ in owner.named_parameters()])
        hold(tuple(got), tuple(want), 70)
