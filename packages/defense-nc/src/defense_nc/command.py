"""The sub-commands ``scan`` and ``clean`` of a defence that reverses triggers."""

from __future__ import annotations

import argparse
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from defense_nc.config import check_rule
from wm_inject.command.common import (
    EXIT_NOT_SCANNED,
    CommandLine,
    Parser,
    add_json,
    resolve_device,
    write_results,
)
from wm_inject.command.config import (
    add_config,
    add_options,
    add_preset,
    print_config,
    read_settings,
)
from wm_inject.command.folders import say
from wm_inject.command.values import output_file, output_folder, within

if TYPE_CHECKING:
    from torch import nn

    from defense_nc.verdict import ScanReport
    from wm_victim import Dataset, ImageSet
    from wm_victim.models import Classifier

_LABEL = within(int, "[0, inf)")
IMAGES = 500  # that a scan uses where so many are there; verdicts are calibrated for them


@dataclass(frozen=True)
class ScanSettings:
    """Settings of ``scan``, as its options describe them.

    Raises:
        ValueError: A value outside its range.
    """

    scan: Any
    images: int | None = None
    alpha: float = 0.05
    max_ratio: float = 0.5
    filter_rate: float = 0.01
    seed: int = 0

    def __post_init__(self) -> None:
        _check(self)
        if not 0 < self.filter_rate < 1:
            raise ValueError(f"expected filter_rate in (0, 1), got {self.filter_rate}")


@dataclass(frozen=True)
class CleanSettings:
    """Settings of ``clean``, as its options describe them.

    Raises:
        ValueError: A value outside its range.
    """

    scan: Any
    unlearning: Any
    images: int | None = None
    clean_images: int | None = None
    max_loss: float = 0.05
    alpha: float = 0.05
    max_ratio: float = 0.5
    seed: int = 0

    def __post_init__(self) -> None:
        _check(self)
        if self.clean_images is not None and self.clean_images < 2:
            raise ValueError(f"expected clean_images >= 2, got {self.clean_images}")
        if not 0 < self.max_loss <= 1:
            raise ValueError(f"expected max_loss in (0, 1], got {self.max_loss}")


def _check(settings: ScanSettings | CleanSettings) -> None:
    check_rule(settings.alpha, settings.max_ratio)
    if settings.images is not None and settings.images < 1:
        raise ValueError(f"expected images >= 1, got {settings.images}")


@dataclass(frozen=True)
class Defence:
    """A defence's sub-commands, and what differs between defences.

    Args:
        config: Class of the search settings.
        presets: Names of its presets; "fast" is the default.
        detector: Search settings, alpha and max_ratio in, the detector's ``scan`` out.
        reversed_name: What it reverses, for the printed lines.
        recipe: The preset of `Unlearning` that ``clean`` starts from.
        clean_fraction: Fraction of the training set that ``clean`` uses; the scanned images if
            None.
        save: Saves a reversed trigger, for --triggers; None leaves that option out.
        invert: Reverses the trigger of one label, for --force; None leaves that option out.
    """

    config: Any
    presets: tuple[str, ...]
    detector: Callable[[Any, float, float], Callable[..., ScanReport]]
    reversed_name: str
    recipe: str
    clean_fraction: float | None = None
    save: Callable[[Any, Path, dict[str, Any]], None] | None = None
    invert: Callable[..., nn.Module] | None = None

    def add_to(self, command: CommandLine) -> None:
        """Add ``scan`` and ``clean`` (also ``unlearn``, the papers' word) to a command."""
        scan = command.add("scan", self._scan, "is there a backdoor?", exit_error=EXIT_NOT_SCANNED)
        self._add_inputs(scan, ScanSettings)
        scan.add_argument(
            "--checkpoint",
            type=output_file,
            help="keep the state here, and go on from it after a stop",
        )
        scan.add_argument(
            "--filter",
            type=output_file,
            metavar="OUT.onnx",
            help="write a filter for incoming images that act like triggers of a label",
        )
        text = "fraction of clean images that the filter may flag"
        add_options(scan, ScanSettings, {"filter_rate": text})
        text = "of --filter and --reversed (default: of those that stand out, the smallest p-value)"
        scan.add_argument("--label", type=_LABEL, help=text)
        scan.add_argument(
            "--reversed",
            type=output_file,
            metavar="OUT.onnx",
            help=f"write that label's reversed {self.reversed_name}",
        )
        if self.save is not None:
            text = f"also write the reversed {self.reversed_name}s to this folder"
            scan.add_argument("--triggers", type=output_folder, help=text)
        add_config(scan)
        clean = command.add(
            "clean", self._clean, "clean labels that stand out in a scan", aliases=["unlearn"]
        )
        self._add_inputs(clean, CleanSettings)
        text = "clean this label, whatever the scan says (default: all that stand out)"
        clean.add_argument("--label", type=_LABEL, help=text)
        if self.invert is not None:
            text = "clean --label without a scan"
            clean.add_argument("--force", action="store_true", help=text)
        default = "those of the scan"
        if self.clean_fraction is not None:
            default = f"{self.clean_fraction * 100:g} %% of the training set"
        helps = {
            "clean_images": f"images to clean with (default: {default})",
            "max_loss": "write nothing if more of the accuracy is lost",
        }
        add_options(clean, CleanSettings, helps)
        recipes = ("nc", "paper", "reverse")
        text = f"of unlearning (default: {self.recipe})"
        add_preset(clean, "--recipe", table="unlearning", choices=recipes, help=text)
        text = "the cleaned classifier's file"
        clean.add_argument("--out", type=output_file, required=True, help=text)
        add_config(clean)

    def _add_inputs(self, parser: Parser, settings: type) -> None:
        parser.add_argument(
            "classifier",
            type=Path,
            metavar="CLASSIFIER",
            help="a file that `wm-victim train` wrote",
        )
        parser.add_argument(
            "--data",
            required=True,
            help="clean images: digits, mnist, fashion-mnist, cifar10, gtsrb, a folder, or an .npz",
        )
        parser.add_argument("--root", type=Path, help="where named sets lie (default: WM_DATA)")
        text = "of the search (default: fast, whose verdicts are calibrated)"
        add_preset(parser, "--preset", table="scan", choices=self.presets, help=text)
        helps = {
            "images": f"images to scan with (default: {IMAGES}, or all that there are)",
            "alpha": "false-positive rate of the verdict",
            "max_ratio": "accuse only below this fraction of the median",
        }
        add_options(parser, settings, helps)
        add_json(parser)

    def _scan(self, args: argparse.Namespace) -> int:
        settings = read_settings(args, ScanSettings(self.config.preset("fast")))
        if args.print_config:
            return print_config(settings)
        model, data, images = _open_inputs(args, settings)
        report = self._report(settings, model, images, checkpoint=args.checkpoint)
        metadata = {
            "classifier": args.classifier.name,
            "data": data.name,
            "preset": settings.scan.name,
            "fingerprint": data.fingerprint,
        }
        write_results(args, report.to_dict() | metadata)
        if self.save is not None and args.triggers is not None:
            for label, trigger in report.triggers.items():
                self.save(trigger, args.triggers / f"label-{label}.safetensors", metadata)
        self._export(args, settings, report, model, images)
        return report.verdict.exit_code

    def _report(
        self,
        settings: ScanSettings | CleanSettings,
        model: nn.Module,
        images: ImageSet,
        **more: Any,
    ) -> ScanReport:
        scan = self.detector(settings.scan, settings.alpha, settings.max_ratio)
        report = scan(model, images.images, labels=images.labels, seed=settings.seed, **more)
        print(report_table(report))
        return report

    def _export(
        self,
        args: argparse.Namespace,
        settings: ScanSettings,
        report: ScanReport,
        model: Classifier,
        images: ImageSet,
    ) -> None:
        """Write --filter and --reversed, for --label or the outlier with the smallest p-value."""
        from defense_nc.input_filters.discriminant_filter import DiscriminantFilter
        from defense_nc.input_filters.export import export_filter
        from wm_inject import to_onnx

        if args.filter is None and args.reversed is None:
            return
        labels = report.suspected if args.label is None else (args.label,)
        if not labels:
            print("no file for services: no label stands out (--label names one)")
            return
        label = min(labels, key=lambda label: report.labels[label].p_value)
        trigger, example = report.triggers[label], images.images[:8]
        if args.reversed is not None:
            to_onnx(trigger.cpu(), example, args.reversed, uint8=True)
            print(f"wrote {args.reversed}: the reversed {self.reversed_name} of label {label}")
        if args.filter is None:
            return
        try:
            input_filter = DiscriminantFilter(false_positive_rate=settings.filter_rate).calibrate(
                model, images.images, triggers={label: trigger}, seed=settings.seed
            )
            export_filter(input_filter, example, args.filter)
        except (ValueError, RuntimeError) as error:  # does not change the verdict
            print(f"no filter: {error}")
        else:
            print(f"wrote {args.filter}: flags images that act like triggers of label {label}")

    def _clean(self, args: argparse.Namespace) -> int:
        from defense_nc.mitigations.unlearning import Unlearning
        from wm_victim import defender_subset, save_classifier

        start = CleanSettings(self.config.preset("fast"), Unlearning.preset(self.recipe))
        settings = read_settings(args, start)
        if args.print_config:
            return print_config(settings)
        forced = self.invert is not None and args.force
        if forced and args.label is None:
            args.parser.error("expected --label with --force")
        model, data, images = _open_inputs(args, settings)
        report = None if forced else self._report(settings, model, images)
        triggers = self._triggers(args, settings, model, images, report)
        count, fraction = settings.clean_images, self.clean_fraction
        if count is None and fraction is not None:
            count = max(2, int(len(data.train) * fraction))
        if count is not None:
            subset = defender_subset(data.train, count=count, seed=settings.seed)
            images = subset.to(images.images.device)
        cleaned: nn.Module = model
        for label, trigger in triggers.items():
            cleaned = settings.unlearning.repair(
                cleaned,
                images.images,
                images.labels,
                triggers={label: trigger},
                seed=settings.seed,
                progress=True,
            ).model
        metadata = {
            "cleaned": sorted(triggers),
            "images": len(images),
            "seed": settings.seed,
            "fingerprint": data.fingerprint,
        }
        results = {"scan": None if report is None else report.to_dict(), **metadata}
        recipe = asdict(settings.unlearning)
        results |= {"recipe": recipe} | self._measure(
            (model, cleaned), triggers, data, settings.max_loss
        )
        save_classifier(
            cleaned, args.out, _metadata(args.classifier) | metadata | {"unlearning": recipe}
        )
        write_results(args, results)
        print(f"wrote {args.out}")
        return 0

    def _triggers(
        self,
        args: argparse.Namespace,
        settings: CleanSettings,
        model: nn.Module,
        images: ImageSet,
        report: ScanReport | None,
    ) -> dict[int, nn.Module]:
        """The reversed triggers of --label, or of all labels that the scan names."""
        if report is None:
            assert self.invert is not None
            trigger = self.invert(
                model,
                images.images,
                args.label,
                labels=images.labels,
                config=settings.scan,
                seed=settings.seed,
                progress=True,
            )
            return {args.label: trigger}
        labels = report.suspected if args.label is None else (args.label,)
        if not labels:
            raise ValueError(
                f"not cleaned: no label stands out (--label names one), the verdict is "
                f"{report.verdict}: {report.reason}"
            )
        for label in labels:
            if not report.labels[label].converged:
                rate = report.labels[label].success_rate
                raise ValueError(
                    f"not cleaned: the reversed {self.reversed_name} of label {label} reaches it "
                    f"for {rate:.0%} of the images only"
                )
        return {label: report.triggers[label].to(images.images.device) for label in labels}

    def _measure(
        self,
        models: tuple[nn.Module, nn.Module],
        triggers: Mapping[int, nn.Module],
        data: Dataset,
        max_loss: float,
    ) -> dict[str, Any]:
        """Accuracy, answers and triggers before and after, on images that were not cleaned with.

        Raises:
            ValueError: A model that lost more than ``max_loss`` of its accuracy or its answers.
        """
        from defense_nc.mitigations import repair_cost
        from wm_victim import attack_success
        from wm_victim.inference import predict

        test = data.test.to(next(models[0].parameters()).device)
        before, after = (predict(model, test.images).argmax(1) for model in models)
        cost = repair_cost(before, after, test.labels)
        print(cost)
        success = {}
        for label, trigger in triggers.items():
            success[label] = [attack_success(m, test, trigger, target=label) for m in models]
            change = "{:.4f} -> {:.4f}".format(*success[label])
            print(f"reversed {self.reversed_name} of label {label}: success {change}")
        if not cost.within(max_loss):
            raise ValueError(
                f"not cleaned: it would cost more than --max-loss {max_loss:g} ({cost})"
            )
        return {
            "accuracy": cost.accuracy,
            "same_answers": cost.agreement,
            "held_out": cost.images,
            "success": success,
        }


def _open_inputs(
    args: argparse.Namespace, settings: ScanSettings | CleanSettings
) -> tuple[Classifier, Dataset, ImageSet]:
    """The classifier, its data, and the defender's images; model and images on the device.

    Labels are numbered as the classifier numbers them.
    """
    from wm_victim import defender_subset, load_classifier, load_dataset
    from wm_victim.reading import Way, read_model

    device = resolve_device(args.device)
    model = load_classifier(args.classifier)
    channels, classes = model.config["channels"], model.config["num_classes"]
    label = getattr(args, "label", None)
    if label is not None and label >= classes:
        raise ValueError(f"expected --label in 0 .. {classes - 1}, got {label}")
    data = load_dataset(
        args.data, root=args.root, image_size=model.config["image_size"], skip_unreadable=True
    )
    say([] if data.source is None else data.source.lines())
    if data.channels != channels:
        raise ValueError(
            f"expected data with {channels} channels, as the classifier was trained on, got "
            f"{data.channels} in {data.name}"
        )
    count = min(IMAGES, len(data.train)) if settings.images is None else settings.images
    images = defender_subset(data.train, count=count, seed=settings.seed)
    reading = read_model(
        model,
        images.images,
        images.labels,
        num_classes=classes,
        classes=data.classes,
        output_names=_metadata(args.classifier).get("classes"),
        ways=(Way(),),
    )
    say([f"the classifier answers {reading.accuracy or 0:.1%} of {len(images)} images as labelled"])
    label_map = reading.label_map
    if label_map is not None and any(a != b for a, b in label_map.outputs.items()):
        say([f"labels are matched to its outputs: {label_map.describe(data.classes)}"])
        train, test, images = (
            replace(part, labels=label_map.apply(part.labels))
            for part in (data.train, data.test, images)
        )
        data = replace(data, train=train, test=test)
    return model.to(device), data, images.to(device)


def _metadata(classifier: Path) -> dict[str, Any]:
    """What a classifier's file says of its data and training."""
    from wm_inject.core.checkpoint import load_checkpoint

    return dict(load_checkpoint(classifier, kind="classifier").metadata or {})


def report_table(report: ScanReport) -> str:
    """A scan for the terminal: a line a label, both rules, the verdict and its reason."""
    lines = ["label     score  ratio  success        p  paper index"]
    for row in report.labels:
        named = " <- suspected" if row.label in report.suspected else ""
        missed = "" if row.converged else " (not reached)"
        lines.append(
            f"{row.label:5d} {row.score:9.4g} {row.ratio:6.2f} {row.success_rate:8.3f} "
            f"{row.p_value:8.2g} {row.paper_index:12.2f}{named}{missed}"
        )
    flagged = ", ".join(map(str, report.paper_flagged)) or "none"
    named = ", ".join(map(str, report.suspected)) or "none"
    return "\n".join(
        [
            *lines,
            f"default rule: p {report.p_value:.2g} (alpha {report.alpha:g}), suspected: {named}",
            f"paper's rule: index {report.paper_index:.2f}, with the lower median "
            f"{report.paper_index_low:.2f}; flagged (> 2): {flagged}",
            *(f"note: {note}" for note in report.notes),
            f"verdict: {report.verdict}. {report.reason}",
        ]
    )
