"""The reader of XLA's programs, on short texts as XLA prints them."""

import importlib

import pytest

pytestmark = pytest.mark.cross  # pure text; importing the backend needs JAX

ALL = tuple(range(8))
PAIRS = ((0, 1), (2, 3), (4, 5), (6, 7))
APART = ((0, 2, 4, 6), (1, 3, 5, 7))
MESH = "mesh['axis_0'=2,'axis_1'=1,'axis_2'=4], device_ids=([4,2]T(1,0)) "


@pytest.fixture
def hlo():
    return importlib.import_module("kbtrain.backends.jax.hlo")


@pytest.fixture
def program(hlo):
    """``program(lines, others)``: a program of these instructions, and of other computations."""

    def make(lines, others="", devices=8):
        body = "\n".join(f"  {line.strip()}" for line in lines.strip().splitlines())
        text = f"HloModule m, is_scheduled=true\n\n{others}\nENTRY %main (x: f32[]) -> f32[] {{\n"
        return hlo.Program(f"{text}{body}\n}}\n", devices)

    return make


@pytest.mark.parametrize(
    ("printed", "groups"),
    [
        ("{{0,1},{2,3},{4,5},{6,7}}", PAIRS),
        ("{{0,2,4,6},{1,3,5,7}}", APART),
        ("{}", (ALL,)),
        ("[4,2]<=[8]", PAIRS),
        ("[2,4]<=[4,2]T(1,0)", APART),
        ("mesh['axis_0'=8,'axis_1'=1] {'axis_0'}", (ALL,)),
        ("mesh[data=4,fsdp=2] {fsdp}", PAIRS),
        ("mesh['a'=2,'b'=4] {'a','b'}", (ALL,)),
        (MESH + "{'axis_0'}", PAIRS),
        (MESH + "{'axis_2'}", APART),
        ("mesh['a'=2,'b'=4], device_ids=(0,2,4,6,1,3,5,7) {'b'}", APART),
        ("mesh['a'=8] {'a':(4)2}", PAIRS),
        ("mesh['a'=8] {'a':(1)4}", APART),
    ],
)
def test_groups_of_devices_in_each_form(program, printed, groups):
    line = f"%r = f32[12]{{0}} all-reduce(%x), channel_id=1, replica_groups={printed}, "
    (only,) = program(line + "use_global_device_ids=true, to_apply=%add").collectives()
    assert only.groups == groups
    assert only.group == len(groups[0])
    assert only.sent == 2 * 48 * (only.group - 1) / only.group


@pytest.mark.parametrize(
    "printed", ["grid<8>", "mesh['a'=8] {'b'}", "mesh['a'=4], device_ids=(0,1) {'a'}"]
)
def test_an_unknown_form_is_no_group_of_all_devices(hlo, program, printed):
    found = program(f"%r = f32[12]{{0}} all-reduce(%x), replica_groups={printed}, to_apply=%add")
    with pytest.raises(hlo.UnknownGroupsError, match="the groups of a collective"):
        found.sent()


def test_one_replica_is_all_of_its_partitions(program):
    line = "%r = f32[8]{0} all-reduce(%x), channel_id=1, replica_groups={{0}}, to_apply=%add"
    assert program(line).collectives()[0].groups == (ALL,)


STAGE = """
%{name} (p: bf16[32,256]) -> bf16[256,256] {{
  %p = bf16[32,256]{{1,0:T(8,128)(2,1)}} parameter(0)
  ROOT %g = bf16[256,256]{{1,0:T(8,128)(2,1)}} all-gather(%p), channel_id={channel}, \
replica_groups=mesh['axis_0'=8] {{'axis_0'}}, dimensions={{0}}, use_global_device_ids=true
}}
"""


def test_the_stages_of_a_gather_of_a_tpu_are_one_gather(program):
    names = ["fused_computation.1", "async_collective_fusion.1", "async_collective_fusion.2",
             "fused_computation.2"]  # fmt: skip
    others = "".join(STAGE.format(name=name, channel=4) for name in names)
    others += STAGE.format(name="fused_computation.3", channel=5)
    names.append("fused_computation.3")
    lines = [
        f"%f.{i} = bf16[256,256]{{1,0:T(8,128)(2,1)S(1)}} fusion(%x), kind=kCustom, calls=%{name}"
        for i, name in enumerate(names)
    ]
    found = program("\n".join(lines), others)
    assert [(each.size, each.overlapped) for each in found.collectives()] == [
        (2 * 256 * 256, 2),
        (2 * 256 * 256, None),
    ]
    assert found.sent() == {"all-gather": (2, 2 * 2 * 256 * 256 * 7 // 8)}


def test_equal_channels_outside_of_kernels_are_several(program):
    line = "{} = f32[8]{{0}} all-gather(%x), channel_id=1, replica_groups={{}}, dimensions={{0}}"
    assert len(program("\n".join(line.format(name) for name in ("%a", "%b"))).collectives()) == 2


def test_a_sum_of_which_a_kernel_keeps_a_part_is_scattered(program):
    others = """
%all-reduce-scatter (input: f32[256,256]) -> f32[32,256] {
  %input = f32[256,256]{1,0:T(8,128)S(1)} parameter(0)
  %all-reduce.58 = f32[256,256]{1,0:T(8,128)} all-reduce(%input), channel_id=21, \
replica_groups={{0,1,2,3,4,5,6,7}}, use_global_device_ids=true, to_apply=%add
  %i = u32[] partition-id()
  ROOT %s = f32[32,256]{1,0:T(8,128)S(1)} dynamic-slice(%all-reduce.58, %i, %i), \
dynamic_slice_sizes={32,256}
}
"""
    line = "%f = f32[32,256]{1,0:T(8,128)S(1)} fusion(%x), kind=kCustom, calls=%all-reduce-scatter"
    size = 4 * 256 * 256
    assert program(line, others).sent() == {"reduce-scatter": (1, size * 7 // 8)}
    inside = others.partition("{\n")[2].rpartition("}")[0]
    assert program(inside).sent() == {"all-reduce": (1, 2 * size * 7 // 8)}  # not in a kernel


def test_what_starts_asynchronously_counts_once(program):
    others = """
%wrapped (p: f32[8]) -> f32[64] {
  %p = f32[8]{0} parameter(0)
  ROOT %g = f32[64]{0} all-gather(%p), channel_id=3, replica_groups=[1,8]<=[8], dimensions={0}, \
use_global_device_ids=true
}
"""
    found = program(
        """
        %s = ((f32[8]{0}), f32[64]{0}, s32[]) async-start(%x), calls=%wrapped
        %w = f32[8]{0} fusion(%x), kind=kLoop, calls=%other
        %d = f32[64]{0} async-done(%s)
        """,
        others,
    )
    (only,) = found.collectives()
    assert (only.kind, only.size, only.overlapped) == ("all-gather", 256, 1)


@pytest.mark.parametrize(
    ("line", "size"),
    [
        (
            "(f32[8]{0}, f32[8]{0}, u32[]{:S(2)}, u32[]{:S(2)}) collective-permute-start(%x), "
            "channel_id=1, source_target_pairs={{0,1},{1,0}}",
            32,
        ),
        (
            "((f32[8]{0}, bf16[8]{0}), (f32[8]{0}, bf16[8]{0}), u32[], u32[]) "
            "collective-permute-start(%x, %y), source_target_pairs={{0,1}}",
            48,
        ),
        (
            "((f32[16]{0}, bf16[4]{0}), (f32[8]{0}, bf16[2]{0})) reduce-scatter-start(%x, %y), "
            "replica_groups=[4,2]<=[8], dimensions={0}, to_apply=%add",
            72,
        ),
        ("(f32[8]{0}, f32[64]{0}) all-gather-start(%x), replica_groups={}, dimensions={0}", 256),
        ("(f32[8]{0}, f32[2]{0}) all-reduce-start(%x, %y), replica_groups={}, to_apply=%add", 40),
    ],
)
def test_a_start_returns_operands_and_contexts_too(program, line, size):
    (only,) = program(f"%s = {line}").collectives()
    assert only.size == size


def test_a_permutation_is_sent_by_those_with_a_target(program):
    line = "%s = f32[8]{0} collective-permute(%x), source_target_pairs={{0,1},{1,2},{2,3},{3,0}}"
    found = program(line, devices=4)
    assert found.sent() == {"collective-permute": (1, 32)}
    assert found.sent_over(2) == (16.0, 16.0)  # 1 to 2 and 3 to 0 leave their machine


@pytest.mark.parametrize(
    ("kind", "groups", "inside", "outside"),
    [
        # 4 machines of 2 devices, 64 bytes. The two of a machine add up, then the machines.
        ("all-reduce", "[1,8]<=[8]", 2 * 64 / 2, 2 * 64 * 3 / 8),
        ("all-reduce", "[4,2]<=[8]", 2 * 64 / 2, 0),
        ("all-reduce", "[2,4]<=[4,2]T(1,0)", 0, 2 * 64 * 3 / 4),
        ("all-gather", "[1,8]<=[8]", 64 / 2, 64 * 3 / 8),
        ("all-to-all", "[1,8]<=[8]", 64 / 8, 64 * 6 / 8),
    ],
)
def test_what_stays_in_a_machine_and_what_leaves_it(program, kind, groups, inside, outside):
    line = f"%r = f32[16]{{0}} {kind}(%x), channel_id=1, replica_groups={groups}, "
    found = program(line + "use_global_device_ids=true, dimensions={0}")
    assert found.sent_over(2) == pytest.approx((inside, outside))
    assert found.sent_over(8)[1] == 0


def test_memory_of_a_tpu_is_read_and_written_once(program):
    found = program(
        """
        %x = f32[64,128]{1,0:T(8,128)} parameter(0)
        %c = (f32[64,128]{1,0:T(8,128)S(1)}, f32[64,128]{1,0:T(8,128)}, u32[]{:S(2)}) copy-start(%x)
        %d = f32[64,128]{1,0:T(8,128)S(1)} copy-done(%c)
        %s = ((f32[64,128]{1,0:T(8,128)}), f32[8,128]{1,0:T(8,128)S(1)}, s32[]) slice-start(%x)
        %t = f32[8,128]{1,0:T(8,128)S(1)} slice-done(%s)
        %f = f32[64,128]{1,0:T(8,128)S(1)} fusion(%d, %t), kind=kLoop, calls=%work
        %b = (f32[64,128]{1,0:T(8,128)}, f32[64,128]{1,0:T(8,128)S(1)}, u32[]{:S(2)}) copy-start(%f)
        ROOT %e = f32[64,128]{1,0:T(8,128)} copy-done(%b)
        """,
        devices=1,
    )
    whole, rows = 4 * 64 * 128, 4 * 8 * 128
    assert found.bytes_accessed() == whole + rows + whole  # read, sliced, written back


def test_a_copy_that_only_starts_is_one_read_and_one_write(program):
    found = program(
        """
        %x = f32[64]{0} parameter(0)
        %c = (f32[64]{0}, f32[64]{0}, u32[]) copy-start(%x)
        ROOT %d = f32[64]{0} copy-done(%c)
        """
    )
    assert found.bytes_accessed() == 2 * 256


def test_collective_memory_of_a_gpu_is_memory(program):
    found = program("%x = f32[64]{0:S(1)} parameter(0)\n%c = f32[64]{0:S(1)} copy(%x)")
    assert found.bytes_accessed() == 2 * 256


@pytest.mark.parametrize(
    ("shape", "size"),
    [
        ("f8e4m3fn[3,5]{1,0}", 15),
        ("f8e5m2[4]", 4),
        ("c64[2]{0}", 16),
        ("c128[2]{0}", 32),
        ("bf16[7]{0}", 14),
        ("pred[5]{0}", 5),
        ("s4[5]{0:E(4)}", 3),
        ("f32[]", 4),
        ("f32[<=8]{0}", 32),
        ("token[]", 0),
        ("(f32[2,3]{1,0}, /*index=1*/(s8[4]{0}, token[]))", 28),
    ],
)
def test_bytes_of_shapes(program, shape, size):
    found = program(f"%r = {shape} custom-call(%x)")
    assert found.bytes_accessed() == size
