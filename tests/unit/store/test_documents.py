# SPDX-License-Identifier: Apache-2.0
from __future__ import annotations

import json
import os

import pytest

from edgekd.store import documents

SEALED = documents.seal({"outcome": "FAIL", "numbers": [1, 2.5, None], "text": "\u00e9"})


def test_a_sealed_document_is_read_back_however_it_is_formatted():
    assert documents.is_sealed(SEALED)
    assert documents.parse_mapping(json.dumps(SEALED, indent=3).encode()) == SEALED
    assert documents.seal(SEALED) == SEALED


@pytest.mark.parametrize(
    "change",
    [{"outcome": "PASS"}, {"numbers": [1, 2, None]}, {"more": 1}, {"self": None}, {"self": "0" * 64}, {"text": float("nan")}],
)
def test_a_changed_document_is_not_sealed(change):
    assert not documents.is_sealed({**SEALED, **change})


@pytest.mark.parametrize("name", SEALED)
def test_a_document_without_a_part_is_not_sealed(name):
    assert not documents.is_sealed({key: value for key, value in SEALED.items() if key != name})


@pytest.mark.parametrize(
    "content",
    [
        b"",
        b"{",
        b"[1]",
        b"1",
        b"\xff\xfe",
        b"{}\0",
        b"[" * 200_000,
        b'{"a":' * 200_000,
        b'{"a": ' + b"9" * 10_000 + b"}",
        "\ud800".encode("utf-8", "surrogatepass"),
    ],
    ids=range(10),
)
def test_content_that_is_not_a_json_object_is_none(content):
    assert documents.parse_mapping(content) is None


def test_only_regular_files_are_read(tmp_path):
    os.mkfifo(tmp_path / "pipe")
    (tmp_path / "folder").mkdir()
    (tmp_path / "loop").symlink_to("loop")
    (tmp_path / "dangling").symlink_to("nowhere")
    (tmp_path / "endless").symlink_to("/dev/zero")
    for name in ("pipe", "folder", "loop", "dangling", "endless", "none", "x" * 5000):
        with pytest.raises(OSError, match=r".+"):
            documents.read_file(tmp_path / name)
        assert documents.read(tmp_path / name) is None


def test_a_huge_file_is_not_read(tmp_path, monkeypatch):
    monkeypatch.setattr(documents, "MAX_BYTES", 3)
    (tmp_path / "file").write_bytes(b"1234")
    with pytest.raises(OSError, match="File too large"):
        documents.read_file(tmp_path / "file")


def test_documents_are_json_without_nan():
    assert json.loads(documents.as_json({"a": [1, None]})) == {"a": [1, None]}
    with pytest.raises(ValueError, match="JSON"):
        documents.as_json({"a": float("nan")})
