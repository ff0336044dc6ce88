# SPDX-License-Identifier: Apache-2.0
"""Which device measures which target, on scripted connections."""

from __future__ import annotations

from contextlib import contextmanager
from types import SimpleNamespace

import pytest

from edgekd import config, registry
from edgekd.build import devices
from edgekd.domain.device import ChosenDevice, DeviceSpec
from edgekd.errors import UnavailableError, UsageError

PI4 = {
    "arch": "aarch64", "cpu_model": "Raspberry Pi 4", "core": "cortex-a72", "features": ["asimd"], "instruction_set": "aarch64", "cores": 4,
}  # fmt: skip
PI5 = {**PI4, "cpu_model": "Raspberry Pi 5", "core": "cortex-a76", "features": ["asimd", "asimddp", "asimdhp"]}
SERVER = {**PI4, "arch": "x86_64", "features": ["avx2", "fma"]}
INSTALLED = {"ai-edge-litert": "2.3.0", "onnxruntime": "1.32.0"}


class Board:
    kind = "ssh"

    def __init__(self, label, facts, versions=INSTALLED):
        self.label, self._facts, self._versions = label, facts, versions

    def facts(self):
        return self._facts

    def versions(self, packages):
        return {package: self._versions.get(package) for package in packages}


@pytest.fixture
def choose(monkeypatch):
    """Return a function that chooses among boards for targets, and returns the choice by label, and the log."""

    def run(boards, *names, runtimes=("litert", "onnxruntime")):
        @contextmanager
        def connect(spec):
            yield boards[spec.address]

        monkeypatch.setattr(registry, "device", lambda kind: SimpleNamespace(connect=connect))
        targets = [config.load_target(name) for name in names]
        candidates = {target.name: [SimpleNamespace(runtime=runtime) for runtime in runtimes] for target in targets}
        lines = []
        plan = SimpleNamespace(targets=targets, candidates=candidates)
        chosen = devices.choose(plan, [DeviceSpec("ssh", address) for address in boards], lines.append)
        return {name: device.spec.address for name, device in chosen.items()}, lines

    return run


def test_a_device_measures_the_target_that_it_fits_and_others_are_as_without_it(choose):
    chosen, lines = choose({"a": Board("a", PI4)}, "rpi4", "rpi5", "host")
    assert chosen == {"rpi4": "a"}
    assert "target rpi4: is measured on ssh:a" in lines
    for name in ("rpi5", "host"):
        assert f"target {name}: no device that was named fits it; it is built as without --device" in lines


def test_each_target_gets_its_device(choose):
    chosen, _ = choose({"a": Board("a", PI5), "b": Board("b", PI4), "c": Board("c", SERVER)}, "rpi4", "rpi5", "x86-64-v3")
    assert chosen == {"rpi4": "b", "rpi5": "a", "x86-64-v3": "c"}


def test_nothing_is_logged_without_a_device(choose):
    assert choose({}, "rpi4") == ({}, [])


def test_two_devices_of_one_target_are_refused(choose):
    with pytest.raises(UsageError, match="target rpi4: ssh:a and ssh:b both fit it; expected one --device for it"):
        choose({"a": Board("a", PI4), "b": Board("b", PI4)}, "rpi4")


def test_a_target_that_is_not_reached_by_the_kind_is_a_mistake_of_usage(choose):
    with pytest.raises(
        UsageError, match=r"device a: host is reached by local; expected --target with a profile whose device.kinds has ssh"
    ):
        choose({"a": Board("a", PI4)}, "host")


@pytest.mark.parametrize(
    ("facts", "target", "difference"),
    [
        (SERVER, "rpi4", "rpi4 is aarch64, a is x86_64"),
        (PI5, "rpi4", "a has asimddp, which rpi4 lacks, so other kernels would run"),
        (PI4, "rpi5", "a lacks asimddp, asimdhp, which rpi5 has"),
        (
            {**SERVER, "features": ["avx2", "avx512f"]},
            "x86-64-v3",
            "a lacks fma, which x86-64-v3 has; a has avx512f, which x86-64-v3 lacks",
        ),
    ],
)
def test_a_device_that_is_not_what_the_profile_says_is_refused_with_the_differences(choose, facts, target, difference):
    with pytest.raises(UnavailableError, match=f"^device a: is not what the profile says: {difference}"):
        choose({"a": Board("a", facts)}, target)


def test_a_runtime_that_is_missing_on_the_device_is_reported_before_training(choose):
    board = Board("a", PI4, {"onnxruntime": "1.32.0"})
    with pytest.raises(UnavailableError, match=r"^device a: its Python has no ai-edge-litert or tflite-runtime; run there: python3 -m pip"):
        choose({"a": board}, "rpi4")
    assert choose({"a": board}, "rpi4", runtimes=("onnxruntime",))[0] == {"rpi4": "a"}
    assert choose({"a": Board("a", PI4, {"tflite-runtime": "2.14.0"})}, "rpi4", runtimes=("litert",))[0] == {"rpi4": "a"}


def test_a_device_that_another_took_the_place_of_is_refused():
    device = ChosenDevice(DeviceSpec("ssh", "a"), PI4, {})
    devices.check_unchanged(device, Board("a", {**PI4, "load": 3.0}))
    with pytest.raises(
        UnavailableError, match=r"is not the machine .*\(cpu_model Raspberry Pi 4 -> Raspberry Pi 5, core cortex-a72 -> cort"
    ):
        devices.check_unchanged(device, Board("a", PI5))
    with pytest.raises(UnavailableError, match="its CPU features changed"):
        devices.check_unchanged(device, Board("a", {**PI4, "features": []}))
