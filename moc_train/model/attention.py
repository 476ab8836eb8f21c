"""Causal self-attention with rotary positions.

Rotary embedding: RoFormer, arXiv 2104.09864, with the two halves of a head rotated against each other.

Legend: B sequences, S positions, N heads, C head width, D = N * C.
"""

import torch
import torch.nn.functional as F
from torch import Tensor, nn

__all__ = ["Attention", "rotary_table", "rotate"]


def rotary_table(positions: int, head_width: int, theta: float, device: torch.device) -> tuple[Tensor, Tensor]:
    """Return the fp32 cosines and sines (S, C/2) of every position and frequency."""
    exponent = torch.arange(0, head_width, 2, device=device, dtype=torch.float32) / head_width
    angle = torch.outer(torch.arange(positions, device=device, dtype=torch.float32), theta**-exponent)
    return angle.cos(), angle.sin()


def rotate(x_BNSC: Tensor, table: tuple[Tensor, Tensor]) -> Tensor:
    """Return `x` with each pair (c, c + C/2) turned by its position's angle, in the dtype of `x`."""
    cos, sin = table
    first, second = x_BNSC.float().chunk(2, -1)
    return torch.cat((first * cos - second * sin, second * cos + first * sin), -1).to(x_BNSC.dtype)


class Attention(nn.Module):
    def __init__(self, qkv_weight: Tensor, out_weight: Tensor, *, heads: int) -> None:
        super().__init__()
        self.heads = heads
        self.qkv = nn.Parameter(qkv_weight)
        self.out = nn.Parameter(out_weight)

    def forward(self, x_BSD: Tensor, table: tuple[Tensor, Tensor]) -> Tensor:
        batch, positions, width = x_BSD.shape
        qkv = F.linear(x_BSD, self.qkv).view(batch, positions, 3, self.heads, width // self.heads)
        query, key, value = qkv.permute(2, 0, 3, 1, 4).unbind(0)
        y = F.scaled_dot_product_attention(rotate(query, table), rotate(key, table), value, is_causal=True)
        return F.linear(y.transpose(1, 2).reshape(batch, positions, width), self.out)
