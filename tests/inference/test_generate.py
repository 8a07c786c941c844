import math

import pytest
import torch

from statewise.inference import bits_per_token, generate, sample
from statewise.inference._generate import DONE, filter_logits
from statewise.models.language.stack import LanguageModel

MIXERS = ["mamba", "mamba2", "attention", "s4d"]


def _model(mixer="mamba2"):
    torch.manual_seed(0)
    options = {"name": mixer, **({"head_dim": 16} if mixer == "mamba2" else {})}
    # A tied head would make an untrained model repeat its last token.
    model = LanguageModel(40, 32, 2, mixer=options, tie_embeddings=False)
    with torch.no_grad():
        model.embedding.weight.mul_(30)  # so that logits differ by more than rounding
    return model.eval()


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


def test_filters_by_hand():
    logits = torch.tensor([[0.5, 0.25, 0.15, 0.1]]).log()

    def kept(**options):
        return torch.isfinite(filter_logits(logits, **options))[0].tolist()

    assert kept() == [True] * 4
    assert kept(top_k=2) == [True, True, False, False]
    assert kept(top_k=9) == [True] * 4
    assert kept(top_p=0.4) == [True, False, False, False]
    assert kept(top_p=0.7) == [True, True, False, False]
    assert kept(top_p=0.8) == [True, True, True, False]
    assert kept(top_p=0.0) == [True, False, False, False]
    assert kept(min_p=0.4) == [True, True, False, False]
    assert kept(top_k=3, min_p=0.4) == [True, True, False, False]


def test_draws_follow_the_probabilities():
    logits = torch.tensor([0.6, 0.3, 0.1]).log().expand(20_000, 3)
    generator = torch.Generator().manual_seed(0)
    share = sample(logits, generator=generator).bincount(minlength=3) / 20_000
    # Four standard deviations of a binomial share.
    assert all(abs(float(s) - p) < 4 * math.sqrt(p * (1 - p) / 20_000) for s, p in zip(share, (0.6, 0.3, 0.1)))
    assert set(sample(logits, temperature=0, generator=generator).tolist()) == {0}


@pytest.mark.parametrize(
    ("option", "value"),
    [("temperature", -1), ("top_k", -1), ("top_p", 1.5), ("min_p", -0.1), ("repetition_penalty", 0)],
)
def test_bad_options_are_named(option, value):
    with pytest.raises(ValueError, match=option):
        next(generate(_model(), [[1]], 1, **{option: value}))


@pytest.mark.parametrize("prompts", [[], [[]], [[1], []], torch.zeros(1, 0, dtype=torch.int64)])
def test_empty_prompts_are_refused(prompts):
    with pytest.raises(ValueError, match="prompts"):
        next(generate(_model(), prompts, 1))


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
