"""Time in stretches on many threads: the same results and gradients as in one piece."""

import pytest
import torch

from statewise.ops import _stretches
from statewise.ops.linear_scan import linear_scan
from statewise.ops.selective_scan import selective_scan
from statewise.ops.ssd import ssd
from statewise.testing import assert_no_worse


def test_only_where_many_threads_are_idle(monkeypatch):
    monkeypatch.setattr(torch, "get_num_threads", lambda: 16)
    least = _stretches.LEAST
    assert _stretches.count(1, 100 * least) == 16
    assert _stretches.count(1, 5 * least) == 5
    assert _stretches.count(5, 100 * least) == 3
    assert _stretches.count(6, 100 * least) == 1  # two threads a task: twice the work gains nothing
    assert _stretches.count(1, 2 * least - 1) == 1
    monkeypatch.setattr(torch, "get_num_threads", lambda: 2)
    assert _stretches.count(1, 100 * least) == 1


LENGTH = 50  # 4 stretches of 12 and a rest of 2


def _draw(*shape, scale=1.0):
    return torch.randn(*shape) * scale


def _named(**inputs):
    return inputs


OPS = {
    "selective_scan": (
        lambda **kw: selective_scan(**kw, dt_softplus=True, dt_limit=(0.001, 5.0)),
        lambda: _named(
            x=_draw(2, LENGTH, 5), dt=_draw(2, LENGTH, 5), A=-torch.rand(5, 3), B=_draw(2, LENGTH, 3),
            C=_draw(2, LENGTH, 3), D=_draw(5), z=_draw(2, LENGTH, 5), dt_bias=_draw(5), state=_draw(2, 5, 3),
        ),
    ),
    "ssd": (
        lambda **kw: ssd(**kw, dt_softplus=True, chunk_size=8),
        lambda: _named(
            x=_draw(1, LENGTH, 2, 4), dt=_draw(1, LENGTH, 2), A=-torch.rand(2), B=_draw(1, LENGTH, 1, 3),
            C=_draw(1, LENGTH, 1, 3), D=_draw(2), dt_bias=_draw(2), state=_draw(1, 2, 4, 3),
        ),
    ),
    "linear_scan": (linear_scan, lambda: _named(a=torch.rand(2, LENGTH, 5), x=_draw(2, LENGTH, 5), state=_draw(2, 5))),
    "linear_scan, one decay": (linear_scan, lambda: _named(a=torch.rand(1, 1, 5), x=_draw(2, LENGTH, 5), state=None)),
}  # fmt: skip


@pytest.mark.parametrize("name", OPS)
def test_the_same_as_in_one_piece(name, monkeypatch):
    op, draw = OPS[name]
    inputs = {k: None if v is None else v.requires_grad_() for k, v in draw().items()}
    given = [v for v in inputs.values() if v is not None]
    cut = []

    def run(dtype, parts):
        def count(tasks, length):
            # What is cut already is not cut again.
            cut.append(parts if length == LENGTH else 1)
            return cut[-1]

        monkeypatch.setattr(_stretches, "count", count)
        wide = {k: None if v is None else v.detach().to(dtype).requires_grad_() for k, v in inputs.items()}
        y, last = op(**wide)
        weights = torch.Generator().manual_seed(1)
        loss = sum((t * torch.randn(t.shape, generator=weights).to(dtype)).sum() for t in (y, last))
        grads = torch.autograd.grad(loss, [v for v in wide.values() if v is not None])
        return y, last, *grads

    exact, plain = run(torch.float64, 1), run(torch.float32, 1)
    cut.clear()
    parts = run(torch.float32, 4)
    assert cut.count(4) == 1
    assert len(parts) == 2 + len(given)
    for i, found in enumerate(zip(parts, plain, exact)):
        assert_no_worse(*found, 4.0, f"result {i}")
