"""causal_conv1d under its names against a plain definition in float64: layouts, states, rings, documents, releases."""

from __future__ import annotations

from functools import partial
from itertools import pairwise

import pytest
import shim_definitions as plain
import torch
from shim_definitions import assert_near, check, randn

ROWS, CHANNELS, LENGTH, WIDTH = 2, 5, 13, 4


@pytest.mark.parametrize("activation", [None, "silu", "swish"])
@pytest.mark.parametrize("last", [False, True])
def test_causal_conv1d_fn(activation, last):
    from causal_conv1d import causal_conv1d_fn

    x = randn(ROWS, LENGTH, CHANNELS).transpose(1, 2) if last else randn(ROWS, CHANNELS, LENGTH)
    inputs = {"x": x, "weight": randn(CHANNELS, WIDTH), "bias": randn(CHANNELS),
              "initial_states": randn(ROWS, CHANNELS, WIDTH - 1)}  # fmt: skip
    ours = partial(causal_conv1d_fn, activation=activation, return_final_states=True)
    check(
        ours, lambda initial_states, **i: plain.conv(**i, initial=initial_states, activation=activation), inputs, "fn"
    )
    y, final = causal_conv1d_fn(x, inputs["weight"], return_final_states=True)
    assert y.stride() == (x.stride() if last else y.contiguous().stride())
    out = torch.empty_like(final)
    assert causal_conv1d_fn(x, inputs["weight"], return_final_states=True, final_states_out=out)[1] is out
    assert torch.equal(out, final)


@pytest.mark.parametrize("with_state", [False, True])
def test_documents_in_a_row(with_state):
    from causal_conv1d import causal_conv1d_fn

    lengths, padding = (2, 1, 7), 3
    seq_idx = torch.tensor([[0, 0, 1] + [2] * 7 + [-1] * 3], dtype=torch.int32)
    inputs = {"x": randn(1, CHANNELS, LENGTH), "weight": randn(CHANNELS, WIDTH), "bias": randn(CHANNELS)}
    if with_state:
        inputs["initial_states"] = randn(1, CHANNELS, WIDTH - 1)

    def definition(x, weight, bias, initial_states=None):
        parts = x.split([*lengths, padding], -1)
        before = [initial_states, None, None]
        ys = [plain.conv(part, weight, bias, initial=b, activation="silu")[0] for part, b in zip(parts, before)]
        return torch.cat([*ys, torch.zeros_like(parts[-1])], -1)

    check(partial(causal_conv1d_fn, seq_idx=seq_idx, activation="silu"), definition, inputs, "documents")


# A ring takes no more inputs at once than it has places.
@pytest.mark.parametrize(
    ("length", "ring"), [(n, r) for r in (False, True) for n in (None, 1, 3, 9) if not r or n != 9]
)
@pytest.mark.parametrize("rows", ["own", "chosen", "padded"])
def test_causal_conv1d_update(length, ring, rows):
    from causal_conv1d import causal_conv1d_update

    size, batch = 7, 3
    x = randn(batch, CHANNELS) if length is None else randn(batch, CHANNELS, length)
    weight, bias = randn(CHANNELS, WIDTH), randn(CHANNELS)
    state = randn(batch if rows == "own" else 6, CHANNELS, size)
    seen = torch.tensor([0, 5, 9], dtype=torch.int32) if ring else None
    indices = {"own": None, "chosen": [4, 0, 3], "padded": [4, -1, 3]}[rows]
    wide, want_state = x.double() if length else x.double()[..., None], state.double().clone()
    want = torch.zeros_like(wide)
    for i, row in enumerate(range(batch) if indices is None else indices):
        if row < 0:
            continue
        before = want_state[row]
        if ring:
            before = before.roll(-int(seen[i]), -1)  # oldest first
        want[i], _ = (t[0] for t in plain.conv(
            wide[i : i + 1], weight.double(), bias.double(), initial=before[None, :, size - WIDTH + 1 :],
            activation="silu",
        ))  # fmt: skip
        after = torch.cat([before, wide[i]], -1)[:, -size:]
        if ring:
            after = after.roll(int(seen[i]) + wide.shape[-1], -1)
        want_state[row] = after
    indices = None if indices is None else torch.tensor(indices, dtype=torch.int32)
    y = causal_conv1d_update(x, state, weight, bias, "silu", cache_seqlens=seen, conv_state_indices=indices)
    assert_near(y, want if length else want[..., 0], "output")
    assert torch.equal(state, want_state.float()), "the state is a copy of inputs"


def test_varlen_states():
    from causal_conv1d.causal_conv1d_varlen import causal_conv1d_varlen_states

    x, borders = randn(12, CHANNELS), torch.tensor([0, 5, 5, 7, 12])
    states = causal_conv1d_varlen_states(x, borders, 4)
    for i, (start, end) in enumerate(pairwise(borders)):
        want = torch.cat([torch.zeros(4, CHANNELS), x[start:end]])[-4:]
        assert torch.equal(states[i], want.t())


def test_every_release_of_the_extension():
    import causal_conv1d_cuda as extension

    x, weight, bias = randn(ROWS, CHANNELS, LENGTH), randn(CHANNELS, WIDTH), randn(CHANNELS)
    initial, dout = randn(ROWS, CHANNELS, WIDTH - 1), randn(ROWS, CHANNELS, LENGTH, seed=1)
    leaves = [t.double().requires_grad_() for t in (x, weight, bias, initial)]
    y, final = plain.conv(*leaves, activation="silu")
    y0, _ = plain.conv(*leaves[:3], activation="silu")
    grads = torch.autograd.grad(y, leaves, dout.double())
    grads0 = torch.autograd.grad(y0, leaves[:3], dout.double())

    lead, out, state = (x, weight, bias), torch.empty_like(x), torch.empty_like(initial)
    for arguments in ((True,), (None, True), (None, None, None, True)):
        assert_near(extension.causal_conv1d_fwd(*lead, *arguments), y0, f"fwd {len(arguments)}")
    assert extension.causal_conv1d_fwd(*lead, None, initial, out, state, True) is None
    assert_near(out, y, "fwd, written")
    assert_near(state, final, "final state, written")

    lead = (*lead, dout)
    for arguments in ((None, True), (None, None, True), (None, None, None, None, False, True)):
        found = extension.causal_conv1d_bwd(*lead, *arguments)
        for got, want in zip(found, grads0):
            assert_near(got, want, f"bwd {len(arguments)}")
    into = [torch.empty_like(t) for t in (x, weight, bias, initial)]
    assert extension.causal_conv1d_bwd(*lead, None, initial, None, *into, True) is None
    for got, want in zip(into, grads):
        assert_near(got, want, "bwd, written")

    now, _ = plain.conv(x.double()[..., :1], weight.double(), bias.double(), initial.double(), "silu")
    lead = (x[..., 0], None, weight, bias)
    for more in ((), (None,), (None, None)):
        given = (lead[0], initial.clone(), *lead[2:])
        assert_near(extension.causal_conv1d_update(*given, True, *more), now[..., 0], "update")
    out = torch.empty_like(x[..., 0])
    extension.causal_conv1d_update(lead[0], initial.clone(), *lead[2:], out, True, None, None)
    assert_near(out, now[..., 0], "update, written")
    with pytest.raises(TypeError, match="want 4, 5, 7 or 8 arguments, got 3"):
        extension.causal_conv1d_fwd(x, weight, bias)


def test_an_activation_that_there_is_not():
    from causal_conv1d import causal_conv1d_fn

    with pytest.raises(NotImplementedError, match="want None, 'silu' or 'swish', got 'gelu'"):
        causal_conv1d_fn(randn(1, 2, 3), randn(2, 4), activation="gelu")
