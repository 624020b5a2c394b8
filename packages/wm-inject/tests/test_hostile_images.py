"""Images from strangers: each is read right or named in one line; nothing crashes or swells."""

from __future__ import annotations

import re
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest

sys.path.append(str(Path(__file__).parent))
from hostile_images import BAD, ODD, encoded, picture

from wm_inject.core import decode
from wm_inject.core.decode import is_picture, read_header
from wm_inject.core.images import load_image


def test_there_are_enough_of_them():
    assert len(BAD) >= 60 and len(ODD) >= 20


def test_odd_images_are_read_right(tmp_path, subtests):
    for name in ODD:
        with subtests.test(name=name):
            make, allowed, grey = ODD[name]
            path = make(tmp_path)
            want = picture()[..., :1] if grey else picture()
            found = load_image(path, channels=1 if grey else 3)
            assert found.shape == want.shape and found.dtype == np.uint8
            assert int(np.abs(found.astype(int) - want).max()) <= allowed
            if "exif" not in name:
                assert read_header(path)[:2] == want.shape[1::-1]
            assert is_picture(path)


@pytest.mark.integration
def test_bad_images_are_named_in_one_line(tmp_path, subtests):
    for name in BAD:
        with subtests.test(name=name):
            path = BAD[name](tmp_path)
            start = time.monotonic()
            with pytest.raises(ValueError) as refused:
                load_image(path)
            assert time.monotonic() - start < 10
            message = str(refused.value)
            assert path.name in message and "\n" not in message and len(message) < 400
            # Whose object or function failed inside a library helps nobody.
            assert not re.search(r"<_io|decoder error|0x|None", message)


def test_libraries_write_no_lines_of_their_own(tmp_path):
    """libtiff writes to the second descriptor from C; Pillow warns."""
    for number, name in enumerate(name for name in BAD if "tiff" in name):
        (tmp_path / f"{number}.tif").write_bytes(BAD[name](tmp_path).read_bytes())
    broken = bytearray(encoded("TIFF", compression="tiff_lzw"))
    broken[20:200] = b"\xff" * 180
    (tmp_path / "lzw.tif").write_bytes(broken)
    code = f"""
from pathlib import Path
from wm_inject.command.common import run_cli
from wm_inject.core.image_files import find_images
from wm_inject.core.images import load_images
def read(_):
    found = find_images(Path({str(tmp_path)!r}))
    pixels, _, unread = load_images(found.folder, found.names, size=8, channels=3)
    print(len(pixels), len(unread))
run_cli(read)
"""
    run = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert int(run.stdout.split()[1]) >= 8
    assert run.stderr == ""


@pytest.mark.integration
def test_bad_images_fill_no_memory(tmp_path):
    """All of them in one process that may have 512 MB beside what it starts with."""
    for number, make in enumerate(BAD.values()):
        (tmp_path / str(number)).mkdir()
        make(tmp_path / str(number))
    code = f"""
import resource, sys
from pathlib import Path
from wm_inject.core.images import load_image
limit = int(Path("/proc/self/statm").read_text().split()[0]) * 4096 + 512 * 2**20
resource.setrlimit(resource.RLIMIT_AS, (limit, limit))
count = 0
for folder in Path({str(tmp_path)!r}).iterdir():
    for path in folder.iterdir():
        if path.name == "target":
            continue
        try:
            load_image(path)
        except ValueError:
            count += 1
print(count)
"""
    run = subprocess.run(
        [sys.executable, "-W", "error", "-c", code], capture_output=True, text=True, check=False
    )
    assert run.returncode == 0, run.stderr[-2000:]
    assert int(run.stdout) == len(BAD)


def test_bounds_are_those_of_the_module(tmp_path, monkeypatch):
    path = ODD["png"][0](tmp_path)
    monkeypatch.setattr(decode, "MAX_PIXELS", 24 * 24 - 1)
    with pytest.raises(ValueError, match=r"a\.png as an image: expected at most 575 pixels"):
        load_image(path)
    with pytest.raises(ValueError, match="at most 575 pixels"):
        read_header(path)
    monkeypatch.setattr(decode, "MAX_BYTES", 10)
    with pytest.raises(ValueError, match=r"expected 1 \.\. 10 bytes"):
        load_image(path)
