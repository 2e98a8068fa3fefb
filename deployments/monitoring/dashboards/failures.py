"""What fails, and what becomes of flagged requests?"""

from __future__ import annotations

from deployments.monitoring.dashboards.panels import Dashboard, Panel, Query
from deployments.monitoring.dashboards.promql import increase, latest, of, rate

FAILURES = "model_outcome:guard_failures:ratio_rate5m"
ERRORS = "model:guard_request_errors:ratio_rate"
BY_NODE = "{{model}} {{instance}}"

VERDICTS = (
    Panel(
        "Answered unguarded (failing open)",
        "Share of the requests due a verdict that were answered without one, over 5 minutes. One is worth a look: "
        "whoever can make the corrected network fail has a way around the guard. Above the line it is critical.",
        (Query(of(FAILURES, 'outcome="open"')),),
        unit="percentunit",
        width=8,
        lines=(0.05,),
        runbook="GuardFailingOpen",
    ),
    Panel(
        "Refused (failing closed)",
        "Share of the requests due a verdict that got an error because a stage failed, over 5 minutes. Above the line "
        "it is critical: clients are without answers.",
        (Query(of(FAILURES, 'outcome="closed"')),),
        unit="percentunit",
        width=8,
        lines=(0.05,),
        runbook="GuardRefusing",
    ),
    Panel(
        "Failures by stage and outcome",
        "In the time shown: which stage to look at. original, upstream: the classifier itself. queue: no place, or no "
        "time left. corrected, statistic: the guard.",
        (Query(increase("guard_failures_total", "stage", "outcome"), "{{model}} {{stage}} {{outcome}}"),),
        kind="bargauge",
        unit="none",
        width=8,
        runbook="GuardRefusing",
    ),
)

REQUESTS = (
    Panel(
        "Requests without a verdict",
        "Errors a second, whoever was to blame: also unreadable requests, and clients that went away.",
        (Query(rate("guard_requests_total", where='verdict="error"')),),
        unit="reqps",
        runbook="GuardErrorBudget",
    ),
    Panel(
        "Share of errors, by window",
        "GuardErrorBudget rings where 5 minutes and 1 hour are above the upper line, or 30 minutes and 6 hours above "
        "the lower one: the budget of an objective of 99% then lasts two days, or five.",
        tuple(Query(of(f"{ERRORS}{window}"), f"{{{{model}}}} {window}") for window in ("5m", "30m", "1h", "6h")),
        unit="percentunit",
        lines=(0.06, 0.144),
        runbook="GuardErrorBudget",
    ),
)

FLAGGED = (
    Panel(
        "Flagged images, corrected or rejected",
        "Answered by the corrected network (mode correct), or without a label (mode reject). Both are zero in modes "
        "observe and flag.",
        (
            Query(rate("guard_corrected_total"), "{{model}} corrected"),
            Query(rate("guard_rejected_total"), "{{model}} rejected"),
        ),
        unit="cps",
    ),
    Panel(
        "Events by outcome",
        "Of flagged requests. dropped: the queue was full, or the server ended. failed: the sink did not take it. "
        "Either way somebody does not hear of a flagged request; answers are not affected. All zero where no events "
        "are configured.",
        (Query(rate("guard_events_total", "outcome"), "{{model}} {{outcome}}"),),
        unit="cps",
        runbook="GuardEventsDropped",
    ),
)

QUARANTINE = (
    Panel(
        "Images for the quarantine",
        "Flagged images, by what became of them. dropped or failed: they are not kept; the endpoint's log says why. "
        "All zero without a quarantine.",
        (Query(rate("guard_quarantined_total", "outcome"), "{{model}} {{outcome}}"),),
        unit="cps",
        width=8,
    ),
    Panel(
        "Images in the quarantine",
        "What there is to look at, as each node sees it. A flat top is the configured limit: the oldest images make "
        "room.",
        (Query(latest("guard_quarantine_images", "instance"), BY_NODE, optional=True),),
        unit="none",
        width=8,
        empty="No quarantine is configured",
    ),
    Panel(
        "Size of the quarantine",
        "On disk, as each node sees it. Growing towards the configured limit is usual.",
        (Query(latest("guard_quarantine_bytes", "instance"), BY_NODE, optional=True),),
        unit="bytes",
        width=8,
        empty="No quarantine is configured",
    ),
)

NODES = (
    Panel(
        "Nodes that answer Prometheus",
        "Every node that is to be watched. Down: what it answers, nobody watches.",
        (Query('up{job=~".*guard.*"}', "{{instance}}"),),
        kind="stat",
        width=24,
        height=5,
        names=((0, "down", "red"), (1, "up", "green")),
        runbook="GuardNoData",
    ),
)

FAILING = Dashboard(
    "guard-failures",
    "Guard: failures",
    "What fails, and what becomes of flagged requests?",
    (VERDICTS, REQUESTS, FLAGGED, QUARANTINE, NODES),
)
