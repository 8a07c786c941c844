"""`statewise doctor`: versions, the back-end of each op and why, a check of each kernel, and measured speeds."""

from __future__ import annotations

import os
import time
from typing import Any

from .errors import UserError

LENGTH, BATCH = 67, 2  # of the self-check: no multiple of any chunk


def _machine() -> list[tuple[str, str]]:
    import torch

    from ..benchmarks.machine import device_name

    rows = [
        ("processor", device_name("cpu")),
        ("threads", f"{torch.get_num_threads()} (torch.set_num_threads, OMP_NUM_THREADS)"),
    ]
    if torch.cuda.is_available():
        rows += [(f"GPU {i}", torch.cuda.get_device_name(i)) for i in range(torch.cuda.device_count())]
    else:
        rows.append(("GPU", "none that PyTorch sees"))
    forced = os.environ.get("STATEWISE_BACKEND")
    rows.append(("STATEWISE_BACKEND", f"{forced}: every op is forced to it" if forced else "not set: automatic choice"))
    return rows


def measure() -> list[tuple[str, str]]:
    """Memory bandwidth, exponentials and matrix products of the CPU with the threads PyTorch uses."""
    from ..benchmarks import bounds

    return bounds.measure().rows()


def check_op(spec: Any, backend: str) -> tuple[float, float, list[str]]:
    """(seconds of the first call, those of the next, what is wrong) of one op on one back-end, over all variants of its
    cases. The first call may compile.

    Right means: no more than the op's own factor further from a float64 computation than the plain definition is in
    float32.
    """
    import torch

    from ..testing.tolerance import LawError, assert_no_worse, double

    cases = spec.load_cases()
    generator = torch.Generator().manual_seed(0)
    first, second, wrong = float("nan"), float("nan"), []
    for variant in cases.VARIANTS:
        inputs = cases.sample(variant, BATCH, LENGTH, dtype=torch.float32, decay="mixed", generator=generator)
        if spec.reasons(**inputs).get(backend) is not None:
            continue
        exact = {k: double(v) if isinstance(v, torch.Tensor) else v for k, v in inputs.items()}
        with torch.no_grad():
            began = time.perf_counter()
            y, _ = spec.run(**inputs, backend=backend)
            ended = time.perf_counter()
            if first != first:
                spec.run(**inputs, backend=backend)
                first, second = ended - began, time.perf_counter() - ended
        plain, truth = spec.reference(**inputs)[0], spec.reference(**exact)[0]
        try:
            assert_no_worse(y, plain, truth, cases.FACTOR, f"{spec.name} ({variant})")
        except LawError as error:
            wrong.append(str(error))
    return first, second, wrong


def choices(spec: Any) -> list[tuple[str, str, bool]]:
    """(back-end, why it is taken or not, whether it can serve) for an ordinary float32 call, in order of preference."""
    import torch

    from ..ops import _backend

    cases = spec.load_cases()
    generator = torch.Generator().manual_seed(0)
    inputs = cases.sample(cases.VARIANTS[0], 1, 8, dtype=torch.float32, decay="mixed", generator=generator)
    reasons = spec.reasons(**inputs)
    try:
        chosen = _backend.resolve(spec.name, reasons)
    except _backend.BackendError as error:
        chosen = None
        failed = str(error)
    first = next((name for name, reason in reasons.items() if reason is None), None)
    rows = []
    for name, reason in reasons.items():
        if reason is not None:
            rows.append((name, f"cannot serve: {reason}", False))
        elif name == chosen:
            how = "the only one" if len(reasons) == 1 else "the first that can" if name == first else "asked for"
            rows.append((name, f"[bold]chosen[/]: {how}", True))
        else:
            rows.append((name, "able" if chosen else failed, True))
    return rows


def main(argv: list[str]) -> int:
    if "--help" in argv or "-h" in argv:
        print(
            "usage: statewise doctor\n\nWhat this machine offers, which kernels run on it, and whether they are right."
        )
        return 0
    if argv:
        raise UserError(f"doctor: takes no options, got {' '.join(argv)}")
    from rich.console import Console
    from rich.table import Table

    from ..benchmarks.machine import versions
    from ..ops import OPS

    console = Console()

    def facts(title: str, rows: list[tuple[str, str]]) -> None:
        table = Table(
            title=title, title_justify="left", title_style="bold", box=None, show_header=False, pad_edge=False
        )
        table.add_column(no_wrap=True)
        table.add_column(overflow="fold")
        for row in rows:
            table.add_row(*row)
        console.print(table)
        console.print()

    facts("versions", versions())
    facts("machine", _machine())
    failures: list[str] = []
    table = Table(title="ops", title_justify="left", title_style="bold", box=None, pad_edge=False)
    for name in ("op", "back-end", "check", "first call", "second", "why"):
        table.add_column(name, overflow="fold", no_wrap=name in ("op", "back-end"))
    with console.status("Checking kernels (compiled on first use, then kept)"):
        for spec in OPS.values():
            for backend, why, able in choices(spec):
                if not able:
                    table.add_row(spec.name, backend, "", "", "", why)
                    continue
                first, second, wrong = check_op(spec, backend)
                failures += wrong
                verdict = "[bold red]WRONG[/]" if wrong else "right"
                table.add_row(spec.name, backend, verdict, *(f"{1e3 * t:,.1f} ms" for t in (first, second)), why)
    console.print(table)
    console.print()
    with console.status("Measuring"):
        speeds = measure()
    facts("measured now (CPU)", speeds)
    for failure in failures:
        console.print(f"[bold red]wrong:[/] {failure}", highlight=False)
    return 1 if failures else 0
