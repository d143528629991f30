"""What the selection prefers, on trajectories of which that is known."""

import dataclasses

import pytest

from latentrevise.data.records import Trajectory
from latentrevise.recovery.selection import select


def trajectory(name, ids, logprob=-1.0, prefix=(1, 2)):
    values = {f.name: None for f in dataclasses.fields(Trajectory)}
    values |= {"sample_id": name, "plain_prefix_ids": prefix, "completion_ids": tuple(ids)}
    return Trajectory(**{**values, "plain_logprobs": (logprob,) * len(ids)})


ROWS = [
    trajectory("long", range(10, 20), -0.5),
    trajectory("rare", range(30, 35), -2.0),
    trajectory("like long", range(10, 19), -0.4),
    trajectory("short", range(11, 15), -0.3),
]


@pytest.mark.parametrize(
    ("how", "names"),
    [
        ("first", ["long", "rare", "like long", "short"]),
        ("shortest", ["short", "rare", "like long", "long"]),
        ("surprising", ["rare", "long", "like long", "short"]),
        ("diverse", ["short", "rare", "long", "like long"]),
    ],
)
def test_orders(how, names):
    assert [t.sample_id for t in select(ROWS, how)] == names
    assert [t.sample_id for t in select(ROWS, how, 2)] == names[:2]


def test_equal_texts_are_taken_once_and_the_first_of_them():
    again = [
        trajectory("a", (5, 6), -1.0),
        ROWS[0],
        trajectory("b", (5, 6), -3.0),
        trajectory("c", (5, 6), prefix=(9,)),
    ]
    for how in ("first", "shortest", "surprising", "diverse"):
        assert sorted(t.sample_id for t in select(again, how)) == ["a", "c", "long"]
    assert select([], "diverse") == []
