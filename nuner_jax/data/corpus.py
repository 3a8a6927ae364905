"""The tokenised corpus: memory-mapped flat arrays, made once for (data, tokenizer, window length).

Each sequence holds a text, or one window of a text that is longer than a window. The million sentences of NuNER
are some 35 million tokens, 140 MB; so everything is tokenised once, and the loader only gathers slices.
"""

from __future__ import annotations

import contextlib
import dataclasses
import hashlib
import json
from collections.abc import Sequence
from pathlib import Path

import numpy as np
from absl import logging

from nuner_jax.data import builder, ragged
from nuner_jax.data.tokens import encode, with_special_tokens
from nuner_jax.errors import NunerError
from nuner_jax.folders import locked, workshop, writing
from nuner_jax.pretrained import tokenizer_fingerprint

_FORMAT = 1  # raise it when the arrays below change meaning: older caches are then left alone
_TEXTS_PER_CALL = 1024  # texts per tokenizer call: enough to keep its threads busy

_ARRAYS = {
    "tokens_T": np.int32,
    "sequence_offsets_W1": np.int64,
    "source_W": np.uint8,
    "pair_positions_P": np.uint16,
    "pair_concepts_P": np.int32,
    "pair_offsets_W1": np.int64,
    "concept_tokens_U": np.int32,
    "concept_offsets_C1": np.int64,
    "concept_mentions_C": np.int64,
}


@dataclasses.dataclass(frozen=True)
class Corpus:
    """The tokenised texts of one split, over all sources.

    tokens_T, sequence_offsets_W1: the sequences, special tokens included.
    source_W: which source (index into `source_names`) a sequence is from.
    pair_positions_P, pair_concepts_P, pair_offsets_W1: for each sequence its positive pairs, (position in the
      sequence, concept id), each pair once.
    concept_tokens_U, concept_offsets_C1: the concept names, special tokens included.
    concept_mentions_C: number of mentions of each concept.
    report: what tokenising and windowing did.
    """

    tokens_T: np.ndarray
    sequence_offsets_W1: np.ndarray
    source_W: np.ndarray
    pair_positions_P: np.ndarray
    pair_concepts_P: np.ndarray
    pair_offsets_W1: np.ndarray
    concept_tokens_U: np.ndarray
    concept_offsets_C1: np.ndarray
    concept_mentions_C: np.ndarray
    concept_names: Sequence[str]
    source_names: Sequence[str]
    report: dict[str, int]
    fingerprint: str

    @property
    def length_W(self) -> np.ndarray:
        """Tokens per sequence, special tokens included: int64 [W]."""
        return np.diff(self.sequence_offsets_W1)


def load_corpus(
    sources: dict[str, Path],
    split: str,
    tokenizer,
    *,
    window: int,
    concept_length: int,
    cache_dir: Path,
) -> Corpus:
    """Opens the corpus of these data sets, tokenising them first where the cache has no such corpus.

    Args:
      sources: name -> folder of a built data set.
      split: "train" or "validation".
      tokenizer: a fast tokenizer.
      window: tokens per sequence at most, the two special tokens included.
      concept_length: tokens per concept name at most, the two special tokens included; longer names are cut
        there, and counted in the report.
      cache_dir: where tokenised corpora are kept.

    Raises:
      NunerError: the split holds no text, or the cache cannot be written.
    """
    key = {
        "format": _FORMAT,
        "data": [(name, builder.fingerprint(folder)) for name, folder in sources.items()],  # their order counts
        "split": split,
        "tokenizer": tokenizer_fingerprint(tokenizer),
        "window": window,
        "concept_length": concept_length,
    }
    fingerprint = hashlib.sha256(json.dumps(key, sort_keys=True).encode()).hexdigest()
    folder = Path(cache_dir) / "corpus" / f"{split}-{fingerprint[:16]}"
    if not (folder / "corpus.json").exists():
        with locked(folder):  # of several processes on a machine, one tokenises
            if not (folder / "corpus.json").exists():
                with writing(folder), workshop(folder) as temporary:
                    _write_corpus(temporary / "corpus", sources, split, tokenizer, window, concept_length)
                    (temporary / "corpus").rename(folder)
    return _open_corpus(folder, fingerprint)


def _open_corpus(folder: Path, fingerprint: str) -> Corpus:
    def broken(path: Path) -> NunerError:
        return NunerError(f"{path} is missing or incomplete: delete the folder {folder}, and it is made again")

    try:
        info = json.loads((folder / "corpus.json").read_text())
    except ValueError as error:
        raise broken(folder / "corpus.json") from error
    arrays = {}
    for name, dtype in _ARRAYS.items():
        path, size = folder / name, info["sizes"][name]
        if not path.exists() or path.stat().st_size != size * np.dtype(dtype).itemsize:
            raise broken(path)
        arrays[name] = np.memmap(path, dtype, "r") if size else np.zeros(0, dtype)
    return Corpus(
        **arrays,
        concept_names=info["concept_names"],
        source_names=info["source_names"],
        report=info["report"],
        fingerprint=fingerprint,
    )


def _write_corpus(folder: Path, sources, split: str, tokenizer, window: int, concept_length: int) -> None:
    """Tokenises all sources into a folder of flat files."""
    folder.mkdir()
    sizes = dict.fromkeys(_ARRAYS, 0)
    report: dict[str, int] = {}
    totals = {"tokens": 0, "pairs": 0}
    concept_ids: dict[str, int] = {}
    mentions: list[int] = []
    with contextlib.ExitStack() as stack:
        files = {name: stack.enter_context((folder / name).open("wb")) for name in _ARRAYS}

        def append(name: str, values) -> None:
            array = np.ascontiguousarray(values, _ARRAYS[name])
            files[name].write(array.tobytes())  # not tofile: it does not tell a full disk by its name
            sizes[name] += array.size

        append("sequence_offsets_W1", [0])
        append("pair_offsets_W1", [0])
        for index, (name, data_dir) in enumerate(sources.items()):
            records = builder.open_split(data_dir, split)
            for start in range(0, len(records), _TEXTS_PER_CALL):
                batch = records[start : start + _TEXTS_PER_CALL]
                encoded = _encode(batch, tokenizer, concept_ids, mentions, window, report)
                append("source_W", np.full(encoded["length_W"].size, index))
                append("tokens_T", encoded["tokens_T"])
                append("pair_positions_P", encoded["pair_positions_P"])
                append("pair_concepts_P", encoded["pair_concepts_P"])
                append("sequence_offsets_W1", _continue(totals, "tokens", encoded["length_W"]))
                append("pair_offsets_W1", _continue(totals, "pairs", encoded["pairs_W"]))
            logging.info("tokenised the %s split of source %s", split, name)
        if not sizes["source_W"]:
            raise NunerError(f"the {split} split of {', '.join(map(str, sources.values()))} holds no text")

        names = list(concept_ids)
        concept_tokens_U, concept_offsets_C1 = _encode_concepts(names, tokenizer, concept_length, report)
        append("concept_tokens_U", concept_tokens_U)
        append("concept_offsets_C1", concept_offsets_C1)
        append("concept_mentions_C", mentions)
    info = {"sizes": sizes, "report": report | totals, "concept_names": names, "source_names": list(sources)}
    (folder / "corpus.json").write_text(json.dumps(info))


def _continue(totals: dict[str, int], key: str, length_N: np.ndarray) -> np.ndarray:
    """The ends of the next rows of a ragged array that is written in pieces; advances the total."""
    ends_N = totals[key] + np.cumsum(length_N)
    totals[key] += int(length_N.sum())
    return ends_N


def _encode(records, tokenizer, concept_ids, mentions, window, report) -> dict[str, np.ndarray]:
    """Tokenises a batch of texts, finds the tokens of each mention, and cuts long texts into windows.

    Texts stand one after another in one coordinate of characters and one of tokens, so that all of a batch's
    mentions are found by two binary searches.
    """
    texts = [record.text for record in records]
    encoded = encode(texts, tokenizer)
    spans_Tx2 = encoded.spans_Tx2
    mentions_Mx3 = _mentions(records, encoded.char_offsets_N1, concept_ids, mentions)
    first_M = np.searchsorted(spans_Tx2[:, 1], mentions_Mx3[:, 0], side="right")
    stop_M = np.searchsorted(spans_Tx2[:, 0], mentions_Mx3[:, 1], side="left")
    _count(report, "mentions", len(mentions_Mx3))
    _count(report, "mentions_without_tokens", int(np.sum(stop_M <= first_M)))
    stop_M = np.maximum(stop_M, first_M)
    # Two mentions of one concept can share a token ("Ann-Marie"): each pair counts once.
    pairs_Px2 = np.stack(
        [ragged.ranges(first_M, stop_M - first_M), np.repeat(mentions_Mx3[:, 2], stop_M - first_M)],
        axis=1,
    )
    pairs_Px2 = np.unique(pairs_Px2, axis=0)

    within_T = np.diff(spans_Tx2[:, 0], prepend=-1) == 0  # a further token of the same character (bytes of an emoji)
    breaks_T = _word_starts(texts, spans_Tx2[:, 0]) & ~within_T
    inside_T = _within_mentions(first_M, stop_M, len(spans_Tx2)) | within_T
    start_W, stop_W = _windows(encoded.token_offsets_N1, breaks_T, inside_T, window - 2, report)
    _count(report, "texts", len(texts))
    _count(report, "sequences", start_W.size)

    tokens_T, offsets_W1 = with_special_tokens(encoded.ids_T, start_W, stop_W - start_W, tokenizer)
    window_P = np.searchsorted(stop_W, pairs_Px2[:, 0], side="right")
    return {
        "tokens_T": tokens_T,
        "length_W": np.diff(offsets_W1),
        "pair_positions_P": pairs_Px2[:, 0] - start_W[window_P] + 1 if window_P.size else window_P,
        "pair_concepts_P": pairs_Px2[:, 1],
        "pairs_W": np.bincount(window_P, minlength=start_W.size),
    }


def _mentions(records, char_offsets, concept_ids, mentions) -> np.ndarray:
    """All mentions of a batch as (start, end, concept id), characters counted over the whole batch."""
    rows = []
    for record, base in zip(records, char_offsets[:-1].tolist(), strict=True):
        for entity in record.entities:
            concept = concept_ids.setdefault(entity.concept, len(concept_ids))
            if concept == len(mentions):
                mentions.append(0)
            mentions[concept] += 1
            rows.append((base + entity.start, base + entity.end, concept))
    return np.array(rows, np.int64).reshape(-1, 3)


def _within_mentions(first_M: np.ndarray, stop_M: np.ndarray, size: int) -> np.ndarray:
    """bool [T]: whether a cut before a token would divide a mention (tokens first to stop, exclusive)."""
    depth_T1 = np.zeros(size + 1, np.int32)
    np.add.at(depth_T1, first_M[stop_M > first_M] + 1, 1)
    np.add.at(depth_T1, stop_M[stop_M > first_M], -1)
    return np.cumsum(depth_T1)[:-1] > 0


def _word_starts(texts: list[str], char_T: np.ndarray) -> np.ndarray:
    """bool [T]: whether a token begins a word, that is, follows white space or begins with it."""
    chars = np.frombuffer("\n".join([*texts, ""]).encode("utf-32-le", "surrogatepass"), np.uint32)
    space = np.isin(chars, [ord(c) for c in " \t\n\r\f\v\x85\xa0\u2028\u2029\u3000"])
    return space[char_T - 1] | space[np.minimum(char_T, chars.size - 1)] | (char_T == 0)


def _windows(token_offsets, breaks_T, inside_T, capacity: int, report) -> tuple[np.ndarray, np.ndarray]:
    """Token ranges of the windows: whole texts where they fit, else pieces that end at word boundaries.

    A piece ends at the last word boundary that divides no mention; failing that (a "word" longer than a window,
    a script without spaces), after the last token where no mention or character is divided; failing that (a
    mention longer than a window), at the last word boundary, or where the window is full. Nothing is left out.
    """
    starts, stops = [], []
    for start, stop in zip(token_offsets[:-1].tolist(), token_offsets[1:].tolist(), strict=True):
        if stop == start:
            _count(report, "texts_without_tokens", 1)
        _count(report, "texts_split", int(stop - start > capacity))
        while stop - start > capacity:
            cuts = np.arange(start + 1, start + capacity + 1)
            words, outside = breaks_T[cuts], ~inside_T[cuts]
            choices = (
                ("cuts_between_words", cuts[words & outside]),
                ("cuts_in_words", cuts[outside]),
                ("cuts_through_mentions", cuts[words]),
                ("cuts_through_mentions", cuts),
            )
            kind, places = next(choice for choice in choices if choice[1].size)
            cut = int(places[-1])
            _count(report, kind, 1)
            starts.append(start)
            stops.append(cut)
            start = cut
        if stop > start:
            starts.append(start)
            stops.append(stop)
    return np.array(starts, np.int64), np.array(stops, np.int64)


def _encode_concepts(names: list[str], tokenizer, concept_length: int, report) -> tuple[np.ndarray, np.ndarray]:
    """The tokens of all concept names, each as a sequence, and their offsets."""
    encoded = encode(names, tokenizer)
    length_C = np.diff(encoded.token_offsets_N1)
    kept_C = np.minimum(length_C, concept_length - 2)
    _count(report, "concepts", len(names))
    _count(report, "concept_names_cut", int(np.sum(kept_C < length_C)))
    return with_special_tokens(encoded.ids_T, encoded.token_offsets_N1[:-1], kept_C, tokenizer)


def _count(report: dict[str, int], key: str, number: int) -> None:
    report[key] = report.get(key, 0) + number
