"""What is run: attacked networks, defences and draws, one plan a table. Every plan is a command: ``python -m
benchmarks.lab``."""

from __future__ import annotations

from dataclasses import asdict, dataclass, replace
from typing import Any

from benchmarks.lab.attacks import ATTACKS, Goal
from benchmarks.lab.training import Recipe


@dataclass(frozen=True)
class Case:
    """One attacked network but for its seed.

    attack: of `benchmarks.lab.attacks.ATTACKS`. goal: where it sends inputs. per_class: images poisoned of each source
    class. recipe: how it is trained. variant: tells cases of one attack apart in names.
    """

    attack: str
    goal: Goal
    per_class: int
    recipe: Recipe
    variant: str = ""

    def name(self, seed: int) -> str:
        """As files are named: attack, goal unless all-to-one, variant, seed."""
        goal = "" if self.goal.kind == "all2one" else self.goal.kind
        return "-".join(part for part in (self.attack, goal, self.variant, f"s{seed}") if part)

    @property
    def title(self) -> str:
        return self.name(0).removesuffix("-s0")

    def settings(self, seed: int) -> dict[str, Any]:
        """What the network is a function of, besides the data."""
        return {
            "attack": self.attack,
            "goal": asdict(self.goal),
            "per_class": self.per_class,
            "recipe": self.recipe.to_json(),
            "seed": seed,
        }


@dataclass(frozen=True)
class Plan:
    """cases × seeds networks, each × defences × draws of D.

    seeds: of networks, triggers included. draws: seeds of D and of the defence. per_class: images a class in D.
    evaluated: test images, besides D, that everything is measured on; None: all. fpr: what detectors may flag of clean
    inputs. costs: accuracy that an attack may cost and still count as one that took. shift: of
    `benchmarks.lab.data.SHIFTS`, what D has been through and production has not. contaminated: images of D that bear
    the trigger, unknown to the defender, with their true label. published: of published.json, the table to print
    beside. by_data: made for several data sets; results lie in a folder for each.
    """

    title: str
    cases: tuple[Case, ...]
    defences: tuple[str, ...]
    seeds: tuple[int, ...]
    draws: tuple[int, ...] = (0,)
    per_class: int = 50
    evaluated: int | None = None
    fpr: float = 0.005
    costs: float = 0.03
    shift: str = "none"
    contaminated: int = 0
    published: str = ""
    by_data: bool = False

    def __post_init__(self) -> None:
        unknown = {case.attack for case in self.cases} - set(ATTACKS)
        if unknown:
            raise ValueError(f"attacks: there is no {', '.join(sorted(unknown))}; there are {', '.join(ATTACKS)}")

    @property
    def conditions(self) -> dict[str, Any]:
        """What every cell is judged under."""
        names = ("per_class", "evaluated", "fpr", "shift", "contaminated")
        return {name: getattr(self, name) for name in names}


PEERS = ("mmbm", "fine-pruning", "nad", "i-bau", "anp", "clp", "neural-cleanse")
DETECTORS = ("strip", "scale-up", "ibd-psc", "max-activation", "feature-distance")
OURS = ("mmdf", "mmdf-learned", "mmac", "bna", "prune")
LAWS = ("mmdf", "mmdf-gaussian", "max-activation")
MMDF_SETTINGS = (
    "mmdf", "mmdf-q50", "mmdf-q90", "mmdf-q99", "mmdf-middle", "mmdf-late", "mmdf-1%", "mmdf-bfloat16",
)  # fmt: skip
EVERY = ("undefended", *OURS, *PEERS, *DETECTORS)

BNA_TRIGGERS = ("badnet", "chessboard-2", "single-pixel", "l0", "l2", "wanet")

SMALL = Recipe(width=16, stride=2, epochs=12, learning_rate=0.4, shift=2)
PAPER = Recipe(epochs=30)
HARD = {
    "w8": replace(SMALL, width=8),
    "w16": SMALL,
    "w32": replace(SMALL, width=32),
    "short": replace(SMALL, epochs=4),
    "long": replace(SMALL, epochs=36),
    "tuned": replace(SMALL, epochs=4, learning_rate=0.1, base=SMALL),
    "tuned-12": replace(SMALL, learning_rate=0.1, base=SMALL),
}  # one thing changed at a time; the names are the variants of cases


def _case(
    attack: str, recipe: Recipe, per_class: int | None = None, *, kind: str = "all2one", variant: str = ""
) -> Case:
    count = ATTACKS[attack].per_class if per_class is None else per_class
    return Case(attack, Goal(kind), count or 0, recipe, variant)


def _x2x(attack: str, recipe: Recipe) -> tuple[Case, ...]:
    """One-to-one and all-to-all, with enough poison for each: a single source class, or nine wanted classes."""
    return (
        _case(attack, recipe, 900, kind="one2one"),
        _case(attack, recipe, 300, kind="all2all"),
    )


SMALL_PLAN = Plan(
    "CIFAR-10 on a CPU: a ResNet-18 of a quarter of the width, and the stem with stride 2",
    (
        _case("clean", SMALL),
        _case("badnet", SMALL, 250),
        _case("blend", SMALL, 500),
        _case("badnet", SMALL, 500, kind="all2all"),
        _case("chessboard", SMALL, 500),
        _case("wanet", SMALL, 900),
    ),
    EVERY,
    seeds=(0,),
    draws=(0, 1),
    evaluated=2000,
    published="2308.04617-table1",
)


def _sensitivity(title: str, defences: tuple[str, ...] = LAWS, **changed: Any) -> Plan:
    """The small plan's networks, with another D or other settings of the guard, over five draws."""
    return replace(SMALL_PLAN, title=title, defences=defences, draws=(0, 1, 2, 3, 4), published="", **changed)


PLANS: dict[str, Plan] = {
    "small": SMALL_PLAN,
    "small-d50": _sensitivity("Sensitivity: D of 50 images a class"),
    "small-d10": _sensitivity("Sensitivity: D of 10 images a class", per_class=10),
    "small-d5": _sensitivity("Sensitivity: D of 5 images a class", per_class=5),
    "small-jpeg": _sensitivity("Sensitivity: D went through JPEG of quality 50, production did not", shift="jpeg"),
    "small-bright": _sensitivity("Sensitivity: D is 1.3 times as bright as production", shift="bright"),
    "small-dark": _sensitivity("Sensitivity: D is 0.7 times as bright as production", shift="dark"),
    "small-contaminated": _sensitivity("Sensitivity: 10 of the 500 images of D bear the trigger", contaminated=10),
    "hard-case": Plan(
        "The hard case: the chessboard, by the size of the network and the length of training, and by fine-tuning",
        tuple(
            _case(attack, recipe, count, variant=variant)
            for variant, recipe in HARD.items()
            for attack, count in (("clean", 0), ("chessboard", 500))
            if attack != "clean" or recipe.base is None
        ),
        ("undefended", "mmdf", "mmdf-learned", "mmdf-middle", "mmdf-late", "max-activation", "feature-distance"),
        seeds=(0,),
        draws=(0, 1, 2),
        evaluated=2000,
    ),
    "small-settings": _sensitivity("Sensitivity: settings of mmdf", MMDF_SETTINGS),
    "2308.04617-table1": Plan(
        "MMAC and MMDF, Table 1: CIFAR-10, ResNet-18, all-to-one",
        tuple(
            _case(attack, PAPER)
            for attack in ("clean", "chessboard", "badnet", "blend", "wanet", "input-aware", "clean-label")
        ),
        EVERY,
        seeds=(0, 1, 2, 3, 4),
        published="2308.04617-table1",
    ),
    "2308.04617-table2": Plan(
        "MMAC and MMDF, Table 2: LeakyReLU in place of ReLU",
        tuple(_case(attack, replace(PAPER, slope=0.1), variant="leaky") for attack in ("clean", "badnet")),
        ("undefended", "mmac", "mmdf"),
        seeds=(0, 1, 2, 3, 4),
        published="2308.04617-table2",
    ),
    "2308.04617-table3": Plan(
        "MMAC and MMDF, Table 3: the adaptive attack, Eq. 5",
        (_case("clean", PAPER), *(_case(f"within-bounds-{beta}", PAPER) for beta in ("0.5", "1", "5", "10"))),
        ("undefended", "mmac", "mmdf"),
        seeds=(0, 1, 2, 3, 4),
        costs=0.15,
        published="2308.04617-table3",
    ),
    "2308.04617-table4": Plan(
        "MMAC and MMDF, Table 4: CIFAR-100, Tiny ImageNet or GTSRB, by the --data given; 5 images a class",
        tuple(_case(attack, PAPER) for attack in ("clean", "chessboard", "badnet", "blend")),
        ("undefended", "mmac", "mmdf"),
        seeds=(0, 1, 2, 3, 4),
        per_class=5,
        by_data=True,
    ),
    "2308.04617-table5": Plan(
        "MMAC and MMDF, Table 5: one-to-one and all-to-all",
        (
            _case("clean", PAPER),
            *(case for attack in ("chessboard", "badnet", "blend") for case in _x2x(attack, PAPER)),
        ),
        ("undefended", "mmac", "mmdf"),
        seeds=(0, 1, 2, 3, 4),
        published="2308.04617-table5",
    ),
    "2308.09850-table1": Plan(
        "BNA, Tables 1 and 5: CIFAR-10, ResNet-18, six triggers, all-to-one and all-to-all",
        (
            _case("clean", PAPER),
            *(_case(attack, PAPER) for attack in BNA_TRIGGERS),
            *(
                _case(attack, PAPER, {"single-pixel": 800, "wanet": 1500}.get(attack, 300), kind="all2all")
                for attack in BNA_TRIGGERS
            ),
        ),
        ("undefended", "bna", "neural-cleanse", "nad", "i-bau", "anp", "strip"),
        seeds=(0, 1, 2, 3, 4),
        per_class=100,
    ),
    "2308.09850-table2": Plan(
        "BNA, Table 2: the chessboard's number of poisoned images a class, and its size",
        (
            _case("clean", PAPER),
            *(_case("chessboard-2", PAPER, count, variant=f"n{count}") for count in (100, 200, 500)),
            _case("chessboard", PAPER),
        ),
        ("undefended", "bna", "neural-cleanse", "nad", "i-bau", "anp"),
        seeds=(0, 1, 2, 3, 4),
        per_class=100,
    ),
    "2308.09850-table3": Plan(
        "BNA, Table 3: GTSRB, CIFAR-100, ImageNette or Tiny ImageNet, by the --data given; all-to-one",
        tuple(_case(attack, PAPER) for attack in ("clean", "badnet", "chessboard", "l0", "l2", "wanet")),
        ("undefended", "bna"),
        seeds=(0,),
        per_class=10,
        by_data=True,
    ),
}
