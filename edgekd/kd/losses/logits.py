# SPDX-License-Identifier: Apache-2.0
"""Losses that are pure functions of logits.

A new one is one function here, one line in ``edgekd.kd.losses.LOSSES``, and its kind with its options in ``edgekd.domain.losses``.
A loss takes those of ``student`` (n, C), ``teacher`` (n, C) and ``labels`` (n,), int64, -1 where there is none, that it needs, and
returns a scalar. All its other parameters are its options. Logits are converted to float32 at least.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from torch import Tensor


UNLABELLED = -1  # the label of a sample that has none
_EPSILON = 1e-7  # equal logits have no standard deviation to divide by


def ce(student: Tensor, labels: Tensor, label_smoothing: float = 0.0) -> Tensor:
    """Return the cross-entropy of the labels: ``mean over labelled samples of -log softmax(student)[label]``.

    With smoothing s, the target probability of the label is ``1 - s + s / C``, that of every other class ``s / C``.
    A batch without a label gives 0. Labels of mixed samples are class probabilities, which are smoothed alike.

    Shapes:
        student: (n, C) logits; labels: (n,) int64, -1 where there is none, or (n, C) float, 0 where there is none; result: ().

    Source:
        Smoothing: Szegedy et al., arXiv 1512.00567, section 7.
    """
    from torch.nn.functional import cross_entropy

    if labels.is_floating_point():
        labelled = labels.sum(dim=1) > 0
        total = cross_entropy(to_float32(student[labelled]), labels[labelled], reduction="sum", label_smoothing=label_smoothing)
        return total / labelled.sum().clamp(min=1)
    total = cross_entropy(to_float32(student), labels, ignore_index=UNLABELLED, reduction="sum", label_smoothing=label_smoothing)
    return total / (labels != UNLABELLED).sum().clamp(min=1)


def kl(student: Tensor, teacher: Tensor, temperature: float, *, standardize: bool = False) -> Tensor:
    """Return the Kullback-Leibler divergence of the student's softened probabilities from the teacher's.

    ``T^2 * mean over samples of KL(softmax(teacher / T) || softmax(student / T))``. It is summed over classes, so that the
    number of classes does not weaken it, and multiplied by T^2, so that its gradient keeps its size as T grows. At T = 1 its
    gradient is that of cross-entropy to the teacher's soft labels. ``kl(p, p, T) = 0``. With ``standardize``, the mean of each
    sample's logits is subtracted and they are divided by their standard deviation: the student has to match the teacher's
    order and relations, not its scale, and its probabilities are not calibrated.

    Shapes:
        student, teacher: (n, C) logits; result: ().

    Source:
        Hinton, Vinyals, Dean, arXiv 1503.02531, section 2. Standardized: Sun et al., arXiv 2403.01427, algorithm 1.
    """
    from torch.nn.functional import kl_div, log_softmax

    student, teacher = to_float32(student), to_float32(teacher)
    if standardize:
        student, teacher = _standardized(student), _standardized(teacher)
    log_probabilities, target = log_softmax(student / temperature, dim=1), log_softmax(teacher / temperature, dim=1)
    return kl_div(log_probabilities, target, reduction="batchmean", log_target=True) * temperature**2


def dkd(student: Tensor, teacher: Tensor, labels: Tensor, temperature: float, target_weight: float, rest_weight: float) -> Tensor:
    """Return the divergence in two parts, each with a weight: the label's class against all others, and among the others.

    ``T^2 * mean over labelled samples of (target_weight * KL(b_teacher || b_student) + rest_weight * KL(r_teacher || r_student))``
    with ``b = (p[label], 1 - p[label])``, ``r`` the softmax over the other classes, both of logits / T. Hinton's loss is
    the case ``target_weight = 1``, ``rest_weight = 1 - p_teacher[label]``. ``dkd(p, p) = 0``; a batch without a label gives 0.

    Shapes:
        student, teacher: (n, C) logits with C > 1; labels: (n,) int64, -1 where there is none; result: ().

    Source:
        Zhao et al., arXiv 2203.08679, equation 7 (8 is the weight of most of its CIFAR-100 results).
    """
    import torch
    from torch.nn.functional import kl_div

    labelled = labels != UNLABELLED
    shifts = torch.arange(student.shape[1], device=student.device)
    classes = (labels[labelled][:, None] + shifts) % student.shape[1]  # the label's class first
    parts = []
    for logits in (student, teacher):
        log_probabilities = torch.log_softmax(to_float32(logits)[labelled] / temperature, dim=1).gather(1, classes)
        log_rest = log_probabilities[:, 1:].logsumexp(dim=1, keepdim=True)
        parts.append((torch.cat([log_probabilities[:, :1], log_rest], dim=1), log_probabilities[:, 1:] - log_rest))
    (student_target, student_rest), (teacher_target, teacher_rest) = parts
    target = kl_div(student_target, teacher_target, reduction="sum", log_target=True)
    rest = kl_div(student_rest, teacher_rest, reduction="sum", log_target=True)
    return (target_weight * target + rest_weight * rest) * temperature**2 / labelled.sum().clamp(min=1)


def dist(student: Tensor, teacher: Tensor, temperature: float, inter_weight: float, intra_weight: float) -> Tensor:
    """Return how far the student's relations are from the teacher's: within each sample, and within each class of the batch.

    ``T^2 * (inter_weight * mean over samples of (1 - r) + intra_weight * mean over classes of (1 - r))`` with Pearson's r
    between rows (then columns) of ``softmax(logits / T)``. The student of a much stronger teacher learns its preferences, not
    its confidence, so the student's probabilities are not calibrated. ``dist(p, p) = 0``.

    Shapes:
        student, teacher: (n, C) logits; result: ().

    Source:
        Huang et al., arXiv 2205.10536, equations 8 to 10.
    """
    import torch

    student, teacher = (torch.softmax(to_float32(logits) / temperature, dim=1) for logits in (student, teacher))
    inter = 1 - _correlation(student, teacher).mean()
    intra = 1 - _correlation(student.T, teacher.T).mean()
    return temperature**2 * (inter_weight * inter + intra_weight * intra)


def hard(student: Tensor, teacher: Tensor) -> Tensor:
    """Return the cross-entropy of the classes that the teacher predicts: ``mean of -log softmax(student)[argmax teacher]``.

    Shapes:
        student, teacher: (n, C) logits; result: ().

    Source:
        Touvron et al., arXiv 2012.12877, equation 3.
    """
    from torch.nn.functional import cross_entropy

    return cross_entropy(to_float32(student), teacher.argmax(dim=1))


def mse(student: Tensor, teacher: Tensor) -> Tensor:
    """Return the mean squared difference of logits: ``mean over samples and classes of (student - teacher)^2``.

    Shapes:
        student, teacher: (n, C) logits; result: ().

    Source:
        Kim et al., arXiv 2105.08919, equation 3.
    """
    from torch.nn.functional import mse_loss

    return mse_loss(to_float32(student), to_float32(teacher))


def mse_labels(student: Tensor, labels: Tensor) -> Tensor:
    """Return the mean squared difference from the labels: ``mean over known numbers of (student - label)^2``.

    A batch without a label gives 0.

    Shapes:
        student: (n, D); labels: (n, D) float, NaN where there is none; result: ().

    Source:
        Gauss 1809; together with a teacher as in Chen et al., NIPS 2017, section 3.3.
    """
    import torch

    known = ~torch.isnan(labels)
    return (to_float32(student) - labels.nan_to_num())[known].square().sum() / known.sum().clamp(min=1)


def _standardized(logits: Tensor) -> Tensor:
    return (logits - logits.mean(dim=1, keepdim=True)) / (logits.std(dim=1, keepdim=True) + _EPSILON)


def _correlation(student: Tensor, teacher: Tensor) -> Tensor:
    """Return Pearson's correlation of each pair of rows; 0 where one is constant."""
    from torch.nn.functional import cosine_similarity

    return cosine_similarity(student - student.mean(dim=1, keepdim=True), teacher - teacher.mean(dim=1, keepdim=True), dim=1)


def to_float32(logits: Tensor) -> Tensor:
    """Return logits in float32 at least: softmax and its logarithm lose too much precision in 16 bits."""
    import torch

    return logits.to(torch.promote_types(logits.dtype, torch.float32))
