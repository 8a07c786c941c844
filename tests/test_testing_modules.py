"""The laws of modules: a correct mixer passes, each way of getting one wrong is caught, and types choose the laws."""

from __future__ import annotations

from typing import NamedTuple

import pytest
import torch
from torch import Tensor, nn

from statewise.mixers.base import CausalMixer, HasImpulse, HasMixing, Mixing, SequenceMixer, check_input
from statewise.ops import linear_scan
from statewise.ops._backend import chosen
from statewise.testing import LawError, check_mixer, check_model, laws_for, module_laws

D = 6


class LeakyState(NamedTuple):
    h: Tensor  # (B, D)


class Leaky(CausalMixer, HasMixing):
    """A gated leaky average: h_t = a h_{t-1} + v_t, y_t = out(gate(x_t) h_t)."""

    def __init__(self, d_model: int = D):
        super().__init__()
        self.d_model = d_model
        self.log_a = nn.Parameter(-torch.rand(d_model) - 0.1)
        self.value, self.gate, self.out = (nn.Linear(d_model, d_model) for _ in range(3))

    def init_state(self, batch, *, capacity=None, device=None, dtype=torch.float32):
        return LeakyState(torch.zeros(batch, self.d_model, device=device, dtype=dtype))

    def _decay(self, x):
        return self.log_a.exp().to(x.dtype).expand(x.shape)

    def _run(self, x, state, seg):
        check_input(self, x, self.d_model)
        x = x if seg is None else seg.mask(x)
        v = self.value(x)
        h, last = linear_scan(self._decay(v), v, state=None if state is None else state.h, seg=seg)
        y = self.out(torch.sigmoid(self.gate(x)) * h)
        return (y if seg is None else seg.mask(y)), LeakyState(last)

    def mixing(self, x, seg=None):
        from statewise.ops import linear_scan_matrix

        x = x if seg is None else seg.mask(x)
        dense = linear_scan_matrix(self._decay(x), seg=seg).expand(len(x), -1, -1, -1)

        def emit(y):
            y = self.out(torch.sigmoid(self.gate(x)) * y.squeeze(-1))
            return y if seg is None else seg.mask(y)

        return Mixing(dense, self.value(x)[..., None], emit)


def test_a_correct_mixer_passes():
    assert check_mixer(Leaky, D) == len(laws_for(Leaky))


# ---- broken mixers ---------------------------------------------------------------------------------------------------


class IgnoresSegments(Leaky):
    def _run(self, x, state, seg):
        return super()._run(x, state, None)


class LeaksPadding(Leaky):
    def _run(self, x, state, seg):
        if seg is None or seg.valid is None:
            return super()._run(x, state, seg)
        y, state = super()._run(x, state, seg)
        return y + 0 * x, state


class SpeaksAtPadding(Leaky):
    def _run(self, x, state, seg):
        y, state = super()._run(x, state, seg)
        return (y if seg is None or seg.valid is None else y + 0.1 * ~seg.valid[..., None]), state


class PadsTheState(Leaky):
    def _run(self, x, state, seg):
        y, last = super()._run(x, state, seg)
        if seg is None or seg.valid is None:
            return y, last
        return y, LeakyState(torch.where(seg.valid[:, -1:], last.h, 0.9 * last.h))


class LooksAhead(Leaky):
    def forward(self, x, seg=None):
        y = super().forward(x, seg)
        return y + 0.1 * torch.cat([y[:, 1:], 0 * y[:, :1]], 1)[:, : y.shape[1]]


class ForgetsBetweenCalls(Leaky):
    def _run(self, x, state, seg):
        return super()._run(x, None, seg)


class CutsTheGraph(Leaky):
    def _run(self, x, state, seg):
        return super()._run(x, None if state is None else LeakyState(state.h.detach()), seg)


class StepsDifferently(Leaky):
    def step(self, x_t, state):
        y, state = super().step(x_t, state)
        return y * (1 + 1e-6), state


class BatchLast(Leaky):
    def init_state(self, batch, *, capacity=None, device=None, dtype=torch.float32):
        return LeakyState(torch.zeros(self.d_model, batch, dtype=dtype))

    def _run(self, x, state, seg):
        y, state = super()._run(x, None if state is None else LeakyState(state.h.T), seg)
        return y, LeakyState(state.h.T)


class SharesRows(Leaky):
    def _run(self, x, state, seg):
        y, state = super()._run(x, state, seg)
        return y + 0.1 * y[:1].detach() * (seg is None), state


class UnusedParameter(Leaky):
    def __init__(self):
        super().__init__()
        self.extra = nn.Parameter(torch.ones(D))


class WrongMatrix(Leaky):
    def mixing(self, x, seg=None):
        m = super().mixing(x, seg)
        return m._replace(dense=m.dense * 1.001)


class AcceptsAnyWidth(Leaky):
    def _run(self, x, state, seg):
        return super()._run(x[..., : self.d_model] if x.ndim == 3 else x, state, seg)


class NoEmpty(Leaky):
    def _run(self, x, state, seg):
        y, state = super()._run(x, state, seg)
        return y - 0 * y[:, :1].mean(), LeakyState(state.h + 0 * y.mean(1))


class Breaks(Leaky):
    def _run(self, x, state, seg):
        torch._dynamo.graph_break()
        return super()._run(x, state, seg)


class Overflows(Leaky):
    def _run(self, x, state, seg):
        y, state = super()._run(x, state, seg)
        return (y * torch.inf if y.dtype == torch.bfloat16 else y), state


class HidesAWeight(Leaky):
    def __init__(self):
        super().__init__()
        self.secret = torch.randn(D)

    def _run(self, x, state, seg):
        y, state = super()._run(x, state, seg)
        return y * self.secret.to(y.dtype), state


class RemembersInside(Leaky):
    """Part of its state is not in its state."""

    memory = 0.0

    def _run(self, x, state, seg):
        y, last = super()._run(x, state, seg)
        y, self.memory = y + self.memory, last.h.detach().mean().item()
        return y, last


class NotToeplitz(Leaky, HasImpulse):
    def impulse(self, length):
        return self.log_a.exp()[:, None] ** (torch.arange(length) + 0.01)


class _Square(torch.autograd.Function):
    @staticmethod
    def forward(ctx, v):
        ctx.save_for_backward(v)
        return v * v

    @staticmethod
    def backward(ctx, g):
        (v,) = ctx.saved_tensors
        slope = 2 * v * g
        return slope if chosen() == "reference" else slope.detach()


class FlatKernel(Leaky):
    """Gradients that have no gradients, but for the reference."""

    def _decay(self, x):
        a = torch.exp(-_Square.apply(self.log_a) - 0.1)
        return a.to(x.dtype).expand(x.shape)


class HoldsOnToAParameter(Leaky):
    """What stands in the place of a parameter during a transform is not what this reads."""

    def __init__(self, d_model: int = D):
        super().__init__(d_model)
        self.held = [self.log_a]

    def _decay(self, x):
        return (self.log_a.detach() + self.held[0] - self.held[0].detach()).exp().to(x.dtype).expand(x.shape)


BROKEN = [
    ("packed_is_separate", IgnoresSegments),
    ("packed_is_separate", LeaksPadding),
    ("packed_is_separate", SpeaksAtPadding),
    ("final_state_is_right", PadsTheState),
    ("future_is_unseen", LooksAhead),
    ("split_is_whole", ForgetsBetweenCalls),
    ("step_is_forward", ForgetsBetweenCalls),
    ("split_is_whole", CutsTheGraph),
    ("step_is_forward", StepsDifferently),
    ("capacity_is_enough", StepsDifferently),
    ("states_are_batch_first", BatchLast),
    ("rows_commute", SharesRows),
    ("gradients_reach_everything", UnusedParameter),
    ("matrix_is_forward", WrongMatrix),
    ("wrong_width_is_named", AcceptsAnyWidth),
    ("empty_works", NoEmpty),
    ("half_is_finite", Overflows),
    ("copies_are_equal", HidesAWeight),
    ("matrix_is_toeplitz", NotToeplitz),
    ("states_keep_on_disk", RemembersInside),
    ("second_derivatives_are_right", FlatKernel),
    ("transforms_agree", HoldsOnToAParameter),
]


@pytest.mark.parametrize(("law", "broken"), BROKEN, ids=lambda v: getattr(v, "__name__", v))
def test_broken_mixer_is_caught(law, broken):
    (found,) = [entry for entry in module_laws(broken, d_model=D) if entry.name == law]
    with pytest.raises(LawError):
        found.check()


def test_a_graph_break_is_caught():
    (found,) = [entry for entry in module_laws(Breaks, d_model=D) if entry.name == "compiles_whole"]
    with pytest.raises(torch._dynamo.exc.Unsupported):
        found.check()


def test_every_law_has_a_broken_mixer():
    caught = {law for law, _ in BROKEN} | {"compiles_whole", "weights_keep_on_disk"}  # those two have their own tests
    assert caught == {law.__name__ for law in [*laws_for(NotToeplitz), *laws_for(Forgetful)]}


# ---- models ----------------------------------------------------------------------------------------------------------


class Tiny(nn.Module):
    """Tokens to logits over one leaky mixer; not streamable, so only the laws of any module apply."""

    def __init__(self):
        super().__init__()
        self.embedding, self.mixer, self.head = nn.Embedding(7, D), Leaky(), nn.Linear(D, 7)

    def forward(self, tokens, seg=None):
        return self.head(self.mixer(self.embedding(tokens), seg))


class Forgetful(Tiny):
    def save_pretrained(self, directory):
        pass

    @classmethod
    def from_pretrained(cls, directory):
        return cls()


def test_model_laws():
    assert check_model(Tiny, 7) == len(laws_for(Tiny))
    (law,) = [law for law in module_laws(Forgetful, vocab=7) if law.name == "weights_keep_on_disk"]
    with pytest.raises(LawError, match="from_pretrained"):
        law.check()


# ---- types choose the laws -------------------------------------------------------------------------------------------


def test_laws_by_type():
    class Plain(SequenceMixer):
        def forward(self, x, seg=None):
            return x

    names = {kind: {law.__name__ for law in laws_for(kind)} for kind in (nn.Linear, Plain, Leaky, NotToeplitz)}
    assert names[nn.Linear] < names[Plain] < names[Leaky] < names[NotToeplitz]
    assert "step_is_forward" not in names[Plain]
    assert laws_for(Leaky()) == laws_for(Leaky)


def test_exactly_one_kind_of_input():
    with pytest.raises(ValueError, match="exactly one"):
        module_laws(Leaky)
