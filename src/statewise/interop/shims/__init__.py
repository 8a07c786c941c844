"""Drop-in names: `import mamba_ssm`, `causal_conv1d`, `selective_scan_cuda` and their like resolve to Statewise.

Code that was written for the CUDA packages then runs unmodified on any device:

    import statewise
    statewise.interop.install_shims()
    from mamba_ssm import Mamba2                # is statewise.interop.shims.mamba_ssm.Mamba2

or, without touching the script, `python -m statewise.shim script.py args`.

The modules below this package mirror the layout of the packages they stand for. They are adapters: argument orders,
layouts and state formats of the originals over the ops of `statewise.ops`. Interfaces: mamba_ssm 2.3 (and what older
releases and the fork of Vision Mamba named otherwise), causal-conv1d 1.6 (and the low-level calls since 1.0).
"""

from ._install import Shims, install_shims, uninstall_shims

__all__ = ["Shims", "install_shims", "uninstall_shims"]
