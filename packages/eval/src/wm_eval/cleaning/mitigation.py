"""The reverse-generator paper's table of mitigation, with our figures beside its own."""

from __future__ import annotations

from collections.abc import Sequence

from wm_eval.attacks.render import Page
from wm_eval.attacks.spread import counted, plus_minus
from wm_eval.cleaning.gather import CleaningRecords, Figure, about, figures, spread
from wm_eval.cleaning.paper import PAPER_ATTACK, PAPER_TABLE2
from wm_eval.tables import ABSENT, Table


def mitigation_page(study: CleaningRecords) -> Page:
    """Fine-tuning without and with reversed images, in the paper's rows, beside its figures.

    Source: Zheng, Hua and Zhang, Table 2.
    """
    listed = mitigation_figures(study, figures(study))
    rows = []
    for share in sorted({n.share for n in listed}):
        for source, forced in (("measured", False), ("measured, forced", True), ("paper", False)):
            mine = [
                n
                for n in listed
                if n.share == share
                and n.source == source.partition(",")[0]
                and (n.forced == forced or n.method == "control")
            ]
            if not any(n.method == "unlearning-reverse" for n in mine):
                continue
            cells, seeds = [], set[int]()
            for method in ("control", "unlearning-reverse"):
                for measure in ("acc", "asr"):
                    values = [n.value for n in mine if (n.method, n.measure) == (method, measure)]
                    seeds.add(len(values))
                    cells.append(plus_minus(spread(values), factor=100, digits=2))
            many = ABSENT if source == "paper" else counted(seeds)
            rows.append((f"{100 * share:g} %", source, *cells, many))
    headers = ("clean data", "source", "ACC without", "ASR without", "ACC with", "ASR with")
    note = (
        "Without: fine-tuning by the same settings. With: a reversed image beside each clean one. "
        "The paper trains for ten epochs, so its rows with reversed images take twice the "
        'steps of those without; ours take the same. "Forced": the true target\'s generator, '
        "where the scan did not name it."
    )
    table = Table("mitigation", "WaNet, in percent", (*headers, "seeds"), tuple(rows), note)
    title = "Mitigation with different shares of clean data (reverse-generator paper, Table 2)"
    return Page("mitigation", title, about(study), (table,), (), study.about["name"])


def mitigation_figures(study: CleaningRecords, numbers: Sequence[Figure]) -> tuple[Figure, ...]:
    """The figures of `mitigation_page`: ours, and the paper's as fractions."""
    ours = [
        n
        for n in numbers
        if n.attack == PAPER_ATTACK
        and n.method in ("control", "unlearning-reverse")
        and n.measure in ("acc", "asr")
    ]
    paper = []
    for share, row in PAPER_TABLE2.get(study.about["name"], {}).items():
        for method, acc, asr in (
            ("control", row.acc_without, row.asr_without),
            ("unlearning-reverse", row.acc_with, row.asr_with),
        ):
            place = (PAPER_ATTACK, method, False, share)
            paper += [
                Figure(*place, measure, "paper", None, round(value / 100, 4))
                for measure, value in (("acc", acc), ("asr", asr))
            ]
    return (*ours, *paper)


__all__ = ["mitigation_figures", "mitigation_page"]
