"""Costs read from a program's text, on a program small enough to count by hand."""

import math

import pytest

from magma_jax.plan.hlo import parse, program_costs

# Two layers in a loop: a gather of one layer's weight that runs beside two fusions, a matmul, a sum over devices.
PROGRAM = """\
HloModule step, is_scheduled=true

%fused_slice (p0: bf16[2,8,4], p1: s32[]) -> bf16[1,8,4] {
  %p0 = bf16[2,8,4]{2,1,0} parameter(0)
  %p1 = s32[] parameter(1)
  %zero = s32[] constant(0)
  ROOT %slice = bf16[1,8,4]{2,1,0} dynamic-slice(%p0, %p1, %zero, %zero), dynamic_slice_sizes={1,8,4}
}

%start (q0: bf16[8,4]) -> bf16[32,4] {
  %q0 = bf16[8,4]{1,0} parameter(0)
  %gather.1 = bf16[32,4]{1,0} all-gather(%q0), channel_id=7, replica_groups=mesh['a'=4,'b'=2] {'a'}, dimensions={0}
  ROOT %begun = bf16[32,4]{1,0} custom-call(%gather.1), custom_call_target="AsyncCollectiveStart"
}

%matmul (r0: bf16[16,4], r1: bf16[32,4], r2: bf16[8,4]) -> bf16[16,32] {
  %r0 = bf16[16,4]{1,0:T(8,128)(2,1)S(1)} parameter(0)
  %r1 = bf16[32,4]{1,0} parameter(1)
  %r2 = bf16[8,4]{1,0} parameter(2)
  %gather.2 = bf16[32,4]{1,0} all-gather(%r2), channel_id=7, replica_groups=mesh['a'=4,'b'=2] {'a'}, dimensions={0}
  ROOT %product = bf16[16,32]{1,0} convolution(%r0, %r1), dim_labels=bf_oi->bf
}

%condition (c0: (s32[], bf16[2,8,4], bf16[16,4], bf16[16,32])) -> pred[] {
  %c0 = (s32[], bf16[2,8,4]{2,1,0}, bf16[16,4]{1,0}, /*index=3*/bf16[16,32]{1,0}) parameter(0)
  %limit = s32[]{:T(128)} constant(2)
  %i = s32[] get-tuple-element(%c0), index=0
  ROOT %less = pred[] compare(%i, %limit), direction=LT
}

%body (b0: (s32[], bf16[2,8,4], bf16[16,4], bf16[16,32])) -> (s32[], bf16[2,8,4], bf16[16,4], bf16[16,32]) {
  %b0 = (s32[], bf16[2,8,4]{2,1,0}, bf16[16,4]{1,0}, bf16[16,32]{1,0}) parameter(0)
  %i = s32[] get-tuple-element(%b0), index=0
  %weights = bf16[2,8,4]{2,1,0} get-tuple-element(%b0), index=1
  %x = bf16[16,4]{1,0:T(8,128)(2,1)S(1)} get-tuple-element(%b0), index=2
  %layer = bf16[1,8,4]{2,1,0} fusion(%weights, %i), kind=kLoop, calls=%fused_slice
  %flat = bf16[8,4]{1,0} bitcast(%layer)
  %begin = bf16[32,4]{1,0} fusion(%flat), kind=kCustom, calls=%start
  %y = bf16[16,32]{1,0} fusion(%x, %begin, %flat), kind=kOutput, calls=%matmul
  %sum = bf16[16,32]{1,0} all-reduce(%y), channel_id=8, replica_groups=[4,2]<=[8], to_apply=%add
  ROOT %next = (s32[], bf16[2,8,4]{2,1,0}, bf16[16,4]{1,0}, bf16[16,32]{1,0}) tuple(%i, %weights, %x, %sum)
}

ENTRY %main (a0: bf16[2,8,4], a1: bf16[16,4], a2: f32[2,4,8], a3: f32[2,8,6]) -> (s32[], bf16[2,8,4]) {
  %a0 = bf16[2,8,4]{2,1,0} parameter(0)
  %a1 = bf16[16,4]{1,0} parameter(1)
  %a2 = f32[2,4,8]{2,1,0} parameter(2)
  %a3 = f32[2,8,6]{2,1,0} parameter(3)
  %zero = s32[] constant(0)
  %empty = bf16[16,32]{1,0} constant({...})
  %init = (s32[], bf16[2,8,4]{2,1,0}, bf16[16,4]{1,0}, bf16[16,32]{1,0}) tuple(%zero, %a0, %a1, %empty)
  %loop = (s32[], bf16[2,8,4]{2,1,0}, bf16[16,4]{1,0}, bf16[16,32]{1,0}) while(%init), condition=%condition, body=%body
  %batched = f32[2,4,6] convolution(%a2, %a3), window={size=2 pad=1_1 lhs_dilate=2}, dim_labels=0bf_0io->0bf
  %permuted = (f32[2,4,6], f32[2,4,6], u32[]) collective-permute-start(%batched), source_target_pairs={{0,1}}
  ROOT %result = (s32[], bf16[2,8,4]{2,1,0}) tuple(%zero, %a0)
}
"""


@pytest.fixture(scope="module")
def costs():
    return program_costs(PROGRAM, devices=8)


def test_matmuls_count_as_often_as_they_run(costs):
    loop = 2 * (2 * 16 * 32 * 4)
    # Of the dilated, padded axis only the pairs count that meet an element: a matmul of each of the two batch rows.
    outputs, window, left = 2, 2, 2
    pairs = sum((o + w - 1) in range(0, 2 * left, 2) for o in range(outputs) for w in range(window))
    assert costs.flops == loop + 2 * 4 * 6 * 8 * pairs
    assert costs.unknown_loops == 0


def test_a_collective_beside_two_fusions_is_one(costs):
    found = {collective.kind: collective for collective in costs.collectives}
    assert len(costs.collectives) == len(found) == 3
    gather, total = found["all-gather"], found["all-reduce"]
    assert (gather.group, gather.count, gather.loop, gather.shapes[0].dims) == (4, 2, True, (32, 4))
    assert gather.received == 3 * 8 * 4 * 2
    assert (total.group, total.count, total.received) == (2, 2, 2 * (16 * 32 * 2) / 2)
    assert (found["collective-permute"].count, found["collective-permute"].loop) == (1, False)


def test_traffic_counts_slices_and_leaves_out_on_chip_memory(costs):
    layer = 8 * 4 * 2 + 4 + 8 * 4 * 2  # the slice of the weights and its index are read, the layer is written
    begin = 8 * 4 * 2 + 32 * 4 * 2
    product = 32 * 4 * 2 + 16 * 32 * 2  # x is on the chip, and what is sent was read when the gather began
    total = 2 * 16 * 32 * 2
    batched = 4 * (2 * 4 * 8 + 2 * 8 * 6 + 2 * 4 * 6)
    permuted = 4 * 2 * (2 * 4 * 6)
    assert costs.hbm_bytes == 2 * (layer + begin + product + total) + batched + permuted


BESIDE = """\
HloModule beside, is_scheduled=true

%start (p0: bf16[8,4]) -> (bf16[8,4], bf16[32,4]) {
  %p0 = bf16[8,4]{1,0} parameter(0)
  %gather.1 = bf16[32,4]{1,0} all-gather(%p0), channel_id=7, replica_groups=[1,4]<=[4], dimensions={0}
  ROOT %begun = (bf16[8,4]{1,0}, bf16[32,4]{1,0}) custom-call(%p0, %gather.1), custom_call_target="AsyncCollectiveStart"
}

%squares (q0: bf16[8,4], q1: bf16[32,4], q2: f32[16]) -> (f32[16], bf16[8,4], bf16[32,4]) {
  %q0 = bf16[8,4]{1,0} parameter(0)
  %q1 = bf16[32,4]{1,0} parameter(1)
  %q2 = f32[16]{0} parameter(2)
  %square = f32[16]{0} multiply(%q2, %q2)
  %gather.2 = bf16[32,4]{1,0} all-gather(%q0), channel_id=7, replica_groups=[1,4]<=[4], dimensions={0}
  ROOT %all = (f32[16]{0}, bf16[8,4]{1,0}, bf16[32,4]{1,0}) tuple(%square, %q0, %gather.2)
}

%finish (r0: bf16[8,4], r1: bf16[32,4]) -> bf16[32,4] {
  %r0 = bf16[8,4]{1,0} parameter(0)
  %r1 = bf16[32,4]{1,0} parameter(1)
  %gather.3 = bf16[32,4]{1,0} all-gather(%r0), channel_id=7, replica_groups=[1,4]<=[4], dimensions={0}
  ROOT %whole = bf16[32,4]{1,0} custom-call(%r0, %r1, %gather.3), custom_call_target="AsyncCollectiveDone"
}

ENTRY %main (a0: bf16[8,4], a1: f32[16], a2: f32[4,4]) -> bf16[32,4] {
  %a0 = bf16[8,4]{1,0} parameter(0)
  %a1 = f32[16]{0} parameter(1)
  %a2 = f32[4,4]{1,0} parameter(2)
  %begin = (bf16[8,4]{1,0}, bf16[32,4]{1,0}) fusion(%a0), calls=%start, output_to_operand_aliasing={{0}: (0, {})}
  %sent = bf16[8,4]{1,0} get-tuple-element(%begin), index=0
  %room = bf16[32,4]{1,0} get-tuple-element(%begin), index=1
  %during = (f32[16]{0}, bf16[8,4]{1,0}, bf16[32,4]{1,0}) fusion(%sent, %room, %a1), calls=%squares, \
output_to_operand_aliasing={{1}: (0, {}), {2}: (1, {})}
  %row = ((f32[4,4]{1,0}), f32[1,4]{1,0:S(1)}, s32[]{:S(2)}) slice-start(%a2), slice={[0:1], [0:4]}
  %kept = f32[1,4]{1,0:S(1)} slice-done(%row)
  ROOT %end = bf16[32,4]{1,0} fusion(%sent, %room), calls=%finish, output_to_operand_aliasing={{}: (1, {})}
}
"""


def test_what_a_collective_moves_beside_other_work_counts_once():
    costs = program_costs(BESIDE, devices=4)
    gather, squares, row = 2 * (8 * 4 + 32 * 4), 4 * (16 + 16), 4 * 4  # the row goes to memory on the chip
    assert costs.hbm_bytes == gather + squares + row
    assert [collective.received for collective in costs.collectives] == [2 * 3 * 8 * 4]


NESTED = """\
HloModule decode, is_scheduled=true

%slice_of_stack (n0: s8[2,8,4], n1: s32[]) -> bf16[1,8,4] {
  %n0 = s8[2,8,4]{2,1,0} parameter(0)
  %n1 = s32[] parameter(1)
  %zero = s32[] constant(0)
  %wide = bf16[2,8,4]{2,1,0} convert(%n0)
  ROOT %one = bf16[1,8,4]{2,1,0} dynamic-slice(%wide, %n1, %zero, %zero), dynamic_slice_sizes={1,8,4}
}

%product (o0: bf16[16,4], o1: s8[2,8,4], o2: s32[]) -> bf16[16,8] {
  %o0 = bf16[16,4]{1,0} parameter(0)
  %o1 = s8[2,8,4]{2,1,0} parameter(1)
  %o2 = s32[] parameter(2)
  %layer = bf16[1,8,4]{2,1,0} fusion(%o1, %o2), kind=kLoop, calls=%slice_of_stack
  %flat = bf16[8,4]{1,0} bitcast(%layer)
  ROOT %y = bf16[16,8]{1,0} convolution(%o0, %flat), dim_labels=bf_oi->bf
}

%update (u0: bf16[2,8,4], u1: s32[], u2: bf16[1,8,4]) -> bf16[2,8,4] {
  %u0 = bf16[2,8,4]{2,1,0} parameter(0)
  %u1 = s32[] parameter(1)
  %u2 = bf16[1,8,4]{2,1,0} parameter(2)
  %zero = s32[] constant(0)
  %old = bf16[1,8,4]{2,1,0} dynamic-slice(%u0, %u1, %zero, %zero), dynamic_slice_sizes={1,8,4}
  %new = bf16[1,8,4]{2,1,0} add(%old, %u2)
  ROOT %whole = bf16[2,8,4]{2,1,0} dynamic-update-slice(%u0, %new, %u1, %zero, %zero)
}

ENTRY %main (a0: bf16[16,4], a1: s8[2,8,4], a2: s32[], a3: bf16[2,8,4], a4: bf16[1,8,4]) -> bf16[16,8] {
  %a0 = bf16[16,4]{1,0} parameter(0)
  %a1 = s8[2,8,4]{2,1,0} parameter(1)
  %a2 = s32[] parameter(2)
  %a3 = bf16[2,8,4]{2,1,0} parameter(3)
  %a4 = bf16[1,8,4]{2,1,0} parameter(4)
  %cache = bf16[2,8,4]{2,1,0} fusion(%a3, %a2, %a4), kind=kLoop, calls=%update
  ROOT %out = bf16[16,8]{1,0} fusion(%a0, %a1, %a2), kind=kOutput, calls=%product
}
"""


def test_of_a_stack_that_is_sliced_inside_or_updated_in_place_only_the_layer_counts():
    layer, index = 8 * 4 * 2, 4
    cache = layer + index + layer + layer  # read, index, what is added, written
    product = 16 * 4 * 2 + 8 * 4 + index + 16 * 8 * 2  # one layer of bytes, which are widened where they are used
    assert program_costs(NESTED, devices=1).hbm_bytes == cache + product


def test_a_loop_without_a_limit_counts_once_and_says_so():
    text = PROGRAM.replace("direction=LT", "direction=NE")
    costs = program_costs(text, devices=8)
    assert costs.unknown_loops == 1
    assert costs.flops < program_costs(PROGRAM, devices=8).flops
    known = text.replace("body=%body", 'body=%body, backend_config={"known_trip_count":{"n":"5"}}')
    assert {c.count for c in program_costs(known, devices=8).collectives if c.loop} == {5}


def test_shapes_of_every_kind():
    line = "%x = (bf16[2,3]{1,0:T(8,128)(2,1)S(1)}, f8e4m3fn[4], pred[5]{0}, token[], f32[]) custom-call(%y)"
    computations, entry = parse("ENTRY %main (y: f32[]) -> f32[] {\n  " + line + "\n}\n")
    shapes = computations[entry]["x"].shapes
    assert [shape.bytes for shape in shapes] == [12, 4, 5, 0, 4]
    assert [shape.in_hbm for shape in shapes] == [False, True, True, True, True]
    assert math.prod(shapes[-1].dims) == 1


def test_kernels_of_fused_attention_count_and_end_no_computation():
    """Their metadata have several lines, one of which begins with braces."""
    layouts = "s8[1,4,4]{2,1,0}, s8[1,4,4]{2,1,0}, bf16[2,64,8]{2,1,0}, bf16[2,64,8]{2,1,0}, bf16[2,64,8]{2,1,0}"
    kernel = (
        '  %{0}.1 = bf16[2,64,8]{{2,1,0}} custom-call(%a), custom_call_target="tpu_custom_call", '
        f"operand_layout_constraints={{{{{layouts.replace('{', '{{').replace('}', '}}')}}}}}, "
        'frontend_attributes={{kernel_metadata={{\n"block_q":"{{1024}}"\n}}}}, metadata={{op_name="step"}}\n'
    )
    text = (
        "HloModule step\n\nENTRY %main (a: bf16[16,4]) -> bf16[16,16] {\n  %a = bf16[16,4]{1,0} parameter(0)\n"
        + "".join(kernel.format(f"splash_mha_{name}_no_residuals") for name in ("fwd", "dq", "dkv"))
        + "  ROOT %y = bf16[16,16]{1,0} dot(%a, %a), lhs_contracting_dims={1}, rhs_contracting_dims={1}\n}\n"
    )
    # Of 4 x 4 blocks, 10 are not above the diagonal.
    attention = (2 + 3 + 4) * 2 * 2 * 64 * 64 * 8 * 10 / 16
    assert program_costs(text, 1).flops == attention + 2 * 16 * 16 * 4


BRANCHES = """\
HloModule step

%dear (d0: f32[4,8]) -> f32[4,4] {
  %d0 = f32[4,8]{1,0} parameter(0)
  ROOT %d = f32[4,4]{1,0} dot(%d0, %d0), lhs_contracting_dims={1}, rhs_contracting_dims={1}
}

%cheap (c0: f32[4,8]) -> f32[4,4] {
  %c0 = f32[4,8]{1,0} parameter(0)
  %half = f32[4,2]{1,0} slice(%c0), slice={[0:4], [0:2]}
  ROOT %c = f32[4,4]{1,0} dot(%half, %half), lhs_contracting_dims={1}, rhs_contracting_dims={1}
}

ENTRY %main (a0: s32[], a1: f32[4,8]) -> f32[4,4] {
  %a0 = s32[] parameter(0)
  %a1 = f32[4,8]{1,0} parameter(1)
  ROOT %r = f32[4,4]{1,0} conditional(%a0, %a1, %a1, %a1), branch_computations={%cheap, %dear, %cheap}
}
"""


def test_of_branches_the_dearest_counts():
    assert program_costs(BRANCHES, devices=1).flops == 2 * 4 * 4 * 8


SLICES = """\
HloModule slices, is_scheduled=true

%condition (c0: (s32[], f32[16,4])) -> pred[] {
  %c0 = (s32[], f32[16,4]{1,0}) parameter(0)
  %limit = s32[] constant(3)
  %i = s32[] get-tuple-element(%c0), index=0
  ROOT %less = pred[] compare(%i, %limit), direction=LT
}

%body (b0: (s32[], f32[16,4])) -> (s32[], f32[16,4]) {
  %b0 = (s32[], f32[16,4]{1,0}) parameter(0)
  %i = s32[] get-tuple-element(%b0), index=0
  %grads = f32[16,4]{1,0} get-tuple-element(%b0), index=1
  %after = token[] after-all()
  %send.1 = (f32[16,4]{1,0}, u32[], token[]) send(%grads, %after), channel_id=2, is_host_transfer=true, \
frontend_attributes={_xla_megascale_target="{1,2}x{0:3}",_xla_megascale_transfer_type="ALL_REDUCE"}
  %recv.1 = (f32[16,4]{1,0}, u32[], token[]) recv(%after), channel_id=1, is_host_transfer=true, \
frontend_attributes={_xla_megascale_target="{1,2}x{0:3}",_xla_megascale_transfer_type="ALL_REDUCE"}
  %sent.1 = token[] send-done(%send.1), channel_id=2, is_host_transfer=true
  %received.1 = (f32[16,4]{1,0}, token[]) recv-done(%recv.1), channel_id=1, is_host_transfer=true
  %total = f32[16,4]{1,0} get-tuple-element(%received.1), index=0
  ROOT %next = (s32[], f32[16,4]{1,0}) tuple(%i, %total)
}

ENTRY %main (a0: f32[16,4], a1: f32[8]) -> f32[16,4] {
  %a0 = f32[16,4]{1,0} parameter(0)
  %a1 = f32[8]{0} parameter(1)
  %zero = s32[] constant(0)
  %init = (s32[], f32[16,4]{1,0}) tuple(%zero, %a0)
  %loop = (s32[], f32[16,4]{1,0}) while(%init), condition=%condition, body=%body
  %after.2 = token[] after-all()
  %whole = f32[32]{0} all-gather(%a1), channel_id=2, replica_groups={{0,1,2,3}}, dimensions={0}
  %send.2 = (f32[8]{0}, u32[], token[]) send(%a1, %after.2), channel_id=4, is_host_transfer=true, \
frontend_attributes={_xla_megascale_target="{1,2}x{0:3}",_xla_megascale_transfer_type="ALL_GATHER"}
  %recv.2 = (f32[3,8]{1,0}, u32[], token[]) recv(%after.2), channel_id=3, is_host_transfer=true, \
frontend_attributes={_xla_megascale_target="{1,2}x{0:3}",_xla_megascale_transfer_type="ALL_GATHER"}
  ROOT %end = f32[16,4]{1,0} get-tuple-element(%loop), index=1
}
"""


def test_a_transfer_to_the_hosts_of_other_slices_is_a_collective_between_them():
    costs = program_costs(SLICES, devices=4, slices=3)
    found = {(one.kind, one.between_slices): one for one in costs.collectives}
    assert len(found) == len(costs.collectives) == 3
    reduced, gathered = found["all-reduce", True], found["all-gather", True]
    assert (reduced.count, reduced.loop, reduced.received) == (3, True, 2 * (16 * 4 * 4) * 2 / 3)
    assert (gathered.count, gathered.group, gathered.received) == (1, 3, 2 * 8 * 4)
    assert found["all-gather", False].received == 3 * 8 * 4
    whole, context = 8 * 4 + 32 * 4, 4
    assert costs.hbm_bytes == 3 * (2 * 16 * 4 * 4 + context) + whole + 8 * 4 + 3 * 8 * 4 + context
