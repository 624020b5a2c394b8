"""Labelled images as stored: uint8 arrays, their classes, and one way to split and order them."""

from __future__ import annotations

from typing import Any, NamedTuple

import numpy as np

Pixels = np.ndarray[Any, np.dtype[np.uint8]]
Labels = np.ndarray[Any, np.dtype[np.int64]]

# Frames of this track of GTSRB's training set are also among its test images.
LEAKED_CLASS, LEAKED_TRACK = 14, 23


class RawData(NamedTuple):
    """One split: uint8 ``(N, H, W, C)`` and int64 ``(N,)``."""

    pixels: Pixels
    labels: Labels


class RawDataset(NamedTuple):
    """Both splits as stored; ``default_size`` is the side to enlarge to unless told otherwise."""

    name: str
    train: RawData
    test: RawData
    classes: tuple[str, ...]
    train_ids: Labels
    default_size: int | None = None


def stratified_order(labels: Labels, *, seed: int) -> Labels:
    """A seeded order of all positions in which every prefix holds the classes in proportion.

    The j-th of a class's n shuffled images gets the key (j + 1/2) / n; positions are sorted by key.
    """
    generator = np.random.Generator(np.random.PCG64(seed))
    keys = np.empty(len(labels))
    for label in np.unique(labels):
        members = generator.permutation(np.flatnonzero(labels == label))
        keys[members] = (np.arange(len(members)) + 0.5) / len(members)
    return np.argsort(keys, kind="stable").astype(np.int64)


def split_once(
    name: str, data: RawData, classes: tuple[str, ...], first: int, default_size: int | None = None
) -> RawDataset:
    """A fixed stratified split into ``first`` training images and the rest."""
    order = stratified_order(data.labels, seed=0)
    train, test = np.sort(order[:first]), np.sort(order[first:])
    if not len(test):
        raise ValueError(f"expected at least two images in {name}, got {len(data.labels)}")
    return RawDataset(
        name,
        RawData(data.pixels[train], data.labels[train]),
        RawData(data.pixels[test], data.labels[test]),
        classes,
        np.arange(len(train)),
        default_size,
    )
