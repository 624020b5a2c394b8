"""The attack paper's two tables with measured numbers in them, and how backdoors were learned."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from wm_eval import paper
from wm_eval.numbers import (
    AVERAGES,
    Number,
    numbers,
    planned,
    poison_losses,
    select,
    spread,
)
from wm_eval.pages.coverage import coverage
from wm_eval.records import Failure, Key, Record, StudyRecords
from wm_eval.render import (
    ABSENT,
    Page,
    Table,
    count_range,
    percent,
    plus_minus,
    points,
    split_headers,
)
from wm_eval.titles import ATTACKS, CLEAN, attack_title, in_order

# Each column of Table 1: its title, and which of the paper's five it is compared with.
COLUMNS = {
    "none": ("None", 0),
    "mask": ("RM pixel", 1),
    "mask-block": ("RM block", 1),
    "rotation": ("Rotation", 2),
    "noise": ("Noise gaussian", 3),
    "salt-pepper": ("Noise salt-pepper", 3),
    "rescale": ("Re-scale", 4),
}
_AVERAGES = ("AVG pixel, gaussian", "AVG block, salt-pepper")
MEASURES = {
    "cda": "Clean accuracy (CDA, %)",
    "asr": "Attack success (ASR, %)",
    "ftr": "False triggers (%)",
}
STEALTH = {"psnr": ("PSNR (dB)", 2), "ssim": ("SSIM", 3), "lpips": ("LPIPS", 3)}
LEARNED = 0.9  # attack success from which a backdoor counts as learned
ALLOWED_LOSS = 0.03  # of clean accuracy against the clean victim of the same seed
TRAINED = {
    "plain": ("table1", "Table 1: attacks under corruption"),
    "corrupted": ("table1-corrupted", "Table 1 with victims that were trained under corruptions"),
}
_NOTES = {
    "cda": "Test images without a trigger that are classified correctly, after the corruption. "
    "AVG is the paper's: the mean of five columns, None among them, for each reading of its one "
    "mask and one noise; what it prints stands under both readings.",
    "asr": "Test images of other classes than the target that get the target label once the "
    "trigger is in them: trigger, 8 bits, corruption, classifier. The paper does not say whether "
    "it counts images of the target class; here they are left out.",
    "ftr": "The same images without the trigger, after the same corruption, that get the target "
    "label all the same. Attack success is worth what it has above this: a victim that always "
    "says the target has 100 % of both. The paper does not report it.",
}


def attack_pages(study: StudyRecords) -> list[Page]:
    """Table 1 for each way of training, Table 2, and how the backdoors were learned."""
    pages = [table1(study, name) for name in TRAINED if started(study, name)]
    if study.select(kind="stealth") or any(f.kind == "stealth" for f in study.failures):
        pages.append(table2(study))
    return [*pages, learning(study)] if study.select(kind="victim") else pages


def started(study: StudyRecords, corruptions: str) -> bool:
    """Whether a victim of this training was trained or measured, or tried to be."""
    return any(e.key.get("corruptions") == corruptions for e in _entries(study))


def table1(study: StudyRecords, corruptions: str = "plain") -> Page:
    """Clean accuracy, attack success and false triggers: attacks by corruptions.

    Args:
        study: Its records.
        corruptions: Of the victims' training, "plain" or "corrupted".

    Raises:
        ValueError: Another training.

    Source: Wang et al., "Spy-Watermark", Table 1. False triggers, the clean victim, both readings
        of mask and noise, and the rows that are marked so are not in the paper.
    """
    if corruptions not in TRAINED:
        raise ValueError(f"expected corruptions in {', '.join(TRAINED)}, got {corruptions!r}")
    name, title = TRAINED[corruptions]
    measured = [
        n
        for n in numbers(study)
        if n.measure in MEASURES and n.key.get("corruptions") == corruptions
    ]
    every = (*measured, *_printed_rates(study))
    attacks = _attacks(study)
    seeds = _seeds(study, corruptions)
    tables = [_rates_table(f"{name}-{m}", m, attacks, every) for m in MEASURES]
    cells: list[tuple[str, Key]] = [
        (m, {"attack": a, "corruptions": corruptions, "seed": s, "corruption": c})
        for a in attacks
        for s in seeds
        for m in _measures(a)
        for c in COLUMNS
    ]
    tables += coverage(study, name, ("rates", "trigger", "victim", "images"), cells, measured)
    how = "images as they are" if corruptions == "plain" else "randomly corrupted images"
    return Page(
        name, title, f"{about(study, seeds)} Victims are trained on {how}.", tuple(tables), every
    )


def table2(study: StudyRecords) -> Page:
    """How far triggered images are from the originals: PSNR, SSIM and LPIPS.

    Source: Wang et al., "Spy-Watermark", Table 2 (CIFAR-10).
    """
    entries = numbers(study)
    measured = [n for n in entries if n.measure in STEALTH]
    common = [n for n in entries if n.measure == "common"]
    printed = paper.STEALTH if _data(study) == paper.STEALTH_DATA else {}
    every = (
        *measured,
        *common,
        *(
            Number(measure, {"attack": attack}, getattr(row, measure), "paper")
            for attack, row in printed.items()
            for measure in STEALTH
        ),
    )
    attacks = [name for name in _attacks(study) if name != CLEAN]
    columns = tuple(c for title, _ in STEALTH.values() for c in (title, f"{title}, paper"))
    headers = ("attack", *columns, *(("in common (%)",) if common else ()), "seeds")
    images = count_range(r.values["n"] for r in study.select(kind="stealth"))
    note = (
        f"Means over {images} test images, each clamped and rounded to 8 bits first, then over "
        "seeds (± sample standard deviation). SSIM is taken over whole windows only, which weighs "
        "a mark at the very edge less than the padded form does. The paper does not name LPIPS's "
        "network."
    )
    if common:
        note += (
            " In common: the share of the change's energy that is the same in all images, which "
            "averaging brings to light."
        )
    rows = tuple(_stealth_row(attack, every) for attack in attacks)
    tables = [Table("table2-stealth", "Stealth", headers, rows, note)]
    seeds = _seeds(study, None)
    cells: list[tuple[str, Key]] = [
        (m, {"attack": a, "seed": s}) for a in attacks for s in seeds for m in STEALTH
    ]
    kinds = ("stealth", "trigger", "victim", "images")
    tables += coverage(study, "table2", kinds, cells, measured)
    return Page("table2", "Table 2: stealth", about(study, seeds), tuple(tables), every)


def learning(study: StudyRecords) -> Page:
    """Steps, poison exposures, final attack success and accuracy against the clean victim.

    For each training a table of attacks and, below it, a line for every victim that missed 90 %
    attack success or lost more than 3 points of clean accuracy.
    """
    shown = {"steps", "poisoned", "poisoned_of_target", "learned_epoch", "exposures"}
    shown |= {"poison_loss_first", "poison_loss_last", "asr", "cda_gap"}
    every = [
        n
        for n in numbers(study)
        if n.measure in shown
        and n.key["attack"] != CLEAN
        and n.key.get("corruption", "none") == "none"
    ]
    tables = []
    for corruptions in TRAINED:
        victims = [r for r in study.select(kind="victim", corruptions=corruptions)]
        victims = [r for r in victims if r.key["attack"] != CLEAN]
        if not victims:
            continue
        selected = [n for n in every if n.key.get("corruptions") == corruptions]
        tables.append(_learning_table(study, corruptions, victims, selected))
        order = in_order([str(r.key["attack"]) for r in victims], ATTACKS)
        victims.sort(key=lambda r: (order.index(str(r.key["attack"])), r.key["seed"]))
        if misses := [line for r in victims for line in _miss(study, r)]:
            headers = ("attack", "seed", "miss", "what else is known")
            title = f"Misses, {corruptions} recipe"
            tables.append(Table(f"misses-{corruptions}", title, headers, tuple(misses)))
    title = "How the backdoors were learned"
    return Page("learning", title, about(study, _seeds(study, None)), tuple(tables), tuple(every))


def about(study: StudyRecords, seeds: Sequence[Any]) -> str:
    """What a page was measured on, in a few sentences."""
    values = facts(study)
    if "name" not in values:
        return ""
    model = f", {values['model']}" if values.get("model") else ""
    measured = values.get("n_measured", values.get("n_test"))
    corrupted = values.get("n_corrupted", measured)
    fewer = "" if corrupted == measured else f", {corrupted} of them under corruptions"
    parts = [
        f"{values['name']}{model}: {values['n_train']} training images, rates over {measured} "
        f"test images{fewer}."
    ]
    if "profile" in values:
        parts.append(f"Profile {values['profile']}.")
    if len(seeds) == 1:
        parts.append(f"Seed {seeds[0]}: one, so there is no spread.")
    elif seeds:
        parts.append(f"Seeds {', '.join(map(str, seeds))}: mean ± sample standard deviation.")
    return " ".join(parts)


def facts(study: StudyRecords) -> dict[str, Any]:
    """What the records say of the images and of the study as a whole."""
    records = [*study.select(kind="images"), *study.select(kind="study")]
    return {name: value for record in records for name, value in record.values.items()}


def _entries(study: StudyRecords) -> list[Record | Failure]:
    return [*study.records, *study.failures]


def _attacks(study: StudyRecords) -> list[str]:
    """The attacks to expect, in the order of the table; the clean victim comes last."""
    names = {str(e.key["attack"]) for e in _entries(study) if "attack" in e.key}
    names |= set(planned(study, "attacks") or ATTACKS)
    return [*in_order(names - {CLEAN}, ATTACKS), CLEAN]


def _seeds(study: StudyRecords, corruptions: str | None) -> list[int]:
    """The seeds that were planned, run or tried; of one training, or of the stealth table."""
    entries = [
        e
        for e in _entries(study)
        if e.kind in ("rates", "victim", "stealth")
        and (e.kind == "stealth") == (corruptions is None)
        and e.key.get("corruptions") in (None, corruptions)
    ]
    return sorted({int(e.key["seed"]) for e in entries} | set(planned(study, "seeds")))


def _data(study: StudyRecords) -> str:
    images = study.select(kind="images")
    return str(images[0].values["name"]) if images else ""


def _measures(attack: str) -> tuple[str, ...]:
    return ("cda", "ftr") if attack == CLEAN else tuple(MEASURES)


def _printed_rates(study: StudyRecords) -> list[Number]:
    """What the paper prints, under every column that may be meant; as fractions."""
    return [
        Number(measure, {"attack": attack, "corruption": column}, round(value / 100, 3), "paper")
        for (data, attack, measure), row in paper.RATES.items()
        if data == _data(study)
        for column, value in [
            *((column, row.columns[index]) for column, (_, index) in COLUMNS.items()),
            *((column, row.average) for column in AVERAGES),
        ]
    ]


def _rates_table(name: str, measure: str, attacks: Sequence[str], every: Sequence[Number]) -> Table:
    columns = (*COLUMNS, *AVERAGES)
    rates = [n for n in every if n.measure == measure]
    rows = []
    for attack in attacks:
        if measure not in _measures(attack):
            continue
        spreads = [spread(select(rates, measure, attack=attack, corruption=c)) for c in columns]
        cells = (plus_minus(s, factor=100, digits=1) for s in spreads)
        seeds = count_range(s.n for s in spreads if s is not None)
        rows.append((attack_title(attack), "measured", *cells, seeds))
        printed = {
            n.key["corruption"]: n.value
            for n in rates
            if n.source == "paper" and n.key["attack"] == attack
        }
        if printed:
            cells = (f"{100 * printed[column]:.1f}" for column in columns)
            rows.append((attack_title(attack), "paper", *cells, ABSENT))
    titles = (*(title for title, _ in COLUMNS.values()), *_AVERAGES)
    headers = ("attack", "source", *titles, "seeds")
    return Table(name, MEASURES[measure], headers, tuple(rows), _NOTES[measure])


def _stealth_row(attack: str, every: Sequence[Number]) -> tuple[str, ...]:
    cells, counts = [], []
    for measure, (_, digits) in STEALTH.items():
        values = spread(select(every, measure, attack=attack))
        printed = select(every, measure, source="paper", attack=attack)
        cells.append(plus_minus(values, digits=digits))
        cells.append(f"{printed[0]:.{digits}f}" if printed else ABSENT)
        counts += [values.n] if values else []
    if any(n.measure == "common" for n in every):  # earlier records have none
        shares = spread(select(every, "common", attack=attack))
        cells.append(plus_minus(shares, digits=1, factor=100))
    return (attack_title(attack), *cells, count_range(counts))


def _learning_table(
    study: StudyRecords, corruptions: str, victims: Sequence[Record], every: Sequence[Number]
) -> Table:
    attacks = in_order([str(r.key["attack"]) for r in victims], ATTACKS)
    rows = tuple(
        _learning_row(study, [r for r in victims if r.key["attack"] == a], every) for a in attacks
    )
    headers = split_headers(
        "attack | steps | poisoned images an epoch | learned | exposures until learned | final "
        "ASR (%) | CDA against clean (points) | share of the target class poisoned | loss on "
        "poisoned images"
    )
    note = (
        f"Learned: attack success of at least {percent(LEARNED, digits=0)} on held-out images at "
        "the end of an epoch. Exposures: poisoned images seen by then, repetitions included. The "
        "share of the target class is that of a clean-label attack, which poisons no other "
        "class. The loss is the cross-entropy to the target on held-out images with the trigger "
        "alone, after the first and after the last epoch. One seed: the difference comes with "
        "its 95 % interval, paired by image; more: mean ± sample standard deviation."
    )
    title = "How each backdoor was learned"
    title += "" if corruptions == "plain" else " by victims trained under corruptions"
    return Table(f"learning-{corruptions}", title, headers, rows, note)


def _learning_row(
    study: StudyRecords, victims: Sequence[Record], every: Sequence[Number]
) -> tuple[str, ...]:
    attack, corruptions = victims[0].key["attack"], victims[0].key["corruptions"]

    def values(measure: str) -> list[float]:
        return select(every, measure, attack=attack)

    def mean(measure: str, **how: Any) -> str:
        return plus_minus(spread(values(measure)), **how)

    rates = study.select(kind="rates", attack=attack, corruptions=corruptions)
    gaps = [r.values["cda_gap"]["none"] for r in rates if r.values.get("cda_gap")]
    learned = values("exposures")
    losses = [spread(values(f"poison_loss_{when}")) for when in ("first", "last")]
    return (
        attack_title(str(attack)),
        count_range(map(int, values("steps"))),
        count_range(map(int, values("poisoned"))),
        f"{len(learned)} of {len(victims)}",
        count_range(map(int, learned)) if learned else "not learned",
        mean("asr", factor=100, digits=1),
        # One seed has no spread, but an interval of its own.
        points(gaps[0]) if len(gaps) == 1 else mean("cda_gap", factor=100, digits=1, sign=True),
        mean("poisoned_of_target", digits=2),
        " to ".join(f"{loss.mean:.2f}" for loss in losses if loss is not None) or ABSENT,
    )


def _miss(study: StudyRecords, victim: Record) -> list[tuple[str, ...]]:
    """A line for a victim that was measured and missed; those that were not are in Table 1."""
    rates = study.select(kind="rates", **victim.key)
    if not rates or "none" not in rates[0].values["corruptions"]:
        return []
    asr = rates[0].values["corruptions"]["none"]["asr"]
    gap = (rates[0].values.get("cda_gap") or {}).get("none")
    parts = []
    if asr < LEARNED:
        parts.append(f"ASR {percent(asr)}, below {percent(LEARNED, digits=0)}")
    if gap and gap["value"] < -ALLOWED_LOSS:
        parts.append(f"CDA {points(gap)} points against the clean victim")
    if not parts:
        return []
    title = attack_title(str(victim.key["attack"]))
    return [(title, str(victim.key["seed"]), "; ".join(parts), _causes(victim.values))]


def _causes(victim: Mapping[str, Any]) -> str:
    """What a record says about the cause, as far as it says anything."""
    learned, losses = victim["learned"], poison_losses(victim)
    parts = [
        f"{victim['steps']} steps",
        "at 90 % in no epoch"
        if learned is None
        else f"at 90 % in epoch {learned['epoch']}, after {learned['exposures']} exposures",
    ]
    if (share := victim.get("poisoned_of_target")) is not None:
        parts.append(f"clean-label, {percent(share)} of the target class poisoned")
    if losses:
        parts.append(f"loss on poisoned images {losses[0]:.2f} to {losses[-1]:.2f}")
    return "; ".join(parts)
