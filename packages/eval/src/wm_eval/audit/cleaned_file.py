"""A cleaned model's file: in the form of the original, so that it can take its place."""

from __future__ import annotations

import tempfile
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from wm_eval.audit.onnx_weights import OnnxWeights, describe_graph
from wm_inject import to_onnx, to_torchscript
from wm_inject.core.files import atomic_path
from wm_victim.loading import OpenedModel, open_model

TOLERANCE = 1e-3  # of the largest logit
_HALF = 2e-2  # where the file holds its weights in half precision
_SUFFIXES = {"onnx": ".onnx", "torchscript": ".pt"}


class CleanedFile:
    """Where a cleaned model goes, decided before it is cleaned.

    An ONNX or safetensors file keeps everything but its weights. Where they cannot be put back
    (they were folded or computed when the graph was imported), and for TorchScript, the file is a
    new graph.

    Args:
        source: The original file.
        out: The new one.
        opened: What `wm_victim.loading.open_model` gave for the original.
        module: Images in [0, 1] to logits; the opened module is a part of it.
        images: At least three, in [0, 1], to compare the new file on.
        options: Arguments that ``open_model`` was given.

    Attributes:
        notes: In what the new file will differ from the original, beside its weights, in lines.

    Raises:
        ValueError: A suffix that does not fit, or a form that cannot be written.
    """

    def __init__(
        self,
        source: Path,
        out: Path,
        opened: OpenedModel,
        module: nn.Module,
        images: Tensor,
        options: Mapping[str, Any],
    ) -> None:
        suffix = _SUFFIXES.get(opened.source, ".safetensors")
        if out.suffix != suffix:
            raise ValueError(
                f"expected --out *{suffix} for a model that came as {opened.source}, got {out.name}"
            )
        self.source, self.out, self.opened = source, out, opened
        self.images, self.options = images[:8], dict(options)
        self.notes: tuple[str, ...] = ()
        names = (name for name, part in module.named_modules() if part is opened.module)
        self._part = next(names, None)  # the name of the opened module within the module
        self._weights: OnnxWeights | None = None
        if opened.source == "onnx":
            self._weights = self._find_weights()
        if suffix != ".safetensors" and self._weights is None:
            self._rehearse(module)

    def write(self, module: nn.Module, metadata: Mapping[str, Any]) -> str:
        """Write the cleaned model, and compare the file with it.

        Args:
            module: As the one that the constructor was given, with other weights.
            metadata: Recorded inside the file.

        Returns:
            What was written, in a line.

        Raises:
            ValueError: A file that would compute something else; nothing is written.
        """
        record = {"kind": "cleaned classifier", **metadata}
        inner = module.get_submodule(self._part or "")
        if self._weights is not None:
            weights, half = self._weights, self._weights.half
            try:
                return self._put(
                    module, lambda p: weights.write(p, inner.state_dict(), record), half
                )
            except ValueError as error:
                self.notes = (f"the cleaned file is a new graph: {error}",)
                return f"note: {self.notes[0]}\n{self._export(module, self.out, record)}"
        if self.out.suffix != ".safetensors":
            return self._export(module, self.out, record)
        if self.opened.source == "wm":
            from wm_inject.core.checkpoint import load_checkpoint
            from wm_victim import save_classifier

            old = load_checkpoint(self.source, kind="classifier").metadata or {}
            return self._put(module, lambda p: save_classifier(inner, p, {**old, **metadata}))
        return self._put(module, lambda p: _save_weights(self.source, inner, p))

    def _find_weights(self) -> OnnxWeights | None:
        """The places of the weights in the file; None, and a note, where they are not found."""
        module = self.opened.module
        trained = [name for name, _ in module.named_parameters()]
        trained += [name for name in module.state_dict() if "running_" in name]
        try:
            return OnnxWeights(self.source, self.opened.sha256, module.state_dict(), trained)
        except ValueError as error:
            self.notes = (f"the cleaned file will be a new graph: {error}",)
            return None

    def _put(self, module: nn.Module, save: Callable[[Path], object], half: bool = False) -> str:
        """Write the original with new weights, open it again, and compare."""
        inner, images = module.get_submodule(self._part or ""), []
        with atomic_path(self.out) as part:
            save(part)
            again = open_model(part, **self.options).module
            hook = inner.register_forward_pre_hook(lambda _, args: images.append(args[0]))
            try:
                with torch.no_grad():
                    module(self.images)
            finally:
                hook.remove()
            with torch.no_grad():
                expected, logits = inner(images[0]), again(images[0])
            apart = float((logits - expected).abs().max() / expected.abs().max().clamp_min(1e-12))
            if not apart <= (_HALF if half else TOLERANCE):
                raise ValueError(f"the file with new weights differs by {apart:.2g} of the logits")
        return f"wrote {self.out}: the original with new weights, within {apart:.1g} of the model"

    def _rehearse(self, module: nn.Module) -> None:
        """Export the unchanged module, so that what cannot be written is refused now."""
        with tempfile.TemporaryDirectory(prefix="wm-export-") as folder:
            path = Path(folder, "new" + self.out.suffix)
            self._export(module, path, {})
            if self.opened.source == "onnx":
                new, old = describe_graph(path), describe_graph(self.source)
                self.notes = (*self.notes, f"{new} in place of {old}")
        images = "images as float32 (N, C, H, W) in [0, 1]"
        was = f"images {self.opened.layout} and {self.opened.outputs}"
        self.notes = (*self.notes, f"it takes {images} and gives logits; the original: {was}")

    def _export(self, module: nn.Module, path: Path, record: dict[str, Any]) -> str:
        how: dict[str, Any] = {"relative": True, "tolerance": TOLERANCE, "metadata": record}
        if self.opened.source == "onnx":
            graph = describe_graph(self.source)
            if len(graph.inputs) == len(graph.outputs) == 1:
                how["input_name"], how["output_names"] = *graph.inputs, list(graph.outputs)
            parity = to_onnx(module, self.images, path, traced=True, **how)
        else:
            parity = to_torchscript(module, self.images, path, **how)
        return f"wrote {path}: images in [0, 1] to logits, within {parity.max_rel:.1g} of the model"


def _save_weights(source: Path, module: nn.Module, path: Path) -> None:
    """Weights under the names, in the types and beside the other tensors of a safetensors file.

    Where the original has another form, or names that were not only given a prefix: under those of
    the architecture.
    """
    from safetensors import SafetensorError, safe_open
    from safetensors.torch import save_file

    inner = module[-1] if isinstance(module, nn.Sequential) else module
    state = {name: value.contiguous().clone() for name, value in inner.state_dict().items()}
    metadata = None
    try:
        with safe_open(source, "pt") as file:
            metadata = file.metadata()
            tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
    except SafetensorError:
        tensors = {}
    places = {
        name: next((key for key in tensors if f".{key}".endswith(f".{name}")), None)
        for name in state
    }
    if None not in places.values() and len(set(places.values())) == len(places):
        state = {key: state[name].to(tensors[key].dtype) for name, key in places.items() if key}
        state = {**tensors, **state}
    with_metadata = {"metadata": metadata} if metadata else {}
    save_file(state, path, **with_metadata)
