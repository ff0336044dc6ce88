# SPDX-License-Identifier: Apache-2.0
"""Files of weights are read without running any of them, and every other file is refused in one line that says what it is."""

from __future__ import annotations

import argparse
import os
import pickle
import subprocess
import sys
import tarfile
import zipfile

import numpy as np
import pytest
import torch
from safetensors.torch import save_file
from torch import nn

from edgekd.errors import RecipeError
from edgekd.kd.teachers.checkpoints import read_checkpoint


def refusal(path):
    with pytest.raises(RecipeError) as caught:
        read_checkpoint(path)
    (problem,) = caught.value.problems
    assert "\n" not in problem
    return problem


@pytest.mark.parametrize("suffix", ["pt", "pth", "bin", "th", "ckpt", "tar", "pkl"])
@pytest.mark.parametrize("legacy", [False, True])
def test_a_state_dict_saved_by_torch_is_read_whatever_its_name_and_format(tmp_path, suffix, legacy):
    weights = nn.Linear(2, 3).state_dict()
    torch.save(weights, tmp_path / f"w.{suffix}", _use_new_zipfile_serialization=not legacy)
    assert torch.equal(read_checkpoint(tmp_path / f"w.{suffix}")["weight"], weights["weight"])


def test_safetensors_are_read_by_their_content(tmp_path):
    save_file({"weight": torch.ones(2)}, tmp_path / "pytorch_model.bin")
    assert read_checkpoint(tmp_path / "pytorch_model.bin")["weight"].tolist() == [1, 1]


OTHER_FILES = {
    "empty": (b"", "is empty; save the weights again"),
    "a pointer": (b"version https://git-lfs.github.com/spec/v1\noid sha256:4d7a\nsize 12\n", "run: git lfs pull"),
    "a page": (b"\n<!DOCTYPE html><html>404</html>", "is a web page"),
    "compressed": (b"\x1f\x8b\x08\x00" + bytes(50), "gunzip w.pth"),
    "HDF5": (b"\x89HDF\r\n\x1a\n" + bytes(50), "is an HDF5 file"),
    "text": (b"these are no weights", "cannot be read as weights"),
}


@pytest.mark.parametrize("name", OTHER_FILES)
@pytest.mark.parametrize("file", ["w.pth", "w.safetensors"])
def test_another_file_is_named(tmp_path, name, file):
    content, message = OTHER_FILES[name]
    (tmp_path / file).write_bytes(content)
    if name != "text" or file == "w.pth":
        assert message.replace("w.pth", file) in refusal(tmp_path / file)
    else:
        assert "is not a readable safetensors file" in refusal(tmp_path / file)


def test_arrays_and_archives_of_others_are_named(tmp_path):
    with (tmp_path / "w.bin").open("wb") as file:
        np.savez_compressed(file, weight=np.zeros(3))
    assert "is a file of numpy.savez" in refusal(tmp_path / "w.bin")
    with tarfile.open(tmp_path / "w.tar", "w") as archive:
        archive.add(tmp_path / "w.bin", "w.bin")
    assert "is a tar archive; unpack it first: tar -xf w.tar" in refusal(tmp_path / "w.tar")


@pytest.mark.filterwarnings("ignore::DeprecationWarning")
def test_programs_are_named(tmp_path):
    torch.jit.trace(nn.Linear(2, 2), torch.zeros(1, 2)).save(tmp_path / "w.pt")
    assert "is a TorchScript archive, a program; name it teacher.file" in refusal(tmp_path / "w.pt")
    torch.export.save(torch.export.export(nn.Linear(2, 2), (torch.zeros(1, 2),)), tmp_path / "w.pth")
    assert "is a program of torch.export; name it teacher.file" in refusal(tmp_path / "w.pth")


def test_an_archive_that_unpacks_to_gigabytes_is_refused_by_its_declared_sizes(tmp_path):
    torch.save({"weight": torch.zeros(2**23)}, tmp_path / "plain.pt")
    with zipfile.ZipFile(tmp_path / "plain.pt") as plain, zipfile.ZipFile(tmp_path / "w.pt", "w", zipfile.ZIP_DEFLATED) as packed:
        for entry in plain.infolist():
            packed.writestr(entry.filename, plain.read(entry), zipfile.ZIP_DEFLATED)
    assert (tmp_path / "w.pt").stat().st_size < 2**16
    assert "w.pt: unpacks to 32 MiB from 0.0 MiB" in refusal(tmp_path / "w.pt")


def test_a_header_of_safetensors_that_declares_too_much_is_refused(tmp_path):
    header = b'{"weight":{"dtype":"F32","shape":[1099511627776,1099511627776],"data_offsets":[0,8]}}'
    (tmp_path / "w.safetensors").write_bytes(len(header).to_bytes(8, "little") + header + bytes(8))
    assert "is not a readable safetensors file" in refusal(tmp_path / "w.safetensors")


def test_a_checkpoint_with_objects_is_refused_with_the_line_that_mends_it(tmp_path):
    torch.save({"state_dict": nn.Linear(2, 2).state_dict(), "hyper_parameters": argparse.Namespace(a=1)}, tmp_path / "last.ckpt")
    problem = refusal(tmp_path / "last.ckpt")
    assert "last.ckpt: holds more than tensors (argparse.Namespace) and would run code when it is loaded" in problem
    line = problem.rpartition("save only the weights: ")[2]
    subprocess.run([sys.executable, "-c", line], cwd=tmp_path, check=True)
    assert set(read_checkpoint(tmp_path / "teacher.pth")) == {"weight", "bias"}


def test_a_pickled_module_is_refused(tmp_path):
    torch.save(nn.Linear(2, 2), tmp_path / "w.pt")
    assert "holds more than tensors (torch.nn.modules.linear.Linear) and would run code" in refusal(tmp_path / "w.pt")


def test_a_list_is_refused(tmp_path):
    torch.save([torch.zeros(1)], tmp_path / "w.pt")
    assert "holds list; expected a state dict" in refusal(tmp_path / "w.pt")


class Payload:
    def __init__(self, marker):
        self.marker = marker

    def __reduce__(self):
        return os.mkdir, (str(self.marker),)


@pytest.mark.parametrize("name", ["w.pt", "w.bin", "w.safetensors"])
@pytest.mark.parametrize("writer", ["torch", "pickle"])
def test_a_pickle_with_a_payload_is_refused_and_never_run(tmp_path, name, writer):
    marker, path = tmp_path / "ran", tmp_path / name
    content = {"weight": torch.zeros(2), "evil": Payload(marker)}
    if writer == "torch":
        torch.save(content, path)
    else:
        path.write_bytes(pickle.dumps(content))
    with pytest.raises(RecipeError) as caught:
        read_checkpoint(path)
    assert len(caught.value.problems) == 1
    assert "\n" not in str(caught.value)
    assert name in str(caught.value)
    assert not marker.exists()
    stored = path.read_bytes()
    assert b"mkdir" in stored  # the call is in the file,
    assert str(marker).encode() in stored
    function, arguments = content["evil"].__reduce__()
    function(*arguments)
    assert marker.exists()  # and running it would have been detected


@pytest.mark.parametrize("name", ["w.pt", "w.safetensors"])
@pytest.mark.parametrize("content", [b"", b"no weights at all", b"PK\x03\x04 half a zip", bytes(range(256)) * 8])
def test_damaged_weights_are_refused_in_one_line(tmp_path, name, content):
    (tmp_path / name).write_bytes(content)
    with pytest.raises(RecipeError, match=name) as caught:
        read_checkpoint(tmp_path / name)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("name", ["w.pt", "w.safetensors"])
def test_truncated_weights_are_refused(tmp_path, name):
    weights = nn.Linear(20, 30).state_dict()
    torch.save(weights, tmp_path / "w.pt")
    save_file(weights, tmp_path / "w.safetensors")
    content = (tmp_path / name).read_bytes()
    for share in (0.3, 0.7, 0.99):
        (tmp_path / name).write_bytes(content[: int(share * len(content))])
        with pytest.raises(RecipeError, match=name):
            read_checkpoint(tmp_path / name)
