"""The options of the commands that consist of many independent stages: where these run."""

from __future__ import annotations

import argparse

from wm_eval.executors import HERE, Executor
from wm_eval.local_processes import LocalProcesses
from wm_eval.ray_tasks import LOCAL, RayTasks


def add_executor(parser: argparse.ArgumentParser) -> None:
    """Give a parser ``--workers``, ``--ray`` and ``--gpus-per-task``."""
    group = parser.add_argument_group("where stages run")
    where = group.add_mutually_exclusive_group()
    where.add_argument(
        "--workers",
        type=int,
        default=1,
        metavar="N",
        help="on so many processes of one thread each (default: 1, this process)",
    )
    where.add_argument(
        "--ray",
        nargs="?",
        const=LOCAL,
        metavar="ADDRESS",
        help="as Ray tasks, on the cluster at ADDRESS or on this machine (needs ray)",
    )
    group.add_argument(
        "--gpus-per-task",
        type=float,
        metavar="SHARE",
        help="of a GPU for each Ray task, as 0.25 (default: 1 with --device cuda, else 0)",
    )


def chosen_executor(given: argparse.Namespace, *, device: str) -> Executor:
    """The executor that the options ask for.

    Args:
        given: What `add_executor` parsed.
        device: Where stages compute, "cpu" or a cuda device.

    Raises:
        ValueError: Fewer workers than 1, a share of a GPU that is none or that is not for Ray, or
            Ray tasks that compute on a GPU and are given none.
    """
    share = given.gpus_per_task
    if given.ray is None:
        if share is not None:
            raise ValueError("expected --gpus-per-task together with --ray")
        # An impossible count is refused there.
        return HERE if given.workers == 1 else LocalProcesses(given.workers)
    on_gpu = device != "cpu"
    share = float(on_gpu) if share is None else share
    if on_gpu and not share > 0:
        raise ValueError(f"expected --gpus-per-task above 0 with --device cuda, got {share:g}")
    return RayTasks(given.ray, share)


__all__ = ["add_executor", "chosen_executor"]
