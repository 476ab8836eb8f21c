"""All backends of the grouped product compute the same values and gradients."""

import pytest
import torch
from torch import Tensor

from moc_train.model.gmm import Backend, LoopBackend, TorchBackend, alignment, choose_backend, gmm

SIZES = [(5, 0, 3, 8), (0, 0, 0, 7), (4,), (1, 1, 1, 1), (0, 0)]
K, N = 16, 24


def operands(sizes: tuple[int, ...], dtype: torch.dtype, *, trans_b: bool) -> tuple[Tensor, Tensor, Tensor]:
    generator = torch.Generator().manual_seed(len(sizes))
    shape = (len(sizes), N, K) if trans_b else (len(sizes), K, N)
    a = torch.randn(sum(sizes), K, generator=generator).to(dtype).requires_grad_()
    b = torch.randn(shape, generator=generator).to(dtype).requires_grad_()
    return a, b, torch.tensor(sizes)


def results(backend: Backend, sizes: tuple[int, ...], dtype: torch.dtype, *, trans_b: bool) -> list[Tensor]:
    a, b, batch_sizes = operands(sizes, dtype, trans_b=trans_b)
    out = gmm(a, b, batch_sizes, trans_b, backend=backend)
    weight = torch.linspace(-1, 1, out.numel()).view_as(out).to(dtype)
    (out * weight).sum().backward()
    assert a.grad is not None
    assert b.grad is not None
    return [out.detach(), a.grad, b.grad]


@pytest.mark.parametrize("trans_b", [False, True])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("sizes", SIZES)
def test_torch_and_loop_agree_in_values_and_gradients(
    sizes: tuple[int, ...], dtype: torch.dtype, trans_b: bool
) -> None:
    expected = results(LoopBackend(), sizes, dtype, trans_b=trans_b)

    actual = results(TorchBackend(), sizes, dtype, trans_b=trans_b)

    torch.testing.assert_close(actual, expected)


@pytest.mark.parametrize("backend", [LoopBackend(), TorchBackend()])
@pytest.mark.parametrize("sizes", SIZES)
def test_every_group_has_a_gradient_and_an_empty_one_has_zeros(backend: Backend, sizes: tuple[int, ...]) -> None:
    _out, grad_a, grad_b = results(backend, sizes, torch.float32, trans_b=False)

    assert grad_a.shape == (sum(sizes), K)
    assert [bool(grad.any()) for grad in grad_b] == [size > 0 for size in sizes]


@pytest.mark.parametrize("trans_b", [False, True])
def test_the_loop_passes_a_numerical_gradient_check(trans_b: bool) -> None:
    a, b, batch_sizes = operands((2, 0, 3), torch.float64, trans_b=trans_b)

    assert torch.autograd.gradcheck(lambda a, b: gmm(a, b, batch_sizes, trans_b, backend=LoopBackend()), (a, b))


def test_a_gradient_without_strides_is_accepted() -> None:
    a, b, batch_sizes = operands((2, 3), torch.float32, trans_b=False)

    gmm(a, b, batch_sizes, backend=TorchBackend()).sum().backward()

    assert a.grad is not None


def test_sizes_must_be_given_for_every_group() -> None:
    a, b, _ = operands((2, 3), torch.float32, trans_b=False)

    with pytest.raises(ValueError, match=r"one batch size per group is needed sizes=3 groups=2"):
        gmm(a, b, torch.tensor([2, 2, 1]), backend=LoopBackend())


@pytest.mark.parametrize(("dtype", "unit"), [(torch.float32, 4), (torch.bfloat16, 8)])
def test_the_torch_backend_is_chosen_only_where_its_alignment_rule_allows(dtype: torch.dtype, unit: int) -> None:
    sizes = {"dtype": dtype, "device_type": "cpu"}

    assert alignment(dtype) == unit
    assert isinstance(choose_backend("auto", width=2 * unit, hidden=unit, **sizes), TorchBackend)
    assert isinstance(choose_backend("auto", width=2 * unit, hidden=unit + 1, **sizes), LoopBackend)
    with pytest.raises(ValueError, match=f"the torch backend needs multiples of {unit}"):
        choose_backend("torch", width=2 * unit, hidden=unit + 1, **sizes)
    with pytest.raises(ValueError, match="the grouped_gemm backend needs cuda and bf16"):
        choose_backend("grouped_gemm", width=unit, hidden=unit, **sizes)
