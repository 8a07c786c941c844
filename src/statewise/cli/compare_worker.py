"""`python -m statewise.cli.compare_worker RUN_DIR`: one run of a comparison, in a process of its own.

RUN_DIR has a config.yaml. The run begins, or goes on from its newest checkpoint. It ends in order when standard input
is closed, so that nothing is left running when the program that started it is killed.
"""

from __future__ import annotations

import os
import signal
import sys
import threading

from ..recipes.compare.state import write_failure
from ..training.directory import RunDirectory
from . import run
from .errors import Interrupted, UserError


def _end_with_parent() -> None:
    # Not sys.stdin: a thread that waits in its buffer must not be there when the interpreter ends.
    while os.read(0, 1):
        pass
    os.kill(os.getpid(), signal.SIGTERM)


def _is_divergence(error: BaseException | None) -> bool:
    from ..tasks import NonFinite

    while error is not None and not isinstance(error, NonFinite):
        error = error.__cause__
    return error is not None


def main(path: str) -> int:
    threading.Thread(target=_end_with_parent, daemon=True).start()
    directory = RunDirectory(path)
    try:
        return run.go_on(directory, resume=bool(directory.saved_steps()))
    except UserError as error:
        if _is_divergence(error):
            write_failure(path, str(error))
        print(f"statewise: error: {error}", flush=True)
        return 2
    except Interrupted as error:
        print(error, flush=True)
        return error.code


if __name__ == "__main__":
    sys.exit(main(sys.argv[1]))
