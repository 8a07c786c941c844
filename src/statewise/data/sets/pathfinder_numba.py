"""Pathfinder, compiled: grow snakes of dashes on a plane, and draw them from the stamps of pathfinder_stamps.py.

A chain is an int64 array (dashes, 3): shape and anchor (y, x) of each dash. `taken` (size, size) float32 in [0, 1] says
how much of each pixel the zones of earlier dashes and the border take.
"""

from __future__ import annotations

import numpy as np

from .pathfinder_stamps import ANGLES
from .random_numba import below, kernel, stream, uniform

FREE = np.float32(0.3)  # a pixel is free while no more of it is taken
CLASH = np.float32(1.8)  # a dash crosses another where what both take comes to this
DASH_TRIES, DISTRACTOR_TRIES = 3, 5
GUESSES = 200
ENOUGH = 0.01  # no more distractors when less than this share of the image is free


@kernel
def _inside(y, x, size):
    return 0 <= y < size and 0 <= x < size


@kernel
def _span(at, half, size):
    """First and last + 1 row of a stamp that lie on the image."""
    return max(0, half - at), min(2 * half + 1, size + half - at)


@kernel
def _raise_to(picture, stamp, y, x, factor, ids, number):
    """Put the larger of the two in each pixel; note in `ids`, unless empty, whose it is."""
    size, half = len(picture), len(stamp) // 2
    (top, bottom), (left, right) = _span(y, half, size), _span(x, half, size)
    for i in range(top, bottom):
        for j in range(left, right):
            value, row, column = stamp[i, j] * factor, y - half + i, x - half + j
            if value > picture[row, column]:
                picture[row, column] = value
                if len(ids):
                    ids[row, column] = number


@kernel
def _clashes(taken, zone, y, x):
    size, half = len(taken), len(zone) // 2
    (top, bottom), (left, right) = _span(y, half, size), _span(x, half, size)
    for i in range(top, bottom):
        for j in range(left, right):
            if taken[y - half + i, x - half + j] + zone[i, j] >= CLASH:
                return True
    return False


@kernel
def _has_room(taken, edge, y, x, angle, t):
    """Whether a first dash can begin at (y, x); all that is nearer to the border than `edge` counts as taken."""
    size = len(taken)
    for i in range(t.solid_counts[angle]):
        row, column = y + t.solid[angle, i, 0], x + t.solid[angle, i, 1]
        if _inside(row, column, size):
            near = min(row, column, size - 1 - row, size - 1 - column) < edge
            if near or taken[row, column] > FREE:
                return False
    return True


@kernel
def _stays(y, x, angle, t, size):
    """Whether head and pivot of a first dash are on the image."""
    head, pivot = t.reach[angle], t.pivot[angle]
    return _inside(y + head[0], x + head[1], size) and _inside(y + pivot[0], x + pivot[1], size)


@kernel
def _begin(chain, pivot, angle, y, x, t):
    chain[0, 0], chain[0, 1], chain[0, 2] = angle, y, x
    pivot[0], pivot[1] = y + t.pivot[angle, 0], x + t.pivot[angle, 1]


@kernel
def _place(state, taken, edge, angle, t, room):
    """A pixel, uniform over those with room for a first dash at this angle, as y * size + x; -1 if there is none."""
    size = len(taken)
    # Where there is room in many places a few guesses find one. Where there is not, all pixels are looked at.
    for _ in range(GUESSES):
        guess = below(state, size * size)
        if _has_room(taken, edge, guess // size, guess % size, angle, t):
            return guess
    n = 0
    for pixel in range(size * size):
        if _has_room(taken, edge, pixel // size, pixel % size, angle, t):
            room[n] = pixel
            n += 1
    return room[below(state, n)] if n else -1


@kernel
def _seed(state, taken, edge, chain, pivot, t, room):
    """A first dash anywhere with room; False if there is no place."""
    size = len(taken)
    for _ in range(DASH_TRIES):
        angle = below(state, ANGLES)
        chosen = _place(state, taken, edge, angle, t, room) if t.solid_counts[angle] else -1
        if chosen < 0:
            return False
        y, x = chosen // size, chosen % size
        if _stays(y, x, angle, t, size):
            _begin(chain, pivot, angle, y, x, t)
            return True
    return False


@kernel
def _seed_beside(state, size, other, chain, pivot, t):
    """A first dash at the seed distance from the tail of another snake."""
    for _ in range(DASH_TRIES):
        angle, direction = below(state, ANGLES), below(state, ANGLES)
        y, x = other[0, 1] + t.ring[direction, 0], other[0, 2] + t.ring[direction, 1]
        if _stays(y, x, angle, t, size):
            _begin(chain, pivot, angle, y, x, t)
            return True
    return False


@kernel
def _extend(state, taken, chain, n, pivot, t, chances):
    """Dash n of a chain. What dash n - 1 takes is noted only now, so that dash n may begin beside it."""
    size = len(taken)
    shape = chain[n - 1, 0]
    py, px = pivot[0] + t.advance[shape, 0], pivot[1] + t.advance[shape, 1]
    total = 0.0
    for k in range(len(t.candidates)):
        y, x = py + t.candidates[k, 0], px + t.candidates[k, 1]
        if _inside(y, x, size):
            near = np.float32(0)
            for q in range(len(t.disc)):
                row, column = y + t.disc[q, 0], x + t.disc[q, 1]
                if _inside(row, column, size):
                    near = max(near, taken[row, column])
            total += (1.0 - near) * t.weights[shape, k]
        chances[k] = total
    if total < 1e-4:
        return False
    for _ in range(DASH_TRIES):
        drawn = uniform(state) * total
        k = 0
        while chances[k] <= drawn:
            k += 1
        y, x = py + t.candidates[k, 0], px + t.candidates[k, 1]
        if not _clashes(taken, t.zones[ANGLES + k], y, x):
            _take(taken, chain[n - 1], t)
            chain[n, 0], chain[n, 1], chain[n, 2] = ANGLES + k, y, x
            pivot[0], pivot[1] = py, px
            return True
    return False


@kernel
def _take(taken, dash, t):
    _raise_to(taken, t.zones[dash[0]], dash[1], dash[2], np.float32(1), np.empty((0, 0), np.uint8), 0)


@kernel
def _pair(state, taken, style, chains, pivots, t, room, chances):
    """The two long snakes, side by side dash by dash; False if one of them gets stuck."""
    taken[:] = 1
    taken[style.padding : -style.padding, style.padding : -style.padding] = 0
    if not _seed(state, taken, 2 * style.seed_distance, chains[0], pivots[0], t, room):
        return False
    if not _seed_beside(state, style.size, chains[0], chains[1], pivots[1], t):
        return False
    for n in range(1, style.contour):
        for i in range(2):
            if not _extend(state, taken, chains[i], n, pivots[i], t, chances):
                return False
    # Of the two last dashes only that of the second snake is noted: so it is in the published generator.
    _take(taken, chains[1, -1], t)
    return True


@kernel
def _distractor(state, taken, chain, pivot, t, room, chances):
    """A short snake; False if it gets stuck or the image is full. `taken` then keeps traces of it."""
    if (taken <= FREE).sum() < ENOUGH * taken.size or not _seed(state, taken, 1, chain, pivot, t, room):
        return False
    for n in range(1, len(chain)):
        if not _extend(state, taken, chain, n, pivot, t, chances):
            return False
    _take(taken, chain[-1], t)
    return True


@kernel
def _draw_chain(picture, ids, number, chain, contrast, t):
    for n in range(len(chain)):
        shape, y, x = chain[n]
        _raise_to(picture, t.lines[shape], y, x, np.float32(contrast), ids, number)


@kernel
def _image(state, style, distractor, distractors, t, tries, picture, ids, chains):
    """One image: (label, marked snake at the origin, number of distractors), or a label of -1 after so many tries."""
    size = style.size
    taken = np.empty((size, size), np.float32)
    room, chances = np.empty(size * size, np.int64), np.empty(len(t.candidates), np.float64)
    pivots = np.empty((2, 2), np.int64)
    label = below(state, 2)
    while not _pair(state, taken, style, chains, pivots, t, room, chances):
        tries -= 1
        if tries == 0:
            return -1, 0, 0
    for i in range(2):
        _draw_chain(picture, ids, i + 1, chains[i], style.snake_contrast * style.dash_contrast, t)
    short = np.empty((distractor, 3), np.int64)
    count = 0
    for _ in range(distractors):
        for _ in range(DISTRACTOR_TRIES):
            before = taken.copy()
            if _distractor(state, taken, short, pivots[0], t, room, chances):
                count += 1
                _draw_chain(picture, ids, 2 + count, short, style.snake_contrast, t)
                break
            taken = before
    return label, below(state, 2), count


@kernel
def draw(seed, first, style, distractor, distractors, choices, tries, images, labels, ids, dashes, marked, counts):
    """Images first, first + 1, ... of a seed; returns how many of them could be drawn before one could not.

    Args:
        choices: `Tables`, one for each margin.
        tries: pairs of snakes that may be begun for one image.
        images, ids: (n, size, size) uint8, zeros, written: brightness, and the snake of each pixel (1, 2: the long
            ones, from 3 on: distractors; 0: none).
        labels, counts: (n,) int64, written; counts are of distractors.
        dashes: (n, 2, contour, 2, 2) int64, written: of both long snakes each dash from its beginning to its end.
        marked: (n, 2, 2) int64, written: the two markers.
    """
    picture = np.empty((style.size, style.size), np.float32)
    chains = np.empty((2, style.contour, 3), np.int64)
    for i in range(len(images)):
        state = stream(seed, first + i)
        t = choices[below(state, len(choices))]
        picture[:] = 0
        label, origin, counts[i] = _image(state, style, distractor, distractors, t, tries, picture, ids[i], chains)
        if label < 0:
            return i
        for which in range(2):
            for n in range(style.contour):
                shape, y, x = chains[which, n]
                near, far = (0, 1) if n == 0 else (1, 0)  # later dashes are drawn back from their tips
                dashes[i, which, n, near, 0], dashes[i, which, n, near, 1] = y, x
                dashes[i, which, n, far, 0] = y + t.reach[shape, 0]
                dashes[i, which, n, far, 1] = x + t.reach[shape, 1]
        marked[i, 0] = dashes[i, origin, 0, 0]
        marked[i, 1] = dashes[i, origin if label else 1 - origin, -1, 1]
        for end in range(2):
            _raise_to(picture, t.marker, marked[i, end, 0], marked[i, end, 1], np.float32(1), ids[i][:0], 0)
        labels[i] = label
        images[i] = (picture * (np.float32(255) / picture.max()) + np.float32(0.5)).astype(np.uint8)
    return len(images)
