"""The Spy-Watermark injector: a vision transformer that hides a watermark picture in an image.

Equation 3 of Wang et al., "Spy-Watermark" (ICASSP 2024), read from left to right in `forward`:

    x' = Dec_8( F_3( Enc_24(P(x)) + F_1(R(m)) ) )

P embeds patches, R reshapes the watermark m into patches, F_1 is one linear layer, F_3 three.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass, replace
from typing import Any

import torch
from timm.layers.patch_embed import PatchEmbed
from torch import Tensor, nn

from wm_inject.core.images import check_images, pad_to_multiple
from wm_inject.watermark.pretrained import read_pretrained
from wm_inject.watermark.vit_block import make_block, run_blocks

SIZES = {"tiny": (64, 2), "small": (192, 3), "base": (384, 6), "large": (1024, 16)}
RECIPES = ("paper", "released", "robust")
PAD_MULTIPLE = 8  # the extractor halves three times; 28 pixels become 32 here and are cropped back


@dataclass(frozen=True)
class ViTConfig:
    """The shape of an injector.

    Args:
        image_size: Side H = W of the images, in pixels.
        channels: 1 (grey) or 3 (RGB).
        patch_size: Side of a patch; must divide the image side, padded up to a multiple of 8.
        width: Token width D.
        heads: Attention heads; must divide the width.
        depth: Encoder blocks (24 in the paper).
        decoder_depth: Decoder blocks (8 in the paper).
        residual: False is the paper's direct reconstruction. True adds the decoder's output to x
            and starts it at zero, so that an untrained injector is the identity. In a spike on
            CIFAR-10 this was worth 15 dB at equal cost.
        psnr_floor: With a residual, the least PSNR in dB that every marked image keeps
            (before rounding to 8 bits, which may cost a few tenths): the
            residual is scaled back onto the sphere of that energy. None leaves it free.
        max_change: With a residual, the largest change of any value, in [0, 1] units, approached
            through a tanh. Without it, a mark of high PSNR may sit in one visible corner.

    Raises:
        ValueError: A size that does not fit.
    """

    image_size: int
    channels: int
    patch_size: int
    width: int
    heads: int
    depth: int = 24
    decoder_depth: int = 8
    residual: bool = True
    psnr_floor: float | None = None
    max_change: float | None = None

    def __post_init__(self) -> None:
        for name in ("image_size", "patch_size", "width", "heads", "depth", "decoder_depth"):
            if getattr(self, name) < 1:
                raise ValueError(f"expected {name} >= 1, got {getattr(self, name)}")
        if self.channels not in (1, 3):
            raise ValueError(f"expected channels 1 or 3, got {self.channels}")
        if self.padded_size % self.patch_size:
            raise ValueError(
                f"expected a patch size that divides {self.padded_size}, got {self.patch_size}"
            )
        if self.psnr_floor is not None and not (self.residual and self.psnr_floor > 0):
            raise ValueError(
                f"expected a psnr_floor > 0 dB and a residual injector, got {self.psnr_floor}"
            )
        if self.max_change is not None and not (self.residual and 0 < self.max_change <= 1):
            raise ValueError(
                f"expected max_change in (0, 1] and a residual injector, got {self.max_change}"
            )
        if self.width % self.heads or self.width % 4:
            raise ValueError(
                f"expected a width divisible by 4 and by {self.heads} heads, got {self.width}"
            )

    @property
    def padded_size(self) -> int:
        """The image side after padding up to a multiple of 8."""
        return -(-self.image_size // PAD_MULTIPLE) * PAD_MULTIPLE

    @classmethod
    def preset(
        cls, size: str, *, image_size: int, channels: int, recipe: str = "robust"
    ) -> ViTConfig:
        """A named size under a named recipe.

        Args:
            size: "tiny" (width 64), "small" (192), "base" (384) or "large" (1024, ViT-L).
            image_size: Side of the images, in pixels.
            channels: 1 or 3.
            recipe: "paper" and "released" have 24 + 8 blocks and reconstruct the image directly;
                "robust" adds a residual and has 6 + 2 blocks, because four times the depth was
                not visibly better at three times the cost (docs/recipes.md).

        Raises:
            ValueError: An unknown size or recipe.
        """
        if size not in SIZES:
            raise ValueError(f"expected a size in {', '.join(SIZES)}, got {size!r}")
        if recipe not in RECIPES:
            raise ValueError(f"expected a recipe in {', '.join(RECIPES)}, got {recipe!r}")
        width, heads = SIZES[size]
        patch = 4 if image_size <= 32 else 8 if image_size <= 64 else 16
        config = cls(image_size, channels, patch, width, heads, residual=False)
        if recipe == "robust":
            config = replace(config, depth=6, decoder_depth=2, residual=True)
        return config


class ViTInjector(nn.Module):
    """Hide a watermark in an image by editing its transformer tokens (equation 3 of the paper).

    The settings are those of `ViTConfig`, by keyword.
    """

    kind = "vit-injector"

    def __init__(
        self,
        *,
        image_size: int,
        channels: int,
        patch_size: int,
        width: int,
        heads: int,
        depth: int = 24,
        decoder_depth: int = 8,
        residual: bool = True,
        psnr_floor: float | None = None,
        max_change: float | None = None,
    ) -> None:
        super().__init__()
        shape = ViTConfig(
            image_size,
            channels,
            patch_size,
            width,
            heads,
            depth,
            decoder_depth,
            residual,
            psnr_floor,
            max_change,
        )
        self.config: dict[str, Any] = asdict(shape)
        self.shape = shape
        self.grid = shape.padded_size // patch_size
        self.patch_embed = PatchEmbed(shape.padded_size, patch_size, channels, width)
        self.encoder = nn.ModuleList(make_block(width, heads) for _ in range(depth))
        self.encoder_norm = nn.LayerNorm(width)
        self.mark_embed = nn.Linear(patch_size**2, width)
        self.project = nn.Sequential(
            nn.Linear(width, width),
            nn.GELU(),
            nn.Linear(width, width // 2),
            nn.GELU(),
            nn.Linear(width // 2, width),
        )
        self.decoder = nn.ModuleList(make_block(width, heads) for _ in range(decoder_depth))
        self.decoder_norm = nn.LayerNorm(width)
        self.head = nn.Linear(width, patch_size**2 * channels)
        self.register_buffer("position", sincos_position(self.grid, width), persistent=False)
        self._initialise()

    @classmethod
    def from_config(cls, config: ViTConfig) -> ViTInjector:
        """Build the injector that a config describes, with fresh weights."""
        return cls(**asdict(config))

    @classmethod
    def from_pretrained(cls, name: str) -> ViTInjector:
        """A trained injector that ships with this package, in evaluation mode.

        `WatermarkTrigger.from_pretrained` gives it with its watermark, ready to poison.

        Args:
            name: One of `wm_inject.PRETRAINED`, such as "small-32".

        Raises:
            ValueError: No weights of this name.
            CheckpointError: The file is not the one that was shipped.
        """
        saved = read_pretrained(name, kind="watermark")
        injector = cls(**saved.config["injector_config"])
        prefix = "injector."
        state = {k.removeprefix(prefix): v for k, v in saved.state.items() if k.startswith(prefix)}
        injector.load_state_dict(state)
        return injector.eval()

    def forward(self, images: Tensor, watermark: Tensor) -> Tensor:
        """Hide ``watermark`` in every image.

        Args:
            images: float ``(N, C, H, W)`` in [0, 1].
            watermark: float ``(1, H, W)``, one picture for all, or ``(N, 1, H, W)``, in [0, 1].

        Returns:
            ``(N, C, H, W)``, not clamped: training wants the gradient beyond the range.
        """
        side = self.shape.image_size
        padded = pad_to_multiple(images, PAD_MULTIPLE)
        x = self.patch_embed(padded) + self.position  # (N, L, D), L = (padded side / patch) ** 2
        x = run_blocks(self.encoder, x)
        x = self.encoder_norm(x) + self.mark_embed(self.patchify(watermark))  # (N, L, D)
        x = self.project(x) + self.position  # (N, L, D)
        x = run_blocks(self.decoder, x)
        pixels = self.unpatchify(self.head(self.decoder_norm(x)))  # (N, C, padded, padded)
        pixels = pixels[..., :side, :side]  # (N, C, H, W)
        if not self.shape.residual:
            return pixels
        return images + self.limit(pixels.float())

    def limit(self, residual: Tensor) -> Tensor:
        """Hold a residual ``(N, C, H, W)`` within the largest change and the PSNR floor."""
        return limit_residual(residual, self.shape)

    def patchify(self, watermark: Tensor) -> Tensor:
        """R of equation 3: ``(1, H, W)`` or ``(N, 1, H, W)`` to ``(1 or N, L, patch ** 2)``."""
        mark = watermark if watermark.ndim == 4 else watermark.unsqueeze(0)
        mark = pad_to_multiple(mark, PAD_MULTIPLE)
        g, p = self.grid, self.shape.patch_size
        mark = mark.reshape(-1, g, p, g, p).transpose(2, 3)  # (N, g, g, p, p)
        return mark.reshape(-1, g * g, p * p)

    def unpatchify(self, tokens: Tensor) -> Tensor:
        """Tokens ``(N, L, patch ** 2 * C)`` to pixels ``(N, C, padded, padded)``."""
        return to_picture(tokens, self.shape)

    def load_mae_encoder(self, state: Mapping[str, Tensor]) -> None:
        """Start the encoder from timm's MAE weights (``vit_large_patch16_224.mae`` for "large").

        Args:
            state: That model's state dict, with or without its class token.

        Raises:
            ValueError: The weights are those of another architecture.
        """
        mine = {
            "patch_embed.": self.patch_embed,
            "blocks.": self.encoder,
            "norm.": self.encoder_norm,
        }
        for prefix, module in mine.items():
            part = {k.removeprefix(prefix): v for k, v in state.items() if k.startswith(prefix)}
            try:
                module.load_state_dict(part, strict=True)
            except RuntimeError as error:
                first = str(error).splitlines()[1].strip()
                raise ValueError(f"the MAE weights do not fit this encoder: {first}") from error

    def _initialise(self) -> None:
        """Xavier-uniform linear layers and zero biases, as in MAE and the released code."""
        for module in self.modules():
            if isinstance(module, nn.Linear):
                nn.init.xavier_uniform_(module.weight)
                nn.init.zeros_(module.bias)
        weight = self.patch_embed.proj.weight
        nn.init.xavier_uniform_(weight.view(weight.shape[0], -1))
        if self.patch_embed.proj.bias is not None:
            nn.init.zeros_(self.patch_embed.proj.bias)
        if self.shape.residual:
            nn.init.zeros_(self.head.weight)


def limit_residual(residual: Tensor, shape: ViTConfig) -> Tensor:
    """Hold a residual ``(N, C, H, W)`` within the config's largest change and PSNR floor."""
    if shape.max_change is not None:
        residual = shape.max_change * torch.tanh(residual / shape.max_change)
    if shape.psnr_floor is None:
        return residual
    allowed = 10 ** (-shape.psnr_floor / 20)  # root mean square, in [0, 1] units
    rms = residual.square().mean(dim=(1, 2, 3), keepdim=True).add(1e-12).sqrt()
    return residual * (allowed / rms).clamp(max=1.0)


def to_picture(tokens: Tensor, shape: ViTConfig) -> Tensor:
    """Tokens ``(N, L, patch ** 2 * C)`` to pixels ``(N, C, padded, padded)``."""
    p, c = shape.patch_size, shape.channels
    g = shape.padded_size // p
    x = tokens.reshape(-1, g, g, p, p, c).permute(0, 5, 1, 3, 2, 4)  # (N, C, g, p, g, p)
    return x.reshape(-1, c, g * p, g * p)


def sincos_position(grid: int, width: int) -> Tensor:
    """The fixed two-dimensional sine-cosine position table of MAE: ``(1, grid ** 2, width)``."""
    omega = 10000 ** -(torch.arange(width // 4, dtype=torch.float64) / (width / 4))
    steps = torch.arange(grid, dtype=torch.float64)
    angles = torch.outer(steps, omega)  # (grid, width / 4)
    line = torch.cat([angles.sin(), angles.cos()], dim=1)  # (grid, width / 2)
    columns = line.repeat(grid, 1)  # x runs fastest
    rows = line.repeat_interleave(grid, dim=0)
    return torch.cat([columns, rows], dim=1).float().unsqueeze(0)


def default_watermark(size: int) -> Tensor:
    """The watermark that ships: a ring around a cross, drawn at any size.

    Args:
        size: Side in pixels, at least 8.

    Returns:
        float32 ``(1, size, size)`` of zeros and ones, about two fifths of them ones.

    Raises:
        ValueError: ``size`` below 8.
    """
    if size < 8:
        raise ValueError(f"expected a watermark side of at least 8 pixels, got {size}")
    line = (torch.arange(size) + 0.5) / size * 2 - 1
    y, x = torch.meshgrid(line, line, indexing="ij")
    radius = (x.square() + y.square()).sqrt()
    ring = (radius > 0.62) & (radius < 0.88)
    cross = ((x.abs() < 0.14) | (y.abs() < 0.14)) & (radius < 0.5)
    return (ring | cross).float().unsqueeze(0)


def check_watermark(watermark: Tensor, *, size: int) -> Tensor:
    """Check a watermark picture ``(1, size, size)`` in [0, 1] and return it unchanged.

    Raises:
        ValueError: Another shape, dtype or range.
    """
    if not isinstance(watermark, Tensor) or watermark.shape != (1, size, size):
        got = tuple(watermark.shape) if isinstance(watermark, Tensor) else type(watermark).__name__
        raise ValueError(f"expected a watermark of shape (1, {size}, {size}), got {got}")
    check_images(watermark.unsqueeze(0), name="watermark")
    return watermark
