"""Long texts become the tokens that the S4 code makes of them, and what would give the label away is gone."""

from __future__ import annotations

import hashlib
import io
import json
import tarfile
from collections import Counter
from dataclasses import replace

import numpy as np
import pytest

from statewise.data import sets
from statewise.data.labelled import check
from statewise.data.sets import _packages
from statewise.data.sets._characters import SPECIALS, Characters
from statewise.data.sets.text import body_of


def make(name, profile, source=None, seed=0):
    data = sets.get(name)(profile, seed=seed, source=source, workers=1, progress=lambda done, total: None)
    check(data)
    return data


def read(data, row):
    assert data.symbols[row[-1]] == "<eos>"
    return "".join(data.symbols[token] for token in row[:-1])


# ---- characters ----------------------------------------------------------------------------------------------------


def test_the_vocabulary_is_ordered_by_frequency_then_by_character():
    texts = ["banana\n", "été 💡", "b" * 50]
    characters = Characters.of(texts, length=9, min_freq=2)
    counts = Counter("".join(text[:8] for text in texts))  # what is cut off does not count
    kept = sorted((c for c in counts if counts[c] >= 2), key=lambda c: (-counts[c], c))
    assert characters.symbols == (*SPECIALS, *kept)
    rows = characters.rows(["ban", "", "bx", "b" * 50])
    assert [row.tolist() for row in (rows[i] for i in range(4))] == [[3, 4, 5, 2], [2], [3, 1, 2], [3] * 8 + [2]]
    assert rows.flat.dtype == np.uint8


def test_many_characters_and_half_characters():
    text = "".join(map(chr, range(300, 700))) + "\ud800💡"
    characters = Characters.of([text], length=1000)
    rows = characters.rows([text])
    assert len(characters) == len(SPECIALS) + 402
    assert "".join(characters.symbols[i] for i in rows[0][:-1]) == text


# ---- text ----------------------------------------------------------------------------------------------------------


@pytest.fixture
def reviews(tmp_path):
    for part in ("train", "test"):
        for kind, word in (("neg", "bad"), ("pos", "good")):
            folder = tmp_path / "aclImdb" / part / kind
            folder.mkdir(parents=True)
            for i in range(3):
                (folder / f"{i}_7.txt").write_text(f"{word} film, {part} é " + "x" * 2500 * i, encoding="utf-8")
    return tmp_path


def test_film_reviews(reviews):
    for source in (reviews, reviews / "aclImdb"):
        data = make("text", "full", source)
        assert data.train.labels.tolist() == [0, 0, 0, 1, 1, 1]
        assert data.validation is data.test  # the published protocol
        assert data.train.inputs.lengths.tolist() == [19, 2519, 4096, 20, 2520, 4096]
        assert data.symbols == (*SPECIALS, "x", " ")  # the only characters that are there 15 times


def test_film_reviews_that_are_missing(reviews):
    with pytest.raises(ValueError, match="source: the full profile is read from files; give the folder aclImdb"):
        make("text", "full")
    with pytest.raises(ValueError, match="leave source out"):
        make("text", "small", reviews)
    for path in (reviews / "aclImdb" / "test" / "pos").iterdir():
        path.unlink()
    with pytest.raises(ValueError, match=r"pos: no reviews \(\*\.txt\) here"):
        make("text", "full", reviews)


LETTER = b"""From someone@spam.example Thu
Received: from spam.example
Subject: Secret
Content-Type: multipart/mixed; boundary="cut"

preamble
--cut
Content-Type: text/plain; charset=utf-8
Content-Transfer-Encoding: base64

SGVsbG8gd29ybGQ=
--cut
Content-Type: application/octet-stream

attached
--cut
Content-Type: text/html
Content-Transfer-Encoding: quoted-printable

<b>a=3Db</b>
--cut--
"""


def test_the_body_of_a_letter():
    assert body_of(LETTER) == "Hello world\n<b>a=b</b>"
    assert body_of(b"Subject: x\r\n\r\nfirst\r\nsecond\xe9\r\n") == "first\nsecondé"
    assert body_of(b"") == ""


def packed(monkeypatch, tmp_path, constant, files):
    """Put an archive with these files in the place of a package's."""
    monkeypatch.setenv("STATEWISE_DATA", str(tmp_path))
    data = io.BytesIO()
    with tarfile.open(fileobj=data, mode="w:gz") as archive:
        for name, content in files.items():
            info = tarfile.TarInfo(name)
            info.size = len(content)
            archive.addfile(info, io.BytesIO(content))
    package = replace(getattr(_packages, constant), sha256=hashlib.sha256(data.getvalue()).hexdigest())
    monkeypatch.setattr(_packages, constant, package)
    (tmp_path / "archives").mkdir()
    (tmp_path / "archives" / package.file).write_bytes(data.getvalue())


def test_e_mails(monkeypatch, tmp_path):
    word = [
        hashlib.sha256(bytes([i])).hexdigest().translate(str.maketrans("0123456789", "ghijklmnop")) for i in range(60)
    ]
    files = {}
    for i in range(20):
        files[f"package/data/easy-ham-1/{i:05}.txt"] = (
            f"Subject: ham\n\nwanted {word[i]} {'e' * 2000 * (i % 2)}".encode()
        )
        files[f"package/data/spam-2/{i:05}.txt"] = f"Subject: spam\n\nbuy {word[20 + i]}".encode()
    files["package/data/spam-1/copy.txt"] = f"Subject: again\n\nBUY 12 {word[20]}!".encode()  # a copy but for numbers
    files["package/data/spam-1/both.txt"] = f"x: y\n\nwanted {word[3]} {'e' * 2000}".encode()  # wanted, and spam
    files["package/data/spam-1/empty.txt"] = b"Subject: nothing\n\n\n"
    files["package/README.md"] = b"Subject: no letter\n\ntext"
    packed(monkeypatch, tmp_path, "SPAM_ASSASSIN", files)
    data = make("text", "small")
    parts = [data.train, data.validation, data.test]
    assert [len(part) for part in parts] == [27, 4, 8]
    assert sum(np.bincount(part.labels) for part in parts).tolist() == [19, 20]
    texts = [[read(data, part.inputs[i]) for i in range(len(part))] for part in parts]
    assert len({text for part in texts for text in part}) == 39
    assert "spam" not in "".join(texts[0])
    assert data.train.inputs.lengths.max() == data.length == 1024
    other = make("text", "small", seed=1)
    assert other.test.inputs.flat.tolist() != data.test.inputs.flat.tolist()


# ---- retrieval -----------------------------------------------------------------------------------------------------


@pytest.fixture
def papers(tmp_path):
    for name, rows in (("train", 4), ("eval", 2), ("test", 3)):
        lines = [f'{i % 2}.0\tP{i}\tQ{i}\t"{name} {i}\t{"é" * 5000}{i}\n' for i in range(rows)]
        (tmp_path / f"new_aan_pairs.{name}.tsv").write_text("".join(lines), encoding="utf-8", newline="\n")
    return tmp_path


def test_pairs_of_papers(papers):
    data = make("retrieval", "full", papers)
    assert [len(s) for s in (data.train, data.validation, data.test)] == [4, 2, 3]
    assert data.train.labels.tolist() == [0, 1, 0, 1]
    first, second = data.train.inputs
    assert read(data, first[1]) == '"train 1'  # a quotation mark is a character
    assert read(data, second[1]) == "é" * 3999
    assert read(data, data.test.inputs[0][2]).replace("<unk>", "?") == '"t??t 2'  # the characters are those of training


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ("1\ta\tb\tc\n", "line 2: 4 cells"),
        ("1\ta\tb\tc\td\te\n", "line 2: 6 cells"),
        ("yes\ta\tb\tc\td\n", "line 2: 5 cells, the first b'yes'"),
    ],
)
def test_a_line_that_is_no_pair(line, message, papers):
    path = papers / "new_aan_pairs.eval.tsv"
    path.write_text("1\ta\tb\tc\td\n" + line)
    with pytest.raises(ValueError, match=message) as error:
        make("retrieval", "full", papers)
    assert str(path) in str(error.value)


def test_papers_that_are_missing(papers):
    (papers / "new_aan_pairs.test.tsv").write_text("")
    with pytest.raises(ValueError, match=r"test\.tsv: is empty"):
        make("retrieval", "full", papers)
    (papers / "new_aan_pairs.test.tsv").unlink()
    with pytest.raises(ValueError, match=r"has no new_aan_pairs\.test\.tsv; want the folder"):
        make("retrieval", "full", papers)
    with pytest.raises(ValueError, match="leave source out"):
        make("retrieval", "small", papers)


def test_passages_of_addresses(monkeypatch, tmp_path):
    files = {}
    for year in range(1800, 2000, 2):
        text = f"Fellow citizens of {year}. " + "".join(f"<{year} {i:04}>" for i in range(600))
        files[f"package/data/{year}.json"] = json.dumps({"year": year, "text": text}).encode()
    packed(monkeypatch, tmp_path, "ADDRESSES", files)
    monkeypatch.setattr("statewise.data.sets.retrieval._PAIRS", {"train": 400, "validation": 40, "test": 60})
    data = make("retrieval", "small")
    seen = {}
    for name in ("train", "validation", "test"):
        split = getattr(data, name)
        assert split.labels.mean() == 0.5
        pairs = [tuple(read(data, rows[i]) for rows in split.inputs) for i in range(len(split))]
        assert len(set(pairs)) == len(pairs)
        years = [[int(passage.partition(">")[2][1:5]) for passage in pair] for pair in pairs]
        for (a, b), (first, second), label in zip(years, pairs, split.labels):
            assert first != second
            assert "Fellow" not in first + second
            assert a == b if label else abs(a - b) >= 100
        seen[name] = {year for pair in years for year in pair}
        if name == "train":
            # One passage alone must not tell: years are as frequent in both kinds of pairs, on both sides.
            for side in (0, 1):
                kinds = [[pair[side] for pair, label in zip(years, split.labels) if label == kind] for kind in (0, 1)]
                shares = [np.mean([1850 < year < 1950 for year in kind]) for kind in kinds]
                assert abs(shares[0] - shares[1]) < 4 * (0.5 / len(kinds[0])) ** 0.5  # four deviations
    monkeypatch.setattr("statewise.data.sets.retrieval._YEARS", 200)
    with pytest.raises(ValueError, match="70 addresses do not give 400 pairs"):
        make("retrieval", "small")
    assert not seen["train"] & seen["test"] | seen["train"] & seen["validation"] | seen["validation"] & seen["test"]
