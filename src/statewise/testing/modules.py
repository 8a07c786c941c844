"""The laws of mixers, blocks and models. Which laws apply follows from the type of the module alone."""

from __future__ import annotations

import copy
import tempfile
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any, Protocol, runtime_checkable

import torch
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel

from .. import state as S
from ..mixers.base import Causal, HasImpulse, HasMixing, SequenceMixer
from ..ops import use_backend
from ..segments import Segments
from .cases import generator_for, segments
from .ops import Law
from .poison import poisoned_empty
from .subject import (
    BATCH,
    KINDS,
    LENGTH,
    NEXT,
    Outcome,
    Subject,
    compare,
    convert,
    follow,
    fresh,
    from_state,
    from_state_one_by_one,
    history,
    one_by_one,
    pushed,
    pushed_forward,
    row_by_row,
    rows_at_once,
    run,
    shuffled,
    slopes,
    steps,
    visible,
    whole,
)
from .tolerance import assert_agree, assert_zero, double, require, scale

# ---- the laws -------------------------------------------------------------------------------------------------------


def _seg(kind: str, length: int = LENGTH) -> Segments:
    seg = segments(kind, BATCH, length, 5, generator_for("modules", kind))
    assert seg is not None
    return seg


def packed_is_separate(s: Subject) -> None:
    """Laws 3 and 4: packing, padding on the left, on the right and in between, with rubbish in the padding."""
    x = s.draw(BATCH, LENGTH, "x")
    for kind in KINDS:
        seg = _seg(kind)
        ways = {"forward": partial(whole, seg=seg)}
        compare(s, kind, partial(one_by_one, seg=seg), ways, x, single=kind == "mixed")


def rows_commute(s: Subject) -> None:
    """Law 8: permuting rows commutes."""
    x = s.draw(BATCH, LENGTH, "x")
    for seg in (None, _seg("mixed")):
        ways = {"permuted": partial(shuffled, seg=seg)}
        compare(s, "rows", partial(whole, seg=seg), ways, x, single=False)


def gradients_reach_everything(s: Subject) -> None:
    """Laws 9 and 12: every parameter gets a finite gradient that is not zero."""
    module = s.module()
    y = module(s.draw(BATCH, LENGTH, "x"))
    (y * torch.randn(y.shape, generator=generator_for("y"))).sum().backward()
    for name, p in module.named_parameters():
        require(p.grad is not None and bool((p.grad != 0).any()), f"{s.name}: parameter {name} gets no gradient")
        require(
            p.grad is not None and bool(torch.isfinite(p.grad).all()), f"{s.name}: gradient of {name} is not finite"
        )


def second_derivatives_are_right(s: Subject) -> None:
    """Law 9: gradients of gradients, through kernels as through plain PyTorch."""

    def plainly(subject: Subject, module: nn.Module, x: Tensor) -> Outcome:
        with use_backend("reference"):
            return slopes(subject, module, x)

    # PyTorch has no second derivatives of its fused attention.
    with sdpa_kernel(SDPBackend.MATH):
        compare(s, "second derivatives", plainly, {"kernels": slopes}, s.draw(2, LENGTH, "x"), wide=False)


def transforms_agree(s: Subject) -> None:
    """Law 9: outputs and gradients for each row, by transforms of torch.func, are those of one row at a time."""
    x = s.draw(BATCH, LENGTH, "x")
    for seg in (None, _seg("mixed")):
        ways = {"vmap of grad": partial(rows_at_once, seg=seg)}
        compare(s, "torch.func", partial(row_by_row, seg=seg), ways, x, grads=False)
    with sdpa_kernel(SDPBackend.MATH):
        compare(s, "torch.func", pushed, {"jvp": pushed_forward}, x, grads=False)


def empty_works(s: Subject) -> None:
    """Length 0: no output, and a state that is left as it is."""
    module: Any = s.module()
    full, none = module(s.draw(BATCH, 2, "x")), s.draw(BATCH, 0, "x")
    y = module(none)
    require(y.shape == (BATCH, 0, *full.shape[2:]), f"{s.name}: length 0 gives {tuple(y.shape)}")
    if isinstance(module, Causal):
        state = history(s, module, BATCH)
        want = follow(s, module, state, BATCH)
        y, after = module.extend(none, S.clone(state))
        require(y.shape == (BATCH, 0, *full.shape[2:]), f"{s.name}: extend by length 0 gives {tuple(y.shape)}")
        assert_agree(follow(s, module, after, BATCH), want, f"{s.name}: the state after an extend by length 0")


def half_is_finite(s: Subject) -> None:
    """bfloat16 weights, and autocast over float32 weights, forward and backward."""
    x = s.draw(BATCH, LENGTH, "x")
    low = convert(s.module(), lambda t: t.bfloat16() if t.is_floating_point() else t)
    cases = {"bfloat16": (low, x.bfloat16() if x.is_floating_point() else x, False), "autocast": (s.module(), x, True)}
    for name, (module, inputs, cast) in cases.items():
        with torch.autocast("cpu", torch.bfloat16, enabled=cast):
            y = module(inputs)
            again = module(inputs, _seg("mixed"))
        require(bool(torch.isfinite(y).all()), f"{s.name}: {name}: forward is not finite")
        if not cast and x.is_floating_point():
            require(y.dtype == torch.bfloat16, f"{s.name}: {name}: y is {y.dtype}, want the dtype of x")
        (y.float().sum() + again.float().sum()).backward()
        for parameter, p in module.named_parameters():
            require(p.grad is not None and bool(torch.isfinite(p.grad).all()),
                    f"{s.name}: {name}: gradient of {parameter} is missing or not finite")  # fmt: skip


def copies_are_equal(s: Subject) -> None:
    """Law 12: a deep copy, and a new module with the same state dict, compute the same."""
    module, x = s.module(), s.draw(BATCH, LENGTH, "x")
    y = module(x)
    other = s.build().eval()
    other.load_state_dict(module.state_dict())
    for name, twin in (("deep copy", copy.deepcopy(module)), ("state dict", other)):
        require(torch.equal(twin(x), y), f"{s.name}: {name}: computes something else")
    y.sum().backward()
    with torch.no_grad():
        for p in other.parameters():
            p.zero_()
    require(torch.equal(module(x), y), f"{s.name}: a copy shares its parameters")


def wrong_width_is_named(s: Subject) -> None:
    """A wrong width or rank raises ValueError, and the message names x."""
    assert s.d_model is not None
    for shape in ((2, 3, s.d_model + 1), (3, s.d_model)):
        try:
            s.module()(torch.zeros(shape))
        except ValueError as error:
            require("x:" in str(error), f"{s.name}: the error on shape {shape} does not name x: {error}")
        else:
            require(False, f"{s.name}: x of shape {shape} is accepted, with d_model {s.d_model}")


def compiles_whole(s: Subject) -> None:
    """Law 11: torch.compile has no graph break."""

    def compiled(subject: Subject, module: nn.Module, x: Tensor) -> Outcome:
        torch._dynamo.reset()
        return {"y": torch.compile(module, fullgraph=True, backend="aot_eager")(x)}

    # Compiling is dear. In float64 a module runs the same lines, with another back-end of its ops: see their own law.
    compare(s, "compile", whole, {"compiled": compiled}, s.draw(BATCH, LENGTH, "x"), wide=False)


def future_is_unseen(s: Subject) -> None:
    """Law 7: causality. By gradient, or by other tokens later on."""
    module, x = s.module(torch.float64), double(s.draw(BATCH, LENGTH, "x"))
    for t in (0, LENGTH // 2, LENGTH - 2):
        if s.vocab is not None:
            late = torch.arange(LENGTH) > t
            other = module(torch.where(late, (x + 1) % s.vocab, x))
            assert_agree(other[:, : t + 1], module(x)[:, : t + 1], f"{s.name}: y up to {t} for other tokens later on")
            continue
        leaf = x.clone().requires_grad_()
        early = module(leaf)[:, : t + 1]
        (g,) = torch.autograd.grad(early, leaf, torch.randn(early.shape, generator=generator_for(t)).double())
        # Fourier transforms leave rounding in the future, so "zero" means: explained by rounding.
        allowed = 4096 * torch.finfo(torch.float64).eps * scale(g)
        future = scale(g[:, t + 1 :])
        require(future <= allowed, f"{s.name}: y up to time {t} depends on later x: gradient {future:.3g}")


def step_is_forward(s: Subject) -> None:
    """Law 1: step over time == forward."""
    for grads in (True, False):
        compare(s, "step", run, {"step over time": steps}, s.draw(BATCH, LENGTH, "x"), grads=grads)


def capacity_is_enough(s: Subject) -> None:
    """A state with room for exactly the positions to come gives the same."""
    way = partial(steps, capacity=LENGTH + NEXT)
    compare(s, "capacity", run, {"step over time": way}, s.draw(BATCH, LENGTH, "x"))


def split_is_whole(s: Subject) -> None:
    """Law 2: extend of any split == whole, from a state with a history, with gradients in that state."""
    x = s.draw(BATCH, LENGTH, "x")
    for seg in (None, _seg("mixed")):
        cuts: tuple[tuple[int, ...], ...] = ((0,), (1,), (LENGTH - 1,), (LENGTH,), (4, 4, 9))
        ways = {f"cut at {cut}": partial(from_state, seg=seg, cuts=cut) for cut in cuts}
        compare(s, "extend", partial(from_state, seg=seg), ways, x, single=seg is None)


def final_state_is_right(s: Subject) -> None:
    """Laws 3 and 4 for the state: after packed and padded rows it goes on with each row's last document."""
    x = s.draw(BATCH, LENGTH, "x")
    for kind in KINDS:
        seg = _seg(kind)
        ways = {"extend": partial(from_state, seg=seg)}
        compare(s, f"state, {kind}", partial(from_state_one_by_one, seg=seg), ways, x, single=kind == "mixed")


def states_are_batch_first(s: Subject) -> None:
    """Law 8 for states: select, expand and merge rows, also of states that have seen different lengths."""
    module: Any = s.module(torch.float64)
    with torch.no_grad():
        for name, t in S.leaves(fresh(module, BATCH)):
            require(t.shape[0] == BATCH, f"{s.name}: init_state: leaf {name} has {tuple(t.shape)}, want batch first")
        state, x = history(s, module, BATCH), double(s.draw(BATCH, NEXT, "next"))
        require(S.batch_size(state) == BATCH, f"{s.name}: a leaf of the state is not batch first")
        y = module.extend(x, S.clone(state))[0]
        order = torch.tensor([2, 0, 1, 1])
        got = module.extend(x[order], S.clone(S.select(state, order)))[0]
        assert_agree(got, y[order], f"{s.name}: state.select", LENGTH)
        got = module.extend(x.repeat_interleave(2, 0), S.clone(S.expand(state, 2)))[0]
        assert_agree(got, y.repeat_interleave(2, 0), f"{s.name}: state.expand", LENGTH)
        alone, past = [], double(s.draw(BATCH, 2 + BATCH, "past"))
        for b in range(BATCH):
            alone.append(module.extend(past[b : b + 1, : 2 + b], fresh(module, 1))[1])
        want = torch.cat([module.extend(x[b : b + 1], S.clone(one))[0] for b, one in enumerate(alone)])
        got = module.extend(x, S.clone(S.merge(alone)))[0]
        assert_agree(got, want, f"{s.name}: state.merge of rows with different pasts", LENGTH)


def states_keep_on_disk(s: Subject) -> None:
    """Law 12 for states: a state that is saved and loaded goes on exactly as before."""
    module: Any = s.module()
    x = s.draw(BATCH, 4, "past")
    with torch.no_grad(), tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "state.safetensors"
        for capacity in (None, 4 + NEXT):
            state = module.extend(x, module.init_state(BATCH, capacity=capacity))[1]
            S.save(state, path)
            back = S.load(path, module.init_state(1, capacity=capacity))
            same = torch.equal(follow(s, module, back, BATCH), follow(s, module, state, BATCH))
            require(same, f"{s.name}: a loaded state goes on differently (capacity {capacity})")


def matrix_is_forward(s: Subject) -> None:
    """Law 5: emit(dense @ v) == forward, and a causal mixer's matrix is lower triangular."""
    x = s.draw(BATCH, LENGTH, "x")

    def by_matrix(subject: Subject, module: Any, x: Tensor, *, seg: Segments | None) -> Outcome:
        m = module.mixing(subject.hide(x, seg), seg)
        return {"y": visible(m.emit(m.apply()), seg, module)}

    for seg in (None, _seg("mixed"), _seg("packed"), _seg("left pad")):
        ways = {"emit(dense @ v)": partial(by_matrix, seg=seg)}
        compare(s, "matrix", partial(whole, seg=seg), ways, x, single=seg is None)
    module: Any = s.module()
    m = module.mixing(x)
    time = (-2, -1) if m.kind == "head" else (1, 2)
    shape = (BATCH, LENGTH, LENGTH)
    require(
        (m.dense.shape[0], *(m.dense.shape[i] for i in time)) == shape, f"{s.name}: dense is {tuple(m.dense.shape)}"
    )
    require(torch.equal(module.matrix(x), m.dense), f"{s.name}: matrix(x) is not mixing(x).dense")
    if isinstance(module, Causal):
        above = torch.ones(LENGTH, LENGTH, dtype=torch.bool).triu(1)
        assert_zero(m.dense.movedim(time, (0, 1))[above], f"{s.name}: matrix above the diagonal")


def matrix_is_toeplitz(s: Subject) -> None:
    """Law 6 for time-invariant mixers: each diagonal of the matrix is one entry of the impulse response, for any x."""
    module: Any = s.module(torch.float64)
    with torch.no_grad():
        m, k = module.mixing(double(s.draw(BATCH, LENGTH, "x"))), module.impulse(LENGTH)
        lag = torch.arange(LENGTH)[:, None] - torch.arange(LENGTH)
        want = k[..., lag.clamp(min=0)].masked_fill(lag < 0, 0)  # (D, L, L) or (D_out, D_in, L, L)
        if m.kind == "block":
            want = want.permute(2, 3, 0, 1)
        assert_agree(m.dense, want.to(m.dense.dtype).expand_as(m.dense), f"{s.name}: matrix from impulse", LENGTH)


@runtime_checkable
class Saves(Protocol):
    """A model that can be written to a directory and read back."""

    def save_pretrained(self, directory: Any) -> None: ...


def weights_keep_on_disk(s: Subject) -> None:
    """Law 12: save_pretrained and from_pretrained give back the same model."""
    module: Any = s.module()
    x = s.draw(BATCH, LENGTH, "x")
    with torch.no_grad(), tempfile.TemporaryDirectory() as folder:
        module.save_pretrained(folder)
        back = type(module).from_pretrained(folder).eval()
        require(torch.equal(back(x), module(x)), f"{s.name}: from_pretrained computes something else")
    for name, p in back.named_parameters():
        require(p.requires_grad, f"{s.name}: from_pretrained: {name} can no longer be trained")


# Type -> the laws that being of this type promises.
_LAWS: tuple[tuple[Any, tuple[Callable[[Subject], None], ...]], ...] = (
    (
        nn.Module,
        (
            packed_is_separate,
            rows_commute,
            gradients_reach_everything,
            second_derivatives_are_right,
            transforms_agree,
            empty_works,
            half_is_finite,
            copies_are_equal,
            compiles_whole,
        ),
    ),
    (SequenceMixer, (wrong_width_is_named,)),
    (
        Causal,
        (
            future_is_unseen,
            step_is_forward,
            capacity_is_enough,
            split_is_whole,
            final_state_is_right,
            states_are_batch_first,
            states_keep_on_disk,
        ),
    ),
    (HasMixing, (matrix_is_forward,)),
    (HasImpulse, (matrix_is_toeplitz,)),
    (Saves, (weights_keep_on_disk,)),
)


def laws_for(module: nn.Module | type) -> list[Callable[[Subject], None]]:
    """The laws that apply to a module or to a class of modules, by type."""
    cls = module if isinstance(module, type) else type(module)
    return [law for kind, laws in _LAWS if issubclass(cls, kind) for law in laws]


def module_laws(build: Callable[[], nn.Module], *, d_model: int | None = None, vocab: int | None = None) -> list[Law]:
    """The laws of what `build()` makes. Give d_model for inputs (B, L, d_model), vocab for tokens (B, L)."""
    if (d_model is None) == (vocab is None):
        raise ValueError("want exactly one of d_model (inputs of that width) and vocab (number of tokens)")
    subject = Subject(build, d_model, vocab)

    def check(law: Callable[[Subject], None]) -> None:
        with poisoned_empty():
            law(subject)

    return [Law(law.__name__, partial(check, law)) for law in laws_for(build())]


def check_mixer(build: Callable[[], nn.Module], d_model: int) -> int:
    """Check every law of the mixer (or block) that `build()` makes; LawError at the first that does not hold.

    `build` takes no argument and makes the module on CPU in float32; it is called several times. Keep it small: a
    width of 8 to 16. Returns how many laws were checked.
    """
    laws = module_laws(build, d_model=d_model)
    for law in laws:
        law.check()
    return len(laws)


def check_model(build: Callable[[], nn.Module], vocab: int) -> int:
    """As `check_mixer`, for a model over tokens (B, L) in [0, vocab)."""
    laws = module_laws(build, vocab=vocab)
    for law in laws:
        law.check()
    return len(laws)
