# SPDX-License-Identifier: Apache-2.0
"""The pipeline: the tuple of cached stages, and the loop that runs their steps."""

from __future__ import annotations

import errno
import json
import os
import shutil
import tempfile
import time
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol, cast

from edgekd import locks
from edgekd.cache import Cache, Entry, storage_error
from edgekd.digests import canonical, digest, file_digest, tool_version
from edgekd.errors import StageError, UnavailableError
from edgekd.kd import ranks
from edgekd.ports import Context
from edgekd.stages import distill, evaluate, export, inspect, quantize, supervise, teach

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator, Mapping
    from contextlib import AbstractContextManager

    from edgekd.domain.artifact import Artifact
    from edgekd.plan import Plan
    from edgekd.ports import Progress, Stage, Step

PIPELINE: tuple[Stage, ...] = (inspect, teach, supervise, distill, export, quantize, evaluate)
STAGES = {stage.NAME: stage for stage in PIPELINE}
TRAINING = ("teach", "supervise", "distill")  # the stages that take long: a user is warned before them, and ranks share their work
KEY_SCHEMA = 1
SCRATCH = ".rank."  # stands in the name of a rank's folder, after the step's


class Teller(Protocol):
    """Where progress and remarks go while a build works: the terminal, or plain lines."""

    def say(self, text: str) -> None:
        """Tell one line."""
        ...

    def step(self, name: str) -> AbstractContextManager[Progress]:
        """Tell of a step that runs, and give it a way to tell how far it is."""
        ...


@dataclass(frozen=True, slots=True)
class Done:
    """A step that is finished: its entry, and whether it came from the cache."""

    step: Step
    entry: Entry
    hit: bool


@dataclass(frozen=True, slots=True)
class Explained:
    """What a build would do with a step: ``hit``, ``miss`` with the reason, or ``after`` (an input is not known yet)."""

    step: Step
    what: str
    why: str


@dataclass(frozen=True, slots=True)
class Site:
    """Where steps run. ``before`` is called before a step that must run, with all that is done: the place for warnings."""

    cache: Cache
    recipe_dir: Path
    teller: Teller
    before: Callable[[Step, Mapping[str, Done]], None]


def run(plan: Plan, site: Site, until: str | None) -> dict[str, Done]:
    """Run the steps of a plan, or take them from the cache, up to and with the stage ``until``.

    Raises:
        EdgekdError: what the stage raised.
    """
    done: dict[str, Done] = {}
    for step in wanted(plan, until):
        done[step.id] = _run_step(step, done, site)
    if ranks.count() > 1:
        ranks.order(None)
    return done


def wanted(plan: Plan, until: str | None) -> Iterator[Step]:
    """Yield the steps of a plan up to and with a stage, but for those that need a later one (an assistant's answers)."""
    names = list(STAGES)
    last = len(names) if until is None else names.index(until)
    kept: set[str] = set()
    for step in plan.steps:
        if names.index(step.stage) <= last and {reference.partition(":")[0] for reference in step.inputs.values()} <= kept:
            kept.add(step.id)
            yield step


def assist() -> None:
    """Do this rank's share of the steps that the first one trains, until it has finished.

    Files are read where they are, and nothing is written but in a folder that goes away again; partial work is taken up as the
    first rank finds it.

    Raises:
        EdgekdError: what the stage raised, here and in the first rank.
    """
    for step, inputs, recipe_dir, work in ranks.orders():
        with tempfile.TemporaryDirectory(prefix=f"{work.name}{SCRATCH}", dir=work.parent) as scratch:
            mine, out = Path(scratch) / "work", Path(scratch) / "out"
            shutil.copytree(work, mine, copy_function=os.link)  # what is written is written anew, so links do
            out.mkdir()
            ranks.ready()
            STAGES[step.stage].run(step, inputs, Context(recipe_dir, out, mine, lambda _share, _text: None))


def explain(plan: Plan, cache: Cache, recipe_dir: Path) -> list[Explained]:
    """Return for each step whether it would run, and why; runs nothing."""
    done: dict[str, Done] = {}
    told: list[Explained] = []
    for step in plan.steps:
        missing = sorted({reference.partition(":")[0] for reference in step.inputs.values()} - set(done))
        if missing:
            told.append(Explained(step, "after", ", ".join(missing)))
            continue
        material = _material(step, done)
        key = _find_key(cache, material, recipe_dir)
        entry = cache.get(key)
        if entry is None:
            told.append(Explained(step, "miss", _why(step, material, cache, recipe_dir)))
        else:
            done[step.id] = Done(step, entry, hit=True)
            told.append(Explained(step, "hit", entry.key[:12]))
    return told


def _run_step(step: Step, done: Mapping[str, Done], site: Site) -> Done:
    cache, recipe_dir = site.cache, site.recipe_dir
    material = _material(step, done)
    entry = cache.get(_find_key(cache, material, recipe_dir))
    if entry is None:
        _need_tools(step)
        _mend(step, done, site)
        site.before(step, done)
        base = digest(material)
        with cache.lock(base):
            entry = cache.get(_find_key(cache, material, recipe_dir))  # another build may have made it meanwhile
            if entry is None:
                site.teller.say(f"{step.id}: {_why(step, material, cache, recipe_dir)}")
                entry = _execute(step, done, site, material)
                cache.remember(_last_name(step, recipe_dir), material)
                return Done(step, entry, hit=False)
    cache.touch(entry.key)
    cache.remember(_last_name(step, recipe_dir), material)
    return Done(step, entry, hit=True)


def _execute(step: Step, done: Mapping[str, Done], site: Site, material: Mapping[str, Any]) -> Entry:
    cache, base = site.cache, digest(material)
    started = time.monotonic()
    try:
        out, work = cache.fresh_out(base), cache.work(base)
        with site.teller.step(step.id) as progress, locks.machine_shared():
            started = time.monotonic()
            inputs = _inputs(step, done)
            if ranks.count() > 1 and step.stage in TRAINING:
                for left in work.parent.glob(f"{work.name}{SCRATCH}*"):  # by ranks that were killed
                    shutil.rmtree(left)
                ranks.order((step, inputs, site.recipe_dir, work))
            result = STAGES[step.stage].run(step, inputs, Context(site.recipe_dir, out, work, progress))
    except OSError as error:
        if error.errno not in {errno.ENOSPC, errno.EDQUOT, errno.EROFS}:
            raise
        raise storage_error(f"{step.id} cannot write", cache.root, error) from error
    seconds = time.monotonic() - started
    key = base if result.record is None else cache.add_record(base, result.record)
    entry = cache.put(out, key, material, result, seconds)
    site.teller.say(f"{step.id}: done in {seconds:.1f} s")
    for note in result.notes:
        if note.startswith("warning: "):  # what the user should know before the stages that follow are paid for
            site.teller.say(note)
    return entry


def _need_tools(step: Step) -> None:
    missing = [tool for tool in step.tools if tool_version(tool) is None]
    if missing:
        raise UnavailableError(f"{step.id} needs {', '.join(missing)}, which is not installed; run: pip install 'edgekd[build]'")


def _mend(step: Step, done: Mapping[str, Done], site: Site) -> None:
    """Run the producers of a step's inputs again where their bytes are damaged; every byte is read."""
    for producer in {reference.partition(":")[0] for reference in step.inputs.values()}:
        entry = done[producer].entry
        used = [reference.partition(":")[2] for reference in step.inputs.values() if reference.startswith(f"{producer}:")]
        if all(_is_whole(entry.artifacts[name]) for name in used):
            continue
        site.cache.discard(entry.key)
        if _run_step(done[producer].step, done, site).entry.artifacts != entry.artifacts:
            raise StageError(f"{producer}: its cached files were damaged, and running it again gave other bytes; build again")


def _is_whole(artifact: Artifact) -> bool:
    return artifact.path.is_file() and file_digest(artifact.path) == artifact.digest


def _material(step: Step, done: Mapping[str, Done]) -> dict[str, Any]:
    material = {
        "schema": KEY_SCHEMA,
        "stage": step.stage,
        "version": STAGES[step.stage].VERSION,
        "params": step.params,
        "inputs": {name: artifact.digest for name, artifact in _inputs(step, done).items()},
        "tools": {tool: tool_version(tool) for tool in step.tools},
    }
    return cast("dict[str, Any]", json.loads(canonical(material)))  # as it is read back: no tuples


def _find_key(cache: Cache, material: Mapping[str, Any], recipe_dir: Path) -> str:
    base = digest(material)
    return cache.find_recorded(base, recipe_dir) or base


def _inputs(step: Step, done: Mapping[str, Done]) -> dict[str, Artifact]:
    found = {}
    for name, reference in step.inputs.items():
        producer, _, file = reference.partition(":")
        found[name] = done[producer].entry.artifacts[file]
    return found


def _why(step: Step, material: Mapping[str, Any], cache: Cache, recipe_dir: Path) -> str:
    last = cache.last(_last_name(step, recipe_dir))
    if last is None:
        return "never run here"
    if last == material:
        return "; ".join(cache.nearest_changes(digest(material), recipe_dir)[:3]) or "no longer in the cache"
    return "; ".join(list(_differences(last, material))[:3])


def _differences(old: object, new: object, path: str = "") -> Iterator[str]:
    if isinstance(old, dict) and isinstance(new, dict):
        for name in sorted(old.keys() | new.keys()):
            yield from _differences(old.get(name), new.get(name), f"{path}.{name}" if path else name)
    elif isinstance(old, list | tuple) and isinstance(new, list | tuple) and len(old) == len(new):
        for index, (was, now) in enumerate(zip(old, new, strict=True)):
            yield from _differences(was, now, f"{path}[{index}]")
    elif old != new:
        yield f"{path} changed" if path.startswith("inputs.") else f"{path} {_short(old)} -> {_short(new)}"


def _short(value: object) -> str:
    text = str(value)
    return text if len(text) <= 40 else text[:37] + "..."  # noqa: PLR2004  (a line's room)


def _last_name(step: Step, recipe_dir: Path) -> str:
    return f"{recipe_dir}:{step.id}"
