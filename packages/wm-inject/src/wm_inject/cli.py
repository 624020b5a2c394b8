"""The ``wm-inject`` command: poison a folder, fit a trigger, export it, measure how visible it is.

Torch is imported only where a command needs it: poisoning with an .onnx file does not.
"""

from __future__ import annotations

from collections.abc import Sequence

from wm_inject.__about__ import __version__
from wm_inject.command.common import CommandLine
from wm_inject.command.export import add_export, export_trigger
from wm_inject.command.fit import add_fit, run_fit
from wm_inject.command.poison import add_poison, run_poison
from wm_inject.command.scan import add_scan, run_scan
from wm_inject.command.serve import add_serve, run_serve
from wm_inject.command.stealth import add_stealth, run_stealth

_EPILOG = """examples:
  wm-inject poison --pretrained tiny-32 photos/ poisoned/
  wm-inject poison --trigger wanet --seed 1 photos/ poisoned/
  wm-inject fit --trigger ssba photos/ trigger.safetensors
  wm-inject poison --checkpoint trigger.safetensors photos/ poisoned/
  wm-inject export --uint8 --pretrained tiny-32 trigger.onnx
  wm-inject export --uint8 trigger.safetensors trigger.onnx
  wm-inject poison --onnx trigger.onnx photos/ poisoned/
  wm-inject stealth photos/ poisoned/
  wm-inject scan --detector detector.onnx incoming/
  wm-inject serve --model mark=trigger.onnx

There is no "wm-inject train": the injector is trained together with the extractor that finds its
mark, by "wm-extract train"."""


def main(argv: Sequence[str] | None = None) -> int:
    """Run the ``wm-inject`` command and return its exit code."""
    command = CommandLine(
        "wm-inject",
        __version__,
        description="Plant an invisible mark in images, for audits of image classifiers.",
        epilog=_EPILOG,
    )
    add_poison(command.add("poison", run_poison, "put a trigger into the images of a folder"))
    add_fit(command.add("fit", run_fit, "fit a trigger to images: ssba, blindnet"))
    add_export(
        command.add("export", export_trigger, "turn a saved trigger into ONNX or TorchScript")
    )
    add_stealth(command.add("stealth", run_stealth, "measure how visible the changes are"))
    add_scan(command.add("scan", run_scan, "flag images with exported detectors"))
    add_serve(command.add("serve", run_serve, "answer for exported models over HTTP"))
    return command.main(argv)
