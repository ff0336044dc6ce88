# SPDX-License-Identifier: Apache-2.0
"""The process in which the user's code runs for inspection; it gets its job on standard input and answers on a pipe."""

from __future__ import annotations

import ctypes
import faulthandler
import importlib
import json
import os
import signal
import sys
import traceback
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

from edgekd import usercode
from edgekd.domain.recipe import EntryPoint
from edgekd.errors import EdgekdError, RecipeError
from edgekd.kd.output_spec import MULTICLASS, OutputSpec, label_problem
from edgekd.stages.inspect import networks, splits
from edgekd.store.digests import file_digest
from edgekd.usercode.watch import Watcher, code, union

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping
    from types import TracebackType

    from edgekd.ports import Record

_PR_SET_PDEATHSIG = 1
_FEW_SAMPLES = 100
_FEW_OF_A_CLASS = 10
_DATA_SHARE = 0.8  # of the progress


class Inspection:
    """One run over the user's code: data, teacher, student, metric, augmentation."""

    def __init__(self, job: Mapping[str, Any], tell: Callable[..., None]) -> None:
        self.params, self.tell = job["params"], tell
        self.recipe_dir, self.out = Path(job["recipe_dir"]), Path(job["out"])
        self.bench = networks.Bench(self.params, self.recipe_dir, self.out)
        self.watcher = Watcher(self.recipe_dir, (self.out, Path(job["work"])))
        self.records: list[Record] = []
        self.notes: list[str] = []
        self.summary: dict[str, Any] = {"inputs": self.params["inputs"]}
        self.labels: dict[str, Any] = {}
        self.scored: list[int] = []
        self.answers: Any = None
        self._beside: dict[str, dict[str, Any]] = {}  # further teachers, assistants, students of other sizes

    def run(self) -> dict[str, Any]:
        """Run all phases and return what was found.

        Raises:
            RecipeError: what is wrong.
        """
        self._phase("data", self.params["splits"], self._data)
        self._phase("teacher", self.params["teacher"] or self.params["file"], self._teacher)
        self._phase("student", self.params["student"], self._student)
        for number, given in enumerate(self.params["teachers"]):
            self._phase(f"teacher.{number}", given["teacher"] or given["file"], partial(self._further, number, given))
        for number, model in enumerate(self.params["assistants"]):
            self._phase(f"assistant.{number}", model, partial(self._assistant, model))
        for number, model in enumerate(self.params["sizes"]):
            self._phase(f"size.{number}", model, partial(self._size, model))
        self._compare()
        if self.params["taps"]:
            self._phase("taps", self.params["student"], self._taps)
        self._phase("metric", self.params["score"] or self.params["metric"], self._metric)
        for name in ("augment", "views"):
            self._phase(name, self.params[name], partial(networks.augment, self.bench, name))
        self._write("summary.json", self.summary)
        record = union(self.records)
        weights = {name: file_digest(self.recipe_dir / name) for name in self._weights()}
        return {
            "metrics": self.summary,
            "notes": self.notes,
            "record": {
                "files": {**record.files, **weights},
                "listings": record.listings,
                "env": record.env,
                "modules": record.modules,
            },
        }

    def _phase(self, name: str, what: str | None, work: Callable[[], None]) -> None:
        if what is None:
            self._write(f"{name}.code.json", {})
            return
        self.tell(running=what)
        with self.watcher.phase() as seen:
            work()
        record = self.watcher.record(seen)
        self.records.append(record)
        found = code(record)
        for weights in self._weights():  # an artifact of their own
            found["files"].pop(weights, None)
        self._write(f"{name}.code.json", found)

    def _data(self) -> None:
        from edgekd.kd.reproducible import seed_all

        entry = self.bench.entry("splits")
        reader = splits.Reader(
            entry,
            self.params["inputs"],
            self._has_classes(),
            self.out,
            lambda share, text: self.tell(share=share * _DATA_SHARE, text=text),
        )
        seed_all(0)  # splits that are drawn without a seed of their own are the same in each run
        found = splits.named(usercode.call_user_code(usercode.load_function(self.recipe_dir, entry), entry), entry)
        kept = splits.read(found, reader)
        if self.params["pseudo_labels"] and not kept["unlabelled"].digests:
            what = "distill.baselines.pseudo_labels needs samples without labels, and the split 'unlabelled' has none"
            raise RecipeError(f"{entry}: {what}; return some, or leave pseudo_labels out")
        shared = splits.overlaps(kept, self.params["max_overlap"], entry)
        self.labels = {name: split.labels for name, split in kept.items()}
        self.scored = networks.scored_rows(self.labels["evaluation"])
        self.summary["splits"] = {
            name: {"samples": len(split.digests), "classes": splits.class_counts(split.labels), "overlap": shared[name]}
            for name, split in kept.items()
        }
        self.summary["groups"] = splits.groups(found["evaluation"], len(kept["evaluation"].digests), reader)
        self._remark()

    def _remark(self) -> None:
        found = self.summary["splits"]
        count = found["evaluation"]["samples"]
        if count < _FEW_SAMPLES:
            self.notes.append(f"evaluation has {count} samples; accuracy is known only roughly")
        if not self._has_classes():
            return
        evaluated = found["evaluation"]["classes"]
        unseen = sorted(set(evaluated) - set(found["train"]["classes"]), key=int)
        if unseen:
            self.notes.append(f"train has no sample of class {', '.join(unseen)}, which evaluation has")
        few = [name for name in sorted(evaluated, key=int) if evaluated[name] < _FEW_OF_A_CLASS]
        if few:
            self.notes.append(f"evaluation has fewer than {_FEW_OF_A_CLASS} samples of class {', '.join(few)}; their accuracy says little")

    def _teacher(self) -> None:
        self.tell(share=_DATA_SHARE, text="tries the teacher")
        self.summary["teacher"] = networks.teacher(self.bench, self.params)
        for number, weights in enumerate(self.params["checkpoints"]):
            networks.teacher(self.bench, {**self.params, "weights": weights}, f"checkpoint.{number}")

    def _taps(self) -> None:
        if (warning := networks.taps(self.bench)) is not None:
            self.notes.append(f"warning: {warning}")

    def _further(self, number: int, given: Mapping[str, Any]) -> None:
        self._beside[given["teacher"] or given["file"]] = networks.teacher(self.bench, given, f"teacher.{number}")

    def _assistant(self, model: str) -> None:
        self._beside[model] = networks.fresh(self.bench, EntryPoint.parse(model), "assistant")

    def _size(self, model: str) -> None:
        self._beside[model] = networks.fresh(self.bench, EntryPoint.parse(model), "student")
        self.summary.setdefault("sizes", {})[model] = self._beside[model]["parameters"]

    def _student(self) -> None:
        self.tell(share=0.9, text="tries the student")
        self.summary["student"], self.answers = networks.student(self.bench, self.scored)

    def _compare(self) -> None:
        (teacher,), (student,) = self.summary["teacher"]["outputs"], self.summary["student"]["outputs"]
        names = f"{self.params['student']} and {self.params['teacher'] or self.params['file']}"
        if teacher != student:
            told = f"the teacher {teacher} classes, the student {student}"
            raise RecipeError(f"{names}: teacher and student give different outputs: {told}; expected the same")
        for name, other in self._beside.items():
            if other["outputs"] != [student]:
                what = f"it has {other['outputs'][0]} classes, teacher and student have {student}"
                raise RecipeError(f"{name}: gives other outputs than teacher and student: {what}; expected the same")
        self.summary["classes"] = student
        form = OutputSpec(self.params.get("task", MULTICLASS), tuple(self.params.get("heads", ())))
        for name in splits.LABELLED:
            if (why := label_problem(form, self.labels[name], student)) is not None:
                raise RecipeError(f"{self.params['splits']}: {name}: {why}")
        if not self._has_classes():
            return
        if student == 1:
            raise RecipeError(f"{names}: teacher and student give one output; top-1 needs one for each class, two at least")
        problems = []
        for name in splits.LABELLED:
            outside = int((self.labels[name] >= student).sum())
            if outside:
                problems.append(
                    f"{self.params['splits']}: {name}: has the label {self.labels[name].max()}, but teacher and student know "
                    f"{student} classes (0 to {student - 1}); {outside} of {len(self.labels[name])} labels are above"
                )
        if problems:
            raise RecipeError(*problems)

    def _metric(self) -> None:
        networks.metric(self.bench, self.answers, self.labels["evaluation"][self.scored])

    def _has_classes(self) -> bool:
        """Return whether labels must be class ids: for top-1, and to teach a teacher."""
        return self.params["taught"] or (self.params["metric"] is None and self.params["score"] is None)

    def _weights(self) -> list[str]:
        given = [teacher[name] for teacher in (self.params, *self.params["teachers"]) for name in ("weights", "file")]
        return [name for name in (*given, *self.params["checkpoints"]) if name is not None]

    def _write(self, name: str, content: Mapping[str, Any]) -> None:
        (self.out / name).write_text(json.dumps(content, indent=1, sort_keys=True, allow_nan=False) + "\n")


def main(descriptor: int) -> None:
    """Do the job on standard input and tell of it, one JSON text a line, on a pipe."""
    job = json.loads(sys.stdin.buffer.read())
    _die_with(job["parent"])
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # an interrupt is the parent's, which ends us
    faulthandler.enable()
    os.set_inheritable(descriptor, False)  # noqa: FBT003  (takes no keyword)
    os.dup2(os.open(os.devnull, os.O_RDONLY), 0)  # user code that asks for input gets none
    sys.stdout.reconfigure(line_buffering=True)  # type: ignore[union-attr]  # what is printed before a crash is of use
    channel = os.fdopen(descriptor, "w", buffering=1)  # open to the end: a bug is told last

    def tell(**message: Any) -> None:
        channel.write(json.dumps(message) + "\n")

    def tell_bug(kind: type[BaseException], error: BaseException, trace: TracebackType | None) -> None:
        tell(bug="".join(traceback.format_exception(kind, error, trace)))

    sys.excepthook = tell_bug
    importlib.import_module("torch")  # before the watch begins, and numpy with it: not the user's

    try:
        tell(**Inspection(job, tell).run())
    except EdgekdError as error:
        tell(error=type(error).__name__, problems=getattr(error, "problems", (str(error),)))
    except OSError as error:  # the cache's disk; the user's own are told by usercode
        tell(os_error=[error.errno, error.strerror, error.filename])


def _die_with(parent: int) -> None:
    """Let the kernel end this process when its parent ends."""
    ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, signal.SIGKILL)
    if os.getppid() != parent:  # it ended before that
        os._exit(1)


if __name__ == "__main__":
    main(int(sys.argv[1]))
