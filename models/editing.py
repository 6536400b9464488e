"""Masks for in-painting, out-painting and editing: from boxes and pictures to tokens, and back to pixels.

A mask says what is kept. It is made at the side of the last token map, carried to every scale, and may be used once
more on the pixels of the result. True or 1 means "stays as it is" throughout.

Shapes: B batch, L tokens, h = w = p_K sides of the last token map, H, W sides of the image.
"""

import torch
from torch import Tensor
from torch.nn import functional as F

from models.scales import Scales

MAX_TOKENS_KEPT_WHOLE = 3  # a scale this small is the whole image at once: the 1x1 scale


def keep_tokens(scales: Scales, keep_mask: Tensor, *, keep_coarsest: bool = True) -> Tensor:
    """Carry a mask to the tokens of all scales: keep_mask (h, w) or (B, h, w), bool or 0 and 1 -> (1 or B, L) bool.

    At each scale the mask is resized bilinearly and keeps where it exceeds 0.5; scales of three tokens or fewer are
    kept whole (public demo_zero_shot_edit.ipynb), unless keep_coarsest is False.
    """
    masks = keep_mask if keep_mask.ndim == 3 else keep_mask[None]
    if masks.ndim != 3 or tuple(masks.shape[1:]) != (scales.side, scales.side):
        raise ValueError(
            f"keep_mask has shape {tuple(keep_mask.shape)}, expected ({scales.side}, {scales.side}), the "
            "sides of the last token map, or a batch of these"
        )
    values = masks[:, None].float()  # (B, 1, h, w)
    by_scale = []
    for side in scales.patch_nums:
        kept = F.interpolate(values, size=(side, side), mode="bilinear") > 0.5  # (B, 1, p_k, p_k)
        if keep_coarsest and side * side <= MAX_TOKENS_KEPT_WHOLE:
            kept = torch.ones_like(kept)
        by_scale.append(kept.flatten(1))
    return scales.join(by_scale)


def box_in_tokens(box: tuple[float, float, float, float], side: int) -> Tensor:
    """Mark the cells of a token map in a box: (y0, x0, y1, x1) as shares of the image's sides -> (side, side) bool.

    Edges are rounded to the nearest cell (public notebook). Raises ValueError for a box that holds no cell.
    """
    y0, x0, y1, x1 = box
    if not (0 <= y0 < y1 <= 1 and 0 <= x0 < x1 <= 1):
        raise ValueError(f"box {box} must have 0 <= y0 < y1 <= 1 and 0 <= x0 < x1 <= 1, as shares of the image's sides")
    inside = torch.zeros(side, side, dtype=torch.bool)
    inside[round(y0 * side) : round(y1 * side), round(x0 * side) : round(x1 * side)] = True
    if not inside.any():
        raise ValueError(f"box {box} is thinner than half a token; the image has {side} x {side} of them: enlarge it")
    return inside


def area_in_tokens(area: Tensor, side: int) -> Tensor:
    """Mark the cells of a token map that an area covers by more than half: area (H, W) bool -> (side, side) bool."""
    return F.interpolate(area[None, None].float(), size=(side, side), mode="area")[0, 0] > 0.5


def tokens_to_pixels(mask: Tensor, image_size: int) -> Tensor:
    """Mark the pixels of the kept cells: (h, w) bool -> (H, W) bool."""
    return F.interpolate(mask[None, None].float(), size=(image_size, image_size), mode="nearest")[0, 0] > 0.5


def paste_kept_pixels(original: Tensor, edited: Tensor, kept: Tensor, *, feather: int) -> Tensor:
    """Put the original's pixels back where they were kept, with a soft seam: images (B, 3, H, W) -> (B, 3, H, W).

    kept: (H, W) bool. Inside it the result is the original, exactly. Outside, the original fades out linearly over
    `feather` pixels (largest of the distances in x and y), so the seam lies in the part that was drawn.
    """
    if feather < 0:
        raise ValueError(f"feather {feather} must be a number of pixels, 0 (a hard seam) or more")
    mask = kept[None, None].to(original.dtype)  # (1, 1, H, W)
    grown = [F.max_pool2d(mask, 2 * radius + 1, stride=1, padding=radius) for radius in range(feather + 1)]
    share = torch.stack(grown).mean(dim=0)  # 1 inside, falling outside
    return torch.where(share == 1, original, share * original + (1 - share) * edited)
