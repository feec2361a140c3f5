"""Long text to passages that a small model can read, and passages to queries with honest labels."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Iterator

from nestvec.corpus.retrieval_set import RetrievalSet, Texts
from nestvec.errors import DataError

SHORTEST, LONGEST = 80, 160  # words; 160 English words are about 210 tokens, MiniLM reads 256

_PARAGRAPHS = re.compile(r"\n[ \t\r]*\n")
_SENTENCES = re.compile(r"(?<=[.!?。])\s+")
_QUERY_WORDS = range(4, 41)
_BODY_WORDS = 20
_HEADING_WORDS = 12
_LEFT_OVER = 20


def passages(text: str) -> list[str]:
    """Split text into passages of about 80 to 160 words.

    Paragraphs are joined (a newline between) until there are 80 words; no sentence is split unless
    it has more than 160 words. White space is collapsed, and no word is lost. Up to 20 words left
    over at the end go to the passage before.

    >>> [len(p.split()) for p in passages("one two three. " * 100)]
    [159, 141]
    """
    found: list[str] = []
    lines: list[str] = []
    n_words = 0

    def close() -> None:
        nonlocal n_words
        if lines:
            found.append("\n".join(lines))
            lines.clear()
            n_words = 0

    for paragraph in _PARAGRAPHS.split(text):
        for number, words in enumerate(_sentences(paragraph)):
            if n_words + len(words) > LONGEST:
                close()
            if number == 0 or not lines:
                lines.append(" ".join(words))
            else:
                lines[-1] += " " + " ".join(words)
            n_words += len(words)
        if n_words >= SHORTEST:
            close()
    if found and n_words < _LEFT_OVER:
        found[-1] = "\n".join([found[-1], *lines])
    else:
        close()
    return found


def _sentences(paragraph: str) -> Iterator[list[str]]:
    """Yield the words of each sentence, endless ones in parts."""
    for sentence in _SENTENCES.split(" ".join(paragraph.split())):
        words = sentence.split()
        for start in range(0, len(words), LONGEST):
            yield words[start : start + LONGEST]


def summary_queries(texts: Texts, *, name: str = "own text") -> RetrievalSet:
    """Make queries of passages' headings or first sentences, each answered by the rest.

    A passage gives a query if its first line is a heading (at most 12 words) or else its first
    sentence has 4 to 40 words, at least 20 words follow, and no other passage begins the same. The
    query's words are taken out of the document, so that nothing can be found by its own copy. The
    other passages stay as documents. One answer a query is known; others that would do count as
    wrong, so read the figures against each other, not as absolute quality.

    Raises
    ------
    DataError
        If no passage gives a query.
    """
    split = [summary_of(text) for text in texts.texts]
    times = Counter(head.casefold() for head, _ in split)
    doc_ids, doc_texts, query_ids, query_texts, qrels = [], [], [], [], {}
    for one, text, (head, body) in zip(texts.ids, texts.texts, split, strict=True):
        asks = bool(head) and times[head.casefold()] == 1
        doc_ids.append(one)
        doc_texts.append(body if asks else text)
        if asks:
            query_ids.append(f"{one}?")
            query_texts.append(head)
            qrels[f"{one}?"] = {one: 1}
    if not query_ids:
        raise DataError(
            f"{name}: none of {len(texts)} passages begins with a heading or a sentence of 4 to 40 "
            f"words and goes on for {_BODY_WORDS}; give queries and qrels of your own."
        )
    return RetrievalSet(name, doc_ids, doc_texts, query_ids, query_texts, qrels)


def summary_of(text: str) -> tuple[str, str]:
    """Return what a passage begins with and the rest; an empty head if it gives no query."""
    first, _, rest = text.partition("\n")
    head, body = first.strip("#= \t"), rest
    if len(head.split()) > _HEADING_WORDS or not rest:
        parts = _SENTENCES.split(text, maxsplit=1)
        head, body = parts[0], parts[1] if len(parts) > 1 else ""
    head = " ".join(head.split())
    if len(head.split()) not in _QUERY_WORDS or len(body.split()) < _BODY_WORDS:
        return "", text
    return head, body
