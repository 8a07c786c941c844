"""Speculative decoding: the text is that of the model alone, whatever the draft guesses."""

import math

import pytest
import torch

from statewise import deterministic, state
from statewise.inference import DONE, DraftModel, Guess, NGram, Sampling, generate
from statewise.inference._generation import BEHIND, Row
from statewise.inference._sampling import Uniforms, draw
from statewise.inference._speculative import verdict

from .conftest import V, make_model

PROMPTS = [[7, 8, 9, 7, 8, 9, 7, 8], [3], [1, 2, 1, 2, 1]]


class Oracle:
    """Guesses from a script, so that it is known which guesses are right."""

    def __init__(self, texts, wrong_at=(), tokens=4):
        self.texts, self.wrong_at, self.tokens = texts, wrong_at, tokens

    def begin(self, sampling, seeds, vocabulary):
        self.asked = 0

    def guess(self, rows, limits):
        self.asked += 1
        out = []
        for row, limit in zip(rows, limits):
            done = len(row.made)
            guess = self.texts[row.index][done : done + min(limit, self.tokens)]
            out.append(Guess([(t + 1) % V if done + i in self.wrong_at else t for i, t in enumerate(guess)]))
        return out


class Noise(Oracle):
    """Random guesses of random lengths, most of them wrong."""

    def __init__(self):
        self.generator = torch.Generator().manual_seed(0)

    def guess(self, rows, limits):
        lengths = torch.randint(0, 4, (len(rows),), generator=self.generator).tolist()
        return [
            Guess(torch.randint(0, 4, (min(n, limit),), generator=self.generator).tolist())
            for n, limit in zip(lengths, limits)
        ]


def _drafts(model):
    return {
        "ngram": NGram(1, 5),
        "same model": DraftModel(model, 3),
        "other model": DraftModel(make_model("mamba", 16, seed=1), 4),
        "noise": Noise(),
    }


@pytest.mark.parametrize("name", ["ngram", "same model", "other model", "noise"])
@pytest.mark.parametrize("mixer", ["mamba2", "attention", "s4d", "hybrid"])
def test_greedy_text_is_the_same_to_the_bit(mixer, name):
    """Ragged rows, rows that end early, wrong guesses, and afterwards the states and log-probabilities too."""
    model = make_model(mixer)
    options = {"temperature": 0, "repetition_penalty": 0.7, "stop": [5, 22], "logprobs": True}
    with deterministic():
        plain = generate(model, PROMPTS, 16, **options)
        run = generate(model, PROMPTS, 16, draft=_drafts(model)[name], **options)
        assert torch.equal(torch.stack(list(run), 1), torch.stack(list(plain), 1))
        assert run.made == plain.made
        assert run.logprobs == plain.logprobs
        for row in range(3):
            got, want = run.context(row), plain.context(row)
            assert torch.equal(got.logits, want.logits)
            for (leaf, x), (_, y) in zip(state.leaves(got.state), state.leaves(want.state)):
                assert torch.equal(x, y), leaf
    assert run.guessed > 0
    # Of three right guesses two are left over where a row ends.
    assert name != "same model" or run.guessed - run.accepted <= 2 * len(PROMPTS)


@pytest.mark.parametrize("draft", [NGram(1, 5), Noise()])
def test_certain_guesses_do_not_change_what_is_drawn(draft):
    """Also with sampling: the same seed gives the same text, with and without look-up."""
    model = make_model()
    with deterministic():
        plain = generate(model, PROMPTS, 24, seed=3, temperature=0.8, top_p=0.9)
        run = generate(model, PROMPTS, 24, seed=3, temperature=0.8, top_p=0.9, draft=draft)
        assert torch.equal(torch.stack(list(run), 1), torch.stack(list(plain), 1))
    assert 0 < run.accepted < run.guessed


@pytest.mark.parametrize("end", range(1, 12))
def test_a_row_may_end_anywhere_among_right_guesses(end):
    """The context of a row then is that of plain decoding, also when the state of the call has read further."""
    model = make_model("hybrid")
    with deterministic():
        long = generate(model, [[3]], 20, temperature=0)
        list(long)
        how = {"temperature": 0, "until": lambda row, made: len(made) == end}
        plain, run = (generate(model, [[3]], 20, draft=d, **how) for d in (None, Oracle(long.made, tokens=4)))
        assert torch.equal(torch.stack(list(run)), torch.stack(list(plain)))
        got, want = run.context(), plain.context()
        assert torch.equal(got.tokens, want.tokens)
        assert torch.equal(got.logits, want.logits)


# ---- the rule ----------------------------------------------------------------------------------------------------


def _far(counts, probabilities):
    """Pearson's statistic in units of its own standard deviation, above its mean."""
    total, kept = counts.sum(), probabilities > 0
    assert counts[~kept].sum() == 0
    expected = total * probabilities[kept]
    freedom = int(kept.sum()) - 1
    return float(((counts[kept] - expected) ** 2 / expected).sum() - freedom) / math.sqrt(2 * freedom)


def test_the_verdict_has_the_distribution_of_the_model():
    p = torch.tensor([0.5, 0.3, 0.2, 0.0])
    q = torch.tensor([0.1, 0.3, 0.2, 0.4])
    proposals, checks = Uniforms([1]), Uniforms([2])
    counts, kept, total = torch.zeros(4), 0, 20_000
    for _ in range(total):
        guess = int(draw(q[None], proposals.take([0])))
        token = verdict(p, q, guess, checks, 0)
        counts[token] += 1
        kept += token == guess
    assert _far(counts, p) < 4
    # The share that stands is the overlap of p and q, which no rule can exceed; four standard deviations.
    overlap = float(torch.minimum(p, q).sum())
    assert abs(kept / total - overlap) < 4 * math.sqrt(overlap * (1 - overlap) / total)


def test_the_verdict_where_p_and_q_are_one():
    p = torch.tensor([0.25, 0.75])
    assert {verdict(p, p, token, Uniforms([s]), 0) for token in (0, 1) for s in range(9)} == {0, 1}
    assert verdict(p, p, 0, Uniforms([0]), 0) == 0


def test_sampling_with_a_draft_model_keeps_the_distribution():
    """Third tokens of many rows against the exact probabilities, which go through every first and second token."""
    torch.manual_seed(0)
    from statewise.models.language import LanguageModel

    def tiny(seed):
        torch.manual_seed(seed)
        model = LanguageModel(5, 8, 1, mixer="mamba", tie_embeddings=False)
        with torch.no_grad():
            model.embedding.weight.mul_(60)
        return model.eval()

    model, other = tiny(0), tiny(1)
    how = {"temperature": 0.9, "top_p": 0.95}
    rows = 4000
    run = generate(model, [[2]] * rows, 3, seed=1, draft=DraftModel(other, 2), **how)
    made = torch.stack(list(run), 1)
    assert 0.05 < run.accepted / run.guessed < 0.95

    sampling, seen = Sampling(**how), torch.zeros(1, 5, dtype=torch.bool)
    with torch.no_grad():
        exact = torch.zeros(5, 5, 5, dtype=torch.float64)
        first = sampling.probabilities(model(torch.tensor([[2]]))[:, -1], seen)[0]
        for a in range(5):
            second = sampling.probabilities(model(torch.tensor([[2, a]]))[:, -1], seen)[0]
            for b in range(5):
                third = sampling.probabilities(model(torch.tensor([[2, a, b]]))[:, -1], seen)[0]
                exact[a, b] = first[a].double() * second[b].double() * third.double()
    for over, column in [((1, 2), 0), ((0, 2), 1), ((0, 1), 2)]:
        assert _far(made[:, column].bincount(minlength=5).double(), exact.sum(over)) < 4
    pairs = (made[:, 1] * 5 + made[:, 2]).bincount(minlength=25).double()
    assert _far(pairs, exact.sum(0).flatten()) < 4
    # The test can fail: the draft's own probabilities are far away.
    alone = torch.stack(list(generate(other, [[2]] * rows, 3, seed=1, **how)), 1)
    assert _far(alone[:, 2].bincount(minlength=5).double(), exact.sum((0, 1)).clamp(min=1e-9)) > 10


# ---- calls -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("tokens", "count"), [(4, 25), (1, 10), (7, 9)])
def test_right_guesses_save_calls(tokens, count):
    model = make_model()
    with deterministic():
        plain = generate(model, [[3]], count, temperature=0)
        list(plain)
        run = generate(model, [[3]], count, temperature=0, draft=Oracle(plain.made, tokens=tokens))
        list(run)
    assert run.made == plain.made
    assert plain.calls == count - 1
    assert run.calls == math.ceil((count - 1) / (tokens + 1))
    assert run.accepted == run.guessed


def test_a_wrong_guess_costs_no_call_of_its_own():
    model = make_model()
    with deterministic():
        plain = generate(model, [[3]], 41, temperature=0)
        list(plain)
        # Each call: guesses of which the first is right and the second wrong, so two tokens.
        run = generate(model, [[3]], 41, temperature=0, draft=Oracle(plain.made, wrong_at=range(0, 41, 2), tokens=4))
        list(run)
    assert run.made == plain.made
    # Every so often a row is too far behind, and a call goes without guesses.
    assert run.calls <= math.ceil(40 / 2) + math.ceil(40 / BEHIND)


def test_guesses_never_exceed_what_is_asked_for():
    limits = []

    class Greedy(Oracle):
        def guess(self, rows, limits_now):
            limits.extend(limits_now)
            return [Guess([0] * limit) for limit in limits_now]

    run = generate(make_model(), [[1], [2]], 6, temperature=0, draft=Greedy(None))
    assert [t for t in torch.stack(list(run), 1).flatten().tolist() if t != DONE].__len__() == 12
    assert max(limits) == 4
    assert min(limits) >= 0


# ---- look-up -----------------------------------------------------------------------------------------------------


def _look_up(text, length, limit, tokens=8):
    draft = NGram(length, tokens)
    draft.begin(Sampling(), [0], V)
    return draft.guess([Row(0, torch.tensor(text))], [limit])[0].tokens


def test_look_up_by_hand():
    assert _look_up([1, 2, 3, 4, 5, 1, 2, 3], 3, 2) == [4, 5]
    assert _look_up([1, 2, 3, 4, 5, 1, 2, 3], 3, 0) == []
    assert _look_up([1, 2, 3, 9, 1, 2, 3, 8, 7, 7, 1, 2, 3], 3, 2) == [8, 7]  # the latest occurrence
    assert _look_up([1, 2, 3], 3, 5) == []
    assert _look_up([1, 2], 3, 5) == []
    assert _look_up([5, 5], 1, 4) == [5, 5, 5, 5]
    assert _look_up([1, 2, 1, 2, 1], 2, 5) == [2, 1, 2, 1, 2]  # goes on with the period
    assert _look_up([1, 2, 3, 4, 5, 6, 1], 1, 99, tokens=3) == [2, 3, 4]


def test_look_up_reads_a_text_once_and_keeps_up():
    """Growing by one token at a time finds what reading everything at once finds."""
    text = torch.randint(0, 3, (60,), generator=torch.Generator().manual_seed(0)).tolist()
    draft, row = NGram(3, 4), Row(0, torch.tensor(text[:2]))
    draft.begin(Sampling(), [0], V)
    for at in range(2, 60):
        assert draft.guess([row], [4])[0].tokens == _look_up(text[:at], 3, 4)
        row.made.append(text[at])


@pytest.mark.parametrize(
    ("make", "name"),
    [(lambda: NGram(0), "length"), (lambda: NGram(2, 0), "tokens"), (lambda: DraftModel(None, 0), "tokens")],
)
def test_bad_options_are_named(make, name):
    with pytest.raises(ValueError, match=name):
        make()


def test_a_draft_of_another_vocabulary_is_named():
    from statewise.models.language import LanguageModel

    draft = LanguageModel(V // 2, 16, 1, mixer="mamba").eval()
    with pytest.raises(ValueError, match=f"draft.*vocabulary of {V}.*{V // 2}"):
        generate(make_model(), [[1]], 9, draft=DraftModel(draft))
