"""llama.cpp, through llama-cpp-python: our weights as a GGUF file in a temporary folder, its own C interface."""

from __future__ import annotations

import ctypes
import tempfile
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from .. import machine
from ..cases import Missing
from . import want

CONTEXT = 4096

# Our name in a block -> theirs. Matrices keep the dtype of the model; what is small or sensitive is float32, as in
# every GGUF file of these models.
_MATRICES = {"in_proj": "ssm_in", "x_proj": "ssm_x", "out_proj": "ssm_out"}
_SMALL = {
    "norm.weight": "attn_norm.weight",
    "mixer.conv1d.weight": "ssm_conv1d.weight",
    "mixer.conv1d.bias": "ssm_conv1d.bias",
    "mixer.dt_proj.bias": "ssm_dt.bias",
    "mixer.dt_bias": "ssm_dt.bias",
    "mixer.A_log": "ssm_a",
    "mixer.D": "ssm_d",
    "mixer.norm.weight": "ssm_norm.weight",
}


def write_gguf(model: Any, path: Path) -> None:
    """The weights of a `mamba` or `mamba2` language model, without a vocabulary."""
    import gguf

    config, mixer = model.config, model.blocks[0].mixer
    second = config["mixer"] == "mamba2"
    writer = gguf.GGUFWriter(str(path), "mamba2" if second else "mamba")
    rows = model.embedding.weight.shape[0]
    writer.add_tokenizer_model("none")
    writer.add_vocab_size(rows)
    writer.add_context_length(CONTEXT)
    writer.add_embedding_length(config["d_model"])
    writer.add_feed_forward_length(0)
    writer.add_head_count(0)
    writer.add_block_count(config["n_layer"])
    writer.add_layer_norm_rms_eps(config["norm_eps"])
    writer.add_ssm_conv_kernel(mixer.conv1d.width)
    writer.add_ssm_inner_size(mixer.d_inner)
    writer.add_ssm_state_size(mixer.d_state)
    writer.add_ssm_time_step_rank(mixer.n_heads if second else mixer.dt_rank)
    if second:
        writer.add_ssm_group_count(mixer.n_groups)

    def add(name: str, t: Tensor, kind: torch.dtype) -> None:
        t = t.detach().to(kind).contiguous()
        if kind == torch.bfloat16:
            writer.add_tensor(name, t.view(torch.uint8).numpy(), raw_dtype=gguf.GGMLQuantizationType.BF16)
        else:
            writer.add_tensor(name, t.numpy())

    add("token_embd.weight", model.embedding.weight, model.embedding.weight.dtype)
    add("output_norm.weight", model.norm_f.weight, torch.float32)
    for i, block in enumerate(model.blocks):
        for name, t in block.named_parameters():
            leaf = name.removeprefix("mixer.").removesuffix(".weight")
            if leaf in _MATRICES:
                add(f"blk.{i}.{_MATRICES[leaf]}.weight", t, t.dtype)
            elif leaf == "dt_proj":
                add(f"blk.{i}.ssm_dt.weight", t, t.dtype)
            else:
                if name == "mixer.A_log":
                    t = -t.detach().float().exp()
                if second and name in ("mixer.A_log", "mixer.D"):
                    t = t[:, None]
                if name == "mixer.norm.weight":
                    t = t.unflatten(0, (mixer.n_groups, -1))
                add(f"blk.{i}.{_SMALL[name]}", t, torch.float32)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


class LlamaCpp:
    """One sequence; tokens (1, L), logits (1, V). Only the last position has logits, as its own generation asks for."""

    def __init__(self, model: Any) -> None:
        want("llama.cpp")
        if machine.version("gguf") is None:
            raise Missing("llama.cpp: writing the model for it needs gguf, which is not installed")
        import llama_cpp

        self._c: Any = llama_cpp
        self._quiet = llama_cpp.llama_log_callback(lambda level, text, data: None)
        llama_cpp.llama_log_set(self._quiet, ctypes.c_void_p(0))
        llama_cpp.llama_backend_init()
        self.vocab_size, self._rows = model.config["vocab_size"], model.embedding.weight.shape[0]
        with tempfile.TemporaryDirectory() as folder:
            path = Path(folder) / "model.gguf"
            write_gguf(model, path)
            options = llama_cpp.llama_model_default_params()
            self._model = llama_cpp.llama_model_load_from_file(str(path).encode(), options)
        if not self._model:
            raise Missing("llama.cpp: refused the model file")
        options = llama_cpp.llama_context_default_params()
        options.n_ctx, options.n_batch = CONTEXT, 1024
        options.n_threads = options.n_threads_batch = torch.get_num_threads()
        self._context = llama_cpp.llama_init_from_model(self._model, options)
        if not self._context:
            raise Missing("llama.cpp: could not make a context")
        self._position = 0

    def _decode(self, tokens: list[int]) -> Tensor:
        if self._position + len(tokens) > CONTEXT:
            self._clear()
        array = (self._c.llama_token * len(tokens))(*tokens)
        if self._c.llama_decode(self._context, self._c.llama_batch_get_one(array, len(tokens))):
            raise RuntimeError("llama_decode failed")
        self._position += len(tokens)
        logits = self._c.llama_get_logits_ith(self._context, -1)
        row = (ctypes.c_float * self._rows).from_address(ctypes.addressof(logits.contents))
        flat = torch.frombuffer(row, dtype=torch.float32)
        return flat[None, : self.vocab_size].clone()

    def _clear(self) -> None:
        self._c.llama_memory_clear(self._c.llama_get_memory(self._context), True)
        self._position = 0

    def prefill(self, tokens: Tensor) -> Tensor:
        return self.start(tokens)

    def start(self, tokens: Tensor) -> Tensor:
        self._clear()
        return self._decode(tokens[0].tolist())

    def step(self, token: Tensor) -> Tensor:
        return self._decode(token.tolist())

    def __del__(self) -> None:
        if getattr(self, "_context", None):
            self._c.llama_free(self._context)
        if getattr(self, "_model", None):
            self._c.llama_model_free(self._model)
