"""Files that call themselves images, made by code: odd ones that are to be read, and bad ones.

`ODD` are files whose picture is known; `BAD` are damaged, oversized, or no pictures at all. Each is
a function of the folder that it writes into, and gives the path.
"""

from __future__ import annotations

import io
import os
import struct
import zlib
from collections.abc import Callable
from pathlib import Path

import numpy as np
from PIL import Image

SIDE = 24
Maker = Callable[[Path], Path]


def picture() -> np.ndarray:
    """A gradient with a bright corner: no two of its four corners alike."""
    y, x = np.mgrid[:SIDE, :SIDE]
    pixels = np.stack([10 * x, 10 * y, 5 * (x + y)], axis=2).astype(np.uint8)
    pixels[:4, :4] = (250, 240, 20)
    return pixels


def encoded(kind: str, image: Image.Image | None = None, **options: object) -> bytes:
    stream = io.BytesIO()
    (image or Image.fromarray(picture())).save(stream, format=kind, **options)
    return stream.getvalue()


def file(name: str, content: Callable[[], bytes]) -> Maker:
    def make(folder: Path) -> Path:
        path = folder / name
        path.write_bytes(content())
        return path

    return make


def chunk(kind: bytes, body: bytes, *, crc: int | None = None) -> bytes:
    """One chunk of a PNG file."""
    right = zlib.crc32(kind + body)
    return (
        struct.pack(">I", len(body))
        + kind
        + body
        + struct.pack(">I", right if crc is None else crc)
    )


def png(
    width: int, height: int, data: bytes, *, depth: int = 8, colour: int = 2, more: bytes = b""
) -> bytes:
    """A PNG file whose header may lie about its data."""
    header = struct.pack(">IIBBBBB", width, height, depth, colour, 0, 0, 0)
    start = b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + more
    return start + chunk(b"IDAT", data) + chunk(b"IEND", b"")


def sixteen_bits() -> np.ndarray:
    return picture()[..., 0].astype(np.uint16) * 257


def flipped(kind: str, place: float, count: int) -> bytes:
    """A file with some bytes turned over, from a place on (as a share of its length)."""
    content = bytearray(encoded(kind))
    start = int(place * len(content))
    for index in range(start, min(start + count, len(content))):
        content[index] ^= 0xFF
    return bytes(content)


def rotated(orientation: int) -> bytes:
    """The picture stored turned, with the EXIF tag that turns it back."""
    turns = {3: 2, 6: 1, 8: 3}
    exif = Image.Exif()
    exif[0x0112] = orientation
    stored = Image.fromarray(np.rot90(picture(), turns[orientation]).copy())
    return encoded("PNG", stored, exif=exif)


def palette(*, transparent: bool) -> bytes:
    image = Image.fromarray(picture()).quantize(64)
    options = {"transparency": bytes(range(64))} if transparent else {}
    return encoded("PNG", image, **options)


def _link(folder: Path) -> Path:
    (folder / "target").mkdir(exist_ok=True)
    real = folder / "target" / "real.png"
    real.write_bytes(encoded("PNG"))
    (folder / "link.png").symlink_to(real)
    return folder / "link.png"


# Name to maker and the largest difference from `picture` that is right for it; "grey" is compared
# as grey.
ODD: dict[str, tuple[Maker, int, bool]] = {
    "png": (file("a.png", lambda: encoded("PNG")), 0, False),
    "png called jpg": (file("a.jpg", lambda: encoded("PNG")), 0, False),
    "jpeg": (file("b.jpg", lambda: encoded("JPEG", quality=100, subsampling=0)), 12, False),
    "progressive jpeg": (
        file("c.jpg", lambda: encoded("JPEG", quality=100, subsampling=0, progressive=True)),
        12,
        False,
    ),
    "cmyk jpeg": (
        file(
            "d.jpg",
            lambda: encoded("JPEG", Image.fromarray(picture()).convert("CMYK"), quality=100),
        ),
        40,
        False,
    ),
    "webp": (file("e.webp", lambda: encoded("WEBP", lossless=True)), 0, False),
    "bmp": (file("f.bmp", lambda: encoded("BMP")), 0, False),
    "ppm": (file("g.ppm", lambda: encoded("PPM")), 0, False),
    "tiff": (file("h.tif", lambda: encoded("TIFF")), 0, False),
    "compressed tiff": (file("i.tiff", lambda: encoded("TIFF", compression="tiff_lzw")), 0, False),
    "interlaced-like optimised png": (
        file("j.png", lambda: encoded("PNG", optimize=True)),
        0,
        False,
    ),
    "palette": (file("k.png", lambda: palette(transparent=False)), 40, False),
    "palette with transparency": (file("l.png", lambda: palette(transparent=True)), 40, False),
    "alpha": (
        file(
            "m.png",
            lambda: encoded("PNG", Image.fromarray(np.dstack([picture(), picture()[..., 0]]))),
        ),
        0,
        False,
    ),
    "grey": (file("n.png", lambda: encoded("PNG", Image.fromarray(picture()[..., 0]))), 0, True),
    "grey with alpha": (
        file("o.png", lambda: encoded("PNG", Image.fromarray(picture()[..., 0]).convert("LA"))),
        0,
        True,
    ),
    "16 bits, grey png": (
        file("p.png", lambda: encoded("PNG", Image.fromarray(sixteen_bits()))),
        0,
        True,
    ),
    "16 bits, grey tiff": (
        file("q.tif", lambda: encoded("TIFF", Image.fromarray(sixteen_bits()))),
        0,
        True,
    ),
    "one bit": (
        file("r.png", lambda: encoded("PNG", Image.fromarray(picture()[..., 0] > 127))),
        128,
        True,
    ),
    "turned by exif 3": (file("s.png", lambda: rotated(3)), 0, False),
    "turned by exif 6": (file("t.png", lambda: rotated(6)), 0, False),
    "turned by exif 8": (file("u.png", lambda: rotated(8)), 0, False),
    "gif": (
        file("x.gif", lambda: encoded("GIF", Image.fromarray(picture()).quantize(64))),
        40,
        False,
    ),
    "gif called png": (
        file("y.png", lambda: encoded("GIF", Image.fromarray(picture()).quantize(64))),
        40,
        False,
    ),
    "jfif": (file("z.jfif", lambda: encoded("JPEG", quality=100, subsampling=0)), 12, False),
    "no suffix": (file("picture", lambda: encoded("PNG")), 0, False),
    "another suffix": (file("picture.PNG.bak", lambda: encoded("BMP")), 0, False),
    "text chunk": (
        file(
            "v.png",
            lambda: encoded("PNG")[:33] + chunk(b"tEXt", b"Title\0<script>") + encoded("PNG")[33:],
        ),
        0,
        False,
    ),
    "bytes after the end": (file("w.png", lambda: encoded("PNG") + b"PK\x03\x04" * 50), 0, False),
    "a link": (_link, 0, False),
    "a name with spaces and umlauts": (
        file("ein Bild ä%20'\".png", lambda: encoded("PNG")),
        0,
        False,
    ),
}


def _cut(kind: str, share: float) -> Callable[[], bytes]:
    return lambda: encoded(kind)[: int(share * len(encoded(kind)))]


def _frames(kind: str) -> bytes:
    more = [Image.fromarray(np.roll(picture(), n, axis=0)) for n in (1, 2)]
    return encoded(kind, save_all=True, append_images=more)


def _large(width: int, height: int) -> bytes:
    """A small file of a large picture: rows of zeros compress a thousandfold."""
    packer = zlib.compressobj(9)
    row = bytes(1 + 3 * width)
    data = b"".join(packer.compress(row) for _ in range(height)) + packer.flush()
    return png(width, height, data)


def _fifo(folder: Path) -> Path:
    os.mkfifo(folder / "pipe.png")
    return folder / "pipe.png"


def _folder(folder: Path) -> Path:
    (folder / "folder.png").mkdir()
    return folder / "folder.png"


def _dangling(folder: Path) -> Path:
    (folder / "gone.png").symlink_to(folder / "nothing")
    return folder / "gone.png"


def _device(folder: Path) -> Path:
    (folder / "zero.png").symlink_to("/dev/zero")
    return folder / "zero.png"


def _sparse(folder: Path) -> Path:
    with (folder / "sparse.png").open("wb") as out:
        out.write(encoded("PNG"))
        out.truncate(1 << 30)
    return folder / "sparse.png"


def _locked(folder: Path) -> Path:
    """A loop of links, which nobody can open."""
    (folder / "loop.png").symlink_to(folder / "loop.png")
    return folder / "loop.png"


_TIFF_LOOP = (
    b"II*\0\x08\0\0\0" + b"\x01\0" + struct.pack("<HHII", 256, 4, 1, 9) + struct.pack("<I", 8)
)

BAD: dict[str, Maker] = {
    **{
        f"{kind.lower()} cut at {share:.0%}": file(f"cut{n}.{kind.lower()}", _cut(kind, share))
        for n, (kind, share) in enumerate(
            [(k, s) for k in ("PNG", "JPEG", "WEBP", "BMP", "TIFF", "PPM") for s in (0.1, 0.5)]
        )
    },
    "png cut at 95%": file("cut95.png", _cut("PNG", 0.6)),
    "png without its end": file("noend.png", lambda: encoded("PNG")[:-40]),
    "empty": file("empty.png", lambda: b""),
    "one byte": file("one.png", lambda: b"\x89"),
    "text": file("text.png", lambda: b"this is no picture\n" * 30),
    "html": file("page.jpg", lambda: b"<html><script>alert(1)</script></html>"),
    "svg": file("drawing.png", lambda: b"<svg xmlns='http://www.w3.org/2000/svg' width='9'/>"),
    "zip": file("archive.png", lambda: b"PK\x03\x04" + bytes(200)),
    "elf": file("program.png", lambda: b"\x7fELF" + bytes(200)),
    "pdf": file("paper.png", lambda: b"%PDF-1.7\n" + bytes(100)),
    "postscript": file("script.png", lambda: b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 9 9\n"),
    "ico": file("icon.png", lambda: encoded("ICO")),
    "avif": file("new.avif", lambda: b"\0\0\0\x1cftypavif" + bytes(90)),
    "heic": file("phone.jpg", lambda: b"\0\0\0\x18ftypheic" + bytes(90)),
    "jpeg xl": file("new.jxl", lambda: b"\xff\x0a" + bytes(90)),
    "jpeg 2000": file("scan.jp2", lambda: b"\0\0\0\x0cjP  \r\n\x87\n" + bytes(90)),
    "photoshop": file("layers.psd", lambda: b"8BPS\0\1" + bytes(90)),
    "pickle": file("model.png", lambda: b"\x80\x04\x95\x0b\0\0\0\0\0\0\0\x8c\x07builtin\x94."),
    "animated gif": file("moving.gif", lambda: _frames("GIF")),
    "animated png": file("moving.png", lambda: _frames("PNG")),
    "animated webp": file("moving.webp", lambda: _frames("WEBP")),
    "tiff of several pages": file("pages.tif", lambda: _frames("TIFF")),
    "tiff of floats": file(
        "floats.tif", lambda: encoded("TIFF", Image.fromarray(picture()[..., 0] / np.float32(255)))
    ),
    "tiff of 32-bit values": file(
        "wide.tif",
        lambda: encoded("TIFF", Image.fromarray(picture()[..., 0].astype(np.int32) * 1_000_000)),
    ),
    "tiff that points to itself": file("ring.tif", lambda: _TIFF_LOOP),
    "png with a wrong checksum": file("crc.png", lambda: png(8, 8, b"").replace(b"IDAT", b"IDAU")),
    "png with a wrong checksum in its data": file(
        "crc2.png",
        lambda: encoded("PNG")[:33] + chunk(b"IDAT", encoded("PNG")[41:80], crc=7),
    ),
    "png without data": file("nodata.png", lambda: png(8, 8, b"")),
    "png with garbage for data": file("garbage.png", lambda: png(8, 8, b"\x99" * 60)),
    "png with too little data": file("little.png", lambda: png(64, 64, zlib.compress(bytes(50)))),
    "png of no size": file("nosize.png", lambda: png(0, 8, zlib.compress(b"\0"))),
    "png of a colour that is none": file(
        "colour.png", lambda: png(8, 8, zlib.compress(bytes(500)), colour=5)
    ),
    "png of a depth that is none": file(
        "depth.png", lambda: png(8, 8, zlib.compress(bytes(500)), depth=5)
    ),
    "png with a chunk of two gigabytes": file(
        "chunk.png",
        lambda: b"\x89PNG\r\n\x1a\n" + struct.pack(">I", 2**31 - 1) + b"IHDR" + bytes(13),
    ),
    "png with a text bomb": file(
        "note.png",
        lambda: png(
            8,
            8,
            zlib.compress(bytes(8 * 25)),
            more=chunk(b"zTXt", b"a\0\0" + zlib.compress(bytes(80_000_000), 9)),
        ),
    ),
    "png that says it has four giga pixels": file(
        "giant.png", lambda: png(65535, 65535, zlib.compress(bytes(100)))
    ),
    "png of 60 million real pixels": file("bomb.png", lambda: _large(10_000, 6_000)),
    "png of 200 million pixels": file(
        "bomb2.png", lambda: png(20_000, 10_000, zlib.compress(bytes(9)))
    ),
    "jpeg header that says 65500 x 65500": file(
        "giant.jpg",
        lambda: encoded("JPEG").replace(
            struct.pack(">HH", SIDE, SIDE), struct.pack(">HH", 65500, 65500), 1
        ),
    ),
    "ppm header of a billion": file("giant.ppm", lambda: b"P6 40000 40000 255\n" + bytes(30)),
    "ppm of negative size": file("minus.ppm", lambda: b"P6 -4 4 255\n" + bytes(48)),
    "bmp header of a billion": file(
        "giant.bmp",
        lambda: encoded("BMP")[:18] + struct.pack("<ii", 40000, 40000) + encoded("BMP")[26:],
    ),
    "bmp of an unknown compression": file(
        "packed.bmp", lambda: encoded("BMP")[:30] + struct.pack("<I", 77) + encoded("BMP")[34:]
    ),
    "png turned over in its header": file("flip1.png", lambda: flipped("PNG", 0.0, 12)),
    "png turned over in its data": file("flip2.png", lambda: flipped("PNG", 0.5, 20)),
    "webp turned over in its header": file("flip3.webp", lambda: flipped("WEBP", 0.0, 20)),
    "tiff turned over in its header": file("flip4.tif", lambda: flipped("TIFF", 0.0, 8)),
    "jpeg of headers alone": file("heads.jpg", lambda: b"\xff\xd8\xff\xe0\0\x10JFIF\0" + bytes(40)),
    "jpeg that only starts": file("start.jpg", lambda: b"\xff\xd8\xff"),
    "a pipe": _fifo,
    "a folder": _folder,
    "a link to nothing": _dangling,
    "a link to an endless device": _device,
    "a link to itself": _locked,
    "a gigabyte of holes": _sparse,
}
