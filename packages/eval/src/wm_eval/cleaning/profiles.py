"""The cleanings that ship: every number of them stands here, and nowhere else."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

from defense_nc import NCConfig
from defense_reverse import ReverseConfig
from wm_eval.attacks.config import CLEAN
from wm_eval.attacks.profiles import attack_profile
from wm_eval.cleaning.config import CleaningConfig
from wm_inject.attacks import PROFILES, Profile
from wm_victim.datasets import MIRROR_CHANGES_LABEL


def cleaning_profile(
    profile: Profile = "small", data: str = "cifar10", **changes: Any
) -> CleaningConfig:
    """What is cleaned and how, by profile and data set, with changes.

    The victims are those of the attack study of the same name, `attack_profile`.

    Args:
        profile: "tiny" (a look at all of it), "small" (settings that a CPU can afford) or "paper"
            (the papers' settings, for a GPU).
        data: "cifar10", "gtsrb", "imagenet10", "mnist", "digits", or the path of a folder or .npz.
        changes: Fields of `CleaningConfig` to set otherwise, or ``attacks`` and ``seeds`` of its
            study.

    Raises:
        ValueError: No such profile, or changes that do not fit.
    """
    if profile not in PROFILES:
        raise ValueError(f"expected a profile in {', '.join(PROFILES)}, got {profile!r}")
    numbers = _NUMBERS[profile](data)
    study: dict[str, Any] = {"attacks": (CLEAN, *numbers.pop("attacks"))}
    study |= {name: changes.pop(name) for name in ("attacks", "seeds") if name in changes}
    numbers["study"] = replace(attack_profile(profile, data), **study)
    try:
        return CleaningConfig(**{**numbers, **changes})
    except TypeError as error:
        raise ValueError(f"expected fields of CleaningConfig: {error}") from error


def _tiny(data: str) -> dict[str, Any]:
    return {
        "attacks": ("badnets",),
        "shares": (0.1,),  # of a thousand digits, 5 % are five images a class
        "steps": 60,
        "images": 100,
        "nc": NCConfig.preset("fast", steps=30),
        "reverse": ReverseConfig.preset("fast", steps=60),
    }


def _small(data: str) -> dict[str, Any]:
    numbers: dict[str, Any] = {
        "attacks": ("badnets", "wanet"),
        # Ten passes, as in the reverse-generator paper, over 5 % of the images, twice each.
        "steps": 625 if data == "cifar10" else 400,
        "nc": NCConfig.preset("fast"),
        "reverse": ReverseConfig.preset("fast"),
    }
    if data == "mnist":
        # The paper's own victim: unlearning at the paper's rate, a tenth of ours.
        settings = {"unlearning-reverse": {"preset": "paper"}}
        numbers |= {"attacks": ("wanet",), "settings": settings}
    return numbers


def _paper(data: str) -> dict[str, Any]:
    settings: dict[str, dict[str, Any]] = {}
    if data in MIRROR_CHANGES_LABEL:
        mirrored = ("fine-tuning", "nad", "fine-pruning", "ft-sam")
        settings = {name: {"augmentation": "crop"} for name in mirrored}
    return {
        "attacks": ("badnets", "wanet"),
        "steps": 1000,
        "preset": "paper",
        "settings": settings,
        "nc": NCConfig.preset("robust"),
        "reverse": ReverseConfig.preset("robust"),
    }


_NUMBERS = {"tiny": _tiny, "small": _small, "paper": _paper}

__all__ = ["cleaning_profile"]
