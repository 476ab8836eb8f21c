"""The mixture-of-experts layer, with stacked expert weights, as DeepSpeed recognises it.

It is a `deepspeed.moe.layer.MoE` by type only: the engine looks for that type, and for parameters tagged
`allreduce=False` and `group_name`. Its state dict has one entry per expert under DeepSpeed's own keys, so that
`engine.save_checkpoint` writes every global expert to its own file.
No name of a replicated parameter in here may contain "expert": DeepSpeed tells them apart by that substring.

Legend: B sequences, S positions, T = B * S tokens, D model width, H expert width, L local experts, E experts.
"""

from typing import Any, NamedTuple

import deepspeed.comm as dist
import torch
import torch.nn.functional as F
from deepspeed.moe.layer import MoE
from deepspeed.utils import groups
from torch import Tensor, nn

from moc_train.model.dispatch import collect, distribute, plan_route
from moc_train.model.gmm import Backend, choose_backend, gmm
from moc_train.model.initial import normal
from moc_train.model.router import Router

__all__ = ["GroupedMoE", "RouterLosses"]

WEIGHTS = ("w1", "w3", "w2")
NATIVE_PREFIX = "deepspeed_moe.experts.deepspeed_experts."


class RouterLosses(NamedTuple):
    balance: Tensor
    z: Tensor


class GroupedMoE(MoE):  # type: ignore[misc]
    """A dropless top-k SwiGLU mixture of experts, sharded over an expert-parallel group."""

    tokens_per_expert: Tensor

    def __init__(
        self,
        *,
        layer: int,
        width: int,
        hidden: int,
        experts: int,
        top_k: int,
        ep_size: int,
        seed: int,
        std: float,
        out_std: float,
        gmm_backend: str = "auto",
    ) -> None:
        nn.Module.__init__(self)  # MoE.__init__ would build experts of its own
        if experts % ep_size:
            raise ValueError(f"experts must be a multiple of ep_size {experts=} {ep_size=}")
        self.width, self.hidden = width, hidden
        self.num_experts, self.ep_size = experts, ep_size
        self.num_local_experts = experts // ep_size
        self.expert_group_name = f"ep_size_{ep_size}"
        self.use_residual = self.enable_expert_tensor_parallelism = False
        self.gmm_backend = gmm_backend
        self.router = Router(normal((experts, width), std, seed, layer, "router"), top_k=top_k)

        # DeepSpeed broadcasts only between replicas of an expert, so each expert's values follow from its global index.
        self.first_local_expert = dist.get_rank() % ep_size * self.num_local_experts
        shapes = {"w1": ((width, hidden), std), "w3": ((width, hidden), std), "w2": ((hidden, width), out_std)}
        for name in WEIGHTS:
            shape, deviation = shapes[name]
            values = [normal(shape, deviation, seed, layer, e, name) for e in self.local_experts()]
            weight = nn.Parameter(torch.stack(values))
            weight.allreduce, weight.group_name = False, self.expert_group_name  # type: ignore[attr-defined]
            self.register_parameter(name, weight)
        # Routes of this rank's tokens to every global expert, in training, since the start of the process or restore.
        self.register_buffer("tokens_per_expert", torch.zeros(experts, dtype=torch.int64), persistent=False)
        self.ep_group: Any = None
        self._backend: Backend | None = None
        self.register_state_dict_post_hook(_split_experts)
        self.register_load_state_dict_pre_hook(_stack_experts)

    def local_experts(self) -> range:
        """Return the global indices of the experts whose weights are on this rank."""
        return range(self.first_local_expert, self.first_local_expert + self.num_local_experts)

    def set_deepspeed_parallelism(self, use_data_before_expert_parallel_: bool = False) -> None:
        """Join the expert-parallel group; called by the engine, collectively."""
        if self.expert_group_name not in groups._get_expert_parallel_group_dict():
            groups._create_expert_and_data_parallel(
                self.ep_size, use_data_before_expert_parallel_=use_data_before_expert_parallel_
            )
        ep_rank = groups._get_expert_parallel_rank(self.expert_group_name)
        if ep_rank * self.num_local_experts != self.first_local_expert:
            raise RuntimeError(
                "expert weights were made for another place in the group: use_data_before_expert_parallelism is not"
                f" supported ep_rank={ep_rank} first_local_expert={self.first_local_expert}"
            )
        self.ep_group = groups._get_expert_parallel_group(self.expert_group_name)

    def forward(self, x_BSD: Tensor) -> tuple[Tensor, RouterLosses]:
        """Return the mixture's output and the router's losses of this micro-batch."""
        tokens_TD = x_BSD.reshape(-1, x_BSD.size(-1))
        routing = self.router(tokens_TD)
        if self.training and not is_repeated():
            self.tokens_per_expert += routing.count_E
        route = plan_route(routing.index_Tk, routing.count_E, ep_size=self.ep_size, group=self.ep_group)
        rows_RD = self._run_experts(distribute(tokens_TD, route), route.batch_sizes)
        results_TkD = collect(rows_RD, route)
        y_TD = (results_TkD * routing.weight_Tk.unsqueeze(-1).to(results_TkD.dtype)).sum(1)
        return y_TD.view_as(x_BSD), RouterLosses(routing.balance_loss, routing.z_loss)

    def _run_experts(self, rows_RD: Tensor, batch_sizes: Tensor) -> Tensor:
        if self._backend is None:  # precision and device are known only after the engine has placed the weights
            self._backend = choose_backend(
                self.gmm_backend,
                width=self.width,
                hidden=self.hidden,
                dtype=self.w1.dtype,
                device_type=self.w1.device.type,
            )
        gate_RH = gmm(rows_RD, self.w1, batch_sizes, backend=self._backend)
        up_RH = gmm(rows_RD, self.w3, batch_sizes, backend=self._backend)
        return gmm(F.silu(gate_RH) * up_RH, self.w2, batch_sizes, backend=self._backend)


def is_repeated() -> bool:
    """Return whether a backward pass runs this forward pass again, as activation checkpointing does."""
    return torch._C._current_graph_task_id() != -1


def _split_experts(_module: nn.Module, state: dict[str, Tensor], prefix: str, _metadata: Any) -> None:
    for name in WEIGHTS:
        for index, expert in enumerate(state.pop(prefix + name)):
            state[f"{prefix}{NATIVE_PREFIX}{index}.{name}"] = expert


def _stack_experts(module: GroupedMoE, state: dict[str, Tensor], prefix: str, *_rest: Any) -> None:
    for name in WEIGHTS:
        keys = [f"{prefix}{NATIVE_PREFIX}{index}.{name}" for index in range(module.num_local_experts)]
        if all(key in state for key in keys):  # else torch names the missing weight itself
            state[prefix + name] = torch.stack([state.pop(key) for key in keys])
