"""Bootstrap intervals against a plain loop, normal theory and their claimed coverage."""

import numpy as np
import pytest

from jaxcomp.evaluate.intervals import bootstrap_perplexity, paired_difference, paired_ratio
from jaxcomp.evaluate.perplexity import Perplexity


def scores(seed=0, windows=60, tokens=20, mean=2.0, sd=0.3):
    nll = np.random.default_rng(seed).normal(mean, sd, windows) * tokens
    return Perplexity(nll, np.zeros(windows, int), tokens)


def shifted(base, by, noise=0.0, seed=1):
    """`base` with `by` nats more per token, plus noise that a paired comparison sees and a mean does not."""
    extra = by + noise * np.random.default_rng(seed).normal(size=len(base.nll))
    return Perplexity(base.nll + extra * base.tokens_per_window, base.correct, base.tokens_per_window)


def loop(statistic, windows, seed, resamples=2000, level=0.95):
    """Percentile bootstrap as a textbook states it: one draw of indices at a time."""
    rng = np.random.default_rng(seed)
    samples = sorted(statistic(rng.integers(windows, size=windows)) for _ in range(resamples))
    position = lambda q: q * (resamples - 1)
    at = lambda x: samples[int(x)] + (x - int(x)) * (samples[min(int(x) + 1, resamples - 1)] - samples[int(x)])
    return at(position((1 - level) / 2)), at(position((1 + level) / 2))


def ppl(result, indices):
    return np.exp(sum(result.nll[i] for i in indices) / (len(indices) * result.tokens_per_window))


def test_perplexity_interval_equals_the_loop():
    result = scores()
    found = bootstrap_perplexity(result, seed=3)
    np.testing.assert_allclose(found[1:], loop(lambda i: ppl(result, i), 60, seed=3), rtol=1e-12)
    assert found.low < found.value == result.ppl < found.high


@pytest.mark.parametrize(
    "interval, combine", [(paired_ratio, lambda a, b: a / b), (paired_difference, lambda a, b: a - b)]
)
def test_paired_intervals_equal_the_loop(interval, combine):
    base = scores()
    new = shifted(base, 0.02, noise=0.05)
    found = interval(new, base, seed=4, level=0.9)
    expected = loop(lambda i: combine(ppl(new, i), ppl(base, i)), 60, seed=4, level=0.9)
    np.testing.assert_allclose(found[1:], expected, rtol=1e-9)
    np.testing.assert_allclose(found.value, combine(new.ppl, base.ppl))


def test_width_agrees_with_normal_theory():
    result = scores(windows=400)
    interval = bootstrap_perplexity(result, resamples=4000)
    per_token = result.nll / result.tokens_per_window
    theory = 2 * 1.96 * per_token.std() / np.sqrt(len(per_token))
    np.testing.assert_allclose(np.log(interval.high / interval.low), theory, rtol=0.06)


def test_coverage_is_the_level():
    hits = 0
    for seed in range(200):
        interval = bootstrap_perplexity(scores(seed=seed, windows=80), level=0.9, resamples=300)
        hits += interval.low <= np.exp(2.0) <= interval.high
    assert 0.83 <= hits / 200 <= 0.95


def test_pairing_sees_what_separate_intervals_do_not():
    base = scores(sd=0.5)
    new = shifted(base, 0.02, noise=0.01)
    ratio, difference = paired_ratio(new, base), paired_difference(new, base)
    assert ratio.low > 1.0 and difference.low > 0.0
    assert bootstrap_perplexity(new).low < base.ppl, "alone the intervals overlap"


def test_constant_ratio_has_an_interval_of_no_width():
    base = scores()
    interval = paired_ratio(shifted(base, 0.1), base)
    np.testing.assert_allclose(interval, np.exp(0.1), rtol=1e-12)


def test_seed_decides_the_interval():
    result = scores()
    assert bootstrap_perplexity(result, seed=1) == bootstrap_perplexity(result, seed=1)
    assert bootstrap_perplexity(result, seed=1) != bootstrap_perplexity(result, seed=2)


@pytest.mark.parametrize("other", [scores(windows=59), scores(tokens=21)])
def test_pairing_needs_equal_windows(other):
    with pytest.raises(ValueError, match=r"found \(windows, tokens\) \(60, 20\) and"):
        paired_ratio(scores(), other)
