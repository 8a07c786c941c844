"""Formats of the published image sets: IDX (MNIST), and CIFAR-10 as bytes or as pickles that cannot run anything."""

from __future__ import annotations

import io
import pickle
import struct
from pathlib import Path
from typing import Any

import numpy as np

from ._files import content

_CIFAR_ROW = 3 * 32 * 32


# ---- IDX -----------------------------------------------------------------------------------------------------------


def idx(data: bytes, where: str, dimensions: int) -> np.ndarray:
    """The array of unsigned bytes in an IDX file.

    Args:
        data: the file: 0 0 8 d, d big-endian sizes, values.
        where: the file's name, for errors.
        dimensions: d; 3 for pictures, 1 for labels.

    Raises:
        ValueError: not such a file, or not as long as its header says.
    """
    magic = bytes([0, 0, 8, dimensions])
    if data[:4] != magic:
        raise ValueError(
            f"{where}: not an IDX file of {dimensions} dimensions: starts with {data[:4]!r}, want {magic!r}"
        )
    head = 4 + 4 * dimensions
    if len(data) < head:
        raise ValueError(f"{where}: cut short in its header; get it again")
    shape = struct.unpack(f">{dimensions}I", data[4:head])
    expected = head + int(np.prod([int(size) for size in shape], dtype=object))
    if len(data) != expected:
        raise ValueError(f"{where}: {len(data)} bytes, but its header says {expected}; get it again")
    return np.frombuffer(data, np.uint8, offset=head).reshape(shape)


def idx_pair(images: tuple[str, bytes], labels: tuple[str, bytes]) -> tuple[np.ndarray, np.ndarray]:
    """Pictures (n, height, width) and labels (n,) of two IDX files, each given as its name and its content.

    Raises:
        ValueError: as `idx`, they do not belong together, or a label is not 0 to 9.
    """
    x, y = idx(images[1], images[0], 3), idx(labels[1], labels[0], 1)
    if len(x) != len(y):
        raise ValueError(f"{labels[0]}: {len(y)} labels for the {len(x)} pictures of {images[0]}")
    if len(y) and y.max() > 9:
        raise ValueError(f"{labels[0]}: label {y.max()}; want 0 to 9")
    return x, y.astype(np.int64)


# ---- CIFAR-10 ------------------------------------------------------------------------------------------------------


def cifar_folder(root: Path) -> dict[str, tuple[np.ndarray, np.ndarray]]:
    """The train and test part of CIFAR-10: pictures (n, 1024, 3) uint8, row by row, and labels (n,).

    Args:
        root: folder cifar-10-batches-bin or cifar-10-batches-py, or the folder that holds one.

    Raises:
        ValueError: neither is there, or a file in it is not what it should be.
    """
    readers = {
        "cifar-10-batches-bin": ("data_batch_{}.bin", "test_batch.bin", _cifar_binary),
        "cifar-10-batches-py": ("data_batch_{}", "test_batch", _cifar_pickle),
    }
    for name, (train, test, reader) in readers.items():
        for place in (root, root / name):
            if (place / test).is_file():
                batches = [reader(place / train.format(i)) for i in range(1, 6)]
                x, y = (np.concatenate(part) for part in zip(*batches))
                return {"train": (x, y), "test": reader(place / test)}
    raise ValueError(f"{root}: has no CIFAR-10; want the folder cifar-10-batches-bin or cifar-10-batches-py in it")


def _cifar_pictures(path: Path, planes: np.ndarray, labels: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """(n, 3072) planes R, G, B -> (n, 1024, 3)."""
    if len(labels) and not 0 <= labels.min() <= labels.max() <= 9:
        raise ValueError(f"{path}: labels {labels.min()} to {labels.max()}; want 0 to 9")
    pictures = planes.reshape(-1, 3, 1024).transpose(0, 2, 1)
    return np.ascontiguousarray(pictures), labels.astype(np.int64)


def _cifar_binary(path: Path) -> tuple[np.ndarray, np.ndarray]:
    """Rows of one label byte and 3,072 bytes of a picture."""
    data = content(path)
    if not data or len(data) % (_CIFAR_ROW + 1):
        raise ValueError(f"{path}: {len(data)} bytes; want a multiple of {_CIFAR_ROW + 1}. Get it again")
    rows = np.frombuffer(data, np.uint8).reshape(-1, _CIFAR_ROW + 1)
    return _cifar_pictures(path, rows[:, 1:], rows[:, 0])


def _cifar_pickle(path: Path) -> tuple[np.ndarray, np.ndarray]:
    try:
        batch = _Arrays(io.BytesIO(content(path)), encoding="bytes").load()
    # A pickle can fail in any way that the types it builds can.
    except Exception as error:
        raise ValueError(f"{path}: not a CIFAR-10 batch: {error}; get it again, or use cifar-10-batches-bin") from error
    planes, labels = (batch.get(key) for key in (b"data", b"labels")) if isinstance(batch, dict) else (None, None)
    planes = getattr(planes, "array", None)
    if planes is None or planes.ndim != 2 or planes.shape[1] != _CIFAR_ROW:
        raise ValueError(f"{path}: not a CIFAR-10 batch; want data, an array of bytes (n, {_CIFAR_ROW})")
    if not isinstance(labels, list) or not all(type(label) is int for label in labels) or len(labels) != len(planes):
        raise ValueError(f"{path}: not a CIFAR-10 batch; want labels, a list of {len(planes)} integers")
    return _cifar_pictures(path, planes, np.array(labels, np.int64))


class _Array:
    """Stands for an array of bytes while a pickle is read: its state is the raw bytes and must agree with its shape."""

    __slots__ = ("array",)

    def __setstate__(self, state: Any) -> None:
        _, shape, dtype, fortran, raw = state
        if type(dtype) is not _Dtype or type(raw) is not bytes:
            raise pickle.UnpicklingError("an array that is not of bytes")
        self.array = np.frombuffer(raw, np.uint8).reshape(shape, order="F" if fortran else "C")


class _Dtype:
    """Stands for numpy's type of an unsigned byte; its state (order of bytes, size) says nothing that matters here."""

    __slots__ = ()

    def __setstate__(self, state: Any) -> None:
        pass


class _Call:
    """What a pickle may call in place of the function that it names. Without attributes, so it can change nothing."""

    __slots__ = ()


class _Reconstruct(_Call):
    __slots__ = ()

    def __call__(self, *_: Any) -> _Array:
        return _Array()


class _MakeDtype(_Call):
    __slots__ = ()

    def __call__(self, code: Any, *_: Any) -> _Dtype:
        if code not in ("u1", b"u1"):
            raise pickle.UnpicklingError(f"an array of {code!r}, want u1")
        return _Dtype()


class _Encode(_Call):
    """Bytes in a pickle of protocol 2 that Python 3 wrote."""

    __slots__ = ()

    def __call__(self, text: Any, encoding: Any) -> bytes:
        if type(text) is not str or encoding != "latin1":
            raise pickle.UnpicklingError("text in an encoding that is not latin1")
        return text.encode("latin1")


_ALLOWED: dict[tuple[str, str], Any] = {
    ("numpy", "ndarray"): "ndarray",
    ("numpy", "dtype"): _MakeDtype(),
    ("numpy.core.multiarray", "_reconstruct"): _Reconstruct(),
    ("numpy._core.multiarray", "_reconstruct"): _Reconstruct(),
    ("_codecs", "encode"): _Encode(),
}


class _Arrays(pickle.Unpickler):
    """Reads dictionaries, lists, text, numbers and arrays of bytes. Every name that a pickle asks for leads to a
    stand-in of this file or is an error, so that nothing outside this file is ever called.
    """

    def find_class(self, module: str, name: str) -> Any:
        if (module, name) not in _ALLOWED:
            raise pickle.UnpicklingError(f"it asks for {module}.{name}, which is not run")
        return _ALLOWED[module, name]
