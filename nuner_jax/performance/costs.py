"""What a training step must compute and move: operations and bytes of each part, counted from the model's sizes.

Operations are those of matrix products, a multiplication and its addition being two; all else (LayerNorm, softmax,
GELU, softplus, the optimizer) is bound by memory, and counted in bytes alone. What an implementation computes twice
(rematerialisation, flash attention's backward pass, a loss in chunks) is counted once: these are *model* operations,
as in Chowdhery et al. 2022 (PaLM), appendix B.

Bytes are the least that any program moves: each product reads its two operands and writes its result once, attention
as one fused kernel, everything elementwise within its neighbours. Activations are of the compute dtype; parameters and
their gradients are float32. So the time that both give is a floor, below which no implementation of this model gets.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable, Mapping, Sequence

import numpy as np

from nuner_jax.models.encoder_config import EncoderConfig

PARAMETER_BYTES = 4  # float32
ON_TOP = ("head", "loss", "optimizer")
"""The parts of a step that are no encoder's."""
OPTIMIZER_BYTES = 32  # AdamW per parameter: gradient (norm), parameter, gradient, two moments; three are written


@dataclasses.dataclass(frozen=True)
class Load:
    """What an encoder is given in one step.

    tokens: positions that it computes.
    attended: pairs (token, token that it attends to).
    passes: how often its parameters are read, which is the number of micro-batches.
    """

    tokens: float
    attended: float
    passes: int = 1


def whole(rows: int, row_length: int, passes: int = 1) -> Load:
    """What is computed: every position of `rows` rows in each pass, padding too, attending to its whole row."""
    tokens = passes * rows * row_length
    return Load(tokens, tokens * row_length, passes)


def within(segments_AxRxL: np.ndarray) -> Load:
    """What is useful: the tokens of segments, each attending to its own segment; 0 is padding."""
    length = segments_AxRxL.shape[-1]
    rows_NxL = segments_AxRxL.reshape(-1, length).astype(np.int64)
    # One number for each segment of each row; those of padding are then left out.
    numbers = rows_NxL + (rows_NxL.max(initial=0) + 1) * np.arange(len(rows_NxL))[:, None]
    sizes = np.unique(numbers[rows_NxL > 0], return_counts=True)[1]
    return Load(float(sizes.sum()), float(np.square(sizes).sum()), len(segments_AxRxL))


@dataclasses.dataclass(frozen=True)
class Cost:
    """Operations of matrix products; bytes of activations, which devices share, and of parameters, which each reads."""

    operations: float = 0.0
    activation_bytes: float = 0.0
    parameter_bytes: float = 0.0

    def __add__(self, other: Cost) -> Cost:
        return Cost(*(a + b for a, b in zip(dataclasses.astuple(self), dataclasses.astuple(other), strict=True)))

    def seconds(self, *, matrix_rate: float, bandwidth: float, devices: int = 1) -> float:
        """The floor: no part is faster than its operations, nor than its bytes.

        Args:
          matrix_rate: operations per second of one device.
          bandwidth: bytes per second of one device's memory.
          devices: that share the rows; each reads all parameters.
        """
        moved = self.activation_bytes / devices + self.parameter_bytes
        return max(self.operations / devices / matrix_rate, moved / bandwidth)


@dataclasses.dataclass(frozen=True)
class Part:
    """A part of the model in one step: its forward pass, and its backward pass (nothing, where it is frozen)."""

    forward: Cost
    backward: Cost = Cost()

    @property
    def both(self) -> Cost:
        """Both passes."""
        return self.forward + self.backward

    def __add__(self, other: Part) -> Part:
        return Part(self.forward + other.forward, self.backward + other.backward)


def total(parts: Iterable[Part]) -> Cost:
    """All passes of all parts."""
    return sum((part.both for part in parts), start=Cost())


def encoder(
    config: EncoderConfig, load: Load, *, frozen_layers: int, itemsize: int, keeps_frozen: bool = False
) -> dict[str, Part]:
    """The parts "embeddings", "frozen" and "trained" of an encoder.

    Args:
      config: its sizes.
      load: what it is given.
      frozen_layers: bottom layers that, with the embeddings, have no backward pass; 0: all is trained.
      itemsize: bytes of a number in the compute dtype.
      keeps_frozen: whether what the embeddings and the frozen layers give is there already: then they cost nothing.
    """
    forward, backward = _layer(config, load, itemsize)
    frozen = sum((Part(forward) for _ in range(frozen_layers)), start=Part(Cost()))
    trained = sum((Part(forward, backward) for _ in range(config.num_layers - frozen_layers)), start=Part(Cost()))
    if 0 < frozen_layers < config.num_layers:
        # No gradient goes below the lowest trained layer, so its first product has none of its input.
        width = config.hidden_size
        first = Cost(
            -6.0 * load.tokens * width**2, -4.0 * load.tokens * width * itemsize, -_weights(3 * width**2, load)
        )
        trained += Part(Cost(), first)
    if keeps_frozen:
        return {"embeddings": Part(Cost()), "frozen": Part(Cost()), "trained": trained}
    embeddings = Part(_embedding(config, load, itemsize))
    if not frozen_layers:
        embeddings = dataclasses.replace(embeddings, backward=_embedding_gradient(config, load, itemsize))
    return {"embeddings": embeddings, "frozen": frozen, "trained": trained}


def _layer(config: EncoderConfig, load: Load, itemsize: int) -> tuple[Cost, Cost]:
    """Forward and backward pass of one layer: four products and the attention, each with two gradients."""
    width, inner = config.hidden_size, config.intermediate_size
    products = [dense(load, *sizes, itemsize) for sizes in ((width, 3 * width), (width, width))]
    products += [dense(load, *sizes, itemsize) for sizes in ((width, inner), (inner, width))]
    vectors = load.tokens * width * itemsize
    # Scores and mixtures forward; of both, two gradients each. Read are q, k, v (and backward o, do), written the rest.
    attention = Part(Cost(4.0 * load.attended * width, 4 * vectors), Cost(8.0 * load.attended * width, 8 * vectors))
    layer = sum(products, start=attention)
    return layer.forward, layer.backward


def dense(load: Load, inputs: int, outputs: int, itemsize: int) -> Part:
    """A product of every token's vector with a matrix [inputs, outputs]."""
    operations = 2.0 * load.tokens * inputs * outputs
    activations = load.tokens * (inputs + outputs) * itemsize
    weights = _weights(inputs * outputs, load)
    return Part(Cost(operations, activations, weights), Cost(2 * operations, 2 * activations, 2 * weights))


def _weights(number: int, load: Load) -> float:
    return float(number * PARAMETER_BYTES * load.passes)


def _embedding(config: EncoderConfig, load: Load, itemsize: int) -> Cost:
    """Rows of two tables are read, and their sum is written."""
    return Cost(0.0, load.tokens * config.hidden_size * (2 * PARAMETER_BYTES + itemsize))


def _embedding_gradient(config: EncoderConfig, load: Load, itemsize: int) -> Cost:
    """The tables' gradients are written whole, and each token is added to a row of both."""
    tables = (config.vocab_size + config.max_positions) * config.hidden_size
    return Cost(0.0, load.tokens * config.hidden_size * (itemsize + 4 * PARAMETER_BYTES), _weights(tables, load))


def contrastive_loss(pairs: float, vectors: float, width: int, itemsize: int) -> Part:
    """The dense part of the contrastive loss; its positive pairs are a thousandth of it, and left out.

    Args:
      pairs: dot products of a token and a concept.
      vectors: tokens and concepts.
      width: of a vector.
      itemsize: bytes of a number in the compute dtype.
    """
    read = vectors * width * itemsize
    return Part(Cost(2.0 * pairs * width, read), Cost(4.0 * pairs * width, read + vectors * width * PARAMETER_BYTES))


def optimizer(parameters: int) -> Part:
    """The update of the trained parameters, gradient norm included: no products, but much to move."""
    return Part(Cost(0.0, 0.0, float(OPTIMIZER_BYTES * parameters)))


def head(load: Load, sizes: Sequence[tuple[int, int]], trains_encoder: bool) -> Part:
    """Dense layers of float32 over vectors, one after another.

    Args:
      load: the vectors, as tokens.
      sizes: inputs and outputs of each layer.
      trains_encoder: whether a gradient goes on below the first one.
    """
    layers = [dense(load, inputs, outputs, PARAMETER_BYTES) for inputs, outputs in sizes]
    part = sum(layers, start=Part(Cost()))
    if trains_encoder:
        return part
    first = layers[0].backward  # of whose two products one remains
    return part + Part(Cost(), Cost(-first.operations / 2, -first.activation_bytes / 2, -first.parameter_bytes / 2))


def two_towers(text: Mapping[str, Part], concept: Mapping[str, Part], loss: Part) -> dict[str, Part]:
    """The parts of contrastive pre-training, from those of its encoders, as a table shows them."""
    return {
        "embeddings": text["embeddings"] + concept["embeddings"],
        "text tower, frozen": text["frozen"],
        "text tower, trained": text["trained"],
        "concept tower": concept["frozen"] + concept["trained"],
        "loss": loss,
    }


def tagger(text: Mapping[str, Part], head: Part) -> dict[str, Part]:
    """The parts of an encoder with a head, as a table shows them."""
    return {
        "embeddings": text["embeddings"],
        "encoder, frozen": text["frozen"],
        "encoder, trained": text["trained"],
        "head": head,
    }
