"""Which engines are exported, by tier."""

from __future__ import annotations

from tests.export.models import Scenario

DEFAULT = (
    Scenario(layer="dense", zero=2, dtype="fp32"),
    Scenario(layer="native", zero="bf16", dtype="bf16"),
    Scenario(layer="native", zero=1, dtype="fp32"),
    Scenario(layer="stacked", zero=2, dtype="bf16"),
)
SLOW = (
    Scenario(layer="dense", zero="bf16", dtype="bf16"),
    Scenario(layer="dense", zero=1, dtype="bf16"),
    Scenario(layer="native", zero=2, dtype="bf16", options=(("round_robin_gradients", True),)),
    Scenario(layer="native", zero=2, dtype="fp32", options=(("parameter_alignment", True),)),
    Scenario(layer="stacked", zero="bf16", dtype="bf16"),
    Scenario(layer="stacked", zero=1, dtype="fp32"),
    Scenario(layer="stacked", zero=2, dtype="fp32", options=(("elastic_checkpoint", True),)),
)
FOUR_RANKS = (
    Scenario(layer="native", zero=2, dtype="bf16"),
    Scenario(layer="stacked", zero="bf16", dtype="bf16"),
    Scenario(layer="stacked", zero=1, dtype="fp32"),
)
BY_NAME = {scenario.name: scenario for scenario in DEFAULT + SLOW + FOUR_RANKS}
