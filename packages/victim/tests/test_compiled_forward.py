"""The fused forward pass answers like the model, and leaves it as it was."""

import copy

import pytest
import torch
from torch import nn

from wm_victim import build_classifier
from wm_victim.forward_fusion import fold, fused_forward
from wm_victim.inference import frozen
from wm_victim.toy_backdoors import planted_classifier

CPU = torch.device("cpu")


def victim(name):
    """A classifier whose normalisations have something to say."""
    model = build_classifier(name, num_classes=5, channels=3, image_size=32, width=8, seed=1)
    generator = torch.Generator().manual_seed(0)
    for layer in model.modules():
        if isinstance(layer, nn.BatchNorm2d):
            layer.running_mean.normal_(0, 0.3, generator=generator)
            layer.running_var.uniform_(0.5, 2, generator=generator)
            nn.init.uniform_(layer.weight, 0.5, 1.5, generator=generator)
            nn.init.normal_(layer.bias, 0, 0.3, generator=generator)
    return model.eval()


def norms(model):
    return sum(isinstance(layer, nn.BatchNorm2d) for layer in model.modules())


def answers(passes, images):
    """Logits, and the gradient of one of them with respect to the images."""
    images = images.clone().requires_grad_()
    logits = passes(images)
    (grad,) = torch.autograd.grad(logits[:, 1].sum(), images)
    return logits.detach(), grad


@pytest.fixture
def images():
    return torch.rand(6, 3, 32, 32, generator=torch.Generator().manual_seed(0))


@pytest.mark.parametrize("name", ["resnet10", "preactresnet18"])
def test_folded_it_is_the_same_function(images, name):
    model = victim(name)
    with frozen(model):
        folded = fold(model)
        assert norms_called(folded) < norms(model)
        for got, wanted in zip(answers(folded, images), answers(model, images), strict=True):
            torch.testing.assert_close(got, wanted, rtol=1e-3, atol=1e-4)


def norms_called(traced):
    """How many normalisations the traced graph still runs."""
    layers = dict(traced.named_modules())
    called = (layers[n.target] for n in traced.graph.nodes if n.op == "call_module")
    return sum(isinstance(layer, nn.BatchNorm2d) for layer in called)


class Shared(nn.Module):
    """A convolution that is used twice, with a normalisation after one of the two."""

    def __init__(self):
        super().__init__()
        self.conv, self.norm = nn.Conv2d(3, 3, 3, padding=1), nn.BatchNorm2d(3)
        self.norm.running_mean.fill_(0.5)

    def forward(self, images):
        once = self.norm(self.conv(images))
        return (once + self.conv(images)).mean(dim=(2, 3))


class Branching(nn.Module):
    """What it does depends on the images: it cannot be traced."""

    def forward(self, images):
        means = images.mean(dim=(2, 3))
        return means if means.sum() > 0 else -means


@pytest.mark.parametrize("kind", [Shared, Branching])
def test_what_cannot_be_folded_is_copied(images, kind):
    with frozen(kind()) as model:
        folded = fold(model)
        assert folded is not model
        torch.testing.assert_close(folded(images), model(images))


def test_bfloat16_is_near_and_the_model_is_untouched(images):
    model = victim("resnet10")
    before = copy.deepcopy(model.state_dict())
    with frozen(model):
        exact = answers(fused_forward(model, "float32", CPU), images)
        fast = answers(fused_forward(model, "bfloat16", CPU), images)
    assert fast[0].dtype == fast[1].dtype == torch.float32
    torch.testing.assert_close(fast[0], exact[0], rtol=0.1, atol=0.1)
    cosine = torch.cosine_similarity(fast[1].flatten(1), exact[1].flatten(1))
    assert cosine.min() > 0.9
    for name, value in model.state_dict().items():
        assert torch.equal(value, before[name]) and value.is_contiguous()


def test_float32_is_the_model_itself():
    model = planted_classifier("patch")
    assert fused_forward(model, "float32", CPU) is model


def test_models_with_tensors_of_five_axes_pass():
    """Exporters leave such constants in graphs: the positions of an uneven pooling, for one."""
    model = victim("resnet10")
    model.register_buffer("positions", torch.zeros(2, 4, 2, 4, 2, dtype=torch.int64))
    images = torch.rand(4, 3, 32, 32, generator=torch.Generator().manual_seed(0))
    fast, _ = answers(fused_forward(model, "bfloat16", CPU), images)
    torch.testing.assert_close(fast, model(images).detach(), rtol=0.1, atol=0.1)
