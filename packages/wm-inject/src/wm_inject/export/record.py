"""What travels inside an exported file: what it is, what it takes, what its weights are."""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping
from importlib import metadata as installed
from typing import Any

from torch import Tensor, nn

from wm_inject.__about__ import __version__
from wm_inject.core.checkpoint import tensors_digest
from wm_inject.export.parity import Parity

FORMAT = "wm-export-2"


def export_record(
    module: nn.Module,
    example: Tensor,
    metadata: Mapping[str, Any] | None,
    *,
    uint8: bool,
    precision: str,
    inputs: Iterable[str],
    outputs: Iterable[str],
    tolerance: float,
    relative: bool,
) -> dict[str, Any]:
    """Everything but the parity, which is not known before the file has been run.

    Raises:
        ValueError: Metadata that JSON cannot hold.
    """
    state = module.state_dict()
    record: dict[str, Any] = {
        "format": FORMAT,
        "channels": example.shape[1],
        "image_size": list(example.shape[2:]),
        "value_range": [0, 255] if uint8 else [0, 1],
        "uint8": uint8,
        "precision": precision,
        "inputs": list(inputs),
        "outputs": list(outputs),
        "tolerance": tolerance,
        "relative": relative,
        "weights_sha256": tensors_digest(state),
        "versions": {"torch": installed.version("torch"), "wm-inject": __version__},
    }
    for name in ("kind", "config"):
        if isinstance(found := getattr(module, name, None), (str, dict)):
            record[name] = found
    if "watermark" in state:
        record["watermark_sha256"] = tensors_digest({"watermark": state["watermark"]})
    record |= metadata or {}
    try:
        json.dumps(record, allow_nan=False)
    except TypeError as error:
        raise ValueError(f"expected metadata of JSON types only: {error}") from error
    return record


def with_parity(record: Mapping[str, Any], parity: Parity) -> dict[str, Any]:
    """The record with the differences that were found between file and module."""
    differences = {"max_abs": parity.max_abs, "max_rel": parity.max_rel}
    return {**record, "parity": {**differences, "batches": list(parity.batches)}}
