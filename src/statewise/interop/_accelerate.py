"""Statewise's ops under the models of an installed transformers, put there and taken away again."""

from __future__ import annotations

import inspect
import re
from collections.abc import Callable
from dataclasses import dataclass, field
from functools import cache
from importlib import import_module
from pathlib import Path
from types import ModuleType
from typing import Any

# transformers marks the functions that a faster implementation may replace with this decorator.
_MARKED = re.compile(r"^@use_kernel_func_from_hub_with_fallback\([^)]*\)\s*\ndef (\w+)", re.MULTILINE)

# What stands for an op where a fused function is switched off, and the functions around it are replaced instead.
PARTS = "its parts"


@dataclass(frozen=True)
class Replacement:
    """One function of one modeling file.

    Attributes:
        family: name of the model family, e.g. "mamba2".
        function: name in its modeling file, of a function or of the class of a norm.
        op: the op of Statewise that runs now, or "its parts" where a fused function is switched off so that the
            functions around it are used; None if the function was not replaced.
        why: why not, otherwise empty.
    """

    family: str
    function: str
    op: str | None
    why: str = ""


@dataclass(frozen=True)
class _Patch:
    owner: Any  # a module, or a class
    name: str
    original: Callable[..., Any]
    ours: Callable[..., Any]


@dataclass
class Acceleration:
    """What one call of `accelerate` did. Printed, it is a table; in a `with` statement it is undone at the end."""

    replacements: tuple[Replacement, ...]
    _patches: list[_Patch] = field(default_factory=list, repr=False)

    @property
    def families(self) -> tuple[str, ...]:
        """The families in which something was replaced."""
        return tuple(dict.fromkeys(r.family for r in self.replacements if r.op))

    def undo(self) -> None:
        """Put the very objects back that were there before."""
        for patch in self._patches:
            # Whoever replaced our function after us keeps what they put there.
            if getattr(patch.owner, patch.name) is patch.ours:
                setattr(patch.owner, patch.name, patch.original)
            if patch in _active:
                _active.remove(patch)
        self._patches.clear()

    def __enter__(self) -> Acceleration:
        return self

    def __exit__(self, *_: object) -> None:
        self.undo()

    def __str__(self) -> str:
        lines: dict[str, tuple[list[str], list[str]]] = {}
        for r in self.replacements:
            now, left = lines.setdefault(r.family, ([], []))
            if r.op is None:
                left.append(f"{r.function} ({r.why})")
            elif r.op not in (PARTS, *now):
                now.append(r.op)
        width = max(map(len, lines), default=0)
        return "\n".join(
            f"{family:<{width}}  runs on {', '.join(now) or 'nothing new'}"
            + (f"; not replaced: {', '.join(left)}" if left else "")
            for family, (now, left) in lines.items()
        )


_active: list[_Patch] = []


def accelerate(*families: str, quiet: bool = False) -> Acceleration:
    """Run the state space models of an installed transformers on Statewise's ops.

    The functions that transformers itself marks as replaceable are replaced in its modeling files, and so are the norms
    of these files, so models that exist already run on them too. Where Statewise has no fast kernel (another device
    than CPU and CUDA, float64), and on CUDA where mamba_ssm or causal-conv1d is installed, a call goes to the function
    that was there. Outputs stay what they are, up to rounding. Packed rows (`seq_idx`), which transformers refuses
    without mamba_ssm, work in the families built on Mamba-2 as far as a model hands them on.

    Args:
        families: names as "mamba2" or "bamba"; all in which there is something to replace if none is given.
        quiet: do not print the table of what was replaced.

    Returns:
        What was done. A second call replaces nothing more and says so.

    Raises:
        ImportError: transformers is not installed, or is a version whose functions are not marked.
        ValueError: a family that is not there or has nothing to replace.
    """
    found = _marked_functions()
    if unknown := [name for name in families if name not in found]:
        raise ValueError(f"accelerate: want families among {', '.join(found)}, got {', '.join(map(repr, unknown))}")
    replacements, patches = [], []
    for family in families or found:
        module = import_module(f"transformers.models.{family}.modeling_{family}")
        packs = "mamba2_chunk_scan" in found[family]
        replaced = [_function(family, module, name, packs) for name in found[family]]
        if any(name.startswith("mamba") for name in found[family]):
            replaced += _norms(family, module)
        for row, patch in replaced:
            replacements.append(row)
            if patch is not None:
                patches.append(patch)
    _active.extend(patches)
    done = Acceleration(tuple(replacements), patches)
    if not quiet:
        print(done)
    return done


def decelerate() -> None:
    """Take back all that `accelerate` replaced, in all its calls."""
    Acceleration((), list(_active)).undo()


def _function(family: str, module: ModuleType, name: str, packs: bool) -> tuple[Replacement, _Patch | None]:
    from ._hooks import HOOKS

    current = getattr(module, name, None)
    if name not in HOOKS:
        return Replacement(family, name, None, "no op"), None
    make, op = HOOKS[name]
    if _is_ours(current):
        return Replacement(family, name, op), None
    if current is None or (unknown := _unknown_parameters(make, current)):
        why = "not found" if current is None else f"unknown arguments {', '.join(unknown)}"
        return Replacement(family, name, None, why), None
    ours = make(current, packs)
    setattr(module, name, ours)
    return Replacement(family, name, op), _Patch(module, name, current, ours)


def _norms(family: str, module: ModuleType) -> list[tuple[Replacement, _Patch | None]]:
    from . import _norms

    found: list[tuple[Replacement, _Patch | None]] = []
    for norm in _norms.classes(module):
        name, current = norm.__name__, norm.forward
        if _is_ours(current):
            found.append((Replacement(family, name, _norms.op(norm)), None))
        elif (ours := _norms.replacement(norm)) is None:
            found.append((Replacement(family, name, None, "unknown form"), None))
        else:
            norm.forward = ours
            found.append((Replacement(family, name, _norms.op(norm)), _Patch(norm, "forward", current, ours)))
    return found


def _is_ours(function: Any) -> bool:
    return any(patch.ours is function for patch in _active)


def _unknown_parameters(make: Callable[..., Any], current: Callable[..., Any]) -> list[str]:
    """Arguments of the function that is there which its replacement does not have."""
    known = inspect.signature(make(current, False), follow_wrapped=False).parameters
    if any(p.kind is p.VAR_POSITIONAL for p in known.values()):
        return []
    theirs = inspect.signature(current).parameters
    ignored = {"use_mambapy", "use_associative_scan"}  # which of transformers' own ways to compute the same
    return [n for n, p in theirs.items() if p.kind is not p.VAR_KEYWORD and n not in known and n not in ignored]


@cache
def _marked_functions() -> dict[str, list[str]]:
    """Model family: the functions that its modeling file marks as replaceable. Files are read, not imported."""
    try:
        import transformers
    except ImportError:
        raise ImportError("accelerate: transformers is not installed: pip install statewise[hf]") from None
    models = Path(transformers.__file__).parent / "models"
    found = {}
    for path in sorted(models.glob("*/modeling_*.py")):
        family = path.parent.name
        if path.stem != f"modeling_{family}":
            continue
        names = _MARKED.findall(path.read_text(encoding="utf-8"))
        if names:
            found[family] = names
    if not found:
        raise ImportError(
            f"accelerate: transformers {transformers.__version__} marks no functions that could be replaced; 5.24 does"
        )
    return found
