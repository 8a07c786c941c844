"""From logits to tokens: small rules that compose, and a draw.

A rule maps logits (B, V) to logits (B, V) of the same shape: -inf forbids a token. It also gets `seen` (B, V) bool, the
tokens that occur in each row's text so far. Rows do not know of each other.
"""

from __future__ import annotations

import random
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor

from ._checks import above, at_least

Rule = Callable[[Tensor, Tensor], Tensor]


def repetition_penalty(penalty: float) -> Rule:
    """Above 1: every token that a row holds already gets less likely. Positive logits are divided by it, negative ones
    multiplied. Source: Keskar et al., "CTRL", 2019 (arXiv 1909.05858), section 4.1."""
    above("repetition_penalty", penalty, 0)

    def rule(logits: Tensor, seen: Tensor) -> Tensor:
        scaled = torch.where(logits > 0, logits / penalty, logits * penalty)
        return torch.where(seen, scaled, logits)

    return rule


def temperature(value: float) -> Rule:
    """Divides the logits; below 1 makes likely tokens likelier. More than 0: the limit 0 is not a rule but greedy
    decoding (`Sampling(temperature=0)`)."""
    above("temperature", value, 0)
    return lambda logits, seen: logits / value


def top_k(k: int) -> Rule:
    """Keep the k likeliest tokens (and those that tie with the last of them)."""
    at_least("top_k", k, 1)

    def rule(logits: Tensor, seen: Tensor) -> Tensor:
        if k >= logits.shape[-1]:
            return logits
        return logits.masked_fill(logits < logits.topk(k, -1).values[..., -1:], -torch.inf)

    return rule


def top_p(p: float) -> Rule:
    """Keep the likeliest tokens until their probabilities sum to p: the nucleus, never empty.
    Source: Holtzman et al. 2020 (arXiv 1904.09751)."""
    above("top_p", p, 0, 1)

    def rule(logits: Tensor, seen: Tensor) -> Tensor:
        ordered, index = logits.sort(-1, descending=True)
        share = ordered.softmax(-1)
        # A token goes if those before it already make up p; the first has none before it.
        outside = share.cumsum(-1) - share >= p
        outside[..., 0] = False
        return logits.masked_fill(torch.zeros_like(outside).scatter(-1, index, outside), -torch.inf)

    return rule


def min_p(p: float) -> Rule:
    """Keep tokens at least p times as likely as the likeliest. Source: Nguyen et al. 2024 (arXiv 2407.01082)."""
    at_least("min_p", p, 0, 1)

    def rule(logits: Tensor, seen: Tensor) -> Tensor:
        share = logits.softmax(-1)
        return logits.masked_fill(share < p * share.amax(-1, keepdim=True), -torch.inf)

    return rule


@dataclass(frozen=True)
class Sampling:
    """How a token is chosen. The defaults draw from the model's own probabilities.

    Args:
        temperature: divides the logits; 0 takes the likeliest token (greedy), and nothing else but the penalty and
            `rules` then plays a part.
        top_k: draw from the k likeliest only; 0 for all.
        top_p: draw from the likeliest tokens that make up this probability, in (0, 1]; 1 for all.
        min_p: draw from tokens at least this share as likely as the likeliest, in [0, 1]; 0 for all.
        repetition_penalty: above 1 makes what a row holds already less likely; 1 for none.
        rules: of your own; they come first.

    Order: `rules`, penalty, temperature, top_k, top_p, min_p. Each sees what the one before it left.

    Raises:
        ValueError: a number outside its range; the message names it.
    """

    temperature: float = 1.0
    top_k: int = 0
    top_p: float = 1.0
    min_p: float = 0.0
    repetition_penalty: float = 1.0
    rules: Sequence[Rule] = ()
    _chain: tuple[Rule, ...] = field(init=False, repr=False, compare=False)

    def __post_init__(self) -> None:
        at_least("temperature", self.temperature, 0)
        at_least("top_k", self.top_k, 0)
        above("top_p", self.top_p, 0, 1)
        at_least("min_p", self.min_p, 0, 1)
        above("repetition_penalty", self.repetition_penalty, 0)
        chain = list(self.rules)
        if self.repetition_penalty != 1:
            chain.append(repetition_penalty(self.repetition_penalty))
        if not self.greedy:
            chain += [temperature(self.temperature)] if self.temperature != 1 else []
            chain += [top_k(self.top_k)] if self.top_k else []
            chain += [top_p(self.top_p)] if self.top_p < 1 else []
            chain += [min_p(self.min_p)] if self.min_p else []
        object.__setattr__(self, "_chain", tuple(chain))

    @property
    def greedy(self) -> bool:
        return self.temperature == 0

    def adjust(self, logits: Tensor, seen: Tensor) -> Tensor:
        """Logits (B, V) in float32 after all rules."""
        logits = logits.float()
        for rule in self._chain:
            logits = rule(logits, seen)
        return logits

    def probabilities(self, logits: Tensor, seen: Tensor) -> Tensor:
        """(B, V) float32: what a draw is made from. Greedy decoding has none: see `pick`."""
        return self.adjust(logits, seen).softmax(-1)

    def pick(self, logits: Tensor, seen: Tensor, uniform: Tensor | None) -> Tensor:
        """One token per row, (B,) int64. `uniform` (B,) float64 in [0, 1) decides; greedy decoding needs none."""
        if uniform is None:
            return self.adjust(logits, seen).argmax(-1)
        return draw(self.probabilities(logits, seen), uniform)


def draw(weights: Tensor, uniform: Tensor) -> Tensor:
    """Invert the distribution function: weights (B, V), >= 0, to (B,) int64, each index as likely as its weight.

    Args:
        uniform: (B,) float64 in [0, 1). One number per row decides, so a row's token depends on its own row only.
    """
    cumulated = weights.double().cumsum(-1)
    total = cumulated[..., -1]
    # Rounding must not take the product up to the total: no index lies behind it.
    target = torch.minimum(uniform.to(total) * total, total.nextafter(torch.zeros_like(total)))
    return (cumulated <= target[..., None]).sum(-1)


def sample(
    logits: Tensor,
    *,
    temperature: float = 1.0,
    top_k: int = 0,
    top_p: float = 1.0,
    min_p: float = 0.0,
    generator: torch.Generator | None = None,
) -> Tensor:
    """Draw one token per row: logits (B, V) -> (B,) int64. The options are those of `Sampling`."""
    how = Sampling(temperature, top_k, top_p, min_p)
    seen = torch.zeros_like(logits, dtype=torch.bool)
    if how.greedy:
        return how.pick(logits, seen, None)
    device = logits.device if generator is None else generator.device
    uniform = torch.rand(len(logits), dtype=torch.float64, device=device, generator=generator)
    return how.pick(logits, seen, uniform)


class Uniforms:
    """A stream of uniform numbers for each row, fixed by its seed: no row's numbers depend on another row.

    Python's generator serves, whose numbers are the same on every machine and for every version of PyTorch.
    """

    def __init__(self, seeds: Sequence[int]) -> None:
        self._streams = [random.Random(seed) for seed in seeds]

    def one(self, row: int) -> float:
        return self._streams[row].random()

    def take(self, rows: Sequence[int]) -> Tensor:
        """(len(rows),) float64 in [0, 1)."""
        return torch.tensor([self.one(row) for row in rows], dtype=torch.float64)


def row_seeds(seed: int | Sequence[int] | None, rows: int) -> list[int]:
    """One seed per row: an integer s stands for s, s + 1, ...; None draws them from PyTorch's own random numbers."""
    if seed is None:
        return torch.randint(2**62, (rows,)).tolist()
    seeds = [seed + row for row in range(rows)] if isinstance(seed, int) else list(seed)
    if len(seeds) != rows:
        raise ValueError(f"seed: want one for each of the {rows} prompts (or one number for all), got {len(seeds)}")
    for s in seeds:
        at_least("seed", s, 0)
    return seeds
