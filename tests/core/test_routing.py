"""Routes: what is counted, what recoveries lose, and that every wrong value is refused."""

from __future__ import annotations

import json
from collections.abc import Callable

import pytest
from hypothesis import given
from hypothesis import strategies as st

from moc.format.tagged import decode_state, encode_state
from moc.routing import BASES, COUNT_LIMIT, Capture, Routing, lose
from moc.state import Expert
from tests.core.values import captures, routings

ONE = Routing(basis="kept", routed=((6, 4), (10, 0)), learned=((6, 4), (10, 0)))


@given(routings())
def test_routing_comes_back_from_json(routing: Routing) -> None:
    assert Routing.from_json(json.loads(json.dumps(routing.to_json()))) == routing


@given(captures())
def test_capture_comes_back_from_a_state_blob(capture: Capture) -> None:
    blob = encode_state({"routing": capture.to_tree()}).to_bytes()

    tree = decode_state(blob)

    assert isinstance(tree, dict)
    assert Capture.from_tree(tree["routing"]) == capture


@given(routings())
def test_lost_tokens_are_a_proportion(routing: Routing) -> None:
    assert 0 <= routing.plt <= 1
    assert (routing.plt == 0) == (routing.learned == routing.routed)


def test_the_proportion_is_the_mean_over_the_layers() -> None:
    routing = lose(ONE, {Expert(layer=0, index=1): 1, Expert(layer=1, index=0): 8})

    assert routing.lost == (3, 2)
    assert routing.plt == pytest.approx((3 / 10 + 2 / 10) / 2)


def test_a_layer_without_routes_has_lost_nothing() -> None:
    assert Routing(basis="kept", routed=((0, 0), (4, 4)), learned=((0, 0), (2, 4))).plt == pytest.approx(1 / 8)


def test_routes_lost_by_one_fault_are_not_lost_again_by_the_next() -> None:
    first = lose(Routing(basis="kept", routed=((100,),), learned=((100,),)), {Expert(layer=0, index=0): 30})
    later = Routing(basis="kept", routed=((150,),), learned=((first.learned[0][0] + 50,),))

    second = lose(later, {Expert(layer=0, index=0): 30})  # the same old version again: nothing newer was committed

    assert first.lost == (70,)
    assert second.lost == (120,)


@given(st.data())
def test_counters_equal_a_log_of_every_route(data: st.DataObject) -> None:
    """One expert trains, is captured and falls back to any capture; the model keeps the sets that counters count."""
    routed = learned = 0
    present: set[int] = set()
    captures: list[tuple[int, frozenset[int]]] = [(0, frozenset())]
    for event in data.draw(st.lists(st.sampled_from(("train", "capture", "fault")), max_size=30)):
        if event == "train":
            present.update(range(routed, routed + 3))
            routed, learned = routed + 3, learned + 3
        elif event == "capture":
            captures.append((learned, frozenset(present)))
        else:
            version, known = data.draw(st.sampled_from(captures))
            routing = Routing(basis="kept", routed=((routed,),), learned=((learned,),))
            learned = lose(routing, {Expert(layer=0, index=0): version}).learned[0][0]
            present = set(known)

        routing = Routing(basis="kept", routed=((routed,),), learned=((learned,),))
        assert routing.lost == (routed - len(present),)


def test_a_capture_knows_what_a_version_has_learned_only_by_its_step() -> None:
    capture = Capture(routing=ONE, captured=((6, 2), (10, 0)), steps=((8, 4), (8, 8)))

    assert capture.learned_by(Expert(layer=0, index=1), 4) == 2
    assert capture.learned_by(Expert(layer=0, index=1), 8) is None


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"basis": "all"}, "basis='all'"),
        ({"routed": ()}, r"experts=\(\)"),
        ({"routed": ((1, 2), ())}, r"experts=\(2, 0\)"),
        ({"routed": ((6, -1), (10, 0))}, "layer=0 expert=1 count=-1"),
        ({"routed": ((6, COUNT_LIMIT + 1), (10, 0))}, f"count={COUNT_LIMIT + 1}"),
        ({"learned": ((6, 4),)}, "another model"),
        ({"learned": ((6, 5), (10, 0))}, r"name=learned layer=0 expert=1 count=5 allowed=0\.\.4"),
    ],
)
def test_what_cannot_be_is_refused_with_its_numbers(changes: dict[str, object], message: str) -> None:
    fields: dict[str, object] = {"basis": ONE.basis, "routed": ONE.routed, "learned": ONE.learned}

    with pytest.raises(ValueError, match=message):
        Routing(**{**fields, **changes})  # type: ignore[arg-type]


def test_a_number_of_another_count_is_worth_nothing_and_costs_no_state() -> None:
    assert lose(ONE, {Expert(layer=0, index=0): 7}).learned == ((0, 4), (10, 0))
    assert lose(ONE, {Expert(layer=0, index=2): 1, Expert(layer=2, index=0): 0}) == ONE


@pytest.mark.parametrize("wrong", [None, 1, True, 1.0, "x", [], {}, [[1]], [[True, 0], [0, 0]], [[1.0, 0], [0, 0]]])
@pytest.mark.parametrize("field", ["basis", "routed", "lost"])
def test_json_of_another_shape_is_refused(field: str, wrong: object) -> None:
    body = {**ONE.to_json(), field: wrong}
    missing = {name: value for name, value in body.items() if name != field}

    for given_body in (body, missing, [body], wrong):
        with pytest.raises((ValueError, TypeError)):
            Routing.from_json(given_body)


def _cut(packed: object) -> object:
    assert isinstance(packed, bytes)
    return packed[:-1]


@pytest.mark.parametrize(
    "wrong", [lambda _: None, lambda _: 1, lambda _: "kept " * 9, lambda _: b"", _cut, lambda v: [v]]
)
@pytest.mark.parametrize("field", ["basis", "experts", "routed", "learned", "captured", "steps"])
def test_a_tree_of_another_shape_is_refused(field: str, wrong: Callable[[object], object]) -> None:
    tree = Capture(routing=ONE, captured=ONE.learned, steps=((8, 8), (8, 8))).to_tree()
    value = tree.pop(field)
    with pytest.raises(ValueError, match="incomplete"):
        Capture.from_tree(tree)
    if not (wrong is _cut and not isinstance(value, bytes)):
        with pytest.raises((ValueError, TypeError)):
            Capture.from_tree({**tree, field: wrong(value)})


def test_both_bases_are_allowed_and_no_other() -> None:
    assert BASES == ("kept", "routed, before drops")
