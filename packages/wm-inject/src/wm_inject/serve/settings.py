"""How a server is run: addresses, limits and times, all checked when they are given."""

from __future__ import annotations

import ipaddress
import os
import re
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

TOKEN_VARIABLE = "WM_SERVE_TOKEN"
_TOKEN = re.compile(r"[!-~]{16,512}")
Log = Literal["all", "errors", "none"]


@dataclass(frozen=True)
class ServeSettings:
    """Settings of `wm-inject serve`.

    Raises:
        ValueError: A value out of its range, or a server open to all without having said so.
    """

    host: str = "127.0.0.1"
    port: int = 8000  # 0 lets the system choose one
    token: str | None = None  # of ``Authorization: Bearer TOKEN``; None asks for nothing
    open_to_all: bool = False  # listen beyond this machine without a token
    max_body: int = 64 * 2**20  # bytes of one request; all together four times as many
    max_json: int = 16 * 2**20  # bytes; lists grow many times as large when read
    max_batch: int = 32  # images in one run; a larger request is run in parts
    delay_ms: float = 0.0  # how long an image may wait for others to share its run
    queue: int = 1024  # images that may wait or run at once, over all models
    request_timeout: float = 30.0  # seconds to send a request in
    infer_timeout: float = 30.0  # seconds from its last byte to the answer
    stop_timeout: float = 30.0  # seconds that accepted requests get at the end
    threads: int = 1  # of ONNX Runtime inside one operator
    workers: int = 1  # runs of models at the same time
    connections: int = 256
    log: Log = "errors"  # which requests get a line on stderr

    def __post_init__(self) -> None:
        ranges: dict[str, tuple[float, float]] = {
            "port": (0, 65535),
            "max_body": (1024, 2**40),
            "max_json": (1024, 2**32),
            "max_batch": (1, 65536),
            "queue": (1, 2**24),
            "threads": (1, 256),
            "workers": (1, 64),
            "connections": (1, 65536),
        }
        for name, (low, high) in ranges.items():
            value = getattr(self, name)
            if type(value) is not int or not low <= value <= high:
                raise ValueError(f"expected {name} in {low:g} .. {high:g}, got {value!r}")
        times = {"delay_ms": (0, 1000), "request_timeout": (0.01, 3600)}
        times |= {"infer_timeout": (0.01, 3600), "stop_timeout": (0.01, 3600)}
        for name, (low, high) in times.items():
            value = getattr(self, name)
            if not isinstance(value, int | float) or not low <= value <= high:
                raise ValueError(f"expected {name} in {low:g} .. {high:g}, got {value!r}")
        if self.log not in ("all", "errors", "none"):
            raise ValueError(f"expected log to be all, errors or none, got {self.log!r}")
        if self.token is not None and not _TOKEN.fullmatch(self.token):
            # Not shown: a token with one wrong character is nearly the token.
            raise ValueError(
                "expected a token of 16 to 512 printable characters without spaces, got another"
            )
        if not (is_loopback(self.host) or self.token or self.open_to_all):
            raise ValueError(
                f"expected a token for a server beyond this machine ({self.host}), got none: "
                f"give --token-file or {TOKEN_VARIABLE}, or say --open-to-all"
            )

    def __repr__(self) -> str:
        token = "a token" if self.token else "no token"
        return f"ServeSettings({self.host}:{self.port}, {token})"


def is_loopback(host: str) -> bool:
    """Whether an address can be reached from this machine only."""
    if host == "localhost":
        return True
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return False  # any other name may mean any address


def read_token(path: str | Path | None) -> str | None:
    """The token in a file, or else in the environment variable WM_SERVE_TOKEN; None without both.

    Raises:
        ValueError: No such file, or nothing in it.
    """
    if path is None:
        return os.environ.get(TOKEN_VARIABLE) or None
    try:
        token = Path(path).read_text(encoding="utf-8").strip()
    except (OSError, UnicodeDecodeError) as error:
        raise ValueError(
            f"expected a token in {path}, cannot read it: {type(error).__name__}"
        ) from None
    if not token:
        raise ValueError(f"expected a token in {path}, got an empty file")
    return token
