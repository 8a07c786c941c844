"""What the mixers of mamba_ssm share: the convolution's parameters, marks on parameters, and the inference cache."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn


def depthwise(channels: int, width: int, bias: bool, **options: Any) -> nn.Conv1d:
    """The module that holds the convolution's parameters; the mixers compute with `statewise.ops.short_conv`."""
    return nn.Conv1d(channels, channels, width, groups=channels, padding=width - 1, bias=bias, **options)


def no_decay(parameter: nn.Parameter) -> nn.Parameter:
    """Mark a parameter as the training scripts of mamba_ssm expect it: no weight decay."""
    parameter._no_weight_decay = True  # type: ignore[attr-defined]
    return parameter


class Cached:
    """Mixin: the two states of a mixer in `inference_params.key_value_memory_dict`, written in place."""

    layer_idx: int | None

    def allocate_inference_cache(self, batch_size: int, max_seqlen: int, dtype=None, **_: Any) -> tuple[Tensor, Tensor]:
        """Zeros for the convolution (B, D, K) and the recurrence."""
        raise NotImplementedError

    def _get_states_from_cache(self, inference_params, batch_size: int, initialize_states: bool = False):
        if self.layer_idx is None:
            raise ValueError(f"{type(self).__name__}: layer_idx: want a number for inference, got None")
        states = inference_params.key_value_memory_dict
        if self.layer_idx not in states:
            states[self.layer_idx] = self.allocate_inference_cache(batch_size, 0)
        elif initialize_states:
            for state in states[self.layer_idx]:
                state.zero_()
        return states[self.layer_idx]


def last_inputs(x: Tensor, width: int) -> Tensor:
    """The last `width` positions of x (B, D, L), with zeros before it where it is shorter."""
    return torch.nn.functional.pad(x, (width - x.shape[-1], 0))
