"""The scans under the names of mamba_ssm against plain definitions in float64."""

from __future__ import annotations

from functools import partial

import pytest
import shim_definitions as plain
import torch
from shim_definitions import assert_near, cast, check, randn
from torch.nn.functional import linear, silu

from statewise.testing import assert_agree

ROWS, CHANNELS, LENGTH, N = 2, 6, 21, 4


def scan_inputs(directions: str, kind: str = "real", gated: bool = True) -> dict:
    complex_ = kind == "complex"
    times = 2 if complex_ else 1
    shapes = {
        "constant": (CHANNELS, N),
        "shared": (ROWS, N, times * LENGTH),
        "grouped": (ROWS, 3, N, times * LENGTH),
    }
    b, c = directions.split("-")

    def direction(which, seed):
        t = randn(*shapes[which], seed=seed)
        return torch.complex(t, randn(*shapes[which], seed=seed + 50)) if complex_ and which == "constant" else t

    A = -randn(CHANNELS, N).abs() - 0.1
    return {
        "u": randn(ROWS, CHANNELS, LENGTH), "delta": randn(ROWS, CHANNELS, LENGTH, seed=1),
        "A": torch.complex(A, randn(CHANNELS, N, seed=2)) if complex_ else A,
        "B": direction(b, 3), "C": direction(c, 4), "D": randn(CHANNELS, seed=5),
        "z": randn(ROWS, CHANNELS, LENGTH, seed=6) if gated else None, "delta_bias": randn(CHANNELS, seed=7),
        "delta_softplus": True, "return_last_state": True,
    }  # fmt: skip


@pytest.mark.parametrize("kind", ["real", "complex"])
@pytest.mark.parametrize(
    "directions", ["shared-shared", "grouped-grouped", "constant-constant", "constant-shared", "grouped-constant"]
)
def test_selective_scan_fn(directions, kind):
    from mamba_ssm.ops.selective_scan_interface import selective_scan_fn, selective_scan_ref

    inputs = scan_inputs(directions, kind)
    check(selective_scan_fn, plain.selective_scan, inputs, "selective_scan_fn")
    check(selective_scan_ref, plain.selective_scan, inputs, "selective_scan_ref")
    assert selective_scan_fn(**inputs)[0].is_contiguous()  # callers take views of it


def test_selective_scan_cuda():
    import selective_scan_cuda
    import selective_scan_cuda_core
    import selective_scan_cuda_oflex

    given = scan_inputs("grouped-grouped")
    del given["return_last_state"]
    order = ("u", "delta", "A", "B", "C", "D", "z", "delta_bias")
    leaves = {n: t.double().requires_grad_() for n, t in given.items() if n != "delta_softplus"}
    y, last = plain.selective_scan(**leaves, delta_softplus=True, return_last_state=True)
    dout = randn(*y.shape, seed=9)
    want = dict(zip(order, torch.autograd.grad(y, [leaves[n] for n in order], dout.double())))
    ungated = {**leaves, "z": None}
    y0 = plain.selective_scan(**ungated, delta_softplus=True)
    without = [n for n in order if n != "z"]
    want0 = dict(zip(without, torch.autograd.grad(y0, [leaves[n] for n in without], dout.double())))

    args = [given[n] for n in order]
    out, x, out_z = selective_scan_cuda.fwd(*args, True)
    assert_near(x[:, :, -1, 1::2], last, "last state")
    assert_near(out, y0, "before the gate")
    assert_near(out_z, y, "after the gate")
    dz = torch.empty_like(given["z"])
    *grads, again = selective_scan_cuda.bwd(*args, dout, x, out, dz, True, True)
    for name, got in zip((*without, "z"), grads):
        assert_near(got, want[name], name)
    assert grads[-1] is dz
    assert_near(again, y, "recomputed")

    args = [given[n] for n in without]
    for module, options in ((selective_scan_cuda_core, (1,)), (selective_scan_cuda_oflex, (1, True))):
        out, x = module.fwd(*args, True, *options)
        assert_near(out, y0, module.__name__)
        for name, got in zip(without, module.bwd(*args, dout, x, True, 1)):
            assert_near(got, want0[name], f"{module.__name__}: {name}")
    half = [t.bfloat16() if t.ndim > 2 else t for t in args]
    assert selective_scan_cuda_oflex.fwd(*half, True, 1, True)[0].dtype == torch.float32
    assert selective_scan_cuda_oflex.fwd(*half, True, 1, False)[0].dtype == torch.bfloat16


def inner_inputs(kind: str) -> dict:
    rank, real = 2, kind == "real"
    width = rank + 2 * N * (1 if real else 2)
    A = -randn(CHANNELS, N).abs() - 0.1
    return {
        "xz": randn(ROWS, 2 * CHANNELS, LENGTH), "conv1d_weight": randn(CHANNELS, 1, 3), "conv1d_bias": randn(CHANNELS),
        "x_proj_weight": 0.3 * randn(width, CHANNELS), "delta_proj_weight": randn(CHANNELS, rank),
        "out_proj_weight": randn(5, CHANNELS), "out_proj_bias": randn(5),
        "A": A if real else torch.complex(A, randn(CHANNELS, N, seed=2)), "D": randn(CHANNELS, seed=3),
        "delta_bias": randn(CHANNELS, seed=4),
    }  # fmt: skip


def plain_inner(xz, conv1d_weight, conv1d_bias, x_proj_weight, delta_proj_weight, out_proj_weight, out_proj_bias, A,
                D, delta_bias, A_b=None, norms=(None, None, None), project=True):  # fmt: skip
    x, z = xz.chunk(2, 1)
    x, _ = plain.conv(x, conv1d_weight[:, 0], conv1d_bias, activation="silu")
    rank, width = delta_proj_weight.shape[1], A.shape[1] * (2 if A.is_complex() else 1)
    dt, B, C = linear(x.transpose(1, 2), x_proj_weight).split([rank, width, width], -1)
    dt = linear(dt, delta_proj_weight)
    B, C, dt = (t if w is None else plain.rms(t, w, eps=1e-6) for t, w in zip((B, C, dt), norms))
    if A.is_complex():
        B, C = (t.unflatten(-1, (-1, 2)).transpose(1, 2).flatten(-2) for t in (B, C))
    else:
        B, C = B.transpose(1, 2), C.transpose(1, 2)
    dt = dt.transpose(1, 2)
    y = plain.selective_scan(x, dt, A, B, C, D, z, delta_bias, True)
    if A_b is not None:
        back = [t.flip(-1) for t in (x, dt, B, C, z)]
        y = y + plain.selective_scan(*back[:2], A_b, *back[2:4], D, back[4], delta_bias, True).flip(-1)
    return linear(y.transpose(1, 2), out_proj_weight, out_proj_bias) if project else y


@pytest.mark.parametrize("kind", ["real", "complex"])
def test_mamba_inner_fn(kind):
    from mamba_ssm import mamba_inner_fn

    check(mamba_inner_fn, plain_inner, inner_inputs(kind), "mamba_inner_fn")


def test_mamba_inner_fn_with_norms():
    from mamba_ssm import mamba_inner_fn

    norms = {"b_rms_weight": randn(N), "c_rms_weight": randn(N, seed=1), "dt_rms_weight": randn(CHANNELS, seed=2)}

    def definition(b_rms_weight, c_rms_weight, dt_rms_weight, **inputs):
        return plain_inner(**inputs, norms=(b_rms_weight, c_rms_weight, dt_rms_weight))

    check(mamba_inner_fn, definition, inner_inputs("real") | norms, "mamba_inner_fn")


def test_the_inner_functions_of_vision_mamba():
    from mamba_ssm.ops.selective_scan_interface import bimamba_inner_fn, mamba_inner_fn_no_out_proj

    inputs = inner_inputs("real")
    both = inputs | {"A_b": -randn(CHANNELS, N, seed=8).abs()}
    check(bimamba_inner_fn, plain_inner, both, "bimamba_inner_fn")
    without = {n: t for n, t in inputs.items() if not n.startswith("out_proj")}
    definition = partial(plain_inner, out_proj_weight=None, out_proj_bias=None, project=False)
    check(mamba_inner_fn_no_out_proj, definition, without, "mamba_inner_fn_no_out_proj")


# ---- SSD -------------------------------------------------------------------------------------------------------------

HEADS, WIDTH, GROUPS = 4, 3, 2


def ssd_inputs(**more) -> dict:
    return {
        "x": randn(ROWS, LENGTH, HEADS, WIDTH), "dt": randn(ROWS, LENGTH, HEADS), "A": -randn(HEADS).abs() - 0.1,
        "B": randn(ROWS, LENGTH, GROUPS, N), "C": randn(ROWS, LENGTH, GROUPS, N, seed=1), "D": randn(HEADS, WIDTH),
        "z": randn(ROWS, LENGTH, HEADS, WIDTH, seed=2), "dt_bias": randn(HEADS, seed=3), **more,
    }  # fmt: skip


@pytest.mark.parametrize("limit", [None, (0.3, 1.1)])
def test_mamba_chunk_scan_combined(limit):
    from mamba_ssm.ops.triton.ssd_combined import mamba_chunk_scan_combined

    ours = partial(
        mamba_chunk_scan_combined, chunk_size=8, dt_softplus=True, return_final_states=True,
        **({} if limit is None else {"dt_limit": limit}),
    )  # fmt: skip
    definition = partial(plain.ssd, dt_softplus=True, dt_limit=limit)
    inputs = ssd_inputs(initial_states=randn(ROWS, HEADS, WIDTH, N))
    check(ours, lambda initial_states, **i: definition(state=initial_states, **i), inputs, "mamba_chunk_scan_combined")


def documents(function, lengths, padding, state=None, **inputs):
    """`function` on each document of a row alone; zeros in the padding on the right. And the state of each."""
    at, ys, states = 0, [], []
    timed = ("x", "dt", "B", "C", "z")
    for i, length in enumerate(lengths):
        part = {n: t[:, at : at + length] if n in timed else t for n, t in inputs.items()}
        y, h = function(**part, state=state if i == 0 else None)
        ys.append(y)
        states.append(h)
        at += length
    ys.append(torch.zeros_like(inputs["x"][:, :padding]))
    return torch.cat(ys, 1), torch.cat(states)


@pytest.mark.parametrize("with_state", [False, True])
def test_documents_in_a_row(with_state):
    from mamba_ssm.ops.triton.ssd_combined import mamba_chunk_scan_combined

    lengths, padding = (7, 1, 10), 3
    seq_idx = torch.tensor([[0] * 7 + [1] + [2] * 10 + [-1] * 3], dtype=torch.int32)
    cu_seqlens = torch.tensor([0, 7, 8, 18])
    inputs = {n: t[:1] if n in ("x", "dt", "B", "C", "z") else t for n, t in ssd_inputs().items()}
    if with_state:
        inputs["initial_states"] = randn(1, HEADS, WIDTH, N)

    def ours(**i):
        return mamba_chunk_scan_combined(
            **i, chunk_size=8, dt_softplus=True, seq_idx=seq_idx, cu_seqlens=cu_seqlens, return_varlen_states=True
        )

    def definition(initial_states=None, **i):
        return documents(partial(plain.ssd, dt_softplus=True), lengths, padding, initial_states, **i)

    check(ours, definition, inputs, "documents")


def test_varlen_states_need_one_row():
    from mamba_ssm.ops.triton.ssd_combined import mamba_chunk_scan_combined

    with pytest.raises(ValueError, match=r"cu_seqlens: want the borders .* got 2 rows"):
        mamba_chunk_scan_combined(
            **ssd_inputs(), chunk_size=8, cu_seqlens=torch.tensor([0, 21]), return_varlen_states=True
        )


@pytest.mark.parametrize(("normed", "first", "mlp"), [(True, False, 0), (True, True, 2), (False, False, 2)])
def test_mamba_split_conv1d_scan_combined(normed, first, mlp):
    from mamba_ssm.ops.triton.ssd_combined import mamba_split_conv1d_scan_combined, mamba_split_conv1d_scan_ref

    inner, directions = HEADS * WIDTH, GROUPS * N
    inputs = {
        "zxbcdt": randn(ROWS, LENGTH, 2 * mlp + 2 * inner + 2 * directions + HEADS),
        "conv1d_weight": randn(inner + 2 * directions, 4), "conv1d_bias": randn(inner + 2 * directions),
        "dt_bias": randn(HEADS), "A": -randn(HEADS).abs() - 0.1, "D": randn(HEADS, seed=1),
        "outproj_weight": randn(5, mlp + inner), "outproj_bias": randn(5),
    }  # fmt: skip
    if normed:
        inputs["rmsnorm_weight"] = randn(inner, seed=2)

    def definition(
        zxbcdt, conv1d_weight, conv1d_bias, dt_bias, A, D, outproj_weight, outproj_bias, rmsnorm_weight=None
    ):
        z0, x0, z, xbc, dt = zxbcdt.split([mlp, mlp, inner, inner + 2 * directions, HEADS], -1)
        xbc = plain.conv(xbc.transpose(1, 2), conv1d_weight, conv1d_bias, activation="silu")[0].transpose(1, 2)
        x, B, C = xbc.split([inner, directions, directions], -1)
        heads = partial(torch.unflatten, dim=-1, sizes=(HEADS, WIDTH))
        gate = None if normed else heads(z)
        B, C = (t.unflatten(-1, (GROUPS, N)) for t in (B, C))
        y = plain.ssd(heads(x), dt, A, B, C, D, gate, dt_bias, dt_softplus=True)[0].flatten(-2)
        if normed:
            y = plain.rms(y, rmsnorm_weight, z=z, eps=1e-5, group_size=inner // GROUPS, norm_before_gate=first)
        return linear(torch.cat([silu(z0) * x0, y], -1), outproj_weight, outproj_bias)

    options = {"headdim": WIDTH, "ngroups": GROUPS, "norm_before_gate": first, "rmsnorm_eps": 1e-5, "chunk_size": 8}
    check(partial(mamba_split_conv1d_scan_combined, **options), definition, inputs, "split")
    check(partial(mamba_split_conv1d_scan_ref, **options), definition, inputs, "split, ref")


def test_the_functions_behind_autograd():
    """Hydra and others write their own backward pass over these."""
    from mamba_ssm.ops.triton.ssd_combined import _mamba_chunk_scan_combined_bwd, _mamba_chunk_scan_combined_fwd

    inputs = ssd_inputs()
    leaves = {n: t.double().requires_grad_() for n, t in inputs.items()}
    y, _ = plain.ssd(**leaves, dt_softplus=True)
    dout = randn(*y.shape, seed=4)
    want = torch.autograd.grad(y, [leaves[n] for n in ("x", "dt", "A", "B", "C", "D", "z", "dt_bias")], dout.double())
    out, *_ = _mamba_chunk_scan_combined_fwd(**inputs, chunk_size=8, dt_softplus=True)
    assert_near(out, y, "fwd")
    found = _mamba_chunk_scan_combined_bwd(dout, out=out, **inputs, chunk_size=8, dt_softplus=True)
    for i, (got, truth) in enumerate(zip(found, want)):
        assert_near(got, truth, f"gradient {i}")


def test_stages_of_a_chunked_scan():
    from mamba_ssm.modules.ssd_minimal import ssd_minimal_discrete
    from mamba_ssm.ops.triton import ssd_chunk_scan, ssd_chunk_state, ssd_state_passing

    inputs = {n: cast(t, torch.float64) for n, t in ssd_inputs().items()}
    x, dt, A, B, C, D, z = (inputs[n] for n in ("x", "dt", "A", "B", "C", "D", "z"))
    sums, steps = ssd_chunk_state._chunk_cumsum_fwd(dt, A, 8, inputs["dt_bias"], True)
    states = ssd_chunk_state.chunk_state(B, x, steps, sums)
    entering, last = ssd_state_passing.state_passing(states.flatten(-2), sums[..., -1])
    entering = entering.unflatten(-1, (WIDTH, N))
    y = ssd_chunk_scan.chunk_scan(B, C, x, steps, sums, entering, D, z)
    want, state = plain.ssd(**inputs, dt_softplus=True)
    assert_agree(y, want, "in stages", LENGTH)
    assert_agree(last.unflatten(-1, (WIDTH, N)), state, "last state", LENGTH)
    one = ssd_chunk_state.chunk_state_varlen(B[0], x[0], steps[0], sums[0], torch.tensor([0, LENGTH]), entering[0])
    assert_agree(one[0], state[0], "state of a sequence", LENGTH)
    dt = torch.nn.functional.softplus(dt + inputs["dt_bias"])
    B, C = (t.repeat_interleave(HEADS // GROUPS, 2) for t in (B, C))
    y, last = ssd_minimal_discrete(x * dt[..., None], dt * A, B, C, 8)
    assert_agree(last, state, "ssd_minimal_discrete", LENGTH)


# ---- one step --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("form", ["no heads", "heads", "tied heads"])
@pytest.mark.parametrize("padded", [False, True])
def test_selective_state_update(form, padded):
    from mamba_ssm.ops.triton.selective_state_update import selective_state_update

    tied = form == "tied heads"
    size = (CHANNELS,) if form == "no heads" else (HEADS, WIDTH)

    def spread(*shape, seed):  # one number a head where heads are tied
        t = randn(*shape, *size, seed=seed)
        return t[..., :1].expand(*shape, *size) if tied else t

    rows = 3
    A = -(randn(HEADS, 1, 1).abs().expand(*size, N) if tied else randn(*size, N).abs()) - 0.1
    directions = (rows, N) if form == "no heads" else (rows, GROUPS, N)
    state = randn(5, *size, N)
    x, dt, z = randn(rows, *size), spread(rows, seed=1), randn(rows, *size, seed=2)
    B, C, D, bias = randn(*directions), randn(*directions, seed=3), randn(*size, seed=4), spread(seed=5)
    indices = torch.tensor([3, -1, 0] if padded else [3, 1, 0], dtype=torch.int32)

    wide = [t.double() for t in (x, dt, A, B, C, D, z, bias, state)]
    want_y, want_state = torch.zeros_like(wide[0]), wide[8].clone()
    for i, row in enumerate(indices.tolist()):
        if row < 0:
            continue
        step = torch.nn.functional.softplus(wide[1][i] + wide[7])[..., None]
        b, c = (t[i] if form == "no heads" else t[i].repeat_interleave(HEADS // GROUPS, 0)[:, None] for t in wide[3:5])
        h = torch.exp(step * wide[2]) * wide[8][row] + step * b * wide[0][i][..., None]
        want_state[row] = h
        want_y[i] = ((h * c).sum(-1) + wide[5] * wide[0][i]) * silu(wide[6][i])
    y = selective_state_update(state, x, dt, A, B, C, D, z, bias, True, state_batch_indices=indices)
    assert_near(y, want_y, "output")
    assert_near(state, want_state, "state, in place")
    if padded:
        assert (y[1] == 0).all()
