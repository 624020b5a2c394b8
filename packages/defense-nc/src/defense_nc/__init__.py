"""Neural Cleanse: trigger inversion, anomaly index, calibrated verdicts, unlearning."""

from defense_nc.__about__ import __version__ as __version__
