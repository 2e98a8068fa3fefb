"""Manifests and figures in lines for people."""

from __future__ import annotations

from typing import Any


def describe(manifest: dict[str, Any]) -> str:
    """A manifest in lines for people."""
    spec, fit_, threshold = manifest["input"], manifest["fit"], manifest["threshold"]
    accuracy = fit_["accuracy"]
    per_class = fit_["images_per_class"]
    lines = {
        "method": f"{manifest['method']}, {fit_['correction']['bounds']} bounds at {fit_['correction']['sites']} sites",
        "model": f"{len(manifest['classes'])} classes, fingerprint {manifest['fingerprint'][:16]}…",
        "input": f"{spec['channels']}×{spec['height']}×{spec['width']}, float32 in [0, 1] or uint8"
        + (f", normalised by mean {spec['mean']} and std {spec['std']} inside" if spec["mean"] else ""),
        "clean set": f"{fit_['images']} images, {_span(per_class)} a class",
        "accuracy there": f"{accuracy['original']:.1%} original, {accuracy['corrected']:.1%} corrected",
        "threshold": f"p < {threshold['p_value']:g}, a margin change above {threshold['score']:.3g} logits "
        f"({manifest['null']['kind']} law; p-values below {threshold['p_value_support']:.2g} are extrapolated)",
        "made": f"{manifest['created_at']} with torch {manifest['versions']['torch']}",
    }
    learning = fit_["correction"].get("learning")
    if learning:
        lines["learning"] = (
            f"{'converged' if learning['converged'] else 'did not converge'} in {learning['seconds']} s; "
            f"{learning['feasible_checks']} of {learning['checks']} checks kept the accuracy; largest margins "
            f"{learning['margin_at_start']:.2f} → {learning['margin'] or float('nan'):.2f} of the clean mean"
        )
    width = max(map(len, lines))
    return "\n".join(f"{key:<{width}}  {value}" for key, value in lines.items())


def table(figures: dict[str, Any]) -> str:
    """The figures of an evaluation in lines for people."""

    def share(value: float | None) -> str:
        return "     –" if value is None else f"{value:6.1%}"

    n, detection = figures["n"], figures["detection"]
    lines = [f"{'':<10}{'ACC':>7}{'ASR':>8}{'PACC':>8}"]
    for name in ("original", "corrected", "guarded"):
        row = figures[name]
        lines.append(f"{name:<10} {share(row['acc'])}  {share(row['asr'])}  {share(row['pacc'])}")
    lines.append(
        f"flagged: {detection['fpr']:.2%} of {n['clean']} clean images (nominal {detection['nominal_fpr']:.2%})"
    )
    if n["triggered"]:
        lines[-1] += f", {detection['tpr']:.1%} of {n['triggered']} triggered ones"
        successful = detection["auroc_successful"]
        lines.append(
            f"AUROC {detection['auroc']:.4f} over all triggered images, "
            + (
                "none of which was successful"
                if successful is None
                else f"{successful:.4f} over the {n['successful']} successful"
            )
        )
    return "\n".join(lines)


def _span(counts: list[int]) -> str:
    low, high = min(counts), max(counts)
    return str(low) if low == high else f"{low} to {high}"
