import numpy as np
import pytest
import torch

from statewise.data.language import ByteData
from statewise.data.probes import MQARData, SelectiveCopyingData
from statewise.data.steps import IGNORE, Batch, share
from statewise.data.text import Corpus

TEXT = bytes(range(97, 123)) * 40
DOCUMENTS = [bytes([i]) * (3 + 7 * i) for i in range(1, 12)]


def _text(**options):
    return ByteData(Corpus("a test", [TEXT], [TEXT[:100]]), 4, 16, **options)


def _packed(**options):
    return ByteData(Corpus("a test", DOCUMENTS, [TEXT[:100]]), 4, 16, packed=True, **options)


MAKERS = {
    "text": _text,
    "packed": _packed,
    "copying": lambda **o: SelectiveCopyingData(4, 20, 5, 6, n_validation=9, **o),
    "mqar": lambda **o: MQARData(4, 20, 5, 32, n_validation=9, **o),
    "mqar with short gaps": lambda **o: MQARData(4, 20, 5, 32, 0.01, n_validation=9, **o),
}


def _equal(a: Batch, b: Batch) -> bool:
    same = torch.equal(a.tokens, b.tokens) and torch.equal(a.targets, b.targets)
    if a.seg is None or b.seg is None:
        return same and a.seg is b.seg
    return same and torch.equal(a.seg.position, b.seg.position)


@pytest.mark.parametrize("kind", MAKERS)
def test_a_batch_is_a_function_of_seed_and_step(kind):
    first, again, other = MAKERS[kind](seed=1), MAKERS[kind](seed=1), MAKERS[kind](seed=2)
    first.batch(3), first.batch(9)  # what was asked before makes no difference
    assert _equal(first.batch(5), again.batch(5))
    assert not _equal(first.batch(5), first.batch(6))
    assert not _equal(first.batch(5), other.batch(5))
    assert all(_equal(a, b) for a, b in zip(first.validation(), again.validation()))


@pytest.mark.parametrize("kind", MAKERS)
@pytest.mark.parametrize("world", [2, 3])
def test_shares_of_all_processes_make_the_batch(kind, world):
    for batch in [MAKERS[kind]().batch(0), *MAKERS[kind]().validation()]:
        shares = [share(batch, rank, world) for rank in range(world)]
        assert len({len(s.tokens) for s in shares}) == 1
        rows = torch.cat([s.targets for s in shares])
        assert torch.equal(rows[: len(batch.targets)], batch.targets)
        assert bool((rows[len(batch.targets) :] == IGNORE).all())


def test_windows_predict_the_next_byte():
    data = _text()
    tokens, targets, seg = data.batch(0)
    assert seg is None
    assert torch.equal(tokens[:, 1:], targets[:, :-1])
    for row in torch.cat([tokens, targets[:, -1:]], 1):
        assert bytes(row.tolist()) in TEXT


def test_every_window_can_be_drawn():
    data = ByteData(Corpus("a test", [bytes(range(20))], [b"ab"]), 16, 1)
    starts = {int(t) for step in range(100) for t in data.batch(step).tokens[:, 0]}
    assert starts == set(range(19))  # the last byte has no next one


def test_packed_rows_keep_documents_apart():
    data = _packed()
    many = False
    for step in range(20):
        tokens, targets, seg = data.batch(step)
        assert seg is not None
        many |= bool((seg.resets.sum(1) > 1).any())
        # Each document here is one byte value over and over, so a target of another document would show.
        scored = targets != IGNORE
        assert torch.equal(tokens[scored], targets[scored])
        for row in range(len(tokens)):
            for document in seg.document[row].unique():
                assert len(tokens[row][seg.document[row] == document].unique()) == 1
    assert many


def test_validation_covers_the_held_out_text_once():
    data = _text()
    scored = torch.cat([b.targets.flatten() for b in data.validation()])
    assert bytes(scored.tolist()) == TEXT[1 : 1 + 99 // 16 * 16]


def test_held_out_part_shorter_than_a_row():
    data = ByteData(Corpus("a test", [TEXT], [b"abc"]), 4, 16)
    (batch,) = data.validation()
    assert batch.tokens.tolist() == [[97, 98]]


def test_too_small_a_text():
    with pytest.raises(ValueError, match=r"data\.path.*too small.*4 x 16 = 64"):
        ByteData(Corpus("a test", [b"x" * 64], [b"xy"]), 4, 16)
    with pytest.raises(ValueError, match=r"data\.held_out"):
        ByteData(Corpus("a test", [b"x" * 65], [b"x"]), 4, 16)


def test_selective_copying_rows():
    data = SelectiveCopyingData(64, length=20, n_copy=5, n_symbols=6)
    tokens, targets, _ = data.batch(0)
    assert tokens.shape == targets.shape == (64, 25)
    for row, answer in zip(tokens.tolist(), targets.tolist()):
        symbols = [t for t in row[:20] if t < 6]
        assert answer == [IGNORE] * 20 + symbols
        assert row[20:] == [data.marker] * 5
        assert {t for t in row[:20] if t >= 6} == {data.noise}
    assert len({tuple(r) for r in (tokens[:, :20] < 6).tolist()}) > 32  # places change from row to row


def test_mqar_rows():
    data = MQARData(64, length=24, n_pairs=5, vocab_size=32)
    tokens, targets, _ = data.batch(0)
    for row, answer in zip(tokens.tolist(), targets.tolist()):
        pairs = dict(zip(row[0:10:2], row[1:10:2]))
        assert len(pairs) == 5
        asked = [i for i, t in enumerate(answer) if t != IGNORE]
        assert len(asked) == 5
        assert min(asked) >= 10
        assert {row[i]: answer[i] for i in asked} == pairs
        assert {t for i, t in enumerate(row) if i >= 10 and i not in asked} <= {data.blank}
    keys, values = tokens[:, 0:10:2], tokens[:, 1:10:2]
    assert 1 <= int(keys.min()) <= int(keys.max()) <= data.n_keys < int(values.min()) <= int(values.max()) < 32


@pytest.mark.parametrize("kind", ["copying", "mqar"])
def test_validation_rows_are_not_training_rows(kind):
    data = MAKERS[kind]()
    seen = {tuple(r) for step in range(50) for r in data.batch(step).tokens.tolist()}
    assert not seen & {tuple(r) for b in data.validation() for r in b.tokens.tolist()}
    assert sum(len(b.tokens) for b in data.validation()) == 9


def test_probe_options_are_checked():
    with pytest.raises(ValueError, match="n_copy"):
        SelectiveCopyingData(4, length=5, n_copy=6)
    with pytest.raises(ValueError, match="n_pairs"):
        MQARData(4, length=11, n_pairs=4)
    with pytest.raises(ValueError, match="vocab_size"):
        MQARData(4, length=64, n_pairs=8, vocab_size=12)
    with pytest.raises(ValueError, match="batch_size"):
        SelectiveCopyingData(0)


def test_numbers_do_not_come_from_the_global_generators():
    data = MAKERS["copying"]()
    torch.manual_seed(0)
    np.random.seed(0)
    a = data.batch(0)
    torch.manual_seed(1)
    np.random.seed(1)
    assert _equal(a, data.batch(0))
