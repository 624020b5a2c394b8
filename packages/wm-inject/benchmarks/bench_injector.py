"""The injector on every back end, as a share of the rate of matrix products in the same run.

The group "peers" has a plain vision transformer of timm of the same width and depth in eager mode.
The int8 graphs are held against float32 products, and may well pass 1.
"""

from __future__ import annotations

import functools
import warnings
from collections.abc import Callable
from pathlib import Path
from types import ModuleType

import pytest
import torch
from pytest_benchmark.fixture import BenchmarkFixture
from timm.models.vision_transformer import VisionTransformer
from torch import Tensor, nn

from wm_inject import WatermarkTrigger
from wm_inject.export import to_onnx, to_torchscript
from wm_inject.runtime import OnnxModel
from wm_inject.watermark.fast import fast_trigger
from wm_inject.watermark.vit import ViTInjector, vit_config

pytestmark = pytest.mark.bench
SIZES = ("tiny", "small", "base")
BACKENDS = ("eager", "fast-float32", "fast-bfloat16", "torchscript", "onnx-float32", "onnx-int8")
TOKENS = 64  # of 32 x 32 pixels


@functools.cache
def trigger(size: str) -> WatermarkTrigger:
    with torch.random.fork_rng():
        torch.manual_seed(0)
        injector = ViTInjector(**vit_config(size, image_size=32, channels=3))
        torch.nn.init.normal_(injector.head.weight, std=0.002)  # zero before training
    return WatermarkTrigger(injector).requires_grad_(False)


def images(count: int) -> Tensor:
    return torch.rand(count, 3, 32, 32, generator=torch.Generator().manual_seed(0))


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("exported")


def exported(size: str, folder: Path, precision: str = "float32") -> Path:
    path = folder / f"{size}-{precision}.onnx"
    if not path.exists():
        to_onnx(trigger(size), images(3), path, precision=precision)
    return path


def call(backend: str, size: str, batch: Tensor, folder: Path) -> Callable[[], object]:
    """A call of one back end on a batch."""
    if backend.startswith("onnx"):
        model = OnnxModel(exported(size, folder, backend.removeprefix("onnx-")))
        array = batch.numpy()
        return lambda: model(array)
    module: nn.Module = trigger(size)
    if backend == "fast-float32":
        module = fast_trigger(trigger(size), precision="float32")
    elif backend == "fast-bfloat16":
        module = fast_trigger(trigger(size), precision="bfloat16")
    elif backend == "torchscript":
        path = folder / f"{size}.pt"
        if not path.exists():
            to_torchscript(trigger(size), images(3), path)
        module = torch.jit.load(str(path))
    return lambda: module(batch)


@pytest.mark.benchmark(group="injector")
@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("batch", [1, 32])
@pytest.mark.parametrize("size", SIZES)
def test_injector(
    benchmark: BenchmarkFixture,
    size: str,
    batch: int,
    backend: str,
    folder: Path,
    speed: ModuleType,
) -> None:
    with torch.no_grad():
        speed.measure(
            benchmark,
            call(backend, size, images(batch), folder),
            flops=speed.count_flops(trigger(size), images(batch)),
            images=batch,
            dtype=torch.bfloat16 if backend == "fast-bfloat16" else torch.float32,
            shapes=speed.block_shapes(batch * TOKENS, trigger(size).injector.width),
        )


@pytest.mark.benchmark(group="injector")
@pytest.mark.parametrize("part", [4, 8, 16])
def test_onnx_runtime_in_parts(
    benchmark: BenchmarkFixture, part: int, folder: Path, speed: ModuleType
) -> None:
    """The base injector on 32 images, a few at a time, so that what it computes stays in caches."""
    model = OnnxModel(exported("base", folder))
    parts = [one.numpy() for one in images(32).split(part)]
    speed.measure(
        benchmark,
        lambda: [model(one) for one in parts],
        flops=speed.count_flops(trigger("base"), images(32)),
        images=32,
        shapes=speed.block_shapes(32 * TOKENS, trigger("base").injector.width),
    )


@pytest.mark.benchmark(group="peers")
@pytest.mark.parametrize("precision", ["float32", "bfloat16"])
@pytest.mark.parametrize("size", SIZES)
def test_timm_vit(
    benchmark: BenchmarkFixture, size: str, precision: str, speed: ModuleType
) -> None:
    """timm's own transformer with as many blocks of the same width, in eager mode."""
    injector, dtype = trigger(size).injector, getattr(torch, precision)
    peer = VisionTransformer(
        img_size=32,
        patch_size=injector.patch_size,
        embed_dim=injector.width,
        num_heads=injector.heads,
        depth=len(injector.encoder) + len(injector.decoder),
        class_token=False,
        global_pool="",
        num_classes=0,
    )
    peer = peer.eval().requires_grad_(False).to(dtype)
    batch = images(32).to(dtype)
    with torch.no_grad():
        speed.measure(
            benchmark,
            lambda: peer(batch),
            flops=speed.count_flops(peer, batch),
            images=32,
            dtype=dtype,
            shapes=speed.block_shapes(32 * TOKENS, injector.width),
        )


@pytest.mark.benchmark(group="export")
@pytest.mark.parametrize("exporter", [to_onnx, to_torchscript], ids=["onnx", "torchscript"])
def test_export(benchmark: BenchmarkFixture, exporter: Callable[..., object], folder: Path) -> None:
    """The small injector to a file, reloading and comparison included."""
    path = folder / f"export-{exporter.__name__}"
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        benchmark.pedantic(exporter, args=(trigger("small"), images(3), path), rounds=1)
