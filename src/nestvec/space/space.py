"""A Space: where vectors live and may be compared."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field, fields, replace
from typing import Any

import numpy as np

from nestvec.errors import DimensionError, SpaceError, SpaceMismatchError
from nestvec.space.nesting import known_dims, parse_dims

_ALLOWED = {
    "metric": ("cosine", "dot"),
    "normalisation": ("l2", "none"),
    "precision": ("float32", "float16", "int8", "binary"),
}

#: The version of the stamp's layout in files.
STAMP_VERSION = 1


@dataclass(frozen=True)
class Space:
    """Where vectors live and may be compared.

    Two vectors may be compared if and only if their spaces have the same `space_id`. It is a hash
    of `fingerprint`, `document_prompt`, `query_prompt`, `layer`, `dim`, `normalisation` and `maps`;
    the other fields travel beside it.

    Parameters
    ----------
    fingerprint
        Content hash of weights, pooling and tokenizer (an encoder makes it), or
        ``declared:<name>`` for vectors whose origin the user states.
    dim
        Full size of the vectors, before any cut.
    document_prompt, query_prompt
        Text put before every document or query; documents and queries share one Space.
    layer
        Encoder layer the vectors leave from; None is the last.
    normalisation
        ``"l2"`` if rows have length 1, else ``"none"``.
    maps
        Content hashes of the fitted maps applied, in order.
    cut
        Size of the prefix these vectors are, None for the full size.
    model, revision
        Names for people; not hashed.
    metric
        How vectors here are compared, ``"cosine"`` or ``"dot"``.
    nesting_dims
        Sizes the vectors were made to be cut to, rising; empty if nobody said.
    precision
        Number format of the stored vectors: float32, float16, int8 or binary.
    compatible_with
        Stamp of an older Space, if the first numbers of these vectors, cut to its size and
        L2-normalised, were trained to live there (`nestvec.upgrade.compatible_prefix`).
    via
        Content hashes of the bridges that brought the vectors here from another model's Space
        (`nestvec.upgrade`); empty for vectors of the model itself.
    """

    fingerprint: str
    dim: int
    document_prompt: str = ""
    query_prompt: str = ""
    layer: int | None = None
    normalisation: str = "l2"
    maps: tuple[str, ...] = ()
    cut: int | None = None
    model: str = field(default="", compare=False)
    revision: str = field(default="", compare=False)
    metric: str = field(default="cosine", compare=False)
    nesting_dims: tuple[int, ...] = field(default=(), compare=False)
    precision: str = field(default="float32", compare=False)
    compatible_with: Mapping[str, Any] | None = field(default=None, compare=False)
    via: tuple[str, ...] = field(default=(), compare=False)

    def __post_init__(self) -> None:
        if not self.fingerprint:
            raise SpaceError("a Space needs a fingerprint; use Space.declared(name, dim=...).")
        if not isinstance(self.dim, (int, np.integer)) or self.dim < 1:
            raise DimensionError(f"a Space of dim {self.dim!r} does not exist; dim is >= 1.")
        for name in ("dim", "layer", "cut"):  # NumPy integers are not JSON
            value = getattr(self, name)
            object.__setattr__(self, name, None if value is None else int(value))
        for name, allowed in _ALLOWED.items():
            if getattr(self, name) not in allowed:
                raise SpaceError(
                    f"{name} {getattr(self, name)!r} is not one of {', '.join(allowed)}."
                )
        for name in ("maps", "via"):
            object.__setattr__(self, name, tuple(getattr(self, name)))
        if self.nesting_dims:
            dims = parse_dims(self.nesting_dims, full=self.dim)
            object.__setattr__(self, "nesting_dims", dims)
        if self.cut is not None and not 1 <= self.cut <= self.dim:
            raise DimensionError(f"prefix dim {self.cut} does not fit a Space of dim {self.dim}.")

    @classmethod
    def declared(
        cls,
        name: str,
        *,
        dim: int,
        revision: str = "",
        nesting_dims: tuple[int, ...] | str | None = None,
        **more: Any,
    ) -> Space:
        """Stamp vectors of known origin: ``Space.declared("text-embedding-3-small", dim=1536)``.

        The name (and revision) is all there is to tell such spaces apart, so name the model, not
        the file. Nesting dims of known models come along by themselves.

        >>> Space.declared("text-embedding-3-small", dim=1536).nesting_dims
        (512, 1536)
        """
        if not name.strip():
            raise SpaceError("vectors without a model name cannot be stamped; say which model.")
        if nesting_dims is None:
            nesting_dims = tuple(d for d in known_dims(name) or () if d <= dim)
        elif isinstance(nesting_dims, str):
            nesting_dims = parse_dims(nesting_dims, full=dim)
        return cls(
            fingerprint=f"declared:{name}@{revision}" if revision else f"declared:{name}",
            dim=dim,
            model=name,
            revision=revision,
            nesting_dims=nesting_dims,
            **more,
        )

    @property
    def space_id(self) -> str:
        """16 hex digits of the hash, and ``/d`` behind it for a prefix."""
        hashed = {
            "fingerprint": self.fingerprint,
            "prompts": [self.document_prompt, self.query_prompt],
            "layer": self.layer,
            "dim": self.dim,
            "normalisation": self.normalisation,
            "maps": list(self.maps),
        }
        text = json.dumps(hashed, sort_keys=True, ensure_ascii=True, separators=(",", ":"))
        digest = hashlib.sha256(text.encode()).hexdigest()[:16]
        return digest if self.cut is None else f"{digest}/{self.cut}"

    @property
    def has_unit_rows(self) -> bool:
        """Whether every row has length 1: the Space is normalised, or a (re-normalised) prefix."""
        return self.normalisation == "l2" or self.cut is not None

    @property
    def size(self) -> int:
        """Number of columns of vectors of this Space: the cut, or the full dim."""
        return self.dim if self.cut is None else self.cut

    def prefix(self, dim: int, *, allow_untrained: bool = False) -> Space:
        """Return the Space of the first ``dim`` numbers, re-normalised.

        Raises
        ------
        DimensionError
            If ``dim`` is longer than the vectors, or is not a nesting dim while there are some
            and ``allow_untrained`` is False.
        """
        self.check_prefix(dim, allow_untrained=allow_untrained)
        if dim == self.size:
            return self
        old = self.compatible_with
        kept = old is not None and (old["cut"] or old["dim"]) <= dim
        return replace(
            self,
            cut=dim,
            nesting_dims=tuple(d for d in self.nesting_dims if d <= dim),
            compatible_with=old if kept else None,
        )

    def check_prefix(self, dim: int, *, allow_untrained: bool = False) -> None:
        """Raise `DimensionError` unless vectors of this Space may be cut to ``dim``."""
        if int(dim) != dim or not 1 <= dim <= self.size:
            raise DimensionError(
                f"prefix dim {dim} does not fit embeddings of dim {self.size}. "
                f"Choose from 1 to {self.size}" + self._fitting(", best one of {}") + "."
            )
        if dim == self.size or allow_untrained or dim in self.nesting_dims:
            return
        if not self.nesting_dims:
            raise DimensionError(
                f"prefix dim {dim} of {self.label}: this space is not known to be nested, so a cut "
                f"was neither trained nor measured. Fit a nestvec.MatryoshkaAdaptor, state "
                f"nesting_dims, or pass allow_untrained=True to cut anyway."
            )
        lower = [d for d in self.nesting_dims if d < dim]
        upper = [d for d in self.nesting_dims if d > dim]
        near = " or ".join(f"dim={d}" for d in lower[-1:] + upper[:1])
        raise DimensionError(
            f"prefix dim {dim} is not one of this model's nesting dims {self.nesting_dims}. "
            f"A prefix between nesting dims was not trained and not measured. "
            f"Use {near}, or pass allow_untrained=True to measure it anyway."
        )

    def _fitting(self, template: str) -> str:
        return template.format(self.nesting_dims) if self.nesting_dims else ""

    def mapped(self, content_hash: str, **changes: Any) -> Space:
        """Return the Space that a fitted map with this content hash leads to."""
        if self.cut is not None:
            raise SpaceError(
                f"a map takes full vectors, and {self.label} is cut to {self.cut} of {self.dim} "
                f"dims. Apply the map first, then cut."
            )
        changes = {"compatible_with": None, **changes}  # a map may leave the old Space
        return replace(self, maps=(*self.maps, content_hash), **changes)

    @property
    def label(self) -> str:
        """One line for messages: name, id, size."""
        name = self.model or self.fingerprint[:24]
        maps = f" + {len(self.maps)} map{'s' * (len(self.maps) > 1)}" if self.maps else ""
        via = f", through bridge {self.via[-1]}" if self.via else ""
        return f"{name}{maps} ({self.size} dims, space {self.space_id}{via})"

    def check_same(self, other: Space) -> None:
        """Raise `SpaceMismatchError` unless vectors of ``other`` may be compared with ours."""
        if self.space_id != other.space_id:
            raise SpaceMismatchError(
                f"these vectors cannot be compared: {self.label} and {other.label} are two spaces. "
                f"{_what_would_join(self, other)}"
            )

    def to_dict(self) -> dict[str, Any]:
        """Return the stamp as plain JSON values; `from_dict` reads it back."""
        return {"stamp_version": STAMP_VERSION, "space_id": self.space_id, **asdict(self)}

    @classmethod
    def from_dict(cls, stamp: dict[str, Any]) -> Space:
        """Read a stamp; one whose id does not match its content is refused."""
        version = stamp.get("stamp_version")
        if version != STAMP_VERSION:
            raise SpaceError(
                f"this stamp has version {version!r}; this nestvec reads {STAMP_VERSION}. "
                f"Upgrade nestvec."
            )
        names = {f.name for f in fields(cls)}
        try:
            values = {k: v for k, v in stamp.items() if k in names}
            for key in ("maps", "nesting_dims", "via"):
                values[key] = tuple(values.get(key, ()))
            space = cls(**values)
        except TypeError as error:
            raise SpaceError(f"the stamp is incomplete: {error}.") from error
        if stamp.get("space_id") not in (None, space.space_id):
            raise SpaceError(
                f"the stamp says space {stamp['space_id']} but its content hashes to "
                f"{space.space_id}: it was edited or damaged."
            )
        return space


def _what_would_join(a: Space, b: Space) -> str:
    if replace(a, cut=None).space_id == replace(b, cut=None).space_id:
        size = min(a.size, b.size)
        return f"They are two sizes of one space: cut the longer with prefix({size})."
    for new, old in ((a, b), (b, a)):
        if new.compatible_with and new.compatible_with["space_id"] == old.space_id:
            return f"{new.label} was trained to hold the other: nestvec.upgrade.compatible_prefix."
    if a.fingerprint != b.fingerprint:
        return (
            "They come from two models: encode one side again with the other's model, or join "
            "them by nestvec.upgrade.fit(old=..., new=...) on a sample encoded by both."
        )
    if a.maps != b.maps:
        short, long = sorted((a, b), key=lambda s: len(s.maps))
        if long.maps[: len(short.maps)] == short.maps:
            missing = ", ".join(long.maps[len(short.maps) :])
            return f"One is the other after a map: apply map {missing} to {short.label}."
        return "Different maps were applied: apply one map to both sides."
    if (a.document_prompt, a.query_prompt) != (b.document_prompt, b.query_prompt):
        return "Their prompts differ: encode both sides with the same two prompts."
    if a.layer != b.layer:
        return f"They leave the encoder at layers {a.layer} and {b.layer}: use one layer."
    if a.normalisation != b.normalisation:
        return "One is L2-normalised and the other is not: call normalised() on it."
    return f"Their full dims differ: {a.dim} and {b.dim}."
