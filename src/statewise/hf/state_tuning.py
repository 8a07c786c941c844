"""State tuning: the weights stay, the state before the first token is learned."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from .. import state as trees
from ..state import State


class InitialState(nn.Module):
    """A learned state for one row, shared by all rows.

    Args:
        template: a state tree of one row, e.g. `model.init_state(1)`. Its floating and complex leaves become
            parameters and begin with its values; caches that hold nothing yet, counters and flags are not learned.
    """

    def __init__(self, template: State):
        super().__init__()
        for name, leaf in trees.leaves(template):
            if leaf.shape[0] != 1:
                raise ValueError(f"template: want a state of one row, got {leaf.shape[0]} rows in {name}")
            if leaf.numel() and (leaf.is_floating_point() or leaf.is_complex()):
                # Optimisers and files know real numbers better than complex ones.
                start = torch.view_as_real(leaf) if leaf.is_complex() else leaf
                self.register_parameter(_key(name), nn.Parameter(start.detach().clone()))

    def forward(self, template: State, batch: int = 1) -> State:
        """The state tree for `batch` rows; what is not learned comes from `template` (of one row)."""
        names = iter([_key(name) for name, _ in trees.leaves(template)])

        def leaf(t: Tensor) -> Tensor:
            learned = self._parameters.get(next(names))
            if learned is not None:
                t = torch.view_as_complex(learned) if t.is_complex() else learned
            # A state is consumed by the call it is given to, a parameter must not be.
            return t.expand(batch, *t.shape[1:]).clone()

        return trees.map_state(leaf, template)


def _key(name: str) -> str:
    # A parameter's name may not hold a dot.
    return name.replace(".", "-")
