# SPDX-License-Identifier: Apache-2.0
import pytest
import torch
from torch import nn

from edgekd.kd.training import distributed


@pytest.fixture
def three(monkeypatch):
    """Stand for the second of three ranks, all on this machine."""
    for name, value in {"TORCHELASTIC_RUN_ID": "x", "WORLD_SIZE": "3", "LOCAL_WORLD_SIZE": "3", "RANK": "1"}.items():
        monkeypatch.setenv(name, value)


def test_a_process_that_torchrun_did_not_start_is_alone(monkeypatch):
    monkeypatch.setenv("WORLD_SIZE", "4")  # as other launchers set it too
    monkeypatch.setenv("RANK", "2")
    assert (distributed.world_size(), distributed.rank(), distributed.shard(7)) == (1, 0, slice(0, 7))
    part = torch.ones(2, requires_grad=True)
    assert distributed.all_gather(part, distributed.shard_sizes(2)) is part
    assert (distributed.all_reduce(0.5), distributed.broadcast_number(3)) == (0.5, 3)
    distributed.all_reduce_gradients([nn.Parameter(torch.ones(2))])
    assert not torch.distributed.is_initialized()


@pytest.mark.parametrize("total", [0, 1, 2, 3, 10, 128])
@pytest.mark.usefixtures("three")
def test_shares_are_all_there_is_in_order_and_as_equal_as_can_be(total):
    cuts = [distributed.shard(total, rank) for rank in range(3)]
    assert [row for cut in cuts for row in range(total)[cut]] == list(range(total))
    sizes = [len(range(total)[cut]) for cut in cuts]
    assert max(sizes) - min(sizes) <= 1
    assert distributed.shard_sizes(total) == sizes
    assert distributed.shard(total) == cuts[1]


@pytest.mark.usefixtures("three")
def test_the_cores_are_shared_unless_threads_are_given(monkeypatch):
    assert distributed.world(None, 8) == {"threads": 2, "ranks": 3}
    assert distributed.world(None, 2) == {"threads": 1, "ranks": 3}
    assert distributed.world(4, 8) == {"threads": 4, "ranks": 3}
    monkeypatch.delenv("TORCHELASTIC_RUN_ID")
    assert distributed.world(None, 8) == {"threads": 8}  # the key of a build that is not shared says nothing of ranks


@pytest.mark.usefixtures("three")
def test_batch_norm_is_warned_of():
    told = distributed.batch_norm_warning(lambda: nn.Sequential(nn.Conv2d(1, 2, 3), nn.BatchNorm2d(2)), 96)
    assert told is not None
    assert told.startswith("warning: 3 ranks")
    assert "about 32 of the 96" in told
    assert distributed.batch_norm_warning(lambda: nn.Sequential(nn.Conv2d(1, 2, 3), nn.LayerNorm(2)), 96) is None


def test_one_process_is_not_warned_of():
    assert distributed.batch_norm_warning(lambda: pytest.fail("it was built for nothing"), 96) is None
