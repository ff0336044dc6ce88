# SPDX-License-Identifier: Apache-2.0
"""A trial of ways to train: the same training steps in turns, on the network and the machine that they are for."""

from __future__ import annotations

import json
import statistics
import time
from dataclasses import replace
from typing import TYPE_CHECKING, Any

from edgekd.domain.recipe import Entry
from edgekd.errors import RecipeError
from edgekd.kd import data, models, train, ways
from edgekd.kd.repeatable import repeatable
from edgekd.kd.ways import Way
from edgekd.ports import StageResult

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping, Sequence

    from edgekd.domain.artifact import Artifact
    from edgekd.ports import Context

STEPS, ROUNDS = 3, 9
PAYS = 1.1  # times as fast, in all rounds but one: less is not worth other weights


def run(section: str, params: Mapping[str, Any], inputs: Mapping[str, Artifact], context: Context) -> StageResult:
    """Try the ways, the first of which must do; write ``way.json``. ``section`` is the recipe's, for messages."""
    import torch

    entry = Entry.of(params["model"])
    given = data.samples(inputs, "train")
    few = given.pick(torch.arange(STEPS * params["batch_size"]) % len(given))
    settings = train.Settings(1, params["batch_size"], params["optimizer"], 1e-6, 0.0, 0, params["threads"])
    job = train.Job(
        section=section,
        entry=entry,
        build=lambda: models.student(context.recipe_dir, entry),
        train=few,
        validation=few,
        objective=lambda logits, _answers, _labels, _epoch: logits.float().square().mean(),
        settings=settings,
    )
    first, *others = [Way(**told) for told in params["tried"]]
    notes: list[str] = []
    with repeatable(params["threads"]):
        blocks = {first: train.rehearsal(replace(job, settings=replace(settings, way=first)))}
        for way in others:
            try:
                blocks[way] = train.rehearsal(replace(job, settings=replace(settings, way=way)))
                blocks[way]()
            except (RecipeError, RuntimeError) as error:
                blocks.pop(way, None)
                notes.append(f"warning: {entry} is not trained in {way}, which fails: {str(error).splitlines()[0]}")
        seconds = raced(blocks)
    chosen = best(seconds)
    speeds = {str(way): statistics.median(map(ratio, seconds[first], took)) for way, took in seconds.items() if way != first}
    told = ", ".join(f"{way} is {speed:.2f}" for way, speed in speeds.items())
    notes += [f"{entry}: {told} times as fast as {first}; it is trained in {chosen}"] if speeds else []
    (context.out / ways.FILE).write_text(json.dumps(chosen.told, sort_keys=True) + "\n")
    return StageResult({"speeds": speeds}, tuple(notes))


def raced(blocks: Mapping[Way, Callable[[], object]]) -> dict[Way, list[float]]:
    """Return the seconds of each way, round by round, after one that does not count; who begins changes from round to round."""
    seconds: dict[Way, list[float]] = {way: [] for way in blocks}
    for turn in range(1 + ROUNDS):
        for way in [*blocks][:: 1 if turn % 2 else -1]:
            started = time.perf_counter()
            blocks[way]()
            seconds[way].append(time.perf_counter() - started)
    return {way: took[1:] for way, took in seconds.items()}


def best(seconds: Mapping[Way, Sequence[float]]) -> Way:
    """Return the way that is taken: a later one only if it is faster by enough, in all rounds but one, than the best before it."""
    chosen, *others = seconds
    for way in others:
        if sorted(map(ratio, seconds[chosen], seconds[way]))[min(1, ROUNDS - 1)] >= PAYS:
            chosen = way
    return chosen


def ratio(slow: float, fast: float) -> float:
    """Return how many times as fast the second is."""
    return slow / fast
