"""The plan of a few-shot evaluation: all that is read and checked before anything is computed or asked."""

from __future__ import annotations

import dataclasses
import hashlib
import json
from collections.abc import Collection, Mapping
from pathlib import Path
from urllib.parse import quote

from ml_collections import ConfigDict

from nuner_jax import workdir as workdir_lib
from nuner_jax.annotate.prompts import Prompt
from nuner_jax.annotate.request.ask import identity
from nuner_jax.data.ner import datasets
from nuner_jax.data.records import Record
from nuner_jax.errors import NunerError
from nuner_jax.fewshot.features import Frozen, load_frozen
from nuner_jax.fewshot.heads import HeadOptions
from nuner_jax.fewshot.llm.prompt import make_prompt, read_definitions
from nuner_jax.fewshot.material import Material
from nuner_jax.fewshot.results import IN_CONTEXT, ROWS_FILE, Grid, Results, read_rows
from nuner_jax.writers import Console


@dataclasses.dataclass(frozen=True)
class Plan:
    """All that a run needs, read and checked.

    encoders, llms: by name. definitions: of each set, what its types mean, for language models.
    settings: of each set, encoder and head, a hash of all that decides its results beside k and seed.
    """

    config: ConfigDict
    workdir: Path
    grid: Grid
    sets: Mapping[str, Material]
    encoders: Mapping[str, Frozen]
    heads: Mapping[str, HeadOptions]
    llms: Mapping[str, ConfigDict]
    definitions: Mapping[str, Mapping[str, str]]
    settings: Mapping[tuple[str, str, str], str]

    @property
    def rows_file(self) -> Path:
        """Where the rows are."""
        return self.workdir / ROWS_FILE

    def detail_file(self, name: str) -> Path:
        """What the page tells of a set beyond its scores."""
        return self.workdir / "details" / f"{quote(name, safe='')}.json"

    def missing_jobs(self, names: Collection[str]) -> list[Job]:
        """What is to be done of these encoders or language models."""
        missing: dict[tuple, list[int]] = {}
        for name, encoder, head, k, _, seed in Results(read_rows(self.rows_file), self.grid).missing:
            if encoder in names:
                missing.setdefault((name, encoder, head, k), []).append(seed)
        return [Job(*key, tuple(seeds)) for key, seeds in missing.items()]

    @property
    def shown(self) -> tuple[str, str, int]:
        """(encoder, head, k) whose errors the page shows: the last encoder's, or else language model's, largest k."""
        encoder = (*self.grid.llms, *self.grid.encoders)[-1]
        return encoder, self.grid.heads_of(encoder)[0], self.grid.k[-1]

    @property
    def shown_title(self) -> str:
        """What the page calls it."""
        encoder, head, k = self.shown
        return f"{self.grid.name_of(encoder, head)}, k = {k}"


@dataclasses.dataclass(frozen=True)
class Job:
    """The rows of one set, encoder, head and k that are not there yet: one for each of the seeds."""

    set: str
    encoder: str
    head: str
    k: int
    seeds: tuple[int, ...]

    @property
    def system(self) -> tuple[str, str, int]:
        """What is measured: (encoder, head, k)."""
        return self.encoder, self.head, self.k


def prepare(config: ConfigDict, workdir: Path, console: Console) -> Plan:
    """Reads all sets and encoders, draws all samples, and looks at the results that are there.

    Raises:
      NunerError: a set or encoder that cannot be used; results of other settings in the workdir.
    """
    grid = _grid(config)
    sets, definitions = {}, {}
    for name in grid.sets:
        given = config.sets[name].to_dict()
        meanings = given.pop("definitions", None)
        data = datasets.load({**given, "name": name})
        definitions[name] = read_definitions(meanings, data)
        console.say(datasets.report_table(data.report))
        sets[name] = Material.of(data, grid.k, grid.seeds, grid.rule, config.eval.max_sentences)
    encoders = {}
    for name in grid.encoders:
        encoders[name] = load_frozen(config.encoders[name], config.dtype)
        layers = " and ".join(map(str, encoders[name].hidden_layers(config.layers)))
        console.say(f"encoder {name}: {encoders[name].origin}, {encoders[name].fingerprint[:12]}, layer {layers}")
    shared = {key: value for key, value in config.head.items() if key != "kinds"}
    heads = {kind: HeadOptions(kind=kind, **shared) for kind in grid.heads}
    llms = {name: config.llms[name] for name in grid.llms}
    settings = {}
    for name, material in sets.items():
        for encoder, head in grid.systems:
            if head == IN_CONTEXT:
                decides = _decides_answers(llms[encoder], definitions[name])
            else:
                decides = _decides_heads(config, encoders[encoder], heads[head])
            parts = (material.data.fingerprint, *decides, config.eval.to_dict())
            settings[name, encoder, head] = hashlib.sha256(repr(parts).encode()).hexdigest()[:16]
    plan = Plan(config, workdir, grid, sets, encoders, heads, llms, definitions, settings)
    _check_rows(plan)
    workdir_lib.write_config(config, workdir, resumed=False)
    samples = {name: material.samples_as_dict() for name, material in sets.items()}
    (workdir / "samples.json").write_text(json.dumps(samples))
    return plan


def _grid(config: ConfigDict) -> Grid:
    return Grid(
        sets=tuple(sorted(config.sets)),
        encoders=tuple(sorted(config.encoders, key=lambda name: (name != config.baseline, name))),
        heads=tuple(config.head.kinds),
        k=tuple(sorted(config.k)),
        seeds=tuple(range(config.seed, config.seed + config.seeds)),
        rule=config.rule,
        baseline=config.baseline,
        llms=tuple(sorted(config.llms, key=lambda name: (name != config.baseline, name))),
    )


def _decides_heads(config: ConfigDict, encoder: Frozen, head: HeadOptions) -> tuple:
    return encoder.fingerprint, encoder.hidden_layers(config.layers), dataclasses.astuple(head)


def _decides_answers(llm: ConfigDict, definitions: Mapping[str, str]) -> tuple:
    prompt = make_prompt(definitions, [Record("an example")], "a text")
    return identity(llm, Prompt.verbatim()), prompt, llm.examples


def _check_rows(plan: Plan) -> None:
    """Refuses a workdir whose results are not those of this config."""
    for row in Results(read_rows(plan.rows_file), plan.grid).rows:
        here = plan.settings[row["set"], row["encoder"], row["head"]]
        sample = plan.sets[row["set"]].samples[row["k"], row["seed"]].hash
        if (row.get("settings"), row["sample_hash"]) != (here, sample):
            raise NunerError(
                f"{plan.rows_file} holds results of {row['encoder']} on {row['set']} with other data, weights or "
                "settings (head, layers, eval; endpoint, examples and definitions of a language model): choose "
                "another --workdir, or delete this one"
            )
