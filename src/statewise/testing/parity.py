"""Our language model beside one of transformers with the same weights: the same function, in every way of using it.

The other model is used through what all causal language models of transformers offer; nothing of transformers is
imported here. What transformers computes over whole rows, one at a time, is what ours is held to. Where transformers
also serves padding or a cache continued by several tokens rightly, ours is compared with that too; a family for which
it does not is named with the reason, and the check fails as soon as the reason is gone.
"""

from __future__ import annotations

import copy
import tempfile
from collections.abc import Callable, Mapping
from functools import partial
from itertools import pairwise
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ..segments import Segments
from .ops import Law
from .tolerance import require, scale

# The figure that the project promises for logits in float32. A gradient is a sum over all positions of the batch.
PROMISED, GRADIENT = 1e-5, 1e-4
BATCH, LENGTH, NEW = 2, 33, 24
CUTS = (5, 6, 19)  # so that a chunk of one token stands between longer ones
Build = Callable[[], tuple[Any, Any]]
Wrong = Mapping[str, str]


def sharpen(model: Any, generator: torch.Generator) -> None:
    """Move parameters off their initial values, so that every one shows in the outputs.

    Matrices keep the size of what goes through them, which is not so for the small ones that models begin with: there
    a wrong mixer hardly shows beside the residual stream. Step sizes become small, as trained models have them: a state
    that is forgotten at once hides what is lost of it.
    """
    with torch.no_grad():
        for name, p in model.named_parameters():
            if name.endswith(("dt_proj.bias", "dt_bias")):
                p.copy_(-4 + 3 * torch.rand(p.shape, generator=generator))
            elif p.ndim > 1 and not name.endswith("A_log"):
                p.copy_(torch.randn(p.shape, generator=generator) / p.shape[-1] ** 0.5)
            else:
                p.add_(torch.randn(p.shape, generator=generator) * 0.1 * max(float(p.std(correction=0)), 0.3))


def assert_close(ours: Tensor, theirs: Tensor, what: str, bound: float = PROMISED) -> None:
    """Largest difference, relative to the largest entry, within a bound."""
    require(ours.shape == theirs.shape, f"{what}: shape {tuple(ours.shape)}, theirs {tuple(theirs.shape)}")
    found = float((ours - theirs).abs().max()) / max(scale(theirs), torch.finfo(torch.float32).tiny)
    require(found <= bound, f"{what}: relative error {found:.3g}, want at most {bound:g}")


def _tokens(ours: Any, *shape: int) -> Tensor:
    # 0 and 1 are often special tokens.
    return torch.randint(2, ours.vocab_size, shape, generator=torch.Generator().manual_seed(7))


def _alone(theirs: Any, tokens: Tensor) -> Tensor:
    return theirs(tokens, use_cache=False).logits


def same_logits(theirs: Any, ours: Any) -> None:
    """Logits over whole rows."""
    tokens = _tokens(ours, BATCH, LENGTH)
    with torch.no_grad():
        assert_close(ours(tokens), _alone(theirs, tokens), "logits")


def same_gradients(theirs: Any, ours: Any, load: Callable[[str], Any]) -> None:
    """Gradients of every parameter; theirs are brought into our layout by the loader itself."""
    tokens = _tokens(ours, BATCH, LENGTH)
    direction = torch.randn(BATCH, LENGTH, ours.vocab_size, generator=torch.Generator().manual_seed(8))
    theirs.zero_grad()
    (_alone(theirs, tokens) * direction).sum().backward()
    (ours(tokens) * direction).sum().backward()
    slopes = copy.deepcopy(theirs)
    with torch.no_grad():
        for (name, p), q in zip(theirs.named_parameters(), slopes.parameters()):
            require(p.grad is not None, f"their parameter {name} gets no gradient")
            q.copy_(p.grad)
    with tempfile.TemporaryDirectory() as folder:
        slopes.save_pretrained(folder)
        want = dict(load(folder).named_parameters())
        for name, p in ours.named_parameters():
            assert_close(p.grad, want[name].detach(), f"gradient of {name}", GRADIENT)
    ours.zero_grad()


def same_greedy_tokens(theirs: Any, ours: Any, wrong: str | None = None) -> None:
    """The likeliest continuation, theirs by `generate` (from whole rows if steps are wrong), ours step by step."""
    prompt = _tokens(ours, BATCH, 9)
    options = {"max_new_tokens": NEW, "do_sample": False, "pad_token_id": 0, "eos_token_id": None}
    want = theirs.generate(prompt, use_cache=wrong is None, **options)[:, 9:]
    got = []
    with torch.no_grad():
        logits, state = ours.prefill(prompt, ours.init_state(BATCH))
        for _ in range(NEW):
            got.append(logits.argmax(-1))
            logits, state = ours.step(got[-1], state)
    require(torch.equal(torch.stack(got, 1), want), f"greedy tokens: {torch.stack(got, 1).tolist()}, {want.tolist()}")


def padding_changes_nothing(theirs: Any, ours: Any, wrong: str | None = None) -> None:
    """Rows of different lengths, padded on the left: each as alone."""
    lengths, total = (4, 17, 9), 17
    rows = [_tokens(ours, 1, n) for n in lengths]
    tokens = torch.cat([torch.nn.functional.pad(row, (total - row.shape[1], 0)) for row in rows])
    seg = Segments.from_lengths(list(lengths), total, side="left")
    assert seg.valid is not None
    with torch.no_grad():
        logits = ours(tokens, seg)
        together = theirs(tokens, attention_mask=seg.valid.long(), use_cache=False).logits
        off = 0.0
        for b, row in enumerate(rows):
            alone = _alone(theirs, row)[0]
            assert_close(logits[b, total - lengths[b] :], alone, f"row {b}, padded on the left")
            off = max(off, float((together[b, total - lengths[b] :] - alone).abs().max()) / scale(alone))
    _theirs_too(off, wrong, "padding on the left")


def chunks_are_whole(theirs: Any, ours: Any, wrong: str | None = None) -> None:
    """A cache continued in chunks of several tokens gives what the whole row gives."""
    tokens = _tokens(ours, BATCH, LENGTH)
    edges = (0, *CUTS, LENGTH)
    mine, others, state, cache = [], [], ours.init_state(BATCH), None
    with torch.no_grad():
        want = _alone(theirs, tokens)
        for a, b in pairwise(edges):
            part, state = ours.extend(tokens[:, a:b], state)
            mine.append(part)
            out = theirs(tokens[:, a:b], cache=cache, use_cache=True, position_ids=torch.arange(a, b)[None])
            others.append(out.logits)
            cache = out.cache
    assert_close(torch.cat(mine, 1), want, f"in chunks cut at {CUTS}")
    _theirs_too(float((torch.cat(others, 1) - want).abs().max()) / scale(want), wrong, "a cache continued in chunks")


def packed_is_separate(theirs: Any, ours: Any) -> None:
    """Documents side by side in one row: each as transformers computes it alone."""
    lengths = (3, 12, 1, 8)
    documents = [_tokens(ours, 1, n) for n in lengths]
    with torch.no_grad():
        got = ours(torch.cat(documents, 1), Segments.pack([list(lengths)]))
        want = torch.cat([_alone(theirs, document) for document in documents], 1)
    assert_close(got, want, "packed documents")


def round_trip_is_exact(theirs: Any, ours: Any) -> None:
    """Their checkpoint as ours and back, in shards: the same names, and the same bits; their class takes it."""
    from ..interop.checkpoints import convert
    from ..models._tensors import open_tensors

    with tempfile.TemporaryDirectory() as folder:
        start, middle, end = (Path(folder) / name for name in ("start", "middle", "end"))
        theirs.save_pretrained(start)
        convert(start, middle, to="statewise")
        convert(middle, end, to="transformers", family=theirs.config.model_type, max_shard=20_000)
        for what, want, got in (
            ("ours", ours.state_dict(), open_tensors(middle)),
            ("theirs", open_tensors(start), open_tensors(end)),
        ):
            require(set(got) == set(want), f"{what}: other names: {sorted(set(got) ^ set(want))}")
            for name in want:
                same = got[name].dtype == want[name].dtype and torch.equal(got[name], want[name])
                require(same, f"{what}: {name} is not the same to the bit")
        again = type(theirs).from_pretrained(end).eval()
        if kind := getattr(theirs.config, "_experts_implementation", None):
            again.set_experts_implementation(kind)
        tokens = _tokens(ours, BATCH, LENGTH)
        with torch.no_grad():
            assert_close(
                _alone(again, tokens), _alone(theirs, tokens), "their class with the checkpoint that came back"
            )


def _theirs_too(off: float, wrong: str | None, what: str) -> None:
    """What transformers gives is right, or known to be wrong and still so."""
    if wrong is None:
        require(off <= PROMISED, f"transformers is off by {off:.3g} for {what}, and no reason is known")
    else:
        require(off > PROMISED, f"transformers now serves {what} rightly ({off:.3g}); it is named as wrong: {wrong}")


def parity_laws(
    build: Build,
    load: Callable[[str], Any],
    *,
    wrong_padding: str | None = None,
    wrong_chunks: str | None = None,
    wrong_steps: str | None = None,
) -> list[Law]:
    """The checks of one pair of models.

    Args:
        build: makes (theirs, ours), both in eval mode in float32 with the same weights.
        load: our loader, from a folder that `save_pretrained` of theirs wrote.
        wrong_padding, wrong_chunks, wrong_steps: why transformers itself is wrong there, if it is.
    """
    checks: list[Callable[[Any, Any], None]] = [
        same_logits,
        partial(same_gradients, load=load),
        partial(same_greedy_tokens, wrong=wrong_steps),
        partial(padding_changes_nothing, wrong=wrong_padding),
        partial(chunks_are_whole, wrong=wrong_chunks),
        packed_is_separate,
        round_trip_is_exact,
    ]

    def run(check: Callable[[Any, Any], None]) -> None:
        check(*build())

    return [Law(getattr(c, "func", c).__name__, partial(run, c)) for c in checks]


class Families:
    """Families of models and the checks of each, in a tiny and in an oddly-sized configuration.

    Args:
        table: name -> how theirs is built (for an odd configuration or not), and for what transformers itself is wrong
            there (arguments of `parity_laws`): always, and only if odd.
        load: our loader.
    """

    def __init__(self, table: Mapping[str, tuple[Callable[[bool], Any], Wrong, Wrong]], load: Callable[[str], Any]):
        self.table, self.load = table, load
        self._pairs: dict[tuple[str, bool], tuple[Any, Any]] = {}

    def pair(self, name: str, odd: bool) -> tuple[Any, Any]:
        """(theirs with random weights, ours as loaded from what theirs wrote), made once."""
        if (name, odd) not in self._pairs:
            torch.manual_seed(0)
            theirs = self.table[name][0](odd).eval()
            sharpen(theirs, torch.Generator().manual_seed(1))
            with tempfile.TemporaryDirectory() as folder:
                theirs.save_pretrained(folder)
                self._pairs[name, odd] = theirs, self.load(folder)
        return self._pairs[name, odd]

    def laws(self) -> dict[str, Law]:
        """All checks of all families, by "name-tiny-check" and "name-odd-check"."""
        found = {}
        for name, (_, wrong, wrong_if_odd) in self.table.items():
            for odd in (False, True):
                reasons = {**wrong, **(wrong_if_odd if odd else {})}
                for law in parity_laws(partial(self.pair, name, odd), self.load, **reasons):
                    found[f"{name}-{'odd' if odd else 'tiny'}-{law.name}"] = law
        return found
