import gzip
import math
from collections import Counter

import numpy as np
import pytest

from statewise.data.baselines import baselines, compressed_bits, ngram_bits
from statewise.data.text import TextOptions, load_corpus, python_docs, read_documents, split


def test_python_docs_are_there():
    documents = python_docs()
    assert len(documents) > 50
    assert 300_000 < sum(map(len, documents)) < 1_000_000
    assert all(b"\r" not in d for d in documents)


@pytest.mark.parametrize("share", [0.1, 0.5, 0.999])
def test_split_loses_nothing_and_cuts_at_the_share(share):
    documents = [b"a" * 10, b"b" * 7, b"c", b"d" * 30]
    train, held_out = split(documents, share)
    assert b"".join(train + held_out) == b"".join(documents)
    assert len(b"".join(held_out)) == 48 - round(48 * (1 - share))
    assert all(train)
    assert all(held_out)


def test_file_directory_and_glob(tmp_path):
    (tmp_path / "sub").mkdir()
    (tmp_path / "a.txt").write_bytes(b"first")
    (tmp_path / "sub" / "b.md").write_bytes(b"second")
    (tmp_path / "empty.txt").write_bytes(b"")
    assert read_documents(str(tmp_path / "a.txt")) == [b"first"]
    assert read_documents(str(tmp_path)) == [b"first", b"second"]
    assert read_documents(str(tmp_path / "**" / "*.md")) == [b"second"]


@pytest.mark.parametrize("name", ["missing.txt", "*.nothing", "empty.txt", "folder"])
def test_no_text_is_an_error_that_names_the_argument(tmp_path, name):
    (tmp_path / "empty.txt").write_bytes(b"")
    (tmp_path / "folder").mkdir()
    with pytest.raises(ValueError, match=r"data\.path.*"):
        read_documents(str(tmp_path / name))


@pytest.mark.parametrize("share", [0.0, 1.0, -0.1, 2.0])
def test_held_out_must_be_a_share(share):
    with pytest.raises(ValueError, match=r"data\.held_out"):
        TextOptions(held_out=share)


def _order2_by_hand(train: bytes, held_out: bytes) -> float:
    """Witten-Bell, one byte at a time, from dictionaries."""
    counts = [Counter(), Counter(), Counter()]
    for k in range(3):
        for i in range(k, len(train)):
            counts[k][train[i - k : i], train[i]] += 1

    def p(context: bytes, byte: int, k: int) -> float:
        if k < 0:
            return 1 / 256
        suffix = context[len(context) - k :]
        following = {b: n for (c, b), n in counts[k].items() if c == suffix}
        total, kinds = sum(following.values()), len(following)
        lower = p(context, byte, k - 1)
        return lower if total == 0 else (following.get(byte, 0) + kinds * lower) / (total + kinds)

    bits = [-math.log2(p(held_out[:i], b, min(i, 2))) for i, b in enumerate(held_out)]
    return sum(bits) / len(bits)


def test_order_2_is_witten_bell():
    train, held_out = b"the cat sat on the mat, the rat ate the hat", b"that the cat hate \xff"
    assert ngram_bits(train, held_out, 2) == pytest.approx(_order2_by_hand(train, held_out))


def test_ngram_probabilities_sum_to_one():
    train = b"abracadabra"
    for prefix in (b"", b"a", b"ab", b"zz"):
        n = len(prefix) + 1
        before = ngram_bits(train, prefix, 2) * len(prefix) if prefix else 0.0
        total = sum(2 ** -(ngram_bits(train, prefix + bytes([b]), 2) * n - before) for b in range(256))
        assert total == pytest.approx(1)


def test_baselines_of_random_bytes_are_at_least_8_bits():
    noise = np.random.default_rng(0).integers(0, 256, 20_000, dtype=np.uint8).tobytes()
    found = baselines(noise[:10_000], noise[10_000:])
    assert found["uniform"] == 8
    assert min(found.values()) >= 8


def test_compressors_count_whole_files():
    text = b"abc" * 1000
    assert compressed_bits(text)["gzip -9"] == 8 * len(gzip.compress(text, 9)) / len(text)


def test_corpus_of_the_default():
    corpus = load_corpus(TextOptions())
    assert len(b"".join(corpus.held_out)) == pytest.approx(0.1 * sum(map(len, python_docs())), abs=1)
