"""What a file is, by its content; its name is not asked."""

from __future__ import annotations

from collections.abc import Collection
from typing import Literal

from wm_victim.loading.tensors import looks_like_safetensors

Kind = Literal["zip", "safetensors", "onnx"]
ZipKind = Literal["state", "torchscript"]

SAVE_WEIGHTS = (
    'ask its maker to save the weights: python -c "import torch; from safetensors.torch import '
    "save_model; save_model(torch.load('MODEL', weights_only=False), 'MODEL.safetensors')\" "
    "(this runs the file's code), then open MODEL.safetensors with its architecture's name"
)
_RESAVE = (
    'if it holds weights alone, save it anew: python -c "import torch; '
    "torch.save(torch.load('MODEL', weights_only=True), 'MODEL.pt')\""
)
_LEGACY = b"\x80\x02\x8a\nl\xfc\x9cF\xf9 j\xa8P\x19."
_ONNX = "ask its maker for ONNX: python -m tf2onnx.convert --keras MODEL --output MODEL.onnx"
_EXPORT = (
    'ask its maker for ONNX: python -c "import torch; '
    "torch.onnx.export(torch.export.load('MODEL').module(), EXAMPLE, 'MODEL.onnx')\" "
    "(this runs the file's code)"
)
_STARTS: tuple[tuple[int, bytes, str], ...] = (
    (0, b"\x89HDF\r\n\x1a\n", f"an HDF5 file, such as Keras writes; {_ONNX}"),
    (
        257,
        b"ustar",
        f"a tar archive, torch's oldest form, which runs code when read; {SAVE_WEIGHTS}",
    ),
    (0, b"\x1f\x8b", "a gzip file; unpack it first"),
    (0, b"\x78\x9c", "a compressed pickle, such as joblib writes, which runs code when read"),
    (0, b"\x78\x5e", "a compressed pickle, such as joblib writes, which runs code when read"),
    (0, b"\x78\x01", "a compressed pickle, such as joblib writes, which runs code when read"),
    (0, b"\x78\xda", "a compressed pickle, such as joblib writes, which runs code when read"),
    (0, b"BZh", "a bzip2 file; unpack it first"),
    (0, b"\xfd7zXZ", "an xz file; unpack it first"),
    (0, b"(\xb5/\xfd", "a zstd file; unpack it first"),
    (0, b"GGUF", "a GGUF file, which holds no image classifier"),
    (4, b"TFL3", "a TensorFlow Lite file, which is quantised or cannot be differentiated"),
    (4, b"ORTM", "an ONNX Runtime binary; open the .onnx that it was made from"),
    (0, b"\x93NUMPY", "a NumPy array, no model"),
    (0, b"version https://git-lfs", "a pointer of Git LFS; fetch the file: git lfs pull"),
    (0, b"<", "a web page or XML, no model: was it downloaded whole?"),
    (0, b"\x7fELF", "a program"),
    (0, b"MZ", "a program"),
    (0, b"#!", "a program"),
)


def sniff(start: bytes) -> tuple[Kind, str]:
    """What the first 512 bytes say.

    Returns:
        The kind and "", or "onnx" as the last guess; a reason instead of "" to refuse the file.
    """
    if len(start) < 16:
        return "onnx", f"only {len(start)} bytes long"
    if start[:4] == b"PK\x03\x04":
        return "zip", ""
    if start[:2] == b"PK":
        return "zip", "an empty or damaged archive"
    # A brace at that place is a safetensors header first: its length may begin with any bytes.
    if looks_like_safetensors(start) and start[5:8] == b"\0\0\0":
        return "safetensors", ""
    for place, mark, why in _STARTS:
        if start[place : place + len(mark)] == mark:
            return "onnx", why
    if start.startswith(_LEGACY):
        return "onnx", f"torch's form without an archive, which runs code when read; {_RESAVE}"
    if start[:1] == b"\x80" and start[1:2] in b"\x02\x03\x04\x05":
        return "onnx", f"a Python pickle, which runs code when read; {SAVE_WEIGHTS}"
    # Protocols 0 and 1 have no mark: they begin with a global, a mark, or an empty container.
    if start[:1] in (b"c", b"(", b"]", b"}") and b"\n" in start[:200]:
        return (
            "onnx",
            f"a Python pickle of an old protocol, which runs code when read; {SAVE_WEIGHTS}",
        )
    if looks_like_safetensors(start):
        return "safetensors", ""
    return "onnx", ""


def sniff_zip(names: Collection[str]) -> tuple[ZipKind, str]:
    """What an archive with records of these names is; a reason instead of "" to refuse it."""
    tails = {name.partition("/")[2] for name in names}
    if "constants.pkl" in tails or any(tail.startswith("code/") for tail in tails):
        return "torchscript", ""
    if any("archive_format" in tail or tail.startswith("models/") for tail in tails):
        return "state", f"a .pt2 program of torch.export, whose reader runs pickles; {_EXPORT}"
    if "data.pkl" in tails:
        return "state", ""
    if names and all(name.endswith(".npy") for name in names):
        return "state", "an archive of NumPy arrays, no model"
    if {"config.json", "model.weights.h5"} & set(names):
        return "state", f"a Keras file, whose layers may hold code; {_ONNX}"
    return "state", "an archive that is no PyTorch file"


def with_name(why: str, name: str) -> str:
    """A reason whose command names the file, unless a shell would read more into the name."""
    plain = name.isascii() and name.replace(".", "").replace("_", "").replace("-", "").isalnum()
    return why.replace("MODEL", name) if plain and name[0] != "-" else why
