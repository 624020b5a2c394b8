"""Reverse-engineered backdoor generators: find and remove dynamic, invisible triggers."""

from defense_reverse.__about__ import __version__ as __version__
from defense_reverse.generator import UNetGenerator
from defense_reverse.mitigate import mitigate
from defense_reverse.reverse import pretrain, reverse_engineer
from defense_reverse.scan import detection_case, scan
from defense_reverse.search import LambdaSearch, ReverseConfig
from defense_reverse.trigger import ReversedTrigger, load_reversed, save_reversed

__all__ = [
    "LambdaSearch",
    "ReverseConfig",
    "ReversedTrigger",
    "UNetGenerator",
    "__version__",
    "detection_case",
    "load_reversed",
    "mitigate",
    "pretrain",
    "reverse_engineer",
    "save_reversed",
    "scan",
]
