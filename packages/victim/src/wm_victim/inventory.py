"""What a data set holds, and what it takes in memory."""

from __future__ import annotations

from typing import Any

import torch

from wm_victim.datasets import Dataset
from wm_victim.image_store import pack

_MIB = 2**20


def inventory(data: Dataset) -> dict[str, Any]:
    """Count what is in a data set.

    Args:
        data: Any.

    Returns:
        Plain values: ``name``, ``image_size``, ``channels``, ``classes`` (how many), ``train`` and
        ``test`` (how many images), ``smallest_class`` and ``largest_class`` (training images),
        ``mib_in_memory`` (float32, both sets), ``mib_on_a_gpu`` (the training images as they are
        kept beside a GPU, where half of the free memory must hold them) and ``fingerprint``.
    """
    counts = torch.bincount(data.train.labels, minlength=data.num_classes)
    return {
        "name": data.name,
        "image_size": data.image_size,
        "channels": data.channels,
        "classes": data.num_classes,
        "train": len(data.train),
        "test": len(data.test),
        "smallest_class": int(counts.min()),
        "largest_class": int(counts.max()),
        "mib_in_memory": round((data.train.images.nbytes + data.test.images.nbytes) / _MIB, 1),
        "mib_on_a_gpu": round(pack(data.train.images).nbytes / _MIB, 1),
        "fingerprint": data.fingerprint,
    }
