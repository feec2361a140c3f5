"""Train a query encoder against frozen documents: the index stays as it is (ADORE)."""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from nestvec.corpus.retrieval_set import Texts
from nestvec.encoders import TextEncoder
from nestvec.encoders._quiet import quiet
from nestvec.encoders.fingerprint import fingerprint
from nestvec.encoders.shared_space import join_queries
from nestvec.errors import DataError, SpaceError
from nestvec.space import Embeddings
from nestvec.train.card import declare_dims, write_card
from nestvec.train.dynamic import DynamicNegatives
from nestvec.train.keeping import KeepNeighbours
from nestvec.train.objectives import cut
from nestvec.train.result import Trained
from nestvec.train.run import Run
from nestvec.train.sentence_transformer import SentenceTransformerLoss
from nestvec.train.settings import Settings
from nestvec.train.sizes import sizes_of
from nestvec.train.text import (
    HEAD_RATE,
    HOLDOUT_MOST,
    HOLDOUT_SHARE,
    TextTrainer,
    _freeze,
    _freeze_unused,
    loaded_text_model,
)
from nestvec.train.trainer import carry_out

from datasets import Dataset  # isort: skip  # a missing one is said by nestvec.train.text
from sentence_transformers import SentenceTransformerTrainingArguments  # isort: skip

Qrels = Mapping[str, Mapping[str, int]]
_DEPTH = 10  # of the validation


def train_queries(
    model: Any,
    documents: Any,
    queries: Texts,
    qrels: Qrels,
    output: str | os.PathLike[str],
    *,
    dims: Iterable[int] | str | None = None,
    k: int = 200,
    scale: float | int = 20.0,
    holdout: float | int | None = None,
    keep: float | int = 0.0,
    weights: Any = "uniform",
    freeze_layers: int = 0,
    settings: Settings | None = None,
    fresh: bool = False,
) -> Trained:
    """Train the query side alone; the documents' vectors, and every index of them, stay valid.

    At each step the batch's queries are searched, exactly and at every size, among the frozen
    vectors, and what is found and not relevant are their negatives (`DynamicNegatives`).

    Parameters
    ----------
    model
        As in `train_text`: the model that encoded the documents, or a query encoder that this made
        for them before. A model that is handed over is trained in place.
    documents
        `Embeddings` with ids, or a `nestvec.Index`. They are read, never written.
    queries, qrels
        Texts that ask, with ids, and ``{query id: {document id: grade}}``. Queries without a
        relevant document are left out.
    output
        A folder, new or left by the same training, which then goes on from its last checkpoint.
    dims, keep, weights, freeze_layers, settings, fresh
        As in `train_text`.
    k, scale
        Of `DynamicNegatives`.
    holdout
        Share of the queries that are held out and scored as training goes: how often one of the 10
        closest documents is relevant, at every size. By default 5%, at most 1,000; 0 trains on all.

    Returns
    -------
    Trained
        The folder holds a sentence-transformers model that encodes queries into the Space of the
        documents: ``nestvec.encode(texts, model=folder, role="query")`` has their Space, and
        documents are refused.

    Raises
    ------
    SpaceMismatchError
        If the model does not encode into the Space of the documents.
    TrainingError, DataError, DimensionError, ModelError, StorageError
        As `train_text` raises them; `DataError` also for qrels that name unknown ids.
    """
    settings = settings or Settings()
    settings.check()
    if not isinstance(documents, Embeddings):
        documents = documents.embeddings()
    space = documents.space
    encoder = TextEncoder(model)
    space.check_same(encoder.space)
    if space.metric == "dot" and not space.has_unit_rows:
        raise SpaceError(
            f"{space.label} is compared by dot product of unnormalised vectors, and prefixes are "
            f"compared by cosine here. Call normalised() on the documents first."
        )
    base = encoder.space.model or encoder.source
    model, _, prompts = loaded_text_model(encoder.model)
    sizes = sizes_of(model.get_embedding_dimension(), dims, lowest=16, weights=weights)
    texts, relevant = _judged(queries, qrels, documents)
    train, held = _split(len(texts), holdout, settings.seed)
    objective = DynamicNegatives(
        torch.from_numpy(np.array(documents.array)),
        relevant,
        sizes,
        k=k,
        scale=scale,
        weights=weights,
    )
    trainable = {parameter: parameter.requires_grad for parameter in model.parameters()}
    _freeze(model, freeze_layers)
    try:
        run = Run(
            Path(output),
            {
                "model": fingerprint(model),
                "documents": _hash(documents),
                "queries": _hash_of(texts, relevant),
                "held_out": held.tolist(),
                "dims": sizes,
                "k": k,
                "scale": float(scale),
                "keep": float(keep),
                "weights": weights,
                "freeze_layers": freeze_layers,
                "settings": settings.to_dict(),
            },
            fresh=fresh,
        )
        if run.finished:
            return Trained.of(run, sizes)
        _freeze_unused(model, texts[0])
        kept = KeepNeighbours(sizes, weights=weights) if keep else None
        prompt = prompts["query"]
        trainer = TextTrainer(
            model=model,
            args=settings.arguments(
                run.checkpoints,
                n_rows=len(train),
                kind=SentenceTransformerTrainingArguments,
                learning_rate_mapping={r"^keep\.": settings.head_rate(HEAD_RATE)} if keep else {},
                prompts={"anchor": prompt} if prompt else {},
            ),
            train_dataset=Dataset.from_dict(
                {"anchor": [texts[row] for row in train], "label": train.tolist()}
            ),
            loss=SentenceTransformerLoss(
                model, objective, chunk_size=settings.chunk_size, keep=kept, keep_weight=keep
            ),
        )
        trainer.beside = () if kept is None else (kept,)

        def validate() -> dict[str, float]:
            rows = model.encode(
                [texts[row] for row in held],
                prompt=prompt or None,
                convert_to_tensor=True,
                show_progress_bar=False,
                truncate_dim=None,
            )
            return _hits(rows.float(), objective, [relevant[row] for row in held])

        validates = validate if len(held) else None
        trainer.be_careful(run, settings=settings, validate=validates)

        def save(metrics: dict[str, float]) -> None:
            folder = run.folder
            with quiet():
                model.save_pretrained(str(folder), create_model_card=False)
            declare_dims(folder, sizes)
            join_queries(folder, fingerprint(model), space.fingerprint)
            write_card(
                folder,
                library="sentence-transformers",
                base=base,
                dims=sizes,
                metrics=metrics,
                measured_on="queries that were held out",
                trained_on=f"{len(train):,} queries, against {len(documents):,} frozen documents",
                settings=settings.to_dict(),
                usage=f"""```python
import nestvec as nv

asks = nv.encode(texts, model="{folder.resolve().name}", role="query")
hits = nv.Index.open("documents.nest").search(asks)   # of {space.model or "the first model"}
```

Queries only: documents are encoded by the model they always were.""",
            )

        return carry_out(trainer, run, sizes, save)
    finally:
        for parameter, was in trainable.items():
            parameter.requires_grad_(was)
        model.eval()


def _judged(
    queries: Texts, qrels: Qrels, documents: Embeddings
) -> tuple[list[str], list[dict[int, float]]]:
    """Return the queries that have a relevant document, and the rows and grades of those."""
    unknown = [query for query in qrels if query not in set(queries.ids)]
    if unknown:
        raise DataError(f"the qrels name {len(unknown)} unknown query ids, e.g. {unknown[0]!r}.")
    texts, relevant = [], []
    for query, text in zip(queries.ids, queries.texts, strict=True):
        graded = {doc: grade for doc, grade in qrels.get(query, {}).items() if grade > 0}
        if not graded:
            continue
        ids: Any = list(graded)
        if documents.ids.dtype.kind == "i" and all(one.lstrip("-").isdigit() for one in ids):
            ids = [int(one) for one in ids]
        rows = documents.rows_of(ids).tolist()
        texts.append(text)
        relevant.append(dict(zip(rows, map(float, graded.values()), strict=True)))
    if len(texts) < 2:
        raise DataError(f"{len(texts)} queries with a relevant document; at least 2 are needed.")
    return texts, relevant


def _split(n: int, holdout: float | int | None, seed: int) -> tuple[np.ndarray, np.ndarray]:
    if holdout is not None and not 0 <= holdout < 1:
        raise DataError(f"holdout {holdout!r} is not a share: 0 to below 1.")
    size = min(int(HOLDOUT_SHARE * n), HOLDOUT_MOST) if holdout is None else int(holdout * n)
    if n - size < 2:
        raise DataError(f"holdout {holdout!r} of {n} queries leaves {n - size} to train on.")
    order = np.random.default_rng(seed).permutation(n)
    return np.sort(order[size:]), np.sort(order[:size])


def _hits(
    rows: Tensor, objective: DynamicNegatives, relevant: list[dict[int, float]]
) -> dict[str, float]:
    found = {}
    for dim in objective.dims:
        documents = objective.get_buffer(f"documents_{dim}")
        scores = cut(rows, dim, normalise=True) @ documents.T
        nearest = scores.topk(min(_DEPTH, len(documents)), dim=1).indices.tolist()
        right = [bool(own.keys() & set(near)) for own, near in zip(relevant, nearest, strict=True)]
        found[f"hit{_DEPTH}@{dim}"] = sum(right) / len(right)
    return found


def _hash(documents: Embeddings) -> str:
    digest = hashlib.sha256(documents.space.space_id.encode())
    digest.update(np.ascontiguousarray(documents.array).data)
    return digest.hexdigest()[:16]


def _hash_of(texts: list[str], relevant: list[dict[int, float]]) -> str:
    text = json.dumps([texts, [sorted(found.items()) for found in relevant]])
    return hashlib.sha256(text.encode()).hexdigest()[:16]
