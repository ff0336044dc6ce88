# SPDX-License-Identifier: Apache-2.0
from __future__ import annotations

import mmap
import os
from dataclasses import replace

import numpy as np
import pytest
import torch
from safetensors import safe_open

from edgekd.errors import RecipeError
from edgekd.kd import losses
from edgekd.kd.soft_targets import storage

DIGESTS = {"teacher": "1" * 64, "augment": "2" * 64, "data": "3" * 64}
DENSE = storage.make_header("train", (2, 50, 7), **DIGESTS)
SAMPLED = storage.make_header("train", (2, 50, 300), slots=16, **DIGESTS)
BOTH = pytest.mark.parametrize("header", [DENSE, SAMPLED], ids=["dense", "sampled"])


def teacher_logits(header, seed=0):
    """Return logits (V, n, C) of a teacher that is confident of some samples and not of others."""
    values = np.random.default_rng(seed).standard_normal((header.views, header.samples, header.classes)).astype(np.float32) * 2
    values[..., 5] += np.linspace(0, 20, header.samples, dtype=np.float32)
    return values


def fill(path, header, logits, chunk=20, stop=None):
    """Fill a file as the stage does: chunk by chunk, each of one view; stop after ``stop`` chunks, as if killed."""
    stored_rows, chunks = storage.begin(path, header), 0
    while stored_rows < header.rows and chunks != stop:
        view, row = divmod(stored_rows, header.samples)
        stored_rows = storage.append(path, header, stored_rows, logits[view, row : row + chunk])
        chunks += 1
    if stored_rows == header.rows:
        storage.finish(path, header, path.with_suffix(".done"))
    return path.with_suffix(".done")


def softmax(values):
    return torch.from_numpy(values).double().softmax(-1).numpy()


def tile(tmp_path, rows, repeats, slots):
    """Return soft targets in which each of a few rows is sampled many times: (repeats * m) rows."""
    header = storage.make_header("train", (1, repeats * len(rows), rows.shape[1]), slots=slots, **DIGESTS)
    return storage.open_expected(fill(tmp_path / "tile", header, np.tile(rows, (repeats, 1))[None], chunk=header.rows), header)


def test_the_number_of_classes_decides_how_soft_targets_are_stored():
    assert storage.make_header("train", (1, 1, 256), **DIGESTS).slots == 0
    assert storage.make_header("train", (1, 1, 257), **DIGESTS).slots == storage.SLOTS
    assert storage.make_header("train", (1, 1, 1000), slots=0, **DIGESTS).item.itemsize == 2000
    assert storage.make_header("train", (1, 1, 1000), **DIGESTS).item.itemsize == 260
    assert storage.make_header("train", (1, 1, 2**16 + 1), **DIGESTS).item["ids"].base == np.uint32
    for slots in (1, 1000, 2000, -1):
        with pytest.raises(ValueError, match="expected 0 or 2 to 999 for 1000 classes"):
            storage.make_header("train", (1, 1, 1000), slots=slots, **DIGESTS)


def test_dense_soft_targets_are_read_back_except_for_rounding(tmp_path):
    logits = teacher_logits(DENSE)
    logits[0, 0] = [1e-5, -1e-5, 0, 65504, -65504, 3e-8, 1000.3]
    targets = storage.open_expected(fill(tmp_path / "a", DENSE, logits), DENSE)
    rows = np.random.default_rng(1).permutation(50)[:30]
    for view in (0, 1):
        values = targets.read(view, rows)
        assert (values.shape, values.dtype) == ((30, 7), np.float32)
        assert (np.abs(values - logits[view, rows]) <= np.abs(logits[view, rows]) / 2048 + 3e-8).all()
    np.testing.assert_array_equal(targets.read(0, [0, 1], 4.0), targets.read(0, range(2)))
    with pytest.raises(ValueError, match="a dense file has no sparse rows"):
        targets.read_sparse(0, [0])
    with pytest.raises(IndexError):
        targets.read(0, [50])


def test_a_sampled_record_has_the_largest_first_and_sums_to_one(tmp_path):
    logits = teacher_logits(SAMPLED)
    targets = storage.open_expected(fill(tmp_path / "a", SAMPLED, logits), SAMPLED)
    for view in (0, 1):
        ids, values = targets.read_sparse(view, range(50))
        records, probabilities = targets.stored(view, range(50)), softmax(logits[view])
        assert (ids.dtype, values.dtype, ids.shape) == (np.int64, np.float32, (50, 16))
        assert (np.diff(np.sort(ids, axis=1)) > 0).all()
        np.testing.assert_array_equal(ids[:, 0], logits[view].argmax(axis=1))
        logs = np.log(np.take_along_axis(probabilities, ids, axis=1))
        assert (np.abs(records["logs"] - logs) <= np.abs(logs) / 2048 + 1e-6).all()
        np.testing.assert_allclose(np.exp(values.astype(np.float64)).sum(axis=1), 1, atol=4e-3)
        assert 8 <= records["exact"].min() < 16
        for row, exact in enumerate(records["exact"].tolist()):
            np.testing.assert_array_equal(ids[row, :exact], np.argsort(-logits[view, row], kind="stable")[:exact])
            np.testing.assert_array_equal(values[row, :exact], records["logs"][row, :exact].astype(np.float32))
            assert np.ptp(values[row, exact:]) == 0
            assert (np.diff(ids[row, exact:]) > 0).all()
        dense = targets.read(view, range(50))
        np.testing.assert_array_equal(np.take_along_axis(dense, ids, axis=1), values)
        assert (np.sort(dense, axis=1)[:, : 300 - 16] == storage.FLOOR).all()


@pytest.mark.parametrize("slots", [5, 16])
def test_the_mean_of_many_samples_is_the_softmax_and_that_of_the_largest_is_not(tmp_path, slots):
    repeats, halves = 4000, np.arange(300, dtype=np.float32) * -np.log(np.float32(2))  # each as likely as all after it
    rows = np.stack([*teacher_logits(SAMPLED)[0, [0, 20]], halves])
    targets, expected = tile(tmp_path, rows, repeats, slots), softmax(rows)
    estimates = softmax(targets.read(0, range(3 * repeats))).reshape(repeats, 3, 300)
    assert slots // 2 < targets.stored(0, [2])["exact"] >= slots - 2
    error = np.abs(estimates.mean(axis=0) - expected)
    standard_error = np.sqrt(expected * estimates.max(axis=(0, 2))[:, None] / repeats)  # of a draw with weight w: at most sqrt(p w / n)
    assert (error <= 5 * standard_error + 0.004 * expected).all()
    top = np.where(expected >= np.sort(expected, axis=1)[:, [-slots]], expected, 0)
    bias = np.abs(top / top.sum(axis=1, keepdims=True) - expected).sum(axis=1)
    assert (error.sum(axis=1)[:2] < bias[:2] / 5).all()
    assert bias[0] > 0.5


@pytest.mark.parametrize("temperature", [1.0, 2.0, 0.5])
def test_the_mass_at_another_temperature_is_estimated_without_bias_before_it_is_normalized(tmp_path, temperature):
    rows, repeats = teacher_logits(SAMPLED)[0, [0, 20, 49]], 4000
    targets = tile(tmp_path, rows, repeats, 32)
    mass = np.exp(targets.read(0, range(3 * repeats), temperature).astype(np.float64) / temperature).sum(axis=1).reshape(repeats, 3)
    expected = (softmax(rows) ** (1 / temperature)).sum(axis=1)
    assert (np.abs(mass.mean(axis=0) - expected) <= 5 * mass.std(axis=0) / np.sqrt(repeats) + 0.004 * expected).all()


def test_equal_and_extreme_logits_have_records_too(tmp_path):
    header = replace(SAMPLED, views=1, samples=4)
    logits = np.zeros((1, 4, 300), dtype=np.float32)
    logits[0, 1, 7] = 3e38  # a softmax rounds its probability to 1
    logits[0, 2, :200] = -1e5
    logits[0, 3, 3:5] = 800
    targets = storage.open_expected(fill(tmp_path / "a", header, logits), header, lambda view, rows: logits[view, rows])
    ids, values = targets.read_sparse(0, range(4))
    np.testing.assert_allclose(values[0, :8], np.log(1 / 300), rtol=1 / 2048)
    np.testing.assert_allclose(values[0, 8:], np.log(292 / 300 / 8), rtol=1 / 2048)  # 8 draws stand for the others
    np.testing.assert_allclose(np.exp(values.astype(np.float64)).sum(axis=1), 1, atol=4e-3)
    assert (ids[1, 0], values[1].tolist()) == (7, [0, *[storage.FLOOR] * 15])
    assert (ids[2] >= 200).all()
    np.testing.assert_allclose(values[3, :2], np.log(0.5), atol=4e-4)


def test_the_losses_accept_sampled_soft_targets(tmp_path):
    targets = storage.open_expected(fill(tmp_path / "a", SAMPLED, teacher_logits(SAMPLED)), SAMPLED)
    student, labels = torch.from_numpy(teacher_logits(SAMPLED, seed=1)[0]).requires_grad_(), torch.arange(50)
    for temperature in (1.0, 4.0, 100.0):
        teacher = torch.from_numpy(targets.read(0, range(50), temperature))
        for loss in (losses.kl(student, teacher, temperature), losses.dkd(student, teacher, labels, temperature, 1.0, 2.0)):
            assert 0 < loss.item() < 1e5
            assert torch.autograd.grad(loss, student)[0].isfinite().all()
    ids, values = map(torch.from_numpy, targets.read_sparse(0, range(50)))
    sparse = (values.exp() * (values - student.log_softmax(1).gather(1, ids))).sum() / 50
    torch.testing.assert_close(losses.kl(student, torch.from_numpy(targets.read(0, range(50))), 1.0), sparse, rtol=1e-2, atol=1e-2)


@BOTH
def test_the_file_is_one_that_safetensors_reads(tmp_path, header):
    logits = teacher_logits(header)
    path = fill(tmp_path / "a", header, logits)
    with safe_open(path, "numpy") as file:
        assert file.metadata() == header.metadata()
        (name,) = file.keys()
        tensor = file.get_tensor(name)
    assert (name, header.metadata()["kind"]) == (("records", "sampled") if header.slots else ("logits", "dense"))
    rows = tensor.view(header.item)[..., 0] if header.slots else tensor
    np.testing.assert_array_equal(rows[1], storage.open_expected(path, header).stored(1, range(50)))
    assert [item.name for item in tmp_path.iterdir()] == ["a.done"]


@BOTH
@pytest.mark.parametrize("chunk", [1, 7, 50])
def test_the_bytes_do_not_depend_on_the_chunks(tmp_path, header, chunk):
    logits = teacher_logits(header)
    assert fill(tmp_path / "a", header, logits).read_bytes() == fill(tmp_path / "b", header, logits, chunk).read_bytes()


def test_a_draw_depends_on_split_view_and_row(tmp_path):
    header = storage.make_header("train", (2, 5000, 20), slots=4, **DIGESTS)  # more rows than draw from one generator
    logits = np.broadcast_to(teacher_logits(header)[0, 0], (2, 5000, 20))
    path = fill(tmp_path / "a", header, logits, 5000)
    assert fill(tmp_path / "b", header, logits, 4095).read_bytes() == path.read_bytes()
    ids, _ = storage.open_expected(path, header).read_sparse(0, range(5000))
    of_other_view, _ = storage.open_expected(path, header).read_sparse(1, range(5000))
    other_header = replace(header, split="unlabelled")
    other_split = storage.open_expected(fill(tmp_path / "c", other_header, logits, 5000), other_header)
    of_other_split, _ = other_split.read_sparse(0, range(5000))
    for other in (of_other_view, of_other_split, np.roll(ids, 1, axis=0), np.roll(ids, 4096, axis=0)):
        assert (ids != other).any(axis=1).mean() > 0.5


@BOTH
@pytest.mark.parametrize("stop", [0, 1, 3])
def test_a_run_that_was_killed_resumes_and_ends_with_the_same_bytes(tmp_path, header, stop):
    logits, path = teacher_logits(header), tmp_path / "b"
    expected = fill(tmp_path / "a", header, logits).read_bytes()
    fill(path, header, logits, stop=stop)
    assert storage.begin(path, header) == [0, 20, 40, 50][stop]
    with path.open("r+b") as file:  # a chunk that was being written
        file.seek(len(expected) - header.item.itemsize * (header.rows - 50))
        file.write(b"torn")
    assert fill(path, header, logits).read_bytes() == expected


@BOTH
@pytest.mark.parametrize("damage", ["torn journal", "no journal", "no file", "cut file", "torn header", "another teacher"])
def test_a_file_that_is_not_known_to_be_undamaged_is_written_again(tmp_path, header, damage):
    logits, path = teacher_logits(header), tmp_path / "b"
    expected = fill(tmp_path / "a", header, logits).read_bytes()
    fill(path, replace(header, teacher="4" * 64) if damage == "another teacher" else header, logits, stop=2)
    journal = tmp_path / "b.journal"
    if damage == "torn journal":
        journal.write_bytes(journal.read_bytes()[:-1])
    elif damage == "torn header":
        path.write_bytes(b"\0" * 8 + path.read_bytes()[8:])
    elif damage == "cut file":
        path.write_bytes(path.read_bytes()[:-1])
    elif damage.startswith("no "):
        (path if damage == "no file" else journal).unlink()
    assert storage.begin(path, header) == 0
    assert fill(path, header, logits).read_bytes() == expected


@BOTH
def test_only_a_complete_file_is_finished_and_a_chunk_is_of_one_view(tmp_path, header):
    path, logits = tmp_path / "a", teacher_logits(header)
    fill(path, header, logits, stop=2)
    with pytest.raises(ValueError, match="a: 40 of 100 rows are stored"):
        storage.finish(path, header, tmp_path / "b")
    for wrong in (logits[0, :11], logits[0, :5, 1:]):
        with pytest.raises(ValueError, match="after row 40 of view 0; expected rows of one view"):
            storage.append(path, header, 40, wrong)


@pytest.mark.parametrize("shape", [(1, 0, 7), (3, 0, 300)])
def test_a_split_without_samples_has_a_file_too(tmp_path, shape):
    header = storage.make_header("unlabelled", shape, **DIGESTS)
    path = fill(tmp_path / "a", header, teacher_logits(header))
    targets = storage.open_expected(path, header, lambda *_: pytest.fail("no row to check"))
    assert targets.read(0, []).shape == (0, shape[2])


@BOTH
def test_other_soft_targets_are_refused_with_their_differences(tmp_path, header):
    path = fill(tmp_path / "a", header, teacher_logits(header))
    changes = [
        ("teacher", "4" * 64, "teacher 111111111111, expected 444444444444"),
        ("augment", "4" * 64, "augment 222222222222, expected 444444444444"),
        ("data", "4" * 64, "data 333333333333, expected 444444444444"),
        ("views", 3, "views 2, expected 3"),
        ("samples", 51, "samples 50, expected 51"),
        ("split", "test", "split train, expected test"),
        ("classes", 9000, f"classes {header.classes}, expected 9000"),
        ("schema", 2, "schema 1, expected 2"),
        ("slots", 3, f"slots {header.slots}, expected 3" + ("" if header.slots else "; kind dense, expected sampled")),
    ]
    for name, value, difference in changes:
        with pytest.raises(RecipeError, match=f"^a.done: holds other soft targets: {difference}; remove it and build again$") as caught:
            storage.open_expected(path, replace(header, **{name: value}))
        assert len(caught.value.problems) == 1
    with pytest.raises(RecipeError, match="samples 50, expected 9; teacher 111111111111, expected 5; remove"):
        storage.open_expected(path, replace(header, samples=9, teacher="5"))


@BOTH
def test_a_damaged_file_is_refused(tmp_path, header):
    path = fill(tmp_path / "a", header, teacher_logits(header))
    expected = path.read_bytes()
    for cut in (expected[:-1], expected + b"\0"):
        path.write_bytes(cut)
        with pytest.raises(RecipeError, match=rf"^a.done: has {len(cut)} bytes, expected {len(expected)}; remove"):
            storage.open_expected(path, header)
    other_type = expected.replace(b"U8" if header.slots else b"F16", b"I8")
    for other in (b"", expected[:20], b"\xff" * 400, b"\2" + b"\0" * 7 + b"[]", b"\4" + b"\0" * 7 + b"[}[}", other_type):
        path.write_bytes(other)
        with pytest.raises(RecipeError, match=r"^a.done: is not a file of soft targets; remove it and build again$"):
            storage.open_expected(path, header)


@BOTH
def test_a_spot_check_recomputes_the_same_few_rows_and_tolerates_rounding(tmp_path, header):
    logits, requests = teacher_logits(header), []
    path = fill(tmp_path / "a", header, logits)

    def recompute(view, rows):
        requests.append((view, rows.tolist()))
        return logits[view, rows] * np.float32(1 + 2e-6)

    for _ in range(2):
        storage.open_expected(path, header, recompute)
    assert requests[:2] == requests[2:]
    assert [(view, len(rows)) for view, rows in requests[:2]] == [(0, storage.SPOT_ROWS), (1, storage.SPOT_ROWS)]


@BOTH
@pytest.mark.parametrize("change", ["another teacher", "rows moved", "a little", "not a number"])
def test_a_spot_check_refuses_logits_that_the_teacher_does_not_return(tmp_path, header, change):
    logits = teacher_logits(header)
    other = {
        "another teacher": teacher_logits(header, seed=1),
        "rows moved": np.roll(logits, 1, axis=1),
        "a little": logits + np.float32(0.1) * np.sign(np.arange(header.classes, dtype=np.float32) % 2 - 0.5),
        "not a number": logits * np.float32("nan"),
    }[change]
    path = fill(tmp_path / "a", header, logits)
    message = r"^a.done: the teacher no longer returns the stored logits: train\[\d+\] in view 0, class \d+: \S+, stored -?\d\S*; remove it"
    with pytest.raises(RecipeError, match=message):
        storage.open_expected(path, header, lambda view, rows: other[view, rows])


@BOTH
@pytest.mark.parametrize("value", [np.nan, np.inf, -np.inf])
def test_a_logit_that_is_not_finite_is_reported_with_its_sample(tmp_path, header, value):
    logits, path = teacher_logits(header), tmp_path / "a"
    logits[0, 23, 3] = value
    with pytest.raises(RecipeError, match=rf"^teacher: its logit for train\[23\] is {value} for class 3; expected finite logits"):
        fill(path, header, logits)
    assert storage.begin(path, header) == 20


def test_a_logit_out_of_the_range_of_float16_is_refused(tmp_path):
    logits = teacher_logits(DENSE)
    logits[1, 30, 2] = -65505
    with pytest.raises(RecipeError, match=r"train\[30\] is -65505.0 for class 2; expected finite logits within 65504, the range of"):
        fill(tmp_path / "a", DENSE, logits)
    logits = teacher_logits(SAMPLED)
    logits[1, 30, 2] = -65505  # a record holds log-probabilities
    fill(tmp_path / "b", SAMPLED, logits)


@BOTH
def test_a_large_file_is_read_without_mapping_it(tmp_path, monkeypatch, header):
    path = fill(tmp_path / "a", header, teacher_logits(header))
    mapped = storage.open_expected(path, header)
    monkeypatch.setattr(storage, "MAPPED_BYTES", 1000)
    monkeypatch.setattr(mmap, "mmap", lambda *_, **__: pytest.fail("mapped"))
    targets = storage.open_expected(path, header, lambda view, rows: teacher_logits(header)[view, rows])
    for view in (0, 1, -1):
        for rows in (np.random.default_rng(0).permutation(50), [3, 3, -1], []):
            np.testing.assert_array_equal(targets.read(view, rows), mapped.read(view, rows))
    for view, row in ((0, 50), (0, -51), (2, 0)):
        for either in (targets, mapped):
            with pytest.raises(IndexError):
                either.read(view, [row])


@BOTH
def test_soft_targets_that_are_released_close_their_file(tmp_path, header):
    file = storage.open_expected(fill(tmp_path / "a", header, teacher_logits(header)), header)._file
    with pytest.raises(OSError, match="Bad file descriptor"):
        os.fstat(file)
