"""Cost against length, up to a million positions, for the three scans. Narrow, so that the inputs fit into memory."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import replace

from .cases import Case
from .ops import FORWARD, Op, catalogue, row

LENGTHS = tuple(2**k for k in range(7, 21))
# Width of the rows: sizes and labels.
NARROW = {
    "selective_scan": ((128, 16), "D128 N16"),
    "linear_scan": (128, "D128"),
    "ssd": ((2, 64, 128), "H2 P64 N128 G1"),
}


def _narrow() -> list[Op]:
    found = {op.title: op for op in catalogue()}
    return [replace(found[name], size=size, label=label) for name, (size, label) in NARROW.items()]


def rows(device: str = "cpu", lengths: Sequence[int] | None = None, quick: bool = False) -> Iterator[Case]:
    """Forward only; shortest first, so that what a peer will take is known before it is called."""
    for op in _narrow():
        for length in sorted(lengths or (LENGTHS[:3] if quick else LENGTHS)):
            yield row(op, FORWARD, length, device=device, suite="scaling")
