"""What a preset is."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any


@dataclass(frozen=True)
class Card:
    """Where a model comes from.

    `parameters` is the published count; `licence` that of the published weights.
    """

    paper: str
    year: int
    parameters: int
    licence: str
    summary: str


@dataclass(frozen=True)
class Preset:
    architecture: str
    card: Card
    config: dict[str, Any] = field(default_factory=dict)
