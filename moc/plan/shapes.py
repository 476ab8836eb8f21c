"""Shapes of models: which tensors a mixture-of-experts transformer has, in the order in which DeepSpeed flattens them.

Only sizes matter here. A shape says how many parameters are *dense* (everything that every data-parallel rank trains:
attention, norms, routers, shared experts, embeddings) and how large each matrix of one *expert* is.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import MISSING, dataclass, fields

from moc.errors import UsageError

__all__ = ["FIELD_HELP", "LatentAttention", "ModelShape", "Module", "shape_from_fields"]

FIELD_HELP = {
    "name": "for the output",
    "layers": "transformer blocks",
    "hidden": "model width",
    "heads": "attention heads",
    "vocabulary": "rows of the embedding",
    "ffn": "inner width of dense feed-forward blocks (0: all have experts)",
    "moe_layers": "blocks whose feed-forward part is a mixture of experts",
    "experts": "routed experts of each such block",
    "expert_ffn": "inner width of one expert",
    "top_k": "experts per token",
    "shared_ffn": "inner width of the expert that every token passes (default 0)",
    "kv_heads": "key and value heads (default: heads)",
    "head": "width of one head (default: hidden / heads)",
    "gated": "feed-forward blocks have three matrices, not two (default true)",
    "biased": "linear layers and norms have biases (default false)",
    "qk_norm": "queries and keys are normed per head (default false)",
    "tied": "input and output embedding are one (default false)",
    "positions": "rows of a learned position embedding (default 0)",
    "latent": "latent attention: mapping of q_rank, kv_rank, nope, rope, value",
    "stacked": "a rank's experts are one parameter per matrix (default false)",
}
"""The fields of a model file, one line each."""

LIMITS = {
    **dict.fromkeys(("hidden", "heads", "vocabulary", "expert_ffn", "top_k"), (1, 1 << 20)),
    **dict.fromkeys(("ffn", "shared_ffn", "kv_heads", "head", "positions"), (0, 1 << 20)),
    **dict.fromkeys(("layers", "moe_layers", "experts"), (1, 1 << 12)),
}
ELEMENT_LIMIT = 10**17  # bytes and their sums over ranks then fit 63 bits
FLAGS = ("gated", "biased", "qk_norm", "tied", "stacked")


@dataclass(frozen=True, slots=True, kw_only=True)
class LatentAttention:
    """Multi-head latent attention: ranks of the two compressions, and the head's three widths."""

    q_rank: int
    kv_rank: int
    nope: int
    rope: int
    value: int


@dataclass(frozen=True, slots=True, kw_only=True)
class Module:
    """A dense module that is copied as one in the paper's sharding; `elements` counts its parameters."""

    name: str
    elements: int


@dataclass(frozen=True, slots=True, kw_only=True)
class ModelShape:
    """What of a model decides the bytes of its checkpoints; the fields are described in `FIELD_HELP`."""

    name: str
    layers: int
    hidden: int
    heads: int
    vocabulary: int
    ffn: int
    moe_layers: int
    experts: int
    expert_ffn: int
    top_k: int
    shared_ffn: int = 0
    kv_heads: int = 0
    head: int = 0
    gated: bool = True
    biased: bool = False
    qk_norm: bool = False
    tied: bool = False
    positions: int = 0
    latent: LatentAttention | None = None
    stacked: bool = False

    def __post_init__(self) -> None:
        for name, (least, most) in LIMITS.items():
            value = getattr(self, name)
            _require(least <= value <= most, self.name, name, value, f"{least}..{most}")
        _require(self.moe_layers <= self.layers, self.name, "moe_layers", self.moe_layers, f"1..{self.layers}")
        _require(self.top_k <= self.experts, self.name, "top_k", self.top_k, f"1..{self.experts}")
        needs_ffn = self.moe_layers < self.layers
        _require(self.ffn > 0 or not needs_ffn, self.name, "ffn", self.ffn, "at least 1 where blocks have no experts")
        if not self.head and self.latent is None:
            _require(self.hidden % self.heads == 0, self.name, "heads", self.heads, f"a divisor of {self.hidden}")
        _require(self.elements <= ELEMENT_LIMIT, self.name, "parameters", self.elements, f"up to {ELEMENT_LIMIT}")

    @property
    def expert_matrices(self) -> tuple[int, ...]:
        """The sizes of one expert's parameters, in the order of the module."""
        return _feed_forward(self.hidden, self.expert_ffn, gated=self.gated, biased=self.biased)

    @property
    def expert_elements(self) -> int:
        """The parameters of one expert."""
        return sum(self.expert_matrices)

    @property
    def all_expert_elements(self) -> int:
        """The parameters of all experts."""
        return self.moe_layers * self.experts * self.expert_elements

    @property
    def dense_elements(self) -> int:
        """The parameters outside the experts."""
        return sum(module.elements for module in self.dense_modules())

    @property
    def elements(self) -> int:
        """All parameters."""
        return self.dense_elements + self.all_expert_elements

    def dense_modules(self) -> tuple[Module, ...]:
        """Return the modules outside the experts, in order: embeddings, then each block's parts.

        Blocks with experts are spread over the depth as evenly as integers allow; only the order depends on it.
        """
        norm = self.hidden * (2 if self.biased else 1)
        rows = [Module(name="embedding", elements=(self.vocabulary + self.positions) * self.hidden)]
        for block in range(self.layers):
            rows.append(Module(name=f"blocks.{block}.attention", elements=self._attention_elements() + norm))
            is_moe = (block + 1) * self.moe_layers // self.layers > block * self.moe_layers // self.layers
            if is_moe:
                inner = self.experts * self.hidden
                if self.shared_ffn:
                    inner += sum(_feed_forward(self.hidden, self.shared_ffn, gated=self.gated, biased=self.biased))
            else:
                inner = sum(_feed_forward(self.hidden, self.ffn, gated=self.gated, biased=self.biased))
            rows.append(Module(name=f"blocks.{block}.{'router' if is_moe else 'ffn'}", elements=inner + norm))
        rows.append(Module(name="norm", elements=norm))
        if not self.tied:
            rows.append(Module(name="head", elements=self.vocabulary * self.hidden))
        return tuple(rows)

    def _attention_elements(self) -> int:
        if self.latent is not None:
            part, width = self.latent, self.heads * (self.latent.nope + self.latent.rope)
            queries = self.hidden * part.q_rank + part.q_rank + part.q_rank * width
            keys = self.hidden * (part.kv_rank + part.rope) + part.kv_rank
            return (
                queries
                + keys
                + part.kv_rank * self.heads * (part.nope + part.value)
                + self.heads * part.value * self.hidden
            )
        head = self.head or self.hidden // self.heads
        width, key_width = self.heads * head, (self.kv_heads or self.heads) * head
        biases = width + 2 * key_width + self.hidden if self.biased else 0
        norms = 2 * head if self.qk_norm else 0
        return 2 * self.hidden * width + 2 * self.hidden * key_width + biases + norms


def shape_from_fields(given: Mapping[str, object], *, source: str) -> ModelShape:
    """Return the shape that a mapping describes; raises UsageError naming `source`, the field and what is allowed."""
    known = {field.name: field for field in fields(ModelShape)}
    unknown = sorted(set(given) - set(known))
    if unknown:
        raise UsageError(f"unknown field of a model: source={source} field={unknown[0]} allowed={','.join(known)}")
    missing = [name for name, field in known.items() if field.default is MISSING and name not in given]
    if missing:
        raise UsageError(f"field of a model is missing: source={source} field={missing[0]} ({FIELD_HELP[missing[0]]})")
    values = {name: _value(name, value, source) for name, value in given.items() if name != "latent"}
    latent = given.get("latent")
    return ModelShape(**values, latent=None if latent is None else _latent(latent, source))  # type: ignore[arg-type]


def _value(name: str, value: object, source: str) -> object:
    expected = str if name == "name" else bool if name in FLAGS else int
    if type(value) is not expected:
        raise UsageError(
            f"field of a model has a wrong type: source={source} field={name} given={value!r} "
            f"allowed={expected.__name__}"
        )
    return value


def _latent(value: object, source: str) -> LatentAttention:
    names = [field.name for field in fields(LatentAttention)]
    is_valid = isinstance(value, Mapping) and sorted(value) == sorted(names)
    if (
        not isinstance(value, Mapping)
        or not is_valid
        or any(type(v) is not int or not 1 <= v <= 1 << 20 for v in value.values())
    ):
        raise UsageError(
            f"field of a model is wrong: source={source} field=latent given={value!r} "
            f"allowed=a mapping of {','.join(names)} to numbers from 1 to {1 << 20}"
        )
    return LatentAttention(**value)


def _feed_forward(hidden: int, inner: int, *, gated: bool, biased: bool) -> tuple[int, ...]:
    """Return the sizes of a feed-forward block's parameters, each bias after its matrix."""
    matrix = hidden * inner
    if not biased:
        return (matrix,) * (3 if gated else 2)
    return (matrix, inner) * (2 if gated else 1) + (matrix, hidden)


def _require(is_legal: bool, model: str, name: str, given: object, allowed: str) -> None:
    if not is_legal:
        raise UsageError(
            f"field of a model is out of range: model={model} field={name} given={given} allowed={allowed}"
        )
