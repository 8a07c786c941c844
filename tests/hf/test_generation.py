"""`generate` of transformers over our states: every way to decode, equal to ours, to theirs and to a full forward."""

from __future__ import annotations

import pytest
import torch
import transformers

import statewise
from statewise.hf import StatewiseCache, StatewiseForCausalLM
from statewise.testing import assert_agree

GREEDY = {"do_sample": False, "pad_token_id": 0, "eos_token_id": None}


def prompt(*shape: int) -> torch.Tensor:
    return torch.randint(1, 61, shape)


@pytest.fixture
def draft(build):
    # Agrees with the model now and then, which is the interesting case.
    return build("mamba", seed=1, n_layer=1)


def test_greedy_is_ours_and_that_of_full_forwards(model):
    x = prompt(2, 7)
    got = model.generate(x, max_new_tokens=10, **GREEDY)
    assert got.shape == (2, 17)
    assert torch.equal(got[:, 7:], torch.stack(list(statewise.inference.generate(model.core, x, 10, temperature=0)), 1))
    assert torch.equal(got, model.generate(x, max_new_tokens=10, use_cache=False, **GREEDY))
    assert torch.equal(got[:, 7:], model(got).logits[:, 6:-1].argmax(-1))


def test_left_padded_prompts(model):
    rows = [prompt(1, n) for n in (3, 8, 5)]
    x = torch.cat([torch.nn.functional.pad(r, (8 - r.shape[1], 0)) for r in rows])
    mask = torch.cat([torch.nn.functional.pad(torch.ones_like(r), (8 - r.shape[1], 0)) for r in rows])
    got = model.generate(x, attention_mask=mask, max_new_tokens=6, **GREEDY)
    for row, alone in zip(got, rows):
        assert torch.equal(row[8:], model.generate(alone, max_new_tokens=6, **GREEDY)[0, alone.shape[1] :])


def test_sampling_draws_the_same_with_and_without_a_cache(model):
    x = prompt(2, 5)
    options = {"do_sample": True, "top_k": 20, "top_p": 0.9, "temperature": 0.7, "pad_token_id": 0, "max_new_tokens": 8}
    draws = []
    for use_cache in (True, False):
        torch.manual_seed(3)
        draws.append(model.generate(x, use_cache=use_cache, **options))
    assert torch.equal(*draws)


@pytest.mark.parametrize("options", [{"num_beams": 3}, {"num_beams": 4, "num_return_sequences": 2}])
def test_beams(model, options):
    x = prompt(2, 5)
    got = model.generate(x, max_new_tokens=7, **options, **GREEDY)
    assert torch.equal(got, model.generate(x, max_new_tokens=7, use_cache=False, **options, **GREEDY))


def test_beams_are_those_of_the_same_model_in_transformers(build):
    ours = build("mamba2", mixer={"name": "mamba2", "d_state": 8, "head_dim": 16})
    config = transformers.Mamba2Config(
        vocab_size=61, hidden_size=32, state_size=8, num_hidden_layers=2, head_dim=16, num_heads=4, n_groups=1,
        expand=2, chunk_size=16, tie_word_embeddings=True,
    )  # fmt: skip
    theirs = transformers.Mamba2ForCausalLM(config).eval()
    weights = {f"backbone.{n.replace('embedding.', 'embeddings.')}": t for n, t in ours.core.state_dict().items()}
    weights = {n: t[:, None] if n.endswith("conv1d.weight") else t for n, t in weights.items()}
    missing, unexpected = theirs.load_state_dict(weights, strict=False)
    assert (missing, unexpected) == (["lm_head.weight"], [])
    theirs.tie_weights()
    x = prompt(2, 6)
    for options in ({}, {"num_beams": 3}, {"num_beams": 2, "repetition_penalty": 1.5}):
        got = ours.generate(x, max_new_tokens=8, **options, **GREEDY)
        assert torch.equal(got, theirs.generate(x, max_new_tokens=8, **options, **GREEDY)), options


def test_assisted_decoding(model, draft):
    x = prompt(1, 9)
    want = model.generate(x, max_new_tokens=24, **GREEDY)
    for assistant in (draft, model):
        got = model.generate(x, max_new_tokens=24, assistant_model=assistant, **GREEDY)
        assert torch.equal(got, want)


def test_prompt_lookup(model):
    x = prompt(1, 5).repeat(1, 20)  # long enough that the prompt is not run twice
    want = model.generate(x, max_new_tokens=24, **GREEDY)
    out = model.generate(x, max_new_tokens=24, prompt_lookup_num_tokens=4, return_dict_in_generate=True, **GREEDY)
    assert torch.equal(out.sequences, want)
    # The state that is left is that of the tokens that were kept.
    cache = model.settle(out.cache)
    again = model(want[:, : cache.get_seq_length()], use_cache=True).cache
    last = want[:, cache.get_seq_length() :][:, :1]
    assert_agree(model(last, cache=cache).logits, model(last, cache=again).logits, "after the look-up", want.shape[1])


def test_streamer_and_stop(model):
    class Keep(transformers.generation.BaseStreamer):
        def __init__(self):
            self.seen = []

        def put(self, value):
            self.seen.extend(value.flatten().tolist())

        def end(self):
            self.seen.append("end")

    x, streamer = prompt(1, 4), Keep()
    whole = model.generate(x, max_new_tokens=9, **GREEDY)[0].tolist()
    model.generate(x, max_new_tokens=9, streamer=streamer, **GREEDY)
    assert streamer.seen == [*whole, "end"]
    stop = whole[8]
    end = whole.index(stop, 4) + 1
    got = model.generate(x, max_new_tokens=9, **{**GREEDY, "eos_token_id": stop})
    assert got[0].tolist() == whole[:end]


def test_prompts_in_chunks_and_from_embeddings(model):
    x = prompt(2, 13)
    want = model.generate(x, max_new_tokens=6, **GREEDY)
    assert torch.equal(model.generate(x, max_new_tokens=6, prefill_chunk_size=4, **GREEDY), want)
    embedded = model.get_input_embeddings()(x)
    assert torch.equal(model.generate(inputs_embeds=embedded, max_new_tokens=6, **GREEDY), want[:, 13:])


def test_a_conversation_goes_on_from_its_cache(model):
    x = prompt(1, 7)
    first = model.generate(x, max_new_tokens=5, return_dict_in_generate=True, **GREEDY)
    more = torch.cat([first.sequences, prompt(1, 4)], 1)
    want = model.generate(more, max_new_tokens=5, **GREEDY)
    fork = first.cache.fork()
    assert torch.equal(model.generate(more, cache=first.cache, max_new_tokens=5, **GREEDY), want)
    assert torch.equal(model.generate(more, past_key_values=fork, max_new_tokens=5, **GREEDY), want)


def test_from_a_state_of_ours(model):
    x = prompt(1, 7)
    _, state = model.core.extend(x[:, :4], None)
    cache = StatewiseCache(state, seen=4)
    assert torch.equal(
        model.generate(x, cache=cache, max_new_tokens=5, **GREEDY), model.generate(x, max_new_tokens=5, **GREEDY)
    )


def test_what_cannot_be_served(build):
    model: StatewiseForCausalLM = build("mamba")
    with pytest.raises(ValueError, match=r"cache_implementation: want None .* got 'static'"):
        model.generate(prompt(1, 3), max_new_tokens=2, cache_implementation="static", **GREEDY)
    with pytest.raises(TypeError, match="cache: want a StatewiseCache, got DynamicCache"):
        model.generate(prompt(1, 3), max_new_tokens=2, cache=transformers.DynamicCache(), **GREEDY)


def test_pipeline(build, tmp_path):
    from statewise.hf import byte_tokenizer

    model = build("mamba2", vocab_size=256)
    model.save_pretrained(tmp_path)
    byte_tokenizer().save_pretrained(tmp_path)
    pipe = transformers.pipeline("text-generation", model=str(tmp_path), device="cpu")
    text = pipe("Wie schön", max_new_tokens=4, do_sample=False, pad_token_id=0)[0]["generated_text"]
    made = torch.stack(
        list(statewise.inference.generate(model.core, [list("Wie schön".encode())], 4, temperature=0)), 1
    )
    assert text == (b"Wie sch\xc3\xb6n" + bytes(made[0].tolist())).decode("utf-8", "replace")
