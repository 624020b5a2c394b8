"""Write docs/weights.md, the model card, from the records and the cards of what ships.

Run ``python tools/render_weights.py`` after weights were trained; a test holds the page to them.
"""

from __future__ import annotations

import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from wm_eval.records import StudyRecords, read_study
from wm_eval.render import ABSENT, Table, percent, split_headers, to_markdown
from wm_eval.titles import CLEAN, SHIPPED, detector_title
from wm_extract import PAPER_CORRUPTIONS
from wm_extract.unet import WEIGHTS
from wm_inject import PRETRAINED, pretrained_card
from wm_inject.command.common import run_cli
from wm_inject.core.files import write_text
from wm_inject.watermark.pretrained import FOLDER

_VARIED = "varied-32"
_RATES = ("cda", "asr", "ftr")
_STORED = ("stealth", "stealth_jpeg")
_KNOWN = {"pairs": "pairs", "blind": "apart"}
_SHOWN = {"pairs": (1, 100, 5000), "blind": (100, 5000)}
ROOT = Path(__file__).resolve().parents[1]
RECORDS, PAGE = ROOT / "results" / "weights", ROOT / "docs" / "weights.md"
AVERAGING = ROOT / "results" / "averaging"
ABLATION = ROOT / "results" / "ablation-injector"
VICTIMS = {
    "marks-cifar10": "CIFAR-10, airbench at half its width",
    "marks-cifar10-5-percent": "the same, fewer images",
    "p1-imagenet10-224": "ten ImageNet classes, 224 x 224, EfficientNet-Lite0 fine-tuned",
}
HEAD = """# Ready-made weights

Injectors that are trained already ship in the wheel of wm-inject, and the extractor of each in that
of wm-extract. Nothing is downloaded.

```sh
wm-inject poison --pretrained photo-64 photos/ poisoned/    # every picture marked, at its own size
wm-extract detect poisoned/ --pretrained photo-64           # which pictures carry the mark?
wm-inject export --uint8 --pretrained tiny-32 mark.onnx     # for services that run without torch
wm-extract export --uint8 --pretrained tiny-32 find.onnx    # its detector, threshold and all
wm-eval demo --pretrained                                   # the demo, without its first training
```

```python
from wm_extract import MarkDetector, UNetExtractor
from wm_inject import PRETRAINED, ViTInjector, WatermarkTrigger, pretrained_card

trigger = WatermarkTrigger.from_pretrained("small-32")  # injector and watermark: poisons a batch
detector = MarkDetector.from_pretrained("small-32")  # extractor, watermark and threshold
injector = ViTInjector.from_pretrained("tiny-32")  # the networks alone
extractor = UNetExtractor.from_pretrained("tiny-32")
print(PRETRAINED, pretrained_card("tiny-32")["figures"])
```

All hide the watermark that ships, a ring around a cross (`default_watermark(32)`). One pair's
extractor reads the marks of its own injector.

## Before you use them

- **They come from research-use images.** CIFAR-10 is published for research without a licence that
  says more; ImageNet, of which `tiny-64` and `photo-64` saw ten classes, is given out for
  non-commercial research and education; MNIST is commonly given as CC BY-SA 3.0. No image is in the
  wheels. Use the weights for research, teaching and audits that you are entitled to; for a product,
  train your own with `wm-extract train` on images you have the rights to.
- **They are public.** Whoever has this package can find, and make, the same mark. That is right for
  studying defences and wrong for anything that has to stay secret.
- [Responsible use](responsible-use.md) applies: mark what you own or were asked to audit.
- The networks of each know one size, 32 or 64 pixels a side. Pictures of other sizes are marked by
  a change that is made on a shrunken copy and enlarged ([below](#photographs-at-their-own-size)).
  Images of another kind than those below may be marked less well, so measure (`wm-inject stealth`,
  `wm-extract detect`) before you rely on it.
- **Most marks hardly depend on the image** ([below](#what-averaging-takes-and-forges)). Some 98 %
  of the change's energy is the same for all images, and whoever holds one marked image with its
  original, or a hundred marked images and a hundred clean ones of other pictures, can take the mark
  away or forge it. The changes of `varied-32` differ: the mean of many neither takes it away nor
  forges it. The change of a single image still does, on most others. No mark here is a protection
  against an adversary.
- **`tiny-32` or `small-32`?** The small one has nine times the weights and is as visible. On
  photographs like those that both were trained on it is found a little more often; on traffic
  signs, and after JPEG and cropping, which neither was trained for, less often. When in doubt,
  take `tiny-32`.
"""
TAIL = """## How they were made

`python tools/train_weights.py --out runs/weights NAME` trains, rounds to 16 bits, chooses the
threshold and measures; `--ship` puts the files and their cards into the packages, and
`python tools/render_weights.py` writes this page. It runs on a CPU, where the same seed gives the
same weights. The recipe is `JointConfig.preset("robust")` of wm-extract with the steps and floor
above ([recipes](recipes.md)); no labels are used. The threshold is chosen on more training images,
which training has not seen. `tiny-32` is the pair of the
[CIFAR-10 study](../results/cifar10/records.jsonl): the same images, settings and seed.

A small injector learns at 0.4 of a tiny one's rate. At the same rate it drives the tanh that limits
its change far beyond its range, where nothing more can be learned; such a pair was found in 82.6 %
of CIFAR-10's test images after 2,500 steps, and in none after 5,000
([records](../results/weights/records.jsonl), `attempt`).

Which of several trainings of `tiny-32` ships was decided after figures on test images had been seen
(one that also learned GTSRB was found less often), so that they may flatter a little. The rate and
the steps of `small-32` were chosen on training images that were kept back. A variant that also held
the tanh back was then measured on the same test images, found as often, and dropped as the less
simple one. `tiny-64` was tried at 38 dB, where every kept image was found, and then trained at 40;
it saw CIFAR-10 enlarged and ImageNet reduced to 64 pixels. `photo-64` goes on from it with crops
among the corruptions; trainings of 40.5 to 41 dB that had grey pictures among the
corruptions or a change in luminance alone had not learned within 400 steps, and were stopped.
`varied-32` goes on from `tiny-32` with a loss on the squared cosine between the changes of two
images, and one that wants nothing read from an image with the mean of the others' changes. A loss
that wants nothing read with a single other one's change ended the mark within 750 steps, without
the first of the two. Weights, steps and corruptions were chosen after four other trainings, two of
them judged on test images and two on training images that were kept back.

Every figure is of test images that neither training nor threshold saw (the first 2,000 of a set,
or all), with the weights as they ship. "Found" is the share of marked images that the detector with
its own threshold takes for marked; "taken" is the share of unmarked images that it takes for
marked, both after the corruption. A set that a pair was not trained on carries a star.

The loader compares each file with the SHA-256 of its card (`weights/cards.json` in the package) and
refuses another one. The figures are in the card too: `pretrained_card("tiny-32")`. Records:
[results/weights](../results/weights/records.jsonl).
"""


def pairs_table(cards: Mapping[str, Mapping[str, Any]]) -> Table:
    """What there is: networks, data, sizes."""
    rows = [
        (
            f"`{name}`",
            f"{'grey' if card['channels'] == 1 else 'RGB'}, {card['image_size']} px",
            f"{card['injector_parameters']:,} + {card['extractor_parameters']:,}",
            ", ".join(f"{part['images']:,} of {part['name']}" for part in card["data"]),
            f"{card['iterations']:,}",
            f"{card['psnr_floor']:g} dB",
            f"{(FOLDER / f'{name}.safetensors').stat().st_size / 1e6:.1f} + "
            f"{(WEIGHTS / f'{name}.safetensors').stat().st_size / 1e6:.1f} MB",
        )
        for name, card in cards.items()
    ]
    headers = split_headers(
        "name | images | parameters (injector + extractor) | training images | steps | PSNR floor "
        "| files"
    )
    return Table("pairs", "What there is", headers, tuple(rows), "")


def stealth_table(study: StudyRecords) -> Table:
    """How visible the marks are."""
    rows = []
    for name, test, v in measured(study):
        stealth = v["stealth"]
        lpips = f"{stealth['lpips']['mean']:.4f}" if stealth["lpips"] else ABSENT
        rows.append(
            (
                f"`{name}`",
                test,
                f"{v['n']:,}",
                f"{stealth['psnr']['mean']:.2f}",
                f"{stealth['psnr']['p05']:.2f}",
                f"{stealth['ssim']['mean']:.4f}",
                lpips,
                f"{255 * stealth['linf']['mean']:.1f}",
                percent(v["common"]),
            )
        )
    headers = split_headers(
        "pair | test images | n | PSNR | 5th percentile | SSIM | LPIPS | largest change | in common"
    )
    note = (
        "Means over 8-bit images; PSNR in dB, the largest change in steps of 255. In common: how "
        "much of the change's energy is the same for all images."
    )
    return Table("stealth", "How visible they are", headers, tuple(rows), note)


def found_table(study: StudyRecords) -> Table:
    """How surely the mark is found, and how often it is seen where it is not."""
    names: tuple[str, ...] = ()
    rows = []
    for name, test, v in measured(study):
        names = tuple(v["corruptions"])
        cells = (
            f"{percent(row['true_positives'] / v['n'])} / "
            f"{percent(row['false_positives'] / v['n'], digits=2)}"
            for row in v["corruptions"].values()
        )
        rows.append((f"`{name}`", test, *cells))
    note = (
        "Found / taken: marked and unmarked images that the detector calls marked. Its threshold "
        "aims at 0.10 % of unmarked images without a corruption."
    )
    return Table(
        "found", "How surely they are found", ("pair", "test images", *names), tuple(rows), note
    )


def photographs_table(study: StudyRecords) -> Table:
    """The same on whole photographs that the mark was laid over."""
    names: tuple[str, ...] = ()
    rows = []
    for name in PRETRAINED:
        for record in study.select(kind="photographs", weights=name):
            v = record.values
            names = tuple(v["corruptions"])
            figures = [v[kind][part]["mean"] for kind in _STORED for part in ("psnr", "ssim")]
            cells = (
                f"{percent(row['true_positives'] / v['n'])} / "
                f"{percent(row['false_positives'] / v['n'], digits=2)}"
                for row in v["corruptions"].values()
            )
            visible = (f"{figures[0]:.2f}, {figures[1]:.4f}", f"{figures[2]:.2f}, {figures[3]:.4f}")
            size = " x ".join(map(str, v["size"]))
            rows.append((f"`{name}`", f"{v['n']} of {v['test']}, {size}", *visible, *cells))
    headers = ("pair", "test images", "PSNR, SSIM", "as JPEG 95", *names)
    note = (
        "PSNR in dB and SSIM at full size, without loss and as the JPEG files that `wm-inject "
        "poison` writes. Found / taken as above; half and double size with a filter at random of "
        "box, bilinear, Hamming, bicubic and Lanczos; crop-90: 90 % of width and of height, "
        "anywhere; screenshot: re-scaled by 0.5 to 2, a rim of 5 % cut off, JPEG 85."
    )
    return Table("photographs", "Photographs at their own size", headers, tuple(rows), note)


def averaging_table() -> Table:
    """What is left of a mark, and what can be forged, by averaging."""
    headers: list[str] = []
    rows = []
    for record in read_study(AVERAGING).select(kind="averaging"):
        v = record.values
        attacks = {
            f"{title}, {row['known']:,}": _attacked(row)
            for kind, title in _KNOWN.items()
            for row in v[kind]
            if row["known"] in _SHOWN[kind]
        }
        headers = list(attacks)
        alike = v["dependence"]
        shares = (percent(alike["universal"]), percent(alike["leading"]))
        rows.append((f"`{record.key['weights']}`", *shares, percent(v["found"]), *attacks.values()))
    note = (
        "The share of the change's energy that is the same in all images (unbiased), and in eight "
        "directions. Then marked images that are still found after the mean of so many others' "
        "changes was taken off / unmarked ones that are taken for marked after it was added, of "
        "1,000 test images of CIFAR-10. Pairs: the attacker has the originals of marked images; "
        "apart: clean images of other pictures (`python tools/measure_averaging.py`)."
    )
    columns = ("pair", "in common", "in 8 directions", "found untouched", *headers)
    return Table("averaging", "What averaging takes and forges", columns, tuple(rows), note)


def _attacked(row: Mapping[str, Any]) -> str:
    return f"{percent(row['found'])} / {percent(row['forged'])}"


def varied_table(study: StudyRecords) -> Table:
    """What each part of the recipe for a mark of each image's own is worth."""
    ships = values_of(study, "measure", _VARIED)["tests"]["cifar10"]
    (averaging,) = read_study(AVERAGING).select(kind="averaging", weights=_VARIED)
    rows = [_varied_row(f"`{_VARIED}`", ships, averaging.values)]
    for record in read_study(ABLATION).select(kind="varied"):
        values = record.values
        rows.append(_varied_row(str(record.key["variant"]), values, values["averaging"]))
    headers = split_headers(
        "recipe | in common | found untouched | worst of the paper's corruptions | JPEG | crop | "
        "most taken | pairs, 1 | apart, 5,000"
    )
    note = (
        f"Pairs that differ from the recipe of `{_VARIED}` in one thing, one seed each, on 2,000 "
        "test images of CIFAR-10. Most taken: unmarked images that are taken for marked, under the "
        "corruption that has most of them. The last two columns: found / forged by averaging, as "
        "above. `python tools/ablate_varied.py` makes them."
    )
    return Table("varied", "What image dependence costs", headers, tuple(rows), note)


def _varied_row(
    name: str, values: Mapping[str, Any], averaging: Mapping[str, Any]
) -> tuple[str, ...]:
    n, corruptions = values["n"], values["corruptions"]
    under = {kind: row["true_positives"] / n for kind, row in corruptions.items()}
    taken = max(row["false_positives"] / n for row in corruptions.values())
    worst = min(PAPER_CORRUPTIONS, key=under.__getitem__)
    attacks = {(kind, row["known"]): row for kind in _KNOWN for row in averaging[kind]}
    most = max(known for _, known in attacks)
    return (
        name,
        percent(averaging["dependence"]["universal"]),
        percent(under["none"]),
        f"{percent(under[worst])} ({worst})",
        *(percent(under[kind]) for kind in ("jpeg", "crop")),
        percent(taken, digits=2),
        *(_attacked(attacks[key]) for key in (("pairs", 1), ("blind", most))),
    )


def attack_table() -> Table:
    """What victims learn of them, and what detectors see of that."""
    rows = []
    for folder, victims in VICTIMS.items():
        if not (ROOT / "results" / folder).exists():
            continue
        study = read_study(ROOT / "results" / folder)
        for attack, name in SHIPPED.items():
            for record in study.select(kind="rates", attack=attack):
                key = {"seed": record.key["seed"], "corruptions": record.key["corruptions"]}
                (clean,) = study.select(kind="rates", attack=CLEAN, **key)
                (victim,) = study.select(kind="victim", attack=attack, **key)
                rates = record.values["corruptions"]["none"]
                said = [
                    f"{detector_title(str(scan.key['detector']))}: {_said(scan.values)}"
                    for scan in study.select(kind="scan", attack=attack, **key)
                ]
                shares = (clean.values["corruptions"]["none"]["cda"], *(rates[k] for k in _RATES))
                count = f"{victim.values['poisoned']:,}"
                cells = (count, *map(percent, shares), "; ".join(said) or ABSENT)
                rows.append((f"`{name}`", victims, *cells))
    headers = split_headers(
        "pair | victims | poisoned images | clean accuracy, clean victim | clean accuracy | ASR | "
        "without the mark | what detectors say"
    )
    note = (
        "One victim each; a tenth of its training images was marked and labelled as the target, or "
        "as many as the table says. ASR: marked test images of other classes that get that label. "
        "The whole tables: [Spy-Watermark](../results/spy-watermark.md). `photo-64` was trained on "
        "photographs that its victims saw."
    )
    return Table("attack", "In the attack", headers, tuple(rows), note)


def _said(values: Mapping[str, Any]) -> str:
    if not values["suspected"]:
        return str(values["verdict"])
    labels = (f"label {label}" for label in values["suspected"])
    return f"{values['verdict']}, {' and '.join(labels)} (planted: {values['true_target']})"


def bits_table(study: StudyRecords) -> Table:
    """How much of the watermark is read back."""
    names: tuple[str, ...] = ()
    rows = []
    for name, test, v in measured(study):
        names = tuple(v["corruptions"])
        cells = (percent(row["bits"]) for row in v["corruptions"].values())
        rows.append((f"`{name}`", test, *cells))
    note = "Balanced bit accuracy on marked images; a constant output scores 50 %."
    return Table(
        "bits", "How much is read back", ("pair", "test images", *names), tuple(rows), note
    )


def measured(study: StudyRecords) -> list[tuple[str, str, Mapping[str, Any]]]:
    """Pair, set and figures, one row each; a star where the pair was not trained on the set."""
    rows = []
    for name in PRETRAINED:
        known = {part["name"] for part in pretrained_card(name)["data"]}
        for test, values in values_of(study, "measure", name)["tests"].items():
            rows.append((name, test if test in known else f"{test} *", values))
    return rows


def values_of(study: StudyRecords, kind: str, name: str) -> Mapping[str, Any]:
    """The values of the record of the weights that ship, not of earlier attempts."""
    records = study.select(kind=kind, weights=name)
    return next(record.values for record in records if "attempt" not in record.key)


def render() -> str:
    """The page for the weights that ship."""
    study = read_study(RECORDS)
    cards = {name: pretrained_card(name) for name in PRETRAINED}
    tables = (
        pairs_table(cards),
        stealth_table(study),
        found_table(study),
        photographs_table(study),
        averaging_table(),
        varied_table(study),
        attack_table(),
        bits_table(study),
    )
    digests = [
        f"{values_of(study, 'pack', name)['files'][f'packed/{part}/{name}.safetensors']}  "
        f"{package}/weights/{name}.safetensors"
        for name in PRETRAINED
        for package, part in (("wm_inject", "trigger"), ("wm_extract", "detector"))
    ]
    parts = [HEAD, *(to_markdown(table)[1:] for table in tables)]  # one level up
    parts += [TAIL, "## SHA-256", "", "```", *digests, "```", ""]
    return "\n".join(parts)


def _main(argv: Sequence[str] | None) -> int:
    write_text(PAGE, render())
    return 0


if __name__ == "__main__":
    sys.exit(run_cli(_main))
