import io
import json
import os
import tarfile
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from wm_victim import Dataset, ImageSet, defender_subset, load_dataset
from wm_victim.digits import read_digits
from wm_victim.named_datasets import IMAGENET10_CLASSES

REAL = os.environ.get("WM_DATA", "")
needs_data = pytest.mark.skipif(not REAL, reason="WM_DATA names no folder with the real data sets")


@pytest.fixture(scope="module")
def digits() -> Dataset:
    return load_dataset("digits")


@pytest.fixture(scope="module")
def cifar10() -> Dataset:
    return load_dataset("cifar10", root=REAL, download=False)


def on_grid(images: torch.Tensor) -> bool:
    levels = images * 255
    return torch.allclose(levels, levels.round(), atol=1e-4)


def test_digits_are_real_digits_split_once(digits: Dataset) -> None:
    assert (len(digits.train), len(digits.test)) == (1200, 597)
    assert (digits.num_classes, digits.channels, digits.image_size) == (10, 1, 32)
    assert digits.train.images.shape == (1200, 1, 32, 32)
    assert on_grid(digits.train.images) and on_grid(digits.test.images)
    counts = torch.bincount(digits.train.labels).float() / 1200
    tested = torch.bincount(digits.test.labels).float() / 597
    assert (counts - tested).abs().max() < 0.003
    assert torch.equal(digits.train.ids, torch.arange(1200))
    assert torch.equal(digits.test.ids, torch.arange(1200, 1797))


def test_digits_match_scikit_learn(digits: Dataset) -> None:
    from sklearn.datasets import load_digits

    bunch = load_digits()
    for ours, theirs in zip(read_digits(), (bunch.images, bunch.target), strict=True):
        assert np.array_equal(ours, theirs) and ours.dtype == theirs.dtype
    small = load_dataset("digits", image_size=8)
    stored = np.round(bunch.images * 255 / 16) / 255
    found = np.concatenate([small.train.images[:, 0], small.test.images[:, 0]])
    # Every stored image is there exactly as often as in the original, whatever the order.
    assert np.allclose(
        np.sort(found.reshape(1797, -1).sum(1)), np.sort(stored.reshape(1797, -1).sum(1)), atol=1e-3
    )
    labels = torch.cat([small.train.labels, small.test.labels])
    assert torch.equal(torch.bincount(labels), torch.from_numpy(np.bincount(bunch.target)))


def test_loading_twice_gives_the_same_bytes_and_print(digits: Dataset) -> None:
    again = load_dataset("digits", seed=7)
    assert again.fingerprint == digits.fingerprint
    assert torch.equal(again.train.images, digits.train.images)
    assert load_dataset("digits", limit=1199).fingerprint != digits.fingerprint
    assert load_dataset("digits", image_size=16).fingerprint != digits.fingerprint


def test_limits_are_stratified_and_nested(digits: Dataset) -> None:
    small, large = load_dataset("digits", limit=100), load_dataset("digits", limit=300)
    assert set(small.train.ids.tolist()) < set(large.train.ids.tolist())
    assert torch.bincount(small.train.labels).tolist() == [10] * 10
    assert torch.equal(small.train.images, digits.train.images[small.train.ids])
    assert len(small.test) == 597
    other = load_dataset("digits", limit=100, seed=1)
    assert set(other.train.ids.tolist()) != set(small.train.ids.tolist())


def test_some_classes_are_numbered_in_their_order(digits: Dataset) -> None:
    some = load_dataset("digits", classes=(7, 2))
    assert some.classes == (digits.classes[7], digits.classes[2])
    assert some.fingerprint != digits.fingerprint
    for part, whole in ((some.train, digits.train), (some.test, digits.test)):
        for label, stored in enumerate((7, 2)):
            of_label, of_stored = part.labels == label, whole.labels == stored
            assert torch.equal(part.images[of_label], whole.images[of_stored])
            assert torch.equal(part.ids[of_label], whole.ids[of_stored])
        assert len(part) == int(((whole.labels == 7) | (whole.labels == 2)).sum())


def test_classes_that_are_none_are_refused(subtests: pytest.Subtests) -> None:
    for classes in ((3,), (3, 3), (3, 10), (-1, 3), ()):
        with subtests.test(classes=classes), pytest.raises(ValueError, match="classes below 10"):
            load_dataset("digits", classes=classes)


def test_the_defenders_share_is_stratified_nested_and_seeded(digits: Dataset) -> None:
    tenth = defender_subset(digits.train, share=0.1, seed=3)
    assert len(tenth) == 120
    assert torch.bincount(tenth.labels).tolist() == [12] * 10
    assert torch.equal(tenth.ids, defender_subset(digits.train, count=120, seed=3).ids)
    assert set(tenth.ids.tolist()) < set(
        defender_subset(digits.train, count=200, seed=3).ids.tolist()
    )
    assert set(tenth.ids.tolist()) != set(
        defender_subset(digits.train, count=120, seed=4).ids.tolist()
    )


def test_a_defender_needs_one_number_in_range(digits: Dataset, subtests: pytest.Subtests) -> None:
    for settings in [
        {},
        {"share": 0.1, "count": 5},
        {"share": 0.0},
        {"share": 1.5},
        {"count": 0},
        {"count": 1201},
    ]:
        with subtests.test(settings=settings), pytest.raises(ValueError, match="expected"):
            defender_subset(digits.train, seed=0, **settings)  # type: ignore[arg-type]


def test_a_subset_keeps_images_labels_and_ids_together(digits: Dataset) -> None:
    picked = digits.test.subset(torch.tensor([5, 2]))
    assert torch.equal(picked.images, digits.test.images[[5, 2]])
    assert picked.ids.tolist() == [1205, 1202]
    eights = digits.test.subset(digits.test.labels == 8)
    assert set(eights.labels.tolist()) == {8}
    assert len(picked.to("cpu")) == 2


def test_a_subset_refuses_what_does_not_fit(digits: Dataset, subtests: pytest.Subtests) -> None:
    for index in [
        torch.tensor([597]),
        torch.tensor([-1]),
        torch.tensor([0.5]),
        torch.tensor([True]),
        torch.tensor([[1]]),
        torch.tensor([], dtype=torch.int64),
    ]:
        with subtests.test(index=index), pytest.raises(ValueError, match="expected"):
            digits.test.subset(index)


def test_an_image_set_refuses_broken_parts() -> None:
    images, labels, ids = torch.rand(3, 1, 8, 8), torch.zeros(3, dtype=torch.int64), torch.arange(3)
    with pytest.raises(ValueError, match="finite"):
        ImageSet(images + 1, labels, ids)
    with pytest.raises(ValueError, match="labels"):
        ImageSet(images, labels[:2], ids)
    with pytest.raises(ValueError, match="3 ids"):
        ImageSet(images, labels, ids[:2])
    with pytest.raises(ValueError, match="int64"):
        ImageSet(images, labels, ids.float())


def test_loading_refuses_numbers_out_of_range(subtests: pytest.Subtests) -> None:
    for settings, message in [
        ({"limit": 0}, "limit in 1 .. 1200"),
        ({"limit": 1201}, "limit in 1 .. 1200"),
        ({"image_size": 2}, "image_size"),
        ({"image_size": 5000}, "image_size"),
    ]:
        with (
            subtests.test(settings=settings, message=message),
            pytest.raises(ValueError, match=message),
        ):
            load_dataset("digits", **settings)  # type: ignore[arg-type]


def test_an_unknown_set_is_refused_with_the_known_ones() -> None:
    with pytest.raises(
        ValueError, match="digits, mnist, fashion-mnist, cifar10, gtsrb, imagenet10"
    ):
        load_dataset("cifar1000")


def test_a_missing_set_is_refused_without_a_download(tmp_path: Path) -> None:
    for name in ("mnist", "fashion-mnist", "cifar10", "gtsrb", "imagenet10"):
        with pytest.raises(ValueError, match=f"cannot get {name}"):
            load_dataset(name, root=tmp_path, download=False)


# Sets in one file


def arrays(**changes: object) -> dict[str, object]:
    generator = np.random.default_rng(0)
    return {
        "x_train": generator.integers(0, 256, (12, 6, 6, 3), dtype=np.uint8),
        "y_train": np.arange(12) % 3,
        "x_test": generator.integers(0, 256, (6, 6, 6, 3), dtype=np.uint8),
        "y_test": np.arange(6)[:, None] % 3,
        **changes,
    }


def test_an_npz_keeps_its_pixels(tmp_path: Path) -> None:
    stored = arrays()
    np.savez(tmp_path / "mine.npz", **stored)
    data = load_dataset(tmp_path / "mine.npz")
    assert (data.name, data.classes, data.image_size) == ("mine", ("0", "1", "2"), 6)
    expected = torch.from_numpy(stored["x_train"]).permute(0, 3, 1, 2) / 255
    assert torch.equal(data.train.images, expected)
    assert data.test.labels.tolist() == [0, 1, 2, 0, 1, 2]


def test_a_named_set_in_the_root_comes_first_grey_without_a_channel(tmp_path: Path) -> None:
    grey = np.zeros((4, 28, 28), np.uint8)
    labels = np.array([0, 1, 0, 1])
    np.savez(
        tmp_path / "fashion-mnist.npz",
        x_train=grey,
        y_train=labels,
        x_test=grey,
        y_test=labels,
        classes=np.array(["shirt", "shoe"]),
    )
    data = load_dataset("fashion-mnist", root=tmp_path)
    assert (data.classes, data.channels) == (("shirt", "shoe"), 1)


def test_pictures_side_by_side_are_of_every_combination_of_classes(tmp_path: Path) -> None:
    signs = np.random.default_rng(0).integers(0, 256, (90, 8, 8, 3), np.uint8)
    labels = np.arange(90) % 3
    np.savez(tmp_path / "gtsrb.npz", x_train=signs, y_train=labels, x_test=signs, y_test=labels)
    data = load_dataset("gtsrb+digits", root=tmp_path, image_size=32)
    digits = load_dataset("digits")
    assert data.name == "gtsrb+digits" and data.num_classes == 30
    assert data.classes[:2] == ("0 0", "0 1") and data.classes[-1] == "2 9"
    assert len(data.train) == 1200 and len(data.test) == 597 and data.channels == 3
    # Every digit once; every sign about equally often.
    assert torch.equal((data.train.labels % 10).bincount(), digits.train.labels.bincount())
    assert (data.train.labels // 10).bincount().min() >= 390
    again = load_dataset("gtsrb+digits", root=tmp_path, image_size=32)
    assert again.fingerprint == data.fingerprint


def test_pictures_side_by_side_are_those_of_their_labels(tmp_path: Path) -> None:
    shades = np.repeat(np.arange(4, dtype=np.uint8), 6) * 60  # a class's pictures are of one shade
    pixels, labels = np.broadcast_to(shades[:, None, None], (24, 8, 8)), shades // 60
    for name in ("mnist", "cifar10"):
        np.savez(
            tmp_path / f"{name}.npz", x_train=pixels, y_train=labels, x_test=pixels, y_test=labels
        )
    train = load_dataset("mnist+cifar10", root=tmp_path, image_size=16).train
    middle = (train.images[:, 0, 8] * 255).round().long() // 60
    assert torch.equal(middle[:, 2] * 4 + middle[:, -3], train.labels)


def test_a_bad_npz_is_refused(tmp_path: Path, subtests: pytest.Subtests) -> None:
    for changes, message in [
        ({"x_train": np.zeros((12, 6, 6, 3), np.float32)}, "uint8"),
        ({"x_test": np.zeros((6, 6, 6, 4), np.uint8)}, "1 or 3"),
        ({"y_test": np.zeros(6)}, "y_test as 6 integers"),
        ({"y_test": np.zeros(5, np.int64)}, "y_test as 6 integers"),
        ({"y_train": np.arange(12) - 1}, "labels in 0"),
        ({"classes": np.array(["a", "b"])}, "labels in 0"),
        ({"x_train": np.array([{}], dtype=object)}, "cannot read bad.npz"),
        ({"x_train": np.zeros((12, 6, 8, 3), np.uint8)}, "square"),
        ({"x_test": np.zeros((0, 6, 6, 3), np.uint8), "y_test": np.zeros(0, np.int64)}, "at least"),
    ]:
        with subtests.test(changes=changes, message=message):
            np.savez(tmp_path / "bad.npz", **arrays(**changes))
            with pytest.raises(ValueError, match=message):
                load_dataset(tmp_path / "bad.npz")


def test_a_damaged_or_partial_npz_is_refused(tmp_path: Path) -> None:
    (tmp_path / "noise.npz").write_bytes(b"not a zip")
    with pytest.raises(ValueError, match=r"cannot read noise\.npz"):
        load_dataset(tmp_path / "noise.npz")
    np.savez(tmp_path / "part.npz", x_train=np.zeros((1, 4, 4), np.uint8))
    with pytest.raises(ValueError, match="x_test, y_test, y_train"):
        load_dataset(tmp_path / "part.npz")


def write_gtsrb_tar(path: Path) -> None:
    """Three tracks of class 14 with two frames each; track 23 is the one that leaked."""
    tiles = np.repeat(np.arange(6, dtype=np.uint8) * 40, 4 * 4 * 3).reshape(24, 4, 3)
    strip = io.BytesIO()
    Image.fromarray(tiles).save(strip, format="WEBP", lossless=True)
    tracks = np.array([[22, 2], [22, 5], [23, 2], [23, 5], [24, 2], [24, 5]], np.int16)
    meta = {"classes": [str(c) for c in range(43)], "shape": [4, 4, 3]}
    files = {"meta.json": json.dumps(meta).encode()}
    labels = np.full(6, 14)
    for name, array in [
        ("train_labels", labels),
        ("test_labels", labels),
        ("train_track_frame", tracks),
    ]:
        buffer = io.BytesIO()
        np.save(buffer, array)
        files[f"{name}.npy"] = buffer.getvalue()
    for split in ("train", "test"):
        files[f"{split}/0000.webp"] = strip.getvalue()
    with tarfile.open(path, "w") as archive:
        for name, content in files.items():
            info = tarfile.TarInfo(name)
            info.size = len(content)
            archive.addfile(info, io.BytesIO(content))


def test_gtsrb_strips_leave_the_leaked_track_out(tmp_path: Path) -> None:
    write_gtsrb_tar(tmp_path / "gtsrb.tar")
    strict = load_dataset("gtsrb", root=tmp_path)
    assert strict.train.ids.tolist() == [0, 1, 4, 5]
    assert (strict.train.images[:, 0, 0, 0] * 255).round().tolist() == [0, 40, 160, 200]
    assert len(load_dataset("gtsrb", root=tmp_path, strict=False).train) == 6
    assert strict.num_classes == 43


def test_a_damaged_tar_is_refused(tmp_path: Path) -> None:
    (tmp_path / "cifar10.tar").write_bytes(b"x" * 2000)
    with pytest.raises(ValueError, match=r"cannot read cifar10\.tar"):
        load_dataset("cifar10", root=tmp_path)


WNIDS = list(IMAGENET10_CLASSES)


def jpeg(value: int, size: tuple[int, int], mode: str = "RGB") -> bytes:
    stream = io.BytesIO()
    Image.new(mode, size, (value,) * 3 if mode == "RGB" else value).save(stream, format="JPEG")
    return stream.getvalue()


def write_imagenet10_tar(path: Path, wnids: list[str]) -> None:
    """Two pictures of every class in train, one in val; the level tells the class."""
    files = {"meta.json": json.dumps({"wnids": wnids}).encode()}
    for label, wnid in enumerate(wnids):
        files[f"train/{wnid}/a.JPEG"] = jpeg(20 * label, (12, 20))
        files[f"train/{wnid}/b.JPEG"] = jpeg(20 * label, (16, 16), "L")
        files[f"val/{wnid}/c.JPEG"] = jpeg(20 * label, (16, 16))
    with tarfile.open(path, "w") as archive:
        for name, content in reversed(files.items()):
            info = tarfile.TarInfo(name)
            info.size = len(content)
            archive.addfile(info, io.BytesIO(content))


def test_imagenet10_is_read_from_its_pictures(tmp_path: Path) -> None:
    write_imagenet10_tar(tmp_path / "imagenet10.tar", WNIDS)
    data = load_dataset("imagenet10", root=tmp_path, image_size=8)
    assert (len(data.train), len(data.test), data.channels, data.image_size) == (20, 10, 3, 8)
    assert data.classes[0] == "tench" and data.num_classes == 10
    levels = (data.train.images.mean((1, 2, 3)) * 255).round() / 20
    assert levels.round().long().tolist() == data.train.labels.tolist()
    assert load_dataset("imagenet10", root=tmp_path, limit=10).image_size == 224


def test_imagenet10_is_read_from_torchvisions_folder(tmp_path: Path) -> None:
    for split in ("train", "val"):
        for label, wnid in enumerate(WNIDS):
            folder = tmp_path / "imagenette2-320" / split / wnid
            folder.mkdir(parents=True)
            (folder / "a.JPEG").write_bytes(jpeg(20 * label, (40, 24)))
    data = load_dataset("imagenet10", root=tmp_path, image_size=8, download=False)
    assert data.train.labels.tolist() == data.test.labels.tolist() == list(range(10))
    assert (data.train.images[:, 0, 0, 0] * 255 / 20).round().tolist() == list(range(10))


def test_a_tar_of_other_pictures_is_no_imagenet10(tmp_path: Path) -> None:
    write_imagenet10_tar(tmp_path / "imagenet10.tar", WNIDS[::-1])
    with pytest.raises(ValueError, match=r"cannot read imagenet10\.tar .* expected the classes"):
        load_dataset("imagenet10", root=tmp_path)


@needs_data
@pytest.mark.slow
def test_the_real_imagenet10_has_its_counts() -> None:
    data = load_dataset("imagenet10", root=REAL, image_size=32, download=False)
    assert torch.bincount(data.train.labels).tolist() == [100] * 10
    assert torch.bincount(data.test.labels).tolist() == [50] * 10


# Folders


def write_png(
    path: Path, *, value: int = 0, size: tuple[int, int] = (8, 8), mode: str = "RGB"
) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.new(mode, size, (value,) * 3 if mode == "RGB" else value).save(path)


def test_class_folders_are_split_in_proportion(tmp_path: Path) -> None:
    for name in ("cat", "dog"):
        for index in range(10):
            write_png(tmp_path / name / f"{index}.png", value=index)
    data = load_dataset(tmp_path)
    assert data.classes == ("cat", "dog")
    assert torch.bincount(data.train.labels).tolist() == [8, 8]
    assert torch.bincount(data.test.labels).tolist() == [2, 2]
    assert load_dataset(tmp_path).fingerprint == data.fingerprint


def test_train_and_test_folders_are_kept_apart(tmp_path: Path) -> None:
    for split, count in (("train", 3), ("test", 2)):
        for label in ("0", "2"):
            for index in range(count):
                write_png(tmp_path / split / label / f"{index}.png", value=90, mode="L")
    data = load_dataset(tmp_path, image_size=16)
    assert (len(data.train), len(data.test), data.channels, data.image_size) == (6, 4, 1, 16)
    assert data.classes == ("0", "1", "2")  # numbers stay what they are
    assert data.train.labels.tolist() == [0, 0, 0, 2, 2, 2]
    assert torch.equal(data.train.images, torch.full((6, 1, 16, 16), 90 / 255))
    (tmp_path / "test").rename(tmp_path / "elsewhere")
    assert len(load_dataset(tmp_path).train) == 5


def test_a_list_of_labels_is_followed(tmp_path: Path) -> None:
    for index in range(5):
        write_png(tmp_path / "files" / f"{index}.png", value=index * 50)
    rows = "\n".join(f"files/{i}.png,{'odd' if i % 2 else 'even'}" for i in range(5))
    (tmp_path / "labels.csv").write_text(f"file,label\n{rows}\n")
    data = load_dataset(tmp_path)
    assert data.classes == ("even", "odd")
    both = [data.train, data.test]
    values = torch.cat([part.images[:, 0, 0, 0] for part in both]).mul(255).round() / 50
    labels = torch.cat([part.labels for part in both])
    assert torch.equal(values.long() % 2, labels)


def test_bad_folders_are_refused(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="found none"):
        load_dataset(tmp_path)
    write_png(tmp_path / "loose.png")
    with pytest.raises(ValueError, match="one folder per class"):
        load_dataset(tmp_path)
    (tmp_path / "labels.csv").write_text("file,label\n../outside.png,1\n")
    with pytest.raises(ValueError, match="columns such as file and label"):
        load_dataset(tmp_path)
    (tmp_path / "labels.csv").write_text("file,label\nloose.png,1\n")
    with pytest.raises(ValueError, match="at least two images"):
        load_dataset(tmp_path)


def test_images_of_many_sizes_or_damaged_are_refused(tmp_path: Path) -> None:
    for index in range(6):
        write_png(tmp_path / "ab"[index % 2] / f"{index}.png", size=(8 + index // 2, 8))
    with pytest.raises(ValueError, match="one size or an image_size, got 3"):
        load_dataset(tmp_path)
    assert load_dataset(tmp_path, image_size=8).image_size == 8
    for name in ("a/9.png", "b/8.png"):
        (tmp_path / name).write_bytes(b"no image")
    # The second one is damaged behind its header.
    (tmp_path / "b" / "7.png").write_bytes((tmp_path / "a" / "0.png").read_bytes()[:45])
    with pytest.raises(ValueError, match="cannot read 3 of 9 images") as refused:
        load_dataset(tmp_path, image_size=8)
    assert all(name in str(refused.value) for name in ("a/9.png", "b/8.png", "b/7.png"))
    data = load_dataset(tmp_path, image_size=8, skip_unreadable=True)
    assert len(data.train) + len(data.test) == 6 and data.source is not None
    assert {file for file, _ in data.source.left_out} == {"a/9.png", "b/8.png", "b/7.png"}


def test_stored_sizes_that_differ_once_upright_are_refused(tmp_path: Path) -> None:
    exif = Image.Exif()
    exif[0x0112] = 6
    for name, options in (("a/0.png", {}), ("b/1.png", {"exif": exif})):
        (tmp_path / name).parent.mkdir()
        Image.new("RGB", (8, 6)).save(tmp_path / name, **options)
    with pytest.raises(ValueError, match="one size or an image_size, got 2"):
        load_dataset(tmp_path)


def test_gtsrb_in_torchvisions_folders(tmp_path: Path) -> None:
    base = tmp_path / "gtsrb"
    for track in (22, 23):
        for label in (2, 14):
            write_png(
                base / "GTSRB" / "Training" / f"{label:05d}" / f"{track:05d}_00000.ppm",
                size=(20, 30),
            )
    write_png(base / "GTSRB" / "Final_Test" / "Images" / "00000.ppm", value=80, size=(40, 33))
    (base / "GT-final_test.csv").write_text("Filename;ClassId\n00000.ppm;17\n")
    data = load_dataset("gtsrb", root=tmp_path, download=False)
    assert data.train.labels.tolist() == [2, 2, 14]
    assert data.train.ids.tolist() == [0, 1, 2]
    assert (data.test.labels.tolist(), data.image_size) == ([17], 32)
    everything = load_dataset("gtsrb", root=tmp_path, download=False, strict=False)
    assert len(everything.train) == 4


# The real sets


@pytest.mark.integration
@needs_data
def test_cifar10_is_complete_and_in_order(cifar10: Dataset) -> None:
    assert (len(cifar10.train), len(cifar10.test)) == (50_000, 10_000)
    assert torch.bincount(cifar10.train.labels).tolist() == [5000] * 10
    assert cifar10.train.labels[:5].tolist() == [6, 9, 9, 4, 1]
    # Known means and deviations of the training set.
    known = torch.tensor([0.4914, 0.4822, 0.4465]), torch.tensor([0.2470, 0.2435, 0.2616])
    assert torch.allclose(cifar10.train.images.mean((0, 2, 3)), known[0], atol=1e-3)
    assert torch.allclose(cifar10.train.images.std((0, 2, 3)), known[1], atol=1e-3)


@pytest.mark.integration
@needs_data
def test_mnist_is_complete() -> None:
    data = load_dataset("mnist", root=REAL, download=False, limit=2000)
    assert data.train.images.shape == (2000, 1, 28, 28)
    assert torch.bincount(data.test.labels).tolist() == [
        *(980, 1135, 1032, 1010, 982, 892, 958, 1028, 974, 1009)
    ]


@pytest.mark.integration
@needs_data
def test_gtsrb_is_strict_by_default() -> None:
    strict = load_dataset("gtsrb", root=REAL, download=False)
    loose = load_dataset("gtsrb", root=REAL, download=False, strict=False)
    assert (len(loose.train), len(strict.train), len(strict.test)) == (13_069, 13_059, 12_630)
    assert (torch.bincount(loose.train.labels) - torch.bincount(strict.train.labels))[14] == 10
