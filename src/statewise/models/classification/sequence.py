"""A classifier of sequences over any mixers: encoder, residual blocks, pooling over the true length, head."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from copy import deepcopy

import torch
from torch import Tensor, nn

from ... import blocks, mixers
from ...blocks.branch import Branch
from ...blocks.norms import norm_named
from ...mixers.layers import Linear
from ...ops.attention import attention_positions
from ...segments import Segments
from .._specs import Spec, plain, spec_list
from .._weights import Pretrained

POOLS = ("mean", "last", "max", "none")
HEADS = ("linear", "mlp", "pair")


class SequenceClassifier(Pretrained):
    """Tokens (B, L) or values (B, L, C) -> logits (B, K): one label a row, whatever its length.

    Args:
        n_outputs: K, number of classes (or of values to predict).
        d_model: width D. n_layer: number of blocks.
        vocab_size: number of tokens V, where inputs are tokens; channels: C, where they are values. Give one of them.
        mixer: a name from `statewise.mixers.names()`, a dict such as {"name": "s4d", "d_state": 64}, or a list of
            these: one per block or a pattern that repeats. They need not be causal. None in a list: no mixer.
        mlp: a position-wise part after each mixer, from `statewise.blocks.names()`, likewise; None: none.
        norm: "layer", "batch" (statistics over valid positions) or "rms".
        prenorm: the norm stands before each mixer and part, and once more after the last; False: after each.
        final_norm: with prenorm, whether there is that last norm.
        dropout: on what each mixer and part adds, one mask per row and channel for the whole sequence.
        positions: add sinusoidal positions to the input, for mixers that do not know the order of tokens.
        token_bias: a bias on embedded tokens, as where one-hot tokens enter a dense layer.
        pool: "mean", "max" or "last" over the valid positions of a row; "none": logits (B, L, K) at every position.
        head: "linear"; "mlp" (D to D, ReLU, to K); or "pair": rows 2 i and 2 i + 1 are compared, so 2B rows in give B
            out, from features [a, b, a - b, a * b] (to D, GELU, to K).
        sampling_rate: of the input, as a multiple of the rate that the mixers learned at: 0.5 where every second sample
            is there. Other than 1 it wants mixers whose steps are time (`statewise.mixers.HasRate`), and no positions.

    forward(x, seg): padding (`seg`) changes no logit. With a pool a row is one document; with pool="none" rows may
    be packed.

    Source: S4 (Gu et al. 2021, arXiv 2111.00396), appendix D; pairs: Long Range Arena (arXiv 2011.04006), section 2.
    """

    architecture = "sequence_classifier"

    def __init__(
        self,
        n_outputs: int,
        d_model: int,
        n_layer: int,
        *,
        vocab_size: int | None = None,
        channels: int | None = None,
        mixer: Spec | Sequence[Spec] = "s4d",
        mlp: Spec | Sequence[Spec] = None,
        norm: str = "layer",
        prenorm: bool = True,
        final_norm: bool = True,
        dropout: float = 0.0,
        positions: bool = False,
        token_bias: bool = False,
        pool: str = "mean",
        head: str = "linear",
        sampling_rate: float = 1.0,
    ):
        super().__init__()
        for name, value in (("n_outputs", n_outputs), ("d_model", d_model), ("n_layer", n_layer)):
            if isinstance(value, bool) or not isinstance(value, int) or value < 1:
                raise ValueError(f"{name}: want an integer >= 1, got {value!r}")
        if (vocab_size is None) == (channels is None):
            raise ValueError(
                "vocab_size: want it for tokens, or channels for values, and not both; "
                f"got vocab_size = {vocab_size} and channels = {channels}"
            )
        if pool not in POOLS:
            raise ValueError(f"pool: want one of {', '.join(POOLS)}, got {pool!r}")
        if head not in HEADS:
            raise ValueError(f"head: want one of {', '.join(HEADS)}, got {head!r}")
        if head == "pair" and pool == "none":
            raise ValueError("head: 'pair' compares whole rows, so pool cannot be 'none'")
        self.config = {
            "n_outputs": n_outputs,
            "d_model": d_model,
            "n_layer": n_layer,
            "vocab_size": vocab_size,
            "channels": channels,
            "mixer": plain(mixer),
            "mlp": plain(mlp),
            "norm": norm,
            "prenorm": prenorm,
            "final_norm": final_norm,
            "dropout": dropout,
            "positions": positions,
            "token_bias": token_bias,
            "pool": pool,
            "head": head,
            "sampling_rate": 1.0,
        }
        self.pool, self.positions = pool, positions
        self.embedding = None if vocab_size is None else nn.Embedding(vocab_size, d_model)
        self.in_proj = None if channels is None else Linear(channels, d_model)
        self.token_bias = nn.Parameter(torch.zeros(d_model)) if token_bias and vocab_size is not None else None
        self.layers = nn.ModuleList()
        for spec, part in zip(spec_list("mixer", mixer, n_layer), spec_list("mlp", mlp, n_layer)):
            if spec is None and part is None:
                raise ValueError("mixer: a block has neither a mixer nor a feed-forward part; want one or both")
            parts: list[nn.Module] = [] if spec is None else [mixers.create(d_model=d_model, **spec)]
            parts += [] if part is None else [blocks.create(d_model=d_model, **part)]
            for made in parts:
                self.layers.append(Branch(made, norm_named(norm, d_model), prenorm=prenorm, dropout=dropout))
        self.norm_f = norm_named(norm, d_model) if prenorm and final_norm else None
        self.head = _head(head, d_model, n_outputs)
        if sampling_rate != 1:
            self._resample(sampling_rate)

    def embed(self, x: Tensor) -> Tensor:
        """Tokens (B, L) or values (B, L, C) -> (B, L, D)."""
        if self.embedding is not None:
            if x.ndim != 2 or x.is_floating_point() or x.dtype == torch.bool:
                raise ValueError(f"SequenceClassifier: x: want integer tokens (B, L), got {x.dtype} {tuple(x.shape)}")
            y = self.embedding(x)
            return y if self.token_bias is None else y + self.token_bias
        assert self.in_proj is not None
        channels = self.in_proj.in_features
        if x.ndim != 3 or x.shape[-1] != channels or not x.is_floating_point():
            got = f"{x.dtype} {tuple(x.shape)}"
            raise ValueError(f"SequenceClassifier: x: want floating values (B, L, {channels}), got {got}")
        return self.in_proj(x)

    def features(self, x: Tensor, seg: Segments | None = None) -> Tensor:
        """Everything before pooling: (B, L, D), zero at padding."""
        y = self.embed(x)
        if self.positions:
            y = y + sinusoids(attention_positions(None, seg, y.shape[0], y.shape[1], y.device), y.shape[-1]).to(y.dtype)
        # What stands at padding must not reach a norm over the batch, nor be NaN in the residual stream.
        y = y if seg is None else seg.mask(y)
        for layer in self.layers:
            y = layer(y, seg)
        y = y if self.norm_f is None else self.norm_f(y, seg)
        return y if seg is None else seg.mask(y)

    def forward(self, x: Tensor, seg: Segments | None = None) -> Tensor:
        y = self.features(x, seg)
        return self.head(y if self.pool == "none" else pooled(self.pool, y, seg))

    def at_sampling_rate(self, rate: float) -> SequenceClassifier:
        """The same weights for input that is sampled `rate` times as often: 0.5 for every second sample.

        A copy; what it is saved as says its rate. Nothing is trained again.

        Raises:
            ValueError: a mixer that counts tokens instead of time, or positions added to the input.

        Source: S4 (arXiv 2111.00396), section 4.3: Speech Commands at half the rate of training.
        """
        made = deepcopy(self)
        made._resample(rate)
        return made

    def _resample(self, rate: float) -> None:
        if not rate > 0:
            raise ValueError(f"sampling_rate: want a positive number, got {rate}")
        if self.positions:
            raise ValueError("sampling_rate: the positions that are added to the input count tokens, not time")
        mixers.scale_rate(self.layers, 1 / rate)
        self.config["sampling_rate"] *= rate

    def encoder_state(self) -> dict[str, Tensor]:
        """The weights of everything but the head, for another model with the same encoder."""
        return {name: t for name, t in self.state_dict().items() if not name.startswith("head.")}


class PairHead(nn.Module):
    """(2B, D) -> (B, K): rows 2 i and 2 i + 1 as [a, b, a - b, a * b], to D, GELU, to K."""

    def __init__(self, d_model: int, n_outputs: int):
        super().__init__()
        self.fc1, self.fc2 = Linear(4 * d_model, d_model), Linear(d_model, n_outputs)

    def forward(self, x: Tensor) -> Tensor:
        if len(x) % 2:
            raise ValueError(f"SequenceClassifier: x: want an even number of rows, two for each pair, got {len(x)}")
        a, b = x[0::2], x[1::2]
        return self.fc2(nn.functional.gelu(self.fc1(torch.cat([a, b, a - b, a * b], -1))))


def _head(kind: str, d_model: int, n_outputs: int) -> nn.Module:
    if kind == "pair":
        return PairHead(d_model, n_outputs)
    if kind == "mlp":
        return nn.Sequential(Linear(d_model, d_model), nn.ReLU(), Linear(d_model, n_outputs))
    return Linear(d_model, n_outputs)


def pooled(how: str, y: Tensor, seg: Segments | None) -> Tensor:
    """y (B, L, D) -> (B, D): "mean", "max" or "last" over the valid positions; zeros for a row that has none."""
    valid = None if seg is None else seg.valid
    if y.shape[1] == 0:
        return y.new_zeros(y.shape[0], y.shape[2])
    if valid is None:
        return {"mean": lambda: y.mean(1), "max": lambda: y.amax(1), "last": lambda: y[:, -1]}[how]()
    if how == "mean":
        return y.masked_fill(~valid[..., None], 0).sum(1) / valid.sum(1, keepdim=True).clamp(min=1)
    if how == "max":
        top = y.masked_fill(~valid[..., None], -math.inf).amax(1)
        return top.masked_fill(~valid.any(1, keepdim=True), 0)
    at = torch.where(valid, torch.arange(y.shape[1], device=y.device), 0).amax(1)
    return y[torch.arange(len(y), device=y.device), at] * valid.any(1, keepdim=True)


def sinusoids(position: Tensor, d_model: int) -> Tensor:
    """(B, L) -> (B, L, D): sine and cosine of the position at rates from 1 to 1 / 10,000 (arXiv 1706.03762, 3.5)."""
    half = -(-d_model // 2)
    rate = torch.exp(-math.log(10000.0) / half * torch.arange(half, device=position.device))
    angle = position[..., None] * rate
    return torch.stack([angle.sin(), angle.cos()], -1).flatten(-2)[..., :d_model]


def adopt_encoder(model: SequenceClassifier, weights: Mapping[str, Tensor]) -> None:
    """Give `model` the encoder of another one, e.g. of one that was trained to fill in what was masked.

    Where the other one's input has one channel more, the last (which says what is masked) is dropped. The head stays.

    Raises:
        ValueError: the encoders differ; the message names the first weight that does.
    """
    own = model.encoder_state()
    given = {name: t for name, t in weights.items() if not name.startswith("head.")}
    key = "in_proj.weight"
    if key in own and key in given and given[key].shape[1] == own[key].shape[1] + 1:
        given[key] = given[key][:, :-1]
    for name in own.keys() | given.keys():
        shapes = [tuple(t[name].shape) if name in t else None for t in (own, given)]
        if shapes[0] != shapes[1]:
            raise ValueError(f"adopt_encoder: {name}: want shape {shapes[0]}, got {shapes[1]}")
    model.load_state_dict(given, strict=False)
