"""Trees of live values ↔ trees that `moc.format.tagged` can store.

`plain_of` turns tensors and arrays into `ArrayValue`s that alias CPU memory where they can; `live_of` builds fresh
tensors and arrays.
"""

from __future__ import annotations

from collections import OrderedDict
from math import prod

import numpy as np
import torch

from moc.errors import MismatchError, UsageError
from moc.format.tagged import ArrayValue

__all__ = ["array_of", "bytes_of", "dtype_name", "expect_array", "live_of", "plain_of", "tensor_of"]

TORCH_DTYPES: dict[str, torch.dtype] = {
    "BOOL": torch.bool,
    "U8": torch.uint8,
    "I8": torch.int8,
    "F8_E4M3": torch.float8_e4m3fn,
    "F8_E5M2": torch.float8_e5m2,
    "I16": torch.int16,
    "U16": torch.uint16,
    "F16": torch.float16,
    "BF16": torch.bfloat16,
    "I32": torch.int32,
    "U32": torch.uint32,
    "F32": torch.float32,
    "I64": torch.int64,
    "U64": torch.uint64,
    "F64": torch.float64,
}
DTYPE_NAMES = {dtype: name for name, dtype in TORCH_DTYPES.items()}
NUMPY_DTYPES: dict[str, str] = {
    "BOOL": "bool",
    "U8": "uint8",
    "I8": "int8",
    "I16": "int16",
    "U16": "uint16",
    "F16": "float16",
    "I32": "int32",
    "U32": "uint32",
    "F32": "float32",
    "I64": "int64",
    "U64": "uint64",
    "F64": "float64",
}
NUMPY_NAMES = {dtype: name for name, dtype in NUMPY_DTYPES.items()}


def dtype_name(dtype: torch.dtype, what: str) -> str:
    """Return the safetensors name of a dtype; raises UsageError that names `what` has it."""
    if dtype not in DTYPE_NAMES:
        raise UsageError(
            f"cannot store a tensor of this dtype: tensor={what} dtype={dtype} allowed={sorted(TORCH_DTYPES)}"
        )
    return DTYPE_NAMES[dtype]


def bytes_of(tensor: torch.Tensor) -> torch.Tensor:
    """Return the memory of a contiguous tensor as a flat view of bytes."""
    return tensor.detach().reshape(-1).view(torch.uint8)


def array_of(tensor: torch.Tensor, what: str) -> ArrayValue:
    """Return a tensor's values; they alias its memory if it is contiguous and on the CPU.

    Blocks: for a device tensor, until the current stream has reached this point and the copy to the host is done.
    """
    if tensor.layout is not torch.strided or tensor.is_quantized:
        raise UsageError(
            f"cannot store a tensor of this layout: tensor={what} layout={tensor.layout} allowed=torch.strided"
        )
    name = dtype_name(tensor.dtype, what)
    host = tensor.detach().to("cpu").resolve_conj().contiguous()
    data = bytes_of(host).numpy().data if host.numel() else memoryview(b"")
    return ArrayValue(dtype=name, shape=tuple(host.shape), kind="torch", data=data)


def tensor_of(value: ArrayValue) -> torch.Tensor:
    """Return a new CPU tensor with the values of a stored one."""
    dtype = TORCH_DTYPES[value.dtype]
    if not prod(value.shape):
        return torch.empty(value.shape, dtype=dtype)
    return torch.frombuffer(bytearray(value.data), dtype=dtype).reshape(value.shape)


def plain_of(value: object, path: str, *, is_lenient: bool) -> object:
    """Return `value` with tensors and arrays replaced by `ArrayValue` and ordered dicts by dicts.

    With `is_lenient`, for state that DeepSpeed or torch own and only read as numbers, numpy scalars become Python
    numbers and other subclasses of dict (a scheduler's Counter) become dicts. What remains of an unsupported type is
    refused, by its path, when the tree is encoded.
    """
    match value:
        case torch.Tensor():
            return array_of(value, path)
        case np.ndarray():
            return _array_of_numpy(value, path)
        case np.generic() if is_lenient:
            return value.item()
        case torch.Size():
            return tuple(value)
        case dict() if is_lenient or type(value) in (dict, OrderedDict):
            return {key: plain_of(item, f"{path}[{key!r}]", is_lenient=is_lenient) for key, item in value.items()}
        case list() if type(value) is list:
            return [plain_of(item, f"{path}[{i}]", is_lenient=is_lenient) for i, item in enumerate(value)]
        case tuple() if type(value) is tuple:
            return tuple(plain_of(item, f"{path}[{i}]", is_lenient=is_lenient) for i, item in enumerate(value))
        case _:
            return value


def live_of(value: object, like: object = None) -> object:
    """Return `value` with arrays rebuilt, and with the subclass of dict that `like` has at the same place."""
    match value:
        case ArrayValue(kind="torch"):
            return tensor_of(value)
        case ArrayValue():
            return np.frombuffer(bytearray(value.data), dtype=NUMPY_DTYPES[value.dtype]).reshape(value.shape)
        case dict():
            known = like if isinstance(like, dict) else {}
            items = {key: live_of(item, known.get(key)) for key, item in value.items()}
            return type(known)(items) if type(known) is not dict else items
        case list():
            pairs = like if isinstance(like, list) and len(like) == len(value) else [None] * len(value)
            return [live_of(item, known) for item, known in zip(value, pairs, strict=True)]
        case tuple():
            return tuple(live_of(item) for item in value)
        case _:
            return value


def expect_array(value: object, path: str) -> ArrayValue:
    """Return `value` as an array, or raise MismatchError naming what should have been one."""
    if not isinstance(value, ArrayValue):
        raise MismatchError(f"expected an array: path={path} type={type(value).__name__}")
    return value


def _array_of_numpy(value: np.ndarray, path: str) -> ArrayValue:
    name = NUMPY_NAMES.get(value.dtype.name)
    if name is None or not value.dtype.isnative:
        raise UsageError(
            f"cannot store an array of this dtype: path={path} dtype={value.dtype} allowed={sorted(NUMPY_NAMES)}"
        )
    packed = np.ascontiguousarray(value).reshape(-1)
    data = packed.view(np.uint8).data if packed.size else memoryview(b"")
    return ArrayValue(dtype=name, shape=tuple(value.shape), kind="numpy", data=data)
