"""ListOps: values by hand, statistics of the grammar, the same set whoever draws it, and files that are not right."""

from __future__ import annotations

import hashlib
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

import statewise
from statewise.data.labelled import Split, check
from statewise.data.sets import baselines, listops
from statewise.data.sets.listops import SYMBOLS, Grammar, encode, generate, make, outline, value

# What this process imports, other processes import too, with the kernels that it has compiled.
SRC = Path(statewise.__file__).parents[1]


def _silent(done: int, total: int) -> None:
    pass


def _by_definition(words: list[str]) -> int:
    """The value, by the recursive definition: an implementation of its own."""
    word = words.pop(0)
    if not word.startswith("["):
        return int(word)
    arguments = []
    while words[0] != "]":
        arguments.append(_by_definition(words))
    words.pop(0)
    operator = {"[MIN": min, "[MAX": max, "[MED": lambda a: int(np.median(a)), "[SM": lambda a: sum(a) % 10}[word]
    return int(operator(arguments))


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("[MED 1 2 3 4 ]", 2),
        ("[SM 9 9 9 ]", 7),
        ("[MED 9 0 4 ]", 4),
        ("[MIN 5 [MAX 0 8 ] 7 ]", 5),
        ("( ( ( [MAX 3 ) 5 ) ] )", 5),
        ("7", 7),
    ],
)
def test_values_by_hand(text, expected):
    assert value(text) == expected


@pytest.mark.parametrize("text", ["[MAX 3 5", "[MAX ]", "3 ] 5", "3 5", "", "[MAX 3 ] ]", "]"])
def test_what_is_no_expression(text):
    with pytest.raises(ValueError, match="not a whole expression"):
        value(text)


def test_drawn_expressions_have_the_value_of_the_definition():
    grammar = Grammar(20, 120, max_depth=5, max_args=6)
    rows, labels = generate(300, seed=3, grammar=grammar)
    assert len({bytes(rows[i]) for i in range(300)}) == 300
    for i, label in enumerate(labels):
        words = [SYMBOLS[t] for t in rows[i]]
        assert words.pop() == "<eos>"
        assert 20 < len(words) < 120
        deep = most = 0
        still_open: list[int] = []
        for word in words:  # depth and number of arguments
            if word == "]":
                most = max(most, still_open.pop())
                continue
            if still_open:
                still_open[-1] += 1
            if word.startswith("["):
                still_open.append(0)
            deep = max(deep, len(still_open) + (not word.startswith("[")))
        assert deep <= 5
        assert 2 <= most <= 6
        assert value(rows[i]) == label == _by_definition(words)


def test_statistics_of_the_published_grammar():
    """Mean length 1067, and the shares of the labels, as measured with another implementation."""
    rows, labels = generate(3000, seed=1)
    lengths = rows.lengths - 1
    assert lengths.min() > 500
    assert lengths.max() < 2000
    assert lengths.mean() == pytest.approx(1067, rel=0.1)
    shares = np.bincount(labels, minlength=10) / len(labels)
    assert shares[0] == pytest.approx(0.166, rel=0.15)
    assert shares[9] == pytest.approx(0.157, rel=0.15)
    assert ((shares[1:9] > 0.06) & (shares[1:9] < 0.11)).all()


def test_the_baseline_of_the_root_operator(monkeypatch):
    size = listops.Size(Grammar(), (4000, 100, 2000), 2048)
    monkeypatch.setitem(listops.PROFILES, "full", size)
    data = make("full", seed=0, source=None, workers=1, progress=_silent)
    check(data)
    found = baselines(data)
    assert 0.35 <= found["root operator"] <= 0.39
    assert found["most frequent label"] < 0.2
    assert found["most frequent label"] == (data.test.labels == np.bincount(data.train.labels).argmax()).mean()


_DIGEST = """
import hashlib
from statewise.data.sets.listops import Grammar, generate
rows, labels = generate(700, seed=5, grammar=Grammar(20, 60), workers={workers})
print(hashlib.sha256(rows.flat.tobytes() + rows.offsets.tobytes() + labels.tobytes()).hexdigest())
"""


def test_the_set_depends_on_the_seed_alone():
    rows, labels = generate(700, seed=5, grammar=Grammar(20, 60), workers=3)
    here = hashlib.sha256(rows.flat.tobytes() + rows.offsets.tobytes() + labels.tobytes()).hexdigest()
    environment = {**os.environ, "PYTHONPATH": str(SRC), "PYTHONHASHSEED": "77"}
    code = _DIGEST.format(workers=1)
    there = subprocess.run([sys.executable, "-c", code], env=environment, capture_output=True, text=True, check=True)
    assert there.stdout.strip() == here
    other, _ = generate(700, seed=6, grammar=Grammar(20, 60))
    assert bytes(other[0]) != bytes(rows[0])


def test_a_grammar_with_few_expressions():
    grammar = Grammar(1, 5, max_depth=2, max_args=2)  # 4 operators on two digits: 400 of them
    rows, _ = generate(150, grammar=grammar)
    assert len({bytes(rows[i]) for i in range(150)}) == 150
    with pytest.raises(ValueError, match="widen"):
        generate(401, grammar=grammar)
    with pytest.raises(ValueError, match="min_length"):
        generate(1, grammar=Grammar(10, 11))


def test_an_outline_has_all_tokens():
    rows, _ = generate(5, seed=2, grammar=Grammar(50, 200))
    for i in range(5):
        lines = outline(rows[i], 50)
        assert " ".join(lines).split() == [SYMBOLS[t] for t in rows[i][:-1]]
        assert max(map(len, lines)) <= 50
    assert outline(encode("[MAX 1 [MIN 2 3 ] ]"), 11) == ["[MAX", "  1", "  [MIN", "    2 3", "  ]", "]"]


# ---- the published files ---------------------------------------------------------------------------------------------

_LINES = {
    "basic_train.tsv": [("( ( ( ( [MAX 3 ) 5 ) ] )", 5), ("[SM 9 [MIN 4 7 ] ]", 3)],
    "basic_val.tsv": [("( ( ( [MED 1 ) 2 ) ] )", 1)],
    "basic_test.tsv": [("[MIN 6 8 ]", 6)],
}


@pytest.fixture
def published(tmp_path):
    for name, rows in _LINES.items():
        text = "".join(f"{source}\t{target}\r\n" for source, target in [("Source", "Target"), *rows])
        (tmp_path / name).write_bytes(text.encode())
    return tmp_path


def _read(folder):
    return make("full", seed=0, source=folder, workers=1, progress=_silent)


def _text(split: Split, row: int) -> str:
    return " ".join(SYMBOLS[t] for t in split.inputs[row])


def test_the_published_files_are_read(published):
    data = _read(published)
    check(data)
    assert [len(s) for s in (data.train, data.validation, data.test)] == [2, 1, 1]
    assert data.train.labels.tolist() == [5, 3]
    assert _text(data.train, 0) == "[MAX 3 5 ] <eos>"
    assert _text(data.validation, 0) == "[MED 1 2 ] <eos>"
    assert (data.vocab_size, data.length, data.n_classes) == (18, 2048, 10)


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ("[MAX 3 5 ]\t4", r"basic_test.tsv, line 3: the value is 5, the label 4"),
        ("[MAX 3 5\t5", "line 3: not a whole expression"),
        ("[MAX 3 5 ]", "line 3: want an expression, a tab and a digit"),
        ("[MAX 3 5 ]\t12", "line 3: want an expression, a tab and a digit"),
        ("[FIRST 3 5 ]\t3", r"line 3: no symbol of ListOps: '\[FIRST'"),
    ],
)
def test_a_line_that_is_not_right(published, line, message):
    path = published / "basic_test.tsv"
    path.write_text(path.read_text() + line + "\n")
    with pytest.raises(ValueError, match=message):
        _read(published)


@pytest.mark.parametrize("line", [b"[MAX 3 " + b"5 " * 70_000 + b"]\t5\n", b"[MAX \xff 3 ]\t5\n", b'"[MAX 3 ]\t5\n'])
def test_a_file_that_is_no_table_of_text(published, line):
    path = published / "basic_test.tsv"
    path.write_bytes(path.read_bytes() + line)
    with pytest.raises(ValueError, match=r"basic_test\.tsv, "):
        _read(published)


def test_files_that_are_not_there(published, tmp_path):
    (published / "basic_val.tsv").write_text("3\t3\n")
    with pytest.raises(ValueError, match="Source and Target"):
        _read(published)
    (published / "basic_val.tsv").unlink()
    with pytest.raises(ValueError, match=r"basic_val.tsv is missing"):
        _read(published)
    with pytest.raises(ValueError, match="--profile full"):
        make("small", seed=0, source=published, workers=1, progress=_silent)
