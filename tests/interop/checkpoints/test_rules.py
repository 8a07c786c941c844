"""Tables of rules: every form is undone by its other half, and a table that is no bijection is found."""

from __future__ import annotations

import pytest
import torch

from statewise.interop.checkpoints.rules import (
    Divided,
    Insert,
    Joined,
    Reshaped,
    Rule,
    Same,
    Stacked,
    Swapped,
    Transposed,
    bind,
    same,
    to_ours,
    to_theirs,
    within,
)
from statewise.models._tensors import Entry, Tensors

# A form, shapes of ours, how many of theirs.
FORMS = [
    (Same(), [(3, 4)], 1),
    (Insert(1), [(3, 4)], 1),
    (Transposed(), [(3, 4)], 1),
    (Transposed(0, 2), [(3, 4, 5)], 1),
    (Reshaped((-1,)), [(3, 4)], 1),
    (Swapped(), [(6, 4)], 1),
    (Swapped(1), [(2, 6, 4)], 1),
    (Joined(), [(6, 4)], 3),
    (Joined(1), [(3, 8)], 2),
    (Divided(), [(5, 3), (2, 3), (1, 3)], 1),
    (Divided(1), [(3, 5), (3, 2)], 1),
    (Stacked(), [(4, 3, 2)], 4),
    (Stacked(Joined()), [(4, 6, 2)], 8),
    (Stacked(Insert(0)), [(2, 3)], 2),
]


def held(tensors: dict[str, torch.Tensor]) -> Tensors:
    return Tensors("test", {n: Entry(tuple(t.shape), t.dtype) for n, t in tensors.items()}, tensors.__getitem__)


@pytest.mark.parametrize(("form", "shapes", "count"), FORMS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_form_is_undone_by_its_other_half(form, shapes, count, dtype):
    ours = {f"our{i}": torch.randn(shape).to(dtype) for i, shape in enumerate(shapes)}
    names = tuple(f"their{i}" for i in range(count))
    (bound,) = bind([Rule(tuple(ours), names, form)], {name: tuple(t.shape) for name, t in ours.items()})
    theirs = to_theirs(held(ours), [bound])
    assert {name: entry.shape for name, entry in theirs.entries.items()} == bound.theirs
    out = {name: theirs[name] for name in names}
    assert {name: tuple(t.shape) for name, t in out.items()} == bound.theirs  # as foretold from shapes alone
    assert all(t.is_contiguous() for t in out.values())
    back = to_ours(held(out), [bound])
    for name, t in ours.items():
        assert back[name].dtype == dtype
        assert torch.equal(back[name], t)
    # The other way round, from any tensors of theirs.
    out = {name: torch.randn(t.shape).to(dtype) for name, t in out.items()}
    middle = to_ours(held(out), [bound])
    again = to_theirs(held({name: middle[name] for name in ours}), [bound])
    for name, t in out.items():
        assert torch.equal(again[name], t)


def test_forms_do_not_leave_the_numbers_where_they_are():
    x = torch.arange(12.0).view(6, 2)
    assert torch.equal(Swapped().theirs([x], 1)[0], torch.cat([x[3:], x[:3]]))
    assert [len(t) for t in Joined().theirs([x], 3)] == [2, 2, 2]
    assert torch.equal(Divided().theirs([x[:4], x[4:]], 1)[0], x)
    assert torch.equal(Stacked(Joined()).theirs([x.view(2, 6, 1)], 4)[1], x.flatten()[3:6, None])


def test_tables():
    table = within("layers.0", "model.h.0", [*same("a", "bias"), Rule("b", "c", Insert(1))])
    bound = bind(table, {"layers.0.a": (2,), "layers.0.b": (3, 4)})  # a model without a bias
    assert [b.theirs for b in bound] == [{"model.h.0.a": (2,)}, {"model.h.0.c": (3, 1, 4)}]


@pytest.mark.parametrize(
    ("table", "message"),
    [
        (same("a"), "no rule for b"),
        (same("a", "b", "a"), "our a is in two rules"),
        ([Rule("a", "x"), Rule("b", "x")], "their x is in two rules"),
        ([*same("b"), Rule(("a", "c"), "x", Divided())], "only some of these names"),
        ([*same("b"), Rule("a", ("x", "y", "z"), Joined())], "gives 2 tensors"),
    ],
)
def test_what_is_no_bijection_is_found(table, message):
    with pytest.raises(LookupError, match=message):
        bind(table, {"a": (2,), "b": (2,)})


def test_two_dtypes_in_one_tensor_are_refused():
    bound = bind([Rule("a", ("x", "y"), Joined())], {"a": (4,)})
    with pytest.raises(ValueError, match=r"want one dtype for x, y, got torch.bfloat16, torch.float32"):
        to_ours(held({"x": torch.zeros(2), "y": torch.zeros(2, dtype=torch.bfloat16)}), bound)
