"""What tables call attacks, detectors, mitigations, data sets and networks, in their order."""

from __future__ import annotations

from collections.abc import Iterable

CLEAN = "clean"  # the attack of a clean victim
# In the order of the paper's Table 1; then what it does not have.
ATTACKS = {
    "badnets": "BadNets",
    "blend": "Blend",
    "refool": "Refool",
    "blindnet": "BlindNet",
    "ssba": "SSBA",
    "sig": "SIG",
    "ftrojan": "FTrojan",
    "lf": "LF",
    "wanet": "WaNet",
    "marksman": "Marksman",
    "input-aware": "Input-aware (not in the paper)",
    "watermark": "Spy-Watermark",
    "equation2": "Plain blend, equation 2 (not in the paper)",
    CLEAN: "No attack (clean victim)",
}
# For columns of pictures and axes.
SHORT_ATTACKS = {
    name: title.partition(" (")[0].partition(",")[0] for name, title in ATTACKS.items()
}
CALIBRATED = ("nc", "reverse")  # the detectors whose verdicts have a calibrated error rate
DETECTORS = {
    "nc": "Neural Cleanse",
    "reverse": "Reverse generators",
    "reverse-lpips": "Reverse generators with LPIPS",
    "feature-re": "FeatureRE",
    "bti-dbf": "BTI-DBF",
}
# First those that use a reversed trigger, with their control; then those that need no scan.
METHODS = {
    "control": "Fine-tuning by unlearning's settings",
    "control-nc": "Fine-tuning by the settings of unlearning with Neural Cleanse",
    "unlearning-nc": "Unlearning, Neural Cleanse",
    "unlearning-reverse": "Unlearning, reverse generators",
    "unlearning-reverse-lpips": "Unlearning, reverse generators with LPIPS",
    "neuron-pruning": "Neuron pruning, Neural Cleanse",
    "fine-tuning": "Fine-tuning",
    "nad": "NAD",
    "fine-pruning": "Fine-pruning",
    "anp": "ANP",
    "i-bau": "I-BAU",
    "ft-sam": "FT-SAM",
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
    """What tables call an attack."""
    return ATTACKS.get(name, name)


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
