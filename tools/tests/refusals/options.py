"""Options of the six commands and values that they refuse, before any work and any import of torch.

Numbers below their range and NaN, and outputs that cannot be written, are tried for every option in
`tools/tests/test_command_lines.py`; here are values that only one option knows to be wrong.
"""

from __future__ import annotations

_SCAN = ("wm-eval", "scan", "m.onnx", "--images", "x")
_CLEAN = ("wm-eval", "clean", "m.onnx", "--images", "x", "--out", "y.onnx")
_NC = ("defense-nc", "scan", "v.safetensors", "--data", "x")
_REVERSE = ("defense-reverse", "scan", "v.safetensors", "--data", "x")
_TRAIN = ("wm-victim", "train", "--data", "x", "--out", "y")
_MARK = ("wm-extract", "train", "x", "--out", "y")
_POISON = ("wm-inject", "poison", "--trigger", "badnets", "x", "y")

# A command that is right but for the last option and its value.
REFUSED: tuple[tuple[tuple[str, ...], str, str], ...] = (
    (_SCAN, "--preset", "slow"),
    (_SCAN, "--preset", "ports"),  # one of Neural Cleanse's alone
    (_SCAN, "--detectors", "nc,nc"),
    (_SCAN, "--detectors", "strip"),
    (_SCAN, "--detectors", ","),
    (_SCAN, "--alpha", "5"),
    (_SCAN, "--alpha", "0"),
    (_SCAN, "--minutes", "inf"),
    (_SCAN, "--minutes", "0"),
    (_SCAN, "--count", "19"),
    (_SCAN, "--classes", "1"),
    (_SCAN, "--image-size", "7"),
    (_SCAN, "--image-size", "5000"),
    (_SCAN, "--channels", "2"),
    (_SCAN, "--mean", "0.5"),
    (_SCAN, "--std", "0.5,x,1"),
    ((*_SCAN, "--mean", "0.5"), "--std", "0"),
    ((*_SCAN, "--mean", "0.5"), "--std", "1,1,1"),
    ((*_SCAN, "--std", "1,1"), "--mean", "0,0"),
    (_SCAN, "--device", "tpu"),
    (_SCAN, "--seed", "4294967296"),
    (_CLEAN, "--rounds", "0"),
    (_CLEAN, "--max-loss", "0"),
    (_CLEAN, "--max-loss", "1.5"),
    (_CLEAN, "--label", "x"),
    (("wm-eval", "inspect", "x", "--extractor", "y"), "--batch-size", "0"),
    (("wm-eval", "run", "demo"), "--workers", "0"),
    (("wm-eval", "run", "demo"), "--set", "seeds"),
    (("wm-eval", "tables", "x"), "--formats", "md,doc"),
    (_NC, "--preset", "slow"),
    (_NC, "--alpha", "1"),
    (_NC, "--max-ratio", "2"),
    (_NC, "--filter-rate", "1"),
    (_NC, "--images", "0"),
    (_REVERSE, "--preset", "ports"),
    (_REVERSE, "--alpha", "0"),
    (_TRAIN, "--model", "resnet99"),
    (_TRAIN, "--width", "7"),
    (_TRAIN, "--ratio", "1.5"),
    (_TRAIN, "--limit", "0"),
    (_TRAIN, "--epochs", "0"),
    (_TRAIN, "--lr", "inf"),
    (("wm-victim", "test", "v", "--data", "x"), "--image-size", "2000"),
    (_MARK, "--image-size", "2000"),
    (_MARK, "--false-positive-rate", "1"),
    (_MARK, "--size", "huge"),
    (_POISON, "--ratio", "0"),
    (_POISON, "--alpha", "2"),
    (_POISON, "--channels", "2"),
    (("wm-inject", "export", "t.safetensors", "t.onnx"), "--batch", "2"),
    (("wm-inject", "export", "t.safetensors", "t.onnx"), "--tolerance", "0"),
    (("wm-inject", "serve", "--model", "a=b"), "--port", "70000"),
)
