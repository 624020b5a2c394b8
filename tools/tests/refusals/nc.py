"""What defense_nc refuses."""

from __future__ import annotations

from tools.tests.refusals.common import Table

TABLE = Table(module="defense_nc", cases={})
