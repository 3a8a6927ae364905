"""Collectives read out of compiled programs: kind, group, rounds and bytes."""

import jax
import jax.numpy as jnp
import pytest
from jax.sharding import PartitionSpec as P

from nuner_jax import sharding
from nuner_jax.performance import hlo


def found_in(function, *arrays, mesh, in_specs, out_specs) -> list[hlo.Collective]:
    sharded = jax.shard_map(function, mesh=mesh, in_specs=in_specs, out_specs=out_specs, check_vma=False)
    return hlo.collectives(jax.jit(sharded).lower(*arrays).compile().as_text())


def test_a_sum_over_all_devices():
    mesh = sharding.make_mesh(8)
    (one,) = found_in(lambda x: jax.lax.psum(x, "data"), jnp.ones((8, 5)), mesh=mesh, in_specs=P("data"), out_specs=P())
    assert (one.kind, one.group, one.times, one.arrays) == ("all-reduce", 8, 1, (("f32", (1, 5)),))
    assert one.sizes == (20,)
    assert one.sent_share == pytest.approx(2 * 7 / 8)


@pytest.mark.parametrize(("axis", "group"), [("data", 4), ("fsdp", 2)])
def test_a_gather_is_of_the_devices_of_its_axis_and_shows_the_whole_array(axis, group):
    (one,) = found_in(
        lambda x: jax.lax.all_gather(x, axis, tiled=True),
        jnp.ones((8, 6), jnp.bfloat16),
        mesh=sharding.make_mesh(4, 2),
        in_specs=P(("data", "fsdp")),
        out_specs=P("fsdp" if axis == "data" else "data"),
    )
    assert (one.kind, one.group) == ("all-gather", group)
    assert [shape for _, shape in one.arrays] == [(group, 6)]
    assert one.sent_share == (group - 1) / group


def test_a_scattered_sum_counts_what_goes_into_it():
    (one,) = found_in(
        lambda x: jax.lax.psum_scatter(x, "data", tiled=True),
        jnp.ones((16, 3)),
        mesh=sharding.make_mesh(8),
        in_specs=P(),
        out_specs=P("data"),
    )
    assert (one.kind, one.group, sum(one.sizes)) == ("reduce-scatter", 8, 16 * 3 * 4)


def test_a_collective_in_a_loop_counts_in_every_round():
    def function(x):
        return jax.lax.scan(lambda total, _: (jnp.sin(jax.lax.psum(total, "data")), None), x, None, length=11)[0]

    (one,) = found_in(function, jnp.ones((8, 5)), mesh=sharding.make_mesh(8), in_specs=P("data"), out_specs=P("data"))
    assert (one.kind, one.times) == ("all-reduce", 11)


def test_devices_that_are_alone_send_nothing():
    mesh = sharding.make_mesh(8)
    assert not found_in(
        lambda x: jax.lax.psum(x, "fsdp"), jnp.ones((8, 5)), mesh=mesh, in_specs=P("data"), out_specs=P("data")
    )


def test_the_partitioner_s_groups_of_a_mesh_of_two_axes():
    mesh = sharding.make_mesh(4, 2)
    place = [jax.sharding.NamedSharding(mesh, spec) for spec in (P("fsdp"), P(("data", "fsdp")))]
    multiply = jax.jit(lambda w, x: x @ w, in_shardings=place, out_shardings=place[1])
    (one,) = hlo.collectives(multiply.lower(jnp.ones((32, 16)), jnp.ones((8, 32))).compile().as_text())
    assert (one.kind, one.group, one.arrays) == ("all-gather", 2, (("f32", (32, 16)),))


# As the compiler for TPU v5e writes them: tiled layouts; a gather that two computations carry on, and a loop besides; a
# loop whose rounds only its condition tells; one of half as many rounds, as each does the work of two; a permutation
# with operand, result and a number of its own.
ALL = 'replica_groups={{0,1,2,3,4,5,6,7}}, dimensions={0}, async_collective_fusion_config, op_name="all_gather"'
TPU = """HloModule jit_step, is_scheduled=true, num_partitions=8

%async_collective_fusion.1 (param_0.1: bf16[1,48,128]) -> bf16[8,48,128] {
  %all-gather.6 = bf16[8,48,128]{2,1,0:T(8,128)(2,1)} all-gather(%a), channel_id=1, ALL
}

%async_collective_fusion.2 (param_0.2: bf16[1,48,128]) -> bf16[8,48,128] {
  %all-gather.8 = bf16[8,48,128]{2,1,0:T(8,128)(2,1)S(1)} all-gather(%a), channel_id=1, ALL
}

%condition.1 (wide.param.161: (s32[], f32[16])) -> pred[] {
  %constant.429 = s32[]{:T(128)} constant(9)
  %wide.param.161 = (s32[]{:T(128)}, f32[16]{0:T(128)}) parameter(0)
  %get-tuple-element.415 = s32[]{:T(128)} get-tuple-element(%wide.param.161), index=0
  ROOT %lt.340 = pred[]{:T(512)} compare(%get-tuple-element.415, %constant.429), direction=LT
}

%body.1 (wide.param.162: (s32[], f32[16])) -> (s32[], f32[16]) {
  %all-reduce.48 = (f32[128]{0:T(128)S(1)}, f32[]{:T(128)}) all-reduce(%a, %b), replica_groups=[2,4]<=[8], to_apply=%add
}

%condition.2 (wide.param.163: (f32[16], u32[])) -> pred[] {
  %constant.430 = u32[]{:T(128)} constant(8)
  %wide.param.163 = (f32[16]{0:T(128)}, u32[]{:T(128)}) parameter(0)
  %get-tuple-element.416 = u32[]{:T(128)} get-tuple-element(%wide.param.163), index=1
  ROOT %lt.341 = pred[]{:T(512)} compare(%get-tuple-element.416, %constant.430), direction=LT
}

%body.2 (wide.param.164: (f32[16], u32[])) -> (f32[16], u32[]) {
  %constant.431 = u32[]{:T(128)} constant(2)
  %wide.param.164 = (f32[16]{0:T(128)}, u32[]{:T(128)}) parameter(0)
  %get-tuple-element.417 = u32[]{:T(128)} get-tuple-element(%wide.param.164), index=1
  %fusion.3 = bf16[8,48,128]{2,1,0:T(8,128)(2,1)} fusion(%param.16), kind=kCustom, calls=%async_collective_fusion.2
  %reduce-scatter.5 = f32[16]{0:T(128)} reduce-scatter(%c), replica_groups=[1,8]<=[8], dimensions={0}, to_apply=%add
  %add.7 = u32[]{:T(128)} add(%get-tuple-element.417, %constant.431)
  ROOT %tuple.8 = (f32[16]{0:T(128)}, u32[]{:T(128)}) tuple(%reduce-scatter.5, /*index=1*/%add.7)
}

ENTRY %main.1 (param.16: bf16[1,48,128]) -> f32[] {
  %fusion.1 = bf16[8,48,128]{2,1,0:T(8,128)(2,1)} fusion(%param.16), kind=kCustom, calls=%async_collective_fusion.1
  %fusion.2 = bf16[8,48,128]{2,1,0:T(8,128)(2,1)} fusion(%param.16), kind=kCustom, calls=%async_collective_fusion.2
  %while.12 = (s32[]{:T(128)}, f32[16]{0}) while(%tuple.1), condition=%condition.1, body=%body.1
  %while.13 = (f32[16]{0:T(128)}, u32[]{:T(128)}) while(%tuple.2), condition=%condition.2, body=%body.2
  %permute.1 = (s32[1]{0}, s32[1]{0}, u32[]{:S(2)}) collective-permute-start(%b), source_target_pairs={{3,1},{5,2}}
  %collective-permute-done.1 = s32[1]{0:T(128)} collective-permute-done(%permute.1)
}
"""


def test_the_text_of_a_tpu_s_compiler():
    gather, reduce, permute, scatter = sorted(hlo.collectives(TPU.replace("ALL", ALL)), key=lambda one: one.kind)
    assert (gather.kind, gather.group, gather.times, gather.sizes) == ("all-gather", 8, 1, (8 * 48 * 128 * 2,))
    assert (reduce.kind, reduce.group, reduce.times, reduce.sizes) == ("all-reduce", 4, 9, (512, 4))
    assert (permute.kind, permute.times, permute.sizes) == ("collective-permute", 1, (4,))
    assert (scatter.kind, scatter.times, scatter.sizes) == ("reduce-scatter", 4, (8 * 16 * 4,))
