# SPDX-License-Identifier: Apache-2.0
import pytest
import torch
from torch import nn

from edgekd.errors import UsageError
from edgekd.kd.training import distributed


@pytest.fixture
def three_ranks(monkeypatch):
    """Make this process the second of three ranks, all on this machine."""
    for name, value in {"TORCHELASTIC_RUN_ID": "x", "WORLD_SIZE": "3", "LOCAL_WORLD_SIZE": "3", "RANK": "1"}.items():
        monkeypatch.setenv(name, value)


def test_a_process_that_torchrun_did_not_start_is_the_only_rank(monkeypatch):
    monkeypatch.setenv("WORLD_SIZE", "4")  # as other launchers set it too
    monkeypatch.setenv("RANK", "2")
    assert (distributed.world_size(), distributed.rank(), distributed.shard(7)) == (1, 0, slice(0, 7))
    part = torch.ones(2, requires_grad=True)
    assert distributed.all_gather(part, distributed.shard_sizes(2)) is part
    assert (distributed.all_reduce(0.5), distributed.broadcast_number(3)) == (0.5, 3)
    distributed.all_reduce_gradients([nn.Parameter(torch.ones(2))])
    assert not torch.distributed.is_initialized()


@pytest.mark.parametrize("total", [0, 1, 2, 3, 10, 128])
@pytest.mark.usefixtures("three_ranks")
def test_shards_cover_all_samples_in_order_and_are_as_equal_as_possible(total):
    shards = [distributed.shard(total, rank) for rank in range(3)]
    assert [row for shard in shards for row in range(total)[shard]] == list(range(total))
    sizes = [len(range(total)[shard]) for shard in shards]
    assert max(sizes) - min(sizes) <= 1
    assert distributed.shard_sizes(total) == sizes
    assert distributed.shard(total) == shards[1]


@pytest.mark.usefixtures("three_ranks")
def test_ranks_share_the_cores_unless_the_recipe_gives_threads(monkeypatch):
    assert distributed.world(None, 8) == {"threads": 2, "ranks": 3}
    assert distributed.world(None, 2) == {"threads": 1, "ranks": 3}
    assert distributed.world(4, 8) == {"threads": 4, "ranks": 3}
    monkeypatch.delenv("TORCHELASTIC_RUN_ID")
    assert distributed.world(None, 8) == {"threads": 8, "ranks": 1}


@pytest.mark.usefixtures("three_ranks")
def test_batch_norm_gets_a_warning():
    warning = distributed.batch_norm_warning(lambda: nn.Sequential(nn.Conv2d(1, 2, 3), nn.BatchNorm2d(2)), 96)
    assert warning is not None
    assert warning.startswith("warning: 3 ranks")
    assert "about 32 of the 96" in warning
    assert distributed.batch_norm_warning(lambda: nn.Sequential(nn.Conv2d(1, 2, 3), nn.LayerNorm(2)), 96) is None


def test_a_single_process_gets_no_warning():
    assert distributed.batch_norm_warning(lambda: pytest.fail("it was built without need"), 96) is None


TORCHRUN = {
    "TORCHELASTIC_RUN_ID": "none",
    "RANK": "1",
    "WORLD_SIZE": "3",
    "LOCAL_RANK": "1",
    "LOCAL_WORLD_SIZE": "3",
    "MASTER_ADDR": "127.0.0.1",
    "MASTER_PORT": "29500",
}


def _set_environment(monkeypatch, variables):
    for name in TORCHRUN:
        monkeypatch.delenv(name, raising=False)
    for name, value in variables.items():
        monkeypatch.setenv(name, value)


@pytest.mark.parametrize("variables", [{}, TORCHRUN, {"RANK": "5", "WORLD_SIZE": "x"}])
def test_the_variables_of_torchrun_are_complete_or_absent(monkeypatch, variables):
    _set_environment(monkeypatch, variables)
    distributed.check_environment()


@pytest.mark.parametrize("name", TORCHRUN)
def test_a_missing_variable_of_torchrun_is_the_user_s_mistake(monkeypatch, name):
    _set_environment(monkeypatch, {**{key: value for key, value in TORCHRUN.items() if key != name}, "TORCHELASTIC_MAX_RESTARTS": "0"})
    with pytest.raises(UsageError, match=f"TORCHELASTIC_ are set, but {name} is missing; start edgekd with torchrun"):
        distributed.check_environment()


@pytest.mark.parametrize(
    ("name", "value", "message"),
    [
        ("WORLD_SIZE", "two", "WORLD_SIZE is 'two', not a whole number"),
        ("RANK", "-1", "RANK is '-1', not a whole number"),
        ("MASTER_PORT", "", "MASTER_PORT is '', not a whole number"),
        ("RANK", "3", "RANK is 3 and WORLD_SIZE is 3"),
        ("LOCAL_RANK", "7", "LOCAL_RANK is 7 and LOCAL_WORLD_SIZE is 3"),
        ("LOCAL_WORLD_SIZE", "4", "LOCAL_WORLD_SIZE is 4 and WORLD_SIZE is 3"),
        ("LOCAL_WORLD_SIZE", "0", "LOCAL_RANK is 1 and LOCAL_WORLD_SIZE is 0"),
    ],
)
def test_an_invalid_variable_of_torchrun_is_the_user_s_mistake(monkeypatch, name, value, message):
    _set_environment(monkeypatch, {**TORCHRUN, name: value})
    with pytest.raises(UsageError, match=message):
        distributed.check_environment()
