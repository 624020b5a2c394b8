from __future__ import annotations

from pathlib import Path

import pytest

from wm_eval.workspace import Made, Workspace


def workspace(folder: Path, said: list | None = None) -> Workspace:
    return Workspace(folder, 0, "abc", "cpu", (said if said is not None else []).append)


class Work:
    """A stage that counts how often it was done and writes one file."""

    def __init__(self, space: Workspace, text: str = "weights") -> None:
        self.space, self.text, self.times = space, text, 0

    def __call__(self, checkpoint: Path) -> Made:
        self.times += 1
        checkpoint.write_text("half way")
        self.space.path("models", "a.bin").write_text(self.text)
        return Made({"cda": 1 / 3}, ("models/a.bin",))


def test_a_stage_that_is_done_is_skipped(tmp_path: Path) -> None:
    said: list[str] = []
    space = workspace(tmp_path, said)
    work = Work(space)
    first = space.stage("a", {"x": 1}, (), work)
    assert space.stage("a", {"x": 1}, (), work) == first
    assert work.times == 1
    assert said == ["a: started", "a: done before"]
    assert list((tmp_path / "work").iterdir()) == []
    assert (tmp_path / "records" / "a.env.json").is_file()


def test_a_stage_is_done_again_if_anything_changed(tmp_path: Path) -> None:
    space = workspace(tmp_path)
    work = Work(space)
    space.stage("a", {"x": 1}, (), work)
    space.stage("a", {"x": 2}, (), work)
    assert work.times == 2
    (tmp_path / "models" / "a.bin").write_text("tampered")
    space.stage("a", {"x": 2}, (), work)
    assert work.times == 3
    (tmp_path / "models" / "a.bin").unlink()
    space.stage("a", {"x": 2}, (), work)
    assert work.times == 4
    (tmp_path / "records" / "a.json").write_text("{")
    space.stage("a", {"x": 2}, (), work)
    assert work.times == 5


def test_what_depends_on_a_changed_stage_is_done_again(tmp_path: Path) -> None:
    space = workspace(tmp_path)
    later = Work(space)
    for text, times in (("weights", 1), ("weights", 1), ("others", 2)):
        (tmp_path / "records" / "a.json").unlink(missing_ok=True)
        space.stage("a", {}, (), Work(space, text))
        space.stage("b", {}, ("a",), lambda _: (later(_), Made({}))[1])
        assert later.times == times
        later.text = text


def test_a_killed_study_leaves_the_same_bytes(tmp_path: Path) -> None:
    def killed(_: Path) -> Made:
        raise KeyboardInterrupt

    whole, resumed = workspace(tmp_path / "one"), workspace(tmp_path / "two")
    for name in "ab":
        whole.stage(name, {}, ("a",) if name == "b" else (), Work(whole))
    resumed.stage("a", {}, (), Work(resumed))
    with pytest.raises(KeyboardInterrupt):
        resumed.stage("b", {}, ("a",), killed)
    assert not (tmp_path / "two" / "records" / "b.json").exists()
    for name in "ab":
        resumed.stage(name, {}, ("a",) if name == "b" else (), Work(resumed))
        records = [tmp_path / x / "records" / f"{name}.json" for x in ("one", "two")]
        assert records[0].read_bytes() == records[1].read_bytes()
