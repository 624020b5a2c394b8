"""In the child: TorchScript, which is code, to ONNX, which is not."""

from __future__ import annotations

import warnings
from pathlib import Path
from typing import Any

import torch

from wm_victim.loading.from_onnx import convert_onnx
from wm_victim.loading.numeric import probe_images

_OPSET = 17
_TOLERANCE = 1e-3


def convert_script(given: Path, out: Path, options: dict[str, Any]) -> dict[str, Any]:
    """Load a TorchScript archive, export it to ONNX, and go on as with a stranger's ONNX.

    Its code runs here, at load and in the export. What leaves the sandbox is the graph.

    Args:
        given: The archive.
        out: Where ``plain.onnx`` goes.
        options: "image_size" and "channels".

    Raises:
        ValueError: A module that cannot be exported, or whose export computes something else.
    """
    import onnxruntime as ort

    module = torch.jit.load(str(given), map_location="cpu").eval()
    images = probe_images(2, options["channels"], options["image_size"])
    exported = out / "exported.onnx"
    with torch.no_grad(), warnings.catch_warnings():
        warnings.simplefilter("ignore")
        want = module(images)
        if not isinstance(want, torch.Tensor):
            raise ValueError(f"expected one tensor from it, got {type(want).__name__}")
        torch.onnx.export(
            module,
            (images,),
            str(exported),
            dynamo=False,
            opset_version=_OPSET,
            input_names=["image"],
            output_names=["output"],
            dynamic_axes={"image": {0: "batch"}, "output": {0: "batch"}},
        )
    session = ort.InferenceSession(str(exported), providers=["CPUExecutionProvider"])
    got = torch.from_numpy(session.run(None, {"image": images.numpy()})[0])
    if got.shape != want.shape or not bool(
        (got - want).abs().max() <= _TOLERANCE * (want.abs().max() + 1e-6)
    ):
        raise ValueError("its export to ONNX computes something else")
    return convert_onnx(exported, out, options)
