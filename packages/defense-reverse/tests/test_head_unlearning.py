"""Head unlearning: one row changes, the shortcut to it is gone, clean images keep their labels."""

import copy

import pytest
import torch
from torch import Tensor, nn

from defense_reverse.linear_head import find_head, read_features
from defense_reverse.mitigations import HeadUnlearning
from wm_victim.logits import Logits, Squash

CLASSES = 5
LABELS = torch.arange(60) % CLASSES
# Label k lights up column k; the columns from CLASSES on are for triggers.
IMAGES = torch.rand(60, 1, 12, 12, generator=torch.Generator().manual_seed(0)) / 5
IMAGES[torch.arange(60), :, :, LABELS] += 0.5
NO_TRIGGER = {2: nn.Identity()}


class Columns(nn.Module):
    """Features are the columns' means; row 2 reads the columns of the trigger as well."""

    def __init__(self, form: str = "linear") -> None:
        super().__init__()
        rows = torch.cat([torch.eye(CLASSES), torch.zeros(CLASSES, 12 - CLASSES)], 1)
        rows[2, CLASSES:] = 1.0
        self.form = form
        self.head = nn.Linear(12, CLASSES)
        self.head.weight.data = 9 * rows
        self.head.bias.data = torch.linspace(-0.2, 0.2, CLASSES) - 6 * (torch.arange(5) == 2)
        self.conv = nn.Conv2d(12, CLASSES, 1)
        self.conv.weight.data = 9 * rows[:, :, None, None]
        self.conv.bias.data = self.head.bias.data.clone()

    def forward(self, images: Tensor) -> Tensor:
        """Images in [0, 1] to logits, or to probabilities."""
        features = images[:, 0].mean(1)
        if self.form == "convolution":
            logits: Tensor = self.conv(features[:, :, None, None]).flatten(1)
            return logits
        logits = self.head(features)
        return logits.softmax(1) if self.form == "probabilities" else logits


def model_of(form: str) -> nn.Module:
    model = Columns(form).eval()
    return Logits(model, Squash()).eval() if form == "probabilities" else model


def triggered(images: Tensor) -> Tensor:
    images = images.clone()
    images[..., CLASSES:] += 0.6
    return images.clamp(0, 1)


@pytest.mark.parametrize("form", ["linear", "convolution", "probabilities"])
def test_what_the_layer_reads_is_told_image_by_image(form: str) -> None:
    model = model_of(form)
    read = read_features(model, IMAGES, find_head(model, IMAGES[:8]))
    torch.testing.assert_close(read, IMAGES[:, 0].mean(1).double(), rtol=1e-3, atol=1e-4)


@pytest.mark.parametrize("form", ["linear", "convolution", "probabilities"])
def test_the_triggers_weights_go_and_clean_images_keep_their_labels(form: str) -> None:
    model = model_of(form)
    before = copy.deepcopy(model.state_dict())
    others = LABELS != 2
    assert bool((model(triggered(IMAGES)).argmax(1) == 2).all())
    repaired = HeadUnlearning().repair(model, IMAGES, LABELS, triggers=NO_TRIGGER)
    assert repaired.log == {"labels": [2]}
    answers = repaired.model(triggered(IMAGES)).argmax(1)
    assert float((answers[others] == 2).double().mean()) < 0.05
    assert bool((repaired.model(IMAGES).argmax(1) == LABELS).all())
    changed = {
        name
        for name, tensor in repaired.model.state_dict().items()
        if not torch.equal(tensor, before[name])
    }
    assert len(changed) == 1
    row, old = (state[changed.copy().pop()] for state in (repaired.model.state_dict(), before))
    kept = torch.arange(CLASSES) != 2
    torch.testing.assert_close(row[kept], old[kept])
    assert all(torch.equal(t, before[name]) for name, t in model.state_dict().items())


def test_nothing_suspected_changes_nothing_and_a_seed_gives_one_result() -> None:
    model = Columns().eval()
    same = HeadUnlearning().repair(model, IMAGES, LABELS, triggers={}).model
    assert torch.equal(same(IMAGES), model(IMAGES))
    first, again = (
        HeadUnlearning(most=40).repair(model, IMAGES, LABELS, triggers=NO_TRIGGER, seed=3).model
        for _ in range(2)
    )
    assert torch.equal(first(IMAGES), again(IMAGES))


def test_what_cannot_be_fitted_is_refused() -> None:
    repair = HeadUnlearning().repair
    with pytest.raises(ValueError, match="linear layer"):
        repair(Constant(), IMAGES, LABELS, triggers=NO_TRIGGER)
    for labels in (LABELS.where(LABELS != 2, 0), torch.full_like(LABELS, 2)):
        with pytest.raises(ValueError, match="images of label 2"):
            repair(Columns(), IMAGES, labels, triggers=NO_TRIGGER)


class Constant(Columns):
    """Its last layer is no weight of the model."""

    def forward(self, images: Tensor) -> Tensor:
        """Images in [0, 1] to logits."""
        return self.head.weight[0, 0] * images[:, 0].mean(1) @ torch.eye(12)[:, :CLASSES]
