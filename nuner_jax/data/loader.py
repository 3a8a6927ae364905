"""Packed batches for contrastive pre-training: a batch is a pure function of (seed, step).

Batch `step` is the `step`-th piece of the endless stream of rows. There is no iterator state: to resume at a step
is to ask for it, on any number of hosts, each of which gathers its own rows only. The distinct concepts of the
whole batch are found on every host (a few thousand ids) and dealt to rows of their own, so that each is encoded
once.

Shapes: R text rows of L tokens with P positive pairs each; Q concept rows of K tokens with S slots each.
"""

from __future__ import annotations

import dataclasses
import math

import numpy as np

from nuner_jax.data import packing, ragged
from nuner_jax.data.corpus import Corpus
from nuner_jax.data.packed_rows import Placed, RowStream
from nuner_jax.errors import NunerError

_MEASURED_BATCHES = 256  # batches looked at to choose the static shapes
_SEQUENCES_AT_ONCE = 2**16  # whose concepts are counted: memory does not grow with the corpus
_HEADROOM = 1.06  # over the largest of them; what does not fit is counted in the training log


@dataclasses.dataclass(frozen=True)
class Shapes:
    """The static shapes of a batch: R x L text, P pairs a row, Q x K concept tokens, S concepts a row."""

    rows: int
    row_length: int
    pairs_per_row: int
    concept_rows: int
    concept_row_length: int
    concepts_per_row: int


class PackedLoader:
    """Batches of packed rows, as a pure function of the step."""

    def __init__(
        self,
        corpus: Corpus,
        *,
        rows: int,
        row_length: int,
        concept_row_length: int | None,
        row_multiple: int = 1,
        seed: int,
        pad_id: int,
        accumulate: int = 1,
        weights: dict[str, float] | None = None,
        load_W: np.ndarray | None = None,
        shuffle: bool = True,
    ):
        """Plans the packing and measures the static shapes.

        Args:
          corpus: the tokenised texts.
          rows: R, text rows of one batch.
          row_length: L, tokens per text row.
          concept_row_length: the largest K, tokens per concept row, to choose; None: batches of text rows alone.
          row_multiple: Q is rounded up to a multiple of it, so that a batch is the same on every mesh whose
            batch axes divide it.
          seed: of the shuffles.
          pad_id: token id of empty positions.
          accumulate: batches of an update, to which its rows are dealt by turns: the same rows, however many they are.
          weights: source name -> visits per epoch (default 1 each); a fraction is a seeded part of the source.
          load_W: what batches are to have alike, of each sequence; None: its `concept_tokens`.
          shuffle: False gives one epoch and then empty rows, for evaluation.

        Raises:
          NunerError: a negative weight, a corpus that is empty at these weights, a sequence longer than a row.
        """
        self.corpus, self.pad_id, self._accumulate = corpus, pad_id, accumulate
        self.frozen_TxD: np.ndarray | None = None  # of each token of the corpus, to be gathered with it
        self._visits_M = visits(corpus, weights or {}, seed)
        if not self._visits_M.size:
            raise NunerError(f"no sequence is left at the source weights {weights} (config.data.sources)")
        self._stream = RowStream(
            corpus.length_W[self._visits_M],
            row_length=row_length,
            seed=seed,
            shuffle=shuffle,
            strata=rows * accumulate,
            load_S=(concept_tokens(corpus) if load_W is None else load_W)[self._visits_M],
        )
        self.shapes = self._measure(rows, row_length, concept_row_length, row_multiple)

    @property
    def rows_per_epoch(self) -> int:
        """Packed rows that hold every sequence once."""
        return self._stream.rows_per_epoch

    @property
    def sequences_per_epoch(self) -> int:
        """Sequences visited in an epoch, weights included."""
        return self._visits_M.size

    @property
    def fill(self) -> float:
        """Share of text token slots that hold a token."""
        return self._stream.fill

    @property
    def num_batches(self) -> int:
        """Batches that visit every row at least once."""
        return math.ceil(self.rows_per_epoch / self.shapes.rows)

    def batch(
        self, index: int, text_rows: np.ndarray | None = None, concept_rows: np.ndarray | None = None
    ) -> dict[str, np.ndarray]:
        """The batch of this index: the rows asked for (None: all) of the text, and of the concepts.

        Args:
          index: of the batch.
          text_rows, concept_rows: int [R'], [Q'], distinct rows of the batch; the result has them in this order,
            and R', Q' for R, Q below.

        Returns:
          tokens, segments [R, L] int32 (segment 0 is padding); scored [R, L] bool;
          pair_positions, pair_concepts [R, P] int32 (-1 pads; positions in the row, concept ids);
          concept_tokens, concept_segments [Q, K] int32; concept_ids [Q, S] int32 (-1 is an empty slot);
          dropped_pairs [R], dropped_concepts [Q] int32, what the static shapes had no room for. Of text rows alone
          there are those of the text. With `frozen_TxD`, frozen [R, L, D] besides, 0 in padding.
        """
        number_R = self._numbers(index, self.shapes.rows)
        text = self._text_rows(self._placed(number_R if text_rows is None else number_R[text_rows]))
        if not self.shapes.concept_rows:
            return text
        concepts = _distinct_concepts(self.corpus, self._placed(number_R).sequence_N)
        return text | self._concept_rows(concepts, concept_rows)

    def _numbers(self, index: int, rows: int) -> np.ndarray:
        """The rows of the stream that a batch has: int64 [R]."""
        update, part = divmod(index, self._accumulate)
        return (update * rows + np.arange(rows)) * self._accumulate + part

    def _placed(self, number_R: np.ndarray) -> Placed:
        """The sequences of the corpus in these rows of the stream."""
        placed = self._stream.placed(number_R)
        return dataclasses.replace(placed, sequence_N=self._visits_M[placed.sequence_N])

    def _text_rows(self, placed: Placed) -> dict[str, np.ndarray]:
        """Gathers tokens, segments and positive pairs of some rows of a batch."""
        corpus, rows, room = self.corpus, placed.rows, self.shapes.pairs_per_row
        tokens, segments = placed.gather(corpus.tokens_T, corpus.sequence_offsets_W1, self.pad_id)
        scored = segments > 0
        for special_N in (placed.start_N, placed.start_N + placed.length_N - 1):
            scored.reshape(-1)[special_N] = False

        first_pair_N, pairs_N = _pair_ranges(corpus, placed.sequence_N)
        pairs = ragged.ranges(first_pair_N, pairs_N)
        position_P = np.repeat(placed.start_N, pairs_N) + corpus.pair_positions_P[pairs]
        row_P = np.repeat(placed.row_N, pairs_N)
        place_P = ragged.ranges(np.zeros(rows), np.bincount(row_P, minlength=rows))
        fits_P = place_P < room
        # A pair without room must not turn into a negative: its token is not scored at all, and its other
        # pairs go too.
        scored.reshape(-1)[position_P[~fits_P]] = False
        kept_P = scored.reshape(-1)[position_P]
        pair_positions = np.full((rows, room), -1, np.int32)
        pair_concepts = np.full_like(pair_positions, -1)
        where = row_P[kept_P], place_P[kept_P]
        pair_positions[where] = position_P[kept_P] % placed.row_length
        pair_concepts[where] = corpus.pair_concepts_P[pairs[kept_P]]
        frozen = {}
        if self.frozen_TxD is not None:
            frozen["frozen"] = placed.values(self.frozen_TxD, corpus.sequence_offsets_W1, 0)
        return {
            "tokens": tokens,
            "segments": segments,
            "scored": scored,
            "pair_positions": pair_positions,
            "pair_concepts": pair_concepts,
            "dropped_pairs": np.bincount(row_P[~kept_P], minlength=rows).astype(np.int32),
            **frozen,
        }

    def _concept_rows(self, concepts: np.ndarray, part: np.ndarray | None) -> dict[str, np.ndarray]:
        """Deals the batch's distinct concepts to rows, and gathers the tokens of some of the rows."""
        shapes, corpus = self.shapes, self.corpus
        first_N = np.asarray(corpus.concept_offsets_C1[concepts])
        length_N = np.asarray(corpus.concept_offsets_C1[concepts + 1]) - first_N
        row_N, slot_N, offset_N = packing.deal(length_N, shapes.concept_rows)
        fits_N = (slot_N < shapes.concepts_per_row) & (offset_N + length_N <= shapes.concept_row_length)
        dropped = np.bincount(row_N[~fits_N], minlength=shapes.concept_rows).astype(np.int32)

        part = np.arange(shapes.concept_rows) if part is None else part
        place_Q = np.full(shapes.concept_rows, -1)  # of each row of the batch among those asked for
        place_Q[part] = np.arange(len(part))
        mine_N = fits_N & (place_Q[row_N] >= 0)
        row_n, slot_n, offset_n = place_Q[row_N[mine_N]], slot_N[mine_N], offset_N[mine_N]
        tokens = np.full((len(part), shapes.concept_row_length), self.pad_id, np.int32)
        segments = np.zeros_like(tokens)
        ids = np.full((len(part), shapes.concepts_per_row), -1, np.int32)
        to = ragged.ranges(row_n * shapes.concept_row_length + offset_n, length_N[mine_N])
        tokens.reshape(-1)[to] = corpus.concept_tokens_U[ragged.ranges(first_N[mine_N], length_N[mine_N])]
        segments.reshape(-1)[to] = np.repeat(slot_n + 1, length_N[mine_N])
        ids[row_n, slot_n] = concepts[mine_N]
        return {
            "concept_tokens": tokens,
            "concept_segments": segments,
            "concept_ids": ids,
            "dropped_concepts": dropped[part],
        }

    def _measure(self, rows: int, row_length: int, concept_row_length: int | None, row_multiple: int) -> Shapes:
        """Static shapes from the first batches: the largest of each, and a little headroom."""
        number = min(_MEASURED_BATCHES, math.ceil(self.rows_per_epoch / rows))
        batches = [self._placed(self._numbers(index, rows)) for index in range(number)]
        pairs = 1
        for placed in batches:
            pairs = max(pairs, np.bincount(placed.row_N, _pair_ranges(self.corpus, placed.sequence_N)[1]).max())
        concept_shape = (0, 0, 0)
        if concept_row_length is not None:
            sequences = [placed.sequence_N for placed in batches]
            concept_shape = self._measure_concepts(sequences, concept_row_length, row_multiple)
        return Shapes(rows, row_length, round_up(math.ceil(_HEADROOM * pairs), 8), *concept_shape)

    def _measure_concepts(self, batches: list[np.ndarray], longest_row: int, row_multiple: int) -> tuple[int, int, int]:
        """Concept rows, tokens per row and concepts per row that hold the concepts of these batches' sequences."""
        concepts, tokens = 1, 1
        concept_length_C = np.diff(self.corpus.concept_offsets_C1)
        for sequences in batches:
            distinct = _distinct_concepts(self.corpus, sequences)
            concepts, tokens = max(concepts, distinct.size), max(tokens, concept_length_C[distinct].sum())
        # Few long rows attend over more than they need, many short ones leave gaps: the rows are as many as the
        # longest allowed row asks for, and then only as long as they must be (dealing makes them alike).
        tokens = math.ceil(_HEADROOM * tokens)
        rows = round_up(math.ceil(tokens / longest_row), row_multiple)
        longest = int(concept_length_C.max(initial=1))
        row_length = round_up(max(longest, math.ceil(tokens / rows)), 8)
        return rows, row_length, math.ceil(_HEADROOM * concepts / rows)


def visits(corpus: Corpus, weights: dict[str, float], seed: int) -> np.ndarray:
    """The sequences of one epoch: each source as often as its weight says, int64 [M].

    Args:
      corpus, weights, seed: as `PackedLoader` takes them.

    Raises:
      NunerError: a negative weight.
    """
    for name, weight in weights.items():
        if not 0 <= weight < math.inf:
            raise NunerError(f"config.data.sources.{name}.weight = {weight}: visits per epoch are at least 0")
    keys_W = np.random.Generator(np.random.Philox(key=[seed, 2**63])).random(corpus.source_W.size)
    weight_W = np.array([weights.get(name, 1.0) for name in corpus.source_names])[corpus.source_W]
    copies_W = np.floor(weight_W) + (keys_W < weight_W % 1)
    return np.repeat(np.arange(corpus.source_W.size), copies_W.astype(np.int64))


def concept_tokens(corpus: Corpus) -> np.ndarray:
    """Tokens of the names of each sequence's distinct concepts: int64 [W].

    The static shapes of a batch are those of the fullest one, so it is these that batches should have alike.
    """
    length_C, sequences = np.diff(corpus.concept_offsets_C1), corpus.length_W.size
    tokens_W = np.zeros(sequences, np.int64)
    for first in range(0, sequences, _SEQUENCES_AT_ONCE):
        pair_offsets = np.asarray(corpus.pair_offsets_W1[first : first + _SEQUENCES_AT_ONCE + 1])
        concept_P = np.asarray(corpus.pair_concepts_P[pair_offsets[0] : pair_offsets[-1]], np.int64)
        sequence_P = np.repeat(np.arange(pair_offsets.size - 1), np.diff(pair_offsets))
        both_P = sequence_P * length_C.size + concept_P
        # The tokens of a mention follow each other: most repetitions go before the sorting, which takes the time.
        both_P = both_P[np.diff(both_P, prepend=-1) != 0]
        sequence_N, concept_N = np.divmod(np.unique(both_P), length_C.size)
        tokens_W[first : first + pair_offsets.size - 1] = np.bincount(
            sequence_N, length_C[concept_N], minlength=pair_offsets.size - 1
        )
    return tokens_W


def _pair_ranges(corpus: Corpus, sequences: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """First pair and number of pairs of each sequence."""
    first_N = np.asarray(corpus.pair_offsets_W1[sequences])
    return first_N, np.asarray(corpus.pair_offsets_W1[sequences + 1]) - first_N


def _distinct_concepts(corpus: Corpus, sequences: np.ndarray) -> np.ndarray:
    """The distinct concept ids of these sequences, ascending: int64 [N]."""
    return np.unique(corpus.pair_concepts_P[ragged.ranges(*_pair_ranges(corpus, sequences))]).astype(np.int64)


def round_up(value: int, multiple: int) -> int:
    """The least multiple that is not below the value."""
    return -(-int(value) // multiple) * multiple
