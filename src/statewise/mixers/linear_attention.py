"""Attention whose scores are inner products, so that it runs as a recurrence: with a sum or a learned normaliser."""

from __future__ import annotations

from abc import abstractmethod
from typing import NamedTuple

import torch
from torch import Tensor

from .._names import unknown
from ..maths.features import elu_features, taylor_features, taylor_width
from ..ops._precision import no_autocast, widen
from ..ops.short_conv import short_conv
from ..ops.ssd import ssd, ssd_matrix
from ..segments import Segments
from ..state import exportable
from .base import CausalMixer, HasMixing, Mixing, check_input
from .layers import Linear, ShortConv

FEATURE_MAPS = ("elu", "taylor")


@exportable
class LinearAttentionState(NamedTuple):
    conv: Tensor  # (B, K-1, H (2 N + P)): last valid inputs of the convolution, oldest first; K - 1 = 0 without one
    kv: Tensor  # (B, H, P or P + 1, n): sum of value times key features; the last row sums the features alone


class _Separable(CausalMixer, HasMixing):
    """Attention with scores phi(q_t) . phi(k_s): their sum over the past runs as SSD without decay.

    A subclass says what the features are, and by what the sum is divided.
    """

    def __init__(
        self,
        d_model: int,
        *,
        n_heads: int = 1,
        key_dim: int | None = None,
        head_dim: int | None = None,
        bias: bool = True,
        d_conv: int = 0,
    ):
        super().__init__()
        what = type(self).__name__
        if n_heads < 1 or (d_model % n_heads and None in (key_dim, head_dim)):
            raise ValueError(
                f"{what}: n_heads: want a divisor of d_model = {d_model}, or key_dim and head_dim, got {n_heads}"
            )
        key_dim = d_model // n_heads if key_dim is None else key_dim
        head_dim = d_model // n_heads if head_dim is None else head_dim
        for name, width in (("key_dim", key_dim), ("head_dim", head_dim)):
            if width < 1:
                raise ValueError(f"{what}: {name}: want a positive width, got {width}")
        self.d_model, self.n_heads, self.key_dim, self.head_dim = d_model, n_heads, key_dim, head_dim
        self.q_proj = Linear(d_model, n_heads * key_dim, bias=bias)
        self.k_proj = Linear(d_model, n_heads * key_dim, bias=bias)
        self.v_proj = Linear(d_model, n_heads * head_dim, bias=bias)
        self.out_proj = Linear(n_heads * head_dim, d_model, bias=bias)
        self.conv1d = ShortConv(n_heads * (2 * key_dim + head_dim), d_conv) if d_conv else None
        self._make_normaliser(bias)

    # What the state keeps beside the values: 1 for the sum of features, 0 for nothing.
    _extra: int

    @property
    @abstractmethod
    def n_features(self) -> int:
        """n, numbers of state per value channel."""

    def _make_normaliser(self, bias: bool) -> None:
        """Parameters of the normaliser, if it has any."""

    @abstractmethod
    def _features(self, t: Tensor) -> Tensor:
        """(..., key_dim) -> (..., n)."""

    @abstractmethod
    def _attend(
        self, x: Tensor, phi: Tensor, psi: Tensor, v: Tensor, kv: Tensor, seg: Segments | None
    ) -> tuple[Tensor, Tensor]:
        """The normalised sum over the past, (B, L, H, P), and the new state."""

    @abstractmethod
    def _weights(self, x: Tensor, scores: Tensor, seg: Segments | None) -> Tensor:
        """Normalised scores, (B, H, L, L)."""

    def init_state(self, batch, *, capacity=None, device=None, dtype=torch.float32) -> LinearAttentionState:
        device = self._device() if device is None else device
        channels, width = (0, 1) if self.conv1d is None else self.conv1d.weight.shape
        shape = (batch, self.n_heads, self.head_dim + self._extra, self.n_features)
        return LinearAttentionState(
            torch.zeros(batch, width - 1, channels, device=device, dtype=dtype),
            torch.zeros(shape, device=device, dtype=dtype),
        )

    def _project(
        self, x: Tensor, conv: Tensor | None, seg: Segments | None
    ) -> tuple[Tensor, Tensor, Tensor, Tensor | None]:
        """phi(q), phi(k) (B, L, H, n) and v (B, L, H, P), wide, and the state of the convolution if there is one."""
        q, k, v = self.q_proj(x), self.k_proj(x), self.v_proj(x)
        if self.conv1d is not None:
            qkv, conv = short_conv(torch.cat([q, k, v], -1), self.conv1d.weight, self.conv1d.bias, state=conv, seg=seg)
            q, k, v = qkv.split((q.shape[-1], k.shape[-1], v.shape[-1]), -1)
        q, k, v = (widen(t).unflatten(-1, (self.n_heads, -1)) for t in (q, k, v))
        return self._features(q), self._features(k), v, conv

    def _no_decay(self, v: Tensor) -> tuple[Tensor, Tensor]:
        """A step of 1 with a rate of 0, which is what makes SSD a plain sum."""
        return v.new_ones(*v.shape[:3]), v.new_zeros(self.n_heads)

    def _sum(
        self, phi: Tensor, psi: Tensor, v: Tensor, state: Tensor | None, seg: Segments | None
    ) -> tuple[Tensor, Tensor]:
        with no_autocast(v):
            return ssd(v, *self._no_decay(v), psi, phi, state=state, seg=seg)

    def _scores(self, phi: Tensor, psi: Tensor, v: Tensor, seg: Segments | None) -> Tensor:
        """phi(q_t) . phi(k_s) for s <= t in one document, (B, H, L, L)."""
        dt, rate = self._no_decay(v)
        return ssd_matrix(dt, rate, psi, phi, seg=seg)

    def _emit(self, y: Tensor, dtype: torch.dtype, seg: Segments | None) -> Tensor:
        y = self.out_proj(y.flatten(-2).to(dtype))
        return y if seg is None else seg.mask(y)

    def _run(
        self, x: Tensor, state: LinearAttentionState | None, seg: Segments | None
    ) -> tuple[Tensor, LinearAttentionState]:
        check_input(self, x, self.d_model)
        if seg is not None:
            x = seg.mask(x)
        conv, kv = self.init_state(len(x), dtype=widen(x).dtype) if state is None else state
        phi, psi, v, new = self._project(x, conv, seg)
        y, kv = self._attend(x, phi, psi, v, kv, seg)
        return self._emit(y, x.dtype, seg), LinearAttentionState(conv if new is None else new, kv)

    def mixing(self, x: Tensor, seg: Segments | None = None) -> Mixing:
        check_input(self, x, self.d_model)
        if seg is not None:
            x = seg.mask(x)
        phi, psi, v, _ = self._project(x, None, seg)
        dense = self._weights(x, self._scores(phi, psi, v, seg), seg)
        return Mixing(dense, v, lambda y: self._emit(y, x.dtype, seg))


class LinearAttention(_Separable):
    """Linear attention: phi(q_t) . phi(k_s) in place of the exponential, divided by its sum over the past.

    Args:
        d_model: width D of input and output.
        n_heads: H. key_dim: width N of queries and keys per head; head_dim: P, of values. None: d_model / n_heads.
        feature_map: "elu", phi = elu + 1 with n = N features; or "taylor", the series of exp(q . k / sqrt(N)) up to
            its square, with n = (N + 1)(N + 2) / 2 features, which is near to softmax attention.
        bias: of the projections.
        d_conv: K, width of a causal convolution over queries, keys and values, 1 to 8; 0: none.

    The state holds n (P + 1) numbers a head: n is the state expansion, what sets how much can be recalled.

    Source: Katharopoulos et al. 2020, "Transformers are RNNs" (arXiv 2006.16236); second-order Taylor map: Arora et
    al. 2024, "Based" (arXiv 2402.18668), section 4.
    """

    _extra = 1

    def __init__(
        self,
        d_model: int,
        *,
        n_heads: int = 1,
        key_dim: int | None = None,
        head_dim: int | None = None,
        feature_map: str = "elu",
        bias: bool = True,
        d_conv: int = 0,
    ):
        if feature_map not in FEATURE_MAPS:
            raise ValueError(f"LinearAttention: {unknown('feature_map', feature_map, FEATURE_MAPS)}")
        super().__init__(d_model, n_heads=n_heads, key_dim=key_dim, head_dim=head_dim, bias=bias, d_conv=d_conv)
        self.feature_map = feature_map

    @property
    def n_features(self) -> int:
        return self.key_dim if self.feature_map == "elu" else taylor_width(self.key_dim, 2)

    def _features(self, t: Tensor) -> Tensor:
        return elu_features(t) if self.feature_map == "elu" else taylor_features(t * self.key_dim**-0.25, 2)

    def _attend(
        self, x: Tensor, phi: Tensor, psi: Tensor, v: Tensor, kv: Tensor, seg: Segments | None
    ) -> tuple[Tensor, Tensor]:
        # A value of one at every position makes the recurrence sum the features as well.
        y, kv = self._sum(phi, psi, torch.cat([v, torch.ones_like(v[..., :1])], -1), kv, seg)
        return y[..., :-1] / _at_padding(y[..., -1:], seg), kv

    def _weights(self, x: Tensor, scores: Tensor, seg: Segments | None) -> Tensor:
        total = _at_padding(scores.sum(-1).transpose(1, 2), seg).transpose(1, 2)
        return scores / total.unsqueeze(-1)


class NormalizedAttention(_Separable):
    """Normalised attention: y_t = exp(-n_t) sum over s <= t of (q_t . k_s) v_s, with n_t linear in x_t.

    Scores may be negative and nothing is summed to one: a learned factor per head keeps the sum in range instead.

    Args:
        d_model: width D of input and output.
        n_heads: H. key_dim: width N of queries and keys per head; head_dim: P, of values. None: d_model / n_heads.
        bias: of the projections.
        d_conv: K, width of a causal convolution over queries, keys and values, 1 to 8; 0: none.

    The state holds N P numbers a head.

    Source: Sieber et al. 2024, "Understanding the Differences in Foundation Models" (arXiv 2405.15731), section 4.1.
    """

    _extra = 0

    def _make_normaliser(self, bias: bool) -> None:
        self.n_proj = Linear(self.d_model, self.n_heads, bias=bias)

    @property
    def n_features(self) -> int:
        return self.key_dim

    def _features(self, t: Tensor) -> Tensor:
        return t

    def _gain(self, x: Tensor) -> Tensor:
        """exp(-n_t) for each head, (B, L, H, 1)."""
        return torch.exp(-widen(self.n_proj(x))).unsqueeze(-1)

    def _attend(
        self, x: Tensor, phi: Tensor, psi: Tensor, v: Tensor, kv: Tensor, seg: Segments | None
    ) -> tuple[Tensor, Tensor]:
        y, kv = self._sum(phi, psi, v, kv, seg)
        return y * self._gain(x), kv

    def _weights(self, x: Tensor, scores: Tensor, seg: Segments | None) -> Tensor:
        return scores * self._gain(x).transpose(1, 2)


def _at_padding(total: Tensor, seg: Segments | None) -> Tensor:
    """`total` (B, L, ...) > 0 at valid tokens, with ones in padding, where it is 0 and nothing is divided."""
    if seg is None or seg.valid is None:
        return total
    return total.masked_fill(~seg.valid.reshape(*seg.shape, *(1,) * (total.ndim - 2)), 1)
