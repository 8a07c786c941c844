"""Installing the names, taking them back, and what is said about names that are not there."""

from __future__ import annotations

import importlib.util
import subprocess
import sys
from pathlib import Path

import pytest

import statewise
from statewise.interop import install_shims, uninstall_shims
from statewise.interop.shims._install import ROOTS


@pytest.fixture(autouse=True)
def shims():  # not installed unless a test does it
    uninstall_shims()
    yield
    uninstall_shims()


def test_names_come_and_go():
    assert importlib.util.find_spec("mamba_ssm") is None
    done = install_shims()
    assert done.installed == ROOTS
    assert not done.kept
    assert set(str(done).splitlines()) == {f"{name:<25}  statewise" for name in ROOTS}
    assert importlib.util.find_spec("mamba_ssm") is not None
    import causal_conv1d_cuda  # noqa: F401
    import mamba_ssm
    import mamba_ssm.ops.triton.ssd_combined as combined
    from mamba_ssm.modules import mamba2

    assert mamba_ssm.Mamba2 is mamba2.Mamba2
    assert mamba_ssm.ops.triton.ssd_combined is combined
    assert mamba_ssm is statewise.interop.shims.mamba_ssm, "one module under two names"
    assert mamba_ssm.__spec__.name == "statewise.interop.shims.mamba_ssm"
    done.uninstall()
    assert not any(name.partition(".")[0] in ROOTS for name in sys.modules)
    with pytest.raises(ModuleNotFoundError):
        import mamba_ssm
    done.uninstall()  # twice does no harm


def test_modules_are_the_same_after_another_installation():
    with install_shims():
        from mamba_ssm import Mamba as first
    with install_shims():
        from mamba_ssm import Mamba as second
    assert first is second


@pytest.fixture
def real(tmp_path, monkeypatch):
    """A package of that name that is really installed."""
    (tmp_path / "mamba_ssm").mkdir()
    (tmp_path / "mamba_ssm" / "__init__.py").write_text("real = True")
    monkeypatch.syspath_prepend(str(tmp_path))
    importlib.invalidate_caches()
    yield tmp_path
    sys.modules.pop("mamba_ssm", None)


def test_an_installed_package_is_kept(real):
    with pytest.warns(UserWarning, match=r"mamba_ssm: really installed.*force=True"):
        done = install_shims()
    with done:
        assert done.kept == {"mamba_ssm": str(real / "mamba_ssm" / "__init__.py")}
        assert "mamba_ssm" not in done.installed
        assert "installed, kept:" in str(done)
        import causal_conv1d
        import mamba_ssm

        assert mamba_ssm.real
        assert causal_conv1d.__version__.endswith("statewise")


def test_force_stands_in_and_gives_back(real):
    import mamba_ssm

    theirs = mamba_ssm
    with install_shims(force=True) as done:
        assert not done.kept
        import mamba_ssm

        assert mamba_ssm.__version__.endswith("statewise")
    assert sys.modules["mamba_ssm"] is theirs


@pytest.mark.parametrize(
    ("code", "message"),
    [
        ("from mamba_ssm import Mamba3", r"its mamba_ssm has no Mamba3; it has Mamba, Mamba2, MambaLMHeadModel"),
        ("from mamba_ssm.ops.triton.ssd_combined import nothing", r"no nothing; it has mamba_chunk_scan, "),
        ("import mamba_ssm.ops.tilelang", r"has no mamba_ssm.ops.tilelang; mamba_ssm.ops has selective_scan_int"),
        ("import mamba_ssm.ops.cute.mamba3", r"has no mamba_ssm.ops.cute; "),
        ("from mamba_ssm.ops import cute", r"has no cute; it has selective_scan_interface, triton"),
        ("from selective_scan_cuda import forward", r"its selective_scan_cuda has no forward; it has bwd, fwd"),
    ],
)
def test_what_is_not_there_is_said(code, message):
    with install_shims(), pytest.raises(ImportError, match=message):
        exec(code)


def test_python_looks_for_names_of_its_own():
    with install_shims():
        import mamba_ssm

        assert not hasattr(mamba_ssm, "__wrapped__")


# ---- python -m statewise.shim ----------------------------------------------------------------------------------------


def run(*arguments, cwd=None):
    return subprocess.run(
        [sys.executable, "-m", "statewise.shim", *map(str, arguments)],
        capture_output=True, text=True, check=False, cwd=cwd,
        env={"PYTHONPATH": str(Path(statewise.__file__).parents[1]), "PATH": ""},
    )  # fmt: skip


def test_a_script_runs_as_under_python(tmp_path):
    (tmp_path / "beside.py").write_text("value = 3")
    script = tmp_path / "script.py"
    script.write_text(
        "import sys, beside, torch\nfrom mamba_ssm import Mamba\n"
        "assert __name__ == '__main__' and sys.argv[1:] == ['--width', '8'], sys.argv\n"
        "print(tuple(Mamba(int(sys.argv[2]))(torch.zeros(1, 5, 8)).shape), beside.value)\nsys.exit(7)"
    )
    done = run(script, "--width", "8")
    assert (done.returncode, done.stdout.strip()) == (7, "(1, 5, 8) 3"), done.stderr
    done = run("-m", "script", "--width", "8", cwd=tmp_path)
    assert (done.returncode, done.stdout.strip()) == (7, "(1, 5, 8) 3"), done.stderr


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ([], "want a script to run"),
        (["-m"], "want a module to run"),
        (["--fast", "x.py"], "unknown option --fast"),
        (["nowhere.py"], "nowhere.py: no such file"),
    ],
)
def test_wrong_use(arguments, message):
    from statewise.shim import main

    with pytest.raises(SystemExit, match=message):
        main(arguments)


def test_help(capsys):
    from statewise.shim import main

    main(["--help"])
    assert "python -m statewise.shim" in capsys.readouterr().out
