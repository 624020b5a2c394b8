"""Everything in both papers, in order of value, under a budget of time."""

__all__: list[str] = []
