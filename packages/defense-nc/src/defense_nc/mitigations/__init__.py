"""Mitigations of Neural Cleanse, and what those of other papers are built from."""

from defense_nc.mitigations.common import check_repair, trainable
from defense_nc.mitigations.fine_tune import (
    Closure,
    DivergedError,
    Sgd,
    cross_entropy,
    fine_tune,
    learning_rate,
    plain_step,
    sgd_preset,
)
from defense_nc.mitigations.neuron_pruning import NeuronPruning
from defense_nc.mitigations.repair_cost import RepairCost, repair_cost
from defense_nc.mitigations.unlearning import Unlearning, pass_batches

__all__ = [
    "Closure",
    "DivergedError",
    "NeuronPruning",
    "RepairCost",
    "Sgd",
    "Unlearning",
    "check_repair",
    "cross_entropy",
    "fine_tune",
    "learning_rate",
    "pass_batches",
    "plain_step",
    "repair_cost",
    "sgd_preset",
    "trainable",
]
