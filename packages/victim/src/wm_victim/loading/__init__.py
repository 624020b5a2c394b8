"""Open models of unknown origin: none of their code runs, and what cannot be checked is refused."""

from wm_victim.loading.contract import Limits, LoadingError, OpenedModel
from wm_victim.loading.open import open_model

__all__ = ["Limits", "LoadingError", "OpenedModel", "open_model"]
