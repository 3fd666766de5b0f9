"""tools/study_report.py: what paired differences decide, and what a log tells."""
import json
import random

import pytest

from evaluate import PAPER_TASKS, change
from tools import study
from tools.study_report import (
    LOWER,
    attended,
    claim_table,
    draw_isolation,
    draw_losses,
    interval,
    seeds_needed,
    spread,
    verdict,
    world_table,
)
from tools.study_variants import STABLEMTL, VARIANTS, runs


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
        trusted = stats.ttest_1samp(d, 0)
        assert (verdict(d) != "undecided") == (trusted.pvalue < 0.05)
        assert interval(d) == pytest.approx([*trusted.confidence_interval()], rel=1e-4, abs=1e-4)


def test_which_metrics_count_as_errors():
    """Of the seven tasks' only mIoU is better when higher."""
    assert [t for t in PAPER_TASKS if not LOWER[t]] == ["semantic"]


def test_steps_that_titles_promise(tmp_path):
    """A stage 2 and its control of as many steps as stage 1, of twice the usual ones; a stage 1 of half; of none."""
    args = study.parse(f"--out {tmp_path} --seeds 1 --steps 14 --steps2 5 --only all".split())
    steps = {job.variant: job.steps for job in runs(args)}
    assert steps.keys() == VARIANTS.keys()
    expected = {"single": 14, "continued": 5, "multi": 5, "longer": 10, "continued-longer": 10, "longest": 14,
                "continued-longest": 14, "no-isolation": 14, "no-isolation-half": 7, "batch-4": 10, "oracle": 5,
                "streams-off": 0, "longer-off": 0, "longest-off": 0}
    assert {name: steps[name] for name in expected} == expected


def test_what_rounds_to_zero_has_no_sign():
    """A tiny loss was printed as -0.00, a tiny gain as +0.00."""
    claim = {"claim": "it helps", "where": "unseen", "paper": 1.5, "verdict": "not reproduced"}
    *_, row = claim_table({"claims": [claim | {"differences": [-0.001, -0.002], "seeds needed": 3}]})
    assert row == "| it helps | unseen | 0.00 ± 0.00071 | -0.00785 to 0.00485 | +1.50 | not reproduced |"
    told = [spread([x], "+.2f") for x in (-0.004, 0.0, 0.004, -0.006, 0.006)]
    assert told == ["0.00", "0.00", "0.00", "-0.01", "+0.01"] and spread([-0.0]) == "0"
    assert [change(now, 2) for now in (1.99999, 2, 2.00001, 1.98)] == ["+0.00%", "+0.00%", "+0.00%", "-1.00%"]


def test_a_gain_over_fewer_seeds_says_so():
    """Where the zero line lacks a seed, Delta_m is over fewer than the metrics beside it."""
    seeds = {n: {"delta_m": gain, "results": {"depth": {"real": 9.0}}, "delta_m of further steps": {}}
             for n, gain in enumerate(({"unseen": 1.0}, {"unseen": 3.0}, {}))}
    result = {"tasks": ["depth"], "variants": {"single": {"title": "single", "seeds": seeds}}}
    assert world_table(result, STABLEMTL, "unseen")[-1] == "| single | +2.00 ± 1.4, 2 of the seeds | 9 ± 0 | 3 |"
    del seeds[2]
    assert world_table(result, STABLEMTL, "unseen")[-1] == "| single | +2.00 ± 1.4 | 9 ± 0 | 2 |"


def test_what_the_attention_does_at_the_end():
    """Means over the last twentieth of the steps that have an attention; of none, nothing."""
    entries = [{"loss": 1.0}] * 5
    entries += [{"attention_entropy": k / 40, "attention_largest": 0.5, "attention_term": 2.0 * k} for k in range(40)]
    assert attended(entries) == pytest.approx(
        {"attention_entropy": 38.5 / 40, "attention_largest": 0.5, "attention_term": 77.0})
    assert attended(entries[:5]) == {}


def test_steps_that_fp16_skipped_are_in_no_mean(tmp_path):
    """Their log has null for the loss and the norm: curves and norms are those of the other steps."""
    args = study.parse(f"--out {tmp_path} --seeds 1 --steps 8 --only single --tasks shading,albedo".split())
    job, = runs(args)
    job.out.mkdir(parents=True)
    (job.out / "results.json").write_text('{"results": {}}')
    lines = [{"task": [args.tasks[s % 2]], "loss": s, "grad_norm": 2 * s, "img_per_s": 1} for s in range(8)]
    lines[0] |= {"loss": None, "grad_norm": None}
    (job.out / "log.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    *_, together = draw_losses(args).axes
    assert [list(line.get_ydata()) for line in together.lines if len(line.get_ydata())] == [[1, 2, 3, 4, 5, 6, 7]]
    seeds = {"seeds": {0: {"results": {t: {"real": 1.0} for t in args.tasks}}}}
    axes, *_ = draw_isolation(args, {"variants": {"single": seeds, "no-isolation": seeds}}).axes
    assert sorted(line.get_xydata()[0][0] for line in axes.lines if line.get_label() in args.tasks) == [8, 8]
