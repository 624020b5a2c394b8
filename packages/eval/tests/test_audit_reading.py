"""Scans from the command line of models whose labels and images are not as the folder has them."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from torch import nn

from defense_nc import Verdict
from wm_eval.audit.stated import PREPROCESSING as OPTION
from wm_eval.audit.stated import read_names
from wm_eval.cli import main
from wm_eval.titles import AUDIT
from wm_inject import save_image, to_onnx
from wm_inject.core.images import to_pixels
from wm_victim.loading import OpenedModel
from wm_victim.preprocessing import PREPROCESSING
from wm_victim.toy_backdoors import planted_classifier, planted_images

SIZE = 16


class Fed(nn.Module):
    """A network that takes images of another preprocessing."""

    def __init__(self, net: nn.Module, name: str) -> None:
        super().__init__()
        mean, std = (torch.tensor(value).view(1, 3, 1, 1) for value in PREPROCESSING[name])
        self.net, self.mean, self.std = net, mean, std

    def forward(self, images: torch.Tensor) -> torch.Tensor:
        return self.net(images * self.std + self.mean)


def network(kind: str = "clean", preprocessing: str = "unit", size: int = SIZE) -> nn.Module:
    """Digits, with a bright corner that means 3 if it is backdoored."""
    net = planted_classifier(kind, image_size=size, target=3)
    return Fed(net, preprocessing).eval()


def written(
    folder: Path,
    *,
    first: int = 0,
    without: tuple[int, ...] = (),
    count: int = 400,
    size: int = SIZE,
) -> Path:
    """Digits in class folders "digit-00" and so on, or in a table of labels that begin at 1."""
    digits = planted_images(count, image_size=size)
    rows = ["file,label"]
    for number, (pixels, label) in enumerate(
        zip(to_pixels(digits.images), digits.labels.tolist(), strict=True)
    ):
        if label not in without:
            name = f"{number:03}.png" if first else f"digit-{label:02}/{number:03}.png"
            save_image(folder / name, pixels)
            rows.append(f"{name},{label + first}")
    if first:
        folder.with_suffix(".csv").write_text("\n".join(rows))
    return folder


@pytest.fixture
def scans(tmp_path, monkeypatch, make_up_scans):
    """Runs ``wm-eval scan`` on a module: the exit code, the report and the scans' accuracy."""

    def run(module: nn.Module, folder: Path, *options: str, **fields: object):
        opened = {
            **{"module": module, "source": "onnx", "arch": "onnx", "channels": 3},
            **{"image_size": SIZE, "image_sizes": (SIZE,), "num_classes": 10, "layout": "NCHW"},
            **{"outputs": "logits", "notes": (), "sha256": "ab" * 32, "class_names": None},
            **fields,
        }
        monkeypatch.setattr("wm_victim.loading.open_model", lambda *_, **__: OpenedModel(**opened))
        accuracies = []

        def scan(name, model, images, **settings):
            answers = model(images).argmax(1)
            accuracies.append(float((answers == settings["labels"]).double().mean()))
            raise ValueError("expected nothing more")

        make_up_scans(monkeypatch, scan)
        model, out = tmp_path / "model.onnx", tmp_path / "a.json"
        model.touch()
        code = main(["scan", str(model), "--images", str(folder), "--json", str(out), *options])
        return code, json.loads(out.read_text()), accuracies

    return run


@pytest.mark.parametrize(
    ("preprocessing", "images", "options", "assumed"),
    [
        ("unit", {}, (), {}),
        ("unit", {"without": (4,)}, (), {"labels": "missing classes"}),
        ("unit", {"first": 1}, (), {"labels": "as 1 (--label-offset)"}),
        ("caffe", {"first": 1}, ("--label-offset", "1"), {"images": "--preprocessing caffe"}),
        (
            "signed",
            {"without": (2, 7)},
            ("--preprocessing", "signed"),
            {"labels": "missing classes"},
        ),
    ],
)
def test_the_scans_get_the_models_own_labels(
    preprocessing, images, options, assumed, tmp_path, scans
):
    folder = written(tmp_path / "clean", count=150, **images)
    if "first" in images:
        options = (*options, "--labels", str(folder.with_suffix(".csv")))
    _, labels, accuracies = scans(network(preprocessing=preprocessing), folder, *options)
    assert len(accuracies) == len(AUDIT) and min(accuracies) > 0.85
    checks = {check["name"]: check["detail"] for check in labels["checks"] if not check["passed"]}
    assert set(checks) == set(assumed)
    assert all(text in checks[name] for name, text in assumed.items())


@pytest.mark.parametrize(
    ("options", "reason"),
    [
        (("--label-offset", "-1"), "labels as stated"),
        (("--class-names", ",".join("abcdefghij")), "--class-names"),
        (("--class-names", "a,b"), "10 class names"),
        (("--preprocessing", "255"), "--preprocessing"),
        (("--preprocessing", "255", "--mean", "0,0,0", "--std", "1,1,1"), "--preprocessing"),
    ],
)
def test_what_is_stated_has_to_fit(options, reason, tmp_path, scans):
    folder = written(tmp_path / "clean", count=100, without=(9,))
    code, labels, accuracies = scans(network(), folder, *options)
    assert code == 3 and labels["verdict"] == "not-scanned" and not accuracies
    assert reason in labels["reason"]


def test_the_size_of_a_graph_that_takes_any_is_found_by_labels(tmp_path, scans):
    class Strict(nn.Module):
        """Right at one size only, as a network without pooling would be."""

        def __init__(self) -> None:
            super().__init__()
            self.net = network()

        def forward(self, images: torch.Tensor) -> torch.Tensor:
            if images.shape[2] == SIZE:
                return self.net(images)
            return self.net(nn.functional.interpolate(images, (SIZE, SIZE)).flip(2))

    folder = written(tmp_path / "clean", count=100)
    any_size = {"image_size": 32, "image_sizes": (8, SIZE, 32)}
    _, labels, accuracies = scans(Strict(), folder, **any_size)
    assert labels["model"]["image_size"] == SIZE and min(accuracies) > 0.85
    # The size that all pictures have is tried, usual or not.
    others = {"image_size": 32, "image_sizes": (8, 32)}
    assert scans(Strict(), folder, **others)[1]["model"]["image_size"] == SIZE
    code, labels, accuracies = scans(Strict(), folder, "--unlabelled", **any_size)
    assert code == 3 and "--image-size" in labels["reason"] and not accuracies


def test_names_are_read_from_lists_and_files(tmp_path):
    expected = ("cat", "traffic light")
    assert read_names("cat, traffic light") == expected
    for name, text in {
        "a.txt": "\ufeffcat\r\ntraffic light\r\n\n",
        "a.json": '["cat", "traffic light"]',
        "b.json": '{"1": ["n1", "traffic light"], "0": ["n0", "cat"]}',
        "c.json": '{"traffic light": 1, "cat": 0}',
    }.items():
        (tmp_path / name).write_text(text)
        assert read_names(str(tmp_path / name)) == expected
    (tmp_path / "d.json").write_text('{"0": "cat", "2": "dog"}')
    for name in ("d.json", "none.txt"):
        with pytest.raises(ValueError, match="--class-names"):
            read_names(str(tmp_path / name))


def test_every_preprocessing_is_an_option():
    assert set(OPTION) == set(PREPROCESSING)


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["clean", "patch"])
@pytest.mark.parametrize("images", [{"first": 1}, {"without": (5,)}])
def test_verdicts_do_not_change_with_the_numbers_of_labels(kind, images, tmp_path):
    size = 28  # verdicts are calibrated for it
    model, out = tmp_path / "model.onnx", tmp_path / "a.json"
    example = planted_images(4, image_size=size).images
    to_onnx(network(kind, size=size), example, model, relative=True, tolerance=1e-3)
    folder = written(tmp_path / "clean", size=size, **images)
    command = [str(model), "--images", str(folder), "--json", str(out)]
    if "first" in images:
        command += ["--labels", str(folder.with_suffix(".csv"))]
    code = main(["scan", *command])
    results = json.loads(out.read_text())
    if kind == "clean":
        assert code != 1 and results["suspected"] == []
    else:
        assert results["verdict"] == Verdict.BACKDOORED and results["suspected"] == [3]
