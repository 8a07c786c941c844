"""Other libraries, each made to compute what a row computes, from our inputs and with our shapes.

An adapter of an op is `adapter(inputs, mode)`, with mode "forward" or "step": it returns a function without arguments
that gives (y, state), the state None where the library does not return one. Views are all it does to the inputs, so
that nothing but the library's own work is timed. Layouts are turned before, where the library's own model turns them.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import torch

from .. import machine
from ..cases import Missing

Run = Callable[[], tuple[torch.Tensor, Any]]

# Name in the tables -> (distribution, module).
PACKAGES = {
    "transformers": ("transformers", "transformers"),
    "mambapy": ("mambapy", "mambapy"),
    "llama.cpp": ("llama-cpp-python", "llama_cpp"),
    "mamba_ssm": ("mamba-ssm", "mamba_ssm"),
    "causal_conv1d": ("causal-conv1d", "causal_conv1d"),
    "fla": ("flash-linear-attention", "fla"),
}
CPU = ("transformers", "mambapy", "llama.cpp")
GPU = ("transformers", "mamba_ssm", "causal_conv1d", "fla")


@dataclass(frozen=True)
class OpPeer:
    """An adapter and what is known of it.

    Args:
        package: a name of PACKAGES, or "torch".
        adapter: see above.
        modes: "forward" (and with gradients) and "step".
        held: tensors of (B, L, D, N) in float32 that it holds at once, forward and with the gradients.
        device: "cpu", "cuda" or "any".
    """

    package: str
    adapter: Callable[[Mapping[str, Any], str], Run]
    modes: tuple[str, ...] = ("forward",)
    held: tuple[float, float] = (0.0, 0.0)
    device: str = "any"

    @property
    def compiles(self) -> bool:
        return self.device == "cuda"

    def serves(self, mode: str, device: str) -> bool:
        """Whether it has this mode on this device."""
        return self.device in ("any", device) and ("step" if mode == "step" else "forward") in self.modes


def installed(device: str) -> dict[str, str]:
    """Name -> version, or why it cannot take part."""
    found = {"torch": str(torch.__version__)}
    for name in CPU if device == "cpu" else GPU:
        found[name] = machine.version(*PACKAGES[name]) or "not installed"
    return found


def want(package: str) -> None:
    """Raise Missing unless the package is installed."""
    if package != "torch" and machine.version(*PACKAGES[package]) is None:
        raise Missing(f"{package}: not installed")
