# SPDX-License-Identifier: Apache-2.0
"""A trial of the precisions: the same training steps in turns, on the network and the processor that they are for."""

from __future__ import annotations

import json
import statistics
import time
from dataclasses import replace
from typing import TYPE_CHECKING, Any

from edgekd.domain.recipe import Entry
from edgekd.errors import RecipeError
from edgekd.kd import data, models, precision, train
from edgekd.kd.repeatable import repeatable
from edgekd.ports import StageResult

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping

    from edgekd.domain.artifact import Artifact
    from edgekd.ports import Context

STEPS, ROUNDS = 3, 9
PAYS = 1.1  # times as fast, in all rounds but one: less is not worth other weights


def run(section: str, params: Mapping[str, Any], inputs: Mapping[str, Artifact], context: Context) -> StageResult:
    """Try the precisions; write ``precision.json``. ``section`` is the recipe's, for messages."""
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
    with repeatable(params["threads"]):
        try:
            blocks = {name: train.rehearsal(replace(job, settings=replace(settings, precision=name))) for name in _BOTH}
        except RecipeError as error:
            if error.__cause__ is None:
                raise
            ratios, note = [0.0], f"warning: {entry} is trained in float32, since bfloat16 fails: {error}"
        else:
            ratios = raced(blocks)
            note = f"{entry}: bfloat16 is {statistics.median(ratios):.2f} times as fast"
    chosen = precision.BFLOAT16 if pays(ratios) else precision.FLOAT32
    (context.out / precision.FILE).write_text(json.dumps({"precision": chosen}) + "\n")
    return StageResult({"speed": statistics.median(ratios)}, (note,))


_BOTH = (precision.FLOAT32, precision.BFLOAT16)


def raced(blocks: Mapping[str, Callable[[], object]]) -> list[float]:
    """Return how many times as fast bfloat16 is, round by round, after one that does not count."""
    ratios = []
    for turn in range(1 + ROUNDS):
        seconds = {}
        for name in _BOTH if turn % 2 else reversed(_BOTH):
            started = time.perf_counter()
            blocks[name]()
            seconds[name] = time.perf_counter() - started
        ratios.append(seconds[precision.FLOAT32] / seconds[precision.BFLOAT16])
    return ratios[1:]


def pays(ratios: list[float]) -> bool:
    """Return whether bfloat16 was faster by enough in all rounds but one."""
    return sorted(ratios)[min(1, len(ratios) - 1)] >= PAYS
