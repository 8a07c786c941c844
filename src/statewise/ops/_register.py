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


def recomputing(
    name: str,
    inputs: str,
    outputs: int,
    module: str,
    fake: Callable,
    *,
    gradients: int | None = None,
    device: str | tuple[str, ...] = "CPU",
) -> Any:
    """An operator that keeps nothing but its inputs for the backward pass, and `<name>_backward` for that.

    Args:
        inputs: as in a schema, two or more tensors first: `"Tensor x, Tensor? bias, int length"`.
        outputs: number of tensors that it returns.
        module: has `forward(*inputs)`, and `backward(*gradients of the outputs, *inputs)`, which gives a gradient for
            each tensor among the inputs, an empty one for a tensor that is absent.
        fake, device: as in `operator`.
        gradients: how many of the tensors have a gradient, the first ones; all of them if None.
    """
    names = inputs.split(", ")
    tensors = sum(name.startswith("Tensor") for name in names)
    wanted = tensors if gradients is None else gradients

    def result(count: int) -> str:
        return "Tensor" if count == 1 else f"({', '.join(['Tensor'] * count)})"

    def fake_backward(*args):
        given = args[outputs : outputs + wanted]
        return tuple(given[0].new_empty(0) if t is None else t.new_empty(t.shape) for t in given)

    slopes = ", ".join(f"Tensor grad_{i}" for i in range(outputs))
    forward = operator(f"{name}({inputs}) -> {result(outputs)}", f"{module}:forward", fake, device=device)
    backward = operator(
        f"{name}_backward({slopes}, {inputs}) -> {result(wanted)}", f"{module}:backward", fake_backward, device=device
    )

    def save(ctx, inputs, output):
        ctx.save_for_backward(*inputs[:tensors])
        ctx.options = inputs[tensors:]
        ctx.set_materialize_grads(True)

    def derive(ctx, *grads):
        given = ctx.saved_tensors
        found = backward(*grads, *given, *ctx.options)
        own = [None if t is None else g for t, g in zip(given[:wanted], found)]
        return *own, *[None] * (len(names) - wanted)

    differentiable(forward, derive, save)
    return forward
