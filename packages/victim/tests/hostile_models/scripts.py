"""TorchScript that acts, loops or grows."""

import warnings
from pathlib import Path

import torch

from .case import case

# --- TorchScript ---

SCRIPT = {"allow_torchscript": True, "image_size": 16, "channels": 3}


class WritesAtForward(torch.nn.Module):
    def __init__(self, path: str) -> None:
        super().__init__()
        self.path = path

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        torch.save(x, self.path)
        return x.flatten(1)[:, :10]


class MapsAtForward(torch.nn.Module):
    def __init__(self, path: str) -> None:
        super().__init__()
        self.path = path

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        y = torch.from_file(self.path, shared=True, size=16)
        return x.flatten(1)[:, :10] + y.sum()


class LoopsAtForward(torch.nn.Module):
    def forward(self, x: torch.Tensor) -> torch.Tensor:
        while bool(x.sum() < 1e30):
            x = x * 1.0
        return x.flatten(1)[:, :10]


class BranchesAtForward(torch.nn.Module):
    def forward(self, x: torch.Tensor) -> torch.Tensor:
        y = x.flatten(1)[:, :10]
        if bool(x[0, 0, 0, 0] > 0.99):
            y = -y
        return y


class GrowsAtForward(torch.nn.Module):
    def forward(self, x: torch.Tensor) -> torch.Tensor:
        y = torch.ones([8589934592])
        return x.flatten(1)[:, :10] + y.sum()


class ActsAtLoad(torch.nn.Module):
    def __init__(self, path: str) -> None:
        super().__init__()
        self.path, self.total = path, 0.0

    @torch.jit.export
    def __getstate__(self) -> tuple[str, bool]:
        return self.path, self.training

    @torch.jit.export
    def __setstate__(self, state: tuple[str, bool]) -> None:
        self.path = state[0]
        self.training = state[1]
        # What comes of it must be kept, or the compiler leaves the call out.
        y = torch.from_file(state[0], shared=True, size=16)
        self.total = float(y.sum())

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x.flatten(1)[:, :10]


def scripted(module: torch.nn.Module, folder: Path) -> Path:
    path = folder / "a.pt"
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        torch.jit.script(module.eval()).save(str(path))
    return path


@case("torchscript", **SCRIPT)
def writes_a_file_at_forward(folder: Path, marker: Path) -> Path:
    return scripted(WritesAtForward(str(marker)), folder)


@case("torchscript", **SCRIPT)
def maps_a_file_at_forward(folder: Path, marker: Path) -> Path:
    return scripted(MapsAtForward(str(marker)), folder)


@case("torchscript", **SCRIPT)
def acts_at_load(folder: Path, marker: Path) -> Path:
    return scripted(ActsAtLoad(str(marker)), folder)


@case("torchscript")
def acts_at_load_and_is_not_allowed(folder: Path, marker: Path) -> Path:
    return scripted(ActsAtLoad(str(marker)), folder)


@case("torchscript", child=True, **SCRIPT)
def loops_at_forward(folder: Path, marker: Path) -> Path:
    return scripted(LoopsAtForward(), folder)


@case("torchscript", child=True, **SCRIPT)
def grows_at_forward(folder: Path, marker: Path) -> Path:
    return scripted(GrowsAtForward(), folder)


@case("torchscript", child=True, **SCRIPT)
def branches_at_forward(folder: Path, marker: Path) -> Path:
    return scripted(BranchesAtForward(), folder)
