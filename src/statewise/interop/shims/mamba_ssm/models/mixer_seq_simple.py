"""The language model of mamba_ssm: its checkpoints load with strict=True."""

from __future__ import annotations

import copy
import json
import math
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from ..._missing import missing
from ..modules.block import Block, add_norm
from ..modules.mamba2 import Mamba2
from ..modules.mamba_simple import Mamba
from ..modules.mha import MHA
from ..modules.mlp import GatedMLP
from ..ops.triton.layer_norm import RMSNorm, layer_norm_fn, rms_norm_fn
from ..utils.generation import GenerationMixin
from ..utils.hf import load_config_hf, load_state_dict_hf
from .config_mamba import MambaConfig

__all__ = ["CausalLMOutput", "MambaLMHeadModel", "MixerModel", "create_block", "layer_norm_fn", "rms_norm_fn"]

__getattr__ = missing(__name__)

_MIXERS = {"Mamba1": Mamba, "Mamba2": Mamba2}


class CausalLMOutput(NamedTuple):
    logits: Tensor


def create_block(
    d_model: int, d_intermediate: int, ssm_cfg: dict[str, Any] | None = None,
    attn_layer_idx: list[int] | None = None, attn_cfg: dict[str, Any] | None = None, norm_epsilon: float = 1e-5,
    rms_norm: bool = False, residual_in_fp32: bool = False, fused_add_norm: bool = False,
    layer_idx: int | None = None, device=None, dtype=None,
) -> Block:  # fmt: skip
    """One block: attention if its index is in attn_layer_idx, otherwise the mixer that ssm_cfg["layer"] names."""
    options: dict[str, Any] = {"device": device, "dtype": dtype}
    if attn_layer_idx and layer_idx in attn_layer_idx:
        mixer: Any = partial(MHA, layer_idx=layer_idx, **(attn_cfg or {}), **options)
    else:
        arguments = copy.deepcopy(ssm_cfg) if ssm_cfg else {}
        layer = arguments.pop("layer", "Mamba1")
        if layer not in _MIXERS:
            raise ValueError(f"create_block: ssm_cfg['layer']: want one of {', '.join(_MIXERS)}, got {layer!r}")
        mixer = partial(_MIXERS[layer], layer_idx=layer_idx, **arguments, **options)
    norm = partial(RMSNorm if rms_norm else nn.LayerNorm, eps=norm_epsilon, **options)
    mlp: Any = nn.Identity
    if d_intermediate:
        mlp = partial(GatedMLP, hidden_features=d_intermediate, out_features=d_model, **options)
    block = Block(d_model, mixer, mlp, norm, fused_add_norm, residual_in_fp32)
    block.layer_idx = layer_idx  # type: ignore[assignment]
    return block


def _init_weights(
    module: nn.Module, n_layer: int, initializer_range: float = 0.02, rescale_prenorm_residual: bool = True,
    n_residuals_per_layer: int = 1,
) -> None:  # fmt: skip
    """Zero biases, small embeddings, and output projections shrunk by the root of the number of residual branches."""
    if isinstance(module, nn.Linear):
        if module.bias is not None and not getattr(module.bias, "_no_reinit", False):
            nn.init.zeros_(module.bias)
    elif isinstance(module, nn.Embedding):
        nn.init.normal_(module.weight, std=initializer_range)
    if rescale_prenorm_residual:
        for name, parameter in module.named_parameters():
            if name in ("out_proj.weight", "fc2.weight"):
                nn.init.kaiming_uniform_(parameter, a=math.sqrt(5))
                with torch.no_grad():
                    parameter.div_(math.sqrt(n_residuals_per_layer * n_layer))


class MixerModel(nn.Module):
    """Embedding, blocks and the last norm: tokens (B, L) to (B, L, D)."""

    def __init__(
        self, d_model: int, n_layer: int, d_intermediate: int, vocab_size: int, ssm_cfg: dict[str, Any] | None = None,
        attn_layer_idx: list[int] | None = None, attn_cfg: dict[str, Any] | None = None, norm_epsilon: float = 1e-5,
        rms_norm: bool = False, initializer_cfg: dict[str, Any] | None = None, fused_add_norm: bool = False,
        residual_in_fp32: bool = False, device=None, dtype=None,
    ):  # fmt: skip
        super().__init__()
        self.residual_in_fp32, self.fused_add_norm = residual_in_fp32, fused_add_norm
        options: dict[str, Any] = {"device": device, "dtype": dtype}
        self.embedding = nn.Embedding(vocab_size, d_model, **options)
        self.layers = nn.ModuleList(
            create_block(
                d_model, d_intermediate, ssm_cfg, attn_layer_idx, attn_cfg, norm_epsilon, rms_norm, residual_in_fp32,
                fused_add_norm, i, **options,
            )
            for i in range(n_layer)
        )  # fmt: skip
        norm: Any = RMSNorm if rms_norm else nn.LayerNorm
        self.norm_f = norm(d_model, eps=norm_epsilon, **options)
        branches = 2 if d_intermediate else 1
        self.apply(partial(_init_weights, n_layer=n_layer, n_residuals_per_layer=branches, **(initializer_cfg or {})))

    def allocate_inference_cache(self, batch_size: int, max_seqlen: int, dtype=None, **options: Any) -> dict[int, Any]:
        return {
            i: layer.allocate_inference_cache(batch_size, max_seqlen, dtype=dtype, **options)  # type: ignore[operator]
            for i, layer in enumerate(self.layers)
        }

    def forward(self, input_ids: Tensor, inference_params=None, **mixer_kwargs: Any) -> Tensor:
        hidden_states, residual = self.embedding(input_ids), None
        for layer in self.layers:
            hidden_states, residual = layer(hidden_states, residual, inference_params, **mixer_kwargs)
        return add_norm(self, self.norm_f, hidden_states, residual)[0]


class MambaLMHeadModel(nn.Module, GenerationMixin):
    """A language model: tokens (B, L) to logits (B, L, V), V rounded up to pad_vocab_size_multiple."""

    def __init__(
        self, config: MambaConfig, initializer_cfg: dict[str, Any] | None = None, device=None, dtype=None
    ) -> None:
        super().__init__()
        self.config = config
        multiple = config.pad_vocab_size_multiple
        vocab_size = -(-config.vocab_size // multiple) * multiple
        options: dict[str, Any] = {"device": device, "dtype": dtype}
        self.backbone = MixerModel(
            config.d_model, config.n_layer, config.d_intermediate, vocab_size, config.ssm_cfg, config.attn_layer_idx,
            config.attn_cfg, rms_norm=config.rms_norm, initializer_cfg=initializer_cfg,
            fused_add_norm=config.fused_add_norm, residual_in_fp32=config.residual_in_fp32, **options,
        )  # fmt: skip
        self.lm_head = nn.Linear(config.d_model, vocab_size, bias=False, **options)
        self.apply(partial(_init_weights, n_layer=config.n_layer, **(initializer_cfg or {})))
        self.tie_weights()

    def tie_weights(self) -> None:
        if self.config.tie_embeddings:
            self.lm_head.weight = self.backbone.embedding.weight

    def allocate_inference_cache(self, batch_size: int, max_seqlen: int, dtype=None, **options: Any) -> dict[int, Any]:
        return self.backbone.allocate_inference_cache(batch_size, max_seqlen, dtype=dtype, **options)

    def forward(
        self, input_ids: Tensor, position_ids: Tensor | None = None, inference_params=None, num_last_tokens: int = 0,
        **mixer_kwargs: Any,
    ) -> CausalLMOutput:  # fmt: skip
        """num_last_tokens > 0: logits of so many last positions only. position_ids is not used."""
        hidden_states = self.backbone(input_ids, inference_params=inference_params, **mixer_kwargs)
        if num_last_tokens > 0:
            hidden_states = hidden_states[:, -num_last_tokens:]
        return CausalLMOutput(self.lm_head(hidden_states))

    @classmethod
    def from_pretrained(cls, pretrained_model_name: str, device=None, dtype=None, **kwargs: Any) -> MambaLMHeadModel:
        """From a directory or a hub name, by config.json and model.safetensors (see `utils.hf` for pickled weights)."""
        model = cls(MambaConfig(**load_config_hf(pretrained_model_name)), device=device, dtype=dtype, **kwargs)
        model.load_state_dict(load_state_dict_hf(pretrained_model_name, device=device, dtype=dtype))
        return model

    def save_pretrained(self, save_directory: str) -> None:
        """Write config.json and model.safetensors (the original writes pytorch_model.bin, a pickle)."""
        from safetensors.torch import save_file

        directory = Path(save_directory)
        directory.mkdir(parents=True, exist_ok=True)
        # Tied tensors are written under both names, so that a strict load finds every key.
        tensors = {name: t.detach().clone().contiguous() for name, t in self.state_dict().items()}
        save_file(tensors, str(directory / "model.safetensors"), metadata={"format": "pt"})
        (directory / "config.json").write_text(json.dumps(vars(self.config), indent=4), encoding="utf-8")
