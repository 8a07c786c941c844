"""The only file that talks to torch.library: it turns a kernel into an operator that autograd, torch.compile and
torch.export understand.

Rules: schemas are functional and of fixed arity; the backward pass is an operator of its own; the implementation is
named by a string and imported on the first call, so that `import statewise` imports neither numba nor triton.
"""

from __future__ import annotations

from collections.abc import Callable
from importlib import import_module
from itertools import zip_longest
from typing import Any

import torch
from torch import Tensor

from . import _deterministic
from ._eager import direct
from ._precision import no_autocast

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


def twice_differentiable(backward: Any, outputs: int, definition: Callable, inputs: Callable = lambda *given: given):
    """Let gradients that an operator computes be differentiated again, any number of times, in plain PyTorch.

    The operator computes g, the gradient of <definition(inputs), slopes>; what is asked for is that of <g, seconds>.

    Args:
        backward: `(slopes of the outputs..., *given) -> gradients of the first tensors given`, an operator.
        outputs: how many slopes it takes.
        definition: what was differentiated, in plain PyTorch: `(*inputs)` -> that many outputs, or the one.
        inputs: `(*given) -> inputs` where the operator is given something else in the place of an input.
    """

    def save(ctx, inputs, output):
        ctx.save_for_backward(*(t if isinstance(t, Tensor) else None for t in inputs))
        ctx.others = [None if isinstance(t, Tensor) else t for t in inputs]
        ctx.set_materialize_grads(False)

    def derive(ctx, *seconds):
        if _deterministic.active():
            raise _deterministic.NotDeterministic(
                f"{backward._schema.name}: further derivatives are made in plain PyTorch, in no fixed order"
            )
        again = torch.is_grad_enabled()
        with torch.enable_grad(), no_autocast(ctx.saved_tensors[0]):
            given = [
                other if t is None else _apart(t, wanted)
                for t, other, wanted in zip(ctx.saved_tensors, ctx.others, ctx.needs_input_grad)
            ]
            slopes, rest = given[:outputs], given[outputs:]
            # Once more, as one input may be made from another that is given.
            asked = [s is not None for s in seconds]
            arguments = [_apart(t, True) if wanted else t for t, wanted in zip_longest(inputs(*rest), asked)]
            made = definition(*arguments)
            made = [(y, g) for y, g in zip((made,) if outputs == 1 else made, slopes) if y.requires_grad]
            firsts = _gradients([y for y, _ in made], arguments, [g for _, g in made], create_graph=True)
            pairs = [(g, s) for g, s in zip(firsts, seconds) if s is not None and g is not None and g.requires_grad]
            return _gradients([g for g, _ in pairs], given, [s for _, s in pairs], create_graph=again)

    torch.library.register_autograd(backward._schema.name, derive, setup_context=save, lib=_library)


def _apart(t: Tensor, wanted: bool) -> Tensor:
    """`t` in a graph of its own, into which what it was made from does not reach; with a gradient there if `wanted`."""
    if not wanted or not (t.is_floating_point() or t.is_complex()):
        return t.detach()
    return t.view_as(t) if t.requires_grad else t.detach().requires_grad_()


def _gradients(
    of: list[Tensor], wanted: list, slopes: list[Tensor], *, create_graph: bool
) -> tuple[Tensor | None, ...]:
    """torch.autograd.grad, with None for what has no gradient and for what is not a tensor."""
    live = [isinstance(t, Tensor) and t.requires_grad for t in wanted]
    leaves = [t for t, here in zip(wanted, live) if here]
    found = torch.autograd.grad(of, leaves, slopes, create_graph=create_graph, allow_unused=True) if of else ()
    rest = iter(found)
    return tuple(next(rest, None) if here else None for here in live)


def recomputing(
    name: str,
    inputs: str,
    outputs: int,
    module: str,
    fake: Callable,
    definition: Callable,
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
        definition: the same in plain PyTorch, of which further derivatives are made.
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
    twice_differentiable(backward, outputs, definition)
    return forward


def recomputing_kernels(
    name: str, inputs: str, outputs: int, module: str, fake: Callable, definition: Callable, **options: Any
) -> tuple[Any, Any]:
    """`recomputing` for CPU and GPU: `name` and `module` have "{}" where the back-end stands, "numba" or "triton"."""
    cpu, gpu = (
        recomputing(
            name.format(backend), inputs, outputs, module.format(backend), fake, definition, device=device, **options
        )
        for backend, device in (("numba", "CPU"), ("triton", TRITON))
    )
    return cpu, gpu
