"""Tiny encoders of each family, whose weights follow from a seed, and the sentences they are given.

The names and shapes of the weights are written out here once more, as `transformers` has them, so that they test
ours. numpy's `RandomState` never changes its stream, so the weights need no storing.
"""

import json
import pathlib

import numpy as np
from safetensors.numpy import save_file

FOLDER = pathlib.Path(__file__).parent

# A width of 64, because XLA on CPU unrolls LayerNorm at 32 and compiles four times as long.
_SIZES = {
    "vocab_size": 80,
    "hidden_size": 64,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "intermediate_size": 96,
    "hidden_act": "gelu",
    "hidden_dropout_prob": 0.1,
    "attention_probs_dropout_prob": 0.1,
}
_ROBERTA = {**_SIZES, "max_position_embeddings": 34, "type_vocab_size": 1, "pad_token_id": 1, "layer_norm_eps": 1e-5}
HF_CONFIGS = {
    "bert": {
        **_SIZES,
        "model_type": "bert",
        "max_position_embeddings": 32,
        "type_vocab_size": 2,
        "pad_token_id": 0,
        "layer_norm_eps": 1e-12,
    },
    "roberta": {**_ROBERTA, "model_type": "roberta"},
    "xlm-roberta": {**_ROBERTA, "model_type": "xlm-roberta", "num_hidden_layers": 3},
}
SEEDS = {"bert": 0, "roberta": 1, "xlm-roberta": 2}


def weights(family: str) -> dict[str, np.ndarray]:
    """Float32 weights by name, large enough that attention is far from uniform and norms matter."""
    config, random = HF_CONFIGS[family], np.random.RandomState(SEEDS[family])
    width, inner = config["hidden_size"], config["intermediate_size"]
    shapes = {
        "embeddings.word_embeddings.weight": (config["vocab_size"], width),
        "embeddings.position_embeddings.weight": (config["max_position_embeddings"], width),
        "embeddings.token_type_embeddings.weight": (config["type_vocab_size"], width),
        "embeddings.LayerNorm.weight": (width,),
        "embeddings.LayerNorm.bias": (width,),
    }
    dense = {
        "attention.self.query": (width, width),
        "attention.self.key": (width, width),
        "attention.self.value": (width, width),
        "attention.output.dense": (width, width),
        "intermediate.dense": (inner, width),
        "output.dense": (width, inner),
    }
    for number in range(config["num_hidden_layers"]):
        layer = f"encoder.layer.{number}"
        for name, shape in dense.items():
            shapes[f"{layer}.{name}.weight"] = shape
            shapes[f"{layer}.{name}.bias"] = shape[:1]
        for name in ("attention.output.LayerNorm", "output.LayerNorm"):
            shapes[f"{layer}.{name}.weight"] = shapes[f"{layer}.{name}.bias"] = (width,)
    return {name: _values(name, shape, random) for name, shape in shapes.items()}


def _values(name: str, shape: tuple[int, ...], random: np.random.RandomState) -> np.ndarray:
    centre = 1.0 if name.endswith("LayerNorm.weight") else 0.0
    spread = 0.2 if len(shape) > 1 else 0.1
    return (centre + spread * random.standard_normal(shape)).astype(np.float32)


def sentences() -> list[list[int]]:
    """Token ids of four sentences; none is the pad token of any family."""
    random = np.random.RandomState(3)
    return [random.randint(3, _SIZES["vocab_size"], length).tolist() for length in (7, 12, 1, 9)]


def padded(rows: list[list[int]], pad: int) -> tuple[np.ndarray, np.ndarray]:
    """tokens and segments [B,L]: a sentence per row, and two slots of padding beside the longest."""
    length = max(map(len, rows)) + 2
    tokens, segments = np.full((len(rows), length), pad, np.int32), np.zeros((len(rows), length), np.int32)
    for number, row in enumerate(rows):
        tokens[number, : len(row)], segments[number, : len(row)] = row, 1
    return tokens, segments


def packed(rows: list[list[int]], pad: int) -> tuple[np.ndarray, np.ndarray]:
    """tokens and segments [1,L]: all sentences in one row, and three slots of padding."""
    tokens = [*sum(rows, []), pad, pad, pad]
    segments = [segment for segment, row in enumerate(rows, start=1) for _ in row] + [0, 0, 0]
    return np.array([tokens], np.int32), np.array([segments], np.int32)


def write_folder(
    folder: pathlib.Path, hf_config: dict, tensors: dict[str, np.ndarray], file: str = "model.safetensors"
) -> pathlib.Path:
    """A Hugging Face folder of these weights."""
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "config.json").write_text(json.dumps(hf_config))
    save_file(tensors, folder / file, metadata={"format": "pt"})
    return folder
