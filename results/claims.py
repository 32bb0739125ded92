"""The paper's claims, measured on results/runs: python results/claims.py draws figures and writes tables and verdicts.

Each claim, a row of claims.csv, has one measure and one rule. A claim that neither holds nor fails is at most small (a
difference below the claim's effect), open (these seeds cannot tell), not run, or says nothing (it had to come out so).
"""

import re
import sys
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pandas as pd
from scipy.stats import nct, t, ttest_ind

ROOT = Path(__file__).resolve().parent.parent
KEPT = ROOT / "results" / "runs"
sys.path.insert(0, str(ROOT))
import plot  # noqa: E402 (it is in the folder above)

METHODS = {"trmrl": "TrMRL", "rl2": "RL²", "varibad": "VariBAD", "pearl": "PEARL", "maml": "MAML"}
SCORED = {"PEARL": slice(2, None), "MAML": slice(5, None)}  # episodes after adapting; the other methods adapt at once
ENVS = ("HalfCheetahVel", "AntDir", "ML1-Reach", "ML1-Push", "ML45-Train")
VERDICTS = ("holds", "does not hold", "at most small", "open", "not run", "says nothing")
MAIN = ENVS[0]  # also the flags of its main runs
REACH = "ML1-Reach --total-timesteps 1500000"


def name_of(script: str, flags: str, seed: int | str) -> str:
    """A run's folder: trmrl-HalfCheetahVel-layers-8-s13."""
    return "-".join([script, *flags.replace("--", "").split(), f"s{seed}"])


# --- Runs, measures, intervals ----------------------------------------------------------------------------------------
class Run:
    """One folder of results/runs."""

    def __init__(self, folder: Path):
        run = plot.load_run(folder, [])
        self.name, self.args, self.files, self.setting = folder.name, run.args, run.files, run.setting()
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

    def final_ood(self) -> float:
        """The same out of distribution; there is none on MetaWorld."""
        return self.files["progress"]["ood_return"].dropna()[-3:].mean()

    def first_reached(self, level: float) -> tuple[float, float]:
        """Million steps and minutes at the first evaluation that is at least at level, else infinite."""
        reached = np.append((self.tests >= level).nonzero()[0], -1)[0]
        return (np.inf, np.inf) if reached < 0 else (self.steps[reached], self.minutes[reached])

    def early(self) -> float:
        """The mean test return, or success, over the first million steps of training."""
        steps, tests = self.steps[self.steps <= 1.01], self.tests[self.steps <= 1.01]
        return np.trapezoid(tests, steps) / (steps[-1] - steps[0])

    def later(self) -> float:
        """What the later episodes of a meta-test add: the sixth minus the first."""
        return self.episodes()[-1] - self.episodes()[0]

    def representation_error_falls(self) -> bool:
        """Whether this error of Fig. 7 falls at each layer; so does the next one."""
        return bool((np.diff(self.files["refinement"]["representation_error"]) < 0).all())

    def regression_mse_falls(self) -> bool:
        return bool((np.diff(self.files["refinement"]["regression_mse"]) < 0).all())

    def gained_by_training(self, error: str) -> float:
        """The mean over the inner layers of an error of Fig. 7, as a share of layer 0's: untrained minus trained."""
        trained, untrained = self.files["probe"][error], self.files["probe"][f"untrained_{error}"]
        return float((untrained[1:-1] / untrained[0] - trained[1:-1] / trained[0]).mean())

    def representations_converge(self) -> float:
        return self.gained_by_training("representation_error")

    def actions_emerge(self) -> float:
        return self.gained_by_training("regression_mse")

    def attention_weighs(self) -> float:
        """The correlation of a past memory's α with how much it tells of the task, a mean over layers, less the
        untrained network's."""
        return float((self.files["probe"]["weighing"] - self.files["probe"]["untrained_weighing"]).mean())

    def memories_tell(self) -> float:
        """R² of a linear model from working memories to the task."""
        return float(self.files["probe"]["r2_memories"])

    def violations(self) -> np.ndarray:
        """The share of attentions that break Theorem 4.1, by layer (L,)."""
        return self.files["probe"]["violations"]

    def violations_normalised(self) -> np.ndarray:
        """The same, with values normalised as in the theorem's proof."""
        return self.files["probe"]["violations_normalised"]

    def adapted(self) -> float:
        """The step from which the first episode's mean reward stays within 0.1 of its mean over steps 100 to 200."""
        rewards = self.files["meta_test"]["rewards"][:, 0].mean(0)
        far = np.abs(rewards - rewards[100:].mean()) > 0.1
        return far.nonzero()[0].max(initial=-1) + 1


def kept(name: str) -> list[Path]:
    """The folders of kept runs by a pattern. args.json is written last: without it a run is still being kept."""
    return [path.parent for path in sorted(KEPT.glob(f"{name}/args.json"))]


def find(setting: str) -> list[Run]:
    """All seeds' kept runs of a script's stem and flags, such as "rl2 AntDir". Raises ValueError if defaults differ."""
    runs = [Run(folder) for folder in kept(name_of(*setting.split(" ", 1), 0)[:-1] + "[0-9]*")]
    if len({run.setting for run in runs}) > 1:
        raise ValueError(f"{setting}: not all seeds have the same flags, so that they are no single setting")
    return runs


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


# --- The verdicts -----------------------------------------------------------------------------------------------------
def verdict(number: Interval, rule: str, effect: float) -> str:
    """Of a rule such as "above −150" or "within 0.1 of 0", by where the whole interval lies. Of what shall be above 0,
    "at most small" says that it is smaller than the effect."""
    kind, limit = rule.split()[:2]
    low, high, limit = number.low, number.high, float(limit.strip(",").replace("−", "-"))
    holds = {"above": low > limit, "below": high < limit, "within": -limit < low and high < limit}[kind]
    fails = {"above": high < limit, "below": low > limit, "within": low > limit or high < -limit}[kind]
    small = kind == "above" and limit == 0 and 0 <= high < effect
    return "at most small" if small else "holds" if holds else "does not hold" if fails else "open"


def seeds_needed(effect: float, spread: float, groups: int, within: bool = False) -> int | str:
    """The smallest number of seeds of each of groups settings with which an interval shows the effect, or shows that it
    is within ± the effect if it is 0, with probability 0.8. The spread is the standard deviation between seeds."""
    for n in range(3, 101):
        freedom = groups * (n - 1)
        shown = nct.sf(t.ppf(0.975, freedom), freedom, effect / (spread * np.sqrt(groups / n)))
        if shown >= (0.9 if within else 0.8):  # both ends must be within: each fails at most once in ten times
            return n
    return "over 100"


def compare(settings: list[list[Run]], measure: str) -> Interval:
    """Of one setting the mean, of two the first minus the second, of more how much the measure grows from one setting
    to the next, by linear regression on the seeds that all have. If two settings share three or more seeds, these are
    compared one by one, and the others are left out."""
    table = pd.DataFrame([{run.args["seed"]: getattr(run, measure)() for run in runs} for runs in settings])
    if len(table) == 1:
        return Interval(table.loc[0], success=settings[0][0].by_success)
    common = table.dropna(axis="columns")
    if len(table) == 2 and len(common.columns) < 3:
        return Interval(table.loc[0].dropna(), minus=table.loc[1].dropna())
    if len(table) == 2:
        return Interval(common.loc[0] - common.loc[1])
    return Interval(np.polyfit(table.index, common, deg=1)[0])


def judge(claim: pd.Series) -> tuple[str, str]:
    """What was measured of a row of claims.csv, and the verdict. Its settings are separated by |."""
    settings = [find(runs) for runs in claim["settings"].split(" | ")]
    if not all(settings):
        return "", "not run"
    says_nothing = claim["holds if"].startswith("says nothing")
    values = [getattr(run, claim["measure"])() for run in settings[0]]
    if isinstance(values[0], bool):  # whether it is so in each seed
        result, found = f"{sum(values)} of {len(values)} seeds", "holds" if all(values) else "does not hold"
    elif isinstance(values[0], np.ndarray):  # Theorem 4.1: how often each layer breaks it
        shares = np.mean(values, axis=0)
        result, found = ", ".join(f"{share:.2%}" for share in shares), "does not hold" if shares.any() else "holds"
    else:
        result = compare(settings, claim["measure"])
        found = says_nothing or verdict(result, claim["holds if"], float(claim["effect"]))
    return str(result), "says nothing" if says_nothing else found


# --- Tables and figures -----------------------------------------------------------------------------------------------
def markdown(rows: list[dict]) -> str:
    """A table; the keys of the first row name its columns. Without rows it is empty."""
    if not rows:
        return ""
    lines = [list(rows[0]), ["---"] * len(rows[0]), *(row.values() for row in rows)]
    return "".join(f"| {' | '.join(map(str, line))} |\n" for line in lines)


def minutes(runs: list[Run]) -> str:
    return f"{np.mean([run.minutes[-1] for run in runs]):.0f}"


def judged() -> pd.DataFrame:
    """The claims of claims.csv, with what was measured and the verdicts."""
    claims = pd.read_csv(KEPT.parent / "claims.csv", keep_default_na=False)
    claims["result"], claims["verdict"] = zip(*(judge(claim) for _, claim in claims.iterrows()))
    return claims


def claims_table(claims: pd.DataFrame) -> str:
    """In the order of VERDICTS, so that what is decided comes first."""
    claims = claims.sort_values("verdict", key=lambda verdict: verdict.map(VERDICTS.index), kind="stable")
    columns = ["verdict", "number", "claim", "where in the paper", "measured", "holds if", "result"]
    return markdown(claims[columns].to_dict("records"))


def seeds_table(claims: pd.DataFrame) -> str:
    rows = []
    for _, claim in claims[claims["effect"] != ""].iterrows():
        groups = 2 if claim["settings"].count(" | ") == 1 else 1
        within = claim["holds if"].startswith("within")
        needed = seeds_needed(float(claim["effect"]), float(claim["spread"]), groups, within)
        rows.append(claim[["number", "claim", "effect", "spread"]].to_dict() | {"seeds": needed})
    return markdown(rows)


def verdicts(claims: pd.DataFrame) -> str:
    papers = claims["verdict"][claims["number"] != "ours"]
    holds, fails, small, still_open, missing, empty = (papers.eq(verdict).sum() for verdict in VERDICTS)
    return (
        f"We checked {len(papers)} claims of the paper. {holds} hold and {fails} do not hold. In {small} the "
        f"claimed lead is at most small, less than a tenth of what training gains. {still_open} stay open with these "
        f"seeds, and {missing} await their runs. {empty} say nothing, as they had to come out so, or nearly. No "
        "interval is corrected for so many claims. [results/README.md](results/README.md) has findings and figures, "
        "[claims.md](results/claims.md) the claims, the decided ones first.\n"
    )


def by_method(env: str, what: str, cell: Callable[[list[Run]], str]) -> dict:
    """A table's row: what cell makes of each method's runs; empty for a method without any."""
    found = {method: find(f"{script} {env}") for script, method in METHODS.items()}
    cells = {method: cell(runs) if runs else "" for method, runs in found.items()}
    return {"environment": env, "measure": what} | cells


def means_table() -> str:
    """The mean over seeds of each environment, measure and method, and in brackets the number of seeds."""

    def mean(measure: Callable[[Run], float], runs: list[Run]) -> str:
        return f"{Interval([measure(run) for run in runs], success=runs[0].by_success)} ({len(runs)})"

    rows = []
    for env in ENVS:
        what = "success" if env.startswith("ML") else "return"
        rows.append(by_method(env, what, lambda runs: mean(Run.first, runs)))
        if env == "HalfCheetahVel":
            rows.append(by_method(env, "OOD return", lambda runs: mean(Run.ood, runs)))
    return markdown(rows)


def budgets_table() -> str:
    """How long a run of each method was."""
    what, cell = "M steps; minutes", lambda runs: f"{runs[0].steps[-1]:.2g}; {minutes(runs)}"
    return markdown([by_method(env, what, cell) for env in ENVS])


def ablations_table() -> str:
    """A row a setting of Figs. 10 to 13 and of ablations.py, and of what they are compared with."""
    names = {path.name.rsplit("-s", 1)[0] for path in kept("*") if path.name.startswith(("trmrl", "ablations"))}
    names -= {f"trmrl-{env}" for env in ENVS if env != MAIN}
    rows = []
    for name in sorted(names, key=lambda name: plot.by_numbers(name.split("-", 1)[1])):
        runs = [Run(path) for path in kept(f"{name}-s[0-9]*")]
        success = runs[0].by_success
        words = re.sub(r"-(?=[a-z])", " ", re.sub("(?<=plain).*", "", name.split("-", 1)[1]))  # plain has one setting
        words = words.replace("swap layer norm no t fixup", "Xavier").replace("swap layer norm", "T-Fixup + LayerNorm")
        row = {"setting": re.sub(r"-(?=\d)", " = ", words.replace("no t fixup", "Xavier + LayerNorm"))}
        for what, measure in {"mean over training": Run.area, "final": Run.final, "final, OOD": Run.final_ood}.items():
            values = [measure(run) for run in runs]
            seeds = ", ".join(f"{value:.{2 if success else 0}f}" for value in values)
            row[what] = "" if np.isnan(values[0]) else f"{Interval(values, success=success)}<br>{seeds}"
        rows.append(row | {"minutes": minutes(runs)})
    return markdown(rows)


def costs_table() -> str:
    """A row a method: M steps and core-minutes until a level is reached: the median of its seeds (the worst)."""

    def cell(runs: list[Run], level: int) -> str:
        reached = [run.first_reached(level) for run in runs]
        steps, minutes = (f"{np.median(row):.2g} ({max(row):.2g})" for row in zip(*reached))
        return f"{steps} M; {minutes} min".replace("inf", "—")

    rows = []
    for script, method in METHODS.items():
        if runs := find(f"{script} {MAIN}"):
            rows.append({"method": method} | {f"to −{-level}": cell(runs, level) for level in (-60, -45, -30)})
    return markdown(rows)


def write_seeds() -> None:
    """A row a run: what was measured, and where it comes from."""
    measures = {"start": lambda run: run.tests[0], "final": Run.final, "final_ood": Run.final_ood}
    measures |= {"mean_over_training": Run.area, "scored_episode": Run.first, "ood": Run.ood}
    measures |= {"episode_6": lambda run: run.episodes()[-1]}
    rows = []
    for run in map(Run, kept("*")):
        row = {"run": run.name, "method": run.args["method"], "env": run.args["env"], "seed": run.args["seed"]}
        row |= {name: round(float(measure(run)), 2) for name, measure in measures.items()}
        row |= {"million_steps": round(run.steps[-1], 2), "minutes": round(run.minutes[-1], 1)}
        rows.append(row | {"commit": run.args["versions"]["commit"], "runs_beside": run.args["versions"]["beside"]})
    pd.DataFrame(rows).to_csv(KEPT.parent / "seeds.csv", index=False)


def draw_ablation(runs: list[plot.Run], flag: str) -> plot.plt.Figure:
    """Learning curves of a flag's values. T-Fixup has a panel for each depth, and LayerNorm is named beside it.
    HalfCheetahVel's curves start near −300, but are told apart above −150 only, if all come so far."""
    for run in runs:
        run.label = plot.name_of(flag, run.args[flag]) + ", authors' token" * run.args.get("authors_token", False)
        if flag == "t_fixup":
            norm = run.args[flag] == run.args.get("swap_layer_norm", False)  # trmrl.py has it with Xavier alone
            run.label += " + LayerNorm" * norm
            run.env += f"\nL = {run.args['layers']}" + ", plain" * run.args.get("plain", False)
    runs.sort(key=lambda run: (not run.env.startswith(MAIN), plot.by_numbers(run.env), plot.by_numbers(run.label)))
    curves = plot.learning_curves(runs)
    labels = curves["setting"].unique()
    colours = dict(zip(labels, plot.sns.color_palette("magma_r", len(labels)).as_hex()))
    colours[min(runs, key=plot.Run.changed).label] = plot.COLOURS["TrMRL"]  # the defaults, or what is closest
    figure = plot.draw_curves(curves.assign(colour=curves["setting"].map(colours)), "million environment steps")
    for axes in figure.axes:
        if axes.get_title().startswith(MAIN):
            axes.set_ylim(-150 if all(line.get_ydata()[-1] > -150 for line in axes.lines) else None, 0)
    return figure


def draw(film: bool = False) -> None:
    """Every figure from the kept runs, into results/figures."""
    names = "|".join(name_of(script, env, 0)[:-3] for script in METHODS for env in ENVS)
    starts = "|".join(name_of(script, flags, 0)[:-3] for script in ("trmrl", "ablations") for flags in (MAIN, REACH))
    figures = {  # flag: the folders of its figure's runs
        "t_fixup": rf"({starts})(-layers-12)?(-swap-layer-norm)?(-no-t-fixup)?(-plain.*)?",
        "memory_length": rf"({starts})(-memory-length-\d+)?(-authors-token)?",
        "layers": rf"({starts})(-layers-\d+)?",
        "heads": rf"({starts})(-heads-\d+)?",
    }

    def matching(pattern: str) -> list[plot.Run]:
        return plot.load_runs([path for path in kept("*") if re.fullmatch(pattern, path.name)], [])

    plot.draw_all(matching(rf"({names})-s\d+"), KEPT.parent / "figures", film)
    for flag, pattern in figures.items():
        runs = matching(rf"{pattern}-s\d+")
        if rivals := [run for run in runs if len({other.setting() for other in runs if other.env == run.env}) > 1]:
            plot.write(KEPT.parent / "figures" / f"ablation_{flag}.png", draw_ablation(rivals, flag).savefig)


def write_tables() -> None:
    """Replaces what stands between <!-- name --> and <!-- end --> in README.md, results/README.md and claims.md."""
    claims = judged()
    tables = {"means": means_table(), "costs": costs_table(), "budgets": budgets_table(), "seeds": seeds_table(claims)}
    tables |= {"verdicts": verdicts(claims), "claims": claims_table(claims), "ablations": ablations_table()}
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
