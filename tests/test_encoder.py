"""The encoder against transformers, and what packing, freezing, dropout and bf16 must (not) change."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from nuner_jax import pretrained, sharding
from nuner_jax.config import finetune_schema, pretrain_classes_schema, pretrain_schema
from nuner_jax.errors import NunerError
from nuner_jax.models import encoder as encoder_module
from nuner_jax.models.encoder import Encoder, EncoderConfig, positions_from_segments
from nuner_jax.models.hf_weights import hf_weights
from nuner_jax.models.params import flatten, merge, split, unflatten
from tests.goldens import tiny

FAMILIES = sorted(tiny.HF_CONFIGS)
LAYOUTS = {"padded": tiny.padded, "packed": tiny.packed}
PARITY = 1e-5  # Largest absolute difference to transformers in f32; never to be relaxed.

CONFIG = EncoderConfig.from_hf(tiny.HF_CONFIGS["roberta"])


def build(config=CONFIG, seed=0, **options):
    return Encoder(config, rngs=nnx.Rngs(seed), **{"dtype": jnp.float32, **options})


def abstract(config, **options):
    return split(nnx.eval_shape(lambda: build(config, **options)))


def load(folder, **options):
    """The encoder of a Hugging Face folder, and its config."""
    config = pretrained.load_encoder_config(folder)
    graphdef, shapes = abstract(config, **options)
    return merge(graphdef, pretrained.load_encoder(folder, config, shapes)), config


@functools.cache
def tiny_params(family="roberta"):
    """Parameters with large weights, so that every part of the model leaves its mark on the result."""
    config = EncoderConfig.from_hf(tiny.HF_CONFIGS[family])
    weights, shapes = tiny.weights(family), abstract(config)[1]
    made = {w.path: w.from_hf([weights[name] for name in w.hf_names]) for w in hf_weights(config)}
    assert made.keys() == flatten(shapes).keys()
    return unflatten(made)


def tiny_encoder(family="roberta", dropout=0.1, **options):
    config = EncoderConfig.from_hf(tiny.HF_CONFIGS[family])
    return merge(abstract(dataclasses.replace(config, dropout=dropout), **options)[0], tiny_params(family))


@functools.partial(jax.jit, static_argnames="graphdef")
def _call(params, batch, dropout_key, *, graphdef):
    return merge(graphdef, params)(*batch, dropout_key=dropout_key)


def call(encoder, *batch, dropout_key=None):
    """encoder(*batch), compiled."""
    graphdef, params = split(encoder)
    return np.asarray(_call(params, batch, dropout_key, graphdef=graphdef))


def valid_vectors(encoder, tokens_BxL, segments_BxL):
    """The vectors of all real tokens, one below the other."""
    return call(encoder, tokens_BxL, segments_BxL).astype(np.float32)[segments_BxL > 0]


# --- The same as transformers ------------------------------------------------------------------


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("family", FAMILIES)
def test_vectors_are_those_stored_from_torch(family, layout, tmp_path):
    folder = tiny.write_folder(tmp_path, tiny.HF_CONFIGS[family], tiny.weights(family))
    encoder, config = load(folder)
    with np.load(tiny.FOLDER / f"{family}.npz") as golden:
        expected_TxD = golden["hidden_TxD"]
    found_TxD = valid_vectors(encoder, *LAYOUTS[layout](tiny.sentences(), config.pad_token_id))
    assert found_TxD.shape == expected_TxD.shape
    assert np.abs(found_TxD - expected_TxD).max() < PARITY


@pytest.mark.live
@pytest.mark.parametrize("family", FAMILIES)
def test_vectors_are_those_of_a_random_transformers_model(family, tmp_path):
    torch = pytest.importorskip("torch")
    import transformers

    from tests.goldens import make

    torch.manual_seed(5)
    config = transformers.AutoConfig.for_model(**tiny.HF_CONFIGS[family], initializer_range=0.2)
    model = transformers.AutoModel.from_config(config).eval()  # with its pooler, which has no place here
    model.save_pretrained(tmp_path)
    encoder, config = load(tmp_path)
    batch = tiny.padded(tiny.sentences(), config.pad_token_id)
    expected_TxD = make.torch_hidden(model, *batch)
    assert np.abs(expected_TxD).max() > 1
    for layout in (batch, tiny.packed(tiny.sentences(), config.pad_token_id)):
        assert np.abs(valid_vectors(encoder, *layout) - expected_TxD).max() < PARITY


TEN_SENTENCES = [
    "Marie Curie discovered polonium and radium in Paris in 1898.",
    "The Roscoff marine station lies on the coast of Brittany.",
    "Ibuprofen should not be taken together with aspirin.",
    "Yes.",
    "In 2019, the Event Horizon Telescope showed the shadow of a black hole in the galaxy M87.",
    "Das Gemälde hängt in der Alten Pinakothek in München.",
    "Amazon's share price fell by 3.5% after the earnings call on Thursday.",
    "CRISPR-Cas9 was adapted from a defence mechanism of Streptococcus pyogenes.",
    "Who directed the film Spirited Away?",
    "She booked flight BA 117 from Heathrow to JFK, leaving at 8:25 a.m. on 3 March.",
]


@pytest.mark.live
def test_vectors_are_those_of_the_real_minilm(minilm_folder):
    pytest.importorskip("torch")
    import transformers

    from tests.goldens import make

    ids = pretrained.load_tokenizer(minilm_folder)(TEN_SENTENCES)["input_ids"]
    encoder, config = load(minilm_folder)
    batch = tiny.padded(ids, config.pad_token_id)
    expected_TxD = make.torch_hidden(transformers.AutoModel.from_pretrained(minilm_folder).eval(), *batch)
    for layout in (batch, tiny.packed(ids, config.pad_token_id)):
        assert np.abs(valid_vectors(encoder, *layout) - expected_TxD).max() < PARITY


# --- Packing -----------------------------------------------------------------------------------


def test_a_sentences_vectors_do_not_depend_on_its_neighbours():
    first, middle, *_ = tiny.sentences()
    encoder, inside = tiny_encoder(), slice(len(first), len(first) + len(middle))

    def vectors(before, after):
        tokens, segments = tiny.packed([before, middle, after], CONFIG.pad_token_id)
        return call(encoder, tokens, segments)[0, inside]

    reference = vectors(first, [5, 6, 7])
    others = vectors(first[::-1], [70, 71, 72])
    assert np.abs(reference - others).max() == 0


def test_vectors_do_depend_on_the_other_words_of_the_sentence():
    encoder, sentence = tiny_encoder(), tiny.sentences()[0]
    reference, changed = (
        valid_vectors(encoder, *tiny.padded([row], CONFIG.pad_token_id)) for row in (sentence, [*sentence[:-1], 4])
    )
    assert np.abs(reference - changed)[0].max() > 1e-2


def test_positions_start_again_in_every_segment_and_stay_zero_in_padding():
    segments = jnp.array([[1, 1, 1, 2, 2, 3, 0, 0], [0, 0, 0, 0, 0, 0, 0, 0], [2, 2, 2, 2, 1, 1, 1, 1]])
    expected = [[0, 1, 2, 0, 1, 0, 0, 0], [0] * 8, [0, 1, 2, 3, 0, 1, 2, 3]]
    assert positions_from_segments(segments).tolist() == expected


def test_given_positions_take_the_place_of_the_computed_ones():
    encoder = tiny_encoder()
    tokens, segments = tiny.packed(tiny.sentences(), CONFIG.pad_token_id)
    positions = positions_from_segments(segments)
    computed = call(encoder, tokens, segments)
    np.testing.assert_array_equal(computed, call(encoder, tokens, segments, positions))
    assert np.abs(computed - call(encoder, tokens, segments, positions + 1)).max() > 1e-2


@pytest.mark.parametrize("family", FAMILIES)
def test_a_segment_of_the_maximal_length_fits_and_a_longer_one_is_nan(family):
    encoder, config = tiny_encoder(family), EncoderConfig.from_hf(tiny.HF_CONFIGS[family])
    assert config.max_length == 32
    fits, longer = np.full((1, 32), 5), np.full((1, 33), 5)
    assert np.isfinite(call(encoder, fits, np.ones_like(fits))).all()
    assert np.isnan(call(encoder, longer, np.ones_like(longer))).any()


def test_padding_is_finite_and_leaves_no_trace_in_gradients_even_beyond_the_position_table():
    tokens, segments = np.full((2, 40), CONFIG.pad_token_id), np.zeros((2, 40), np.int32)
    tokens[0, :5], segments[0, :5] = 7, 1
    graphdef = abstract(CONFIG)[0]

    def loss(params):
        hidden = merge(graphdef, params)(tokens, segments)
        return jnp.where(segments[..., None] > 0, hidden, 0).sum(), hidden

    gradients, hidden = jax.jit(jax.grad(loss, has_aux=True))(tiny_params())
    assert np.isfinite(hidden).all()
    assert all(np.isfinite(leaf).all() for leaf in jax.tree.leaves(gradients))
    assert not gradients["embeddings"]["word"]["embedding"][CONFIG.pad_token_id].any()


# --- Frozen layers -----------------------------------------------------------------------------


def frozen_below(path, layers):
    return layers > 0 and (path.startswith("embeddings/") or path.split("/")[1] in map(str, range(layers)))


@functools.cache
def loss_and_gradients(stop_gradient_layers):
    """The compiled function of the parameters."""
    graphdef = abstract(CONFIG)[0]
    batch = tiny.padded(tiny.sentences(), CONFIG.pad_token_id)

    def loss(params):
        hidden = merge(graphdef, params)(*batch, stop_gradient_layers=stop_gradient_layers)
        return (hidden**2 * jnp.arange(CONFIG.hidden_size)).sum()

    return jax.jit(jax.value_and_grad(loss)).lower(tiny_params()).compile()


@pytest.mark.parametrize("layers", [0, 1, 2])
def test_gradients_of_frozen_layers_are_zero_and_of_the_others_are_not(layers):
    gradients = flatten(loss_and_gradients(layers)(tiny_params())[1])
    moved = {path for path, gradient in gradients.items() if np.any(gradient)}
    assert moved == {path for path in gradients if not frozen_below(path, layers)}


def test_freezing_leaves_the_forward_pass_and_the_other_gradients_as_they_are():
    free, frozen = (loss_and_gradients(layers)(tiny_params()) for layers in (0, 1))
    assert free[0] == frozen[0]
    for path, gradient in flatten(frozen[1]).items():
        if not frozen_below(path, 1):
            np.testing.assert_allclose(gradient, flatten(free[1])[path], rtol=1e-6)


def test_frozen_layers_cost_no_backward_pass():
    none_frozen, one_frozen, all_frozen = (loss_and_gradients(k).cost_analysis()["flops"] for k in (0, 1, 2))
    batch = tiny.padded(tiny.sentences(), CONFIG.pad_token_id)
    _, params = split(tiny_encoder())
    forward = _call.lower(params, batch, None, graphdef=abstract(CONFIG)[0]).compile().cost_analysis()["flops"]
    assert all_frozen < 1.05 * forward
    assert 0.3 < (one_frozen - forward) / (none_frozen - forward) < 0.5


@pytest.mark.parametrize("layers", [-1, 3])
def test_more_frozen_layers_than_layers_are_refused(layers):
    batch = tiny.padded(tiny.sentences(), CONFIG.pad_token_id)
    with pytest.raises(NunerError, match=f"{layers} layers to freeze, but the encoder has 2"):
        tiny_encoder()(*batch, stop_gradient_layers=layers)


# --- Precision, dropout, attention -------------------------------------------------------------


def test_bf16_computes_in_bf16_near_f32_with_f32_parameters():
    batch = tiny.padded(tiny.sentences(), CONFIG.pad_token_id)
    half = tiny_encoder(dtype=jnp.bfloat16)
    assert call(half, *batch).dtype == jnp.bfloat16
    assert {leaf.dtype for leaf in jax.tree.leaves(split(build(dtype=jnp.bfloat16))[1])} == {jnp.dtype("float32")}
    exact, near = valid_vectors(tiny_encoder(), *batch), valid_vectors(half, *batch)
    assert 0 < np.abs(exact - near).mean() < 0.02  # The vectors' standard deviation is 1.
    assert np.abs(exact - near).max() < 0.15


def test_bf16_sums_layer_norm_in_f32():
    # In bf16 the mean of 64 values near 100 is a multiple of 0.5, as large as their spread.
    x = jnp.asarray(100 + np.random.RandomState(0).standard_normal((4, 64)), jnp.bfloat16)
    half = tiny_encoder(dtype=jnp.bfloat16).layers[0].mlp_norm(x).astype(jnp.float32)
    exact = tiny_encoder().layers[0].mlp_norm(x.astype(jnp.float32))
    assert np.abs(half - exact).max() < 0.02


def test_dropout_needs_a_key_and_follows_it():
    tokens, segments = tiny.padded(tiny.sentences(), CONFIG.pad_token_id)
    keys = (None, None, *map(jax.random.key, (0, 0, 1)))
    plain, again, first, repeated, second = (call(tiny_encoder(), tokens, segments, dropout_key=key) for key in keys)
    np.testing.assert_array_equal(plain, again)
    np.testing.assert_array_equal(first, repeated)
    assert np.abs(plain - first)[segments > 0].mean() > 1e-2
    assert np.abs(second - first)[segments > 0].mean() > 1e-2


def test_dropout_of_rate_zero_changes_nothing():
    batch = tiny.padded(tiny.sentences(), CONFIG.pad_token_id)
    encoder = tiny_encoder(dropout=0)
    np.testing.assert_array_equal(call(encoder, *batch), call(encoder, *batch, dropout_key=jax.random.key(0)))


def test_dropout_drops_its_share_and_keeps_the_mean():
    dropped = encoder_module.dropped(jnp.ones((1000, 100), jnp.bfloat16), 0.25, jax.random.key(0)).astype(jnp.float32)
    assert abs((dropped == 0).mean() - 0.25) < 0.01
    assert abs(dropped.mean() - 1) < 0.02


def test_dropout_masks_differ_between_the_places_where_it_acts():
    tokens, segments = np.full((1, 30), 5), np.ones((1, 30), np.int32)
    seen = []
    original = jax.random.bernoulli
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(jax.random, "bernoulli", lambda *a: seen.append(original(*a)) or seen[-1])
        tiny_encoder()(tokens, segments, dropout_key=jax.random.key(0))
    assert len(seen) == 1 + 2 * CONFIG.num_layers  # embeddings; attention and MLP of every layer
    assert len({mask.tobytes() for mask in map(np.asarray, seen)}) == len(seen)


def test_an_attention_that_cannot_be_had_is_refused():
    with pytest.raises(NunerError, match="'flash' is unknown; choose one of plain, xla, cudnn, splash"):
        build(attention_implementation="flash")
    with pytest.raises(NunerError, match="'cudnn' computes in bfloat16, not in float32"):
        build(attention_implementation="cudnn")
    build(attention_implementation="cudnn", dtype=jnp.bfloat16)


# --- Rematerialisation -------------------------------------------------------------------------


def remat_loss(remat, implementation="plain", frozen=0, config=CONFIG):
    """A loss of parameters and a batch, with dropout."""
    graphdef = abstract(config, remat=remat, attention_implementation=implementation)[0]

    def loss(params, *batch):
        hidden = merge(graphdef, params)(*batch, stop_gradient_layers=frozen, dropout_key=jax.random.key(0))
        return (hidden**2 * jnp.arange(config.hidden_size)).sum()

    return loss


@pytest.mark.parametrize("implementation", ["plain", "xla"])
@pytest.mark.parametrize("remat", ["attention", "layers"])
def test_computing_again_changes_no_loss_and_no_gradient(remat, implementation):
    batch = tiny.packed(tiny.sentences(), CONFIG.pad_token_id)
    kept, again = (
        jax.jit(jax.value_and_grad(remat_loss(name, implementation, frozen=1)))(tiny_params(), *batch)
        for name in ("none", remat)
    )
    np.testing.assert_allclose(again[0], kept[0], rtol=1e-6)
    for path, gradient in flatten(again[1]).items():
        expected = flatten(kept[1])[path]
        np.testing.assert_allclose(gradient, expected, rtol=1e-5, atol=1e-5 * np.abs(expected).max(), err_msg=path)


@pytest.mark.parametrize("implementation", ["plain", "xla"])
def test_what_is_computed_again_is_not_kept(implementation):
    layers, rows, length = 4, 2, 512
    config = dataclasses.replace(CONFIG, num_layers=layers, max_positions=length + 2)
    batch = [jax.ShapeDtypeStruct((rows, length), jnp.int32)] * 2

    def kept(remat, frozen):
        """The shapes of what the backward pass is given of the forward pass."""
        forward = functools.partial(jax.vjp, remat_loss(remat, implementation, frozen, config))
        back = jax.eval_shape(lambda *inputs: forward(*inputs)[1], abstract(config)[1], *batch)
        return [leaf for leaf in jax.tree.leaves(back) if length in leaf.shape]

    def size(leaves):
        return sum(leaf.size * leaf.dtype.itemsize for leaf in leaves)

    nothing, attention, whole = (kept(remat, frozen=0) for remat in ("none", "attention", "layers"))
    weights = rows * config.num_heads * length**2
    assert sum(leaf.size == weights for leaf in nothing) >= layers
    assert all(leaf.size < weights for leaf in attention)
    assert size(whole) < size(attention) / 2 < size(nothing) / 4
    inputs = [leaf for leaf in whole if leaf.shape == (rows, length, config.hidden_size)]
    assert size(whole) - size(inputs) < size(inputs), "the mask, and what the embeddings keep"
    assert size(kept("layers", frozen=2)) < size(whole)


def test_what_cannot_be_computed_again_is_refused():
    with pytest.raises(NunerError, match="remat 'mlp' is unknown; choose one of none, attention, layers"):
        build(remat="mlp")
    for schema in (pretrain_schema, pretrain_classes_schema, finetune_schema):
        assert schema.CHOICES["model.remat"] == encoder_module.REMAT


# --- Parameters --------------------------------------------------------------------------------


def test_the_parameter_tree_has_the_documented_paths_and_shapes():
    config = dataclasses.replace(CONFIG, num_layers=1)
    v, d, p, t, f, h, k = 80, 64, 34, 1, 96, 4, 16
    expected = {
        "embeddings/word/embedding": (v, d),
        "embeddings/position/embedding": (p, d),
        "embeddings/type/embedding": (t, d),
        "embeddings/norm/scale": (d,),
        "embeddings/norm/bias": (d,),
        "layers/0/attention/qkv/kernel": (d, 3, h, k),
        "layers/0/attention/qkv/bias": (3, h, k),
        "layers/0/attention/out/kernel": (h, k, d),
        "layers/0/attention/out/bias": (d,),
        "layers/0/attention_norm/scale": (d,),
        "layers/0/attention_norm/bias": (d,),
        "layers/0/mlp/up/kernel": (d, f),
        "layers/0/mlp/up/bias": (f,),
        "layers/0/mlp/down/kernel": (f, d),
        "layers/0/mlp/down/bias": (d,),
        "layers/0/mlp_norm/scale": (d,),
        "layers/0/mlp_norm/bias": (d,),
    }
    assert {path: leaf.shape for path, leaf in flatten(abstract(config)[1]).items()} == expected


def test_initial_values_are_those_of_bert():
    leaves = flatten(split(build())[1])
    for path, leaf in leaves.items():
        if path.endswith("/bias"):
            assert not leaf.any(), path
        elif path.endswith("/scale"):
            assert (leaf == 1).all(), path
        elif leaf.size > 1000:
            assert 0.016 < leaf.std() < 0.02 and abs(leaf).max() < 0.0401, path  # 0.02, cut at two deviations
    other_seed = flatten(split(build(seed=1))[1])
    assert (leaves["layers/0/mlp/up/kernel"] != other_seed["layers/0/mlp/up/kernel"]).all()


def test_split_and_merge_keep_the_order_of_more_than_ten_layers():
    encoder = build(dataclasses.replace(CONFIG, num_layers=12))
    graphdef, params = split(encoder)
    again = merge(graphdef, jax.tree.map(lambda leaf: leaf, params))  # which sorts "10" before "2"
    for number, (before, after) in enumerate(zip(encoder.layers, again.layers, strict=True)):
        np.testing.assert_array_equal(before.mlp.up.kernel[...], after.mlp.up.kernel[...])
        np.testing.assert_array_equal(before.mlp.up.kernel[...], params["layers"][str(number)]["mlp"]["up"]["kernel"])


def test_parameters_are_a_plain_dict_inside_jit_grad_and_eval_shape():
    config = dataclasses.replace(CONFIG, num_layers=1)

    def init(key):
        return split(build(config, seed=key))[1]

    graphdef, shapes = abstract(config)
    batch = tiny.padded(tiny.sentences(), CONFIG.pad_token_id)

    def loss(params):
        return merge(graphdef, params)(*batch).sum()

    key = jax.random.key(0)
    params = jax.jit(init)(key)
    same = jax.tree.structure(shapes)
    for tree in (params, jax.eval_shape(init, key), jax.eval_shape(jax.grad(loss), shapes)):
        assert type(tree) is dict and jax.tree.structure(tree) == same
    assert {str} == {type(key) for key in params["layers"]}


def test_placed_activations_change_no_vector_and_keep_the_structure_static():
    place = sharding.row_sharding(sharding.make_mesh(4, 2, 1))
    batch = tuple(np.tile(array, (8, 1)) for array in tiny.packed(tiny.sentences(), CONFIG.pad_token_id))
    placed = _call(tiny_params(), batch, None, graphdef=abstract(CONFIG, activations=place)[0])  # static: hashed
    assert placed.sharding.is_equivalent_to(place, 3)
    np.testing.assert_allclose(placed, call(tiny_encoder(), *batch), atol=PARITY)


def test_split_refuses_state_that_is_no_parameter():
    with pytest.raises(ValueError, match="[Nn]on-exhaustive"):
        split(nnx.Dropout(0.5, rngs=nnx.Rngs(0)))


def test_flatten_and_unflatten_are_inverse():
    tree = {"a": {"b": 1, "c": {"0": 2}}, "d": 3}
    assert flatten(tree) == {"a/b": 1, "a/c/0": 2, "d": 3}
    assert unflatten(flatten(tree)) == tree
