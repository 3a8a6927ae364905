"""Export: a Hugging Face folder that others load, with the same vectors and the same parameters."""

import json

import jax
import numpy as np
import pytest

from nuner_jax import checkpoint, export, pretrained
from nuner_jax import config as config_lib
from nuner_jax.models.encoder import Encoder, EncoderConfig
from nuner_jax.models.params import flatten, merge, split
from nuner_jax.train import train

SENTENCES = ["Divers from the Roscoff station recorded a bloom.", "Ann", "Zeytoun, on Malcolm Street, pours arak."]


@pytest.fixture(scope="module", params=["roberta", "bert"])
def exported(request, rows_file, root, tmp_path_factory, minilm_folder):
    """A short run of either family, and its export: (workdir, folder)."""
    workdir = tmp_path_factory.mktemp(request.param)
    config = config_lib.load_file(f"{root}/tests/configs/tiny.py:{rows_file}")
    config.data.cache_dir = str(rows_file.parent / "cache")
    config.steps, config.export = 3, True
    if request.param == "bert":
        config.model.tokenizer = str(minilm_folder)
        config.model.encoder.update(
            model_type="bert", vocab_size=30522, pad_token_id=0, type_vocab_size=2, max_position_embeddings=64
        )
    train(config, workdir)
    return workdir, workdir / "export"


def test_export_then_import_gives_identical_parameters(exported):
    workdir, folder = exported
    params = checkpoint.load_params(checkpoint.resolve(str(workdir)))
    for tower, place in (("text", folder), ("concept", folder / "concept")):
        config = pretrained.load_encoder_config(place)
        back = flatten(pretrained.load_encoder(place, config, params[tower]))
        for path, leaf in flatten(params[tower]).items():
            np.testing.assert_array_equal(back[path], leaf, err_msg=path)
    joined = json.loads((folder / "nuner.json").read_text())
    assert joined["bias"] == float(params["logit"]["bias"])
    assert joined["concept_pooling"] == "mean"


def test_an_export_starts_another_run(exported, rows_file, root, tmp_path, capsys):
    workdir, folder = exported
    config = config_lib.load_file(f"{root}/tests/configs/tiny.py:{rows_file}")
    config.data.cache_dir = str(rows_file.parent / "cache")
    config.steps, config.model.init, config.model.tokenizer = 0, "pretrained", None
    config.model.text, config.model.concept = str(folder), str(folder / "concept")
    train(config, tmp_path)
    assert f"initialisation: pretrained weights: text {folder}, concept {folder}/concept" in capsys.readouterr().out
    before = checkpoint.load_params(checkpoint.resolve(str(workdir)))
    after = checkpoint.load_params(tmp_path / "checkpoints" / "0")
    for path, leaf in flatten(before["text"]).items():
        np.testing.assert_array_equal(flatten(after["text"])[path], leaf, err_msg=path)


@pytest.mark.live
def test_transformers_gives_the_same_vectors_for_both_towers(exported):
    torch = pytest.importorskip("torch")
    import transformers

    workdir, folder = exported
    params = checkpoint.load_params(checkpoint.resolve(str(workdir)))
    for tower, place in (("text", folder), ("concept", folder / "concept")):
        tokenizer = transformers.AutoTokenizer.from_pretrained(place)
        model = transformers.AutoModel.from_pretrained(place, add_pooling_layer=False).eval()
        batch = tokenizer(SENTENCES, return_tensors="pt", padding=True)
        with torch.no_grad():
            theirs = model(**batch).last_hidden_state.numpy()
        config = EncoderConfig.from_hf(json.loads((place / "config.json").read_text()))
        assert config.dropout == 0.1

        def forward(params, tokens, segments, config=config):
            from flax import nnx

            graphdef, _ = split(nnx.eval_shape(lambda: Encoder(config, dtype=np.float32, rngs=nnx.Rngs(0))))
            return merge(graphdef, params)(tokens, segments)

        segments = batch["attention_mask"].numpy().astype(np.int32)
        ours = jax.jit(forward)(params[tower], batch["input_ids"].numpy().astype(np.int32), segments)
        np.testing.assert_allclose(np.asarray(ours)[segments > 0], theirs[segments > 0], atol=1e-5)


def test_exporting_again_replaces_the_export_and_nothing_is_left_beside_it(exported, tmp_path):
    workdir, _ = exported
    folder = checkpoint.resolve(str(workdir))
    out = tmp_path / "model"
    export.export(folder, out)
    (out / "stale").write_text("from before")
    export.export(folder, out)
    assert sorted(p.name for p in tmp_path.iterdir()) == ["model"]
    assert not (out / "stale").exists()
    assert {"config.json", "model.safetensors", "tokenizer.json", "nuner.json", "README.md", "concept"} <= {
        p.name for p in out.iterdir()
    }
