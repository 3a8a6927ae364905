"""Concept names: the capitals of titles go, acronyms stay; plurals become the singular that is in use."""

from __future__ import annotations

import pytest
from hypothesis import example, given
from hypothesis import strategies as st

from nuner_jax.data.align import concept_name
from nuner_jax.data.concepts import normalise_case, plural_forms


@pytest.mark.parametrize(
    ("name", "expected"),
    [
        ("Person", "person"),
        ("Programming Language", "programming language"),
        ("  Medical \n Condition ", "medical condition"),
        ("DNA sequence", "DNA sequence"),
        ("DNA Sequence", "DNA sequence"),
        ("COVID-19 Vaccine", "COVID-19 vaccine"),
        ("Non-Profit Organization", "non-profit organization"),
        ("City/Town", "city/town"),
        ("Person (Fictional)", "person (fictional)"),
        ("mRNA", "mRNA"),
        ("iPhone Model", "iPhone model"),
        ("Vitamin A", "vitamin A"),
        ("U.S. State", "U.S. state"),
        ("Élève", "élève"),
        ("World War II", "world war II"),
        ("idea", "idea"),
    ],
)
def test_capitals_that_only_a_title_gave_go(name, expected):
    assert normalise_case(name) == expected


@given(st.text(max_size=30) | st.text("aAbBéÉ-/ (ßǅǆIİΣς1", max_size=12))
@example("ΑΣ Ας-Σ")
def test_normalising_twice_changes_nothing_more_and_only_case_changes(name):
    once = normalise_case(name)
    assert normalise_case(once) == once
    assert once.lower() == concept_name(name).lower() or not name.isascii()


def test_plurals_are_mapped_to_singulars_that_occur():
    vocabulary = ["city", "cities", "programming language", "programming languages", "people", "person", "vehicles"]
    assert plural_forms(vocabulary) == {
        "cities": "city",
        "programming languages": "programming language",
        "people": "person",
    }


@pytest.mark.parametrize(
    ("plural", "singular"),
    [
        ("bus", "bu"),
        ("physics", "physic"),
        ("lens", "len"),
        ("glass", "glas"),
        ("crisis", "crisi"),
        ("news", "new"),
        ("goods", "good"),
        ("CDs", "CD"),
        ("gas", "ga"),
        ("Simpsons", "Simpson"),
        ("type of cities", "type of town"),
    ],
)
def test_what_only_looks_like_a_plural_stays(plural, singular):
    assert plural_forms([plural, singular]) == {}


@given(st.lists(st.text("aeisy ", max_size=6) | st.sampled_from(["axes", "axis", "axe", "biases", "bias"])))
@example(["biases", "bias", "bia"])
def test_no_name_is_mapped_to_one_that_is_mapped_itself(vocabulary):
    forms = plural_forms(vocabulary)
    assert set(forms.values()) <= set(vocabulary) - forms.keys()
