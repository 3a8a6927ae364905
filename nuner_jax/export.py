"""Exports a checkpoint: `python -m nuner_jax.export --checkpoint=runs/quickstart --out=my_encoder`.

The folder is an ordinary Hugging Face one: the text tower, which is what NuNER is, with its tokenizer, loads
with `transformers.AutoModel.from_pretrained(folder)` and gives the same vectors. The concept tower lies beside
it in `concept/`, and `nuner.json` holds what joins the two (scale, bias, pooling).
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Sequence
from pathlib import Path

import numpy as np
from absl import flags

from nuner_jax import checkpoint, pretrained
from nuner_jax.errors import NunerError, run_command
from nuner_jax.folders import local_path
from nuner_jax.models.encoder import EncoderConfig


def main(argv: Sequence[str]) -> None:
    """Reads the flags, and exports."""
    if len(argv) > 1 or not flags.FLAGS.checkpoint or not flags.FLAGS.out:
        raise NunerError("--checkpoint=WORKDIR_OR_CHECKPOINT and --out=FOLDER are needed")
    folder = checkpoint.resolve(flags.FLAGS.checkpoint)
    out = local_path(flags.FLAGS.out)
    loader = export(folder, out)
    print(f"exported {folder} to {out}")
    print(f'load it with: transformers.{loader}.from_pretrained("{out}")')


def export(folder: Path, out: Path) -> str:
    """Writes the tower or towers, or the tagger, of a checkpoint as a Hugging Face folder.

    Args:
      folder: WORKDIR/checkpoints/STEP.
      out: the folder to write; an earlier export there is replaced.

    Returns:
      The class of transformers that loads it.

    Raises:
      NunerError: the checkpoint cannot be read, or is of a model that transformers has no class for; the folder
        cannot be written, or holds something else.
    """
    info = checkpoint.read_info(folder)
    if info.get("task") not in _KINDS:
        raise NunerError(f"{folder} is a checkpoint of the task {info.get('task')!r}, which has nothing to export")
    tokenizer = folder.parent.parent / "tokenizer"
    if not tokenizer.is_dir():
        raise NunerError(f"{tokenizer} does not exist: an export needs the tokenizer that the run left in its workdir")
    params = checkpoint.load_params(folder)
    loader, write, card = _KINDS[info["task"]]
    # Written beside and then renamed, so that nobody reads half a model.
    partial = out.with_name(f".{out.name}.partial")
    try:
        if out.exists() and not (out / "nuner.json").exists() and any(out.iterdir()):
            raise NunerError(f"--out={out} exists and is not an export: choose another folder")
        shutil.rmtree(partial, ignore_errors=True)
        partial.mkdir(parents=True)
        more = write(partial, tokenizer, info, params) | {"data": info["data"], "step": int(folder.name)}
        (partial / "nuner.json").write_text(json.dumps(more, indent=2))
        (partial / "README.md").write_text(card.format(**more))
        shutil.rmtree(out, ignore_errors=True)
        partial.rename(out)
    except OSError as error:
        raise NunerError(f"cannot write the export {out}: {error}") from error
    finally:
        shutil.rmtree(partial, ignore_errors=True)
    return loader


def _write_towers(partial: Path, tokenizer: Path, info: dict, params: dict) -> dict:
    """Both towers of pre-training; returns what joins them."""
    scale, bias = (float(params["logit"][name]) for name in ("log_scale", "bias"))
    for place, tower in ((partial, "text"), (partial / "concept", "concept")):
        shutil.copytree(tokenizer, place, dirs_exist_ok=True)
        pretrained.save_encoder(place, EncoderConfig.from_hf(info[tower]), params[tower])
    return {"log_scale": scale, "bias": bias, "concept_pooling": info["concept_pooling"]}


def _write_text_tower(partial: Path, tokenizer: Path, info: dict, params: dict) -> dict:
    """The encoder that was trained on classes; returns what these were."""
    shutil.copytree(tokenizer, partial, dirs_exist_ok=True)
    pretrained.save_encoder(partial, EncoderConfig.from_hf(info["text"]), params["text"])
    return {"classes": info["classes"]}


def _write_tagger(partial: Path, tokenizer: Path, info: dict, params: dict) -> dict:
    """An encoder with a linear head; returns what `transformers` does not know of it."""
    if info["head"]["kind"] != "linear" or info["layers"] != [-1]:
        raise NunerError(
            "transformers has no class for this tagger: only one with a linear head on the last layer can be exported "
            "(config.head.kind = 'linear', config.model.layers = (-1,))"
        )
    kernel_DxC, bias_C = (np.asarray(params["head"]["out"][name]) for name in ("kernel", "bias"))
    if standard := params["head"].get("standard"):  # it is linear too, and becomes part of the head
        kernel_DxC = np.asarray(standard["scale"])[:, None] * kernel_DxC
        bias_C = bias_C - np.asarray(standard["mean"]) @ kernel_DxC
    labels = dict(enumerate(info["labels"]))
    head = pretrained.HfHead(
        "ForTokenClassification",
        {"classifier.weight": np.ascontiguousarray(kernel_DxC.T), "classifier.bias": bias_C},
        {"id2label": labels, "label2id": {label: number for number, label in labels.items()}},
    )
    shutil.copytree(tokenizer, partial, dirs_exist_ok=True)
    pretrained.save_encoder(partial, EncoderConfig.from_hf(info["text"]), params["text"], head)
    return {"types": info["types"], "scheme": info["head"]["scheme"]}


_CARD = """---
library_name: transformers
tags: [named-entity-recognition, nuner]
---
# A NuNER encoder

The text tower of a NuNER pre-training run (Bogdanov et al., EMNLP 2024) made with nuner_jax, at step {step}, on
data of fingerprint `{data}`. It is a plain encoder: fine-tune it for token classification, or take its vectors.

```python
from transformers import AutoModel, AutoTokenizer

tokenizer = AutoTokenizer.from_pretrained("THIS_FOLDER")
model = AutoModel.from_pretrained("THIS_FOLDER", add_pooling_layer=False)
vectors = model(**tokenizer("Divers from the Roscoff station", return_tensors="pt")).last_hidden_state
```

`concept/` holds the encoder of concept names, and `nuner.json` the scale, bias and pooling that join the two.
"""

_CLASSES_CARD = """---
library_name: transformers
tags: [named-entity-recognition, ner-bert]
---
# An encoder pre-trained on a closed set of entity types

Pre-trained as NER-BERT was (Liu et al. 2021), as a classifier of tokens, with nuner_jax, at step {step}, on data of
fingerprint `{data}`: a baseline for NuNER encoders. It is a plain encoder without the classifier: fine-tune it for
token classification, or take its vectors.

```python
from transformers import AutoModel, AutoTokenizer

tokenizer = AutoTokenizer.from_pretrained("THIS_FOLDER")
model = AutoModel.from_pretrained("THIS_FOLDER", add_pooling_layer=False)
vectors = model(**tokenizer("Divers from the Roscoff station", return_tensors="pt")).last_hidden_state
```

`nuner.json` holds the names of the classes.
"""

_TAGGER_CARD = """---
library_name: transformers
pipeline_tag: token-classification
tags: [named-entity-recognition, nuner]
---
# A tagger of named entities

Fine-tuned with nuner_jax, at step {step}, on data of fingerprint `{data}`. Every word's label is that of its first
sub-token. The labels are of the scheme {scheme}: nuner_jax takes the best valid sequence of them; the pipeline below
takes each word's best label, and joins words whose labels are IO or BIO.

```python
from transformers import pipeline

tagger = pipeline("token-classification", model="THIS_FOLDER", aggregation_strategy="first")
print(tagger("Divers from the Roscoff station recorded a bloom."))
```
"""

_KINDS = {
    "pretrain": ("AutoModel", _write_towers, _CARD),
    "pretrain_classes": ("AutoModel", _write_text_tower, _CLASSES_CARD),
    "finetune": ("AutoModelForTokenClassification", _write_tagger, _TAGGER_CARD),
}
"""By task: the class of transformers that loads the export, the function that writes it, and its card."""

if __name__ == "__main__":
    # Defined here and not above: the training command imports this module, and has flags of its own.
    flags.DEFINE_string("checkpoint", None, "Workdir of a run (its best checkpoint), or one checkpoint.")
    flags.DEFINE_string("out", None, "Folder to write; it must not exist yet, or be an export.")
    run_command(main)
