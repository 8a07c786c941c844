"""What is particular to the selective scan: speed against transformers, memory, threads, and agreement with SSD."""

from __future__ import annotations

import math
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace

import pytest
import torch

from statewise.ops import ssd
from statewise.ops.selective_scan import cases, selective_scan


def inputs(batch: int, length: int, size=(40, 16), variant="gated", seed=0):
    generator = torch.Generator().manual_seed(seed)
    return cases.sample(
        variant, batch, length, dtype=torch.float32, decay="mixed", generator=generator, size=size
    )  # fmt: skip


@pytest.mark.speed
def test_faster_than_the_loop_of_transformers():
    """The promise, at the shape of mamba-130m: 10 times forward, and 10 times forward and backward."""
    pytest.importorskip("transformers")
    from statewise.benchmarks import bounds, ops, report, runner

    op = next(op for op in ops.catalogue() if op.title == "selective_scan")
    op = replace(op, peers={"transformers": op.peers["transformers"]})
    limits = bounds.measure(seconds=0.1)
    # Their backward pass grows with the square of the length (each slice's gradient is a whole tensor): at 1024
    # positions it takes a minute, and the ratio is in the thousands.
    for mode, length in ((ops.FORWARD, 1024), (ops.BOTH, 192)):
        row = runner.run_case(ops.row(op, mode, length), limits, runner.Settings(), runner.Forecast())
        entry = row["entries"][1]
        print(f"\nselective_scan, {mode}, L {length}: transformers {report.peer_cell(row, entry)}")
        assert not entry["doubtful"]
        assert report.ratio(row, entry) >= 10


_MEMORY = """
import sys, torch
from statewise.benchmarks.machine import peak_memory
from statewise.mixers import Mamba
torch.set_num_threads(2)
mixer = Mamba(64, d_state=128)
x = torch.randn(1, int(sys.argv[1]), 64)
mixer(x[:, :256]).sum().backward()  # compile, so that the peak is that of the run
mixer(x).sum().backward()
print(peak_memory())
"""


@pytest.mark.slow
@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="reads the peak memory from /proc")
def test_training_memory_is_linear_in_length_without_a_state_per_position():
    """Peak memory of a training step at L, 2L and 4L: straight, and far below one (B, L, D, N) tensor."""
    first = 32768  # less would hide below the memory that compiling takes
    peaks = [
        int(subprocess.run([sys.executable, "-c", _MEMORY, str(n * first)], capture_output=True, check=True).stdout)
        for n in (1, 2, 4)
    ]
    slope = (peaks[2] - peaks[1]) / (2 * first)
    earlier = (peaks[1] - peaks[0]) / first
    state_per_position = 128 * 128 * 4  # D_in * N floats
    print(f"\npeak bytes per position: {earlier:.0f}, then {slope:.0f}; a state is {state_per_position}")
    assert slope < 0.5 * state_per_position
    assert 0.7 < slope / earlier < 1.4


@pytest.mark.usefixtures("split_small")
@pytest.mark.parametrize("threads", [1, 2, 3])
def test_result_does_not_depend_on_the_number_of_threads(threads):
    given = inputs(2, 200, (150, 16))
    expected = selective_scan(**given)
    before = torch.get_num_threads()
    torch.set_num_threads(threads)
    try:
        got = selective_scan(**given)
    finally:
        torch.set_num_threads(before)
    assert torch.equal(got[0], expected[0])
    assert torch.equal(got[1], expected[1])


@pytest.mark.usefixtures("split_small")
def test_several_python_threads_at_once():
    given = [inputs(2, 300, (150, 16), seed=s) for s in range(6)]
    expected = [selective_scan(**i)[0] for i in given]
    with ThreadPoolExecutor(6) as pool:
        got = list(pool.map(lambda i: selective_scan(**i)[0], given * 3))
    assert all(torch.equal(a, b) for a, b in zip(got, expected * 3))


class _Scans(torch.utils.data.Dataset):
    def __len__(self):
        return 4

    def __getitem__(self, seed):
        return selective_scan(**inputs(2, 300, (150, 16), seed=seed))[0]


@pytest.mark.usefixtures("split_small")
def test_in_forked_data_loader_workers():
    expected = [_Scans()[i] for i in range(4)]  # starts the thread pool that the workers must not inherit
    got = list(torch.utils.data.DataLoader(_Scans(), batch_size=None, num_workers=2, multiprocessing_context="fork"))
    assert all(torch.equal(a, b) for a, b in zip(got, expected))


def test_equals_ssd_where_both_apply():
    """With dt and A equal across a head, and B and C shared, Mamba's scan is SSD."""
    torch.manual_seed(0)
    B, L, H, P, N = 2, 75, 3, 4, 5
    x, dt = torch.randn(B, L, H, P, dtype=torch.float64), torch.rand(B, L, H, dtype=torch.float64) * 0.3
    A, D = -torch.rand(H, dtype=torch.float64) * 8, torch.randn(H, dtype=torch.float64)
    b, c = torch.randn(2, B, L, 1, N, dtype=torch.float64)
    expected, state = ssd(x, dt, A, b, c, D)
    y, s = selective_scan(
        x.flatten(2),
        dt.repeat_interleave(P, -1),
        A.repeat_interleave(P)[:, None].expand(H * P, N),
        b,
        c,
        D.repeat_interleave(P),
    )
    scale = 64 * torch.finfo(torch.float64).eps * math.sqrt(L)
    assert (y.unflatten(-1, (H, P)) - expected).abs().max() <= scale * expected.abs().max()
    assert (s.unflatten(1, (H, P)) - state).abs().max() <= scale * state.abs().max()


@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        ({"x": lambda t: t[0]}, ValueError, r"selective_scan: x: want shape \(B, L, D\), got"),
        ({"dt": lambda t: t[:, :-1]}, ValueError, r"selective_scan: dt: want shape \(B, L, D\) = \(2, 9, 40\), got"),
        ({"A": lambda t: t[:-1]}, ValueError, r"selective_scan: A: want shape \(D, N\) = \(40, N\), got \(39, 16\)"),
        ({"B": lambda t: t[..., :-1]}, ValueError, r"selective_scan: B: want shape \(B, L, N\) = \(2, 9, 16\)"),
        ({"z": lambda t: t.double()}, TypeError, r"selective_scan: z is torch.float64 but x is torch.float32"),
        ({"D": lambda t: t.to("meta")}, ValueError, r"selective_scan: D is on meta but x on cpu"),
        ({"A": lambda t: t + 0j}, TypeError, "A, B and C all real or all complex"),
    ],
)
def test_bad_input(change, error, message):
    given = inputs(2, 9)
    name, alter = next(iter(change.items()))
    given[name] = alter(given[name])
    with pytest.raises(error, match=message):
        selective_scan(**given)


def test_explicit_backend_that_cannot_serve_says_why():
    from statewise.ops import BackendError

    given = {k: v.double() if isinstance(v, torch.Tensor) else v for k, v in inputs(2, 9).items()}
    with pytest.raises(BackendError, match=r"Numba kernels compute in float32, got torch\.float64"):
        selective_scan(**given, backend="numba")
