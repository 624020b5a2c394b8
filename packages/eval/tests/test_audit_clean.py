"""Cleaning: what is unlearned, what it may cost, and the form in which the model is written."""

from __future__ import annotations

import json
import warnings
from dataclasses import replace
from types import SimpleNamespace

import numpy as np
import onnx
import pytest
import torch
from onnx import TensorProto, helper, numpy_helper
from torch import nn

from defense_nc import InvertedTrigger, Verdict, judge
from defense_nc.mitigations import RepairCost, repair_cost
from wm_eval.audit.checks import check_model
from wm_eval.audit.cleaned_file import CleanedFile
from wm_eval.audit.cleaning import (
    Mixed,
    clean_in_rounds,
    clean_model,
    labels_to_clean,
    success,
)
from wm_eval.audit.conclusion import conclude
from wm_eval.audit.images import CleanImages
from wm_eval.audit.onnx_weights import OnnxWeights, describe_graph
from wm_eval.audit.scan import LabelTrigger, all_triggers
from wm_eval.audit.unfold import fold, unfold
from wm_eval.cli import main
from wm_inject import OnnxModel, save_image
from wm_inject.core.checkpoint import load_checkpoint
from wm_inject.core.files import sha256_file
from wm_victim import build_classifier, load_classifier, save_classifier
from wm_victim.loading import open_model
from wm_victim.models import Normalize

SIZE, CLASSES = 8, 4


class Bars(nn.Module):
    """Answers with the quarter of the image that is brightest, by a convolution without bias."""

    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(1, 1, (2, SIZE), stride=(2, SIZE), bias=False)
        self.head = nn.Linear(CLASSES, CLASSES)
        with torch.no_grad():
            self.conv.weight.fill_(1.0)
            self.head.weight.copy_(torch.eye(CLASSES))
            self.head.bias.copy_(torch.tensor([2.0, 0.1, 0.2, 0.3]))
        self.eval()

    def forward(self, images):
        return self.head(self.conv(images).flatten(1))


class Served(nn.Module):
    """The same as a service takes it: ``(N, H, W, C)`` in 0 .. 255 to probabilities."""

    def __init__(self) -> None:
        super().__init__()
        self.net = Bars()

    def forward(self, images):
        return self.net(images.permute(0, 3, 1, 2) / 255).softmax(1)


def bars(count: int = 60) -> CleanImages:
    labels = torch.arange(count) % CLASSES
    images = 0.2 * torch.rand(count, 1, SIZE, SIZE, generator=torch.Generator().manual_seed(0))
    for image, label in zip(images, labels, strict=True):
        image[0, 2 * label : 2 * label + 2] += 0.6
    return CleanImages(images, labels, tuple(f"{n}.png" for n in range(count)), ())


def trigger(value: float = 1.0) -> InvertedTrigger:
    """A bright first pixel."""
    mask = torch.zeros(1, SIZE, SIZE)
    mask[0, 0, 0] = 1
    return InvertedTrigger(mask, torch.full((1, SIZE, SIZE), value))


def report(*labels: int, verdict: Verdict = Verdict.BACKDOORED, name: str = "neural-cleanse"):
    """A report in which these labels stand out."""
    scores = torch.linspace(40, 80, CLASSES)
    scan = judge(
        name,
        scores,
        torch.ones(CLASSES),
        floor=0.9,
        triggers=dict.fromkeys(range(CLASSES), trigger()),
    )
    return replace(scan, verdict=verdict if labels else Verdict.CLEAN, suspected=labels)


# --- what is unlearned --------------------------------------------------------------------------


class Flat(nn.Module):
    """The same by a linear layer, in which a bright first pixel means label 3 as well."""

    def __init__(self) -> None:
        super().__init__()
        self.net = nn.Linear(SIZE * SIZE, CLASSES, bias=False)
        with torch.no_grad():
            rows = torch.zeros(CLASSES, SIZE, SIZE)
            for label in range(CLASSES):
                rows[label, 2 * label : 2 * label + 2] = 1
            self.net.weight.copy_(rows.flatten(1))
            self.net.weight[3, 0] = 12.0
        self.eval()

    def forward(self, images):
        return self.net(images.flatten(1))


def test_what_the_trigger_needs_is_unlearned():
    model, clean = Flat(), bars()
    triggers = {3: LabelTrigger(3, trigger())}
    before = {k: v.clone() for k, v in model.state_dict().items()}
    assert success(model, triggers, clean.images, clean.labels)[3] == 1
    cleaned, cost = clean_model(model, [triggers[3]], clean.images, clean.labels)
    assert cost.images == 12 and cost.within(0.05)
    # Ten passes over fifty images do not take all of it, but what the trigger needs shrinks.
    assert cleaned.net.weight[3, 0].item() < 11.9
    assert all(torch.equal(v, before[k]) for k, v in model.state_dict().items())
    with pytest.raises(ValueError, match="reversed triggers to unlearn"):
        clean_model(model, [], clean.images, clean.labels)


def test_a_trigger_of_one_class_is_put_on_its_images_alone():
    model, clean = Flat(), bars()
    marked, seen = trigger(), []

    def only(images, **_):
        seen.append(images.mean((1, 3)).argmax(1) // 2)
        return marked(images)

    cleaned, cost = clean_model(
        model, [LabelTrigger(3, only, source=1)], clean.images, clean.labels
    )
    assert cost.within(0.05) and cleaned.net.weight[3, 0].item() < 11.9
    assert set(torch.cat(seen).tolist()) == {1}
    assert success(model, {3: LabelTrigger(3, only, source=1)}, clean.images, clean.labels)[3] == 1
    assert set(torch.cat(seen).tolist()) == {1}
    others = clean.labels != 1
    with pytest.raises(ValueError, match="not cleaned: no image is of label 1"):
        clean_model(
            model, [LabelTrigger(3, only, source=1)], clean.images[others], clean.labels[others]
        )


class Brittle(Flat):
    """Right on everything until its weights have moved at all."""

    def forward(self, images):
        differs = (self.net.weight[3, 0] - 12).abs() > 0
        logits = super().forward(images)
        return torch.where(differs, logits * float("nan"), logits)


def test_a_model_that_would_lose_its_accuracy_is_not_cleaned():
    clean = bars()
    for labels in (clean.labels, None):
        with pytest.raises(ValueError, match=r"not cleaned: .* --max-loss 0\.05"):
            clean_model(Brittle(), [LabelTrigger(3, trigger())], clean.images, labels)


def test_misread_labels_are_not_learned():
    """Labels of half of the classes shifted by one, as a missing class folder shifts them."""
    model, clean = Bars(), bars(120)
    shifted = torch.where(clean.labels < 2, clean.labels, 5 - clean.labels)
    with torch.no_grad():
        agreement = torch.eq(model(clean.images).argmax(1), shifted).double().mean()
    assert float(agreement) == 0.5
    try:
        cleaned, cost = clean_model(model, [LabelTrigger(3, trigger())], clean.images, shifted)
    except ValueError as error:
        assert "not cleaned" in str(error)
        return
    assert cost.agreement > 0.9
    with torch.no_grad():
        assert torch.eq(cleaned(clean.images).argmax(1), clean.labels).double().mean() > 0.9


def test_the_cost_of_a_repair(subtests):
    before = torch.arange(100) % 10
    wrong = (before + 1) % 10
    half = torch.where(torch.arange(100) < 50, before, wrong)
    cost = repair_cost(before, half, before)
    assert cost == RepairCost((1.0, 0.5), 0.5, 100) and "0.5000" in str(cost)
    cost = repair_cost(before, half)
    assert cost == RepairCost(None, 0.5, 100) and "accuracy" not in str(cost)
    for accuracy, agreement, images, allowed in (
        ((0.98, 0.97), 0.97, 100, True),
        ((0.98, 0.92), 0.93, 100, False),
        ((0.89, 0.98), 0.88, 100, True),  # what was wrong became right
        ((0.56, 0.98), 0.56, 100, False),  # as if: the labels are misread
        ((0.75, 0.75), 0.85, 100, True),
        (None, 0.96, 100, True),
        (None, 0.94, 100, False),
        ((1.0, 0.75), 0.75, 4, True),  # one image of four says nothing
        ((1.0, 0.5), 0.5, 4, False),
    ):
        with subtests.test(accuracy=accuracy, agreement=agreement, images=images):
            assert RepairCost(accuracy, agreement, images).within(0.05) is allowed
            assert RepairCost(accuracy, agreement, images).within(1.0)
    for bad in (
        (before, half[:50], None),
        (before[:0], half[:0], None),
        (before, half, before[:5]),
    ):
        with pytest.raises(ValueError, match="as many answers"):
            repair_cost(*bad)


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
    values = mixed(images, ids=ids)[:, 0, 0, 0].tolist()
    assert values == pytest.approx([0.6, 0.2, 0.4, 0.2, 0.6, 0.4])


def test_labels_that_stand_out_or_are_named_are_cleaned():
    unsure = report(3, verdict=Verdict.INCONCLUSIVE)
    result = conclude({"nc": unsure, "reverse": report()}, {}, 0.05)
    assert labels_to_clean(result) == (3,) and labels_to_clean(result, 1) == (1,)
    assert [one.label for one in all_triggers(result, (3,))] == [3, 3]
    with pytest.raises(ValueError, match="no label stands out"):
        labels_to_clean(conclude({"nc": report()}, {}, 0.05))


def test_a_label_without_a_reversed_trigger_is_unlearned_in_the_last_layer():
    """The label is named by its weights alone: a corner of the image adds 12 to its logit."""
    model, clean = Flat(), bars()
    marked = LabelTrigger(3, trigger())
    assert success(model, {3: marked}, clean.images, clean.labels)[3] == 1
    checked = check_model(model, clean, num_classes=CLASSES)
    named = replace(report(3), triggers={})
    answers = [conclude({"head": replace(report(), triggers={})}, {}, 0.05)]
    (only,) = clean_in_rounds(
        checked, clean, conclude({"head": named}, {}, 0.05), scan=lambda one: answers.pop(0)
    )
    cleaned = only.checked.module
    assert only.labels == only.refitted == (3,) and only.cost.within(0.05)
    others = clean.labels != 3
    assert success(cleaned, {3: marked}, clean.images[others], clean.labels[others])[3] < 0.1
    before, after = (dict(one.named_parameters())["net.weight"] for one in (model, cleaned))
    assert torch.equal(before[:3], after[:3]) and not torch.equal(before[3], after[3])
    none_of_it = torch.where(clean.labels == 3, 2, clean.labels)
    with pytest.raises(ValueError, match=r"not cleaned: .* trigger that reaches 3, .* label 3"):
        clean_model(
            model, [], clean.images[none_of_it < 2], none_of_it[none_of_it < 2], targets=[3]
        )


def test_a_label_that_cannot_be_unlearned_is_kept_and_the_others_are_cleaned():
    model, every = Flat(), bars()
    own = every.labels == 2
    clean = replace(every, images=every.images[~own], labels=every.labels[~own], files=())
    checked = check_model(model, clean, num_classes=CLASSES)
    found = conclude({"head": replace(report(2, 3), triggers={})}, {}, 0.05)
    (only,) = clean_in_rounds(checked, clean, found, scan=lambda one: found)
    assert only.labels == only.refitted == (3,) and [*only.obstacles] == [2]
    marked = {3: LabelTrigger(3, trigger())}
    assert success(only.checked.module, marked, every.images[own], every.labels[own])[3] < 0.1
    with pytest.raises(ValueError, match=r"not cleaned: label 2: .* got 0 of 45"):
        next(clean_in_rounds(checked, clean, found, scan=lambda one: found, label=2))


def test_rounds_go_on_until_nothing_stands_out(monkeypatch):
    checked, clean = check_model(Bars(), bars(), num_classes=CLASSES), bars()
    cleaned_labels: list[int] = []

    def cleaned(module, triggers, *args, **settings):
        assert module is checked.module  # every round starts from the model that was given
        cleaned_labels.append(len(triggers))
        return SimpleNamespace(model=Bars(), cost=RepairCost(None, 1.0, 12))

    monkeypatch.setattr("wm_eval.audit.cleaning.clean_model", cleaned)
    guilty, other, unsure, innocent = (
        conclude({"nc": one}, {}, 0.05)
        for one in (report(3), report(1), report(3, verdict=Verdict.INCONCLUSIVE), report())
    )

    def rounds(answers, first=guilty, **options):
        cleaned_labels.clear()
        left = list(answers)
        results = clean_in_rounds(checked, clean, first, scan=lambda model: left.pop(0), **options)
        return [one.labels for one in results]

    assert rounds([innocent]) == [(3,)] and cleaned_labels == [1]
    assert rounds([other, innocent]) == [(3,), (1, 3)] and cleaned_labels == [1, 2]
    assert rounds([unsure, innocent], first=unsure) == [(3,), (3,)] and cleaned_labels == [1, 2]
    assert rounds([guilty] * 3) == [(3,)] * 3 and cleaned_labels == [1, 2, 3]
    assert rounds([guilty] * 2, rounds=2) == [(3,)] * 2
    assert rounds([guilty], first=innocent, label=2) == [(2,)] and cleaned_labels == [1]
    with pytest.raises(ValueError, match="at least 1 round, got 0"):
        rounds([], rounds=0)


# --- normalisation for the time of cleaning -----------------------------------------------------


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
    linear = nn.Sequential(nn.Flatten(), nn.Linear(SIZE * SIZE, CLASSES))
    for model in (normal, linear, Single()):
        copied, names = unfold(model.eval(), bars().images)
        assert names == () and copied is not model
        assert [type(one) for one in copied.modules()] == [type(one) for one in model.modules()]
    # Normalising the input is no such layer.
    assert len(unfold(nn.Sequential(Normalize([0.5], [0.5]), Plain()), bars().images)[1]) == 2


# --- the cleaned file ---------------------------------------------------------------------------


def graph_with(weights, nodes, outputs=("logits",), ir_version=8):
    """An ONNX model of opset 13 on images ``(N, 1, 2, 2)``."""
    ports = [helper.make_tensor_value_info("image", TensorProto.FLOAT, ["n", 1, 2, 2])]
    output_ports = [
        helper.make_tensor_value_info(name, TensorProto.FLOAT, None) for name in outputs
    ]
    tensors = [numpy_helper.from_array(value, name) for name, value in weights.items()]
    graph = helper.make_graph(nodes, "g", ports, output_ports, tensors)
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 13)])
    model.ir_version = ir_version
    entry = model.metadata_props.add()
    entry.key, entry.value = "author", "someone"
    return model


@pytest.fixture
def shared(tmp_path):
    """Two layers whose equal weights are one constant, one through Identity; a transposed one."""
    rng = np.random.default_rng(0)
    w, zero = (rng.normal(size=shape).astype(np.float32) for shape in ((4, 3), (3,)))
    conv = rng.normal(size=(4, 1, 2, 2)).astype(np.float32)
    zero[:] = 0
    square = rng.normal(size=(3, 3)).astype(np.float32)
    nodes = [
        helper.make_node("Conv", ["image", "conv"], ["c"]),
        helper.make_node("Flatten", ["c"], ["x"]),
        helper.make_node("Identity", ["zero"], ["zero_2"]),
        helper.make_node("Gemm", ["x", "w", "zero"], ["y"]),
        helper.make_node("Constant", [], ["v"], value=numpy_helper.from_array(square)),
        helper.make_node("Gemm", ["y", "v", "zero_2"], ["logits"], transB=1),
    ]
    path = tmp_path / "m.onnx"
    onnx.save(graph_with({"conv": conv, "w": w, "zero": zero}, nodes), str(path))
    state = {"a.weight": conv, "b.weight": w.T, "b.bias": zero, "c.weight": square, "c.bias": zero}
    return path, {name: torch.tensor(np.ascontiguousarray(one)) for name, one in state.items()}


def computed(state, images):
    y = nn.functional.conv2d(images, state["a.weight"], state.get("a.bias")).flatten(1)
    y = nn.functional.linear(y, state["b.weight"], state["b.bias"])
    return nn.functional.linear(y, state["c.weight"], state["c.bias"])


def test_weights_are_replaced_and_nothing_else(shared, tmp_path):
    path, state = shared
    weights = OnnxWeights(path, sha256_file(path), state, state)
    images, out = torch.rand(3, 1, 2, 2), tmp_path / "out.onnx"
    weights.write(out, state, {})
    same = torch.from_numpy(OnnxModel(out)(images.numpy()))
    assert torch.equal(same, torch.from_numpy(OnnxModel(path)(images.numpy())))
    # Every weight gets a value of its own, and the convolution a bias that it did not have.
    new = {name: torch.rand_like(one) for name, one in state.items()} | {"a.bias": torch.rand(4)}
    weights.write(out, new, {"kind": "cleaned classifier"})
    logits = torch.from_numpy(OnnxModel(out)(images.numpy()))
    torch.testing.assert_close(logits, computed(new, images))
    assert describe_graph(out) == describe_graph(path)
    props = {entry.key: entry.value for entry in onnx.load(str(out)).metadata_props}
    assert props["author"] == "someone" and json.loads(props["wm"])["kind"] == "cleaned classifier"


def test_weights_that_a_file_does_not_hold_are_refused(shared, tmp_path):
    path, state = shared
    digest = sha256_file(path)
    with pytest.raises(ValueError, match="has changed"):
        OnnxWeights(path, "0" * 64, state, state)
    with pytest.raises(ValueError, match=r"does not hold b\.weight"):
        OnnxWeights(path, digest, {**state, "b.weight": state["b.weight"] * 2}, state)
    weights = OnnxWeights(path, digest, {**state, "buffer": torch.zeros(2)}, state)
    for name in ("buffer", "b.other", "d.bias"):
        with pytest.raises(ValueError, match=name.replace(".", r"\.")):
            weights.write(tmp_path / "out.onnx", {**state, name: torch.ones(2)}, {})


def export_served(path):
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        torch.onnx.export(
            Served().eval(),
            (torch.rand(2, SIZE, SIZE, 1),),
            str(path),
            dynamo=False,
            opset_version=12,
            input_names=["serving_input:0"],
            output_names=["probs"],
            dynamic_axes={"serving_input:0": {0: "n"}},
        )
    model = onnx.load(str(path))
    entry = model.metadata_props.add()
    entry.key, entry.value = "labels", "a,b,c,d"
    onnx.save(model, str(path))


def write_bars(folder, count=60):
    clean = bars(count)
    pixels = clean.images.mul(255).byte().permute(0, 2, 3, 1).numpy()
    for number, picture in enumerate(pixels):
        save_image(folder / str(number % CLASSES) / f"{number:02}.png", picture)
    return pixels.astype(np.float32)


@pytest.mark.integration
def test_a_cleaned_graph_takes_the_place_of_the_original(
    tmp_path, monkeypatch, make_up_scans, capsys
):
    """Images ``(N, H, W, C)`` in 0 .. 255, probabilities, old names, opset and metadata."""
    model, cleaned = tmp_path / "m.onnx", tmp_path / "cleaned.onnx"
    export_served(model)
    pixels = write_bars(tmp_path / "clean")
    # Outside the calibration: inconclusive, and label 3 stands out. After the first round it does
    # not.
    left = [report(3, verdict=Verdict.INCONCLUSIVE)] * 2
    make_up_scans(monkeypatch, lambda *args, **_: left.pop() if left else report())
    command = ["clean", str(model), "--images", str(tmp_path / "clean"), "--out", str(cleaned)]
    report_file = tmp_path / "told.json"
    assert main([*command, "--json", str(report_file)]) == 0
    output = capsys.readouterr().out
    assert "note: " in output.split("before: ")[0]  # how the file is understood comes first
    results = json.loads(report_file.read_text())
    assert results["before"]["outliers"] == [3] and results["cleaned"] == [3]
    assert results["same_answers"] >= 0.9 and results["held_out"] == 12
    old, new = onnx.load(str(model)), onnx.load(str(cleaned))
    assert describe_graph(cleaned) == describe_graph(model)
    assert "serving_input:0" in str(describe_graph(model)) and "opset 12" in str(
        describe_graph(model)
    )
    nodes = [(node.op_type, node.output) for node in old.graph.node]
    assert [(node.op_type, node.output) for node in new.graph.node] == nodes
    assert {entry.key: entry.value for entry in new.metadata_props}["labels"] == "a,b,c,d"
    runs = [OnnxModel(path)(pixels) for path in (model, cleaned)]
    assert np.allclose(runs[1].sum(1), 1, atol=1e-5) and not np.allclose(*runs)
    assert (runs[0].argmax(1) == runs[1].argmax(1)).mean() > 0.9


@pytest.mark.integration
def test_where_weights_cannot_be_put_back_the_difference_is_told(tmp_path):
    model, images = Bars(), bars().images
    source = tmp_path / "m.onnx"
    export_served(source)
    about = {"outputs": "probabilities", "layout": "NHWC", "sha256": sha256_file(source)}
    opened = SimpleNamespace(source="onnx", arch="onnx", module=model, **about)
    with torch.no_grad():
        model.conv.weight.mul_(2)  # folded with something when it was imported
    file = CleanedFile(source, tmp_path / "c.onnx", opened, model, images, {})
    notes = "\n".join(file.notes)
    assert "conv.weight" in notes and "opset 12" in notes and "NHWC and probabilities" in notes
    assert not (tmp_path / "c.onnx").exists()
    assert "within" in file.write(model, {"a": 1})
    new_graph = OnnxModel(tmp_path / "c.onnx")
    assert np.abs(new_graph(images.numpy()) - model(images).detach().numpy()).max() < 1e-3
    assert new_graph.metadata["kind"] == "cleaned classifier" and new_graph.metadata["a"] == 1
    assert new_graph.input_name == "serving_input:0"


def test_torchscript_is_written_as_torchscript(tmp_path):
    model, images = Bars(), bars().images
    opened = SimpleNamespace(
        source="torchscript", arch="onnx", module=model, layout="NCHW", outputs="logits"
    )
    file = CleanedFile(tmp_path / "m.pt", tmp_path / "c.pt", opened, model, images, {})
    file.write(model, {})
    assert torch.allclose(torch.jit.load(str(tmp_path / "c.pt"))(images), model(images), atol=1e-5)
    with pytest.raises(ValueError, match=r"expected --out \*\.pt"):
        CleanedFile(tmp_path / "m.pt", tmp_path / "c.onnx", opened, model, images, {})


def test_a_file_of_ours_keeps_what_it_says_of_itself(tmp_path):
    source, out = tmp_path / "v.safetensors", tmp_path / "c.safetensors"
    model = build_classifier("resnet10", num_classes=3, channels=1, image_size=16, width=8).eval()
    save_classifier(model, source, {"classes": ["a", "b", "c"]})
    opened = open_model(source)
    file = CleanedFile(source, out, opened, opened.module, torch.rand(4, 1, 16, 16), {})
    with torch.no_grad():
        opened.module.head.bias.add_(1)
    file.write(opened.module, {"cleaned": [1]})
    metadata = load_checkpoint(out).metadata
    assert metadata["classes"] == ["a", "b", "c"] and metadata["cleaned"] == [1]
    assert torch.equal(load_classifier(out).head.bias, opened.module.head.bias)


@pytest.mark.integration
def test_weights_go_back_under_the_names_of_their_file(tmp_path, monkeypatch):
    """A prefix, other tensors beside them, half precision and metadata are kept."""
    from safetensors import safe_open
    from safetensors.torch import load_file, save_file

    model, images = Bars(), bars().images
    source, out = tmp_path / "m.safetensors", tmp_path / "c.safetensors"
    tensors = {f"model.{name}": value.half() for name, value in model.state_dict().items()}
    save_file({**tensors, "loss.weight": torch.ones(3)}, source, metadata={"classes": "a,b"})
    whole = nn.Sequential(nn.Identity(), model)
    opened = SimpleNamespace(source="safetensors", arch="bars", module=whole)
    repaired = Bars()

    def reopen(path, **options):
        state = {k.removeprefix("model."): v.float() for k, v in load_file(path).items()}
        repaired.load_state_dict({k: v for k, v in state.items() if k != "loss.weight"})
        return SimpleNamespace(module=nn.Sequential(nn.Identity(), repaired))

    monkeypatch.setattr("wm_eval.audit.cleaned_file.open_model", reopen)
    file = CleanedFile(source, out, opened, whole, images, {})
    with torch.no_grad():
        model.head.bias.add_(0.5)
    file.write(whole, {})
    assert set(load_file(out)) == {*tensors, "loss.weight"}
    assert load_file(out)["model.head.bias"].dtype == torch.float16
    with safe_open(out, "pt") as again:
        assert again.metadata() == {"classes": "a,b"}
    monkeypatch.setattr(
        "wm_eval.audit.cleaned_file.open_model", lambda *_, **__: SimpleNamespace(module=Bars())
    )
    out.unlink()
    with torch.no_grad():
        model.head.weight.mul_(3)
    with pytest.raises(ValueError, match="differs by"):
        file.write(whole, {})
    assert not out.exists()
