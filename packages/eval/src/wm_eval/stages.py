"""The stages of a study, one function each, from the first image to the cleaned classifier."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

from torch import Tensor, nn

from wm_eval.config import StudyConfig, plain
from wm_eval.detectors import detector
from wm_eval.measure import (
    mark_values,
    metrics_values,
    parameters,
    poisoned_images,
    scan_values,
    stealth_values,
)
from wm_eval.pictures import reversed_picture, watermark_pictures
from wm_eval.robustness import compare, outcomes, summarize
from wm_eval.study import (
    EXTRACTOR,
    TRIGGER,
    Study,
    fresh_classifier,
    load_reversed,
    reversed_file,
    save_reversed,
    victim_file,
)
from wm_eval.workspace import Made
from wm_extract import UNetExtractor, train_jointly
from wm_inject import (
    WatermarkTrigger,
    load_image,
    pretrained_card,
    quantize,
    save_checkpoint,
    save_trigger,
    to_float,
)
from wm_victim import (
    load_classifier,
    save_classifier,
    train_classifier,
)


class NoTrigger(nn.Module):
    """Changes nothing: cleaning with it is the control, as many steps without a trigger."""

    def forward(
        self, images: Tensor, *, ids: Tensor | None = None, target: Tensor | None = None
    ) -> Tensor:
        """The images as they are."""
        return images


DEFENCES = ("nc", "reverse")


def describe_data(study: Study) -> Made:
    """What the images are."""
    data = study.data
    return Made(
        {
            "name": data.name,
            "n_train": len(data.train),
            "n_test": len(data.test),
            "n_measured": len(study.test),
            "classes": list(data.classes),
            "channels": data.channels,
            "image_size": data.image_size,
            "fingerprint": data.fingerprint,
        }
    )


def train_mark(study: Study, checkpoint: Path) -> Made:
    """Train injector and extractor together, without labels and without a victim."""
    config = study.config
    result = train_jointly(
        study.data.train.images.to(study.device),
        config=config.joint,
        watermark=_watermark(config.watermark, study.data.image_size),
        seed=config.seed,
        checkpoint=checkpoint,
        progress=study.progress,
    )
    trigger = WatermarkTrigger(
        result.injector.cpu(), watermark=result.watermark.cpu(), strength=config.strength
    )
    _save_mark(study, trigger, result.extractor)
    values = {
        "recipe": config.joint.recipe,
        "size": config.joint.size,
        "injector_parameters": parameters(result.injector),
        "extractor_parameters": parameters(result.extractor),
        "history": [row._asdict() for row in result.history],
    }
    return Made(values, (TRIGGER, EXTRACTOR))


def take_mark(study: Study) -> Made:
    """Take injector and extractor as they ship, trained beforehand."""
    config, data = study.config, study.data
    assert config.pretrained is not None
    card = pretrained_card(config.pretrained)
    wanted, got = (card["channels"], card["image_size"]), (data.channels, data.image_size)
    if got != wanted:
        raise ValueError(
            f"expected images of {wanted[0]} channels and {wanted[1]} px for the weights "
            f"{config.pretrained}, got {got[0]} and {got[1]}"
        )
    ready = WatermarkTrigger.from_pretrained(config.pretrained)
    trigger = WatermarkTrigger(ready.injector, watermark=ready.watermark, strength=config.strength)
    extractor = UNetExtractor.from_pretrained(config.pretrained)
    _save_mark(study, trigger, extractor)
    values = {
        "recipe": card["recipe"],
        "size": card["size"],
        "trained_on": card["data"],
        "injector_parameters": parameters(trigger),
        "extractor_parameters": parameters(extractor),
    }
    return Made(values, (TRIGGER, EXTRACTOR))


def _save_mark(study: Study, trigger: WatermarkTrigger, extractor: UNetExtractor) -> None:
    """Write both where the later stages read them."""
    metadata = {"seed": study.config.seed, "data": study.data.fingerprint}
    save_trigger(trigger, study.space.path(TRIGGER), metadata)
    save_checkpoint(
        study.space.path(EXTRACTOR),
        kind=UNetExtractor.kind,
        config=extractor.config,
        state=extractor.state_dict(),
        metadata=metadata,
    )


def measure_mark(study: Study) -> Made:
    """How visible the watermark is, what is read back, and whether marked images are told apart."""
    trigger, extractor, test = study.trigger(), study.extractor(), study.test
    images = quantize(test.images)
    poisoned = poisoned_images(trigger, test)
    values = mark_values(
        extractor,
        trigger.watermark,
        images,
        poisoned,
        corruptions=study.corruptions,
        false_positive_rate=study.config.measure.false_positive_rate,
        seed=study.config.seed,
    )
    shown = images[: study.config.measure.pictures]
    folder = study.space.folder / "pictures"
    pictures = watermark_pictures(folder, trigger, extractor, trigger.watermark, shown)
    files = [pictures["watermark"], *(p for row in pictures["rows"] for p in row.values())]
    stealth = stealth_values(poisoned, images)
    return Made({**values, "stealth": stealth, "pictures": pictures}, _names(files))


def train_victim(study: Study, name: str, checkpoint: Path) -> Made:
    """Train the clean or the backdoored victim: one recipe, one seed, one difference."""
    config, data = study.config, study.data
    model = fresh_classifier(data, config.victim.model, width=config.victim.width, seed=config.seed)
    attack: dict[str, Any] = {}
    if name == "backdoored":
        attack = {
            "plan": replace(config.plan, seed=config.seed),
            "trigger": study.trigger(),
        }
    history = train_classifier(
        model,
        data.train.to(study.device),
        config=replace(config.train, seed=config.seed),
        checkpoint=checkpoint,
        device=study.device,
        progress=study.progress,
        **attack,
    )
    path = victim_file(name)
    metadata = {"seed": config.seed, "data": data.fingerprint, "victim": name}
    save_classifier(model.cpu(), study.space.path(path), metadata)
    values = {"parameters": parameters(model), "history": history.to_dict()}
    return Made(values, (path,))


def measure_victims(study: Study) -> Made:
    """Both victims under every corruption, compared image by image."""
    rows = {name: _rows(study, study.victim(name)) for name in ("clean", "backdoored")}
    victims = {
        name: {c: metrics_values(summarize(found)) for c, found in by_name.items()}
        for name, by_name in rows.items()
    }
    gaps = {
        c: compare(rows["backdoored"][c].correct, rows["clean"][c].correct)._asdict()
        for c in study.corruptions
    }
    values = {"target": study.config.plan.target, "label_map": study.config.plan.label_map}
    return Made({**values, "victims": victims, "cda_gap": gaps})


def scan_victim(study: Study, defence: str, victim: str) -> Made:
    """Run one defence on one victim; keep what it found, and a picture for every label."""
    config, space = study.config, study.space
    mine = study.defender(config.defence.images)
    rule = config.defence
    scanner: Any = detector(defence, alpha=rule.alpha, max_ratio=rule.max_ratio)
    report = replace(scanner, config=getattr(config, defence)).scan(
        study.victim(victim),
        mine.images,
        labels=mine.labels,
        seed=config.seed,
        progress=study.progress,
    )
    folder, prefix = space.folder / "pictures", f"{defence}-{victim}"
    pictures = {
        str(label): reversed_picture(folder, f"{prefix}-{label}", trigger, mine.images[:64].cpu())
        for label, trigger in sorted(report.triggers.items())
    }
    values = scan_values(report)
    chosen = chosen_label(values)
    files = list(_names(pictures.values()))
    if chosen is not None:
        files.append(reversed_file(defence, victim))
        save_reversed(report.triggers[chosen].cpu(), space.path(files[-1]))
    values |= {
        "defence": defence,
        "victim": victim,
        "max_ratio": config.defence.max_ratio,
        "n_images": len(mine),
        "true_target": config.plan.target if victim == "backdoored" else None,
        "pictures": pictures,
    }
    return Made(values, files)


def clean_victim(study: Study, defence: str) -> Made:
    """Clean the backdoored victim with the label that the scan named; with none, say so."""
    config, space = study.config, study.space
    scan = space.record(f"scan-{defence}-backdoored").values
    label = chosen_label(scan)
    if label is None:
        why = f"the scan named no label ({scan['verdict']}: {scan['reason']})"
        return Made({"done": False, "why": why, "label": None})
    mine = study.defender(config.defence.cleaning_images)
    before = study.victim("backdoored")
    unlearning = getattr(config, f"{defence}_cleaning")
    reversed_trigger = load_reversed(space.path(reversed_file(defence, "backdoored")))
    after, control = (
        unlearning.repair(
            before, mine.images, mine.labels, triggers={label: trigger}, seed=config.seed
        ).model
        for trigger in (reversed_trigger.to(study.device), NoTrigger())
    )
    path = f"models/cleaned-{defence}.safetensors"
    save_classifier(after.cpu(), space.path(path), {"seed": config.seed, "label": label})
    cleaned = load_classifier(space.path(path)).to(study.device)
    rows = [_rows(study, m, only_none=True)["none"] for m in (before, cleaned, control)]
    first, second, third = rows
    counts = first.attacked
    values = {
        "done": True,
        "why": f"the scan named label {label}",
        "label": label,
        "other_labels_named": [k for k in scan["suspected"] if k != label],
        "n_images": len(mine),
        "before": metrics_values(summarize(first)),
        "after": metrics_values(summarize(second)),
        "control": metrics_values(summarize(third)),
        "cda_change": compare(second.correct, first.correct)._asdict(),
        "asr_change": compare(second.opened[counts], first.opened[counts])._asdict(),
        "asr_against_control": compare(second.opened[counts], third.opened[counts])._asdict(),
    }
    return Made(values, (path,))


def chosen_label(scan: Mapping[str, Any]) -> int | None:
    """The named label that stands out most; None if none was named."""
    named = [label for label in scan["labels"] if label["label"] in scan["suspected"]]
    if not named:
        return None
    return int(min(named, key=lambda x: (x["p_value"], x["ratio"], x["label"]))["label"])


def stage_settings(config: StudyConfig, *sections: str) -> dict[str, Any]:
    """The parts of the settings that a stage depends on, for its record."""
    whole = plain(config)
    return {name: whole[name] for name in ("name", *sections)}


def _rows(study: Study, model: nn.Module, *, only_none: bool = False) -> dict[str, Any]:
    plan = study.config.plan
    corruptions = study.corruptions
    return outcomes(
        model,
        study.trigger(),
        study.test,
        target=plan.target,
        corruptions={"none": corruptions["none"]} if only_none else corruptions,
        seed=study.config.seed,
        label_map=plan.label_map,
    )


def _watermark(path: str | None, size: int) -> Tensor | None:
    if path is None:
        return None
    return to_float(load_image(path, size=size, channels=1)[None])[0]


def _names(pictures: Any) -> tuple[str, ...]:
    return tuple(sorted({f"pictures/{picture['file']}" for picture in pictures}))
