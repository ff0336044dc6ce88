# SPDX-License-Identifier: Apache-2.0
"""Rules of ``[distill]`` and ``[teacher]`` that span several fields: losses and their options, teachers, taps, epochs."""

from __future__ import annotations

from typing import TYPE_CHECKING

from edgekd.domain.losses import AUTO, FROZEN, LABEL_LOSSES, LOSSES, REGRESSION_LOSSES, TAPPED, Loss
from edgekd.domain.recipe import MOST_EPOCHS, Baselines, Distill, Evaluate, Student, Teacher, Training
from edgekd.errors import expected_one_of

if TYPE_CHECKING:
    from collections.abc import Sequence

    from edgekd.config.reader import Reader

_INTERVAL = 2  # values of an interval of epochs: first and last


def check(reader: Reader) -> None:
    """Note the problems of the valid parts of ``[distill]``, ``[teacher]`` and ``[student]``."""
    check_losses(reader)
    teachers = reader.all_parsed(Teacher)
    for key, teacher in teachers:
        _check_teacher(reader, teacher, key)
    for key, training in reader.all_parsed(Training):
        if training.checkpoints >= training.epochs:
            reader.problem(f"{key}.checkpoints", f"{training.checkpoints} of {training.epochs} epochs; expected fewer than {key}.epochs")
    for key, student in reader.all_parsed(Student):
        _check_output(reader, student, key)
        _check_task(reader, student)
    reference = next((teacher for key, teacher in teachers if key == "teacher"), None)
    for key, distill in reader.all_parsed(Distill):
        _check_distill(reader, distill, key, reference)


def loss_problems(loss: Loss, key: str) -> list[str]:
    """Return the problems of a loss by itself: options, taps and teacher that its kind does not have."""
    if loss.kind not in LOSSES:
        return [f"{key}.kind: '{loss.kind}' is not a loss; {expected_one_of(loss.kind, LOSSES)}"]
    problems = [
        f"{key}.{name}: '{loss.kind}' has no {name}; {expected_one_of(name, ('weight', *LOSSES[loss.kind]))}"
        for name in sorted(loss.explicit_options.keys() - LOSSES[loss.kind].keys())
    ]
    if loss.kind in TAPPED and not loss.taps:
        example = '[{ student = "layer2", teacher = "layer4" }]'
        problems.append(f"{key}.taps: missing; '{loss.kind}' matches modules of student and teacher: taps = {example}")
    if loss.kind not in TAPPED and loss.taps:
        problems.append(f"{key}.taps: '{loss.kind}' is a loss of logits and has no taps; expected them with {', '.join(TAPPED)}")
    if loss.teacher != FROZEN and loss.kind in (*TAPPED, *LABEL_LOSSES):
        problems.append(
            f"{key}.teacher: '{loss.teacher}', but '{loss.kind}' does not use teacher logits; expected it with kl, dist, mse, ..."
        )
    return problems


def check_losses(reader: Reader) -> None:
    """Note the problems of the valid losses, each by itself and as a list."""
    keys: set[tuple[object, ...]] = set()
    for key, loss in reader.all_parsed(Loss):
        # a loss of logits may occur again with other epochs or another teacher; one of taps has all its taps in one place
        unique = (loss.kind,) if loss.kind in TAPPED else (loss.kind, loss.teacher, loss.epochs)
        if unique in keys:
            reader.problem(f"{key}.kind", f"'{loss.kind}' occurs twice; expected each loss once")
        for problem in loss_problems(loss, key):
            reader.problem("", problem)
        keys.add(unique)


def _check_teacher(reader: Reader, teacher: Teacher, key: str) -> None:
    if teacher.train is not None and key != "teacher":
        reader.problem(f"{key}.train", "a further teacher cannot be trained; expected model and weights, or file")
    if teacher.checkpoints and key != "teacher":
        reader.problem(f"{key}.checkpoints", "only the reference has earlier weights; expected them in [teacher]")
    elif teacher.checkpoints and (teacher.model is None or teacher.weights is None):
        reader.problem(f"{key}.checkpoints", "need model and weights; a teacher with [teacher.train] has teacher.train.checkpoints")


def _check_distill(reader: Reader, distill: Distill, key: str, reference: Teacher | None) -> None:
    _check_views(reader, distill, key)
    if distill.teacher_weighting != "fixed" and not distill.teachers:
        problem = f"'{distill.teacher_weighting}', but there is one teacher; expected further ones in {key}.teachers"
        reader.problem(f"{key}.teacher_weighting", problem)
    epochs = MOST_EPOCHS if distill.epochs == AUTO else distill.epochs
    if reference is not None and (count := _count_weights(reference)) > epochs:
        reader.problem(f"{key}.epochs", f"{epochs} for {count} weights of the teacher in turn; expected at least one epoch for each")
    _check_taps(reader, distill, key, reference)
    if any(loss.epochs is not None for loss in distill.losses):
        if any(loss.has_auto for loss in distill.losses):
            reader.problem(f"{key}.losses", "have epochs, and a value is 'auto', which shorter runs choose; expected one of the two")
        if any(assistant.epochs not in {None, epochs} for assistant in distill.assistants):
            problem = f"have other epochs than the student, and losses have epochs; expected {epochs}"
            reader.problem(f"{key}.assistants", problem)
    _check_epoch_limits(reader, distill, key, reference)
    _check_epochs(reader, distill.losses, epochs, key)


def _check_views(reader: Reader, distill: Distill, key: str) -> None:
    why = "the teacher's logits are computed once for each view"
    if distill.views is None:
        for name in ("augment", "mixup"):
            if getattr(distill, name) is not None:
                reader.problem(key, f"has {name} without views, such as 8: {why}")
    elif distill.augment is None and distill.mixup is None:
        reader.problem(key, f"has views without augment or mixup: {why}")
    elif distill.mixup is not None and distill.views == 1:
        reader.problem(f"{key}.views", "1 with mixup, and the first view is not mixed; expected at least 2, such as 30")
    if distill.mixup is None:
        return
    mixup, why = f"{key}.mixup", f"{distill.mixup:g} mixes inputs and class probabilities"
    for student_key, student in reader.all_parsed(Student):
        if any(spec.dtype != "float32" for spec in student.inputs):
            reader.problem(mixup, f"{why}, and {student_key}.inputs has integers; expected float32 inputs, or no such key")
        if student.task != "multiclass" or student.heads:
            reader.problem(mixup, f"{why}, and this student has other outputs; expected one softmax, or no such key")
    if distill.teacher_weighting != "fixed":
        reader.problem(mixup, f"{why}, and '{distill.teacher_weighting}' weighs teachers by one class; expected \"fixed\", or no such key")
    if any(loss.kind == "dkd" for loss in distill.losses):
        reader.problem(mixup, f"{why}, and 'dkd' needs one class per sample; expected 'kl', or no such key")


def _check_taps(reader: Reader, distill: Distill, key: str, reference: Teacher | None) -> None:
    index = next((index for index, loss in enumerate(distill.losses) if loss.kind in TAPPED), None)
    if index is None:
        return
    if reference is not None and reference.model is None:
        reader.problem(f"{key}.losses[{index}].taps", "need a teacher that is a module; expected teacher.model and weights, not file")
    for name, network in (("assistants", "teacher"), ("sizes", "student")):
        if getattr(distill, name):
            problem = f"name modules of one {network}; expected no {key}.{name}, or losses of logits"
            reader.problem(f"{key}.losses[{index}].taps", problem)


def _check_epoch_limits(reader: Reader, distill: Distill, key: str, reference: Teacher | None) -> None:
    if distill.epochs == AUTO and distill.max_minutes is None:
        reader.problem(f"{key}.epochs", f"'auto' without a limit; expected a number, or {key}.max_minutes, such as 30")
    if distill.epochs == AUTO and any(assistant.epochs is None for assistant in distill.assistants):
        reader.problem(f"{key}.assistants", f"need epochs of their own where {key}.epochs is 'auto'; expected a number for each")
    for name in ("max_minutes", "break_even_inferences"):
        if getattr(distill, name) is not None and any(loss.epochs is not None for loss in distill.losses):
            problem = f"may end training before {distill.epochs} epochs, and losses have epochs; expected one of the two"
            reader.problem(f"{key}.{name}", problem)
    if distill.break_even_inferences is None:
        return
    if reference is not None and (reference.file or "").endswith(".safetensors"):
        problem = "needs a teacher whose latency can be measured, and this one is stored logits; expected no such key"
        reader.problem(f"{key}.break_even_inferences", problem)


def _check_output(reader: Reader, student: Student, key: str) -> None:
    """Note the problems of outputs that are not one softmax."""
    if student.task == "multiclass" and not student.heads:
        return
    if student.heads and (student.task != "multiclass" or len(student.heads) == 1):
        reader.problem(f"{key}.heads", 'are several softmaxes; expected at least two, and task = "multiclass"')
    if all(evaluate.score is None and evaluate.metric == "top1" for _, evaluate in reader.all_parsed(Evaluate)):
        name = "heads" if student.heads else "task"
        reader.problem(f"{key}.{name}", "top-1 judges one softmax; expected evaluate.score or evaluate.metric of your own")
    for distill_key, distill in reader.all_parsed(Distill):
        if distill.teacher_weighting != "fixed":
            problem = f"'{distill.teacher_weighting}' weighs teachers by the probability of one label per sample"
            reader.problem(f"{distill_key}.teacher_weighting", f'{problem}, and this student has other outputs; expected "fixed"')
    for teacher_key, teacher in reader.all_parsed(Teacher):
        if teacher.train is not None:
            reader.problem(f"{teacher_key}.train", "trains for classes of one softmax; expected a teacher with weights, or file")


def _check_task(reader: Reader, student: Student) -> None:
    """Note losses and baselines that have no meaning for the student's task."""
    is_regression = student.task == "regression"
    for key, baselines in reader.all_parsed(Baselines):
        if is_regression:
            reader.problem(key, f"seeds = {baselines.seeds}, but baselines learn classes, and student.task is regression; expected none")
    for key, loss in reader.all_parsed(Loss):
        if is_regression and loss.kind not in (*REGRESSION_LOSSES, *TAPPED):
            problem = f"'{loss.kind}' compares classes, and student.task is regression; expected one of {', '.join(REGRESSION_LOSSES)}"
            reader.problem(f"{key}.kind", problem)
        if not is_regression and loss.kind == "mse_labels":
            reader.problem(f"{key}.kind", "'mse_labels' compares numbers with labels; expected 'ce', or student.task = \"regression\"")


def _count_weights(teacher: Teacher) -> int:
    """Return how many weights of the teacher the student learns from in turn, earlier ones included."""
    return 1 + (len(teacher.checkpoints) if teacher.train is None else teacher.train.checkpoints)


def is_interval(epochs: Sequence[int]) -> bool:
    """Return whether epochs are a first and a last one."""
    return len(epochs) == _INTERVAL and epochs[0] <= epochs[1]


def _check_epochs(reader: Reader, losses: Sequence[Loss], epochs: int, key: str) -> None:
    for index, loss in enumerate(losses):
        if loss.epochs is None:
            continue
        if not is_interval(loss.epochs) or loss.epochs[1] > epochs:
            problem = f"{list(loss.epochs)}; expected the first and the last epoch in which it is active, from 1 to {epochs}"
            reader.problem(f"{key}.losses[{index}].epochs", problem)
            return
    for epoch in range(epochs):
        if not any(loss.is_active_in(epoch) for loss in losses):
            reader.problem(f"{key}.losses", f"none is active in epoch {epoch + 1}; expected at least one in each of {epochs} epochs")
            return
