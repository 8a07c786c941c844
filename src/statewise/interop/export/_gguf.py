"""GGUF, the files of llama.cpp and what builds on it, for Mamba and Mamba-2."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator
from importlib.util import find_spec
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor

from ..._files import write_atomically
from ...mixers.mamba import Mamba
from ...mixers.mamba2 import Mamba2
from . import _check, _folder, _llama, _vocabulary

Kind = Literal["f32", "f16", "bf16"]
DTYPES: dict[str, torch.dtype] = {"f32": torch.float32, "f16": torch.float16, "bf16": torch.bfloat16}
SUPPORTED = "language models whose layers are all 'mamba', or all 'mamba2'"
# A recurrence has no longest context; the number is what llama.cpp's own converter writes for these models.
_CONTEXT = 1 << 20
# llama.cpp multiplies half-precision weights by activations that it rounds to the same precision.
_LIMITS = {"f32": _check.LIMIT, "f16": 1e-2, "bf16": 5e-2}

# Our name in a block -> theirs. Matrices keep the dtype of the file; what is small or sensitive is float32, as in
# every GGUF file of these models.
_MATRICES = {"in_proj": "ssm_in", "x_proj": "ssm_x", "dt_proj": "ssm_dt", "out_proj": "ssm_out"}
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


def to_gguf(
    model: Any,
    out: str | os.PathLike,
    *,
    dtype: Kind | None = None,
    tokenizer: str | os.PathLike | None = None,
    check: bool = True,
    force: bool = False,
    say: Callable[[str], None] = lambda text: None,
) -> dict[str, float]:
    """Write a Mamba or Mamba-2 language model as one GGUF file.

    Args:
        model: a language model whose layers are all `mamba`, or all `mamba2`.
        out: the file.
        dtype: of the matrices, "f32", "f16" or "bf16"; that of the model if None. The rest is float32.
        tokenizer: folder with a Hugging Face tokenizer.json (byte-level BPE). None: a model of 256 tokens gets bytes
            as its vocabulary, any other none at all, and then takes and gives token numbers only.
        check: load the file in llama.cpp and compare logits and greedy tokens with the model.
        force: replace the file.
        say: is told about progress.

    Returns:
        The relative error of the logits; empty with check=False.

    Raises:
        ImportError: gguf or llama-cpp-python is missing.
        ValueError: llama.cpp has no such model, or the tokenizer is of another kind; the message says what would do.
        FileExistsError: the file exists.
        ExportError: llama.cpp computes something else. Nothing is written.
    """
    _folder.require("gguf", "gguf")
    architecture(model)  # before anybody is sent to install something for a model that cannot be written
    if check and find_spec("llama_cpp") is None:
        raise ImportError(
            "export: llama_cpp is not installed: pip install llama-cpp-python (it needs a C++ compiler), or write the "
            "file unchecked, with check=False (--no-check)"
        )
    target = Path(out)
    if target.is_dir():
        raise IsADirectoryError(f"{target}: want a file for GGUF, such as {target / 'model.gguf'}")
    _folder.refuse_existing(target, force)
    name = dtype or _name_of(model.embedding.weight.dtype)
    if name not in DTYPES:
        raise ValueError(f"export: dtype: want f32, f16 or bf16, got {name!r}")
    vocabulary = _vocabulary.read(tokenizer, model.vocab_size, model.embedding.weight.shape[0])
    target.parent.mkdir(parents=True, exist_ok=True)
    errors: dict[str, float] = {}

    def write(path: str) -> None:
        say("writing")
        write_gguf(model, path, name, vocabulary)
        if check:
            say("checking in llama.cpp")
            errors.update(_llama.compare(_folder.plain_copy(model), path))
            _check.demand(errors, _LIMITS[name], os.fspath(target))

    write_atomically(target, write)
    return errors


def _name_of(dtype: torch.dtype) -> str:
    return next((name for name, kind in DTYPES.items() if kind == dtype), "f32")


def architecture(model: Any) -> str:
    """ "mamba" or "mamba2"; ValueError if llama.cpp cannot run this model, with everything that stands in the way."""
    mixers: list[Any] = [getattr(block, "mixer", None) for block in getattr(model, "blocks", [])]
    kinds = {type(m) for m in mixers}
    if kinds not in ({Mamba}, {Mamba2}):
        found = ", ".join(sorted(k.__name__ for k in kinds)) or type(model).__name__
        raise ValueError(f"export: GGUF: want {SUPPORTED}, got {found}; ONNX and torch-export take any")
    second, first = kinds == {Mamba2}, mixers[0]
    problems = []
    if any(block.mlp is not None for block in model.blocks):
        problems.append("d_intermediate: want 0, llama.cpp has no MLP in these models")
    if first.in_proj.bias is not None:
        problems.append("bias: want False, llama.cpp has no bias in these projections")
    if not second and first.d_inner != 2 * first.d_model:
        problems.append(f"expand: want 2, got {first.d_inner / first.d_model:g}")
    if second and first.dt_limit is not None:
        problems.append("dt_limit: want None, llama.cpp does not clamp steps")
    if second and first.D.ndim > 1:
        problems.append("skip_per_channel: want False, llama.cpp has one skip weight a head")
    if second and first.norm.eps != model.config["norm_eps"]:
        problems.append(f"norm_eps: want {first.norm.eps:g}, as in the gated norms, got {model.config['norm_eps']:g}")
    if len({(m.d_inner, m.d_state, m.conv1d.width) for m in mixers}) > 1:
        problems.append("mixer: want all layers of one size")
    if problems:
        raise ValueError("export: GGUF: " + "; ".join(problems))
    return "mamba2" if second else "mamba"


def write_gguf(
    model: Any, path: str | os.PathLike, dtype: str | None = None, vocabulary: _vocabulary.Write | None = None
) -> None:
    """The file itself, without any check of what is there or whether it is right. Arguments as in `to_gguf`."""
    import gguf

    name = architecture(model)
    config, mixer, second = model.config, model.blocks[0].mixer, name == "mamba2"
    kind = DTYPES[dtype or _name_of(model.embedding.weight.dtype)]
    writer = gguf.GGUFWriter(os.fspath(path), name)
    types = gguf.LlamaFileType
    writer.add_file_type(
        {torch.float32: types.ALL_F32, torch.float16: types.MOSTLY_F16, torch.bfloat16: types.MOSTLY_BF16}[kind]
    )
    (vocabulary or _vocabulary.read(None, 0, model.embedding.weight.shape[0]))(writer)
    writer.add_context_length(_CONTEXT)
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
    for tensor_name, t, of in _tensors(model, second, kind):
        t = t.detach().to("cpu", of).contiguous()
        if not bool(torch.isfinite(t).all()):
            raise ValueError(f"export: {tensor_name} holds numbers that {dtype} has not; want f32 or bf16")
        if of == torch.bfloat16:
            writer.add_tensor(tensor_name, t.view(torch.uint8).numpy(), raw_dtype=gguf.GGMLQuantizationType.BF16)
        else:
            writer.add_tensor(tensor_name, t.numpy())
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


def _tensors(model: Any, second: bool, kind: torch.dtype) -> Iterator[tuple[str, Tensor, torch.dtype]]:
    """(name, tensor, dtype) of everything in the file."""
    yield "token_embd.weight", model.embedding.weight, kind
    yield "output_norm.weight", model.norm_f.weight, torch.float32
    if model.lm_head is not None:
        yield "output.weight", model.lm_head.weight, kind
    for i, block in enumerate(model.blocks):
        mixer = block.mixer
        if mixer.conv1d.bias is None:
            yield f"blk.{i}.ssm_conv1d.bias", torch.zeros(len(mixer.conv1d.weight)), torch.float32
        for name, t in block.named_parameters():
            leaf = name.removeprefix("mixer.").removesuffix(".weight")
            if leaf in _MATRICES:
                yield f"blk.{i}.{_MATRICES[leaf]}.weight", t, kind
                continue
            if name == "mixer.A_log":
                t = -t.detach().float().exp()
            if second and name in ("mixer.A_log", "mixer.D"):
                t = t[:, None]
            if name == "mixer.norm.weight":
                t = t.unflatten(0, (mixer.n_groups, -1))
            yield f"blk.{i}.{_SMALL[name]}", t, torch.float32
