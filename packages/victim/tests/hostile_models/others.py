"""Files that are no models at all."""

import os
import pickle
import zipfile
from pathlib import Path

import numpy as np

from .case import case, put
from .pickles import shell

# --- Not models at all ---


@case("no model")
def a_folder(folder: Path, marker: Path) -> Path:
    (folder / "a.onnx").mkdir()
    return folder / "a.onnx"


@case("no model")
def a_named_pipe(folder: Path, marker: Path) -> Path:
    os.mkfifo(folder / "a.pt")
    return folder / "a.pt"


@case("no model")
def a_link_to_an_endless_device(folder: Path, marker: Path) -> Path:
    (folder / "a.pt").symlink_to("/dev/zero")
    return folder / "a.pt"


@case("no model")
def random_bytes(folder: Path, marker: Path) -> Path:
    data = np.random.default_rng(1).integers(128, 256, 4096, dtype=np.uint8).tobytes()
    return put(folder, "a.onnx", data)


@case("no model")
def keras_archive(folder: Path, marker: Path) -> Path:
    path = folder / "a.keras"
    with zipfile.ZipFile(path, "w") as file:
        file.writestr("config.json", "{}")
        file.writestr("model.weights.h5", b"\x89HDF\r\n\x1a\n")
    return path


@case("no model")
def hdf5(folder: Path, marker: Path) -> Path:
    return put(folder, "a.h5", b"\x89HDF\r\n\x1a\n" + bytes(512))


@case("no model")
def web_page(folder: Path, marker: Path) -> Path:
    return put(folder, "a.onnx", b"<!DOCTYPE html><html>not found</html>")


@case("no model")
def name_of_two_lines(folder: Path, marker: Path) -> Path:
    return put(folder, "a\nb\x1b[31m'$(x).pt", pickle.dumps(shell(marker), 2))
