# SPDX-License-Identifier: Apache-2.0
"""Checks of score functions and metrics before training: what is refused, what is noted, and the parts for the interval."""

from __future__ import annotations

from types import SimpleNamespace

import numpy as np
import pytest

from edgekd import usercode
from edgekd.errors import RecipeError
from edgekd.stages.inspect import metric

OUTPUTS, LABELS = np.eye(3, dtype=np.float32)[np.arange(9) % 3], np.arange(9) % 3
SCORES = "models.py:score: returned {} for 9 samples; expected 9 scores from 0 to 1"
WHOLE = "models.py:metric: returned {}; expected one finite number for the whole set, at most 1 (0.93, not 93)"
VALID_SCORES = ["(outputs.argmax(1) == labels)", "(outputs.argmax(1) == labels).astype(float)", "[0.5] * len(labels)", "torch.ones(9)"]
VALID_METRICS = ["0.5", "1", "np.float32(0.5)", "torch.tensor(0.25)", "float((outputs.argmax(1) == labels).mean())", "-0.2"]
BAD_SCORES = {
    "one": ("0.5", SCORES.format("float 0.5")),
    "none": ("None", SCORES.format("NoneType None")),
    "too few": ("labels[1:] * 0", SCORES.format("ndarray of shape [8]")),
    "a column": ("labels[:, None] * 0", SCORES.format("ndarray of shape [9, 1]")),
    "percent": ("labels * 100", SCORES.format("ndarray of shape [9]")),
    "negative": ("labels - 1.0", SCORES.format("ndarray of shape [9]")),
    "nan": ("labels * float('nan')", SCORES.format("ndarray of shape [9]")),
    "text": ("['a'] * 9", SCORES.format("list ['a', 'a', 'a', 'a', 'a', 'a', 'a', 'a',")),
    "raised": ("1 / 0", "models.py:4: score() raised ZeroDivisionError: division by zero"),
    "ragged": ("[[1], [1, 2]]", None),
}
BAD_METRICS = {
    "an array": ("labels", WHOLE.format("ndarray of shape [9]")),
    "none": ("None", WHOLE.format("NoneType None")),
    "percent": ("93.0", WHOLE.format("float 93.0")),
    "nan": ("float('nan')", WHOLE.format("float nan")),
    "text": ("'0.9'", WHOLE.format("str 0.9")),
    "raised": ("1 / 0", "models.py:4: metric() raised ZeroDivisionError: division by zero"),
}


@pytest.fixture
def refusal(tmp_path):
    """Return a function that checks one expression as a score or a metric, and returns the parts and notes, or the refusal."""

    def check(kind, expression, labels=LABELS, outputs=OUTPUTS, setup=""):
        code = f"import numpy as np, torch, time\n{setup}\ndef {kind}(outputs, labels):\n    return {expression}\n"
        (tmp_path / "models.py").write_text(code)
        params = SimpleNamespace(metric=None, score=None, task="multiclass", heads=())
        setattr(params, kind, f"models.py:{kind}")
        try:
            return metric.check_metric(SimpleNamespace(params=params, recipe_dir=tmp_path), outputs, labels, labels)
        except RecipeError as error:
            return "\n".join(error.problems)

    yield check
    usercode.forget_modules()


@pytest.mark.parametrize("expression", VALID_SCORES)
def test_valid_score(expression, refusal):
    assert refusal("score", expression)[0] == metric.PARTS


@pytest.mark.parametrize("expression", VALID_METRICS)
def test_valid_metric(expression, refusal):
    assert refusal("metric", expression)[0] == metric.PARTS


@pytest.mark.parametrize("name", BAD_SCORES)
def test_invalid_score(name, refusal):
    expression, message = BAD_SCORES[name]
    answer = refusal("score", expression)
    assert answer == message or (message is None and "what score returned raised ValueError" in answer)


@pytest.mark.parametrize("name", BAD_METRICS)
def test_invalid_metric(name, refusal):
    expression, message = BAD_METRICS[name]
    assert refusal("metric", expression) == message


@pytest.mark.parametrize("kind", ["metric", "score"])
def test_a_function_that_differs_between_calls_is_refused(kind, refusal):
    expression = "np.random.random(len(labels))" if kind == "score" else "np.random.random()"
    assert "for the same outputs; expected the same (a generator with a fixed seed)" in refusal(kind, expression)


def test_a_function_that_changes_its_arrays_gets_copies(refusal):
    labels, outputs = LABELS.copy(), OUTPUTS.copy()
    setup = "def spoil(outputs, labels):\n    labels[:] = 7\n    outputs[:] = -1\n    return 0.5"
    assert refusal("metric", "spoil(outputs, labels)", labels, outputs, setup)[0] == metric.PARTS
    assert (labels == LABELS).all()
    assert (outputs == OUTPUTS).all()


@pytest.mark.parametrize(
    ("expression", "where"),
    [
        ("float(np.corrcoef(outputs[:, 0] - outputs[0, 0], labels)[0, 1])", "returned float nan"),
        ("1 / outputs.std(0).sum() * 0 if outputs.std(0).sum() else 1 / 0", "raised ZeroDivisionError"),
        ("float((labels == 2)[outputs.argmax(1) == 2].sum()) / int((outputs.argmax(1) == 2).sum())", "raised ZeroDivisionError"),
        ("0.5 if outputs.max() == 1 else float('inf')", "returned float inf"),
    ],
)
def test_a_metric_that_is_undefined_on_possible_outputs_is_refused(expression, where, refusal):
    with np.errstate(all="ignore"):
        message = refusal("metric", expression)
    assert where in message
    assert message.endswith("(with outputs that are the same for all samples, or random ones for the whole split)")


def test_an_error_rate_is_refused(refusal):
    expected = "returned 0 for perfect predictions and 1 for wrong ones; expected more for better predictions (1 - error, not the error)"
    assert refusal("metric", "float((outputs.argmax(1) != labels).mean())") == f"models.py:metric: {expected}"
    assert refusal("score", "(outputs.argmax(1) != labels)") == f"models.py:score: {expected}"


def test_a_metric_that_ignores_predictions_gets_a_note(refusal):
    assert refusal("metric", "0.5")[1] == ["warning: models.py:metric returned 0.5 for perfect and for wrong predictions alike"]
    assert refusal("metric", "float((outputs.argmax(1) == labels).mean())")[1] == []
    assert refusal("metric", "0.5", labels=np.ones((9, 2)))[1] == []


def test_a_slow_metric_gets_fewer_parts_and_a_note(refusal, monkeypatch):
    monkeypatch.setattr(metric, "_MAX_SECONDS", 0.5)
    parts, (note,) = refusal("metric", "time.sleep(0.01) or float((outputs.argmax(1) == labels).mean())")
    assert parts < metric.PARTS
    assert note.startswith("models.py:metric takes 0.0 s: its interval is computed from 20 parts of the set")


def test_a_metric_is_checked_on_samples_of_each_class():
    labels = np.repeat(np.arange(5), [1000, 1, 2, 500, 30])
    rows = metric.metric_rows(labels)
    assert np.bincount(labels[rows]).tolist() == [12, 1, 2, 12, 12]
    assert metric.metric_rows(np.arange(200)) == list(range(200))
    assert metric.metric_rows(np.zeros((100, 2))) == list(range(64))
