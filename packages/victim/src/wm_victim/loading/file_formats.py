"""What a file is, by its content; its name does not matter."""

from __future__ import annotations

from collections.abc import Collection
from typing import Literal

from wm_victim.loading.contract import LoadingError
from wm_victim.loading.safetensors_header import looks_like_safetensors

ASK_FOR_WEIGHTS = (
    "ask its maker for the weights alone, torch.save(model.state_dict(), ...) or safetensors, and "
    "open them with the architecture's name"
)
_LEGACY = b"\x80\x02\x8a\nl\xfc\x9cF\xf9 j\xa8P\x19."
_ONNX = "ask its maker for ONNX"
_JOBLIB = "a compressed pickle, such as joblib writes, which runs code when read"
_TAR = f"a tar archive, torch's oldest form, which runs code when read; {ASK_FOR_WEIGHTS}"
# Offset, bytes, and the reason to refuse a file that has them there.
_SIGNATURES: tuple[tuple[int, bytes, str], ...] = (
    (0, b"\x89HDF\r\n\x1a\n", f"an HDF5 file, such as Keras writes; {_ONNX}"),
    (257, b"ustar", _TAR),
    (0, b"\x1f\x8b", "a gzip file; unpack it first"),
    *((0, start, _JOBLIB) for start in (b"\x78\x9c", b"\x78\x5e", b"\x78\x01", b"\x78\xda")),
    (0, b"BZh", "a bzip2 file; unpack it first"),
    (0, b"\xfd7zXZ", "an xz file; unpack it first"),
    (0, b"(\xb5/\xfd", "a zstd file; unpack it first"),
    (0, b"GGUF", "a GGUF file, which holds no image classifier"),
    (4, b"TFL3", "a TensorFlow Lite file, which is quantised or cannot be differentiated"),
    (4, b"ORTM", "an ONNX Runtime binary; open the .onnx that it was made from"),
    (0, b"\x93NUMPY", "a NumPy array, no model"),
    (0, b"version https://git-lfs", "a pointer of Git LFS; fetch the file: git lfs pull"),
    (0, b"<", "a web page or XML, no model: was it downloaded whole?"),
    *((0, start, "a program") for start in (b"\x7fELF", b"MZ", b"#!")),
)


def file_format(start: bytes) -> Literal["zip", "legacy", "safetensors", "onnx"]:
    """What the first 512 bytes of a file say; ONNX, which has no signature, is the last guess.

    Raises:
        LoadingError: A format that is refused, with the reason.
    """
    if len(start) < 16:
        raise LoadingError(f"only {len(start)} bytes long")
    if start[:4] == b"PK\x03\x04":
        return "zip"
    if start[:2] == b"PK":
        raise LoadingError("an empty or damaged archive")
    # A brace in this position is a safetensors header first: its length may begin with any bytes.
    if looks_like_safetensors(start) and start[5:8] == b"\0\0\0":
        return "safetensors"
    for offset, signature, reason in _SIGNATURES:
        if start[offset : offset + len(signature)] == signature:
            raise LoadingError(reason)
    if start.startswith(_LEGACY):
        return "legacy"
    if start[:1] == b"\x80" and start[1:2] in b"\x02\x03\x04\x05":
        raise LoadingError(f"a Python pickle, which runs code when read; {ASK_FOR_WEIGHTS}")
    # Protocols 0 and 1 have no signature: they begin with a global, a mark, or an empty container.
    if start[:1] in (b"c", b"(", b"]", b"}") and b"\n" in start[:200]:
        raise LoadingError(
            f"a Python pickle of an old protocol, which runs code when read; {ASK_FOR_WEIGHTS}"
        )
    return "safetensors" if looks_like_safetensors(start) else "onnx"


def archive_format(names: Collection[str]) -> Literal["state", "torchscript"]:
    """What a zip archive with records of these names is.

    Raises:
        LoadingError: A format that is refused, with the reason.
    """
    tails = {name.partition("/")[2] for name in names}
    if "constants.pkl" in tails or any(tail.startswith("code/") for tail in tails):
        return "torchscript"
    if any("archive_format" in tail or tail.startswith("models/") for tail in tails):
        raise LoadingError(f"a .pt2 program of torch.export, whose reader runs pickles; {_ONNX}")
    if any(f"/{name}".endswith("/data.pkl") for name in names):
        return "state"
    if names and all(name.endswith(".npy") for name in names):
        raise LoadingError("an archive of NumPy arrays, no model")
    if {"config.json", "model.weights.h5"} & set(names):
        raise LoadingError(f"a Keras file, whose layers may hold code; {_ONNX}")
    files = [name for name in names if not name.endswith("/") and "__MACOSX" not in name]
    if len(files) == 1:
        raise LoadingError(f"an archive that holds {files[0]!r}: unpack it and name that file")
    raise LoadingError("an archive that is no PyTorch file")
