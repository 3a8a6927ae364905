"""A task that can be compiled but not trained: pre-training with the shapes of its batch stated, and no data."""

from __future__ import annotations

import math
import types
from collections.abc import Callable, Mapping

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh
from ml_collections import ConfigDict

from nuner_jax import sharding
from nuner_jax.data.loader import Shapes, round_up
from nuner_jax.errors import NunerError
from nuner_jax.tasks.pretrain import Pretrain
from nuner_jax.tasks.protocol import Task

# What the embedded sample has for each text token in batches of 64 x 512, about 800 of its sentences: positive pairs,
# distinct concepts and their names' tokens, special ones included (RoBERTa-like byte pairs). Fewer per token in larger
# batches, where concepts repeat.
_PAIRS, _CONCEPTS, _CONCEPT_TOKENS = 0.52, 0.10, 0.46
_PEAK = 1.5  # the fullest row's pairs over the mean row's; of whole batches, the largest is about the mean

STATED = ("pairs_per_row", "concept_rows", "concept_row_length", "concepts_per_row")
"""What may be stated: fields of `Shapes`, all that no config tells."""


def parse_shapes(text: str) -> dict[str, int]:
    """The sizes that --shapes states: "assumed", or "pairs_per_row=400,concept_rows=64" and so on.

    Raises:
      NunerError: another key, or a value that is no number above 0.
    """
    stated = {}
    for part in text.split(",") if text != "assumed" else ():
        key, _, value = part.partition("=")
        if key not in STATED or not value.isdecimal() or not int(value):
            raise NunerError(
                f"--shapes: {part!r} is not understood: 'assumed', or what the line 'batch:' of a training log says, "
                f"such as {STATED[0]}=400; the keys are {', '.join(STATED)}, and one that is left out is assumed"
            )
        stated[key] = int(value)
    return stated


def assumed_shapes(config: ConfigDict, stated: Mapping[str, int] = types.MappingProxyType({})) -> Shapes:
    """The shapes of a batch of text like the embedded sample's, but for those that are stated.

    Args:
      config: of pre-training.
      stated: fields of `Shapes` and their values.
    """
    data = config.data
    rows = data.rows // config.optim.accumulate
    tokens = rows * data.row_length
    rows_needed = math.ceil(_CONCEPT_TOKENS * tokens / data.concept_row_length)
    concept_rows = stated.get("concept_rows", round_up(rows_needed, data.row_multiple))
    shapes = {
        "pairs_per_row": round_up(math.ceil(_PEAK * _PAIRS * data.row_length), 8),
        "concept_rows": concept_rows,
        "concept_row_length": round_up(math.ceil(_CONCEPT_TOKENS * tokens / concept_rows), 8),
        "concepts_per_row": math.ceil(_CONCEPTS * tokens / concept_rows),
    }
    return Shapes(rows=rows, row_length=data.row_length, **(shapes | dict(stated)))


class Sized(Pretrain):
    """Pre-training whose data is not there: it has a step, a batch of shapes, and nothing to train on."""

    def __init__(self, config: ConfigDict, mesh: Mesh, stated: Mapping[str, int]):
        """Fixes all shapes; see `assumed_shapes`."""
        self._stated = stated
        super().__init__(config, mesh, lambda line: None)

    def _open_data(self, say: Callable[[str], None]) -> None:
        self.loader = types.SimpleNamespace(shapes=assumed_shapes(self._config, self._stated))
        self.steps_per_epoch = 1.0  # not known; no more than a constant of the schedule

    def abstract_batch(self) -> dict[str, jax.ShapeDtypeStruct]:
        """What `train_batch` would give: shapes, dtypes and places."""
        shapes, place = self.loader.shapes, sharding.batch_sharding(self._mesh)
        text, concepts = (shapes.rows, shapes.row_length), (shapes.concept_rows, shapes.concept_row_length)
        pairs = (shapes.rows, shapes.pairs_per_row)
        arrays = {
            **dict.fromkeys(("tokens", "segments", "scored"), text),
            **dict.fromkeys(("pair_positions", "pair_concepts"), pairs),
            **dict.fromkeys(("concept_tokens", "concept_segments"), concepts),
            "concept_ids": (shapes.concept_rows, shapes.concepts_per_row),
            "dropped_pairs": (shapes.rows,),
            "dropped_concepts": (shapes.concept_rows,),
        }
        if self._keeps_frozen:
            arrays["frozen"] = (*text, self.text_config.hidden_size)
        dtypes = {"scored": jnp.bool_, "frozen": jnp.bfloat16}
        return {
            name: jax.ShapeDtypeStruct(
                (self._config.optim.accumulate, *shape), dtypes.get(name, jnp.int32), sharding=place
            )
            for name, shape in arrays.items()
        }


def batch_shapes(task: Task, mesh: Mesh, step: int = 0) -> dict[str, jax.ShapeDtypeStruct]:
    """The shapes, dtypes and places of a task's whole batches [A, rows, ...], as that of a step has them."""
    place, batch = sharding.batch_sharding(mesh), task.train_batch(step, np.arange)
    return {name: jax.ShapeDtypeStruct(value.shape, value.dtype, sharding=place) for name, value in batch.items()}
