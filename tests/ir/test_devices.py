"""Devices as data: what ships, a user's own file, and files that are wrong."""

from __future__ import annotations

from pathlib import Path

import pytest

from foveate.errors import InputError
from foveate.ir.cost.devices import BITS, Device, device_of, devices

OWN = "mine: {flops_per_s: {float32: 2.0e+12}, bytes_per_s: 1.0e+11}\n"


def test_the_devices_that_ship() -> None:
    assert set(devices()) >= {"a100", "h100", "h200", "l4", "rtx-4090", "jetson-thor", "cpu"}
    for device in devices().values():
        assert device.about
        assert all(device.rate(dtype) > 0 for dtype in BITS)
        assert device.rate("bfloat16") >= device.rate("float32")


def test_a_format_without_a_rate_runs_at_the_next_wider_one() -> None:
    device = Device("d", {"float32": 1.0, "float16": 2.0}, 1.0)
    assert [device.rate(d) for d in ("float64", "float32", "bfloat16", "float8", "int8", "int4")] == [2, 1, 2, 2, 2, 2]


def test_a_file_of_ones_own(tmp_path: Path) -> None:
    path = tmp_path / "mine.yaml"
    path.write_text(OWN)
    assert device_of(str(path)) == Device("mine", {"float32": 2e12}, 1e11)


def test_exponents_as_everyone_writes_them(tmp_path: Path) -> None:
    path = tmp_path / "mine.yaml"
    path.write_text(OWN.replace("2.0e+12", "2e12").replace("1.0e+11", "1e11"))
    assert device_of(str(path)) == Device("mine", {"float32": 2e12}, 1e11)


def test_a_device_is_written_as_it_is_read(tmp_path: Path) -> None:
    device = Device("this CPU, 2 threads", {"float32": 1.5e11}, 2e10, 8e9, 3e-6, 0.5, True, "measured")
    path = tmp_path / "d.yml"
    path.write_text(device.to_yaml())
    assert device_of(str(path)) == device


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("{", "is not YAML"),
        ("[1]", "must be a mapping from a device's name"),
        ("", "must be a mapping from a device's name"),
        ("a: 3", "a: must be a mapping with flops_per_s"),
        (OWN + OWN.replace("mine", "other"), "must hold one device, it holds 2"),
        ("a: {flops_per_s: {float32: fast}, bytes_per_s: 1.0e+9}", "of at least 1, it is 'fast'"),
        ("a: {flops_per_s: {float33: 1.0e+12}, bytes_per_s: 1.0e+9}", "must map number formats"),
        ("a: {flops_per_s: {}, bytes_per_s: 1.0e+9}", "must map number formats"),
        ("a: {flops_per_s: {float32: 1.0e+12}}", "bytes_per_s must be a number of at least 1, it is None"),
        ("a: {flops_per_s: {float32: 1.0e+12}, bytes_per_s: .inf}", "bytes_per_s must be a number"),
        ("a: {flops_per_s: {float32: 1.0e+12}, bytes_per_s: .nan}", "bytes_per_s must be a number"),
        ("a: {flops_per_s: {float32: 1.0e+12}, bytes_per_s: true}", "bytes_per_s must be a number"),
        ("a: {flops_per_s: {float32: 1.0e+12}, bytes_per_s: 10, speed: 3}", "'speed' is not one of"),
        ("a: {flops_per_s: {float32: 1.0e+12}, bytes_per_s: 10, fused: 3}", "fused must be true or false"),
        ("a: !!python/object/apply:os.system ['true']", "is not YAML"),
    ],
)
def test_files_that_are_wrong(tmp_path: Path, text: str, said: str) -> None:
    path = tmp_path / "d.yaml"
    path.write_text(text)
    with pytest.raises(InputError, match=said) as caught:
        device_of(str(path))
    assert "d.yaml" in str(caught.value)


def test_a_file_that_is_not_there(tmp_path: Path) -> None:
    with pytest.raises(InputError, match=r"nothing\.yaml cannot be read: No such file"):
        device_of(str(tmp_path / "nothing.yaml"))


def test_an_unknown_name_lists_the_known_ones() -> None:
    with pytest.raises(InputError, match="'h300' is not known; there are: a100, h100, h200"):
        device_of("h300")
