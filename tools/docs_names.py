"""What the pages of the reference are told: the public names of packages that import them late.

Such a package imports a name when it is first used. What type checkers read, its imports under
``TYPE_CHECKING``, says which they are. Griffe reads sources and runs nothing: it is given that
list as ``__all__``.
"""

from __future__ import annotations

from typing import Any

import griffe


class LateNames(griffe.Extension):
    """Takes a package's imported names for its public ones where its ``__all__`` is computed."""

    def on_package(self, *, pkg: griffe.Module, **_: Any) -> None:
        """Called by Griffe with every package that it has read."""
        if not pkg.exports:
            names = [n for n, origin in pkg.imports.items() if origin.startswith(f"{pkg.path}.")]
            pkg.exports = [*sorted(n for n in names if not n.startswith("_"))]
