"""nestvec demo: the whole story on real text that every machine has, or on the user's own."""

from __future__ import annotations

import sys
import time
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import numpy as np
import typer
from rich.markup import escape

from nestvec.cli._common import Column, Json, command, fail, note, out, print_json, prompted
from nestvec.cli.embed import embed_set
from nestvec.search import Cascade, SearchResult, Stage, cascade_search
from nestvec.space import Embeddings

if TYPE_CHECKING:
    from nestvec.corpus import Qrels, RetrievalSet
    from nestvec.encoders import Encoder
    from nestvec.maps import MatryoshkaAdaptor

EPILOG = """
Examples:

  nestvec demo                       (the docstrings of this machine's Python)

  nestvec demo ~/notes               (your own folder or file of text)

  nestvec demo --query "parse a date" --json
"""

K = 10
KEEPS = (50, 100, 200, 400)  # shortlists tried for the cascade
FEWEST_QUERIES = 30
RECALL = 0.99  # share of the exact full-size answers that the cascade has to find


@dataclass
class Found:
    """The cascade that was chosen, and what it gained and lost on queries not used to choose it."""

    plan: str
    recall: float
    ndcg: float
    ndcg_full: float
    share_of_macs: float
    n_queries: int

    def sentence(self) -> str:
        return (
            f"{self.plan} finds {self.recall:.1%} of the exact full-size answers with "
            f"{self.share_of_macs:.0%} of the multiply-adds; nDCG@10 {self.ndcg:.3f} against "
            f"{self.ndcg_full:.3f}, on {self.n_queries:,} queries that did not choose the plan"
        )


@command
def demo(
    path: Annotated[
        Path | None,
        typer.Argument(
            help="Your own text: a file or a folder. By default the docstrings of the standard "
            "library and of installed packages.",
            show_default=False,
        ),
    ] = None,
    output: Annotated[
        Path, typer.Option("-o", "--output", help="Folder for everything that is made.")
    ] = Path("demo-out"),
    column: Column = None,
    passages: Annotated[int, typer.Option(min=50, help="At most so many passages.")] = 4000,
    model: Annotated[str, typer.Option(help="Encoder.")] = "all-MiniLM-L6-v2",
    query: Annotated[
        list[str] | None,
        typer.Option(
            help="Search for these words at the end; repeat for more.", show_default=False
        ),
    ] = None,
    seed: Annotated[int, typer.Option(help="Seed of every random choice.")] = 0,
    json: Json = False,
) -> None:
    """Embed real text, make it nested, measure every size, search cheap-then-exact, report."""
    from nestvec.encoders import encoder_of
    from nestvec.maps import MatryoshkaAdaptor
    from nestvec.measurement import measure

    started = time.monotonic()
    texts = _read(path, column, passages, seed)
    if len(texts.query_ids) < FEWEST_QUERIES:
        fail(
            f"{path}: only {len(texts.query_ids)} of its passages begin with a line that can serve "
            f"as a query, which is too few to measure on (at least {FEWEST_QUERIES}). Give more "
            f"text, or your own queries and labels to nestvec measure."
        )
    _step(
        "text",
        f"{len(texts.doc_ids):,} passages of {texts.name}, {len(texts.query_ids):,} summary lines "
        f"as queries for their bodies",
    )
    encoder = encoder_of(model)
    _step("model", encoder.source)
    docs, asks = embed_set(encoder, texts, output)
    adaptor = MatryoshkaAdaptor(random_state=seed, verbose=True).fit(docs)
    adaptor.save(output / "map")
    guard = adaptor.guard_.sentence()
    _step("fit", guard)
    nested, nested_asks = adaptor.transform(docs), adaptor.transform(asks)
    nested.save(output / "nested.safetensors")
    curve = measure(
        docs,
        asks,
        texts.qrels,
        maps={"adaptor_unsupervised": adaptor},
        texts=(texts.doc_texts, texts.query_texts),
        dataset=texts.name,
        seed=seed,
        show_progress=True,
    )
    curve.to_json(output / "curve.json")
    if not json:
        out.print(curve.table())
    _step("choose", curve.verdict())
    found = _cascade(nested, nested_asks, texts.qrels, seed)
    _step("search", found.sentence())
    bodies = dict(zip(texts.doc_ids, texts.doc_texts, strict=True))
    searched = Searcher(encoder, adaptor, nested, bodies, found.plan)
    answers = searched(query or _examples(texts))
    report = output / "report.html"
    curve.report(report, sections=_sections(texts, encoder.source, guard, found, answers))
    seconds = time.monotonic() - started
    if json:
        print_json(
            {
                "dataset": texts.name,
                "n_passages": len(docs),
                "n_queries": len(asks),
                "verdict": curve.verdict(),
                "guard": adaptor.guard_.to_dict(),
                "cascade": vars(found),
                "answers": answers,
                "report": str(report),
                "seconds": round(seconds, 1),
            }
        )
        return
    _print_answers(answers)
    _step("report", f"{report}, {seconds:.0f} s in all")
    if query is None and sys.stdin.isatty() and sys.stdout.isatty():
        for words in prompted("search (an empty line ends)"):
            _print_answers(searched([words]))


def _step(name: str, text: str) -> None:
    note(f"{name:>8}  {text}")


def _read(path: Path | None, column: str | None, passages: int, seed: int) -> RetrievalSet:
    from nestvec.corpus import Texts, docstrings, read_texts, summary_queries

    if path is None:
        return docstrings(limit=passages, seed=seed)
    texts = read_texts(path, column=column)
    if len(texts) > passages:
        keep = np.sort(np.random.default_rng(seed).choice(len(texts), passages, replace=False))
        note(f"{path} has {len(texts):,} passages; {passages:,} of them are drawn (--passages)")
        texts = Texts([texts.ids[i] for i in keep], [texts.texts[i] for i in keep])
    return summary_queries(texts, name=path.resolve().name)


def _cascade(docs: Embeddings, asks: Embeddings, qrels: Qrels, seed: int) -> Found:
    """Choose the cheapest cascade on one half of the queries, and judge it on the other."""
    order = np.random.default_rng(seed).permutation(len(asks))
    half = max(1, len(order) // 2)
    choosing, judging = asks[np.sort(order[:half])], asks[np.sort(order[half:])]
    full = Cascade([Stage(docs.dim, K)])
    candidates = [
        Cascade.adaptive(shortlist_dim=dim, rerank_dim=docs.dim, shortlist=keep, k=K)
        for dim in docs.space.nesting_dims
        for keep in KEEPS
        if dim < docs.dim and keep < len(docs)
    ]
    candidates.sort(key=lambda cascade: cascade.macs(len(docs)))
    exact = cascade_search(choosing, docs, full)
    chosen = full
    for cascade in candidates:
        if cascade.macs(len(docs)) >= full.macs(len(docs)):
            break
        if _recall(cascade_search(choosing, docs, cascade), exact) >= RECALL:
            chosen = cascade
            break
    want, got = (cascade_search(judging, docs, plan) for plan in (full, chosen))
    return Found(
        plan=str(chosen),
        recall=_recall(got, want),
        ndcg=_ndcg(got, judging, qrels),
        ndcg_full=_ndcg(want, judging, qrels),
        share_of_macs=chosen.macs(len(docs)) / full.macs(len(docs)),
        n_queries=len(judging),
    )


def _recall(got: SearchResult, want: SearchResult) -> float:
    """Share of the exact answers that were found."""
    return float(np.mean([np.isin(w, g).mean() for g, w in zip(got.rows, want.rows, strict=True)]))


def _ndcg(found: SearchResult, asks: Embeddings, qrels: Qrels) -> float:
    from nestvec.measurement.metrics import per_query

    values = per_query(found.ids.tolist(), asks.ids.tolist(), qrels, ["nDCG@10"])
    return float(values["nDCG@10"].mean())


@dataclass
class Searcher:
    """Words in, the three best passages out, by the chosen cascade."""

    encoder: Encoder
    adaptor: MatryoshkaAdaptor
    docs: Embeddings
    texts: dict[str, str]
    plan: str

    def __call__(self, words: list[str]) -> list[dict[str, Any]]:
        asks = self.adaptor.transform(self.encoder.encode(words, role="query", show_progress=False))
        found = cascade_search(asks, self.docs, self.plan)
        return [
            {
                "query": query,
                "hits": [
                    {"id": hit["id"], "score": hit["score"], "text": self.texts[hit["id"]]}
                    for hit in found.explain(row)[:3]
                ],
            }
            for row, query in enumerate(words)
        ]


def _examples(texts: RetrievalSet) -> list[str]:
    """Three of the queries, far apart."""
    n = len(texts.query_texts)
    return [texts.query_texts[i] for i in sorted({n // 6, n // 2, 5 * n // 6})]


def _print_answers(answers: list[dict[str, Any]]) -> None:
    for answer in answers:
        out.print(f"\n[bold]{escape(answer['query'])}[/]")
        for hit in answer["hits"]:
            text = " ".join(hit["text"].split())
            out.print(f"  {hit['score']:.3f}  {hit['id']}  {text[:110]}", markup=False)


def _sections(
    texts: RetrievalSet, source: str, guard: str, found: Found, answers: list[dict[str, Any]]
) -> list[tuple[str, str]]:
    about = (
        f"{len(texts.doc_ids):,} passages of {texts.name}; {len(texts.query_ids):,} summary lines "
        f"are queries for their bodies, from which they were taken out. Another passage that would "
        f"do counts as wrong, so read the figures against each other.\nModel: {source}."
    )
    hits = [
        f"{answer['query']}\n"
        + "\n".join(
            f"    {h['score']:.3f}  {h['id']}  {' '.join(h['text'].split())[:140]}"
            for h in answer["hits"]
        )
        for answer in answers
    ]
    return [
        ("The text", about),
        ("What the guard kept", guard),
        ("Cheap first, then exact", found.sentence()),
        ("A few searches", "\n\n".join(hits)),
    ]
