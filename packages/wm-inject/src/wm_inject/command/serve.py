"""``wm-inject serve``: answer for exported models over HTTP, by the Open Inference Protocol v2."""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

from wm_inject.__about__ import __version__
from wm_inject.command.common import Parser, add_common

_EPILOG = """examples:
  wm-inject serve --model wanet=wanet.onnx
  wm-inject serve --model mark=mark.onnx --model victim=victim.onnx --port 9000 --delay-ms 2
  wm-inject serve --model mark=mark.onnx --host 0.0.0.0 --token-file token.txt

  curl http://127.0.0.1:8000/v2/models/wanet

Models are opened once, at the start. SIGTERM or Ctrl-C lets what was accepted finish."""

_NUMBERS: tuple[tuple[str, type, str], ...] = (
    ("port", int, "TCP port; 0 takes a free one"),
    ("max-body", int, "bytes of one request"),
    ("max-json", int, "bytes of its JSON"),
    ("max-batch", int, "images in one run"),
    ("delay-ms", float, "time that an image may wait for others"),
    ("queue", int, "images that may wait or run"),
    ("request-timeout", float, "seconds in which a request has to be sent"),
    ("infer-timeout", float, "seconds until its answer, waiting included"),
    ("stop-timeout", float, "seconds that accepted requests get at the end"),
    ("threads", int, "threads inside one operator"),
    ("workers", int, "runs at the same time"),
    ("connections", int, "connections at the same time"),
)


def add_serve(parser: Parser) -> None:
    """Give ``parser`` the options of `serve`."""
    from wm_inject.serve.settings import TOKEN_VARIABLE, ServeSettings

    parser.description = "Answer for exported models over HTTP (Open Inference Protocol v2)."
    parser.epilog = _EPILOG
    parser.add_argument(
        "--model",
        action="append",
        required=True,
        metavar="NAME=PATH",
        help="a model and the name that clients call it; once for each",
    )
    parser.add_argument("--host", default="127.0.0.1", help="address (default: this machine only)")
    parser.add_argument(
        "--token-file",
        type=Path,
        metavar="FILE",
        help=f"what clients send as a bearer token (default: the variable {TOKEN_VARIABLE})",
    )
    parser.add_argument(
        "--open-to-all", action="store_true", help="listen beyond this machine without a token"
    )
    for name, kind, text in _NUMBERS:
        usual = getattr(ServeSettings, name.replace("-", "_"))
        parser.add_argument(
            f"--{name}", type=kind, default=usual, help=f"{text} (default: {usual})"
        )
    parser.add_argument(
        "--log",
        choices=("all", "errors", "none"),
        default="errors",
        help="requests that get a line on stderr (default: errors)",
    )
    add_common(parser, version=__version__)
    parser.set_defaults(run=run_serve, parser=parser)


def run_serve(args: argparse.Namespace) -> str:
    """Serve until a signal, and say so."""
    from wm_inject import serve
    from wm_inject.runtime.onnx_model import providers_for

    paths: dict[str, str] = {}
    for given in args.model:
        name, equals, path = given.partition("=")
        if not (name and equals and path) or name in paths:
            args.parser.error(f"expected --model NAME=PATH, each name once, got {given!r}")
        paths[name] = path
    numbers: dict[str, Any] = {
        name.replace("-", "_"): getattr(args, name.replace("-", "_")) for name, _, _ in _NUMBERS
    }
    settings = serve.ServeSettings(
        host=args.host,
        token=serve.read_token(args.token_file),
        open_to_all=args.open_to_all,
        log=args.log,
        **numbers,
    )
    models = serve.open_models(
        paths, providers=providers_for(args.device), threads=settings.threads
    )
    serve.run_server(serve.Service(models, settings))
    return f"stopped; {len(models)} model{'s' if len(models) > 1 else ''} served"
