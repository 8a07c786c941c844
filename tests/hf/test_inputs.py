"""Attention masks, positions and packed rows are exact: each document gives what it gives alone."""

from __future__ import annotations

import pytest
import torch
from transformers import DataCollatorWithFlattening

from statewise.hf.inputs import segments
from statewise.testing import assert_agree

LENGTHS = (4, 9, 6)


@pytest.fixture
def documents():
    return [torch.randint(0, 61, (1, n)) for n in LENGTHS]


@pytest.mark.parametrize("side", ["left", "right"])
def test_padding(model, documents, side):
    total = max(LENGTHS) + 1
    pad = lambda t, n: torch.nn.functional.pad(t, (total - n, 0) if side == "left" else (0, total - n), value=0)  # noqa: E731
    x = torch.cat([pad(d, n) for d, n in zip(documents, LENGTHS)])
    mask = torch.cat([pad(torch.ones_like(d), n) for d, n in zip(documents, LENGTHS)])
    out = model(x, attention_mask=mask, use_cache=True)
    for row, (document, n) in enumerate(zip(documents, LENGTHS)):
        alone = model(document, use_cache=True)
        places = slice(total - n, None) if side == "left" else slice(0, n)
        assert_agree(out.logits[row : row + 1, places], alone.logits, f"{side} padding, row {row}", total)
    # The state does not see padding either: all rows go on alike.
    more = torch.randint(0, 61, (3, 3))
    cache, given = out.cache, torch.cat([mask, torch.ones_like(more)], 1)
    going_on = model(more, attention_mask=given, cache=cache).logits
    for row, document in enumerate(documents):
        want = model(torch.cat([document, more[row : row + 1]], 1)).logits[:, -3:]
        assert_agree(going_on[row : row + 1], want, f"after {side} padding, row {row}", total)


@pytest.mark.parametrize(
    "said_by",
    [
        {},  # position_ids
        {"return_seq_idx": True},
        {"return_flash_attn_kwargs": True},
        {"return_seq_idx": True, "return_position_ids": False},
        {"return_flash_attn_kwargs": True, "return_position_ids": False},
    ],
)
def test_rows_packed_by_the_collator_of_transformers(model, documents, said_by):
    collate = DataCollatorWithFlattening(return_tensors="pt", **said_by)
    batch = collate([{"input_ids": d[0].tolist()} for d in documents])
    out = model(**batch)
    alone = [model(d, labels=d) for d in documents]
    assert_agree(out.logits, torch.cat([a.logits for a in alone], 1), "packed", sum(LENGTHS))
    losses = sum(a.loss * (n - 1) for a, n in zip(alone, LENGTHS)) / sum(n - 1 for n in LENGTHS)
    assert_agree(out.loss, losses, "loss of a packed row", sum(LENGTHS))


def test_packed_rows_in_chunks_with_padding(model, documents):
    x = torch.cat([torch.zeros(1, 2, dtype=torch.int64), *documents, torch.zeros(1, 3, dtype=torch.int64)], 1)
    seq_idx = torch.tensor([[-1] * 2 + [0] * 4 + [1] * 9 + [2] * 6 + [-1] * 3])
    want = torch.cat([model(d).logits for d in documents], 1)
    assert_agree(model(x, seq_idx=seq_idx).logits[:, 2:-3], want, "packed and padded", x.shape[1])
    positions = torch.cat([torch.ones(1, 2), *[torch.arange(n)[None] for n in LENGTHS], torch.ones(1, 3)], 1).long()
    mask = (seq_idx >= 0).long()
    parts, cache = [], None
    for a, b in [(0, 5), (5, 6), (6, 24)]:
        out = model(x[:, a:b], position_ids=positions[:, a:b], attention_mask=mask[:, a:b], cache=cache, use_cache=True)
        parts.append(out.logits)
        cache = out.cache
    assert_agree(torch.cat(parts, 1)[:, 2:-3], want, "packed, padded and in chunks", x.shape[1])


def test_what_says_nothing_costs_nothing():
    ones, up = torch.ones(2, 5), torch.arange(5)[None]
    assert segments(2, 5) is None
    assert segments(2, 5, attention_mask=ones, position_ids=up) is None
    assert segments(2, 5, position_ids=up + 3) is None
    assert (
        segments(2, 1, attention_mask=torch.tensor([[0, 1], [1, 1]]), position_ids=torch.tensor([[1], [1]]), seen=1)
        is None
    )


def test_positions():
    got = segments(
        1, 6, attention_mask=torch.tensor([[0, 1, 1, 0, 1, 1]]), position_ids=torch.tensor([[0, 0, 1, 1, 0, 1]])
    )
    assert got.position[0][got.valid[0]].tolist() == [0, 1, 0, 1]
    inside = segments(
        1, 4, attention_mask=torch.tensor([[1, 1, 0, 1]]), position_ids=torch.tensor([[0, 1, 0, 2]])
    )  # fmt: skip
    assert inside.position[0][inside.valid[0]].tolist() == [0, 1, 2]
    going_on = segments(1, 3, seq_idx=torch.tensor([[5, 5, 6]]), seen=4)
    assert going_on.position.tolist() == [[1, 2, 0]]
    tuned = segments(2, 3, attention_mask=torch.tensor([[0, 1, 1], [1, 1, 1]]), fresh=False)
    assert not tuned.resets.any()


def test_wrong_shapes():
    for arguments, message in [
        ({"attention_mask": torch.ones(2, 1, 5, 5)}, r"attention_mask: want shape \(2, 5\), got \(2, 1, 5, 5\)"),
        ({"attention_mask": {"full_attention": None}}, "got dict"),
        ({"position_ids": torch.zeros(2, 4)}, r"position_ids: want shape \(1, 5\) or \(2, 5\)"),
        ({"seq_idx": torch.zeros(1, 5)}, "seq_idx: want shape"),
        ({"cu_seq_lens": torch.tensor([0, 5])}, "one packed row, got a batch of 2"),
    ]:
        with pytest.raises(ValueError, match=message):
            segments(2, 5, **arguments)
    with pytest.raises(ValueError, match="want places from 0 up to the length 5"):
        segments(1, 5, cu_seq_lens=torch.tensor([0, 3]))
    with pytest.raises(ValueError, match="several documents cannot begin with a tuned state"):
        segments(1, 5, seq_idx=torch.tensor([[0, 0, 1, 1, 1]]), fresh=False)
