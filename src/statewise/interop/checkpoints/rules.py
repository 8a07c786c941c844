"""The correspondence of two state dicts as a table of small invertible rules.

A rule ties names of ours to names of theirs by a form. Most forms leave the numbers where they are; none computes with
them, so that both directions are exact to the bit. A table is a list of rules; `bind` ties it to the names that a
model really has, and proves on the way that it is a bijection.

    CONV = [*same("conv1d.bias"), Rule("conv1d.weight", "conv1d.weight", Insert(1))]
    table = within("layers.0.mixer", "backbone.layers.0.mixer", CONV)
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor

from ...models._tensors import Entry, Tensors

Shape = tuple[int, ...]


class Form(Protocol):
    """How the tensors of one side are laid out on the other."""

    def ours(self, theirs: list[Tensor], like: list[Shape]) -> list[Tensor]:
        """From their tensors to ours, which have the shapes `like`."""

    def theirs(self, ours: list[Tensor], count: int) -> list[Tensor]:
        """From our tensors to their `count`."""


@dataclass(frozen=True)
class Same:
    """One tensor each, alike."""

    def ours(self, theirs: list[Tensor], like: list[Shape]) -> list[Tensor]:
        return theirs

    def theirs(self, ours: list[Tensor], count: int) -> list[Tensor]:
        return ours


@dataclass(frozen=True)
class Insert:
    """Theirs has one more axis of length 1, as depthwise convolutions have: (D, K) and (D, 1, K) for axis 1."""

    axis: int

    def ours(self, theirs: list[Tensor], like: list[Shape]) -> list[Tensor]:
        return [t.squeeze(self.axis) for t in theirs]

    def theirs(self, ours: list[Tensor], count: int) -> list[Tensor]:
        return [t.unsqueeze(self.axis) for t in ours]


@dataclass(frozen=True)
class Transposed:
    """Theirs is ours with two axes exchanged."""

    a: int = -2
    b: int = -1

    def ours(self, theirs: list[Tensor], like: list[Shape]) -> list[Tensor]:
        return [t.transpose(self.a, self.b) for t in theirs]

    def theirs(self, ours: list[Tensor], count: int) -> list[Tensor]:
        return [t.transpose(self.a, self.b) for t in ours]


@dataclass(frozen=True)
class Reshaped:
    """Theirs has the numbers of ours in the same order in another shape: `shape`, with one -1 allowed."""

    shape: Shape

    def ours(self, theirs: list[Tensor], like: list[Shape]) -> list[Tensor]:
        return [t.reshape(s) for t, s in zip(theirs, like)]

    def theirs(self, ours: list[Tensor], count: int) -> list[Tensor]:
        return [t.reshape(self.shape) for t in ours]


@dataclass(frozen=True)
class Swapped:
    """Theirs has the two halves of an axis in the other order."""

    axis: int = 0

    def ours(self, theirs: list[Tensor], like: list[Shape]) -> list[Tensor]:
        return [torch.cat(t.chunk(2, self.axis)[::-1], self.axis) for t in theirs]

    def theirs(self, ours: list[Tensor], count: int) -> list[Tensor]:
        return self.ours(ours, [])


@dataclass(frozen=True)
class Joined:
    """Ours is all of theirs one after the other along an axis, equally long."""

    axis: int = 0

    def ours(self, theirs: list[Tensor], like: list[Shape]) -> list[Tensor]:
        return [torch.cat(theirs, self.axis)]

    def theirs(self, ours: list[Tensor], count: int) -> list[Tensor]:
        return list(ours[0].chunk(count, self.axis))


@dataclass(frozen=True)
class Divided:
    """Theirs is all of ours one after the other along an axis; how long each is, our shapes say."""

    axis: int = 0

    def ours(self, theirs: list[Tensor], like: list[Shape]) -> list[Tensor]:
        return list(theirs[0].split([shape[self.axis] for shape in like], self.axis))

    def theirs(self, ours: list[Tensor], count: int) -> list[Tensor]:
        return [torch.cat(ours, self.axis)]


@dataclass(frozen=True)
class Stacked:
    """Ours has a first axis over things (experts, say) of which theirs are apart, each laid out as in `each`."""

    each: Form = Same()

    def ours(self, theirs: list[Tensor], like: list[Shape]) -> list[Tensor]:
        size = len(theirs) // like[0][0]
        groups = [theirs[i : i + size] for i in range(0, len(theirs), size)]
        return [torch.stack([self.each.ours(group, [like[0][1:]])[0] for group in groups])]

    def theirs(self, ours: list[Tensor], count: int) -> list[Tensor]:
        size = count // len(ours[0])
        return [t for one in ours[0].unbind() for t in self.each.theirs([one], size)]


@dataclass(frozen=True)
class Rule:
    """Names of ours, names of theirs (one, or several in a fixed order), and the form that ties them."""

    ours: str | tuple[str, ...]
    theirs: str | tuple[str, ...]
    form: Form = Same()

    @property
    def our_names(self) -> tuple[str, ...]:
        return (self.ours,) if isinstance(self.ours, str) else self.ours

    @property
    def their_names(self) -> tuple[str, ...]:
        return (self.theirs,) if isinstance(self.theirs, str) else self.theirs


def same(*names: str) -> list[Rule]:
    """Rules for tensors that have the same name and layout on both sides."""
    return [Rule(name, name) for name in names]


def within(ours: str, theirs: str, rules: Iterable[Rule]) -> list[Rule]:
    """The rules below a module: `ours` and `theirs` are put before the names."""
    return [
        Rule(
            tuple(f"{ours}.{name}" for name in rule.our_names),
            tuple(f"{theirs}.{name}" for name in rule.their_names),
            rule.form,
        )
        for rule in rules
    ]


# ---- a table and a model ---------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Bound:
    """A rule with the shapes of both sides."""

    rule: Rule
    ours: dict[str, Shape]
    theirs: dict[str, Shape]


def bind(rules: Sequence[Rule], shapes: Mapping[str, Shape]) -> list[Bound]:
    """The rules that concern a model with these names and shapes, each with the shapes of both sides.

    A rule of whose names the model has none (a bias it is built without) is left out.

    Raises:
        LookupError: the table is no bijection for this model: a name in two rules or in none, or a rule of whose names
            the model has some. That is a mistake in the table.
    """
    bound, seen = [], set()
    for rule in rules:
        here = [name in shapes for name in rule.our_names]
        if not any(here):
            continue
        if not all(here):
            raise LookupError(f"rule {rule}: the model has only some of these names")
        meta = [torch.empty(shapes[name], device="meta") for name in rule.our_names]
        theirs = rule.form.theirs(meta, len(rule.their_names))
        if len(theirs) != len(rule.their_names):
            raise LookupError(f"rule {rule}: gives {len(theirs)} tensors")
        for name in (*(f"our {n}" for n in rule.our_names), *(f"their {n}" for n in rule.their_names)):
            if name in seen:
                raise LookupError(f"{name} is in two rules")
            seen.add(name)
        bound.append(
            Bound(
                rule,
                {name: tuple(shapes[name]) for name in rule.our_names},
                {name: tuple(t.shape) for name, t in zip(rule.their_names, theirs)},
            )
        )
    left = [name for name in shapes if f"our {name}" not in seen]
    if left:
        raise LookupError(f"no rule for {', '.join(left)}")
    return bound


def to_ours(found: Tensors, bound: Sequence[Bound]) -> Tensors:
    """Their tensors under our names, in our layout; each is read when it is asked for."""
    return _translated(
        found,
        [(b.rule.their_names, b.ours, b) for b in bound],
        lambda b, tensors: b.rule.form.ours(tensors, list(b.ours.values())),
    )


def to_theirs(ours: Tensors, bound: Sequence[Bound]) -> Tensors:
    """Our tensors under their names, in their layout; each is read when it is asked for."""
    return _translated(
        ours,
        [(b.rule.our_names, b.theirs, b) for b in bound],
        lambda b, tensors: b.rule.form.theirs(tensors, len(b.theirs)),
    )


def _translated(
    found: Tensors,
    steps: list[tuple[tuple[str, ...], dict[str, Shape], Bound]],
    apply: Callable[[Bound, list[Tensor]], list[Tensor]],
) -> Tensors:
    entries, source = {}, {}
    for names, shapes, bound in steps:
        dtypes = {found.entries[name].dtype for name in names}
        if len(dtypes) > 1:
            # Putting them into one tensor would round some of them.
            raise ValueError(
                f"{found.source}: want one dtype for {', '.join(names)}, got {', '.join(sorted(map(str, dtypes)))}"
            )
        for name, shape in shapes.items():
            entries[name] = Entry(shape, *dtypes)
            source[name] = (names, shapes, bound)
    # The results of the last rule: its tensors are asked for one after the other.
    last: dict[str, Tensor] = {}

    def read(name: str) -> Tensor:
        if name not in last:
            names, shapes, bound = source[name]
            last.clear()
            last.update(zip(shapes, apply(bound, [found[n] for n in names])))
        return last.pop(name).contiguous()

    return Tensors(found.source, entries, read)
