"""What wm_eval refuses."""

from __future__ import annotations

from tools.tests.refusals.common import Table

TABLE = Table(module="wm_eval", cases={})
