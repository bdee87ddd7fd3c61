"""What the Triton kernels would take of GPUs that are not here, read from their machine code."""

from __future__ import annotations

from dataclasses import replace

import pytest

pytest.importorskip("triton")

from foveate.kernels.neighbor.offline import Resources, launches, meta_problem, resources

HEADS = {"a head each": (32, 32), "seven heads a key head": (28, 4)}


@pytest.mark.slow
@pytest.mark.parametrize("size", [128, 64])
@pytest.mark.parametrize("heads", HEADS.values(), ids=HEADS)
@pytest.mark.parametrize("capability", [80, 90, 100])
def test_every_kernel_compiles_without_faults(capability: int, heads: tuple[int, int], size: int) -> None:
    found = {
        name: resources(launch, capability) for name, launch in launches(meta_problem(*heads, size), capability).items()
    }
    assert set(found) == {"neighbor_forward", "neighbor_dq", "neighbor_dkv", "text_dkv"}
    assert {name: x.faults() for name, x in found.items() if x.faults()} == {}
    # The GPU's own matrix instruction, not an older one that it also has.
    assert all({80: "HMMA", 90: "HGMMA", 100: "UTCHMMA"}[capability] in x.matrix for x in found.values())


@pytest.mark.slow
@pytest.mark.parametrize("radius", [2, 5])
@pytest.mark.parametrize("heads", [(32, 32), (32, 16), (32, 8), (28, 4), (32, 2)])
def test_a_large_radius_and_any_group_fit_too(heads: tuple[int, int], radius: int) -> None:
    launch = launches(meta_problem(*heads, 128, radius=radius), 90)["neighbor_forward"]
    assert resources(launch, 90).faults() == []


def test_each_fault_is_told() -> None:
    good = Resources(
        capability=80, registers=255, spilled=0, shared=163 * 1024, matrix={"HMMA": 1}, copies={"LDGSTS": 1}
    )
    assert good.faults() == []
    bad = Resources(80, registers=256, spilled=8, shared=163 * 1024 + 1, matrix={}, copies={})
    assert bad.faults() == [
        "8 bytes are spilled",
        "256 registers, 255 is the limit",
        "166913 bytes of shared memory, 166912 is the limit",
        "no matrix instruction (HMMA)",
        "no asynchronous copy (LDGSTS, UTMALDG)",
    ]


def test_a_program_too_large_is_found_to_spill() -> None:
    launch = launches(meta_problem(32, 32, 128), 90)["neighbor_forward"]
    found = resources(replace(launch, constants={**launch.constants, "block": 128}), 90)
    assert any("are spilled" in fault for fault in found.faults()), found
