# SPDX-License-Identifier: Apache-2.0
"""How fast the stage ``soft_targets`` runs a teacher, against the same teacher by hand in every memory format and number of threads.

Teachers: a depthwise and a plain convolutional network, a transformer over token ids (36, a median of 11 without padding), and the plain
network as an ONNX file. By hand: batches of 128, unsorted; for the transformer also sorted by length and without padding. The stage runs
as in a build; its time is that between the first and the last chunk of the train split. Each round runs all of them, in turns. Then the
same beside one core that is kept busy, by hand also with one thread pinned to the other core. Prints the ratio of the stage to the best
by hand (by its median) with its interval. Exits with 1 if one is below the bar.

    python benchmarks/teacher_throughput.py [rounds] [teacher ...]
"""

from __future__ import annotations

import contextlib
import os
import statistics
import subprocess
import sys
import tempfile
import time
from operator import truediv
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import torch
from distill_step import median_interval
from torch import Tensor, nn

from edgekd.domain.artifact import Artifact
from edgekd.domain.recipe import Data, Distill, EntryPoint, Recipe, Student, Teacher, TensorSpec
from edgekd.harness import runner
from edgekd.kd import modules
from edgekd.ports import Context
from edgekd.stages import soft_targets

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

ROUNDS, BATCH, BAR = 11, 128, 0.95
TOKENS, VOCABULARY = 36, 2000
CHUNKS = 4  # of the stage, the first of which is not timed; by hand there is one
BUSY = "while True: pass"


def depthwise() -> nn.Module:
    """Return a depthwise separable network for spectrograms, as DS-CNN (arXiv 1711.07128)."""

    def block(width: int) -> list[nn.Module]:
        depthwise_part = [nn.Conv2d(width, width, 3, 1, 1, groups=width, bias=False), nn.BatchNorm2d(width), nn.ReLU()]
        return [*depthwise_part, nn.Conv2d(width, width, 1, bias=False), nn.BatchNorm2d(width), nn.ReLU()]

    first = [nn.Conv2d(1, 64, (10, 4), 2, (4, 1), bias=False), nn.BatchNorm2d(64), nn.ReLU()]
    return nn.Sequential(*first, *block(64), *block(64), *block(64), *block(64), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(64, 12))


def plain() -> nn.Module:
    """Return a plain convolutional network for small images."""
    layers: list[nn.Module] = []
    for inputs, outputs in ((3, 32), (32, 64), (64, 128)):
        layers += [nn.Conv2d(inputs, outputs, 3, 1, 1), nn.BatchNorm2d(outputs), nn.ReLU(), nn.MaxPool2d(2)]
    return nn.Sequential(*layers, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(128, 10))


class Transformer(nn.Module):
    """Two encoder layers over token ids that are padded with 0; mean pooling over tokens."""

    def __init__(self) -> None:
        super().__init__()
        layer = nn.TransformerEncoderLayer(128, 4, 512, batch_first=True)
        self.words, self.positions = nn.Embedding(VOCABULARY, 128), nn.Parameter(torch.zeros(1, TOKENS, 128))
        self.encoder, self.head = nn.TransformerEncoder(layer, 2, enable_nested_tensor=False), nn.Linear(128, 20)

    def forward(self, ids: Tensor) -> Tensor:
        """Shapes: ids (n, tokens); result (n, 20)."""
        is_token = ids != 0
        states = self.encoder(self.words(ids) + self.positions[:, : ids.shape[1]], src_key_padding_mask=~is_token)
        weights = is_token.unsqueeze(2).float()
        return self.head((states * weights).sum(1) / weights.sum(1))


def images(count: int, *shape: int) -> np.ndarray:
    """Return random images."""
    return np.random.default_rng(0).standard_normal((count, *shape), dtype=np.float32)


def token_ids(count: int) -> np.ndarray:
    """Return random sentences, (count, 36) int64."""
    generator = np.random.default_rng(0)
    ids = generator.integers(1, VOCABULARY, (count, TOKENS))
    lengths = generator.gamma(4, 3, count).clip(2, TOKENS)
    ids[np.arange(TOKENS) >= lengths[:, None]] = 0
    return ids


TEACHERS: dict[str, tuple[Callable[[], nn.Module], Callable[[int], np.ndarray]]] = {
    "depthwise": (depthwise, lambda count: images(count, 1, 49, 10)),
    "plain": (plain, lambda count: images(count, 3, 32, 32)),
    "transformer": (Transformer, token_ids),
    "onnx": (plain, lambda count: images(count, 3, 32, 32)),
}


def trained(name: str) -> nn.Module:
    """Return the module of a teacher, always with the same weights."""
    torch.manual_seed(0)
    return TEACHERS[name][0]().eval().requires_grad_(requires_grad=False)


def by_hand(name: str, samples: np.ndarray, file: Path) -> dict[str, Callable[[], None]]:
    """Return a loop for each memory format and number of threads, and for sorted tokens."""
    loops: dict[str, Callable[[], None]] = {}
    unsorted = [samples[start : start + BATCH] for start in range(0, len(samples), BATCH)]
    for threads in range(1, runner.facts()["cores"] + 1):
        if file.suffix == ".onnx":
            loops[f"onnxruntime, {threads} threads"] = _onnx_loop(file, threads, unsorted)
            continue
        for memory_format in (torch.contiguous_format, torch.channels_last):
            if memory_format == torch.contiguous_format or samples.ndim == 4:  # noqa: PLR2004  (images)
                text = f"{str(memory_format).removeprefix('torch.').removesuffix('_format')}, {threads} threads"
                loops[text] = _torch_loop(trained(name), memory_format, threads, unsorted)
        if samples.dtype == np.int64:
            lengths = (samples != 0).sum(1)
            order = np.argsort(lengths)
            rows = [order[start : start + BATCH] for start in range(0, len(order), BATCH)]
            trimmed = [samples[part, : lengths[part].max()] for part in rows]
            loops[f"sorted, {threads} threads"] = _torch_loop(trained(name), torch.contiguous_format, threads, trimmed)
    return loops


def _torch_loop(module: nn.Module, memory_format: torch.memory_format, threads: int, batches: list[np.ndarray]) -> Callable[[], None]:
    module = module.to(memory_format=memory_format)  # type: ignore[call-overload]  # an overload torch forgot

    def run() -> None:
        torch.set_num_threads(threads)
        with torch.inference_mode():
            for batch in batches:
                tensor = torch.from_numpy(batch)
                module(tensor.contiguous(memory_format=memory_format) if tensor.ndim == 4 else tensor).numpy()  # noqa: PLR2004  (images)

    return run


def _onnx_loop(file: Path, threads: int, batches: list[np.ndarray]) -> Callable[[], None]:
    import onnxruntime

    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = threads
    session = onnxruntime.InferenceSession(file, options, providers=["CPUExecutionProvider"])
    (name,) = (item.name for item in session.get_inputs())

    def run() -> None:
        for batch in batches:
            session.run(None, {name: batch})

    return run


def stage(name: str, folder: Path, samples: np.ndarray) -> tuple[Callable[[], float], Path]:
    """Return a function that runs the stage and returns its samples/s, and the file of the teacher."""
    entry, module = EntryPoint(f"{name}.py", "teacher"), trained(name)
    (folder / entry.file).write_text(f"import teacher_throughput\n\n\ndef teacher():\n    return teacher_throughput.trained({name!r})\n")
    if name == "onnx":
        file, teacher = folder / "teacher.onnx", Teacher(file="teacher.onnx")
        shapes = ({0: torch.export.Dim.DYNAMIC},)
        torch.onnx.export(module, (torch.from_numpy(samples[:2]),), file, dynamic_shapes=shapes, external_data=False, verbose=False)
    else:
        file, teacher = folder / "teacher.safetensors", Teacher(entry, "teacher.safetensors")
        modules.save_weights(module, file)
    dtype = "int64" if samples.dtype == np.int64 else "float32"
    student = Student(entry, (TensorSpec("x", (1, *samples.shape[1:]), dtype),))
    [step] = soft_targets.steps(Recipe(1, name, Data(entry), teacher, student, Distill(epochs=1)), [])
    inputs = {"teacher": Artifact(file, "", 0)}
    for split, count in {"train": len(samples), "validation": 8, "unlabelled": 0}.items():
        np.save(folder / f"{split}.npy", samples[:count])
        inputs[f"{split}.inputs.0"] = Artifact(folder / f"{split}.npy", "", 0)
    np.save(folder / "labels.npy", np.zeros(8))
    inputs["validation.labels"] = Artifact(folder / "labels.npy", "", 0)

    def run() -> float:
        times: list[float] = []
        with tempfile.TemporaryDirectory(dir=folder) as scratch:
            out, work = Path(scratch, "out"), Path(scratch, "work")
            out.mkdir()
            work.mkdir()

            def progress(_share: float, text: str) -> None:
                if text.startswith("train"):
                    times.append(time.perf_counter())

            result = soft_targets.run(step, inputs, Context(folder, out, work, progress))
        for note in result.notes:
            if "runs" in note:
                print(f"{name}: {note}")
        return (len(samples) - soft_targets.CHUNK) / (times[-1] - times[0])

    return run, file


def timed(loop: Callable[[], None], count: int) -> Callable[[], float]:
    """Return a function that runs a loop and returns its samples/s."""

    def run() -> float:
        started = time.perf_counter()
        loop()
        return count / (time.perf_counter() - started)

    return run


def pinned(run: Callable[[], float]) -> Callable[[], float]:
    """Return a function that runs on the last core only."""

    def run_pinned() -> float:
        cores = os.sched_getaffinity(0)
        os.sched_setaffinity(0, {max(cores)})
        try:
            return run()
        finally:
            os.sched_setaffinity(0, cores)

    return run_pinned


@contextlib.contextmanager
def busy_core() -> Iterator[None]:
    """Keep the first core busy."""
    core = min(os.sched_getaffinity(0))
    with subprocess.Popen([sys.executable, "-c", f"import os; os.sched_setaffinity(0, {{{core}}})\n{BUSY}"]) as process:
        try:
            yield
        finally:
            process.kill()


def compare(name: str, runs: dict[str, Callable[[], float]], rounds: int, where: str) -> bool:
    """Run all in turns and print; return whether the stage is slower than the bar."""
    speeds: dict[str, list[float]] = {text: [] for text in runs}
    for number in range(rounds + 1):
        for text in list(runs)[:: 1 if number % 2 else -1]:
            speeds[text].append(runs[text]())
    speeds = {text: values[1:] for text, values in speeds.items()}
    stage_speeds = speeds.pop("stage")
    best = max(speeds, key=lambda text: statistics.median(speeds[text]))
    listed = ", ".join(f"{text} {statistics.median(values):,.0f}" for text, values in speeds.items())
    median, low, high = median_interval(list(map(truediv, stage_speeds, speeds[best])))
    print(f"{name}, {where}: stage {statistics.median(stage_speeds):,.0f} samples/s; by hand: {listed}")
    print(f"  stage / {best}: {median:.2f} [{low:.2f}, {high:.2f}], bar {BAR}", flush=True)
    return median < BAR


def main() -> int:
    """Compare all teachers, quiet and beside a busy core."""
    rounds = int(sys.argv[1]) if len(sys.argv) > 1 else ROUNDS
    misses = []
    for name in sys.argv[2:] or TEACHERS:
        samples = TEACHERS[name][1](CHUNKS * soft_targets.CHUNK)
        with tempfile.TemporaryDirectory() as folder:
            run, file = stage(name, Path(folder), samples)
            by_hand_samples = samples[: soft_targets.CHUNK]
            loops = {text: timed(loop, len(by_hand_samples)) for text, loop in by_hand(name, by_hand_samples, file).items()}
            runs: dict[str, Callable[[], float]] = {"stage": run, **loops}
            misses.append(compare(name, runs, rounds, "quiet"))
            single = {f"{text}, pinned": pinned(loop) for text, loop in loops.items() if " 1 threads" in text}
            with busy_core():
                misses.append(compare(name, runs | single, rounds, "beside a busy core"))
    return int(any(misses))


if __name__ == "__main__":
    sys.modules["teacher_throughput"] = sys.modules["__main__"]  # the stage imports the teachers from it
    sys.exit(main())
