"""Making foreign names resolve to the modules of this package, and taking it back."""

from __future__ import annotations

import sys
import warnings
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from importlib import import_module
from importlib.abc import Loader, MetaPathFinder
from importlib.machinery import ModuleSpec
from importlib.util import find_spec
from pkgutil import iter_modules
from types import ModuleType

from . import _settings

ROOTS = (
    "mamba_ssm",
    "causal_conv1d",
    "selective_scan_cuda",
    "selective_scan_cuda_core",
    "selective_scan_cuda_oflex",
    "causal_conv1d_cuda",
)


class _Alias(Loader):
    """Puts one module under a second name, instead of running its file twice."""

    def __init__(self, real: str):
        self.real = real

    def create_module(self, spec: ModuleSpec) -> ModuleType:
        module = import_module(self.real)
        self.spec = module.__spec__
        return module

    def exec_module(self, module: ModuleType) -> None:
        module.__spec__ = self.spec  # the import system has put the alias there


class _Finder(MetaPathFinder):
    def __init__(self, roots: Iterable[str]):
        self.roots = frozenset(roots)

    def find_spec(self, fullname: str, path: Sequence[str] | None = None, target: ModuleType | None = None):
        if fullname.partition(".")[0] not in self.roots:
            return None
        real = f"{__package__}.{fullname}"
        try:
            found = find_spec(real)
        except ModuleNotFoundError:  # the parent is a module, not a package
            found = None
        if found is None:
            raise ModuleNotFoundError(_no_module(fullname), name=fullname)
        return ModuleSpec(fullname, _Alias(real), is_package=found.submodule_search_locations is not None)


def _no_module(name: str) -> str:
    parent = name.rpartition(".")[0]
    offered = []
    module = sys.modules.get(parent)
    if module is not None and hasattr(module, "__path__"):
        offered = sorted(m.name for m in iter_modules(module.__path__) if not m.name.startswith("_"))
    there = f"{parent} has {', '.join(offered)}" if offered else f"{parent} has no modules below it"
    return f"Statewise stands in for {name.partition('.')[0]} and has no {name}; {there}"


@dataclass
class Shims:
    """What `install_shims` did; also a context manager that takes it back.

    Attributes:
        installed: names that resolve to Statewise now.
        kept: names of packages that are installed for real and were left alone, with the place where they are.
    """

    installed: tuple[str, ...]
    kept: dict[str, str]

    def uninstall(self) -> None:
        """Same as `uninstall_shims()`."""
        uninstall_shims()

    def __enter__(self) -> Shims:
        return self

    def __exit__(self, *_: object) -> None:
        self.uninstall()

    def __str__(self) -> str:
        width = max(map(len, (*self.installed, *self.kept)), default=0)
        rows = [f"{name:<{width}}  statewise" for name in self.installed]
        rows += [f"{name:<{width}}  installed, kept: {place}" for name, place in self.kept.items()]
        return "\n".join(rows)


_active: tuple[_Finder, dict[str, ModuleType]] | None = None


def install_shims(*, force: bool = False, allow_pickle: bool = False) -> Shims:
    """Make `mamba_ssm`, `causal_conv1d` and their compiled extensions resolve to Statewise, from the next import on.

    Modules that hold a name of theirs already keep it: call this before they are imported. Calling it again starts
    from a clean slate, so it may be called with other options.

    Args:
        force: also stand in for packages that are really installed. Without it they are kept, with a warning.
        allow_pickle: let `from_pretrained` of the stand-ins read pytorch_model.bin, with torch's weights_only=True. By
            default only safetensors files are read.

    Returns:
        What was done; used in a `with` statement it is undone at the end.
    """
    global _active
    uninstall_shims()
    kept = {} if force else _really_installed()
    roots = tuple(root for root in ROOTS if root not in kept)
    finder = _Finder(roots)
    _active = finder, _take_out(roots)
    sys.meta_path.insert(0, finder)
    _settings.allow_pickle = allow_pickle
    if kept:
        names = ", ".join(kept)
        warnings.warn(f"{names}: really installed, so kept; install_shims(force=True) stands in for them", stacklevel=2)
    return Shims(roots, kept)


def uninstall_shims() -> None:
    """Take back `install_shims`; what was imported under the names before comes back. Does nothing if none are."""
    global _active
    if _active is None:
        return
    finder, displaced = _active
    sys.meta_path.remove(finder)
    _take_out(finder.roots)
    sys.modules.update(displaced)
    _settings.allow_pickle = False
    _active = None


def _really_installed() -> dict[str, str]:
    places = {}
    for root in ROOTS:
        try:
            spec = find_spec(root)
        except ValueError:  # in sys.modules without a spec: somebody else's stand-in
            places[root] = "in sys.modules"
            continue
        if spec is not None:
            places[root] = spec.origin or "a namespace package"
    return places


def _take_out(roots: Iterable[str]) -> dict[str, ModuleType]:
    names = [name for name in sys.modules if name.partition(".")[0] in set(roots)]
    return {name: sys.modules.pop(name) for name in names}
