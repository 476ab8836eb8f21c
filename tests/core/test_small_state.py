"""What ranks have alike of their small state is stored by one rank of a node, and restored on all of them."""

from __future__ import annotations

from moc.format.keys import parse_object_key
from moc.format.manifest import Manifest
from moc.format.tagged import decode_state, encode_state
from moc.recover import StorageSource
from moc.routing import KEPT, ROUTING_KEY, Routing
from moc.snapshot.seal import SealRecord
from tests.core.test_partial_saves import LAYERS, Bench

EXPERTS, RANKS = 64, 4


def _captured(bench: Bench, records: list[SealRecord]) -> dict[int, bytes]:
    """Return the blobs in memory."""
    found = {}
    for record in records:
        with bench.arena.view(bench.arena.state_offset(record.rank, record.slots), record.state_bytes) as view:
            found[record.rank] = bytes(view)
    return found


def _stored(bench: Bench, manifest: Manifest) -> dict[int, bytes]:
    rows = [row for row in manifest.objects if parse_object_key(row.key)[2] == "d"]
    return {
        parse_object_key(row.key)[1]: bench.repository.read_state(row, bench.repository.read_header(row))
        for row in rows
    }


def test_routes_and_whatever_else_is_alike_are_stored_once() -> None:
    bench = Bench(experts=EXPERTS, size=RANKS, mode="full", k=None)
    counts = tuple(tuple(range(layer, layer + EXPERTS)) for layer in range(LAYERS))
    bench.routing = Routing(basis=KEPT, routed=counts, learned=counts)
    bench.advance()
    records = bench.seals()

    outcome = bench.offer(records)

    assert outcome.error is None, outcome.error
    bench.sound()
    captured, manifest = _captured(bench, records), bench.repository.read_manifest(outcome.name)
    stored = _stored(bench, manifest)
    assert stored[0] == captured[0]
    for rank in range(1, RANKS):
        tree = decode_state(stored[rank])
        assert isinstance(tree, dict)
        assert [path for path, _ in tree["changes"]] == [["noise"], ["note"]], "what is a rank's own"
        assert len(stored[rank]) < len(captured[rank]) / 8
    bench.close()
    for rank in range(RANKS):
        tree, is_exact = StorageSource(bench.repository, manifest, rank=rank).state(rank)
        assert (encode_state(tree).to_bytes(), is_exact) == (captured[rank], True)
        assert isinstance(tree, dict)
        assert ROUTING_KEY in tree
    bench.repository.close()
