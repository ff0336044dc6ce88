# SPDX-License-Identifier: Apache-2.0
"""Is a teacher worth learning from? Its outputs for labelled samples are compared with those of the best constant output.

A wrong order of classes, wrong preprocessing and untrained weights give outputs of the right shape. A student learns them well, and
a budget that compares it with such a teacher is met. Only the labels show it.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

from edgekd.kd.output_spec import MULTICLASS, MULTILABEL, REGRESSION, OutputSpec, label_rows, logit_rows, parse_labels

if TYPE_CHECKING:
    import numpy as np

_ADVICE = "check that its weights, the order of its classes and the preprocessing of its inputs are those that it was trained with"
_ALPHA = 0.025  # one-sided: a teacher that is better than a constant by chance is taken for a good one this often
_ORDER_ALPHA = 0.001  # another order of classes is reported only if it is better beyond doubt
_MARGIN = 0.1  # refused if it certainly closes less than this share of the gap between a constant and a perfect output
_LITTLE = 0.25  # warned of below this share
_USEFUL_AUC = 0.75  # mean area under the ROC curve of a teacher that ranks samples well, although it predicts one class only
_USEFUL_CORRELATION = 0.5
_USEFUL_ACCURACY = 0.5  # in another order of the classes
_MIN_SAMPLES = 8
_MIN_CERTAIN = 30  # fewer do not say how often the commonest class occurs: no teacher is refused for them
_MIN_ORDER_SAMPLES = 20
_MAX_ORDER_CLASSES = 2000  # an assignment of more takes too long
_MAX_SHOWN_CLASSES = 32
_MAX_RANKED = 2000  # samples that labels are shuffled over
_SHUFFLES = 200


@dataclass(frozen=True, slots=True)
class Problem:
    """What is wrong with a teacher; ``is_worthless`` if it is certainly no better than a constant output."""

    text: str
    is_worthless: bool


def quality_problems(spec: OutputSpec, outputs: np.ndarray, labels: np.ndarray) -> list[Problem]:
    """Return what the outputs for labelled samples say against a teacher; nothing where the labels do not fit the outputs.

    One softmax (or each head): top-1 accuracy against that of the commonest class, with an exact paired test (McNemar), and another
    order of the classes, from one half of the samples (assignment problem) and confirmed on the other. Independent labels: the mean
    area under the ROC curve against 0.5, by shuffling samples. Numbers: the squared error against that of the mean.

    Shapes:
        outputs: (n, C); labels: (n,), (n, heads), (n, labels) or (n, numbers).
    """
    problems = _problems(spec, outputs, labels)
    return problems if len(outputs) >= _MIN_CERTAIN else [replace(problem, is_worthless=False) for problem in problems]


def _problems(spec: OutputSpec, outputs: np.ndarray, labels: np.ndarray) -> list[Problem]:
    """Return the problems, however few the samples are."""
    import numpy as np
    import torch

    parsed = parse_labels(spec, labels)
    if parsed is None or len(outputs) < _MIN_SAMPLES or (spec.heads and sum(spec.heads) != outputs.shape[1]):
        return []
    if spec.task == MULTILABEL:
        return _multilabel_problems(outputs, parsed.numpy()) if parsed.shape == outputs.shape else []
    if spec.task == REGRESSION:
        return _regression_problems(outputs.astype(np.float64), parsed.double().numpy()) if parsed.shape == outputs.shape else []
    heads = zip(logit_rows(spec, torch.from_numpy(outputs)), label_rows(spec, parsed), strict=True)
    problems = []
    for number, (logits, classes) in enumerate(heads):
        where = f"head {number}: " if len(set(spec.heads)) > 1 else ""
        problems += [Problem(where + item.text, item.is_worthless) for item in _class_problems(logits.numpy(), classes.numpy())]
    return problems


def _class_problems(logits: np.ndarray, labels: np.ndarray) -> list[Problem]:
    """Return the problems of one softmax. Shapes: logits (n, C); labels (n,), below 0 where there is none."""
    import numpy as np
    from scipy.stats import binomtest

    is_labelled, width = labels >= 0, logits.shape[1]
    logits, labels = logits[is_labelled], labels[is_labelled]
    count = len(labels)
    if count < _MIN_SAMPLES or width == 1 or labels.max() >= width:
        return []
    is_right, commonest = logits.argmax(axis=1) == labels, labels == np.bincount(labels).argmax()
    accuracy, constant = float(is_right.mean()), float(commonest.mean())
    order = _describe_order(logits, labels, is_right)
    is_better = _is_better(is_right, commonest, _ALPHA)
    gap = 1 - constant
    is_ranking = (not is_better or accuracy < constant + _LITTLE * gap) and _mean_class_auc(logits, labels) >= _USEFUL_AUC
    figures = f"right on {accuracy:.1%} of {count} labelled samples, the commonest class on {constant:.1%}"
    if is_better or (is_ranking and constant > 0.5):  # noqa: PLR2004  (a majority: accuracy alone says little)
        if order is not None:
            return [Problem(f"is {figures}; {order}", is_worthless=False)]
        if accuracy < constant + _LITTLE * gap and not is_ranking:
            return [Problem(f"is hardly better than the commonest class: {figures}; {_ADVICE}", is_worthless=False)]
        return []
    highest = float(binomtest(int(is_right.sum()), count).proportion_ci(1 - 2 * _ALPHA, method="wilson").high)
    is_worthless = order is not None or (highest < constant + _MARGIN * gap and not is_ranking)
    return [Problem(f"is no better than the commonest class: {figures}; {order or _ADVICE}", is_worthless)]


def _is_better(is_right: np.ndarray, other: np.ndarray, alpha: float) -> bool:
    """Return whether predictions are right significantly more often than others of the same samples: McNemar's exact test, one-sided."""
    from scipy.stats import binomtest

    wins, losses = int((is_right & ~other).sum()), int((other & ~is_right).sum())
    return wins + losses > 0 and float(binomtest(wins, wins + losses, alternative="greater").pvalue) <= alpha


def _describe_order(logits: np.ndarray, labels: np.ndarray, is_right: np.ndarray) -> str | None:
    """Return in which other order of its outputs a teacher is right more often, or None."""
    import numpy as np
    from scipy.optimize import linear_sum_assignment

    width = logits.shape[1]
    if len(labels) < _MIN_ORDER_SAMPLES or width > _MAX_ORDER_CLASSES:
        return None
    predicted = logits.argmax(axis=1)
    half, other_half = np.array_split(np.random.default_rng(0).permutation(len(labels)), 2)
    confusion = np.zeros((width, width))
    np.add.at(confusion, (predicted[half], labels[half]), 1)
    confusion += np.eye(width) / len(labels)  # of equally good orders, the present one
    classes = linear_sum_assignment(confusion, maximize=True)[1]  # the label of each output
    reordered = classes[predicted] == labels
    if reordered[other_half].mean() < _USEFUL_ACCURACY or not _is_better(reordered[other_half], is_right[other_half], _ORDER_ALPHA):
        return None
    outputs = np.argsort(classes)
    misplaced = np.flatnonzero(outputs != np.arange(width))
    remedy = f"return logits[:, {outputs.tolist()}]"
    if width > _MAX_SHOWN_CLASSES:
        examples = (f"its output {outputs[label]} is class {label}" for label in misplaced[:2])
        remedy = f"for example, {', '.join(examples)}"
    return f"its classes seem to be in another order than the labels, in which it would be right on {reordered.mean():.1%}; {remedy}"


def _multilabel_problems(outputs: np.ndarray, labels: np.ndarray) -> list[Problem]:
    """Return the problems of independent labels. Shapes: (n, labels) both; labels are below 0 where unknown."""
    import numpy as np
    from scipy.optimize import linear_sum_assignment

    outputs, labels = outputs[:_MAX_RANKED], labels[:_MAX_RANKED]
    present = ((labels == 1).any(axis=0) & (labels == 0).any(axis=0)).nonzero()[0]
    if not len(present):
        return []
    outputs, positive = outputs[:, present], (labels[:, present] == 1).astype(np.float64)
    generator = np.random.default_rng(0)
    auc = _mean_auc(outputs, positive)
    shuffled = np.array([_mean_auc(outputs, positive[generator.permutation(len(outputs))]) for _ in range(_SHUFFLES)])
    error = 2 * float(shuffled.std())
    figures = f"mean area under the ROC curve {auc:.2f} for {len(outputs)} samples and {len(present)} labels, 0.5 for a constant"
    hint = _ADVICE.replace("classes", "labels")
    if 1 < len(present) <= _MAX_ORDER_CLASSES and len(outputs) >= _MIN_ORDER_SAMPLES:
        half, other_half = np.array_split(generator.permutation(len(outputs)), 2)
        columns = linear_sum_assignment(_auc_matrix(outputs[half], positive[half]), maximize=True)[1]
        reordered = _mean_auc(outputs[other_half][:, np.argsort(columns)], positive[other_half])
        if reordered > _mean_auc(outputs[other_half], positive[other_half]) + max(_MARGIN, error):
            hint = f"its outputs seem to be in another order than the labels, in which that area would be {reordered:.2f}; {hint}"
    if auc < 0.5 - error:
        hint = f"its outputs are high where the label is 0: is their sign reversed? {hint}"
    if auc > 0.5 + error and auc >= 0.5 + _MARGIN and "order than" not in hint:
        return []
    return [Problem(f"hardly tells labels apart: {figures}; {hint}", is_worthless=auc + error < 0.5 + _MARGIN)]


def _mean_class_auc(logits: np.ndarray, labels: np.ndarray) -> float:
    """Return the mean area under the ROC curve of the probability of each class."""
    import numpy as np
    from scipy.special import log_softmax

    rows = np.linspace(0, len(labels) - 1, min(len(labels), _MAX_RANKED)).astype(np.int64)
    positive = labels[rows, None] == np.unique(labels[rows])
    return _mean_auc(log_softmax(logits[rows], axis=1)[:, np.unique(labels[rows])], positive)


def _mean_auc(outputs: np.ndarray, positive: np.ndarray) -> float:
    """Return the mean area under the ROC curve over the columns that have samples of both kinds. Shapes: (n, C) both."""
    import numpy as np
    from scipy.stats import rankdata

    counts = positive.sum(axis=0)
    both = (counts > 0) & (counts < len(outputs))
    if not both.any():
        return 0.5
    ranks, counts = rankdata(outputs[:, both], axis=0), counts[both]
    sums = (ranks * positive[:, both]).sum(axis=0)
    return float(np.mean((sums / counts - (counts + 1) / 2) / (len(outputs) - counts)))


def _auc_matrix(outputs: np.ndarray, positive: np.ndarray) -> np.ndarray:
    """Return the area under the ROC curve of each output for each label; 0.5 for a label that has samples of one kind only."""
    import numpy as np
    from scipy.stats import rankdata

    counts = positive.sum(axis=0)
    both = (counts > 0) & (counts < len(outputs))
    safe = np.where(both, counts, 1)
    areas = (rankdata(outputs, axis=0).T @ positive / safe - (safe + 1) / 2) / (len(outputs) - safe)
    areas[:, ~both] = 0.5
    matrix: np.ndarray = areas
    return matrix


def _regression_problems(outputs: np.ndarray, labels: np.ndarray) -> list[Problem]:
    """Return the problems of numbers. Shapes: (n, numbers) both."""
    import numpy as np

    deviation = labels.std(axis=0)
    outputs, labels, deviation = outputs[:, deviation > 0], labels[:, deviation > 0], deviation[deviation > 0]
    if not len(deviation):
        return []
    constant = (((labels - labels.mean(axis=0)) / deviation) ** 2).mean(axis=1)
    gains = constant - (((outputs - labels) / deviation) ** 2).mean(axis=1)
    gain, error = float(gains.mean()), 2 * float(gains.std(ddof=1)) / len(gains) ** 0.5
    if gain - error > 0 and gain >= _MARGIN:
        return []
    figures = f"it explains {gain:.2f} of the variance of {len(labels)} samples, the mean of the labels 0"
    spread = np.where(outputs.std(axis=0) > 0, outputs.std(axis=0), 1.0)
    slopes = ((outputs - outputs.mean(axis=0)) * (labels - labels.mean(axis=0))).mean(axis=0) / spread**2
    correlations = slopes * spread / deviation
    if (np.abs(correlations) >= _USEFUL_CORRELATION).all():
        number = int(np.abs(correlations).argmax())
        offset = labels[:, number].mean() - slopes[number] * outputs[:, number].mean()
        scale = f"the labels are about {slopes[number]:.4g} * output + {offset:.4g} (output {number})"
        return [Problem(f"seems to have another unit than the labels: {figures}, and {scale}; rescale its outputs", is_worthless=False)]
    return [Problem(f"is no better than a constant: {figures}; {_ADVICE}", is_worthless=gain + error < _MARGIN)]


def probability_problem(spec: OutputSpec, outputs: np.ndarray, *, trained: bool = True) -> Problem | None:
    """Return whether outputs are probabilities or their logarithms instead of logits, or None.

    Args:
        spec: What the outputs mean; numbers are never probabilities.
        outputs: Shape (n, C).
        trained: False for fresh weights, whose small logits may all be between 0 and 1 by chance.

    The softmax of probabilities is nearly uniform, so that nothing can be learned from it. Logarithms of probabilities are logits
    up to a constant per sample: the same for every loss with a softmax, but not for ``mse``.
    """
    import torch

    in_unit = bool((outputs >= -_ROUNDING).all() and (outputs <= 1 + _ROUNDING).all())
    if spec.task == MULTILABEL and trained and in_unit and outputs.size >= _MIN_SAMPLES:
        text = "returns probabilities (all from 0 to 1), not logits; leave out its last sigmoid, or return torch.logit(p)"
        return Problem(text, is_worthless=True)
    if spec.task != MULTICLASS or (spec.heads and sum(spec.heads) != outputs.shape[1]):
        return None
    rows = [item for item in logit_rows(spec, torch.from_numpy(outputs)) if item.shape[1] > 1]
    if not rows:
        return None
    if in_unit and all((item.sum(dim=1) - 1).abs().max() < _ROUNDING for item in rows):
        text = "returns probabilities (rows that sum to 1), not logits; leave out its last softmax, or return torch.log(p)"
        return Problem(text, is_worthless=True)
    if all(item.logsumexp(dim=1).abs().max() < _ROUNDING for item in rows):
        text = "returns log-probabilities: the same as logits for losses with a softmax, not for 'mse'; leave out its last log_softmax"
        return Problem(text, is_worthless=False)
    if trained and in_unit and outputs.max() > 0.5:  # noqa: PLR2004  (a sigmoid that predicts something)
        text = "returns numbers from 0 to 1 only, whose softmax is nearly uniform; are they probabilities? expected logits"
        return Problem(text, is_worthless=False)
    return None


_ROUNDING = 2e-3  # of probabilities in half precision
