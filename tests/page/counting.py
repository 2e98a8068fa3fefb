"""A replica's counters without a replica. Run as a process with a folder in ``PROMETHEUS_MULTIPROC_DIR``, it
tells what it serves and then counts what each line of its standard input says, answering each with a line."""

from __future__ import annotations

import json
import os
import sys
from pathlib import Path
from typing import Any

import numpy as np
from prometheus_client import CollectorRegistry

from deployments.engine.metrics import Metrics
from deployments.watch.facts import Facts, shape

SCORES = (-4.0, -2.5, -1.5, -0.8, -0.2, 0.4, 1.0, 1.6, 2.2, 2.83, 5.0, 8.0, 12.0)
LIMIT, THRESHOLD = 2.83, 0.005  # without p-values scores lie lower by LIMIT, for their limit is 0


class Counting:
    """One model that counts. classes: its names; the first is the attacker's."""

    def __init__(self, model: str, classes: list[str], p_values: bool) -> None:
        self._classes = classes
        self._p_values = p_values
        self._rng = np.random.default_rng(0)
        threshold = THRESHOLD if p_values else None
        about = {"method": "mmdf" if p_values else "bna", "fingerprint": "0123456789abcdef" * 4, "version": "3"}
        self._lower = 0.0 if p_values else LIMIT
        scores = [round(score - self._lower, 2) for score in SCORES]
        self._metrics = Metrics(model, classes, registry=CollectorRegistry(), score_buckets=scores)
        self._metrics.artifact(**about, threshold=threshold, created_at="2026-11-21T09:00:00+00:00")
        bounds = self._metrics.bounds
        Facts(
            model=model,
            **about,
            calibrated_at="2026-11-21T09:00:00+00:00",
            labels=tuple(classes),
            nominal=dict.fromkeys(classes, threshold or 0.004),
            threshold=threshold,
            support=0.002 if p_values else None,
            score_limit=LIMIT - self._lower,
            score=shape(bounds["score"], (self._scores(4000) - self._lower).tolist(), 500),
            brightness=shape(bounds["brightness"], self._rng.beta(5, 5, 4000).tolist(), 500),
            contrast=shape(bounds["contrast"], self._rng.beta(3, 9, 4000).tolist(), 500),
        ).write(Path(os.environ["PROMETHEUS_MULTIPROC_DIR"]))

    def _scores(self, count: int) -> np.ndarray:
        return self._rng.normal(0.2, 1.0, count)

    def count(self, clean: int = 0, triggered: int = 0, failed: int = 0, brightness: float = 0.5) -> None:
        """So many requests of one image each; ``failed`` ones have no verdict."""
        metrics, rng = self._metrics, self._rng
        label = np.concatenate([rng.integers(0, len(self._classes), clean), np.zeros(triggered)]).astype(np.int64)
        flagged = np.concatenate([rng.random(clean) < THRESHOLD, np.ones(triggered, bool)])
        metrics.verdicts(label, flagged)
        metrics.requests("correct", "clean").inc(int((~flagged).sum()))
        metrics.requests("correct", "flagged").inc(int(flagged.sum()))
        metrics.corrected().inc(int(flagged.sum()))
        metrics.requests("correct", "error").inc(failed)
        metrics.inputs("error").inc(failed)
        metrics.failures("corrected", "open").inc(failed)
        scores = np.concatenate([np.minimum(self._scores(clean), 2.8), rng.normal(9.0, 1.5, triggered)])
        p_values = np.concatenate([np.maximum(rng.random(clean), THRESHOLD), np.full(triggered, 0.00005)])
        scores[flagged] = np.maximum(scores[flagged], 3.0)
        p_values[flagged] = np.minimum(p_values[flagged], 0.004)
        metrics.statistics(scores - self._lower, p_values if self._p_values else None)
        for value in rng.beta(5, 5, len(label)) - 0.5 + brightness:
            metrics.brightness().observe(value)
        for value in rng.beta(3, 9, len(label)):
            metrics.contrast().observe(value)
        for stage, typical in (("decode", 0.0004), ("queue", 0.0001), ("original", 0.018), ("corrected", 0.021)):
            for value in rng.lognormal(np.log(typical), 0.4, len(label)):
                metrics.stage_seconds(stage).observe(value)
        for value in rng.lognormal(np.log(0.025), 0.5, len(label)):
            metrics.stage_seconds("total").observe(value)


def main() -> None:
    """First line: [[model, classes, p_values], …]. Every other: {"model": …, and what `Counting.count` takes}."""
    told: list[Any] = json.loads(sys.stdin.readline())
    models = {name: Counting(name, classes, p_values) for name, classes, p_values in told}
    print("ready", flush=True)
    for text in sys.stdin:
        said = json.loads(text)
        models[said.pop("model")].count(**said)
        print("counted", flush=True)


if __name__ == "__main__":
    main()
