"""Image classifiers to attack and audit: data sets, models, training on poisoned data."""

from typing import TYPE_CHECKING

from wm_inject.core.lazy import lazy_names
from wm_victim.__about__ import __version__ as __version__

if TYPE_CHECKING:
    from wm_victim.datasets import Dataset as Dataset
    from wm_victim.datasets import ImageSet as ImageSet
    from wm_victim.datasets import defender_subset as defender_subset
    from wm_victim.datasets import load_dataset as load_dataset
    from wm_victim.inference import predict as predict
    from wm_victim.metrics import accuracy as accuracy
    from wm_victim.metrics import attack_success as attack_success
    from wm_victim.models import CLASSIFIERS as CLASSIFIERS
    from wm_victim.models import DATASET_STATS as DATASET_STATS
    from wm_victim.models import build_classifier as build_classifier
    from wm_victim.models import load_classifier as load_classifier
    from wm_victim.models import save_classifier as save_classifier
    from wm_victim.train import TrainHistory as TrainHistory
    from wm_victim.train import train_classifier as train_classifier
    from wm_victim.train_config import TrainConfig as TrainConfig
else:
    __getattr__, __dir__, __all__ = lazy_names(__name__)
