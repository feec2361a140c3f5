"""Is the judge right? Upgrades whose truth is known from other, more queries, and its verdicts.

    python benchmarks/judge.py [--device cuda --vectors-only] [--try]

Each upgrade is a pair of encoders, a bridge and perhaps an accident: pairs that were shuffled, ids
that were permuted, another model's queries, questions in letters no tokenizer knows, 30 pairs. Its
truth is fixed first, on queries the judge never sees and more of them: *good* if the 95% interval
of nDCG@10 of new minus old queries on the old gallery lies above -0.01, *bad* if below it, *open*
if it holds it. Then the judge is asked twice: with judgements, and without any. It must call none
of the bad ones safe, and all of the good ones where it has judgements.

The vectors are those of ``bridge.py``.
"""

from __future__ import annotations

import argparse
import os
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import _encoders
import _frame
import numpy as np

import nestvec as nv
from nestvec.maps.guard import unit
from nestvec.measurement import RetrievalTask
from nestvec.measurement.bootstrap import resample
from nestvec.upgrade.judgement import MARGIN

Sides = dict[str, nv.Embeddings]  # docs, and queries by split
#: Not SciFact: its many queries are those that the fine-tuned model was trained on.
DATASET, JUDGED, TRUTH = "clinc150", "judge", "truth"


@dataclass(frozen=True)
class Upgrade:
    """An upgrade under test; ``accident`` changes (old side, new side, pairs) before the bridge."""

    name: str
    old: str
    new: str
    n_pairs: int = 1000
    accident: Callable[[Sides, Sides, list], tuple[Sides, Sides, list]] | None = None
    of_new: Callable[[np.ndarray], np.ndarray] | None = None  # the new model, made of the old one
    n_queries: int | None = None  # that the judge sees; None for all


# --- new models made of old ones, and accidents -------------------------------------------------


def turned(rows: np.ndarray) -> np.ndarray:
    dim = rows.shape[1]
    turn = np.linalg.qr(np.random.default_rng(7).normal(size=(dim, dim)))[0]
    return unit(rows @ turn.astype(np.float32))


def in_int8(rows: np.ndarray) -> np.ndarray:
    scale = np.abs(rows).max() / 127
    return unit((np.rint(rows / scale) * scale).astype(np.float32))


def noise_model(rows: np.ndarray) -> np.ndarray:
    return unit(np.random.default_rng(len(rows)).normal(size=rows.shape).astype(np.float32))


def shuffled_pairs(old: Sides, new: Sides, pairs: list) -> tuple[Sides, Sides, list]:
    order = np.random.default_rng(1).permutation(len(pairs[1]))
    return old, new, [pairs[0], pairs[1].replaced(pairs[1].array[order], pairs[1].space)]


def permuted(part: str | None, which: str) -> Callable[..., tuple[Sides, Sides, list]]:
    """Queries (part None), or documents, of one side stand under each other's ids."""

    def accident(old: Sides, new: Sides, pairs: list) -> tuple[Sides, Sides, list]:
        sides = {"old": dict(old), "new": dict(new)}
        for name, side in sides[which].items():
            if (name == "docs") == (part == "docs"):
                order = np.random.default_rng(2).permutation(len(side))
                sides[which][name] = side.replaced(side.array[order], side.space)
        return sides["old"], sides["new"], pairs

    return accident


def another_models_queries(old: Sides, new: Sides, pairs: list) -> tuple[Sides, Sides, list]:
    """Queries come from a third model and say that they come from the new one."""
    third = _encoders.vectors("finetuned", DATASET)
    wrong = {n: new[n].replaced(third[n].array, new[n].space) for n in (JUDGED, TRUTH)}
    return old, {**new, **wrong}, pairs


def other_letters(old: Sides, new: Sides, pairs: list) -> tuple[Sides, Sides, list]:
    """The new model is asked in letters that its tokenizer does not know."""
    coded = {n: new[n].replaced(new[f"{n} coded"].array, new[n].space) for n in (JUDGED, TRUTH)}
    return old, {**new, **coded}, pairs


UPGRADES = (
    # expected to be good
    Upgrade("turned: the same model, its space rotated", "minilm", "minilm", of_new=turned),
    Upgrade("int8: the same model, rounded", "minilm", "minilm", of_new=in_int8),
    Upgrade("from LSA to MiniLM", "lsa300", "minilm"),
    Upgrade("from 3 layers to 6", "cut3", "minilm"),
    Upgrade("from LSA to 3 layers", "lsa300", "cut3"),
    Upgrade("from another training to MiniLM", "other", "minilm"),
    Upgrade("from MiniLM to its fine-tuned self", "minilm", "finetuned"),
    Upgrade("from LSA to the fine-tuned MiniLM", "lsa300", "finetuned"),
    Upgrade("from MiniLM to its fine-tuned self with a new last layer", "minilm", "headed"),
    Upgrade("from 3 layers to the one with a new last layer", "cut3", "headed"),
    # expected to be bad
    Upgrade("wrong model: noise", "minilm", "minilm", of_new=noise_model),
    Upgrade(
        "wrong model: a third one's queries", "cut3", "minilm", accident=another_models_queries
    ),
    Upgrade("shuffled pairs", "cut3", "minilm", accident=shuffled_pairs),
    Upgrade("other letters", "cut3", "minilm", accident=other_letters),
    Upgrade("permuted query ids", "cut3", "minilm", accident=permuted(None, "new")),
    Upgrade("permuted ids in the old gallery", "cut3", "minilm", accident=permuted("docs", "old")),
    Upgrade("too few pairs: 30", "minilm", "cut3", n_pairs=30),
    Upgrade("from MiniLM to LSA", "minilm", "lsa300"),
    Upgrade("too few queries: 40, from MiniLM to 3 layers", "minilm", "cut3", n_queries=40),
)


def prepared(up: Upgrade) -> tuple[Sides, Sides, Any]:
    """Return both sides and the bridge, accident included."""
    old = _encoders.vectors(up.old, DATASET)
    if up.of_new is None:
        new = _encoders.vectors(up.new, DATASET)
        pairs = list(_encoders.pairs(up.old, up.new, DATASET, up.n_pairs))
    else:
        dims = old["docs"].space.nesting_dims
        space = nv.Space.declared("new", dim=dims[-1], nesting_dims=dims)
        new = {part: side.replaced(up.of_new(side.array), space) for part, side in old.items()}
        sample = _encoders.pairs(up.old, up.old, DATASET, up.n_pairs)[0]
        pairs = [sample, sample.replaced(up.of_new(sample.array), space)]
    if up.accident is not None:
        old, new, pairs = up.accident(old, new, pairs)
    bridge = nv.upgrade.fit(old=pairs[0], new=pairs[1], sample_size=None)
    return old, new, bridge


def true_difference(
    up: Upgrade, old: Sides, new: Sides, bridge: Any
) -> tuple[float, float, float, int]:
    """Return nDCG@10 of new minus old queries on the old gallery: value, low, high, queries."""
    qrels = _encoders.texts(DATASET).qrels[TRUTH]
    found = []
    for asks in (old[TRUTH], bridge.transform(new[TRUTH])):
        task = RetrievalTask(old["docs"], asks, qrels, metrics=("nDCG@10",))
        found.append(task.score(task.asking.array, old["docs"].array)["nDCG@10"])
    estimate = resample(np.stack(found), seed=1)
    value, low, high = (float(side[1]) for side in estimate.difference(to=0))
    return value, low, high, len(found[0])


def rows_of(up: Upgrade) -> list[dict[str, Any]]:
    old, new, bridge = prepared(up)
    value, low, high, n_truth = true_difference(up, old, new, bridge)
    truth = "good" if low > -MARGIN else "bad" if high < -MARGIN else "open"
    if "permuted ids in the old gallery" in up.name:
        truth = "bad"  # both sides find nothing: equal, and neither is any use
    common = {"dataset": DATASET, "pair": f"{up.old} -> {up.new}", "seed": _encoders.SEED}
    rows: list[dict[str, Any]] = [
        {
            **common,
            "method": up.name,
            "metric": "truth: nDCG@10 new/old - old/old",
            "value": value,
            "low": low,
            "high": high,
            "n": n_truth,
            "truth": truth,
            "note": bridge.guard_.sentence(),
        }
    ]
    n = up.n_queries
    for how, qrels in (
        ("judgements", _encoders.texts(DATASET).qrels[JUDGED]),
        ("no labels", None),
    ):
        asked = old[JUDGED][:n].ids.tolist() if n else old[JUDGED].ids.tolist()
        some = None if qrels is None else {q: qrels[q] for q in asked if q in qrels}
        found = nv.upgrade.judge(
            old_docs=old["docs"], old_queries=old[JUDGED][:n], new_docs=new["docs"],
            new_queries=new[JUDGED][:n], bridge=bridge, qrels=some,
        )  # fmt: skip
        size = found.sizes[0]
        rows.append(
            {
                **common,
                "method": up.name,
                "metric": f"judged by {how}: {found.metric} new/old - old/old",
                "value": size.difference.value,
                "low": size.at_least,
                "n": found.n_queries,
                "verdict": found.verdict,
                "safe": found.safe,
                "truth": truth,
                "note": found.sentence(),
            }
        )
    verdicts = f"judged {rows[1]['verdict']}, without labels {rows[2]['verdict']}"
    print(f"{up.name}: {truth} ({value:+.4f} [{low:+.4f}, {high:+.4f}]); {verdicts}", flush=True)
    return rows


def counted(rows: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """How many of the good and of the bad upgrades were called safe."""
    found = []
    for how in ("judgements", "no labels"):
        for truth in ("good", "bad", "open"):
            some = [r for r in rows if f"judged by {how}" in r["metric"] and r["truth"] == truth]
            found.append(
                {
                    "method": f"all, {how}",
                    "metric": "called safe",
                    "truth": truth,
                    "value": sum(r["safe"] for r in some),
                    "n": len(some),
                }
            )
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--device", choices=("cpu", "cuda"), help="by default cuda if there is one")
    parser.add_argument("--vectors-only", "--train-only", action="store_true", dest="fill")
    parser.add_argument("--try", action="store_true", dest="attempt", help="LSA alone: no GPU")
    parser.add_argument(
        "--encoders", default=",".join(_encoders.ENCODERS), help="whose upgrades are judged"
    )
    arguments = parser.parse_args()
    if arguments.device == "cpu":
        os.environ["CUDA_VISIBLE_DEVICES"] = ""
    if arguments.fill:
        _encoders.fill()
        return
    if arguments.attempt:
        for up in UPGRADES:
            if up.of_new is not None or up.accident in (shuffled_pairs, other_letters):
                rows_of(Upgrade(up.name, "lsa300", "lsa300", n_pairs=400, accident=up.accident,
                                of_new=up.of_new))  # fmt: skip
        return
    meta = _frame.meta(
        seeds=[_encoders.SEED],
        data=_encoders.SETS,
        question="Does the judge call no bad upgrade safe, and every good one?",
        encoders=_encoders.WHAT,
        trained_on=_encoders.MADE_ON,
        margin=MARGIN,
    )
    known = {*arguments.encoders.split(",")}
    judged = [up for up in UPGRADES if {up.old, up.new} <= known]
    rows = [row for up in judged for row in rows_of(up)]
    _frame.write("judge", rows + counted(rows), meta)


if __name__ == "__main__":
    main()
