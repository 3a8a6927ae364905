"""Trains a tokenizer for an encoder from scratch: `python -m nuner_jax.data.tokenizer --input=sample --out=tokenizer`.

A byte-level BPE with RoBERTa's special tokens, learned from the texts and concept names of importable data. The
embedded sample's own (`nuner_jax/data/sample/tokenizer`, 8,192 entries) was made by this command.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from pathlib import Path

from absl import flags

from nuner_jax.data.importers import ImportOptions, Report, import_records, resolve_inputs
from nuner_jax.errors import NunerError, run_command

_SPECIAL = {"bos_token": "<s>", "pad_token": "<pad>", "eos_token": "</s>", "unk_token": "<unk>", "mask_token": "<mask>"}


def main(argv: Sequence[str]) -> None:
    """Reads the flags, and trains."""
    values = flags.FLAGS
    if len(argv) > 1 or not values.input or not values.out:
        raise NunerError("--input=FILE (or sample) and --out=FOLDER are needed")
    size = train_tokenizer(values.input, Path(values.out), values.vocab_size)
    print(f"wrote a tokenizer of {size:,} entries to {values.out}")


def train_tokenizer(inputs: Sequence[str], out: Path, vocab_size: int) -> int:
    """Learns a byte-level BPE and writes it as a Hugging Face tokenizer folder.

    Args:
      inputs: as `nuner_jax.data.build` takes them.
      out: the folder.
      vocab_size: entries at most, special tokens included.

    Returns:
      The number of entries.

    Raises:
      NunerError: bad input, a vocabulary too small for bytes and special tokens, a folder that cannot be written.
    """
    from tokenizers import ByteLevelBPETokenizer
    from transformers import RobertaTokenizer

    least = 256 + len(_SPECIAL)
    if vocab_size < least:
        raise NunerError(f"--vocab_size={vocab_size}: at least {least} are needed (all bytes, and the special tokens)")
    learner = ByteLevelBPETokenizer()
    learner.train_from_iterator(
        _texts(inputs), vocab_size, min_frequency=2, show_progress=False, special_tokens=list(_SPECIAL.values())
    )
    try:
        out.mkdir(parents=True, exist_ok=True)
        vocab, merges = learner.save_model(str(out))
        tokenizer = RobertaTokenizer(vocab=vocab, merges=merges, **_SPECIAL)
        for file in (vocab, merges):  # tokenizer.json holds them
            Path(file).unlink()
        tokenizer.save_pretrained(str(out))
    except OSError as error:
        raise NunerError(f"cannot write the tokenizer {out}: {error}") from error
    return len(tokenizer)


def _texts(inputs: Sequence[str]) -> Iterator[str]:
    for record in import_records(resolve_inputs(inputs), Report(), ImportOptions()):
        yield record.text
        yield from (entity.concept for entity in record.entities)


if __name__ == "__main__":
    flags.DEFINE_multi_string("input", [], "Data to learn from: files that the data builder can import, or sample.")
    flags.DEFINE_string("out", None, "Folder to write.")
    flags.DEFINE_integer("vocab_size", 8192, "Entries, special tokens included.")
    run_command(main)
