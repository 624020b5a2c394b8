from __future__ import annotations

import json

import numpy as np
import pytest

from wm_inject.serve.protocol import InferRequest, Wanted, encode_infer, parse_infer, split_body

SIDE = 4


def pixels(n: int = 2) -> np.ndarray:
    return np.random.default_rng(n).integers(0, 256, (n, SIDE, SIDE, 3), dtype=np.uint8)


def tensor(name: str, array: np.ndarray, datatype: str, **more) -> dict:
    data = {"data": array.reshape(-1).tolist()}
    return {"name": name, "shape": list(array.shape), "datatype": datatype} | data | more


def message(n: int = 2, **more) -> dict:
    ids, target = np.arange(n), np.arange(n) % 5
    inputs = [
        tensor("image", pixels(n), "UINT8"),
        tensor("ids", ids, "INT64"),
        tensor("target", target, "INT64"),
    ]
    return {"inputs": inputs} | more


def parse(found: dict, served, tail: bytes | None = None) -> InferRequest:
    head = json.dumps(found).encode()
    length = None if tail is None else str(len(head))
    return parse_infer(*split_body(head + (tail or b""), length), served)


def image_alone(**change) -> dict:
    return {"inputs": [tensor("image", np.full((1, 3, 2, 2), 0.25), "FP32") | change]}


def test_flat_and_nested_lists_are_the_same(serve_models):
    flat = parse(message(), serve_models["told"])
    nested = message()
    nested["inputs"][0]["data"] = pixels(2).tolist()
    for found in (flat, parse(nested, serve_models["told"])):
        assert found.images == 2 and found.id is None
        assert found.feeds["image"].dtype == np.uint8 and found.feeds["ids"].dtype == np.int64
        assert np.array_equal(found.feeds["image"], pixels(2))
        assert found.outputs == (Wanted("output", False), Wanted("sum", False))


def test_binary_tensors_follow_in_the_order_of_the_inputs(serve_models):
    for padding in range(9):  # numbers that begin at any address
        asked = message(3, id="x" * (100 + padding))
        tail = b""
        for place, kind in ((0, "u1"), (2, "<i8")):
            array = np.array(asked["inputs"][place].pop("data")).astype(kind)
            asked["inputs"][place]["parameters"] = {"binary_data_size": array.nbytes}
            tail += array.tobytes()
        found = parse(asked, serve_models["told"], tail)
        assert np.array_equal(found.feeds["image"], pixels(3))
        assert found.feeds["target"].tolist() == [0, 1, 2] == found.feeds["ids"].tolist()
        assert all(array.flags.aligned for array in found.feeds.values())
        assert found.id == asked["id"]


def test_what_is_wanted_and_in_which_form(serve_models):
    names = [{"name": "sum", "parameters": {"binary_data": False}}, {"name": "output"}]
    asked = message(outputs=names, parameters={"binary_data_output": True})
    found = parse(asked, serve_models["told"])
    assert found.outputs == (Wanted("sum", False), Wanted("output", True))


def test_answers_as_json_and_as_binary(serve_models):
    served = serve_models["float"]
    values = {
        "output": np.array([[0.5, 0.25]], np.float32)[:, ::-1],
        "bright": np.array([[True, False]]),
    }
    asked = InferRequest("7", {}, 1, (Wanted("output", True), Wanted("bright", False)))
    body, length = encode_infer(asked, served, values)
    head = json.loads(body[:length])
    assert (head["model_name"], head["model_version"], head["id"]) == ("float", "1", "7")
    assert head["outputs"] == [
        {
            "name": "output",
            "datatype": "FP32",
            "shape": [1, 2],
            "parameters": {"binary_data_size": 8},
        },
        {"name": "bright", "datatype": "BOOL", "shape": [1, 2], "data": [True, False]},
    ]
    assert body[length:] == np.array([0.25, 0.5], "<f4").tobytes()
    asked = InferRequest(None, {}, 1, (Wanted("output", False),))
    body, length = encode_infer(asked, served, values)
    assert length is None and json.loads(body)["outputs"][0]["data"] == [0.25, 0.5]
    assert "id" not in json.loads(body)


NESTED_DEEP: list = []
for _ in range(900):
    NESTED_DEEP = [NESTED_DEEP]


def test_bad_inputs_are_refused(serve_models, subtests):
    for change, told_so in [
        ({"datatype": "UINT8"}, "expected image in FP32, got 'UINT8'"),
        ({"datatype": "FP99"}, "expected image in FP32, got 'FP99'"),
        ({"datatype": None}, "expected image in FP32, got None"),
        ({"datatype": ["FP32"]}, "expected image in FP32, got list"),
        ({"name": "photo"}, "expected the inputs image, got 'photo'"),
        ({"name": 3}, "expected the name of each input as a string, got 3"),
        ({"shape": None}, "the shape of image as 1 to 8 numbers"),
        ({"shape": []}, "the shape of image as 1 to 8 numbers"),
        ({"shape": [1.0, 3, 2, 2]}, "the shape of image as 1 to 8 numbers"),
        ({"shape": [True, 3, 2, 2]}, "the shape of image as 1 to 8 numbers"),
        ({"shape": [1] * 9}, "the shape of image as 1 to 8 numbers"),
        ({"shape": [0, 3, 2, 2], "data": []}, "at least one image"),
        ({"shape": [-1, 3, 2, 2]}, "at least one image"),
        ({"shape": [2**63, 2**63, 2**63, 9]}, "numbers of image, got 12"),
        ({"shape": [12]}, r"expected image of shape \(N, 3, h, w\), got \(12,\)"),
        ({"shape": [1, 1, 3, 4]}, r"image of shape \(N, 3, h, w\), got \(1, 1, 3, 4\)"),
        ({"shape": [2, 3, 2, 2]}, "expected 24 numbers of image, got 12"),
        ({"data": None}, "the data of image as a list, got NoneType"),
        ({"data": {}}, "the data of image as a list, got dict"),
        ({"data": "0.5"}, "the data of image as a list, got str"),
        ({"data": []}, "expected 12 numbers of image, got 0"),
        ({"data": [0.5] * 11}, "expected 12 numbers of image, got 11"),
        ({"data": [0.5] * 11 + ["a"]}, "as float or int, got str"),
        ({"data": [0.5] * 11 + [None]}, "as float or int, got NoneType"),
        ({"data": [0.5] * 11 + [True]}, "as float or int, got bool"),
        ({"data": [0.5] * 11 + [[0.5]]}, "as float or int, got list"),
        ({"data": [[0.5] * 6, [0.5] * 6]}, "flat or nested as its shape"),
        ({"data": [[[[0.5] * 3] * 4]]}, "flat or nested as its shape"),
        ({"data": NESTED_DEEP}, "flat or nested as its shape"),
        ({"data": [0.5] * 11 + [1.5]}, r"finite values in \[0, 1\], got \[0.5, 1.5\]"),
        ({"data": [0.5] * 11 + [-1e-9]}, r"finite values in \[0, 1\]"),
        ({"data": [0.5] * 11 + [1e300]}, r"finite values in \[0, 1\], got \[0.5, inf\]"),
        ({"data": [0.5] * 11 + [2**64 - 1]}, r"finite values in \[0, 1\]"),
        ({"parameters": 3}, "the parameters of image as a JSON object, got int"),
        ({"parameters": {"binary_data_size": 48}}, "either data or binary_data_size"),
    ]:
        with subtests.test(change=change, told_so=told_so):
            with pytest.raises(ValueError, match=told_so) as caught:
                parse(image_alone(**change), serve_models["float"])
            assert "\n" not in str(caught.value)


def test_numbers_out_of_range_are_refused(serve_models, subtests):
    for place, values, told_so in [
        (1, [0, 2**63], "the data of ids within 64 bits"),
        (1, [0, -(2**63) - 1], "expected"),
        (1, [0, 2**70], "as int, got float"),
        (1, [0, 1.0], "as int, got float"),
        (1, [0, 1, 2], "expected 2 numbers of ids, got 3"),
        (2, [0, 5], r"expected target in 0 \.\. 4, got 0 \.\. 5"),
        (2, [-1, 0], r"expected target in 0 \.\. 4, got -1 \.\. 0"),
        (0, [256] * 96, r"the data of image in 0 \.\. 255"),
        (0, [-1] * 96, r"the data of image in 0 \.\. 255"),
        (0, [2**63] * 96, "the data of image within 64 bits"),
    ]:
        with subtests.test(place=place, values=values, told_so=told_so):
            asked = message(2)
            asked["inputs"][place]["data"] = values
            with pytest.raises(ValueError, match=told_so):
                parse(asked, serve_models["told"])


def test_bad_requests_are_refused(serve_models, subtests):
    for change, told_so in [
        ({"inputs": []}, "expected inputs as a list of at least one"),
        ({"inputs": {}}, "expected inputs as a list of at least one"),
        ({"inputs": [3]}, "expected each input as a JSON object, got int"),
        ({"inputs": message()["inputs"][:2]}, "expected the inputs image, ids, target, got"),
        ({"inputs": message()["inputs"] * 2}, "expected each input once, got image twice"),
        ({"inputs": message(2)["inputs"][:2] + message(3)["inputs"][2:]}, "3 of target"),
        ({"id": 5}, "expected id as a printable string"),
        ({"id": "x" * 129}, "expected id as a printable string"),
        ({"id": "a\nb"}, "expected id as a printable string"),
        ({"outputs": {}}, "expected outputs as a list, got dict"),
        ({"outputs": [{"name": "other"}]}, "expected outputs of output, sum, got 'other'"),
        ({"outputs": [{"name": "sum"}, {"name": "sum"}]}, "expected each output once"),
        ({"outputs": [{"name": "sum", "parameters": {"classification": 2}}]}, "not offered"),
        ({"outputs": [{"name": "sum", "parameters": {"binary_data": 1}}]}, "true or false, got 1"),
        ({"parameters": {"binary_data_output": "yes"}}, "true or false, got 'yes'"),
        ({"parameters": [1]}, "the parameters of the request as a JSON object, got list"),
    ]:
        with (
            subtests.test(change=change, told_so=told_so),
            pytest.raises(ValueError, match=told_so),
        ):
            parse(message() | change, serve_models["told"])


def test_bytes_that_do_not_add_up_are_refused(serve_models, subtests):
    for size, tail, told_so in [
        (48, b"", "expected 48 bytes of image after the JSON, got 0"),
        (48, bytes(47), "expected 48 bytes of image after the JSON, got 47"),
        (48, bytes(49), "expected 48 bytes of tensors after the JSON, got 49"),
        (47, bytes(47), "expected binary_data_size 48"),
        (-48, bytes(48), "expected binary_data_size 48"),
        (48.0, bytes(48), "expected binary_data_size 48"),
        ("48", bytes(48), "expected binary_data_size 48"),
        (48, np.full(12, np.nan, "<f4").tobytes(), r"finite values in \[0, 1\], got \[nan, nan\]"),
        (48, np.full(12, np.inf, "<f4").tobytes(), r"finite values in \[0, 1\]"),
        (48, np.full(12, 0.5, ">f4").tobytes(), None),
    ]:
        with subtests.test(size=size, tail=tail, told_so=told_so):
            asked = image_alone(parameters={"binary_data_size": size})
            del asked["inputs"][0]["data"]
            if told_so is None:  # the other byte order is another number, and a tiny one
                assert parse(asked, serve_models["float"], tail).feeds["image"].max() < 1e-38
                continue
            with pytest.raises(ValueError, match=told_so):
                parse(asked, serve_models["float"], tail)


def test_bools_are_bytes_zero_and_one(serve_models):
    size = {"binary_data_size": SIDE}
    entry = {"name": "image", "shape": [1, SIDE], "datatype": "BOOL", "parameters": size}
    found = parse({"inputs": [entry]}, serve_models["one"], bytes([0, 1, 1, 0]))
    assert found.feeds["image"].tolist() == [[False, True, True, False]]
    with pytest.raises(ValueError, match="expected image as bytes 0 and 1"):
        parse({"inputs": [entry]}, serve_models["one"], bytes([0, 2, 1, 0]))
    entry = {"name": "image", "shape": [1, SIDE], "datatype": "BOOL", "data": [0, 1, 0, 1]}
    with pytest.raises(ValueError, match="as bool, got int"):
        parse({"inputs": [entry]}, serve_models["one"])


def test_bad_lengths_of_the_json_are_refused(subtests):
    for length in ["-1", "999999", "x", "", "1" * 40, "١"]:
        with (
            subtests.test(length=length),
            pytest.raises(ValueError, match="Inference-Header-Content-Length"),
        ):
            split_body(json.dumps(message()).encode(), length)


def test_what_is_no_json_is_refused(serve_models, subtests):
    for body in [
        b"",
        b"{",
        b"\xff",
        b"nothing",
        b"[" * 5000,
        b'{"inputs": NaN}',
        b"1e999",
        b'"\\ud800"',
    ]:
        with subtests.test(body=body):
            with pytest.raises(ValueError, match="expected JSON") as caught:
                parse_infer(*split_body(body, None), serve_models["told"])
            assert "\n" not in str(caught.value)


@pytest.mark.parametrize("body", [b"[]", b"3", b"null", b'"a"'])
def test_json_that_is_no_object_is_refused(serve_models, body):
    with pytest.raises(ValueError, match="expected the request as a JSON object"):
        parse_infer(*split_body(body, None), serve_models["told"])
