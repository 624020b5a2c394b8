"""The two engines of trigger inversion: one label after another, and all labels at once."""

from defense_nc.engines.batched import invert_triggers
from defense_nc.engines.sequential import invert_trigger

__all__ = ["invert_trigger", "invert_triggers"]
