"""What mitigations leave of backdoors and what they cost, beside what the paper prints."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from itertools import product
from typing import Any

from wm_eval import paper
from wm_eval.numbers import Number, keys, named, numbers, planned, reason, spread
from wm_eval.pages.attacks import about
from wm_eval.pages.detection import (
    data_name,
    images_line,
    missing,
    network,
    victim_rates,
    where,
)
from wm_eval.records import Key, Record, StudyRecords
from wm_eval.render import (
    ABSENT,
    Page,
    Table,
    count_range,
    label_list,
    plus_minus,
    points,
    split_headers,
    with_interval,
)
from wm_eval.titles import (
    ATTACKS,
    CLEAN,
    METHODS,
    NOT_REPAIRED,
    attack_title,
    detector_title,
    in_order,
    method_title,
)

_MEASURES = ("cda_before", "cda", "asr_before", "asr", "der")
_NOTE = (
    "ACC: clean test images classified correctly, in percent. ASR: test images of other classes "
    "than the target that get the target label with the trigger in them, stored in 8 bits. DER: "
    "(loss of ASR - loss of ACC + 1) / 2, losses below zero counted as zero; 0.5 is what doing "
    "nothing earns. Where a scan named nothing, nothing was cleaned, and the figures are those of "
    'the victim; rows with the "oracle label" clean it all the same, with the true target\'s '
    "reversed trigger, which a defender could not know."
)
_CLEAN_NOTE = (
    "What each method costs where there is nothing to remove, in points of accuracy. Methods that "
    "wait for a verdict leave a model alone that their scan finds clean; rows with the "
    '"oracle label" unlearn the trigger of the label that stood out most.'
)
_MEAN_NOTE = "Means over the victims of all attacks, those that were not cleaned among them."
_SEVERAL = 3  # attacks, from which on a mean says something
_NEVER = "none: the clean victim"
_AGAIN = (
    "After fine-tuning of the cleaned network on the defender's clean images and so many poisoned "
    "training images with the label that the attack gives them. The clean victim, which never "
    "had the backdoor, says what so few images teach anew: a backdoor that comes back with fewer "
    "was hidden, not removed."
)
_PAPER_NOTE = (
    "After cleaning with a fraction of the training images: unlearning the reversed triggers of "
    "the labels that the scan named, and as many steps of fine-tuning on the clean images alone. "
    "n: models that were cleaned; where the scan named nothing there is nothing to unlearn. Mean "
    "± sample standard deviation; in brackets what the paper prints."
)


def mitigation_page(study: StudyRecords) -> Page:
    """Attacks by methods, the cost on clean models, and every mitigation one by one."""
    tables = [_across(study), _overview(study), _costs(study), _reactivations(study)]
    tables += [_scans(study), _rescans(study), _details(study), _missing(study)]
    title = "What mitigations leave of a backdoor, and what they cost"
    seeds = sorted({*planned(study, "seeds"), *keys(study, "mitigation", "seed")})
    every = tuple(n for n in numbers(study) if n.measure in _MEASURES and "method" in n.key)
    shown = tuple(table for table in tables if table.rows)
    return Page("mitigation", title, about(study, seeds), shown, every)


def paper_page(study: StudyRecords) -> Page:
    """Accuracy and attack success after mitigation, with reversed triggers and without.

    Source: Zheng, Hua and Zhang, Table 2.
    """
    rows, printed = [], []
    data, (model, _) = data_name(study), network(study)
    ways = {
        (str(r.key["attack"]), float(r.key["fraction"]), str(r.key["method"]))
        for r in study.select(kind="mitigation")
        if "lr" not in r.key and r.key["attack"] != CLEAN
    }
    order = list(METHODS)
    for attack, fraction, method in sorted(ways, key=lambda w: (w[0], w[1], order.index(w[2]))):
        same = attack == paper.DEFENCE_ATTACK and paper.MITIGATION_NETWORKS.get(data) == model
        row = paper.MITIGATION.get((data, fraction, method)) if same else None
        rows.append(_paper_row(study, attack, fraction, method, row))
        if row is not None:
            key: Key = {"attack": attack, "method": method, "fraction": fraction}
            printed += [
                Number(measure, key, round(value / 100, 4), "paper")
                for measure, value in (("cda", row.acc), ("asr", row.asr))
            ]
    headers = split_headers(
        "data | network | attack | clean images | method | ACC before | ACC after | ASR before | "
        "ASR after | n"
    )
    tables = [Table("mitigation-paper", "Mitigation", headers, tuple(rows), _PAPER_NOTE)]
    tables += missing(study, "mitigation-paper")
    every = (*(n for n in numbers(study) if n.measure in _MEASURES and "method" in n.key), *printed)
    title = "Mitigation (reverse-generator paper, Table 2)"
    return Page("mitigation-paper", title, images_line(study), tuple(tables), every)


def _of(
    study: StudyRecords, attack: str, method: str, oracle: bool, fraction: float | None = None
) -> list[Record]:
    key = {} if fraction is None else {"fraction": fraction}
    records = study.select(kind="mitigation", attack=attack, method=method, **key)
    same = [r for r in records if bool(r.key.get("oracle_label")) == oracle and "lr" not in r.key]
    return sorted(same, key=lambda r: r.key["seed"])


def _names(study: StudyRecords, name: str, order: Iterable[str]) -> list[str]:
    plan = {"attack": "attacks", "method": "mitigations"}[name]
    return in_order({*keys(study, "mitigation", name), *planned(study, plan)} - {CLEAN}, order)


def _fractions(study: StudyRecords) -> list[float]:
    return sorted({*keys(study, "mitigation", "fraction"), *planned(study, "fractions")})


def _rows(study: StudyRecords) -> Iterator[tuple[str, str, bool]]:
    for attack in _names(study, "attack", ATTACKS):
        for method in _names(study, "method", METHODS):
            yield attack, method, False
            yield attack, method, True


def _overview(study: StudyRecords) -> Table:
    rows = []
    for attack, method, oracle in _rows(study):
        records = _of(study, attack, method, oracle)
        if not records:
            continue
        title = method_title(method, oracle_label=oracle)
        cells = [attack_title(attack), title, _cleaned(records)]
        cells += [_percent(_before(records, measure)) for measure in ("cda", "asr")]
        for fraction in _fractions(study):
            part = _of(study, attack, method, oracle, fraction)
            cells += [_percent(r.values["after"][m] for r in part) for m in ("cda", "asr")]
            cells.append(plus_minus(spread(r.values["der"] for r in part), digits=3))
        cells.append(count_range(r.values["steps"] for r in records if r.values["done"]))
        rows.append((*cells, _seed_count(records)))
    columns = [f"{m}, {100 * f:g} %" for f in _fractions(study) for m in ("ACC", "ASR", "DER")]
    headers = ("attack", "method", "cleaned", "ACC before", "ASR before", *columns)
    title = "Backdoored models, by share of clean data"
    return Table("mitigation", title, (*headers, "steps", "seeds"), tuple(rows), _NOTE)


def _across(study: StudyRecords) -> Table:
    """Each method over all victims that it was records on, where they are of several attacks."""
    rows = []
    for method in _names(study, "method", METHODS):
        for fraction in _fractions(study):
            records = [
                record
                for attack in _names(study, "attack", ATTACKS)
                for record in _of(study, attack, method, False, fraction)
            ]
            attacks = {str(r.key["attack"]) for r in records}
            if len(attacks) < _SEVERAL:
                continue
            cells = [method_title(method), f"{100 * fraction:g} %", str(len(attacks))]
            asr = [float(r.values["after"]["asr"]) for r in records]
            lost = [r.values["after"]["cda"] - r.values["before"]["cda"] for r in records]
            cells += [_cleaned(records), f"{100 * sum(lost) / len(lost):+.1f}"]
            cells += [f"{100 * rate:.1f}" for rate in (sum(asr) / len(asr), max(asr))]
            cells.append(f"{sum(r.values['der'] for r in records) / len(records):.3f}")
            rows.append(tuple(cells))
    headers = split_headers(
        "method | clean data | attacks | cleaned | mean change of ACC | mean ASR | highest ASR | "
        "mean DER"
    )
    return Table("mitigation-across", "All attacks together", headers, tuple(rows), _MEAN_NOTE)


def _costs(study: StudyRecords) -> Table:
    """What each method does to clean models."""
    rows = []
    for method in _names(study, "method", METHODS):
        for oracle in (False, True):
            records = _of(study, CLEAN, method, oracle)
            if not records:
                continue
            cells = [method_title(method, oracle_label=oracle), _cleaned(records)]
            cells.append(_percent(_before(records, "cda")))
            for fraction in _fractions(study):
                part = _of(study, CLEAN, method, oracle, fraction)
                changes = spread(r.values["cda_change"]["value"] for r in part)
                cells.append(_percent(r.values["after"]["cda"] for r in part))
                cells.append(plus_minus(changes, factor=100, digits=1, sign=True))
            rows.append((*cells, _seed_count(records)))
    columns = [f"{what}, {100 * f:g} %" for f in _fractions(study) for what in ("ACC", "change")]
    headers = ("method", "cleaned", "ACC before", *columns, "seeds")
    return Table("mitigation-clean", "Clean models", headers, tuple(rows), _CLEAN_NOTE)


def _sorted(study: StudyRecords, kind: str) -> list[Record]:
    """Records of one kind by attack, the clean victims first."""
    order = [CLEAN, *_names(study, "attack", ATTACKS)]
    records = [r for r in study.select(kind=kind) if r.key["attack"] in order]
    return sorted(records, key=lambda r: (order.index(str(r.key["attack"])), r.key["seed"]))


def _scans(study: StudyRecords) -> Table:
    rows = tuple(
        (
            attack_title(str(r.key["attack"])),
            detector_title(str(r.key["detector"])),
            str(r.key["seed"]),
            r.values["verdict"],
            label_list(named(r.values)),
            ABSENT if r.key["attack"] == CLEAN else str(r.values["true_target"]),
            r.values.get("reason", ""),
        )
        for r in _sorted(study, "scan")
    )
    headers = ("victim", "scan", "seed", "verdict", "labels named", "true target", "reason")
    return Table("mitigation-scans", "What the scans said", headers, rows)


def _rescans(study: StudyRecords) -> Table:
    records = _sorted(study, "rescan")
    rows = tuple(
        (
            attack_title(str(r.key["attack"])),
            method_title(str(r.key["method"])),
            f"{100 * float(r.key['fraction']):g} %",
            str(r.key["seed"]),
            f"{r.values['verdict_before']} ({label_list(r.values['named_before'])})",
            f"{r.values['verdict']} ({label_list(named(r.values))})",
            "yes" if r.values["agrees"] else "no",
        )
        for r in records
    )
    headers = ("victim", "method", "clean data", "seed", "before", "after", "agrees")
    note = (
        f"{sum(r.values['agrees'] for r in records)} of {len(records)} cleaned models are found "
        "clean by the scan that had named a label in them."
    )
    return Table("mitigation-rescans", "Scanned again after cleaning", headers, rows, note)


def _reactivations(study: StudyRecords) -> Table:
    """How few poisoned images bring a backdoor back that was removed."""
    records = study.select(kind="reactivation")
    counts = sorted({row["poisoned"] for r in records for row in r.values["rows"]})
    attacks, methods = _names(study, "attack", ATTACKS), [NOT_REPAIRED, *METHODS]

    def place(record: Record) -> tuple[int, int, float, int]:
        attack, method = (str(record.key[name]) for name in ("attack", "method"))
        fraction, seed = float(record.key["fraction"]), int(record.key["seed"])
        return attacks.index(attack), methods.index(method), fraction, seed

    rows = []
    for r in sorted(records, key=place):
        attack, method = str(r.key["attack"]), str(r.key["method"])
        fraction, seed = float(r.key["fraction"]), r.key["seed"]
        cells = [attack_title(attack), _NEVER, f"{100 * fraction:g} %", ABSENT]
        if method != NOT_REPAIRED:
            repaired = _of(study, attack, method, False, fraction)
            before = [one.values["after"]["asr"] for one in repaired if one.key["seed"] == seed]
            cells[1], cells[3] = method_title(method), _percent(before)
        after = {row["poisoned"]: row["asr"] for row in r.values["rows"]}
        cells += [_percent([after[count]] if count in after else []) for count in counts]
        rows.append((*cells, str(r.values["steps"]), str(seed)))
    headers = ("attack", "method", "clean data", "ASR", *(f"ASR, {n:,}" for n in counts))
    title = "How few poisoned images bring it back"
    return Table("mitigation-reactivation", title, (*headers, "steps", "seed"), tuple(rows), _AGAIN)


def _details(study: StudyRecords) -> Table:
    rows = tuple(
        _detail(record)
        for attack in (CLEAN, *_names(study, "attack", ATTACKS))
        for method in _names(study, "method", METHODS)
        for oracle in (False, True)
        for record in _of(study, attack, method, oracle)
    )
    head = ("victim", "method", "clean data", "seed", "images", "labels", "ACC after")
    headers = (*head, "change of ACC, points", "ASR after", "change of ASR, points", "DER")
    note = (
        "Rates with Wilson's 95 % intervals; changes with intervals for pairs, since both models "
        "see the same images. The rating's interval takes the worst and best corner of both."
    )
    return Table("mitigation-details", "Every cleaning", headers, rows, note)


def _detail(record: Record) -> tuple[str, ...]:
    key, values = record.key, record.values
    head = (
        attack_title(str(key["attack"])),
        method_title(str(key["method"]), oracle_label=bool(key.get("oracle_label"))),
        f"{100 * float(key['fraction']):g} %",
        str(key["seed"]),
        str(values["n_images"]),
        label_list(values["labels"]),
    )
    if not values["done"]:
        return (*head, "not cleaned", *(ABSENT,) * 4)
    after = values["after"]
    cells = (with_interval(after["cda"], after["cda_interval"]), _change(values.get("cda_change")))
    if key["attack"] == CLEAN:
        return (*head, *cells, *(ABSENT,) * 3)
    rating = ABSENT if values.get("der") is None else f"{values['der']:.3f}"
    if values.get("der_interval"):
        low, high = values["der_interval"]
        rating += f" ({low:.3f} to {high:.3f})"
    asr = with_interval(after["asr"], after["asr_interval"])
    return (*head, *cells, asr, _change(values.get("asr_change")), rating)


def _change(difference: Mapping[str, Any] | None) -> str:
    return ABSENT if difference is None else points(difference)


def _missing(study: StudyRecords) -> Table:
    """What was planned and has no record, and why."""
    rows = []
    names = ("attacks", "mitigations", "fractions", "seeds")
    for record in study.select(kind="study"):
        plan = record.values.get("planned", {})
        for attack, method, fraction, seed in product(*(plan.get(name, ()) for name in names)):
            if seed in {r.key["seed"] for r in _of(study, attack, method, False, fraction)}:
                continue
            key = {"attack": attack, "method": method, "fraction": fraction, "seed": seed}
            why = reason(study, ("mitigation", "scan", "rates", "victim", "images"), key)
            titles = (attack_title(attack), method_title(method))
            rows.append((*titles, f"{100 * fraction:g} %", str(seed), why))
    headers = ("victim", "method", "clean data", "seed", "reason")
    return Table("mitigation-missing", "What is missing, and why", headers, tuple(rows))


def _paper_row(
    study: StudyRecords, attack: str, fraction: float, method: str, printed: paper.Mitigated | None
) -> tuple[str, ...]:
    records = _of(study, attack, method, False, fraction)
    done = [r for r in records if r.values["done"]]
    rates = victim_rates(study, attack)
    before = [rates[int(r.key["seed"])] for r in done if int(r.key["seed"]) in rates]
    cells = []
    for measure, value in (("cda", printed and printed.acc), ("asr", printed and printed.asr)):
        cells.append(plus_minus(spread(v[measure] for v in before), factor=100))
        text = plus_minus(spread(r.values["after"][measure] for r in done), factor=100)
        cells.append(text if value is None else f"{text} ({value:.2f})")
    count = str(len(done)) if len(done) == len(records) else f"{len(done)} of {len(records)}"
    head = (*where(study, attack), f"{100 * fraction:g} %", method_title(method))
    return (*head, *cells, count)


def _cleaned(records: Sequence[Record]) -> str:
    return f"{sum(r.values['done'] for r in records)} of {len(records)}"


def _before(records: Sequence[Record], measure: str) -> list[float]:
    """A victim's rate before, once for each seed."""
    return list({r.key["seed"]: r.values["before"][measure] for r in records}.values())


def _percent(values: Iterable[float]) -> str:
    return plus_minus(spread(values), factor=100, digits=1)


def _seed_count(records: Sequence[Record]) -> str:
    return str(len({r.key["seed"] for r in records}))
