"""Models for other programs: PyTorch programs, ONNX and GGUF. Each is checked against the model when it is written."""

from __future__ import annotations

from ._check import ExportError
from ._gguf import to_gguf
from ._graphs import GRAPHS, start_state
from ._onnx import to_onnx
from ._pt2 import to_torch_export

__all__ = ["GRAPHS", "ExportError", "start_state", "to_gguf", "to_onnx", "to_torch_export"]
