"""`open_model`: static checks, conversion in a sandboxed child, checks of the result."""

from __future__ import annotations

import tempfile
from collections.abc import Sequence
from pathlib import Path

from wm_inject.core.image_size import ImageSize
from wm_inject.core.signals import exits_on_signals
from wm_inject.core.text import printable
from wm_victim.forward_fusion import channels_last
from wm_victim.loading.class_names import read_names
from wm_victim.loading.contract import Candidate, Limits, LoadingError, ModelOptions, OpenedModel
from wm_victim.loading.file_formats import file_format
from wm_victim.loading.graphs import open_onnx
from wm_victim.loading.output_checks import check_outputs, check_weights
from wm_victim.loading.regular_files import copy_regular_file
from wm_victim.loading.weights import open_archive, open_legacy, open_safetensors
from wm_victim.logits import Logits, Squash


def open_model(
    path: str | Path,
    *,
    arch: str | None = None,
    num_classes: int | None = None,
    image_size: ImageSize | None = None,
    channels: int | None = None,
    mean: Sequence[float] | None = None,
    std: Sequence[float] | None = None,
    allow_torchscript: bool = False,
    limits: Limits | None = None,
) -> OpenedModel:
    """Open an image classifier of unknown origin; no code of the file runs in this process.

    Args:
        path: This project's own checkpoint; safetensors or a weights-only PyTorch file (both with
            ``arch``); ONNX; or TorchScript with ``allow_torchscript``. The content decides.
        arch: An architecture of torchvision or timm: "resnet18", "torchvision:resnet18",
            "timm:convnext_tiny".
        num_classes: K, 2 and more; inferred if None.
        image_size: H = W in pixels, or (H, W) for a graph, 8 .. 1024 each; inferred, or the
            architecture's own, if None.
        channels: 1 or 3; inferred if None.
        mean: What the model expects to be subtracted from images in [0, 1], per channel. If None:
            the architecture's own, or none for a graph.
        std: And what they are to be divided by.
        allow_torchscript: Convert TorchScript, which is code, inside the sandbox.
        limits: What the file may ask for.

    Returns:
        The model on the CPU, in eval mode; its parameters can be trained.

    Raises:
        LoadingError: One line that names the file and the reason.
        ValueError: An argument outside its range.
        RuntimeError: A package for this format is not installed.
    """
    mean, std = (None if values is None else tuple(values) for values in (mean, std))
    options = ModelOptions(arch, num_classes, image_size, channels, mean, std, allow_torchscript)
    limits = limits or Limits()
    path = Path(path)
    name = printable(path.name)
    with (
        exits_on_signals(),  # or the folder stays where a command is ended
        tempfile.TemporaryDirectory(prefix="wm-open-", ignore_cleanup_errors=True) as scratch,
    ):
        for folder in ("in", "out"):
            (Path(scratch) / folder).mkdir()
        snapshot = Path(scratch, "in", "model")
        try:
            digest = copy_regular_file(path, snapshot, max_bytes=limits.max_bytes)
            candidate = _read(path, snapshot, options, limits)
            return _checked(candidate, options, limits, digest)
        except LoadingError as error:
            reason = printable(error, 800)
            raise LoadingError(f"cannot open {name}: {reason}") from error
        except OSError as error:
            reason = f"{tempfile.gettempdir()}: {error.strerror or error}"
            raise LoadingError(
                f"cannot open {name}: expected room for a copy in {reason}; "
                "the variable TMPDIR names another folder"
            ) from error
        except MemoryError as error:
            raise LoadingError(f"cannot open {name}: it needs more memory than there is") from error


def _read(path: Path, snapshot: Path, options: ModelOptions, limits: Limits) -> Candidate:
    with snapshot.open("rb") as file:
        kind = file_format(file.read(512))
    if kind == "safetensors":
        return open_safetensors(snapshot, options, limits)
    if kind == "zip":
        return open_archive(snapshot, options, limits)
    if kind == "legacy":
        return open_legacy(snapshot, options, limits)
    return open_onnx(path, snapshot, options, limits)


def _checked(
    candidate: Candidate, options: ModelOptions, limits: Limits, digest: str
) -> OpenedModel:
    module = channels_last(candidate.module.eval())
    check_weights(module)
    outputs = check_outputs(
        module,
        channels=candidate.channels,
        size=candidate.image_size,
        num_classes=options.num_classes,
        max_classes=limits.max_classes,
        brief=candidate.source in ("onnx", "torchscript"),
        at_once=candidate.at_once,
    )
    if outputs.probabilities:
        module = Logits(module, Squash()).eval()
    names, notes = read_names(candidate.class_names), candidate.notes
    if names is not None and len(names) != outputs.num_classes:
        notes = (*notes, f"the file names {len(names)} classes, it gives {outputs.num_classes}")
        names = None
    return OpenedModel(
        module=module,
        source=candidate.source,
        arch=candidate.arch,
        channels=candidate.channels,
        image_size=candidate.image_size,
        num_classes=outputs.num_classes,
        layout=candidate.layout,
        outputs="probabilities" if outputs.probabilities or candidate.probabilities else "logits",
        notes=notes,
        sha256=digest,
        class_names=names,
        image_sizes=candidate.image_sizes or (candidate.image_size,),
    )
