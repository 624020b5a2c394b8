"""A trained watermark trigger for inference: the same call, no gradients, several times as fast.

Computed once instead of in every call: the watermark's branch becomes a constant, and the scale of
the attention moves into its weights. These are cast, and on a CPU packed for oneDNN, whose matrix
products include bias, GELU and residual sum (docs/speed.md).
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, Literal, get_args

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from wm_inject.attacks.watermark import WatermarkTrigger
from wm_inject.core.checks import check_choice
from wm_inject.core.images import check_images, pad_to_multiple
from wm_inject.watermark.fused_linear import FusedLinear, Norm
from wm_inject.watermark.vit import PAD_MULTIPLE, limit_residual, unpatchify

Precision = Literal["bfloat16", "float32"]
_ROWS = 2048  # tokens at once: more would leave the caches and gain nothing


def fast_trigger(
    trigger: WatermarkTrigger,
    *,
    precision: Precision = "bfloat16",
    device: str | torch.device = "cpu",
    compile: bool = False,
) -> FastTrigger:
    """The inference form of a trained trigger.

    Args:
        trigger: The trained trigger.
        precision: "float32" agrees with the trigger to 1e-5. "bfloat16" multiplies matrices in
            bfloat16 and keeps sums, norms, the first and the last layer in float32: in the tests,
            8-bit pixels move by at most 2 steps and the PSNR by at most 0.1 dB. It is slow on a CPU
            without bfloat16.
        compile: On a CUDA device, also record the network as a CUDA graph for every batch size.

    Returns:
        A module with the trigger's call, for inference only: save and export the trigger itself.
    """
    if not isinstance(trigger, WatermarkTrigger):
        raise ValueError(f"expected a WatermarkTrigger, got {type(trigger).__name__}")
    check_choice("precision", precision, get_args(Precision))
    device = torch.device(device)
    if compile and device.type != "cuda":
        raise ValueError(f"expected a CUDA device for compile, got {device}")
    return FastTrigger(trigger, getattr(torch, precision), device, compile)


class FastTrigger(nn.Module):
    """The inference form of a `WatermarkTrigger`, built by `fast_trigger`."""

    kind = "watermark"

    @torch.no_grad()
    def __init__(
        self, trigger: WatermarkTrigger, dtype: torch.dtype, device: torch.device, compile: bool
    ) -> None:
        super().__init__()
        injector: Any = trigger.injector
        self.image_size, self.channels, self.patch_size = (
            injector.image_size,
            injector.channels,
            injector.patch_size,
        )
        self.width, self.heads, self.grid = injector.width, injector.heads, injector.grid
        self.colours = injector.colours
        self.bounds = injector.bounds if injector.residual else None
        self.strength = trigger.strength
        self.dtype, self.device = dtype, device
        width, self.length = self.width, self.grid * self.grid
        rows = max(1, _ROWS // self.length) * self.length

        def product(
            linear: Any, dtype: torch.dtype = dtype, scale: Tensor | None = None
        ) -> FusedLinear:
            weight, bias = linear.weight.detach().float().flatten(1), linear.bias.detach().float()
            if scale is not None:
                weight, bias = weight * scale[:, None], bias * scale
            return FusedLinear(weight.to(device), bias.to(device), dtype, rows)

        def norm(layer: Any) -> Norm:
            weight, bias = layer.weight.detach().clone(), layer.bias.detach().clone()
            return Norm(weight.to(device), bias.to(device), layer.eps)

        # The queries carry the scale of the attention.
        scale = torch.ones(3 * width, device=injector.position.device)
        scale[:width] = (width // self.heads) ** -0.5

        def stage(block: Any) -> tuple[Any, ...]:
            qkv, proj = product(block.attn.qkv, scale=scale), product(block.attn.proj)
            fc1, fc2 = product(block.mlp.fc1), product(block.mlp.fc2)
            return norm(block.norm1), qkv, proj, norm(block.norm2), fc1, fc2

        self._encoder = [stage(block) for block in injector.encoder]
        self._decoder = [stage(block) for block in injector.decoder]
        embed, head = injector.patch_embed.proj, injector.head
        self._embed, self._head = product(embed, torch.float32), product(head, torch.float32)
        self._project = [product(injector.project[i]) for i in (0, 2, 4)]
        self._encoder_norm = norm(injector.encoder_norm)
        self._decoder_norm = norm(injector.decoder_norm)
        self._position = injector.position.detach().clone().to(device)
        self._mark = injector.mark_embed(injector.patchify(trigger.watermark)).to(device)
        # In bfloat16 on a CPU, softmax(q k^T) v takes half the time of the fused kernel at 64 to
        # 256 tokens; in float32 the fused one is the faster.
        self._plain_attention = device.type == "cpu" and dtype == torch.bfloat16
        self._run: Callable[[Tensor], Tensor] = self._pixels
        if compile:
            self._run = torch.compile(self._pixels, mode="reduce-overhead", dynamic=False)
        self.eval()

    @torch.no_grad()
    def forward(
        self, images: Tensor, *, ids: Tensor | None = None, target: Tensor | None = None
    ) -> Tensor:
        """Hide the watermark; ``ids`` and ``target`` are ignored.

        Raises:
            ValueError: Images of another size or on another device.
        """
        check_images(images, channels=self.channels, size=(self.image_size,) * 2)
        self._check_device(images)
        parts = images.split(max(1, _ROWS // self.length))
        return torch.cat([self._apply_watermark(part) for part in parts])

    def _check_device(self, images: Tensor) -> None:
        if images.device.type != self.device.type:
            raise ValueError(f"expected images on {self.device}, got {images.device}")

    def _apply(self, fn: Any, recurse: bool = True) -> Any:
        """Refuse `to`, `half` and the like, which do not know the packed weights."""
        raise ValueError("expected a fast trigger to stay on its device: build another one")

    def _apply_watermark(self, images: Tensor) -> Tensor:
        side = self.image_size
        pixels = self._run(pad_to_multiple(images, PAD_MULTIPLE))[..., :side, :side]
        change = pixels - images if self.bounds is None else limit_residual(pixels, self.bounds)
        return (images + self.strength * change).clamp_(0, 1)

    def _pixels(self, images: Tensor) -> Tensor:
        """Equation 3 for padded images, ``(n, C, padded, padded)`` in, ``(n, C or 1, ...)`` out."""
        c, p, g, width = self.channels, self.patch_size, self.grid, self.width
        patches = images.reshape(-1, c, g, p, g, p).permute(0, 2, 4, 1, 3, 5)
        x = self._embed(patches.reshape(-1, c * p * p)).view(-1, self.length, width)
        x = self._blocks(self._encoder, (x + self._position).view(-1, width))
        x = self._encoder_norm(x).view(-1, self.length, width) + self._mark
        first, second, third = self._project
        x = third(second.gelu(first.gelu(x.view(-1, width)))).view(-1, self.length, width)
        x = self._blocks(self._decoder, (x + self._position).view(-1, width))
        return unpatchify(self._head(self._decoder_norm(x)), g, p, self.colours)

    def _blocks(self, blocks: list[Any], x: Tensor) -> Tensor:
        """Rows ``(n * L, D)`` in float32 to the same; what comes in is overwritten."""
        for norm1, qkv, proj, norm2, fc1, fc2 in blocks:
            x = proj.add(self._attend(qkv(norm1(x))), x)
            x = fc2.add(fc1.gelu(norm2(x)), x)
        return x

    def _attend(self, qkv: Tensor) -> Tensor:
        """Rows ``(n * L, 3 D)`` to ``(n * L, D)``; the queries are scaled already."""
        heads, width = self.heads, self.width
        parts = qkv.view(-1, self.length, 3, heads, width // heads).permute(2, 0, 3, 1, 4)
        if self._plain_attention:
            # One copy of all three, where `matmul` would make one of each.
            q, k, v = parts.reshape(3, -1, self.length, width // heads).unbind(0)
            mixed = torch.bmm(torch.bmm(q, k.transpose(1, 2)).softmax(dim=-1), v)
            mixed = mixed.view(-1, heads, self.length, width // heads)
        else:
            q, k, v = parts.unbind(0)
            mixed = F.scaled_dot_product_attention(q, k, v, scale=1.0)
        return mixed.transpose(1, 2).reshape(-1, width)  # from (n, heads, L, D / heads)
