"""tools/study_report.py: what paired differences decide, and what a log tells."""
import random

import pytest

from tools.study_report import attended, seeds_needed, verdict


def test_verdict():
    """The 95% interval of the mean decides, as a trusted t test does; one seed never does, and more seeds need a
    smaller difference."""
    cases = {(5.0,): "undecided", (1.0, 1.2, 0.9): "reproduced", (-1.0, -1.2, -0.9): "not reproduced",
             (1.0, -0.5, 0.3): "undecided", (0.0, 0.0): "undecided"}
    assert {d: verdict(d) for d in cases} == cases
    assert [seeds_needed(d) for d in cases] == [None, 3, 3, 41, None]      # (2.26 x 0.7506 / 0.2667)^2 = 40.5
    stats, rng = pytest.importorskip("scipy.stats"), random.Random(0)
    for n in [k for k in range(2, 11) for _ in range(20)]:
        d = [rng.gauss(0.7, 0.5) for _ in range(n)]
        assert (verdict(d) != "undecided") == (stats.ttest_1samp(d, 0).pvalue < 0.05)


def test_what_the_attention_does_at_the_end():
    """Means over the last twentieth of the steps that have an attention; of none, nothing."""
    entries = [{"loss": 1.0}] * 5
    entries += [{"attention_entropy": k / 40, "attention_largest": 0.5, "attention_term": 2.0 * k} for k in range(40)]
    assert attended(entries) == pytest.approx(
        {"attention_entropy": 38.5 / 40, "attention_largest": 0.5, "attention_term": 77.0})
    assert attended(entries[:5]) == {}
