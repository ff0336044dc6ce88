# SPDX-License-Identifier: Apache-2.0
"""Damaged and edited versions of JSON files: bytes flipped, cut, inserted; values replaced, removed, added."""

from __future__ import annotations

import copy
import json

VALUES = (
    *(
        None,
        True,
        False,
        0,
        -1,
        1,
        10**400,
        1e308,
        float("nan"),
        float("inf"),
        "",
        "x",
        "PASS",
        "FAIL",
        "..",
        "/etc/passwd",
        "\0",
        "\ud800",
    ),
    *([], {}, [[]], {"a": {}}),
)
WRAPPERS = (
    lambda content: b"",
    lambda content: b"\xef\xbb\xbf" + content,
    lambda content: content.decode().encode("utf-16"),
    lambda content: content + content,
    lambda content: content + b"\0",
    lambda content: b"[" * 100_000 + content,
    lambda content: b'{"a":' * 100_000 + content + b"}" * 100_000,
    lambda content: content.replace(b"PASS", b"FAIL"),
    lambda content: content.replace(b"FAIL", b"PASS"),
    lambda content: content.replace(b": 1", b": 1" + b"0" * 5000),
    lambda content: content.replace(b'"schema": 1', b'"schema": 1, "schema": 2'),
)


def mutate(content, random):
    """Return a mutation of a JSON file; the same for the same state of ``random``."""
    kind = random.choice(("bytes", "bytes", "value", "value", "value", "wrapper"))
    if kind == "wrapper":
        return random.choice(WRAPPERS)(content)
    if kind == "value":
        return _mutate_value(json.loads(content), random)
    position = random.randrange(len(content))
    end = position + random.randrange(1, 50)
    return random.choice(
        (
            content[:position] + bytes([content[position] ^ (1 << random.randrange(8))]) + content[position + 1 :],
            content[:position],
            content[:position] + content[end:],
            content[:position] + random.randbytes(3) + content[position:],
            content[:end] + content[position:],
        )
    )


def _mutate_value(document, random):
    document = copy.deepcopy(document)
    places = list(_places(document))
    parent, key = random.choice(places)
    action = random.choice(("replace", "replace", "remove", "add", "swap"))
    if action == "remove":
        del parent[key]
    elif action == "add" and isinstance(parent, dict):
        parent["added"] = random.choice(VALUES)
    elif action == "swap":
        other_parent, other_key = random.choice(places)
        parent[key] = copy.deepcopy(other_parent[other_key])
    else:
        parent[key] = random.choice(VALUES)
    return json.dumps(document).encode()


def _places(value):
    """Yield each place in a document: the object or array, and the key or index."""
    items = list(value.items()) if isinstance(value, dict) else list(enumerate(value)) if isinstance(value, list) else []
    for key, item in items:
        yield value, key
        yield from _places(item)
