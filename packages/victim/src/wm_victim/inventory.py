"""What a data set holds, and what it takes in memory."""

from __future__ import annotations

from typing import Any

import torch

from wm_victim.datasets import Dataset
from wm_victim.image_store import pack

_MIB = 2**20


def inventory(data: Dataset) -> dict[str, Any]:
    """Counts of images and classes, memory and fingerprint of a data set, as plain values.

    ``mib_on_a_gpu`` is of the training images as `ImageStore` packs them.
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
