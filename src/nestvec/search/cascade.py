"""Stage, Cascade, Plan: what a search does, as text that a person reads and a program parses."""

from __future__ import annotations

import contextlib
import itertools
import math
import operator
import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from types import MappingProxyType

from nestvec.errors import PlanError

_BITS = {"float32": 32, "float16": 16, "int10": 10, "int8": 8, "binary": 1}  # finest first
_STAGE = re.compile(r"(?P<dim>\d+)(?::(?P<precision>[a-z0-9]+))?@(?P<keep>\d+)")
_STRUCTURE = re.compile(r"(?P<name>[a-z][a-z0-9_]*)(?:\((?P<knobs>[^()]*)\))?")


@dataclass(frozen=True)
class Stage:
    """One pass: score the rows still in play by their first ``dim`` numbers, keep the best.

    Parameters
    ----------
    dim
        Prefix size; the prefix is L2-normalised after the cut.
    keep
        Number of rows that go on; the last stage's is the number returned.
    precision
        Number format of the gallery's vectors in this stage.

    Examples
    --------
    >>> Stage(64, 400, "int8")
    Stage.parse('64:int8@400')
    """

    dim: int
    keep: int
    precision: str = "float32"

    def __post_init__(self) -> None:
        for name, value in (("dim", self.dim), ("keep", self.keep)):
            try:
                whole = operator.index(value)
            except TypeError:
                whole = 0
            if whole < 1:
                raise PlanError(f"stage {self!s}: {name} is a whole number >= 1, not {value!r}.")
            object.__setattr__(self, name, whole)
        if self.precision not in _BITS:
            raise PlanError(
                f"stage {self!s}: precision {self.precision!r} is not one of {', '.join(_BITS)}."
            )

    def __str__(self) -> str:
        precision = "" if self.precision == "float32" else f":{self.precision}"
        return f"{self.dim}{precision}@{self.keep}"

    def __repr__(self) -> str:
        return f"Stage.parse({str(self)!r})"

    @classmethod
    def parse(cls, text: str) -> Stage:
        """Read ``dim[:precision]@keep``."""
        match = _STAGE.fullmatch(text.strip())
        if match is None:
            raise PlanError(
                f"stage {text.strip()!r} cannot be read. Write dim@keep or dim:precision@keep, "
                f"like 384@10 or 64:int8@400."
            )
        precision = match["precision"] or "float32"
        return cls(int(match["dim"]), int(match["keep"]), precision)

    @property
    def bytes_per_vector(self) -> int:
        """Bytes one gallery row takes in this stage; bits are packed."""
        return -(-self.dim * _BITS[self.precision] // 8)


@dataclass(frozen=True)
class Cascade:
    """The stages of a search: dims rise (or stay, at a finer precision), shortlists shrink or stay.

    >>> Cascade.parse("64:int8@400 > 384@10").stages[0].keep
    400
    >>> str(Cascade([Stage(64, 100), Stage(384, 10)]))
    '64@100 > 384@10'
    """

    stages: tuple[Stage, ...]

    def __init__(self, stages: Iterable[Stage]) -> None:
        object.__setattr__(self, "stages", tuple(stages))
        if not self.stages:
            raise PlanError("a cascade needs at least one stage, like 384@10.")
        for before, after in itertools.pairwise(self.stages):
            if (after.dim, _BITS[after.precision]) <= (before.dim, _BITS[before.precision]):
                raise PlanError(
                    f"cascade {self!s}: stage {after!s} sees no more than {before!s} before it. "
                    f"Dims rise from stage to stage, or stay at a finer precision."
                )
            if after.keep > before.keep:
                raise PlanError(
                    f"cascade {self!s}: stage {after!s} keeps more rows than {before!s} before it. "
                    f"Shortlists shrink from stage to stage."
                )

    def __str__(self) -> str:
        return " > ".join(map(str, self.stages))

    def __repr__(self) -> str:
        return f"Cascade.parse({str(self)!r})"

    @classmethod
    def parse(cls, text: str) -> Cascade:
        """Read stages joined by ``>``."""
        return cls(Stage.parse(part) for part in text.split(">"))

    @classmethod
    def adaptive(cls, *, shortlist_dim: int, rerank_dim: int, shortlist: int, k: int) -> Cascade:
        """Shortlist at one size, rerank at another (adaptive retrieval, arXiv 2205.13147).

        >>> str(Cascade.adaptive(shortlist_dim=16, rerank_dim=384, shortlist=200, k=10))
        '16@200 > 384@10'
        """
        return cls([Stage(shortlist_dim, shortlist), Stage(rerank_dim, k)])

    @classmethod
    def funnel(cls, dims: Iterable[int], *, shortlist: int, k: int) -> Cascade:
        """Halve the shortlist while the sizes rise (funnel retrieval, arXiv 2205.13147).

        The first search keeps ``shortlist`` rows, every rerank halves what is kept, the last size
        keeps ``k``; once the shortlist would fall to ``k`` the last size follows. The paper doubles
        the sizes: 16 -> 32 -> ... -> 2048 with 200 -> 100 -> 50 -> 25 -> 10.

        >>> str(Cascade.funnel((16, 32, 64, 128, 256, 384), shortlist=200, k=10))
        '16@200 > 32@100 > 64@50 > 128@25 > 256@12 > 384@10'
        """
        *rising, last = dims
        if shortlist < k:
            raise PlanError(f"a funnel that starts with {shortlist} rows cannot end with {k}.")
        stages = []
        keep = shortlist
        for dim in rising:
            if keep <= k:
                break
            stages.append(Stage(dim, keep))
            keep //= 2
        return cls([*stages, Stage(last, k)])

    def macs(self, n_gallery: int) -> int:
        """Multiply-adds of one query over ``n_gallery`` rows, at any precision alike.

        ``n_gallery * dim_1 + sum(keep_{i-1} * dim_i)``; normalising the query is left out.
        """
        return sum(
            rows * stage.dim for rows, stage in zip(self._rows(n_gallery), self.stages, strict=True)
        )

    def bytes_read(self, n_gallery: int) -> int:
        """Bytes of gallery vectors that one query reads: where precision shows."""
        return sum(
            rows * stage.bytes_per_vector
            for rows, stage in zip(self._rows(n_gallery), self.stages, strict=True)
        )

    def _rows(self, n_gallery: int) -> list[int]:
        return [n_gallery, *(min(s.keep, n_gallery) for s in self.stages[:-1])]


@dataclass(frozen=True)
class Plan:
    """A structure with its knobs, and the cascade it feeds: ``exact 64@100 > 384@10``.

    The structure makes the first stage's shortlist; ``exact`` scans every row and is what all
    others are measured against.

    >>> plan = Plan.parse("graph(ef=80) 384:int8@40 > 384@10")
    >>> plan.structure, dict(plan.knobs), plan.cascade.stages[-1].keep
    ('graph', {'ef': 80}, 10)
    >>> str(Plan.parse("384@10"))
    'exact 384@10'
    """

    cascade: Cascade
    structure: str = "exact"
    knobs: Mapping[str, int | float] = field(default_factory=dict)

    def __post_init__(self) -> None:
        object.__setattr__(self, "knobs", MappingProxyType(dict(self.knobs)))
        # Every search looks its plan up, and to hash one takes as long as some searches do.
        key = self.structure, self.cascade, frozenset(self.knobs.items())
        object.__setattr__(self, "_hash", hash(key))

    def __str__(self) -> str:
        knobs = ", ".join(f"{name}={value}" for name, value in self.knobs.items())
        return f"{self.structure}{f'({knobs})' if knobs else ''} {self.cascade}"

    def __repr__(self) -> str:
        return f"Plan.parse({str(self)!r})"

    def __hash__(self) -> int:
        return self._hash  # type: ignore[attr-defined]

    def __reduce__(self) -> tuple[object, tuple[str]]:
        return Plan.parse, (str(self),)  # a mapping proxy does not pickle

    @classmethod
    def parse(cls, text: str) -> Plan:
        """Read ``[structure[(knob=value, ...)]] stage > stage``; no structure means ``exact``."""
        match = _STRUCTURE.match(text.strip())
        if match is None:
            return cls(Cascade.parse(text))
        rest = text.strip()[match.end() :]
        if not rest.strip():
            raise PlanError(
                f"plan {text.strip()!r} has no stages. Write them behind the structure, like "
                f"'{match['name']} 64@100 > 384@10'."
            )
        return cls(Cascade.parse(rest), match["name"], dict(_knobs(match["knobs"], text)))


def _knobs(text: str | None, plan: str) -> Iterable[tuple[str, int | float]]:
    seen = set()
    for part in filter(None, (p.strip() for p in (text or "").split(","))):
        name, _, value = (p.strip() for p in part.partition("="))
        number = float("nan")
        with contextlib.suppress(ValueError):
            number = int(value) if re.fullmatch(r"[+-]?\d+", value) else float(value)
        if not name.isidentifier() or not math.isfinite(number):
            raise PlanError(
                f"plan {plan.strip()!r}: knob {part!r} cannot be read. Write name=number, like "
                f"ef=80."
            )
        if name in seen:
            raise PlanError(f"plan {plan.strip()!r}: knob {name!r} is given twice.")
        seen.add(name)
        yield name, number
