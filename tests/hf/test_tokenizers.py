"""The byte tokenizer, and tokenizers beside a model."""

from __future__ import annotations

import torch
from transformers import AutoTokenizer

from statewise.hf import byte_tokenizer


def test_tokens_are_bytes():
    tokenizer = byte_tokenizer()
    everything = "".join(map(chr, range(1, 0x250))) + "  \n\t 日本語 🙂 <s> don't"
    assert tokenizer(everything).input_ids == list(everything.encode())
    assert tokenizer.decode(list(everything.encode())) == everything
    assert len(tokenizer) == 256
    assert (tokenizer.eos_token_id, tokenizer.pad_token_id) == (0, 0)
    assert tokenizer.decode([104, 105, 0], skip_special_tokens=True) == "hi"


def test_batches_are_padded_on_the_left_and_change_nothing(build, tmp_path):
    model = build("mamba2", vocab_size=256)
    model.save_pretrained(tmp_path)
    byte_tokenizer().save_pretrained(tmp_path)
    tokenizer = AutoTokenizer.from_pretrained(tmp_path)
    batch = tokenizer(["one", "twenty"], padding=True, return_tensors="pt")
    assert batch.attention_mask.tolist() == [[0, 0, 0, 1, 1, 1], [1] * 6]
    options = {"max_new_tokens": 4, "do_sample": False}
    both = model.generate(**batch, **options)
    alone = model.generate(**tokenizer("one", return_tensors="pt"), **options)
    assert torch.equal(both[0, 3:], alone[0])


def test_a_lone_tokenizer_file_is_found(build, tmp_path):
    build("mamba2", vocab_size=256).save_pretrained(tmp_path)
    byte_tokenizer().backend_tokenizer.save(str(tmp_path / "tokenizer.json"))
    assert AutoTokenizer.from_pretrained(tmp_path)("hi").input_ids == [104, 105]
