"""`shared_ssm` is `diagonal_ssm` with the same modes in each channel, for less memory."""

from __future__ import annotations

import pytest
import torch

from statewise.ops.lti import reference
from statewise.ops.lti.shared import shared_ssm
from statewise.testing import assert_agree, assert_no_worse
from statewise.testing.cases import SEGMENTS, generator_for, segments

B, D, N = 3, 4, 5


def inputs(length: int, kind: str, with_state: bool, dtype: torch.dtype):
    g = generator_for("shared modes", length, kind)
    log_a = torch.complex(-torch.rand(N, generator=g).double() / 5, 3 * torch.randn(N, generator=g).double())
    draw = lambda *size: torch.randn(*size, dtype=torch.complex128, generator=g)  # noqa: E731
    tensors = [draw(B, length, D).real.clone(), log_a, draw(D, N), draw(D).real.clone()]
    tensors += [draw(B, D, N)] if with_state else []
    kinds = {torch.float32: torch.complex64, torch.float64: torch.complex128}
    tensors = [t.to(kinds[dtype] if t.is_complex() else dtype).requires_grad_() for t in tensors]
    seg = segments(kind, B, length, 8, g)
    if seg is not None and seg.valid is not None:
        with torch.no_grad():
            tensors[0].masked_fill_(~seg.valid.unsqueeze(-1), torch.nan)
    return tensors, seg


def plain(u, log_a, c, skip, state=None, seg=None):
    return reference.diagonal_ssm(
        u, log_a.expand(D, N), torch.ones_like(c), c, skip, conjugate=False, state=state, seg=seg
    )


def shared(u, log_a, c, skip, state=None, seg=None):
    return shared_ssm(u, log_a, c, skip, state=state, seg=seg)


def outcome(f, tensors, seg) -> dict[str, torch.Tensor]:
    y, last = f(*tensors, seg=seg)
    g = generator_for("weights")
    weights = [torch.randn(t.shape, dtype=torch.complex128, generator=g) for t in (y, last)]
    loss = (y * weights[0].real).sum() + (last * weights[1]).real.sum()
    grads = torch.autograd.grad(loss, tensors)
    names = ("u", "log_a", "c", "D", "state")
    return {"y": y, "last": last} | {f"gradient of {name}": t for name, t in zip(names, grads)}


@pytest.mark.parametrize("with_state", [False, True])
@pytest.mark.parametrize("length", [1, 9, 37])
@pytest.mark.parametrize("kind", SEGMENTS)
def test_it_is_the_recurrence(kind, length, with_state):
    tensors, seg = inputs(length, kind, with_state, torch.float64)
    truth = outcome(plain, tensors, seg)
    for name, got in outcome(shared, tensors, seg).items():
        assert_agree(got, truth[name], name, length, at_least=1.0)
    if kind in ("none", "mixed") and length == 37:
        single, _ = inputs(length, kind, with_state, torch.float32)
        rounded = [t.detach().to(t64.dtype).requires_grad_() for t, t64 in zip(single, tensors)]
        near, honest = outcome(plain, rounded, seg), outcome(plain, single, seg)
        for name, got in outcome(shared, single, seg).items():
            assert_no_worse(got, honest[name], truth[name], 4, name, rounded=near[name])


def test_memory_does_not_grow_with_both_channels_and_modes():
    def kept(length: int, width: int, modes: int) -> int:
        size = 0

        def pack(t):
            nonlocal size
            size += t.numel() * t.element_size()
            return t

        c = torch.randn(width, modes, dtype=torch.complex64, requires_grad=True)
        log_a = torch.complex(-torch.rand(modes), torch.randn(modes))
        with torch.autograd.graph.saved_tensors_hooks(pack, lambda t: t):
            shared_ssm(torch.randn(1, length, width, requires_grad=True), log_a, c, torch.randn(width))
        return size

    length, width, modes = 1024, 64, 256
    # One tensor over tokens, channels and modes would be 134 MB.
    assert kept(length, width, modes) < length * width * modes * 8 / 10
    assert kept(2 * length, width, modes) < 2.5 * kept(length, width, modes)
