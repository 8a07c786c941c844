"""Plain definitions to compare the drop-in names with, written from the formulas, and how they are compared.

Everything keeps its dtype, so the same definition gives the float64 truth and what honest float32 arithmetic gives.
"""

from __future__ import annotations

import torch
from torch.nn.functional import silu, softplus

from statewise.testing import assert_no_worse
from statewise.testing.tolerance import disturbed

FACTOR = 4.0  # the largest of the ops' own factors


def randn(*shape, seed=0, **options):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed + sum(shape)), **options)


def cast(value, dtype):
    if not isinstance(value, torch.Tensor) or not (value.is_floating_point() or value.is_complex()):
        return value
    return value.detach().clone().to(dtype.to_complex() if value.is_complex() else dtype)


def check(fn, plain, inputs: dict, what: str) -> None:
    """`fn(**inputs)` against `plain(**inputs)`: all outputs, and the gradients of all floating inputs through them."""
    truth, honest = run(plain, inputs, torch.float64), run(plain, inputs, torch.float32)
    generator = torch.Generator().manual_seed(0)
    near = {n: off(cast(t, torch.float64), generator) for n, t in inputs.items()}
    rounded, ours = run(plain, near, torch.float64), run(fn, inputs, torch.float32)
    assert truth.keys() == ours.keys()
    for name, want in truth.items():
        assert_no_worse(ours[name], honest[name], want, FACTOR, f"{what}: {name}", rounded=rounded[name])


def off(value, generator):
    """Each number off by one rounding of float32."""
    if not isinstance(value, torch.Tensor):
        return value
    if value.is_complex():
        return torch.complex(disturbed(value.real, generator), disturbed(value.imag, generator))
    return disturbed(value, generator)


def assert_near(got: torch.Tensor, want: torch.Tensor, what: str) -> None:
    """A float32 result is the float64 truth up to a relative error of 1e-5."""
    error = (got.detach() - want.detach()).abs().max() / want.abs().max()
    assert got.shape == want.shape
    assert error <= 1e-5, f"{what}: relative error {error:.2g}"


def run(function, inputs: dict, dtype) -> dict[str, torch.Tensor]:
    leaves = {name: cast(value, dtype) for name, value in inputs.items()}
    differentiable = {
        n: t for n, t in leaves.items() if isinstance(t, torch.Tensor) and (t.is_floating_point() or t.is_complex())
    }
    for t in differentiable.values():
        t.requires_grad_()
    found = function(**leaves)
    found = found if isinstance(found, tuple) else (found,)
    weights = [cast(randn(*y.shape, seed=7), dtype) for y in found]
    total = sum(((y.real + y.imag if y.is_complex() else y) * w).sum() for y, w in zip(found, weights))
    grads = torch.autograd.grad(total, list(differentiable.values()), allow_unused=True)
    results = {f"output {i}": y.detach() for i, y in enumerate(found)}
    return results | {f"gradient of {n}": g for n, g in zip(differentiable, grads) if g is not None}


def selective_scan(u, delta, A, B, C, D=None, z=None, delta_bias=None, delta_softplus=False, return_last_state=False):
    rows, channels, length = u.shape

    def at(t, i):  # (rows or 1, channels or 1, N)
        if t.ndim == 2:
            return t[None]
        if A.is_complex():
            t = torch.view_as_complex(t.unflatten(-1, (-1, 2)).contiguous())
        t = t[:, None] if t.ndim == 3 else t
        return t[..., i].repeat_interleave(channels // t.shape[1], 1) if t.shape[1] > 1 else t[..., i]

    delta = delta if delta_bias is None else delta + delta_bias[:, None]
    delta = softplus(delta) if delta_softplus else delta
    h = torch.zeros(rows, channels, A.shape[1], dtype=A.dtype)
    ys = []
    for i in range(length):
        step = delta[:, :, i, None]
        h = torch.exp(step * A) * h + step * at(B, i) * u[:, :, i, None]
        y = (h * at(C, i)).sum(-1)
        ys.append(2 * y.real if y.is_complex() else y)
    y = torch.stack(ys, -1)
    y = y if D is None else y + D[:, None] * u
    y = y if z is None else y * silu(z)
    return (y, h) if return_last_state else y


def ssd(x, dt, A, B, C, D=None, z=None, dt_bias=None, state=None, dt_softplus=False, dt_limit=None):
    """One document: y (B, L, H, P) and the last state (B, H, P, N)."""
    rows, length, heads, width = x.shape
    dt = dt if dt_bias is None else dt + dt_bias
    dt = softplus(dt) if dt_softplus else dt
    dt = dt if dt_limit is None else dt.clamp(*dt_limit)
    B, C = (t.repeat_interleave(heads // t.shape[2], 2) for t in (B, C))
    h = torch.zeros(rows, heads, width, B.shape[-1], dtype=x.dtype) if state is None else state
    ys = []
    for i in range(length):
        decay = torch.exp(dt[:, i] * A)[..., None, None]
        h = decay * h + (dt[:, i, :, None] * x[:, i])[..., None] * B[:, i, :, None]
        ys.append((h * C[:, i, :, None]).sum(-1))
    y = torch.stack(ys, 1) if ys else torch.zeros_like(x)
    if D is not None:
        y = y + (D[:, None] if D.ndim == 1 else D) * x
    return (y if z is None else y * silu(z)), h


def conv(x, weight, bias=None, initial=None, activation=None):
    """One document: x (B, D, L) to y and the last K - 1 inputs."""
    width = weight.shape[1]
    before = torch.zeros(*x.shape[:2], width - 1, dtype=x.dtype) if initial is None else initial
    padded = torch.cat([before, x], -1)
    y = sum(weight[:, k, None] * padded[..., k : k + x.shape[-1]] for k in range(width))
    y = y if bias is None else y + bias[:, None]
    return (silu(y) if activation else y), padded[..., padded.shape[-1] - width + 1 :]


def rms(x, weight, bias=None, z=None, eps=1e-6, group_size=None, norm_before_gate=True):
    x = x * silu(z) if z is not None and not norm_before_gate else x
    y = x.unflatten(-1, (-1, group_size or x.shape[-1]))
    y = (y / torch.sqrt(y.square().mean(-1, keepdim=True) + eps)).flatten(-2) * weight
    y = y if bias is None else y + bias
    return y * silu(z) if z is not None and norm_before_gate else y
