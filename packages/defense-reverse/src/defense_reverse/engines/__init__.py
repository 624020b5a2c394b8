"""The engines of a scan: all labels in the same steps, or one after the other (the reference)."""

from defense_reverse.engines.batched import search_together
from defense_reverse.engines.sequential import search_in_turn

__all__ = ["search_in_turn", "search_together"]
