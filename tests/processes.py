# SPDX-License-Identifier: Apache-2.0
"""Steps in processes of their own, as a build runs them; and in the process of the test, for stages that it defines."""

from __future__ import annotations

import atexit
from typing import TYPE_CHECKING

from edgekd.build import pipeline
from edgekd.build.worker import Worker

if TYPE_CHECKING:
    from edgekd.ports import Context, StageResult, Step

_workers: dict[object, Worker] = {}


def run_step(step: Step, context: Context) -> StageResult:
    """Run a step without inputs; all tests of this process share one worker, which has imported torch."""
    worker = _workers.get("worker")
    if worker is None:
        worker = _workers["worker"] = Worker(context.recipe_dir)
        atexit.register(worker.close)
    worker.recipe_dir = context.recipe_dir
    return pipeline.call_stage(worker, step, {}, context)


class ThisProcess:
    """A worker that calls functions in this process."""

    def call(self, name, function, *arguments, progress, max_silence_s=None):
        return function(*arguments, progress=progress)
