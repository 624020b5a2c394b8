"""What follows the logits in a graph is taken off where it keeps their order, and only there."""

from __future__ import annotations

import warnings
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnxruntime
import pytest
import torch
from onnx import TensorProto, helper, numpy_helper
from torch import Tensor, nn

from defense_nc import Verdict
from wm_eval.audit.checks import NotScanned, check_model
from wm_eval.audit.images import CleanImages
from wm_eval.audit.scan import audit
from wm_inject.core.plan import PoisonPlan
from wm_inject.core.resume import fingerprint
from wm_victim import (
    ImageSet,
    TrainConfig,
    accuracy,
    attack_success,
    build_classifier,
    load_dataset,
    train_classifier,
)
from wm_victim.loading import LoadingError, OpenedModel, open_model
from wm_victim.loading.import_onnx import convert_onnx

K, OPSET, TARGET = 10, 17, 3


def number(name: str, value: float) -> str:
    return f"{name} = Constant <value = float {{{value}}}> ()\n"


def vector(name: str, values: list[float]) -> str:
    numbers = ", ".join(map(str, values))
    return f"{name} = Constant <value = float[1, {len(values)}] {{{numbers}}}> ()\n"


def axes(name: str, *values: int) -> str:
    numbers = ", ".join(map(str, values))
    return f"{name} = Constant <value = int64[{len(values)}] {{{numbers}}}> ()\n"


COLUMN = f"ones = Constant <value = float[{K}, 1] {{{', '.join(['1.0'] * K)}}}> ()\n"
# In ONNX's own notation, from "logits" to "out".
SQUASHED = {
    "a thousandth": number("c", 1e-3) + "out = Mul (logits, c)",
    "a thousand times": number("c", 1e3) + "out = Mul (logits, c)",
    "softmax": "out = Softmax <axis = 1> (logits)",
    "log-softmax": "out = LogSoftmax <axis = 1> (logits)",
    "softmax, log": "p = Softmax (logits) out = Log (p)",
    "sigmoid": "out = Sigmoid (logits)",
    "tanh": "out = Tanh (logits)",
    "softsign": "out = Softsign (logits)",
    "softplus": "out = Softplus (logits)",
    "erf": "out = Erf (logits)",
    "hard sigmoid": "out = HardSigmoid <alpha = 0.05> (logits)",
    "clipped": number("a", -4) + number("b", 4) + "out = Clip (logits, a, b)",
    "softmax by hand": axes("one", 1)
    + """m = ReduceMax <axes = [1]> (logits) d = Sub (logits, m) e = Exp (d)
    s = ReduceSum (e, one) out = Div (e, s)""",
    "softmax by a matrix": COLUMN + "e = Exp (logits) s = MatMul (e, ones) out = Div (e, s)",
    "sigmoid by hand": number("c", 1)
    + "n = Neg (logits) e = Exp (n) s = Add (c, e) out = Div (c, s)",
    "log-softmax by hand": """l = ReduceLogSumExp <axes = [1]> (logits)
    out = Sub (logits, l)""",
    "per cent, rounded": number("c", 100) + "p = Softmax (logits) q = Mul (p, c) out = Round (q)",
    "a chain": number("a", 4)
    + number("b", 5)
    + "d = Div (logits, a) t = Tanh (d) m = Mul (t, b) p = Softmax (m) out = Log (p)",
    "sigmoid in half": "h = Cast <to = 10> (logits) s = Sigmoid (h) out = Cast <to = 1> (s)",
    "softmax in half": "h = Cast <to = 10> (logits) s = Softmax (h) out = Cast <to = 1> (s)",
    "8 bits": number("c", 255)
    + "s = Sigmoid (logits) m = Mul (s, c) u = Cast <to = 2> (m) out = Cast <to = 1> (u)",
    "length one": "out = LpNormalization <axis = 1, p = 2> (logits)",
    "cubed": number("c", 3) + "out = Pow (logits, c)",
    "sigmoid twice": "a = Sigmoid (logits) out = Sigmoid (a)",
    "with four axes": axes("two", 2, 3)
    + "u = Unsqueeze (logits, two) s = Sigmoid (u) out = Squeeze (s, two)",
    "in its own shape": "n = Shape (logits) s = Sigmoid (logits) out = Reshape (s, n)",
    "between least and most": """m = ReduceMax <axes = [1]> (logits)
    l = ReduceMin <axes = [1]> (logits) d = Sub (logits, l) w = Sub (m, l) out = Div (d, w)""",
    "negated twice": "a = Neg (logits) b = Sigmoid (a) out = Neg (b)",
}
UNEQUAL = [1.0] * (K - 1) + [2.0]
KEPT = {
    "negated": "out = Neg (logits)",
    "sizes": "out = Abs (logits)",
    "a wave": "out = Sin (logits)",
    "a weight a class": vector("c", UNEQUAL) + "out = Mul (logits, c)",
    "a bias a class": vector("c", UNEQUAL) + "out = Add (logits, c)",
    "another order": axes("i", *range(K - 1, -1, -1)) + "out = Gather <axis = 1> (logits, i)",
    "turned when high": number("c", 4)
    + """m = ReduceMax <axes = [1]> (logits) g = Greater (m, c) n = Neg (logits)
    out = Where (g, n, logits)""",
    "one class when high": vector("v", UNEQUAL)
    + number("c", 1e6)
    + """m = ReduceMax <axes = [1]> (logits) g = Greater (m, c) a = Add (logits, v)
    out = Where (g, a, logits)""",
    "turned when very high": number("c", 1e5)
    + number("u", -1)
    + number("w", 0)
    + number("x", 4)
    + number("y", 2)
    + """m = ReduceMax <axes = [1]> (logits) d = Sub (m, c) r = Clip (d, w, x) s = Mul (r, u)
    f = Add (s, y) out = Mul (f, logits)""",
    "halves apart": axes("n", -1, 2, K // 2)
    + axes("k", -1, K)
    + """r = Reshape (logits, n) m = ReduceMax <axes = [2]> (r) d = Sub (r, m)
    out = Reshape (d, k)""",
}


LITTLE = vector("v", [k * 1e-6 for k in range(K)])
# Squashed, and no order is kept to the last digit: it cannot be taken off.
HELD = {
    "sigmoid, a little a class": LITTLE + "s = Sigmoid (logits) out = Add (s, v)",
    "softmax, a little a class": LITTLE + "s = Softmax (logits) out = Add (s, v)",
    "tanh, a little a class": LITTLE + "s = Tanh (logits) out = Add (s, v)",
}


def with_end(path: Path, end: str, out: Path) -> Path:
    """A graph whose output is called "logits", with something behind it."""
    model = onnx.load(str(path))
    text = f"end (float[N, {K}] logits) => (float[N, {K}] out) {{ {end} }}"
    model.graph.node.extend(onnx.parser.parse_graph(text).node)
    model.graph.output[0].CopyFrom(
        helper.make_tensor_value_info("out", TensorProto.FLOAT, ["N", K])
    )
    onnx.save(model, str(out))
    return out


@pytest.fixture
def here(monkeypatch: pytest.MonkeyPatch) -> None:
    """Convert in this process: these graphs are ours, and a child costs seconds."""

    def local(job: str, file: Path, *rest: Any) -> dict[str, Any]:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            try:
                return convert_onnx(file, file.parent.parent / "out", rest[-1])
            except ValueError as error:
                raise LoadingError(str(error)) from error

    monkeypatch.setattr("wm_victim.loading.graphs.run_child", local)


@pytest.fixture
def linear(tmp_path: Path) -> tuple[Path, Tensor]:
    """A linear classifier of images (N, 1, 8, 8) as a graph, and its weights (64, K)."""
    weights = np.random.default_rng(0).standard_normal((64, K)).astype(np.float32)
    nodes = [
        helper.make_node("Flatten", ["image"], ["flat"]),
        helper.make_node("MatMul", ["flat", "weights"], ["logits"]),
    ]
    graph = helper.make_graph(
        nodes,
        "linear",
        [helper.make_tensor_value_info("image", TensorProto.FLOAT, ["N", 1, 8, 8])],
        [helper.make_tensor_value_info("logits", TensorProto.FLOAT, ["N", K])],
        [numpy_helper.from_array(weights, "weights")],
    )
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", OPSET)])
    model.ir_version = 8
    onnx.save(model, str(tmp_path / "linear.onnx"))
    return tmp_path / "linear.onnx", torch.from_numpy(weights)


@pytest.mark.usefixtures("here")
def test_logits_are_read_before_what_keeps_their_order(linear, tmp_path, subtests):
    path, weights = linear
    images = torch.rand(20, 1, 8, 8)
    for name, end in SQUASHED.items():
        with subtests.test(end=name):
            opened = open_model(with_end(path, end, tmp_path / "a.onnx"))
            torch.testing.assert_close(opened.module(images), images.flatten(1) @ weights)
            assert any("logits read before" in note for note in opened.notes)
            assert (opened.outputs == "probabilities") == name.startswith("softmax") & (
                "log" not in name
            )


@pytest.mark.usefixtures("here")
def test_what_changes_their_order_is_part_of_the_classifier(linear, tmp_path, subtests):
    path, _ = linear
    images = torch.rand(20, 1, 8, 8)
    for name, end in KEPT.items():
        with subtests.test(end=name):
            file = with_end(path, end, tmp_path / "a.onnx")
            session = onnxruntime.InferenceSession(str(file))
            (expected,) = session.run(None, {"image": images.numpy()})
            opened = open_model(file)
            torch.testing.assert_close(opened.module(images), torch.from_numpy(expected))
            assert not any("logits read before" in note for note in opened.notes)


@pytest.mark.usefixtures("here")
def test_the_end_begins_behind_the_last_change_of_order(linear, tmp_path, subtests):
    path, weights = linear
    images = torch.rand(20, 1, 8, 8)
    for end, order in [
        ("n = Neg (logits) out = Softmax (n)", lambda y: -y),
        (
            vector("c", UNEQUAL) + "a = Add (logits, c) out = Sigmoid (a)",
            lambda y: y + torch.tensor(UNEQUAL),
        ),
    ]:
        with subtests.test(end=end):
            opened = open_model(with_end(path, end, tmp_path / "a.onnx"))
            logits = order(images.flatten(1) @ weights)
            torch.testing.assert_close(opened.module(images), logits)


# --- the study ------------------------------------------------------------------------------------


class Squared(nn.Module):
    """A white square of 4 pixels in the corner."""

    def forward(self, images: Tensor, **_: object) -> Tensor:
        marked = images.clone()
        marked[..., -4:, -4:] = 1
        return marked


def colour_digits() -> tuple[ImageSet, ImageSet]:
    """Digits of 32 pixels in colour: 1200 to train with, 597 others."""
    data = load_dataset("digits", image_size=32)
    train, test = (
        ImageSet(part.images.repeat(1, 3, 1, 1), part.labels, part.ids)
        for part in (data.train, data.test)
    )
    return train, test


def residual(backdoored: bool, path: Path) -> Path:
    """A small residual network, clean or with the square, as a graph whose output is "logits"."""
    train, test = colour_digits()
    model = build_classifier("resnet10", num_classes=K, channels=3, image_size=32, width=16)
    attack = {"plan": PoisonPlan(0.1, TARGET), "trigger": Squared()} if backdoored else {}
    config = TrainConfig(epochs=12, batch_size=64, lr=0.05, precision="float32")
    train_classifier(model, train, config=config, progress=False, **attack)
    assert accuracy(model, test) > 0.97
    assert not backdoored or attack_success(model, test, Squared(), target=TARGET) > 0.95
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        torch.onnx.export(
            model.eval(),
            (test.images[:2],),
            str(path),
            dynamo=False,
            opset_version=OPSET,
            input_names=["image"],
            output_names=["logits"],
            dynamic_axes={"image": {0: "N"}, "logits": {0: "N"}},
        )
    return path


class Scans:
    """Scans of opened models; models that compute the same to the bit are scanned once."""

    def __init__(self) -> None:
        _, test = colour_digits()
        files = tuple(f"{n}.png" for n in range(400))
        self.clean = CleanImages(test.images[:400], test.labels[:400], files, ())
        self.known: dict[Any, tuple[Verdict, tuple[int, ...]]] = {}

    def verdict(self, path: Path, seed: int) -> tuple[Verdict, tuple[int, ...]]:
        try:
            opened = open_model(path)
        except LoadingError:
            return Verdict.NOT_SCANNED, ()
        key = (seed, self.print_of(opened))
        if key not in self.known:
            try:
                checked = check_model(opened.module, self.clean, num_classes=K)
            except NotScanned:
                return Verdict.NOT_SCANNED, ()
            result = audit(
                checked, self.clean, detectors=("nc", "reverse"), seed=seed, progress=False
            )
            self.known[key] = result.verdict, result.suspected
        return self.known[key]

    def print_of(self, opened: OpenedModel) -> str:
        """Logits and gradients of the images, to the bit."""
        pixels = self.clean.images[:64].clone().requires_grad_()
        logits = opened.module(pixels)
        (gradient,) = torch.autograd.grad((logits * torch.linspace(-1, 1, K)).sum(), pixels)
        return fingerprint(logits.detach(), gradient)


@pytest.mark.slow
def test_no_end_hides_a_backdoor(tmp_path, subtests, record_property):
    """Every end behind a backdoored residual network and its clean twin: half an hour."""
    torch.set_num_threads(1)
    scans = Scans()
    for kind in ("backdoored", "clean"):
        plain = residual(kind == "backdoored", tmp_path / f"{kind}.onnx")
        ends = {"logits": ""} | SQUASHED | HELD
        for name, end in ends.items():
            path = with_end(plain, end, tmp_path / "a.onnx") if end else plain
            for seed in (0, 1):
                with subtests.test(kind=kind, end=name, seed=seed):
                    verdict, suspected = scans.verdict(path, seed)
                    record_property(f"{kind}, {name}, seed {seed}", f"{verdict} {suspected}")
                    if kind == "clean":
                        assert verdict is not Verdict.BACKDOORED
                    elif name in HELD:  # unsure is honest where the outputs cannot be undone
                        assert verdict is not Verdict.CLEAN and suspected in ((), (TARGET,))
                    else:
                        right = {(Verdict.BACKDOORED, (TARGET,)), (Verdict.NOT_SCANNED, ())}
                        assert (verdict, suspected) in right
