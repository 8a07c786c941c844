"""llama.cpp, through llama-cpp-python: our weights as a GGUF file in a temporary folder, its own C interface."""

from __future__ import annotations

import tempfile
from pathlib import Path
from typing import Any

from torch import Tensor

from ...interop.export._gguf import write_gguf
from ...interop.export._llama import Llama, LlamaError
from .. import machine
from ..cases import Missing
from . import want


class LlamaCpp:
    """One sequence; tokens (1, L), logits (1, V). Only the last position has logits, as its own generation asks for."""

    def __init__(self, model: Any) -> None:
        want("llama.cpp")
        if machine.version("gguf") is None:
            raise Missing("llama.cpp: writing the model for it needs gguf, which is not installed")
        self.vocab_size = model.config["vocab_size"]
        with tempfile.TemporaryDirectory() as folder:
            path = Path(folder) / "model.gguf"
            write_gguf(model, path)
            try:
                self._llama = Llama(path)
            except LlamaError as error:
                raise Missing(str(error)) from error

    def _decode(self, tokens: list[int]) -> Tensor:
        return self._llama.decode(tokens)[None, : self.vocab_size]

    def prefill(self, tokens: Tensor) -> Tensor:
        return self.start(tokens)

    def start(self, tokens: Tensor) -> Tensor:
        self._llama.clear()
        return self._decode(tokens[0].tolist())

    def step(self, token: Tensor) -> Tensor:
        return self._decode(token.tolist())
