"""``wm-eval graph``: branches of an ONNX graph that pictures can steer, in words."""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from dataclasses import asdict, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from wm_eval.audit.budget import OutOfTime
from wm_eval.audit.open_options import add_graph_options, check_open_options
from wm_inject.command.common import EXIT_NOT_SCANNED, CommandLine, add_json, write_results
from wm_inject.command.values import output_file
from wm_inject.core.errors import error_line
from wm_inject.core.image_size import describe_size

if TYPE_CHECKING:
    from defense_nc import Verdict
    from wm_eval.audit.conclusion import Audit
    from wm_inject.core.images import Pixels
    from wm_victim.branches import Branch, GraphReport

_EPILOG = """\
examples:
  wm-eval graph model.onnx --images clean/ --json graph.json
  wm-eval graph model.onnx --picture fires.png

The exit code is the verdict: 0 nothing found, 1 backdoored (a small change of pictures fires a
branch, and the branch decides the answer), 2 inconclusive (a branch that could not be fired, or
only by replacing most of a picture), 3 not looked at, 64 wrong usage. Backdoors inside trained
weights are no branches: "wm-eval scan" looks for those. The file is read and run in a sandbox.
"""
_SIZE, _COUNT = 256, 32  # of the clean pictures, before the graph's own size is known
_MOST = 12  # operators on the terminal; all are in the JSON
_STATES = {
    "steers": "a small change of pictures fires it, and then it decides the answer",
    "fired": "it fires, but most of a picture has to be replaced, or few answers change",
    "preparation": "other pictures are prepared in another way, before the first layer",
    "harmless": "it fires, and no answer changes",
    "not fired": "it looks like a branch, and nothing that was tried fires it",
}


def add_graph(command: CommandLine) -> None:
    """Add ``graph``."""
    parser = command.add(
        "graph",
        _graph,
        "can pictures steer an ONNX graph past its trained layers? a verdict as the exit code",
        epilog=_EPILOG,
        exit_error=EXIT_NOT_SCANNED,
    )
    parser.add_argument("model", type=Path, metavar="MODEL.onnx", help="an ONNX file")
    parser.add_argument(
        "--images", type=Path, help="folder of clean images (default: random discs)"
    )
    add_graph_options(parser)
    add_json(parser, "write the whole report here as JSON")
    parser.add_argument(
        "--picture", type=output_file, help="write a picture that fires the first branch here (PNG)"
    )


def _graph(args: argparse.Namespace) -> int:
    check_open_options(args)
    try:
        report = look(args, None if args.images is None else clean_pixels(args.images))
    except Exception as error:
        reason = error_line(error)
        write_results(args, {"verdict": "not-scanned", "exit_code": 3, "reason": reason})
        raise
    verdict, reason = judge(report)
    print("\n".join([*report_lines(report), f"verdict: {verdict}. {reason}"]))
    picture = next((one.picture for one in report.branches if one.picture is not None), None)
    if args.picture is not None and picture is not None:
        _write_picture(args.picture, picture)
    write_results(args, to_json(report) | {"verdict": verdict, "exit_code": verdict.exit_code})
    return verdict.exit_code


def look(args: argparse.Namespace, images: Pixels | None) -> GraphReport:
    """`wm_victim.branches.look_at_graph` with the options of a command."""
    from wm_victim.branches import look_at_graph

    return look_at_graph(
        args.model,
        images,
        image_size=args.image_size,
        channels=args.channels,
        num_classes=args.classes,
        mean=args.mean,
        std=args.std,
    )


def clean_pixels(folder: Path) -> Pixels:
    """Some clean pictures of a folder, uint8 ``(N, 256, 256, 3)``.

    Raises:
        ValueError: As `wm_eval.audit.images.read_clean`.
    """
    from wm_eval.audit.images import read_clean
    from wm_inject import to_pixels

    return to_pixels(read_clean(folder, size=_SIZE, channels=3, count=_COUNT).images)


def judge(report: GraphReport) -> tuple[Verdict, str]:
    """The verdict on a graph, and why, in a sentence."""
    from defense_nc import Verdict

    if report.steering:
        one = report.steering[0]
        effect = one.effect
        assert effect is not None
        return Verdict.BACKDOORED, (
            f"A branch past the trained layers decides the answer: from "
            f"{(one.decides or one.operators)[-1]} to {one.joins[-1]}. A change of {one.share:.2%} "
            f"of the pixels ({one.stamp}) fires it on {effect.fired} of {effect.tried} clean "
            f"pictures; {effect.steered} of them get another label, {effect.label_count} of these "
            f"label {effect.label}, and none of these where the branch is held at rest."
        )
    if report.unclear:
        return Verdict.INCONCLUSIVE, (
            f"{len(report.unclear)} branches that may steer the answer were not shown to do so by "
            "a small change of pictures."
        )
    return Verdict.CLEAN, (
        "No branch past the trained layers was found that pictures can steer. A backdoor inside "
        "the weights is not looked for here."
    )


def report_lines(report: GraphReport) -> list[str]:
    """What was looked at, and every branch, for people."""
    source = "clean" if report.own_images else "made-up"
    lines = [
        f"{report.layers} trained layers, {report.nodes} nodes, "
        f"{describe_size(report.image_size)} pixels, {report.channels} channels; "
        f"{report.images} {source} pictures",
        *(f"note: {note}" for note in report.notes),
    ]
    for number, branch in enumerate(report.branches, 1):
        lines += [f"branch {number}: {_STATES[branch.state]}", *_branch_lines(branch)]
    return lines


def _branch_lines(branch: Branch) -> list[str]:
    lines = [
        f"  reads: {_some(branch.reads)}",
        f"  operators: {_some(branch.operators)}",
        f"  decides: {_some(branch.decides) or 'no single operator'}",
        f"  passes {branch.layers} of {branch.all_layers} trained layers",
        f"  joins: {_some(branch.joins)}, on the way to output {branch.output!r}",
        *(f"  {side}" for side in branch.sides),
        f"  clean pictures that take it: {branch.clean_taken} of {branch.clean}",
    ]
    effect = branch.effect
    if effect is None:
        return [*lines, f"  not searched for: {branch.why}"] if branch.why else lines
    where = ""
    if branch.box:
        top, bottom, left, right = branch.box
        where = f", in rows {top} to {bottom} and columns {left} to {right}"
    return [
        *lines,
        f"  fired by: {branch.stamp}; {branch.share:.2%} of the pixels{where}",
        f"  fires on {effect.fired} of {effect.tried} clean pictures with it; {effect.steered} get "
        f"another label, {effect.label_count} of them label {effect.label}; with the branch held "
        "at rest they do not",
        f"  moved by hand, without any change of the picture: {effect.forced} of {effect.tried} "
        "labels change",
    ]


def _some(names: Sequence[str]) -> str:
    more = f" and {len(names) - _MOST} more" if len(names) > _MOST else ""
    return ", ".join(names[:_MOST]) + more


def to_json(report: GraphReport) -> dict[str, Any]:
    """Everything but the pictures, ready for JSON."""
    branches = [
        asdict(replace(branch, picture=None)) | {"meaning": _STATES[branch.state]}
        for branch in report.branches
    ]
    facts = {
        name: getattr(report, name)
        for name in ("sha256", "layers", "nodes", "images", "own_images", "image_size", "channels")
    }
    return {
        "format": "wm-graph-1",
        **facts,
        "notes": list(report.notes),
        "reason": judge(report)[1],
        "branches": branches,
    }


def _write_picture(path: Path, pixels: Pixels) -> None:
    from PIL import Image

    from wm_inject.core.files import atomic_path

    with atomic_path(path) as part:
        Image.fromarray(pixels.squeeze()).save(part, format="PNG")


def look_before_scan(args: argparse.Namespace) -> GraphReport | None:
    """The graph of a model that is to be scanned; None for other files, or where it cannot be run.

    What is wrong with the file or the images is said by the scan itself.
    """
    from wm_victim.loading.file_formats import file_format

    try:
        with args.model.open("rb") as file:
            if file_format(file.read(512)) in ("safetensors", "zip", "legacy"):
                return None
        return look(args, clean_pixels(args.images))
    except OutOfTime:
        raise
    except (ValueError, OSError, RuntimeError):
        return None


def with_graph(audit: Audit, report: GraphReport | None) -> Audit:
    """The audit of a model whose graph was looked at: a branch that steers decides."""
    from defense_nc import Verdict

    if report is None or not report.steering:
        return audit
    reason = f"{judge(report)[1]} {audit.reason}"
    return replace(audit, verdict=Verdict.BACKDOORED, reason=reason)
