"""Reading compiled programs: kernels, loops, collectives and their axes, the largest arrays."""

import types

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from benchmarks import compiled
from blip3o_jax.plan import program

TEXT = """HloModule jit_f, is_scheduled=true

FileNames
1 "/somewhere/blip3o_jax/nn/linear.py"

FileLocations
1 {file_name_id=1 function_name_id=1 line=42 end_line=42 column=2 end_column=2}

StackFrames
1 {file_location_id=1 parent_frame_id=1}

%fused (p: f32[8,4]) -> f32[8,4] {
  %p = f32[8,4]{1,0} parameter(0)
  %big = f32[800,400]{1,0} broadcast(%p), dimensions={0,1}
  %gather = f32[16,4]{1,0} all-gather(%p), channel_id=1, replica_groups=[4,2]<=[8], dimensions={0}
  ROOT %t = f32[8,4]{1,0} tanh(%p)
}

%body (s: (s32[], f32[8,4])) -> (s32[], f32[8,4]) {
  %s = (s32[], f32[8,4]{1,0}) parameter(0)
  %i = s32[] get-tuple-element(%s), index=0
  %x = f32[8,4]{1,0} get-tuple-element(%s), index=1
  %f1 = f32[8,4]{1,0} fusion(%x), kind=kLoop, calls=%fused
  %f2 = f32[8,4]{1,0} custom-call(%f1), custom_call_target="gemm"
  ROOT %out = (s32[], f32[8,4]{1,0}) tuple(%i, %f2)
}

%cond (s: (s32[], f32[8,4])) -> pred[] {
  %s.1 = (s32[], f32[8,4]{1,0}) parameter(0)
  ROOT %less = pred[] fusion(%s.1), kind=kLoop, calls=%compare
}

ENTRY %main (a: f32[8,4]) -> f32[8,4] {
  %a = f32[8,4]{1,0:T(8,128)} parameter(0)
  %w1 = (s32[], f32[8,4]{1,0}) while(%a), condition=%cond, body=%body, backend_config={"known_trip_count":{"n":"10"}}
  %w2 = (s32[], f32[8,4]{1,0}) while(%w1), condition=%cond, body=%body, metadata={op_name="jit(f)/tokens/while"}
  %start = (f32[8,4]{1,0}, bf16[32,4]{1,0}) all-gather-start(%a), channel_id=7, replica_groups={{0,2,4,6},{1,3,5,7}}
  %joined = ((f32[8,4], f32[1]), (f32[16,4], f32[2]), u32[]) all-gather-start(%a), channel_id=8, replica_groups={{0,1}}
  %scatter = ((f32[64]{0}), f32[16]{0}) reduce-scatter-start(%c), channel_id=10, replica_groups={{0,2,4,6}}
  %scattered = f32[16]{0} reduce-scatter(%c), channel_id=11, replica_groups={{0,2,4,6}}
  %sum = (f32[64]{0}, f32[4]{0}) all-reduce-start(%c, %d), channel_id=12, replica_groups={{0,1}}
  %done = bf16[32,4]{1,0} all-gather-done(%start)
  %large = bf16[100,100]{1,0} copy(%done), metadata={op_name="jit(f)/dot" stack_frame_id=1}
  %two = (bf16[90,100]{1,0}, f32[2]{0}) fusion(%large), kind=kLoop, calls=%fused, metadata={stack_frame_id=1}
  ROOT %r = f32[8,4]{1,0} all-reduce(%a), channel_id=9, replica_groups=mesh['axis_0'=2,'axis_1'=4] {'axis_0'}
}
"""
MEMORY = types.SimpleNamespace(
    argument_size_in_bytes=100,
    output_size_in_bytes=50,
    alias_size_in_bytes=20,
    temp_size_in_bytes=7,
    peak_memory_in_bytes=9000,
    generated_code_size_in_bytes=3,
)


MESH = types.SimpleNamespace(
    shape={"fsdp": 4, "tensor": 2}, devices=np.array([types.SimpleNamespace(platform="tpu")] * 8)
)


@pytest.fixture
def needs():
    compiled = types.SimpleNamespace(memory_analysis=lambda: MEMORY, as_text=lambda: TEXT)
    return program.read(compiled, MESH)


def test_kernels_count_as_often_as_their_loop_runs(needs):
    inside = 2 + 1  # of the body and of the condition
    assert needs.loops == {"jit(f)/tokens/while": inside}
    assert needs.kernels == 10 * inside + inside + 8  # and six collectives, the copy and a fusion


def test_collectives_name_their_axes_and_count_in_fusions_and_loops(needs):
    found = {(each.kind, each.axes): (each.count, each.bytes) for each in needs.collectives}
    assert found == {
        ("all-gather", ("tensor",)): (13, 12 * 256 + 264),
        ("all-gather", ("fsdp",)): (1, 256),
        ("all-reduce", ("fsdp",)): (1, 128),
        ("all-reduce", ("tensor",)): (1, 272),
        ("reduce-scatter", ("fsdp",)): (2, 2 * 256),
    }


def test_bytes_and_the_largest_arrays_by_their_place_in_the_source(needs):
    assert (needs.peak_bytes, needs.argument_bytes, needs.code_bytes) == (9000, 100, 3)
    assert needs.largest[0] == (20_000, "bf16[100,100]", "nn/linear.py:42")
    assert needs.largest[1] == (18_000, "bf16[90,100]", "nn/linear.py:42")  # one of two results of a kernel
    assert "f32[800,400]" not in [shape for _, shape, _ in needs.largest]  # within a kernel nothing is stored


@pytest.mark.parametrize(
    ("rest", "group", "axes"),
    [
        ("replica_groups={{0,1},{2,3}}", [0, 1], ("tensor",)),
        ("replica_groups=[2,4]<=[4,2]T(1,0), dimensions", [0, 2, 4, 6], ("fsdp",)),
        ("replica_groups=[1,8]<=[8]", list(range(8)), ("fsdp", "tensor")),
        ("replica_groups=mesh['axis_0'=4,'axis_1'=2] {'axis_1'}, x", [0, 1], ("tensor",)),
        ("source_target_pairs={{0,2},{2,4}}", [0, 2], ("fsdp",)),
        ("dimensions={0}", [], ()),
    ],
)
def test_groups_are_read_in_every_notation(rest, group, axes):
    assert program.first_group(rest) == group
    assert program.axes_of(group, {"fsdp": 4, "tensor": 2}) == axes


def test_bytes_of_arrays():
    sizes = {("f32", "2,3"): 24, ("bf16", ""): 2, ("pred", "9"): 9, ("s4", "8"): 4, ("f8e4m3fn", "16"): 16}
    assert {array: program.array_bytes(*array) for array in sizes} == sizes


def test_a_program_of_this_machine_can_be_read():
    compiled = jax.jit(lambda x: jnp.tanh(x @ x).sum()).lower(jnp.zeros((64, 64))).compile()
    needs = program.read(compiled)
    assert needs.kernels >= 1 and needs.argument_bytes == 64 * 64 * 4 and needs.peak_bytes >= needs.argument_bytes


def test_what_the_compiler_says_of_a_program_that_does_not_fit():
    message = (
        "RESOURCE_EXHAUSTED: Ran out of memory on HBM, the total memory required\n for HLO temporaries (46.50G) exceeds"
    )
    error = program.DoesNotFit(message)
    assert error.needed_bytes == 93 * 2**29 and "required for HLO" in str(error)
    assert program.DoesNotFit("RESOURCE_EXHAUSTED").needed_bytes == 0


def test_what_rises_over_its_budget_is_named():
    budget = {"a: update": {"peak_bytes": 100, "kernels": 20}}
    assert compiled.risen({"a: update": {"peak_bytes": 105, "kernels": 21}}, budget) == []
    now = {"a: update": {"peak_bytes": 106, "kernels": 40}, "b: of no budget": {"peak_bytes": 1, "kernels": 1}}
    assert compiled.risen(now, budget) == [
        "a: update: peak_bytes 106, +6% over 100",
        "a: update: kernels 40, +100% over 20",
    ]


def test_a_budget_is_of_every_stage_and_of_no_other():
    budget = {"a, v5e:2x2: update": {}, "a, v5e:2x2: old": {}, "b: left out": {}}
    assert compiled.unmatched({"a, v5e:2x2: update": {}, "a, v5e:2x2: new": {}}, budget) == [
        "a, v5e:2x2: new: not in compiled.json, write it with --update",
        "a, v5e:2x2: old: in compiled.json, but the program has no such stage",
    ]
    assert compiled.unmatched({"b: left out": {}}, budget) == []
