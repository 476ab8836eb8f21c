"""A pre-norm decoder-only transformer with a mixture of experts in chosen layers.

Every initial value is a function of the seed and the parameter's place, so all ranks and all expert-parallel sizes
start from the same model.

Legend: B sequences, S positions, D model width, V vocabulary.
"""

from typing import NamedTuple

import torch.nn.functional as F
from torch import Tensor, nn

from moc_train.config import ModelConfig
from moc_train.model.attention import Attention, rotary_table
from moc_train.model.initial import normal
from moc_train.model.moe import GroupedMoE

__all__ = ["StepLosses", "Transformer"]


class StepLosses(NamedTuple):
    """What a forward pass returns: `total` is to be minimised; the parts are detached, router losses as layer means."""

    total: Tensor
    language: Tensor
    balance: Tensor
    z: Tensor


class SwiGLU(nn.Module):
    """The dense MLP."""

    def __init__(self, gate: Tensor, up: Tensor, down: Tensor) -> None:
        super().__init__()
        self.gate, self.up, self.down = nn.Parameter(gate), nn.Parameter(up), nn.Parameter(down)

    def forward(self, x_BSD: Tensor) -> Tensor:
        return F.linear(F.silu(F.linear(x_BSD, self.gate)) * F.linear(x_BSD, self.up), self.down)


class Block(nn.Module):
    def __init__(self, config: ModelConfig, layer: int, ep_size: int) -> None:
        super().__init__()
        width, seed, std = config.width, config.seed, config.init_std
        out_std = std / (2 * config.layers) ** 0.5  # keeps the residual stream's variance independent of depth
        self.attention_norm = nn.RMSNorm(width, eps=config.norm_eps)
        self.attention = Attention(
            normal((3 * width, width), std, seed, layer, "qkv"),
            normal((width, width), out_std, seed, layer, "out"),
            heads=config.heads,
        )
        self.mlp_norm = nn.RMSNorm(width, eps=config.norm_eps)
        self.moe: GroupedMoE | None = None
        self.mlp: SwiGLU | None = None
        if layer in config.moe_layer_indices():
            self.moe = GroupedMoE(
                layer=layer,
                width=width,
                hidden=config.expert_hidden,
                experts=config.experts,
                top_k=config.top_k,
                ep_size=ep_size,
                seed=seed,
                std=std,
                out_std=out_std,
                gmm_backend=config.gmm,
            )
        else:
            hidden = config.dense_hidden
            self.mlp = SwiGLU(
                normal((hidden, width), std, seed, layer, "gate"),
                normal((hidden, width), std, seed, layer, "up"),
                normal((width, hidden), out_std, seed, layer, "down"),
            )

    def forward(self, x_BSD: Tensor, table: tuple[Tensor, Tensor]) -> tuple[Tensor, Tensor | None, Tensor | None]:
        x_BSD = x_BSD + self.attention(self.attention_norm(x_BSD), table)
        normed_BSD = self.mlp_norm(x_BSD)
        if self.mlp is not None:
            return x_BSD + self.mlp(normed_BSD), None, None
        assert self.moe is not None, "a block has either a dense MLP or experts"
        y_BSD, losses = self.moe(normed_BSD)
        return x_BSD + y_BSD, losses.balance, losses.z


class Transformer(nn.Module):
    """The whole model; its forward pass takes tokens and targets and returns the losses."""

    def __init__(self, config: ModelConfig, *, vocab_size: int, ep_size: int) -> None:
        super().__init__()
        self.config = config
        shape = (vocab_size, config.width)
        self.embedding = nn.Parameter(normal(shape, config.init_std, config.seed, "embedding"))
        self.blocks = nn.ModuleList(Block(config, layer, ep_size) for layer in range(config.layers))
        self.norm = nn.RMSNorm(config.width, eps=config.norm_eps)
        self.head: nn.Parameter | None = None
        if not config.tied_embeddings:
            self.head = nn.Parameter(normal(shape, config.init_std, config.seed, "head"))

    def moe_layers(self) -> list[GroupedMoE]:
        """Return the mixture-of-experts layers, first to last."""
        return [module for module in self.modules() if isinstance(module, GroupedMoE)]

    def hidden(self, tokens_BS: Tensor) -> tuple[Tensor, list[Tensor], list[Tensor]]:
        """Return the last hidden states, and the balance and z losses of each MoE layer."""
        config = self.config
        x_BSD = F.embedding(tokens_BS, self.embedding)
        table = rotary_table(tokens_BS.size(1), config.width // config.heads, config.rope_theta, tokens_BS.device)
        balance: list[Tensor] = []
        z: list[Tensor] = []
        for block in self.blocks:
            x_BSD, layer_balance, layer_z = block(x_BSD, table)
            if layer_balance is not None and layer_z is not None:
                balance.append(layer_balance)
                z.append(layer_z)
        return self.norm(x_BSD), balance, z

    def logits(self, tokens_BS: Tensor) -> Tensor:
        """Return the fp32 logits (B, S, V) of the next token at every position."""
        return self._project(self.hidden(tokens_BS)[0])

    def forward(self, tokens_BS: Tensor, targets_BS: Tensor) -> StepLosses:
        x_BSD, balance, z = self.hidden(tokens_BS)
        language = F.cross_entropy(self._project(x_BSD).flatten(0, 1), targets_BS.flatten())
        zero = language.new_zeros(())
        balance_sum, z_sum = sum(balance, zero), sum(z, zero)
        total = language + self.config.balance_loss * balance_sum + self.config.z_loss * z_sum
        layers = max(1, len(balance))
        return StepLosses(total, language.detach(), balance_sum.detach() / layers, z_sum.detach() / layers)

    def _project(self, x_BSD: Tensor) -> Tensor:
        return F.linear(x_BSD, self.embedding if self.head is None else self.head).float()
