"""Reading the body of a request: never more than the limits, in memory and in time."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager

from starlette.exceptions import HTTPException
from starlette.requests import Request

LATER = {"retry-after": "1"}
_TOGETHER = 4  # largest bodies that may be in memory at once


class Bodies:
    """All bodies that a service holds at a time.

    Args:
        limit: Bytes that one may have; all together may have four times as many.
        seconds: Time in which one has to be sent.
    """

    def __init__(self, limit: int, seconds: float) -> None:
        self.limit, self.seconds = limit, seconds
        self.held = 0

    @asynccontextmanager
    async def read(self, request: Request) -> AsyncIterator[bytes]:
        """Give the whole body; it counts as held until the block is left.

        Raises:
            HTTPException: 413 for one over the limit, which is not read any further; 415 for a
                compressed one; 408 for one that is not sent in time; 503 where too many are held;
                400 where the client leaves.
        """
        if request.headers.get("content-encoding", "identity").lower() != "identity":
            raise HTTPException(415, "expected a body without Content-Encoding")
        length = request.headers.get("content-length", "")
        # Nobody has to send a number of a thousand digits to be refused.
        if length.isascii() and length.isdigit() and int(length[:16]) > self.limit:
            raise self._too_large()
        pieces: list[bytes] = []
        try:
            async with asyncio.timeout(self.seconds):
                await self._collect(request, pieces)
        except TimeoutError:
            self.held -= sum(map(len, pieces))
            raise HTTPException(408, f"expected the body within {self.seconds:g} s") from None
        except BaseException:
            self.held -= sum(map(len, pieces))
            raise
        try:
            yield pieces[0] if len(pieces) == 1 else b"".join(pieces)
        finally:
            self.held -= sum(map(len, pieces))

    async def _collect(self, request: Request, pieces: list[bytes]) -> None:
        total, more = 0, True
        while more:
            message = await request.receive()
            if message["type"] != "http.request":
                raise HTTPException(400, "expected a whole body")
            pieces.append(message.get("body", b""))
            more = message.get("more_body", False)
            total += len(pieces[-1])
            self.held += len(pieces[-1])
            if total > self.limit:
                raise self._too_large()
            if self.held > _TOGETHER * self.limit:
                raise HTTPException(503, "too many large bodies, come back later", LATER)

    def _too_large(self) -> HTTPException:
        return HTTPException(413, f"expected a body of at most {self.limit} bytes, got more")
