"""``guard demo``."""

from __future__ import annotations

import json
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import click

from deployments.proxies import free_port
from deployments.signals import interrupt_on_signals, until_interrupted
from guard.cli.options import json_option
from guard.progress import bars


@click.command()
@json_option
@click.option("--report", type=click.Path(file_okay=False, path_type=Path), metavar="DIR", help="Write an HTML report.")
@click.option("--keep", is_flag=True, help="Leave the endpoint up until Ctrl-C, and print a curl line.")
@click.option("--port", type=click.IntRange(0, 65535), default=0, help="Of the endpoint.  [default: a free one]")
@click.option("--seed", default=0, show_default=True, help="Of the split, the patch and the training.")
def demo(json_path: str | None, report: Path | None, keep: bool, port: int, seed: int) -> None:
    """The whole story on an embedded default, in about two minutes.

    Trains a small residual network on poisoned digits, fits the guard on clean ones, serves it with Ray Serve, sends
    clean and triggered images over HTTP, and compares with the endpoint as it was before.
    """
    begun = time.perf_counter()
    with tempfile.TemporaryDirectory(prefix="guard-demo-") as scratch:
        _run(Path(scratch), json_path, report, keep, port or free_port(), seed, begun)


def _run(
    scratch: Path, json_path: str | None, report: Path | None, keep: bool, port: int, seed: int, begun: float
) -> None:
    from deployments.config import ModelConfig, ServeConfig
    from deployments.demo import story, traffic
    from deployments.document import document
    from deployments.serve import running

    interrupt_on_signals()
    prepared = story.prepare(scratch, seed=seed, progress=bars)
    _say("start Ray Serve")
    config = ServeConfig(models=(ModelConfig(artifact=prepared.artifact, name="digits"),))
    with running(document(config, host="127.0.0.1", port=port)) as server:
        url = server.url
        from ray import serve

        from deployments.demo import bare

        serve.run(bare.build(prepared.artifact / "program.pt2"), name="bare", route_prefix="/bare")
        result = story.attack(url, f"{url}/bare", prepared, bars)
        serve.delete("bare")
        if json_path and json_path != "-":
            Path(json_path).write_text(json.dumps(result.figures, indent=2) + "\n")
        if json_path == "-":
            click.echo(json.dumps(result.figures, indent=2))
        else:
            click.echo(_table(result.figures))
        if report is not None:
            from deployments.demo.report import write

            click.echo(f"report: {write(report, prepared, result)}", err=True)
        _say(f"done in {time.perf_counter() - begun:.0f} s")
        if keep:
            picture = (report or scratch) / "triggered.png"
            picture.write_bytes(traffic.png(prepared.triggered.images[0]))
            line = f"try: curl -s -H 'content-type: image/png' --data-binary @{picture.resolve()} {url}/classify"
            click.echo(line, err=json_path == "-")
            _say("the endpoint stays up until Ctrl-C")
            until_interrupted()
            _say("shutting down")
    missed = story.shortfalls(result.figures)
    for sentence in missed:
        _say(sentence)
    if missed:
        sys.exit(1)


def _table(figures: dict[str, Any]) -> str:
    latency, detection, n = figures["latency"], figures["detection"], figures["n"]
    lines = [f"{'':<18}{'ACC':>8}{'ASR':>8}{'PACC':>8}{'p50':>10}{'p99':>10}"]
    for title, key, times in (("without the guard", "original", "bare"), ("with the guard", "guarded", "guarded")):
        shares = "".join(f"{figures[key][name]:8.1%}" for name in ("acc", "asr", "pacc"))
        lines.append(f"{title:<18}{shares}{latency[times]['p50']:7.1f} ms{latency[times]['p99']:7.1f} ms")
    added = {name: latency["guarded"][name] - latency["bare"][name] for name in ("p50", "p99")}
    lines.append(f"{'added':<42}{added['p50']:+7.1f} ms{added['p99']:+7.1f} ms")
    lines.append(
        f"flagged: {detection['tpr']:.1%} of {n['triggered']} triggered images (TPR), "
        f"{detection['fpr']:.1%} of {n['clean']} clean ones (FPR; nominal {detection['nominal_fpr']:.1%})"
    )
    return "\n".join(lines)


def _say(sentence: str) -> None:
    click.echo(f"demo: {sentence}", err=True)
