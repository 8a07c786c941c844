"""Rotary positions in configurations of transformers: an object since version 5, fields of their own before."""

from __future__ import annotations

from typing import Any

from ..fields import Fields, expansion


def read_rope(fields: Fields, head_dim: int, part: float = 1.0) -> dict[str, Any]:
    """`rope_theta` and `rope_dim` of our attention. `part`: of each head, where the configuration does not say."""
    fields.only("rope_scaling", None)
    inner = fields.below("rope_parameters")
    inner.only("rope_type", "default", default="default")
    theta = inner.number("rope_theta", fields.number("rope_theta", 10000.0, above=0), above=0)
    factor = inner.number("partial_rotary_factor", fields.number("partial_rotary_factor", part, above=0), above=0)
    return {"rope_theta": theta, "rope_dim": int(head_dim * factor)}


def write_rope(attention: dict[str, Any]) -> dict[str, Any]:
    """`rope_parameters` of transformers from complete options of our attention."""
    factor = expansion(attention["rope_dim"], attention["head_dim"])
    return {
        "rope_type": "default",
        "rope_theta": attention["rope_theta"],
        "partial_rotary_factor": float(factor),
    }
