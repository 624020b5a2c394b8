"""What runs inside the sandbox: one conversion of one file, or the reason why there is none."""

from __future__ import annotations

import json
import sys
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from wm_inject.core.errors import out_of_memory
from wm_inject.core.text import first_line
from wm_victim.loading.contract import MORE_MEMORY
from wm_victim.loading.state_files import convert_state

_OPSET = 17
_TOLERANCE = 1e-3


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


def _convert_script(path: Path, out: Path, options: dict[str, Any]) -> dict[str, Any]:
    """Load a TorchScript archive, export it to ONNX, and continue as with untrusted ONNX.

    Its code runs here, at load and in the export. What leaves the sandbox is the graph.
    """
    from wm_victim.loading.image_sizes import guess_note
    from wm_victim.loading.import_onnx import convert_onnx

    module = torch.jit.load(str(path), map_location="cpu").float().eval()
    channels, sizes, notes = _script_images(module, options)
    exported, problem = out / "exported.onnx", None
    for size in sizes:
        try:
            _export(module, exported, channels, size, options.get("at_once") or 2)
        except (RuntimeError, ValueError) as error:
            if out_of_memory(error):
                raise
            problem = problem or error
            continue
        if options["image_size"] is None:
            notes.append(guess_note(size, tuple(sorted(sizes))))
        result = convert_onnx(exported, out, options)
        return {**result, "notes": [*notes, *result["notes"]]}
    assert problem is not None
    raise problem


def _export(module: Any, path: Path, channels: int, size: int, count: int) -> None:
    """Export a script for images of one size, in any number or, where it takes no other, singly."""
    import onnxruntime as ort

    from wm_victim.loading.output_checks import probe_images

    images = probe_images(count, channels, size)
    with torch.no_grad():
        try:
            outputs = module(images)
        except RuntimeError:
            images = images[:1]
            outputs = module(images)
    expected = outputs if isinstance(outputs, (tuple, list)) else (outputs,)
    if not expected or not all(isinstance(value, Tensor) for value in expected):
        raise ValueError(f"expected tensors from it, got {type(outputs).__name__}")
    names = [f"output{number}" for number in range(len(expected))]
    with torch.no_grad():
        torch.onnx.export(
            module,
            (images,),
            str(path),
            dynamo=False,
            opset_version=_OPSET,
            input_names=["image"],
            output_names=names,
            dynamic_axes={name: {0: "batch"} for name in ("image", *names)},
        )
    session = ort.InferenceSession(str(path), providers=["CPUExecutionProvider"])
    outputs = map(torch.from_numpy, session.run(names, {"image": images.numpy()}))
    if not all(map(_same, outputs, expected)):
        raise ValueError("its export to ONNX computes something else")


def _same(outputs: Tensor, expected: Tensor) -> bool:
    if outputs.shape != expected.shape:
        return False
    bound = _TOLERANCE * (expected.abs().max() + 1e-6)
    return bool((outputs - expected).abs().max() <= bound)


def _script_images(module: Any, options: dict[str, Any]) -> tuple[int, list[int], list[str]]:
    """The channels that a script takes, the sizes to try, the likeliest first, and notes."""
    from wm_victim.loading.image_sizes import likely_size, sizes_that_run

    first = next((p.shape[1] for p in module.parameters() if p.ndim == 4), None)
    channels = [3, 1] if first not in (1, 3) else [first]
    channels = [options["channels"]] if options["channels"] else channels
    only = (options["image_size"],) if options["image_size"] else None
    for count in channels:
        if sizes := sizes_that_run(module, count, only=only):
            likely = likely_size(module, count, sizes)
            notes = [] if options["channels"] else [f"{count} channels, by trying"]
            return count, sorted(sizes, key=lambda size: abs(size - likely)), notes
    option = "image_size (--image-size)" if only is None else "channels (--channels)"
    channels_text = f"{' or '.join(map(str, channels))} channels"
    raise ValueError(f"expected {option}: it runs on no usual images of {channels_text}")


def _conversion(job: str) -> Callable[[Path, Path, dict[str, Any]], dict[str, Any]]:
    if job == "state":
        return convert_state
    if job == "onnx":
        from wm_victim.loading.import_onnx import convert_onnx

        return convert_onnx
    if job == "graph":
        from wm_victim.branches.find import find_branches

        return find_branches
    return _convert_script


def _reason(error: Exception) -> str:
    line = first_line(error)
    if out_of_memory(error):
        return MORE_MEMORY
    return line if isinstance(error, ValueError) else f"{type(error).__name__}: {line}"


if __name__ == "__main__":
    main(sys.argv[1])
