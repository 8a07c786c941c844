"""The only file that talks to torch.library: it turns a kernel into an operator that autograd, torch.compile and
torch.export understand.

Rules: schemas are functional and of fixed arity; the backward pass is an operator of its own; the implementation is
named by a string and imported on the first call, so that `import statewise` imports neither numba nor triton.
"""

from __future__ import annotations

from collections.abc import Callable
from importlib import import_module
from typing import Any

import torch

from ._eager import direct

_library = torch.library.Library("statewise", "FRAGMENT")

# Triton kernels take CPU tensors under Triton's interpreter only: `triton_reason` keeps others away.
TRITON = ("CUDA", "CPU")


def operator(schema: str, implementation: str, fake: Callable, *, device: str | tuple[str, ...] = "CPU") -> Any:
    """Define `statewise::<name>` and return a function that calls it, past torch.library where nobody would notice.

    Args:
        schema: the torch.library schema, e.g. `"twice(Tensor x) -> Tensor"`.
        implementation: `"package.module:function"`, imported on the first call.
        fake: the same signature; returns empty tensors of the right shape, dtype and device.
        device: dispatch key that the kernel serves, or several: TRITON for Triton kernels.
    """
    name = schema.split("(", 1)[0]
    module, function = implementation.split(":")
    loaded: list[Callable] = []

    def run(*args, **kwargs):
        if not loaded:
            loaded.append(getattr(import_module(module), function))
        if not args[0].is_cuda:
            return loaded[0](*args, **kwargs)
        # Triton launches on the current device, whatever device its arguments are on.
        with torch.cuda.device(args[0].device):
            return loaded[0](*args, **kwargs)

    _library.define(schema)
    for key in (device,) if isinstance(device, str) else device:
        _library.impl(name, run, key)
    torch.library.register_fake(f"statewise::{name}", fake, lib=_library)
    registered = getattr(torch.ops.statewise, name).default

    def call(*args):
        return run(*args) if direct(*args) else registered(*args)

    call._schema = registered._schema  # type: ignore[attr-defined]
    return call


def differentiable(op: Any, backward: Callable, save: Callable) -> None:
    """Attach `backward(ctx, *grads)`; `save(ctx, inputs, output)` stores what it needs."""
    torch.library.register_autograd(op._schema.name, backward, setup_context=save, lib=_library)
