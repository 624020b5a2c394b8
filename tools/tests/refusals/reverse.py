"""What defense_reverse refuses."""

from __future__ import annotations

from tools.tests.refusals.common import Table

TABLE = Table(module="defense_reverse", cases={})
