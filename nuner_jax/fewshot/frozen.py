"""Measures frozen encoders: their features once for each set, then the heads of all seeds at once."""

from __future__ import annotations

import time

import numpy as np

from nuner_jax.fewshot.features import WordFeatures, word_features
from nuner_jax.fewshot.heads import predict_heads, train_heads
from nuner_jax.fewshot.material import Material
from nuner_jax.fewshot.outcome import keep_detail, rows_of
from nuner_jax.fewshot.plan import Job, Plan
from nuner_jax.fewshot.results import append_rows
from nuner_jax.fewshot.scoring import mentions_of
from nuner_jax.fewshot.starts import Starts
from nuner_jax.writers import Console, duration

_TRAINING_COST = 3  # of a word in an update, in words classified: there and back


def measure(plan: Plan, console: Console, starts: Starts) -> None:
    """Computes what is not there yet of the encoders."""
    jobs = plan.missing_jobs(plan.grid.encoders)
    passes: dict[tuple[str, str], list[Job]] = {}  # those that share features
    for job in jobs:
        passes.setdefault((job.set, job.encoder), []).append(job)
    heads = sum(len(job.seeds) for job in jobs)
    if plan.encoders:
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
                found = mentions_of(material.query, predicted_HxW)
                rows = rows_of(plan, job, predicted_HxW, found)
                keep_detail(plan, job, predicted_HxW, found)
            for row in rows:
                row["seconds"] = round(timer.seconds / len(rows), 3)
                row["words_without_tokens"] = int(query.silent_V.size)
            append_rows(plan.rows_file, rows)
            starts.write()
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
