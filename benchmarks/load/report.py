"""The figures of a load run as a page of tables and two plots."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

Row = dict[str, Any]


def write(folder: Path, figures: dict[str, Any]) -> Path:
    """``load.json``, ``report.md`` and the plots in ``folder``; the path of the page."""
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "load.json").write_text(json.dumps(figures, indent=2) + "\n")
    for kind in ("closed", "open"):
        _plot(folder / f"{kind}.png", [row for row in figures["rows"] if row["kind"] == kind])
    page = folder / "report.md"
    page.write_text(text(figures))
    return page


def text(figures: dict[str, Any]) -> str:
    """The page, in Markdown."""
    about = figures["hardware"]
    lines = [
        "# Load",
        "",
        f"`{figures['command']}` on {about['processor']}, {about['cores']} cores, load {about['load']:.1f} before; "
        f"proxy {figures['proxy']}; ResNet-18, 3×64×64, one UINT8 image a request, binary tensors. Locust on the same "
        "machine. Medians over the rounds, least to largest in brackets; ratios are within a round.",
        "",
    ]
    for kind, title, column in (
        ("closed", "Closed loop", "clients"),
        ("open", "Open loop, Poisson arrivals", "requests/s"),
    ):
        rows = [row for row in figures["rows"] if row["kind"] == kind]
        lines += [
            f"## {title}",
            "",
            f"| {column} | endpoint | n | p50 | p90 | p95 | p99 | over bare, p50 | over bare, p99 | requests/s "
            "| CPU a request | failed |",
            "|---|---|---|---|---|---|---|---|---|---|---|---|",
            *(_line(row) for row in rows),
            "",
            f"![{title}]({kind}.png)",
            "",
        ]
    lines += [
        "## Where the time goes",
        "",
        "Mean milliseconds a request in a stage of the guard, closed loop with one client.",
        "",
        "| endpoint | " + " | ".join(figures["stages"]["flag"]) + " |",
        "|" + "---|" * (1 + len(figures["stages"]["flag"])),
        *(
            f"| {system} | " + " | ".join(f"{value:.2f}" for value in stages.values()) + " |"
            for system, stages in figures["stages"].items()
        ),
        "",
        "## Without any network",
        "",
        "`GET /v2/health/live` through the ingress, and a route that does nothing on uvicorn alone (one client): p50 "
        "{ingress:.2f} and {uvicorn:.2f} ms, ratio {ratio:.1f}.".format(**figures["noop"]),
        "",
    ]
    return "\n".join(lines)


def _line(row: Row) -> str:
    def spread(name: str) -> str:
        values = sorted(row[name])
        return f"{values[len(values) // 2]:.2f} ({values[0]:.2f}-{values[-1]:.2f})"

    times = " | ".join(f"{row[name]:.1f} ms" for name in ("p50", "p90", "p95", "p99"))
    return (
        f"| {row['load']:g} | {row['system']} | {row['n']} | {times} | {spread('ratio_p50')} | {spread('ratio_p99')} "
        f"| {row['throughput']:.1f} | {row['cpu_ms']:.1f} ms | {row['failed']} |"
    )


def _plot(path: Path, rows: list[Row]) -> None:
    if not rows:
        return
    import matplotlib

    matplotlib.use("agg")
    from matplotlib import pyplot

    loads = sorted({row["load"] for row in rows})
    systems = list(dict.fromkeys(row["system"] for row in rows))
    unit = "clients" if rows and rows[0]["kind"] == "closed" else "requests/s"
    figure, axes = pyplot.subplots(1, len(loads), figsize=(4 * len(loads), 3.6), layout="constrained", squeeze=False)
    for axis, load in zip(axes[0], loads, strict=True):
        for index, name in enumerate(("p50", "p99")):
            heights = [
                next(row[name] for row in rows if (row["system"], row["load"]) == (one, load)) for one in systems
            ]
            axis.bar([place + 0.4 * index for place in range(len(systems))], heights, width=0.4, label=name)
        axis.set_xticks([place + 0.2 for place in range(len(systems))], systems)
        axis.set_title(f"{load:g} {unit}")
        axis.set_ylabel("ms")
        axis.grid(axis="y", alpha=0.3)
    axes[0][0].legend()
    figure.savefig(path, dpi=120)
    pyplot.close(figure)
