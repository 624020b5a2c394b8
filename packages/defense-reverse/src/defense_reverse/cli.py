"""The ``defense-reverse`` command: scan a classifier with reversed generators, and clean one."""

from __future__ import annotations

import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from defense_nc.command import Defence
from defense_reverse.__about__ import __version__
from defense_reverse.config import PRESETS, ReverseConfig
from wm_inject.command.common import CommandLine

if TYPE_CHECKING:
    from defense_nc import ScanReport

_EPILOG = """\
examples:
  defense-reverse scan victim.safetensors --data mnist --json scan.json
  defense-reverse scan --preset robust --print-config > mine.toml
  defense-reverse scan victim.safetensors --data mnist --config mine.toml
  defense-reverse clean victim.safetensors --data mnist --out cleaned.safetensors

`scan` exits with its verdict: 0 clean, 1 backdoored, 2 inconclusive, 3 not scanned (an error).
`clean` exits with 0 when it wrote a cleaned classifier, and with 1 when it did not.
"""


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command; `scan` returns its verdict's exit code, `clean` 0, or 1 if not cleaned."""
    command = CommandLine(
        "defense-reverse",
        __version__,
        description="Look for a backdoor with dynamic or invisible triggers in an image "
        "classifier: one reversed generator per label. Clean the label that a scan names.",
        epilog=_EPILOG,
    )
    Defence(
        config=ReverseConfig,
        presets=tuple(PRESETS),
        detector=_detector,
        reversed_name="generator",
        recipe="reverse",
        clean_fraction=0.05,
        save=_save,
    ).add_to(command)
    return command.main(argv)


def _detector(config: ReverseConfig, alpha: float, max_ratio: float) -> Callable[..., ScanReport]:
    from defense_reverse.detector import ReverseGenerator

    return ReverseGenerator(config, alpha, max_ratio).scan


def _save(trigger: Any, path: Path, metadata: dict[str, Any]) -> None:
    from defense_reverse.trigger import save_reversed

    save_reversed(trigger, path, metadata)


if __name__ == "__main__":
    sys.exit(main())
