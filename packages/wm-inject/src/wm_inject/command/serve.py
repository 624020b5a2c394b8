"""``wm-inject serve``: answer for exported models over HTTP, by the Open Inference Protocol v2."""

from __future__ import annotations

import argparse
from pathlib import Path

from wm_inject.command.common import Parser
from wm_inject.command.config import add_options, read_settings

_EPILOG = """examples:
  wm-inject serve --model wanet=wanet.onnx
  wm-inject serve --model mark=mark.onnx --model victim=victim.onnx --port 9000 --delay-ms 2
  wm-inject serve --model mark=mark.onnx --host 0.0.0.0 --token-file token.txt

  curl http://127.0.0.1:8000/v2/models/wanet

Models are opened once, at the start. SIGTERM or Ctrl-C lets what was accepted finish."""

_OPTIONS = {
    "host": "address to listen on",
    "port": "TCP port; 0 takes a free one",
    "max_body": "bytes of one request",
    "max_json": "bytes of its JSON",
    "max_batch": "images in one run",
    "delay_ms": "time that an image may wait for others",
    "queue": "images that may wait or run",
    "request_timeout": "seconds in which a request has to be sent",
    "infer_timeout": "seconds until its answer, waiting included",
    "stop_timeout": "seconds that accepted requests get at the end",
    "threads": "threads inside one operator",
    "workers": "runs at the same time",
    "connections": "connections at the same time",
    "log": "requests that get a line on stderr",
}


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
    parser.add_argument(
        "--token-file",
        type=Path,
        metavar="FILE",
        help=f"what clients send as a bearer token (default: the variable {TOKEN_VARIABLE})",
    )
    parser.add_argument(
        "--open-to-all",
        action="store_true",
        default=None,
        help="listen beyond this machine without a token",
    )
    add_options(parser, ServeSettings, _OPTIONS)


def run_serve(args: argparse.Namespace) -> None:
    """Serve until a signal."""
    from wm_inject import serve
    from wm_inject.runtime.onnx_model import providers_for

    paths: dict[str, str] = {}
    for text in args.model:
        name, equals, path = text.partition("=")
        if not (name and equals and path) or name in paths:
            args.parser.error(f"expected --model NAME=PATH, each name once, got {text!r}")
        paths[name] = path
    start = serve.ServeSettings(token=serve.read_token(args.token_file))
    settings = read_settings(args, start)
    models = serve.open_models(
        paths, providers=providers_for(args.device), threads=settings.threads
    )
    serve.run_server(serve.Service(models, settings))
    print(f"stopped; {len(models)} model{'s' if len(models) > 1 else ''} served")
