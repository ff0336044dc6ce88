# SPDX-License-Identifier: Apache-2.0
"""The process in which the user's code runs for inspection: ``python -m edgekd.stages.inspect.child JOB``."""

from __future__ import annotations

import ctypes
import json
import os
import shutil
import signal
import sys
import threading
from pathlib import Path
from typing import TYPE_CHECKING, Any

from edgekd import usercode
from edgekd.digests import file_digest
from edgekd.domain.recipe import Entry
from edgekd.errors import RecipeError
from edgekd.stages.inspect import splits
from edgekd.stages.inspect.watch import Watch

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

    import numpy as np

PROBE = 2  # samples that models are tried on
_PR_SET_PDEATHSIG = 1


class Inspection:
    """One run over the user's code: data, teacher, student, metric, augmentation."""

    def __init__(self, job: dict[str, Any]) -> None:
        self.params = job["params"]
        self.recipe_dir, self.out = Path(job["recipe_dir"]), Path(job["out"])
        self.running = Path(job["answer"]).with_name("running.txt")
        self.watch = Watch(self.recipe_dir, (self.out, self.running.parent))
        self.notes: list[str] = []
        self.summary: dict[str, Any] = {"inputs": self.params["inputs"]}

    def run(self) -> None:
        """Run all phases.

        Raises:
            RecipeError: what is wrong.
        """
        self._phase("data", self.params["splits"], self._data)
        self._phase("teacher", self.params["teacher"] or self.params["file"], self._teacher)
        self._phase("student", self.params["student"], self._student)
        self._compare()
        self._phase("metric", self.params["metric"] or self.params["score"], self._metric)
        self._phase("augment", self.params["augment"], self._augment)
        (self.out / "summary.json").write_text(json.dumps(self.summary, indent=1, sort_keys=True) + "\n")

    def _phase(self, name: str, what: str | None, work: Callable[[], None]) -> None:
        files: list[str] = []
        if what is not None:
            self.running.write_text(what)
            self.watch.phase()
            self.watch.active = True
            try:
                work()
            finally:
                self.watch.active = False
                files = self.watch.files()
        names = {_portable(self.watch.name(path)): file_digest(Path(path)) for path in files if Path(path).is_file()}
        weights = {self.params["weights"], self.params["file"]}  # an artifact of their own
        code = {
            "files": {key: value for key, value in names.items() if key not in weights},
            "modules": self.watch.packages() if files else {},
        }
        (self.out / f"{name}.code.json").write_text(json.dumps(code, indent=1, sort_keys=True) + "\n")

    def _data(self) -> None:
        where = self.params["splits"]
        found = splits.named(self._call(where), where)
        counts: dict[str, int] = {}
        problems: list[str] = []
        for number, name in enumerate(splits.SPLITS):
            writer = splits.Writer(name, where, self.params["inputs"], self.out)
            if name not in found:
                writer.write_nothing()
                counts[name] = 0
                continue
            try:
                writer.write(found[name], lambda share, n=number: _progress((n + share) / 6, f"reads {splits.SPLITS[n]}"))  # type: ignore[misc]
            except RecipeError as error:
                problems += error.problems
            counts[name] = len(found[name])
        if problems:
            raise RecipeError(*problems)
        problems, shared = splits.overlaps(self.out, self.params["inputs"], self.params["max_overlap"])
        if problems:
            raise RecipeError(*(f"{where}: {problem}" for problem in problems))
        independent = splits.groups(found["evaluation"], counts["evaluation"], self.out)
        self.summary |= {
            "splits": {name: self._split(name, count) for name, count in counts.items()},
            "overlap": shared,
            "groups": independent,
        }

    def _split(self, name: str, count: int) -> dict[str, Any]:
        import numpy as np

        if name not in splits.LABELLED:
            return {"samples": count, "classes": None}
        ids, numbers = np.unique(np.load(self.out / f"{name}.labels.npy"), return_counts=True)
        return {"samples": count, "classes": {str(key): int(value) for key, value in zip(ids, numbers, strict=True)}}

    def _teacher(self) -> None:
        from edgekd.kd import models

        entry = _entry(self.params["teacher"])
        if self.params["file"] is not None:
            path = self.out / f"teacher{Path(self.params['file']).suffix}"
            shutil.copyfile(self.recipe_dir / self.params["file"], path)
            self.summary["teacher"] = {
                "parameters": None,
                "outputs": self._probe(models.load_teacher(self.recipe_dir, None, path), self.params["file"]),
            }
            return
        module = models.student(self.recipe_dir, entry)
        if not self.params["taught"]:
            models.fill(module, models.read_weights(self.recipe_dir / self.params["weights"]), f"{entry} with {self.params['weights']}")
            models.save_weights(module, self.out / "teacher.safetensors")
        self.summary["teacher"] = {"parameters": models.parameter_count(module), "outputs": self._probe(_answering(module), str(entry))}

    def _student(self) -> None:
        import torch

        from edgekd.kd import models

        entry = _entry(self.params["student"])
        torch.manual_seed(0)
        module = models.student(self.recipe_dir, entry)
        count = sum(parameter.numel() for parameter in module.parameters() if parameter.requires_grad)
        if count == 0:
            raise RecipeError(f"{entry}: the student has no parameter that can be trained")
        answer = _answering(module)
        outputs = self._probe(answer, str(entry))
        first, second = answer(self._samples(PROBE)), answer(self._samples(PROBE))
        if (first != second).any():
            raise RecipeError(f"{entry}: the student in eval mode gives two answers to one input; expected the same (dropout by hand?)")
        self.summary["student"] = {"parameters": models.parameter_count(module), "outputs": outputs}

    def _compare(self) -> None:
        teacher, student = self.summary["teacher"]["outputs"], self.summary["student"]["outputs"]
        if teacher != student:
            raise RecipeError(
                f"teacher and student give different outputs: the teacher {teacher[0]} classes, the student {student[0]}; expected the same"
            )
        problems = []
        for name in splits.LABELLED:
            highest = max(map(int, self.summary["splits"][name]["classes"]))
            if highest >= student[0]:
                problems.append(
                    f"{self.params['splits']}: {name}: has the label {highest}, but teacher and student know {student[0]} classes "
                    f"(0 to {student[0] - 1})"
                )
        if problems:
            raise RecipeError(*problems)
        self.summary["classes"] = student[0]
        unseen = sorted(set(self.summary["splits"]["evaluation"]["classes"]) - set(self.summary["splits"]["train"]["classes"]), key=int)
        if unseen:
            self.notes.append(f"train has no sample of class {', '.join(unseen)}, which evaluation has")

    def _metric(self) -> None:
        import numpy as np

        text = self.params["metric"] or self.params["score"]
        labels = np.load(self.out / "evaluation.labels.npy")[:8]
        outputs = np.eye(self.summary["classes"], dtype=np.float32)[labels]
        found = self._call(text, outputs, labels)
        if self.params["score"]:
            array = np.asarray(found)
            if array.shape != labels.shape or not np.isfinite(array.astype(float)).all() or array.min() < 0 or array.max() > 1:
                raise RecipeError(f"{text}: returned {_told(found)} for {len(labels)} samples; expected {len(labels)} scores from 0 to 1")
        elif np.ndim(found) != 0 or isinstance(found, str) or not np.isfinite(float(found)):
            raise RecipeError(f"{text}: returned {_told(found)}; expected one finite number for the whole set")

    def _augment(self) -> None:
        import torch

        arrays = [torch.from_numpy(array) for array in self._samples(PROBE)]
        given = arrays[0] if len(arrays) == 1 else tuple(arrays)
        found = self._call(self.params["augment"], given, torch.Generator().manual_seed(0))
        made = [found] if len(arrays) == 1 else list(found) if isinstance(found, tuple | list) else [found]
        shapes = [getattr(item, "shape", None) for item in made]
        if shapes != [array.shape for array in arrays]:
            raise RecipeError(
                f"{self.params['augment']}: returned {_told(found)}; expected a batch of the same shapes {[list(a.shape) for a in arrays]}"
            )

    def _samples(self, count: int) -> list[np.ndarray]:
        import numpy as np

        return [
            np.array(np.load(self.out / f"evaluation.inputs.{i}.npy", mmap_mode="r")[:count]) for i in range(len(self.params["inputs"]))
        ]

    def _probe(self, answer: Callable[[list[np.ndarray]], np.ndarray], what: str) -> list[int]:
        """Try a model on one sample and on two; return the shape of an answer."""
        import numpy as np

        for count in (1, PROBE):
            arrays = self._samples(count)
            found = answer(arrays)
            if found.ndim != 2 or len(found) != len(arrays[0]):  # noqa: PLR2004  (samples, classes)
                raise RecipeError(
                    f"{what}: gives outputs of shape {list(found.shape)} for {len(arrays[0])} samples; expected (samples, classes)"
                )
            if not np.isfinite(found).all():
                raise RecipeError(f"{what}: gives outputs that are not finite (NaN or infinite)")
        return [int(size) for size in found.shape[1:]]

    def _call(self, text: str, *arguments: Any) -> Any:
        entry = _entry(text)
        return usercode.call(usercode.load(self.recipe_dir, entry), entry, *arguments)


def _answering(module: Any) -> Callable[[list[np.ndarray]], np.ndarray]:
    import torch

    def answer(arrays: Sequence[np.ndarray]) -> np.ndarray:
        entry = Entry(type(module).__name__, "forward")
        with torch.inference_mode():
            found = usercode.call(module.eval(), entry, *(torch.from_numpy(array) for array in arrays))
        if not isinstance(found, torch.Tensor):
            raise RecipeError(
                f"{type(module).__name__}: forward() returned {type(found).__name__}; expected one tensor of logits (samples, classes)"
            )
        return found.float().numpy()

    return answer


def _entry(text: str | None) -> Entry:
    return Entry(*(text or ":").rsplit(":", 1))


def _portable(name: str) -> str:
    """Return a name that is the same in two checkouts: files outside the recipe's folder lose theirs."""
    return f"outside/{Path(name).name}" if Path(name).is_absolute() else name


def _told(found: object) -> str:
    shape = getattr(found, "shape", None)
    return f"{type(found).__name__}" + (f" of shape {list(shape)}" if shape is not None else f" {str(found)[:40]}")


def _progress(share: float, text: str) -> None:
    sys.__stdout__.write(f"\x1eprogress {share:.4f} {text}\n")  # type: ignore[union-attr]  # a child always has one
    sys.__stdout__.flush()  # type: ignore[union-attr]


def _die_with_parent() -> None:
    """End when the parent ends: by the kernel, and by the end of its pipe."""
    ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, signal.SIGKILL)
    pipe = os.dup(0)
    os.dup2(os.open(os.devnull, os.O_RDONLY), 0)  # user code that asks for input gets none

    def wait() -> None:
        os.read(pipe, 1)
        os._exit(1)

    threading.Thread(target=wait, daemon=True).start()


def main(path: str) -> None:
    """Run the job in a file and write the answer."""
    _die_with_parent()
    job = json.loads(Path(path).read_text())
    os.chdir(job["recipe_dir"])
    sys.path[:] = [item for item in sys.path if item]  # -m put the working folder there, by the name ''
    import numpy as np  # noqa: F401  (before the watch begins: not the user's)
    import torch

    torch.set_num_threads(max(1, (os.cpu_count() or 2) // 2))
    inspection = Inspection(job)
    problems: tuple[str, ...] = ()
    os_error = None
    try:
        inspection.run()
    except RecipeError as error:
        problems = error.problems
    except OSError as error:
        os_error, problems = error.errno, (error.strerror or str(error),)
    record = inspection.watch.record() if not problems else {}
    answer = {
        "problems": problems,
        "os_error": os_error,
        "record": record,
        "notes": inspection.notes,
        "metrics": inspection.summary if not problems else {},
    }
    Path(job["answer"]).write_text(json.dumps(answer))


if __name__ == "__main__":
    main(sys.argv[1])
