"""Images (…, 3, H, W): in [0, 1], or as 8 bits, which take a quarter of the memory."""

import torch
from torch import Tensor


def eight_bits(images: Tensor) -> Tensor:
    """Images in [0, 1] rounded as a PNG would, on the CPU; those of 8 bits are left alone. ValueError where values are
    not finite: they would be black."""
    if images.dtype == torch.uint8:
        return images.cpu()
    if not torch.isfinite(images).all():
        raise ValueError("images have values that are not finite: their model, or its decoder in half precision, fails")
    return (255 * images.float()).round().byte().cpu()


def unit(images: Tensor) -> Tensor:
    """Images in [0, 1], in fp32."""
    return images.float() / 255 if images.dtype == torch.uint8 else images.float()
