"""Image classifiers to attack and audit: data sets, models, training on poisoned data."""

from wm_victim.__about__ import __version__
from wm_victim.datasets import Dataset, ImageSet, defender_subset, load_dataset
from wm_victim.models import (
    CLASSIFIERS,
    DATASET_STATS,
    build_classifier,
    load_classifier,
    save_classifier,
)
from wm_victim.train import (
    TrainConfig,
    TrainHistory,
    accuracy,
    attack_success,
    predict,
    train_classifier,
)

__all__ = [
    "CLASSIFIERS",
    "DATASET_STATS",
    "Dataset",
    "ImageSet",
    "TrainConfig",
    "TrainHistory",
    "__version__",
    "accuracy",
    "attack_success",
    "build_classifier",
    "defender_subset",
    "load_classifier",
    "load_dataset",
    "predict",
    "save_classifier",
    "train_classifier",
]
