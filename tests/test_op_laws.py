"""Every law of every op, on every device that is there."""

from __future__ import annotations

import pytest
import torch

from statewise.ops import OPS
from statewise.testing import op_laws

DEVICES = {"cpu": None, "cuda": None if torch.cuda.is_available() else "no CUDA device on this machine"}


def _all():
    for device, missing in DEVICES.items():
        for name, spec in OPS.items():
            if missing:
                skip = pytest.mark.skip(reason=f"the laws of an op: {missing}")
                yield pytest.param(None, id=f"{name}-{device}", marks=skip)
            else:
                for law in op_laws(spec, device=device):
                    yield pytest.param(law, id=f"{name}-{device}-{law.name}")


@pytest.mark.parametrize("law", list(_all()))
def test_law(law):
    law.check()


def _with_kernels():
    for name, spec in OPS.items():
        if any(law.name.startswith("registration") for law in op_laws(spec)):
            yield name


@pytest.mark.usefixtures("split_small")
@pytest.mark.parametrize("name", list(_with_kernels()))
def test_definition_with_two_threads(name):
    laws = [law for law in op_laws(OPS[name]) if law.name.startswith("definition") and ",B3," in law.name]
    threads = torch.get_num_threads()
    torch.set_num_threads(2)
    try:
        for law in laws[:12]:
            law.check()
    finally:
        torch.set_num_threads(threads)
