# SPDX-License-Identifier: Apache-2.0
"""Losses: pure functions of logits. A new one is one function, one line in ``LOSSES`` and its kind in ``domain.recipe``.

A loss takes what it needs of ``student`` (n, C), ``teacher`` (n, C) and ``labels`` (n,), int64, -1 where there is none, and
returns a scalar. What else it takes are its options. Logits are widened to float32 at least.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from torch import Tensor


UNLABELLED = -1  # the label of a sample that has none
_STILL = 1e-7  # logits that all agree have no spread to divide by


def ce(student: Tensor, labels: Tensor, label_smoothing: float = 0.0) -> Tensor:
    """Return the cross-entropy of the labels: ``mean over labelled samples of -log softmax(student)[label]``.

    With smoothing s, the label's share becomes ``1 - s + s / C`` and every other class's ``s / C``.
    A batch without a label gives 0.

    Shapes:
        student: (n, C) logits; labels: (n,) int64, -1 where there is none; result: ().

    Source:
        Smoothing: Szegedy et al., arXiv 1512.00567, section 7.
    """
    from torch.nn.functional import cross_entropy

    summed = cross_entropy(to_float32(student), labels, ignore_index=UNLABELLED, reduction="sum", label_smoothing=label_smoothing)
    return summed / (labels != UNLABELLED).sum().clamp(min=1)


def kl(student: Tensor, teacher: Tensor, temperature: float, *, standardize: bool = False) -> Tensor:
    """Return the softened divergence of student from teacher.

    ``T^2 * mean over samples of KL(softmax(teacher / T) || softmax(student / T))``: summed over classes, so that the
    number of classes does not weaken it, and times T^2, so that its gradient keeps its size as T grows. At T = 1 its
    gradient is that of cross-entropy to the teacher's soft labels. ``kl(p, p, T) = 0``. Standardized, each sample's
    logits first lose their mean and are divided by their standard deviation: the student has to match the teacher's
    order and relations, not its scale; what it then answers is not calibrated.

    Shapes:
        student, teacher: (n, C) logits; result: ().

    Source:
        Hinton, Vinyals, Dean, arXiv 1503.02531, section 2. Standardized: Sun et al., arXiv 2403.01427, algorithm 1.
    """
    from torch.nn.functional import kl_div, log_softmax

    student, teacher = to_float32(student), to_float32(teacher)
    if standardize:
        student, teacher = _standardized(student), _standardized(teacher)
    found, wanted = log_softmax(student / temperature, dim=1), log_softmax(teacher / temperature, dim=1)
    return kl_div(found, wanted, reduction="batchmean", log_target=True) * temperature**2


def dkd(student: Tensor, teacher: Tensor, labels: Tensor, temperature: float, target_weight: float, rest_weight: float) -> Tensor:
    """Return the divergence in two parts with a weight each: the label's class against all others, and among the others.

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
    chosen = labels[labelled]
    classes = (chosen[:, None] + torch.arange(student.shape[1], device=student.device)) % student.shape[1]  # the label's first
    parts = []
    for logits in (student, teacher):
        shares = torch.log_softmax(to_float32(logits)[labelled] / temperature, dim=1).gather(1, classes)
        rest = shares[:, 1:].logsumexp(dim=1, keepdim=True)
        parts.append((torch.cat([shares[:, :1], rest], dim=1), shares[:, 1:] - rest))
    (target_found, rest_found), (target_wanted, rest_wanted) = parts
    target = kl_div(target_found, target_wanted, reduction="sum", log_target=True)
    among = kl_div(rest_found, rest_wanted, reduction="sum", log_target=True)
    return (target_weight * target + rest_weight * among) * temperature**2 / labelled.sum().clamp(min=1)


def dist(student: Tensor, teacher: Tensor, temperature: float, inter_weight: float, intra_weight: float) -> Tensor:
    """Return how far the student's relations are from the teacher's: within each sample, and within each class of the batch.

    ``T^2 * (inter_weight * mean over samples of (1 - r) + intra_weight * mean over classes of (1 - r))`` with Pearson's r
    between rows (then columns) of ``softmax(logits / T)``. A teacher much stronger than its student is followed in what
    it prefers, not in how sure it is; what the student then answers is not calibrated. ``dist(p, p) = 0``.

    Shapes:
        student, teacher: (n, C) logits; result: ().

    Source:
        Huang et al., arXiv 2205.10536, equations 8 to 10.
    """
    import torch

    found, wanted = torch.softmax(to_float32(student) / temperature, dim=1), torch.softmax(to_float32(teacher) / temperature, dim=1)
    inter = 1 - _correlation(found, wanted).mean()
    intra = 1 - _correlation(found.T, wanted.T).mean()
    return temperature**2 * (inter_weight * inter + intra_weight * intra)


def hard(student: Tensor, teacher: Tensor) -> Tensor:
    """Return the cross-entropy of the teacher's own answers, as if they were labels: ``mean of -log softmax(student)[argmax teacher]``.

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


def squared(student: Tensor, labels: Tensor) -> Tensor:
    """Return the mean squared difference from the labels: ``mean over numbers that are known of (student - label)^2``.

    A batch without a label gives 0.

    Shapes:
        student: (n, D); labels: (n, D) float, NaN where there is none; result: ().

    Source:
        Gauss 1809; with a teacher beside it as in Chen et al., NIPS 2017, section 3.3.
    """
    import torch

    known = ~torch.isnan(labels)
    return (to_float32(student) - labels.nan_to_num())[known].square().sum() / known.sum().clamp(min=1)


def _standardized(logits: Tensor) -> Tensor:
    return (logits - logits.mean(dim=1, keepdim=True)) / (logits.std(dim=1, keepdim=True) + _STILL)


def _correlation(found: Tensor, wanted: Tensor) -> Tensor:
    """Return Pearson's correlation of each pair of rows; 0 where one does not vary."""
    from torch.nn.functional import cosine_similarity

    return cosine_similarity(found - found.mean(dim=1, keepdim=True), wanted - wanted.mean(dim=1, keepdim=True), dim=1)


def to_float32(logits: Tensor) -> Tensor:
    """Return logits in float32 at least: softmax and its logarithm lose too much in half precision."""
    import torch

    return logits.to(torch.promote_types(logits.dtype, torch.float32))
