"""Queries that a text makes of itself: its title, its first sentence or its first words."""

from __future__ import annotations

from collections.abc import Callable

from nestvec.corpus.passages import summary_of
from nestvec.errors import DataError

#: A text and its title ("" if it has none) -> what asks for it and what is left, or None.
Rule = Callable[[str, str], tuple[str, str] | None]

RULES = ("title", "summary", "lead")
_FEWEST_WORDS = 3  # of a query
_LEAD_WORDS = 10
_REST_WORDS = 10  # that a document is left with at least


def query_rule(name: str) -> Rule:
    """Return a rule by its name.

    ``"title"``: the title asks for the text. ``"summary"``: the heading or first sentence, 4 to 40
    words, asks for the rest (as in `summary_queries`). ``"lead"``: the first 10 words ask for the
    rest, for texts without titles or sentences. What asks is taken out of the document, so that
    nothing can be found by its own copy; 10 words or more are left (20 for ``"summary"``).
    """
    rules: dict[str, Rule] = {"title": _by_title, "summary": _by_summary, "lead": _by_lead}
    if name not in rules:
        raise DataError(f"queries {name!r} is not one of {', '.join(RULES)}, nor a function.")
    return rules[name]


def _by_title(text: str, title: str) -> tuple[str, str] | None:
    title, rest = " ".join(title.split()), " ".join(text.split())
    while title and rest.startswith(title):  # some collections repeat it
        rest = rest[len(title) :].strip()
    return _if_long_enough(title, rest)


def _by_summary(text: str, title: str) -> tuple[str, str] | None:
    head, body = summary_of(text)
    return (head, body) if head else None


def _by_lead(text: str, title: str) -> tuple[str, str] | None:
    words = text.split()
    return _if_long_enough(" ".join(words[:_LEAD_WORDS]), " ".join(words[_LEAD_WORDS:]))


def _if_long_enough(query: str, rest: str) -> tuple[str, str] | None:
    if len(query.split()) < _FEWEST_WORDS or len(rest.split()) < _REST_WORDS:
        return None
    return query, rest
