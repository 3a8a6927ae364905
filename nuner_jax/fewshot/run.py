"""A few-shot evaluation: every set with every encoder, head, k and seed, then tables, curves and a page.

Everything is looked at before anything is computed. Then, for each set and encoder, the words' vectors are computed
once, and for each k the heads of all seeds are trained at once, scored, and written to WORKDIR/results.jsonl: a second
start goes on from there.
"""

from __future__ import annotations

import dataclasses
import hashlib
import json
import time
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from ml_collections import ConfigDict

from nuner_jax import metrics
from nuner_jax import workdir as workdir_lib
from nuner_jax.data.ner import datasets
from nuner_jax.errors import NunerError
from nuner_jax.fewshot import figures, page, tables
from nuner_jax.fewshot.features import Frozen, WordFeatures, load_frozen, word_features
from nuner_jax.fewshot.heads import HeadOptions, predict_heads, train_heads
from nuner_jax.fewshot.material import Material, Sentences
from nuner_jax.fewshot.results import ROWS_FILE, Grid, Results, append_rows, read_rows, summarise
from nuner_jax.folders import writing
from nuner_jax.writers import Console, duration

_TRAINING_COST = 3  # of a word in an update, in words classified: there and back


@dataclasses.dataclass(frozen=True)
class Plan:
    """All that a run needs, read and checked.

    settings: of each set, encoder and head, a hash of all that decides its results beside k and seed.
    """

    config: ConfigDict
    workdir: Path
    grid: Grid
    sets: Mapping[str, Material]
    encoders: Mapping[str, Frozen]
    heads: Mapping[str, HeadOptions]
    settings: Mapping[tuple[str, str, str], str]

    @property
    def rows_file(self) -> Path:
        """Where the rows are."""
        return self.workdir / ROWS_FILE

    def detail_file(self, name: str) -> Path:
        """What the page tells of a set beyond its scores."""
        return self.workdir / "details" / f"{name}.json"


@dataclasses.dataclass(frozen=True)
class Job:
    """The heads of one set, encoder, kind and k that are not there yet: one for each of the seeds."""

    set: str
    encoder: str
    head: str
    k: int
    seeds: tuple[int, ...]


def fewshot(config: ConfigDict, workdir: Path, console: Console) -> Results:
    """Runs a few-shot evaluation, or the rest of one.

    Args:
      config: see `nuner_jax.config.fewshot_schema`.
      workdir: where results, tables, curves and the page go.
      console: for progress and the table.

    Raises:
      NunerError: bad input, named before anything is computed.
    """
    began = time.time()
    with writing(workdir):
        workdir_lib.make(workdir)
        plan = prepare(config, workdir, console)
        measure(plan, console)
        return _report(plan, time.time() - began, console)


# --- The plan ----------------------------------------------------------------------------------


def prepare(config: ConfigDict, workdir: Path, console: Console) -> Plan:
    """Reads all sets and encoders, draws all samples, and looks at the results that are there.

    Raises:
      NunerError: a set or encoder that cannot be used; results of other settings in the workdir.
    """
    grid = _grid(config)
    sets = {}
    for name in grid.sets:
        data = datasets.load({**config.sets[name].to_dict(), "name": name})
        console.say(datasets.report_table(data.report))
        sets[name] = Material.of(data, grid.k, grid.seeds, grid.rule, config.eval.max_sentences)
    encoders = {}
    for name in grid.encoders:
        encoders[name] = load_frozen(config.encoders[name], config.dtype)
        layers = " and ".join(map(str, encoders[name].hidden_layers(config.layers)))
        console.say(f"encoder {name}: {encoders[name].folder}, {encoders[name].fingerprint[:12]}, layer {layers}")
    shared = {key: value for key, value in config.head.items() if key != "kinds"}
    heads = {kind: HeadOptions(kind=kind, **shared) for kind in grid.heads}
    settings = {
        (name, encoder, head): _settings(config, sets[name], encoders[encoder], heads[head])
        for name in grid.sets
        for encoder in grid.encoders
        for head in grid.heads
    }
    plan = Plan(config, workdir, grid, sets, encoders, heads, settings)
    _check_rows(plan)
    workdir_lib.write_config(config, workdir, resumed=False)
    samples = {name: material.samples_as_dict() for name, material in sets.items()}
    (workdir / "samples.json").write_text(json.dumps(samples))
    return plan


def _grid(config: ConfigDict) -> Grid:
    others = sorted(name for name in config.encoders if name != config.baseline)
    return Grid(
        sets=tuple(sorted(config.sets)),
        encoders=(*([config.baseline] if config.baseline else []), *others),
        heads=tuple(config.head.kinds),
        k=tuple(sorted(config.k)),
        seeds=tuple(range(config.seed, config.seed + config.seeds)),
        rule=config.rule,
        baseline=config.baseline,
    )


def _settings(config: ConfigDict, material: Material, encoder: Frozen, head: HeadOptions) -> str:
    parts = (
        material.data.fingerprint,
        encoder.fingerprint,
        encoder.hidden_layers(config.layers),
        dataclasses.astuple(head),
        config.eval.to_dict(),
    )
    return hashlib.sha256(repr(parts).encode()).hexdigest()[:16]


def _check_rows(plan: Plan) -> None:
    """Refuses a workdir whose results are not those of this config."""
    for row in Results(read_rows(plan.rows_file), plan.grid).rows:
        here = plan.settings[row["set"], row["encoder"], row["head"]]
        sample = plan.sets[row["set"]].samples[row["k"], row["seed"]].hash
        if (row.get("settings"), row["sample_hash"]) != (here, sample):
            raise NunerError(
                f"{plan.rows_file} holds results of {row['encoder']} on {row['set']} with other data, weights or "
                "settings (head, layers, eval): choose another --workdir, or delete this one"
            )


# --- Measuring ---------------------------------------------------------------------------------


def measure(plan: Plan, console: Console) -> None:
    """Computes what is not there yet."""
    missing: dict[tuple, list[int]] = {}
    for name, encoder, head, k, _, seed in Results(read_rows(plan.rows_file), plan.grid).missing:
        missing.setdefault((name, encoder, head, k), []).append(seed)
    jobs = [Job(*key, tuple(seeds)) for key, seeds in missing.items()]
    passes: dict[tuple[str, str], list[Job]] = {}  # those that share features
    for job in jobs:
        passes.setdefault((job.set, job.encoder), []).append(job)
    heads = sum(len(job.seeds) for job in jobs)
    console.say(f"to do: {heads:,} heads of {len(plan.grid.sets)} sets and {len(plan.grid.encoders)} encoders")
    pace = _Pace(
        features=sum(_words(plan.sets[name]) for name, _ in passes),
        heads=sum(_head_cost(plan, job) for job in jobs),
    )
    for (name, encoder), together in passes.items():
        material = plan.sets[name]
        with _Timer() as timer:
            query, pool = _features(plan, name, encoder, pace, console)
        pace.done("features", _words(material), timer.seconds)
        console.say(f"{name}, {encoder}: features of {_words(material):,} words; {timer.seconds:.1f} s, {pace.left()}")
        for job in together:
            with _Timer() as timer:
                predicted_HxW = _predict(plan, job, query, pool)
                rows = _rows(plan, job, predicted_HxW)
                if job == _shown(plan, job):
                    _keep_detail(plan, job, predicted_HxW)
            for row in rows:
                row["seconds"] = round(timer.seconds / len(rows), 3)
                row["words_without_tokens"] = int(query.silent_V.size)
            append_rows(plan.rows_file, rows)
            pace.done("heads", _head_cost(plan, job), timer.seconds)
            mean = np.mean([row["token_macro_f1"] for row in rows])
            console.say(
                f"{name}, {plan.grid.name_of(encoder, job.head)}, k = {job.k}: token macro F1 {100 * mean:.1f}, "
                f"mean of {len(rows)} seeds; {timer.seconds:.1f} s, {pace.left()}"
            )


def _words(material: Material) -> int:
    """Words whose features a pass over a set needs."""
    return material.query.labels_W.size + material.pool.labels_W.size


def _head_cost(plan: Plan, job: Job) -> float:
    """Training and prediction of a job, in words classified by one head."""
    material, options = plan.sets[job.set], plan.heads[job.head]
    support = max(material.support(job.k, seed).size for seed in job.seeds)
    trained = _TRAINING_COST * options.steps * min(options.batch, support)
    return len(job.seeds) * (trained + material.query.labels_W.size)


def _features(plan: Plan, name: str, encoder: str, pace: _Pace, console: Console) -> tuple[WordFeatures, WordFeatures]:
    """The vectors of a set's query words, and of the words of its samples."""
    frozen, found = plan.encoders[encoder], []
    for part in ("query", "pool"):
        sentences = getattr(plan.sets[name], part)
        file = None
        if plan.config.features == "file":
            file = plan.workdir / "features" / f"{part}.npy"
            file.parent.mkdir(exist_ok=True)
            file.unlink(missing_ok=True)  # the file of the set before stays readable for who has it mapped

        def advance(share: float, part: str = part) -> None:
            console.progress(f"{name}, {encoder}: {part} features {share:.0%}, {pace.left()}", final=False)

        layers = frozen.hidden_layers(plan.config.layers)
        found.append(word_features(frozen, sentences.texts, sentences.spans, layers, file=file, advance=advance))
    return found[0], found[1]


def _predict(plan: Plan, job: Job, query: WordFeatures, pool: WordFeatures) -> np.ndarray:
    """The class that the head of each seed gives each query word: int32 [H, W]."""
    material = plan.sets[job.set]
    heads = train_heads(
        pool.features_WxD,
        material.pool.labels_W,
        [np.setdiff1d(material.support(job.k, seed), pool.silent_V) for seed in job.seeds],
        num_types=len(material.data.types),
        options=plan.heads[job.head],
        seeds=job.seeds,
    )
    predicted_HxW = predict_heads(heads, query.features_WxD)
    predicted_HxW[:, query.silent_V] = 0  # nothing is known of them
    return predicted_HxW


def _rows(plan: Plan, job: Job, predicted_HxW: np.ndarray) -> list[dict[str, Any]]:
    """The result of each head."""
    material, heads = plan.sets[job.set], len(job.seeds)
    query, types = material.query, material.data.types
    found = _mentions(query, predicted_HxW)
    token = metrics.token_macro_f1(query.labels_W, predicted_HxW, len(types), plan.config.eval.include_other)
    entity = metrics.entity_micro_f1(query.mentions, found, len(types), heads)
    string = metrics.string_f1(query.mentions, found, query.texts, len(types), heads)
    return [
        {
            "set": job.set,
            "encoder": job.encoder,
            "head": job.head,
            "k": job.k,
            "rule": plan.grid.rule,
            "seed": seed,
            "sample_hash": material.samples[job.k, seed].hash,
            "sentences": len(material.samples[job.k, seed].ids),
            "token_macro_f1": float(token.f1_H[at]),
            "entity_f1": float(entity.f1_H[at]),
            "entity_precision": float(entity.precision_H[at]),
            "entity_recall": float(entity.recall_H[at]),
            "string_f1": float(string.f1_H[at]),
            "per_type": token.per_type(at, types),
            "settings": plan.settings[job.set, job.encoder, job.head],
        }
        for at, seed in enumerate(job.seeds)
    ]


def _mentions(query: Sentences, predicted_HxW: np.ndarray) -> metrics.Spans:
    """What the heads found, in characters."""
    spans_Wx2 = np.concatenate([np.zeros((0, 2), np.int32), *query.spans])
    return metrics.io_spans(predicted_HxW, query.offsets_S1).in_characters(spans_Wx2, query.offsets_S1)


def _shown(plan: Plan, job: Job) -> Job:
    """The job of the same set whose errors the page shows: the last encoder, the first head, the largest k."""
    return dataclasses.replace(job, encoder=plan.grid.encoders[-1], head=plan.grid.heads[0], k=plan.grid.k[-1])


def _keep_detail(plan: Plan, job: Job, predicted_HxW: np.ndarray) -> None:
    material = plan.sets[job.set]
    query, types = material.query, material.data.types
    title = f"{plan.grid.name_of(job.encoder, job.head)}, k = {job.k}"
    confusion_HxCxC = metrics.confusion(query.labels_W, predicted_HxW, len(types))
    found = _mentions(query, predicted_HxW)
    plan.detail_file(job.set).parent.mkdir(exist_ok=True)
    page.write_detail(
        page.examine(title, types, query.texts, query.mentions, found, confusion_HxCxC), plan.detail_file(job.set)
    )


# --- The outcome -------------------------------------------------------------------------------


def _report(plan: Plan, seconds: float, console: Console) -> Results:
    """Writes tables, curves and page, and prints the main table."""
    results = Results(read_rows(plan.rows_file), plan.grid)
    cells, notes = summarise(results), _notes(plan, results.rows)
    manifest = tables.make_manifest(
        plan.config,
        results,
        {name: material.data.fingerprint for name, material in plan.sets.items()},
        {name: encoder.fingerprint for name, encoder in plan.encoders.items()},
        seconds,
    )
    paths = tables.write_tables(results, cells, manifest, plan.workdir, notes)
    curves = [
        figures.draw_curves(cells, plan.grid, name, plan.workdir / f"{name}.png")
        for name in ("token_macro_f1", "entity_f1")
    ]
    files = {name: plan.detail_file(name) for name in plan.grid.sets}
    details = {name: page.read_detail(file) for name, file in files.items() if file.exists()}
    paths += [*curves, page.write_page(results, cells, manifest, details, curves, plan.workdir / "results.html", notes)]
    console.say()
    console.say("Token macro F1")
    console.say(tables.as_text(tables.score_table(cells, plan.grid, "token_macro_f1")))
    for line in tables.explanations(results, notes):
        console.say(f"  {line}")
    console.say(f"Done in {duration(seconds)} (this start). Written: {', '.join(path.name for path in paths)}")
    console.say(f"  {plan.workdir}")
    return results


def _notes(plan: Plan, rows: Iterable[Mapping[str, Any]]) -> Sequence[str]:
    notes = [note for material in plan.sets.values() for note in material.notes]
    silent = {(row["set"], row["encoder"]): row["words_without_tokens"] for row in rows}
    return notes + [
        f"{name}, {encoder}: {count:,} query words that its tokenizer leaves out, taken as outside"
        for (name, encoder), count in silent.items()
        if count
    ]


class _Timer:
    """`with _Timer() as timer: …` leaves the time that it took in `timer.seconds`."""

    def __enter__(self) -> _Timer:
        self._began = time.perf_counter()
        return self

    def __exit__(self, *unused: object) -> None:
        self.seconds = time.perf_counter() - self._began


class _Pace:
    """How long the rest will take: of each kind of work, what is left at the speed so far."""

    def __init__(self, **amounts: float):
        self._left = dict(amounts)
        self._done = dict.fromkeys(amounts, 0.0)
        self._seconds = dict.fromkeys(amounts, 0.0)

    def done(self, kind: str, amount: float, seconds: float) -> None:
        """Takes note of work."""
        self._left[kind] -= amount
        self._done[kind] += amount
        self._seconds[kind] += seconds

    def left(self) -> str:
        """In words; nothing is said before every kind of work has a speed."""
        if not all(self._done.values()):
            return "time left unknown yet"
        rest = sum(left * self._seconds[kind] / self._done[kind] for kind, left in self._left.items())
        return f"about {duration(rest)} left"
