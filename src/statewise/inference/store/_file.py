"""One context as one safetensors file, and every check on the way back.

The file holds `tokens` (n,), `logits` (V,), and the leaves of the state as `state.NAME`. Its metadata has one entry,
`statewise.state`: JSON with "body" (format version, fingerprint of the model, key, length, a hash for each tensor) and
"seal", the hash of the body. So damage anywhere is found. It is no protection against forgery: who can write the file
can write the hashes. But whatever it holds, it is data: nothing in it is executed.
"""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Callable, Collection
from dataclasses import asdict, dataclass
from datetime import datetime, timezone
from pathlib import Path
from typing import Any, TypeVar

import torch
from torch import Tensor

from ... import state as states
from ..._files import write_atomically
from ..._version import __version__
from .._reading import Context, compact, device_of, fresh_state
from ._fingerprint import describe, digests, fingerprint

FORMAT = 1
_T = TypeVar("_T")
_META, _STATE = "statewise.state", "state."


class StateError(ValueError):
    """A state cannot be loaded; the message says which file and why. Nothing was loaded."""


class NoState(StateError):
    """The file is not there; another process may have removed it."""


@dataclass(frozen=True)
class Header:
    """What a file says of itself.

    Args:
        format: version of the layout.
        key: 64 hex digits, a hash of the model and of all tokens: equal keys, equal states.
        fingerprint: of the model, see `fingerprint`.
        model: a few words on it.
        length: tokens that the state has read.
        created: time of day in UTC, ISO 8601.
        statewise: version of the library that wrote it.
        digests: SHA-256 of the bytes of each tensor of the file, by its name.
    """

    format: int
    key: str
    fingerprint: str
    model: str
    length: int
    created: str
    statewise: str
    digests: dict[str, str]


def token_bytes(tokens: Tensor) -> memoryview:
    return tokens.contiguous().numpy().astype("<i4", copy=False).data.cast("B")


def key_of(model_fingerprint: str, tokens: Tensor) -> str:
    """The name of a text under a model."""
    start = hashlib.sha256(model_fingerprint.encode())
    start.update(token_bytes(tokens))
    return start.hexdigest()


def prefix_keys(model_fingerprint: str, tokens: Tensor, lengths: Collection[int]) -> dict[int, str]:
    """The key of the first n tokens for each n of `lengths` up to the whole text, in one pass over it."""
    data, done = token_bytes(tokens.to(torch.int32)), 0
    running, keys = hashlib.sha256(model_fingerprint.encode()), {}
    for n in sorted(n for n in lengths if n <= len(tokens)):
        running.update(data[4 * done : 4 * n])
        keys[n], done = running.copy().hexdigest(), n
    return keys


# ---- writing ---------------------------------------------------------------------------------------------------------


def save_context(model: Any, context: Context, path: str | os.PathLike) -> Header:
    """Write what the model has read to one file, atomically: what was there before stays until the new file is whole.

    Raises:
        ValueError: more than one row, or a state that holds NaN or infinity.
    """
    header, tensors = pack(model, context)
    write(header, tensors, Path(path))
    return header


def write(header: Header, tensors: dict[str, Tensor], path: Path) -> None:
    from safetensors.torch import save_file

    body = json.dumps(asdict(header), sort_keys=True)
    metadata = {_META: json.dumps({"body": body, "seal": hashlib.sha256(body.encode()).hexdigest()})}
    path.parent.mkdir(parents=True, exist_ok=True)
    write_atomically(path, lambda temporary: save_file(tensors, temporary, metadata=metadata))


def pack(model: Any, context: Context) -> tuple[Header, dict[str, Tensor]]:
    """Header and tensors of the file of a context."""
    rows = states.batch_size(context.state) if states.leaves(context.state) else 1
    if rows != 1:
        raise ValueError(f"context: want a state of one row, got {rows}; select one")
    if not len(context.tokens):
        raise ValueError("context: want at least one token, got none")
    named = {_STATE + name: t for name, t in states.leaves(compact(context.state))}
    named |= {"tokens": context.tokens.to(torch.int32), "logits": context.logits}
    # Not every version of safetensors has complex numbers: they go as pairs of real ones.
    plain = {name: torch.view_as_real(t.resolve_conj()) if t.is_complex() else t for name, t in named.items()}
    tensors = {name: t.detach().cpu().contiguous() for name, t in plain.items()}
    for name, t in tensors.items():
        if t.is_floating_point() and name != "logits" and not bool(torch.isfinite(t).all()):
            raise ValueError(f"context: {name} holds NaN or infinity, which no text could ever leave again")
    mark = fingerprint(model)
    header = Header(
        FORMAT, key_of(mark, tensors["tokens"]), mark, describe(model), len(context.tokens),
        datetime.now(timezone.utc).isoformat(timespec="seconds"), __version__, digests(tensors),
    )  # fmt: skip
    # Leaves may share memory, which safetensors refuses.
    seen: set[int] = set()
    for name, t in tensors.items():
        place = t.untyped_storage().data_ptr()
        tensors[name] = t.clone() if place in seen or t.untyped_storage().nbytes() != t.nbytes else t
        seen.add(place)
    return header, tensors


# ---- reading ---------------------------------------------------------------------------------------------------------


def read_header(path: str | os.PathLike) -> Header:
    """What a file says of itself; its tensors are not read.

    Raises:
        StateError: no such file, cut short, another kind of file, another format version, or a damaged header.
    """

    def attempt() -> Header:
        with _open(path) as file:
            return _header(path, file)

    return _steady(path, attempt)


class _open:
    """safe_open with errors of ours. It maps the file: a tensor's bytes are read when they are looked at."""

    def __init__(self, path: str | os.PathLike) -> None:
        self._path = path

    def __enter__(self) -> Any:
        from safetensors import SafetensorError, safe_open

        try:
            self._file = safe_open(os.fspath(self._path), "pt")
            return self._file.__enter__()
        except FileNotFoundError as error:
            raise NoState(f"{self._path}: there is no such state file") from error
        except (SafetensorError, OSError, RuntimeError) as error:
            if not os.path.exists(self._path):
                raise NoState(f"{self._path}: is gone") from error
            raise StateError(
                f"{self._path}: is not a whole safetensors file ({error}): it was cut short or is of another format"
            ) from error

    def __exit__(self, *error: Any) -> None:
        self._file.__exit__(*error)


def _header(path: str | os.PathLike, file: Any) -> Header:
    text = (file.metadata() or {}).get(_META)
    if text is None:
        raise StateError(f"{path}: is a safetensors file, but not a state saved with its tokens by statewise")
    try:
        sealed = json.loads(text)
        body = sealed["body"]
        content = json.loads(body)
        version = content["format"]
        if version != FORMAT:
            newer = "a newer version of statewise wrote it" if isinstance(version, int) and version > FORMAT else ""
            raise StateError(f"{path}: want format {FORMAT}, got {version!r}{'; ' if newer else ''}{newer}")
        if hashlib.sha256(body.encode()).hexdigest() != sealed["seal"]:
            raise StateError(f"{path}: the header was changed after it was written")
        header = Header(**content)
    except (KeyError, TypeError, AttributeError, json.JSONDecodeError, RecursionError) as error:
        raise StateError(f"{path}: the header is damaged ({type(error).__name__}: {error})") from error
    names = set(file.keys())
    if names != set(header.digests):
        raise StateError(f"{path}: the tensors are not those of the header: {sorted(names ^ set(header.digests))}")
    return header


def read_tensors(
    path: str | os.PathLike, expect: Callable[[Header], None] | None = None
) -> tuple[Header, dict[str, Tensor]]:
    """Header and tensors, every one checked against its hash. The tensors are views of the mapped file, and private:
    what is written to them does not reach it. `expect` may refuse the header before any tensor is looked at.

    Raises:
        StateError: as `read_header`, or damaged numbers.
    """
    return _steady(path, lambda: _read_tensors(path, expect))


def _steady(path: str | os.PathLike, attempt: Callable[[], _T]) -> _T:
    """`attempt`, and again if it failed while another process removed the file and wrote it once more.

    The library opens a file by its name several times: header and numbers may then be those of two files.
    """
    while True:
        before = _identity(path)
        try:
            return attempt()
        except NoState:
            raise
        except StateError:
            if _identity(path) == before:
                raise


def _identity(path: str | os.PathLike) -> tuple[int, int, int] | None:
    try:
        facts = os.stat(path)
    except FileNotFoundError:
        return None
    return facts.st_ino, facts.st_size, facts.st_mtime_ns


def _read_tensors(path: str | os.PathLike, expect: Callable[[Header], None] | None) -> tuple[Header, dict[str, Tensor]]:
    with _open(path) as file:
        header = _header(path, file)
        if expect is not None:
            expect(header)
        try:
            tensors = {name: file.get_tensor(name) for name in header.digests}
        except (OSError, RuntimeError) as error:
            raise StateError(f"{path}: cannot be mapped: {error}") from error
    for name, digest in digests(tensors).items():
        if digest != header.digests[name]:
            raise StateError(f"{path}: {name} was changed after it was written (its hash is another)")
    tokens = tensors.get("tokens")
    if tokens is None or tokens.dtype != torch.int32 or tokens.shape != (header.length,) or header.length < 1:
        raise StateError(f"{path}: tokens: want int32 ({header.length},), got {_kind(tokens)}")
    if key_of(header.fingerprint, tokens) != header.key:
        raise StateError(f"{path}: the tokens are not those of the key")
    return header, tensors


def _kind(t: Tensor | None) -> str:
    return "nothing" if t is None else f"{t.dtype} {tuple(t.shape)}"


def load_context(model: Any, path: str | os.PathLike) -> Context:
    """Read a file written by `save_context`, for this model. On a CPU the state is mapped, not copied.

    Raises:
        StateError: see `read_tensors`; also the state of another model, and tensors that do not fit this one.
    """
    mark = fingerprint(model)

    def expect(header: Header) -> None:
        if header.fingerprint != mark:
            raise StateError(
                f"{path}: is a state of another model ({header.model}; fingerprint {header.fingerprint[:12]}); "
                f"this one is {describe(model)}; fingerprint {mark[:12]}"
            )

    _, tensors = read_tensors(path, expect)
    logits = tensors.pop("logits", None)
    tokens = tensors.pop("tokens").long()
    size = getattr(model, "vocab_size", None)
    if logits is None or logits.ndim != 1 or (isinstance(size, int) and len(logits) != size):
        raise StateError(f"{path}: logits: want ({size},), got {_kind(logits)}")
    if int(tokens.min()) < 0 or int(tokens.max()) >= len(logits):
        raise StateError(f"{path}: tokens: want numbers from 0 to {len(logits) - 1}, got others")
    like = fresh_state(model, 1)
    want = {_STATE + name: t for name, t in states.leaves(like)}
    _check_leaves(path, tensors, {n: torch.view_as_real(t) if t.is_complex() else t for n, t in want.items()})
    device = device_of(model)
    # A pair may lie at an odd place of the file, where PyTorch does not take it for a complex number: hence the copy.
    parts = iter([_complex(tensors[n]) if t.is_complex() else tensors[n] for n, t in want.items()])
    state = states.map_state(lambda _: next(parts), like)
    return Context(tokens, states.to(state, device), logits.to(device))


def _complex(pairs: Tensor) -> Tensor:
    return torch.view_as_complex(pairs.clone())


def _check_leaves(path: str | os.PathLike, got: dict[str, Tensor], want: dict[str, Tensor]) -> None:
    """Names, dtypes and shapes as in a fresh state; the length of a cache that starts empty is free, but one for all
    leaves of a layer."""
    if got.keys() != want.keys():
        missing, extra = sorted(want.keys() - got.keys()), sorted(got.keys() - want.keys())
        raise StateError(
            f"{path}: not a state of this model: missing {missing or 'none'}, unexpected {extra or 'none'}"
        )
    lengths: dict[str, int] = {}
    for name, t in want.items():
        g, shape = got[name], list(t.shape)
        if t.ndim > 1 and t.shape[1] == 0 and g.ndim == t.ndim:
            shape[1] = lengths.setdefault(name.rpartition(".")[0], g.shape[1])
        if g.dtype != t.dtype or list(g.shape) != shape:
            raise StateError(f"{path}: {name}: want {t.dtype} {tuple(shape)}, got {_kind(g)}")
