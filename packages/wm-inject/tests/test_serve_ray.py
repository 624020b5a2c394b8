"""The service as an ingress of Ray Serve; the real cluster is slow, and only where Ray is."""

from __future__ import annotations

import importlib.util
import json
import socket
import sys
import urllib.error
import urllib.request

import numpy as np
import pytest

from wm_inject.serve.ray_ingress import build

HAS_RAY = importlib.util.find_spec("ray") is not None


def test_without_ray_the_extra_is_named(monkeypatch):
    monkeypatch.setitem(sys.modules, "ray.serve", None)
    monkeypatch.setitem(sys.modules, "ray", None)
    with pytest.raises(RuntimeError, match=r"install wm-inject\[ray\]"):
        build({"models": {"a": "a.onnx"}})


class FakeServe:
    """As much of ray.serve as `build` touches."""

    @staticmethod
    def ingress(app):
        return lambda: app

    @staticmethod
    def deployment(app):
        return FakeServe.Deployment(app)

    class Deployment:
        def __init__(self, app):
            self.app = app

        def options(self, name):
            assert name == "wm-inject"
            return self

        def bind(self):
            return self.app


@pytest.fixture
def fake_ray(monkeypatch):
    monkeypatch.setitem(sys.modules, "ray.serve", FakeServe)


def test_a_replica_builds_the_service(fake_ray, serve_graphs, tmp_path):
    (tmp_path / "token").write_text("correct-horse-battery")
    args = {"models": {"told": serve_graphs["told"]}, "queue": 7}
    service = build(args | {"token_file": str(tmp_path / "token")})()
    assert list(service.models) == ["told"] and service.settings.queue == 7
    assert service.settings.token == "correct-horse-battery"


def test_bad_arguments_are_refused_before_any_replica(fake_ray, subtests):
    for args, told_so in [
        ({}, "expected models as a mapping"),
        ({"models": ["a.onnx"]}, "expected models as a mapping"),
        ({"models": {"a": "a.onnx"}, "providers": "tpu"}, "providers to be cpu or cuda"),
        ({"models": {"a": "a.onnx"}, "port": 80}, "expected settings of the service, got port"),
        ({"models": {"a": "a.onnx"}, "token": "x"}, "expected settings of the service, got token"),
        ({"models": {"a": "a.onnx"}, "speed": 9}, "expected settings of the service, got speed"),
        ({"models": {"a": "a.onnx"}, "queue": 0}, "expected queue in"),
    ]:
        with subtests.test(args=args, told_so=told_so), pytest.raises(ValueError, match=told_so):
            build(args)


@pytest.mark.slow
@pytest.mark.skipif(not HAS_RAY, reason="needs Ray: hatch run cluster:test")
@pytest.mark.filterwarnings("ignore")  # Ray's own, at import and at its end
def test_a_local_cluster_answers(serve_graphs):
    import ray
    from ray import serve

    with socket.create_server(("127.0.0.1", 0)) as free:
        port = free.getsockname()[1]
    ray.init(num_cpus=2, include_dashboard=False, log_to_driver=False)
    try:
        serve.start(http_options={"host": "127.0.0.1", "port": port})
        serve.run(build({"models": {"told": str(serve_graphs["told"])}}), route_prefix="/wm")
        address = f"http://127.0.0.1:{port}/wm/v2/models/told"
        found = json.loads(urllib.request.urlopen(address).read())
        assert found["name"] == "told"
        image = np.arange(48, dtype=np.uint8)
        entries = [
            {"name": "image", "shape": [1, 4, 4, 3], "datatype": "UINT8", "data": image.tolist()},
            {"name": "ids", "shape": [1], "datatype": "INT64", "data": [5]},
            {"name": "target", "shape": [1], "datatype": "INT64", "data": [2]},
        ]
        asked = json.dumps({"inputs": entries, "id": "r"}).encode()
        found = json.loads(urllib.request.urlopen(f"{address}/infer", data=asked).read())
        assert found["id"] == "r" and found["outputs"][0]["data"] == (255 - image).tolist()
        assert found["outputs"][1]["data"] == [7]
        with pytest.raises(urllib.error.HTTPError) as caught:
            urllib.request.urlopen(f"{address}/infer", data=b"{}")
        assert caught.value.code == 400 and b"expected inputs" in caught.value.read()
    finally:
        serve.shutdown()
        ray.shutdown()
