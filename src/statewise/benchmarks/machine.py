"""What a measurement was made on: the processor, the threads and the versions."""

from __future__ import annotations

import os
import platform
from importlib import metadata, util

PACKAGES = ("torch", "numba", "numpy", "lightning", "triton", "transformers")


def version(package: str, module: str | None = None) -> str | None:
    """Installed version, or None. Finding a package is enough; importing it would take seconds."""
    if util.find_spec(module or package) is None:
        return None
    try:
        return metadata.version(package)
    except metadata.PackageNotFoundError:
        return "of unknown version"


def versions() -> list[tuple[str, str]]:
    """(package, version or "not installed"), Python and statewise first."""
    from .._version import __version__

    found = [("statewise", __version__), ("Python", f"{platform.python_version()} on {platform.platform()}")]
    return found + [(name, version(name) or "not installed") for name in PACKAGES]


def processor() -> str:
    """The name the maker gave it."""
    try:
        with open("/proc/cpuinfo", encoding="utf-8") as f:
            return next(line.split(":", 1)[1].strip() for line in f if line.startswith("model name"))
    except (OSError, StopIteration):
        return platform.processor() or platform.machine()


def device_name(device: str) -> str:
    """Processor with cores and vector width, or the GPU."""
    import torch

    if device != "cpu":
        return torch.cuda.get_device_name()
    return f"{processor()}, {os.cpu_count()} cores, {torch.backends.cpu.get_cpu_capability()}"


def free_memory(device: str = "cpu") -> float:
    """Bytes that can still be taken; infinity where the system does not tell."""
    if device != "cpu":
        import torch

        return float(torch.cuda.mem_get_info()[0])
    try:
        with open("/proc/meminfo", encoding="utf-8") as f:
            return next(float(line.split()[1]) * 1024 for line in f if line.startswith("MemAvailable"))
    except (OSError, StopIteration):
        return float("inf")


def better_threads(threads: int) -> int | None:
    """How many threads would not have to share cores with other programs; None if `threads` will do.

    Two threads on one core wait for each other at every kernel: they take many times as long as one.
    """
    if not hasattr(os, "getloadavg"):
        return None
    cores, load = os.cpu_count() or 1, os.getloadavg()[0]
    free = max(1, int(cores - load))
    return free if load > cores / 4 and threads > free else None


def _status(field: str) -> int | None:
    """A size of this process, in bytes, as Linux tells it."""
    try:
        with open("/proc/self/status", encoding="utf-8") as f:
            return next(int(line.split()[1]) * 1024 for line in f if line.startswith(f"{field}:"))
    except (OSError, StopIteration):
        return None


def memory() -> int | None:
    """Bytes that this process holds in RAM now; None where the system does not tell."""
    return _status("VmRSS")


def peak_memory() -> int:
    """Most bytes this process has held in RAM."""
    # Not getrusage where it can be helped: on Linux a child begins with the peak of the process that forked it.
    peak = _status("VmHWM")
    if peak is not None:
        return peak
    import resource

    used = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return used if platform.system() == "Darwin" else used * 1024
