"""Is somebody using a backdoor, and what passes through the guard?"""

from __future__ import annotations

from deployments.monitoring.dashboards.panels import Dashboard, Panel, Query
from deployments.monitoring.dashboards.promql import increase, latest, of, rate

FLAGGED = of("model:guard_flagged_images:ratio_rate5m")

NOW = (
    Panel(
        "Evidence now",
        "How unlikely the flags of late are as chance, as a power of ten. At 9 GuardAttackUnderWay rings: act as its "
        "runbook says.",
        (Query(latest("guard_attack_evidence")),),
        kind="stat",
        width=5,
        height=6,
        most=12,
        lines=(9,),
        runbook="GuardAttackUnderWay",
    ),
    Panel(
        "Flagged now",
        "Share of the images with a verdict in the last 5 minutes. Clean traffic has about the nominal false-positive "
        "ratio (guard-calibration); where it is far more, look at the evidence.",
        (Query(FLAGGED),),
        kind="stat",
        unit="percentunit",
        width=5,
        height=6,
    ),
    Panel(
        "Requests now",
        "Requests a second over the last 5 minutes, whatever became of them. None where some are due: ask the clients, "
        "then the endpoint.",
        (Query(of("model:guard_requests:rate5m")),),
        kind="stat",
        unit="reqps",
        width=5,
        height=6,
    ),
    Panel(
        "Alerts that fire",
        "The guard's own, of the chosen models and of Prometheus's view as a whole. The name leads to the runbook.",
        (
            Query(
                "max by (alertname, severity, model) "
                '(ALERTS{alertname=~"Guard.*", alertstate="firing", model=~"$model|"})',
                optional=True,
            ),
        ),
        kind="table",
        width=9,
        height=6,
        columns=("alertname", "severity", "model"),
        empty="No alert fires",
    ),
)

EVIDENCE = (
    Panel(
        "Evidence of an attack",
        "log10 of the capital of bets against clean traffic: at least 10^x clean images pass on average before x is "
        "reached. The line is where GuardAttackUnderWay rings.",
        (Query(latest("guard_attack_evidence")),),
        most=12,
        lines=(9,),
        runbook="GuardAttackUnderWay",
    ),
    Panel(
        "Evidence by class (top 5)",
        "The same of the images of one predicted class. An attack lifts one class, the attacker's; drift lifts many. "
        "The line is where GuardFlagsConcentrated rings.",
        (
            Query(
                f"topk(5, {latest('guard_class_evidence', 'predicted_class')})",
                "{{model}} {{predicted_class}}",
            ),
        ),
        most=12,
        lines=(6,),
        runbook="GuardFlagsConcentrated",
    ),
)

TRAFFIC = (
    Panel(
        "Requests by verdict",
        "flagged: at least one image is. error: no verdict, see guard-failures. skipped: left out of the sample that "
        "mode observe looks at.",
        (Query(rate("guard_requests_total", "verdict"), "{{model}} {{verdict}}"),),
        unit="reqps",
        width=8,
    ),
    Panel(
        "Images by verdict",
        "A request may hold many images; each has a verdict of its own.",
        (Query(rate("guard_inputs_total", "verdict"), "{{model}} {{verdict}}"),),
        unit="cps",
        width=8,
    ),
    Panel(
        "Flagged share",
        "Of the images with a verdict, over 5 minutes. A step up with evidence is an attack or drift; without, a "
        "change of threshold or artifact, or chance on few images.",
        (Query(FLAGGED),),
        unit="percentunit",
        width=8,
    ),
)

CLASSES = (
    Panel(
        "Flagged images by class (top 10)",
        "In the time shown, by the class that the original network chose. One bar far above the others: the class that "
        "an attacker may have chosen.",
        (
            Query(
                f"topk(10, {increase('guard_flagged_total', 'predicted_class')})",
                "{{model}} {{predicted_class}}",
            ),
        ),
        kind="bargauge",
        unit="none",
        runbook="GuardFlagsConcentrated",
    ),
    Panel(
        "Flagged share by class (top 5)",
        "Of the images of one predicted class, over 5 minutes. Under attack nearly all images of the attacker's class "
        "may be flagged; a rare class has a jumpy share.",
        (
            Query(
                f"topk(5, {of('model_predicted_class:guard_flagged_images:ratio_rate5m')})",
                "{{model}} {{predicted_class}}",
            ),
        ),
        unit="percentunit",
        most=1,
    ),
)

SERVING = (
    Panel(
        "Artifacts that serve",
        "Which fit answers. Two rows of one model are two nodes, or an update under way; longer than that, one node "
        "has an old artifact.",
        (Query(f"{latest('guard_artifact_info', 'method', 'version', 'fingerprint')} == 1"),),
        kind="table",
        width=16,
        height=6,
        columns=("model", "method", "version", "fingerprint"),
    ),
    Panel(
        "Requests by mode",
        "In the time shown. Modes observe and flag let a flagged image's label pass; reject and correct do not.",
        (Query(increase("guard_requests_total", "mode"), "{{model}} {{mode}}"),),
        kind="bargauge",
        unit="none",
        width=8,
        height=6,
    ),
)

OVERVIEW = Dashboard(
    "guard-overview",
    "Guard: overview",
    "Is somebody using a backdoor, and what passes through the guard?",
    (NOW, EVIDENCE, TRAFFIC, CLASSES, SERVING),
)
