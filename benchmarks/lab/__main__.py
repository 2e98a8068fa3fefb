"""The laboratory's commands."""

from __future__ import annotations

from pathlib import Path

import click

from benchmarks.lab.data import load
from benchmarks.lab.plans import PLANS
from benchmarks.lab.report import write
from benchmarks.lab.running import Run
from benchmarks.lab.store import Store
from guard.errors import GuardError
from guard.progress import bars

RESULTS = Path("benchmarks/results")
ARCHIVE = Path("benchmarks/archive")


@click.group(help=__doc__)
def main() -> None:
    """Attacks × defences, trained, judged, tabled."""


@main.command()
def plans() -> None:
    """What there is to run."""
    for name, plan in PLANS.items():
        cells = len(plan.cases) * len(plan.seeds) * len(plan.defences) * len(plan.draws)
        click.echo(f"{name:20} {plan.title}\n{'':20} {len(plan.cases) * len(plan.seeds)} networks, {cells} cells")


@main.command()
@click.argument("plan", type=click.Choice(sorted(PLANS)))
@click.option(
    "--data", required=True, help="A tar or folder with train/CLASS and test/CLASS, or torchvision:DATASET:ROOT."
)
@click.option("--out", type=click.Path(file_okay=False, path_type=Path), help=f"Default: {RESULTS}/PLAN.")
@click.option("--archive", type=click.Path(file_okay=False, path_type=Path), default=ARCHIVE, show_default=True)
@click.option("--gpus", default=0.0, show_default=True, help="Of each task; 0.25 lets four share one.")
@click.option("--again", is_flag=True, help="Do what is done once more.")
def run(plan: str, data: str, out: Path | None, archive: Path, gpus: float, again: bool) -> None:
    """Train and judge what PLAN names and is not there yet, then write the report."""
    try:
        dataset = load(data, progress=bars)
    except GuardError as error:
        raise click.UsageError(str(error)) from error
    out = out or RESULTS / (f"{plan}-{dataset.name}" if PLANS[plan].by_data else plan)
    from tqdm import tqdm

    Run(PLANS[plan], dataset, Store(out, archive), gpus=gpus, again=again, say=tqdm.write, progress=bars)()
    click.echo(f"report: {write(PLANS[plan], out)}")


@main.command()
@click.argument("plan", type=click.Choice(sorted(PLANS)))
@click.option("--out", type=click.Path(exists=True, file_okay=False, path_type=Path), help=f"Default: {RESULTS}/PLAN.")
def report(plan: str, out: Path | None) -> None:
    """Write the report of what is there, without running anything."""
    if out is None and PLANS[plan].by_data:
        raise click.UsageError(f"--out: {plan} has a folder for each data set: {RESULTS}/{plan}-DATASET.")
    click.echo(f"report: {write(PLANS[plan], out or RESULTS / plan)}")


if __name__ == "__main__":
    main()
