import json

import pytest
import torch

from statewise import deterministic
from statewise.inference import Bytes, NGram, Vocabulary, generate_text, tokenizer_for
from statewise.inference._text import Piece, TextGeneration, _ByteDecoder, _Decoder
from statewise.models.language import LanguageModel

TEXT = "naïve – 日本語, 🙂 end"


def _byte_model():
    torch.manual_seed(0)
    return LanguageModel(256, 16, 1, mixer="mamba", tie_embeddings=False).eval()


class Script:
    """Stands for a model: its rows are given texts, one token at a time."""

    def __init__(self, rows):
        self.rows, self.until = rows, None

    def __call__(self, until):
        self.steps = self._run(until)
        return self.steps

    def _run(self, until):
        over = [False] * len(self.rows)
        for t in range(max(map(len, self.rows))):
            for b, row in enumerate(self.rows):
                if not over[b] and t < len(row):
                    over[b] = until(b, row[: t + 1])
            yield t
            if all(over):
                return


def _texts(rows, stop, tokenizer=None):
    run = TextGeneration(tokenizer or Bytes(), Script(rows), len(rows), stop)
    pieces = list(run)
    for b, text in enumerate(run.texts):
        assert "".join(p.text for p in pieces if p.row == b) == text
    assert all(p.text for p in pieces)
    return run


class Pairs:
    """A tokenizer of two-byte tokens, so that characters and stop strings cross tokens."""

    def encode(self, text):
        data = text.encode() + b" " * (len(text.encode()) % 2)
        return [data[i] * 256 + data[i + 1] for i in range(0, len(data), 2)]

    def decode(self, tokens):
        return b"".join(bytes(divmod(t, 256)) for t in tokens).decode("utf-8", "replace")


@pytest.mark.parametrize("tokenizer", [Bytes(), Pairs()])
def test_text_comes_in_whole_characters(tokenizer):
    run = _texts([tokenizer.encode(TEXT)], [], tokenizer)
    assert run.texts == [TEXT + " " * (isinstance(tokenizer, Pairs) and len(TEXT.encode()) % 2)]


@pytest.mark.parametrize("data", [b"\xff\xfe\xfd\xfc\xfb", b"a\xe2\x82", b"\xe2\x82\xac\xe2", b"\xf0\x9f\x99\x82\xff!"])
def test_bytes_that_are_no_text(data):
    assert _texts([list(data)], []).texts == [data.decode("utf-8", "replace")]
    pieces = [_Decoder(Bytes()), _ByteDecoder()]
    texts = ["".join(d.push(b) for b in data) + d.finish() for d in pieces]
    assert texts[0] == texts[1] == data.decode("utf-8", "replace")


@pytest.mark.parametrize("tokenizer", [Bytes(), Pairs()])
def test_a_stop_string_ends_the_text_wherever_it_lies(tokenizer):
    run = _texts([tokenizer.encode(t) for t in ("one END two", "a, 日本語!!", "nothing")], ["END", "本語"], tokenizer)
    assert run.texts[:2] == ["one END", "a, 日本語"]
    assert run.texts[2].rstrip() == "nothing"
    assert run.stopped == ["END", "本語", None]


def test_the_first_of_several_stop_strings_counts():
    assert _texts([Bytes().encode("abcdef")], ["cdef", "bcd"]).texts == ["abcd"]
    assert _texts([Pairs().encode("abcdef")], ["d", "abc"], Pairs()).texts == ["abc"]


def test_a_stop_string_of_the_prompt_does_not_count():
    model = _byte_model()
    run = generate_text(model, Bytes(), "END", 5, stop="END", seed=0)
    list(run)
    assert len(run.tokens.made[0]) == 5
    assert run.stopped == [None]


def test_generation_stops_at_a_string_and_at_a_token():
    model = _byte_model()
    with deterministic():
        free = generate_text(model, Bytes(), ["ab", "c"], 30, seed=1)
        list(free)
        stop = free.tokens.made[0][9]
        for draft in (None, NGram(1, 3)):
            run = generate_text(model, Bytes(), ["ab", "c"], 30, seed=1, stop=[stop], draft=draft)
            list(run)
            first = free.tokens.made[0].index(stop) + 1
            assert run.tokens.made[0] == free.tokens.made[0][:first]
    letters = [chr(t) for t in free.tokens.made[0] if 32 <= t < 127]
    with deterministic():
        run = generate_text(model, Bytes(), "ab", 30, seed=1, stop=letters[2])
        list(run)
    assert run.texts[0].endswith(letters[2])
    assert run.texts[0].count(letters[2]) == 1


def test_pieces_say_their_row():
    run = generate_text(_byte_model(), Bytes(), ["a", "b"], 20, seed=0)
    assert {piece.row for piece in run} == {0, 1}
    assert isinstance(Piece(0, "x"), tuple)


@pytest.mark.parametrize(
    ("prompts", "options", "message"),
    [
        ("", {}, "prompts: row 0"),
        (["a", ""], {}, "prompts: row 1"),
        ([], {}, "at least one prompt"),
        ("a", {"stop": ["x", ""]}, "stop"),
        ("a", {"temperature": -1}, "temperature"),
    ],
)
def test_what_will_not_do_is_named(prompts, options, message):
    with pytest.raises(ValueError, match=message):
        generate_text(_byte_model(), Bytes(), prompts, 3, **options)


def test_an_unknown_option_raises():
    with pytest.raises(TypeError, match="temprature"):
        generate_text(_byte_model(), Bytes(), "a", 3, temprature=1)


def test_the_tokenizer_beside_the_weights(tmp_path):
    model = _byte_model()
    assert isinstance(tokenizer_for(model, tmp_path), Bytes)
    with pytest.raises(ValueError, match=r"want a byte model .* got 40 tokens"):
        tokenizer_for(LanguageModel(40, 16, 1, mixer="mamba"), tmp_path)
    tokenizers = pytest.importorskip("tokenizers")
    words = {word: i for i, word in enumerate(["[UNK]", "hello", "world"])}
    built = tokenizers.Tokenizer(tokenizers.models.WordLevel(words, unk_token="[UNK]"))
    built.pre_tokenizer = tokenizers.pre_tokenizers.Whitespace()
    built.save(str(tmp_path / "tokenizer.json"))
    found = tokenizer_for(model, tmp_path)
    assert isinstance(found, Vocabulary)
    assert found.encode("hello world hello") == [1, 2, 1]
    assert _texts([[1, 2, 1]], [], found).texts == ["hello world hello"]
    (tmp_path / "tokenizer.json").write_text(json.dumps({"version": 3}))
    with pytest.raises(ValueError, match=r"tokenizer\.json: is not a tokenizer file"):
        tokenizer_for(model, tmp_path)
