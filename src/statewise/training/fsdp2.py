"""Sharded weights (PyTorch's fully_shard) under Lightning, with the same one-file checkpoints as every other run."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from lightning.pytorch.strategies import ModelParallelStrategy
from torch import nn

from .checkpoint_io import load_checkpoint


def shard(model: nn.Module, mesh: Any) -> None:
    """Shard each layer by itself, then what is left, over a one-dimensional device mesh."""
    from torch.distributed.fsdp import fully_shard, register_fsdp_forward_method

    for layer in getattr(model, "layers", ()):
        fully_shard(layer, mesh=mesh)
        if hasattr(layer, "_run"):
            # Models call this body of a block, not the block itself: gathering the weights must hook into it.
            register_fsdp_forward_method(layer, "_run")
    fully_shard(model, mesh=mesh)


class FSDP2(ModelParallelStrategy):
    """All processes form one data-parallel group. Checkpoints are gathered on the first process: they do not depend on
    the number of devices."""

    def __init__(self, world: int) -> None:
        super().__init__(data_parallel_size=world, tensor_parallel_size=1, save_distributed_checkpoint=False)

    def load_checkpoint(self, checkpoint_path: Any, weights_only: bool | None = None) -> dict[str, Any]:
        # Lightning would read the file with torch.load.
        from torch.distributed.checkpoint.state_dict import (
            StateDictOptions,
            set_model_state_dict,
            set_optimizer_state_dict,
        )
        from torch.distributed.fsdp import FullyShardedDataParallel, OptimStateKeyType

        checkpoint = load_checkpoint(self.broadcast(checkpoint_path))
        assert self.model is not None
        options = StateDictOptions(full_state_dict=True)
        set_model_state_dict(self.model, checkpoint["state_dict"], options=options)
        for optimizer, state in zip(self.optimizers, checkpoint["optimizer_states"]):
            by_name = FullyShardedDataParallel.rekey_optim_state_dict(state, OptimStateKeyType.PARAM_NAME, self.model)
            set_optimizer_state_dict(self.model, optimizer, by_name, options=options)
        return checkpoint

    def load_model_state_dict(self, checkpoint: Mapping[str, Any], strict: bool = True) -> None:
        pass  # done in load_checkpoint

    def full_state_dict(self) -> dict[str, torch.Tensor]:
        return self.lightning_module_state_dict()
