# SPDX-License-Identifier: Apache-2.0
"""Accuracy, differences and drops by class, with intervals that are missing where the samples do not tell."""

from __future__ import annotations

import numpy as np
import pytest

from edgekd.stats import intervals, paired, scores
from edgekd.stats.jackknife import Jackknife
from edgekd.stats.scores import ModelScores

ONE_EACH = np.arange(200)
TEACHER, STUDENT = (np.where(np.arange(200) % 20 < errors, 0.0, 1.0) for errors in (1, 2))


def _scored(values, without_part=None):
    return ModelScores(float(values.mean()), np.zeros((len(values), 2)), None if without_part else values, without_part, "x86-64-v3")


def test_the_accuracy_of_independent_samples_has_wilsons_interval():
    assert scores.accuracy_interval(_scored(TEACHER), ONE_EACH) == intervals.proportion_interval(190, 200)


@pytest.mark.parametrize("values", [np.ones(200), TEACHER, STUDENT, 1 - TEACHER, np.zeros(200)])
def test_the_accuracy_of_groups_is_within_0_and_1_and_wider(values):
    groups = np.arange(200) // 20
    interval = scores.accuracy_interval(_scored(values), groups)
    assert 0 <= interval.low <= values.mean() <= interval.high <= 1
    assert interval.high - interval.low > 0.03


def test_the_accuracy_of_rights_is_that_of_wrongs_turned_around():
    groups = np.arange(200) // 20
    right, wrong = (scores.accuracy_interval(_scored(values), groups) for values in (TEACHER, 1 - TEACHER))
    assert (right.low, right.high) == pytest.approx((1 - wrong.high, 1 - wrong.low))


def test_a_difference_has_the_interval_and_the_p_of_its_samples():
    item = scores.difference(_scored(TEACHER), _scored(STUDENT), ONE_EACH)
    assert item.value == pytest.approx(0.05)
    assert item.interval == paired.tango_interval(10, 0, 200)
    assert item.p == pytest.approx(2 * 0.5**10)
    assert scores.difference(_scored(0.5 * TEACHER), _scored(STUDENT), ONE_EACH).p is None


def test_one_speaker_has_no_interval():
    one_group = np.zeros(200)
    item = scores.difference(_scored(TEACHER), _scored(STUDENT), one_group)
    assert scores.difference_row(item) == {"pp": pytest.approx(5), "interval_pp": None, "p": None}
    assert scores.accuracy_interval(_scored(TEACHER), one_group) is None


def test_a_metric_that_is_undefined_without_a_part_has_no_interval():
    groups = np.arange(200) % 4
    sound, undefined = (Jackknife(np.array(values), 4) for values in ([0.9, 0.91, 0.9, 0.89], [0.9, np.nan, 0.9, 0.89]))
    assert scores.difference(_scored(TEACHER, sound), _scored(STUDENT, sound), groups).interval is not None
    assert scores.difference(_scored(TEACHER, sound), _scored(STUDENT, undefined), groups).interval is None
    assert scores.accuracy_interval(_scored(TEACHER, undefined), groups) is None


def test_a_class_of_one_speaker_has_a_drop_without_an_interval():
    labels = np.arange(200) // 100
    drops = scores.class_drops(_scored(TEACHER), _scored(STUDENT), labels, groups=labels)
    assert [row["interval"] for row in drops.values()] == [None, None]
    assert drops["0"]["drop"] == pytest.approx(0.05)
    assert scores.class_drops(_scored(TEACHER), _scored(STUDENT), labels, ONE_EACH)["0"]["interval"][1] > 0.1
