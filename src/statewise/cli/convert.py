"""`statewise convert SOURCE TARGET --to FORMAT`: a checkpoint in another format."""

from __future__ import annotations

import sys
from collections.abc import Callable
from contextlib import nullcontext
from typing import Any, Literal

from .errors import UserError, user_errors
from .options import Options

# Below this, writing takes no longer than looking at a progress bar.
_LARGE = 200 * 10**6  # bytes


def convert(
    source: str,
    target: str,
    to: Literal["statewise", "transformers", "mamba_ssm"] = "statewise",
    family: str | None = None,
    dtype: Literal["float32", "bfloat16", "float16"] | None = None,
    overwrite: bool = False,
    unsafe_pickle: bool = False,
    write_pickle: bool = False,
    max_shard_gb: float = 5.0,
) -> int:
    """Write a checkpoint in another format, to the bit.

    Args:
        source: a folder with a checkpoint, or a name owner/name on the Hugging Face Hub
        target: folder to write
        to: format to write
        family: family of transformers to write; that of the source, or the first that can say the model, if not given
        dtype: of the written weights; as stored if not given
        overwrite: replace a checkpoint in the target folder
        unsafe_pickle: read pytorch_model.bin if there are no safetensors; only for files that you trust
        write_pickle: with --to mamba_ssm, write pytorch_model.bin, the only file that mamba_ssm itself reads
        max_shard_gb: write more than this in several files
    """
    import torch

    from ..interop import checkpoints

    with user_errors(), _progress() as progress:
        done = checkpoints.convert(
            source,
            target,
            to=to,
            family=family,
            dtype=None if dtype is None else getattr(torch, dtype),
            overwrite=overwrite,
            unsafe_pickle=unsafe_pickle,
            write_pickle=write_pickle,
            max_shard=_bytes(max_shard_gb),
            progress=progress,
        )
    print(f"{done.directory}: {done.family}, {done.parameters:,} parameters, {done.nbytes / 1e6:,.1f} MB")
    return 0


def _bytes(gigabytes: float) -> int:
    if not 0 < gigabytes < 1e6:
        raise UserError(f"--max-shard-gb: want a number above 0, got {gigabytes}")
    return max(1, int(gigabytes * 1e9))


def _progress() -> Any:
    """A context that gives a function of bytes written and bytes in all."""
    if not sys.stderr.isatty():
        return nullcontext(lambda done, total: None)
    return _Bar()


class _Bar:
    """A progress bar that appears when there is much to write."""

    def __enter__(self) -> Callable[[int, int], None]:
        from rich.console import Console
        from rich.progress import BarColumn, DownloadColumn, Progress, TimeRemainingColumn, TransferSpeedColumn

        columns = (BarColumn(), DownloadColumn(), TransferSpeedColumn(), TimeRemainingColumn())
        self._bar = Progress(*columns, console=Console(stderr=True), transient=True)
        self._task: Any = None
        return self._show

    def _show(self, done: int, total: int) -> None:
        if total < _LARGE:
            return
        if self._task is None:
            self._bar.start()
            self._task = self._bar.add_task("", total=total)
        self._bar.update(self._task, completed=done)

    def __exit__(self, *_: Any) -> None:
        self._bar.stop()


def main(argv: list[str]) -> int:
    options = Options("convert", convert, positional=["source", "target"])
    if "--help" in argv or "-h" in argv:
        print(options.help())
        return 0
    given = options.parse(argv)
    if not any(word == "--to" or word.startswith("--to=") for word in argv):
        raise UserError("--to is missing: want statewise, transformers or mamba_ssm")
    return convert(**given)
