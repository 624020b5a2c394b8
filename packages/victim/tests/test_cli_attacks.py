"""``wm-victim train --attack``: every attack of the table, planted by its name."""

import json
from pathlib import Path

import pytest
import torch

from wm_inject import load_trigger
from wm_inject.attacks import Attack, attack, list_attacks
from wm_inject.core.checkpoint import load_checkpoint
from wm_victim import train
from wm_victim.attack_setup import remove_parts, set_up_attack
from wm_victim.cli import main

SMALL = ["--data", "digits", "--image-size", "16", "--device", "cpu"]
TRAIN = ["train", *SMALL, "--width", "8", "--limit", "320", "--profile", "tiny"]
EPOCHS = {"lf": 6}  # LF searches on a classifier that has learned something
SETTINGS = {"ssba": ["--set", "steps=12"]}


def command(attack: str, out: Path, *options: str) -> list[str]:
    epochs = ["--epochs", str(EPOCHS.get(attack, 1))]
    return [
        *TRAIN,
        *epochs,
        *SETTINGS.get(attack, []),
        "--attack",
        attack,
        "--out",
        str(out),
        *options,
    ]


@pytest.mark.integration
@pytest.mark.parametrize("name", list_attacks())
def test_every_attack_is_planted_and_its_trigger_kept(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], name: str
) -> None:
    out, kept = tmp_path / "victim.safetensors", tmp_path / "trigger.safetensors"
    assert main(command(name, out, "--save-trigger", str(kept), "--target", "1")) == 0
    shown = capsys.readouterr().out.splitlines()
    assert shown[:2] == [f"wrote {out}", f"wrote {kept}"]
    assert {path.name for path in tmp_path.iterdir()} == {out.name, kept.name}
    assert load_trigger(kept).kind == name
    told = load_checkpoint(out).metadata["attack"]
    assert (told["name"], told["profile"], told["plan"]["target"]) == (name, "tiny", 1)
    assert told["trigger"]["kind"] == name and isinstance(told["facts"], dict)
    clean_label = name == "sig"
    assert (told["plan"]["label_map"] == "clean-label") == clean_label
    # What was kept is the trigger as it was after training: it measures the same.
    again = ["test", str(out), *SMALL, "--trigger", str(kept), "--target", "1"]
    assert main(again) == 0
    assert capsys.readouterr().out.splitlines() == shown[2:]


@pytest.mark.integration
def test_ratio_and_settings_reach_the_attack(tmp_path: Path) -> None:
    out, kept = tmp_path / "victim.safetensors", tmp_path / "trigger.safetensors"
    options = ["--ratio", "0.25", "--set", "margin=2", "--set", "value=0.5"]
    assert main(command("badnets", out, *options, "--save-trigger", str(kept))) == 0
    told = load_checkpoint(out).metadata["attack"]
    assert told["plan"]["ratio"] == 0.25 and told["settings"] == options[3::2]
    config = load_trigger(kept).config
    assert (config["margin"], config["value"]) == (2, 0.5)


@pytest.mark.integration
@pytest.mark.parametrize(
    ("attack", "stop"),
    [
        ("lf", 2),
        pytest.param("lf", 8, marks=pytest.mark.slow),
        ("wanet", 1),
        pytest.param("marksman", 1, marks=pytest.mark.slow),
        ("marksman", 3),
        pytest.param("input-aware", 1, marks=pytest.mark.slow),
    ],
)
def test_a_stopped_run_goes_on_to_the_same_bytes(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, attack: str, stop: int
) -> None:
    """Stopped after so many epochs in all, those of the attacker's own classifier included."""
    monkeypatch.setitem(EPOCHS, attack, EPOCHS.get(attack, 2))
    files = {}
    for name in ("whole", "part"):
        (tmp_path / name).mkdir()
        files[name] = [tmp_path / name / f"{kind}.safetensors" for kind in ("victim", "trigger")]
    out, kept = files["whole"]
    assert main(command(attack, out, "--save-trigger", str(kept))) == 0
    out, kept = files["part"]
    save, saved = train.save_state, []

    def save_and_stop(*arguments: object, **settings: object) -> None:
        save(*arguments, **settings)  # type: ignore[arg-type]
        saved.append(1)
        if len(saved) == stop:
            raise KeyboardInterrupt

    with monkeypatch.context() as stopping:
        stopping.setattr(train, "save_state", save_and_stop)
        assert main(command(attack, out, "--save-trigger", str(kept))) == 130
    assert not out.exists() and not kept.exists()
    assert main(command(attack, out, "--save-trigger", str(kept))) == 0
    for one, other in zip(*files.values(), strict=True):
        assert one.read_bytes() == other.read_bytes()
    assert sorted(path.name for path in out.parent.iterdir()) == sorted([out.name, kept.name])


def test_a_trigger_that_was_made_is_not_made_again(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from wm_victim.datasets import load_dataset
    from wm_victim.models import Classifier, build_classifier
    from wm_victim.train_config import TrainConfig

    data = load_dataset("digits", image_size=16, limit=200)
    fits = []
    fit = Attack.fit
    monkeypatch.setattr(Attack, "fit", lambda self, context: fits.append(1) or fit(self, context))
    checkpoint = tmp_path / "run.safetensors"

    def planted(chosen: Attack, target: int = 0) -> torch.nn.Module:
        def build(seed: int) -> Classifier:
            return build_classifier(
                "resnet10", num_classes=10, channels=1, image_size=16, width=8, seed=seed
            )

        return set_up_attack(
            chosen,
            data,
            config=TrainConfig(epochs=1),
            build=build,
            checkpoint=checkpoint,
            target=target,
            progress=False,
        ).trained_trigger

    first = planted(attack("blend", alpha=0.3))
    again = planted(attack("blend", alpha=0.3))
    assert len(fits) == 1 and torch.equal(first.picture, again.picture)
    planted(attack("blend", alpha=0.4))
    planted(attack("blend", alpha=0.4), target=1)
    assert len(fits) == 3
    assert [path.name for path in tmp_path.iterdir()] == ["run.trigger.safetensors"]
    remove_parts(checkpoint)
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("count", [31, 32, 33, 34, 64, 65, 3])
def test_steps_per_epoch_leave_out_a_single_image(count: int) -> None:
    from wm_victim.train_config import TrainConfig

    sizes = [len(rows) for rows in torch.arange(count).split(32)]
    expected = len(sizes) - (len(sizes) > 1 and sizes[-1] == 1)
    assert TrainConfig(batch_size=32).steps_per_epoch(count) == expected


@pytest.mark.integration
def test_a_kept_checkpoint_keeps_its_parts(tmp_path: Path) -> None:
    run = tmp_path / "run.safetensors"
    out = tmp_path / "victim.safetensors"
    assert main(command("badnets", out, "--checkpoint", str(run))) == 0
    assert run.is_file() and (tmp_path / "run.trigger.safetensors").is_file()


def test_a_folder_that_wm_inject_poisoned_is_read_with_its_labels(tmp_path: Path) -> None:
    from PIL import Image

    from wm_inject.cli import main as wm_inject
    from wm_victim.datasets import load_dataset

    for place in range(12):
        folder = tmp_path / "in" / ("ant", "bee", "cow")[place % 3]
        folder.mkdir(parents=True, exist_ok=True)
        Image.new("RGB", (16, 16), (place * 20,) * 3).save(folder / f"{place:02}.png")
    out = tmp_path / "out"
    options = ["--ratio", "0.25", "--target", "2", "--pool", "non_target", "--device", "cpu"]
    poison = ["poison", "--trigger", "badnets", *options, str(tmp_path / "in"), str(out)]
    assert wm_inject(poison) == 0
    rows = json.loads((out / "plan.json").read_text())["images"]
    assert sum(row["label_after"] != row["label_before"] for row in rows) == 2
    data = load_dataset(out)
    assert data.classes == ("ant", "bee", "cow")
    found = torch.cat([data.train.labels, data.test.labels]).bincount()
    wanted = torch.tensor([row["label_after"] for row in rows]).bincount()
    assert found.tolist() == wanted.tolist()
