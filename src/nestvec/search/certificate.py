"""What measured recall proves: confidence bounds for a mean of values in [0, 1], and certificates.

The values are one number a query (its recall), so that neighbours of one query, which are found or
missed together, are never counted as independent trials. Nothing is assumed of their distribution
but its range: the bounds hold at every number of queries, not only at many.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Literal

import numpy as np
from numpy.typing import ArrayLike, NDArray
from scipy.special import entr, ndtri

from nestvec.errors import DataError

Array = NDArray[np.float64]

Method = Literal["betting", "empirical_bernstein", "hoeffding"]

_GRID = 128  # candidates tried together; two rounds place a bound to 0.2% of its gap
_SHARE = 250  # of the values left, a 250th are the next block: single values for the last 500
_CAUTION = 0.85  # a bet that is to pay 1 or nothing is hedged by 2.06 at w = 0.05, not by 2.45
_BOLDEST = 4.0  # what a fund can be moved by, in those units: 4.08 is wanted at w = 1e-5
_PRIOR = 0.05  # losses seen before the first, all of them whole: a variance per loss of 1
_NOTHING = 1e-12  # recall is in steps of 1/k
_DUST = 1e-14  # of capital


@dataclass(frozen=True)
class Bound:
    """What the queries say of one plan: its mean and what the mean is at least."""

    n: int
    mean: float
    lower: float


@dataclass(frozen=True)
class Certificate:
    """How many plans hold the target, and the bound of each that was tested.

    ``bounds`` has the ``n_held`` plans that hold and behind them the first that failed, if one
    did. With ``confidence`` all that hold have a mean of at least ``target``; that each also
    reaches its own ``lower`` is said with this confidence of any one of them, not of all at once.
    """

    target: float
    confidence: float
    n_held: int
    bounds: tuple[Bound, ...]


def certify(
    values_by_plan: Iterable[ArrayLike],
    target: float | int,
    *,
    confidence: float | int = 0.95,
    method: Method = "betting",
    seed: int = 0,
) -> Certificate:
    """Test plans from the safest to the cheapest and stop at the first that fails.

    Parameters
    ----------
    values_by_plan : iterable of (n,)
        Recall in [0, 1] of each query, plan after plan, in an order that was chosen on other
        queries. Plans may share their queries. None is asked for after the first failure, so a
        generator need not measure the rest.
    target
        Mean recall that has to be held, in (0, 1].
    confidence
        Probability, in (0, 1), that every plan counted in ``n_held`` has at least that mean.
    method, seed
        As in `lower_bound`.

    Raises
    ------
    DataError
        If a target, a confidence or values do not fit.

    References
    ----------
    Maurer, Hothorn and Lehmacher 1995 (tests in an order fixed beforehand); Angelopoulos et al.,
    Learn then Test, arXiv:2110.01052 (the same, to choose settings of a model).

    Examples
    --------
    >>> safe, cheap = [1.0] * 95 + [0.9] * 5, [1.0] * 60 + [0.8] * 40
    >>> found = certify([safe, cheap], 0.95)
    >>> found.n_held, [round(bound.mean, 3) for bound in found.bounds]
    (1, [0.995, 0.92])
    """
    target = _target(target)
    # Each test spends all of alpha, and still alpha bounds the chance of one false word: the first
    # plan in the order that misses the target can be certified only if its own test errs, and
    # every later plan is certified only after it. Which plan that is depends on the order alone.
    bounds: list[Bound] = []
    n_held = 0
    for values in values_by_plan:
        x = _values(values)
        lower = lower_bound(x, confidence=confidence, method=method, seed=seed)
        bounds.append(Bound(len(x), float(x.mean()), lower))
        if lower < target:
            break
        n_held += 1
    if not bounds:
        raise DataError("no plans given: certify needs the values of at least one.")
    return Certificate(target, float(confidence), n_held, tuple(bounds))


def lower_bound(
    values: ArrayLike,
    *,
    confidence: float | int = 0.95,
    method: Method = "betting",
    seed: int = 0,
) -> float:
    """Return a number that the mean of the distribution exceeds with this confidence.

    Parameters
    ----------
    values : (n,)
        Independent draws from one distribution on [0, 1], at least two.
    confidence
        In (0, 1), one-sided.
    method
        ``"betting"``: the tightest. ``"empirical_bernstein"``: in closed form, from the sample
        variance. ``"hoeffding"``: from the range alone.
    seed
        Of the order in which ``"betting"`` takes the values. It is a choice for before they are
        seen: the best of many seeds is no bound.

    Returns
    -------
    float
        In [0, mean]. ``"betting"``: never smaller at a smaller confidence, and placed from below to
        0.2% of its distance from the mean.

    Raises
    ------
    DataError
        If the values are no numbers in [0, 1], fewer than two, or the confidence does not fit.

    Notes
    -----
    Betting: if the mean is at most ``m``, nobody gets rich by betting on ``x - m``. Who starts with
    ``w = alpha`` and stakes at each value some of it, as the values before suggest, has 1 at the
    end with probability ``alpha`` at most; if that happens ``m`` is rejected, and the bound is
    the largest rejected ``m``. The stakes decide only how often. As the number of values is known,
    they aim at having 1 at the last (Voracek and Orabona): with ``r`` values left, about
    ``sqrt(2 log(1 / w) / (r variance))`` of ``w`` a unit of ``x - m``. A stake that stays the same
    gives ``2.45 sigma / sqrt(n)`` at 95%, this one comes near the ``1.64`` of a known variance.

    Ours are three things: the variance is the one at the mean ``m``, not the sample's; bets are
    placed in blocks, which are single values at the end; and stakes are shaped so that capital
    never rises with ``m`` (see `_capital`), without which the largest rejected ``m`` is no bound.

    References
    ----------
    Waudby-Smith and Ramdas, Estimating means of bounded random variables by betting,
    arXiv:2010.09686; Voracek and Orabona, STaR-Bets, arXiv:2505.22422; Maurer and Pontil, Empirical
    Bernstein bounds, arXiv:0907.3740, theorem 4; Hoeffding 1963.

    Examples
    --------
    >>> round(lower_bound([1.0] * 1000), 4), round(0.05 ** (1 / 1000), 4)
    (0.997, 0.997)
    >>> round(lower_bound([1.0] * 1000, method="hoeffding"), 4)
    0.9613
    """
    x = _rounded_down(_values(values))
    alpha = _alpha(confidence)
    n, mean = len(x), float(x.mean())
    if method == "hoeffding":
        lower = mean - math.sqrt(math.log(1 / alpha) / (2 * n))
    elif method == "empirical_bernstein":
        log = math.log(2 / alpha)
        lower = mean - math.sqrt(2 * float(x.var(ddof=1)) * log / n) - 7 * log / (3 * (n - 1))
    elif method == "betting":
        lower = _betting_bound(_shuffled(x, seed), mean, alpha)
    else:
        raise DataError(
            f"method {method!r} is not one of 'betting', 'empirical_bernstein', 'hoeffding'."
        )
    return max(0.0, lower)


def n_needed(
    mean: float | int,
    variance: float | int,
    target: float | int,
    *,
    confidence: float | int = 0.95,
    power: float | int = 0.8,
) -> int | None:
    """Return about how many queries would certify ``target``, or None if no number would.

    Parameters
    ----------
    mean, variance
        Of the values, as far as known: those of the queries that did not suffice.
    target, confidence
        What is to be certified.
    power
        The chance, in (0, 1), with which that many fresh queries would do.

    Notes
    -----
    What a known variance asks for, ``(z_confidence + z_power)**2 variance / gap**2``, plus what
    losses too rare to be seen do, ``log(1 / alpha) / log(mean / target)``.

    >>> n_needed(1, 0, 0.99), n_needed(0.98, 0.01, 0.99)
    (299, None)
    """
    target, alpha = _target(target), _alpha(confidence)
    if not 0 <= mean <= 1 or not 0 <= variance <= 0.5:  # 0.25, but for n - 1 in place of n
        raise DataError(
            f"mean {mean} and variance {variance} are of no values in [0, 1]. Pass values.mean() "
            f"and values.var()."
        )
    z = float(ndtri(1 - alpha) + ndtri(1 - _alpha(power, name="power")))
    gap = mean - target
    if gap <= 0:
        return None
    return math.ceil(
        max(z, 0) ** 2 * variance / gap**2 + math.log(1 / alpha) / math.log(mean / target)
    )


def _betting_bound(x: Array, mean: float, alpha: float) -> float:
    if mean == 0:
        return 0.0
    level = np.array([alpha])

    def rejected(gaps: Array) -> NDArray[np.bool_]:
        return _capital(x, mean - gaps, level) >= 1

    gaps = mean * np.geomspace(1e-3 / len(x), 1, _GRID)  # at the last, m = 0, all is rejected
    return mean - _first(rejected, gaps)


def _first(rejected: Callable[[Array], NDArray[np.bool_]], rising: Array) -> float:
    """Return the smallest rejected candidate; the last of ``rising`` is one without a test."""
    at = int(np.argmax(np.append(rejected(rising[:-1]), True)))
    if at == 0:
        return float(rising[0])
    finer = np.linspace(rising[at - 1], rising[at], _GRID)[1:]
    return float(finer[int(np.argmax(np.append(rejected(finer[:-1]), True)))])


def _capital(x: Array, m: Array, level: Array) -> Array:
    """Return the capital after all of ``x`` of gamblers who start with ``level`` and bet on x > m.

    A gambler owns ``w``. For the next block of values there is a fund, worth 1 before and
    ``prod(1 + part * (x - m))`` after it, ``part`` in [0, 1 / m]: a fair game at best if the mean
    is at most ``m``. They put into it ``wanted``, or all they have, and stop at 1.

    Why the end never falls with the start: the stake is concave in ``w``, 0 at 0 and at 1, and at
    most ``w``, so a loss leaves more to who had more; and where a gain does not yet carry to 1, the
    stake falls with a slope of at most ``stake / (1 - w)``, less than the gain makes up for.
    Why it never rises with ``m``: ``part`` is 1 / m or a number over sqrt(1 - m), with either the
    fund falls as ``m`` rises, and so does its gain times each of the two stakes.
    """
    ends = _ends(len(x))
    begins = np.append(0, ends[:-1])
    w = np.broadcast_to(level, np.broadcast_shapes(m.shape, level.shape)).astype(np.float64)
    # Losses before each block, and their variance per loss. The variance at mean m is this times
    # 1 - m: losses of the sizes seen, but more of them, as would be needed for that mean.
    sums = np.append(0, np.cumsum(1 - x))[begins]
    squares = np.append(0, np.cumsum((1 - x) ** 2))[begins]
    variance = np.maximum(squares - sums**2 / np.maximum(begins, 1), 0)
    per_loss = (_PRIOR + variance) / (_PRIOR + sums)
    for begin, end, each in zip(begins, ends, per_loss, strict=True):
        error = np.sqrt((len(x) - begin) * each * (1 - m))  # of the sum of all that is left
        part = np.minimum(1 / m, _BOLDEST / error)
        with np.errstate(over="ignore"):
            fund = np.prod(1 + part[:, None] * (x[begin:end] - m[:, None]), axis=1)
        wanted = _CAUTION * np.sqrt(2 * w * entr(w)) / (error * part)
        gain = np.minimum(w, wanted) * (np.minimum(fund, 1e300) - 1)
        w = w + gain
        w[w < _DUST] = 0  # who lost all may be left 1e-17 by rounding, and grow rich of it
        w[w > 1 - _DUST] = 1
    return w


def _ends(n: int) -> NDArray[np.int64]:
    """Return where the blocks end: each a share of what is left, so single values at the end."""
    ends = [0]
    while ends[-1] < n:
        ends.append(ends[-1] + max(1, (n - ends[-1]) // _SHARE))
    return np.array(ends[1:], dtype=np.int64)


def _shuffled(x: Array, seed: int) -> Array:
    # Queries often come sorted, by topic or by difficulty; then those before say nothing of those
    # after, and a sample that is one as a whole is bet on as if it drifted. The order must not
    # depend on the values: sorted first, they would be no independent draws.
    return np.random.default_rng(seed).permutation(x)


def _rounded_down(x: Array) -> Array:
    """Take what is next to nothing for nothing: no bound rises by it, and no stake overflows."""
    return np.where(x < _NOTHING, 0.0, x)


def _values(values: ArrayLike) -> Array:
    try:
        x = np.asarray(values)
    except ValueError as error:
        raise DataError(f"values: not one number a query ({error}).") from error
    if x.dtype.kind not in "fiub" or x.ndim != 1:
        raise DataError(
            f"values: expected one number in [0, 1] a query, got dtype {x.dtype}, shape {x.shape}. "
            f"Average over the neighbours of a query first."
        )
    if len(x) < 2:
        raise DataError(f"values: {len(x)} given; a bound needs at least 2, and says little of 2.")
    x = x.astype(np.float64)
    inside = (x >= 0) & (x <= 1)
    if not inside.all():
        row = int(np.argmin(inside))
        raise DataError(
            f"values: value {row} is {x[row]}, not a number in [0, 1] ({int((~inside).sum())} "
            f"such of {len(x)}). Scale them by their known range, or drop what was not measured."
        )
    return x


def _alpha(confidence: float | int, *, name: str = "confidence") -> float:
    if not 0 < confidence < 1:
        raise DataError(f"{name} {confidence} is not in (0, 1). Write 0.95 for 95%.")
    return 1 - confidence


def _target(target: float | int) -> float:
    if not 0 < target <= 1:
        raise DataError(f"target {target} is not in (0, 1]. Write 0.99 for a mean recall of 99%.")
    return float(target)
