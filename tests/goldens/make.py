"""Writes what torch computes for the tiny encoders: `python -m tests.goldens.make` (torch is in the extra "test").

The files change only if tests/goldens/tiny.py does.
"""

import numpy as np
import torch
import transformers

from tests.goldens import tiny


def torch_model(family: str) -> torch.nn.Module:
    """The tiny encoder of a family as `transformers` has it."""
    config = transformers.AutoConfig.for_model(**tiny.HF_CONFIGS[family])
    model = transformers.AutoModel.from_config(config, add_pooling_layer=False)
    model.load_state_dict({name: torch.from_numpy(value) for name, value in tiny.weights(family).items()})
    return model.eval()


def torch_hidden(model: torch.nn.Module, tokens_BxL: np.ndarray, segments_BxL: np.ndarray) -> np.ndarray:
    """Last hidden states of all tokens of a padded batch, one below the other: [tokens, D] float32."""
    with torch.no_grad():
        output = model(
            input_ids=torch.from_numpy(tokens_BxL).long(), attention_mask=torch.from_numpy(segments_BxL > 0).long()
        )
    return output.last_hidden_state.float().numpy()[segments_BxL > 0]


def main() -> None:
    for family, hf_config in tiny.HF_CONFIGS.items():
        tokens_BxL, segments_BxL = tiny.padded(tiny.sentences(), hf_config["pad_token_id"])
        path = tiny.FOLDER / f"{family}.npz"
        np.savez(path, hidden_TxD=torch_hidden(torch_model(family), tokens_BxL, segments_BxL))
        print(f"wrote {path.name}")


if __name__ == "__main__":
    main()
