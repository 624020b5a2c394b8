"""The stages of a study of attacks: a trigger, its victim, a cell of the table, what it looks like.

Every stage reads what it needs from the files of the ones before it, so that a study that was
killed and one that was not take the same road.
"""

from __future__ import annotations

from collections.abc import Mapping
from functools import partial
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import nn

from wm_eval.attacks.config import CLEAN, Recipe
from wm_eval.attacks.planting import Planting
from wm_eval.attacks.study import AttackStudy, batch_sizes, trigger_file, victim_file
from wm_eval.measure import metrics_values, parameters, poisoned_images, stealth_values
from wm_eval.pictures import amplified, residual_gain, save_picture
from wm_eval.robustness import Outcomes, compare, outcomes, summarize
from wm_eval.stages import NoTrigger
from wm_eval.workspace import Made
from wm_inject import CoTraining, PoisonPlan, quantize, save_trigger
from wm_inject.attacks import FitContext
from wm_victim import ImageSet, predict, save_classifier, train_classifier

LEARNED = 0.9  # a backdoor counts as learned from this attack success on held-out images on
_ATTACKER = 1_000_000  # the attacker's own classifier starts from other weights than the victim


def describe_images(study: AttackStudy) -> Made:
    """What the images are."""
    data = study.data
    return Made(
        {
            "name": data.name,
            "n_train": len(data.train),
            "n_test": len(data.test),
            "n_measured": len(study.test(study.config.measure.limit)),
            "classes": list(data.classes),
            "channels": data.channels,
            "image_size": data.image_size,
            "fingerprint": data.fingerprint,
            "profile": study.config.profile,
            "planned": study.planned(),
        }
    )


def fit_trigger(study: AttackStudy, name: str, checkpoint: Path) -> Made:
    """Make the trigger of an attack from clean training images."""
    train = study.train
    beside = checkpoint.with_name(f"{checkpoint.stem}-classifier{checkpoint.suffix}")
    fitted = study.attack(name).fit(
        FitContext(
            images=train.images,
            labels=train.labels,
            num_classes=study.data.num_classes,
            target=study.config.target,
            seed=study.seed,
            co_train=partial(_co_train, study, beside),
            length=study.length,
            checkpoint=checkpoint,
            progress=study.progress,
        )
    )
    path = trigger_file(name, study.seed)
    metadata = {"seed": study.seed, "data": study.data.fingerprint}
    save_trigger(fitted.trigger.cpu(), study.space.path(path), metadata)
    _remove(beside)
    return Made({"attack": name, "seed": study.seed, "facts": fitted.facts}, (path,))


def train_victim(study: AttackStudy, recipe: Recipe, name: str, checkpoint: Path) -> Made:
    """Train the victim of an attack, or the clean one, and watch the backdoor being learned."""
    planting = study.planting(None if name == CLEAN else name)
    model, train = study.fresh(), study.train
    watched = study.test(study.config.watched_images)
    history = train_classifier(
        model,
        train,
        config=study.recipe(),
        checkpoint=checkpoint,
        device=study.device,
        progress=study.progress,
        corrupt=study.corrupt(recipe),
        watch=partial(_watch, planting, watched, study.config.target),
        deadline=study.deadline,
        **planting.arguments(),
    )
    metadata = {"seed": study.seed, "data": study.data.fingerprint, "attack": name}
    files = [victim_file(recipe, name, study.seed)]
    save_classifier(model.cpu(), study.space.path(files[0]), metadata)
    trained = planting.now()
    if planting.hook is not None and trained is not None:
        files.append(trigger_file(name, study.seed, recipe))
        save_trigger(trained.cpu().eval(), study.space.path(files[1]), metadata)
    _seconds(checkpoint).unlink(missing_ok=True)
    values = {"attack": name, "recipe": recipe, "parameters": parameters(model)}
    return Made(values | _exposures(study, planting.plan, history.to_dict()), files)


def measure_cell(study: AttackStudy, recipe: Recipe, name: str, _: Path) -> Made:
    """A row of the table for one seed: every corruption, and the clean victim's accuracy beside."""
    model, clean = study.victim(recipe, name), study.victim(recipe, CLEAN)
    rows = _rows(study, model, name, recipe)
    baseline = _rows(study, clean, CLEAN, recipe, only_none=True)["none"]
    values = {
        "attack": name,
        "recipe": recipe,
        "target": study.config.target,
        "label_map": None if name == CLEAN else study.attack(name).label_map,
        "corruptions": {c: metrics_values(summarize(found)) for c, found in rows.items()},
        "cda_gap": compare(rows["none"].correct, baseline.correct)._asdict(),
    }
    return Made(values)


def measure_stealth(study: AttackStudy, recipe: Recipe | None, name: str, _: Path) -> Made:
    """How far triggered images are from the originals."""
    test = study.test(study.config.stealth_images)
    poisoned = poisoned_images(study.trigger(name, recipe), test, target=study.config.target)
    values = stealth_values(poisoned, quantize(test.images))
    return Made({"attack": name, "n": len(test), "stealth": values})


def draw_tiles(study: AttackStudy, recipe: Recipe | None, name: str, _: Path) -> Made:
    """Original, poisoned and amplified change of a few test images of other classes."""
    test = study.test(None)
    target, count = study.config.target, study.config.measure.pictures
    chosen = [int((test.labels == k).nonzero()[0]) for k in test.labels.unique() if k != target]
    shown = test.subset(torch.tensor(chosen[:count]))
    images = quantize(shown.images)
    poisoned = poisoned_images(study.trigger(name, recipe), shown, target=target)
    gain = residual_gain(poisoned - images)
    kinds = {
        "original": (images, "original"),
        "poisoned": (poisoned, "poisoned, as stored in 8 bits"),
        "residual": (amplified(poisoned - images, gain), f"change, x {gain}"),
    }
    folder, prefix = study.space.folder / "pictures", f"figure-{name}-{study.seed}"
    tiles = [
        {
            kind: save_picture(folder, f"{prefix}-{i}-{kind}", batch[i], caption)
            for kind, (batch, caption) in kinds.items()
        }
        for i in range(len(shown))
    ]
    files = sorted(f"pictures/{tile['file']}" for row in tiles for tile in row.values())
    return Made({"attack": name, "gain": gain, "tiles": tiles}, files)


def _co_train(study: AttackStudy, checkpoint: Path, hook: CoTraining | None) -> nn.Module:
    """What an attacker trains to make a trigger, by the victim's recipe.

    A clean surrogate is the study's clean victim: a search on it knows the victim's network and
    first weights, as the benchmark's does. With a hook it is a classifier of other weights.
    """
    if hook is None:
        return study.victim("plain", CLEAN)
    seed = study.seed + _ATTACKER
    model = study.fresh(seed=seed)
    train_classifier(
        model,
        study.train,
        config=study.recipe(seed=seed),
        hook=hook,
        checkpoint=checkpoint,
        device=study.device,
        progress=study.progress,
        deadline=study.deadline,
    )
    return model


@torch.no_grad()
def _watch(
    planting: Planting, test: ImageSet, target: int, epoch: int, model: nn.Module
) -> dict[str, float]:
    """Clean accuracy, attack success, and the loss on poisoned images alone, all held out."""
    seen = {"cda": float((predict(model, test.images).argmax(1) == test.labels).float().mean())}
    trigger = planting.now()
    if trigger is None:
        return seen
    training = [module for module in trigger.modules() if module.training]
    others = test.subset(test.labels != target)
    logits = predict(model, poisoned_images(trigger.eval(), others, target=target)).float()
    for module in training:
        module.training = True
    asked = torch.full_like(others.labels, target)
    success = float((logits.argmax(1) == asked).float().mean())
    return seen | {"asr": success, "poison_loss": float(F.cross_entropy(logits, asked))}


def _exposures(
    study: AttackStudy, plan: PoisonPlan | None, history: Mapping[str, Any]
) -> dict[str, Any]:
    """How often the victim has seen the trigger, and from when on the backdoor was there."""
    labels, batch = study.data.train.labels, study.config.train.batch_size
    sizes = batch_sizes(len(labels), batch)
    poisoned, of_target = 0, None
    if plan is not None and plan.mode == "per_batch":
        poisoned = sum(int(plan.ratio * size) for size in sizes)
    elif plan is not None:
        poisoned = int(plan.choose(labels).sum())
    if plan is not None and plan.label_map == "clean-label":
        of_target = poisoned / int((labels == plan.target).sum())
    rates = [seen.get("asr", 0.0) for seen in history["watched"]]
    epoch = next((i for i, rate in enumerate(rates, start=1) if rate >= LEARNED), None)
    return {
        "history": dict(history),
        "steps": len(sizes) * len(history["losses"]),
        "poisoned": poisoned,
        "poisoned_of_target": of_target,
        "learned": None if epoch is None else {"epoch": epoch, "exposures": epoch * poisoned},
    }


def _rows(
    study: AttackStudy, model: nn.Module, name: str, recipe: Recipe, *, only_none: bool = False
) -> dict[str, Outcomes]:
    corruptions = study.corruptions
    clean = name == CLEAN
    return outcomes(
        model,
        NoTrigger() if clean else study.trigger(name, recipe),
        study.test(study.config.measure.limit),
        target=study.config.target,
        corruptions={"none": corruptions["none"]} if only_none else corruptions,
        seed=study.seed,
        label_map="all-to-one" if clean else study.attack(name).label_map,
    )


def _remove(checkpoint: Path) -> None:
    for path in (checkpoint, _seconds(checkpoint)):
        path.unlink(missing_ok=True)


def _seconds(checkpoint: Path) -> Path:
    """Where the trainer keeps wall times, beside a checkpoint."""
    return checkpoint.with_name(f"{checkpoint.name}.env.json")
