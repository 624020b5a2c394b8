"""The service as an ASGI application: routes, limits, errors, a line for each request."""

from __future__ import annotations

import hmac
import sys
import time
from collections.abc import AsyncIterator, Mapping
from contextlib import asynccontextmanager
from typing import Any

import orjson
from starlette.applications import Starlette
from starlette.exceptions import HTTPException
from starlette.requests import Request
from starlette.responses import Response
from starlette.routing import Route
from starlette.types import Message, Receive, Scope, Send

from wm_inject.__about__ import __version__
from wm_inject.serve.body import LATER, Bodies
from wm_inject.serve.engine import Busy, Engine, Refused
from wm_inject.serve.metrics import CONTENT_TYPE, Metrics
from wm_inject.serve.models import VERSION, Served
from wm_inject.serve.protocol import HEADER_LENGTH, encode_infer, parse_infer, split_body
from wm_inject.serve.settings import ServeSettings

_OPEN = ("/v2/health/live", "/v2/health/ready")  # a supervisor asks these without a token


class Service:
    """An ASGI application that answers for models by the Open Inference Protocol v2.

    Args:
        models: What `open_models` gave.
        settings: The limits; host and port play no role here.
    """

    def __init__(self, models: Mapping[str, Served], settings: ServeSettings) -> None:
        self.models, self.settings = dict(models), settings
        self.metrics = Metrics(lambda: self.engine.images)
        self.engine = Engine(
            max_batch=settings.max_batch,
            delay=settings.delay_ms / 1000,
            queue=settings.queue,
            timeout=settings.infer_timeout,
            workers=settings.workers,
            on_batch=self.metrics.batch,
        )
        self.bodies = Bodies(settings.max_body, settings.request_timeout)
        self._token = settings.token and f"Bearer {settings.token}".encode()
        model = "/v2/models/{name}"
        pages = [
            (f"{model}/infer", self._infer, "POST"),
            (f"{model}/versions/{{version}}/infer", self._infer, "POST"),
            ("/v2", self._server, "GET"),
            ("/v2/health/live", self._live, "GET"),
            ("/v2/health/ready", self._ready, "GET"),
            (model, self._model, "GET"),
            (f"{model}/ready", self._model_ready, "GET"),
            (f"{model}/versions/{{version}}", self._model, "GET"),
            (f"{model}/versions/{{version}}/ready", self._model_ready, "GET"),
            ("/metrics", self._metrics, "GET"),
        ]
        self._pages = Starlette(
            routes=[Route(path, page, methods=[method]) for path, page, method in pages],
            exception_handlers={HTTPException: _refusal, Exception: _failure},
            lifespan=self._lifespan,
        )
        self._pages.router.redirect_slashes = False

    def __repr__(self) -> str:
        return f"Service({', '.join(self.models)})"

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Answer one request, count it, and log it."""
        if scope["type"] != "http":
            await self._pages(scope, receive, send)
            return
        start = time.perf_counter()
        headers: list[tuple[bytes, bytes]] = scope["headers"]
        names = {name for name, _ in headers}
        unread = b"content-length" in names or b"transfer-encoding" in names
        status = 0

        async def take() -> Message:
            nonlocal unread
            message = await receive()
            unread = unread and bool(message.get("more_body"))
            return message

        async def give(message: Message) -> None:
            nonlocal status
            if message["type"] == "http.response.start":
                status = message["status"]
                if unread:  # the rest of a refused body is nothing to wait for
                    message["headers"].append((b"connection", b"close"))
            await send(message)

        state = scope["wm"] = {"model": "", "images": 0, "cause": ""}
        try:
            if self._token and not self._known(scope, headers):
                raise HTTPException(
                    401, "expected Authorization: Bearer TOKEN", {"www-authenticate": "Bearer"}
                )
            await self._pages(scope, take, give)
        except HTTPException as error:
            await _error(error.status_code, error.detail, error.headers)(scope, take, give)
        finally:
            spent = time.perf_counter() - start
            self.metrics.request(state["model"], status, spent, state["images"])
            self._log(scope, status, spent, state)

    def _known(self, scope: Scope, headers: list[tuple[bytes, bytes]]) -> bool:
        """Whether a request may pass: it has the token, or asks for health only."""
        given = [value for name, value in headers if name == b"authorization"]
        # Compared in constant time, and whatever the path is.
        fits = len(given) == 1 and hmac.compare_digest(given[0], self._token or b"")
        return fits or scope["path"].removeprefix(scope.get("root_path", "")) in _OPEN

    def _log(self, scope: Scope, status: int, spent: float, state: dict[str, Any]) -> None:
        wanted = self.settings.log
        if wanted == "all" or (wanted == "errors" and (status >= 400 or status == 0)):
            said = {"method": scope["method"], "path": scope["path"][:200], "status": status}
            log_line("request", **said, ms=round(spent * 1000, 2), **state)

    @asynccontextmanager
    async def _lifespan(self, app: Starlette) -> AsyncIterator[None]:
        yield
        # The server has waited for its clients: no client waits for what still runs.
        await self.engine.close(seconds=0)

    def _find(self, request: Request) -> Served:
        served = self.models.get(request.path_params["name"])
        if served is None or request.path_params.get("version", VERSION) != VERSION:
            raise HTTPException(404, "no such model or version")
        request.scope["wm"]["model"] = served.name
        return served

    async def _infer(self, request: Request) -> Response:
        served = self._find(request)
        engine = self.engine
        try:
            async with self.bodies.read(request) as body:
                lengths = request.headers.getlist(HEADER_LENGTH)
                if len(lengths) > 1:
                    raise ValueError("expected Inference-Header-Content-Length once, got it twice")
                head, tail = split_body(body, lengths[0] if lengths else None)
                if len(head) > self.settings.max_json:
                    limit = f"at most {self.settings.max_json} bytes of JSON"
                    raise HTTPException(413, f"expected {limit}, got more: send binary tensors")
                asked = parse_infer(head, tail, served)
                found = await engine.run(served, asked.feeds, asked.images)
        except ValueError as error:
            raise HTTPException(400, str(error)[:300]) from None
        except Refused as error:
            request.scope["wm"]["cause"] = str(error)
            raise HTTPException(400, f"{served.name} cannot run these inputs") from None
        except Busy as error:
            raise HTTPException(503, f"{error}, come back later", LATER) from None
        except TimeoutError:
            raise HTTPException(504, f"no answer within {engine.timeout:g} s") from None
        request.scope["wm"]["images"] = asked.images
        answer, length = encode_infer(asked, served, found)
        if length is None:
            return Response(answer, media_type="application/json")
        headers = {HEADER_LENGTH: str(length)}
        return Response(answer, headers=headers, media_type="application/octet-stream")

    async def _server(self, request: Request) -> Response:
        extensions = ["binary_tensor_data"]
        return _json({"name": "wm-inject", "version": __version__, "extensions": extensions})

    async def _live(self, request: Request) -> Response:
        return _json({"live": True})

    async def _ready(self, request: Request) -> Response:
        ready = not self.engine.closing
        return _json({"ready": ready}, 200 if ready else 503)

    async def _model(self, request: Request) -> Response:
        return _json(self._find(request).describe())

    async def _model_ready(self, request: Request) -> Response:
        name, ready = self._find(request).name, not self.engine.closing
        return _json({"name": name, "ready": ready}, 200 if ready else 503)

    async def _metrics(self, request: Request) -> Response:
        return Response(self.metrics.text(), headers={"content-type": CONTENT_TYPE})


def log_line(event: str, **values: Any) -> None:
    """Write one line of JSON to stderr; empty values are left out."""
    kept = {name: value for name, value in values.items() if value not in ("", None)}
    line = {"time": round(time.time(), 3), "event": event, **kept}
    sys.stderr.write(orjson.dumps(line, default=str).decode() + "\n")
    sys.stderr.flush()


def _json(value: Any, status: int = 200) -> Response:
    return Response(orjson.dumps(value), status, media_type="application/json")


def _error(status: int, text: str, headers: Mapping[str, str] | None = None) -> Response:
    # What a client sent may stand in the text; it stays one line.
    body = orjson.dumps({"error": " ".join(text.split())})
    return Response(body, status, headers=headers, media_type="application/json")


def _refusal(request: Request, error: Exception) -> Response:
    assert isinstance(error, HTTPException)
    return _error(error.status_code, error.detail, error.headers)


def _failure(request: Request, error: Exception) -> Response:
    """An error of ours: its text is for the log, not for the client."""
    request.scope["wm"]["cause"] = f"{type(error).__name__}: {error}"[:500]
    return _error(500, "internal error")
