"""Settings from TOML and back."""

from __future__ import annotations

import dataclasses
import sys
import tomllib
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from wm_inject.core.toml_settings import fill, load_toml, to_toml


@dataclass(frozen=True)
class Inner:
    rate: float | None = 0.5
    kind: Literal["near", "far"] = "near"
    sides: tuple[int, ...] = (1, 2)
    seed: int = 0

    def __post_init__(self) -> None:
        if self.rate is not None and self.rate < 0:
            raise ValueError(f"expected rate >= 0, got {self.rate}")

    @classmethod
    def preset(cls, name: str) -> Inner:
        if name != "wide":
            raise ValueError(f"expected a preset in wide, got {name!r}")
        return cls(sides=(7, 8, 9))


@dataclass(frozen=True)
class Needy:
    """Has a table without a default."""

    inner: Inner
    weight: float = 1.0


@dataclass(frozen=True)
class Pointed:
    name: str


@dataclass(frozen=True)
class Whole:
    name: str | None = None
    seed: int = 0
    on: bool = False
    pair: tuple[float, int] = (0.5, 1)
    place: Path = Path("here")
    inner: Inner = Inner()
    free: Mapping[str, Any] = field(default_factory=dict)
    worlds: Mapping[str, Needy] = field(default_factory=dict)
    points: Mapping[str, Pointed] = field(default_factory=dict)


NAMES = st.text("abc-_. äé\"'\\\n", max_size=6)
INNERS = st.builds(
    Inner,
    rate=st.none() | st.floats(0, 1e300),
    kind=st.sampled_from(["near", "far"]),
    sides=st.lists(st.integers(-(2**60), 2**60), max_size=3).map(tuple),
)
WHOLES = st.builds(
    Whole,
    name=st.none() | NAMES,
    seed=st.integers(0, 2**31),
    on=st.booleans(),
    pair=st.tuples(st.floats(allow_nan=False), st.integers(0, 9)),
    place=NAMES.map(Path),
    inner=INNERS,
    free=st.dictionaries(NAMES, st.booleans() | st.integers(0, 9) | NAMES | st.floats(0, 1)),
    worlds=st.dictionaries(NAMES, st.builds(Needy, inner=INNERS), max_size=2),
)


@pytest.mark.integration
@settings(derandomize=True, max_examples=200, deadline=None)
@given(config=WHOLES, start=WHOLES)
def test_what_is_written_gives_the_same_settings_from_any_start(
    config: Whole, start: Whole
) -> None:
    assert fill(start, tomllib.loads(to_toml(config))) == config


def test_every_field_is_written_but_the_seeds_that_another_takes_the_place_of() -> None:
    found = tomllib.loads(to_toml(Whole(inner=Inner(seed=5))))
    assert set(found) == {f.name for f in dataclasses.fields(Whole)}
    assert set(found["inner"]) == {"rate", "kind", "sides"}
    assert "seed" in tomllib.loads(to_toml(Inner(seed=5)))
    assert found["name"] == "none" and found["place"] == "here"


def test_a_file_changes_what_it_names_and_nothing_else() -> None:
    start = Whole(name="mine", inner=Inner(rate=0.25), free={"a": 1, "b": 2})
    found = fill(start, {"on": True, "inner": {"rate": "none"}, "free": {"a": 3}, "pair": [1, 2]})
    assert found == dataclasses.replace(
        start, on=True, inner=Inner(rate=None), free={"a": 3}, pair=(1.0, 2)
    )
    assert isinstance(found.pair[0], float)


def test_a_table_may_start_from_a_preset_and_one_of_a_mapping_from_its_defaults() -> None:
    found = fill(Whole(), {"inner": {"preset": "wide", "rate": 1}})
    assert found.inner == Inner(rate=1.0, sides=(7, 8, 9))
    there = fill(Whole(worlds={"a": Needy(Inner(), 2.0)}), {"worlds": {"a": {}, "b": {}}})
    assert there.worlds == {"a": Needy(Inner(), 2.0), "b": Needy(Inner(), 1.0)}


def test_what_does_not_fit_is_refused_in_one_line(subtests: pytest.Subtests) -> None:
    for values, message in [
        ({"colour": 1}, "unknown key 'colour' in settings: expected one of free, inner, name, on"),
        ({"inner": {"rat": 1}}, "unknown key 'rat' in settings.inner: expected one of kind, rate"),
        ({"on": 1}, "expected bool for settings.on, got 1"),
        ({"seed": True}, "expected int for settings.seed, got True"),
        ({"seed": "none"}, "expected int for settings.seed, got 'none'"),
        ({"name": 3}, "for settings.name, got 3"),
        ({"pair": [1]}, "for settings.pair"),
        ({"inner": 1}, "expected a table for settings.inner, got 1"),
        ({"free": 1}, "expected a table for settings.free, got 1"),
        ({"inner": {"kind": "wide"}}, "for settings.inner.kind, got 'wide'"),
        ({"inner": {"rate": -1}}, "settings.inner: expected rate >= 0, got -1"),
        ({"inner": {"preset": "narrow"}}, "expected a preset in wide"),
        ({"preset": "wide"}, "unknown key 'preset' in settings"),
        ({"worlds": {"a": {"weight": "much"}}}, "expected float for settings.worlds.a.weight"),
        ({"worlds": {"a": 1}}, "expected a table for settings.worlds.a, got 1"),
        ({"points": {"a": {}}}, "expected settings.points.a.name, which has no default"),
    ]:
        with subtests.test(values=values, message=message):
            with pytest.raises(ValueError) as refused:
                fill(Whole(), values)
            assert message in str(refused.value) and "\n" not in str(refused.value)


@pytest.mark.parametrize(
    "config", [Whole(name="none"), Whole(free={"a": None}), Inner(rate=float("nan"))]
)
def test_what_toml_cannot_hold_is_not_written(config: Any) -> None:
    with pytest.raises(ValueError, match="expected settings that TOML can hold"):
        to_toml(config)


def test_without_tomli_w_the_error_names_it(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "tomli_w", None)
    with pytest.raises(ImportError, match="pip install tomli-w"):
        to_toml(Inner())


def test_one_seed_is_enough() -> None:
    fill(Whole(), {"seed": 1, "free": {"seed": 2}})
    fill(Needy(Inner()), {"inner": {"seed": 2}})  # has none itself
    with pytest.raises(ValueError, match=r"one seed at the top of study, got one in study\.inner"):
        fill(Whole(), {"inner": {"seed": 2}}, "study")


def test_only_a_toml_file_is_read(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"expected settings in TOML at .*none\.toml, found none"):
        load_toml(tmp_path / "none.toml")
    path = tmp_path / "bad.toml"
    for content in (b"a = ", b"\xff\xfe"):
        path.write_bytes(content)
        with pytest.raises(ValueError, match=r"bad\.toml is not TOML"):
            load_toml(path)
    path.write_text("a = 1")
    assert load_toml(path) == {"a": 1}
