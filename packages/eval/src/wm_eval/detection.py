"""Do the defences find what is there, and nothing where nothing is? One question, seed by seed.

For every seed a clean, a BadNets and a WaNet victim are trained by one recipe, and both defences
scan them. Nothing is tuned on the outcome: settings come in as arguments, every scan is a record.
Source: the experiment of section 4.2 of the reverse-generator paper (its Table 1), on one network.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import partial
from pathlib import Path
from typing import Any

from torch import nn

from defense_nc import NCConfig
from defense_reverse import ReverseConfig, detection_case
from wm_eval.config import plain
from wm_eval.measure import metrics_values, scan_values
from wm_eval.robustness import outcomes, summarize
from wm_eval.stages import DEFENCES
from wm_eval.study import fresh_classifier
from wm_eval.workspace import Made, Workspace
from wm_extract import Identity
from wm_inject import BadNetsTrigger, CoTraining, PoisonPlan, WaNetTrigger
from wm_victim import (
    Dataset,
    TrainConfig,
    defender_subset,
    load_classifier,
    load_dataset,
    save_classifier,
    train_classifier,
)

ATTACKS = ("none", "badnets", "wanet")
PAIRS = (("nc", "none"), ("nc", "badnets"), ("reverse", "none"), ("reverse", "wanet"))


@dataclass(frozen=True)
class DetectionConfig:
    """An experiment on many small victims.

    Args:
        data: A data set by name or path.
        model: A classifier of `build_classifier`.
        width: Its width; its own if None.
        limit: Use this many training images; all if None.
        pairs: Which defence ("nc", "reverse") meets which victim ("none", "badnets", "wanet").
        seeds: Seeds of victim, trigger and scan alike.
        target: The label that the attacks ask for.
        ratio: Share of poisoned images: of all images (BadNets), of every batch (WaNet).
        train: The recipe of every victim.
        images: Clean images of the defender.
        nc: Settings of Neural Cleanse.
        reverse: Settings of the reverse generators.

    Raises:
        ValueError: An unknown defence or attack, or no pair or seed at all.
    """

    data: str = "mnist"
    model: str = "wanet-mnist"
    width: int | None = None
    limit: int | None = None
    pairs: Sequence[tuple[str, str]] = PAIRS
    seeds: Sequence[int] = (0, 1, 2, 3, 4)
    target: int = 0
    ratio: float = 0.1
    train: TrainConfig = field(default_factory=lambda: TrainConfig.preset("mnist", epochs=3))
    images: int = 600
    nc: NCConfig = field(default_factory=NCConfig)
    reverse: ReverseConfig = field(default_factory=lambda: ReverseConfig.preset("fast"))

    def __post_init__(self) -> None:
        known = {(defence, attack) for defence in DEFENCES for attack in ATTACKS}
        if not self.pairs or not set(self.pairs) <= known:
            raise ValueError(
                f"expected pairs of a defence ({', '.join(DEFENCES)}) and a victim "
                f"({', '.join(ATTACKS)}), got {tuple(self.pairs)}"
            )
        if not self.seeds or any(s < 0 for s in self.seeds):
            raise ValueError(f"expected seeds >= 0, at least one, got {tuple(self.seeds)}")


def run_detection(
    config: DetectionConfig,
    out: str | Path,
    *,
    device: str = "cpu",
    progress: bool = True,
    say: Callable[[str], None] = print,
) -> Path:
    """Train every victim and scan it with every defence, or do the rest of it.

    Args:
        config: The experiment.
        out: Its folder; ``records/`` and ``models/`` go there.
        device: "cpu" or a cuda device.
        progress: Show how far long stages are.
        say: Called with a line for every stage.

    Returns:
        The folder of records: ``victim-ATTACK-SEED`` and ``scan-DEFENCE-ATTACK-SEED``.

    Raises:
        ValueError: Data that cannot be loaded, or settings that do not fit them.
        RuntimeError: A training run that diverged.
    """
    data = load_dataset(config.data, limit=config.limit)
    settings = plain(config)
    for seed in config.seeds:
        space = Workspace(Path(out), seed, data.fingerprint, device, say)
        train = {k: settings[k] for k in ("model", "width", "target", "ratio", "train")}
        for defence, attack in config.pairs:
            space.stage(
                f"victim-{attack}-{seed}",
                train | {"attack": attack},
                (),
                partial(_victim, config, data, space, attack, progress),
            )
            space.stage(
                f"scan-{defence}-{attack}-{seed}",
                {"images": config.images, "settings": settings[defence]},
                (f"victim-{attack}-{seed}",),
                partial(_scan, config, data, space, defence, attack, progress),
            )
    return Path(out) / "records"


def _victim(
    config: DetectionConfig,
    data: Dataset,
    space: Workspace,
    attack: str,
    progress: bool,
    checkpoint: Path,
) -> Made:
    seed = space.seed
    model = fresh_classifier(data, config.model, width=config.width, seed=seed)
    # A clean victim is measured with BadNets' trigger: what it does to a model that never saw it.
    trigger: nn.Module = BadNetsTrigger(image_size=data.image_size)
    planting: dict[str, Any] = {}
    if attack == "wanet":
        warp = WaNetTrigger(image_size=data.image_size, seed=seed)
        plan = PoisonPlan(ratio=config.ratio, target=config.target, mode="per_batch", seed=seed)
        hook: CoTraining = warp.noise_hook(plan, num_classes=data.num_classes)
        trigger, planting = warp, {"hook": hook}
    elif attack == "badnets":
        plan = PoisonPlan(ratio=config.ratio, target=config.target, seed=seed)
        planting = {"plan": plan, "trigger": trigger}
    train_classifier(
        model,
        data.train.to(device=space.device),
        config=replace(config.train, seed=seed),
        num_classes=data.num_classes,
        checkpoint=checkpoint,
        device=space.device,
        progress=progress,
        **planting,
    )
    path = f"models/victim-{attack}-{seed}.safetensors"
    save_classifier(model.cpu(), space.path(path), {"seed": seed, "attack": attack})
    found = outcomes(
        model.to(space.device),
        trigger.to(space.device),
        data.test.to(space.device),
        target=config.target,
        corruptions={"none": Identity()},
        seed=seed,
    )["none"]
    return Made({"attack": attack, **metrics_values(summarize(found))}, (path,))


def _scan(
    config: DetectionConfig,
    data: Dataset,
    space: Workspace,
    defence: str,
    attack: str,
    progress: bool,
    _: Path,
) -> Made:
    model = load_classifier(space.path(f"models/victim-{attack}-{space.seed}.safetensors"))
    mine = defender_subset(data.train, count=config.images, seed=space.seed).to(space.device)
    report = DEFENCES[defence].scan(
        model.to(space.device),
        mine.images,
        labels=mine.labels,
        config=getattr(config, defence),
        seed=space.seed,
        progress=progress,
    )
    target = None if attack == "none" else config.target
    values = scan_values(report) | {"attack": attack, "defence": defence, "true_target": target}
    if target is not None:
        values["case"] = detection_case(report.suspected, target)
        values["paper_case"] = detection_case(report.paper_flagged, target)
    return Made(values)


def summarise_detection(records: Mapping[str, Any]) -> list[dict[str, Any]]:
    """One row for every defence and attack: how often each rule names the target, or anything.

    Args:
        records: What `read_records` gives for an experiment's folder.

    Returns:
        Rows with ``defence``, ``attack``, ``n``, ``named_target`` and ``named_other`` (counts of
        scans under the default rule), the same for the paper's rule, the smallest and mean ASR of
        the victims, and the paper's mean index.

    Raises:
        ValueError: No scan among the records.
    """
    scans = [r.values for name, r in sorted(records.items()) if name.startswith("scan-")]
    if not scans:
        raise ValueError("expected the records of a detection experiment, found no scan in them")
    rows = []
    for defence, attack in sorted({(s["defence"], s["attack"]) for s in scans}):
        mine = [s for s in scans if (s["defence"], s["attack"]) == (defence, attack)]
        asr = [
            r.values["asr"] for name, r in records.items() if name.startswith(f"victim-{attack}-")
        ]
        row: dict[str, Any] = {"defence": defence, "attack": attack, "n": len(mine)}
        for key, rule in (("suspected", ""), ("paper_flagged", "paper_")):
            target = [s["true_target"] in s[key] for s in mine]
            other = [bool(set(s[key]) - {s["true_target"]}) for s in mine]
            row |= {f"{rule}named_target": sum(target), f"{rule}named_other": sum(other)}
        row["paper_index_mean"] = sum(s["paper_index"] for s in mine) / len(mine)
        row["asr_min"] = min(asr)
        rows.append(row)
    return rows


__all__ = ["ATTACKS", "PAIRS", "DetectionConfig", "run_detection", "summarise_detection"]
