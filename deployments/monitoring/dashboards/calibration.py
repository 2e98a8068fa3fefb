"""Is traffic still what the guard was fitted on?"""

from __future__ import annotations

from deployments.monitoring.dashboards.panels import Dashboard, Panel, Query
from deployments.monitoring.dashboards.promql import cells, latest, mean, of
from deployments.series import P_VALUES
from guard.evidence import POWER_TOLERANCE

SOON = "Known after some 300 images"

FIT = (
    Panel(
        "Days since calibration",
        "Age of the oldest artifact that serves. Fit the guard again on recent clean images when it gets old, or "
        "sooner where drift shows.",
        (Query(f"(time() - {latest('guard_calibrated_timestamp_seconds', how='min')}) / 86400"),),
        kind="stat",
        unit="d",
        width=8,
        height=5,
        lines=(90,),
        runbook="GuardCalibrationOld",
    ),
    Panel(
        "Threshold",
        "An image is flagged when its p-value is below this. Empty for the method bna, which has no p-values.",
        (Query(latest("guard_threshold")),),
        kind="stat",
        unit="none",
        width=8,
        height=5,
    ),
    Panel(
        "Nominal false-positive ratio",
        "Share of clean images that the threshold flags: what to expect of flags while nothing is wrong.",
        (Query(latest("guard_nominal_false_positive_ratio")),),
        kind="stat",
        unit="percentunit",
        width=8,
        height=5,
    ),
)


def _against_uniform(bound: float) -> Query:
    """How many times as many p-values up to ``bound`` as a uniform law would have."""
    up_to = of("guard_p_value_bucket", f'le="{bound}"')
    return Query(
        f"sum(increase({up_to}[$__range])) / sum(increase({of('guard_p_value_count')}[$__range])) / {bound}",
        f"p ≤ {bound}",
    )


FLAGS = (
    Panel(
        "Flagged share against nominal",
        "On clean traffic the two lie close together. Far more flags without evidence on one class: drift, so fit the "
        "guard again.",
        (
            Query(of("model:guard_flagged_images:ratio_rate5m"), "{{model}} flagged"),
            Query(latest("guard_nominal_false_positive_ratio"), "{{model}} nominal"),
        ),
        unit="percentunit",
        runbook="GuardScoreDrift",
    ),
    Panel(
        "P-values against uniform",
        "How many times as many images have a p-value up to the bound as clean ones would, in the time shown: 1 all "
        "the way down is a good fit. More at the smallest alone: images that bear a trigger. More at all: drift. "
        "Red is more than the evidence allows for; at the smallest bounds it takes thousands of images to mean "
        "something. Empty for the method bna.",
        tuple(_against_uniform(bound) for bound in P_VALUES if 0.001 <= bound < 1),
        kind="bargauge",
        lines=(POWER_TOLERANCE,),
    ),
)

DRIFT = (
    Panel(
        "Score drift",
        "By how much the scores of unflagged images differ from the clean set's beyond chance, 0 to 1. Above the line "
        "p-values are off: find out what changed in the images, then fit the guard again.",
        (Query(latest("guard_score_drift")),),
        lines=(0.05,),
        runbook="GuardScoreDrift",
        empty=SOON,
    ),
    Panel(
        "Input drift",
        "The same of the images' brightness and contrast. Above the line: another camera, light or preprocessing. It "
        "explains a score drift that comes with it.",
        (Query(latest("guard_input_drift", "feature"), "{{model}} {{feature}}"),),
        lines=(0.1,),
        runbook="GuardInputDrift",
        empty=SOON,
    ),
)

INPUTS = tuple(
    Panel(
        f"{feature.title()}, mean",
        f"{meaning}, averaged over images. A step is a change of camera, light or preprocessing.",
        (Query(mean(f"guard_input_{feature}")),),
        unit="none",
        least=None,
        runbook="GuardInputDrift",
    )
    for feature, meaning in (
        ("brightness", "Mean over an image's values, in [0, 1]"),
        ("contrast", "Standard deviation of an image's values"),
    )
)

SCORES = (
    Panel(
        "Scores of $model",
        "How many images have which score; larger is more suspicious. Clean images make one band. A second band far "
        "above it is images that bear a trigger; a band that moves as a whole is drift.",
        (Query(cells("guard_score"), "{{le}}"),),
        kind="heatmap",
        height=9,
        each_model=True,
    ),
)

CALIBRATION = Dashboard(
    "guard-calibration",
    "Guard: calibration",
    "Is traffic still what the guard was fitted on?",
    (FIT, FLAGS, DRIFT, INPUTS, SCORES),
)
