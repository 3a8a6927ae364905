"""Contrastive pre-training as a competent user of PyTorch and transformers would write it: the peer of this project.

    python tests/benchmarks/pretrain_peer.py WORK.json

Started by pretrain_torch.py, which writes WORK.json (see `Work`) and reads what is left in its folder. The sentences
are those of this project's tokenised corpus; all else is PyTorch: AutoModel with SDPA attention, the frozen bottom of
the text tower without gradients, batches that are sorted by length within a pool and padded to their longest, distinct
concepts encoded once a batch, fused AdamW, bf16 autocast where the config computes in bf16.
"""

from __future__ import annotations

import dataclasses
import json
import math
import os
import sys
import time
from pathlib import Path

import numpy as np
import torch
from ml_collections import ConfigDict
from transformers import AutoModel, get_scheduler

from nuner_jax import config as config_lib
from nuner_jax import pretrained
from nuner_jax.data import ragged
from nuner_jax.data.corpus import Corpus
from nuner_jax.data.loader import visits
from nuner_jax.tasks.corpora import open_corpora

SCHEDULES = {"cosine": "cosine", "linear": "linear", "constant": "constant_with_warmup"}
"""By `config.optim.schedule`: what transformers calls it."""


@dataclasses.dataclass(frozen=True)
class Work:
    """What to train.

    config: file of the resolved config.
    start: export of the parameters to start from.
    data: fingerprint of the training corpus, which must be the same.
    folder: where the result and the weights go.
    seed: of the order of the sentences and of dropout.
    batch: sentences per update.
    steps: updates.
    every: updates between two readings of the clock; the first so many are warm-up.
    pool: batches within which sentences are sorted by length.
    concept_groups: parts, by length, in which a batch's concepts are encoded; each is padded to its own longest.
    save_at: steps whose weights are wanted.
    compile: whether torch.compile is used.
    device: "cpu" or "cuda".
    """

    config: str
    start: str
    data: str
    folder: str
    seed: int
    batch: int
    steps: int
    every: int
    pool: int
    concept_groups: int
    save_at: list[int]
    compile: bool
    device: str


def main() -> None:
    """Trains, and leaves result.json and the weights in the folder of the work."""
    work = Work(**json.loads(Path(sys.argv[1]).read_text()))
    torch.set_num_threads(len(os.sched_getaffinity(0)))
    torch.set_float32_matmul_precision("high" if work.device == "cuda" else "highest")
    config = config_lib.read(Path(work.config))
    result = {"intervals": train(work, config), "device": device_name(work.device), "threads": torch.get_num_threads()}
    (Path(work.folder) / "result.json").write_text(json.dumps(result))


def device_name(device: str) -> str:
    """What it is called."""
    return torch.cuda.get_device_name() if device == "cuda" else "cpu"


# --- Data --------------------------------------------------------------------------------------


def open_corpus(config: ConfigDict, start: Path) -> tuple[Corpus, int]:
    """The training corpus of a config, as its own command opens it, and the token id of padding."""
    encoder = pretrained.load_encoder_config(start)
    corpus, _ = open_corpora(
        config.data,
        pretrained.load_tokenizer(start),
        window=min(config.data.row_length, encoder.max_length),
        concept_length=min(config.data.concept_length, encoder.max_length),
        say=lambda line: None,
    )
    return corpus, encoder.pad_token_id


def plan(length_M: np.ndarray, batch: int, steps: int, warmup: int, pool: int, seed: int) -> np.ndarray:
    """The sentences of every update: int64 [steps, batch], indices into `length_M`.

    Shuffled, then repeated, then sorted by length within pools of so many batches, whose order is shuffled again. The
    warm-up is a pool of its own, so that what is timed are whole pools: all lengths, each as often as it occurs.
    """
    random = np.random.default_rng(seed)
    epochs = math.ceil(steps * batch / length_M.size)
    stream = np.concatenate([random.permutation(length_M.size) for _ in range(epochs)])[: steps * batch]
    pools = []
    for part in np.split(stream.reshape(steps, batch), [warmup, *range(warmup + pool, steps, pool)]):
        part = part.reshape(-1)
        batches = part[np.argsort(length_M[part], kind="stable")].reshape(-1, batch)
        pools.append(random.permutation(batches))
    return np.concatenate(pools)


class Batches(torch.utils.data.Dataset):
    """Batches of a corpus by the sequences that they hold."""

    def __init__(self, corpus: Corpus, pad_id: int, concept_groups: int = 1):
        self.corpus, self.pad_id, self.concept_groups = corpus, pad_id, concept_groups

    def __getitem__(self, sequences: np.ndarray) -> dict[str, torch.Tensor | list]:
        """Tensors of a batch of B sequences, L long at most, with T scored tokens, N distinct concepts and P pairs.

        tokens, mask [B, L]; scored [T], places in B x L; names, a list of (tokens, mask) [n, K]; pairs [P], places in
        T x N of the positive pairs.
        """
        corpus = self.corpus
        first_B, length_B = _ranges(corpus.sequence_offsets_W1, sequences)
        tokens_BxL, mask_BxL = padded(corpus.tokens_T, first_B, length_B, self.pad_id)
        at_L = np.arange(tokens_BxL.shape[1])
        scored_BxL = (at_L > 0) & (at_L < length_B[:, None] - 1)  # not the two special tokens

        first_pair_B, pairs_B = _ranges(corpus.pair_offsets_W1, sequences)
        pairs = ragged.ranges(first_pair_B, pairs_B)
        token_P = np.repeat(ragged.offsets(length_B - 2)[:-1], pairs_B) + corpus.pair_positions_P[pairs] - 1
        concepts_N, column_P = np.unique(corpus.pair_concepts_P[pairs], return_inverse=True)
        first_N, length_N = _ranges(corpus.concept_offsets_C1, concepts_N.astype(np.int64))
        order_N = np.argsort(length_N, kind="stable")
        column_P = np.argsort(order_N)[column_P]  # where the concept has gone
        names = [
            tuple(map(torch.from_numpy, padded(corpus.concept_tokens_U, first_N[part], length_N[part], self.pad_id)))
            for part in np.array_split(order_N, self.concept_groups)
        ]
        return {
            "tokens": torch.from_numpy(tokens_BxL),
            "mask": torch.from_numpy(mask_BxL),
            "scored": torch.from_numpy(np.flatnonzero(scored_BxL)),
            "names": names,
            "pairs": torch.from_numpy(token_P * len(concepts_N) + column_P),
        }


def padded(tokens_T: np.ndarray, first_N: np.ndarray, length_N: np.ndarray, pad_id: int):
    """Pieces of a flat array as rows that are as long as the longest: int64 [N, K], and bool where there is a token."""
    mask_NxK = np.arange(length_N.max()) < length_N[:, None]
    tokens_NxK = np.full(mask_NxK.shape, pad_id, np.int64)
    tokens_NxK[mask_NxK] = tokens_T[ragged.ranges(first_N, length_N)]
    return tokens_NxK, mask_NxK


def _ranges(offsets: np.ndarray, rows: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """First element and number of elements of these rows of a ragged array."""
    first = np.asarray(offsets[rows])
    return first, np.asarray(offsets[rows + 1]) - first


# --- Model -------------------------------------------------------------------------------------


class TwoTowers(torch.nn.Module):
    """Both towers and the loss between them."""

    def __init__(self, start: Path, config: ConfigDict):
        """From an export of this project, with the dropout and the frozen layers of the config."""
        super().__init__()
        self.text, self.concept = (
            AutoModel.from_pretrained(
                folder,
                add_pooling_layer=False,
                attn_implementation="sdpa",
                hidden_dropout_prob=config.model.dropout,
                attention_probs_dropout_prob=0.0,  # ours has none
            )
            for folder in (start, start / "concept")
        )
        logit = json.loads((start / "nuner.json").read_text())
        self.log_scale = torch.nn.Parameter(torch.tensor(logit["log_scale"]), config.loss.learn_scale)
        self.bias = torch.nn.Parameter(torch.tensor(logit["bias"]), config.loss.learn_bias)
        self.first_token, self.pairs = config.model.concept_pooling == "first", config.loss.normaliser == "pairs"
        if config.model.frozen_layers:
            # Nothing below them wants a gradient either, so that autograd records, and keeps, nothing of this part.
            for part in (self.text.embeddings, *self.text.encoder.layer[: config.model.frozen_layers]):
                part.requires_grad_(False)

    def forward(self, batch: dict[str, torch.Tensor | list]) -> torch.Tensor:
        """The loss of a batch, per positive pair (or per pair)."""
        hidden_BxLxD = self.text(batch["tokens"], batch["mask"]).last_hidden_state
        tokens_TxD = hidden_BxLxD.flatten(0, 1).index_select(0, batch["scored"])
        concepts_NxD = torch.cat([self.name_vectors(*part) for part in batch["names"]])
        logits_TxN = (tokens_TxD @ concepts_NxD.T).float() * self.log_scale.exp() + self.bias
        positive_P = logits_TxN.flatten().index_select(0, batch["pairs"])
        loss = torch.nn.functional.softplus(logits_TxN).sum() - positive_P.sum()
        return loss / max(1, logits_TxN.numel() if self.pairs else positive_P.numel())

    def name_vectors(self, tokens_NxK: torch.Tensor, mask_NxK: torch.Tensor) -> torch.Tensor:
        """One vector per concept name."""
        hidden_NxKxD = self.concept(tokens_NxK, mask_NxK).last_hidden_state
        if self.first_token:
            return hidden_NxKxD[:, 0]
        weight_NxKx1 = mask_NxK[:, :, None].to(hidden_NxKxD.dtype)
        return (hidden_NxKxD * weight_NxKx1).sum(1) / weight_NxKx1.sum(1)

    def save(self, folder: Path) -> None:
        """As the export of this project has it."""
        self.text.save_pretrained(folder)
        self.concept.save_pretrained(folder / "concept")
        logit = {"log_scale": self.log_scale.item(), "bias": self.bias.item()}
        (folder / "nuner.json").write_text(json.dumps(logit))


# --- Training ----------------------------------------------------------------------------------


class Updates:
    """The optimizer of a config over the parameters of a model that are not frozen."""

    def __init__(self, model: TwoTowers, config: ConfigDict, steps: int):
        o = config.optim
        self.trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
        groups = [
            {"params": [p for p in self.trained if p.ndim >= 2], "weight_decay": o.weight_decay},
            {"params": [p for p in self.trained if p.ndim < 2], "weight_decay": 0.0},
        ]
        self.optimizer = torch.optim.AdamW(groups, config.lr, (o.b1, o.b2), o.eps, fused=True)
        self.schedule = get_scheduler(SCHEDULES[o.schedule], self.optimizer, round(o.warmup * steps), steps)
        self.clip_norm = o.clip_norm

    def update(self, loss: torch.Tensor) -> None:
        """One step down the gradient of a loss."""
        loss.backward()
        torch.nn.utils.clip_grad_norm_(self.trained, self.clip_norm)
        self.optimizer.step()
        self.schedule.step()
        self.optimizer.zero_grad()


def train(work: Work, config: ConfigDict) -> list[dict[str, float]]:
    """Trains to the last step; what each interval between two readings of the clock held, and how long it took."""
    torch.manual_seed(work.seed)
    model = TwoTowers(Path(work.start), config).to(work.device).train()
    updates = Updates(model, config, work.steps)
    run = torch.compile(model, dynamic=True) if work.compile else model
    clock = Clock(work.device)
    for step, batch in enumerate(batches(work, config), 1):
        with torch.autocast(work.device, torch.bfloat16, enabled=config.model.dtype == "bfloat16"):
            loss = run(to_device(batch, work.device))
        updates.update(loss)
        clock.add(loss, batch)
        if step % work.every == 0 or step == work.steps or step in work.save_at:
            clock.read(step)
        if step in work.save_at:
            model.save(Path(work.folder) / str(step))
            clock.start()
    return clock.intervals


def batches(work: Work, config: ConfigDict) -> torch.utils.data.DataLoader:
    """The batches of all updates; beside a GPU they are made by processes of their own."""
    corpus, pad_id = open_corpus(config, Path(work.start))
    if corpus.fingerprint != work.data:
        sys.exit(f"another training corpus than that of {work.start}: {corpus.fingerprint}, not {work.data}")
    weights = {name: source.weight for name, source in config.data.sources.items()}
    visits_M = visits(corpus, weights, work.seed)
    order = plan(corpus.length_W[visits_M], work.batch, work.steps, work.every, work.pool, work.seed)
    gpu = work.device == "cuda"
    return torch.utils.data.DataLoader(
        Batches(corpus, pad_id, work.concept_groups),
        batch_size=None,
        sampler=list(visits_M[order]),
        num_workers=4 if gpu else 0,
        pin_memory=gpu,
    )


def to_device(batch: dict[str, torch.Tensor | list], device: str) -> dict[str, torch.Tensor | list]:
    """The same batch there."""

    def move(value):
        return value.to(device, non_blocking=True) if isinstance(value, torch.Tensor) else [*map(move, value)]

    return {name: move(value) for name, value in batch.items()}


class Clock:
    """Reads the time of several steps at once, so that the device need not be waited for after each."""

    def __init__(self, device: str):
        self.device, self.intervals = device, []
        self.start()

    def start(self) -> None:
        """Begins an interval."""
        self.losses, self.sums = [], {"sentences": 0, "tokens": 0, "token_slots": 0, "concepts": 0, "concept_slots": 0}
        self.began = time.perf_counter()

    def add(self, loss: torch.Tensor, batch: dict[str, torch.Tensor | list]) -> None:
        """Counts a step."""
        self.losses.append(loss.detach())
        sentences, _ = batch["tokens"].shape
        self.sums["sentences"] += sentences
        self.sums["tokens"] += batch["scored"].numel() + 2 * sentences
        self.sums["token_slots"] += batch["tokens"].numel()
        self.sums["concepts"] += sum(len(tokens) for tokens, _ in batch["names"])
        self.sums["concept_slots"] += sum(tokens.numel() for tokens, _ in batch["names"])

    def read(self, step: int) -> None:
        """Ends an interval, and begins the next one."""
        loss = torch.stack(self.losses).mean().item()  # waits for the device
        seconds = time.perf_counter() - self.began
        self.intervals.append({"step": step, "steps": len(self.losses), "seconds": seconds, "loss": loss} | self.sums)
        self.start()


if __name__ == "__main__":
    main()
