"""The direction of imports, and what `import statewise` may cost."""

from __future__ import annotations

import ast
import subprocess
import sys
import textwrap
from collections.abc import Iterator
from pathlib import Path

import pytest

import statewise

ROOT = Path(statewise.__file__).parent

# From the ground up. A package may import what stands on a lower floor, and itself. Two packages of one floor may know
# each other in one direction only.
FLOORS: tuple[tuple[str, ...], ...] = (
    ("_files", "_names", "_words", "_tracing", "_version"),
    ("maths", "segments", "state"),
    ("ops",),
    ("mixers",),
    ("blocks",),
    ("models",),
    ("tasks", "data"),
    ("training", "inference"),
    ("recipes", "benchmarks"),
    ("cli", "shim"),
    ("__main__",),
)
# These act on what is built from outside: they may import all floors below the recipes, and only the commands and
# recipes may import them.
OUTSIDE = ("testing", "interop", "hf", "analysis", "quant", "distributed")
LEVEL = {name: level for level, names in enumerate(FLOORS) for name in names}
TOP = LEVEL["recipes"]

# Libraries that only some users need, or that take long to load.
LAZY = (
    "numba",
    "llvmlite",
    "triton",
    "transformers",
    "peft",
    "lm_eval",
    "lightning",
    "matplotlib",
    "jsonargparse",
    "rich",
    "torchmetrics",
)


def modules() -> list[Path]:
    return sorted(p for p in ROOT.rglob("*.py") if "__pycache__" not in p.parts)


def name_of(path: Path, root: Path) -> tuple[str, ...]:
    parts = path.relative_to(root).with_suffix("").parts
    return parts[:-1] if parts[-1] == "__init__" else parts


def imported(tree: ast.AST, path: Path, root: Path) -> Iterator[tuple[str, ...]]:
    """What of statewise a file imports, anywhere in it, as paths below the package: ("ops", "ssd")."""
    package = name_of(path, root) if path.name == "__init__.py" else name_of(path, root)[:-1]
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            for alias in node.names:
                first, *rest = alias.name.split(".")
                if first == "statewise":
                    yield tuple(rest)
        elif isinstance(node, ast.ImportFrom):
            if node.level:
                base = package[: len(package) - node.level + 1] + tuple(
                    (node.module or "").split(".") if node.module else ()
                )
            else:
                first, *rest = (node.module or "").split(".")
                if first != "statewise":
                    continue
                base = tuple(rest)
            for alias in node.names:
                yield (*base, alias.name)


def problems(root: Path) -> list[str]:
    """Every import that goes the wrong way, as a line of text."""
    found, sideways = [], {}
    for path in sorted(root.rglob("*.py")):
        mine = name_of(path, root)
        if not mine:
            continue  # the front door, statewise/__init__.py, offers names from every floor
        for target in imported(ast.parse(path.read_text()), path, root):
            if not target or target[0] == mine[0] or target[0].startswith("__"):
                wrong = None if target else "imports the front door"
            elif target[0] not in LEVEL and target[0] not in OUTSIDE:
                wrong = f"imports {target[0]!r} from the front door (or a package that has no floor)"
            elif target[0] in OUTSIDE:
                wrong = None if mine[0] in OUTSIDE or LEVEL[mine[0]] >= TOP else "stands below what acts from outside"
            elif mine[0] in OUTSIDE:
                wrong = None if LEVEL[target[0]] < TOP else "acts from outside on what is below the recipes"
            elif mine[0] not in LEVEL:
                wrong = "has no floor"
            elif LEVEL[target[0]] > LEVEL[mine[0]]:
                wrong = "stands on a lower floor"
            else:
                wrong = None
                if LEVEL[target[0]] == LEVEL[mine[0]]:
                    sideways.setdefault((mine[0], target[0]), path)
            if wrong:
                found.append(f"{path.relative_to(root)} imports {'.'.join(target)}: {wrong}")
            if _architecture(mine) and _architecture(target) and target[:3] != mine[:3]:
                found.append(f"{path.relative_to(root)} imports another architecture, {'.'.join(target)}")
    for (a, b), path in sideways.items():
        if (b, a) in sideways:
            found.append(f"{path.relative_to(root)}: {a} and {b} import each other")
    return found


def _architecture(name: tuple[str, ...]) -> bool:
    """models/<domain>/<file>: one architecture a file; a leading underscore marks what they share."""
    return len(name) > 2 and name[0] == "models" and not any(part.startswith("_") for part in name[1:3])


def test_arrows_go_one_way():
    assert not problems(ROOT), "\n".join(problems(ROOT))


@pytest.mark.parametrize(
    ("file", "line", "message"),
    [
        ("ops/x.py", "from ..mixers import base", "lower floor"),
        ("ops/x.py", "def f():\n    import statewise.models.language", "lower floor"),
        ("mixers/x.py", "from statewise.testing import check_mixer", "from outside"),
        ("segments.py", "from .ops import ssd", "lower floor"),
        ("testing/x.py", "from ..recipes import language", "below the recipes"),
        ("models/vision/vim.py", "from ..language.stack import LanguageModel", "another architecture"),
        ("mixers/x.py", "import statewise", "front door"),
        ("mixers/x.py", "from .. import create_model", "front door"),
        ("new/x.py", "from ..ops import ssd", "no floor"),
    ],
)
def test_a_wrong_import_is_found(tmp_path, file, line, message):
    path = tmp_path / file
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(line)
    assert message in "".join(problems(tmp_path))


def test_two_packages_of_a_floor_cannot_import_each_other(tmp_path):
    for here, there in (("tasks", "data"), ("data", "tasks")):
        (tmp_path / here).mkdir()
        (tmp_path / here / "x.py").write_text(f"from ..{there} import y")
        assert bool(problems(tmp_path)) == (here == "data")


def test_kernel_libraries_are_imported_in_kernel_files_only():
    for path in modules():
        tree = ast.parse(path.read_text())
        for node in tree.body:
            names = [a.name for a in node.names] if isinstance(node, ast.Import) else []
            names += [node.module or ""] if isinstance(node, ast.ImportFrom) and not node.level else []
            for name in names:
                library = name.split(".")[0]
                if library in ("numba", "llvmlite"):
                    assert path.name.endswith("numba.py") or path.name == "_simd.py", (
                        f"{path} imports {library} at its top"
                    )
                if library == "triton":
                    assert path.name.endswith("triton.py"), f"{path} imports {library} at its top"


def python(code: str) -> str:
    done = subprocess.run(
        [sys.executable, "-c", textwrap.dedent(code)], capture_output=True, text=True, timeout=300, check=False
    )
    assert done.returncode == 0, done.stderr
    return done.stdout


def test_import_is_lean():
    loaded = python(f"""
        import torch, sys
        before = set(sys.modules)
        import statewise, statewise.ops, statewise.mixers, statewise.models
        new = {{name.split(".")[0] for name in set(sys.modules) - before}}
        print(*sorted(new & set({LAZY!r})))
        print(torch.cuda.is_initialized())
    """).splitlines()
    assert loaded == ["", "False"]


def test_import_costs_less_than_torch():
    torch, own = python("""
        import time
        start = time.perf_counter()
        import torch
        middle = time.perf_counter()
        import statewise
        print(middle - start, time.perf_counter() - middle)
    """).split()
    assert float(own) < float(torch)
