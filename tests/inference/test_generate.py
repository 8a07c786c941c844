import math

import pytest
import torch

from statewise import deterministic, state
from statewise.inference import DONE, bits_per_token, generate, read
from statewise.testing import assert_agree

from .conftest import make_model as _model

MIXERS = ["mamba", "mamba2", "attention", "s4d", "hybrid"]


def _rows(steps):
    return torch.stack(list(steps), 1).tolist()


def _greedy_by_forward(model, prompt, count):
    tokens = list(prompt)
    for _ in range(count):
        tokens.append(int(model(torch.tensor([tokens]))[0, -1].argmax()))
    return tokens[len(prompt) :]


@pytest.mark.parametrize("mixer", MIXERS)
def test_greedy_is_what_forward_says(mixer):
    model = _model(mixer)
    prompt = [3, 1, 4, 1, 5]
    with torch.no_grad():
        want = _greedy_by_forward(model, prompt, 12)
    assert _rows(generate(model, [prompt], 12, temperature=0)) == [want]
    assert len(set(want)) > 1


@pytest.mark.parametrize("mixer", MIXERS)
def test_prompts_of_different_lengths_do_not_disturb_each_other(mixer):
    model = _model(mixer)
    prompts = [[7], [3, 1, 4, 1, 5, 9, 2], [6, 5]]
    alone = [_rows(generate(model, [p], 10, temperature=0))[0] for p in prompts]
    assert _rows(generate(model, prompts, 10, temperature=0)) == alone


def test_a_tensor_of_prompts():
    model = _model()
    prompts = torch.tensor([[1, 2, 3], [4, 5, 6]])
    assert _rows(generate(model, prompts, 5, temperature=0)) == _rows(
        generate(model, prompts.tolist(), 5, temperature=0)
    )


def test_seed():
    model = _model()
    draws = [_rows(generate(model, [[1, 2]], 30, temperature=2.0, seed=s)) for s in (1, 1, 2)]
    assert draws[0] == draws[1] != draws[2]


def test_it_streams_and_stops():
    model = _model()
    (row,) = _rows(generate(model, [[3, 1, 4]], 12, temperature=0))
    stop = row[4]
    first = row.index(stop) + 1
    assert _rows(generate(model, [[3, 1, 4]], 12, temperature=0, stop=[stop])) == [row[:first]]
    other = _rows(generate(model, [[9]], 12, temperature=0))[0]
    both = _rows(generate(model, [[3, 1, 4], [9]], 12, temperature=0, stop=[stop]))
    assert both[0][:first] == row[:first]
    assert all(t == DONE for t in both[0][first:])
    length = other.index(stop) + 1 if stop in other else len(both[1])
    assert both[1][:length] == other[:length]


def test_it_stays_lazy():
    model = _model()
    steps = generate(model, [[1]], 10**9)
    assert next(steps).shape == (1,)


def test_a_repetition_penalty_forbids_in_the_limit():
    (row,) = _rows(generate(_model(), [[1, 2, 3]], 30, temperature=0, repetition_penalty=1e9))
    assert len({1, 2, 3, *row}) == 33


@pytest.mark.parametrize(
    ("option", "value"),
    [
        ("temperature", -1),
        ("temperature", math.nan),
        ("top_k", -1),
        ("top_p", 1.5),
        ("top_p", 0.0),
        ("min_p", -0.1),
        ("repetition_penalty", 0),
        ("seed", -1),
        ("seed", [1, 2]),
        ("chunk", 0),
        ("max_tokens", -1),
    ],
)
def test_bad_options_are_named(option, value):
    with pytest.raises(ValueError, match=option):
        generate(_model(), [[1]], **{"max_tokens": 1, option: value})


@pytest.mark.parametrize(
    ("prompts", "message"),
    [
        ([], "at least one prompt"),
        ([[]], "row 0: want at least one token"),
        ([[1], []], "row 1: want at least one token"),
        (torch.zeros(1, 0, dtype=torch.int64), "row 0: want at least one token"),
        ([1, 2], "wrap it"),
        ([[1], [2, 40]], "row 1: want tokens from 0 to 39, got 40"),
        ([[-1]], "got -1"),
        ([[0.5]], "want integers"),
        (torch.zeros(1, 1, 1, dtype=torch.int64), "want integers"),
    ],
)
def test_prompts_that_will_not_do(prompts, message):
    with pytest.raises(ValueError, match=f"prompts.*{message}"):
        generate(_model(), prompts, 1)


def test_no_tokens_asked():
    assert list(generate(_model(), [[1]], 0)) == []


@pytest.mark.parametrize("mixer", MIXERS)
@pytest.mark.parametrize("chunk", [1, 7, 64])
def test_bits_are_those_of_one_forward_pass(mixer, chunk):
    model = _model(mixer).double()
    tokens = torch.randint(0, 40, (33,), generator=torch.Generator().manual_seed(1))
    with torch.no_grad():
        log_p = model(tokens[None, :-1])[0].log_softmax(-1)
    want = -float(log_p.gather(1, tokens[1:, None]).mean()) / math.log(2)
    # `bits_per_token` takes the loss in float32.
    assert bits_per_token(model, tokens, chunk=chunk) == pytest.approx(want, rel=32 * torch.finfo(torch.float32).eps)


def test_bits_of_one_token():
    with pytest.raises(ValueError, match="tokens"):
        bits_per_token(_model(), torch.zeros(1, dtype=torch.int64))


# ---- rows --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("mixer", MIXERS)
def test_rows_are_their_separate_runs_to_the_bit(mixer):
    """Prompts of other lengths, other seeds, and rows that end earlier change nothing of a row."""
    model = _model(mixer)
    prompts, seeds = [[7], [3, 1, 4, 1, 5, 9, 2], [6, 5]], [5, 11, 2]
    options = {"temperature": 1.5, "top_p": 0.9, "repetition_penalty": 1.1, "logprobs": True}
    with deterministic():
        together = generate(model, prompts, 12, seed=seeds, stop=[4, 7], chunk=3, **options)
        columns = _rows(together)
        for row, (prompt, seed) in enumerate(zip(prompts, seeds)):
            alone = generate(model, [prompt], 12, seed=seed, stop=[4, 7], **options)
            made = _rows(alone)[0]
            assert columns[row] == made + [DONE] * (len(columns[row]) - len(made))
            assert together.logprobs[row] == alone.logprobs[0]
            assert together.made[row] == made


def test_rows_that_end_leave_the_batch():
    model, sizes = _model(), []
    step = model.step
    model.step = lambda tokens, state: sizes.append(len(tokens)) or step(tokens, state)
    ends = {0: 2, 1: 5, 2: 3}
    run = generate(model, [[1], [2], [3]], 9, seed=0, until=lambda row, made: len(made) == ends[row])
    assert len(list(run)) == 5
    assert [len(made) for made in run.made] == [2, 5, 3]
    assert sizes == [3, 2, 1, 1]


def test_one_seed_stands_for_one_after_the_other():
    model = _model()
    both = _rows(generate(model, [[1], [1]], 20, seed=4))
    assert both == [_rows(generate(model, [[1]], 20, seed=s))[0] for s in (4, 5)]
    assert both[0] != both[1]


def test_logprobs_are_those_of_forward():
    model = _model().double()
    prompt = [3, 1, 4]
    run = generate(model, [prompt], 10, temperature=0.5, repetition_penalty=2.0, seed=0, logprobs=True)
    tokens = [*prompt, *_rows(run)[0]]
    with torch.no_grad():
        want = model(torch.tensor([tokens[:-1]]))[0, 2:].log_softmax(-1)
    got = torch.tensor(run.logprobs[0], dtype=torch.float64)
    rounding = 32 * torch.finfo(torch.float32).eps  # they are taken in float32
    assert torch.allclose(got, want.gather(1, torch.tensor(tokens[3:])[:, None])[:, 0], rtol=rounding, atol=rounding)
    with pytest.raises(ValueError, match="logprobs=True"):
        _ = generate(model, [prompt], 1).logprobs


def test_rules_of_your_own():
    def even_only(logits, seen):
        return logits.masked_fill(torch.arange(logits.shape[-1]) % 2 == 1, -torch.inf)

    (row,) = _rows(generate(_model(), [[1]], 30, seed=0, temperature=3.0, rules=[even_only]))
    assert all(token % 2 == 0 for token in row)


# ---- contexts ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("mixer", MIXERS)
def test_going_on_from_a_context_is_going_on(mixer):
    model = _model(mixer)
    with deterministic():
        whole = _rows(generate(model, [[3, 1, 4]], 12, temperature=0))[0]
        first = generate(model, [[3, 1, 4]], 5, temperature=0)
        list(first)
        context = first.context()
        assert context.tokens.tolist() == [3, 1, 4, *whole[:5]]
        for _ in range(2):  # a context is not used up
            assert _rows(generate(model, [context], 7, temperature=0))[0] == whole[5:]
        more = read(model, whole[5:8], context)
        again = read(model, [3, 1, 4, *whole[:8]])
        assert more.tokens.tolist() == again.tokens.tolist()
        assert torch.equal(more.logits, again.logits)
        assert all(torch.equal(a, b) for (_, a), (_, b) in zip(state.leaves(more.state), state.leaves(again.state)))


@pytest.mark.parametrize("mixer", MIXERS)
def test_contexts_and_prompts_in_one_batch(mixer):
    """Among them rows that have ended, at different lengths: their caches must not keep each other's padding."""
    model = _model(mixer)
    with deterministic():
        context = read(model, [3, 1, 4, 1, 5, 9, 2, 6])
        run = generate(model, [[7], context, [2, 2, 2]], 9, temperature=0, stop=[11, 14])
        rows = _rows(run)
        for b, prompt in enumerate([[7], [3, 1, 4, 1, 5, 9, 2, 6], [2, 2, 2]]):
            alone = generate(model, [prompt], 9, temperature=0, stop=[11, 14])
            made = _rows(alone)[0]
            assert rows[b][: len(made)] == made
            got, want = run.context(b), alone.context()
            assert torch.equal(got.tokens, want.tokens)
            assert torch.equal(got.logits, want.logits)
            for (name, x), (_, y) in zip(state.leaves(got.state), state.leaves(want.state)):
                assert torch.equal(x, y), name


def test_a_context_before_anything_was_made():
    model = _model()
    for count in (0, 3):
        run = generate(model, [[1, 2], [3]], count, seed=0)
        context = run.context(1)
        assert context.tokens.tolist() == [3]
        assert_agree(context.logits, read(model, [3]).logits, "logits")
