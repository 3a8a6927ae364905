"""The paper's annotation: random web sentences, its prompt word for word, a model behind the OpenAI API.

    export OPENAI_API_KEY=…
    NUNER_EXTRAS=annotate launch/local.sh annotate --config=configs/annotate_openai.py:MODEL \\
        --config.price.input=… --config.price.output=… --config.request.budget=5 --dry_run

Prices are dollars per million tokens, from the price list of the day; the budget is in dollars and never exceeded.
`--dry_run` shows the first prompts and an estimate and asks nothing; `--pilot` asks for 20 units and tells from them
what all would cost. `--config.endpoint.kind=batch` goes through the Batch API instead, at half the price within a day.
Started again with the same workdir, it goes on; no answer that arrived is asked for again.

Cost: about 155 tokens in and 95 out a sentence (four bytes a token, completions as long as the embedded sample's), so
210 million and 130 million for the 1.35 million of the paper. Expect: not run at full size here; the paper kept 1M
sentences with 4.4M annotations.
"""

from nuner_jax.config import annotate


def get_config(model=None):
    config = annotate()
    config.source.paths = ("hf:allenai/c4:en:train",)  # (paper: C4); streamed, its rows are in random order already
    config.source.documents = 1_500_000  # from its start: enough for the sample
    config.source.size = 1_350_000  # (paper)
    if model:
        config.endpoint.model = model
    return config
