"""What negatives and teachers bring: STAR, ADORE, pairs without labels, a cross-encoder distilled.

    python benchmarks/train_negatives.py [--seeds 0,1,2] [--only scifact] [--device cuda]

- scifact: all-MiniLM-L6-v2 on SciFact's train queries, with random (in-batch) negatives, with
  static hard ones (STAR), and then the query side alone with dynamic ones (ADORE, and
  `adore_mapped` against the documents of the supervised adaptor), beside that adaptor on frozen
  vectors. `scifact_unseen` holds the test queries none of whose relevant documents any training
  query names.
- duqgen: npl, cisi and cranfield without their queries: pairs made of their own documents.
- dse: a MiniLM cross-encoder trained on STS-B teaches vectors through unlabelled pairs.

Settings are chosen on a fifth of SciFact's train queries (duqgen's on all of them, which its
pairs know nothing of) and on STS-B's dev split. ``--train-only`` trains and ranks, which needs
neither faiss nor ir-measures, and writes nothing but the cache; ``--try`` does two steps of each.
"""

from __future__ import annotations

import argparse
import os
import sys
import time
from collections.abc import Callable
from typing import Any

import _frame
import _negatives_dse as distilled
import _negatives_duqgen as duq
import _negatives_scifact as sci
import _sets
import _training
import torch
from _negatives import NAME, TRY, WITHOUT

STORED: dict[str, Callable[[list[int]], Any]] = {
    "scifact": sci.scifact_stored,
    "duqgen": lambda seeds: [duq.duqgen_stored(name, seeds) for name in duq.SETS],
    "dse": distilled.dse_stored,
}
ROWS = {"scifact": sci.scifact, "duqgen": duq.duqgen, "dse": distilled.dse}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--seeds", default="0", help="e.g. 0,1,2")
    parser.add_argument("--only", choices=tuple(ROWS), help="one part; nothing is written")
    parser.add_argument("--device", choices=("cpu", "cuda"), help="by default cuda if there is one")
    parser.add_argument("--train-only", action="store_true", help="fill the cache, write nothing")
    parser.add_argument("--try", action="store_true", dest="tried", help="two steps of everything")
    parser.add_argument(
        "--without", default="", help="not on the test queries: adore, adore_mapped, or both"
    )
    chosen = parser.parse_args()
    WITHOUT.update(filter(None, chosen.without.split(",")))
    if chosen.device == "cpu":
        os.environ["CUDA_VISIBLE_DEVICES"] = ""
    if chosen.device == "cuda" and not torch.cuda.is_available():
        sys.exit("--device cuda: torch sees none here")
    if chosen.tried:
        TRY["try"] = True
    seeds = [int(seed) for seed in chosen.seeds.split(",")]
    if chosen.train_only:
        for part, run in STORED.items():
            if chosen.only in (None, part):
                started = time.perf_counter()
                print(part, flush=True)
                run(seeds)
                print(f"{part}: {time.perf_counter() - started:.0f} s", flush=True)
        return
    meta = _frame.meta(
        seeds=seeds,
        data=[*_sets.RETRIEVAL, "stsb", "sick", "snli_devtest", "multi30k_captions"],
        model=_sets.MODEL,
        recipe={
            "scifact": dict(steps=sci.STEPS, batch=sci.BATCH, n_negatives=sci.N_NEGATIVES),
            "adore": dict(steps=sci.ADORE_STEPS),
            "duqgen": dict(n=duq.N_SYNTHETIC, steps=duq.DUQGEN_STEPS, rules=duq.RULES),
            "dse": dict(
                teacher=distilled.TEACHER,
                steps=distilled.DSE_STEPS,
                gold_steps=distilled.GOLD_STEPS,
            ),
        },
    )
    parts = {part: (lambda run=run: run(seeds)) for part, run in ROWS.items()}
    only = chosen.only or ("scifact" if chosen.tried else None)
    _training.run_parts(NAME, parts, meta, only=only)


if __name__ == "__main__":
    main()
