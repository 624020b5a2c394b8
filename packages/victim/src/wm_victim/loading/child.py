"""What runs inside the sandbox: one job on one file, a plain result, and a reason if it fails."""

from __future__ import annotations

import json
import sys
import warnings
from pathlib import Path
from typing import Any

from wm_victim.loading.opened import first_line


def main(text: str) -> None:
    """Do the job that the settings name, and write ``result.json`` into the scratch folder."""
    settings = json.loads(text)
    given = Path(settings["given"]) / settings["name"]
    out = Path(settings["scratch"])
    warnings.simplefilter("ignore")
    try:
        result = _job(settings["job"])(given, out, settings["options"])
        result["bonds"] = settings["bonds"]
    except MemoryError:
        result = {"refused": "it asks for more memory than allowed"}
    # Whatever the readers raise on a hostile file: the parent only wants the reason.
    except Exception as error:
        result = {"refused": _reason(error)}
    (out / "result.json").write_text(json.dumps(result), encoding="utf-8")


def _job(name: str) -> Any:
    if name == "state":
        from wm_victim.loading.from_state import convert_state

        return convert_state
    if name == "onnx":
        from wm_victim.loading.from_onnx import convert_onnx

        return convert_onnx
    from wm_victim.loading.from_script import convert_script

    return convert_script


def _reason(error: Exception) -> str:
    line = first_line(error)
    told = str(error).lower()
    if "can't allocate memory" in told or "bad_alloc" in told or "failed to allocate" in told:
        return "it asks for more memory than allowed"
    return line if isinstance(error, ValueError) else f"{type(error).__name__}: {line}"


if __name__ == "__main__":
    main(sys.argv[1])
