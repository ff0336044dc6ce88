# SPDX-License-Identifier: Apache-2.0
"""The plug-in protocols: what a stage, a runtime and a device must offer. Modules satisfy them; nothing is inherited."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, Generic, Protocol, TypeVar

if TYPE_CHECKING:
    from contextlib import AbstractContextManager
    from pathlib import Path

    import numpy as np

    from edgekd.domain.artifact import Artifact, CacheEntry, Json
    from edgekd.domain.recipe import Recipe, TensorSpec
    from edgekd.domain.target import Target

P = TypeVar("P")  # the frozen dataclass of a step's parameters
Progress = Callable[[float, str], None]  # (share done in [0, 1], what is being done, in a few words)


@dataclass(frozen=True, slots=True)
class Step(Generic[P]):
    """A cached stage bound to its parameters and inputs.

    ``id`` is unique in a plan and starts with the stage's name (``quantize/litert/static_wi8_ai8/ptq``).
    ``params`` is a frozen dataclass of JSON values: all that may change the output. ``inputs`` maps the stage's own names to artifacts of other
    steps, ``"step id:file name"``. ``tools`` are the distributions whose versions touch the bytes.
    """

    id: str
    stage: str
    params: P
    inputs: Mapping[str, str] = field(default_factory=dict)
    tools: tuple[str, ...] = ()


@dataclass(frozen=True, slots=True)
class CompletedStep:
    """A step that is finished: its entry, and whether it came from the cache."""

    step: Step[Any]
    entry: CacheEntry
    hit: bool


@dataclass(frozen=True, slots=True)
class Context:
    """What a stage gets beside its step and inputs; nothing in it may change the output.

    ``recipe_dir``: user code and files are found from here (their digests reach the key through ``inspect``).
    ``out``: every file written here becomes an artifact under its name; the stage writes nowhere else but ``work``.
    ``work``: a folder of this step's key that survives a kill: partial work, so that a stage can go on.
    """

    recipe_dir: Path
    out: Path
    work: Path
    progress: Progress


@dataclass(frozen=True, slots=True)
class Record:
    """What the user's code read, as ``inspect`` saw it: a cached result stands only while all of this is unchanged.

    ``files``: path (relative to the recipe's folder where it lies in it) to SHA-256, or None for a file that was looked
    for and absent. ``listings``: folder to SHA-256 of its sorted names. ``env``: variable to SHA-256 of its value, or
    None. ``modules``: distribution to version.
    """

    files: Mapping[str, str | None] = field(default_factory=dict)
    listings: Mapping[str, str | None] = field(default_factory=dict)
    env: Mapping[str, str | None] = field(default_factory=dict)
    modules: Mapping[str, str] = field(default_factory=dict)


@dataclass(frozen=True, slots=True)
class StageResult:
    """Numbers and remarks of a run (kept beside the artifacts); ``record`` only from ``inspect``.

    A note that starts with ``warning: `` is told at once.
    """

    metrics: Mapping[str, Json] = field(default_factory=dict)
    notes: tuple[str, ...] = ()
    record: Record | None = None


class Reporter(Protocol):
    """Where progress and remarks go while a build works: the terminal, or plain lines."""

    def log(self, text: str) -> None:
        """Tell one line."""
        ...

    def step(self, name: str) -> AbstractContextManager[Progress]:
        """Tell of a step that runs, and give it a way to tell how far it is."""
        ...


class Stage(Protocol):
    """One cached step of the pipeline: a module.

    It reads only ``step.params`` and ``inputs`` and writes only under ``context.out`` (and ``context.work``). The
    runner, not the stage, computes keys, times, logs and stores. Artifacts hold no time, path or host name.
    """

    NAME: str
    CODE: tuple[str, ...]  # the modules and packages of edgekd that compute its bytes, as paths without suffix; part of its keys

    def steps(self, recipe: Recipe, targets: Sequence[Target]) -> list[Step[Any]]:
        """Return the steps of this stage, without importing anything heavy; the same step for two targets once."""
        ...

    def run(self, step: Step[Any], inputs: Mapping[str, Artifact], context: Context) -> StageResult:
        """Do the work.

        Raises:
            RecipeError: if the user's code or data is wrong.
            StageError: if the work failed.
        """
        ...


class Session(Protocol):
    """A loaded model file, ready to run one sample at a time."""

    def run(self, inputs: Sequence[np.ndarray]) -> list[np.ndarray]:
        """Return the outputs for inputs in the order and types of the model file (batch 1)."""
        ...


class Runtime(Protocol):
    """What executes a model file, and makes one: a package ``edgekd/runtimes/NAME``, light to import."""

    NAME: str
    PACKAGE: str  # the distribution that it needs by default
    FORMAT: str  # ``onnx`` or ``tflite``; the suffix of its files
    SCHEMES: tuple[str, ...]
    EXPORT_TOOLS: tuple[str, ...]  # distributions that touch the exported bytes
    QUANTIZE_TOOLS: tuple[str, ...]

    def export(self, model: Any, inputs: Sequence[TensorSpec], path: Path) -> None:
        """Write a torch module (in eval mode, batch 1) as a float32 model file; the same module gives the same bytes."""
        ...

    def quantize(
        self, source: Path, path: Path, params: Mapping[str, Json], calibration: Sequence[Sequence[np.ndarray]]
    ) -> Mapping[str, Json]:
        """Write a quantized model file and return its scheme file's content, with the why-not list.

        ``params``: ``scheme``, ``io``, and what :meth:`variant` returned. ``calibration``: samples, each a list of
        inputs with batch axis 1; empty where the scheme needs none.
        """
        ...

    def variant(self, scheme: str, cpu_features: Sequence[str], arch: str) -> Mapping[str, Json]:
        """Return what the target's processor changes in quantization (an empty mapping for nothing)."""
        ...

    def why_unfit(self, scheme: str, variant: Mapping[str, Json], instruction_set: str) -> str | None:
        """Return why outputs computed on this instruction set do not stand for the target's (saturation), or None."""
        ...

    def open(self, path: Path, threads: int) -> Session:
        """Load a model file.

        Raises:
            UnavailableError: if the runtime is not installed.
            StageError: if it cannot load the file.
        """
        ...


class Device(Protocol):
    """Where a model is executed: a module ``edgekd/devices/KIND``; ``name`` is None for this machine."""

    KIND: str

    def measure(self, job: Mapping[str, Json], progress: Progress) -> Mapping[str, Json]:
        """Run a measuring job with the harness in a process of its own and return what it printed.

        Raises:
            UnavailableError: if the device cannot be reached or lacks the runtime.
            StageError: if the harness failed.
        """
        ...
