"""Pictures come out of the published files as they are in them, and a file that is not right is named."""

from __future__ import annotations

import gzip
import os
import pickle
import struct

import numpy as np
import pytest
from PIL import Image

from statewise.data import sets
from statewise.data.labelled import check
from statewise.data.sets._images import cifar_folder, idx
from statewise.data.sets.cifar import grey
from statewise.data.sets.images import bit_reversal


def make(name, source, profile="full", seed=0):
    data = sets.get(name)(profile, seed=seed, source=source, workers=1, progress=lambda done, total: None)
    check(data)
    return data


# ---- MNIST ---------------------------------------------------------------------------------------------------------


def idx_bytes(array: np.ndarray) -> bytes:
    return bytes([0, 0, 8, array.ndim]) + struct.pack(f">{array.ndim}I", *array.shape) + array.tobytes()


def mnist_files(rng: np.random.Generator) -> dict[str, np.ndarray]:
    return {
        f"{part}-{kind}-ubyte": rng.integers(0, high, (n, *size), np.uint8)
        for part, n in (("train", 20), ("t10k", 5))
        for kind, high, size in (("images-idx3", 256, (28, 28)), ("labels-idx1", 10, ()))
    }


@pytest.fixture
def mnist(tmp_path):
    """The four files, of which the training pictures are packed."""
    files = mnist_files(np.random.default_rng(0))
    for name, array in files.items():
        data = idx_bytes(array)
        packed = name.startswith("train-images")
        (tmp_path / (name + ".gz" * packed)).write_bytes(gzip.compress(data) if packed else data)
    return tmp_path, files


@pytest.mark.parametrize("name", ["mnist", "fashion_mnist"])
def test_pictures_of_idx_files(name, mnist):
    folder, files = mnist
    data = make(name, folder)
    assert [len(s) for s in (data.train, data.validation, data.test)] == [18, 2, 5]
    assert (data.length, data.channels, data.n_classes, data.mean, data.std) == (784, 1, 10, 0.0, 255.0)
    np.testing.assert_array_equal(data.test.inputs[..., 0], files["t10k-images-idx3-ubyte"].reshape(5, 784))
    np.testing.assert_array_equal(data.test.labels, files["t10k-labels-idx1-ubyte"])
    seen = np.concatenate([data.train.inputs, data.validation.inputs])[..., 0]
    assert sorted(map(bytes, seen)) == sorted(map(bytes, files["train-images-idx3-ubyte"].reshape(20, 784)))


@pytest.mark.parametrize(
    ("name", "order"),
    [("permuted_mnist", np.random.RandomState(92916).permutation(784)), ("bit_reversed_mnist", bit_reversal(784))],
)
def test_pixels_in_another_order(name, order, mnist):
    plain, data = make("mnist", mnist[0]), make(name, mnist[0])
    np.testing.assert_array_equal(data.train.inputs, plain.train.inputs[:, order])
    np.testing.assert_array_equal(data.test.labels, plain.test.labels)
    assert data.name == name
    assert data.image is None


def test_bit_reversal():
    order = bit_reversal(784)
    assert sorted(order) == list(range(784))
    assert order[:4].tolist() == [0, 512, 256, 768]
    # The order in which a decimation-in-time FFT takes its inputs: even positions first, again and again.
    assert bit_reversal(8).tolist() == [0, 4, 2, 6, 1, 5, 3, 7]
    assert bit_reversal(1).tolist() == [0]


@pytest.mark.parametrize(
    ("file", "change", "message"),
    [
        ("t10k-labels-idx1-ubyte", lambda b: b[:-1], "its header says 13"),
        ("t10k-labels-idx1-ubyte", lambda b: b + b"0", "its header says 13"),
        ("t10k-labels-idx1-ubyte", lambda b: b[:6], "cut short in its header"),
        ("t10k-images-idx3-ubyte", lambda b: b"\0\0\x0d" + b[3:], "not an IDX file of 3 dimensions"),
        ("t10k-images-idx3-ubyte", lambda b: b[:8] + b"\xff" * 8 + b[16:], "its header says"),
        ("t10k-labels-idx1-ubyte", lambda b: idx_bytes(np.zeros(4, np.uint8)), "4 labels for the 5 pictures"),
        ("t10k-labels-idx1-ubyte", lambda b: b[:-1] + b"\x0a", "label 10; want 0 to 9"),
        ("train-images-idx3-ubyte.gz", lambda b: b[:-9], "cannot be read"),
        ("train-images-idx3-ubyte.gz", lambda b: b"text", "cannot be read"),
        ("train-labels-idx1-ubyte", None, "has no train-labels-idx1-ubyte"),
    ],
)
def test_a_broken_file_is_named(file, change, message, mnist):
    path = mnist[0] / file
    path.write_bytes(change(path.read_bytes())) if change else path.unlink()
    with pytest.raises(ValueError, match=message) as error:
        make("mnist", mnist[0])
    assert file.removesuffix(".gz") in str(error.value)


def test_a_source_that_is_no_folder(tmp_path):
    with pytest.raises(ValueError, match="full profile is read from files; give a folder with train-images"):
        make("mnist", None)
    with pytest.raises(ValueError, match="is not a folder"):
        make("cifar", tmp_path / "nothing")
    with pytest.raises(ValueError, match="leave source out"):
        make("digits", tmp_path)


# ---- CIFAR-10 ------------------------------------------------------------------------------------------------------

BATCHES = [*(f"data_batch_{i}" for i in range(1, 6)), "test_batch"]


def cifar_rows() -> dict[str, tuple[np.ndarray, np.ndarray]]:
    rng = np.random.default_rng(1)
    return {name: (rng.integers(0, 256, (4, 3072), np.uint8), rng.integers(0, 10, 4)) for name in BATCHES}


def write_binary(folder):
    place = folder / "cifar-10-batches-bin"
    place.mkdir()
    for name, (planes, labels) in cifar_rows().items():
        (place / f"{name}.bin").write_bytes(np.concatenate([labels[:, None].astype(np.uint8), planes], 1).tobytes())
    return place


def python2_pickle(planes: np.ndarray, labels: np.ndarray) -> bytes:
    """What Python 2 wrote: text is bytes, and numpy's functions have their old names."""
    raw = planes.tobytes()
    return (
        b"\x80\x02}q\x00(U\x04dataq\x01cnumpy.core.multiarray\n_reconstruct\nq\x02cnumpy\nndarray\nq\x03K\x00\x85U\x01b"
        b"\x87R(K\x01K" + bytes([len(planes)]) + b"M\x00\x0c\x86cnumpy\ndtype\nU\x02u1K\x00K\x01\x87R(K\x03U\x01|NNN"
        b"J\xff\xff\xff\xffJ\xff\xff\xff\xffK\x00tb\x89T" + struct.pack("<I", len(raw)) + raw + b"tb"
        b"U\x06labels](" + b"".join(b"K" + bytes([label]) for label in labels) + b"eu."
    )


def write_python(folder, pickled):
    place = folder / "cifar-10-batches-py"
    place.mkdir()
    for name, (planes, labels) in cifar_rows().items():
        (place / name).write_bytes(pickled(planes, labels))
    return place


def modern(protocol, order="C"):
    return lambda planes, labels: pickle.dumps(
        {b"data": np.asarray(planes, order=order), b"labels": [int(i) for i in labels], b"filenames": [b"a.png"]},
        protocol=protocol,
    )


WRITERS = {
    "binary": write_binary,
    "python 2": lambda folder: write_python(folder, python2_pickle),
    "protocol 0": lambda folder: write_python(folder, modern(0)),
    "protocol 2": lambda folder: write_python(folder, modern(2)),
    "protocol 4": lambda folder: write_python(folder, modern(4)),
    "column by column": lambda folder: write_python(folder, modern(2, "F")),
}


@pytest.mark.parametrize("writer", WRITERS)
def test_cifar_in_both_formats(writer, tmp_path):
    place = WRITERS[writer](tmp_path)
    rows = cifar_rows()
    for root in (tmp_path, place):
        parts = cifar_folder(root)
        x, y = parts["test"]
        planes, labels = rows["test_batch"]
        # Row by row, and the three colours of a pixel together.
        expected = planes.reshape(4, 3, 32, 32).transpose(0, 2, 3, 1).reshape(4, 1024, 3)
        np.testing.assert_array_equal(x, expected)
        assert y.tolist() == labels.tolist()
        assert parts["train"][1].tolist() == [i for name in BATCHES[:5] for i in rows[name][1]]


def test_colours_are_standardised_per_channel(tmp_path):
    write_binary(tmp_path)
    data = make("cifar", tmp_path)
    assert [len(s) for s in (data.train, data.validation, data.test)] == [18, 2, 4]
    colours = cifar_folder(tmp_path)["test"][0]
    expected = (colours / 255 - [0.4914, 0.4822, 0.4465]) / [0.247, 0.243, 0.261]
    got = (data.test.inputs - data.mean) / data.std
    # Two roundings of values up to 2.2 and shifts up to 2.
    assert np.abs(got - expected).max() <= 4 * np.finfo(np.float32).eps * 2.2
    assert data.test.inputs.dtype == np.float32


def test_grey_is_what_an_imaging_library_makes(tmp_path):
    write_binary(tmp_path)
    data = make("cifar_grey", tmp_path)
    colours = cifar_folder(tmp_path)["test"][0]
    for ours, picture in zip(data.test.inputs, colours):
        theirs = np.asarray(Image.fromarray(picture.reshape(32, 32, 3)).convert("L"))
        np.testing.assert_array_equal(ours.reshape(32, 32), theirs)
    assert (data.mean, data.std, data.length, data.channels) == (122.6, 61.0, 1024, 1)
    every = np.stack(np.meshgrid(*[np.arange(0, 256, 15, dtype=np.uint8)] * 3), -1).reshape(1, -1, 3)
    np.testing.assert_array_equal(grey(every)[0, :, 0], np.asarray(Image.fromarray(every).convert("L"))[0])


class _Runs:
    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        return os.mkdir, (str(self.path),)


def _global(module: str, name: str, argument: bytes = b")") -> bytes:
    return b"c" + f"{module}\n{name}\n".encode() + argument + b"R."


@pytest.mark.parametrize("protocol", [0, 2, 4, 5])
def test_a_pickle_cannot_run_anything(protocol, tmp_path):
    place = write_python(tmp_path, modern(2))
    marker = tmp_path / "it ran"
    (place / "test_batch").write_bytes(pickle.dumps({b"data": _Runs(marker), b"labels": []}, protocol))
    with pytest.raises(ValueError, match=r"test_batch: not a CIFAR-10 batch: it asks for \w+\.mkdir, which is not run"):
        cifar_folder(tmp_path)
    assert not marker.exists()


@pytest.mark.parametrize(
    "data",
    [
        _global("builtins", "getattr"),
        _global("numpy", "load"),
        _global("numpy._core.multiarray", "fromfile"),
        _global("statewise.data.sets._images", "_Arrays"),
        b"cnumpy\nndarray.tofile\n.",
        b"\x80\x04\x8c\x05numpy\x8c\x0fndarray.__new__\x93.",  # a dotted name
        b"\x82\x01.",  # an extension code
        b"Pkey\n.",  # a persistent id
    ],
)
def test_names_that_a_batch_does_not_need(data, tmp_path):
    place = write_python(tmp_path, modern(2))
    (place / "data_batch_3").write_bytes(data)
    with pytest.raises(ValueError, match="data_batch_3: not a CIFAR-10 batch"):
        cifar_folder(tmp_path)


def test_a_pickle_cannot_change_its_reader(tmp_path):
    """A state for the stand-in of numpy's function would stay for the files that are read later."""
    place = write_python(tmp_path, modern(2))
    for state in (b"}(V__call__\nV1\nub.", b"N}(V__call__\nV1\nu\x86b."):
        (place / "test_batch").write_bytes(b"\x80\x02cnumpy.core.multiarray\n_reconstruct\n" + state)
        with pytest.raises(ValueError, match=r"attribute '__(dict|call)__'"):
            cifar_folder(tmp_path)
    (place / "test_batch").write_bytes(modern(2)(*cifar_rows()["test_batch"]))
    cifar_folder(tmp_path)


@pytest.mark.parametrize(
    ("batch", "message"),
    [
        ([], "want data, an array"),
        ({b"labels": [1]}, "want data, an array"),
        ({b"data": b"text", b"labels": [1]}, "want data, an array"),
        ({b"data": np.zeros((1, 3), np.uint8), b"labels": [1]}, r"an array of bytes \(n, 3072\)"),
        ({b"data": np.zeros((1, 3072), np.float32), b"labels": [1]}, "not a CIFAR-10 batch: an array of 'f4'"),
        ({b"data": np.zeros((1, 3072), np.uint8), b"labels": [1, 2]}, "a list of 1 integers"),
        ({b"data": np.zeros((1, 3072), np.uint8), b"labels": ["1"]}, "a list of 1 integers"),
        ({b"data": np.zeros((1, 3072), np.uint8), b"labels": [10]}, "labels 10 to 10; want 0 to 9"),
    ],
)
def test_a_batch_of_another_shape(batch, message, tmp_path):
    place = write_python(tmp_path, modern(2))
    (place / "test_batch").write_bytes(pickle.dumps(batch, 2))
    with pytest.raises(ValueError, match=message) as error:
        cifar_folder(tmp_path)
    assert "test_batch" in str(error.value)


def test_files_of_cifar_that_are_missing_or_cut_short(tmp_path):
    with pytest.raises(ValueError, match="has no CIFAR-10; want the folder"):
        cifar_folder(tmp_path)
    place = write_binary(tmp_path)
    whole = (place / "data_batch_2.bin").read_bytes()
    (place / "data_batch_2.bin").write_bytes(whole[:-1])
    with pytest.raises(ValueError, match=r"data_batch_2\.bin: 12291 bytes; want a multiple of 3073"):
        cifar_folder(tmp_path)
    (place / "data_batch_2.bin").unlink()
    with pytest.raises(ValueError, match=r"data_batch_2\.bin: there is no such file"):
        cifar_folder(tmp_path)


def test_an_idx_file_of_no_pictures():
    assert idx(idx_bytes(np.zeros((0, 28, 28), np.uint8)), "here", 3).shape == (0, 28, 28)
