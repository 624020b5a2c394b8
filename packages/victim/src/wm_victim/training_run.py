"""One training run: batches, augmentation, SGD steps; all randomness from seed and epoch."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import nullcontext
from typing import Any, NamedTuple, Protocol

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from wm_inject.core.plan import CoTraining
from wm_inject.core.precision import onednn_bfloat16, resolve_precision
from wm_inject.core.randomness import derive_seed, seeded
from wm_inject.core.resume import like_parameters
from wm_victim.airbench import WHITEN_EPOCHS, AirbenchBody
from wm_victim.augment import augment
from wm_victim.datasets import ImageSet
from wm_victim.image_store import ImageStore
from wm_victim.models import Classifier
from wm_victim.muon import Muon
from wm_victim.resnet import ResNetBody
from wm_victim.train_config import TrainConfig, learning_rate
from wm_victim.weight_gradients import SideBySideGradients, amx

Forward = Callable[[Tensor], Tensor]
_CHECK_EVERY = 50  # steps between two checks of the loss; each check waits for the device


class Corrupt(Protocol):
    """Changes a training batch: images ``(N, C, H, W)`` to the same shape."""

    def __call__(self, images: Tensor, *, generator: torch.Generator) -> Tensor:
        """Change the batch; ``generator`` is a CPU generator."""


class Epoch(NamedTuple):
    """Means over one pass."""

    loss: float
    accuracy: float


class TrainingRun:
    """Everything that changes from step to step. ``limit`` is that of `ImageStore`."""

    def __init__(
        self,
        model: nn.Module,
        data: ImageSet,
        config: TrainConfig,
        hook: CoTraining | None,
        device: torch.device,
        corrupt: Corrupt | None = None,
        limit: int | None = None,
    ) -> None:
        smaller = min(data.images.shape[2:])
        if config.cutout > smaller:
            raise ValueError(f"expected a cutout of at most {smaller} pixels, got {config.cutout}")
        self.model, self.config = model, config
        self.hook, self.device, self.corrupt = hook, device, corrupt
        self.precision = resolve_precision(config.precision, device)
        # First, because it may change the layout of the weights, which momenta follow.
        self.forward = training_forward(model, config, device)
        self.data = ImageStore(data, device, limit=limit)
        self.steps = config.steps_per_epoch(len(data))
        self.optimizers = _optimizers(model, config, self.precision)
        self.average = Average(model) if config.average else None
        draw = torch.Generator().manual_seed(derive_seed("mirror", config.seed))
        self.mirrored = torch.rand(len(data), generator=draw) < 0.5  # in even epochs

    def state_dict(self) -> dict[str, Any]:
        """Everything that a checkpoint must hold."""
        return {
            "model": self.model.state_dict(),
            "optimizers": [optimizer.state_dict() for optimizer in self.optimizers],
            "hook": {} if self.hook is None else self.hook.state_dict(),
            "average": {} if self.average is None else self.average.state,
        }

    def prepare(self) -> None:
        """Set what is computed from the training data; a run that goes on has it already."""
        if isinstance(self.model, Classifier) and isinstance(self.model.body, AirbenchBody):
            images, _ = self.data.take(torch.arange(min(5000, len(self.data))))
            self.model.body.fit_whitening(self.model.normalize(images))
            if self.average is not None:
                self.average = Average(self.model)

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Restore what `state_dict` returned."""
        self.model.load_state_dict(state["model"])
        for optimizer, saved in zip(self.optimizers, state["optimizers"], strict=True):
            optimizer.load_state_dict(saved)
            like_parameters(optimizer)
        if self.hook is not None:
            self.hook.load_state_dict(state["hook"])
        if self.average is not None:
            self.average.state = state["average"]

    def epoch(self, number: int, advance: Callable[[int], None]) -> Epoch:
        """One pass over the data; its randomness depends on the seed and its number only.

        So a checkpoint between two epochs needs no state of any generator.
        """
        self.model.train()
        body = self.model.body if isinstance(self.model, Classifier) else None
        if isinstance(body, AirbenchBody) and body.whiten.bias is not None:
            body.whiten.bias.requires_grad_(number < WHITEN_EPOCHS)
        seed = derive_seed("train", self.config.seed, number)
        generator = torch.Generator().manual_seed(seed)
        order = torch.randperm(len(self.data), generator=generator)
        batches = order.split(self.config.batch_size)[: self.steps]
        loss_sum = torch.zeros((), device=self.device)
        correct_sum = torch.zeros((), device=self.device, dtype=torch.int64)
        with seeded(seed, self.device):  # for dropout
            for index, rows in enumerate(batches):
                step = number * self.steps + index
                lr = learning_rate(self.config, step, self.config.epochs * self.steps)
                loss, correct = self._step(rows, lr, generator, odd=number % 2 == 1)
                self._average(step + 1)
                loss_sum += loss * len(rows)
                correct_sum += correct
                if index % _CHECK_EVERY == 0 or index == self.steps - 1:
                    self._check_loss(loss_sum, number)
                advance(len(rows))
        count = sum(len(rows) for rows in batches)
        return Epoch(float(loss_sum) / count, int(correct_sum) / count)

    def _average(self, step: int) -> None:
        """Pull the weights to their running average, the more the later; at the end, set them."""
        if self.average is None:
            return
        total, every = self.config.epochs * self.steps, self.config.average
        if step % every == 0 and step < total:
            self.average.update(self.model, decay=0.95**every * (step / total) ** 3)
        elif step == total:
            self.average.update(self.model, decay=1.0)

    def _step(
        self, rows: Tensor, lr: float, generator: torch.Generator, *, odd: bool
    ) -> tuple[Tensor, Tensor]:
        images, labels = self.data.take(rows)
        if self.hook is not None:
            images, labels = self.hook.transform(
                images, labels, model=self.model, generator=generator
            )
        images = augment(
            images,
            mode=self.config.augment,
            generator=generator,
            cutout=self.config.cutout,
            mirrored=self.mirrored[rows] ^ odd,
        )
        if self.corrupt is not None:
            images = self.corrupt(images, generator=generator)
        for optimizer in self.optimizers:
            for group in optimizer.param_groups:
                group["lr"] = lr * group["factor"]
            optimizer.zero_grad(set_to_none=True)
        logits = self.forward(images)
        loss = F.cross_entropy(logits, labels, label_smoothing=self.config.label_smoothing)
        loss.backward()
        for optimizer in self.optimizers:
            optimizer.step()
        return loss.detach(), (logits.detach().argmax(1) == labels).sum()

    def _check_loss(self, loss_sum: Tensor, epoch: int) -> None:
        if not bool(loss_sum.isfinite()):
            raise RuntimeError(
                f"the loss became {float(loss_sum)} in epoch {epoch + 1}: "
                f"try a lower learning rate than {self.config.lr}"
            )


class Average:
    """A running average of floating-point weights and statistics (airbench's lookahead)."""

    def __init__(self, model: nn.Module) -> None:
        self.state = {name: value.detach().clone() for name, value in _floating(model)}

    @torch.no_grad()
    def update(self, model: nn.Module, *, decay: float) -> None:
        """Average the weights in, ``decay`` being the average's share; set the weights to it."""
        for name, value in _floating(model):
            mean = self.state[name]
            value.copy_(mean.lerp_(value, 1 - decay))


def _floating(model: nn.Module) -> list[tuple[str, Tensor]]:
    return [
        (name, value) for name, value in model.state_dict().items() if value.is_floating_point()
    ]


def _optimizers(
    model: nn.Module, config: TrainConfig, precision: torch.dtype
) -> list[torch.optim.Optimizer]:
    """Their groups have a ``factor``, the share of the rate.

    Biases of normalisation layers have a rate of their own, and filters have it with Muon.
    """
    layers = list(model.modules())
    biases = [
        layer.bias
        for layer in layers
        if isinstance(layer, nn.BatchNorm2d) and layer.bias is not None and config.bias_lr != 1
    ]
    filters = [
        layer.weight
        for layer in layers
        if isinstance(layer, nn.Conv2d)
        and layer.weight.requires_grad
        and config.optimizer == "muon"
    ]
    own = {id(parameter) for parameter in (*biases, *filters)}
    others = [parameter for parameter in model.parameters() if id(parameter) not in own]
    groups: list[dict[str, Any]] = [{"params": others, "factor": 1.0}]
    if biases:  # the same decay a step as the others have
        decay = config.weight_decay / config.bias_lr
        groups.append({"params": biases, "factor": config.bias_lr, "weight_decay": decay})
    sgd = torch.optim.SGD(
        groups,
        lr=config.lr,
        momentum=config.momentum,
        weight_decay=config.weight_decay,
        nesterov=config.nesterov,
    )
    if not filters:
        return [sgd]
    factor = config.muon_lr / config.lr
    muon = Muon([{"params": filters, "factor": factor}], lr=config.muon_lr, dtype=precision)
    return [sgd, muon]


def training_forward(model: nn.Module, config: TrainConfig, device: torch.device) -> Forward:
    """The forward pass of a step: images to float32 logits, with gradients to float32 weights.

    Args:
        model: The classifier, on the device already. The layout of its weights is changed.
        config: Its ``layout``, ``precision`` and ``compile`` are used.

    Raises:
        ValueError: ``compile`` on another device than a GPU; layout "blocked" on another than the
            CPU, for another network than a ResNet of this library, or without oneDNN.
    """
    dtype = resolve_precision(config.precision, device)
    if config.compile and device.type != "cuda":
        raise ValueError(f"expected a CUDA device with compile, got {device.type}")
    if config.layout == "blocked":
        return _blocked_forward(model, device, dtype)
    model.to(memory_format=torch.channels_last)
    # "reduce-overhead" records the step as CUDA graphs.
    call = torch.compile(model, mode="reduce-overhead") if config.compile else model
    mixed = dtype == torch.bfloat16
    gradients = SideBySideGradients() if mixed and device.type == "cpu" and amx() else nullcontext()

    def forward(images: Tensor) -> Tensor:
        images = images.contiguous(memory_format=torch.channels_last)
        with torch.autocast(device.type, dtype=torch.bfloat16, enabled=mixed), gradients:
            logits = call(images)
        return logits.float()

    return forward


def _blocked_forward(model: nn.Module, device: torch.device, dtype: torch.dtype) -> Forward:
    """A forward pass in oneDNN's own layout, sixteen channels side by side.

    All layers of a ResNet have kernels for it, and nothing is converted between them. On a CPU
    normalisation, ReLU and convolutions of small maps are faster than in channels-last memory.
    """
    if device.type != "cpu":
        raise ValueError(f"expected the CPU with layout blocked, got {device.type}")
    body = model.body if isinstance(model, Classifier) else None
    if not isinstance(model, Classifier) or not isinstance(body, ResNetBody):
        kind = type(model if body is None else body).__name__
        raise ValueError(f"expected a resnet or preactresnet with layout blocked, got {kind}")
    if not torch.backends.mkldnn.is_available():
        raise ValueError("expected a torch with oneDNN for layout blocked, got one without")
    if dtype == torch.bfloat16 and not onednn_bfloat16():
        raise ValueError(
            "expected precision float32 for layout blocked on this processor, got bfloat16"
        )
    # oneDNN gives the gradients of weights in this layout, and the optimiser wants them alike.
    model.to(memory_format=torch.contiguous_format)
    normalize, head = model.normalize, model.head

    def forward(images: Tensor) -> Tensor:
        opaque = normalize(images).to(dtype).contiguous().to_mkldnn()
        maps = body.blocks(body.stem(opaque)).to_dense().float()
        logits: Tensor = head(maps.mean((2, 3)))
        return logits

    return forward
