"""Splits are disjoint and whole, and seed 0 is the published one."""

from __future__ import annotations

import numpy as np
import torch

from statewise.data.sets._splits import held_out, stratified


def test_seed_0_holds_out_what_the_s4_code_holds_out():
    parts = torch.utils.data.random_split(range(1000), [900, 100], generator=torch.Generator().manual_seed(42))
    for ours, theirs in zip(held_out(1000, 0.1, 0), parts):
        assert ours.tolist() == sorted(theirs.indices)
    assert held_out(1000, 0.1, 1)[1].tolist() != held_out(1000, 0.1, 0)[1].tolist()


def test_every_label_is_split_in_the_same_shares():
    labels = np.repeat([0, 1, 2], [100, 50, 7])
    parts = stratified(labels, (0.1, 0.2), 3)
    assert np.sort(np.concatenate(parts)).tolist() == list(range(157))
    assert [np.bincount(labels[rows]).tolist() for rows in parts] == [[70, 35, 5], [10, 5, 1], [20, 10, 1]]
    again, other = stratified(labels, (0.1, 0.2), 3), stratified(labels, (0.1, 0.2), 4)
    assert [a.tolist() for a in again] == [p.tolist() for p in parts]
    assert other[2].tolist() != parts[2].tolist()
