"""The paper's Table 2 with our figures in it: accuracy and attack success after cleaning."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from wm_eval.attacks.render import Page
from wm_eval.attacks.spread import plus_minus
from wm_eval.paper2.cells import method_title, number, page, spread, where
from wm_eval.paper2.config import FINE_TUNING
from wm_eval.paper2.paper import ATTACK, NETWORKS, PAPER_TABLE2, PaperCleaning
from wm_eval.paper2.summary import Cleaning, DetectRecords
from wm_eval.tables import Table

_NOTE = (
    "After cleaning with a share of the training images: unlearning the reversed triggers of the "
    "labels that the scan named, and as many steps of fine-tuning on the clean images alone. n: "
    "models that were cleaned; where the scan named nothing there is nothing to unlearn. Mean ± "
    "sample standard deviation; in brackets what the paper prints."
)


def cleaning_page(experiments: Sequence[DetectRecords]) -> Page:
    """Table 2: accuracy and attack success after cleaning, with reversed triggers and without.

    Args:
        experiments: One or more folders' records.
    """
    rows, numbers = [], []
    for one in experiments:
        ways = {(key.attack, key.share, key.method) for key in one.cleanings}
        for attack, share, method in sorted(ways, key=_cleaning_order):
            mine = _cleaned(one, attack, share, method)
            rows.append(_cleaning_row(one, attack, share, method, mine))
            numbers += [
                number(one, attack, f"{rate}-after", f"{method}-{share:g}", key.seed, value)
                for key, values in mine.items()
                if values["done"]
                for rate, value in (
                    ("cda", values["after"]["cda"]),
                    ("asr", values["after"]["asr"]),
                )
            ]
    headers = (
        "data",
        "network",
        "attack",
        "clean images",
        "method",
        "ACC before",
        "ACC after",
        "ASR before",
        "ASR after",
        "n",
    )
    table = Table("cleaning", "Mitigation", headers, tuple(rows), _NOTE)
    title = "Mitigation (reverse-generator paper, Table 2)"
    return page("cleaning", title, experiments, table, numbers)


def _cleaned(
    one: DetectRecords, attack: str, share: float, method: str
) -> dict[Cleaning, Mapping[str, Any]]:
    wanted = (attack, share, method)
    return {
        key: values
        for key, values in sorted(one.cleanings.items())
        if (key.attack, key.share, key.method) == wanted
    }


def _cleaning_row(
    one: DetectRecords,
    attack: str,
    share: float,
    method: str,
    mine: Mapping[Cleaning, Mapping[str, Any]],
) -> tuple[str, ...]:
    done = {key: values for key, values in mine.items() if values["done"]}
    before = [one.victims[attack, key.seed] for key in done if (attack, key.seed) in one.victims]
    after = [values["after"] for values in done.values()]
    paper = _printed(one, attack, share, method)
    cells = []
    for rate, printed in (("cda", paper and paper.acc), ("asr", paper and paper.asr)):
        cells.append(plus_minus(spread(v[rate] for v in before), factor=100))
        text = plus_minus(spread(v[rate] for v in after), factor=100)
        cells.append(text if printed is None else f"{text} ({printed:.2f})")
    return (
        *where(one, attack),
        f"{100 * share:g} %",
        method_title(method),
        *cells,
        str(len(done)) if len(done) == len(mine) else f"{len(done)} of {len(mine)}",
    )


def _printed(one: DetectRecords, attack: str, share: float, method: str) -> PaperCleaning | None:
    if attack != ATTACK or NETWORKS.get(one.name) != one.model:
        return None
    return PAPER_TABLE2.get((one.name, share, method))


def _cleaning_order(way: tuple[str, float, str]) -> tuple[str, float, int, str]:
    attack, share, method = way
    return attack, share, 0 if method == FINE_TUNING else 1, method


__all__ = ["cleaning_page"]
