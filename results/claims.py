"""The paper's claims, measured on results/runs: python results/claims.py draws figures and writes tables and verdicts.

Each claim below has one measure and one rule. An interval is 95 %, by Student's t over seeds, for a difference Welch's,
from three seeds on. A verdict is one of: holds, does not hold, open (these seeds cannot tell), not run, and says
nothing (it could not have failed).
"""

import re
import sys
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pandas as pd
import torch
from scipy.stats import linregress, t, ttest_ind

ROOT = Path(__file__).resolve().parent.parent
KEPT = ROOT / "results" / "runs"
sys.path.insert(0, str(ROOT))
import plot  # noqa: E402 (both are in the folder above)
import trmrl  # noqa: E402

METHODS = {"trmrl": "TrMRL", "rl2": "RL²", "varibad": "VariBAD", "pearl": "PEARL", "maml": "MAML"}
SCORED = {"PEARL": slice(2, None), "MAML": slice(5, None)}  # episodes after adapting; the other methods adapt at once
ENVS = ("HalfCheetahVel", "AntDir", "ML1-Reach", "ML1-Push", "ML45-Train")
MAIN = ENVS[0]  # also the flags of its main runs
CHEETAH = "HalfCheetahVel --heads 4"  # the default when its ablations were made
CHEETAH_4M = "HalfCheetahVel --total-timesteps 4000000 --heads 4"
REACH = "ML1-Reach --total-timesteps 1500000"


def name_of(script: str, flags: str, seed: int) -> str:
    """A run's folder: trmrl-HalfCheetahVel-layers-8-s13."""
    return "-".join([Path(script).stem, *flags.replace("--", "").split(), f"s{seed}"])


# --- What needs the network: C6 and Theorem 4.1 -----------------------------------------------------------------------
def r_squared(features: np.ndarray, targets: np.ndarray, fitted: np.ndarray) -> float:
    """Of a linear model of the targets, fitted where fitted is True, on the others."""
    features = np.column_stack([features, np.ones(len(features))])
    weights = np.linalg.lstsq(features[fitted], targets[fitted])[0]
    errors = targets[~fitted] - features[~fitted] @ weights
    return 1 - np.square(errors).mean() / targets[~fitted].var()


def risks(alpha: torch.Tensor, values: torch.Tensor, candidates: torch.Tensor) -> torch.Tensor:
    """Bayes risks (..., C) of candidates (..., C, d): the α-weighted mean (..., N) of - cos(candidate, value_t)."""
    cosines = torch.nn.functional.cosine_similarity(candidates[..., :, None, :], values[..., None, :, :], dim=-1)
    return -(cosines * alpha[..., None, :]).sum(-1)


def violations(alpha: torch.Tensor, values: torch.Tensor) -> float:
    """How often, of all attentions α (..., N), a single value (..., N, d) has a smaller risk than their consensus."""
    consensus = risks(alpha, values, (alpha[..., None, :] @ values))
    return (risks(alpha, values, values).amin(-1) < consensus[..., 0] - 1e-5).float().mean().item()


@torch.no_grad()
def probe(run: Path) -> dict[str, np.ndarray]:
    """C6: R² of linear models from φ, and from raw transitions, to v*. T: violations of Theorem 4.1 by layer.
    Both on 60 unseen tasks, their first episodes by mean actions; the models are fitted on the first 40 tasks."""
    agent, envs, args = trmrl.load(run, test_tasks=60)
    rng = trmrl.random_stream(args.seed, "refinement")
    tasks = envs[0].sample_tasks("test", 60, rng)
    trial = trmrl.collect_trial(agent, envs, tasks, 1, rng, explore=False)
    steps, task = trial.valid.nonzero(as_tuple=True)
    full = steps >= args.memory_length - 1  # where no PAD is in sight
    steps, task = steps[full], task[full]
    projected = []
    hooks = [layer.value.register_forward_hook(lambda *call: projected.append(call[2])) for layer in agent.layers]
    _, attention = agent.refine(trial.transitions, steps, task)
    for hook in hooks:
        hook.remove()
    transitions = agent.normalise(trial.transitions[steps, task])
    result = {"violations": [], "violations_normalised": []}
    for alpha, values in zip(attention, projected):
        values = values.unflatten(2, (args.heads, -1)).transpose(1, 2)  # (B, ω, N, d/ω)
        result["violations"].append(violations(alpha, values))
        result["violations_normalised"].append(violations(alpha, torch.nn.functional.normalize(values, dim=-1)))
    for name, features in (("r2_memories", agent.phi(transitions)), ("r2_raw", trial.transitions[steps, task])):
        result[name] = r_squared(features.numpy().astype(float), tasks[task, 0], (task < 40).numpy())
    return {name: np.array(value) for name, value in result.items()}


# --- Runs, measures, intervals ----------------------------------------------------------------------------------------
class Run:
    """One folder of results/runs."""

    def __init__(self, folder: Path):
        run = plot.load_run(folder, [])
        self.name, self.args, self.files = folder.name, run.args, run.files
        self.scored = SCORED.get(run.method, slice(None))
        table = run.files["progress"].dropna(subset="test_return")
        self.by_success = table["test_success"].notna().any()
        self.tests = table["test_success" if self.by_success else "test_return"].to_numpy()
        self.steps, self.minutes = table["env_steps"].to_numpy() / 1e6, table["wall_seconds"].to_numpy() / 60

    def episodes(self, split: str = "meta_test") -> np.ndarray:
        """Success, or else return, of each episode (6,), as a mean over the tasks of the last meta-test."""
        if split not in self.files:
            return np.full(6, np.nan)
        arrays = self.files[split]
        return arrays["success"].mean(0) if self.by_success else arrays["rewards"].sum(2).mean(0)

    def start(self) -> float:
        return self.tests[0]

    def first(self) -> float:
        """The first episode that the method is made for."""
        return self.episodes()[self.scored][0]

    def ood(self) -> float:
        """A single episode out of distribution jumps: the mean of all that the method is made for."""
        return self.episodes("ood")[self.scored].mean()

    def final(self) -> float:
        return self.tests[-3:].mean()

    def area(self) -> float:
        """Under the learning curve: the mean test return, or success, over all of training."""
        return np.trapezoid(self.tests, self.steps) / (self.steps[-1] - self.steps[0])

    def fall(self) -> float:
        """The largest by which an evaluation lies below the best before it."""
        return (np.maximum.accumulate(self.tests) - self.tests).max()

    def first_reached(self, level: float) -> tuple[float, float]:
        """Million steps and minutes at the first evaluation that is at least at level, else infinite."""
        reached = np.append((self.tests >= level).nonzero()[0], -1)[0]
        return (np.inf, np.inf) if reached < 0 else (self.steps[reached], self.minutes[reached])

    def adapted(self) -> float:
        """The step from which the first episode's mean reward stays within 0.1 of its mean over steps 100 to 200."""
        rewards = self.files["meta_test"]["rewards"][:, 0].mean(0)
        far = np.abs(rewards - rewards[100:].mean()) > 0.1
        return far.nonzero()[0].max(initial=-1) + 1


class NotRun(Exception):
    """A claim's runs are still to be made."""


def find(flags: str, script: str = "trmrl") -> list[Run]:
    """All seeds' runs, so far as there are any."""
    return [Run(folder) for folder in sorted(KEPT.glob(name_of(script, flags, 0)[:-1] + "[0-9]*"))]


def load(flags: str, script: str = "trmrl") -> list[Run]:
    """All seeds' runs. Raises NotRun if there is none."""
    runs = find(flags, script)
    if not runs:
        raise NotRun
    return runs


def each(measure: Callable[[Run], float], runs: list[Run]) -> list[float]:
    return [float(measure(run)) for run in runs]


class Interval:
    """The mean of a number per seed, or with minus the difference of two; from three seeds on, its 95 % interval."""

    def __init__(self, values: list, minus: list | None = None, success: bool = False):
        self.mean = np.mean(values) - (0 if minus is None else np.mean(minus))
        self.low, self.high = plot.interval(values) if minus is None else (np.nan, np.nan)
        if minus is not None and min(len(values), len(minus)) > 2:
            self.low, self.high = ttest_ind(values, minus, equal_var=False).confidence_interval()
        if success and minus is None:  # which lies between 0 and 1
            self.low, self.high = max(self.low, 0.0), min(self.high, 1.0)

    def __str__(self) -> str:
        """Empty if nothing was measured."""
        if np.isnan(self.mean):
            return ""
        mean, low, high = (f"{x:.{2 - (abs(x) >= 10) - (abs(x) >= 100)}f}" for x in (self.mean, self.low, self.high))
        return mean if np.isnan(self.low) else f"{mean} [{low}, {high}]"

    def above(self, limit: float) -> tuple[str, str]:
        """The interval as text, and the verdict on a claim that it lies above a limit."""
        return str(self), "holds" if self.low > limit else "does not hold" if self.high < limit else "open"


def of(measure: Callable[[Run], float], flags: str) -> Interval:
    runs = load(flags)
    return Interval(each(measure, runs), success=runs[0].by_success)


def difference(measure: Callable[[Run], float], flags: str, other: str, script: str = "trmrl") -> Interval:
    """TrMRL's flags minus the other flags, or another method's."""
    return Interval(each(measure, load(flags)), each(measure, load(other, script)))


# --- The claims: each measure returns a number with its interval, and the verdict -------------------------------------
def says_nothing(number: object) -> tuple[str, str]:
    return str(number), "says nothing"


def falling(error: str) -> str:
    """In how many seeds an error of Fig. 7 falls at each layer."""
    runs = load(MAIN)
    return f"{sum((np.diff(run.files['refinement'][error]) < 0).all() for run in runs)} of {len(runs)} seeds"


def probed(name: str) -> np.ndarray:
    return np.array([run.files["probe"][name] for run in load(MAIN)])


def broken(name: str) -> str:
    return ", ".join(f"{share:.2%}" for share in probed(name).mean(0))


def no_effect(interval: Interval) -> tuple[str, str]:
    inside, beside = -0.1 < interval.low and interval.high < 0.1, interval.low > 0 or interval.high < 0
    return str(interval), "holds" if inside else "does not hold" if beside else "open"


def doubled_heads() -> tuple[str, str]:
    """The slope of the area over the logarithm of the number of heads."""
    doublings, areas = [], []
    for doubling, heads in enumerate((1, 2, 4, 8, 16)):
        runs = load(f"HalfCheetahVel --heads {heads}")
        doublings += [doubling] * len(runs)
        areas += each(Run.area, runs)
    fit = linregress(doublings, areas)
    slope, half = Interval([fit.slope]), t.ppf(0.975, len(areas) - 2) * fit.stderr
    slope.low, slope.high = fit.slope - half, fit.slope + half
    return slope.above(0)


@dataclass
class Claim:
    number: str
    text: str  # what the paper says
    place: str  # where
    measured: str  # by which number
    measure: Callable[[], tuple[str, str]]
    rule: str = "above 0"  # where the number's interval lies if the claim holds


def N(n: int) -> str:
    return f" --memory-length {n}"


def L(n: int) -> str:
    return f" --layers {n}"


CLAIMS = [
    Claim(
        "C1", "some 20 steps are enough to adapt", "Fig. 9", "the first step from which the reward stays at its level",
        lambda: (str(of(Run.adapted, MAIN)), of(lambda run: -run.adapted(), MAIN).above(-30)[1]),
        "below 30 steps",
    ),
    Claim(
        "C2", "the return is high from the first episode on", "Fig. 5", "return of the first episode",
        lambda: of(Run.first, MAIN).above(-150), "above −150, what the best constant speed returns",
    ),
    Claim(
        "C2", "later episodes add little", "Fig. 5", "episode 6 minus episode 1",
        lambda: says_nothing(of(lambda run: run.episodes()[-1] - run.first(), MAIN)),
        "nothing could be added: the memory is emptied at an episode's end",
    ),
    Claim(
        "C3", "out of distribution TrMRL is far ahead of RL²", "Fig. 6", "OOD return, TrMRL minus RL²",
        lambda: difference(Run.ood, MAIN, MAIN, "rl2").above(0),
    ),
    Claim(
        "C4", "memories come closer to the last layer's, layer by layer", "Fig. 7", "seeds in which it is so",
        lambda: says_nothing(falling("representation_error")), "untrained networks do it too: each layer adds a little",
    ),
    Claim(
        "C5", "actions can be read better from each further layer", "Fig. 7", "seeds in which it is so",
        lambda: says_nothing(falling("regression_mse")), "untrained networks do it too; the last layer is exact",
    ),
    Claim(
        "C6", "working memories are ordered by task", "Fig. 8", "R² of a linear model from φ to v*",
        lambda: says_nothing(Interval(list(probed("r2_memories")))),
        "φ is linear: the raw transitions give the same R²",
    ),
    Claim(
        "C7", "T-Fixup is decisive on HalfCheetahVel", "Fig. 10", "mean return over training, T-Fixup minus LayerNorm",
        lambda: difference(Run.area, CHEETAH_4M, CHEETAH_4M + " --no-t-fixup").above(0),
    ),
    Claim(
        "C7", "T-Fixup does not matter on ML1-Reach", "Fig. 10", "mean success over training, T-Fixup minus LayerNorm",
        lambda: no_effect(difference(Run.area, REACH, REACH + " --no-t-fixup")), "within ± 0.1",
    ),
    Claim(
        "C8", "N = 5 learns faster than N = 1 on HalfCheetahVel", "Fig. 11", "mean return over training, N = 5 minus 1",
        lambda: says_nothing(difference(Run.area, CHEETAH, CHEETAH + N(1))),
        "with N = 1 the agent never sees a reward, so it cannot know its task",
    ),
    Claim(
        "C8", "N beyond 5 is slower on HalfCheetahVel", "Fig. 11", "mean return over training, N = 5 minus 50",
        lambda: difference(Run.area, CHEETAH, CHEETAH + N(50)).above(0),
    ),
    Claim(
        "C8", "N = 1 ends as high as N = 5 on HalfCheetahVel", "App. E.2", "final return, N = 1 minus 5",
        lambda: says_nothing(difference(Run.final, CHEETAH + N(1), CHEETAH)),
        "here N = 1 sees no reward; in the authors' code it does",
    ),
    Claim(
        "C8", "ML1-Reach gains by memories up to N = 50", "Fig. 11", "mean success over training, N = 50 minus 5",
        lambda: difference(Run.area, REACH + N(50), REACH + N(5)).above(0),
    ),
    Claim(
        "C9", "4 layers learn faster than 1 on HalfCheetahVel", "Fig. 12", "mean return over training, L = 4 minus 1",
        lambda: difference(Run.area, CHEETAH, CHEETAH + L(1)).above(0),
    ),
    Claim(
        "C9", "12 layers learn more slowly than 4", "Fig. 12", "mean return over training, L = 4 minus 12",
        lambda: difference(Run.area, CHEETAH, CHEETAH + L(12)).above(0),
    ),
    Claim(
        "C9", "12 layers still end high", "Fig. 12", "final return with L = 12",
        lambda: of(Run.final, CHEETAH + L(12)).above(-93), "above −93, what the best constant speed returns there",
    ),
    Claim(
        "C9", "ML1-Reach gains by layers", "Fig. 12", "mean success over training, L = 8 minus 1",
        lambda: difference(Run.area, REACH + L(8), REACH + L(1)).above(0),
    ),
    Claim(
        "C10", "more heads help a little on HalfCheetahVel", "Fig. 13", "gain in mean return for twice the heads",
        doubled_heads,
    ),
    *(
        Claim(
            "C11", f"TrMRL ends above RL² on {env}", "Fig. 4", "first episode, TrMRL minus RL²",
            lambda env=env: difference(Run.first, env, env, "rl2").above(0),
        )
        for env in ENVS[:4]
    ),
    *(
        Claim(
            "C11", f"TrMRL learns faster than RL² on {env}", "Fig. 4", "mean over training, TrMRL minus RL²",
            lambda env=env: difference(Run.area, env, env, "rl2").above(0),
        )
        for env in ENVS[:4]
    ),
    Claim(
        "C11", "ML1-Reach is solved", "Fig. 4", "success of the first episode, held-out goals",
        lambda: of(Run.first, "ML1-Reach").above(0.95), "above 0.95",
    ),
    Claim(
        "C12", "TrMRL learns ML45-Train best of all", "Fig. 4", "success of the first episode, TrMRL minus RL²",
        lambda: difference(Run.first, "ML45-Train", "ML45-Train", "rl2").above(0),
    ),
    Claim(
        "T", "Theorem 4.1, with values normalised as in its proof", "App. F", "attentions that break it, by layer",
        lambda: says_nothing(broken("violations_normalised")), "any network fulfils it, by Cauchy and Schwarz",
    ),
    Claim(
        "T", "Theorem 4.1, with the network's own values", "Thm. 4.1", "attentions that break it, by layer",
        lambda: (broken("violations"), "does not hold" if probed("violations").any() else "open"),
        "no attention of any seed breaks it",
    ),
]  # fmt: skip


# --- Tables and figures -----------------------------------------------------------------------------------------------
def markdown(rows: list[dict]) -> str:
    """A table; the keys of the first row name its columns. Without rows it is empty."""
    if not rows:
        return ""
    lines = [list(rows[0]), ["---"] * len(rows[0]), *(row.values() for row in rows)]
    return "".join(f"| {' | '.join(map(str, line))} |\n" for line in lines)


def minutes(runs: list[Run]) -> str:
    return f"{np.mean([run.minutes[-1] for run in runs]):.0f}"


def judged() -> list[tuple[str, str]]:
    """For each claim what was measured, and the verdict."""
    results = []
    for claim in CLAIMS:
        try:
            results.append(claim.measure())
        except NotRun:
            results.append(("", "not run"))
    return results


def claims_table(results: list[tuple[str, str]]) -> str:
    rows = []
    for claim, (result, verdict) in zip(CLAIMS, results):
        row = {"": claim.number, "the paper says": claim.text, "where in the paper": claim.place}
        rows.append(row | {"measured": claim.measured, "result": result, "verdict": verdict})
    return markdown(rows)


def rules_table() -> str:
    return markdown([{"": c.number, "claim": c.text, "holds if, or says nothing because": c.rule} for c in CLAIMS])


def verdicts(results: list[tuple[str, str]]) -> str:
    count = Counter(verdict for _, verdict in results)

    def texts(wanted: str) -> str:
        return "; ".join(claim.text for claim, (_, verdict) in zip(CLAIMS, results) if verdict == wanted)

    return (
        f"Of {len(CLAIMS)} claims of the paper that we checked, {count['holds']} hold: {texts('holds')}. "
        f"{count['does not hold']} failed: {texts('does not hold')}. "
        f"{count['open']} stay open with these seeds, and {count['not run']} await their runs. "
        f"{count['says nothing']} could not have failed, so they say nothing.\n"
    )


def by_method(env: str, what: str, cell: Callable[[list[Run]], str]) -> dict:
    """A table's row: what cell makes of each method's runs; empty for a method without any."""
    found = {method: find(env, script) for script, method in METHODS.items()}
    return {"environment": env, "measure": what} | {
        method: cell(runs) if runs else "" for method, runs in found.items()
    }


def means_table() -> str:
    """The mean over seeds of each environment, measure and method, and in brackets the number of seeds."""

    def mean(measure: Callable[[Run], float], runs: list[Run]) -> str:
        return f"{Interval(each(measure, runs), success=runs[0].by_success)} ({len(runs)})"

    rows = []
    for env in ENVS:
        what = "success" if env.startswith("ML") else "return"
        rows.append(by_method(env, what, lambda runs: mean(Run.first, runs)))
        if env == "HalfCheetahVel":
            rows.append(by_method(env, "OOD return", lambda runs: mean(Run.ood, runs)))
    return markdown(rows)


def budgets_table() -> str:
    """How long a run of each method was."""
    what, cell = "M steps; minutes", lambda runs: f"{runs[0].steps[-1]:.0f}; {minutes(runs)}"
    return markdown([by_method(env, what, cell) for env in ENVS])


def ablations_table() -> str:
    """A row a setting of Figs. 10 to 13, and of what they are compared with."""
    rows = []
    settings = {path.name.rsplit("-s", 1)[0].removeprefix("trmrl-") for path in KEPT.glob("trmrl-*")} - {*ENVS}
    for flags in sorted(settings, key=lambda name: re.sub(r"\d+", lambda number: number[0].zfill(9), name)):
        runs = [Run(path) for path in sorted(KEPT.glob(f"trmrl-{flags}-s[0-9]*"))]
        success = runs[0].by_success
        name = re.sub(r"-(?=\d)", " = ", re.sub(r"-(?=[a-z])", " ", flags))
        row = {"setting": name, "seeds": len(runs)}
        row |= {"final": Interval(each(Run.final, runs), success=success)}
        row |= {"mean over training": Interval(each(Run.area, runs), success=success)}
        row |= {"largest fall": f"{max(each(Run.fall, runs)):.{2 if success else 0}f}", "minutes": minutes(runs)}
        rows.append(row)
    return markdown(rows)


def costs_table() -> str:
    rows = []
    for script, method in METHODS.items():
        for level in (-60, -45, -30) if find(MAIN, script) else ():
            steps, minutes = zip(*(run.first_reached(level) for run in load(MAIN, script)))
            row = {"method": method, "return": f"−{-level}", "M steps, median": np.median(steps), "worst": max(steps)}
            row |= {"core-minutes, median": np.median(minutes), "worst ": max(minutes)}
            shown = {name: f"{x:.2g}" if isinstance(x, float) else x for name, x in row.items()}
            rows.append({name: "not reached" if x == "inf" else x for name, x in shown.items()})
    return markdown(rows)


def write_seeds() -> None:
    """A row a run: what was measured, and where it comes from."""
    measures = {"start": Run.start, "episode_1": Run.first, "episode_6": lambda run: run.episodes()[-1], "ood": Run.ood}
    measures |= {"final": Run.final, "mean_over_training": Run.area, "largest_fall": Run.fall}
    rows = []
    for run in map(Run, sorted(KEPT.iterdir())):
        row = {"run": run.name, "method": run.args["method"], "env": run.args["env"], "seed": run.args["seed"]}
        row |= {name: round(float(measure(run)), 2) for name, measure in measures.items()}
        row |= {"million_steps": round(run.steps[-1], 2), "minutes": round(run.minutes[-1], 1)}
        versions = run.args["versions"]
        rows.append(row | {"commit": versions["commit"], "runs_beside": versions["beside"]})
    pd.DataFrame(rows).to_csv(KEPT.parent / "seeds.csv", index=False)


def draw(film: bool = False) -> None:
    """Every figure from the kept runs, into results/figures."""
    names = "|".join(name_of(script, env, 0)[:-3] for script in METHODS for env in ENVS)
    prefix = {flags: name_of("trmrl", flags, 0)[:-3] for flags in (CHEETAH, CHEETAH_4M, REACH)}
    figures = {  # flag: the runs that its figure is drawn from
        "t_fixup": rf"({prefix[CHEETAH_4M]}|{prefix[REACH]})(-no-t-fixup)?-s\d+",
        "memory_length": rf"({prefix[CHEETAH]}|{prefix[REACH]})(-memory-length-\d+)?-s\d+",
        "layers": rf"({prefix[CHEETAH]}|{prefix[REACH]})(-layers-\d+)?-s\d+",
        "heads": r"trmrl-HalfCheetahVel-heads-\d+-s\d+",
    }
    out = KEPT.parent / "figures"

    def matching(pattern: str) -> list[plot.Run]:
        return plot.load_runs([path for path in sorted(KEPT.iterdir()) if re.fullmatch(pattern, path.name)], [])

    plot.draw_all(matching(rf"({names})-s\d+"), out, film)
    for flag, pattern in figures.items():
        if members := plot.ablations(matching(pattern)).get(flag):
            figure = plot.draw_curves(plot.learning_curves(members), "million environment steps")
            for axes in figure.axes:
                if axes.get_title() == "HalfCheetahVel":
                    axes.set_ylim(-150, 0)  # all but N = 1 start near -300
            plot.write(out / f"ablation_{flag}.png", figure.savefig)


def write_tables() -> None:
    """Replaces what stands between <!-- name --> and <!-- end --> in README.md, results/README.md and claims.md."""
    results = judged()
    tables = {"means": means_table(), "claims": claims_table(results), "verdicts": verdicts(results)}
    tables |= {"rules": rules_table(), "ablations": ablations_table()}
    tables |= {"costs": costs_table(), "budgets": budgets_table()}
    for path in (ROOT / "README.md", KEPT.parent / "README.md", KEPT.parent / "claims.md"):
        text = path.read_text()
        for name, table in tables.items():
            between = rf"(?<=<!-- {name} -->\n).*?(?=<!-- end -->)"
            text = re.sub(between, table.replace("\\", r"\\"), text, count=1, flags=re.S)
        path.write_text(text)
    write_seeds()


if __name__ == "__main__":
    draw(film="--film" in sys.argv)
    write_tables()
