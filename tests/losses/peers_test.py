import collections

import pytest

from paxo.losses.peers import PEERS, Peer, comparison
from tests.losses.every_loss import LOSSES


def test_every_name_is_a_loss():
    assert {row.name for row in PEERS} <= set(LOSSES)


def test_no_pair_stands_twice():
    counts = collections.Counter((row.name, row.peer, row.peer_name) for row in PEERS)
    assert [pair for pair, number in counts.items() if number > 1] == []


def test_what_differs_says_how():
    assert [row for row in PEERS if not row.equal and not row.note] == []


def test_notes_fit_a_line_of_a_table():
    assert [row.note for row in PEERS if len(row.note) > 100 or row.note != row.note.strip()] == []


def test_comparison_is_sorted_and_of_one_library():
    rows = comparison("trl")
    assert {row.peer for row in rows} == {"TRL"}
    assert [row.name for row in rows] == sorted(row.name for row in rows)
    assert sorted(comparison(), key=PEERS.index) == list(PEERS)


def test_an_unknown_library_is_named_with_those_there_are():
    with pytest.raises(ValueError, match="unknown library 'trx'; expected one of EasyDeL, HALOs"):
        comparison("trx")


def test_a_row_is_plain_data():
    assert Peer("dpo", "TRL", "DPOTrainer sigmoid", True) in PEERS
