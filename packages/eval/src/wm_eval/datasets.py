"""The images of a study, loaded once in a process for all of its units."""

from __future__ import annotations

from functools import lru_cache

from wm_eval.config import DataConfig
from wm_victim import Dataset, load_dataset


@lru_cache(maxsize=1)
def study_images(images: DataConfig) -> Dataset:
    """The images of a study; a run forgets them first, since files may have changed.

    Raises:
        ValueError: They cannot be loaded.
    """
    return load_dataset(images.name, image_size=images.image_size, limit=images.limit)


__all__ = ["study_images"]
