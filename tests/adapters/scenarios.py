"""The combinations that are run, as plain rows: no torch here, so that collecting tests stays cheap."""

from __future__ import annotations

from dataclasses import dataclass

__all__ = ["DEFAULT", "SLOW", "Scenario"]


@dataclass(frozen=True, slots=True, kw_only=True)
class Scenario:
    """One engine: `zero` is 1, 2 or "bf16"; `base` the optimizer; `options` further entries of zero_optimization."""

    ranks: int
    dtype: str
    zero: int | str
    base: str
    model: str
    accumulation: int = 1
    scheduler: str = "none"
    options: tuple[str, ...] = ()
    is_skipping: bool = False
    ep_size: int = 2

    @property
    def name(self) -> str:
        parts = [
            f"{self.ranks}ranks",
            self.dtype,
            f"zero{self.zero}",
            self.base,
            self.model,
            f"gas{self.accumulation}",
            self.scheduler,
        ]
        return "-".join([*parts, *self.options, *(["skip"] if self.is_skipping else [])])


def _row(ranks, dtype, zero, base, model, accumulation, scheduler, options=(), skip=False) -> Scenario:
    return Scenario(
        ranks=ranks,
        dtype=dtype,
        zero=zero,
        base=base,
        model=model,
        accumulation=accumulation,
        scheduler=scheduler,
        options=tuple(options),
        is_skipping=skip,
    )


ROUND, ALIGN, OVERLAP, OFFLOAD = "round_robin_gradients", "parameter_alignment", "overlap_comm", "offload"

DEFAULT = (
    _row(2, "fp32", 1, "foreach", "dense", 1, "warmup"),
    _row(2, "bf16", 2, "loop", "native", 3, "none", [ROUND], True),
    _row(2, "bf16", "bf16", "fused", "stacked", 1, "multistep", [], True),
    _row(2, "fp32", 2, "config", "stacked", 3, "warmup", [ALIGN]),
    _row(2, "bf16", 1, "cpu_adam", "native", 1, "warmup", [OFFLOAD, ROUND]),
    _row(2, "fp32", 2, "cpu_adam", "dense", 1, "none", [OFFLOAD], True),
    _row(2, "bf16", "bf16", "foreach", "native", 3, "none"),
    _row(2, "fp32", 1, "fused_adam", "stacked", 1, "numpy", [ROUND], True),
    _row(2, "bf16", "bf16", "cpu_adam", "dense", 3, "multistep"),
    _row(2, "bf16", 2, "amsgrad", "stacked", 1, "warmup", [ALIGN, ROUND, OVERLAP]),
    _row(4, "bf16", 2, "foreach", "stacked", 1, "warmup", [ROUND], True),
    _row(4, "fp32", 1, "loop", "native", 3, "multistep", [ALIGN]),
    _row(4, "bf16", "bf16", "config", "native", 1, "none", [], True),
    _row(4, "fp32", 2, "cpu_adam", "stacked", 3, "none", [OFFLOAD, ALIGN]),
    _row(4, "bf16", 1, "fused", "dense", 1, "warmup", [OVERLAP], True),
)

PRODUCT = tuple(
    _row(
        ranks,
        dtype,
        zero,
        base,
        model,
        3 if (ranks + i) % 3 else 1,
        ("none", "warmup", "multistep")[i % 3],
        options,
        i % 2 == 0,
    )
    for ranks in (2, 4)
    for i, (dtype, zero) in enumerate((("fp32", 1), ("fp32", 2), ("bf16", 1), ("bf16", 2), ("bf16", "bf16")))
    for base in ("foreach", "loop", "fused", "cpu_adam", "fused_adam")
    for model in ("dense", "native", "stacked")
    for options in ((), (ROUND, ALIGN))
    if not (zero == "bf16" and options)
)

SLOW = PRODUCT[::7]  # 7 divides no factor, so every value meets every other
