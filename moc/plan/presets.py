"""Published models by name; the sources of the numbers stand in docs/planning.md."""

from __future__ import annotations

from moc.errors import UsageError
from moc.plan.shapes import LatentAttention, ModelShape

__all__ = ["PRESETS", "preset"]

PRESETS = {
    "gpt-125m-8e": ModelShape(
        name="gpt-125m-8e",
        layers=12,
        hidden=768,
        heads=12,
        vocabulary=50304,
        positions=1024,
        ffn=3072,
        moe_layers=6,
        experts=8,
        expert_ffn=3072,
        top_k=1,
        gated=False,
        biased=True,
        tied=True,
    ),
    "gpt-350m-16e": ModelShape(
        name="gpt-350m-16e",
        layers=24,
        hidden=1024,
        heads=16,
        vocabulary=50304,
        positions=2048,
        ffn=4096,
        moe_layers=12,
        experts=16,
        expert_ffn=4096,
        top_k=1,
        gated=False,
        biased=True,
        tied=True,
    ),
    "mixtral-8x7b": ModelShape(
        name="mixtral-8x7b",
        layers=32,
        hidden=4096,
        heads=32,
        kv_heads=8,
        vocabulary=32000,
        ffn=0,
        moe_layers=32,
        experts=8,
        expert_ffn=14336,
        top_k=2,
    ),
    "qwen3-30b-a3b": ModelShape(
        name="qwen3-30b-a3b",
        layers=48,
        hidden=2048,
        heads=32,
        kv_heads=4,
        head=128,
        qk_norm=True,
        vocabulary=151936,
        ffn=0,
        moe_layers=48,
        experts=128,
        expert_ffn=768,
        top_k=8,
    ),
    "deepseek-v3": ModelShape(
        name="deepseek-v3",
        layers=61,
        hidden=7168,
        heads=128,
        vocabulary=129280,
        ffn=18432,
        moe_layers=58,
        experts=256,
        expert_ffn=2048,
        shared_ffn=2048,
        top_k=8,
        latent=LatentAttention(q_rank=1536, kv_rank=512, nope=128, rope=64, value=128),
    ),
}
"""Models by name."""


def preset(name: str) -> ModelShape:
    """Return a preset; raises UsageError with the known names."""
    if name not in PRESETS:
        raise UsageError(f"unknown model: model={name} allowed={','.join(PRESETS)}, or a YAML or JSON file")
    return PRESETS[name]
