"""How long do answers take, and how much of it is the guard's doing?"""

from __future__ import annotations

from deployments.monitoring.dashboards.panels import Dashboard, Panel, Query
from deployments.monitoring.dashboards.promql import cells, latest, mean, of, quantile, rate

STAGE = "guard_stage_seconds"
P50, P99 = "model_stage:guard_stage_seconds:p50_rate5m", "model_stage:guard_stage_seconds:p99_rate5m"
TOTAL, ORIGINAL, CORRECTED = 'stage="total"', 'stage=~"original|upstream"', 'stage="corrected"'

REQUESTS = (
    Panel(
        "Time of a request",
        "From the body's arrival to the answer, without the proxy in front. The line is GuardLatencyBudget's: the p99 "
        "of 5 minutes above it for 10 minutes rings.",
        tuple(Query(quantile(share, STAGE, TOTAL), f"{{{{model}}}} p{share * 100:g}") for share in (0.5, 0.95, 0.99)),
        unit="s",
        lines=(0.5,),
        runbook="GuardLatencyBudget",
    ),
    Panel(
        "Times of requests",
        "How many requests took how long, all chosen models together. Two bands are two kinds of request, such as few "
        "images and many; a band that climbs is a queue.",
        (Query(cells(STAGE, TOTAL), "{{le}}"),),
        kind="heatmap",
        unit="s",
    ),
)

STAGES = (
    Panel(
        "Stages, p50",
        "decode and total are of a request, queue of its wait for a pass, original and corrected of a pass. The "
        "original runs here (original) or elsewhere (upstream): the other one stays empty.",
        (Query(of(P50), "{{model}} {{stage}}"),),
        unit="s",
    ),
    Panel(
        "Stages, p99",
        "The slowest in a hundred. Where total is slow, the stage that is slow as well says why.",
        (Query(of(P99), "{{model}} {{stage}}"),),
        unit="s",
        runbook="GuardLatencyBudget",
    ),
)

COST = (
    Panel(
        "What the guard adds",
        "Mean time of a request less the mean time of the original network: the corrected network's lead over it, and "
        "also decoding and queueing, which any endpoint has. In mode observe the verdict comes after the answer and "
        "adds nothing.",
        (Query(f"{mean(STAGE, TOTAL)} - {mean(STAGE, ORIGINAL)}"),),
        unit="s",
        least=None,
    ),
    Panel(
        "Corrected network against original",
        "How many times as long the corrected network takes, p99. Around 1 is usual. Above the line, and above 0.1 s, "
        "GuardBranchLate rings: requests wait for it, or go unguarded.",
        (Query(f"{latest(P99, where=CORRECTED)} / {latest(P99, where=ORIGINAL)}"),),
        lines=(3,),
        runbook="GuardBranchLate",
    ),
)

WHERE = (
    Panel(
        "Share of time by stage",
        "Of the time spent in stages, which one has it. original and corrected run side by side, and a pass serves a "
        "whole batch: a share says what to speed up first, not what a request waits for. Much queue: add replicas.",
        (Query(rate(f"{STAGE}_sum", "stage", where='stage!="total"'), "{{model}} {{stage}}"),),
        unit="s",
        width=8,
        shares=True,
    ),
    Panel(
        "Images in a pass",
        "Batches form under load. A mean at the configured max_batch_size says that replicas are busy all the time.",
        (
            Query(mean("guard_batch_size"), "{{model}} mean"),
            Query(quantile(0.99, "guard_batch_size"), "{{model}} p99"),
        ),
        width=8,
    ),
    Panel(
        "Wait for a pass",
        "Time in the queue. Far above the time of a pass: requests come faster than replicas answer.",
        tuple(
            Query(quantile(share, STAGE, 'stage="queue"'), f"{{{{model}}}} p{share * 100:g}") for share in (0.5, 0.99)
        ),
        unit="s",
        width=8,
        runbook="GuardLatencyBudget",
    ),
)

LATENCY = Dashboard(
    "guard-latency",
    "Guard: latency",
    "How long do answers take, and how much of it is the guard's doing?",
    (REQUESTS, STAGES, COST, WHERE),
)
