import sys
from pathlib import Path

import pytest

import statewise

sys.path.insert(0, str(Path(__file__).parent))  # for shim_definitions, which the tests here share


@pytest.fixture(autouse=True)
def shims():
    with statewise.interop.install_shims():
        yield
