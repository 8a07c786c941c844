"""What one writes in plain PyTorch without a library."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch.nn.functional import conv1d, silu

from . import Run


def scan_loop(inputs: Mapping[str, Any], mode: str) -> Run:
    """h_t = a_t h_{t-1} + x_t as a Python loop."""
    a, x = inputs["a"], inputs["x"]
    if mode == "step":
        state = inputs["state"]

        def step():
            h = a * state + x
            return h, h

        return step

    def run():
        h, hs = torch.zeros_like(x[:, 0]), []
        for a_t, x_t in zip(a.unbind(1), x.unbind(1)):
            h = a_t * h + x_t
            hs.append(h)
        return torch.stack(hs, 1), h

    return run


def short_conv(inputs: Mapping[str, Any], mode: str) -> Run:
    """`nn.Conv1d` with one group per channel and SiLU, as in the models of transformers and mambapy."""
    x, weight, bias = inputs["x"], inputs["weight"], inputs["bias"]
    taps = weight.shape[1]
    if mode == "step":
        state = inputs["state"]

        def step():
            window = torch.cat([state, x[:, None]], 1)
            y = conv1d(window.transpose(1, 2), weight[:, None], bias, groups=len(weight))
            return silu(y[:, :, 0]), window[:, 1:]

        return step

    def run():
        y = conv1d(x.transpose(1, 2), weight[:, None], bias, padding=taps - 1, groups=len(weight))[..., : x.shape[1]]
        return silu(y).transpose(1, 2), None

    return run


def fft_conv(inputs: Mapping[str, Any], mode: str) -> Run:
    """torch.fft with zeros up to twice the length, as in the published S4 code."""
    u, kernel, skip = inputs["u"], inputs["kernel"], inputs["D"]

    def run():
        length = u.shape[1]
        spectrum = torch.fft.rfft(u.transpose(1, 2), 2 * length) * torch.fft.rfft(kernel, 2 * length)
        y = torch.fft.irfft(spectrum, 2 * length)[..., :length].transpose(1, 2)
        return y + skip * u, None

    return run


def s4d(inputs: Mapping[str, Any], mode: str) -> Run:
    """The published minimal S4D: a Vandermonde matrix (D, N, L), then torch.fft."""
    u, log_a, b, c, skip = (inputs[k] for k in ("u", "log_a", "b", "c", "D"))
    if mode == "step":
        state, a = inputs["state"], log_a.exp()

        def step():
            h = a * state + b * u[..., None]
            return 2 * (h * c).real.sum(-1) + skip * u, h

        return step

    def run():
        powers = torch.exp(log_a[..., None] * torch.arange(u.shape[1], device=u.device))
        kernel = 2 * torch.einsum("dn,dnl->dl", b * c, powers).real
        return fft_conv({"u": u, "kernel": kernel, "D": skip}, mode)()

    return run
