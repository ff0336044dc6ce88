# SPDX-License-Identifier: Apache-2.0
"""One run over the user's code, phase by phase, under the watcher."""

from __future__ import annotations

import importlib
import json
from contextlib import contextmanager
from dataclasses import asdict, replace
from functools import partial
from typing import TYPE_CHECKING, Any

from edgekd import usercode
from edgekd.domain.recipe import EntryPoint
from edgekd.errors import EdgekdError, RecipeError, describe_unexpected
from edgekd.kd.output_spec import OutputSpec, below_range_problem, label_problem
from edgekd.ports import Record, StageResult
from edgekd.stages.inspect import checks, metric, reading, splits
from edgekd.stages.inspect.params import CheckContext, InspectParams, TeacherParams
from edgekd.store.digests import file_digest
from edgekd.usercode.declared import check_unchanged, declared_reads
from edgekd.usercode.watch import Watcher, code_dependencies, merge_records

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator, Mapping

    from edgekd.ports import Context
    from edgekd.usercode.watch import Reads

_FEW_SAMPLES = 100
_FEW_OF_A_CLASS = 10
_DATA_SHARE = 0.8  # of the progress


class Inspection:
    """One run over the user's code: data, teacher, student, metric, augmentation."""

    def __init__(self, params: InspectParams, context: Context) -> None:
        importlib.import_module("torch")  # and numpy with it, before the watch begins: their files are not the user's
        self.params, self.progress = params, context.progress
        self.recipe_dir, self.out = context.recipe_dir.absolute(), context.out.absolute()
        self.check = CheckContext(self.params, self.recipe_dir, self.out)
        self.watcher = Watcher(self.recipe_dir, (self.out, context.work.absolute()), context.secret)
        self.records: list[Record] = []
        self.declared = Record()
        self.notes = self.check.notes
        self.summary: dict[str, Any] = {"inputs": [{**asdict(spec), "shape": list(spec.shape)} for spec in self.params.inputs]}
        self.labels: dict[str, Any] = {}
        self.metric_rows: list[int] = []
        self.student_outputs: Any = None
        self._further_networks: dict[str, dict[str, Any]] = {}  # further teachers, assistants, students of other sizes

    def run(self) -> StageResult:
        """Run all phases and return the result of the stage.

        Raises:
            RecipeError: what is wrong.
        """
        params = self.params
        self.declared = declared_reads(self.recipe_dir, params.reads)
        self._run_phase("data", params.splits, self._read_data)
        self._run_phase("teacher", params.teacher.name, self._check_teacher)
        self._run_phase("student", params.student, self._check_student)
        for number, teacher in enumerate(params.teachers):
            self._run_phase(f"teacher.{number}", teacher.name, partial(self._check_further_teacher, number, teacher))
        for number, model in enumerate(params.assistants):
            self._run_phase(f"assistant.{number}", model, partial(self._check_assistant, model))
        for number, model in enumerate(params.sizes):
            self._run_phase(f"size.{number}", model, partial(self._check_size, model))
        self._compare_outputs()
        if params.tapped_losses:
            self._run_phase("taps", params.student, self._check_taps)
        self._write("metric.parts.json", {"parts": metric.PARTS})
        self._run_phase("metric", params.score or params.metric, self._check_metric)
        for name, entry in (("augment", params.augment), ("views", params.views)):
            self._run_phase(name, entry, partial(checks.check_augmentation, self.check, str(entry)))
        check_unchanged(self.declared, self.recipe_dir, params.reads)
        self._write("summary.json", self.summary)
        self.notes += [
            f"{entry}: changes {', '.join(sorted(names))} for the whole process; edgekd restores it after each call"
            for entry, names in sorted(usercode.undone_settings.items())
        ]
        record = merge_records(self.records)
        model_files = {name: file_digest(self.recipe_dir / name) for name in params.model_files}
        return StageResult(self.summary, tuple(self.notes), replace(record, files={**record.files, **model_files}))

    def _run_phase(self, name: str, entry: str | None, work: Callable[[], None]) -> None:
        """Run a phase under the watcher, and write what its code depends on; a phase without an entry point has no code."""
        if entry is None:
            self._write(f"{name}.code.json", {})
            return
        with usercode.running(entry), self.watcher.phase() as reads, _refuse_unusable(entry):
            work()
        record = merge_records([self.watcher.record(reads), self.declared])
        self._warn_of_unseen_reads(entry, reads)
        self.records.append(record)
        dependencies = code_dependencies(record)
        for path in self.params.model_files:  # they are artifacts of their own
            dependencies["files"].pop(path, None)
        self._write(f"{name}.code.json", dependencies)

    def _warn_of_unseen_reads(self, entry: str, reads: Reads) -> None:
        readers = sorted(self.watcher.unseen_readers(reads))
        if readers and not self.params.reads:
            self.notes.append(
                f"warning: {entry} uses {', '.join(readers)}, which can read files that edgekd does not see: a change of such a file "
                "goes unnoticed; name the files in data.reads"
            )

    def _read_data(self) -> None:
        from edgekd.kd.reproducible import seed_all

        entry = EntryPoint.parse(self.params.splits)
        settings = reading.ReadSettings(
            entry,
            self.params.inputs,
            self.params.needs_class_ids,
            self.out,
            lambda share, text: self.progress(share * _DATA_SHARE, text),
        )
        function = usercode.load_function(self.recipe_dir, entry)

        def call() -> dict[str, Any]:
            seed_all(0)  # splits that are drawn without a seed of their own are the same in each run
            return splits.check_datasets(usercode.call_user_code(function, entry), entry)

        datasets = call()
        stored = splits.read_splits(datasets, settings)
        self._check_labels({name: split.labels for name, split in stored.items()})
        if self.params.pseudo_labels and not stored["unlabelled"].digests:
            problem = "distill.baselines.pseudo_labels needs samples without labels, and the split 'unlabelled' has none"
            raise RecipeError(f"{entry}: {problem}; return some, or leave pseudo_labels out")
        overlaps = splits.count_overlaps(stored, self.params.max_overlap, entry)
        self.labels = {name: split.labels for name, split in stored.items()}
        self.metric_rows = metric.metric_rows(self.labels["evaluation"])
        self.summary["splits"] = {
            name: {"samples": len(split.digests), "classes": splits.class_counts(split.labels), "overlap": overlaps[name]}
            for name, split in stored.items()
        }
        self.summary["groups"] = splits.write_groups(datasets["evaluation"], len(stored["evaluation"].digests), settings)
        del datasets  # two of large data sets may not fit in memory
        splits.check_repeatable(call(), stored, settings)
        self._note_rare_classes()

    def _check_labels(self, labels: Mapping[str, Any]) -> None:
        """Refuse labels below -1; those of evaluation are for a score of the user's, if the output is one softmax."""
        spec = OutputSpec(self.params.task, self.params.heads)
        names = ("train", "validation") if spec.is_single_softmax else reading.LABELLED
        problems = [(name, below_range_problem(spec, labels[name])) for name in names]
        if messages := [f"{self.params.splits}: {name}: {problem}" for name, problem in problems if problem is not None]:
            raise RecipeError(*messages)

    def _note_rare_classes(self) -> None:
        summary = self.summary["splits"]
        count = summary["evaluation"]["samples"]
        if count < _FEW_SAMPLES:
            self.notes.append(f"evaluation has {count} samples; accuracy is known only roughly")
        if not self.params.needs_class_ids:
            return
        evaluated = summary["evaluation"]["classes"]
        untrained = sorted(set(evaluated) - set(summary["train"]["classes"]), key=int)
        if untrained:
            self.notes.append(f"train has no sample of class {', '.join(untrained)}, which evaluation has")
        rare = [name for name in sorted(evaluated, key=int) if evaluated[name] < _FEW_OF_A_CLASS]
        if rare:
            self.notes.append(f"evaluation has fewer than {_FEW_OF_A_CLASS} samples of class {', '.join(rare)}; their accuracy says little")

    def _check_teacher(self) -> None:
        self.progress(_DATA_SHARE, "checking the teacher")
        teacher = self.params.teacher
        self.summary["teacher"] = checks.check_teacher(self.check, teacher, "teacher")
        for number, weights in enumerate(self.params.checkpoints):
            checks.check_teacher(self.check, replace(teacher, weights=weights), f"checkpoint.{number}")

    def _check_student(self) -> None:
        self.progress(0.9, "checking the student")
        self.summary["student"], self.student_outputs = checks.check_student(self.check, self.metric_rows)

    def _check_further_teacher(self, number: int, teacher: TeacherParams) -> None:
        self._further_networks[teacher.name] = checks.check_teacher(self.check, teacher, f"teacher.{number}")

    def _check_assistant(self, model: str) -> None:
        self._further_networks[model] = checks.check_trainable(self.check, EntryPoint.parse(model), "assistant")

    def _check_size(self, model: str) -> None:
        self._further_networks[model] = checks.check_trainable(self.check, EntryPoint.parse(model), "student")
        self.summary.setdefault("sizes", {})[model] = self._further_networks[model]["parameters"]

    def _check_taps(self) -> None:
        if (warning := checks.check_taps(self.check)) is not None:
            self.notes.append(f"warning: {warning}")

    def _check_metric(self) -> None:
        rows, labels = self.metric_rows, self.labels["evaluation"]
        parts, notes = metric.check_metric(self.check, self.student_outputs, labels[rows], labels)
        self._write("metric.parts.json", {"parts": parts})
        self.notes += notes

    def _compare_outputs(self) -> None:
        """Compare the number of outputs of all networks with each other and with the labels."""
        params = self.params
        (teacher_width,), (width,) = self.summary["teacher"]["outputs"], self.summary["student"]["outputs"]
        networks = f"{params.student} and {params.teacher.name}"
        if teacher_width != width:
            widths = f"the teacher has {teacher_width} classes, the student {width}"
            raise RecipeError(f"{networks}: teacher and student have different outputs: {widths}; expected the same")
        for name, network in self._further_networks.items():
            if network["outputs"] != [width]:
                widths = f"it has {network['outputs'][0]} classes, teacher and student have {width}"
                raise RecipeError(f"{name}: has other outputs than teacher and student: {widths}; expected the same")
        self.summary["classes"] = width
        spec = OutputSpec(params.task, params.heads)
        for name in reading.LABELLED:
            if (problem := label_problem(spec, self.labels[name], width)) is not None:
                raise RecipeError(f"{params.splits}: {name}: {problem}")
        if spec.is_single_softmax:
            self._compare_classes(networks, width)

    def _compare_classes(self, networks: str, classes: int) -> None:
        is_judged = self.params.needs_class_ids
        if classes == 1 and is_judged:
            raise RecipeError(f"{networks}: teacher and student have one output; top-1 needs one for each class, at least two")
        problems = []
        for name in reading.LABELLED if is_judged else ("train", "validation"):
            labels = self.labels[name]
            if labels.dtype.kind != "i" or labels.ndim != 1:  # for a score of the user's
                continue
            outside = int((labels >= classes).sum())
            if outside:
                problems.append(
                    f"{self.params.splits}: {name}: has the label {labels.max()}, but teacher and student have "
                    f"{classes} classes (0 to {classes - 1}); {outside} of {len(labels)} labels are above"
                    + ("; subtract 1 if labels start at 1" if labels.max() == classes and labels.min() > 0 else "")
                )
        if problems:
            raise RecipeError(*problems)

    def _write(self, name: str, content: Mapping[str, Any]) -> None:
        (self.out / name).write_text(json.dumps(content, indent=1, sort_keys=True, allow_nan=False) + "\n")


@contextmanager
def _refuse_unusable(entry: str) -> Iterator[None]:
    """Turn what fails on an object of the user into a refusal: there are more odd tensors and modules than checks."""
    try:
        yield
    except (EdgekdError, OSError, MemoryError):
        raise
    except Exception as error:
        if usercode.describe_user_error(error) is not None:  # raised by the user's code, with its line
            raise
        raise RecipeError(f"{entry}: what it returns cannot be used: {describe_unexpected(error)}") from error
