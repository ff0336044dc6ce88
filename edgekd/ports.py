# SPDX-License-Identifier: Apache-2.0
"""The protocols of plug-ins: what a stage, a runtime and a device must provide. Modules implement them, without inheritance."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, Generic, Protocol, TypeVar

if TYPE_CHECKING:
    from contextlib import AbstractContextManager
    from pathlib import Path

    import numpy as np

    from edgekd.domain.artifact import Artifact, CacheEntry, Json
    from edgekd.domain.device import DeviceSpec
    from edgekd.domain.recipe import Recipe, TensorSpec
    from edgekd.domain.target import Target

P = TypeVar("P")  # the frozen dataclass of a step's parameters
Progress = Callable[[float, str], None]  # (completed share in [0, 1], description of the current work)


@dataclass(frozen=True, slots=True)
class Step(Generic[P]):
    """A cached stage bound to its parameters and inputs.

    ``id`` is unique in a plan and starts with the stage's name (``quantize/litert/static_wi8_ai8/ptq``).
    ``params`` is a frozen dataclass of JSON values: all that may change the output. ``inputs`` maps the stage's names to artifacts of
    other steps, ``"step id:file name"``. ``tools`` are the distributions whose versions affect the bytes. ``threads`` is how many CPU
    threads the stage may use where no byte depends on it: neither of the key nor of the step's identity.
    """

    id: str
    stage: str
    params: P
    inputs: Mapping[str, str] = field(default_factory=dict)
    tools: tuple[str, ...] = ()
    threads: int = field(default=1, compare=False)

    @property
    def producers(self) -> set[str]:
        """Return the ids of the steps whose artifacts this step reads."""
        return {reference.partition(":")[0] for reference in self.inputs.values()}


@dataclass(frozen=True, slots=True)
class CompletedStep:
    """A step that is finished: its entry, and whether it came from the cache."""

    step: Step[Any]
    entry: CacheEntry
    hit: bool

    @property
    def why_not(self) -> str | None:
        """Return why what the step wrote cannot ship (a model file that was refused, or that computes something else), or None."""
        reason = self.entry.metrics.get("why_not")
        return None if reason is None else str(reason)


@dataclass(frozen=True, slots=True)
class Context:
    """What a stage gets in addition to its step and inputs; nothing in it may change the output.

    ``recipe_dir``: paths of user code and files are relative to it (their digests are in the key, through ``inspect``).
    ``out``: every file written here becomes an artifact under its name; the stage writes to no other folder except ``work``.
    ``work``: a folder of this step's key that survives a kill: partial work, so that a stage can resume.
    ``secret``: the key of the hashes of environment values (``Record.env``).
    """

    recipe_dir: Path
    out: Path
    work: Path
    progress: Progress
    secret: bytes = b""


@dataclass(frozen=True, slots=True)
class Record:
    """What the user's code read, as ``inspect`` recorded it: a cached result is valid only while all of this is unchanged.

    ``files``: path (relative to the recipe's folder for a file in it) to SHA-256, or None for a file that was looked
    up and absent. ``listings``: folder to SHA-256 of its sorted names. ``env``: variable to the keyed hash of its
    value (HMAC-SHA-256), or None. ``modules``: distribution to version.
    """

    files: Mapping[str, str | None] = field(default_factory=dict)
    listings: Mapping[str, str | None] = field(default_factory=dict)
    env: Mapping[str, str | None] = field(default_factory=dict)
    modules: Mapping[str, str] = field(default_factory=dict)


@dataclass(frozen=True, slots=True)
class StageResult:
    """Metrics and notes of a run, stored with the artifacts; ``record`` only from ``inspect``.

    A note that starts with ``warning: `` is printed at once. A metric ``why_not`` is the reason why no step may use what this one wrote.
    """

    metrics: Mapping[str, Json] = field(default_factory=dict)
    notes: tuple[str, ...] = ()
    record: Record | None = None


class Reporter(Protocol):
    """Where progress and notes of a build go: the terminal, or plain lines."""

    def log(self, text: str) -> None:
        """Print one line."""
        ...

    def step(self, name: str) -> AbstractContextManager[Progress]:
        """Show a step while it runs; yields the function through which it reports its progress."""
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
        """Run the step.

        Raises:
            RecipeError: if the user's code or data is wrong.
            StageError: if the step failed.
        """
        ...


class Session(Protocol):
    """A loaded model file, ready to run one sample at a time."""

    def run(self, inputs: Sequence[np.ndarray]) -> list[np.ndarray]:
        """Return the outputs for inputs in the order and types of the model file (batch 1)."""
        ...


class Runtime(Protocol):
    """What exports, quantizes and executes a model file: a package ``edgekd/runtimes/NAME``, light to import."""

    NAME: str
    PACKAGE: str  # the distribution that it needs by default
    ALTERNATIVES: tuple[str, ...]  # distributions that execute its files where that one is not installed
    FORMAT: str  # ``onnx`` or ``tflite``; the suffix of its files
    SCHEMES: tuple[str, ...]
    EXPORT_TOOLS: tuple[str, ...]  # distributions that affect the exported bytes
    QUANTIZE_TOOLS: tuple[str, ...]

    def export(self, model: Any, inputs: Sequence[TensorSpec], path: Path, *, rewrite: bool = True) -> tuple[str, ...]:
        """Write a torch module (in eval mode, batch 1) as a float32 model file, and return notes; the same module gives the same bytes.

        ``rewrite``: whether the runtime may change the graph (simplify it) after the conversion.
        """
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
        """Return how quantization differs for the target's CPU (an empty mapping for no difference)."""
        ...

    def why_unfit(self, scheme: str, variant: Mapping[str, Json], instruction_set: str) -> str | None:
        """Return why outputs computed on this instruction set differ from the target's (saturation), or None."""
        ...

    def open(self, path: Path, threads: int) -> Session:
        """Load a model file.

        Raises:
            UnavailableError: if the runtime is not installed.
            StageError: if it cannot load the file.
        """
        ...


@dataclass(frozen=True, slots=True)
class ProcessEnd:
    """How a process on a device ended: its exit code (negative: a signal; None: it did not reply in time), and the end of its output."""

    code: int | None
    last_line: str = "none"


class Process(Protocol):
    """A harness process on a device (``edgekd/harness/runner.py``), with the pipes of its protocol: one line of JSON each."""

    def exchange(self, line: str, timeout_s: float) -> str | ProcessEnd:
        """Send a command and return the reply, or how the process ended.

        Raises:
            UnavailableError: if the connection to the device ended.
        """
        ...


class Connection(Protocol):
    """An open device. ``label`` is how messages call it. Only one harness process computes at a time."""

    kind: str
    label: str

    def facts(self) -> Mapping[str, Json]:
        """Return the facts of the device, as the runner reads them there."""
        ...

    def versions(self, packages: Sequence[str]) -> Mapping[str, str | None]:
        """Return the versions of distributions in the device's Python, None for those that are not installed."""
        ...

    def lease(self, on_wait: Callable[[str], None] | None = None) -> AbstractContextManager[None]:
        """Hold exclusive access to the device. ``on_wait`` is called with a description of who holds it."""
        ...

    def push(self, path: Path) -> str:
        """Return the path on the device of a file with the same content, which is copied if it is not there."""
        ...

    def pull(self, path: str) -> bytes:
        """Return the content of a file on the device."""
        ...

    def start(self) -> AbstractContextManager[Process]:
        """Start a harness process, which ends with the context."""
        ...

    def cpu_seconds(self) -> float:
        """Return the CPU time on the device of this connection and of its processes that have ended."""
        ...


class Device(Protocol):
    """Where a model is executed: a module ``edgekd/devices/KIND``. What all kinds share, the interleaver, is above them."""

    KIND: str

    def connect(self, spec: DeviceSpec) -> AbstractContextManager[Connection]:
        """Open a device. At the end of the context nothing runs or lies there, except files that are stored by their content.

        Raises:
            UnavailableError: if the device cannot be reached or used.
        """
        ...
