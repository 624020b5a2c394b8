"""The Spy-Watermark injector: a vision transformer that hides a watermark picture in an image.

Equation 3 of Wang et al., "Spy-Watermark" (ICASSP 2024), read from left to right in `forward`:

    x' = Dec_8( F_3( Enc_24(P(x)) + F_1(R(m)) ) )

P embeds patches, R reshapes the watermark m into patches, F_1 is one linear layer, F_3 three.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any, NamedTuple

import torch
from timm.layers.patch_embed import PatchEmbed
from timm.models.vision_transformer import Block
from torch import Tensor, nn

from wm_inject.core.checks import check_channels, check_choice
from wm_inject.core.images import pad_to_multiple
from wm_inject.watermark.pretrained import read_pretrained

SIZES = {"tiny": (64, 2), "small": (192, 3), "base": (384, 6), "large": (1024, 16)}
RECIPES = ("paper", "released", "robust")
PAD_MULTIPLE = 8  # the extractor halves three times; 28 pixels become 32 here and are cropped back


class Bounds(NamedTuple):
    """What a residual is held within; None for no limit."""

    psnr_floor: float | None
    max_change: float | None


def vit_config(
    size: str, *, image_size: int, channels: int, recipe: str = "robust", **changes: Any
) -> dict[str, Any]:
    """The arguments of `ViTInjector` for a named size.

    Args:
        size: "tiny" (width 64), "small" (192), "base" (384) or "large" (1024, ViT-L).
        recipe: "paper" and "released" have 24 + 8 blocks and reconstruct the image directly;
            "robust" adds a residual and has 6 + 2 blocks, because four times the depth was
            not visibly better at three times the cost (docs/recipes.md).
        changes: Arguments to change.
    """
    check_choice("a size", size, SIZES)
    check_choice("a recipe", recipe, RECIPES)
    width, heads = SIZES[size]
    robust = recipe == "robust"
    return {
        "image_size": image_size,
        "channels": channels,
        "patch_size": 4 if image_size <= 32 else 8 if image_size <= 64 else 16,
        "width": width,
        "heads": heads,
        "depth": 6 if robust else 24,
        "decoder_depth": 2 if robust else 8,
        "residual": robust,
        **changes,
    }


class ViTInjector(nn.Module):
    """Hide a watermark in an image by editing its transformer tokens (equation 3 of the paper).

    Args:
        image_size: Side H = W of the images, in pixels.
        channels: 1 or 3.
        patch_size: Side of a patch; must divide the image side, padded up to a multiple of 8.
        width: Token width D.
        heads: Attention heads; must divide the width.
        depth: Encoder blocks (24 in the paper).
        decoder_depth: Decoder blocks (8 in the paper).
        residual: False is the paper's direct reconstruction. True adds the decoder's output to x
            and starts it at zero, so that an untrained injector is the identity. On CIFAR-10 this
            was worth 15 dB at equal cost.
        psnr_floor: With a residual, the least PSNR in dB of every marked image (before rounding to
            8 bits, which may cost a few tenths): the residual is scaled back onto the sphere of
            that energy. None leaves it free.
        max_change: With a residual, the largest change of any value, in [0, 1] units, approached
            through a tanh. Without it, a mark of high PSNR may gather in one visible corner.
        luminance: With a residual, change all colours alike: such a mark stays where colours are
            taken away, or stored at half the resolution, as JPEG does.
    """

    kind = "vit-injector"
    position: Tensor

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
        luminance: bool = False,
    ) -> None:
        config = {k: v for k, v in locals().items() if k not in ("self", "__class__")}
        super().__init__()
        self.config: dict[str, Any] = config
        for name in ("image_size", "patch_size", "width", "heads", "depth", "decoder_depth"):
            if config[name] < 1:
                raise ValueError(f"expected {name} >= 1, got {config[name]}")
        check_channels(channels)
        padded_size = -(-image_size // PAD_MULTIPLE) * PAD_MULTIPLE
        if padded_size % patch_size:
            raise ValueError(f"expected a patch_size that divides {padded_size}, got {patch_size}")
        if psnr_floor is not None and not (residual and psnr_floor > 0):
            raise ValueError(f"expected psnr_floor > 0 dB and a residual, got {psnr_floor}")
        if max_change is not None and not (residual and 0 < max_change <= 1):
            raise ValueError(f"expected max_change in (0, 1] and a residual, got {max_change}")
        if luminance and not residual:
            raise ValueError("expected a residual for a change in luminance alone")
        if width % heads or width % 4:
            raise ValueError(f"expected a width divisible by 4 and by {heads} heads, got {width}")
        self.image_size, self.channels, self.patch_size = image_size, channels, patch_size
        self.width, self.heads, self.residual = width, heads, residual
        self.bounds = Bounds(psnr_floor, max_change)
        self.colours = 1 if luminance else channels  # of the decoder's output
        self.grid = padded_size // patch_size
        self.patch_embed = PatchEmbed(padded_size, patch_size, channels, width)
        self.encoder = nn.ModuleList(_block(width, heads) for _ in range(depth))
        self.encoder_norm = nn.LayerNorm(width)
        self.mark_embed = nn.Linear(patch_size**2, width)
        self.project = nn.Sequential(
            nn.Linear(width, width),
            nn.GELU(),
            nn.Linear(width, width // 2),
            nn.GELU(),
            nn.Linear(width // 2, width),
        )
        self.decoder = nn.ModuleList(_block(width, heads) for _ in range(decoder_depth))
        self.decoder_norm = nn.LayerNorm(width)
        self.head = nn.Linear(width, patch_size**2 * self.colours)
        self.register_buffer("position", sincos_position(self.grid, width), persistent=False)
        self._initialise()

    @classmethod
    def from_pretrained(cls, name: str) -> ViTInjector:
        """A trained injector that ships with this package, in evaluation mode.

        ``name`` is one of `wm_inject.PRETRAINED`. `WatermarkTrigger.from_pretrained` has it with
        its watermark, ready to poison.
        """
        saved = read_pretrained(name, kind="watermark")
        injector, prefix = cls(**saved.config["injector_config"]), "injector."
        injector.load_state_dict(
            {k.removeprefix(prefix): v for k, v in saved.state.items() if k.startswith(prefix)}
        )
        return injector.eval()

    def forward(self, images: Tensor, watermark: Tensor, *, bounds: Bounds | None = None) -> Tensor:
        """Hide ``watermark``, ``(1, H, W)`` for all images or ``(N, 1, H, W)``, in ``images``.

        Not clamped: training needs the gradient beyond the range. ``bounds`` replace those of the
        constructor, for training with wider ones.
        """
        x = self.patch_embed(pad_to_multiple(images, PAD_MULTIPLE))  # (N, L, D), L = grid ** 2
        x = _run_blocks(self.encoder, x + self.position)
        x = self.encoder_norm(x) + self.mark_embed(self.patchify(watermark))  # (N, L, D)
        x = self.project(x) + self.position  # (N, L, D)
        x = _run_blocks(self.decoder, x)
        pixels = self.unpatchify(self.head(self.decoder_norm(x)))  # (N, C or 1, padded, padded)
        pixels = pixels[..., : self.image_size, : self.image_size]  # (N, C or 1, H, W)
        if not self.residual:
            return pixels
        return images + limit_residual(pixels.float(), self.bounds if bounds is None else bounds)

    def patchify(self, watermark: Tensor) -> Tensor:
        """R of equation 3: ``(1, H, W)`` or ``(N, 1, H, W)`` to ``(1 or N, L, patch ** 2)``."""
        mark = watermark if watermark.ndim == 4 else watermark.unsqueeze(0)
        mark = pad_to_multiple(mark, PAD_MULTIPLE)
        g, p = self.grid, self.patch_size
        mark = mark.reshape(-1, g, p, g, p).transpose(2, 3)  # (N, g, g, p, p)
        return mark.reshape(-1, g * g, p * p)

    def unpatchify(self, tokens: Tensor) -> Tensor:
        """Tokens ``(N, L, patch ** 2 * C)`` to pixels ``(N, C, padded, padded)``; C may be 1."""
        return unpatchify(tokens, self.grid, self.patch_size, self.colours)

    def load_mae_encoder(self, state: Mapping[str, Tensor]) -> None:
        """Start the encoder from the state dict of timm's MAE, with or without its class token.

        For size "large" that is ``vit_large_patch16_224.mae``; ``ValueError`` for another
        architecture.
        """
        modules: dict[str, nn.Module] = {
            "patch_embed.": self.patch_embed,
            "blocks.": self.encoder,
            "norm.": self.encoder_norm,
        }
        for prefix, module in modules.items():
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
        if self.residual:
            nn.init.zeros_(self.head.weight)


def _block(width: int, heads: int) -> Block:
    """A pre-norm block with an MLP of four times the width."""
    return Block(width, heads, mlp_ratio=4, qkv_bias=True)


def _run_blocks(blocks: Iterable[nn.Module], tokens: Tensor) -> Tensor:
    """Run timm's blocks over ``(N, L, D)``, with the tokens as rows of one matrix.

    timm's own forward keeps ``(N, L, D)``. With ``(N * L, D)`` every linear layer is one matrix
    product with its bias, in torch and as one Gemm node in ONNX, and ONNX Runtime keeps queries,
    keys and values apart without extra copies. The mathematics and the weights are timm's.
    """
    length, width = tokens.shape[1:]
    x = tokens.reshape(-1, width)  # (N * L, D)
    block: Any
    for block in blocks:
        x = x + _attend(block.attn, block.norm1(x), length)
        x = x + block.mlp(block.norm2(x))
    return x.reshape(-1, length, width)


def _attend(attention: Any, x: Tensor, length: int) -> Tensor:
    """Self-attention over rows ``(N * L, D)``, L = ``length``.

    Plain softmax(q k^T) v: half the time of the fused kernel in bf16 on CPUs at these lengths.
    """
    heads, size = attention.num_heads, attention.head_dim
    parts = attention.qkv(x).chunk(3, dim=-1)
    q, k, v = (part.reshape(-1, length, heads, size).transpose(1, 2) for part in parts)
    scores = (q * attention.scale) @ k.transpose(-2, -1)  # (N, heads, L, L)
    mixed = scores.softmax(dim=-1) @ v  # (N, heads, L, size)
    out: Tensor = attention.proj(mixed.transpose(1, 2).reshape(-1, heads * size))
    return out


def limit_residual(residual: Tensor, bounds: Bounds) -> Tensor:
    """Hold a residual ``(N, C, H, W)`` within the largest change and the PSNR floor."""
    if bounds.max_change is not None:
        residual = bounds.max_change * torch.tanh(residual / bounds.max_change)
    if bounds.psnr_floor is None:
        return residual
    allowed = 10 ** (-bounds.psnr_floor / 20)  # root mean square, in [0, 1] units
    rms = residual.square().mean(dim=(1, 2, 3), keepdim=True).add(1e-12).sqrt()
    return residual * (allowed / rms).clamp(max=1.0)


def unpatchify(tokens: Tensor, grid: int, patch: int, channels: int) -> Tensor:
    """Tokens ``(N, L, patch ** 2 * C)`` to pixels ``(N, C, grid * patch, grid * patch)``."""
    x = tokens.reshape(-1, grid, grid, patch, patch, channels)
    x = x.permute(0, 5, 1, 3, 2, 4)  # (N, C, grid, patch, grid, patch)
    return x.reshape(-1, channels, grid * patch, grid * patch)


def sincos_position(grid: int, width: int) -> Tensor:
    """The fixed two-dimensional sine-cosine position table of MAE: ``(1, grid ** 2, width)``."""
    omega = 10000 ** -(torch.arange(width // 4, dtype=torch.float64) / (width / 4))
    steps = torch.arange(grid, dtype=torch.float64)
    angles = torch.outer(steps, omega)  # (grid, width / 4)
    line = torch.cat([angles.sin(), angles.cos()], dim=1)  # (grid, width / 2)
    columns = line.repeat(grid, 1)  # x runs fastest
    rows = line.repeat_interleave(grid, dim=0)
    return torch.cat([columns, rows], dim=1).float().unsqueeze(0)
