"""Meshes, and which process reads which rows of a batch."""

import types

import jax
import numpy as np
import pytest

from blip3o_jax import sharding
from blip3o_jax.errors import UserError


def spread(processes, **sizes):
    """Stands for a mesh whose devices belong to these processes, in order."""
    shape = tuple(sizes.get(axis, 1) for axis in sharding.AXES)
    devices = np.empty(len(processes), object)
    devices[:] = [types.SimpleNamespace(process_index=process) for process in processes]
    return types.SimpleNamespace(
        axis_names=sharding.AXES, shape=dict(zip(sharding.AXES, shape)), devices=devices.reshape(shape)
    )


@pytest.mark.parametrize(
    ("mesh", "readers"),
    [
        (spread([0, 0, 1, 1], data=4), [(0, 2), (1, 2)]),
        (spread([0, 0, 1, 1], data=2, fsdp=2), [(0, 2), (1, 2)]),
        (spread([0, 0, 1, 1], fsdp=2, tensor=2), [(0, 2), (1, 2)]),
        (spread([0, 0, 1, 1], tensor=4), [(0, 1), (0, 1)]),
        (spread([0, 1, 2, 3], data=2, tensor=2), [(0, 2), (0, 2), (1, 2), (1, 2)]),
        (spread([1, 1, 0, 0], data=4), [(1, 2), (0, 2)]),
        (None, [(0, 1)]),
    ],
)
def test_processes_that_hold_the_same_rows_read_the_same(monkeypatch, mesh, readers):
    for process, expected in enumerate(readers):
        monkeypatch.setattr(jax, "process_index", lambda process=process: process)
        assert sharding.reader(mesh) == expected


def test_processes_that_share_a_part_of_their_rows_are_refused():
    with pytest.raises(UserError, match="mesh: .* over 2 processes, some of which share a part of their rows"):
        sharding.reader(spread([0, 0, 0, 1, 1, 1], data=3, tensor=2))


def test_an_unknown_axis_is_named_with_the_nearest():
    with pytest.raises(UserError, match="mesh.tensr: unknown axis - .* did you mean tensor"):
        sharding.make_mesh({"tensr": 1})


@pytest.mark.parametrize(
    ("shape", "expected"),
    [
        *((shape, "sizes for .* at most one of them -1") for shape in (
            {"data": 0}, {"data": -2, "fsdp": -4}, {"data": 2.0, "fsdp": 4}, {"data": True, "fsdp": 8}, {"data": "8"},
            {"data": -1, "fsdp": -1})),
        *((shape, "sizes whose product is 8") for shape in (
            {"data": 3}, {"data": -1, "fsdp": 3}, {"data": 2**63, "fsdp": 2})),
    ],
)  # fmt: skip
def test_sizes_that_make_no_mesh_are_refused(shape, expected):
    with pytest.raises(UserError, match=f"^mesh: got .* - expected {expected}"):
        sharding.make_mesh(shape)


@pytest.mark.parametrize(
    ("names", "shape", "spec"),
    [
        (("batch", None), (8, 3), (("data", "fsdp"), None)),
        (("batch",), (4,), ("data",)),  # both axes together do not divide it
        (("embed", "vocab"), (6, 8), (None, None)),
        (("conv_out", "embed"), (8, 8), ("fsdp", None)),  # an axis divides one dimension
    ],
)
def test_a_dimension_lies_on_the_axes_that_divide_it(names, shape, spec):
    mesh = sharding.make_mesh({"data": 2, "fsdp": 4})
    assert sharding.spec_of(names, shape, mesh) == jax.sharding.PartitionSpec(*spec)


@pytest.mark.parametrize("axes", [None, {"data": 2, "fsdp": 2}])
@pytest.mark.parametrize("at_a_time", [1, 2, 3, 100])
def test_a_function_of_rows_is_the_same_for_a_few_rows_at_a_time(axes, at_a_time):
    mesh = axes and sharding.make_mesh(axes, jax.devices()[:4])
    rows = (np.arange(24, dtype=np.float32).reshape(12, 2), np.arange(12))
    seen = []

    def double(rows):
        seen.append(len(rows[1]))
        return rows[0] * 2, rows[1][:, None] + 1

    with sharding.use_mesh(mesh):
        result = jax.jit(lambda rows: sharding.map_rows(double, rows, at_a_time))(sharding.shard_batch(rows, mesh))
    np.testing.assert_array_equal(result[0], rows[0] * 2)
    np.testing.assert_array_equal(result[1], rows[1][:, None] + 1)
    devices = 4 if mesh else 1
    own = 12 // devices
    assert seen[0] == devices * max(n for n in range(1, own + 1) if own % n == 0 and n <= at_a_time)


def test_rows_that_the_devices_do_not_divide_are_taken_together():
    with sharding.use_mesh(sharding.make_mesh({"data": 4}, jax.devices()[:4])):
        result = jax.jit(lambda rows: sharding.map_rows(lambda rows: rows + len(rows), rows, 1))(np.arange(9))
    np.testing.assert_array_equal(result, 9 + np.arange(9))
