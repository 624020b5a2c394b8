"""No clean model is refused: the list in clean_models.txt, built here with random weights."""

import warnings
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file
from torch import nn

from wm_victim.loading import LoadingError, open_model

_LINES = (Path(__file__).with_name("clean_models.txt")).read_text(encoding="utf-8").splitlines()
CLEAN = [tuple(line.split()) for line in _LINES if not line.startswith("#")]
# A few for every run: smaller ones, of timm's test models,
# stand in for the list.
QUICK = [("safetensors", "timm", "test_vit"), ("onnx-legacy", "timm", "test_resnet")]


def build(library: str, name: str) -> tuple[nn.Module, int]:
    """A model of ten classes with random weights, none of them all zero, and its image size."""
    import timm
    import torchvision

    torch.manual_seed(0)
    if library == "timm":
        module = timm.create_model(name, pretrained=False, num_classes=10)
        size = timm.get_pretrained_cfg(name).input_size[-1]
    else:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # on how some initialise their weights
            module = torchvision.models.get_model(name, weights=None, num_classes=10)
        size = {"inception_v3": 299}.get(name, 224)
    with torch.no_grad():
        for tensor in module.parameters():
            if not tensor.any():  # heads that begin at zero give the same answer for any image
                tensor.normal_(0, 0.02)
    return module.eval(), size


def write(form: str, module: nn.Module, size: int, path: Path) -> None:
    if form == "safetensors":
        save_file({name: value.clone() for name, value in module.state_dict().items()}, path)
        return
    images = torch.rand(2, 3, size, size)
    with warnings.catch_warnings(), torch.no_grad():
        warnings.simplefilter("ignore")
        if form == "onnx-legacy":
            axes = {"image": {0: "batch"}}
            torch.onnx.export(
                module, (images,), path, dynamo=False, input_names=["image"], dynamic_axes=axes
            )
        else:
            batch = torch.export.Dim("batch")
            torch.onnx.export(
                module,
                (images,),
                path,
                dynamo=True,
                dynamic_shapes=({0: batch},),
                external_data=False,
                verbose=False,
            )


def check(case: tuple[str, ...], tmp_path: Path) -> None:
    form, library, name = case
    module, size = build(library, name)
    path = tmp_path / "model"
    try:
        write(form, module, size, path)
    except Exception as error:  # whatever the exporter says: this model has no file to open
        pytest.skip(f"the exporter cannot write it: {str(error).splitlines()[:1]}")
    arch = f"{library}:{name}" if form == "safetensors" else None
    try:
        opened = open_model(path, arch=arch, mean=(0, 0, 0), std=(1, 1, 1))
    except LoadingError as error:
        if "unsupported operators" in str(error):
            pytest.skip(f"counted apart: {error}")
        raise
    assert (opened.num_classes, opened.channels, opened.image_size) == (10, 3, size)
    assert (opened.layout, opened.outputs) == ("NCHW", "logits")
    images = torch.rand(2, 3, size, size)
    with torch.no_grad():
        want, got = module(images), opened.module(images)
    assert float((want - got).abs().max()) <= 2e-3 * float(want.abs().max())


@pytest.mark.integration
@pytest.mark.parametrize("case", QUICK, ids=" ".join)
def test_a_clean_model_opens(case: tuple[str, ...], tmp_path: Path) -> None:
    check(case, tmp_path)


@pytest.mark.slow
@pytest.mark.parametrize("case", CLEAN, ids=" ".join)
def test_no_clean_model_of_the_list_is_refused(case: tuple[str, ...], tmp_path: Path) -> None:
    check(case, tmp_path)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("library", "name", "size"),
    [("torchvision", "densenet121", 384), ("timm", "vit_tiny_patch16_224", 512)],
)
def test_a_model_of_large_images_is_opened_one_by_one(
    library: str, name: str, size: int, tmp_path: Path
) -> None:
    import timm

    module, _ = build(library, name)
    if library == "timm":
        module = timm.create_model(name, num_classes=10, img_size=size).eval()
    write("onnx-legacy", module, size, tmp_path / "model")
    opened = open_model(tmp_path / "model")
    assert (opened.num_classes, opened.image_size) == (10, size)
    assert any("one image at a time" in note for note in opened.notes)


def test_the_list_has_forty_models_of_both_libraries_and_forms() -> None:
    assert len(CLEAN) >= 40
    assert len(set(CLEAN)) == len(CLEAN)
    assert {case[1] for case in CLEAN} == {"torchvision", "timm"}
    assert {case[0] for case in CLEAN} == {"safetensors", "onnx-legacy", "onnx-dynamo"}
