"""The laboratory end to end, on digits: networks are attacked, defences judged, nothing is done twice."""

from __future__ import annotations

import json
import multiprocessing
import shutil
from collections.abc import Callable, Iterator
from concurrent.futures import ProcessPoolExecutor
from contextlib import ExitStack
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from networks import digit_images

from benchmarks.lab.attacks import Goal
from benchmarks.lab.cells import TRIGGERED, defend, restored, took
from benchmarks.lab.data import SHIFTS, Dataset, split
from benchmarks.lab.defences import DEFENCES
from benchmarks.lab.defences.base import Task
from benchmarks.lab.defences.ours import undefended
from benchmarks.lab.plans import PLANS, Case, Plan
from benchmarks.lab.report import write
from benchmarks.lab.running import Run
from benchmarks.lab.store import Store
from benchmarks.lab.training import Recipe
from deployments.distributed import session
from guard.data import Data, as_float

pytestmark = pytest.mark.alone
RECIPE = Recipe(width=8, stride=1, epochs=6, batch=50, shift=1, mirror=False, dtype="float32")
PLAN = Plan(
    "Digits",
    (
        Case("clean", Goal(), 0, RECIPE),
        Case("badnet", Goal(), 20, RECIPE),
        Case("badnet", Goal(), 0, RECIPE, variant="unpoisoned"),
    ),
    ("undefended", "mmdf", "clp", "scale-up"),
    seeds=(0,),
    draws=(0, 1),
    per_class=15,
    evaluated=200,
    fpr=0.02,
)


def load() -> Dataset:
    found = digit_images()
    parts = (
        Data(found.images[rows], found.labels[rows], None, "digits") for rows in (slice(0, 1200), slice(1200, None))
    )
    return Dataset("digits", *parts, 10)


@pytest.fixture(scope="module")
def digits() -> Dataset:
    return load()


BESIDE = ExitStack()  # of the process beside, whose Ray stays open from run to run


def begin() -> None:
    BESIDE.enter_context(session())


def end() -> None:
    BESIDE.close()


def work(plan: Plan, store: Store) -> list[str]:
    said: list[str] = []
    Run(plan, load(), store, say=said.append)()
    return said


@pytest.fixture(scope="module")
def run() -> Iterator[Callable[[Plan, Store], list[str]]]:
    """Runs a plan, and gives back what it said. In a process beside: Serve's handles do not outlive a Ray that a
    process joined before (2.60), and other tests use them in this one."""
    with ProcessPoolExecutor(1, multiprocessing.get_context("spawn")) as beside:
        beside.submit(begin).result()
        yield lambda plan, store: beside.submit(work, plan, store).result()
        beside.submit(end).result()


@pytest.fixture(scope="module")
def ran(run: Callable[[Plan, Store], list[str]], tmp_path_factory: pytest.TempPathFactory) -> tuple[Store, list[str]]:
    """A run of the plan, and what it said."""
    folder = tmp_path_factory.mktemp("laboratory")
    store = Store(folder / "out", folder / "archive")
    return store, run(PLAN, store)


def test_every_cell_is_there_with_its_provenance(ran: tuple[Store, list[str]]) -> None:
    """Three networks, and for each four defences on two draws: figures, or why there are none."""
    networks, cells = ran[0].everything()
    assert [facts["network"] for facts in networks] == ["badnet-s0", "badnet-unpoisoned-s0", "clean-s0"]
    assert len(cells) == 3 * 4 * 2
    for cell in cells:
        assert ("figures" in cell) != ("refused" in cell)
        assert "error" not in cell
        assert cell["commit"]
    for made in (*networks, *(cell for cell in cells if "figures" in cell)):
        assert made["hardware"]["processor"]
        assert made["versions"]["torch"]
        assert made["seconds"]["all"] > 0


def test_an_attack_that_did_not_take_is_no_result(ran: tuple[Store, list[str]]) -> None:
    """The network that was not poisoned is marked, kept, and no defence is judged on it; the poisoned one took."""
    networks, cells = ran[0].everything()
    facts = {one["network"]: one for one in networks}
    assert facts["badnet-s0"]["asr"] > 0.9
    assert facts["badnet-unpoisoned-s0"]["asr"] < 0.2
    assert {cell["network"] for cell in cells if "refused" in cell} == {"badnet-unpoisoned-s0"}
    assert any("did not take" in line for line in ran[1])


def test_the_archive_is_the_network_that_was_judged(ran: tuple[Store, list[str]], digits: Dataset) -> None:
    """Weights read back give the accuracy and the attack's success that the facts tell."""
    case = PLAN.cases[1]
    store = ran[0]
    attacked = store.network("badnet-s0", store.everything()[0][0]["settings"])
    assert attacked is not None
    network = restored(attacked, case.recipe, 10)
    wanted = digits.test.labels != 9
    with torch.inference_mode():
        right = (network(as_float(digits.test.images)).argmax(1) == digits.test.labels).double().mean()
        moved = (network(as_float(attacked.tensors[TRIGGERED][wanted])).argmax(1) == 9).double().mean()
    assert float(right) == pytest.approx(attacked.facts["acc"])
    assert float(moved) == pytest.approx(attacked.facts["asr"])


def test_nothing_is_done_twice(ran: tuple[Store, list[str]], run: Callable[[Plan, Store], list[str]]) -> None:
    """A second run takes over everything; with one file gone it does that alone."""
    store, _ = ran
    lost = store.out / "cells" / "badnet-s0" / "mmdf-d1.json"
    before = {path: path.read_text() for path in store.out.rglob("*.json")}
    first = json.loads(lost.read_text())["figures"]
    lost.unlink()
    run(PLAN, store)
    changed = {path for path in store.out.rglob("*.json") if before[path] != path.read_text()}
    assert {path for path in changed if "refused" not in json.loads(path.read_text())} == {lost}
    assert json.loads(lost.read_text())["figures"] == first


def test_another_setting_is_another_cell(ran: tuple[Store, list[str]]) -> None:
    """What was made by other settings is not taken over."""
    store = ran[0]
    facts = store.everything()[0][0]
    assert store.network("badnet-s0", facts["settings"]) is not None
    assert store.network("badnet-s0", facts["settings"] | {"per_class": 21}) is None
    cell = json.loads((store.out / "cells" / "badnet-s0" / "mmdf-d1.json").read_text())
    assert store.cell("badnet-s0", "mmdf", 1, cell["settings"]) == cell
    assert cell["settings"]["weights"] == facts["weights"]
    for changed in ({"weights": "others"}, {"fpr": 0.01}, {"shift": "jpeg"}):
        assert store.cell("badnet-s0", "mmdf", 1, cell["settings"] | changed) is None


def test_data_are_told_apart_by_every_pixel_and_label(digits: Dataset) -> None:
    """One pixel or one label of the test images makes other data; the same data have the same fingerprint."""
    images, labels = digits.test.images.clone(), digits.test.labels.clone()
    images[3, 0, 2, 2] ^= 1
    labels[5] = (labels[5] + 1) % 10
    same = replace(digits, name="again")
    pixel = replace(digits, test=replace(digits.test, images=images))
    label = replace(digits, test=replace(digits.test, labels=labels))
    assert digits.fingerprint == same.fingerprint
    assert len({one.fingerprint for one in (digits, pixel, label)}) == 3


def test_the_page_is_of_its_plan_alone(ran: tuple[Store, list[str]], tmp_path: Path) -> None:
    """Cells of other draws, conditions or weights, and networks of other recipes, stay off the page."""
    shutil.copytree(ran[0].out, tmp_path, dirs_exist_ok=True)

    def n(plan: Plan) -> set[str]:
        text = write(plan, tmp_path).read_text().split("### badnet\n")[1].split("###")[0]
        return {line.rstrip(" |").split()[-1] for line in text.splitlines() if line.startswith("| mmdf")}

    assert n(PLAN) == {"2"}
    assert n(replace(PLAN, draws=(1,))) == {"1"}
    assert n(replace(PLAN, fpr=0.01)) == {"run"}  # as in "not run"
    longer = tuple(replace(case, recipe=replace(RECIPE, epochs=7)) for case in PLAN.cases)
    assert "badnet-s0" not in write(replace(PLAN, cases=longer), tmp_path).read_text()
    facts = tmp_path / "networks" / "badnet-s0.json"
    facts.write_text(json.dumps(json.loads(facts.read_text()) | {"weights": "others"}))
    assert n(PLAN) == {"run"}


def test_a_page_of_older_files_is_written(ran: tuple[Store, list[str]], tmp_path: Path) -> None:
    """Cells that do not say whose weights they judged stay off it; a figure that they lack is left empty."""
    shutil.copytree(ran[0].out, tmp_path, dirs_exist_ok=True)
    path = tmp_path / "cells" / "badnet-s0" / "mmdf-d0.json"
    cell = json.loads(path.read_text())
    for figures in cell["figures"].values():
        figures.pop("tpr_successful", None)
    path.write_text(json.dumps(cell))
    assert "| badnet | mmdf |" in write(PLAN, tmp_path).read_text()
    del cell["settings"]["weights"]
    path.write_text(json.dumps(cell))
    text = write(PLAN, tmp_path).read_text().split("### badnet\n")[1].split("###")[0]
    assert next(line for line in text.splitlines() if line.startswith("| mmdf")).rstrip(" |").endswith("1")


def test_a_network_that_cannot_be_trained_is_told(run: Callable[[Plan, Store], list[str]], tmp_path: Path) -> None:
    """With what it broke: the attack that is made with it, and no cell of either."""
    broken = replace(RECIPE, network="nothing")
    cases = (Case("clean", Goal(), 0, broken), Case("l2", Goal(), 20, broken))
    store = Store(tmp_path / "out", tmp_path / "archive")
    said = run(replace(PLAN, cases=cases), store)
    assert any(line.startswith("clean-s0: not trained: ") for line in said)
    text = write(replace(PLAN, cases=cases), store.out).read_text()
    assert "- clean-s0: not trained: " in text
    assert "- l2-s0: not trained: clean-s0, which its attack is made with, was not trained" in text
    assert not store.everything()[1]


def test_a_failing_defence_is_told_and_costs_nothing_else(
    ran: tuple[Store, list[str]], run: Callable[[Plan, Store], list[str]], tmp_path: Path
) -> None:
    """A cell that raises is kept with its error, named on the page, and tried again by the next run."""
    store = Store(tmp_path, ran[0].archive)
    plan = replace(PLAN, cases=PLAN.cases[:1], defences=("undefended", "nonsense"), draws=(0,))
    said = run(plan, store)
    cells = {cell["defence"]: cell for cell in store.everything()[1]}
    assert "figures" in cells["undefended"]
    assert "KeyError" in cells["nonsense"]["error"]
    assert any("nonsense: failed" in line for line in said)
    assert "clean-s0, nonsense, draw 0: KeyError" in write(plan, tmp_path).read_text()
    settings = cells["nonsense"]["settings"]
    assert store.cell("clean-s0", "nonsense", 0, settings) is None


def test_the_page_has_every_figure(ran: tuple[Store, list[str]]) -> None:
    """Each attack has its table with mean, deviation and n; one that did not take is named; plots are written."""
    path = write(PLAN, ran[0].out)
    text = path.read_text()
    _, cells = ran[0].everything()
    accuracies = [c["figures"]["clean"]["acc"] for c in cells if (c["case"], c["defence"]) == ("badnet", "mmdf")]
    mean = 100 * sum(accuracies) / len(accuracies)
    row = next(line for line in text.split("### badnet\n")[1].splitlines() if line.startswith("| mmdf"))
    assert f"{mean:.1f} ± " in row
    assert row.rstrip(" |").endswith("2")
    assert "- badnet-unpoisoned-s0: the attack did not take" in text
    assert {plot.name for plot in ran[0].out.glob("*.png")} == {"repairs.png", "detection.png"}


def test_d_and_what_is_measured_never_meet(digits: Dataset) -> None:
    """Draws of D have their images of each class and differ; the rest shares none with its D."""
    first, second = (split(digits.test.labels, 15, draw, 200) for draw in (0, 1))
    assert torch.bincount(digits.test.labels[first.clean]).tolist() == [15] * 10
    assert not set(first.clean.tolist()) & set(first.rest.tolist())
    assert set(first.clean.tolist()) != set(second.clean.tolist())
    assert len(first.rest) == 200


def test_a_cell_is_the_same_again(ran: tuple[Store, list[str]], digits: Dataset) -> None:
    """The same network, defence and draw give the same figures, here and in a task."""
    store = ran[0]
    networks, cells = store.everything()
    attacked = store.network("badnet-s0", networks[0]["settings"])
    assert attacked is not None
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        again = defend(PLAN.cases[1], attacked, digits, PLAN, "scale-up", 1)
    finally:
        torch.set_num_threads(threads)
    kept = next(c for c in cells if (c["network"], c["defence"], c["draw"]) == ("badnet-s0", "scale-up", 1))
    assert again["figures"] == kept["figures"]


def test_whether_an_attack_took() -> None:
    """Nine in ten of the inputs that the network knows, for at most three points of accuracy."""
    clean = {"acc": 0.80, "asr_known": None}
    assert took(clean, clean, 0.03)
    assert took({"acc": 0.771, "asr_known": 0.9}, clean, 0.03)
    assert not took({"acc": 0.769, "asr_known": 0.99}, clean, 0.03)
    assert not took({"acc": 0.80, "asr_known": 0.89}, clean, 0.03)


def test_every_plan_can_be_run() -> None:
    """Each plan names attacks and defences that there are, has a control for each recipe, and no two of its networks
    share a name."""
    for plan in PLANS.values():
        assert set(plan.defences) <= set(DEFENCES)
        controls = [case.recipe for case in plan.cases if case.attack == "clean"]
        assert len(set(controls)) == len(controls)
        assert {case.recipe.control for case in plan.cases} == set(controls)
        names = [case.name(seed) for case in plan.cases for seed in plan.seeds]
        assert len(set(names)) == len(names)


def test_the_defender_gets_d_as_the_plan_says(
    ran: tuple[Store, list[str]], digits: Dataset, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Five contaminated images of D bear the trigger and keep their label; a shift changes D and nothing else."""
    given: list[Task] = []
    monkeypatch.setitem(DEFENCES, "spy", lambda task: given.append(task) or undefended(task))
    store = ran[0]
    attacked = store.network("badnet-s0", store.everything()[0][0]["settings"])
    assert attacked is not None
    plans = (PLAN, replace(PLAN, contaminated=5), replace(PLAN, shift="bright"))
    figures = [defend(PLAN.cases[1], attacked, digits, plan, "spy", 0)["figures"] for plan in plans]
    plain, contaminated, bright = given
    changed = (plain.images != contaminated.images).flatten(1).any(1)
    rows = split(digits.test.labels, 15, 0).clean
    assert torch.equal(contaminated.images[:5], as_float(attacked.tensors[TRIGGERED][rows[:5]]))
    assert not changed[5:].any()
    assert torch.equal(plain.labels, contaminated.labels)
    assert torch.allclose(bright.images, (plain.images * 1.3).clamp(max=1.0), atol=0.003)
    assert figures[0] == figures[1] == figures[2]


def test_what_d_may_have_been_through() -> None:
    """JPEG moves pixels by little, and by more where there is detail; brightness is a factor, clipped at white."""
    flat, noisy = torch.full((2, 3, 16, 16), 90, dtype=torch.uint8), torch.randint(0, 256, (2, 3, 16, 16)).byte()
    assert torch.equal(SHIFTS["none"](noisy), noisy)
    assert (SHIFTS["jpeg"](flat).int() - flat.int()).abs().max() <= 2
    moved = (SHIFTS["jpeg"](noisy).float() - noisy.float()).abs().mean()
    assert 5 < float(moved) < 80
    assert SHIFTS["bright"](torch.tensor([100, 250]).byte()).tolist() == [130, 255]
    assert SHIFTS["dark"](torch.tensor([100]).byte()).tolist() == [70]
