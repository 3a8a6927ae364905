"""A language model in context beside few-shot transfer of a frozen encoder: the same samples, metrics and tables.

    export OPENAI_API_KEY=…
    NUNER_EXTRAS=annotate launch/local.sh fewshot --config=configs/fewshot_llm.py:ENCODER \\
        --config.llms.llm.endpoint.model=MODEL --config.llms.llm.price.input=… --config.llms.llm.price.output=… \\
        --config.llms.llm.request.budget=5 --dry_run

ENCODER is a Hugging Face folder, a hub name, or a workdir of pre-training; it may be left out. k = 0 is zero-shot: the
types with their definitions; at the other k the sentences of each sample are shown too. `--dry_run` shows the first
prompts and an estimate and asks nothing. Prices are dollars per million tokens; the budget is in dollars and never
exceeded. For a server of your own: `--config.llms.llm.endpoint.base_url=http://localhost:8000/v1`, and
`--config.llms.llm.endpoint.key_variable=` for one without keys. Started again with the same workdir, it goes on; no
answer that arrived is asked for again.

Cost: 4,389 requests, with about 8.1 million tokens in and 0.1 million out (four bytes a token, right answers). Expect:
not run with a language model here; right answers score 100, so nothing is lost between an answer and its score.
"""

from nuner_jax.config import fewshot, llm

TRAVEL_DESK = {
    "airline": "a company that flies passengers",
    "destination": "the place where a leg of the journey ends, or where the traveller wants to be",
    "hotel": "a hotel, or a chain of hotels, by name",
    "loyalty_programme": "a programme that rewards frequent customers of airlines or hotels",
    "origin": "the place where a leg of the journey begins",
    "price": "an amount of money with its currency",
    "transport_mode": "a means of transport, such as train, flight or hire car",
    "travel_date": "a day or a period of the journey",
    "traveller": "a person who travels, by name",
}
LAB_NOTES = {
    "chemical": "a chemical substance, reagent, solvent or buffer",
    "concentration": "a concentration or dilution, with its unit",
    "duration": "how long a step takes",
    "gene_or_protein": "a gene, a protein or an enzyme, by name",
    "instrument": "a device or piece of equipment of a laboratory",
    "organism": "a species, a strain or a kind of living being",
    "technique": "an experimental method or procedure, by name",
    "temperature": "a temperature, in degrees or in words",
}


def get_config(encoder=None):
    config = fewshot()
    config.sets = {"travel_desk": {"definitions": TRAVEL_DESK}, "lab_notes": {"definitions": LAB_NOTES}}
    config.llms = {"llm": llm()}
    if encoder:
        config.encoders = {"encoder": encoder}
        config.baseline = "encoder"
    config.k = (0, 4, 16)  # mentions of each type; 0 for the language model alone
    config.seeds = 5  # the fewest that have an interval
    config.eval.max_sentences = 200  # of each test split: every one costs a request for each k and seed
    return config
