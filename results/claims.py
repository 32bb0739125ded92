"""The paper's claims, measured on results/runs: python results/claims.py writes the tables of both READMEs.

A claim's measure and its verdict's rule stand in its function, fixed before the runs; results/README.md says what was
changed later. An interval is 95 %, by Student's t over seeds (Welch's for a difference). What has no runs is "not run".
"""

import itertools
import re
import sys
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pandas as pd
import torch
from scipy.stats import linregress, t, ttest_1samp, ttest_ind

ROOT = Path(__file__).resolve().parent.parent
KEPT = ROOT / "results" / "runs"
sys.path.insert(0, str(ROOT))
import plot  # noqa: E402 (both are in the folder above)
import trmrl  # noqa: E402

ENVS = ("HalfCheetahVel", "AntDir", "ML1-Reach", "ML1-Push", "ML45-Train")
LIMIT_10 = " --input-limit 10"
CHEETAH, REACH = "HalfCheetahVel --total-timesteps 2000000", "ML1-Reach --total-timesteps 1500000"


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
        self.args, self.files = run.args, run.files
        table = run.files["progress"].dropna(subset="test_return")
        self.by_success = table["test_success"].notna().any()
        self.tests = table["test_success" if self.by_success else "test_return"].to_numpy()
        self.gradient_steps = pd.read_csv(folder / "progress.csv")["gradient_steps"].mean()  # an iteration
        self.steps, self.minutes = table["env_steps"].to_numpy() / 1e6, table["wall_seconds"].to_numpy() / 60

    def episodes(self, split: str = "meta_test") -> np.ndarray:
        """Success, or else return, of each episode (6,), as a mean over the tasks of the last meta-test."""
        arrays = self.files[split]
        return arrays["success"].mean(0) if self.by_success else arrays["rewards"].sum(2).mean(0)

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


def find(flags: str, script: str = "trmrl") -> list[Run]:
    """All seeds' runs, so far as there are any."""
    return [Run(folder) for folder in sorted(KEPT.glob(name_of(script, flags, 0)[:-1] + "[0-9]*"))]


class NotRun(Exception):
    """A claim's runs are still to be made."""


def load(flags: str, script: str = "trmrl") -> list[Run]:
    """All seeds' runs. Raises NotRun if there is none."""
    runs = find(flags, script)
    if not runs:
        raise NotRun
    return runs


class Interval:
    """The mean of a number per seed, or with minus the difference of two; from three seeds on, its 95 % interval."""

    def __init__(self, values: list, minus: list | None = None):
        self.mean = np.mean(values) - (0 if minus is None else np.mean(minus))
        self.low = self.high = np.nan
        if min(len(values), len(minus or values)) > 2:
            test = ttest_1samp(values, 0) if minus is None else ttest_ind(values, minus, equal_var=False)
            self.low, self.high = test.confidence_interval()

    def __str__(self) -> str:
        """Empty if nothing was measured."""
        if np.isnan(self.mean):
            return ""
        mean, low, high = (f"{x:.{2 - (abs(x) >= 10) - (abs(x) >= 100)}f}" for x in (self.mean, self.low, self.high))
        return mean if np.isnan(self.low) else f"{mean} [{low}, {high}]"

    def above(self, limit: float) -> str:
        return "confirmed" if self.low > limit else "refuted" if self.high < limit else "not decided"


def each(measure: Callable, runs: list[Run]) -> list[float]:
    return [float(measure(run)) for run in runs]


# --- The claims: each returns what was measured, and the verdict ------------------------------------------------------
def first_step(run: Run) -> int:
    """From which the mean reward of the first episode stays within 0.1 of its mean over steps 100 to 200."""
    rewards = run.files["meta_test"]["rewards"][:, 0].mean(0)
    far = np.abs(rewards - rewards[100:].mean()) > 0.1
    return far.nonzero()[0].max(initial=-1) + 1


def c1() -> tuple[str, str]:
    """Confirmed if the interval lies below 30 steps."""
    steps = each(first_step, load("HalfCheetahVel"))
    return f"first step within 0.1: {Interval(steps)}", Interval([-step for step in steps]).above(-30)


def c2() -> tuple[str, str]:
    """Confirmed if the gain's interval lies below a tenth of what training has gained."""
    runs = load("HalfCheetahVel")
    gains = each(lambda run: run.episodes()[-1] - run.episodes()[0], runs)
    shares = each(lambda run: (run.episodes()[0] - run.episodes()[-1]) / (run.episodes()[0] - run.tests[0]), runs)
    return f"episode 6 minus episode 1: {Interval(gains)}", Interval(shares).above(-0.1)


def c3(flags: str = "HalfCheetahVel") -> tuple[str, str]:
    """Of episode 1. Confirmed if both intervals lie above 0."""
    ours, theirs = load(flags), load(flags, "rl2")
    better = Interval(*(each(lambda run: run.episodes("ood")[0], runs) for runs in (ours, theirs)))
    gap = Interval(*(each(lambda run: run.episodes()[0] - run.episodes("ood")[0], runs) for runs in (theirs, ours)))
    verdicts = {better.above(0), gap.above(0)}
    text = f"OOD return of episode 1, TrMRL minus RL²: {better}; RL²'s gap from test to OOD minus TrMRL's: {gap}"
    return text, verdicts.pop() if len(verdicts) == 1 else "not decided"


def falls(error: str) -> tuple[str, str]:
    """Confirmed if the error falls at each layer in each seed, refuted if in none."""
    runs = load("HalfCheetahVel")
    falling = [(np.diff(run.files["refinement"][error]) < 0).all() for run in runs]
    verdict = "confirmed" if all(falling) else "not decided" if any(falling) else "refuted"
    return f"{error.replace('_', ' ')} falls at each layer in {sum(falling)} of {len(runs)} seeds", verdict


def c6() -> tuple[str, str]:
    """Confirmed if the R² of φ lies above 0.5."""
    runs = load("HalfCheetahVel")
    memories, raw = (Interval([float(run.files["probe"][name]) for run in runs]) for name in ("r2_memories", "r2_raw"))
    text = f"R² of a linear model to v\\* on unseen tasks: from φ {memories}, from raw transitions {raw}"
    return text, memories.above(0.5)


def compare(flags: str, other: str, measure: Callable = Run.area) -> Interval:
    return Interval(each(measure, load(flags)), each(measure, load(other)))


def c7_cheetah() -> tuple[str, str]:
    """Confirmed if the area's interval lies above 0."""
    arguments = "HalfCheetahVel", "HalfCheetahVel --no-t-fixup"
    area = compare(*arguments)
    return f"T-Fixup minus Xavier with LayerNorm: area {area}, final {compare(*arguments, Run.final)}", area.above(0)


def c7_reach() -> tuple[str, str]:
    """No effect: confirmed if the area's interval lies within ± 0.1, refuted if it leaves out 0."""
    arguments = REACH, REACH + " --no-t-fixup"
    area = compare(*arguments)
    verdict = "refuted" if area.low > 0 or area.high < 0 else "not decided"
    verdict = "confirmed" if area.low > -0.1 and area.high < 0.1 else verdict
    return f"T-Fixup minus Xavier with LayerNorm: area {area}, final {compare(*arguments, Run.final)}", verdict


def better(flags: str, other: str, what: str) -> tuple[str, str]:
    """Confirmed if the interval of the areas' difference lies above 0."""
    return f"area, {what}: {compare(flags, other)}", compare(flags, other).above(0)


def c8_level() -> tuple[str, str]:
    """Confirmed if the interval lies above minus a tenth of what N = 5 gained by training, refuted if below."""
    final = compare(CHEETAH + N_1, CHEETAH, Run.final)
    gain = np.mean(each(lambda run: run.final() - run.tests[0], load(CHEETAH)))
    return f"final, N = 1 minus 5: {final}", final.above(-0.1 * gain)


def c9_stable() -> tuple[str, str]:
    """Confirmed if the worst of 12 layers' seeds ends at most 20 below the worst of 4 layers'."""
    deep, usual = load(CHEETAH + L_12), load(CHEETAH)
    worst, limit = min(each(Run.final, deep)), min(each(Run.final, usual))
    text = f"worst seed's final return: L = 12 {worst:.1f}, L = 4 {limit:.1f}; largest fall on the way:"
    text += f" {max(each(Run.fall, deep)):.0f} and {max(each(Run.fall, usual)):.0f}"
    return text, "confirmed" if worst > limit - 20 else "refuted"


def c10() -> tuple[str, str]:
    """Confirmed if the interval of the slope lies above 0."""
    doublings, areas = [], []
    for doubling, flag in enumerate((" --heads 1", " --heads 2", "", " --heads 8", " --heads 16")):
        runs = load(CHEETAH + flag)
        doublings += [doubling] * len(runs)
        areas += each(Run.area, runs)
    fit = linregress(doublings, areas)
    half = t.ppf(0.975, len(areas) - 2) * fit.stderr
    verdict = "confirmed" if fit.slope > half else "refuted" if fit.slope < -half else "not decided"
    return f"area gained by twice the heads: {fit.slope:.1f} ± {half:.1f}", verdict


def gained(runs: list[Run]) -> float:
    """By training: the first episodes of the last meta-test against the first evaluation, the mean over seeds."""
    return np.mean(each(lambda run: run.episodes()[0] - run.tests[0], runs))


def c11(env: str) -> tuple[str, str]:
    """On par: confirmed if the interval lies above minus a tenth of what RL² gained by training, refuted if below."""
    ours, theirs = load(env), load(env, "rl2")
    difference = Interval(*([run.episodes()[0] for run in runs] for runs in (ours, theirs)))
    level = np.mean([0.9 * run.final() + 0.1 * run.tests[0] for run in ours])
    reached = [np.median([run.first_reached(level)[0] for run in runs]) for runs in (ours, theirs)]
    area = Interval(*(each(Run.area, runs) for runs in (ours, theirs)))
    text = f"TrMRL minus RL²: {difference}, area under the curve {area}; median million steps"
    text += f" to 90 % of TrMRL's gain: {reached[0]:.1f} and {reached[1]:.1f}"
    return text.replace("inf", "never"), difference.above(-0.1 * gained(theirs))


def c11_better(env: str) -> tuple[str, str]:
    """Confirmed if one interval lies above 0, refuted if both lie below a tenth of what RL² gained by training.

    RL² has two input limits: confirmed if it is so against both, refuted if against one."""
    ours, texts, verdicts = load(env), [], set()
    for limit in ("", LIMIT_10):
        theirs = load(env + limit, "rl2")
        test, area = (Interval(each(what, ours), each(what, theirs)) for what in (MEASURES["episode 1"], Run.area))
        verdict = "refuted" if max(test.high, area.high) < 0.1 * gained(theirs) else "not decided"
        verdicts.add("confirmed" if max(test.low, area.low) > 0 else verdict)
        texts.append(f"{'within ±10' if limit else 'TrMRL minus RL²'}: {test}, area under the curve {area}")
    if "refuted" in verdicts:
        return "; ".join(texts), "refuted"
    return "; ".join(texts), "confirmed" if verdicts == {"confirmed"} else "not decided"


def solved() -> tuple[str, str]:
    """Of three seeds or more: confirmed if the mean success is at least 0.95."""
    successes = each(lambda run: run.episodes()[0], load("ML1-Reach"))
    verdict = "confirmed" if np.mean(successes) >= 0.95 else "refuted"
    return f"success on held-out goals: {Interval(successes)}", verdict if len(successes) > 2 else "not decided"


def c12() -> tuple[str, str]:
    """One seed: never decided."""
    ours, theirs = load("ML45-Train"), load("ML45-Train", "rl2")
    counts = [(runs[0].files["meta_test"]["success"][:, 0] > 0).sum() for runs in (ours, theirs)]
    return f"environments of 45 with success: TrMRL {counts[0]}, RL² {counts[1]}", "not decided"


def theorem(name: str) -> tuple[str, str]:
    """Confirmed if no attention of any layer and seed has a single value of smaller risk."""
    shares = np.mean([run.files["probe"][name] for run in load("HalfCheetahVel")], axis=0)
    text = "a single value beats the weighted mean, share of attentions by layer: "
    text += ", ".join(f"{share:.1%}" for share in shares)
    return text, "confirmed" if shares.max() == 0 else "refuted"


def unfailing(measured: tuple[str, str]) -> tuple[str, str]:
    """What holds without training too, or by the way a trial is made, could not have failed: its verdict says so."""
    text, verdict = measured
    return text, verdict + ", by construction" if verdict == "confirmed" else verdict


N_1, N_5, N_50 = (f" --memory-length {N}" for N in (1, 5, 50))
L_1, L_8, L_12 = (f" --layers {L}" for L in (1, 8, 12))
CLAIMS = [
    ("C1", "about 20 steps suffice (Fig. 9)", c1),
    ("C2", "high from the first episode, little to gain later (Fig. 5)", lambda: unfailing(c2())),
    ("C3", "OOD better than RL² by a good margin (Fig. 6)", c3),
    ("C3", "the same with inputs kept within ±10, not ±3 (Fig. 6)", lambda: c3("HalfCheetahVel" + LIMIT_10)),
    ("C4", "the representation error falls layer by layer (Fig. 7)", lambda: unfailing(falls("representation_error"))),
    ("C5", "the regression error falls layer by layer (Fig. 7)", lambda: unfailing(falls("regression_mse"))),
    ("C6", "latents order by target velocity, planes separate them (Fig. 8)", lambda: unfailing(c6())),
    ("C7", "T-Fixup is decisive on HalfCheetahVel (Fig. 10)", c7_cheetah),
    ("C7", "T-Fixup has no effect on ML1-Reach (Fig. 10)", c7_reach),
    (
        "C8",
        "N from 1 to 5 helps HalfCheetahVel (Fig. 11)",
        lambda: unfailing(better(CHEETAH, CHEETAH + N_1, "N = 5 minus 1")),
    ),
    ("C8", "N beyond 5 slows HalfCheetahVel (Fig. 11)", lambda: better(CHEETAH, CHEETAH + N_50, "N = 5 minus 50")),
    ("C8", "N = 1 ends as high as N = 5 on HalfCheetahVel (App. E.2)", c8_level),
    ("C8", "ML1-Reach gains up to N = 50 (Fig. 11)", lambda: better(REACH + N_50, REACH + N_5, "N = 50 minus 5")),
    ("C9", "1 to 4 layers help (Fig. 12)", lambda: better(CHEETAH, CHEETAH + L_1, "L = 4 minus 1")),
    ("C9", "12 layers learn more slowly (Fig. 12)", lambda: better(CHEETAH, CHEETAH + L_12, "L = 4 minus 12")),
    ("C9", "12 layers are still stable (Fig. 12)", c9_stable),
    ("C9", "ML1-Reach gains with layers (Fig. 12)", lambda: better(REACH + L_8, REACH + L_1, "L = 8 minus 1")),
    ("C10", "more heads help slightly (Fig. 13)", c10),
    *(("C11", f"at least on par with RL² on {env} (Fig. 4)", lambda env=env: c11(env)) for env in ENVS),
    *(("C11", f"better than RL² on {env} (Sec. 5.2)", lambda env=env: c11_better(env)) for env in ENVS[:3]),
    ("C11", "ML1-Reach is solved, as its curve reads to us (Fig. 4)", solved),
    ("C12", "learns best on ML45-Train (Fig. 4)", c12),
    ("T", "Theorem 4.1, values normalised as in its proof", lambda: unfailing(theorem("violations_normalised"))),
    (
        "T",
        "not claimed by the paper: Theorem 4.1 for the network's own values, not normalised",
        lambda: theorem("violations"),
    ),
]


# --- Tables and figures -----------------------------------------------------------------------------------------------
def markdown(columns: str, rows: list[list]) -> str:
    lines = [columns.split(" | "), ["---"] * columns.count(" | ") + ["---"], *rows]
    return "".join(f"| {' | '.join(map(str, line))} |\n" for line in lines)


def judged() -> list[list]:
    rows = []
    for number, claim, measure in CLAIMS:
        try:
            text, verdict = measure()
        except NotRun:
            text, verdict = "", "not run"
        rows.append([number, claim, text, verdict])
    return rows


MEASURES: dict[str, Callable[[Run], float]] = {
    "start": lambda run: run.tests[0],
    "episode 1": lambda run: run.episodes()[0],
    "episode 6": lambda run: run.episodes()[-1],
    "OOD": lambda run: run.episodes("ood")[0] if "ood" in run.files else np.nan,
}


def minutes(runs: list[Run]) -> str:
    return f"{np.mean([run.minutes[-1] for run in runs]):.0f}"


def results_table() -> str:
    """A row a run with a meta-test, and one for the mean over the seeds."""
    rows = []
    for env, limit, script in itertools.product(ENVS, ("", LIMIT_10), ("trmrl", "rl2")):
        flags = env + limit
        seeds = find(flags, script)
        for runs in [[run] for run in seeds] + [seeds] * (len(seeds) > 1):
            args = runs[0].args
            seed, commit = (args["seed"], args["versions"]["commit"]) if len(runs) == 1 else ("mean", "")
            measured = [Interval(each(measure, runs)) for measure in MEASURES.values()]
            rows.append([flags, args["method"], seed, *measured, f"{runs[0].steps[-1]:.1f}", minutes(runs), commit])
    return markdown(f"environment | method | seed | {' | '.join(MEASURES)} | M steps | minutes | commit", rows)


def means_table() -> str:
    """A row an environment: first episodes of TrMRL and of RL²."""
    rows = []
    for env in ENVS:
        ours, theirs = find(env), find(env, "rl2")
        if ours:
            row = [env]
            for runs in (ours, theirs):
                row.append(", ".join(str(run.args["seed"]) for run in runs))
                row += [Interval(each(MEASURES[name], runs)) if runs else "" for name in ("episode 1", "OOD")]
            rows.append([*row, f"{ours[0].steps[-1]:.0f}", minutes(ours)])
    return markdown("environment | seeds | TrMRL | OOD | seeds | RL² | OOD | M steps | minutes, TrMRL", rows)


def ways_table() -> str:
    """AntDir's first episodes by direction: mean return, how many of them ended in a death, mean reward of steps 100 to
    200 of those that did not."""
    rows = []
    for run in find("AntDir"):
        forward = np.cos(run.files["meta_test"]["tasks"][:, 0]) > 0
        row = [run.args["seed"]]
        for way in (forward, ~forward):
            rewards = run.files["meta_test"]["rewards"][way, 0]
            died = rewards[:, -1] == 0
            row += [
                f"{rewards.sum(1).mean():.0f}",
                f"{died.sum()} of {len(died)}",
                f"{rewards[~died, 100:].mean():.1f}",
            ]
        rows.append(row)
    sides = (f"{way}: {what}" for way in ("forward", "backward") for what in ("return", "died", "late reward"))
    return markdown("seed | " + " | ".join(sides), rows)


def ablations_table() -> str:
    """A row a setting of Figs. 10 to 13, and of what they are compared with."""
    rows = []
    settings = {path.name.rsplit("-s", 1)[0].removeprefix("trmrl-") for path in KEPT.glob("trmrl-*")}
    for flags in sorted(settings, key=lambda name: re.sub(r"\d+", lambda number: number[0].zfill(9), name)):
        runs = [Run(path) for path in sorted(KEPT.glob(f"trmrl-{flags}-s[0-9]*"))]
        if re.search("HalfCheetahVel|total|fixup", flags):
            ood = Interval(each(lambda run: run.files["progress"]["ood_return"].tail(3).mean(), runs))
            measured = [Interval(each(measure, runs)) for measure in (Run.final, Run.area)]
            setting = re.sub("-(total-timesteps|no-t-fixup|input-limit|memory-length|layers|heads)", r", \1", flags)
            fall = f"{max(each(Run.fall, runs)):.{2 if runs[0].by_success else 0}f}"
            gradient_steps = f"{np.mean([run.gradient_steps for run in runs]):.0f}"
            rows.append([setting, len(runs), *measured, fall, ood, gradient_steps, minutes(runs)])
    return markdown("setting | seeds | final | area | largest fall | OOD | gradient steps | minutes", rows)


def costs_table() -> str:
    rows = []
    for level in (-60, -45, -30):
        steps, minutes = zip(*(run.first_reached(level) for run in load("HalfCheetahVel")))
        numbers = np.median(steps), max(steps), np.median(minutes), max(minutes)
        rows.append([f"−{-level}", *(f"{number:.2g}" for number in numbers)])
    return markdown("first evaluation at | median, M steps | worst | median, minutes | worst", rows)


def hours_table() -> str:
    """Core-hours of all kept runs, a core each."""
    rows = []
    for title, pattern in (
        ("Figs. 4 to 9, HalfCheetahVel", "[a-z0-9]+-HalfCheetahVel-s"), ("AntDir", ".*AntDir"),
        ("ML1-Reach", ".*ML1-Reach-(s|input)"), ("ML1-Push", ".*ML1-Push"), ("ML45-Train", ".*ML45"),
        ("C3, inputs within ±10", ".*Cheetah.*input"), ("Fig. 10", ".*fixup"), ("Fig. 11", ".*memory"),
        ("Fig. 12", ".*layers"), ("Fig. 13", ".*heads"), ("what Figs. 10 to 13 share", ".*00-s"), ("all", ""),
    ):  # fmt: skip
        runs = [Run(path) for path in KEPT.iterdir() if re.match(pattern, path.name)]
        if runs:
            rows.append([title, len(runs), f"{sum(run.minutes[-1] for run in runs) / 60:.1f}"])
    return markdown("for | runs | core-hours", rows)


def draw() -> None:
    """Every figure from the kept runs, into results/figures."""
    names = "|".join(ENVS)
    cheetah, reach = (name_of("", flags, 0)[1:-3] for flags in (CHEETAH, REACH))
    figures = {  # flag: the runs that its figure is drawn from
        "all": rf"(trmrl|rl2)-({names})-s\d+",
        "t_fixup": rf"trmrl-(HalfCheetahVel|{reach})(-no-t-fixup)?-s\d+",
        "memory_length": rf"trmrl-({cheetah}|{reach})(-memory-length-\d+)?-s\d+",
        "layers": rf"trmrl-({cheetah}|{reach})(-layers-\d+)?-s\d+",
        "heads": rf"trmrl-({cheetah}|{reach})(-heads-\d+)?-s\d+",
    }
    out = KEPT.parent / "figures"
    for flag, pattern in figures.items():
        folders = [path for path in sorted(KEPT.iterdir()) if re.fullmatch(pattern, path.name)]
        runs = plot.load_runs(folders, [])
        if flag == "all":
            plot.draw_all(runs, out)
        elif members := plot.ablations(runs).get(flag):
            axes = [("env_steps", 1e6, "million steps"), ("wall_seconds", 60, "minutes")]
            for column, unit, label in axes if flag != "t_fixup" else axes[:1]:  # which costs no time
                figure = plot.draw_curves(plot.learning_curves(members, column, unit), label)
                for axes in figure.axes:
                    if "HalfCheetahVel" in axes.get_title():
                        axes.set_ylim(-150, -15)  # all start near -300
                plot.write(out / f"ablation_{flag}_over_{column}.png", figure.savefig)


def write_tables() -> None:
    """Replaces what stands between <!-- name --> and <!-- end --> in both READMEs."""
    claims = judged()
    tables = {
        "results": results_table(), "means": means_table(),
        "ways": ways_table(), "ablations": ablations_table(), "costs": costs_table(), "hours": hours_table(),
        "claims": markdown(" | claim | measured | verdict", claims),
        "verdicts": "".join(
            f"- {verdict.capitalize()}: {'; '.join(f'{row[0]}, {row[1]}' for row in claims if row[3] == verdict)}.\n"
            for verdict in sorted({row[3] for row in claims})
        ),
    }  # fmt: skip
    for path in (ROOT / "README.md", ROOT / "results" / "README.md"):
        text = path.read_text()
        for name, table in tables.items():
            between = rf"(?<=<!-- {name} -->\n).*?(?=<!-- end -->)"
            text = re.sub(between, table.replace("\\", r"\\"), text, count=1, flags=re.S)
        path.write_text(text)


if __name__ == "__main__":
    draw()
    write_tables()
