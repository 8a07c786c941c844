"""The plain forms of the operators are as right as their definitions, whatever the length and the decay."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from statewise import ops, segments
from statewise.interop.export import _portable
from statewise.testing import assert_no_worse
from statewise.testing.tolerance import double

# Chunks are summed in another order than steps, and chunks of chunks once more.
FACTOR = 4.0
CASES = [
    (name, variant)
    for name in ("selective_scan", "ssd", "short_conv", "linear_scan", "diagonal_ssm")
    for variant in ops.OPS[name].load_cases().VARIANTS
    # These have no kernel, so no program holds an operator for them.
    if (name, variant) != ("selective_scan", "complex")
]


class Plain(TorchDispatchMode):
    """Every operator of Statewise runs as its plain form; counts how many did."""

    def __init__(self) -> None:
        super().__init__()
        self.table, self.count = _portable.table(), 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        if func in self.table:
            self.count += 1
            return self.table[func](*args, **(kwargs or {}))
        return func(*args, **(kwargs or {}))


def run(name: str, inputs: dict[str, Any], state: Any) -> Any:
    if name != "diagonal_ssm":
        return ops.OPS[name].run(**inputs, state=state)
    from statewise.ops.lti import _whole  # the operator is what compilers see

    given = {"D": None, "conjugate": True, "state": state, "position": None, "valid": None, "algorithm": None, **inputs}
    order = ("u", "log_a", "b", "c", "D", "state", "position", "valid", "conjugate", "algorithm")
    return _whole(*(given[name] for name in order))


@pytest.mark.parametrize("decay", ["slow", "mixed", "fast"])
@pytest.mark.parametrize(("name", "variant"), CASES)
def test_forms(name, variant, decay):
    spec = ops.OPS[name]
    generator = torch.Generator().manual_seed(0)
    for length in (1, 2, 5, 16, 17, 33, 70):
        inputs = spec.load_cases().sample(variant, 2, length, dtype=torch.float32, decay=decay, generator=generator)
        wide = {k: double(v) if isinstance(v, torch.Tensor) else v for k, v in inputs.items()}
        with torch.no_grad():
            start = spec.reference(**inputs)[1] if length % 2 else None
            truth = spec.reference(**wide, state=None if start is None else double(start))
            plain = spec.reference(**inputs, state=start)
            with Plain() as mode:
                got = run(name, inputs, start)
        # One token has short ways of its own, in PyTorch.
        assert mode.count == 1 or length == 1
        for part, g, p, t in zip(("y", "state"), got, plain, truth):
            assert_no_worse(g, p, t, FACTOR, f"{name} {variant} {decay} L={length} {part}")


def test_norms_and_steps():
    x, z, w = torch.randn(3, 4, 8), torch.randn(3, 4, 8), torch.randn(8)
    for gate in (None, z):
        got = _portable.rms_norm(x, gate, w, 1e-5, 2)
        call = (x, w) if gate is None else (x, gate, w)
        norm = ops.norm.rms_norm if gate is None else ops.norm.gated_rms_norm
        plain = norm(*call, groups=2, backend="reference")
        truth = norm(*map(double, call), groups=2, backend="reference")
        assert_no_worse(got, plain, truth, FACTOR, "rms_norm")
    for name in ("selective_scan", "ssd"):
        spec, generator = ops.OPS[name], torch.Generator().manual_seed(1)
        inputs = spec.load_cases().sample("groups", 2, 1, dtype=torch.float32, decay="mixed", generator=generator)
        start = spec.reference(**inputs)[1]
        wide = {k: double(v) for k, v in inputs.items()}
        with torch.no_grad(), Plain() as mode:
            got = spec.run(**inputs, state=start)
        assert mode.count == 1
        plain, truth = spec.reference(**inputs, state=start), spec.reference(**wide, state=double(start))
        for g, p, t in zip(got, plain, truth):
            assert_no_worse(g, p, t, FACTOR, f"{name}: a step")


@pytest.mark.parametrize("causal", [True, False])
def test_attend(causal):
    q, k, v = torch.randn(2, 4, 7, 8), torch.randn(2, 2, 7, 8), torch.randn(2, 2, 7, 8)
    mask = None if causal else torch.rand(2, 1, 7, 7) > 0.5
    if mask is not None:
        mask = mask | torch.eye(7, dtype=torch.bool)
    sdpa = torch.nn.functional.scaled_dot_product_attention
    want = [sdpa(*map(t, (q, k, v)), mask, 0.0, causal, enable_gqa=True) for t in (lambda x: x, double)]
    got = _portable.attend(q, k, v, mask, 0.0, causal, enable_gqa=True)
    assert_no_worse(got, want[0], want[1], FACTOR, "attend")


def test_packed_rows_are_refused():
    x, weight = torch.randn(1, 5, 3), torch.randn(3, 4)
    with Plain(), pytest.raises(ValueError, match="without packing"):
        ops.short_conv(x, weight, seg=segments.Segments.pack([[2, 3]]))
