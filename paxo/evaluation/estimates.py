"""An average with its interval."""

import dataclasses
import warnings

import numpy as np


@dataclasses.dataclass(frozen=True)
class Estimate:
    """A mean over independent units (prompts) with a 95 % interval.

    Attributes:
        value: the mean.
        low: lower end of the interval.
        high: upper end.
        count: number of units.
    """

    value: float
    low: float
    high: float
    count: int

    def __str__(self):
        return f"{self.value:.3f} [{self.low:.3f}, {self.high:.3f}]"


def bootstrap_mean(values: np.ndarray, *, level: float = 0.95, seed: int = 0) -> Estimate:
    """Mean of `values [N]` with a percentile bootstrap interval over the N units.

    The same values give the same interval: the resampling is seeded.

    Raises:
        ValueError: without values.

    >>> bootstrap_mean(np.full(5, 0.5))
    Estimate(value=0.5, low=0.5, high=0.5, count=5)
    """
    from scipy import stats

    values = np.asarray(values, np.float64)
    if not values.size:
        raise ValueError("there is nothing to average: no unit was measured")
    mean = float(values.mean())
    if values.size == 1 or np.ptp(values) == 0:
        return Estimate(mean, mean, mean, int(values.size))
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", stats.DegenerateDataWarning)
        found = stats.bootstrap(
            (values,),
            np.mean,
            confidence_level=level,
            method="percentile",
            n_resamples=2000,
            rng=np.random.default_rng(seed),
        ).confidence_interval
    return Estimate(mean, float(found.low), float(found.high), int(values.size))
