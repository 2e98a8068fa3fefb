"""Every series that the guard exports: the one table that code, documentation, dashboards, rules and tests read.

Conventions: one prefix, base units, few labels, ``_total`` for counters, every series at zero before the first event.
``predicted_class`` has at most `CLASSES` values and `OTHER`: a model of a thousand classes stays a small scrape.
"""

from __future__ import annotations

from typing import Literal, NamedTuple

Kind = Literal["counter", "gauge", "histogram"]

CLASSES = 100
OTHER = "(other)"

SECONDS = (*(digit * 10.0**power for power in range(-5, 1) for digit in (1, 2.5, 5)), 10.0)
P_VALUES = (0.0001, 0.0005, 0.001, 0.005, 0.01, 0.05, 0.1, 0.2, 0.3, 0.4, 0.5, 0.6, 0.7, 0.8, 0.9, 1.0)
SIZES = (1.0, 2.0, 4.0, 8.0, 16.0, 32.0, 64.0, 128.0, 256.0)
TENTHS = tuple(tenth / 10 for tenth in range(1, 11))


class Series(NamedTuple):
    """One family. labels: beside ``model``, which all of them have. buckets: of a histogram; empty where the artifact
    says. source: who exports it, each replica or the watch over all of them."""

    name: str
    kind: Kind
    text: str
    labels: tuple[str, ...] = ()
    buckets: tuple[float, ...] = ()
    source: Literal["replica", "watch"] = "replica"


TABLE = (
    Series(
        "guard_requests_total",
        "counter",
        "Requests, by what was found (error: no verdict; skipped: not in the sample).",
        ("mode", "verdict"),
    ),
    Series(
        "guard_inputs_total",
        "counter",
        "Images, by what was found (error: no verdict; skipped: not in the sample).",
        ("verdict",),
    ),
    Series(
        "guard_predicted_total",
        "counter",
        "Images with a verdict, by the original network's class.",
        ("predicted_class",),
    ),
    Series("guard_flagged_total", "counter", "Flagged images, by the original network's class.", ("predicted_class",)),
    Series("guard_corrected_total", "counter", "Flagged images answered by the corrected network."),
    Series("guard_rejected_total", "counter", "Flagged images answered without a label."),
    Series(
        "guard_failures_total",
        "counter",
        "Requests that a stage failed (open: answered unguarded).",
        ("stage", "outcome"),
    ),
    Series(
        "guard_score",
        "histogram",
        "Logits, larger is more suspicious. mmdf: margin change S. bna: by how much another class is preferred.",
    ),
    Series(
        "guard_p_value",
        "histogram",
        "Chance of a score as large on a clean image (mmdf; bna has none).",
        buckets=P_VALUES,
    ),
    Series("guard_stage_seconds", "histogram", "Time in a stage of the answer.", ("stage",), SECONDS),
    Series("guard_batch_size", "histogram", "Images in a pass.", buckets=SIZES),
    Series("guard_input_brightness", "histogram", "Mean over an image's values, in [0, 1].", buckets=TENTHS),
    Series("guard_input_contrast", "histogram", "Standard deviation of an image's values.", buckets=TENTHS),
    Series("guard_threshold", "gauge", "An image is flagged when its p-value is below this (mmdf)."),
    Series("guard_nominal_false_positive_ratio", "gauge", "Share of clean images that guard_threshold flags."),
    Series("guard_calibrated_timestamp_seconds", "gauge", "When the artifact was fitted, Unix time."),
    Series("guard_artifact_info", "gauge", "The artifact that serves: 1.", ("method", "fingerprint", "version")),
    Series("guard_events_total", "counter", "Events for flagged requests, by what became of them.", ("outcome",)),
    Series(
        "guard_quarantined_total",
        "counter",
        "Flagged images for the quarantine, by what became of them.",
        ("outcome",),
    ),
    Series("guard_quarantine_images", "gauge", "Flagged images that the quarantine holds.", source="watch"),
    Series("guard_quarantine_bytes", "gauge", "Their size on disk.", source="watch"),
    Series(
        "guard_attack_evidence",
        "gauge",
        "log10 of the capital of bets against clean traffic: at least 10^x clean images pass on average before x is "
        "reached.",
        source="watch",
    ),
    Series(
        "guard_class_evidence",
        "gauge",
        "The same for the images of one predicted class, less the price of having looked at each class.",
        ("predicted_class",),
        source="watch",
    ),
    Series(
        "guard_score_drift",
        "gauge",
        "By how much the scores of unflagged images differ from the clean set's beyond chance "
        "(Kolmogorov-Smirnov, 0 to 1).",
        source="watch",
    ),
    Series(
        "guard_input_drift",
        "gauge",
        "The same of the images' brightness or contrast.",
        ("feature",),
        source="watch",
    ),
)

SERIES = {series.name: series for series in TABLE}
