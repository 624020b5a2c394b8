"""Audits: what is read, what is checked, how one verdict comes of several, and what is written."""

from __future__ import annotations

import json
import time
from dataclasses import replace
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from torch import nn

from defense_nc import InvertedTrigger, Verdict, judge
from wm_eval.audit.budget import OutOfTime, budget
from wm_eval.audit.checks import NotScanned, check_model
from wm_eval.audit.cleaning import Mixed, clean_in_rounds, clean_model, success, write_like
from wm_eval.audit.images import CleanImages, read_clean
from wm_eval.audit.inspect import write_csv, write_page
from wm_eval.audit.outputs import About, to_json, to_sarif, told, write_html
from wm_eval.audit.scan import all_triggers, audit, conclude, longest_minutes, reversed_triggers
from wm_eval.audit.unfold import fold, unfold
from wm_eval.cli import main
from wm_inject import OnnxModel, save_image, to_onnx
from wm_inject.core.image_files import LeftOut
from wm_inject.runtime import ScannedFile
from wm_victim import build_classifier, save_classifier
from wm_victim.models import Normalize

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
    found = read_clean(folder, size=4, channels=1, labels=table)
    assert found.labels.tolist() == [names.index(name) % 5 for name in found.files]
    assert found.classes is None
    table.write_text(
        "name;kind\n" + "".join(f"{name};{'ba'[n % 2]}\n" for n, name in enumerate(names))
    )
    found = read_clean(folder, size=4, channels=1, labels=table)
    assert found.classes == ("a", "b")
    assert found.labels.tolist() == [1 - names.index(name) % 2 for name in found.files]
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
    ]


def test_logarithms_of_probabilities_have_gradients():
    class Logs(Bars):
        def forward(self, images):
            return super().forward(images).log_softmax(1)

    # Their logsumexp is 0 whatever the image is: a check by it would refuse them all.
    assert check_model(Logs(), bars(), num_classes=CLASSES).notes == ()


def test_labels_that_mean_something_else_are_not_used():
    clean = bars()
    found = check_model(Bars(), replace(clean, labels=(clean.labels + 1) % 4), num_classes=CLASSES)
    assert found.labels is None and any(note.startswith("accuracy:") for note in found.notes)
    assert check_model(Bars(), replace(clean, labels=None), num_classes=CLASSES).labels is None


def test_another_scale_of_images_is_found_by_the_labels():
    class Wide(Bars):
        """Right for images in [-1, 1] alone: elsewhere the first label wins."""

        def forward(self, images):
            wide = images.amin(dim=(1, 2, 3)) < -0.5
            logits = super().forward(images)
            return torch.where(wide[:, None], logits, 1e-3 * logits + torch.tensor([9.0, 1, 1, 1]))

    with pytest.raises(NotScanned, match="answers of several classes"):
        check_model(Wide(), bars(), num_classes=CLASSES, guess_scale=False)
    found = check_model(Wide(), bars(), num_classes=CLASSES)
    assert found.accuracy == 1 and "[-1, 1]" in found.checks[4].detail


@pytest.mark.parametrize(
    ("change", "told_so"),
    [
        (lambda x: x * float("nan"), "finite logits"),
        (lambda x: x[:, :3], "finite logits"),
        (lambda x: x + torch.rand(1), "the same logits"),
        (lambda x: x.detach(), "gradients with respect"),
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
    found = audit(checked, bars(), alpha=0.04, state=tmp_path / "state", say=lines.append)
    assert found.verdict is Verdict.BACKDOORED and found.failures == {
        "nc": "expected something else"
    }
    assert asked["reverse"]["alpha"] == 0.02
    assert asked["reverse"]["checkpoint"] == tmp_path / "state" / "reverse.safetensors"
    assert lines == ["Neural Cleanse: started", "Reverse generators: started"]
    assert list(reversed_triggers(found)) == [9]
    assert longest_minutes(checked, bars(), CLASSES) > 0
    for wrong in ({"detectors": ()}, {"alpha": 1.0}, {"detectors": ("nc", "nc")}):
        with pytest.raises(ValueError, match="expected detectors and alpha"):
            audit(checked, bars(), **wrong)


def test_minutes_break_a_scan_off(monkeypatch, make_up_scans):
    def scan(*args, **settings):
        time.sleep(30)

    make_up_scans(monkeypatch, scan)
    checked = check_model(Bars(), bars(), num_classes=CLASSES)
    start = time.monotonic()
    found = audit(checked, bars(), minutes=0.002)
    assert time.monotonic() - start < 10 and found.verdict is Verdict.NOT_SCANNED
    assert "not finished within" in found.failures["nc"]
    assert found.failures["reverse"] == "not begun: the minutes were over"


def test_a_budget_leaves_other_interrupts_alone():
    with budget(None), budget(10):
        pass
    with pytest.raises(KeyboardInterrupt), budget(10):
        raise KeyboardInterrupt
    with pytest.raises(OutOfTime), budget(0.001):
        time.sleep(5)
    with pytest.raises(ValueError, match="minutes > 0"), budget(0):
        pass


# --- cleaning -----------------------------------------------------------------------------------


def test_what_the_trigger_needs_is_unlearned():
    model, clean = Bars(), bars()
    with torch.no_grad():
        model.net[1].weight[3, 0] = 12.0  # a bright first pixel means label 3
    mask = torch.zeros(1, SIZE, SIZE)
    mask[0, 0, 0] = 1
    triggers = {3: InvertedTrigger(mask, torch.ones(1, SIZE, SIZE))}
    before = {k: v.clone() for k, v in model.state_dict().items()}
    assert success(model, triggers, clean.images)[3] == 1
    cleaned = clean_model(model, list(triggers.values()), clean.images, clean.labels)
    # Ten passes over sixty images do not take all of it, but what the trigger needs shrinks.
    assert success(cleaned, triggers, clean.images)[3] < 1
    assert cleaned.net[1].weight[3, 0].item() < 11.9
    assert all(torch.equal(v, before[k]) for k, v in model.state_dict().items())
    wrong = (clean.labels + 1) % CLASSES  # what it learns then costs more than it may
    with pytest.raises(ValueError, match="not cleaned: unlearning took more than 5%"):
        clean_model(_Brittle(), list(triggers.values()), clean.images, wrong)
    with pytest.raises(ValueError, match="reversed triggers to unlearn"):
        clean_model(model, [], clean.images, clean.labels)


class Plain(nn.Module):
    """Convolutions without normalisation, as exporters leave them; one of them padded apart."""

    def __init__(self, channels: int = 1) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.first = nn.Conv2d(channels, 6, 3, padding=1)
        self.inner = nn.Sequential(nn.ZeroPad2d((0, 1, 0, 1)), nn.Conv2d(6, 6, 3, bias=False))
        self.head = nn.Linear(6, CLASSES)

    def forward(self, images):
        y = torch.relu(self.inner(torch.relu(self.first(images))))
        return self.head(y.mean(dim=(2, 3)))


def test_normalisation_is_given_back_and_folded_in_again():
    model, images = Plain().eval(), bars().images
    before = {k: v.clone() for k, v in model.state_dict().items()}
    opened, names = unfold(model, images)
    assert names == ("first", "inner.1")
    norms = [one for one in opened.modules() if isinstance(one, nn.BatchNorm2d)]
    assert len(norms) == 2
    torch.testing.assert_close(opened(images), model(images), rtol=1e-4, atol=1e-5)
    # The statistics are those of the images: in training, what comes out of the first is the same.
    torch.testing.assert_close(
        opened.first.train()(images), model.first(images), rtol=1e-3, atol=1e-4
    )
    folded = fold(opened, names)
    torch.testing.assert_close(folded(images), model(images), rtol=1e-4, atol=1e-5)
    assert not [one for one in folded.modules() if isinstance(one, nn.BatchNorm2d)]
    assert folded.inner[1].bias is not None  # where the mean went
    assert all(torch.equal(v, before[k]) for k, v in model.state_dict().items())


def test_networks_with_normalisation_or_without_convolutions_are_left_alone():
    class Single(Plain):
        def forward(self, images):
            return torch.cat([Plain.forward(self, one) for one in images.split(1)])

    normal = nn.Sequential(nn.Conv2d(1, 2, 3), nn.GroupNorm(1, 2), nn.Flatten())
    for model in (normal, Bars(), Single()):
        copied, names = unfold(model.eval(), bars().images)
        assert names == () and copied is not model
        assert [type(one) for one in copied.modules()] == [type(one) for one in model.modules()]
    # Normalising the input is no such layer.
    assert len(unfold(nn.Sequential(Normalize([0.5], [0.5]), Plain()), bars().images)[1]) == 2


def test_several_triggers_take_turns():
    class Set(nn.Module):
        def __init__(self, value):
            super().__init__()
            self.value = value

        def forward(self, images, **_):
            return torch.full_like(images, self.value)

    mixed, images = Mixed([Set(0.2), Set(0.4), Set(0.6)]), bars(6).images
    assert mixed(images)[:, 0, 0, 0].tolist() == pytest.approx([0.2, 0.4, 0.6] * 2)
    ids = torch.tensor([5, 3, 1, 0, 2, 4])
    found = mixed(images, ids=ids)[:, 0, 0, 0].tolist()
    assert found == pytest.approx([0.6, 0.2, 0.4, 0.2, 0.6, 0.4])


def test_rounds_go_on_until_nothing_is_named(monkeypatch):
    checked, clean = check_model(Bars(), bars(), num_classes=CLASSES), bars()
    given: list[int] = []

    def cleaned(module, triggers, *args, **settings):
        assert module is checked.module  # every round starts from the model that was given
        given.append(len(triggers))
        return Bars()

    monkeypatch.setattr("wm_eval.audit.cleaning.clean_model", cleaned)
    guilty, innocent = (conclude({"nc": report(low)}, {}, 0.05) for low in (3.0, 45.0))

    def rounds(answers, limit=3):
        given.clear()
        left, places = list(answers), []

        def scan(model, place):
            places.append(place)
            return left.pop(0)

        found = list(clean_in_rounds(checked, clean, guilty, clean.labels, scan=scan, rounds=limit))
        assert places == [f"round-{one.number}" for one in found]
        return [one.audit.verdict for one in found]

    bad, good = Verdict.BACKDOORED, Verdict.CLEAN
    assert rounds([innocent]) == [good] and given == [1]
    assert rounds([guilty, innocent]) == [bad, good] and given == [1, 2]
    assert rounds([guilty] * 3) == [bad] * 3 and given == [1, 2, 3]
    assert rounds([guilty] * 3, limit=2) == [bad, bad]
    with pytest.raises(ValueError, match="at least 1 round, got 0"):
        rounds([], limit=0)


def test_every_detectors_way_to_a_suspected_label_is_unlearned():
    found = conclude({"nc": report(3.0), "reverse": report(45.0)}, {}, 0.05)
    # The second accuses nobody, and has reached label 9 as well.
    assert [label for label, _ in all_triggers(found)] == [9, 9]
    assert all_triggers(conclude({"nc": report(45.0)}, {}, 0.05)) == []


class _Brittle(Bars):
    """Right on everything until its weights have moved at all."""

    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("first", self.net[1].weight.detach().clone())

    def forward(self, images):
        logits = super().forward(images).roll(1, dims=1)
        moved = (self.net[1].weight - self.first).abs().max() > 0
        return torch.where(moved, logits * float("nan"), logits)


def test_a_cleaned_model_is_written_as_it_came(tmp_path):
    model, images = Bars(), bars().images
    opened = SimpleNamespace(source="onnx", arch="onnx")
    assert "within" in write_like(model, opened, images[:4], tmp_path / "c.onnx", {"a": 1})
    found = OnnxModel(tmp_path / "c.onnx")
    assert np.abs(found(images.numpy()) - model(images).detach().numpy()).max() < 1e-3
    assert found.metadata["kind"] == "cleaned classifier" and found.metadata["a"] == 1
    opened.source = "torchscript"
    write_like(model, opened, images[:4], tmp_path / "c.pt", {})
    assert torch.allclose(torch.jit.load(str(tmp_path / "c.pt"))(images), model(images), atol=1e-5)
    opened = SimpleNamespace(source="safetensors", arch="bars")
    write_like(nn.Sequential(nn.Identity(), model), opened, images, tmp_path / "c.safetensors", {})
    from safetensors.torch import load_file

    assert set(load_file(tmp_path / "c.safetensors")) == set(model.state_dict())
    with pytest.raises(ValueError, match=r"expected a file \*\.onnx"):
        write_like(model, SimpleNamespace(source="onnx"), images, tmp_path / "c.pt", {})


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
    nothing = to_json(CHECKED_ABOUT, None, "cannot open it")
    assert nothing["verdict"] == "not-scanned" and nothing["exit_code"] == 3
    run = to_sarif(CHECKED_ABOUT, None, "cannot open it")["runs"][0]
    assert not run["invocations"][0]["executionSuccessful"] and run["results"] == []


def test_the_page_escapes_what_strangers_named(tmp_path):
    found = conclude({"nc": report(3.0)}, {"reverse": "<b>no</b>"}, 0.05)
    write_html(tmp_path / "a.html", CHECKED_ABOUT, found, bars().images)
    page = (tmp_path / "a.html").read_text()
    assert "<script>" not in page and "&lt;script&gt;.png" in page
    assert "model&lt;b&gt;.onnx" in page and "&lt;b&gt;no&lt;/b&gt;" in page
    assert page.count("data:image/png;base64,") == 12 and "http" not in page
    assert "backdoored" in page and told(CHECKED_ABOUT, found).splitlines()[-1].startswith(
        "verdict:"
    )


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
    assert main([*given, "--sarif", str(tmp_path / "a.sarif")]) == 3
    told_so = capsys.readouterr().err.strip()
    assert told_so.startswith("error: cannot open model.pkl") and "\n" not in told_so
    found = json.loads(out.read_text())
    assert found["verdict"] == "not-scanned" and found["reason"] in told_so
    log = json.loads((tmp_path / "a.sarif").read_text())
    assert not log["runs"][0]["invocations"][0]["executionSuccessful"]
    with pytest.raises(SystemExit) as stopped:
        main(["scan", "model.onnx"])
    assert stopped.value.code == 64


def test_a_model_is_scanned_from_its_file(folder, tmp_path, monkeypatch, make_up_scans, capsys):
    """A classifier of ours from its checkpoint, with the search itself made up."""
    low = {"nc": 45.0, "reverse": 45.0}
    make_up_scans(monkeypatch, lambda name, *args, **_: report(low[name]))
    model = build_classifier("resnet10", num_classes=3, channels=3, image_size=16, width=8).eval()
    images = read_clean(folder, size=16, channels=3).images
    with torch.no_grad():  # untrained, it would answer one label for everything
        model.head.bias -= model(images).mean(0)
    assert len(model(images).argmax(1).unique()) > 1
    save_classifier(model, tmp_path / "v.safetensors")
    given = ["scan", str(tmp_path / "v.safetensors"), "--images", str(folder)]
    wanted = ["--html", str(tmp_path / "a.html"), "--json", str(tmp_path / "a.json")]
    code = main([*given, *wanted])
    printed = capsys.readouterr()
    assert code == 0 and "verdict: clean" in printed.out and "at most" in printed.err
    low["nc"] = 3.0
    assert main(given) == 1
    assert (tmp_path / "a.html").stat().st_size > 1000


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
