"""Speed, side by side: every contender computes the same thing from the same inputs, and is checked before it is timed.

`timing` interleaves and takes medians, `cases` says what a row is and when a result is right, `ops`, `models` and
`scaling` list the rows, `peers` adapts other libraries, `bounds` measures what the machine could do at best, `runner`
puts a run together and `report` writes it down. `statewise bench` is the way in.
"""
