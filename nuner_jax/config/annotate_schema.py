"""The schema of annotation: every key, its default, its unit and the reason for it."""

from __future__ import annotations

import json
import re
import urllib.parse

from ml_collections import ConfigDict, config_dict

from nuner_jax.errors import NunerError

CHOICES = {
    "source.unit": ("sentence", "passage", "row"),
    "source.duplicates": ("exact", "near"),
    "endpoint.kind": ("live", "batch", "replay"),
    "endpoint.max_tokens_key": ("max_completion_tokens", "max_tokens"),
    "align.occurrences": ("every", "first"),
    "align.match": ("tolerant", "exact"),
}
AT_LEAST = {
    "source.documents": 1,
    "source.size": 1,
    "source.min_chars": 1,
    "source.max_chars": 2,
    "source.min_words": 0,
    "prompt.units_per_request": 1,
    "endpoint.max_tokens": 1,
    "request.max_concurrency": 1,
    "request.timeout": 0.001,
    "request.max_attempts": 1,
    "request.backoff": 0.0,
    "request.pilot": 0,
    "request.budget": 0.0,
    "price.input": 0.0,
    "price.cached": 0.0,
    "price.output": 0.0,
    "batch.requests": 1,
    "batch.bytes": 1000,
    "batch.in_flight": 1,
    "batch.poll": 0.0,
    "align.min_chars": 1,
    "align.max_chars": 1,
}
AT_MOST = {
    "source.script_share": 1.0,
    "source.near_threshold": 1.0,
    "price.batch": 1.0,
    "batch.requests": 50_000,
    "batch.bytes": 200_000_000,
    "build.validation_fraction": 0.5,
}
"""Upper bounds of values that are at least 0."""
FREE_KEYS = ()


def check(config: ConfigDict) -> None:
    """What no bound on a single key can say.

    Raises:
      NunerError: naming the key and what it needs.
    """
    if not config.source.paths:
        raise NunerError("config.source.paths is empty: name at least one file, tfds:… or hf:… data set")
    if config.source.min_chars > config.source.max_chars:
        raise NunerError(
            f"config.source.min_chars = {config.source.min_chars} is above max_chars = {config.source.max_chars}"
        )
    shard = re.fullmatch(r"(\d+)/(\d+)", config.source.shard)
    if not shard or not int(shard[1]) < int(shard[2]):
        raise NunerError(f"config.source.shard = {config.source.shard!r}: i/n with i from 0 to n-1, such as 0/4")
    unknown = set(config.align.normalise) - {"case", "plural"}
    if unknown:
        raise NunerError(f"config.align.normalise: {', '.join(sorted(unknown))} unknown; there are case and plural")
    check_asking(config)


def check_asking(config: ConfigDict, at: str = "config") -> None:
    """The same of the sections that `asking` makes.

    Args:
      config: with these sections.
      at: where the user finds them.

    Raises:
      NunerError: naming the key and what it needs.
    """
    try:
        extra = json.loads(config.endpoint.extra)
    except ValueError:
        extra = None
    if not isinstance(extra, dict):
        raise NunerError(f"{at}.endpoint.extra = {config.endpoint.extra!r}: a JSON object, such as '{{\"seed\": 1}}'")
    if taken := sorted({"messages", "model", "stream"} & extra.keys()):
        raise NunerError(f"{at}.endpoint.extra: {', '.join(taken)} cannot be set there: other keys decide it")
    if config.endpoint.kind == "replay":
        return
    address = urllib.parse.urlsplit(config.endpoint.base_url)
    if address.username or address.password or address.query or address.fragment:  # it is stored, and shown
        raise NunerError(
            f"{at}.endpoint.base_url holds a user, a password or a query: put the key into the environment variable "
            f"{config.endpoint.key_variable or f'that {at}.endpoint.key_variable names'}, and the bare address here"
        )
    if not config.endpoint.model:
        raise NunerError(f"{at}.endpoint.model is not set: name the model as the endpoint does")
    missing = [key for key in ("input", "output") if config.price[key] is None]
    if config.request.budget is not None and missing:
        keys = " and ".join(f"{at}.price.{key}" for key in missing)
        raise NunerError(
            f"{at}.request.budget = {config.request.budget} needs the prices of {config.endpoint.model}: set {keys} "
            "(dollars per million tokens; 0 for a server of your own)"
        )


def annotate() -> ConfigDict:
    """From raw text to aligned shards through a language model; see `configs/annotate_openai.py`."""
    return ConfigDict(
        {
            "task": "annotate",
            "seed": 0,  # of the random sample
            "source": _source(),
            "prompt": {
                "template": "paper",  # "paper", "structured" (a JSON schema), or a file of your own
                "units_per_request": 1,  # sentences in one request; above 1, the answer numbers them
            },
            **asking(),
            "align": {
                "occurrences": "every",  # places of a surface that count: "every" (paper) or "first"
                "match": "tolerant",  # or "exact" (paper): without case and Unicode-form differences
                "min_chars": 1,  # of a mention
                "max_chars": 200,  # of a mention; longer ones are clauses
                "normalise": (),  # of concept names: "case", "plural"; raw forms are kept beside the shards
            },
            "build": {
                "validation_fraction": 0.02,  # share of texts, by hash
                "drop_concept": "concept",  # texts with this concept are left out (paper); "" keeps them
                "keep_unlabelled": False,  # keep texts in which nothing was found
            },
        }
    ).lock()


def asking() -> dict[str, ConfigDict]:
    """The sections that say whom to ask, how, and for how much."""
    return {
        "endpoint": _endpoint(),
        "request": {
            "max_concurrency": 64,  # requests in flight at most; fewer while the endpoint says it is too much
            "timeout": 120.0,  # seconds of one request
            "max_attempts": 6,  # times that one unit is asked for in one start, overloads and outages aside
            "backoff": 1.0,  # seconds before the second attempt; doubles, with jitter, up to 60
            "pilot": 20,  # units asked first, from which the cost of all is estimated; 0: none
            "budget": config_dict.placeholder(float),  # dollars, never exceeded; None: no limit
            "retry_failed": False,  # ask once more for units that failed in an earlier start
        },
        "price": {  # dollars per million tokens, from the endpoint's price list; None: unknown, 0: free
            "input": config_dict.placeholder(float),
            "cached": config_dict.placeholder(float),  # prompt tokens served from a cache; None: as input
            "output": config_dict.placeholder(float),
            "batch": 0.5,  # what the Batch API costs, as a share of the price
        },
        "batch": {  # of the Batch API, with endpoint.kind "batch"; the first two are its own limits
            "requests": 50_000,  # in one file
            "bytes": 200_000_000,  # of one file
            "in_flight": 4,  # batches at a time
            "poll": 60.0,  # seconds between looks at a batch
        },
    }


def _source() -> ConfigDict:
    return ConfigDict(
        {
            "paths": ("sample",),  # files or globs (text, JSONL, JSON, CSV, parquet; plain or gzip), "sample",
            # tfds:NAME_OR_FOLDER[:SPLIT], or hf:ORG/NAME[:CONFIG[:SPLIT]], which is streamed
            "field": "text",  # the key or column that holds the text
            "documents": config_dict.placeholder(int),  # rows or lines read of each path, from its start; None: all
            "unit": "sentence",  # what is asked for: "sentence" (paper), "passage" (paragraphs), or a whole "row"
            "language": "en",  # of the sentence splitter, ISO 639-1
            "min_chars": 20,  # units shorter, or longer, are left out, and counted
            "max_chars": 1000,
            "min_words": 4,
            "script": "Latin",  # Unicode script of the letters; "": any
            "script_share": 0.9,  # of the letters, at least
            "duplicates": "near",  # what is left out: "exact" ones, or "near" ones too
            "near_threshold": 0.8,  # Jaccard similarity of word 3-grams from which two units are near duplicates
            "size": config_dict.placeholder(int),  # units in the random sample; None: all
            "shard": "0/1",  # the part i/n of the sample that this machine annotates
        }
    ).lock()


def _endpoint() -> ConfigDict:
    return ConfigDict(
        {
            "kind": "live",  # one request at a time each, "batch" (the Batch API), or "replay" of recorded completions
            "base_url": "https://api.openai.com/v1",  # of any OpenAI-compatible server
            "model": config_dict.placeholder(str),  # as the endpoint names it
            "key_variable": "OPENAI_API_KEY",  # environment variable with the key; "" for servers without one
            "replay": "sample",  # files of recorded completions (text, completion), with kind "replay"
            "temperature": 0.0,  # None: not sent (some models refuse it)
            "top_p": config_dict.placeholder(float),  # None: not sent
            "max_tokens": 1024,  # of an answer
            "max_tokens_key": "max_completion_tokens",  # its name in the request; "max_tokens" for older servers
            "extra": "{}",  # further keys of the request's body, as a JSON object
        }
    ).lock()
