"""Encoders in Hugging Face folders: found, read and written without torch; and their tokenizers.

A folder holds config.json, model.safetensors (or shards of it with an index) and the files of a
fast tokenizer. Weights are read by name: whatever is missing or has another shape is an error that
lists all of it, whatever is left over is logged.
"""

from __future__ import annotations

import contextlib
import dataclasses
import hashlib
import json
import os
import re
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from absl import logging

from nuner_jax.errors import NunerError
from nuner_jax.models.encoder_config import EncoderConfig
from nuner_jax.models.hf_weights import HfWeight, check_params, hf_weights, listed
from nuner_jax.models.params import Params, unflatten

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerFast

CONFIG = "config.json"
WEIGHTS = "model.safetensors"
INDEX = "model.safetensors.index.json"

# What is fetched from the hub: patterns of file names.
WEIGHT_FILES = (WEIGHTS, "model-*.safetensors", INDEX)
TOKENIZER_FILES = (
    "tokenizer.json",
    "tokenizer_config.json",
    "special_tokens_map.json",
    "added_tokens.json",
    "vocab.txt",
    "vocab.json",
    "merges.txt",
    "sentencepiece.bpe.model",
)
ALL_FILES = (CONFIG, *WEIGHT_FILES, *TOKENIZER_FILES)

# Each of these sets of files is enough to make a fast tokenizer from.
_VOCABULARIES = (
    ("tokenizer.json",),
    ("vocab.txt",),
    ("vocab.json", "merges.txt"),
    ("sentencepiece.bpe.model",),
)

_FLOAT_DTYPES = ("F16", "BF16", "F32", "F64")
_ENCODER_NAME = re.compile(r"^((?:.*?\.)?)(?:embeddings|encoder\.layer)\.")
_LEGACY_NAMES = {"LayerNorm.gamma": "LayerNorm.weight", "LayerNorm.beta": "LayerNorm.bias"}
# Heads of pre-training and of other tasks, and tables of constants: expected to be left over.
_EXPECTED_LEFTOVER = re.compile(r"pooler|position_ids|token_type_ids|lm_head|^cls\.|classifier")


# --- Folders -----------------------------------------------------------------------------------


def resolve(name_or_path: str | os.PathLike, files: Sequence[str] = ALL_FILES) -> Path:
    """The folder of a model: a local one, or a hub model's in the local cache, fetched if needed.

    Args:
      name_or_path: a folder, or a name on the Hugging Face hub such as "FacebookAI/roberta-base".
      files: patterns of the files to fetch from the hub.

    Raises:
      NunerError: it is neither, or the hub cannot be reached and the model is not in the cache.
    """
    path = Path(name_or_path).expanduser()
    if path.is_dir():
        return path
    if path.exists():
        raise NunerError(f"{path} is a file: pass the folder of the model")
    try:
        from huggingface_hub import snapshot_download

        return Path(snapshot_download(str(name_or_path), allow_patterns=list(files)))
    except Exception as error:  # Of many classes, some of the HTTP client's; the remedy is one.
        reason = str(error).strip().split("\n")[0] or type(error).__name__
        raise NunerError(
            f"no model {str(name_or_path)!r}: there is no folder {path.absolute()}, and as a name "
            f"on the Hugging Face hub it could not be fetched ({reason}). Correct the path or the "
            f"name; or, on a machine with a connection, run `hf download {name_or_path} "
            "--local-dir FOLDER` and pass that folder"
        ) from error


def load_encoder_config(folder: Path) -> EncoderConfig:
    """Reads the encoder's sizes from config.json.

    Raises NunerError if it is missing, no JSON object, or describes an unsupported encoder.
    """
    path = folder / CONFIG
    hf_config = _read_json(path)
    try:
        return EncoderConfig.from_hf(hf_config)
    except NunerError as error:
        raise NunerError(f"{path}: {error}") from error


def _read_json(path: Path) -> dict[str, Any]:
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError as error:
        raise NunerError(f"{path.parent} has no {path.name}: is it a model's folder?") from error
    except (OSError, ValueError) as error:
        raise NunerError(f"{path} cannot be read: {error}; fetch the model again") from error
    if not isinstance(content, dict):
        raise NunerError(f"{path} holds no JSON object; fetch the model again")
    return content


# --- Reading weights ---------------------------------------------------------------------------


@dataclasses.dataclass(frozen=True)
class _Stored:
    """One weight as it lies in an open safetensors file."""

    name: str
    path: Path
    file: Any  # safetensors.safe_open
    shape: tuple[int, ...]
    dtype: str

    def read(self) -> np.ndarray:
        return self.file.get_tensor(self.name).astype(np.float32)


def load_encoder(folder: Path, config: EncoderConfig, reference_params: Mapping[str, Any]) -> Params:
    """Reads an encoder's weights, without torch.

    Args:
      folder: holds model.safetensors, or its shards and their index; any floating-point dtype, any
        prefix before the names ("roberta.", "bert.", ...), LayerNorm weights under either name.
      config: the sizes to expect.
      reference_params: the encoder's own parameter tree, for its paths and shapes (arrays or
        `jax.ShapeDtypeStruct`).

    Returns: a tree like `reference_params` of float32 numpy arrays. Weights in the folder that have
    no place in it are logged by name.

    Raises: NunerError that lists all weights that are missing, of another shape or not floats; or
    names the file that is missing or corrupt.
    """
    weights = hf_weights(config)
    check_params(weights, reference_params)
    with contextlib.ExitStack() as files:
        stored = _open_weights(folder, files)
        problems = [line for weight in weights for line in _problems(weight, stored, folder)]
        if problems:
            raise NunerError(
                f"{folder}: {len(problems)} weights do not fit a {config.model_type} encoder of "
                f"{config.num_layers} layers and width {config.hidden_size}:{listed(problems)}\n"
                "Take the sizes from this folder's config.json, or weights of these sizes"
            )
        _log_unused(folder, stored, weights)
        return unflatten({w.path: w.from_hf([stored[name].read() for name in w.hf_names]) for w in weights})


def _open_weights(folder: Path, files: contextlib.ExitStack) -> dict[str, _Stored]:
    """Opens a folder's weights, by name without prefix; what lies outside the encoder keeps its."""
    from safetensors import SafetensorError, safe_open

    stored = []
    for path in _weight_files(folder):
        try:
            file = files.enter_context(safe_open(path, framework="numpy"))
        except FileNotFoundError as error:
            raise NunerError(f"{path} is missing, but {INDEX} names it; fetch it again") from error
        except (SafetensorError, OSError) as error:
            raise NunerError(f"{path} is corrupt or incomplete ({error}); fetch the model again") from error
        for name in file.keys():  # noqa: SIM118 - not a dict
            part = file.get_slice(name)
            stored.append(_Stored(name, path, file, tuple(part.get_shape()), part.get_dtype()))
    prefix = _common_prefix(folder, [weight.name for weight in stored])
    return {_plain_name(weight.name.removeprefix(prefix)): weight for weight in stored}


def _weight_files(folder: Path) -> list[Path]:
    if (folder / WEIGHTS).exists():
        return [folder / WEIGHTS]
    if (folder / INDEX).exists():
        names = _read_json(folder / INDEX).get("weight_map")
        if not isinstance(names, dict) or not names or not all(isinstance(file, str) for file in names.values()):
            raise NunerError(f"{folder / INDEX} holds no weight_map; fetch the model again")
        return [folder / name for name in sorted(set(names.values()))]
    present = sorted(path.name for path in folder.glob("*.bin")) or ["nothing of the kind"]
    raise NunerError(
        f"{folder} has no {WEIGHTS} ({', '.join(present)} is there). Weights of torch are not read "
        "here: where torch is installed, convert them once with python -c 'from transformers "
        'import AutoModel; AutoModel.from_pretrained("MODEL").save_pretrained("FOLDER")\', and '
        "copy the tokenizer's files beside them"
    )


def _common_prefix(folder: Path, names: Sequence[str]) -> str:
    """What stands before "embeddings." and "encoder.layer." in the names."""
    matches = (_ENCODER_NAME.match(name) for name in names)
    counts = Counter(match.group(1) for match in matches if match).most_common(2)
    if not counts:
        raise NunerError(
            f"{folder} holds no encoder like BERT's: none of its {len(names)} weights is called "
            f"embeddings… or encoder.layer…, the first are {', '.join(names[:3]) or 'none'}"
        )
    if len(counts) > 1 and counts[0][1] == counts[1][1]:
        first, second = (prefix or "no prefix" for prefix, _ in counts)
        raise NunerError(f"{folder} holds two encoders ({first} and {second}); export one to a folder of its own")
    return counts[0][0]


def _plain_name(name: str) -> str:
    for legacy, current in _LEGACY_NAMES.items():
        name = name.replace(legacy, current)
    return name


def _problems(weight: HfWeight, stored: Mapping[str, _Stored], folder: Path) -> Iterator[str]:
    for name in weight.hf_names:
        found = stored.get(name)
        if found is None:
            yield f"{name} is missing in {folder}, expected shape {[*weight.hf_shape]}"
        elif found.shape != weight.hf_shape:
            yield f"{found.name} in {found.path.name} has shape {[*found.shape]}, expected {[*weight.hf_shape]}"
        elif found.dtype not in _FLOAT_DTYPES:
            yield (
                f"{found.name} in {found.path.name} has dtype {found.dtype}, expected one of {', '.join(_FLOAT_DTYPES)}"
            )


def _log_unused(folder: Path, stored: Mapping[str, _Stored], weights: Sequence[HfWeight]) -> None:
    used = {name for weight in weights for name in weight.hf_names}
    unused = sorted(stored[name].name for name in stored.keys() - used)
    expected = [name for name in unused if _EXPECTED_LEFTOVER.search(name)]
    surprising = [name for name in unused if name not in expected]
    if expected:
        logging.info("%s: unused, as expected: %s", folder, ", ".join(expected))
    if surprising:
        logging.warning("%s: unused weights: %s", folder, ", ".join(surprising))


# --- Writing -----------------------------------------------------------------------------------


@dataclasses.dataclass(frozen=True)
class HfHead:
    """What a model with a head has in its files beside the encoder.

    architecture: what `transformers` calls its class, after the family: "ForTokenClassification".
    tensors: the head's weights under their Hugging Face names, float32.
    hf_config: what the head adds to config.json.
    """

    architecture: str
    tensors: Mapping[str, np.ndarray]
    hf_config: Mapping[str, Any]


def save_encoder(folder: Path, config: EncoderConfig, params: Mapping[str, Any], head: HfHead | None = None) -> None:
    """Writes config.json and model.safetensors as `transformers.AutoModel.from_pretrained` reads.

    Args:
      folder: made if it does not exist; other files in it (the tokenizer's) stay.
      config: of the encoder.
      params: its parameter tree; arrays of any kind whose values this process can reach. Written
        as float32, so that `load_encoder` gives the same bits back.
      head: of a model for a task, if it is one.

    Raises: NunerError if the tree is not that of `config`, or the folder cannot be written.
    """
    from safetensors import SafetensorError
    from safetensors.numpy import save_file

    weights = hf_weights(config)
    leaves = check_params(weights, params)
    tensors = {}
    for weight in weights:
        tensors.update(weight.to_hf(np.asarray(leaves[weight.path], np.float32)))
    hf_config = config.to_hf()
    if head:
        base, kind = config.base_name, hf_config["architectures"][0].removesuffix("Model")
        tensors = {f"{base}.{name}": value for name, value in tensors.items()} | dict(head.tensors)
        hf_config |= {"architectures": [kind + head.architecture], **head.hf_config}
    partial = folder / f"{WEIGHTS}.partial"
    try:
        folder.mkdir(parents=True, exist_ok=True)
        # transformers refuses a file without this piece of metadata.
        save_file(tensors, partial, metadata={"format": "pt"})
        partial.replace(folder / WEIGHTS)
        (folder / CONFIG).write_text(json.dumps(hf_config, indent=2) + "\n", encoding="utf-8")
    except (OSError, SafetensorError) as error:
        with contextlib.suppress(OSError):
            partial.unlink()
        raise NunerError(f"cannot write the model to {folder}: {error}") from error


# --- Tokenizers --------------------------------------------------------------------------------


def load_tokenizer(folder: Path) -> PreTrainedTokenizerFast:
    """Loads the fast tokenizer of a folder. Nothing is fetched.

    Raises NunerError if the folder has none, if its files are corrupt, or if it is a slow one.
    """
    if not any(all((folder / name).exists() for name in files) for files in _VOCABULARIES):
        # AutoTokenizer would not complain, and make a tokenizer that knows five words.
        choices = ", or ".join(" and ".join(files) for files in _VOCABULARIES)
        raise NunerError(f"{folder} has no tokenizer: {choices} is needed")
    from transformers import AutoTokenizer

    try:
        tokenizer = AutoTokenizer.from_pretrained(folder, use_fast=True, local_files_only=True)
    except Exception as error:  # The tokenizers library raises bare exceptions.
        raise NunerError(f"the tokenizer in {folder} cannot be loaded: {error}") from error
    if not tokenizer.is_fast:
        raise NunerError(
            f"{folder} has only a slow tokenizer ({type(tokenizer).__name__}), which knows no "
            "character offsets: choose a model with a tokenizer.json"
        )
    return tokenizer


def save_tokenizer(tokenizer: PreTrainedTokenizerFast, config: EncoderConfig, folder: Path) -> None:
    """Writes a tokenizer for an encoder; raises NunerError if the folder cannot be written."""
    tokenizer.model_max_length = config.max_length  # who truncates by it stays inside the model
    try:
        tokenizer.save_pretrained(str(folder))
    except Exception as error:  # the Rust side raises no OSError for a full disk
        raise NunerError(f"cannot write the tokenizer to {folder}: {error}") from error


def check_tokenizer(tokenizer: PreTrainedTokenizerFast, config: EncoderConfig) -> None:
    """Raises NunerError that tells all the ways in which a tokenizer does not fit an encoder."""
    problems = []
    largest = max(tokenizer.get_vocab().values(), default=-1)
    if largest >= config.vocab_size:
        problems.append(f"its largest token id is {largest}, but the encoder has {config.vocab_size} word vectors")
    special = {
        "start (cls or bos)": (tokenizer.cls_token_id, tokenizer.bos_token_id),
        "end (sep or eos)": (tokenizer.sep_token_id, tokenizer.eos_token_id),
        "pad": (tokenizer.pad_token_id,),
    }
    for role, ids in special.items():
        if all(token_id is None for token_id in ids):
            problems.append(f"it has no {role} token")
    if tokenizer.pad_token_id not in (None, config.pad_token_id):
        problems.append(f"it pads with id {tokenizer.pad_token_id}, but the encoder with {config.pad_token_id}")
    if problems:
        name = tokenizer.name_or_path or type(tokenizer).__name__
        raise NunerError(
            f"the tokenizer {name} does not fit the encoder:{listed(problems)}\n"
            "Take the tokenizer from the folder of the weights"
        )


def tokenizer_fingerprint(tokenizer: PreTrainedTokenizerFast) -> str:
    """sha256 (hexadecimal) of all that decides how a fast tokenizer splits and numbers a text."""
    content = json.loads(tokenizer.backend_tokenizer.to_str())
    for name in ("truncation", "padding"):  # Left behind by the latest call, not part of it.
        content.pop(name, None)
    return hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()
