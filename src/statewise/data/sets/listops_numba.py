"""ListOps, compiled: draw expressions of the grammar, and work out their values.

Both go through the tokens once, with a stack of the operators that are still open.
"""

from __future__ import annotations

import numpy as np

from .random_numba import below, kernel, stream, uniform

# Token ids, shared with listops.py.
EOS, CLOSE, DIGIT, MIN, MAX, MED, SM = 2, 3, 4, 14, 15, 16, 17
OPERAND = 0.25  # probability that an argument is an expression of its own


@kernel
def _apply(operator, values, n):
    """Value of an operator on values[:n], which are put in order."""
    if operator == SM:
        return values[:n].sum() % 10
    for i in range(1, n):
        v, j = values[i], i
        while j and values[j - 1] > v:
            values[j] = values[j - 1]
            j -= 1
        values[j] = v
    if operator == MIN:
        return values[0]
    if operator == MAX:
        return values[n - 1]
    # The median of an even number of values is cut to an integer.
    return (values[(n - 1) // 2] + values[n // 2]) // 2


@kernel
def _draw(state, tokens, longest, max_depth, max_args):
    """One expression into `tokens`: its (length, value); or (0, 0) as soon as it is longer than `longest`."""
    operators = np.empty(max_depth, np.int64)
    missing = np.empty(max_depth, np.int64)  # arguments still to come
    counts = np.zeros(max_depth, np.int64)
    values = np.empty((max_depth, max_args), np.int64)
    depth = n = 0
    while True:
        # An argument. One at the greatest depth is a digit without a draw.
        if depth < max_depth - 1 and uniform(state) <= OPERAND:
            missing[depth] = 2 + below(state, max_args - 1)
            operators[depth] = MIN + below(state, 4)
            counts[depth] = 0
            token = operators[depth]
            depth += 1
            value = np.int64(-1)
        else:
            value = below(state, 10)
            token = DIGIT + value
        if n == longest:
            return 0, 0
        tokens[n] = token
        n += 1
        while value >= 0:
            if depth == 0:
                return n, value
            top = depth - 1
            values[top, counts[top]] = value
            counts[top] += 1
            missing[top] -= 1
            if missing[top]:
                break
            if n == longest:
                return 0, 0
            tokens[n] = CLOSE
            n += 1
            value = _apply(operators[top], values[top], counts[top])
            depth -= 1


@kernel
def draw(seed, first, min_length, max_length, max_depth, max_args, tokens, lengths, labels):
    """Candidates first, first + 1, ... of a seed: each the first expression of its stream with
    min_length < length < max_length.

    Args:
        tokens: (n, max_length - 1) uint8, written.
        lengths, labels: (n,) int64, written.
    """
    for i in range(len(lengths)):
        state = stream(seed, first + i)
        length, value = 0, 0
        while length <= min_length:
            length, value = _draw(state, tokens[i], max_length - 1, max_depth, max_args)
        lengths[i], labels[i] = length, value


@kernel
def values(flat, offsets, out):
    """Value of every row of tokens (without eos) into `out` (n,) int64; -1 for a row that is no expression."""
    for row in range(len(offsets) - 1):
        tokens = flat[offsets[row] : offsets[row + 1]]
        longest = len(tokens)
        begins = np.empty(longest + 1, np.int64)  # where the arguments of each open operator begin in `stack`
        operators = np.empty(longest + 1, np.int64)
        stack = np.empty(longest + 1, np.int64)
        depth = n = 0
        good = longest > 0
        for i in range(longest):
            token = np.int64(tokens[i])
            if i and depth == 0:
                good = False  # something comes after the end
            elif DIGIT <= token < MIN:
                stack[n] = token - DIGIT
                n += 1
            elif MIN <= token <= SM:
                begins[depth], operators[depth] = n, token
                depth += 1
            elif token == CLOSE and depth and n > begins[depth - 1]:
                depth -= 1
                begin = begins[depth]
                stack[begin] = _apply(operators[depth], stack[begin:], n - begin)
                n = begin + 1
            else:
                good = False
            if not good:
                break
        out[row] = stack[0] if good and depth == 0 and n == 1 else -1
