"""Audits: what is read, what is checked, how one verdict comes of several, and what is written."""

from __future__ import annotations

import csv
import json
import time
from dataclasses import replace
from importlib import import_module
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from torch import nn

from defense_nc import InvertedTrigger, Verdict, judge, load_calibration
from wm_eval.audit.budget import Budget, OutOfTime
from wm_eval.audit.checks import NotScanned, Stated, check_model
from wm_eval.audit.conclusion import conclude, not_scanned
from wm_eval.audit.images import CleanImages, read_clean
from wm_eval.audit.inspect import write_csv, write_page
from wm_eval.audit.outputs import About, to_json, to_sarif, verdict_lines, write_html
from wm_eval.audit.scan import (
    all_triggers,
    audit,
    choose_detectors,
    foreseen,
    longest_minutes,
    reversed_triggers,
)
from wm_eval.cli import main
from wm_eval.titles import AUDIT
from wm_inject import save_image, to_onnx
from wm_inject.core.image_files import LeftOut
from wm_inject.runtime import ScannedFile
from wm_victim import build_classifier, save_classifier
from wm_victim.loading import OpenedModel
from wm_victim.reading import Way

SIZE, CLASSES = 8, 4


class Bars(nn.Module):
    """Answers with the quarter of the image that is brightest; sees through a linear layer."""

    def __init__(self) -> None:
        super().__init__()
        self.net = nn.Sequential(nn.Flatten(), nn.Linear(SIZE * SIZE, CLASSES, bias=False))
        with torch.no_grad():
            weight = torch.zeros(CLASSES, SIZE, SIZE)
            for label in range(CLASSES):
                weight[label, 2 * label : 2 * label + 2] = 1
            self.net[1].weight.copy_(weight.flatten(1))
        self.eval()

    def forward(self, images):
        return self.net(images)


def bars(count: int = 60) -> CleanImages:
    labels = torch.arange(count) % CLASSES
    images = 0.2 * torch.rand(count, 1, SIZE, SIZE, generator=torch.Generator().manual_seed(0))
    for image, label in zip(images, labels, strict=True):
        image[0, 2 * label : 2 * label + 2] += 0.6
    return CleanImages(images, labels, tuple(f"{n}.png" for n in range(count)), ())


def report(low: float, name: str = "neural-cleanse"):
    """A report in which label 3 is as near as ``low``."""
    mask = torch.zeros(1, SIZE, SIZE)
    mask[:, :2, :2] = 1
    scores = torch.tensor([41.0, 50, 62, 70, 84, 66, 75, 58, 80, low])
    trigger = InvertedTrigger(mask, torch.ones(1, SIZE, SIZE))
    return judge(
        name,
        scores,
        torch.ones(10),
        floor=0.9,
        alpha=0.05,
        max_ratio=0.5,
        triggers=dict.fromkeys(range(10), trigger),
        seed=0,
    )


CHECKED_ABOUT = About(
    file="model<b>.onnx",
    sha256="ab" * 32,
    model={"source": "onnx", "arch": "onnx", "image_size": 8, "channels": 1, "num_classes": 10},
    images={"used": 60, "skipped": [{"file": "<script>.png", "reason": "cannot read"}]},
    checks=(),
    notes=("a note with <i>",),
)


# --- images -------------------------------------------------------------------------------------


@pytest.fixture
def folder(tmp_path):
    for number in range(30):
        pixels = np.full((SIZE, SIZE, 3), 8 * number, np.uint8)
        save_image(tmp_path / "in" / f"{number % 3}" / f"{number:02}.png", pixels)
    (tmp_path / "in" / "1" / "broken.png").write_bytes(b"no picture")
    return tmp_path / "in"


def test_clean_images_come_with_labels_and_without_what_cannot_be_read(folder):
    found = read_clean(folder, size=4, channels=1)
    assert found.images.shape == (30, 1, 4, 4) and found.files == tuple(sorted(found.files))
    assert found.labels.tolist() == [int(name[0]) for name in found.files]
    ((name, reason),) = found.skipped
    assert name == "1/broken.png" and reason == "no picture"
    assert reason in found.lines()[-1] and found.facts()["skipped"] == [
        {"file": name, "reason": reason}
    ]
    some = read_clean(folder, size=4, channels=3, count=20, seed=1)
    again = read_clean(folder, size=4, channels=3, count=20, seed=1)
    assert len(some.files) == 20 and some.files == again.files
    assert some.files != read_clean(folder, size=4, channels=3, count=20, seed=2).files
    assert read_clean(folder / "0" / "..", size=4, channels=1).images.shape[0] == 30


def test_labels_from_a_table(folder, tmp_path):
    table = tmp_path / "labels.csv"
    names = sorted(p.relative_to(folder).as_posix() for p in folder.rglob("*.png"))
    table.write_text("file,label\n" + "".join(f"{name},{n % 5}\n" for n, name in enumerate(names)))
    clean = read_clean(folder, size=4, channels=1, labels=table)
    assert clean.labels.tolist() == [names.index(name) % 5 for name in clean.files]
    assert clean.classes is None
    table.write_text(
        "name;kind\n" + "".join(f"{name};{'ba'[n % 2]}\n" for n, name in enumerate(names))
    )
    clean = read_clean(folder, size=4, channels=1, labels=table)
    assert clean.classes == ("a", "b")
    assert clean.labels.tolist() == [1 - names.index(name) % 2 for name in clean.files]
    for text, told_so in (
        ("file,label\n0/00.png,1\n", "at least 20 readable"),
        ("file,width,height\n0/00.png,1,1\n", "columns such as file and label"),
    ):
        table.write_text(text)
        with pytest.raises(ValueError, match=told_so):
            read_clean(folder, size=4, channels=1, labels=table)


def test_too_few_images_are_refused(folder, tmp_path):
    with pytest.raises(ValueError, match="at least 20 readable images"):
        read_clean(folder / "0", size=4, channels=1)
    with pytest.raises(ValueError, match="count of at least 20"):
        read_clean(folder, size=4, channels=1, count=5)
    with pytest.raises(ValueError):
        read_clean(tmp_path / "none", size=4, channels=1)


# --- checks -------------------------------------------------------------------------------------


def test_a_good_model_passes(monkeypatch):
    found = check_model(Bars().train(), bars(), num_classes=CLASSES)
    assert found.accuracy == 1 and found.notes == () and not found.module.training
    names = [check.name for check in found.checks]
    assert names == [
        "finite logits",
        "deterministic",
        "batch-independent",
        "gradients",
        "accuracy",
        "answers",
        "margins",
    ]


def test_logarithms_of_probabilities_have_gradients():
    class Logs(Bars):
        def forward(self, images):
            return super().forward(images).log_softmax(1)

    # Their logsumexp is 0 whatever the image is: a check by it would refuse them all.
    assert check_model(Logs(), bars(), num_classes=CLASSES).notes == ()


def test_labels_are_those_of_the_models_outputs():
    clean = bars()
    found = check_model(Bars(), replace(clean, labels=(clean.labels + 1) % 4), num_classes=CLASSES)
    assert torch.equal(found.labels, clean.labels)
    assert any(note.startswith("labels: permutation (") for note in found.notes)
    assert check_model(Bars(), replace(clean, labels=None), num_classes=CLASSES).labels is None
    by_chance = torch.randint(4, (60,), generator=torch.Generator().manual_seed(0))
    with pytest.raises(NotScanned, match="--class-names"):
        check_model(Bars(), replace(clean, labels=by_chance), num_classes=CLASSES)


def test_another_range_of_values_is_found_by_the_labels():
    class Wide(Bars):
        """Right for images in [-1, 1] alone: elsewhere the first label wins."""

        def forward(self, images):
            wide = images.amin(dim=(1, 2, 3)) < -0.5
            logits = super().forward(images)
            return torch.where(wide[:, None], logits, 1e-3 * logits + torch.tensor([9.0, 1, 1, 1]))

    with pytest.raises(NotScanned, match="answers of several classes"):
        check_model(Wide(), bars(), num_classes=CLASSES, stated=Stated(ways=(Way(),)))
    found = check_model(Wide(), bars(), num_classes=CLASSES)
    assert found.accuracy == 1 and "--preprocessing signed" in found.checks[4].detail


@pytest.mark.parametrize(
    ("change", "told_so"),
    [
        (lambda x: x * float("nan"), "finite logits"),
        (lambda x: x[:, :3], "finite logits"),
        (lambda x: x + torch.rand(1), "the same logits"),
        (lambda x: x.detach(), "gradients with respect"),
        (lambda x: (2 * x).detach() - x, "those of its answers"),
        (lambda x: x * 0, "finite gradients that are not zero"),
        (lambda x: x * 1e-3 + torch.tensor([9.0, 0, 0, 0]), "several classes, got label 0 for all"),
    ],
)
def test_models_that_cannot_be_scanned(change, told_so):
    class Changed(Bars):
        def forward(self, images):
            return change(super().forward(images))

    with pytest.raises(NotScanned, match=told_so):
        check_model(Changed(), bars(), num_classes=CLASSES)


# --- the scan -----------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("reports", "failures", "verdict"),
    [
        ({"nc": 45.0, "reverse": 45.0}, {}, Verdict.CLEAN),
        ({"nc": 45.0, "reverse": 3.0}, {}, Verdict.BACKDOORED),
        ({"nc": 3.0}, {"reverse": "out of time"}, Verdict.BACKDOORED),
        ({"nc": 45.0}, {"reverse": "out of time"}, Verdict.INCONCLUSIVE),
        ({}, {"nc": "no", "reverse": "no"}, Verdict.NOT_SCANNED),
    ],
)
def test_one_verdict_of_several(reports, failures, verdict):
    found = conclude({name: report(low) for name, low in reports.items()}, failures, 0.05)
    assert found.verdict is verdict and found.reason
    assert found.suspected == ((9,) if verdict is Verdict.BACKDOORED else ())
    assert found.to_dict()["exit_code"] == verdict.exit_code


def test_every_detector_gets_its_share_and_failures_do_not_stop_the_others(
    monkeypatch, make_up_scans, tmp_path
):
    asked = {}

    def scan(name, model, images, **settings):
        asked[name] = settings
        if name == "nc":
            raise ValueError("expected something\nelse")
        return report(3.0)

    make_up_scans(monkeypatch, scan)
    checked = check_model(Bars(), bars(), num_classes=CLASSES)
    lines = []
    pair = ("nc", "reverse")
    found = audit(
        checked, bars(), detectors=pair, alpha=0.04, state=tmp_path / "state", say=lines.append
    )
    assert found.verdict is Verdict.BACKDOORED and found.failures == {
        "nc": "expected something else"
    }
    assert asked["reverse"]["alpha"] == 0.02
    # A folder may hold the scans of several models.
    file = asked["reverse"]["checkpoint"]
    assert file.match("state/reverse-*.safetensors")
    audit(checked, bars(24), detectors=("reverse",), state=tmp_path / "state")
    assert asked["reverse"]["checkpoint"] != file
    audit(checked, bars(), detectors=("reverse",), state=tmp_path / "state")
    assert asked["reverse"]["checkpoint"] == file
    assert lines == [
        "Neural Cleanse: started",
        "Neural Cleanse: stopped: expected something else",
        "Reverse generators: started",
        f"Reverse generators: nearest label 9, p {report(3.0).p_value:.2g}",
    ]
    assert list(reversed_triggers(found)) == [9]
    longest = longest_minutes(
        checked, bars(), CLASSES, detectors=("nc", "uap", "mm-bd"), preset="fast"
    )
    assert longest["nc"] > longest["uap"] > longest["mm-bd"] > 0
    for wrong in ({"detectors": ()}, {"alpha": 1.0}, {"detectors": ("nc", "nc")}):
        with pytest.raises(ValueError, match=r"expected (detectors|alpha)"):
            audit(checked, bars(), **{"detectors": pair} | wrong)


def test_whatever_stops_a_detector_the_others_look(monkeypatch, make_up_scans):
    def scan(name, *args, **settings):
        if name == "nc":
            raise KeyError("v7")
        return report(45.0)

    make_up_scans(monkeypatch, scan)
    checked = check_model(Bars(), bars(), num_classes=CLASSES)
    result = audit(checked, bars(), detectors=("nc", "reverse"))
    assert result.verdict is Verdict.INCONCLUSIVE and set(result.failures) == {"nc"}


def test_a_starved_detector_leaves_the_model_not_scanned():
    """Unless the other one accuses; nothing that it says is a reason to call the model clean."""
    starved = replace(report(45.0), verdict=Verdict.NOT_SCANNED, reason="No gradients.")
    for other, verdict in ((45.0, Verdict.NOT_SCANNED), (3.0, Verdict.BACKDOORED)):
        result = conclude({"nc": starved, "reverse": report(other)}, {}, 0.05)
        assert result.verdict is verdict and ("No gradients" in result.reason) == (other == 45.0)


def test_a_label_stands_out_whatever_the_verdict():
    """The scan of a model outside the calibration is inconclusive, and has an outlier."""
    unsure = replace(report(3.0), verdict=Verdict.INCONCLUSIVE)
    conclusion = conclude({"nc": unsure, "reverse": report(45.0)}, {}, 0.05)
    assert conclusion.verdict is Verdict.INCONCLUSIVE
    assert (conclusion.suspected, conclusion.outliers, conclusion.targets) == ((), (9,), (9,))
    # The second accuses nobody, and has reached label 9 as well.
    assert [one.label for one in all_triggers(conclusion)] == [9, 9]
    assert list(reversed_triggers(conclusion)) == [9] and list(
        reversed_triggers(conclusion, (4,))
    ) == [4]
    assert json.loads(json.dumps(to_json(CHECKED_ABOUT, conclusion)))["outliers"] == [9]
    (result,) = to_sarif(CHECKED_ABOUT, conclusion)["runs"][0]["results"]
    assert result["level"] == "warning" and result["properties"]["label"] == 9
    lines = verdict_lines(conclusion)
    assert "9" in lines[0] and lines[1].startswith("  label 9: 3.0 pixels replaced send")
    guilty = conclude({"nc": report(3.0), "reverse": report(45.0)}, {}, 0.05)
    assert (guilty.suspected, guilty.outliers) == ((9,), (9,))
    assert all_triggers(conclude({"nc": report(45.0)}, {}, 0.05)) == []


def test_an_audits_detectors_are_judged_together(tmp_path):
    """Each is unsure of label 9, together they are not; a third has no clean models."""
    scores = torch.linspace(0.9, 1.1, 10).double()
    scores[9] = 0.45
    reports = {}
    for name in ("head", "uap"):
        calibration = load_calibration(name)
        assert calibration is not None
        reports[name] = judge(
            name,
            scores,
            torch.ones(10),
            floor=0.5,
            alpha=0.05 / 3,
            calibration=calibration,
            subject=calibration.models[0].subject,
        )
    found = conclude({**reports, "nc": report(45.0)}, {}, 0.05)
    (names,) = found.together
    joint = found.together[names]
    assert names == ("head", "uap") and found.suspected == joint.suspected == (9,)
    assert found.p_value == pytest.approx(joint.p_value * 3 / 2)
    assert joint.p_value < min(one.p_value for one in reports.values())
    values = json.loads(json.dumps(to_json(CHECKED_ABOUT, found)))
    assert values["together"][0]["detectors"] == ["head", "uap"]
    lines = verdict_lines(found)
    title = "Head weights + Universal perturbations"
    assert any(line.startswith(f"{title}: backdoored") for line in lines)
    write_html(tmp_path / "a.html", CHECKED_ABOUT, found, None)
    assert f"{title}: backdoored" in (tmp_path / "a.html").read_text()


def test_minutes_break_a_scan_off(monkeypatch, make_up_scans):
    def scan(*args, **settings):
        time.sleep(30)

    make_up_scans(monkeypatch, scan)
    checked = check_model(Bars(), bars(), num_classes=CLASSES)
    start = time.monotonic()
    result = audit(checked, bars(), detectors=("nc", "reverse"), budget=Budget(0.002))
    assert time.monotonic() - start < 10 and result.verdict is Verdict.NOT_SCANNED
    assert "not finished within 0.002" in result.out_of_time["nc"]
    assert result.out_of_time["reverse"].startswith("not begun")


@pytest.mark.parametrize(("low", "verdict"), [(3.0, "backdoored"), (45.0, "clean")])
def test_what_is_done_in_time_gives_the_verdict(low, verdict):
    late = {"reverse": "not finished within 10 minutes"}
    found = conclude({"nc": report(low)}, {}, 0.05, out_of_time=late)
    assert found.verdict == verdict and "Reverse generators had no say" in found.reason
    assert found.to_dict()["out_of_time"] == late


def test_a_budget_leaves_other_interrupts_alone():
    with Budget().enforced(), Budget(10).enforced():
        pass
    with pytest.raises(KeyboardInterrupt), Budget(10).enforced():
        raise KeyboardInterrupt
    budget = Budget(0.001)
    with pytest.raises(OutOfTime), budget.enforced():
        time.sleep(5)
    with pytest.raises(OutOfTime), budget.enforced():  # one budget for all blocks
        raise AssertionError
    for minutes in (0, -1, float("nan"), float("inf")):
        with pytest.raises(ValueError, match="minutes > 0"):
            Budget(minutes)


# --- outputs ------------------------------------------------------------------------------------


def test_json_and_sarif():
    guilty = conclude({"nc": report(3.0)}, {}, 0.05)
    found = json.loads(json.dumps(to_json(CHECKED_ABOUT, guilty)))
    assert found["verdict"] == "backdoored" and found["exit_code"] == 1
    assert found["detectors"]["nc"]["suspected"] == [9] and found["images"]["used"] == 60
    log = json.loads(json.dumps(to_sarif(CHECKED_ABOUT, guilty)))
    (run,) = log["runs"]
    (result,) = run["results"]
    assert log["version"] == "2.1.0" and result["level"] == "error"
    assert result["properties"]["label"] == 9 and run["invocations"][0]["executionSuccessful"]
    clean = to_sarif(CHECKED_ABOUT, conclude({"nc": report(45.0)}, {}, 0.05))["runs"][0]
    assert clean["results"] == []
    unread = not_scanned("cannot open it", 0.05)
    nothing = to_json(About("model.onnx"), unread)
    assert nothing["verdict"] == "not-scanned" and nothing["exit_code"] == 3
    run = to_sarif(About("model.onnx"), unread)["runs"][0]
    assert not run["invocations"][0]["executionSuccessful"] and run["results"] == []


def test_the_page_escapes_what_strangers_named(tmp_path):
    found = conclude({"nc": report(3.0)}, {"reverse": "<b>no</b>"}, 0.05)
    write_html(tmp_path / "a.html", CHECKED_ABOUT, found, bars().images)
    page = (tmp_path / "a.html").read_text()
    assert "<script>" not in page and "&lt;script&gt;.png" in page
    assert "model&lt;b&gt;.onnx" in page and "&lt;b&gt;no&lt;/b&gt;" in page
    assert page.count("data:image/png;base64,") == 12 and "http" not in page
    assert "backdoored" in page and verdict_lines(found)[-1].startswith("verdict:")


def test_inspections_escape_names_and_formulas(tmp_path):
    one = SimpleNamespace(looks_for="<light>", threshold=0.5, false_positive_rate=0.01)
    scanner = SimpleNamespace(detectors={"a": one}, false_positive_rate=0.01)
    rows = [
        ScannedFile("=cmd()|.png", True, {"a": 0.9}, None),
        ScannedFile("<img src=x>.png", True, {"a": 0.8}, None),
        ScannedFile("b.png", False, {}, "cannot read <b>"),
        ScannedFile("c\nflagged d\udcff\x1b.png", True, {"a": 0.7}, None),
    ]
    write_csv(tmp_path / "a.csv", scanner, rows)
    lines = (tmp_path / "a.csv").read_text().splitlines()
    assert lines[0] == "file,flagged,score_a,error" and lines[1] == "'=cmd()|.png,1,0.9,"
    assert lines[3] == "b.png,0,,cannot read <b>"
    assert lines[4] == r"c\nflagged d\udcff\x1b.png,1,0.7,"
    left_out = [LeftOut("<i>.txt", "no image")]
    write_page(tmp_path / "a.html", scanner, rows, "Images of <x>", left_out)
    page = (tmp_path / "a.html").read_text()
    assert "<img" not in page and "&lt;img src=x&gt;.png" in page and "&lt;light&gt;" in page
    assert "3 of 3 images are flagged" in page and "&lt;i&gt;.txt: not looked at, no image" in page
    assert r"c\nflagged d\udcff\x1b.png" in page


# --- the command line ---------------------------------------------------------------------------


def test_what_cannot_be_opened_is_not_scanned(folder, tmp_path, capsys):
    (tmp_path / "model.pkl").write_bytes(b"\x80\x04K\x01.")
    out = tmp_path / "a.json"
    given = ["scan", str(tmp_path / "model.pkl"), "--images", str(folder), "--json", str(out)]
    page = tmp_path / "a.html"
    page.write_text("clean, some days ago")
    assert main([*given, "--sarif", str(tmp_path / "a.sarif"), "--html", str(page)]) == 3
    assert "not-scanned" in page.read_text() and "days ago" not in page.read_text()
    told_so = capsys.readouterr().err.strip()
    assert told_so.startswith("error: cannot open model.pkl") and "\n" not in told_so
    found = json.loads(out.read_text())
    assert found["verdict"] == "not-scanned" and found["reason"] in told_so
    log = json.loads((tmp_path / "a.sarif").read_text())
    assert not log["runs"][0]["invocations"][0]["executionSuccessful"]
    with pytest.raises(SystemExit) as stopped:
        main(["scan", "model.onnx"])
    assert stopped.value.code == 64


def full_disk(path, value):
    raise OSError(28, "No space left on device")


# A budget that ends while a file is being opened leaves the closing to the collector.
@pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning")
def test_a_model_is_scanned_from_its_file(folder, tmp_path, monkeypatch, make_up_scans, capsys):
    """A classifier of ours from its checkpoint, with the search itself made up."""
    low = dict.fromkeys(AUDIT, 45.0)
    make_up_scans(monkeypatch, lambda name, *args, **_: report(low[name]))
    model = build_classifier("resnet10", num_classes=3, channels=3, image_size=16, width=8).eval()
    images = read_clean(folder, size=16, channels=3).images
    with torch.no_grad():  # untrained, it would answer one label for everything
        model.head.bias -= model(images).mean(0)
    assert len(model(images).argmax(1).unique()) > 1
    save_classifier(model, tmp_path / "v.safetensors")
    given = ["scan", str(tmp_path / "v.safetensors"), "--images", str(folder)]
    given.append("--unlabelled")
    wanted = ["--html", str(tmp_path / "a.html"), "--json", str(tmp_path / "a.json")]
    code = main([*given, *wanted])
    printed = capsys.readouterr()
    assert code == 0 and "verdict: clean" in printed.out and "at most" in printed.err
    assert printed.out.startswith("v.safetensors: ") and "ok " in printed.out
    # What was understood of the folder is said, and in the report.
    assert "class folders, 31 images of 3 classes (0 10, 1 11, 2 10)" in printed.err
    assert "1/broken.png" in printed.err
    facts = json.loads((tmp_path / "a.json").read_text())["images"]
    assert (facts["used"], facts["source"]["images"]) == (30, 31)
    assert facts["skipped"] == [{"file": "1/broken.png", "reason": "no picture"}]
    # One output that cannot be written does not cost the others.
    (tmp_path / "a.html").unlink()
    with monkeypatch.context() as patch:
        patch.setattr("wm_inject.core.files.write_json", full_disk)
        assert main([*given, *wanted]) == 3 and (tmp_path / "a.html").exists()
    low["uap"] = 3.0
    assert main(given) == 1
    if not torch.cuda.is_available():
        assert main([*given, "--device", "cuda"]) == 3
        assert "CUDA" in capsys.readouterr().err
    capsys.readouterr()
    assert main([*given, "--minutes", "0.00001", "--json", str(tmp_path / "b.json")]) == 3
    assert "1e-05 minutes" in capsys.readouterr().err
    assert json.loads((tmp_path / "b.json").read_text())["verdict"] == "not-scanned"
    assert (tmp_path / "a.html").stat().st_size > 1000


@pytest.mark.parametrize("error", [KeyError("v7"), MemoryError(), csv.Error("field too long")])
def test_no_error_of_a_scan_is_taken_for_a_verdict(folder, tmp_path, monkeypatch, capsys, error):
    def fail(*args, **options):
        raise error

    import_module("wm_eval.audit.cleaned_file")  # it would keep what it imports from the patch
    monkeypatch.setattr("wm_victim.loading.open_model", fail)
    (tmp_path / "m.onnx").write_bytes(b"")
    for command in (["scan"], ["clean", "--out", str(tmp_path / "c.onnx")]):
        assert main([*command, str(tmp_path / "m.onnx"), "--images", str(folder)]) == 3
        assert capsys.readouterr().err.count("\n") == 1


def opened_bars(*notes):
    """`Bars` as if it had been opened from an ONNX file."""
    about = {"source": "onnx", "arch": "onnx", "image_size": SIZE, "channels": 1}
    about |= {"num_classes": CLASSES, "layout": "NHWC", "outputs": "logits", "sha256": "ab" * 32}
    return OpenedModel(module=Bars(), notes=notes, **about)


def test_an_abstention_that_is_certain_is_foreseen():
    certain = foreseen(
        SimpleNamespace(module=Bars(), labels=None),
        SimpleNamespace(images=bars(24).images),
        CLASSES,
        detectors=("nc", "reverse", "mm-bd"),
        preset="fast",
    )
    assert set(certain) == {"nc", "reverse"}  # the third is calibrated for nothing
    assert "classes" in certain["nc"]


def test_the_detectors_of_an_audit_are_those_calibrated_for_the_model():
    def chosen(size: int, classes: int = 10, **more):
        model = nn.Sequential(nn.Conv2d(3, 10, 3), nn.AdaptiveAvgPool2d(1), nn.Flatten())
        clean = SimpleNamespace(images=torch.rand(500, 3, size, size))
        return choose_detectors(SimpleNamespace(module=model, labels=None), clean, classes, **more)

    # Smaller than any that was calibrated on: all look, the cheapest first.
    assert chosen(32) == chosen(8) == ("head", "sweep", "warp", "uap")
    assert chosen(8, wanted=("reverse", "nc")) == ("reverse", "nc")
    # A calibration of a detector that cannot look at the model.
    with pytest.raises(ValueError, match="linear layer"):
        clean = SimpleNamespace(images=torch.rand(8, 3, 32, 32))
        model = SimpleNamespace(module=nn.Flatten(), labels=None)
        choose_detectors(model, clean, 3072, own={"head": None})
    # Of a thousand the sweep alone is calibrated; a search for each would take hours.
    assert chosen(32, classes=1000) == ("sweep",)
    assert chosen(8, classes=1000) == ("head", "sweep")


def test_what_becomes_known_is_printed_before_the_long_work(
    tmp_path, monkeypatch, make_up_scans, capsys
):
    lines = []

    def interrupted(*args, **settings):
        lines.append(capsys.readouterr().out)
        raise KeyboardInterrupt

    make_up_scans(monkeypatch, interrupted)
    opened = opened_bars("uint8 input")
    monkeypatch.setattr("wm_victim.loading.open_model", lambda *args, **options: opened)
    pixels = bars(24).images.mul(255).byte().permute(0, 2, 3, 1).numpy()
    for number, picture in enumerate(pixels):
        save_image(tmp_path / "bars" / str(number % CLASSES) / f"{number}.png", picture)
    (tmp_path / "m.onnx").write_bytes(b"")
    assert main(["scan", str(tmp_path / "m.onnx"), "--images", str(tmp_path / "bars")]) == 130
    (line,) = lines
    assert "m.onnx: onnx" in line and "note: uint8 input" in line and "ok  accuracy" in line


@pytest.mark.integration
def test_inspect(tmp_path, capsys):
    class Light(nn.Module):
        def forward(self, images):
            return images.mean(dim=(1, 2, 3))

    detector = tmp_path / "light.onnx"
    metadata = {"detector": {"threshold": 0.5, "false_positive_rate": 0.01}}
    to_onnx(
        Light(),
        torch.rand(3, 3, SIZE, SIZE),
        detector,
        uint8=True,
        output_names=("score",),
        metadata=metadata,
    )
    for shade in (0, 100, 250):
        save_image(tmp_path / "in" / f"{shade}.png", np.full((SIZE, SIZE, 3), shade, np.uint8))
    outputs = [f"--{kind}={tmp_path}/found.{kind}" for kind in ("csv", "json", "html")]
    assert main(["inspect", str(tmp_path / "in"), "--extractor", str(detector), *outputs]) == 0
    assert "flagged  250.png" in capsys.readouterr().out
    rows = json.loads((tmp_path / "found.json").read_text())["images"]
    assert [row["flagged"] for row in rows] == [False, False, True]  # 0.png, 100.png, 250.png
    assert len((tmp_path / "found.csv").read_text().splitlines()) == 4
    assert "250.png" in (tmp_path / "found.html").read_text()
    # A marked picture does not hide behind a suffix; what is not looked at is named everywhere.
    (tmp_path / "in" / "250.png").rename(tmp_path / "in" / "250.txt")
    (tmp_path / "in" / "notes.txt").write_text("x")
    assert main(["inspect", str(tmp_path / "in"), "--extractor", str(detector), *outputs]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert "flagged  250.txt" in lines and "not looked at: 1 no image (notes.txt)" in lines
    assert "notes.txt: not looked at, no image" in (tmp_path / "found.html").read_text()
    left_out = json.loads((tmp_path / "found.json").read_text())["left_out"]
    assert left_out == [{"file": "notes.txt", "reason": "no image"}]
    for path in (tmp_path / "in").iterdir():
        path.write_bytes(b"no picture")
    assert main(["inspect", str(tmp_path / "in"), "--extractor", str(detector), *outputs]) == 1
    assert "cannot read 2 of 2 images" in capsys.readouterr().err
    assert len((tmp_path / "found.csv").read_text().splitlines()) == 3
