# SPDX-License-Identifier: Apache-2.0
from __future__ import annotations

from types import SimpleNamespace

import numpy as np
import pytest

from edgekd.domain.budget import Budget
from edgekd.domain.recipe import EntryPoint, Evaluate, TargetOverrides
from edgekd.domain.scheme import Quantize
from edgekd.report import provable


@pytest.fixture
def warn(tmp_path):
    """Return a function that returns the warnings on a budget, for an evaluation set of so many samples in so many groups."""

    def warnings(limit, samples, groups, **evaluate):
        np.save(tmp_path / "groups.npy", np.arange(samples) % groups)
        entry = SimpleNamespace(artifacts={"evaluation.groups.npy": SimpleNamespace(path=tmp_path / "groups.npy")})
        overrides = TargetOverrides(Budget(max_accuracy_drop_pp=limit), Quantize())
        recipe = SimpleNamespace(overrides_for=lambda _: overrides, evaluate=Evaluate(**evaluate))
        plan = SimpleNamespace(targets=(SimpleNamespace(name="board"),), recipe=recipe)
        return provable.budget_warnings(plan, {"inspect": SimpleNamespace(entry=entry)})

    return warnings


def test_a_budget_that_the_evaluation_set_can_prove_gets_no_warning(warn):
    assert warn(2.5, 450, 450) == []
    assert warn(None, 10, 10) == []


def test_a_budget_below_what_can_usually_be_proved_may_be_inconclusive(warn):
    (line,) = warn(1.5, 450, 450)
    assert line == (
        "board: with 450 evaluation samples, a drop of less than 2.07 pp cannot be proved if 5 % of predictions differ "
        "(0.85 pp if none differs); the budget is max_accuracy_drop_pp = 1.5: the verdict may be INCONCLUSIVE"
    )


def test_a_budget_below_what_can_be_proved_needs_a_student_that_is_better_than_its_teacher(warn):
    (line,) = warn(0.5, 450, 450)
    assert line.endswith("only a student that is better than its teacher can PASS")


def test_groups_prove_less_than_their_samples(warn):
    (line,) = warn(5.0, 600, 6)
    assert line.startswith("board: with 600 evaluation samples in 6 groups, a drop of less than 7.75 pp cannot be proved if 5 % of")
    assert "predictions differ and those of a group correlate by 0.1 (" in line
    assert line.endswith("the verdict may be INCONCLUSIVE")
    assert warn(0.1, 600, 6)[0].endswith("the verdict may be INCONCLUSIVE")


def test_one_group_proves_nothing(warn):
    (line,) = warn(50.0, 600, 1)
    assert line.startswith("board: with 600 evaluation samples in one group, no drop can be proved; the budget is")


def test_how_much_a_metric_of_the_user_varies_is_not_claimed(warn):
    entry = EntryPoint("data.py", "auc")
    assert warn(0.1, 100, 100, metric=entry) == warn(0.1, 100, 100, score=entry) == []
