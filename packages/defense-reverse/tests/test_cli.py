from __future__ import annotations

import json

import pytest
import torch

from defense_nc import judge
from defense_reverse import (
    ReversedTrigger,
    ReverseGenerator,
    UNetGenerator,
    config,
    load_reversed,
)
from defense_reverse.cli import main
from wm_inject.core import resume
from wm_victim import build_classifier, load_classifier, load_dataset, save_classifier
from wm_victim.toy_digits import fit_head

TINY = {"width": 2, "depth": 1, "pretrain_steps": 1, "steps": 1}


@pytest.fixture
def classifier(tmp_path):
    with torch.random.fork_rng():
        torch.manual_seed(0)
        model = build_classifier("wanet-mnist", num_classes=10, channels=1, image_size=32)
    few = load_dataset("digits", limit=400).train
    fit_head(model, few.images, few.labels)
    save_classifier(model, tmp_path / "victim.safetensors")
    return tmp_path / "victim.safetensors"


@pytest.fixture
def quickly(monkeypatch):
    monkeypatch.setitem(config.PRESETS, "fast", TINY)


def command(name, classifier, *more):
    return [name, str(classifier), "--data", "digits", "--device", "cpu", "--preset", "fast", *more]


def test_scan_prints_writes_and_exits_with_the_verdict(classifier, quickly, tmp_path, capsys):
    out = tmp_path / "scan.json"
    more = ("--images", "40", "--json", str(out), "--triggers", str(tmp_path / "found"))
    code = main(command("scan", classifier, *more))
    told = capsys.readouterr().out
    report = json.loads(out.read_text())
    assert code == {"clean": 0, "backdoored": 1, "inconclusive": 2}[report["verdict"]]
    assert f"verdict: {report['verdict']}" in told and "paper's rule" in told
    assert report["data"] == "digits" and report["config"]["images"] == 40
    assert report["config"]["name"] == "fast"
    triggers = sorted((tmp_path / "found").iterdir())
    assert len(triggers) == 10 and load_reversed(triggers[0]).target == 0


def test_scan_goes_on_from_its_checkpoint(classifier, quickly, tmp_path, monkeypatch, capsys):
    path, real = tmp_path / "scan.safetensors", resume.save_state

    def killed(*args, **more):
        real(*args, **more)
        raise ValueError("killed")

    more = ("--images", "20", "--checkpoint", str(path))
    monkeypatch.setattr(resume, "save_state", killed)
    assert main(command("scan", classifier, *more)) == 3 and path.exists()
    monkeypatch.setattr(resume, "save_state", None)  # nothing is left to be saved
    assert main(command("scan", classifier, *more)) in (0, 1, 2) and not path.exists()
    assert "verdict:" in capsys.readouterr().out


def test_an_error_is_not_a_verdict(classifier, quickly, tmp_path, capsys):
    assert main(command("scan", tmp_path / "none.safetensors")) == 3
    (line,) = capsys.readouterr().err.strip().splitlines()
    assert line.startswith("error:")


def test_clean_refuses_without_a_named_label(classifier, quickly, tmp_path, capsys):
    out = tmp_path / "cleaned.safetensors"
    assert main(command("clean", classifier, "--images", "40", "--out", str(out))) == 1
    assert "error: not cleaned: no label stands out" in capsys.readouterr().err
    assert not out.exists()


def test_clean_writes_a_new_classifier_for_a_named_label(classifier, tmp_path, capsys, monkeypatch):
    trigger = ReversedTrigger(UNetGenerator(channels=1, width=2), target=3)

    def named(*args, **settings):
        scores = torch.tensor([1.0, 1.1, 0.9, 0.1, 1.0, 1.2, 0.95, 1.05, 1.0, 0.9])
        return judge("reverse-generator", scores, torch.ones(10), floor=0.95, triggers={3: trigger})

    monkeypatch.setattr(ReverseGenerator, "scan", named)
    before, out = classifier.read_bytes(), tmp_path / "cleaned.safetensors"
    record = tmp_path / "told.json"
    more = ("--clean-images", "40", "--out", str(out), "--json", str(record), "--recipe", "paper")
    more += ("--max-loss", "1")  # only the last layer of this classifier was trained
    assert main(command("clean", classifier, *more)) == 0
    told, found = capsys.readouterr().out, json.loads(record.read_text())
    rates = "accuracy {:.4f} -> {:.4f}, ".format(*found["accuracy"])
    assert rates in told
    rates = "reversed generator of label 3: success {:.4f} -> {:.4f}\n".format(
        *found["success"]["3"]
    )
    assert rates in told and (found["cleaned"], found["images"]) == ([3], 40)
    assert found["recipe"]["epochs"] == 1 and found["scan"]["suspected"] == [3]
    assert "reversed generator of label 3" in told and "accuracy" in told
    assert classifier.read_bytes() == before
    old, new = load_classifier(classifier), load_classifier(out)
    assert not torch.equal(old.head.weight, new.head.weight)


def test_wrong_usage_exits_64(subtests):
    for argv in [[], ["scan"], ["scan", "x"], ["polish"], ["clean", "x", "--data", "digits"]]:
        with subtests.test(argv=argv):
            with pytest.raises(SystemExit) as stop:
                main(argv)
            assert stop.value.code == 64


def test_help_and_version_answer(capsys, subtests):
    for argv in [["--help"], ["scan", "--help"], ["clean", "--version"]]:
        with subtests.test(argv=argv):
            with pytest.raises(SystemExit) as stop:
                main(argv)
            assert stop.value.code == 0
            assert "defense-reverse" in capsys.readouterr().out
