"""Pathfinder, what can be worked out before an image is drawn: dashes at all angles, where the next may end, discs.

A dash is drawn at a multiple of the resolution and reduced with a Lanczos filter, as are its zone (the dash widened by
the margin) and the discs of the markers. All of that depends on the angle alone, so an image is put together from
stamps. Coordinates are (y, x); an angle goes from the x axis towards y.
"""

from __future__ import annotations

from typing import NamedTuple

import numpy as np

ANGLES = 360  # a first dash has one of these whole degrees, -180 to 179


class Style(NamedTuple):
    """How images are drawn; lengths in pixels.

    Args:
        size: height and width.
        padding: border that stays free.
        dash: length of a dash; thickness: its width, a multiple of 1 / antialias; margins: gap around a dash, one of
            these for each image.
        contour: dashes of each of the two long snakes.
        distractor_dashes: of all short snakes together; a short snake has contour // 3.
        seed_distance: between the first dashes of the two snakes, and half of their distance from the border.
        continuity: how soon a turn becomes unlikely; at a turn of 90 degrees / continuity it is impossible.
        marker: radius of the discs.
        snake_contrast, dash_contrast: brightness: a short snake has the first, a long one the product.
        antialias: resolution at which shapes are drawn.
        any_angle: a snake may begin at any angle. False for what the published program does: OpenCV's values beyond
            the border make it give up on angles at which the zone of a first dash, seen from a corner, is all outside.
            With a margin of 1 that leaves few, so long snakes begin alike and most distractors are given up.
    """

    size: int
    dash: int
    thickness: float
    margins: tuple[int, ...]
    contour: int
    distractor_dashes: int
    seed_distance: int
    continuity: float
    marker: float
    snake_contrast: float
    dash_contrast: float = 1.0
    padding: int = 1
    antialias: int = 2
    any_angle: bool = True

    @property
    def distractor(self) -> int:
        """Dashes of a short snake."""
        return self.contour // 3

    @property
    def distractors(self) -> int:
        """Short snakes; fewer where there is no room."""
        return self.distractor_dashes // self.distractor


class Tables(NamedTuple):
    """Stamps and steps for one margin. A dash has an anchor, the end from which it is drawn, and a shape: 0 to 359 for
    a first dash, drawn from its tail; 360 + k for one that ends at candidate k, drawn back from its tip."""

    lines: np.ndarray  # (shapes, D, D) float32, brightness around the anchor
    zones: np.ndarray  # (shapes, D, D) float32, what the dash and its margin take
    reach: np.ndarray  # (shapes, 2) int64, from the anchor to the other end
    pivot: np.ndarray  # (360, 2) int64, from the tail of a first dash to its pivot
    advance: np.ndarray  # (shapes, 2) int64, from a pivot to the next
    candidates: np.ndarray  # (K, 2) int64, from a pivot to the tip of the next dash
    weights: np.ndarray  # (shapes, K) float64, chance of a candidate after a dash of this shape, not normalised
    solid: np.ndarray  # (360, J, 2) int64, what must be free around the tail of a first dash
    solid_counts: np.ndarray  # (360,) int64, 0 for an angle that is not used
    disc: np.ndarray  # (Q, 2) int64, a disc with the margin as its radius
    ring: np.ndarray  # (360, 2) int64, from the first tail to the second
    marker: np.ndarray  # (R, R) float32


def tables(style: Style, margin: int) -> Tables:
    """All that the compiled renderer looks up."""
    step = style.dash + margin
    candidates = _circle(step)
    first = np.deg2rad(np.arange(-180, 180))
    angles = np.concatenate([first, np.arctan2(candidates[:, 0], candidates[:, 1])])
    drawn = np.concatenate([first, angles[ANGLES:] + np.pi])  # from the anchor
    stamps = [_dash(style, margin, angle) for angle in drawn]
    lines, zones = (np.stack(part).astype(np.float32) for part in zip(*stamps))
    solid = [_solid(zone, step) for zone in zones[:ANGLES]]
    padded = np.zeros((ANGLES, max(map(len, solid)), 2), np.int64)
    for angle, offsets in enumerate(solid):
        padded[angle, : len(offsets)] = offsets
    used = [style.any_angle or _reaches_inward(offsets) for offsets in solid]
    turn = np.abs(angles[:, None] - angles[None, ANGLES:])
    turn = np.minimum(turn, 2 * np.pi - turn) * style.continuity
    return Tables(
        lines=lines,
        zones=zones,
        reach=_steps(drawn, style.dash),
        pivot=_steps(first, style.dash) + _steps(first + np.pi, step),
        advance=_steps(angles, style.dash + 2 * margin),
        candidates=candidates,
        weights=np.cos(np.minimum(turn, np.pi / 2)) ** 2,
        solid=padded,
        solid_counts=np.array([len(offsets) if use else 0 for offsets, use in zip(solid, used)]),
        disc=_disc(margin),
        ring=np.round(style.seed_distance * _unit(np.deg2rad(np.arange(ANGLES)))).astype(np.int64),
        marker=_marker(style),
    )


# ---- geometry --------------------------------------------------------------------------------------------------------


def _unit(angles: np.ndarray) -> np.ndarray:
    # Rounded, so that the last bit of a sine cannot push an exact coordinate to the next pixel.
    return np.round(np.stack([np.sin(angles), np.cos(angles)], -1), 9)


def _steps(angles: np.ndarray, distance: float) -> np.ndarray:
    """Steps of a length, rounded up in both coordinates, as the published generator does: (n, 2)."""
    return np.ceil(_unit(angles) * distance).astype(np.int64)


def _circle(radius: int) -> np.ndarray:
    """The pixels on a circle, each once, in order: (K, 2)."""
    return np.unique(np.floor(radius * _unit(np.arange(0, 2 * np.pi, 1 / radius))).astype(np.int64), axis=0)


def _disc(radius: int) -> np.ndarray:
    y, x = np.mgrid[-radius : radius + 1, -radius : radius + 1]
    return np.argwhere(y**2 + x**2 <= radius**2) - radius


def _solid(zone: np.ndarray, reach: int) -> np.ndarray:
    """Pixels wholly inside the zone of a first dash, as offsets from its tail: (J, 2). They stand one pixel further
    down and right than the zone itself, as in the published generator."""
    offsets = np.argwhere(zone >= 1) - len(zone) // 2 + 1
    return offsets[(np.abs(offsets) <= reach).all(1)]


def _reaches_inward(offsets: np.ndarray) -> bool:
    """Whether from each corner of an image some of the offsets lead to a pixel of it."""
    signs = [(y, x) for y in (-1, 1) for x in (-1, 1)]
    return all((offsets * sign >= 0).all(1).any() for sign in signs)


# ---- drawing ---------------------------------------------------------------------------------------------------------


def _dash(style: Style, margin: int, angle: float) -> tuple[np.ndarray, np.ndarray]:
    """A dash from the middle of a square, and its zone: two pictures (D, D) in [0, 1]."""
    scale = style.antialias
    half = style.dash + int(np.ceil(style.thickness)) + margin
    end = _steps(np.array([angle]), style.dash * scale)[0]
    y, x = np.mgrid[-half * scale : half * scale + 1, -half * scale : half * scale + 1]
    line = _line(y, x, end, round(style.thickness * scale))
    zone = np.zeros_like(line)
    for dy, dx in _disc(margin * scale):  # the line stays further than this from the edge, so nothing wraps around
        zone |= np.roll(line, (dy, dx), (0, 1))
    return _reduce(line, 2 * half + 1), _reduce(zone, 2 * half + 1)


def _line(y: np.ndarray, x: np.ndarray, end: np.ndarray, width: int) -> np.ndarray:
    """Pixels of a line from the origin to `end`."""
    length = np.hypot(*end)
    # A line one pixel wide has one pixel in each row (or column); a wider one is a rectangle.
    across = (x * end[0] - y * end[1]) / (np.abs(end).max() if width == 1 else length)
    along = (y * end[0] + x * end[1]) / length
    slack = 0.5 if width == 1 else 1e-9
    return (across > -width / 2) & (across <= width / 2 + 1e-9) & (along >= -slack) & (along <= length + slack)


def _marker(style: Style) -> np.ndarray:
    """A disc around the middle of a square, (R, R) in [0, 1]."""
    scale = style.antialias
    half = int(np.ceil(style.marker)) + 3  # room for the filter
    # The disc is around the first of the small pixels of the middle one, as in the published generator.
    y, x = np.mgrid[-half * scale : (half + 1) * scale, -half * scale : (half + 1) * scale]
    return _reduce(y**2 + x**2 <= (style.marker * scale) ** 2, 2 * half + 1).astype(np.float32)


def _reduce(picture: np.ndarray, size: int) -> np.ndarray:
    """A black and white picture at a lower resolution, in steps of 1 / 255."""
    weights = _lanczos(len(picture), size)
    return np.round(255 * np.clip(weights @ picture.astype(np.float64) @ weights.T, 0, 1)) / 255


def _lanczos(before: int, after: int) -> np.ndarray:
    """Weights (after, before) of a Lanczos filter with three lobes that reduces a line of pixels."""
    scale = before / after
    middle = (np.arange(after) + 0.5) * scale
    distance = (np.arange(before)[None] + 0.5 - middle[:, None]) / scale
    weights = np.where(np.abs(distance) < 3, np.sinc(distance) * np.sinc(distance / 3), 0)
    return weights / weights.sum(1, keepdims=True)
