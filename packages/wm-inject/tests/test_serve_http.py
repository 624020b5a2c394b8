"""The service on a real socket: a client of others, hostile connections, load, and the end."""

from __future__ import annotations

import http.client
import json
import logging
import signal
import socket
import subprocess
import sys
import threading
import time
from contextlib import closing, contextmanager

import numpy as np
import pytest

from wm_inject.serve import ServeSettings, Service, make_server, run_server

SIDE = 4
COMMAND = [sys.executable, "-c", "import sys; from wm_inject.cli import main; sys.exit(main())"]


@contextmanager
def running(models, **settings):
    """A server in a thread of its own; gives the port."""
    service = Service(models, ServeSettings(port=0, log="none", **settings))
    server, listening = make_server(service)
    thread = threading.Thread(target=server.run, kwargs={"sockets": [listening]})
    port = listening.getsockname()[1]
    thread.start()
    try:
        yield port
    finally:
        server.should_exit = True
        thread.join(20)
        assert not thread.is_alive()


@pytest.fixture(scope="module")
def port(serve_models):
    with running(serve_models) as found:
        yield found


def test_a_server_says_that_it_listens_and_ends_on_a_signal(serve_models, capsys):
    before, service = signal.getsignal(signal.SIGTERM), Service(serve_models, ServeSettings(port=0))

    def end_it():
        limit = time.monotonic() + 60
        while getattr(signal.getsignal(signal.SIGTERM), "__module__", "") != "uvicorn.server":
            assert time.monotonic() < limit
            time.sleep(0.01)
        logging.getLogger("uvicorn.error").warning("a warning")
        signal.raise_signal(signal.SIGTERM)

    thread = threading.Thread(target=end_it)
    thread.start()
    run_server(service)
    thread.join(20)
    lines = [json.loads(line) for line in capsys.readouterr().err.splitlines()]
    assert [line["event"] for line in lines] == ["listening", "server", "stopped"]
    assert lines[0]["models"] == sorted(serve_models) and lines[1]["text"] == "a warning"
    assert signal.getsignal(signal.SIGTERM) == before


def pixels(n: int, seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).integers(0, 256, (n, SIDE, SIDE, 3), dtype=np.uint8)


def binary(n: int, seed: int) -> tuple[bytes, dict[str, str]]:
    """A request to "told" in binary, and its headers."""
    image, ids = pixels(n, seed), np.full(n, seed)
    arrays = {"image": (image, "UINT8"), "ids": (ids, "INT64"), "target": (ids * 0, "INT64")}
    inputs = [
        {
            "name": name,
            "shape": array.shape,
            "datatype": datatype,
            "parameters": {"binary_data_size": array.nbytes},
        }
        for name, (array, datatype) in arrays.items()
    ]
    head = json.dumps({"inputs": inputs, "parameters": {"binary_data_output": True}}).encode()
    body = head + b"".join(array.tobytes() for array, _ in arrays.values())
    return body, {"Inference-Header-Content-Length": str(len(head))}


@contextmanager
def triton_client(port):
    client = pytest.importorskip("tritonclient.http", reason="needs tritonclient[http]")
    made = client.InferenceServerClient(f"127.0.0.1:{port}")
    try:
        yield client, made
    finally:
        made.close()


def test_tritonclient_reads_health_and_metadata(port):
    with triton_client(port) as (_, client):
        assert client.is_server_live() and client.is_server_ready()
        assert client.is_model_ready("told") and client.is_model_ready("told", "1")
        assert not client.is_model_ready("other") and not client.is_model_ready("told", "2")
        assert client.get_server_metadata()["extensions"] == ["binary_tensor_data"]
        found = client.get_model_metadata("told")
        assert [one["name"] for one in found["inputs"]] == ["image", "ids", "target"]


@pytest.mark.parametrize("sent", [True, False], ids=["binary-in", "json-in"])
@pytest.mark.parametrize("got", [True, False, None], ids=["binary-out", "json-out", "all-out"])
def test_tritonclient_infers(port, sent, got):
    with triton_client(port) as (library, client):
        image, ids = pixels(3), np.array([1, -(2**62), 3])
        inputs = [
            library.InferInput("image", list(image.shape), "UINT8"),
            library.InferInput("ids", [3], "INT64"),
            library.InferInput("target", [3], "INT64"),
        ]
        inputs[0].set_data_from_numpy(image, binary_data=sent)
        inputs[1].set_data_from_numpy(ids, binary_data=not sent)  # mixed, in order
        inputs[2].set_data_from_numpy(np.array([0, 4, 2]), binary_data=sent)
        outputs = None
        if got is not None:
            outputs = [library.InferRequestedOutput(n, binary_data=got) for n in ("sum", "output")]
        found = client.infer("told", inputs, outputs=outputs, request_id="r1")
        assert np.array_equal(found.as_numpy("output"), 255 - image)
        assert np.array_equal(found.as_numpy("sum"), np.add(ids, [0, 4, 2]))
        assert found.get_response()["id"] == "r1"


def test_tritonclient_sends_floats_and_gets_bools(port):
    with triton_client(port) as (library, client):
        image = np.random.default_rng(0).random((2, 3, 5, 7), dtype=np.float32)
        given = library.InferInput("image", list(image.shape), "FP32")
        given.set_data_from_numpy(image)
        found = client.infer("float", [given], model_version="1")
        assert np.array_equal(found.as_numpy("output"), image / 2)
        assert np.array_equal(found.as_numpy("bright"), image > 0.5)


def test_tritonclient_is_told_what_is_wrong(port):
    with triton_client(port) as (library, client):
        error = pytest.importorskip("tritonclient.utils").InferenceServerException
        given = library.InferInput("image", [1, 3, 2, 2], "FP32")
        given.set_data_from_numpy(np.full((1, 3, 2, 2), np.nan, np.float32))
        with pytest.raises(error, match="finite values") as caught:
            client.infer("float", [given])
        assert caught.value.status() == "400"
        with pytest.raises(error, match="no such model") as caught:
            client.infer("other", [given])
        assert caught.value.status() == "404"
        with pytest.raises(error):
            client.load_model("told")
        with pytest.raises(error):
            client.unload_model("told")
        assert client.is_model_ready("told")


def test_no_answer_is_lost_or_mixed_up_under_load(port, serve_models):
    clients, each = 6, 60
    wrong: list[str] = []

    def work(client: int) -> None:
        with closing(http.client.HTTPConnection("127.0.0.1", port, timeout=20)) as connection:
            for step in range(each):
                seed = client * 1000 + step
                n = 1 + seed % 3
                body, headers = binary(n, seed)
                if seed % 7 == 0:  # one that is refused, in the midst of the others
                    body = body[:-1]
                connection.request("POST", "/v2/models/told/infer", body, headers)
                answer = connection.getresponse()
                data = answer.read()
                if seed % 7 == 0:
                    right = answer.status == 400
                else:
                    start = int(answer.headers["inference-header-content-length"])
                    image = serve_models["told"].model.run(
                        {
                            "image": pixels(n, seed),
                            "ids": np.full(n, seed),
                            "target": np.zeros(n, int),
                        }
                    )
                    right = data[start:] == image["output"].tobytes() + image["sum"].tobytes()
                if not right:
                    wrong.append(f"{seed}: {answer.status}")
        done.append(client)

    done: list[int] = []
    threads = [threading.Thread(target=work, args=(client,)) for client in range(clients)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(60)
    assert sorted(done) == list(range(clients)) and wrong == []


def read_all(connection: socket.socket) -> bytes:
    data = b""
    while piece := connection.recv(65536):
        data += piece
    return data


def connect(port: int) -> socket.socket:
    return socket.create_connection(("127.0.0.1", port), timeout=10)


HEAD = b"POST /v2/models/told/infer HTTP/1.1\r\nHost: a\r\n"


@pytest.mark.integration
def test_half_sent_requests_are_ended(serve_models):
    with running(serve_models, request_timeout=0.3) as port:
        with connect(port) as body, connect(port) as head, connect(port) as silent:
            body.sendall(HEAD + b"Content-Length: 100\r\n\r\n{")
            head.sendall(HEAD + b"Content-Le")
            start = time.monotonic()
            answer = read_all(body)
            assert b" 408 " in answer and b"expected the body within 0.3 s" in answer
            assert read_all(head) == b"" and read_all(silent) == b""
            assert 0.2 < time.monotonic() - start < 5
        with connect(port) as chunked:
            chunked.sendall(HEAD + b'Transfer-Encoding: chunked\r\n\r\n5\r\n{"inp')
            assert b" 408 " in read_all(chunked)


def test_large_bodies_are_ended_on_the_wire(serve_models):
    with running(serve_models, max_body=100_000) as port:
        with connect(port) as declared:
            declared.sendall(HEAD + b"Content-Length: 200000000\r\n\r\n" + b"x" * 1000)
            assert b" 413 " in read_all(declared)
        with connect(port) as chunked:
            chunked.sendall(HEAD + b"Transfer-Encoding: chunked\r\n\r\n")
            piece = b"8000\r\n" + b"x" * 0x8000 + b"\r\n"
            for _ in range(4):
                chunked.sendall(piece)
            assert b" 413 " in read_all(chunked)
        with connect(port) as expecting:
            expecting.sendall(HEAD + b"Expect: 100-continue\r\nContent-Length: 99999999\r\n\r\n")
            assert read_all(expecting).startswith(b"HTTP/1.1 413 ")


def test_without_httptools_it_is_slower_but_the_same(serve_models, monkeypatch):
    with monkeypatch.context() as patch:
        patch.setattr("wm_inject.serve.server.importlib.util.find_spec", lambda name: None)
        with running(serve_models, max_body=100_000) as port, connect(port) as large:
            large.sendall(HEAD + b"Content-Length: 200000\r\n\r\n{")
            assert b" 413 " in read_all(large)
            body, headers = binary(2, seed=3)
            with closing(http.client.HTTPConnection("127.0.0.1", port, timeout=20)) as connection:
                connection.request("POST", "/v2/models/told/infer", body, headers)
                assert connection.getresponse().status == 200


def test_what_is_no_http_is_a_four_hundred(port):
    for junk in (b"\x16\x03\x01\x02\x00\x01\x00\x01\xfc\x03\x03\r\n\r\n", b"GET\r\n\r\n"):
        with connect(port) as connection:
            connection.sendall(junk)
            assert read_all(connection).startswith(b"HTTP/1.1 400 ")


def test_too_many_connections_are_turned_away(serve_models):
    with running(serve_models, connections=2) as port, connect(port), connect(port):
        time.sleep(0.1)
        with closing(http.client.HTTPConnection("127.0.0.1", port, timeout=10)) as third:
            third.request("GET", "/v2")
            assert third.getresponse().status == 503


@contextmanager
def process(*options: str):
    """`wm-inject serve` in a process; gives it and its port."""
    made = subprocess.Popen(
        [*COMMAND, "serve", "--port", "0", *options],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )
    assert made.stderr is not None and made.stdout is not None
    try:
        yield made, json.loads(made.stderr.readline())["port"]
    finally:
        made.kill()
        made.wait()
        made.stderr.close()
        made.stdout.close()


def deep_request(n: int) -> tuple[bytes, dict[str, str]]:
    image = np.zeros((n, 1, 256, 256), np.float32)
    size = {"binary_data_size": image.nbytes}
    entry = {"name": "image", "shape": image.shape, "datatype": "FP32", "parameters": size}
    head = json.dumps({"inputs": [entry], "parameters": {"binary_data_output": True}}).encode()
    return head + image.tobytes(), {"Inference-Header-Content-Length": str(len(head))}


def counted(port: int) -> float:
    """Images that were accepted, answered ones included."""
    with closing(http.client.HTTPConnection("127.0.0.1", port, timeout=10)) as connection:
        connection.request("GET", "/metrics")
        text = connection.getresponse().read().decode()
    lines = [line for line in text.splitlines() if line.startswith(("wm_queue", "wm_images_total"))]
    return sum(float(line.split()[-1]) for line in lines)


def until(true) -> None:
    end = time.monotonic() + 20
    while not true():
        assert time.monotonic() < end
        time.sleep(0.01)


def test_sigterm_finishes_what_was_accepted(serve_graphs):
    with process("--model", f"deep={serve_graphs['deep']}") as (server, port):
        body, headers = deep_request(1)
        connections = [http.client.HTTPConnection("127.0.0.1", port, timeout=30) for _ in range(3)]
        for connection in connections:
            connection.request("POST", "/v2/models/deep/infer", body, headers)
        until(lambda: counted(port) == 3)  # now all are in the server
        server.send_signal(signal.SIGTERM)
        for connection in connections:
            answer = connection.getresponse()
            assert answer.status == 200 and len(answer.read()) > 256 * 256 * 4
            connection.close()
        assert server.wait(20) == 0
        assert json.loads(server.stderr.read().splitlines()[-1])["event"] == "stopped"
        with pytest.raises(ConnectionRefusedError):
            connect(port)


@pytest.mark.integration
def test_sigterm_does_not_wait_for_ever(serve_graphs):
    options = ["--stop-timeout", "1", "--request-timeout", "60"]
    with (
        process("--model", f"told={serve_graphs['told']}", *options) as (server, port),
        connect(port) as stalled,
    ):
        stalled.sendall(HEAD + b"Content-Length: 100\r\n\r\n{")
        counted(port)  # that one came later, and has its answer
        start = time.monotonic()
        server.send_signal(signal.SIGTERM)
        assert server.wait(20) == 0 and time.monotonic() - start < 8


def test_serving_needs_no_torch(serve_graphs):
    code = f"""
import sys, threading, urllib.request
sys.modules["torch"] = None
from wm_inject.serve import ServeSettings, Service, make_server, open_models
import wm_inject.command.serve
service = Service(open_models({{"told": {str(serve_graphs["told"])!r}}}), ServeSettings(port=0))
server, listening = make_server(service)
thread = threading.Thread(target=server.run, kwargs={{"sockets": [listening]}})
thread.start()
address = f"http://127.0.0.1:{{listening.getsockname()[1]}}/v2/models/told"
assert urllib.request.urlopen(address).status == 200
server.should_exit = True
thread.join()
names = {{"torch", "torchvision", "onnx", "safetensors"}}
heavy = [m for m in sys.modules if m.split(".")[0] in names]
assert heavy == ["torch"], heavy
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
