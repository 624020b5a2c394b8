"""Which ONNX operators are imported, and why the others are refused."""

from __future__ import annotations

from collections.abc import Collection, Mapping

from wm_victim.loading.contract import LoadingError

# Plain arithmetic that onnx2pytorch knows by name. It guesses `torch.NAME` for any other, so that
# an untrusted file could call whatever torch has: only these reach it.
_SUPPORTED = """
    Abs Acos Acosh Add And ArgMax ArgMin Asin Asinh Atan Atanh Attention AveragePool
    BatchNormalization Cast CastLike Ceil Celu Clip Concat Constant ConstantOfShape Conv
    ConvTranspose Cos Cosh CumSum DepthToSpace Div Dropout Einsum Elu Equal Erf Exp Expand EyeLike
    Flatten Floor Gather GatherElements GatherND Gelu Gemm GlobalAveragePool GlobalLpPool
    GlobalMaxPool Greater GreaterOrEqual GroupNormalization HardSigmoid HardSwish Identity
    InstanceNormalization IsInf IsNaN LRN LayerNormalization LeakyRelu Less LessOrEqual Log
    LogSoftmax LpNormalization LpPool MatMul Max MaxPool Mean Min Mish Mod Mul Neg Not Or PRelu Pad
    Pow RMSNormalization Range Reciprocal ReduceL1 ReduceL2 ReduceLogSum ReduceLogSumExp ReduceMax
    ReduceMean ReduceMin ReduceProd ReduceSum ReduceSumSquare Relu Reshape Resize Round
    ScatterElements ScatterND Selu Shape Shrink Sigmoid Sign Sin Sinh Size Slice Softmax Softplus
    Softsign SpaceToDepth Split Sqrt Squeeze Sub Sum Swish Tan Tanh ThresholdedRelu Tile TopK
    Transpose Trilu Unsqueeze Upsample Where Xor
"""
SUPPORTED = frozenset(_SUPPORTED.split())
_CONTROL_FLOW = frozenset({"If", "Loop", "Scan", "SequenceMap"})
_QUANTISED = frozenset({"QLinearConv", "QLinearMatMul", "ConvInteger", "MatMulInteger"})
_QUANTISED |= {"QuantizeLinear", "DequantizeLinear", "DynamicQuantizeLinear"}
_RANDOM = frozenset({"RandomNormal", "RandomNormalLike", "RandomUniform", "RandomUniformLike"})
_RANDOM |= {"Bernoulli", "Multinomial"}
# Inputs that decide how much memory or how many steps, by position.
SIZE_INPUTS = {
    "Reshape": (1,),
    "Expand": (1,),
    "ConstantOfShape": (0,),
    "Range": (0, 1, 2),
    "Tile": (1,),
    "Resize": (1, 2, 3),
    "Upsample": (1,),
    "Pad": (1, 3),
    "Slice": (1, 2, 3, 4),
    "TopK": (1,),
    "Split": (1,),
    "Squeeze": (1,),
    "Unsqueeze": (1,),
}


def refuse_operators(
    ops: Mapping[tuple[str, str], int],
    nested: Mapping[str, int],
    functions: Collection[tuple[str, str]],
) -> None:
    """Raise ``LoadingError``, with a list, for operators that cannot be imported.

    Args:
        ops: How often each (domain, operator) stands in the file.
        nested: How often each operator holds a graph.
        functions: Those that the file defines itself.
    """
    foreign = sorted({f"{d}.{n}" for d, n in ops if d and (d, n) not in functions})
    if any(name.startswith("ai.onnx.ml.") for name in foreign):
        raise LoadingError(
            f"operators without gradients, of classical machine learning: {_list(foreign)}; a scan "
            "needs a differentiable network"
        )
    if foreign:
        raise LoadingError(f"operators that are not standard ONNX: {_list(foreign)}")
    plain = {name for domain, name in ops if domain == ""}
    for known, why in (
        (_CONTROL_FLOW, "control flow, whose branches no test can exhaust"),
        (_QUANTISED, "quantised operators, which have no gradients; export it in float32"),
        (_RANDOM, "random numbers"),
    ):
        if plain & known:
            raise LoadingError(f"{why}: {_list(sorted(plain & known))}")
    if nested:
        raise LoadingError(f"graphs inside the operators {_list(sorted(nested))}")
    unknown = sorted(plain - SUPPORTED)
    if unknown:
        raise LoadingError(f"unsupported operators: {_list(unknown)}")


def refuse_foreign(
    ops: Mapping[tuple[str, str], int], functions: Collection[tuple[str, str]]
) -> None:
    """Raise ``LoadingError`` for operators that ONNX itself does not define, or that are random.

    Args:
        ops: How often each (domain, operator) stands in the file.
        functions: Those that the file defines itself.
    """
    foreign = sorted(
        f"{d}.{n}" for d, n in ops if d not in ("", "ai.onnx.ml") and (d, n) not in functions
    )
    if foreign:
        raise LoadingError(f"operators that are not standard ONNX: {_list(foreign)}")
    if random := {name for domain, name in ops if domain == ""} & _RANDOM:
        raise LoadingError(f"random numbers: {_list(sorted(random))}")


def _list(names: Collection[str]) -> str:
    shown = [repr(name)[1:-1] for name in list(names)[:12]]
    return ", ".join(shown) + (f" and {len(names) - 12} more" if len(names) > 12 else "")
