"""A tokenizer for models of bytes, such as `statewise run` trains."""

from __future__ import annotations

from transformers import PreTrainedTokenizerFast

END = "<|end|>"


def byte_tokenizer() -> PreTrainedTokenizerFast:
    """Text to its UTF-8 bytes and back: 256 tokens, and the token of a byte is its value.

    Byte 0, which text does not hold, stands for the end of a text and for padding.
    `byte_tokenizer().save_pretrained(directory)` puts it beside a model, where AutoTokenizer and pipelines find it.
    """
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers

    # The library's byte alphabet writes printable characters of Latin-1 as themselves and numbers the others from 256.
    printable = {*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)}
    others = iter(range(256, 512))
    vocab = {chr(byte if byte in printable else next(others)): byte for byte in range(256)}
    vocab = {END if byte == 0 else written: byte for written, byte in vocab.items()}
    tokenizer = Tokenizer(models.BPE(vocab=vocab, merges=[]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    tokenizer.decoder = decoders.ByteLevel()
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        eos_token=END,
        pad_token=END,
        clean_up_tokenization_spaces=False,
        padding_side="left",
    )
