"""From a text to its units, and the reasons for which a unit is left out."""

from __future__ import annotations

import re
import unicodedata
from collections.abc import Callable, Iterable

from ml_collections import ConfigDict

from nuner_jax.errors import NunerError

REASONS = ("control_characters", "too_short", "too_long", "few_words", "other_script")
"""Why a unit is left out for itself, in the order in which it is looked at."""

SCRIPTS = {
    **{
        name: (name.upper(),)
        for name in (
            *("Latin", "Greek", "Cyrillic", "Armenian", "Georgian", "Hebrew", "Arabic", "Syriac", "Ethiopic"),
            *("Devanagari", "Bengali", "Gurmukhi", "Gujarati", "Oriya", "Tamil", "Telugu", "Kannada", "Malayalam"),
            *("Sinhala", "Thai", "Lao", "Tibetan", "Myanmar", "Khmer", "Mongolian", "Hiragana", "Katakana", "Hangul"),
        )
    },
    "Han": ("CJK", "IDEOGRAPHIC"),
    "Japanese": ("CJK", "IDEOGRAPHIC", "HIRAGANA", "KATAKANA"),
    "Korean": ("CJK", "IDEOGRAPHIC", "HANGUL"),
}
"""The scripts, and the first words of the Unicode names of their letters."""

_LANGUAGE = re.compile("[a-z]{2,3}(-[a-z0-9]{1,8})*")
_BLANK_LINE = re.compile(r"\n\s*\n")
_CONTROL = re.compile(r"[\x00-\x08\x0b-\x1f\x7f-\x9f]")  # category Cc but for tab and newline
_ASCII_LETTER = re.compile("[A-Za-z]")
_VARIANTS = ("FULLWIDTH ", "HALFWIDTH ")  # begin the names of letters that come in two widths


def check_settings(source: ConfigDict) -> None:
    """Finds what no unit can be made with, before anything is read.

    Raises:
      NunerError: a language that is no code, an unknown script, or a package that is missing.
    """
    if not _LANGUAGE.fullmatch(source.language):
        raise NunerError(
            f"config.source.language = {source.language!r}: a code of ISO 639 in lower case, such as en, de or yue"
        )
    UnitFilter(source)
    unit_splitter(source.unit, source.language)


def unit_splitter(unit: str, language: str) -> Callable[[str], list[str]]:
    """The function from a text to its units, which are as they stand in it, but for two things.

    Space at the ends of a unit goes, and every line ends in a newline: of a text with the line ends of Windows, no
    unit of several lines would pass the filter of control characters.

    Args:
      unit: "row" (the whole text), "passage" (its paragraphs) or "sentence" (the sentences of its paragraphs).
      language: of the sentences, ISO 639; one that sentencex does not know is split by general rules.

    Raises:
      NunerError: sentencex is missing.
    """
    if unit == "row":
        return lambda text: _stripped([_with_newlines(text)])
    if unit == "passage":
        return lambda text: _stripped(paragraphs(_with_newlines(text)))
    try:
        from sentencex import segment
    except ImportError as error:
        raise NunerError(
            "config.source.unit = 'sentence' needs the package sentencex; install the extra: "
            "pip install 'nuner_jax[annotate]'"
        ) from error
    return lambda text: _stripped(
        piece for part in paragraphs(_with_newlines(text)) for piece in segment(language, part)
    )


def paragraphs(text: str) -> list[str]:
    """The parts of a text between blank lines; of a text without blank lines, its lines.

    So both kinds of text are understood: wrapped at some width, and one paragraph per line (as C4 has it).
    """
    if "\n" not in text:
        return [text]
    parts = _BLANK_LINE.split(text.strip())
    return parts if len(parts) > 1 else text.split("\n")


class UnitFilter:
    """Tells which units are left out by themselves; the limits are those of config.source."""

    def __init__(self, source: ConfigDict):
        """Raises `NunerError` for an unknown script."""
        self._min_chars, self._max_chars, self._min_words = source.min_chars, source.max_chars, source.min_words
        self._share = source.script_share
        self._letters = _LetterTable(source.script) if source.script else None
        self._ascii_passes = source.script == "Latin" or self._share == 0

    def reason(self, text: str) -> str | None:
        """One of `REASONS`, or None for a unit that is kept.

        Where a script is asked for, a unit without any letter is left out as well.
        """
        if not text.isprintable() and _CONTROL.search(text):  # the first is quick, and nearly always enough
            return "control_characters"
        if len(text) < self._min_chars:
            return "too_short"
        if len(text) > self._max_chars:
            return "too_long"
        if self._min_words and len(text.split()) < self._min_words:
            return "few_words"
        if self._letters is not None and not self._is_of_script(text):
            return "other_script"
        return None

    def _is_of_script(self, text: str) -> bool:
        if text.isascii() and _ASCII_LETTER.search(text):  # all letters are Latin: nothing to count
            return self._ascii_passes
        letters = text.translate(self._letters)
        return letters.count("s") >= self._share * max(len(letters), 1)


class _LetterTable(dict):
    """For `str.translate`: a letter of the script becomes "s", another letter "o", anything else nothing."""

    def __init__(self, script: str):
        if script not in SCRIPTS:
            raise NunerError(f"config.source.script = {script!r} is unknown; known are: {', '.join(sorted(SCRIPTS))}")
        super().__init__()
        self._prefixes = SCRIPTS[script]

    def __missing__(self, code: int) -> str:
        letter = chr(code)
        mark = ""
        if letter.isalpha():
            name = unicodedata.name(letter, "")
            for variant in _VARIANTS:
                name = name.removeprefix(variant)
            mark = "s" if re.split("[ -]", name)[0] in self._prefixes else "o"
        self[code] = mark
        return mark


def _with_newlines(text: str) -> str:
    return text.replace("\r\n", "\n").replace("\r", "\n") if "\r" in text else text


def _stripped(pieces: Iterable[str]) -> list[str]:
    return [text for piece in pieces if (text := piece.strip())]
