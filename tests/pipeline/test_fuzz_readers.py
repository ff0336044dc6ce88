# SPDX-License-Identifier: Apache-2.0
"""Mutated files: each reader reads them or refuses them with a message; nothing else is raised, and the process lives on."""

from __future__ import annotations

import io
import random
import re
from functools import partial
from pathlib import Path

import numpy as np
import pytest

from edgekd import config
from edgekd.domain.recipe import EntryPoint
from edgekd.errors import EdgekdError
from tests import stripes

ROOT = Path(__file__).parents[2]
FEW, MANY = 40, 2500
TOKENS = (
    *(b"nan", b"inf", b"-1", b"0", b"1e999", b"9" * 30, b"9" * 5000, b"''", b'""', b"[]", b"{}", b"[[", b"true", b"2020-01-01"),
    *(b"\x00", b"\xff", b"\xef\xbb\xbf", b"\n", b"\r", b"=", b'"', b"'''", b"#", b"\\u001b", b"\\ud800", b"native", b"auto"),
    *(b"a" * 3000, b"0x" + b"f" * 40, b"data.py:splits", b"..", b"/", b"[" * 200, b"epochs = ", b"\xff" * 8, b"\x7f" * 8, bytes(64)),
)


def mutate(content, generator):
    """Return bytes with one to four changes: flipped, removed, repeated or inserted ones, a swapped line, another value, a cut."""
    changed = bytearray(content)
    for _ in range(generator.randint(1, 4)):
        kind, start = generator.randrange(8), generator.randrange(len(changed) + 1)
        stop = min(len(changed), start + generator.randint(1, 12))
        if kind == 0 and changed:
            changed[start % len(changed)] ^= 1 << generator.randrange(8)
        elif kind == 1:
            del changed[start:stop]
        elif kind == 2:
            changed[start:start] = generator.choice(TOKENS)
        elif kind == 3:
            changed[start:stop] = generator.choice(TOKENS)
        elif kind == 4:
            changed[start:start] = changed[start:stop]
        elif kind == 5 and generator.random() < 0.3:
            del changed[start:]
        elif kind == 6:
            lines = bytes(changed).split(b"\n")
            lines.insert(generator.randrange(len(lines) + 1), generator.choice(lines))
            changed = bytearray(b"\n".join(lines))
        elif values := list(re.finditer(rb"= *([^\n,}\]]+)", bytes(changed))):
            value = generator.choice(values)
            changed[value.start(1) : value.end(1)] = generator.choice(TOKENS)
    return bytes(changed)


def _recipes(folder):
    stripes.write(folder)
    seeds = [path.read_bytes() for path in sorted((ROOT / "examples").glob("*/edgekd.toml"))]
    return [stripes.RECIPE.encode(), *seeds], "edgekd.toml", config.load_recipe


def _targets(folder):
    folder.mkdir()
    seeds = [path.read_bytes() for path in sorted((ROOT / "targets").glob("*.toml"))]
    return [stripes.PROFILE.encode(), *seeds], "target.toml", lambda path: config.load_target(str(path))


def _weights(folder, suffix):
    import torch
    from safetensors.torch import save

    from edgekd.kd.teachers.weights import load_user_weights

    folder.mkdir()
    weights = {name: value.contiguous() for name, value in stripes.teacher_weights().items()}
    archives = [io.BytesIO(), io.BytesIO()]
    torch.save(weights, archives[0])
    torch.save({"state_dict": {f"module.{name}": value for name, value in weights.items()}, "epoch": 3}, archives[1])
    seeds = [save(weights)] if suffix == ".safetensors" else [archive.getvalue() for archive in archives]

    def load(path):
        module = torch.nn.Sequential(torch.nn.Flatten(), torch.nn.Linear(64, 3))
        load_user_weights(module, path, EntryPoint("models.py", "teacher"))

    return seeds, f"teacher{suffix}", load


def _stored_logits(folder):
    from edgekd.kd.teachers import stored

    folder.mkdir()
    inputs = [np.random.default_rng(0).normal(size=(8, 4)).astype(np.float32)]
    stored.save_teacher_logits(folder / "seed.safetensors", inputs, np.zeros((8, 3), np.float32))
    return [(folder / "seed.safetensors").read_bytes()], "logits.safetensors", stored.teacher_from_stored_logits


READERS = {
    "recipes": _recipes,
    "target profiles": _targets,
    "weights of torch": partial(_weights, suffix=".pt"),
    "weights of safetensors": partial(_weights, suffix=".safetensors"),
    "stored logits": _stored_logits,
}


def _check(reader, count, folder):
    seeds, name, read = READERS[reader](folder)
    generator = random.Random(count)
    path = folder / name
    refusals = []
    for _ in range(count):
        content = mutate(generator.choice(seeds), generator)
        path.write_bytes(content)
        try:
            read(path)
        except EdgekdError as error:
            refusals.append(error)
        except Exception as error:
            raise AssertionError(f"{type(error).__name__} for {content[:4000]!r}") from error
    assert len(refusals) > count // 10
    assert {error.exit_code for error in refusals} <= {2, 5}
    assert not any("Traceback" in str(error) for error in refusals)


@pytest.mark.parametrize("reader", READERS)
def test_a_few_mutated_files_are_read_or_refused(reader, tmp_path):
    _check(reader, FEW, tmp_path / "files")


@pytest.mark.long
@pytest.mark.parametrize("reader", READERS)
def test_many_mutated_files_are_read_or_refused(reader, tmp_path):
    _check(reader, MANY, tmp_path / "files")
