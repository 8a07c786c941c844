"""The op tests of mamba_ssm and causal-conv1d run against the drop-in names, with only the device changed.

Their code is not part of this project: say where checkouts are by STATEWISE_UPSTREAM_MAMBA and STATEWISE_UPSTREAM_CONV.
STATEWISE_UPSTREAM_EVERY=n runs every n-th of their thousands of cases.
"""

from __future__ import annotations

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

SUITES = {
    "MAMBA": [
        "tests/ops/test_selective_scan.py",
        "tests/ops/triton/test_selective_state_update.py",
        "tests/ops/triton/test_layernorm_gated.py",
        "tests/ops/triton/test_ssd.py",
        "tests/test_generation.py",
    ],
    "CONV": ["tests/test_causal_conv1d.py"],
}


@pytest.mark.slow
@pytest.mark.parametrize(("which", "file"), [(which, file) for which, files in SUITES.items() for file in files])
def test_suite(tmp_path, which, file):
    checkout = os.environ.get(f"STATEWISE_UPSTREAM_{which}")
    if not checkout:
        pytest.skip(f"STATEWISE_UPSTREAM_{which} names no checkout, so {file} of it is not run")
    pytest.importorskip("einops", reason="their tests need einops")
    test = tmp_path / Path(file).name
    test.write_text(on_cpu((Path(checkout) / file).read_text()))
    done = subprocess.run(
        [sys.executable, "-m", "pytest", "-q", "-p", "upstream_plugin", "-p", "no:cacheprovider", "--tb=short", test],
        cwd=tmp_path,
        env={**os.environ, "PYTHONPATH": os.pathsep.join([str(Path(__file__).parent), *sys.path])},
        capture_output=True,
        text=True,
        check=False,
    )
    print(done.stdout[-3000:])
    assert done.returncode == 0, done.stdout[-6000:] + done.stderr[-2000:]
    assert re.search(r"\d+ passed", done.stdout)


def on_cpu(code: str) -> str:
    """The device of a test file changed to CPU."""
    code = re.sub(r"""(["'])cuda\1""", '"cpu"', code)
    code = code.replace("torch.cuda.synchronize()", "pass")
    return code.replace("skipif(not torch.cuda.is_available()", "skipif(False")
