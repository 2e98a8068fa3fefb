"""A plan, run: networks are trained and defences judged as Ray tasks, each as soon as what it needs is there.

On one machine or on the cluster at RAY_ADDRESS, which is sent this code. What a run has finished, the next one
does not do again.
"""

from __future__ import annotations

import traceback
from collections.abc import Callable, Iterator
from typing import Any

import torch

import benchmarks
from benchmarks import record
from benchmarks.lab.attacks import ATTACKS
from benchmarks.lab.cells import Attacked, attack, defend, settings_of, took
from benchmarks.lab.data import Dataset
from benchmarks.lab.plans import Case, Plan
from benchmarks.lab.store import Json, Store
from deployments.distributed import session
from guard.progress import Progress, silent

CLEAN = "clean"
Say = Callable[[str], None]
Key = tuple[Case, int]


class Run:
    """One run of ``plan`` on ``data`` into ``store``. gpus: of a task; 0 computes on the processor, a thread a task.

    again: nothing that was finished before is taken over. say: takes a line for people about each thing done.
    """

    def __init__(
        self,
        plan: Plan,
        data: Dataset,
        store: Store,
        *,
        gpus: float = 0.0,
        again: bool = False,
        say: Say = lambda line: None,
        progress: Progress = silent,
    ) -> None:
        self.plan, self.data, self.store, self.again, self.say, self.progress = plan, data, store, again, say, progress
        self._gpus = gpus
        self._commit = record.commit()
        self._controls = {case.recipe: case for case in plan.cases if case.attack == CLEAN}
        lone = [case.title for case in plan.cases if case.recipe.control not in self._controls]
        if lone:
            raise ValueError(f"plan: {', '.join(lone)}: expected a case without attack of the same recipe beside it")
        self._waiting: list[Key] = [(case, seed) for seed in plan.seeds for case in plan.cases]
        self._networks: dict[Key, Attacked] = {}
        self._running: dict[Any, tuple[Any, ...]] = {}

    def __call__(self) -> None:
        """Run everything that is missing. A cell that fails is kept as such, and the others go on."""
        total = len(self._waiting) * (1 + len(self.plan.defences) * len(self.plan.draws))
        with session(benchmarks) as ray, self.progress("networks and cells", total) as advance:
            options = {"num_cpus": 1, "num_gpus": self._gpus}
            self._ray = ray
            self._attack = ray.remote(**options)(_attack)
            self._defend = ray.remote(**options)(_defend)
            self._shared = ray.put(self.data)
            self._advance = advance
            self._start_networks()
            while self._running:
                done, _ = ray.wait(list(self._running))
                try:
                    result = ray.get(done[0])
                except ray.exceptions.RayError as error:  # the worker died; the others go on
                    result = f"{type(error).__name__}: {error}"
                self._finished(*self._running.pop(done[0]), result)
                self._start_networks()

    def _start_networks(self) -> None:
        """Begin what needs nothing that is still missing."""
        for key in list(self._waiting):
            case, seed = key
            needed = self._needs(key)
            surrogate = None if needed is None else self._networks.get(needed)
            if needed is not None and surrogate is None:
                continue
            self._waiting.remove(key)
            known = None if self.again else self.store.network(case.name(seed), settings_of(case, seed, self.data))
            if known is not None:
                self.store.list_network(case.name(seed), known.facts)
                self._trained(key, known, "known")
            else:
                task = self._attack.remote(case, seed, self._shared, surrogate)
                self._running[task] = ("network", key)

    def _finished(self, kind: str, *rest: Any) -> None:
        *key, result = rest
        if kind == "network":
            (network,) = key
            if isinstance(result, str):
                self._lost(network, result)
            else:
                kept = Attacked(result.facts | {"commit": self._commit}, result.tensors)
                self.store.keep_network(network[0].name(network[1]), kept)
                self._trained(network, kept, "trained")
        else:
            case, seed, defence, draw = key
            cell = {"error": result} if isinstance(result, str) else result
            self._keep(case, seed, defence, draw, cell)

    def _trained(self, key: Key, attacked: Attacked, how: str) -> None:
        self._networks[key] = attacked
        facts = attacked.facts
        rates = "" if facts["asr"] is None else f", ASR {facts['asr']:.1%} ({facts['asr_known']:.1%} of the known)"
        self.say(f"{facts['network']}: {how}, ACC {facts['acc']:.1%}{rates}")
        self._advance(1)
        case, seed = key
        control = self._controls[case.recipe.control]
        if case is control:
            ready = [other for other in self._networks if other[1] == seed and other[0].recipe.control == case.recipe]
        else:
            ready = [key] if (control, seed) in self._networks else []
        for other in ready:
            self._start_cells(*other)

    def _start_cells(self, case: Case, seed: int) -> None:
        attacked, clean = self._networks[case, seed], self._networks[self._controls[case.recipe.control], seed]
        fit_for_judgement = took(attacked.facts, clean.facts, self.plan.costs)
        if not fit_for_judgement:
            self.say(f"{case.name(seed)}: the attack did not take; no defence is judged on it")
        shared = None
        for draw, defence in self._wanted():
            settings = self._settings(case, seed, defence, draw)
            if not fit_for_judgement:
                self._keep(case, seed, defence, draw, {"refused": "the attack did not take"})
            elif not self.again and self.store.cell(case.name(seed), defence, draw, settings) is not None:
                self._advance(1)
            else:
                shared = shared or self._ray.put(attacked)
                task = self._defend.remote(case, shared, self._shared, self.plan, defence, draw)
                self._running[task] = ("cell", case, seed, defence, draw)

    def _keep(self, case: Case, seed: int, defence: str, draw: int, cell: Json) -> None:
        name = case.name(seed)
        head = {"network": name, "case": case.title, "seed": seed, "defence": defence, "draw": draw}
        head["settings"] = self._settings(case, seed, defence, draw)
        self.store.keep_cell(name, defence, draw, {**head, **cell, "commit": self._commit})
        if "error" in cell:
            self.say(f"{name}, {defence}: failed: {cell['error'].strip().splitlines()[-1]}")
        self._advance(1)

    def _lost(self, key: Key, error: str) -> None:
        """A network that could not be trained, with all that hangs on it."""
        case, seed = key
        facts = {"network": case.name(seed), "settings": settings_of(case, seed, self.data), "error": error}
        self.store.list_network(case.name(seed), facts | {"commit": self._commit})
        self.say(f"{case.name(seed)}: not trained: {error.strip().splitlines()[-1]}")
        cells = len(self.plan.defences) * len(self.plan.draws)
        self._advance(1 + cells)
        if case is not self._controls[case.recipe.control]:
            return
        for other in [other for other in self._waiting if self._needs(other) == key]:
            self._waiting.remove(other)
            self._lost(other, f"{case.name(seed)}, which its attack is made with, was not trained")

    def _needs(self, key: Key) -> Key | None:
        """The network that an attack is made with."""
        case, seed = key
        wanted = ATTACKS[case.attack].surrogate or case.recipe.base is not None
        return (self._controls[case.recipe.control], seed) if wanted else None

    def _wanted(self) -> Iterator[tuple[int, str]]:
        return ((draw, defence) for draw in self.plan.draws for defence in self.plan.defences)

    def _settings(self, case: Case, seed: int, defence: str, draw: int) -> Json:
        """What a cell is a function of."""
        facts = self._networks[case, seed].facts
        network = {"network": facts["settings"], "weights": facts["weights"]}
        return {**network, "defence": defence, "draw": draw, **self.plan.conditions}


def _attack(case: Case, seed: int, data: Dataset, surrogate: Attacked | None) -> Attacked | str:
    torch.set_num_threads(1)
    try:
        return attack(case, seed, data, surrogate)
    except Exception:
        return traceback.format_exc()


def _defend(case: Case, attacked: Attacked, data: Dataset, plan: Plan, defence: str, draw: int) -> Json | str:
    torch.set_num_threads(1)
    try:
        return defend(case, attacked, data, plan, defence, draw)
    except Exception:
        return traceback.format_exc()
