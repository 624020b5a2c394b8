"""What runs inside the sandbox: one conversion of one file, or the reason why there is none."""

from __future__ import annotations

import json
import pickle
import sys
import warnings
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from wm_inject.core.errors import out_of_memory
from wm_inject.core.text import first_line, printable

_OPSET = 17
_TOLERANCE = 1e-3
# Where training scripts keep the weights; averaged ones last, since they are the exception.
_WRAPPERS = (
    *("state_dict", "model_state_dict", "model", "net", "weights", "params", "state"),
    *("state_dict_ema", "model_ema"),
)


def main(text: str) -> None:
    """Do the job that the settings name, and write ``result.json`` into the scratch folder."""
    settings = json.loads(text)
    path, out = Path(settings["input"]) / settings["name"], Path(settings["scratch"])
    warnings.simplefilter("ignore")
    try:
        result = _conversion(settings["job"])(path, out, settings["options"])
        result["restrictions"] = settings["restrictions"]
    # Whatever the readers raise on a hostile file: the parent only wants the reason.
    except Exception as error:
        result = {"refused": _reason(error)}
    (out / "result.json").write_text(json.dumps(result), encoding="utf-8")


def convert_state(path: Path, out: Path, options: dict[str, Any]) -> dict[str, Any]:
    """Load a checkpoint with ``weights_only=True`` and write its tensors as safetensors.

    It is not mapped into memory: torch 2.15 then skips the check of a record's size and reads other
    records as weights.

    Args:
        path: The archive, checked by `archives`.
        out: Where ``weights.safetensors`` goes.
        options: "max_tensors".

    Raises:
        ValueError: No dictionary of tensors, or tensors larger than the file.
    """
    from safetensors.torch import save_file

    try:
        saved = torch.load(path, map_location="cpu", weights_only=True, mmap=False)
    except pickle.UnpicklingError as error:
        # Its own text recommends to load the file without this protection.
        raise ValueError(
            "torch refuses its pickle: it is no dictionary of plain tensors"
        ) from error
    state, notes = _weights(saved)
    if len(state) > options["max_tensors"]:
        raise ValueError(f"{len(state)} tensors, more than {options['max_tensors']}")
    if sum(tensor.nbytes for tensor in state.values()) > 2 * path.stat().st_size + 2**20:
        raise ValueError("tensors that are larger than the file: views that repeat its bytes")
    plain = {name: tensor.detach().clone().contiguous() for name, tensor in state.items()}
    save_file(plain, out / "weights.safetensors")
    return {"notes": notes}


def _convert_script(path: Path, out: Path, options: dict[str, Any]) -> dict[str, Any]:
    """Load a TorchScript archive, export it to ONNX, and continue as with untrusted ONNX.

    Its code runs here, at load and in the export. What leaves the sandbox is the graph.
    """
    import onnxruntime as ort

    from wm_victim.loading.import_onnx import convert_onnx
    from wm_victim.loading.output_checks import probe_images

    module = torch.jit.load(str(path), map_location="cpu").eval()
    images = probe_images(2, options["channels"], options["image_size"])
    exported = out / "exported.onnx"
    with torch.no_grad(), warnings.catch_warnings():
        warnings.simplefilter("ignore")
        expected = module(images)
        if not isinstance(expected, Tensor):
            raise ValueError(f"expected one tensor from it, got {type(expected).__name__}")
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
    outputs = torch.from_numpy(session.run(None, {"image": images.numpy()})[0])
    if outputs.shape != expected.shape or not bool(
        (outputs - expected).abs().max() <= _TOLERANCE * (expected.abs().max() + 1e-6)
    ):
        raise ValueError("its export to ONNX computes something else")
    return convert_onnx(exported, out, options)


def _conversion(job: str) -> Callable[[Path, Path, dict[str, Any]], dict[str, Any]]:
    if job == "state":
        return convert_state
    if job == "onnx":
        from wm_victim.loading.import_onnx import convert_onnx

        return convert_onnx
    return _convert_script


def _weights(saved: Any) -> tuple[dict[str, Tensor], list[str]]:
    """The tensors by name, from under the wrappers, and notes on what was left out."""
    notes: list[str] = []
    for _ in range(3):
        if not isinstance(saved, Mapping):
            raise ValueError(f"expected a dictionary of tensors, got {type(saved).__name__}")
        inner = next((key for key in _WRAPPERS if isinstance(saved.get(key), Mapping)), None)
        if inner is None:
            break
        notes.append(f"weights taken from the entry {inner!r}")
        saved = saved[inner]
    state: dict[str, Tensor] = {}
    skipped = []
    for name, value in saved.items():
        if not isinstance(name, str):
            raise ValueError("expected tensors by name, got another key")
        dense = isinstance(value, Tensor) and value.layout == torch.strided
        if dense and not value.is_quantized and not value.is_complex():
            state[name] = value
        else:
            skipped.append(printable(name, 40))
    if not state:
        raise ValueError("expected a dictionary of tensors, found no tensor in it")
    if skipped:
        notes.append(f"left out what is no plain tensor: {', '.join(skipped[:5])}")
    return state, notes


def _reason(error: Exception) -> str:
    line = first_line(error)
    if out_of_memory(error):
        return "it asks for more memory than allowed"
    return line if isinstance(error, ValueError) else f"{type(error).__name__}: {line}"


if __name__ == "__main__":
    main(sys.argv[1])
