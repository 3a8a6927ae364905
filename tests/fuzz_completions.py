"""Random and mutated completions through the parser, the split and the alignment, with their invariants asserted.

    python tests/fuzz_completions.py --minutes=10 [--seed=0]

Starts from the completions of the embedded sample. A failure prints the input that caused it, and ends with status 1.
"""

from __future__ import annotations

import argparse
import gzip
import json
import random
import sys
import time
import traceback
from collections import Counter
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))

from nuner_jax.annotate.prompts import Prompt  # noqa: E402
from nuner_jax.data.align import AlignOptions, align, fold  # noqa: E402
from nuner_jax.data.completions import Completion, parse_completion  # noqa: E402
from nuner_jax.data.concepts import normalise_case  # noqa: E402

SAMPLE = ROOT / "nuner_jax" / "data" / "sample" / "completions.jsonl.gz"
PIECES = [
    *(
        "<>",
        "< >",
        "<",
        ">",
        "&lt;&gt;",
        "＜＞",
        "\\<\\>",
        "<|end|>",
        "</s>",
        "<think>",
        "</think>",
        "\n",
        "\r\n",
        "\n\n",
    ),
    *("- ", "* ", "• ", "1. ", "2) ", "## ", "### 1\n", "[2]\n", "**Sentence 3:**\n", "|", "---", "```json\n", "```"),
    *(
        '"',
        "'",
        "“",
        "”",
        "’",
        "`",
        "**",
        "__",
        "(",
        ")",
        "[",
        "]",
        "{",
        "}",
        ",",
        ":",
        ";",
        ".",
        "\\",
        "\\u00",
        "\\ud800",
    ),
    *(
        '{"entities": [',
        '{"sentences": [{"number": 1, "entities": [',
        '{"entity": "',
        '", "concept": "',
        '"}, ',
        "null",
    ),
    *(
        "\u200b",
        "\u200d",
        "\u00ad",
        "\u0301",
        "\u0345",
        "\ufeff",
        "\u00a0",
        "\u3000",
        "\x00",
        "\x85",
        "\u2028",
        "\ud800",
    ),
    *("é", "İ", "ß", "ﬁ", "½", "ǅ", "한", "ำ", "क्ष", "👩‍👩‍👧", "™", "Ω", "entity <> concept <> description\n"),
]
PROMPT = Prompt("[INPUT SENTENCE]", "[INPUT SENTENCE]", structured=False, units_per_request=4)


def assert_accounted(completion: str, parsed: Completion) -> None:
    """Every line of a completion stands in exactly one place, and annotations are sound."""
    rest = [*parsed.rejected, *parsed.ignored]
    lines = [line.removesuffix("\r") for line in completion.split("\n")]
    if not any(line.lstrip().startswith(("{", "[")) for line in lines):
        assert not Counter(one.line for one in rest) - Counter(lines)
        assert len(parsed.annotations) + len(rest) == len(lines)
    else:  # JSON, perhaps, whose items are not lines: what is left over stands there
        bare = completion.replace("\r", "")
        assert all(one.line.replace("\r", "") in bare for one in rest)
        assert parsed.annotations or rest
    assert len(set(parsed.annotations)) == len(parsed.annotations)
    for surface, concept, _ in parsed.annotations:
        assert surface
        assert any(map(str.isalnum, concept)) and concept == " ".join(concept.split())


def assert_aligned(text: str, annotations: tuple, options: AlignOptions) -> None:
    """Every annotation is found or rejected, and every mention stands in the text as its annotation says."""
    aligned = align(text, annotations, options)
    assert len(aligned.found) + len(aligned.rejected) == len(annotations)
    assert aligned.missing == tuple(one for one, reason in aligned.rejected if reason == "not_in_text")
    exact = options.match == "exact"
    assert 0 <= aligned.inexact <= (0 if exact else len(aligned.found))
    surfaces: dict[str, set[str]] = {}
    for one in aligned.found:
        surfaces.setdefault(one.concept, set()).add(one.surface if exact else fold(one.surface))
    for one in aligned.entities:
        mention = text[one.start : one.end]
        assert options.min_chars <= len(mention) <= (options.max_chars or len(text))
        assert (mention if exact else fold(mention)) in surfaces[one.concept], (mention, surfaces[one.concept])
    if not exact:
        assert set(align(text, annotations).missing) >= set(aligned.missing)


def assert_split(answer: str, count: int) -> None:
    """As many parts as texts, and no line of an answer in two of them."""
    parts = PROMPT.split(answer, count)
    assert len(parts) == count
    if '"sentences"' not in answer:
        given = Counter(line.strip("\r") for part in parts if part for line in part.split("\n"))
        assert not given - Counter(line.strip("\r") for line in answer.split("\n"))


def mutated(rng: random.Random, string: str) -> str:
    """`string` with some places changed: pieces put in, stretches cut out, doubled or moved."""
    for _ in range(rng.choice((0, 1, 1, 2, 3, 5, 8, 20))):
        start = rng.randrange(len(string) + 1)
        end = min(len(string), start + rng.choice((0, 0, 1, 1, 2, 5, 30)))
        piece = rng.choice((string[start:end] * 2, "", rng.choice(PIECES), chr(rng.randrange(0x11_0000)), "case"))
        piece = string[start:end].swapcase() if piece == "case" else piece
        string = string[:start] + piece + string[end:]
    return string


def completion_of(rng: random.Random, row: dict) -> str:
    """A completion of the sample, as it is, as JSON, as a part of a numbered answer, or nothing of the kind."""
    lines = row["completion"].split("\n")
    kind = rng.randrange(5)
    if kind == 0:
        return "".join(rng.choice(PIECES) for _ in range(rng.randrange(40)))
    if kind == 1:
        items = [dict(zip(("entity", "concept", "description"), line.split(" <> "), strict=False)) for line in lines]
        answer = rng.choice((items, {"entities": items}, {"sentences": [{"number": 1, "entities": items}]}))
        return json.dumps(answer, indent=rng.choice((None, 1)), ensure_ascii=rng.random() < 0.5)
    if kind == 2:
        return "".join(f"{rng.choice(('### {}', '{}.', '[{}]')).format(n)}\n{row['completion']}\n" for n in range(1, 4))
    return "\n".join(rng.choice(("{}", "{}", "- {}", "1. {}", '"{}"')).replace("{}", line) for line in lines)


def one_round(rng: random.Random, row: dict, counts: Counter[str]) -> dict:
    """One input through everything; what it was, should it fail."""
    text = mutated(rng, row["text"])
    completion, cut = mutated(rng, completion_of(rng, row)), rng.random() < 0.2
    options = AlignOptions(
        rng.choice(("every", "first")), rng.choice(("exact", "tolerant")), *rng.choice(((1,), (2, 20)))
    )
    case = {"text": text, "completion": completion, "cut": cut, "options": options}
    try:
        parsed = parse_completion(completion, rng.choice((text, "")), cut=cut)
        assert_accounted(completion, parsed)
        assert_aligned(text, parsed.annotations, options)
        assert_split(completion, rng.randrange(1, 5))
        for one in parsed.annotations:
            assert normalise_case(normalise_case(one.concept)) == normalise_case(one.concept)
    except Exception:
        traceback.print_exc()
        print("\n".join(f"{key} = {value!r}" for key, value in case.items()))
        sys.exit(1)
    counts["annotations"] += len(parsed.annotations)
    counts.update(one.reason for one in (*parsed.rejected, *parsed.ignored))
    return case


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--minutes", type=float, default=10.0)
    parser.add_argument("--seed", type=int, default=0)
    arguments = parser.parse_args()
    rng, counts = random.Random(arguments.seed), Counter()
    with gzip.open(SAMPLE, "rt", encoding="utf-8") as file:
        rows = [json.loads(line) for line in file]
    start, rounds, slowest = time.perf_counter(), 0, 0.0
    while (now := time.perf_counter()) < start + 60 * arguments.minutes:
        one_round(rng, rng.choice(rows), counts)
        rounds += 1
        slowest = max(slowest, time.perf_counter() - now)
    print(f"{rounds:,} completions in {now - start:.0f} s, the slowest {slowest * 1000:.0f} ms; seed {arguments.seed}")
    print("\n".join(f"  {name:<20}{count:>12,}" for name, count in counts.most_common()))


if __name__ == "__main__":
    main()
