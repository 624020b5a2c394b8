"""The one call that opens a stranger's model, step by step up the ladder of trust."""

from __future__ import annotations

import shutil
import tempfile
from collections.abc import Sequence
from pathlib import Path

from wm_victim.loading.found import Found, Wanted
from wm_victim.loading.numeric import BadNumbers, LogProbabilities, check_answers, check_weights
from wm_victim.loading.open_onnx import open_onnx
from wm_victim.loading.open_weights import open_safetensors, open_zip
from wm_victim.loading.opened import Limits, NotOpened, OpenedModel, plain
from wm_victim.loading.pickles import BadPickle
from wm_victim.loading.runner import ChildFailed
from wm_victim.loading.snapshot import take_snapshot
from wm_victim.loading.sniff import sniff, with_name
from wm_victim.loading.tensors import BadTensors
from wm_victim.loading.zips import BadArchive


def open_model(
    path: str | Path,
    *,
    arch: str | None = None,
    num_classes: int | None = None,
    image_size: int | None = None,
    channels: int | None = None,
    mean: Sequence[float] | None = None,
    std: Sequence[float] | None = None,
    allow_torchscript: bool = False,
    limits: Limits | None = None,
) -> OpenedModel:
    """Open an image classifier of unknown origin; no code of the file runs in this process.

    A static check of the file's bytes comes first, then, for whatever has to be parsed or
    converted, a child process with limits, then checks of the model's numbers.

    Args:
        path: This project's own checkpoint; safetensors or a weights-only PyTorch file (both with
            ``arch``); ONNX; or TorchScript with ``allow_torchscript``. The content decides.
        arch: An architecture of torchvision or timm: "resnet18", "torchvision:resnet18",
            "timm:convnext_tiny".
        num_classes: K, 2 and more; inferred if None.
        image_size: H = W in pixels, 8 .. 1024; inferred, or the architecture's own, if None.
        channels: 1 or 3; inferred if None.
        mean: What the model expects to be subtracted from images in [0, 1], per channel. If None:
            the architecture's own, or none for a graph.
        std: And what they are to be divided by.
        allow_torchscript: Convert TorchScript, which is code, inside the sandbox.
        limits: What the file may ask for.

    Returns:
        The model on the CPU, in eval mode; its parameters can be trained.

    Raises:
        NotOpened: One line that names the file and the reason.
        ValueError: An argument outside its range.
        RuntimeError: A package for this format is not installed.
    """
    wanted = _wanted(arch, num_classes, image_size, channels, mean, std, allow_torchscript)
    limits = limits or Limits()
    path = Path(path)
    name = plain(path.name)
    folder = Path(tempfile.mkdtemp(prefix="wm-open-"))
    try:
        (folder / "in").mkdir()
        (folder / "out").mkdir()
        copy = folder / "in" / "model"
        digest = take_snapshot(path, copy, max_bytes=limits.max_bytes)
        found = _open(path, copy, wanted, limits)
        return _checked(found, wanted, limits, digest)
    except (BadTensors, BadArchive, BadPickle, BadNumbers, ChildFailed) as error:
        raise NotOpened(f"cannot open {name}: {plain(error, 600)}") from error
    except MemoryError as error:
        raise NotOpened(f"cannot open {name}: it needs more memory than there is") from error
    finally:
        shutil.rmtree(folder, ignore_errors=True)


def _wanted(
    arch: str | None,
    num_classes: int | None,
    image_size: int | None,
    channels: int | None,
    mean: Sequence[float] | None,
    std: Sequence[float] | None,
    allow_torchscript: bool,
) -> Wanted:
    if num_classes is not None and num_classes < 2:
        raise ValueError(f"expected num_classes of at least 2, got {num_classes}")
    if image_size is not None and not 8 <= image_size <= 1024:
        raise ValueError(f"expected image_size in 8 .. 1024, got {image_size}")
    if channels not in (None, 1, 3):
        raise ValueError(f"expected channels 1 or 3, got {channels}")
    if (mean is None) != (std is None):
        raise ValueError("expected mean and std together")
    if std is not None and not all(0 < value < float("inf") for value in std):
        raise ValueError(f"expected positive standard deviations, got {tuple(std)}")
    return Wanted(
        arch=arch,
        num_classes=num_classes,
        image_size=image_size,
        channels=channels,
        mean=None if mean is None else tuple(mean),
        std=None if std is None else tuple(std),
        allow_torchscript=allow_torchscript,
    )


def _open(path: Path, copy: Path, wanted: Wanted, limits: Limits) -> Found:
    name = plain(path.name)
    with copy.open("rb") as file:
        start = file.read(512)
    kind, why = sniff(start)
    if why:
        raise NotOpened(f"cannot open {name}: {with_name(why, name)}")
    if kind == "safetensors":
        return open_safetensors(copy, name, wanted, limits)
    if kind == "zip":
        return open_zip(copy, name, wanted, limits)
    return open_onnx(path, copy, wanted, limits)


def _checked(found: Found, wanted: Wanted, limits: Limits, digest: str) -> OpenedModel:
    module = found.module.eval()
    check_weights(module)
    numbers = check_answers(
        module,
        channels=found.channels,
        size=found.image_size,
        num_classes=wanted.num_classes,
        max_classes=limits.max_classes,
        brief=found.source in ("onnx", "torchscript"),
    )
    probabilities = numbers.outputs == "probabilities"
    if probabilities:
        module = LogProbabilities(module).eval()
    return OpenedModel(
        module=module,
        source=found.source,
        arch=found.arch,
        channels=found.channels,
        image_size=found.image_size,
        num_classes=numbers.num_classes,
        layout=found.layout,
        outputs="probabilities" if probabilities or found.probabilities else "logits",
        notes=found.notes,
        sha256=digest,
    )
