"""The same service as an ingress of Ray Serve: ``wm_inject.serve.ray_ingress:build``.

Each replica opens the models itself; nothing but names and numbers travels to it.
"""

from __future__ import annotations

from collections.abc import Mapping
from importlib import import_module
from typing import Any

from wm_inject.runtime.onnx_model import CPU
from wm_inject.serve.settings import ServeSettings, read_token

_CUDA = ("CUDAExecutionProvider", *CPU)


def build(args: Mapping[str, Any]) -> Any:
    """The application that ``serve run`` or a Serve config file names as its ``import_path``.

    Args:
        args: "models", the path of each name as the replicas see it; "providers", cpu or cuda;
            "token_file"; any other field of `ServeSettings` but where to listen, which is for Ray.

    Returns:
        A bound deployment, what Ray calls an application.

    Raises:
        ValueError: Settings that `ServeSettings` refuses, or unknown ones.
        RuntimeError: Ray is not installed.
    """
    try:
        serve = import_module("ray.serve")
    except ImportError as error:
        raise RuntimeError("Ray Serve is not installed: install wm-inject[ray]") from error
    given = dict(args)
    paths, token_file = given.pop("models", None), given.pop("token_file", None)
    provider = given.pop("providers", "cpu")
    if not isinstance(paths, Mapping) or not paths:
        raise ValueError(f"expected models as a mapping of names to paths, got {paths!r}")
    if provider not in ("cpu", "cuda"):
        raise ValueError(f"expected providers to be cpu or cuda, got {provider!r}")
    unknown = set(given) & {"host", "port", "token"} or set(given) - set(
        ServeSettings.__dataclass_fields__
    )
    if unknown:
        raise ValueError(f"expected settings of the service, got {', '.join(sorted(unknown))}")
    ServeSettings(**given)  # refused here, not in every replica
    named = {str(name): str(path) for name, path in paths.items()}

    def service() -> Any:
        from wm_inject.serve.app import Service
        from wm_inject.serve.models import open_models

        settings = ServeSettings(**given, token=read_token(token_file))
        providers = _CUDA if provider == "cuda" else CPU
        return Service(open_models(named, providers=providers, threads=settings.threads), settings)

    deployment = serve.deployment(serve.ingress(service)())
    return deployment.options(name="wm-inject").bind()
