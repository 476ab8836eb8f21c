"""Models on the command line: a preset's name, or a YAML or JSON file; and the options that planning verbs share."""

from __future__ import annotations

import argparse
import os

from moc.cli.modelfile import read_fields
from moc.errors import UsageError
from moc.plan.burden import Checkpoint
from moc.plan.cost import Rates
from moc.plan.ownership import even_ownership, zero2_ownership
from moc.plan.presets import PRESETS, preset
from moc.plan.scope import PAPER_LAYOUT, PARTS, SIZES, Layout, Scope
from moc.plan.shapes import FIELD_HELP, ModelShape, shape_from_fields

__all__ = [
    "MODEL_HELP",
    "add_model",
    "add_rates",
    "check_k",
    "checkpoint_of",
    "load_model",
    "ranks_per_node",
    "rates_of",
]

GPU_HOURS_PER_FAULT = 50_000  # Llama 3 405B: 16,384 GPUs, one unexpected interruption per 3.1 h
GIGABYTE = 10**9

MODEL_HELP = "fields of a model FILE (JSON, or lines `name: value`):\n" + "\n".join(
    f"  {name.ljust(11)} {text}" for name, text in FIELD_HELP.items()
)


def add_model(parser: argparse.ArgumentParser, *, k_defaults: tuple[str, str]) -> None:
    """Add what names a model, its ranks and the experts of a checkpoint; `k_defaults` are for the help."""
    parser.add_argument("--model", required=True, metavar="PRESET|FILE", help=f"{', '.join(PRESETS)}, or a file")
    parser.add_argument("--dp", required=True, type=int, metavar="D", help="data-parallel ranks")
    parser.add_argument("--ep", required=True, type=int, metavar="E", help="expert-parallel size, a divisor of D")
    snapshot, persist = k_defaults
    parser.add_argument("--k-snapshot", type=int, metavar="K", help=f"experts per layer in a snapshot ({snapshot})")
    parser.add_argument("--k-persist", type=int, metavar="K", help=f"experts per layer in storage ({persist})")
    parser.add_argument("--parts", choices=PARTS, default="wo", help="what K applies to: weights, optimizer, both")
    parser.add_argument("--size", choices=SIZES, default="strict", help="master_full: masters are always saved whole")


def add_rates(parser: argparse.ArgumentParser) -> None:
    """Add what was measured, or is assumed, of the machines."""
    parser.add_argument("--link-gbps", type=float, default=25.0, metavar="X", help="device to host, GB/s per rank (25)")
    parser.add_argument("--storage-gbps", type=float, default=0.5, metavar="Y", help="to storage, GB/s per rank (0.5)")
    parser.add_argument(
        "--storage-total-gbps", type=float, default=2000.0, metavar="Z", help="to storage, GB/s of all ranks (2000)"
    )
    parser.add_argument("--fb-s", type=float, default=2.0, metavar="S", help="forward and backward pass, seconds (2)")
    parser.add_argument("--restart-s", type=float, default=300.0, metavar="S", help="from a fault to training, s (300)")
    parser.add_argument(
        "--mtbf-hours",
        type=float,
        metavar="H",
        help=f"mean time between faults of the job (default: {GPU_HOURS_PER_FAULT} h / D)",
    )
    parser.add_argument(
        "--ranks-per-node", type=int, metavar="R", help="ranks whose memory fails together (8, at most D)"
    )


def load_model(name: str) -> ModelShape:
    """Return a preset or the model of a file; raises UsageError."""
    if name in PRESETS or not (os.sep in name or name.endswith((".yaml", ".yml", ".json"))):
        return preset(name)
    return shape_from_fields(read_fields(name), source=name)


def checkpoint_of(args: argparse.Namespace, shape: ModelShape, layout: Layout) -> Checkpoint:
    """Return what the options ask to plan, under one of the layouts."""
    ownership = (even_ownership if layout is PAPER_LAYOUT else zero2_ownership)(shape, args.dp, args.ep)
    return Checkpoint(
        shape=shape,
        ownership=ownership,
        layout=layout,
        scope=Scope(parts=args.parts, size=args.size),
        is_cut=layout is not PAPER_LAYOUT,
    )


def check_k(k_snapshot: int, k_persist: int, experts: int) -> None:
    """Raise UsageError unless both levels can have so many experts."""
    if not 1 <= k_snapshot <= experts:
        raise UsageError(f"number of experts is out of range: k_snapshot={k_snapshot} allowed=1..{experts}")
    if not 1 <= k_persist <= k_snapshot:
        raise UsageError(f"number of experts is out of range: k_persist={k_persist} allowed=1..{k_snapshot}")


def ranks_per_node(args: argparse.Namespace) -> int:
    """Return the option, or its default for so many ranks."""
    return min(8, args.dp) if args.ranks_per_node is None else int(args.ranks_per_node)


def rates_of(args: argparse.Namespace) -> Rates:
    """Return the rates that the options give; without a mean time between faults, the one for so many ranks."""
    if args.dp < 1:
        raise UsageError(f"number of data-parallel ranks is out of range: dp={args.dp} allowed=at least 1")
    ranks = ranks_per_node(args)
    if not 1 <= ranks <= args.dp:
        raise UsageError(f"ranks per node are out of range: given={ranks} allowed=1..{args.dp}")
    hours = GPU_HOURS_PER_FAULT / args.dp if args.mtbf_hours is None else args.mtbf_hours
    return Rates(
        link=args.link_gbps * GIGABYTE,
        storage=args.storage_gbps * GIGABYTE,
        storage_total=args.storage_total_gbps * GIGABYTE,
        pass_s=args.fb_s,
        mtbf_s=hours * 3600,
        restart_s=args.restart_s,
        failed_share=ranks / args.dp,
    )
