"""Names of one concept made one: normalised case, and plurals mapped to the singular that is in use.

Both are choices of the annotation run and never on by themselves: the paper keeps every name as the model wrote it.
"""

from __future__ import annotations

import functools
import re
from collections.abc import Callable, Collection

from nuner_jax.data.align import concept_name
from nuner_jax.errors import NunerError

_PARTS = re.compile(r"([^\s/-]+)")
_NO_PLURAL_ENDINGS = ("ss", "us", "is", "ics")  # glass, bus, crisis, physics
_OWN_MEANING = frozenset(
    ["arms", "clothes", "contents", "customs", "damages", "funds", "glasses", "goods", "grounds", "headquarters"]
    + ["lens", "manners", "means", "media", "news", "premises", "proceeds", "remains", "savings", "series", "species"]
    + ["spectacles", "spirits", "stocks", "works"]
)
"""Plurals, or what looks like one, that mean something else than their singular."""


def normalise_case(name: str) -> str:
    """`name`, its white space collapsed, without the capitals that only a title or the start of a sentence gave it.

    Words, and the parts of "Non-Profit" and "City/Town", of which only the first letter is a capital are lowered:
    "Programming Language" → "programming language". Acronyms, inner capitals and single letters stay: "DNA sequence",
    "mRNA", "COVID-19 vaccine", "vitamin A". Doing it twice changes nothing more.
    """
    return _PARTS.sub(lambda part: part[0].lower() if _is_capitalised(part[0]) else part[0], concept_name(name))


def plural_forms(vocabulary: Collection[str]) -> dict[str, str]:
    """For every name of `vocabulary` that is the plural of another name of it: that other, singular, name.

    vocabulary: distinct concept names, with their case normalised if that is wanted too.
    Only the last word counts ("programming languages" → "programming language"), only if it is of lower-case letters,
    and only to a singular that occurs itself, so that a wrong guess ("lens" → "len") meets nothing. Words in -ss, -us,
    -is, -ics, a few with a meaning of their own ("goods", "arms"), and guesses whose plural is not the word again stay.
    No name that is mapped to is mapped itself.

    Raises:
      NunerError: if `inflect` is not installed.
    """
    names = frozenset(vocabulary)
    singular_of = _singulars()
    forms = {}
    for name in sorted(names):
        head, space, word = name.rpartition(" ")
        singular = singular_of(word)
        if singular and head + space + singular in names:
            forms[name] = head + space + singular
    return {name: singular for name, singular in forms.items() if singular not in forms}


def _is_capitalised(part: str) -> bool:
    """Whether, of at least two letters with a case, the first is a capital and no other is."""
    cased = [letter for letter in part if letter.lower() != letter.upper()]
    return len(cased) > 1 and not cased[0].islower() and all(letter.islower() for letter in cased[1:])


def _singulars() -> Callable[[str], str]:
    """A function from a word to its singular, "" if it is no plural."""
    try:
        import inflect
    except ImportError as error:
        raise NunerError("plurals need inflect: install the extra: pip install 'nuner_jax[annotate]'") from error
    engine = inflect.engine()

    @functools.cache
    def singular_of(word: str) -> str:
        sound = len(word) > 3 and word.isascii() and word.isalpha() and word.islower()
        if not sound or word.endswith(_NO_PLURAL_ENDINGS) or word in _OWN_MEANING:
            return ""
        singular = engine.singular_noun(word)
        return singular if singular and engine.plural_noun(singular) == word else ""

    return singular_of
