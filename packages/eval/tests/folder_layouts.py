"""Folders of labelled images as people have them, and what every command has to read there."""

from __future__ import annotations

import io
import unicodedata
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

SIDE = 8


@dataclass(frozen=True)
class Layout:
    """A folder, and what is right for it.

    Args:
        images: Names of its images.
        labels: The class of every image by its name; None if nothing tells them, a part of the
            message if the folder is to be refused.
        files: Other files with their contents; "" with a name ending in "/" for an empty folder.
        links: Links to folders, by name: the folder that they lead to, as seen from the root.
        left_out: What is not read, exactly.
        classes: The classes in their order; those of ``labels``, sorted or counted, if None.
        parts: The parts for training and testing of images, by the beginnings of their names.
        formats: Formats of images that are no PNG.
    """

    images: tuple[str, ...]
    labels: dict[str, str] | str | None
    files: dict[str, str | bytes] = field(default_factory=dict)
    links: dict[str, str] = field(default_factory=dict)
    left_out: tuple[str, ...] = ()
    classes: tuple[str, ...] | None = None
    parts: dict[str, str] = field(default_factory=dict)
    formats: dict[str, str] = field(default_factory=dict)

    def make(self, root: Path) -> Path:
        """Write it below ``root``; image number n is grey of the value 3 n."""
        folder = root / "set"
        folder.mkdir(parents=True)
        for number, name in enumerate(self.images):
            path = folder / name
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_bytes(_picture(3 * number, self.formats.get(name, "PNG")))
        for name, content in self.files.items():
            path = folder / name
            path.parent.mkdir(parents=True, exist_ok=True)
            if name.endswith("/"):
                path.mkdir()
            else:
                path.write_bytes(content if isinstance(content, bytes) else content.encode())
        for name, target in self.links.items():
            (folder / name).symlink_to(target, target_is_directory=True)
        return folder

    def part(self, name: str) -> str:
        """The part of an image: "train", "val", "test" or ""."""
        return next((p for start, p in self.parts.items() if name.startswith(start)), "")


def _picture(value: int, kind: str) -> bytes:
    stream = io.BytesIO()
    options: dict[str, Any] = {"lossless": True} if kind == "WEBP" else {}
    Image.fromarray(np.full((SIDE, SIDE, 3), value, np.uint8)).save(stream, kind, **options)
    return stream.getvalue()


def _images(*folders: str, count: int = 4, suffix: str = ".png") -> tuple[str, ...]:
    """``count`` images in each of some folders, numbered through."""
    numbers = iter(range(len(folders) * count))
    return tuple(f"{folder}{next(numbers):02}{suffix}" for folder in folders for _ in range(count))


def _by_folder(images: tuple[str, ...], place: int = 0) -> dict[str, str]:
    return {name: name.split("/")[place] for name in images}


def _turns(names: tuple[str, ...], *labels: str) -> dict[str, str]:
    """Labels taken in turns."""
    return {name: labels[number % len(labels)] for number, name in enumerate(names)}


PETS = _images("cat/", "dog/", "fox/")
LOOSE = _images("", count=12)
KINDS = _turns(LOOSE, "cat", "dog", "fox")
NUMBERS = _turns(LOOSE, "0", "1", "2")
SPLIT = _images("train/cat/", "train/dog/", "test/cat/", "test/dog/")
TEST = {"train/": "train", "test/": "test", "val/": "val"}


def _table(
    labels: dict[str, str], header: str = "file,label", row: str = "{},{}", end: str = "\n"
) -> str:
    rows = [row.format(name, label) for name, label in labels.items()]
    return end.join([*([header] if header else []), *rows, ""])


def _labelled(table: str | bytes, name: str = "labels.csv", **more: Any) -> Layout:
    """Twelve loose images and a table beside them."""
    return Layout(LOOSE, KINDS, {name: table}, **more)


LAYOUTS: dict[str, Layout] = {
    # --- class folders
    "class folders": Layout(PETS, _by_folder(PETS)),
    "folders of numbers": Layout(
        n := _images("0/", "1/", "10/"), _by_folder(n), classes=tuple(map(str, range(11)))
    ),
    "folders of numbers with zeros": Layout(
        n := _images("00000/", "00001/", "00010/"),
        {name: str(int(name[:5])) for name in n},
        classes=tuple(map(str, range(11))),
    ),
    "numbers beside names": Layout(n := _images("7/", "cat/"), _by_folder(n)),
    "folders inside classes": Layout(n := _images("cat/a/", "cat/b/", "dog/"), _by_folder(n)),
    "hidden folder beside": Layout(
        PETS,
        _by_folder(PETS),
        {".ipynb_checkpoints/a.png": _picture(1, "PNG")},
        left_out=(".ipynb_checkpoints/",),
    ),
    "hidden folder inside": Layout(
        PETS,
        _by_folder(PETS),
        {"cat/.ipynb_checkpoints/00-checkpoint.png": _picture(1, "PNG")},
        left_out=("cat/.ipynb_checkpoints/",),
    ),
    "archive of macOS": Layout(
        PETS,
        _by_folder(PETS),
        {"__MACOSX/cat/._00.png": b"Mac OS X", "cat/._00.png": b"Mac OS X", ".DS_Store": b"Bud1"},
        left_out=(".DS_Store", "__MACOSX/", "cat/._00.png"),
    ),
    "files of Windows": Layout(
        PETS,
        _by_folder(PETS),
        {"cat/Thumbs.db": b"\xd0\xcf", "desktop.ini": "[x]"},
        left_out=("cat/Thumbs.db", "desktop.ini"),
    ),
    "empty class folder": Layout(
        n := _images("cat/", "fox/"), _by_folder(n), {"dog/": ""}, classes=("cat", "dog", "fox")
    ),
    "class folder of hidden files": Layout(
        n := _images("cat/", "fox/"),
        _by_folder(n),
        {"dog/.DS_Store": b"Bud1"},
        left_out=("dog/.DS_Store",),
        classes=("cat", "dog", "fox"),
    ),
    "folder of other files": Layout(
        PETS,
        _by_folder(PETS),
        {"annotations/a.xml": "<a/>", "readme.md": "hello"},
        left_out=("annotations/a.xml", "readme.md"),
    ),
    "loose picture beside": Layout((*PETS, "logo.png"), _by_folder(PETS), left_out=("logo.png",)),
    "folder around": Layout(n := _images("data/cat/", "data/dog/"), _by_folder(n, 1)),
    "two folders around": Layout(
        n := _images("a/b/cat/", "a/b/dog/"),
        _by_folder(n, 2),
        {"readme.txt": "x"},
        left_out=("readme.txt",),
    ),
    "links to class folders": Layout(
        n := ("../far/cat/00.png", "../far/cat/01.png", *_images("dog/")),
        {f"cat/{k:02}.png": "cat" for k in range(2)} | dict.fromkeys(n[2:], "dog"),
        links={"cat": "../far/cat"},
    ),
    "link that leads back": Layout(
        PETS,
        _by_folder(PETS),
        links={"cat/again": "..", "all": "."},
        left_out=("all/", "cat/again/"),
    ),
    "pictures by content": Layout(
        n := ("cat/00.jfif", "cat/01.PNG.bak", "cat/02", "cat/03.gif", *_images("dog/")),
        _by_folder(n),
        formats={"cat/00.jfif": "JPEG", "cat/03.gif": "GIF"},
    ),
    # --- parts
    "train and test": Layout(SPLIT, _by_folder(SPLIT, 1), parts=TEST),
    "train, val and test": Layout(
        n := _images("train/cat/", "train/dog/", "val/cat/", "val/dog/", "test/cat/", "test/dog/"),
        _by_folder(n, 1),
        parts=TEST,
    ),
    "train and val": Layout(
        n := _images("train/cat/", "train/dog/", "val/cat/", "val/dog/"),
        _by_folder(n, 1),
        parts=TEST,
    ),
    "Training and Testing": Layout(
        n := _images("Training/cat/", "Training/dog/", "Testing/cat/", "Testing/dog/"),
        _by_folder(n, 1),
        parts={"Training/": "train", "Testing/": "test"},
    ),
    "a set inside folders of its own name": Layout(
        n := _images(
            "seg_train/seg_train/sea/",
            "seg_train/seg_train/sky/",
            "seg_test/seg_test/sea/",
            "seg_test/seg_test/sky/",
        ),
        _by_folder(n, 2),
        parts={"seg_train/": "train", "seg_test/": "test"},
    ),
    "one class in the test part": Layout(
        n := _images("train/cat/", "train/dog/", "test/dog/"), _by_folder(n, 1), parts=TEST
    ),
    "train alone": Layout(n := _images("train/cat/", "train/dog/"), _by_folder(n, 1)),
    "empty test folder": Layout(
        n := _images("train/cat/", "train/dog/"), _by_folder(n, 1), {"test/": ""}, parts=TEST
    ),
    "a class called train": Layout(n := _images("bus/", "train/"), _by_folder(n)),
    "GTSRB": Layout(
        n := (
            *_images("GTSRB/Final_Training/Images/00000/", "GTSRB/Final_Training/Images/00002/"),
            *(f"GTSRB/Final_Test/Images/{name}" for name in LOOSE[8:]),
        ),
        {name: str(int(name.split("/")[3])) for name in n[:8]} | _turns(n[8:], "0", "1", "2"),
        {
            "GTSRB/Final_Training/Images/00000/GT-00000.csv": "Filename;Width;ClassId\n00.png;8;0",
            "GTSRB/GT-final_test.csv": _table(
                _turns(LOOSE[8:], "0", "1", "2"), "Filename;Width;ClassId", "{};8;{}"
            ),
            "GTSRB/Final_Test/Images/GT-final_test.test.csv": "Filename;Width\n00.png;8\n",
        },
        left_out=(
            "GTSRB/Final_Test/Images/GT-final_test.test.csv",
            "GTSRB/Final_Training/Images/00000/GT-00000.csv",
        ),
        parts={"GTSRB/Final_Training/": "train", "GTSRB/Final_Test/": "test"},
    ),
    "GTSRB, training alone": Layout(
        n := _images("00000/", "00001/"),
        {name: str(int(name[:5])) for name in n},
        {"00000/GT-00000.csv": "Filename;ClassId\n00.png;0\n"},
        left_out=("00000/GT-00000.csv",),
    ),
    "GTSRB, one class": Layout(
        LOOSE,
        dict.fromkeys(LOOSE, "14"),
        {"GT-00014.csv": _table(dict.fromkeys(LOOSE, "14"), "Filename;ClassId", "{};{}")},
        classes=tuple(map(str, range(15))),
    ),
    "GTSRB of Kaggle": Layout(
        n := (*_images("Meta/"), *_images("Train/0/", "Train/1/"), *_images("Test/")),
        _by_folder(n[4:12], 1) | _turns(n[12:], "0", "1"),
        {
            "Meta.csv": _table(_turns(n[:4], "0", "1"), "Path,ClassId"),
            "Train.csv": "Width,ClassId,Path\n8,0,Train/0/00.png\n",
            "Test.csv": _table(_turns(n[12:], "0", "1"), "Width,ClassId,Path", "8,{1},{0}"),
        },
        left_out=("Meta.csv", *n[:4], "Train.csv"),
        parts={"Train/": "train", "Test/": "test"},
    ),
    "Kaggle": Layout(
        n := (*_images("train/", count=8), *_images("test/")),
        _turns(n[:8], "cat", "dog"),
        {
            "train.csv": _table(_turns(tuple("01234567"), "cat", "dog"), "id,label", "0{},{}"),
            "sample_submission.csv": "id,label\n00,cat\n01,cat\n",
        },
        left_out=("sample_submission.csv", *n[8:]),
        parts=TEST,
    ),
    "CIFAR-10 of Kaggle": Layout(
        n := tuple(f"{part}/{k}.png" for part in ("train", "test") for k in range(1, 7)),
        _turns(n[:6], "cat", "dog"),
        {
            "trainLabels.csv": _table(_turns(tuple("123456"), "cat", "dog"), "id,label"),
            "sampleSubmission.csv": "id,label\n1,cat\n2,cat\n",
        },
        left_out=("sampleSubmission.csv", *n[6:]),
        parts=TEST,
    ),
    "a table in each part": Layout(
        n := (*_images("train/", count=8), *_images("test/")),
        _turns(n, "cat", "dog"),
        {
            "train/metadata.csv": _table(_turns(LOOSE[:8], "cat", "dog"), "file_name,label"),
            "test/metadata.csv": _table(_turns(LOOSE[:4], "cat", "dog"), "file_name,label"),
        },
        parts=TEST,
    ),
    "lists of Caffe": Layout(
        n := _images("images/", count=12),
        _turns(n, "0", "1", "2"),
        {
            "train.txt": _table(_turns(n[:9], "0", "1", "2"), "", "{} {}"),
            "val.txt": _table(_turns(n[9:], "0", "1", "2"), "", "{} {}"),
        },
        parts={name: "train" if k < 9 else "val" for k, name in enumerate(n)},
    ),
    "a column of parts": Layout(
        LOOSE,
        KINDS,
        {
            "sports.csv": _table(
                {
                    name: f"{KINDS[name]},{'train' if k < 8 else 'test'}"
                    for k, name in enumerate(LOOSE)
                },
                "filepaths,labels,data set",
            )
        },
        parts={name: "train" if k < 8 else "test" for k, name in enumerate(LOOSE)},
    ),
    # --- tables
    "labels.csv": _labelled(_table(KINDS)),
    "byte-order mark": _labelled(b"\xef\xbb\xbf" + _table(KINDS).encode()),
    "UTF-16": _labelled(_table(KINDS, "file\tlabel", "{}\t{}").encode("utf-16")),
    "semicolons": _labelled(_table(KINDS, "file;label", "{};{}")),
    "tabs": _labelled(_table(KINDS, "file\tlabel", "{}\t{}"), "labels.tsv"),
    "bars": _labelled(_table(KINDS, "file|label", "{}|{}")),
    "spaces": _labelled(_table(KINDS, "", "{} {}"), "labels.txt"),
    "spaces behind commas": _labelled(_table(KINDS, "file, label", "{} , {} ")),
    "CRLF": _labelled(_table(KINDS, end="\r\n")),
    "CR": _labelled(_table(KINDS, end="\r")),
    "a line on the separator": _labelled("sep=;\n" + _table(KINDS, "file;label", "{};{}")),
    "a comment": _labelled("# by hand\n" + _table(KINDS, "#file,label")),
    "empty lines": _labelled(_table(KINDS, end="\n\n")),
    "capitals": _labelled(_table(KINDS, "FileName,ClassName"), "Labels.CSV"),
    **{
        f"columns {header}": _labelled(_table(KINDS, header))
        for header in (
            *("filename,class", "image,category", "path,label_name", "img,target", "image_id,y"),
            *("file_name,species", "id,breed", "Image Path,Class Label", "what,ever"),
        )
    },
    "no header": _labelled(_table(KINDS, "")),
    "label first": _labelled(_table(KINDS, "label,file", "{1},{0}")),
    "label first, no header": _labelled(_table(KINDS, "", "{1},{0}")),
    "an index of pandas": _labelled(_table(KINDS, ",file,label", "7,{},{}")),
    "another name": _labelled(_table(KINDS), "annotations.csv"),
    "a table with boxes": _labelled(
        _table(KINDS, "filename,width,height,class,xmin,ymin", "{},8,8,{},0,0")
    ),
    "quoted fields": _labelled(_table(KINDS, '"file","label"', '"{}","{}"')),
    "commas in names": Layout(
        n := tuple(f"a, {k:02}.png" for k in range(12)),
        _turns(n, "cat, wild", 'the "wild" dog'),
        {"labels.csv": _table(_turns(n, "cat, wild", 'the ""wild"" dog'), row='"{}","{}"')},
    ),
    "names with spaces": Layout(
        n := tuple(f"my cat {k:02}.png" for k in range(12)),
        _turns(n, "0", "1"),
        {"labels.txt": _table(_turns(n, "0", "1"), "", "{} {}")},
    ),
    "overlong field": _labelled(_table(KINDS, "file,note,label", '{},"' + "x, " * 50_000 + '",{}')),
    "lines in a field": _labelled(_table(KINDS, "file,note,label", '{},"a\nb",{}')),
    "stray quote": _labelled(_table(KINDS).replace("01.png,dog", '01.png,"dog')),
    "stray quote in the file": _labelled(_table(KINDS).replace("01.png", '"01.png')),
    "latin-1": Layout(
        n := tuple(f"\u00e4{k:02}.png" for k in range(12)),
        _turns(n, "M\u00fcll", "Obst"),
        {
            "labels.csv": _table(_turns(n, "M\u00fcll", "Obst"), "file;label", "{};{}").encode(
                "latin-1"
            )
        },
    ),
    "umlauts of macOS": Layout(
        n := tuple(unicodedata.normalize("NFD", f"\u00e4{k:02}.png") for k in range(12)),
        _turns(n, "cat", "dog"),
        {"labels.csv": _table(_turns(LOOSE, "cat", "dog"), row="\u00e4{},{}")},
    ),
    "names that are not UTF-8": Layout(
        n := tuple(f"\udce4{k:02}.png" for k in range(12)),
        _turns(n, "cat", "dog"),
        {"labels.csv": _table(_turns(LOOSE, "cat", "dog"), row="\u00e4{},{}").encode("latin-1")},
    ),
    "numbers": Layout(LOOSE, NUMBERS, {"labels.csv": _table(NUMBERS)}),
    "numbers with fractions": Layout(
        LOOSE, NUMBERS, {"labels.csv": _table(NUMBERS, row="{},{}.0")}
    ),
    "numbers and names": Layout(
        LOOSE,
        _turns(LOOSE, "zebra", "ape", "cow"),
        {"labels.csv": _table(_turns(LOOSE, "0,zebra", "1,ape", "2,cow"), "file,label,label_name")},
        classes=("zebra", "ape", "cow"),
    ),
    "absolute paths of elsewhere": _labelled(_table(KINDS, row="/data/set/{},{}")),
    "paths of Windows": _labelled(_table(KINDS, row="C:\\data\\set\\{},{}")),
    "paths with a dot": _labelled(_table(KINDS, row="./{},{}")),
    "paths with more folders": _labelled(_table(KINDS, row="data/set/{},{}")),
    "paths with fewer folders": Layout(
        n := _images("images/", count=12),
        {name: KINDS[name[7:]] for name in n},
        {"labels.csv": _table(KINDS)},
    ),
    "names without suffix": _labelled(_table({name[:-4]: kind for name, kind in KINDS.items()})),
    "names in capitals": _labelled(_table({name.upper(): k for name, k in KINDS.items()})),
    "files that are not there": _labelled(
        _table(KINDS | {"gone.png": "cat"}), left_out=("gone.png",)
    ),
    "few files of a large table": _labelled(
        _table({f"x{n}.png": "cat" for n in range(500)} | KINDS),
        left_out=tuple(f"x{n}.png" for n in range(500)),
    ),
    "files twice": _labelled(_table(KINDS) + "00.png,cat\n"),
    "images without a row": Layout(
        (*LOOSE, "more.png"), KINDS, {"labels.csv": _table(KINDS)}, left_out=("more.png",)
    ),
    "labels that are empty": Layout(
        LOOSE,
        {name: kind for name, kind in KINDS.items() if name != "03.png"},
        {"labels.csv": _table(KINDS | {"03.png": ""})},
        left_out=("03.png",),
    ),
    "a table over class folders": Layout(
        PETS,
        {name: ("dog" if k == 0 else name[:3]) for k, name in enumerate(PETS)},
        {
            "labels.csv": _table(
                {name: ("dog" if k == 0 else name[:3]) for k, name in enumerate(PETS)}
            )
        },
    ),
    "a table of classes": Layout(
        n := _images("0/", "1/"),
        _by_folder(n),
        {"labels.csv": "ClassId,Name\n0,stop\n1,go\n"},
        left_out=("labels.csv",),
    ),
    # --- no labels
    "loose images": Layout(LOOSE, None),
    "one folder of images": Layout(_images("images/", count=12), None),
    "loose images and a table of something else": Layout(
        LOOSE, None, {"sizes.csv": "width,height\n8,8\n"}, left_out=("sizes.csv",)
    ),
    # --- refused
    "a table in a folder of its own": Layout(
        LOOSE, None, {"notes/list.csv": _table(KINDS)}, left_out=("notes/list.csv",)
    ),
    "a text for every image": Layout(
        tuple(f"{n:02}.png" for n in range(24)),
        None,
        {f"{n:02}.txt": "0 0.5 0.5 1 1\n" for n in range(24)},
        left_out=tuple(f"{n:02}.txt" for n in range(24)),
    ),
    "two labels": Layout(LOOSE, "01.png", {"labels.csv": _table(KINDS) + "01.png,fox\n"}),
    "a name that may be two images": Layout(
        ("cat/00.png", "dog/00.png"),
        "cat/00.png or dog/00.png",
        {"labels.csv": "file,label\n00.png,cat\n"},
    ),
    "two tables that contradict": Layout(
        LOOSE, "--labels", {"a.csv": _table(KINDS), "b.csv": _table(dict.fromkeys(KINDS, "ant"))}
    ),
    "a table without labels": Layout(
        LOOSE, "labels.csv", {"labels.csv": "file,width,height\n00.png,8,8\n"}
    ),
    "a table of other images": Layout(
        LOOSE, "labels.csv", {"labels.csv": "file,label\nx.png,cat\n"}
    ),
    "a table that is none": Layout(LOOSE, "labels.csv", {"labels.csv": bytes(range(256))}),
    "an empty table": Layout(LOOSE, "labels.csv", {"labels.csv": b""}),
    "labels below zero": Layout(
        LOOSE, "whole numbers", {"labels.csv": _table(NUMBERS | {"03.png": "-1"})}
    ),
    "labels that are measurements": Layout(
        LOOSE, "whole numbers", {"labels.csv": _table(dict.fromkeys(LOOSE, "0.5"))}
    ),
    "names in one part, numbers in another": Layout(
        _images("train/cat/", "train/dog/", "test/0/", "test/1/"), "numbers in one"
    ),
    "nothing": Layout((), "found none", {"readme.md": "x"}),
}
