"""Opening strangers' models: no code of theirs runs, and what cannot be checked is refused."""

from wm_victim.loading.open import open_model
from wm_victim.loading.opened import Limits, NotOpened, OpenedModel

__all__ = ["Limits", "NotOpened", "OpenedModel", "open_model"]
