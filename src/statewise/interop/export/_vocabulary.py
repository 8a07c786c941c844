"""The vocabulary of a GGUF file: that of a Hugging Face tokenizer, bytes, or none."""

from __future__ import annotations

import json
import logging
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

Write = Callable[[Any], None]  # adds the entries to a gguf.GGUFWriter
BYTES = 256


def read(tokenizer: str | os.PathLike | None, tokens: int, rows: int) -> Write:
    """How to write the vocabulary of a model.

    Args:
        tokenizer: folder with tokenizer.json, or None.
        tokens: V, the number of tokens; 256 without a tokenizer means bytes.
        rows: of the embedding, at least V. llama.cpp wants an entry for each.

    Raises:
        FileNotFoundError, ValueError: no tokenizer.json, not JSON, not byte-level BPE, or with more tokens than rows.
    """
    if tokenizer is not None:
        return _byte_pairs(Path(tokenizer), rows)
    return _bytes if tokens == rows == BYTES else lambda writer: _none(writer, rows)


def _none(writer: Any, rows: int) -> None:
    writer.add_tokenizer_model("none")
    writer.add_vocab_size(rows)


def _bytes(writer: Any) -> None:
    # llama.cpp's tokenizer of RWKV takes the longest match, and writes bytes as Python does: of single bytes it makes
    # exactly the bytes of the text. Its byte-pair tokenizers refuse an empty list of merges.
    import gguf

    writer.add_tokenizer_model("rwkv")
    writer.add_token_list([repr(bytes([i]))[2:-1].encode() for i in range(BYTES)])
    writer.add_token_types([gguf.TokenType.NORMAL] * BYTES)


def _byte_pairs(folder: Path, rows: int) -> Write:
    import gguf

    path = folder / "tokenizer.json"
    if not path.is_file():
        raise FileNotFoundError(f"{folder}: holds no tokenizer.json; want a folder of a Hugging Face tokenizer")
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
        model, added = content["model"], content.get("added_tokens") or []
        kind, pieces = model.get("type"), _pre_tokenizers(content.get("pre_tokenizer"))
        places = {int(at): (str(text), gguf.TokenType.NORMAL) for text, at in model.get("vocab", {}).items()}
        for token in added:
            special = gguf.TokenType.CONTROL if token.get("special") else gguf.TokenType.USER_DEFINED
            places[int(token["id"])] = (str(token["content"]), special)
    except (ValueError, TypeError, KeyError, AttributeError) as error:
        raise ValueError(f"{path}: is not a tokenizer of Hugging Face: {error!r}") from error
    if kind != "BPE" or pieces != ["ByteLevel"]:
        raise ValueError(
            f"{path}: want byte-level BPE as in GPT-2 and GPT-NeoX, got {kind} after "
            f"{' and '.join(pieces) or 'nothing'}; leave the tokenizer out for a file that takes token numbers"
        )
    if not places or min(places) < 0 or max(places) >= rows:
        raise ValueError(f"{path}: want tokens from 0 to {rows - 1}, the rows of the embedding, got {_range(places)}")
    unused = gguf.TokenType.UNUSED
    entries = [places.get(i, (f"[PAD{i}]", unused)) for i in range(rows)]
    logging.getLogger("gguf").setLevel(logging.ERROR)
    names = gguf.SpecialVocab(folder, load_merges=True, n_vocab=rows)

    def write(writer: Any) -> None:
        writer.add_tokenizer_model("gpt2")
        writer.add_tokenizer_pre("gpt-2")
        writer.add_token_list([text for text, _ in entries])
        writer.add_token_types([kind for _, kind in entries])
        names.add_to_gguf(writer, quiet=True)

    return write


def _pre_tokenizers(section: Any) -> list[str]:
    """Types of the steps; a ByteLevel that does not split words by itself is "ByteLevel without words"."""
    if section is None:
        return []
    if section["type"] == "Sequence":
        return [name for part in section["pretokenizers"] for name in _pre_tokenizers(part)]
    plain = section["type"] != "ByteLevel" or section.get("use_regex", True)
    return [section["type"] if plain else "ByteLevel without words"]


def _range(places: dict[int, Any]) -> str:
    return f"{min(places)} to {max(places)}" if places else "none"
