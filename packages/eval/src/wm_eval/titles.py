"""What tables call attacks, detectors, mitigations, data sets and networks, in their order."""

from __future__ import annotations

from collections.abc import Iterable
from typing import TYPE_CHECKING

from wm_eval import paper
from wm_inject import PRETRAINED
from wm_inject.attacks import ATTACKS as definitions
from wm_inject.attacks import list_attacks

if TYPE_CHECKING:
    from wm_inject.core.plan import LabelMap

CLEAN = "clean"  # the attack of a clean victim
NOT_REPAIRED = "clean-victim"  # in the place of a mitigation: a victim without the backdoor
SHIPPED = {f"watermark-{name}": name for name in PRETRAINED}  # attacks by their weights
# Attacks by trigger and label map, where that is not the trigger's own.
MAPPED: dict[str, tuple[str, LabelMap]] = {
    f"{trigger}-{label_map}": (trigger, label_map)
    for label_map in ("all-to-all", "source-specific")
    for trigger in ("badnets", "blend")
}
# Attacks by trigger, of an attacker who trains against the detectors of an audit.
ADAPTIVE = {f"{trigger}-adaptive": trigger for trigger in ("badnets", "blend")}
EVERY_LABEL = ("marksman",)  # attacks with a trigger for each label
# In the order of the tables.
ATTACKS = (*list_attacks(), "watermark", *SHIPPED, "equation2", *MAPPED, *ADAPTIVE, CLEAN)
_OTHERS = {"equation2": "Plain blend, equation 2", CLEAN: "No attack (clean victim)"}
PAPERS = ("nc", "reverse")  # the detectors of the two papers
AUDIT = ("head", "uap", "sweep", "warp")  # those of an audit, if none are named: cheap at any size
CALIBRATED = (*PAPERS, *AUDIT, "pairs")  # the detectors whose verdicts have a calibrated error rate
DETECTORS = {
    "nc": "Neural Cleanse",
    "reverse": "Reverse generators",
    "reverse-lpips": "Reverse generators with LPIPS",
    "feature-re": "FeatureRE",
    "bti-dbf": "BTI-DBF",
    "uap": "Universal perturbations",
    "sweep": "Patch sweep",
    "head": "Head weights",
    "pairs": "Pair perturbations",
    "warp": "Universal warps",
    "mm-bd": "Maximum margins",
}
# First those that use what a scan found, with their control; then those that need no scan.
METHODS = {
    "control": "Fine-tuning by unlearning's settings",
    "control-nc": "Fine-tuning by the settings of unlearning with Neural Cleanse",
    "unlearning-nc": "Unlearning, Neural Cleanse",
    "unlearning-reverse": "Unlearning, reverse generators",
    "unlearning-reverse-lpips": "Unlearning, reverse generators with LPIPS",
    "unlearning-uap": "Unlearning, universal perturbations",
    "unlearning-warp": "Unlearning, universal warps",
    "unlearning-audit": "Unlearning, an audit's detectors together",
    "head-unlearning": "Unlearning in the last layer",
    "neuron-pruning": "Neuron pruning, Neural Cleanse",
    "fine-tuning": "Fine-tuning",
    "nad": "NAD",
    "fine-pruning": "Fine-pruning",
    "anp": "ANP",
    "i-bau": "I-BAU",
    "ft-sam": "FT-SAM",
    "clp": "Channel-Lipschitz pruning",
    "fst": "Feature-shift tuning",
}
DATA = {"mnist": "MNIST", "cifar10": "CIFAR-10", "gtsrb": "GTSRB"}
NETWORKS = {
    "wanet-mnist": "3 ConvBlocks + fcs",
    "preactresnet18": "PreActResNet-18",
    "preactresnet10": "PreActResNet-10",
    "resnet18": "ResNet-18",
    "resnet10": "ResNet-10",
    "vgg16": "VGG16",
    "mobilenetv2": "MobileNetV2",
}


def attack_title(name: str) -> str:
    """What tables call an attack, and whether the attack paper has it."""
    if name in SHIPPED:
        return f"Watermark, weights {SHIPPED[name]} (not in the paper)"
    if name in MAPPED:
        trigger, label_map = MAPPED[name]
        return f"{definitions[trigger].title} {label_map} (not in the paper)"
    if name in ADAPTIVE:
        return f"{definitions[ADAPTIVE[name]].title} by an adaptive attacker (not in the paper)"
    if name not in (*definitions, *_OTHERS):
        return name
    title = _OTHERS[name] if name in _OTHERS else definitions[name].title
    printed = name == CLEAN or any(attack == name for _, attack, _ in paper.RATES)
    return title if printed else f"{title} (not in the paper)"


def short_attack_title(name: str) -> str:
    """The same for columns of pictures and axes."""
    return attack_title(name).partition(" (")[0].partition(",")[0]


def detector_title(name: str) -> str:
    """What tables call a detector."""
    return DETECTORS.get(name, name)


def method_title(name: str, *, oracle_label: bool = False) -> str:
    """What tables call a mitigation, with the true label if the scan did not name it."""
    title = METHODS.get(name, name)
    return f"{title}, oracle label" if oracle_label else title


def in_order(names: Iterable[str], known: Iterable[str]) -> list[str]:
    """Names in the order in which they are known; unknown ones last, by alphabet."""
    order = list(known)
    return sorted(set(names), key=lambda n: (order.index(n) if n in order else len(order), n))
