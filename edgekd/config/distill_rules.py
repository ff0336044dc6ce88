# SPDX-License-Identifier: Apache-2.0
"""What a recipe says of distillation, checked as a whole: losses against their options, teachers, taps and epochs."""

from __future__ import annotations

from typing import TYPE_CHECKING

from edgekd.domain.losses import FROZEN, LOSSES, REGRESSION_LOSSES, TAPPED, Loss
from edgekd.domain.recipe import Baselines, Distill, Evaluate, Student, Teacher, Training
from edgekd.errors import expected_one_of

if TYPE_CHECKING:
    from collections.abc import Sequence

    from edgekd.config.reader import Reader

_FOLLOWS_NONE = ("ce", "squared")  # of labels alone


def check(reader: Reader) -> None:
    """Note what is wrong with the parts of ``[distill]`` and ``[teacher]`` that could be read."""
    seen: set[tuple[object, ...]] = set()
    for key, loss in reader.all_parsed(Loss):
        # a loss may stand there again with other epochs or another teacher, one of taps takes all of its taps at once
        own = (loss.kind,) if loss.kind in TAPPED else (loss.kind, loss.teacher, loss.epochs)
        if own in seen:
            reader.problem(f"{key}.kind", f"'{loss.kind}' is there twice; expected each loss once")
        for problem in problems_of(loss, key):
            reader.problem("", problem)
        seen.add(own)
    teachers = reader.all_parsed(Teacher)
    reference = next((teacher for key, teacher in teachers if key == "teacher"), None)
    for key, teacher in teachers:
        _check_teacher(reader, teacher, key)
    for key, training in reader.all_parsed(Training):
        if training.checkpoints >= training.epochs:
            reader.problem(f"{key}.checkpoints", f"{training.checkpoints} of {training.epochs} epochs; expected fewer than {key}.epochs")
    scored = any(evaluate.score is not None or not isinstance(evaluate.metric, str) for _, evaluate in reader.all_parsed(Evaluate))
    for key, student in reader.all_parsed(Student):
        _check_form(reader, student, key, scored=scored)
        _check_losses_of(reader, student)
    for key, distill in reader.all_parsed(Distill):
        _check_distill(reader, distill, key, reference)


def problems_of(loss: Loss, key: str) -> list[str]:
    """Return what is wrong with a loss by itself: options, taps and teacher that its kind does not have."""
    if loss.kind not in LOSSES:
        return [f"{key}.kind: '{loss.kind}' is not a loss; {expected_one_of(loss.kind, LOSSES)}"]
    found = [
        f"{key}.{name}: '{loss.kind}' has no {name}; {expected_one_of(name, ('weight', *LOSSES[loss.kind]))}"
        for name in sorted(loss.given.keys() - LOSSES[loss.kind].keys())
    ]
    if loss.kind in TAPPED and not loss.taps:
        example = '[{ student = "layer2", teacher = "layer4" }]'
        found.append(f"{key}.taps: missing; '{loss.kind}' matches modules of student and teacher: taps = {example}")
    if loss.kind not in TAPPED and loss.taps:
        found.append(f"{key}.taps: '{loss.kind}' compares answers and has no taps; expected them with {', '.join(TAPPED)}")
    if loss.teacher != FROZEN and (loss.kind in TAPPED or loss.kind in _FOLLOWS_NONE):
        found.append(f"{key}.teacher: '{loss.teacher}', but '{loss.kind}' follows no such teacher; expected it with kl, dist, mse, ...")
    return found


def _check_teacher(reader: Reader, teacher: Teacher, key: str) -> None:
    if teacher.train is not None and key != "teacher":
        reader.problem(f"{key}.train", "a further teacher is not taught here; expected model and weights, or file")
    if teacher.checkpoints and key != "teacher":
        reader.problem(f"{key}.checkpoints", "only the reference has earlier weights; expected them in [teacher]")
    elif teacher.checkpoints and (teacher.model is None or teacher.weights is None):
        reader.problem(f"{key}.checkpoints", "need model and weights; a teacher that is taught keeps them by teacher.train.checkpoints")


def _check_distill(reader: Reader, distill: Distill, key: str, reference: Teacher | None) -> None:
    if (distill.augment is None) != (distill.views is None):
        has, lacks = ("augment", "views, such as 8") if distill.views is None else ("views", "augment")
        reader.problem(key, f"has {has} without {lacks}: the teacher answers so many augmented views of each sample")
    if distill.teacher_weighting != "fixed" and not distill.teachers:
        reader.problem(
            f"{key}.teacher_weighting", f"'{distill.teacher_weighting}', but there is one teacher; expected further ones in {key}.teachers"
        )
    if reference is not None and _turns(reference) > distill.epochs:
        reader.problem(f"{key}.epochs", f"{distill.epochs} for {_turns(reference)} teachers in turns; expected one for each at least")
    tapped = [index for index, loss in enumerate(distill.losses) if loss.kind in TAPPED]
    if tapped and reference is not None and reference.model is None:
        reader.problem(f"{key}.losses[{tapped[0]}].taps", "need a teacher that is a module; expected teacher.model and weights, not file")
    if tapped and distill.assistants:
        reader.problem(
            f"{key}.losses[{tapped[0]}].taps", f"name modules of one teacher; expected no {key}.assistants, or losses of answers"
        )
    if tapped and distill.sizes:
        reader.problem(f"{key}.losses[{tapped[0]}].taps", f"name modules of one student; expected no {key}.sizes, or losses of answers")
    if any(loss.epochs is not None for loss in distill.losses):
        if any(loss.is_open for loss in distill.losses):
            reader.problem(f"{key}.losses", "have epochs, and something is 'auto', which shorter runs choose; expected one of the two")
        if any(assistant.epochs not in {None, distill.epochs} for assistant in distill.assistants):
            reader.problem(f"{key}.assistants", f"have epochs of their own, and losses count in some of {distill.epochs}; expected as many")
    _check_worth(reader, distill, key, reference)
    _check_epochs(reader, distill.losses, distill.epochs, key)


def _check_worth(reader: Reader, distill: Distill, key: str, reference: Teacher | None) -> None:
    if distill.break_even_inferences is None:
        return
    if reference is not None and (reference.file or "").endswith(".safetensors"):
        reader.problem(f"{key}.break_even_inferences", "needs a teacher that can be timed, and this one is stored answers; expected none")
    if any(loss.epochs is not None for loss in distill.losses):
        reader.problem(
            f"{key}.break_even_inferences",
            f"may end before {distill.epochs} epochs, and losses count in some of them; expected one of the two",
        )


def _check_form(reader: Reader, student: Student, key: str, *, scored: bool) -> None:
    """Note what is wrong with answers that are not one softmax."""
    if not student.form:
        return
    one = 1
    if student.heads and (student.task != "multiclass" or len(student.heads) == one):
        reader.problem(f"{key}.heads", 'are several softmaxes; expected two at least, and task = "multiclass"')
    if not scored:
        reader.problem(
            f"{key}.{'heads' if student.heads else 'answers'}",
            "top-1 judges one softmax; expected evaluate.score or evaluate.metric of your own",
        )
    for where, teacher in reader.all_parsed(Teacher):
        if teacher.train is not None:
            reader.problem(f"{where}.train", "teaches from classes of one softmax; expected a teacher with weights, or file")


def _check_losses_of(reader: Reader, student: Student) -> None:
    """Note losses, and twins' losses, that have no meaning for the student's answers."""
    for where, baselines in reader.all_parsed(Baselines):
        if student.task == "regression":
            told = f"seeds = {baselines.seeds}, but its twins learn classes, and student.task are numbers"
            reader.problem(where, f"{told}; expected none")
    for where, loss in reader.all_parsed(Loss):
        if student.task == "regression" and loss.kind not in (*REGRESSION_LOSSES, *TAPPED):
            reader.problem(
                f"{where}.kind",
                f"'{loss.kind}' compares classes, and student.task are numbers; expected one of {', '.join(REGRESSION_LOSSES)}",
            )
        if student.task != "regression" and loss.kind == "squared":
            reader.problem(f"{where}.kind", "'squared' compares numbers with labels; expected 'ce', or student.task = \"regression\"")


def _turns(teacher: Teacher) -> int:
    return 1 + (len(teacher.checkpoints) if teacher.train is None else teacher.train.checkpoints)


def _check_epochs(reader: Reader, losses: Sequence[Loss], epochs: int, key: str) -> None:
    for index, loss in enumerate(losses):
        if loss.epochs is None:
            continue
        where = f"{key}.losses[{index}].epochs"
        both = 2
        if len(loss.epochs) != both or loss.epochs[0] > loss.epochs[1] or loss.epochs[1] > epochs:
            reader.problem(where, f"{list(loss.epochs)}; expected the first and the last epoch in which it counts, from 1 to {epochs}")
            return
    for epoch in range(epochs):
        if not any(loss.counts_in(epoch) for loss in losses):
            reader.problem(f"{key}.losses", f"none counts in epoch {epoch + 1}; expected one at least in each of {epochs} epochs")
            return
