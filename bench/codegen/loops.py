"""Natural loops of a listing of machine code.

A backward jump alone does not make a loop: waits on a barrier spin in blocks that the assembler puts at the
end of the code and that jump back into the middle of a body. A loop is a jump to a block that every path to
the jump has gone through, together with the blocks between the two.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class Step:
    """One instruction: its name, where it may jump to (an index), and whether it may go on to the next."""

    name: str
    jump: int | None = None
    falls_through: bool = True


def natural_loops(steps: Sequence[Step]) -> list[frozenset[int]]:
    """Positions of the instructions of each natural loop, in no particular order."""
    leaders = {0} | {step.jump for step in steps if step.jump is not None}
    leaders |= {
        index + 1 for index, step in enumerate(steps) if step.jump is not None or not step.falls_through
    }
    starts = sorted(leader for leader in leaders if leader < len(steps))
    spans = list(zip(starts, [*starts[1:], len(steps)], strict=True))
    block_of = {first: number for number, (first, _) in enumerate(spans)}
    successors: list[list[int]] = []
    for number, (_, last) in enumerate(spans):
        end = steps[last - 1]
        goals = [block_of[end.jump]] if end.jump is not None else []
        if end.falls_through and number + 1 < len(spans):
            goals.append(number + 1)
        successors.append(goals)
    predecessors: list[list[int]] = [[] for _ in spans]
    for number, goals in enumerate(successors):
        for goal in goals:
            predecessors[goal].append(number)
    dominators = _dominators(predecessors)
    bodies: dict[int, set[int]] = {}
    for number, goals in enumerate(successors):
        for head in goals:
            if head in dominators[number]:
                bodies.setdefault(head, {head}).update(_between(head, number, predecessors))
    return [frozenset(i for block in body for i in range(*spans[block])) for body in bodies.values()]


def _dominators(predecessors: list[list[int]]) -> list[set[int]]:
    """Blocks on every path to each block; blocks reached by an indirect jump only count as entries."""
    every = set(range(len(predecessors)))
    found = [set(every) for _ in predecessors]
    for number, before in enumerate(predecessors):
        if number == 0 or not before:
            found[number] = {number}
    changed = True
    while changed:
        changed = False
        for number, before in enumerate(predecessors):
            if number == 0 or not before:
                continue
            new = set.intersection(*(found[entry] for entry in before)) | {number}
            if new != found[number]:
                found[number] = new
                changed = True
    return found


def _between(head: int, tail: int, predecessors: list[list[int]]) -> set[int]:
    """Blocks from which `tail` is reached without going through `head`, and `tail`."""
    body, todo = {head}, [tail]
    while todo:
        block = todo.pop()
        if block not in body:
            body.add(block)
            todo += predecessors[block]
    return body
