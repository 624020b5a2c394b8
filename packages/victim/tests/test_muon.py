import pytest
import torch

from wm_victim import (
    ImageSet,
    TrainConfig,
    accuracy,
    build_classifier,
    load_dataset,
    train_classifier,
)
from wm_victim.muon import MOMENTUM, Muon, orthogonalize
from wm_victim.train_config import learning_rate
from wm_victim.training_run import TrainingRun


@pytest.mark.parametrize("shape", [(6, 20), (20, 6), (5, 5)])
def test_singular_vectors_stay_and_singular_values_follow_the_polynomial(
    shape: tuple[int, int],
) -> None:
    matrix = torch.randn(shape, dtype=torch.float64)
    left, values, right = torch.linalg.svd(matrix, full_matrices=False)
    values = values / values.norm()
    for _ in range(3):
        values = 3.4445 * values - 4.7750 * values**3 + 2.0315 * values**5
    expected = left @ values.diag() @ right
    torch.testing.assert_close(orthogonalize(matrix), expected, rtol=1e-5, atol=1e-5)


def test_two_steps_written_out() -> None:
    weight = torch.nn.Parameter(torch.randn(4, 3, 3, 3))
    muon, lr = Muon([{"params": [weight]}], lr=0.1), 0.1
    expected, momentum = weight.detach().clone(), torch.zeros_like(weight)
    for _ in range(2):
        weight.grad = torch.randn_like(weight)
        momentum = MOMENTUM * momentum + weight.grad
        slope = weight.grad + MOMENTUM * momentum
        expected = expected / expected.norm() * 2
        expected = expected - lr * orthogonalize(slope.view(4, 27)).view_as(weight)
        muon.step()
        torch.testing.assert_close(weight.detach(), expected)


def test_filters_move_by_muon_and_everything_else_by_sgd() -> None:
    data = load_dataset("digits", image_size=25).train.subset(torch.arange(200))
    model = build_classifier("airbench", num_classes=10, channels=1, image_size=25, width=8)
    config = TrainConfig.preset("airbench-muon", batch_size=50)
    sgd, muon = TrainingRun(model, data, config, None, torch.device("cpu")).optimizers
    (filters,), others = muon.param_groups, sgd.param_groups
    assert [w.ndim for w in filters["params"]] == [4] * 6
    count = sum(len(group["params"]) for group in (filters, *others))
    assert count == len(list(model.parameters()))
    assert filters["factor"] * config.lr == pytest.approx(config.muon_lr)


def test_the_linear_rate_ends_at_nought() -> None:
    config = TrainConfig(schedule="linear", lr=2.0)
    assert [learning_rate(config, step, 4) for step in range(4)] == [2.0, 1.5, 1.0, 0.5]


@pytest.mark.integration
def test_a_residual_net_learns_digits_with_it() -> None:
    data = load_dataset("digits", image_size=16)
    few = ImageSet(*(part[:600] for part in (data.train.images, data.train.labels, data.train.ids)))
    model = build_classifier("resnet10", num_classes=10, channels=1, image_size=16, width=8)
    config = TrainConfig(epochs=4, batch_size=50, lr=0.05, schedule="linear", optimizer="muon")
    train_classifier(model, few, config=config, progress=False)
    assert accuracy(model, data.test) > 0.8
