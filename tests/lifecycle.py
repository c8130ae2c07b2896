"""What must be true of the tables at any moment, whatever happened: one check for all suites.

`assert_invariants` reads the tables and the audit and compares them with each other and with the
edges of `dispatcher/states.py`. It holds between any two transactions, so it may be called while
batches are still on their way.
"""

from __future__ import annotations

from typing import Final

import sqlalchemy as sa

from dispatcher.states import BATCH_EDGES, CHUNK_EDGES, EXECUTION_EDGES

EDGES: Final[dict[str, frozenset[tuple[str | None, str]]]] = {
    "batch": frozenset((edge.old, edge.new) for edge in BATCH_EDGES),
    "chunk": frozenset((edge.old, edge.new) for edge in CHUNK_EDGES),
    "execution": frozenset((edge.old, edge.new) for edge in EXECUTION_EDGES),
    "target": frozenset({("up", "down"), ("down", "up")}),
}

# Each gives no row while all is well. Strays have a slot of their own and no attempt.
NEVER: Final = {
    "a chunk has more than one open attempt": """
        SELECT batch_id, chunk_index, count(*) FROM dispatcher.attempt
        WHERE outcome IS NULL GROUP BY 1, 2 HAVING count(*) > 1
    """,
    "a chunk is launching or running without an open attempt, or has one and is not": """
        SELECT c.batch_id, c.index, c.state, a.number FROM dispatcher.chunk c
        LEFT JOIN dispatcher.attempt a
            ON a.batch_id = c.batch_id AND a.chunk_index = c.index AND a.outcome IS NULL
        WHERE (c.state IN ('launching', 'running')) <> (a.number IS NOT NULL)
    """,
    "a chunk's state is not that of the execution of its open attempt": """
        SELECT c.batch_id, c.index, c.state, e.id, e.state FROM dispatcher.attempt a
        JOIN dispatcher.chunk c ON c.batch_id = a.batch_id AND c.index = a.chunk_index
        JOIN dispatcher.execution e ON e.id = a.execution_id
        WHERE a.outcome IS NULL AND (c.state = 'running') <> (e.state = 'launched')
    """,
    "a batch is final and a chunk of it is open": """
        SELECT b.id, b.state, c.index, c.state
        FROM dispatcher.batch b JOIN dispatcher.chunk c ON c.batch_id = b.id
        WHERE b.state IN ('succeeded', 'failed', 'cancelled')
            AND c.state IN ('pending', 'launching', 'running')
    """,
    "a running batch has no open chunk": """
        SELECT b.id FROM dispatcher.batch b WHERE b.state = 'running' AND NOT EXISTS (
            SELECT 1 FROM dispatcher.chunk c
            WHERE c.batch_id = b.id AND c.state IN ('pending', 'launching', 'running')
        )
    """,
    "a planned batch has not the chunks and items that it says": """
        SELECT b.id, b.chunk_count, count(c.index), b.item_count, sum(c.size)
        FROM dispatcher.batch b LEFT JOIN dispatcher.chunk c
            ON c.batch_id = b.id AND c.state <> 'split'
        WHERE b.planned_at IS NOT NULL AND b.state <> 'planning'
        GROUP BY b.id HAVING b.chunk_count IS DISTINCT FROM count(c.index)
            OR b.item_count IS DISTINCT FROM coalesce(sum(c.size), 0)
    """,
    "an execution's slots are not its open attempts": """
        SELECT e.id, e.state, e.open_tasks, count(a.number) FROM dispatcher.execution e
        LEFT JOIN dispatcher.attempt a ON a.execution_id = e.id AND a.outcome IS NULL
        WHERE NOT e.stray GROUP BY e.id HAVING e.open_tasks <> count(a.number)
    """,
    "an execution has not the attempts that it was written with": """
        SELECT e.id, e.tasks, count(a.number) FROM dispatcher.execution e
        LEFT JOIN dispatcher.attempt a ON a.execution_id = e.id
        WHERE NOT e.stray GROUP BY e.id HAVING e.tasks <> count(a.number)
    """,
    "an ended execution holds something": """
        SELECT e.id, e.open_tasks, a.batch_id, a.chunk_index FROM dispatcher.execution e
        LEFT JOIN dispatcher.attempt a ON a.execution_id = e.id AND a.outcome IS NULL
        WHERE e.state = 'ended' AND (e.open_tasks <> 0 OR a.number IS NOT NULL)
    """,
    "a chunk's attempts are not numbered from 1 without a gap": """
        SELECT c.batch_id, c.index, c.attempts, count(a.number), min(a.number), max(a.number)
        FROM dispatcher.chunk c LEFT JOIN dispatcher.attempt a
            ON a.batch_id = c.batch_id AND a.chunk_index = c.index
        GROUP BY c.batch_id, c.index HAVING c.attempts <> count(a.number)
            OR c.attempts <> coalesce(max(a.number), 0) OR min(a.number) <> 1
    """,
    "a final chunk does not say what its last attempt says": """
        SELECT c.batch_id, c.index, c.state, a.outcome
        FROM dispatcher.chunk c JOIN dispatcher.attempt a
            ON a.batch_id = c.batch_id AND a.chunk_index = c.index AND a.number = c.attempts
        WHERE (c.state = 'succeeded') <> (a.outcome IS NOT DISTINCT FROM 'succeeded')
            AND c.state NOT IN ('pending', 'launching', 'running')
            AND NOT (c.state = 'succeeded' AND c.size = (
                SELECT count(*) FROM dispatcher.item_result r
                WHERE r.batch_id = c.batch_id AND r.chunk_index = c.index AND r.ok
            ))
    """,
    "the items that have succeeded are not counted right": """
        SELECT c.batch_id, c.index, c.items_ok, count(r.position) FROM dispatcher.chunk c
        LEFT JOIN dispatcher.item_result r
            ON r.batch_id = c.batch_id AND r.chunk_index = c.index AND r.ok
        GROUP BY c.batch_id, c.index, c.items_ok, c.state, c.size
        HAVING c.items_ok <> CASE WHEN c.state = 'succeeded' THEN c.size ELSE count(r.position) END
    """,
    "a chunk that was split has not all its items in its parts": """
        SELECT p.batch_id, p.index, p.size, sum(c.size) FROM dispatcher.chunk p
        LEFT JOIN dispatcher.chunk c ON c.batch_id = p.batch_id AND c.parent = p.index
        WHERE p.state = 'split' GROUP BY p.batch_id, p.index, p.size
        HAVING p.size IS DISTINCT FROM sum(c.size)
    """,
    "a finishing time is missing, or too early for its state": """
        SELECT 'batch', id FROM dispatcher.batch
        WHERE (finished_at IS NOT NULL) <> (state IN ('succeeded', 'failed', 'cancelled'))
            OR finished_at < created_at
        UNION ALL
        SELECT 'chunk', batch_id FROM dispatcher.chunk
        WHERE (finished_at IS NOT NULL) <> (state IN ('succeeded', 'failed', 'cancelled', 'split'))
        UNION ALL
        SELECT 'execution', key FROM dispatcher.execution
        WHERE (finished_at IS NOT NULL) <> (state = 'ended') OR finished_at < intent_at
    """,
    "an unknown execution is never looked for": """
        SELECT id FROM dispatcher.execution WHERE state = 'unknown' AND next_look_at IS NULL
    """,
    "an intended execution waits for nothing": """
        SELECT id FROM dispatcher.execution
        WHERE state = 'intended' AND call_by IS NULL AND next_call_at IS NULL
    """,
    "a cancel is asked for and never sent": """
        SELECT id FROM dispatcher.execution
        WHERE state = 'launched' AND cancel_requested_at IS NOT NULL AND next_cancel_at IS NULL
    """,
}

# The moves in their order, and then the states, which have no number. One statement, so that none
# is written between the two.
MOVES_AND_STATES: Final = """
    SELECT id, kind, batch_id, chunk_index, execution_id, old, new, reason
    FROM dispatcher.event WHERE new IS NOT NULL OR old IS NOT NULL
    UNION ALL SELECT NULL, 'batch', id, NULL, NULL, NULL, state, NULL FROM dispatcher.batch
    UNION ALL SELECT NULL, 'chunk', batch_id, index, NULL, NULL, state, NULL FROM dispatcher.chunk
    UNION ALL SELECT NULL, 'execution', NULL, NULL, id, NULL, state, NULL FROM dispatcher.execution
    ORDER BY id NULLS LAST
"""


def assert_invariants(connection: sa.Connection) -> None:
    """Fail with all that is wrong with the tables and their audit, a line each."""
    wrong = []
    for sentence, statement in NEVER.items():
        rows = connection.execute(sa.text(statement)).fetchall()
        if rows:
            wrong.append(f"{sentence}: {', '.join(str(tuple(row)) for row in rows[:5])}")
    wrong += _wrong_moves(connection)
    assert not wrong, "\n" + "\n".join(wrong)


def _wrong_moves(connection: sa.Connection) -> list[str]:
    """Follow every subject through its events: along the edges, without a gap, to where it is."""
    wrong = []
    last: dict[tuple[object, ...], str | None] = {}
    for number, kind, batch_id, index, execution_id, old, new, reason in connection.execute(
        sa.text(MOVES_AND_STATES)
    ):
        if number is None:
            subject = _subject(kind, batch_id, index, execution_id, None)
            if last.get(subject) != new:
                wrong.append(f"{subject} is {new} and its events end at {last.get(subject)}")
            continue
        if (old, new) not in EDGES[kind]:
            wrong.append(f"event {number}: {kind} {old} → {new} is no edge")
        subject = _subject(kind, batch_id, index, execution_id, reason)
        if last.get(subject, "up" if kind == "target" else None) != old:
            wrong.append(
                f"event {number}: {subject} moves {old} → {new} and was {last.get(subject)}"
            )
        last[subject] = new
    return wrong


def _subject(
    kind: str, batch_id: str | None, index: int | None, execution_id: int | None, reason: str | None
) -> tuple[object, ...]:
    if kind == "batch":
        return kind, batch_id
    if kind == "chunk":
        return kind, batch_id, index
    if kind == "execution":
        return kind, execution_id
    # A target has no column of its own in the audit: its name opens the reason.
    return kind, (reason or "").partition(":")[0]
