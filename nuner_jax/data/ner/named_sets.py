"""Data sets known by name: the embedded ones, and public ones with their files and their place on the hub.

An entry is what a user would otherwise write into a config: keys of `SetSpec` in set_spec.py. Where a public set has
several versions, the entry says which one it means.

Names and files on the hub are as its public pages and the loaders published with the sets have them (the folders in
the conversion of eriktks/conll2003 are inferred from the form of others); no test fetches them. Where one has moved,
the error tells what is there, and `train`, `test` and `dev` in a config take its place.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

_SAMPLE = Path(__file__).parents[1] / "sample"
Keys = Mapping[str, Any]


@dataclass(frozen=True, slots=True)
class NamedSet:
    """A data set known by name.

    about: what it is, and where its files come from.
    folder: the ways in which its files are distributed, each as keys of a spec with file names in place of paths;
      any set may also come as `ANY_FOLDER`.
    hub: the keys that fetch it from the hub; {}: it is not there, or in another version.
    embedded: the keys that read it from the files of this project.
    states_version: a folder of it does not tell its version, so the user must.
    """

    about: str
    folder: tuple[Keys, ...] = ()
    hub: Keys | None = None
    embedded: Keys | None = None
    states_version: bool = False


# The names that a file of each split may have in any folder, without their extension.
ANY_FOLDER = {"train": ("train",), "test": ("test",), "dev": ("dev", "valid", "validation")}


def _shares(file: str) -> NamedSet:
    """An embedded set is one file; half of its sentences, told by their hash, are the test split."""
    return NamedSet("embedded in this project", embedded={"train": str(_SAMPLE / file), "test": 0.5})


def _tner(repo: str, version: str, train: tuple[str, ...] = ("train",)) -> Keys:
    """A set of the TNER collection: JSON lines of `tokens` and numbered `tags`, and a file that names the numbers."""
    return {
        "train": tuple(f"hf:tner/{repo}:{part}" for part in train),
        "test": f"hf:tner/{repo}:test",
        "dev": f"hf:tner/{repo}:valid",
        "labels": f"hf:tner/{repo}:label",
        "tag_key": "tags",
        "version": version,
    }


def _parquet(repo: str, config: str, tag_key: str = "ner_tags") -> Keys:
    """A set in the hub's own conversion to parquet, which holds the names of the tags."""
    at = f"hf:{repo}@refs/convert/parquet:{config}"
    return {
        "train": f"{at}/train",
        "test": f"{at}/test",
        "dev": f"{at}/validation",
        "tag_key": tag_key,
        "version": f"as published in {repo}",
    }


def _few_nerd(setting: str) -> NamedSet:
    return NamedSet(
        f"Few-NERD, {setting} (Ding et al., 2021), fine types; https://github.com/thunlp/Few-NERD",
        hub=_parquet("DFKI-SLT/few-nerd", setting, "fine_ner_tags"),
    )


def _crossner(domain: str) -> NamedSet:
    return NamedSet(
        f"CrossNER, {domain} (Liu et al., 2021); https://github.com/zliucr/CrossNER, ner_data/{domain}",
        hub=_parquet("DFKI-SLT/cross_ner", domain),
    )


NAMED: dict[str, NamedSet] = {
    "travel_desk": _shares("travel_desk.jsonl"),
    "lab_notes": _shares("lab_notes.jsonl"),
    "ontonotes5": NamedSet(
        "OntoNotes 5.0 (LDC2013T19), its English NER split; v4 and v12 of CoNLL-2012 and later splits differ in size",
        hub=_tner("ontonotes5", "5.0, as published in tner/ontonotes5", tuple(f"train0{i}" for i in range(4))),
        states_version=True,
    ),
    "bionlp2004": NamedSet(
        "BioNLP 2004 / JNLPBA (Collier and Kim, 2004)",
        folder=({"train": "Genia4ERtask2.iob2", "test": "Genia4EReval2.iob2", "comment": "###MEDLINE:"},),
        hub=_tner("bionlp2004", "as published in tner/bionlp2004, which has cut a dev split from train"),
    ),
    "mit_restaurant": NamedSet(
        "MIT Restaurant; https://groups.csail.mit.edu/sls/downloads/restaurant",
        folder=({"train": "restauranttrain.bio", "test": "restauranttest.bio", "word_column": 1, "tag_column": 0},),
        hub=_tner("mit_restaurant", "as published in tner/mit_restaurant, which has cut a dev split from train"),
    ),
    "mit_movie": NamedSet(
        "MIT Movie, the simple queries (eng); https://groups.csail.mit.edu/sls/downloads/movie",
        folder=({"train": "engtrain.bio", "test": "engtest.bio", "word_column": 1, "tag_column": 0},),
    ),
    "mit_movie_trivia": NamedSet(
        "MIT Movie, the trivia queries (trivia10k13); https://groups.csail.mit.edu/sls/downloads/movie",
        folder=({"train": "trivia10k13train.bio", "test": "trivia10k13test.bio", "word_column": 1, "tag_column": 0},),
        hub=_tner("mit_movie_trivia", "as published in tner/mit_movie_trivia, which has cut a dev split from train"),
    ),
    "fewnerd_supervised": _few_nerd("supervised"),
    "fewnerd_inter": _few_nerd("inter"),
    "fewnerd_intra": _few_nerd("intra"),
    "conll2003": NamedSet(
        "CoNLL-2003, English (Tjong Kim Sang and De Meulder, 2003)",
        folder=({"train": "eng.train", "test": "eng.testb", "dev": "eng.testa"},),
        hub=_parquet("eriktks/conll2003", "conll2003"),
    ),
    "wnut17": NamedSet(
        "WNUT-17, emerging entities (Derczynski et al., 2017); https://github.com/leondz/emerging_entities_17",
        folder=({"train": "wnut17train.conll", "test": "emerging.test.annotated", "dev": "emerging.dev.conll"},),
        hub=_tner("wnut2017", "as published in tner/wnut2017"),
    ),
    **{f"crossner_{domain}": _crossner(domain) for domain in ("ai", "literature", "music", "politics", "science")},
}
