"""What a server counts, in the text form that Prometheus reads."""

from __future__ import annotations

from collections.abc import Callable

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram, generate_latest

CONTENT_TYPE = "text/plain; version=0.0.4; charset=utf-8"
_SECONDS = (0.001, 0.002, 0.005, 0.01, 0.02, 0.05, 0.1, 0.2, 0.5, 1, 2, 5, 10, 30)
_IMAGES = (1, 2, 4, 8, 16, 32, 64, 128, 256, 512)


class Metrics:
    """Counters of one server, in a registry of their own.

    Args:
        queued: Says how many images wait or run.
    """

    def __init__(self, queued: Callable[[], float]) -> None:
        self.registry = CollectorRegistry()
        registry = self.registry
        self._requests = Counter(
            "wm_requests", "Requests by model and status.", ["model", "code"], registry=registry
        )
        self._seconds = Histogram(
            "wm_request_seconds",
            "From the head of a request to its answer.",
            ["model"],
            buckets=_SECONDS,
            registry=registry,
        )
        self._batches = Histogram(
            "wm_batch_images", "Images in one run.", ["model"], buckets=_IMAGES, registry=registry
        )
        self._images = Counter("wm_images", "Images answered.", ["model"], registry=registry)
        Gauge("wm_queue_images", "Images that wait or run.", registry=registry).set_function(queued)

    def request(self, model: str, code: int, seconds: float, images: int) -> None:
        """Count an answered request. ``model`` is empty where no model of the server was asked."""
        self._requests.labels(model, str(code)).inc()
        if model:
            self._seconds.labels(model).observe(seconds)
        if images:
            self._images.labels(model).inc(images)

    def batch(self, model: str, images: int) -> None:
        """Count one run."""
        self._batches.labels(model).observe(images)

    def text(self) -> bytes:
        """Everything, as Prometheus wants it."""
        return generate_latest(self.registry)
