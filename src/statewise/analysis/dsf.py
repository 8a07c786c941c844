"""`to_dsf`: a mixer and its input as a dynamical system, found by the type of the mixer."""

from __future__ import annotations

from functools import singledispatch
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.functional import silu

from ..maths.features import taylor_features
from ..mixers.attention import Attention
from ..mixers.base import Causal, HasImpulse, HasMixing
from ..mixers.linear_attention import LinearAttention, NormalizedAttention, _Separable
from ..mixers.mamba import Mamba
from ..mixers.mamba2 import Mamba2
from ..mixers.qlstm import QLSTM
from ..mixers.rglru import RGLRU, first_tokens
from ..ops._dt import decay_rate, step_size
from ..ops._precision import widen
from ..ops.attention import attention_matrix
from ..ops.short_conv import short_conv
from ..segments import Segments
from .lti import diagonal_form
from .system import HeadSystem, MixedSystem, System


def to_dsf(mixer: nn.Module, x: Tensor, seg: Segments | None = None) -> System:
    """The system that `mixer` is on the input `x`: Lambda_t, B_t, C_t, D_t, the values it acts on, and what follows.

    Three evaluations agree: `mixer(x, seg)`, `system.emit(system.recurrence())`, and
    `system.emit(system.apply(system.matrix()))`. `system.dense()` has the matrices as the literature writes them.

    - Mamba, Mamba-2, RG-LRU, qLSTM, linear and normalised attention: their own recurrence. Lambda_t of attention is
      the quotient of its normalisers, eta_{t-1} / eta_t.
    - S4D, S5 and whatever else is time-invariant and has a diagonal form: coefficients with a time axis of size 1.
    - Softmax attention: on L tokens its infinite feature map needs n = L features, one for each key, which is what a
      key-value cache is. `taylor_dsf` has the finite feature maps that come near to it.
    - Any other causal mixer with a matrix: likewise one slot of state for each input, with Lambda = 1.

    Args:
        mixer: a causal `HasMixing`. x: (B, L, D), its input. seg: documents and padding.

    Raises:
        TypeError: the mixer is not linear in its values, or looks ahead.
    """
    if not isinstance(mixer, HasMixing) or not isinstance(mixer, Causal):
        why, instead = "looks ahead", "`analysis.memory` works for every mixer and model"
        if isinstance(mixer, Causal):
            why, instead = "is not linear in its values", "`analysis.linearise` has the system along one path"
        raise TypeError(
            f"to_dsf: mixer: want a causal mixer with a matrix (CausalMixer and HasMixing); {type(mixer).__name__} "
            f"{why}. {instead}"
        )
    if seg is not None:
        x = seg.mask(x)
    return _system(mixer, x, seg).separated(seg)


@singledispatch
def _system(mixer: Any, x: Tensor, seg: Segments | None) -> System:
    """The rule for a type of mixer. Another one is added with `_system.register(Type)`."""
    return _slots(mixer, x, seg)


def _slots(mixer: Any, x: Tensor, seg: Segments | None) -> System:
    """Any causal matrix: the state is a list of all values so far, and C_t is row t of the matrix."""
    mixing = mixer.mixing(x, seg)
    if mixing.kind != "head":
        raise TypeError(f"to_dsf: mixer: {type(mixer).__name__} mixes channels, and no diagonal form of it is known")
    v = mixing.v
    length, one = v.shape[1], torch.ones_like(v[:1, :1, :1, :1, None])
    write = torch.eye(length, dtype=v.dtype, device=v.device)[None, :, None, None]
    read = mixing.dense.transpose(1, 2).unsqueeze(3)  # (B, t, H, 1, s)
    return HeadSystem(one, write, read, 0 * one[..., 0], v, mixing.emit)


@_system.register
def _lti(mixer: HasImpulse, x: Tensor, seg: Segments | None) -> System:
    form = diagonal_form(mixer)
    if form is None:
        return _slots(mixer, x, seg)
    decay, write, read, skip = form

    def emit(y: Tensor) -> Tensor:
        # Only here, because `mixing` makes a matrix as well, which a spectrum has no use for.
        return mixer.mixing(x, seg).emit(y)

    if decay.ndim == 1:
        return MixedSystem(decay[None, None], write[None, None], read[None, None], skip[None, None], x, emit)
    decay, write, read = (t[None, None, :, None] for t in (decay, write, read))
    return HeadSystem(decay, write, read, skip[None, None, :, None], x.unsqueeze(-1), emit)


@_system.register
def _mamba(mixer: Mamba, x: Tensor, seg: Segments | None) -> System:
    v, z = mixer.in_proj(x).chunk(2, -1)
    v, _ = short_conv(v, mixer.conv1d.weight, mixer.conv1d.bias, "silu", seg=seg)
    dt, b, c = mixer._coefficients(v)
    dt = step_size(dt, widen(dt).dtype, mixer.dt_proj.bias, True)[..., None, None]  # (B, L, D, 1, 1)

    def emit(y: Tensor) -> Tensor:
        return _masked(mixer.out_proj(y.squeeze(-1).to(z.dtype) * silu(z)), seg)

    decay = torch.exp(dt * decay_rate(mixer.A_log)[:, None])
    b, c = widen(b)[:, :, None, None], widen(c)[:, :, None, None]
    return HeadSystem(decay, dt * b, c, widen(mixer.D)[None, None, :, None], widen(v)[..., None], emit)


@_system.register
def _mamba2(mixer: Mamba2, x: Tensor, seg: Segments | None) -> System:
    z, conv_in, dt = mixer._project(x)
    v, b, c = mixer._heads(short_conv(conv_in, mixer.conv1d.weight, mixer.conv1d.bias, "silu", seg=seg)[0])
    dt = step_size(dt, widen(dt).dtype, mixer.dt_bias, True, mixer.dt_limit)[..., None, None]  # (B, L, H, 1, 1)
    each = mixer.n_heads // mixer.n_groups
    b, c = (widen(t).repeat_interleave(each, 2).unsqueeze(3) for t in (b, c))
    skip = widen(mixer.D) if mixer.D.ndim > 1 else widen(mixer.D)[:, None]

    def emit(y: Tensor) -> Tensor:
        return _masked(mixer.out_proj(mixer.norm(y.flatten(-2).to(z.dtype), z)), seg)

    decay = torch.exp(dt * decay_rate(mixer.A_log)[:, None, None])
    return HeadSystem(decay, dt * b, c, skip[None, None], widen(v), emit)


@_system.register
def _rglru(mixer: RGLRU, x: Tensor, seg: Segments | None) -> System:
    u, _ = mixer._convolve(x, None, seg)
    a, scale = mixer._coefficients(u, first_tokens(None, seg, x)[0])
    return _channels(a, scale, torch.ones_like(a), u, lambda h: mixer._emit(h.to(u.dtype), x, seg))


@_system.register
def _qlstm(mixer: QLSTM, x: Tensor, seg: Segments | None) -> System:
    z, u, _ = mixer._convolve(x, None, seg)
    return _channels(*mixer._coefficients(u), u, lambda h: mixer._emit(h, z, seg))


def _channels(a: Tensor, write: Tensor, read: Tensor, v: Tensor, emit: Any) -> System:
    """Each channel of (B, L, D) is a system with one number of state."""
    none = torch.zeros_like(a[:1, :1, :1, None])
    a, write, read = (t[..., None, None] for t in (a, write, read))
    return HeadSystem(a, write, read, none, widen(v)[..., None], lambda y: emit(y.squeeze(-1)))


@_system.register
def _normalized(mixer: NormalizedAttention, x: Tensor, seg: Segments | None) -> System:
    q, k, v, _ = mixer._project(x, None, seg)
    return _separable(q, k, widen(mixer.n_proj(x)), v, seg, lambda y: mixer._emit(y, x.dtype, seg))


@_system.register
def _linear(mixer: LinearAttention, x: Tensor, seg: Segments | None) -> System:
    phi, psi, v, _ = mixer._project(x, None, seg)
    return _summed(mixer._scores(phi, psi, v, seg), phi, psi, v, seg, lambda y: mixer._emit(y, x.dtype, seg))


@_system.register
def _softmax(mixer: Attention, x: Tensor, seg: Segments | None) -> System:
    q, k, v, _ = mixer._project(x, None, seg)
    weights = widen(attention_matrix(q, k, seg=seg, window=mixer.window, scale=mixer.scale)).transpose(1, 2)
    # Scores are exponentials over the largest one of their row, so that nothing overflows: phi may have any factor.
    largest = weights.amax(-1, keepdim=True)
    phi = weights / torch.where(largest > 0, largest, 1)
    psi = torch.eye(x.shape[1], dtype=phi.dtype, device=x.device)[None, :, None]
    log_eta = torch.where(largest > 0, -largest.log(), 0).squeeze(-1)
    v = widen(v).repeat_interleave(mixer.n_heads // mixer.n_kv_heads, 2)
    return _separable(phi, psi, log_eta, v, seg, lambda y: mixer._emit(y.to(x.dtype), seg))


def taylor_dsf(mixer: Attention, x: Tensor, order: int, seg: Segments | None = None) -> System:
    """Softmax attention with the exponential cut off after (q . k)^order: a system with a finite state.

    n = binomial(P + order, order) features a head. With growing order it comes near to the attention itself. An odd
    order can make the normaliser vanish; an even one cannot.

    Raises:
        TypeError: `mixer` is not `Attention`.
        ValueError: it has a window, which no sum over the past forgets exactly.
    """
    if not isinstance(mixer, Attention):
        raise TypeError(f"taylor_dsf: mixer: want Attention, got {type(mixer).__name__}")
    if mixer.window is not None:
        raise ValueError(f"taylor_dsf: mixer: want one without a window, got window = {mixer.window}")
    if seg is not None:
        x = seg.mask(x)
    q, k, v, _ = mixer._project(x, None, seg)
    each = mixer.n_heads // mixer.n_kv_heads
    q, k, v = widen(q), widen(k).repeat_interleave(each, 2), widen(v).repeat_interleave(each, 2)
    phi = taylor_features(q * (q.shape[-1] ** -0.5 if mixer.scale is None else mixer.scale), order)
    psi = taylor_features(k, order)
    scores = torch.einsum("bthn,bshn->bhts", phi, psi).tril()
    if seg is not None:
        same = seg.document[:, :, None] == seg.document[:, None, :]
        seen = same if seg.valid is None else same & seg.valid[:, :, None] & seg.valid[:, None, :]
        scores = scores * seen[:, None]
    system = _summed(scores, phi, psi, v, seg, lambda y: mixer._emit(y.to(x.dtype), seg))
    return system.separated(seg)


def _summed(scores: Tensor, phi: Tensor, psi: Tensor, v: Tensor, seg: Segments | None, emit: Any) -> System:
    """Separable attention whose normaliser is the sum of its scores (B, H, L, L)."""
    eta = scores.sum(-1).transpose(1, 2)
    if seg is not None and seg.valid is not None:
        eta = eta.masked_fill(~seg.valid[..., None], 1)
    # The normaliser of an odd Taylor order may be negative, so its quotients are taken as they are.
    return _separable(phi, psi, eta.abs().log(), v, seg, emit, eta.sign())


def _separable(
    phi: Tensor,
    psi: Tensor,
    log_eta: Tensor,
    v: Tensor,
    seg: Segments | None,
    emit: Any,
    sign: Tensor | None = None,
) -> System:
    """Attention with scores phi(q_t) . psi(k_s) / eta_t. phi, psi: (B, L, H, n); log_eta and sign of eta: (B, L, H).

    Only differences of logarithms are exponentiated, so a large normaliser does no harm.
    """
    last = _last_valid(seg)
    kept = log_eta if last is None else log_eta.gather(1, last[..., None].expand_as(log_eta))
    decay = torch.exp(torch.cat([kept[:, :1], kept[:, :-1]], 1) - kept)
    gain = torch.exp(-log_eta)
    if sign is not None:
        decay, gain = decay * torch.cat([sign[:, :1], sign[:, :-1]], 1) * sign, gain * sign
    write = psi * gain[..., None]
    none = torch.zeros_like(v[:1, :1, :1, :1])
    return HeadSystem(decay[..., None, None], write.unsqueeze(3), phi.unsqueeze(3), none, v, emit)


def _last_valid(seg: Segments | None) -> Tensor | None:
    """(B, L): the last valid position up to each one."""
    if seg is None or seg.valid is None:
        return None
    at = torch.arange(seg.shape[1], device=seg.position.device).expand(seg.shape)
    return torch.where(seg.valid, at, 0).cummax(1).values


def _masked(y: Tensor, seg: Segments | None) -> Tensor:
    return y if seg is None else seg.mask(y)


# Lambda of these is a quotient of normalisers.
QUOTIENTS = (_Separable, Attention)
# Of these it is a decay. Of others it is that of slots for all inputs, which says nothing.
_MOVING = (Mamba, Mamba2, RGLRU, QLSTM, *QUOTIENTS)


def own_system(mixer: nn.Module, x: Tensor, seg: Segments | None = None) -> System | None:
    """`to_dsf` of a mixer whose recurrence is its own, and None for one that would need a slot for each input."""
    if isinstance(mixer, HasImpulse) and diagonal_form(mixer) is None:
        return None
    return to_dsf(mixer, x, seg) if isinstance(mixer, (*_MOVING, HasImpulse)) else None
