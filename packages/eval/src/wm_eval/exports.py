"""The trained models of a study as TorchScript and ONNX, each reloaded and compared."""

from __future__ import annotations

from typing import Any

from torch import Tensor, nn

from wm_eval.study import Study, load_reversed, reversed_file
from wm_eval.workspace import Made
from wm_inject import to_onnx, to_torchscript

EXAMPLES = 5  # parity is checked on one image and on this many
TOLERANCE = 1e-4  # absolute on images in [0, 1]; relative to the largest logit on logits


def export_models(study: Study) -> Made:
    """Export injector, extractor, classifier and reversed generator with their trained weights.

    The generator is that of the label that the reverse-generator scan named; where it named none,
    the generator is absent, and the reason stands in its place.

    Raises:
        ParityError: An exported model answers differently from the one it came from.
    """
    images = study.test.images[:EXAMPLES].cpu()
    models: dict[str, tuple[nn.Module, bool]] = {
        "injector": (study.trigger().cpu(), False),
        "extractor": (study.extractor().cpu(), False),
        "classifier": (study.victim("backdoored").cpu(), True),
    }
    absent = {}
    generator = study.space.path(reversed_file("reverse", "backdoored"))
    if study.space.record("scan-reverse-backdoored").values["suspected"]:
        models["generator"] = (load_reversed(generator).eval(), False)
    else:
        absent["generator"] = "the scan named no label"
    found = {name: _both(study, name, *model, images) for name, model in models.items()}
    files = [row["file"] for rows in found.values() for row in rows.values()]
    return Made({"tolerance": TOLERANCE, "models": found, "absent": absent}, files)


def _both(study: Study, name: str, model: nn.Module, logits: bool, images: Tensor) -> Any:
    rows = {}
    for form, suffix, export in (("onnx", "onnx", to_onnx), ("torchscript", "pt", to_torchscript)):
        file = f"exports/{name}.{suffix}"
        parity = export(
            model,
            images,
            study.space.path(file),
            tolerance=TOLERANCE,
            relative=logits,
            metadata={"study": study.config.name, "data": study.data.fingerprint},
        )
        rows[form] = {"file": file, "relative": logits, **parity._asdict()}
        rows[form]["batches"] = list(parity.batches)
    return rows


__all__ = ["EXAMPLES", "TOLERANCE", "export_models"]
