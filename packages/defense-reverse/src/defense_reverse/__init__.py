"""Reverse-engineered backdoor generators: one U-Net per label, detection and mitigation of dynamic, invisible triggers."""

from defense_reverse.__about__ import __version__ as __version__
