"""Print what the planner says about the cases of the MoC-System paper, and how long it takes to plan for many ranks.

    python benchmarks/planning.py              # sizes, order, cases, evenness, planning time, manifest
    python benchmarks/planning.py --repeats 9

Only times depend on the machine; every other number is exact arithmetic. The paper's bars have no numbers; beside ours
stand the ranges that its text gives.
"""

import argparse
import statistics
import time
from collections.abc import Callable, Sequence
from dataclasses import replace
from itertools import pairwise
from pathlib import Path

from benchmarks.machine import machine_facts
from moc.format.keys import CheckpointName, object_key
from moc.format.manifest import Manifest, ObjectRow, decode_manifest, encode_manifest
from moc.format.stale import StaleExpert
from moc.plan.assign import RULES
from moc.plan.balance import balanced_rotation, windows
from moc.plan.burden import Checkpoint, bytes_bound, plan_level
from moc.plan.cost import size_ratio
from moc.plan.ownership import even_ownership, zero2_ownership
from moc.plan.presets import PRESETS
from moc.plan.rotation import even_rotation
from moc.plan.scope import MOC_LAYOUT, PAPER_LAYOUT, PARTS, SIZES, Scope
from moc.plan.shapes import ModelShape
from moc.routing import KEPT, Routing
from moc.state import Expert
from moc.topology import Topology

CASES = (("Case1", 8, 8), ("Case2", 16, 16), ("Case3", 16, 8))  # data-parallel and expert-parallel ranks
PUBLISHED = {"w": "0.88", "o": "0.54", "wo": "0.42"}
PUBLISHED_CHANGES = {"all": "-12 to -28 %", "partial": "-22 to -29 %", "adaptive": "a further -3.7 to -6.1 %"}
FIGURE_4 = ((0, 1, 2, 0), (1, 2, 0, 1))  # experts of the four MoE layers in the first two checkpoints, K = 1 of 3


def print_sizes() -> None:
    shape = PRESETS["gpt-350m-16e"]
    print(f"\n## Size, K = 1 of 16, {shape.name}, over a full checkpoint of the same layout\n")
    print("| parts | paper | master_full, 14 B | strict, 14 B | master_full, 12 B | strict, 12 B |")
    print("|---|---|---|---|---|---|")
    for parts in PARTS:
        ratios = [
            f"{size_ratio(shape, layout, Scope(parts=parts, size=size), 1):.3f}"
            for layout in (PAPER_LAYOUT, MOC_LAYOUT)
            for size in ("master_full", "strict")
        ]
        print(f"| {parts} | {PUBLISHED[parts]} | " + " | ".join(ratios) + " |")


def print_order() -> None:
    print("\n## Order of a rotation: 4 MoE layers, 3 experts, K = 1, as in the paper's Fig. 4\n")
    print("| checkpoint | ours | paper |\n|---|---|---|")
    for number, (selected, published) in enumerate(zip(windows(even_rotation(4, 3, 3), 1), FIGURE_4, strict=False), 1):
        print(f"| {number} | {tuple(selected.argmax(axis=1).tolist())} | {published} |")


def print_cases() -> None:
    shape = PRESETS["gpt-350m-16e"]
    print("\n## Bytes of the fullest rank, worst checkpoint of a turn, in MB; change from the column before\n")
    print("| case | K | scope | ownership | baseline | equal | adaptive | adaptive / bound | paper: equal, adaptive |")
    print("|---|---|---|---|---|---|---|---|---|")
    for name, dp, ep in CASES:
        for k, parts, size in ((16, "wo", "strict"), *((1, "wo", size) for size in SIZES), (1, "o", "master_full")):
            scope = Scope(parts=parts, size=size)
            even, real = even_ownership(shape, dp, ep), zero2_ownership(shape, dp, ep)
            print_case(
                name,
                k,
                "paper's model",
                Checkpoint(shape=shape, ownership=even, layout=PAPER_LAYOUT, scope=scope, is_cut=False),
            )
            print_case(
                name,
                k,
                "ZeRO-2, 14 B",
                Checkpoint(shape=shape, ownership=real, layout=PAPER_LAYOUT, scope=scope, is_cut=True),
            )
            print_case(
                name,
                k,
                "ZeRO-2, 12 B",
                Checkpoint(shape=shape, ownership=real, layout=MOC_LAYOUT, scope=scope, is_cut=True),
            )


def print_case(name: str, k: int, title: str, job: Checkpoint) -> None:
    rotation = balanced_rotation(job.ownership, k)
    today = replace(job, layout=PAPER_LAYOUT)  # DeepSpeed stores the weights of training beside the masters
    sizes = [plan_level(today if rule == "baseline" else job, rotation, k, rule).bottleneck for rule in RULES]
    changes = ["", *(f" ({after / before - 1:+.1%})" for before, after in pairwise(sizes))]
    cells = [f"{size / 1e6:.0f}{change}" for size, change in zip(sizes, changes, strict=True)]
    scope = "all" if k == job.shape.experts else f"{job.scope.parts} {job.scope.size}"
    paper = (
        PUBLISHED_CHANGES["all"]
        if scope == "all"
        else f"{PUBLISHED_CHANGES['partial']}, {PUBLISHED_CHANGES['adaptive']}"
    )
    cells += [f"{sizes[-1] / bytes_bound(job, k):.3f}", paper]
    print(f"| {name} | {k} | {scope} | {title} | " + " | ".join(cells) + " |")


def wide_shape(*, is_stacked: bool) -> ModelShape:
    """Return 24 MoE layers of 64 experts with the widths of GPT-350M."""
    name = "stacked" if is_stacked else "separate"
    return replace(PRESETS["gpt-350m-16e"], name=name, moe_layers=24, experts=64, ffn=0, stacked=is_stacked)


def print_evenness() -> None:
    print("\n## Fullest rank over the lower bound, worst checkpoint of a turn, real ZeRO-2 ownership, 12 B\n")
    ks = (1, 2, 4, 8, 16, 32)
    print("64 experts x 16 EP ranks x 24 layers, hidden 1024\n")
    print("| expert parameters | replicas | " + " | ".join(f"K {k}" for k in ks) + " |")
    print("|---|---|" + "---|" * len(ks))
    for is_stacked in (False, True):
        for columns in (1, 2, 4):
            shape = wide_shape(is_stacked=is_stacked)
            cells = [f"{over_bound(shape, 16 * columns, 16, k):.3f}" for k in ks]
            print(f"| {shape.name} | {columns} | " + " | ".join(cells) + " |")
    deepseek = PRESETS["deepseek-v3"]
    print(f"\n{deepseek.name}, 16,384 ranks, EP 64, K 32 of 256: {over_bound(deepseek, 16_384, 64, 32):.4f}")


def over_bound(shape: ModelShape, dp: int, ep: int, k: int) -> float:
    own = zero2_ownership(shape, dp, ep)
    job = Checkpoint(shape=shape, ownership=own, layout=MOC_LAYOUT, scope=Scope(), is_cut=True)
    level = plan_level(job, balanced_rotation(own, k), k, "adaptive")
    return level.bottleneck / bytes_bound(job, k)


def print_times(repeats: int) -> None:
    print(f"\n## Planning time: ownership, rotation, one turn and its bound; seconds, median of {repeats} (range)\n")
    wide = replace(PRESETS["qwen3-30b-a3b"], name="64 layers x 128 experts", layers=64, moe_layers=64)
    jobs: Sequence[tuple[str, Callable[[], object]]] = (
        ("deepseek-v3, 16,384 ranks, EP 64, K 32", lambda: over_bound(PRESETS["deepseek-v3"], 16_384, 64, 32)),
        ("64 layers x 128 experts, 4,096 ranks, EP 128, K 16", lambda: over_bound(wide, 4096, 128, 16)),
        ("64 layers x 128 experts, 4,096 ranks, EP 32, K 16", lambda: over_bound(wide, 4096, 32, 16)),
        ("64 layers x 128 experts, 4,096 ranks, EP 8, K 16", lambda: over_bound(wide, 4096, 8, 16)),
    )
    print("| job | wall | CPU |\n|---|---|---|")
    for title, job in jobs:
        walls, cpus = [], []
        for _ in range(repeats):
            wall, cpu = time.perf_counter(), time.process_time()
            job()
            walls.append(time.perf_counter() - wall)
            cpus.append(time.process_time() - cpu)
        cells = [f"{statistics.median(v):.2f} ({min(v):.2f} to {max(v):.2f})" for v in (walls, cpus)]
        print(f"| {title} | " + " | ".join(cells) + " |")


def print_manifest(repeats: int) -> None:
    print(f"\n## Manifest of deepseek-v3 on 16,384 ranks, EP 64; CPU seconds, median of {repeats}\n")
    print("| checkpoint | objects | stale experts | MB | build | encode | decode |\n|---|---|---|---|---|---|---|")
    for k in (256, 32, 16, 8, 4):
        title = "mode full" if k == 256 else f"partial, K {k} of 256"
        turn = written_pieces(PRESETS["deepseek-v3"], 16_384, 64, k)
        times: list[tuple[float, ...]] = []
        for _ in range(repeats):
            began = time.process_time()
            manifest = build_manifest(turn, dp=16_384, ep=64)
            built = time.process_time()
            encoded = encode_manifest(manifest)
            ended = time.process_time()
            decode_manifest(encoded, name="manifest")
            times.append((built - began, ended - built, time.process_time() - ended))
        cells = [f"{statistics.median(column):.2f}" for column in zip(*times, strict=True)]
        counts = f"{len(manifest.objects)} | {len(manifest.stale_experts)} | {len(encoded) / 1e6:.1f}"
        print(f"| {title} | {counts} | " + " | ".join(cells) + " |")


Written = tuple[list[Expert], list[int]]


def written_pieces(shape: ModelShape, dp: int, ep: int, k: int) -> list[Written]:
    """Return the experts and the bytes of each rank's experts that the checkpoints of one turn write."""
    own = zero2_ownership(shape, dp, ep)
    return [
        (
            [Expert(layer=int(layer), index=int(index)) for layer, index in zip(*selected.nonzero(), strict=True)],
            (own.selected_elements(selected) * MOC_LAYOUT.total).tolist(),
        )
        for selected in windows(balanced_rotation(own, k), k)
    ]


def build_manifest(turn: list[Written], *, dp: int, ep: int) -> Manifest:
    """Return the manifest of the last checkpoint of a turn, which takes from each earlier one what that has written."""
    names = [
        CheckpointName(run="run", incarnation=1, step=100 * n, attempt=f"{n:08x}") for n in range(1, len(turn) + 1)
    ]
    newest = names[-1]
    rows = [object_row(newest, rank, "d", 10**8) for rank in range(dp)]
    stale = []
    for name, (experts, sizes) in zip(names, turn, strict=True):
        rows += [object_row(name, rank, "e00", size) for rank, size in enumerate(sizes) if size]
        if name != newest:
            stale += [StaleExpert(expert=expert, step=name.step, source=name, routed=10**9) for expert in experts]
    layers = 1 + max(expert.layer for experts, _ in turn for expert in experts)
    counts = ((10**9,) * (sum(len(experts) for experts, _ in turn) // layers),) * layers
    return Manifest(
        name=newest,
        parent=None,
        topology=Topology(
            world_size=dp, node_of_rank=tuple(r // 8 for r in range(dp)), ep_sizes=(("ep", ep),)
        ).to_json(),
        catalog_digest="0" * 16,
        tensors=3 * 58 * 256 * 3,
        objects=tuple(sorted(rows, key=lambda row: row.key)),
        fingerprint={},
        versions={},
        is_finite=True,
        stale_experts=tuple(sorted(stale, key=lambda row: row.expert)),
        routing=Routing(basis=KEPT, routed=counts, learned=counts),
    )


def object_row(name: CheckpointName, rank: int, piece: str, data_bytes: int) -> ObjectRow:
    key = object_key(name, rank, piece)
    return ObjectRow(key=key, size_bytes=data_bytes + 8192, header_bytes=8192, header_crc32c=3_616_052_028)


def main() -> None:
    parser = argparse.ArgumentParser(description="the planner on the paper's cases, and its speed")
    parser.add_argument("--repeats", type=int, default=5)
    options = parser.parse_args()
    print_sizes()
    print_order()
    print_cases()
    print_evenness()
    print_times(options.repeats)
    print_manifest(options.repeats)
    print("\nmachine: " + ", ".join(f"{name} {value}" for name, value in machine_facts(Path.cwd()).items()))


if __name__ == "__main__":
    main()
