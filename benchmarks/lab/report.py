"""The results as a page: how well each attack took, each defence on it beside the published figures, and plots."""

from __future__ import annotations

import json
import statistics
from collections import defaultdict
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

import matplotlib

matplotlib.use("Agg")
from matplotlib import pyplot as plt

from benchmarks.lab.plans import OURS, Plan
from benchmarks.lab.store import Json, Store

PUBLISHED: Json = json.loads((Path(__file__).parent / "published.json").read_text())
Cells = dict[tuple[str, str], list[Json]]  # (case, defence) → its cells over seeds and draws


def write(plan: Plan, out: Path) -> Path:
    """``out``/report.md and its plots, from the JSON files in ``out``."""
    networks, cells = _of(plan, *Store(out, out).everything())
    by_case: Cells = defaultdict(list)
    for cell in cells:
        by_case[cell["case"], cell["defence"]].append(cell)
    plots = [name for name in (_repair_plot(plan, by_case, out), _detection_plot(plan, by_case, out)) if name]
    parts = [
        f"# {plan.title}",
        _setting(plan, networks, cells),
        "## The networks",
        _networks(networks),
        "## What each defence leaves of the attacks",
        "Per cent, mean ± standard deviation over networks and draws of D (n cells); in brackets what the paper has. "
        "ASR: triggered inputs answered as the attacker wants; PACC: with their true class; ACC: clean inputs answered "
        "with theirs. A refused input has no answer, and counts as neither." + _means(plan),
        *(f"### {title}\n\n{_repairs(plan, title, by_case)}" for title in _titles(plan)),
        "## How well flags tell triggered inputs from clean ones",
        "Over triggered inputs that fool the undefended network: AUROC, and TPR at the defence's own threshold, from D "
        "alone; *weak*: the trigger mixed with the image until it fools the network four times where the full "
        "one does five times.",
        _detection(plan, by_case),
        *(f"![{name}]({name})" for name in plots),
        "## What failed",
        _failures(networks, cells),
    ]
    path = out / "report.md"
    path.write_text("\n\n".join(part for part in parts if part) + "\n")
    return path


def _of(plan: Plan, networks: Sequence[Json], cells: Sequence[Json]) -> tuple[list[Json], list[Json]]:
    """Of what lies in the folder, which may have seen other plans, what this one asks for."""
    wanted = {case.name(seed): case.settings(seed) for case in plan.cases for seed in plan.seeds}
    known = {
        facts["network"]: facts
        for facts in networks
        if facts["network"] in wanted and wanted[facts["network"]].items() <= facts["settings"].items()
    }
    asked = [
        cell
        for cell in cells
        if cell["network"] in known
        and cell["settings"].get("weights", "") == known[cell["network"]].get("weights")
        and cell["settings"]["network"] == known[cell["network"]]["settings"]
        and cell["defence"] in plan.defences
        and cell["draw"] in plan.draws
        and plan.conditions.items() <= cell["settings"].items()
    ]
    return list(known.values()), asked


def _titles(plan: Plan) -> list[str]:
    return [case.title for case in plan.cases]


def _setting(plan: Plan, networks: Sequence[Json], cells: Sequence[Json]) -> str:
    made = [*_trained(networks), *(cell for cell in cells if "figures" in cell)]
    machines = sorted(
        {
            f"{row['hardware']['device']}, {row['hardware']['processor']}, {row['hardware']['cores']} cores"
            for row in made
        }
    )
    if not made:
        return "Nothing has been made."
    data = sorted({f"{one['settings']['data']} ({one['settings']['images']})" for one in networks})
    torch = sorted({row["versions"]["torch"] for row in made})
    seconds = sum(row["seconds"]["all"] for row in made)
    measured = "all other test images" if plan.evaluated is None else f"{plan.evaluated:,} other test images"
    return (
        f"Data: {', '.join(data)}. "
        f"D: {plan.per_class} test images a class ({len(plan.draws)} draws); everything is measured on {measured}. "
        f"{len(plan.seeds)} network(s) a case. Detectors may flag {plan.fpr:.1%} of clean inputs. "
        f"{'; '.join(machines)}; torch {', '.join(torch)}; {seconds / 60:.0f} task minutes in all."
    )


def _networks(networks: Sequence[Json]) -> str:
    rows = []
    for facts in _trained(networks):
        recipe = facts["settings"]["recipe"]
        rows.append(
            [
                facts["network"], _percent(facts["acc"]), _percent(facts["asr"]), _percent(facts["asr_known"]),
                _percent(facts["pacc"]), f"{facts['n']['clean']}, {facts['n']['triggered']}",
                str(facts["settings"]["per_class"]), _recipe(recipe), f"{facts['seconds']['training']:.0f}",
                facts["commit"],
            ]
        )  # fmt: skip
    head = [
        "network",
        "ACC",
        "ASR",
        "ASR of the known",
        "PACC",
        "n clean, triggered",
        "poisoned a class",
        "recipe",
        "s",
        "commit",
    ]
    return _table(head, rows)


def _trained(networks: Sequence[Json]) -> list[Json]:
    return [facts for facts in networks if "error" not in facts]


def _recipe(recipe: Json) -> str:
    tuned = f" after {recipe['base']['epochs']} clean ones" if "base" in recipe else ""
    return f"{recipe['network']}, width {recipe['width']}, stride {recipe['stride']}, {recipe['epochs']} epochs{tuned}"


def _repairs(plan: Plan, title: str, cells: Cells) -> str:
    rows = []
    for defence in plan.defences:
        found = [cell for cell in cells.get((title, defence), []) if "figures" in cell]
        if not found:
            rows.append([defence, _why(cells.get((title, defence), [])), "", "", "", "", ""])
            continue
        attacked = "full" in found[0]["figures"]
        rows.append(
            [
                defence,
                *(_full(plan, found, title, defence, key) if attacked else "" for key in ("asr", "pacc")),
                f"{_spread(cell['figures']['clean']['acc'] for cell in found)}{_printed(plan, title, defence, 'acc')}",
                _spread(cell["figures"]["weak"]["asr"] for cell in found) if attacked else "",
                f"{statistics.median(cell['seconds']['fit'] for cell in found):.0f}",
                str(len(found)),
            ]
        )  # fmt: skip
    return _table(["defence", "ASR", "PACC", "ACC", "ASR, weak trigger", "fit s", "n"], rows)


def _means(plan: Plan) -> str:
    """How many clean images the paper's figures were reached with."""
    images = PUBLISHED.get(plan.published, {}).get("images", {})
    given = ", ".join(f"{defence} {count}" for defence, count in images.items() if count)
    return (
        f" The paper's defences had, as we read its column of image counts, so many clean images a class: {given}."
        if given
        else ""
    )


def _full(plan: Plan, found: Sequence[Json], title: str, defence: str, key: str) -> str:
    return _spread(cell["figures"]["full"][key] for cell in found) + _printed(plan, title, defence, key)


def _detection(plan: Plan, cells: Cells) -> str:
    rows = []
    for title in _titles(plan):
        for defence in plan.defences:
            found = [cell["figures"] for cell in cells.get((title, defence), []) if "figures" in cell]
            if not found or found[0]["clean"]["fpr"] is None:
                continue
            row = [title, defence]
            for strength in ("full", "weak"):
                for key in ("auroc_successful", "tpr_successful"):
                    values = [figures[strength].get(key) for figures in found if strength in figures]
                    row.append(_spread(values) if values and None not in values else "")
            rows.append([*row, _spread(figures["clean"]["fpr"] for figures in found), str(len(found))])
    return _table(["attack", "detector", "AUROC", "TPR", "AUROC, weak", "TPR, weak", "FPR", "n"], rows)


def _failures(networks: Sequence[Json], cells: Sequence[Json]) -> str:
    lines = [f"- {one['network']}: not trained: {_last(one['error'])}" for one in networks if "error" in one]
    for cell in cells:
        where = f"{cell['network']}, {cell['defence']}, draw {cell['draw']}"
        if "error" in cell:
            lines.append(f"- {where}: {_last(cell['error'])}")
    refused = sorted({cell["network"] for cell in cells if "refused" in cell})
    lines += [f"- {network}: the attack did not take, no defence was judged on it" for network in refused]
    return "\n".join(lines) or "Nothing."


def _last(error: str) -> str:
    return error.strip().splitlines()[-1]


def _repair_plot(plan: Plan, cells: Cells, out: Path) -> str | None:
    """ASR and loss of ACC, a panel an attack, a dot a defence."""
    titles = [case.title for case in plan.cases if case.attack != "clean"]
    return _dots(
        plan, cells, titles, "full", "asr", "triggered inputs answered as the attacker wants (ASR)", out / "repairs.png"
    )


def _detection_plot(plan: Plan, cells: Cells, out: Path) -> str | None:
    titles = [case.title for case in plan.cases if case.attack != "clean"]
    return _dots(plan, cells, titles, "weak", "auroc_successful", "AUROC on weakened triggers", out / "detection.png")


def _dots(
    plan: Plan, cells: Cells, titles: Sequence[str], strength: str, key: str, label: str, path: Path
) -> str | None:
    shown = {}
    for title in titles:
        for defence in plan.defences:
            values = [
                c["figures"][strength][key] for c in cells.get((title, defence), []) if strength in c.get("figures", {})
            ]
            if values and None not in values:
                shown[title, defence] = values
    kept = [title for title in titles if any(case == title for case, _ in shown)]
    defences = [defence for defence in plan.defences if any(name == defence for _, name in shown)]
    if not kept:
        return None
    figure, panels = plt.subplots(
        1, len(kept), figsize=(2.2 + 1.9 * len(kept), 1.2 + 0.24 * len(defences)), sharey=True, squeeze=False
    )
    for panel, title in zip(panels[0], kept, strict=True):
        for height, defence in enumerate(reversed(defences)):
            values = shown.get((title, defence), [])
            colour = "#c2410c" if defence in OURS else "#475569"
            panel.plot(values, [height] * len(values), "o", color=colour, alpha=0.75, markersize=5)
        panel.set_title(title, fontsize=9)
        panel.set_xlim(-0.04, 1.04)
        panel.grid(axis="x", alpha=0.3)
        panel.set_yticks(range(len(defences)), list(reversed(defences)), fontsize=8)
        panel.tick_params(axis="x", labelsize=8)
    figure.supxlabel(label, fontsize=9)
    figure.tight_layout()
    figure.savefig(path, dpi=130)
    plt.close(figure)
    return path.name


def _why(cells: Sequence[Json]) -> str:
    if any("refused" in cell for cell in cells):
        return "the attack did not take"
    return "failed" if cells else "not run"


def _printed(plan: Plan, title: str, defence: str, key: str) -> str:
    """What the paper has in this cell, in brackets; empty where it has none."""
    table = PUBLISHED.get(plan.published, {"rows": {}, "cases": []})
    if defence not in table["rows"] or title not in table["cases"]:
        return ""
    value = table["rows"][defence][key][table["cases"].index(title)]
    return "" if value is None else f" ({' ± '.join(f'{number:.1f}' for number in value)})"


def _spread(values: Iterable[float]) -> str:
    found = [100.0 * value for value in values]
    mean = statistics.fmean(found)
    return f"{mean:.1f}" if len(found) < 2 else f"{mean:.1f} ± {statistics.stdev(found):.1f}"


def _percent(value: float | None) -> str:
    return "" if value is None else f"{100.0 * value:.1f}"


def _table(head: Sequence[str], rows: Sequence[Sequence[Any]]) -> str:
    lines = [head, ["---"] * len(head), *rows]
    return "\n".join("| " + " | ".join(str(value) for value in line) + " |" for line in lines)
