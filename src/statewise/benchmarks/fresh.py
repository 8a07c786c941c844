"""A process of its own for one contender: `python -m statewise.benchmarks.fresh TASK` prints what it cost as JSON.

TASK is the JSON that `models` makes. Printed are the seconds of the first call, the seconds from the start of the
process to its end, and the bytes held at the peak.
"""

from __future__ import annotations

import json
import sys
import time


def started() -> float:
    """When this process began, on the clock of time.time(); now, where the system does not tell."""
    try:
        with open("/proc/self/stat", encoding="utf-8") as f:
            ticks = float(f.read().rpartition(")")[2].split()[19])
        with open("/proc/uptime", encoding="utf-8") as f:
            up = float(f.read().split()[0])
        import os

        return time.time() - (up - ticks / os.sysconf("SC_CLK_TCK"))
    except (OSError, ValueError, IndexError):
        return time.time()


def main(task: dict) -> dict[str, float]:
    """Build the model, call it once, and say what that cost."""
    began = started()
    import torch

    from . import machine, models
    from .peers import whole

    torch.set_num_threads(task["threads"])
    fields = {k: task[k] for k in ("name", "dtype", "device", "n_layer", "vocab_size")}
    subject = models.Subject(**fields)
    ours = task["who"] == "statewise"
    # Another library needs ours for its sizes only: its own weights are the ones that count.
    model = subject.build(empty=not ours)
    who = whole.Ours(model) if ours else whole.Transformers(model, load=False)
    who.model.to(subject.device, getattr(torch, subject.dtype))
    given = models.tokens(model, 1, task["length"], subject.device)
    start = time.perf_counter()
    if task["mode"] == models.TRAIN:
        who.loss(given).backward()
    else:
        with torch.no_grad():
            who.prefill(given)
    first = time.perf_counter() - start
    return {"first": first, "total": time.time() - began, "peak": machine.peak_memory()}


if __name__ == "__main__":
    print(json.dumps(main(json.loads(sys.argv[1]))))
