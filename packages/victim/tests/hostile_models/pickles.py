"""Files whose reader would run their pickles."""

import io
import json
import os
import pickle
import struct
import tarfile
import zipfile
import zlib
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

from .case import case, put

# --- Pickles that run code ---


class Acts:
    """Unpickled, it calls a function."""

    def __init__(self, call: Callable[..., Any], *args: Any) -> None:
        self.call, self.args = call, args

    def __reduce__(self) -> tuple[Any, ...]:
        return self.call, self.args


def shell(marker: Path) -> Acts:
    return Acts(os.system, f"touch '{marker}'")


def archive(pickled: bytes, records: dict[str, bytes] | None = None) -> bytes:
    """A zip as torch.save writes it."""
    out = io.BytesIO()
    with zipfile.ZipFile(out, "w", zipfile.ZIP_STORED) as file:
        file.writestr("archive/data.pkl", pickled)
        file.writestr("archive/version", b"3\n")
        file.writestr("archive/byteorder", b"little")
        for name, data in (records or {}).items():
            file.writestr(f"archive/{name}", data)
    return out.getvalue()


@case("pickle runs code")
def system_in_an_archive(folder: Path, marker: Path) -> Path:
    return put(folder, "a.pt", archive(pickle.dumps(shell(marker), 2)))


@case("pickle runs code")
def exec_in_a_bare_pickle(folder: Path, marker: Path) -> Path:
    return put(folder, "a.pkl", pickle.dumps(Acts(exec, f"open({str(marker)!r}, 'w').close()"), 4))


@case("pickle runs code")
def inst_of_protocol_zero(folder: Path, marker: Path) -> Path:
    return put(folder, "a.pth", f"(S'touch {marker}'\nios\nsystem\n.".encode())


@case("pickle runs code")
def inst_in_an_archive(folder: Path, marker: Path) -> Path:
    return put(folder, "a.pt", archive(f"(S'touch {marker}'\nios\nsystem\n.".encode()))


@case("pickle runs code")
def stack_global_in_an_archive(folder: Path, marker: Path) -> Path:
    return put(folder, "a.pt", archive(pickle.dumps(shell(marker), 4)))


@case("pickle runs code")
def getattr_chain_in_an_archive(folder: Path, marker: Path) -> Path:
    code = b"\x80\x02cbuiltins\ngetattr\n(cpathlib\nPath\nX\x05\x00\x00\x00touchtR"
    text = str(marker).encode()
    code += b"(cpathlib\nPath\n(X" + struct.pack("<I", len(text)) + text + b"tRtR."
    return put(folder, "a.pt", archive(code))


@case("pickle runs code", child=True)
def build_with_setstate(folder: Path, marker: Path) -> Path:
    code = b"\x80\x02ctorch.nn.modules.module\nModule\n)\x81}X\x01\x00\x00\x00aK\x01sb."
    return put(folder, "a.pt", archive(code))


@case("pickle runs code")
def legacy_torch_file(folder: Path, marker: Path) -> Path:
    out = io.BytesIO()
    torch.save(
        {"weight": torch.ones(2), "x": shell(marker)}, out, _use_new_zipfile_serialization=False
    )
    return put(folder, "a.pth", out.getvalue())


def legacy(content: Any) -> bytes:
    """A file in torch's older form, without an archive."""
    out = io.BytesIO()
    torch.save(content, out, _use_new_zipfile_serialization=False)
    return out.getvalue()


@case("pickle runs code")
def code_in_the_head_of_the_older_form(folder: Path, marker: Path) -> Path:
    data = legacy({"weight": torch.ones(2)})
    head = data.index(b"\x80", 20)  # behind the signature and the version
    return put(folder, "a.pth", data[:head] + pickle.dumps(shell(marker), 2) + data[head:])


@case("pickle runs code")
def code_behind_the_weights_of_the_older_form(folder: Path, marker: Path) -> Path:
    data = legacy({"weight": torch.ones(2)})
    keys = data.rindex(b"\x80\x02")  # the list of storages
    return put(folder, "a.pth", data[:keys] + pickle.dumps(shell(marker), 2) + data[keys:])


@case("pickle runs code")
def compressed_as_joblib_writes(folder: Path, marker: Path) -> Path:
    return put(folder, "a.joblib", zlib.compress(pickle.dumps(shell(marker), 2)))


@case("pickle runs code", child=True)
def whole_module(folder: Path, marker: Path) -> Path:
    path = folder / "a.pt"
    torch.save(torch.nn.Linear(2, 2), path)
    return path


@case("pickle runs code")
def named_as_safetensors(folder: Path, marker: Path) -> Path:
    return put(folder, "a.safetensors", pickle.dumps(shell(marker), 2))


# --- Ways around weights_only ---


def tensor_pickle(*, size: int, numel: int, tail: bytes = b".") -> bytes:
    """The instructions that make a float tensor (size,) on a storage of ``numel``, key 0."""
    code = b"\x80\x02ctorch._utils\n_rebuild_tensor_v2\n((X\x07\x00\x00\x00storage"
    code += b"ctorch\nFloatStorage\nX\x01\x00\x00\x000X\x03\x00\x00\x00cpuJ"
    code += struct.pack("<i", numel) + b"tQK\x00J" + struct.pack("<i", size) + b"\x85K\x01\x85"
    return code + b"\x89ccollections\nOrderedDict\n)RtR" + tail


@case("weights-only bypass")
def old_tar_form(folder: Path, marker: Path) -> Path:
    path = folder / "a.pt"
    with tarfile.open(path, "w") as file:
        for name in ("storages", "tensors", "pickle"):
            data = pickle.dumps(shell(marker), 2)
            entry = tarfile.TarInfo(name)
            entry.size = len(data)
            file.addfile(entry, io.BytesIO(data))
    return path


@case("weights-only bypass", child=True)
def item_set_on_a_tensor(folder: Path, marker: Path) -> Path:
    code = tensor_pickle(size=2, numel=2, tail=b"K\x00K\x01s.")
    return put(folder, "a.pt", archive(code, {"data/0": bytes(8)}))


@case("weights-only bypass", child=True)
def storage_shorter_than_it_says(folder: Path, marker: Path) -> Path:
    code = b"\x80\x02}X\x01\x00\x00\x00w" + tensor_pickle(size=999, numel=999)[2:-1] + b"s."
    return put(folder, "a.pt", archive(code, {"data/0": bytes(8)}))


@case("weights-only bypass", child=True)
def view_beyond_its_storage(folder: Path, marker: Path) -> Path:
    code = b"\x80\x02}X\x01\x00\x00\x00w" + tensor_pickle(size=999, numel=2)[2:-1] + b"s."
    return put(folder, "a.pt", archive(code, {"data/0": bytes(8)}))


@case("weights-only bypass", child=True)
def bytearray_of_six_gigabytes(folder: Path, marker: Path) -> Path:
    return put(
        folder, "a.pt", archive(b"\x80\x02cbuiltins\nbytearray\n\x8a\x05\0\0\0\x80\x01\x85R.")
    )


@case("weights-only bypass")
def rebuilding_from_a_type(folder: Path, marker: Path) -> Path:
    code = b"\x80\x02ctorch._tensor\n_rebuild_from_type_v2\n(cos\nsystem\n(tR."
    return put(folder, "a.pt", archive(code))


@case("weights-only bypass", child=True)
def tuples_that_double_as_a_key(folder: Path, marker: Path) -> Path:
    code = b"\x80\x02K\x01" + b"".join(b"q%cq\xff" % n + b"h%c\x86" % n for n in range(40))
    return put(folder, "a.pt", archive(b"\x80\x02}(" + code[2:] + b"K\x01u."))


@case("weights-only bypass", child=True)
def one_storage_as_a_thousand_tensors(folder: Path, marker: Path) -> Path:
    code = tensor_pickle(size=1, numel=4)
    wide = code.replace(b"\x85K\x01\x85", b"\x85K\x00\x85").replace(
        b"K\x00J" + struct.pack("<i", 1), b"K\x00J" + struct.pack("<i", 2**30)
    )
    body = b"".join(b"X\x02\x00\x00\x00" + b"%02d" % n + wide[2:-1] for n in range(60))
    return put(folder, "a.pt", archive(b"\x80\x02}(" + body + b"u.", {"data/0": bytes(16)}))


@case("weights-only bypass", child=True)
def older_form_that_claims_six_gigabytes(folder: Path, marker: Path) -> Path:
    data = legacy({"w": torch.ones(2)})
    claim = b"\x8a\x05" + (6 * 2**28).to_bytes(5, "little")
    return put(folder, "a.pth", data.replace(b"K\x02Nt", claim + b"Nt"))


@case("weights-only bypass", child=True)
def bytes_behind_the_older_form(folder: Path, marker: Path) -> Path:
    return put(folder, "a.pth", legacy({"w": torch.ones(2)}) + pickle.dumps(shell(marker), 2))


@case("weights-only bypass")
def two_pickles_in_one_archive(folder: Path, marker: Path) -> Path:
    bad = {"other/data.pkl": pickle.dumps(shell(marker), 2)}
    return put(folder, "a.pt", archive(pickle.dumps({}, 2), bad))


@case("weights-only bypass")
def code_behind_the_end_of_the_pickle(folder: Path, marker: Path) -> Path:
    code = pickle.dumps({}, 2) + pickle.dumps(shell(marker), 2)
    return put(folder, "a.pt", archive(code))


# --- Programs of torch.export ---


def program(folder: Path, records: dict[str, bytes]) -> Path:
    path = folder / "a.pt2"
    with zipfile.ZipFile(path, "w") as file:
        file.writestr("a/archive_format", b"pt2")
        file.writestr("a/models/model.json", b"{}")
        for name, data in records.items():
            file.writestr(f"a/{name}", data)
    return path


@case("pt2 pickle")
def pickled_weights(folder: Path, marker: Path) -> Path:
    weights = pickle.dumps(shell(marker), 2)
    config = json.dumps({"config": {"w": {"path_name": "weight_0", "use_pickle": True}}})
    return program(
        folder,
        {
            "data/weights/weight_0": weights,
            "data/weights/model_weights_config.json": config.encode(),
        },
    )


@case("pt2 pickle")
def pickled_sample_inputs(folder: Path, marker: Path) -> Path:
    return program(folder, {"data/sample_inputs/model.pt": archive(pickle.dumps(shell(marker), 2))})


@case("pt2 pickle")
def pickled_constants(folder: Path, marker: Path) -> Path:
    return program(folder, {"data/constants/custom_obj_0": pickle.dumps(shell(marker), 2)})


@case("pt2 pickle")
def pickled_program_as_pt(folder: Path, marker: Path) -> Path:
    path = program(folder, {"data.pkl": pickle.dumps(shell(marker), 2)})
    return path.rename(folder / "a.pt")
