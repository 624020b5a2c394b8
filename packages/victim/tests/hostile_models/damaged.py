"""Files that were cut, packed to deceive, or flipped by a bit."""

import pickle
import struct
import warnings
import zipfile
from collections import OrderedDict
from pathlib import Path

import torch
from safetensors.torch import save, save_file

from .case import case, put
from .graph import graph, onnx_file
from .pickles import archive, shell
from .weights import weights

# --- Truncated files ---


@case("truncated")
def half_an_archive(folder: Path, marker: Path) -> Path:
    data = archive(pickle.dumps({}, 2), {"data/0": bytes(4096)})
    return put(folder, "a.pt", data[: len(data) // 2])


@case("truncated")
def half_a_graph(folder: Path, marker: Path) -> Path:
    data = graph().SerializeToString()
    return put(folder, "a.onnx", data[: len(data) // 2])


@case("truncated")
def half_a_safetensors_file(folder: Path, marker: Path) -> Path:
    data = save(weights())
    return put(folder, "a.safetensors", data[: len(data) // 2])


@case("truncated")
def no_byte_at_all(folder: Path, marker: Path) -> Path:
    return put(folder, "a.onnx", b"")


@case("truncated")
def four_bytes(folder: Path, marker: Path) -> Path:
    return put(folder, "a.safetensors", b"\x10\0\0\0")


# --- Archives that deceive ---


@case("zip bomb")
def a_gigabyte_of_nothing(folder: Path, marker: Path) -> Path:
    path = folder / "a.pt"
    with (
        zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as file,
        file.open("archive/data/0", "w") as record,
    ):
        for _ in range(256):
            record.write(bytes(2**20))
    return path


@case("zip bomb")
def record_that_leaves_the_archive(folder: Path, marker: Path) -> Path:
    return put(folder, "a.pt", archive(pickle.dumps({}, 2), {"../../evil": b"x"}))


@case("zip bomb")
def symbolic_link_in_the_archive(folder: Path, marker: Path) -> Path:
    path = put(folder, "a.pt", archive(pickle.dumps({}, 2)))
    with zipfile.ZipFile(path, "a") as file:
        entry = zipfile.ZipInfo("archive/link")
        entry.external_attr = 0o120777 << 16
        file.writestr(entry, "/etc/hostname")
    return path


@case("zip bomb")
def two_records_of_one_name(folder: Path, marker: Path) -> Path:
    path = put(folder, "a.pt", archive(pickle.dumps({}, 2)))
    with warnings.catch_warnings(), zipfile.ZipFile(path, "a") as file:
        warnings.simplefilter("ignore")
        file.writestr("archive/data.pkl", pickle.dumps(shell(marker), 2))
    return path


@case("zip bomb")
def records_that_share_their_bytes(folder: Path, marker: Path) -> Path:
    data = bytearray(archive(pickle.dumps({}, 2), {"data/0": bytes(64), "data/1": bytes(64)}))
    first = data.index(b"PK\x01\x02")
    second = data.rindex(b"PK\x01\x02")
    data[second + 42 : second + 46] = data[first + 42 : first + 46]
    return put(folder, "a.pt", bytes(data))


@case("zip bomb")
def thirty_thousand_records(folder: Path, marker: Path) -> Path:
    records = {f"data/{n}": b"" for n in range(30_000)}
    return put(folder, "a.pt", archive(pickle.dumps({}, 2), records))


# --- Flipped bits ---


def flip(path: Path, at: int, bit: int = 0) -> Path:
    data = bytearray(path.read_bytes())
    data[at] ^= 1 << bit
    path.write_bytes(bytes(data))
    return path


@case("bit flip")
def in_a_record_of_an_archive(folder: Path, marker: Path) -> Path:
    path = folder / "a.pt"
    torch.save(weights(), path)
    return flip(path, path.stat().st_size // 2)


@case("bit flip")
def in_the_weights_of_our_own_checkpoint(folder: Path, marker: Path) -> Path:
    from wm_victim import build_classifier, save_classifier

    path = folder / "a.safetensors"
    model = build_classifier("resnet10", num_classes=4, channels=1, image_size=16, width=8)
    save_classifier(model, path)
    return flip(path, path.stat().st_size - 4097)


@case("bit flip")
def in_the_header_of_safetensors(folder: Path, marker: Path) -> Path:
    return flip(put(folder, "a.safetensors", save(weights())), 40, bit=7)


@case("bit flip")
def in_an_exponent(folder: Path, marker: Path) -> Path:
    path = folder / "a.safetensors"
    state = weights()
    name = max(state)
    state = OrderedDict([(name, torch.full_like(state[name], 1.5)), *state.items()])
    state[name] = torch.full_like(state[name], 1.5)
    save_file(state, path)
    at = path.read_bytes().index(struct.pack("<f", 1.5))
    return flip(path, at + 3, bit=6)


@case("bit flip")
def in_the_length_of_a_graph(folder: Path, marker: Path) -> Path:
    return flip(onnx_file(folder, graph()), 3, bit=2)
