"""Grouped matrix products: one interface, several backends, the same results.

Rows of `a` are sorted by group; group g has `batch_sizes[g]` rows and its own matrix `b[g]`.
Every backend gives a gradient for every group, zeros for an empty one: expert parallelism's collectives rely on it.

Legend: T rows, G groups, K inner size, N output size.
"""

from collections.abc import Callable
from typing import Any, Protocol

import torch
import torch.nn.functional as F
from torch import Tensor

from moc_train.config import GMM_BACKENDS

__all__ = ["GroupedGemmBackend", "LoopBackend", "TorchBackend", "alignment", "choose_backend", "gmm"]

STRIDE_BYTES = 16  # grouped_mm takes strides that are multiples of this


class Backend(Protocol):
    """Two products from which the forward pass and both gradients are made."""

    def product(self, a_TK: Tensor, b_GKN: Tensor, batch_sizes: Tensor, *, trans_b: bool) -> Tensor:
        """Return the rows of `a` times the matrix of their group; `b` is (G, N, K) when `trans_b`."""

    def outer(self, a_TK: Tensor, b_TN: Tensor, batch_sizes: Tensor) -> Tensor:
        """Return (G, K, N): per group, `a` transposed times `b`."""


class LoopBackend:
    """The reference: one matrix product per group."""

    def product(self, a_TK: Tensor, b_GKN: Tensor, batch_sizes: Tensor, *, trans_b: bool) -> Tensor:
        matrices = b_GKN.transpose(1, 2) if trans_b else b_GKN
        out = a_TK.new_empty(a_TK.size(0), matrices.size(2))
        start = 0
        for matrix, size in zip(matrices, batch_sizes.tolist(), strict=True):
            torch.mm(a_TK[start : start + size], matrix, out=out[start : start + size])
            start += size
        return out

    def outer(self, a_TK: Tensor, b_TN: Tensor, batch_sizes: Tensor) -> Tensor:
        out = a_TK.new_zeros(batch_sizes.numel(), a_TK.size(1), b_TN.size(1))
        start = 0
        for group, size in enumerate(batch_sizes.tolist()):
            if size:
                torch.mm(a_TK[start : start + size].t(), b_TN[start : start + size], out=out[group])
            start += size
        return out


class TorchBackend:
    """`torch.nn.functional.grouped_mm`, whose operands must be contiguous with aligned rows."""

    def product(self, a_TK: Tensor, b_GKN: Tensor, batch_sizes: Tensor, *, trans_b: bool) -> Tensor:
        matrices = b_GKN.transpose(1, 2) if trans_b else b_GKN
        return F.grouped_mm(a_TK, matrices, offs=self._ends(batch_sizes, a_TK.device))

    def outer(self, a_TK: Tensor, b_TN: Tensor, batch_sizes: Tensor) -> Tensor:
        return F.grouped_mm(a_TK.t(), b_TN, offs=self._ends(batch_sizes, a_TK.device))

    @staticmethod
    def _ends(batch_sizes: Tensor, device: torch.device) -> Tensor:
        return batch_sizes.cumsum(0).to(device=device, dtype=torch.int32)


class GroupedGemmBackend:
    """The `grouped_gemm` package: CUDA and bf16 only, batch sizes on the host."""

    def __init__(self) -> None:
        from grouped_gemm import backend

        self._gmm: Callable[..., Tensor] = backend.gmm

    def product(self, a_TK: Tensor, b_GKN: Tensor, batch_sizes: Tensor, *, trans_b: bool) -> Tensor:
        return self._gmm(a_TK, b_GKN, batch_sizes, trans_a=False, trans_b=trans_b)

    def outer(self, a_TK: Tensor, b_TN: Tensor, batch_sizes: Tensor) -> Tensor:
        return self._gmm(a_TK, b_TN, batch_sizes, trans_a=True, trans_b=False)


class _Gmm(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, a: Tensor, b: Tensor, batch_sizes: Tensor, trans_b: bool, backend: Backend) -> Tensor:
        ctx.save_for_backward(a, b)
        ctx.batch_sizes, ctx.trans_b, ctx.backend = batch_sizes, trans_b, backend
        if a.size(0) == 0:
            return a.new_empty(0, b.size(1) if trans_b else b.size(2))
        return backend.product(a, b, batch_sizes, trans_b=trans_b)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, Tensor | None, None, None, None]:
        a, b = ctx.saved_tensors
        grad = grads[0].contiguous()
        if a.size(0) == 0:
            return torch.empty_like(a), torch.zeros_like(b), None, None, None
        grad_a = grad_b = None
        if ctx.needs_input_grad[0]:
            grad_a = ctx.backend.product(grad, b, ctx.batch_sizes, trans_b=not ctx.trans_b)
        if ctx.needs_input_grad[1]:
            left, right = (grad, a) if ctx.trans_b else (a, grad)
            grad_b = ctx.backend.outer(left, right, ctx.batch_sizes)
        return grad_a, grad_b, None, None, None


def gmm(a: Tensor, b: Tensor, batch_sizes: Tensor, trans_b: bool = False, *, backend: Backend) -> Tensor:
    """Return (T, N): each row of `a` (T, K) times the matrix of its group in `b` (G, K, N).

    `b` is (G, N, K) with `trans_b`. `batch_sizes` is int64 on the host and sums to T. Differentiable in `a` and `b`.
    """
    if batch_sizes.numel() != b.size(0):
        raise ValueError(f"one batch size per group is needed sizes={batch_sizes.numel()} groups={b.size(0)}")
    return _Gmm.apply(a.contiguous(), b, batch_sizes, trans_b, backend)


def alignment(dtype: torch.dtype) -> int:
    """Return the multiple that the widths of `grouped_mm` operands must have for this dtype."""
    return STRIDE_BYTES // dtype.itemsize


def choose_backend(name: str, *, width: int, hidden: int, dtype: torch.dtype, device_type: str) -> Backend:
    """Return the backend for these sizes; `auto` takes the torch one where its alignment rule allows, else the loop."""
    unit = alignment(dtype)
    is_aligned = width % unit == 0 and hidden % unit == 0
    match name:
        case "auto":
            return TorchBackend() if is_aligned else LoopBackend()
        case "torch":
            if not is_aligned:
                raise ValueError(f"the torch backend needs multiples of {unit} for {dtype}: {width=} {hidden=}")
            return TorchBackend()
        case "loop":
            return LoopBackend()
        case "grouped_gemm":
            if device_type != "cuda" or dtype != torch.bfloat16:
                raise ValueError(f"the grouped_gemm backend needs cuda and bf16: device={device_type} {dtype=}")
            return GroupedGemmBackend()
        case _:
            raise ValueError(f"unknown gmm backend name={name} allowed={', '.join(GMM_BACKENDS)}")
