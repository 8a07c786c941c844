"""Runs in processes of their own, several at a time, with their progress."""

from __future__ import annotations

import contextlib
import os
import signal
import subprocess
import threading
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from textwrap import shorten
from typing import Any, BinaryIO

from rich.console import Console
from rich.markup import escape
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TaskID, TextColumn, TimeRemainingColumn

from ..._files import NO_LOCKS
from ...training.directory import RunDirectory
from .plan import Job
from .state import DIVERGED, FINISHED, last_row, read_json, state_of

LOG, LOCK = "log.txt", ".lock"
_PAUSE = 0.2  # seconds between two looks at the processes


class Stopped(Exception):
    """Ended by a signal, in order: every run has saved its state."""

    def __init__(self, number: int) -> None:
        super().__init__(number)
        self.signal = number


class Lock:
    """Held by whoever works in a directory, its runs included: they inherit it, and so it lasts until the last ends.

    Raises:
        ValueError: somebody else works there.
    """

    def __init__(self, out: Path) -> None:
        self.file = open(out / LOCK, "wb")  # noqa: SIM115
        try:
            import fcntl
        except ImportError:
            return  # Windows: nobody is kept out
        try:
            fcntl.flock(self.file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError as error:
            if error.errno in NO_LOCKS:
                return  # nobody is kept out here either
            self.file.close()
            raise ValueError(f"{out}: another `statewise compare` is at work there; wait until it has ended") from None

    def close(self) -> None:
        self.file.close()

    def remove(self) -> None:
        """Take the file away, and the directory if there is nothing else in it."""
        path = Path(self.file.name)
        path.unlink(missing_ok=True)
        with contextlib.suppress(OSError):
            path.parent.rmdir()


class _Process:
    """A run under way."""

    def __init__(self, job: Job, command: Sequence[str], threads: int, lock: BinaryIO | None) -> None:
        self.job = job
        job.path.mkdir(parents=True, exist_ok=True)
        run = RunDirectory(job.path)
        if run.config.is_file():
            _check_same(run, job)
        else:
            config = dict(job.config)
            run.write_config(config.pop("recipe"), config, "A run of a comparison")
        environment = {**os.environ, "OMP_NUM_THREADS": str(threads)}
        with open(job.path / LOG, "ab") as log:
            # A session of its own: Ctrl-C in a terminal goes to us, and we tell the runs. Standard input is a pipe that
            # nothing is written to; it closes when we end, however we end.
            self.popen = subprocess.Popen(
                [*command, str(job.path)],
                stdin=subprocess.PIPE,
                stdout=log,
                stderr=subprocess.STDOUT,
                env=environment,
                start_new_session=True,
                pass_fds=[lock.fileno()] if lock is not None and os.name == "posix" else [],
            )

    def complaint(self) -> str:
        """The last line of the log, without the name of the program."""
        lines = (self.job.path / LOG).read_text(encoding="utf-8", errors="replace").strip().split("\n")
        return lines[-1].removeprefix("statewise: error: ").strip()

    def close(self) -> int:
        code = self.popen.wait()
        if self.popen.stdin is not None:
            self.popen.stdin.close()
        return code


def _check_same(run: RunDirectory, job: Job) -> None:
    there = run.read_config()
    for name, value in job.config.items():
        if there.get(name) != value:
            raise ValueError(
                f"{run} was begun with {name} = {there.get(name)!r}, but the comparison wants {value!r}; "
                f"move the directory away, and the run is made again"
            )


class Pool:
    """Runs jobs.

    Args:
        command: a program that takes the directory of a run and trains it.
        jobs: processes at a time. threads: of each.
        headline: the metric that progress is about. show: a value of it, for people.
    """

    def __init__(
        self,
        command: Sequence[str],
        *,
        jobs: int,
        threads: int,
        console: Console,
        headline: str,
        show: Callable[[float], str],
        lock: Lock | None = None,
    ) -> None:
        self.command, self.jobs, self.threads, self.console = tuple(command), jobs, threads, console
        self.headline, self.show, self.lock = headline, show, lock
        self._running: dict[_Process, TaskID] = {}
        self._signal: int | None = None

    def run(
        self,
        title: str,
        jobs: Sequence[Job],
        done: Callable[[Job], bool],
        *,
        alone: bool = False,
        told: Callable[[Job], str] = lambda job: "measured",
    ) -> dict[str, str]:
        """Do the jobs that are not done; returns {name: why} of those that ended otherwise than done or diverged.

        Args:
            alone: one at a time, because their time is what is wanted.
            told: what is said of a job that is done but is no finished run.

        Raises:
            Stopped: by Ctrl-C or SIGTERM, after all runs have saved their states. A second signal ends them at once.
        """
        waiting = [job for job in jobs if not done(job)]
        if not waiting:
            return {}
        failed: dict[str, str] = {}
        before = self._catch()
        with self._progress() as progress:
            whole = progress.add_task(f"[bold]{title}", total=len(jobs), completed=len(jobs) - len(waiting), value="")
            try:
                while self._running or (waiting and self._signal is None):
                    while waiting and len(self._running) < (1 if alone else self.jobs) and self._signal is None:
                        self._start(waiting.pop(0), progress)
                    time.sleep(_PAUSE)
                    for process in list(self._running):
                        if process.popen.poll() is None:
                            self._look(process, progress)
                        else:
                            self._ended(process, done, told, failed, progress)
                            progress.advance(whole)
            finally:
                self._kill()
                for number, handler in before.items():
                    signal.signal(number, handler)
        if self._signal is not None:
            raise Stopped(self._signal)
        return failed

    # ---- processes -------------------------------------------------------------------------------------------------

    def _start(self, job: Job, progress: Progress) -> None:
        process = _Process(job, self.command, self.threads, self.lock.file if self.lock else None)
        total = int(job.config["steps"]) if job.kind != "speed" else None
        self._running[process] = progress.add_task(escape(job.name), total=total, value="starting")

    def _look(self, process: _Process, progress: Progress) -> None:
        row = last_row(RunDirectory(process.job.path).metrics)
        if row:
            value = row.get(f"val_{self.headline}") or row.get(self.headline)
            shown = self.show(float(value)) if value else ""
            progress.update(self._running[process], completed=int(row.get("step", 0)), value=shown)

    def _ended(
        self,
        process: _Process,
        done: Callable[[Job], bool],
        told: Callable[[Job], str],
        failed: dict[str, str],
        progress: Progress,
    ) -> None:
        code, job = process.close(), process.job
        progress.remove_task(self._running.pop(process))
        if self._signal is not None and code:
            return
        state, message = state_of(job.path)
        row = last_row(RunDirectory(job.path).metrics)
        if state == DIVERGED:
            self._say(f"[yellow]{escape(job.name)}: diverged[/] ({escape(shorten(message, 90))})")
        elif state == FINISHED:
            name = f"val_{self.headline}"
            # A recipe that keeps the weights of its best validation writes which one that was.
            value = read_json(RunDirectory(job.path).results).get(name, row.get(name))
            told_of = "done" if value is None else f"validation {self.show(float(value))}"
            self._say(f"{escape(job.name)}: {told_of} in {float(row.get('seconds', 0)):,.0f} s")
        elif code == 0 and done(job):
            self._say(f"{escape(job.name)}: {told(job)}")
        else:
            why = process.complaint() if code > 0 else f"killed by signal {-code}; was there too little memory?"
            why = "ended before a step was measured" if code == 0 else why
            failed[job.name] = f"{why} (see {job.path / LOG})"
            self._say(f"[red]{escape(job.name)}: failed[/] {escape(failed[job.name])}")

    def _kill(self) -> None:
        """Only when something of ours went wrong is there still a process here."""
        for process in list(self._running):
            process.popen.terminate()
            process.close()
        self._running.clear()

    # ---- signals ---------------------------------------------------------------------------------------------------

    def _catch(self) -> dict[int, Any]:
        if threading.current_thread() is not threading.main_thread():
            return {}
        return {number: signal.signal(number, self._caught) for number in (signal.SIGINT, signal.SIGTERM)}

    def _caught(self, number: int, _: Any) -> None:
        again = self._signal is not None
        self._signal = number
        for process in self._running:
            # A run that gets SIGTERM ends after the step under way, with a checkpoint.
            (process.popen.kill if again else process.popen.terminate)()

    # ---- what is shown ---------------------------------------------------------------------------------------------

    def _progress(self) -> Progress:
        return Progress(
            TextColumn("{task.description}"),
            BarColumn(bar_width=None),
            MofNCompleteColumn(),
            TextColumn("{task.fields[value]}"),
            TimeRemainingColumn(compact=True),
            console=self.console,
            expand=True,
            disable=not self.console.is_terminal,
            transient=True,
        )

    def _say(self, text: str) -> None:
        self.console.print(text, highlight=False, soft_wrap=True)
