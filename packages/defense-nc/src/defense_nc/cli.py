"""The ``defense-nc`` command: scan a classifier with Neural Cleanse, and clean one."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any

from defense_nc.__about__ import __version__
from defense_nc.command import Defence
from defense_nc.config import PRESETS, NCConfig
from wm_inject.command.common import CommandLine

if TYPE_CHECKING:
    from torch import nn

    from defense_nc.verdict import ScanReport

_EPILOG = """\
examples:
  defense-nc scan victim.safetensors --data digits --json scan.json
  defense-nc scan victim.safetensors --data digits --filter filter.onnx
  defense-nc scan --preset robust --print-config > mine.toml
  defense-nc scan victim.safetensors --data digits --config mine.toml
  defense-nc clean victim.safetensors --data digits --label 0 --out cleaned.safetensors

`scan` exits with its verdict: 0 clean, 1 backdoored, 2 inconclusive, 3 not scanned (an error).
`clean` exits with 0 when it wrote a cleaned classifier, and with 1 when it did not.
"""


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command; `scan` returns its verdict's exit code, `clean` 0, or 1 if not cleaned."""
    command = CommandLine(
        "defense-nc",
        __version__,
        description="Look for a backdoor in an image classifier with Neural Cleanse, and clean it.",
        epilog=_EPILOG,
    )
    Defence(
        config=NCConfig,
        presets=tuple(PRESETS),
        detector=_detector,
        reversed_name="trigger",
        recipe="nc",
        invert=_invert,
    ).add_to(command)
    return command.main(argv)


def _detector(config: NCConfig, alpha: float, max_ratio: float) -> Callable[..., ScanReport]:
    from defense_nc.neural_cleanse import NeuralCleanse

    return NeuralCleanse(config, alpha, max_ratio).scan


def _invert(*args: Any, **settings: Any) -> nn.Module:
    from defense_nc.engines.sequential import invert_trigger

    return invert_trigger(*args, **settings)
