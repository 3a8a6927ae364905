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
    export(folder, out)
    print(f"exported {folder} to {out}")
    print(f'load it with: transformers.AutoModel.from_pretrained("{out}")')


def export(folder: Path, out: Path) -> None:
    """Writes the towers of a checkpoint as a Hugging Face folder.

    Args:
      folder: WORKDIR/checkpoints/STEP.
      out: the folder to write; an earlier export there is replaced.

    Raises:
      NunerError: the checkpoint cannot be read, or is of another task; the folder cannot be written, or holds
        something else.
    """
    info = checkpoint.read_info(folder)
    if info.get("task") != "pretrain":
        raise NunerError(
            f"{folder} is a checkpoint of the task {info.get('task')!r}: only pre-training has towers to export"
        )
    tokenizer = folder.parent.parent / "tokenizer"
    if not tokenizer.is_dir():
        raise NunerError(f"{tokenizer} does not exist: an export needs the tokenizer that the run left in its workdir")
    params = checkpoint.load_params(folder)
    scale, bias = (float(params["logit"][name]) for name in ("log_scale", "bias"))
    # Written beside and then renamed, so that nobody reads half a model.
    partial = out.with_name(f".{out.name}.partial")
    try:
        if out.exists() and not (out / "nuner.json").exists() and any(out.iterdir()):
            raise NunerError(f"--out={out} exists and is not an export: choose another folder")
        shutil.rmtree(partial, ignore_errors=True)
        partial.mkdir(parents=True)
        shutil.copytree(tokenizer, partial, dirs_exist_ok=True)
        pretrained.save_encoder(partial, EncoderConfig.from_hf(info["text"]), params["text"])
        shutil.copytree(tokenizer, partial / "concept")
        pretrained.save_encoder(partial / "concept", EncoderConfig.from_hf(info["concept"]), params["concept"])
        joined = {"log_scale": scale, "bias": bias, "concept_pooling": info["concept_pooling"]}
        (partial / "nuner.json").write_text(
            json.dumps(joined | {"data": info["data"], "step": int(folder.name)}, indent=2)
        )
        (partial / "README.md").write_text(_CARD.format(step=folder.name, data=info["data"]))
        shutil.rmtree(out, ignore_errors=True)
        partial.rename(out)
    except OSError as error:
        raise NunerError(f"cannot write the export {out}: {error}") from error
    finally:
        shutil.rmtree(partial, ignore_errors=True)


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

if __name__ == "__main__":
    # Defined here and not above: the training command imports this module, and has flags of its own.
    flags.DEFINE_string("checkpoint", None, "Workdir of a run (its best checkpoint), or one checkpoint.")
    flags.DEFINE_string("out", None, "Folder to write; it must not exist yet, or be an export.")
    run_command(main)
