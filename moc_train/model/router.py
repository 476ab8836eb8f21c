"""The softmax top-k router, in fp32 whatever the precision of the model.

Losses: load balance, E * sum_i f_i P_i over one micro-batch (Switch Transformer, arXiv 2101.03961, equation 4, with
f_i the share of all T * k assignments), and z, the mean squared log-sum-exp of the logits (arXiv 2202.08906).

Legend: T tokens, D model width, E experts, k experts per token.
"""

from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

__all__ = ["Router", "Routing"]


class Routing(NamedTuple):
    """Which experts each token goes to, with which weight, and what that costs."""

    weight_Tk: Tensor
    index_Tk: Tensor
    count_E: Tensor
    balance_loss: Tensor
    z_loss: Tensor


class Router(nn.Module):
    def __init__(self, weight_ED: Tensor, *, top_k: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(weight_ED)
        self.top_k = top_k

    def forward(self, tokens_TD: Tensor) -> Routing:
        """Return the routing of these tokens; weights are normalised over the chosen experts."""
        # The weight may be bf16: the product is not, because close scores decide which expert is chosen.
        logits_TE = F.linear(tokens_TD.float(), self.weight.float())
        probability_TE = logits_TE.softmax(-1)
        weight_Tk, index_Tk = probability_TE.topk(self.top_k, -1)
        weight_Tk = weight_Tk / weight_Tk.sum(-1, keepdim=True)

        experts = self.weight.size(0)
        count_E = torch.bincount(index_Tk.reshape(-1), minlength=experts)
        balance_loss = experts * (count_E / index_Tk.numel() * probability_TE.mean(0)).sum()
        z_loss = logits_TE.logsumexp(-1).square().mean()
        return Routing(weight_Tk, index_Tk, count_E, balance_loss, z_loss)
