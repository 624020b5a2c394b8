"""Images a second through `wm-inject serve` on loopback, as a share of what the model does alone.

Server, client and whatever else runs share the machine. Both ways are taken in turns, and the ratio
is that of their medians. The model alone runs batches of 32 in one thread, as the server may too.
"""

from __future__ import annotations

import json
import selectors
import socket
import statistics
import subprocess
import sys
import time

import numpy as np
import orjson
import pytest
import torch

from wm_inject import WatermarkTrigger
from wm_inject.export import to_onnx
from wm_inject.runtime import OnnxModel
from wm_inject.watermark.vit import ViTInjector, vit_config

pytestmark = pytest.mark.bench
ROUNDS, SECONDS, CLIENTS, BATCH = 9, 1.0, 8, 32


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    """The tiny injector, with a random head so that it changes the image."""
    path = tmp_path_factory.mktemp("model") / "vit.onnx"
    torch.manual_seed(0)
    injector = ViTInjector(**vit_config("tiny", image_size=32, channels=3))
    torch.nn.init.normal_(injector.head.weight, std=0.05)
    to_onnx(WatermarkTrigger(injector), torch.rand(3, 3, 32, 32), path, uint8=True)
    return path


@pytest.fixture(scope="module")
def port(model):
    """A server of its own process, with the settings it has by default."""
    command = [sys.executable, "-c", "import sys; from wm_inject.cli import main; sys.exit(main())"]
    options = ["serve", "--model", f"vit={model}", "--port", "0"]
    with subprocess.Popen(
        [*command, *options], stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True
    ) as process:
        assert process.stderr is not None
        yield json.loads(process.stderr.readline())["port"]
        process.terminate()
        assert process.wait(30) == 0


def pixels(count: int) -> np.ndarray:
    return np.random.default_rng(count).integers(0, 256, (count, 32, 32, 3), dtype=np.uint8)


def request(images: np.ndarray) -> bytes:
    """A request with binary tensors, its head included."""
    size = {"binary_data_size": images.nbytes}
    tensor = {"name": "image", "shape": images.shape, "datatype": "UINT8", "parameters": size}
    asked = orjson.dumps({"inputs": [tensor], "parameters": {"binary_data_output": True}})
    head = (
        "POST /v2/models/vit/infer HTTP/1.1\r\nHost: localhost\r\n"
        f"Inference-Header-Content-Length: {len(asked)}\r\n"
        f"Content-Length: {len(asked) + images.nbytes}\r\n\r\n"
    )
    return head.encode() + asked + images.tobytes()


def whole_answer(connection: socket.socket) -> bytes:
    """One answer, read to its end."""
    data = b""
    while b"\r\n\r\n" not in data:
        data += connection.recv(2**18)
    head, _, body = data.partition(b"\r\n\r\n")
    length = int(head.lower().partition(b"content-length: ")[2].split(b"\r\n")[0])
    while len(body) < length:
        body += connection.recv(2**18)
    assert head.startswith(b"HTTP/1.1 200"), head
    return head + b"\r\n\r\n" + body


def images_a_second(port: int, sent: bytes, wanted: bytes, count: int) -> float:
    """Eight connections, each with one request under way; every answer has to be the right one."""
    chosen = selectors.DefaultSelector()
    for _ in range(CLIENTS):
        connection = socket.create_connection(("127.0.0.1", port))
        connection.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        connection.sendall(sent)
        chosen.register(connection, selectors.EVENT_READ, bytearray())
    done, under_way = 0, CLIENTS
    start = time.perf_counter()
    while under_way:
        for key, _ in chosen.select():
            key.data.extend(key.fileobj.recv(2**18))
            if len(key.data) < len(wanted):
                continue
            assert key.data == wanted
            key.data.clear()
            done += 1
            if time.perf_counter() - start < SECONDS:
                key.fileobj.sendall(sent)
            else:
                under_way -= 1
    spent = time.perf_counter() - start
    for key in list(chosen.get_map().values()):
        key.fileobj.close()
    return done * count / spent


def images_alone(run: OnnxModel) -> float:
    images, done = pixels(BATCH), 0
    start = time.perf_counter()
    while time.perf_counter() - start < SECONDS:
        run(images)
        done += BATCH
    return done / (time.perf_counter() - start)


@pytest.mark.parametrize(("count", "goal"), [(1, 0.30), (16, 0.60)])
def test_served_against_the_model_alone(benchmark, model, port, count, goal):
    alone, images = OnnxModel(model), pixels(count)
    sent = request(images)
    with socket.create_connection(("127.0.0.1", port)) as connection:
        connection.sendall(sent)
        wanted = whole_answer(connection)
    assert wanted.endswith(alone(images).tobytes())
    rates: tuple[list[float], list[float]] = ([], [])
    for _ in range(ROUNDS):
        rates[0].append(images_a_second(port, sent, wanted, count))
        rates[1].append(images_alone(alone))
    served, reference = map(statistics.median, rates)
    benchmark.extra_info["images_a_second_served"] = round(served)
    benchmark.extra_info["images_a_second_alone"] = round(reference)
    benchmark.extra_info["served_times_alone"] = round(served / reference, 3)
    benchmark.extra_info["goal"] = goal
    benchmark.pedantic(images_alone, (alone,), rounds=1)
