"""A service for exported models: the Open Inference Protocol v2 over HTTP, without torch.

`Service` is an ASGI application; `run_server` puts it on a socket. The names are imported when they
are first used, so that the settings and the Triton layout need nothing of the extra "serve".
"""

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from wm_inject.serve.app import Service as Service
    from wm_inject.serve.engine import Engine as Engine
    from wm_inject.serve.models import Served as Served
    from wm_inject.serve.models import open_models as open_models
    from wm_inject.serve.server import make_server as make_server
    from wm_inject.serve.server import run_server as run_server
    from wm_inject.serve.settings import ServeSettings as ServeSettings
    from wm_inject.serve.settings import read_token as read_token
    from wm_inject.serve.triton import write_triton as write_triton

_HOME = {
    "Engine": "engine",
    "ServeSettings": "settings",
    "Served": "models",
    "Service": "app",
    "make_server": "server",
    "open_models": "models",
    "read_token": "settings",
    "run_server": "server",
    "write_triton": "triton",
}
__all__ = sorted(_HOME)
_EXTRA = ("starlette", "uvicorn", "orjson", "prometheus_client")


def __getattr__(name: str) -> Any:
    if name not in _HOME:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    try:
        value = getattr(import_module(f"{__name__}.{_HOME[name]}"), name)
    except ImportError as error:
        if (error.name or "").partition(".")[0] in _EXTRA:
            raise RuntimeError(
                "the service needs more packages: install wm-inject[serve]"
            ) from error
        raise
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
