"""`python -m statewise.shim script.py args`: run a script whose imports of mamba_ssm and its like get Statewise."""

from __future__ import annotations

import runpy
import sys
from pathlib import Path

_USAGE = """usage: python -m statewise.shim [--force] [--allow-pickle] script.py [arguments]
       python -m statewise.shim [--force] [--allow-pickle] -m module [arguments]

Runs a program in which mamba_ssm, causal_conv1d, selective_scan_cuda and their like are Statewise.

  --force         also where these packages are really installed
  --allow-pickle  let from_pretrained of mamba_ssm read pytorch_model.bin (with torch's weights_only=True)"""


def main(arguments: list[str]) -> None:
    """Run what `arguments` name, as `python` itself would.

    Raises:
        SystemExit: with the usage, if there is nothing to run.
    """
    options = {"--force": False, "--allow-pickle": False}
    rest = list(arguments)
    while rest and rest[0] in options:
        options[rest.pop(0)] = True
    if rest and rest[0] in ("-h", "--help"):
        print(_USAGE)
        return
    if rest and rest[0].startswith("-") and rest[0] != "-m":
        raise SystemExit(f"statewise.shim: unknown option {rest[0]}\n{_USAGE}")
    is_module = rest[:1] == ["-m"]
    rest = rest[1:] if is_module else rest
    if not rest:
        raise SystemExit(f"statewise.shim: want a {'module' if is_module else 'script'} to run\n{_USAGE}")
    if not is_module and not Path(rest[0]).exists():
        raise SystemExit(f"statewise.shim: {rest[0]}: no such file")

    from .interop.shims import install_shims

    install_shims(force=options["--force"], allow_pickle=options["--allow-pickle"])
    sys.argv = rest
    if is_module:
        sys.path.insert(0, "")
        runpy.run_module(rest[0], run_name="__main__", alter_sys=True)
    else:
        sys.path.insert(0, str(Path(rest[0]).resolve().parent))
        runpy.run_path(rest[0], run_name="__main__")


if __name__ == "__main__":
    main(sys.argv[1:])
