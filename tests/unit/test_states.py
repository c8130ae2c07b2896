"""The tables of edges are complete: every state is reached, and every open one is left."""

from __future__ import annotations

from typing import Any

import pytest

from dispatcher.states import (
    BATCH_EDGES,
    CHUNK_EDGES,
    EXECUTION_EDGES,
    FINAL_BATCH,
    FINAL_CHUNK,
    LIVE_EXECUTION,
    BatchState,
    ChunkState,
    ExecutionState,
)

MACHINES: Any = [
    pytest.param(BatchState, BATCH_EDGES, FINAL_BATCH, id="batch"),
    pytest.param(ChunkState, CHUNK_EDGES, FINAL_CHUNK, id="chunk"),
    pytest.param(
        ExecutionState, EXECUTION_EDGES, set(ExecutionState) - LIVE_EXECUTION, id="execution"
    ),
]


@pytest.mark.parametrize(("states", "edges", "final"), MACHINES)
def test_every_state_can_be_reached_from_the_beginning(states: Any, edges: Any, final: Any) -> None:
    reached = {edge.new for edge in edges if edge.old is None}
    for _ in states:
        reached |= {edge.new for edge in edges if edge.old in reached}
    assert reached == set(states)
    assert final <= set(states)


@pytest.mark.parametrize(("states", "edges", "final"), MACHINES)
def test_every_open_state_leads_to_an_end(states: Any, edges: Any, final: Any) -> None:
    ends = set(final)
    for _ in states:
        ends |= {edge.old for edge in edges if edge.new in ends and edge.old is not None}
    assert ends == set(states)


@pytest.mark.parametrize(("states", "edges", "final"), MACHINES)
def test_only_a_retry_or_a_stray_leaves_a_final_state(states: Any, edges: Any, final: Any) -> None:
    assert states
    for edge in edges:
        if edge.old in final:
            assert edge.verb.startswith(("retry (operator", "a stray is seen again")), edge
            assert edge.new not in final


@pytest.mark.parametrize(("states", "edges", "final"), MACHINES)
def test_each_edge_is_there_once_with_a_verb(states: Any, edges: Any, final: Any) -> None:
    pairs = [(edge.old, edge.new) for edge in edges]
    assert len(pairs) == len(set(pairs))
    assert all(edge.verb and edge.old != edge.new for edge in edges)
    assert {type(edge.new) for edge in edges} == {states}
    assert final
