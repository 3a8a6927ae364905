"""What the devices hold and what they send each other: rows, parameters, and never whole activations."""

import ast
import os
import pathlib
import re
import socket
import subprocess
import sys

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from jax.sharding import AxisType, Mesh

from nuner_jax import config as config_lib
from nuner_jax import losses, sharding
from nuner_jax.errors import NunerError
from nuner_jax.models import params as params_lib
from nuner_jax.models.encoder import EncoderConfig
from nuner_jax.models.towers import TwoTower

ROOT = pathlib.Path(__file__).resolve().parent.parent

# No two of these sizes, nor their products with rows, are alike: a shape tells what an array is.
ROWS, LENGTH, CONCEPT_ROWS, CONCEPT_LENGTH, SLOTS, PAIRS = 16, 20, 8, 28, 5, 6
ENCODER = {
    "model_type": "roberta",
    "vocab_size": 96,
    "hidden_size": 64,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "intermediate_size": 256,
    "max_position_embeddings": 50,
    "type_vocab_size": 1,
    "pad_token_id": 1,
    "layer_norm_eps": 1e-5,
}


def compiled_gradients(mesh: Mesh, activations) -> str:
    """The optimised HLO of the loss of a small pair of towers and its gradients, placed as in training."""
    encoder = EncoderConfig.from_hf(ENCODER)

    def build():
        options = {"frozen_layers": 0, "concept_pooling": "mean", "scale": 1.0, "bias": 0.0, "attention": "xla"}
        return TwoTower(encoder, encoder, dtype=jnp.bfloat16, activations=activations, rngs=nnx.Rngs(0), **options)

    graphdef, abstract = params_lib.split(nnx.eval_shape(build))
    params = sharding.with_shardings(mesh, abstract, config_lib.pretrain().mesh.rules)

    def loss(params, batch):
        towers = params_lib.merge(graphdef, params)
        return losses.contrastive_loss(
            mesh,
            towers.token_vectors(batch["tokens"], batch["segments"]),
            batch["segments"] > 0,
            towers.concept_vectors(batch["concept_tokens"], batch["concept_segments"], SLOTS),
            batch["concept_ids"],
            batch["pair_positions"],
            batch["pair_concepts"],
            *towers.logit(),
        )["loss"]

    shapes = {
        **dict.fromkeys(("tokens", "segments"), (ROWS, LENGTH)),
        **dict.fromkeys(("concept_tokens", "concept_segments"), (CONCEPT_ROWS, CONCEPT_LENGTH)),
        **dict.fromkeys(("pair_positions", "pair_concepts"), (ROWS, PAIRS)),
        "concept_ids": (CONCEPT_ROWS, SLOTS),
    }
    place = sharding.row_sharding(mesh)
    batch = {name: jax.ShapeDtypeStruct(shape, jnp.int32, sharding=place) for name, shape in shapes.items()}
    out_shardings = jax.tree.map(lambda leaf: leaf.sharding, params)
    return jax.jit(jax.grad(loss), out_shardings=out_shardings).lower(params, batch).compile().as_text()


_COLLECTIVE = re.compile(r"= (.*?) (all-reduce|all-gather)(?:-start)?\(.*replica_groups=(\S+)")


def collectives(hlo: str) -> set[tuple[str, tuple[int, ...]]]:
    """(operation, shape) of all floats that devices add up or gather; a group of one device sends nothing."""
    return {
        (operation, tuple(int(size) for size in shape.split(",") if size))
        for results, operation, groups in _COLLECTIVE.findall(hlo)
        if not groups.startswith("{{0},")
        for shape in re.findall(r"\b(?:bf16|f32)\[([0-9,]*)\]", results)
    }


def test_no_activation_is_gathered_or_added_up_where_parameters_are_split():
    mesh = sharding.make_mesh(1, 8, 1)
    found = collectives(compiled_gradients(mesh, sharding.row_sharding(mesh)))
    assert ("all-gather", (64, 256)) in found, "parameters are"
    assert ("all-gather", (CONCEPT_ROWS, SLOTS, 64)) in found, "and the concepts of the loss"
    assert ("all-reduce", (256,)) in found, "and gradients are added up"
    lengths = {
        n * rows for n, rows in ((LENGTH, ROWS), (CONCEPT_LENGTH, CONCEPT_ROWS)) for rows in (1, rows // 8, rows)
    }
    assert not [(operation, shape) for operation, shape in found if lengths & set(shape)]


@pytest.mark.parametrize(
    ("axes", "nearest"),
    [((3, 1, 1), (8, 1, 1)), ((-1, 3, 1), (2, 4, 1)), ((-1, 1, 16), (1, 1, 8)), ((4, 4, 2), (4, 1, 2))],
    ids=str,
)
def test_an_impossible_mesh_is_told_with_shapes_that_would_fit(axes, nearest):
    with pytest.raises(NunerError) as error:
        sharding.make_mesh(*axes)
    asked, *fitting = (ast.literal_eval(shape) for shape in re.findall(r"{.*?}", str(error.value)))
    assert str(error.value).startswith("config.mesh: ") and "does not fit 8 device(s) of kind 'cpu'" in str(error.value)
    assert tuple(asked.values()) == axes and tuple(fitting[0].values()) == nearest
    assert len(fitting) == 3 and all(sharding.make_mesh(**shape).size == 8 for shape in fitting)


def interleaved() -> Mesh:
    """The eight devices in an order that no process's devices are neighbours in, as the wiring of a TPU may ask for."""
    order = np.array(jax.devices())[[0, 4, 1, 5, 2, 6, 3, 7]]
    return Mesh(order.reshape(4, 2, 1), sharding.AXES, axis_types=(AxisType.Auto,) * 3)


@pytest.mark.parametrize(
    "make", [lambda: sharding.make_mesh(4, 2, 1), lambda: sharding.make_mesh(2, 2, 2), interleaved]
)
def test_all_rows_are_local_to_a_single_process(make):
    rows = sharding.local_rows(sharding.batch_sharding(make()), 16)
    np.testing.assert_array_equal(rows, np.arange(16))


def test_the_global_array_is_the_whole_batch_where_devices_are_interleaved():
    place = sharding.batch_sharding(interleaved())
    batch = {"x": np.arange(2 * 16 * 3).reshape(2, 16, 3)}
    local = {"x": batch["x"][:, sharding.local_rows(place, 16)]}
    whole = sharding.to_global(place, local, {"x": 16})["x"]
    np.testing.assert_array_equal(whole, batch["x"])
    on_second = next(shard for shard in whole.addressable_shards if shard.device == jax.devices()[4])
    np.testing.assert_array_equal(on_second.data, batch["x"][:, 2:4])


_TWO_PROCESSES = """
import sys
import jax
import numpy as np
from jax.sharding import AxisType, Mesh
from nuner_jax import sharding

jax.distributed.initialize(sys.argv[1], num_processes=2, process_id=int(sys.argv[2]))
order = np.array(sorted(jax.devices(), key=lambda d: d.id)).reshape(2, 4).T
place = sharding.batch_sharding(Mesh(order.reshape(4, 2, 1), sharding.AXES, axis_types=(AxisType.Auto,) * 3))
batch = np.arange(2 * 16 * 3).reshape(2, 16, 3)
rows = sharding.local_rows(place, 16)
whole = sharding.to_global(place, {"x": batch[:, rows]}, {"x": 16})["x"]
for shard in whole.addressable_shards:
    np.testing.assert_array_equal(shard.data, batch[shard.index])
print("rows", rows.tolist())
"""


@pytest.mark.multiprocess
def test_two_processes_with_interleaved_devices_give_their_own_rows():
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        address = f"127.0.0.1:{free.getsockname()[1]}"
    processes = [
        subprocess.Popen(
            [sys.executable, "-c", _TWO_PROCESSES, address, str(i)],
            cwd=ROOT,
            env={**os.environ, "XLA_FLAGS": "--xla_force_host_platform_device_count=4"},
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
        )
        for i in range(2)
    ]
    outputs = [process.communicate(timeout=120)[0] for process in processes]
    assert [process.returncode for process in processes] == [0, 0], outputs
    assert "rows [0, 1, 4, 5, 8, 9, 12, 13]" in outputs[0]
    assert "rows [2, 3, 6, 7, 10, 11, 14, 15]" in outputs[1]
