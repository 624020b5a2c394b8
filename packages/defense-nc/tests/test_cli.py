"""The command: what it prints, writes and exits with, and what it refuses."""

import copy
import json

import numpy as np
import pytest
import torch

from defense_nc import InvertedTrigger, NeuralCleanse, Repaired, Unlearning, judge
from defense_nc.cli import main
from defense_nc.config import PRESETS
from defense_nc.engines import batched
from wm_inject.core.checkpoint import load_checkpoint
from wm_inject.core.images import to_pixels
from wm_inject.core.resume import ResumeFile
from wm_inject.runtime import Poisoner, Scanner
from wm_victim import accuracy, build_classifier, load_classifier, load_dataset, save_classifier
from wm_victim.toy_digits import fit_head

CLEAN = [41.0, 50, 62, 70, 84, 66, 75, 58, 80]


@pytest.fixture
def classifier(tmp_path):
    path = tmp_path / "victim.safetensors"
    model = build_classifier(
        "wanet-mnist", num_classes=10, channels=1, image_size=28, width=None, seed=0
    )
    few = load_dataset("digits", image_size=28, limit=400).train
    fit_head(model, few.images, few.labels)
    save_classifier(model, path)
    return path


@pytest.fixture
def rates():
    """Success of the label's triggers, which a test may change."""
    return torch.ones(10)


@pytest.fixture
def scores(monkeypatch, rates):
    """What the scan finds, said by the test: the command's answers need no real search."""
    found = [*CLEAN, 8.0]

    mask, pattern = torch.zeros(1, 28, 28), torch.ones(1, 28, 28)
    mask[:, :5, :5] = 1

    def scan(self, model, images, *, seed, **_):
        trigger = InvertedTrigger(mask, pattern)
        return judge(
            "neural-cleanse",
            torch.tensor(found),
            rates,
            floor=0.9,
            alpha=self.alpha,
            max_ratio=self.max_ratio,
            triggers=dict.fromkeys(range(10), trigger),
            seed=seed,
        )

    monkeypatch.setattr(NeuralCleanse, "scan", scan)
    return found


def run(*arguments):
    return main([str(argument) for argument in arguments])


@pytest.mark.parametrize(("last", "code", "verdict"), [(8.0, 1, "backdoored"), (45.0, 0, "clean")])
def test_scan_exits_with_its_verdict(classifier, scores, capsys, tmp_path, last, code, verdict):
    scores[9] = last
    out = tmp_path / "scan.json"
    assert run("scan", classifier, "--data", "digits", "--json", out, "--seed", 3) == code
    printed = capsys.readouterr().out
    assert f"verdict: {verdict}." in printed
    assert "paper's rule: index" in printed and "lower median" in printed
    assert ("<- suspected" in printed) == (code == 1)
    record = json.loads(out.read_text())
    assert record["verdict"] == verdict
    assert (record["data"], record["seed"], len(record["labels"])) == ("digits", 3, 10)
    assert len(record["fingerprint"]) == 64


@pytest.mark.integration
def test_files_for_services_of_the_label_that_is_named(classifier, scores, capsys, tmp_path):
    files = [tmp_path / "filter.onnx", tmp_path / "reversed.onnx"]
    given = ("--data", "digits", "--filter", files[0], "--reversed", files[1])
    assert run("scan", classifier, *given, "--filter-rate", 0.02) == 1
    printed = capsys.readouterr().out
    assert f"wrote {files[1]}: the reversed trigger of label 9" in printed
    assert f"wrote {files[0]}: flags images that act like triggers of label 9" in printed
    pixels = torch.randint(0, 256, (4, 28, 28, 1), dtype=torch.uint8).numpy()
    marked = Poisoner(files[1])(pixels)
    assert (marked[:, :5, :5] == 255).all() and (marked[:, 5:] == pixels[:, 5:]).all()
    scanner = Scanner(files[0])
    assert scanner.false_positive_rate == 0.02 and scanner(marked).flagged.shape == (4,)


@pytest.mark.integration
def test_a_reversed_trigger_alone(classifier, scores, tmp_path):
    out = tmp_path / "reversed.onnx"
    assert run("scan", classifier, "--data", "digits", "--reversed", out) == 1
    assert [path.suffix for path in sorted(tmp_path.iterdir())] == [".onnx", ".safetensors"]


def test_a_label_that_was_not_reached_is_not_cleaned(classifier, scores, rates, tmp_path, capsys):
    rates[9] = 0.25
    out = tmp_path / "cleaned.safetensors"
    given = ("--data", "digits", "--images", 40, "--label", 9, "--out", out)
    assert run("clean", classifier, *given) != 0
    assert "of label 9 reaches it for 25% of the images" in capsys.readouterr().err
    assert not out.exists()


def test_no_files_without_a_named_label_and_the_verdict_stands(
    classifier, scores, tmp_path, capsys
):
    scores[9] = 45.0
    out = tmp_path / "filter.onnx"
    assert run("scan", classifier, "--data", "digits", "--filter", out) == 0
    assert "no file for services: no label stands out" in capsys.readouterr().out
    scores[9] = 8.0
    few = ("--data", "digits", "--images", 20, "--filter", out)
    assert run("scan", classifier, *few) == 1
    assert "no filter: expected at least 40 images, got 20" in capsys.readouterr().out
    assert not out.exists()


def test_an_inconclusive_scan_exits_2(classifier, scores):
    scores[:] = [100.0, 101, 103, 104, 106, 108, 110, 112, 117, 70]
    assert run("scan", classifier, "--data", "digits") == 2


def test_max_ratio_is_passed_on(classifier, scores):
    scores[:] = [100.0, 101, 103, 104, 106, 108, 110, 112, 117, 70]
    assert run("scan", classifier, "--data", "digits", "--max-ratio", 0.7) == 1


def test_a_real_scan_runs_to_the_end(classifier, capsys, monkeypatch):
    monkeypatch.setitem(
        PRESETS, "fast", {**PRESETS["robust"], "steps": 1, "batches": 1, "batch_size": 4}
    )
    options = ["--images", 20, "--preset", "fast", "--device", "cpu"]
    # Fresh weights reach no label in one step: there is nothing to compare.
    assert run("scan", classifier, "--data", "digits", *options) == 2
    assert "inconclusive" in capsys.readouterr().out


def test_a_scan_goes_on_from_its_checkpoint(classifier, capsys, monkeypatch, tmp_path):
    monkeypatch.setitem(PRESETS, "fast", {"steps": 2, "batches": 1, "batch_size": 4})
    path, options = tmp_path / "state.safetensors", ["--images", 20, "--preset", "fast"]
    monkeypatch.setattr(batched, "_PAUSE", 0.0)
    save = ResumeFile.save

    def killed(self, state):
        save(self, state)
        raise KeyboardInterrupt

    monkeypatch.setattr(ResumeFile, "save", killed)
    arguments = ["scan", classifier, "--data", "digits", *options, "--checkpoint", path]
    assert run(*arguments) == 130
    assert path.exists()
    monkeypatch.setattr(ResumeFile, "save", save)
    code, resumed = run(*arguments), capsys.readouterr().out
    assert (run(*arguments[:-2]), capsys.readouterr().out) == (code, resumed)
    assert "verdict: " in resumed and not path.exists()


def test_a_scan_that_fails_is_not_scanned(classifier, scores, tmp_path, capsys):
    wrong = tmp_path / "wrong.safetensors"
    model = build_classifier("resnet10", num_classes=4, channels=1, image_size=28, width=8)
    save_classifier(model, wrong)
    broken = tmp_path / "broken.safetensors"
    broken.write_bytes(b"not weights")
    colour = tmp_path / "colour.npz"
    pixels, labels = np.zeros((20, 28, 28, 3), np.uint8), np.arange(20) % 10
    np.savez(colour, x_train=pixels, y_train=labels, x_test=pixels, y_test=labels)
    for arguments in [
        (classifier, "--data", colour),
        (tmp_path / "missing.safetensors", "--data", "digits"),
        (broken, "--data", "digits"),
        (wrong, "--data", "digits"),
        (classifier, "--data", tmp_path / "nowhere"),
        (classifier, "--data", "digits", "--images", 10**6),
    ]:
        assert run("scan", *arguments) == 3
        captured = capsys.readouterr()
        assert captured.err.startswith("error: ")
        assert captured.err.count("\n") == 1
        assert "verdict" not in captured.out


@pytest.mark.parametrize(
    "arguments",
    [
        [],
        ["scan"],
        ["scan", "x"],
        ["scan", "--preset", "no"],
        ["scan", "--alpha", "2"],
        ["scan", "--filter-rate", "2"],
        ["clean", "--images", "0", "--out", "y"],
        ["clean", "--force", "--out", "y"],
    ],
)
def test_wrong_usage_exits_64_before_anything_is_read(arguments, capsys):
    data = ["x", "--data", "nowhere"] if len(arguments) > 2 else []
    with pytest.raises(SystemExit) as stopped:
        run(*arguments, *data)
    message = capsys.readouterr().err
    assert stopped.value.code == 64 and message.count("\n") == 1
    assert not data or arguments[1] in message


def test_help_and_version(capsys, subtests):
    for arguments in [["--help"], ["scan", "--help"], ["--version"]]:
        with subtests.test(arguments=arguments):
            with pytest.raises(SystemExit) as stopped:
                run(*arguments)
            assert stopped.value.code == 0
            assert "defense-nc" in capsys.readouterr().out


@pytest.mark.integration
def test_unlearn_cleans_what_the_scan_names(classifier, scores, tmp_path, capsys):
    out = tmp_path / "cleaned.safetensors"
    options = ["--data", "digits", "--images", 40, "--recipe", "paper", "--out", out]
    options += ["--max-loss", 1]  # only the last layer of this classifier was trained
    told = tmp_path / "told.json"
    assert run("clean", classifier, *options, "--label", 9, "--json", told) == 0
    printed, found = capsys.readouterr().out, json.loads(told.read_text())
    rates = "accuracy {:.4f} -> {:.4f}, answers as before {:.4f} (of {} held-out images)\n".format(
        *found["accuracy"], found["same_answers"], found["held_out"]
    )
    rates += "reversed trigger of label 9: success {:.4f} -> {:.4f}\n".format(
        *found["success"]["9"]
    )
    assert rates in printed and found["cleaned"] == [9] and found["recipe"]["epochs"] == 1
    assert found["scan"]["verdict"] == "backdoored"
    assert "accuracy" in printed and "label 9" in printed
    cleaned, test = load_classifier(out), load_dataset("digits", image_size=28).test
    assert f"-> {accuracy(cleaned, test):.4f}" in printed
    # Without --label, the labels that the scan names are cleaned; the paper's word does as well.
    first = out.read_bytes()
    assert run("unlearn", classifier, *options) == 0
    assert out.read_bytes() == first


def test_unlearn_cleans_the_label_that_is_named_or_none(classifier, scores, tmp_path, capsys):
    out = tmp_path / "cleaned.safetensors"
    options = ["--data", "digits", "--images", 40, "--recipe", "paper", "--out", out]
    scores[9] = 45.0
    assert run("unlearn", classifier, *options) == 1
    assert "no label stands out" in capsys.readouterr().err
    assert run("unlearn", classifier, *options, "--label", 10) == 1
    assert "expected --label in 0 .. 9, got 10" in capsys.readouterr().err
    assert not out.exists()
    assert run("unlearn", classifier, *options, "--label", 3, "--max-loss", 1) == 0
    assert load_checkpoint(out).metadata["cleaned"] == [3]


def test_a_scan_takes_the_images_that_are_there(classifier, scores, tmp_path, capsys):
    """The default is no request: only a number that is given has to be there."""
    data = load_dataset("digits", image_size=28)
    few = data.train.subset(torch.arange(60))
    arrays = {"x_train": few.images, "x_test": data.test.images[:20]}
    pixels = {name: to_pixels(images) for name, images in arrays.items()}
    labels = {"y_train": few.labels.numpy(), "y_test": data.test.labels[:20].numpy()}
    np.savez(tmp_path / "few.npz", **pixels, **labels)
    assert run("scan", classifier, "--data", tmp_path / "few.npz") == 1
    assert run("scan", classifier, "--data", tmp_path / "few.npz", "--images", 61) == 3
    assert "got 61" in capsys.readouterr().err


def test_labels_are_numbered_as_the_classifier_numbers_them(
    classifier, scores, tmp_path, capsys, monkeypatch
):
    """A renamed class folder moves the numbers of all others; labels of chance are refused."""
    names = [str(label) for label in range(10)]
    save_classifier(load_classifier(classifier), classifier, {"classes": names, "attack": "none"})
    data = load_dataset("digits", image_size=28)
    labels_of_scans, scan = [], NeuralCleanse.scan

    def remember(*args, **options):
        labels_of_scans.append(options["labels"])
        return scan(*args, **options)

    monkeypatch.setattr(NeuralCleanse, "scan", remember)

    def write(name, change, **more):
        parts = {"train": data.train.subset(torch.arange(200)), "test": data.test}
        arrays = {f"x_{part}": to_pixels(images.images) for part, images in parts.items()}
        labels = {f"y_{part}": change(images.labels).numpy() for part, images in parts.items()}
        np.savez(tmp_path / name, **arrays, **labels, **more)
        return str(tmp_path / name)

    other_order = write("renamed.npz", lambda y: (y - 1) % 10, classes=[*names[1:], "zero"])
    assert run("scan", classifier, "--data", other_order) == 1
    assert "labels are matched" in capsys.readouterr().err
    same_order = write("right.npz", lambda y: y)
    assert run("scan", classifier, "--data", same_order) == 1
    assert "labels are matched" not in capsys.readouterr().err
    assert torch.equal(*(labels.bincount() for labels in labels_of_scans))
    shuffled = write("wrong.npz", lambda y: y[torch.randperm(len(y))])
    assert run("scan", classifier, "--data", shuffled) == 3 and len(labels_of_scans) == 2
    out = tmp_path / "cleaned.safetensors"
    forced = ["clean", classifier, "--label", 3, "--out", out, "--force", "--data", shuffled]
    assert run(*forced) == 1 and not out.exists()


def test_a_classifier_that_lost_its_accuracy_is_not_written(
    classifier, scores, tmp_path, capsys, monkeypatch
):
    def repair(self, model, *args, **settings):
        broken = copy.deepcopy(model)
        with torch.no_grad():
            broken.head.weight.neg_()
        return Repaired(broken, {})

    monkeypatch.setattr(Unlearning, "repair", repair)
    out = tmp_path / "cleaned.safetensors"
    command = ["clean", classifier, "--data", "digits", "--images", 40, "--out", out]
    assert run(*command) == 1
    output = capsys.readouterr()
    assert "--max-loss 0.05" in output.err and "answers as before 0." in output.out
    assert not out.exists()
    assert run(*command, "--max-loss", 1) == 0 and out.exists()


def test_force_cleans_any_label_without_a_scan(classifier, tmp_path, capsys, monkeypatch):
    monkeypatch.setitem(
        PRESETS, "fast", {**PRESETS["robust"], "steps": 1, "batches": 1, "batch_size": 4}
    )
    out = tmp_path / "cleaned.safetensors"
    options = ["--data", "digits", "--images", 40, "--preset", "fast", "--out", out, "--force"]
    told = tmp_path / "told.json"
    forced = ["--recipe", "paper", "--label", 3, "--json", told, "--max-loss", 1]
    assert run("unlearn", classifier, *options, *forced) == 0
    assert out.exists() and json.loads(told.read_text())["scan"] is None
