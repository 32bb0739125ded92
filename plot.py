"""Draws every figure of the paper that the given runs can give, from the files that trmrl.py wrote.

    python plot.py runs/*               PNG files and summary.md into figures/
    python plot.py runs/* --out DIR     elsewhere

Runs that differ in the seed alone are one setting: a curve is the mean over its seeds, a band the 95 % bootstrapped
confidence interval. What is damaged or unfinished is left out, with a line that says why. Exit codes: 0; 1 if anything
was left out for that reason; 2 if there is no run at all or a flag is wrong.
"""

import json
import os
import sys
import zipfile
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from operator import itemgetter
from pathlib import Path

import matplotlib
import numpy as np
import pandas as pd
import tyro

matplotlib.use("Agg")  # there may be no screen
import matplotlib.pyplot as plt  # noqa: E402
import seaborn as sns  # noqa: E402

NOT_A_SETTING = {"seed", "runs_dir", "device", "versions"}  # what runs of one setting may differ in
TASKS = {"HalfCheetahVel": "target velocity (m/s)", "AntDir": "goal direction (rad)"}
# Okabe and Ito's colours, which colour-blind readers tell apart; seven colours and six dashes give 42 pairs.
COLOURS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#000000")
DASHES = ("", (4, 1.5), (1, 1), (3, 1, 1, 1), (6, 2), (5, 1, 1, 1, 1, 1))
sns.set_theme(context="paper", style="ticks", rc={"savefig.dpi": 160, "savefig.bbox": "tight"})


class LeftOut(Exception):
    """Why a run, a figure or everything is left out."""


# --- Runs and settings ------------------------------------------------------------------------------------------------
@dataclass(eq=False)
class Run:
    folder: Path
    args: dict
    progress: pd.DataFrame  # progress.csv, NaN where nothing was measured
    unfinished: str = ""  # how far it has come
    label: str = ""  # its setting's name in legends
    number: int = 0  # its label's place among all, for the colour

    env = property(lambda self: self.args["env"])
    method = property(lambda self: self.args["method"].replace("RL2", "RL²"))
    title = property(lambda self: f"{self.env}, {self.method}, seed {self.args['seed']}")
    steps = property(lambda self: self.progress["env_steps"].iloc[-1])

    def setting(self, but: str = "") -> str:
        """A key that all seeds of a setting share; but a flag: one that runs share which differ in it alone."""
        return json.dumps({k: v for k, v in sorted(self.args.items()) if k not in NOT_A_SETTING | {but}})


def load_run(folder: Path) -> Run:
    try:
        args = json.loads((folder / "args.json").read_text())
        run = Run(folder, args, pd.read_csv(folder / "progress.csv").astype(float))
        goal = args["total_timesteps"]
        *rows, end = (folder / "progress.csv").read_text().split("\n")
        if end or len({row.count(",") for row in rows}) > 1 or not run.title:
            raise ValueError("a row is not whole")
        if run.steps < goal:
            run.unfinished = f"{run.steps / 1e6:.3g} M of {goal / 1e6:.3g} M steps"
        elif not (folder / "meta_test.npz").exists():
            run.unfinished = "without meta_test.npz"
    except (OSError, ValueError, KeyError, TypeError, IndexError):
        raise LeftOut(f"{folder} has no args.json and progress.csv, or they are empty or damaged") from None
    return run


def group(runs: list[Run], key: Callable) -> list[list[Run]]:
    return [[run for run in runs if key(run) == value] for value in dict.fromkeys(map(key, runs))]


def select(runs: list[Run], problems: list[str]) -> list[Run]:
    """Leaves out what would skew a setting: unfinished runs, unless there is no other, and the same seed twice."""
    kept = []
    for members in group(runs, Run.setting):
        best = [run for run in members if not run.unfinished] or [max(members, key=lambda run: run.steps)]
        problems += [f"{run.folder} is unfinished ({run.unfinished})" for run in members if run not in best]
        for same in group(best, lambda run: run.args["seed"]):
            # By the time in the name: RL2-s1-20261124-053359-756920.
            *older, newest = sorted(same, key=lambda run: (run.folder.name[-22:], run.folder.stat().st_mtime))
            kept.append(newest)
            for run in older:
                print(f"left out: {run.folder} has the setting and seed of {newest.folder}", file=sys.stderr)
    return kept


def differing(runs: list[Run]) -> list[str]:
    names = sorted({name for run in runs for name in run.args} - NOT_A_SETTING)
    return [name for name in names if len({json.dumps(run.args.get(name)) for run in runs}) > 1]


def flag_text(run: Run, flags: list[str]) -> str:
    return "".join(f", {flag.replace('_', ' ')} {run.args.get(flag)}" for flag in flags)


def label_settings(runs: list[Run]) -> None:
    """A label is the method and the flags that differ within the same environment and method."""
    for members in group(runs, lambda run: (run.env, run.method)):
        for run in members:
            run.label = run.method + flag_text(run, differing(members)) + ", unfinished" * bool(run.unfinished)
    # Numbers in labels sort by their value.
    labels = sorted({run.label for run in runs}, key=lambda label: [part.zfill(12) for part in label.split()])
    for run in runs:
        run.number = labels.index(run.label)


def read(runs: list[Run], problems: list[str], name: str, quantities: dict[str, Callable]) -> list[tuple[Run, dict]]:
    """The runs with quantities made of one of their npz files; problems gets those whose file is damaged or missing."""
    found = []
    for run in runs:
        try:
            with np.load(run.folder / name) as file:
                found.append((run, {what: quantity(file) for what, quantity in quantities.items()}))
        except FileNotFoundError:
            problems.append(f"{run.folder / name} is not there")
        except (OSError, ValueError, KeyError, EOFError, zipfile.BadZipFile):
            problems.append(f"{run.folder / name} is damaged")
    if not found:
        raise LeftOut(f"no run has a {name} that can be read")
    return found


def one_environment(runs: list[Run]) -> list[Run]:
    """The runs of HalfCheetahVel, which the paper shows, or else of the first environment; TrMRL's come first."""
    first = min((run.env for run in runs), key=lambda env: (env != "HalfCheetahVel", env), default="")
    chosen = [run for run in runs if run.env == first]
    return sorted(chosen, key=lambda run: (run.method != "TrMRL", run.unfinished))


# --- Long tables: a row a point, with its panel, setting and run ------------------------------------------------------
def points(run: Run, what: str, x: np.ndarray, y: np.ndarray) -> pd.DataFrame:
    names = {"setting": run.label, "number": run.number, "seed": run.args["seed"], "run": run.folder.name}
    return pd.DataFrame({"panel": f"{run.env}: {what}", **names, "x": x, "y": y})


def learning_table(runs: list[Run]) -> pd.DataFrame:
    """Test success, or else return, over millions of environment steps (Fig. 4)."""
    tables = []
    for members in group(runs, lambda run: run.env):
        success = any(run.progress["test_success"].notna().any() for run in members)
        column, what = ("test_success", "test success rate") if success else ("test_return", "test return")
        for seeds in group([run for run in members if run.progress[column].notna().any()], Run.setting):
            curves = [run.progress[["env_steps", column]].dropna().to_numpy().T for run in seeds]
            # Episodes that end early shift the steps between seeds: all go onto those of the run that ends first.
            grid = min((steps for steps, _ in curves), key=max)
            for run, (steps, values) in zip(seeds, curves):
                tables.append(points(run, what, grid / 1e6, np.interp(grid, steps, values)))
    if not tables:
        raise LeftOut("no run has been evaluated yet")
    return pd.concat(tables)


def file_table(runs: list[Run], problems: list[str], name: str, quantities: dict, first: int = 1) -> pd.DataFrame:
    """A panel a quantity, over first, first + 1, ... There is one value a run, so that bands are over the seeds."""
    found = read(runs, problems, name, quantities)
    cells = [(run, what, data[what]) for what in quantities for run, data in found]
    return pd.concat([points(run, what, np.arange(first, first + len(y)), y) for run, what, y in cells])


def ablations(runs: list[Run]) -> dict[str, pd.DataFrame]:
    """Figs. 10-13: for each flag, learning curves of the groups of runs that differ in it alone, a panel a group."""
    tables = {}
    for flag in set(differing(runs)) - {"env", "method"}:
        groups = [found for found in group(runs, partial(Run.setting, but=flag)) if differing(found)]
        for members in groups:
            rivals = [other[0] for other in groups if other[0].env == members[0].env]
            table = learning_table(members)
            table["panel"] += flag_text(members[0], [name for name in differing(rivals) if name != flag])
            tables[flag] = pd.concat([tables.get(flag), table])
    return dict(sorted(tables.items()))


# What a panel shows, of an npz file's arrays.
RETURNS = {"return": lambda file: file["rewards"].sum(axis=2).mean(axis=0)}
REWARDS = {"reward in the first episode": lambda file: file["rewards"][:, 0].mean(axis=0)}
ERRORS = {key.replace("_", " "): itemgetter(key) for key in ("representation_error", "regression_mse")}


# --- Figures: each function returns the figure and the names of the runs in it ----------------------------------------
def draw_curves(table: pd.DataFrame, xlabel: str, whole: bool = False, more: tuple = ()) -> tuple:
    """A panel for each in the table (and empty ones for more), a curve a setting; whole: x is a whole number."""
    palette, dashes, texts = {}, {}, {}
    for (number, setting), rows in table.groupby(["number", "setting"]):
        seeds = sorted(set(rows.groupby("panel")["seed"].nunique()))
        text = f"{setting} ({' to '.join(map(str, seeds[:1] + seeds[1:][-1:]))} seed{'s' * (seeds[-1] > 1)})"
        palette[text], dashes[text] = COLOURS[number % len(COLOURS)], DASHES[number % len(DASHES)]
        texts[setting] = text
    panels, order = [*table["panel"].unique(), *more], list(palette)
    grid = sns.relplot(
        table.assign(setting=table["setting"].map(texts)).reset_index(drop=True),
        kind="line", x="x", y="y", col="panel", col_order=panels, col_wrap=min(3, len(panels)),
        hue="setting", style="setting", hue_order=order, style_order=order, palette=palette, dashes=dashes,
        markers=dict.fromkeys(order, "o") if whole else False, errorbar=("ci", 95), seed=0,
        height=2.7, aspect=1.3, facet_kws={"sharex": False, "sharey": False, "legend_out": False},
    )  # fmt: skip
    grid.set_titles("{col_name}").set_axis_labels(xlabel, "").figure.subplots_adjust(wspace=0.3, hspace=0.5)
    columns = min(2, len(panels))
    sns.move_legend(grid, "upper center", bbox_to_anchor=(0.5, 0), title=None, frameon=False, ncol=columns)
    for axes in grid.axes.flat if whole else ():
        axes.xaxis.set_major_locator(plt.MaxNLocator(integer=True))
    return grid.figure, list(table["run"].unique())


def draw_online_adaptation(runs: list[Run], problems: list[str]) -> tuple:
    """Fig. 9. For HalfCheetahVel a second panel has the velocities that one run reaches in four of its tasks."""
    chosen = one_environment(runs)
    table = file_table(chosen, problems, "meta_test.npz", REWARDS)
    if chosen[0].env != "HalfCheetahVel":
        return draw_curves(table, "time step")
    velocities = {"target": lambda file: file["tasks"][:, 0], "reached": lambda file: file["observations"][:, :, 8]}
    run, data = read(chosen, [], "meta_test.npz", velocities)[0]
    figure, names = draw_curves(table, "time step", more=(f"{run.title}: velocity (m/s)",))
    order = np.argsort(data["target"])
    for colour, i in zip(COLOURS, order[np.linspace(0, len(order) - 1, 4).round().astype(int)]):
        steps = np.arange(1, data["reached"].shape[1] + 1)
        figure.axes[1].plot(steps, data["reached"][i], color=colour, label=f"target {data['target'][i]:.2f}")
        figure.axes[1].axhline(data["target"][i], color=colour, linestyle=":")
    figure.axes[1].legend(loc="center left", bbox_to_anchor=(1, 0.5), frameon=False)
    return figure, names


def draw_working_memories(runs: list[Run], problems: list[str]) -> tuple:
    """Fig. 8: one run's working memories on their three principal components, coloured by task."""
    arrays = {key: itemgetter(key) for key in ("embedding", "task")}
    run, data = read(one_environment(runs), problems, "working_memories.npz", arrays)[0]
    centred = data["embedding"] - data["embedding"].mean(axis=0)
    _, _, components = np.linalg.svd(centred, full_matrices=False)
    figure, axes = plt.subplots(figsize=(5, 4), subplot_kw={"projection": "3d"})
    dots = axes.scatter(*components[:3] @ centred.T, c=data["task"], cmap="viridis", s=4, linewidth=0)
    axes.set(xlabel="PC 1", ylabel="PC 2", zlabel="PC 3", title=run.title)
    axes.set(xticklabels=[], yticklabels=[], zticklabels=[])
    figure.colorbar(dots, label=TASKS.get(run.env, "task"), shrink=0.6, pad=0.15)
    return figure, [run.folder.name]


def draw_attention(runs: list[Run], problems: list[str]) -> tuple:
    """How the current memory of one run divides its attention over the working memories, layer by layer."""
    runs = one_environment([run for run in runs if run.method == "TrMRL"])
    run, data = read(runs, problems, "attention.npz", {"weights": itemgetter("weights")})[0]
    L, N = data["weights"].shape
    figure, axes = plt.subplots(figsize=(5, 3))
    picture = axes.imshow(data["weights"], aspect="auto", cmap="viridis", extent=(0.5 - N, 0.5, L + 0.5, 0.5))
    axes.set(xlabel="working memory, in steps from now", ylabel="layer", title=run.title)
    axes.xaxis.set_major_locator(plt.MaxNLocator(integer=True))
    axes.yaxis.set_major_locator(plt.MaxNLocator(integer=True))
    figure.colorbar(picture, label="attention weight")
    return figure, [run.folder.name]


# --- Summary and command line -----------------------------------------------------------------------------------------
def summary(runs: list[Run]) -> str:
    """Final results as a Markdown table, a row a setting: mean and, of several seeds, its interval."""
    columns = ("train_return", "test_return", "ood_return", "test_success", "minutes")
    header = ["environment", "setting", "seeds", "steps", *(name.replace("_", " ") for name in columns)]
    table = [header, ["---"] * len(header)]
    for seeds in group(runs, Run.setting):
        row = [seeds[0].env, seeds[0].label, str(len(seeds)), f"{np.mean([run.steps for run in seeds]):,.0f}"]
        for name in columns:
            measured = [run.progress.eval("minutes = wall_seconds / 60")[name].dropna() for run in seeds]
            finals = [values.iloc[-1] for values in measured if len(values)]
            row.append(f"{np.mean(finals):.2f}" if finals else "")
            if len(finals) > 1:
                means = sns.algorithms.bootstrap(finals, n_boot=2000, seed=0)
                row[-1] += " [{:.2f}, {:.2f}]".format(*np.percentile(means, (2.5, 97.5)))
        table.append(row)
    return "".join(f"| {' | '.join(row)} |\n" for row in table)


def write(path: Path, save: Callable) -> None:
    """save(file) under a temporary name, which is then renamed, so that path is never half-written."""
    temporary = path.with_name(path.name + ".tmp")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with open(temporary, "wb") as file:
            save(file)
        os.replace(temporary, path)
    except OSError as error:
        raise LeftOut(f"--out {path.parent}: takes a folder that can be written ({error.strerror})") from None


def draw_all(folders: list[Path], out: Path) -> int:
    """Draws what the folders can give, a line a figure; returns the exit code."""
    runs, problems = [], []
    for folder in folders:
        try:
            runs.append(load_run(folder))
        except LeftOut as reason:
            problems.append(str(reason))
    runs = select(runs, problems)
    for problem in problems:
        print(f"left out: {problem}", file=sys.stderr)
    if not runs:
        raise LeftOut("no run at all: give runs/<name> folders that trmrl.py has written")
    label_settings(runs)
    runs.sort(key=lambda run: (run.env, run.number, run.args["seed"]))
    write(out / "summary.md", lambda file: file.write(summary(runs).encode()))
    ood, one = [run for run in runs if run.progress["ood_return"].notna().any()], one_environment(runs)
    figures = {
        "meta_training": lambda runs, _: draw_curves(learning_table(runs), "million environment steps"),
        "adaptation": lambda *of: draw_curves(file_table(*of, "meta_test.npz", RETURNS), "episode", whole=True),
        "ood": lambda _, missing: draw_curves(file_table(ood, missing, "ood.npz", RETURNS), "episode", whole=True),
        "refinement": lambda _, missing: draw_curves(
            file_table(one, missing, "refinement.npz", ERRORS, 0), "layer", whole=True
        ),
        "working_memories": draw_working_memories,
        "online_adaptation": draw_online_adaptation,
        "attention": draw_attention,
    }
    for flag, table in ablations(runs).items():
        figures[f"ablation_{flag}"] = lambda *_, table=table: draw_curves(table, "million environment steps")
    for name, draw in figures.items():
        missing: list[str] = []
        try:
            figure, names = draw(runs, missing)
        except LeftOut as reason:
            print(f"{name}: left out, {reason}")
        else:
            write(out / f"{name}.png", partial(figure.savefig, format="png"))
            plt.close(figure)
            print(f"{name}: drawn from {', '.join(names)}")
        for problem in missing:
            print(f"{name}: left out, {problem}", file=sys.stderr)
        problems += missing
    return int(bool(problems))


def flags(runs: tyro.conf.Positional[tuple[Path, ...]] = (), out: Path = Path("figures")) -> tuple:
    """Draws every figure that runs, the folders that trmrl.py has written, can give; out is where they go."""
    return sorted(set(runs)), out


def main(argv: list[str] | None = None) -> int:
    try:
        given, unknown = tyro.cli(flags, args=argv, return_unknown_args=True)
        if unknown:
            raise LeftOut(f"there is no flag {unknown[0]}; --help shows all")
        return draw_all(*given)
    except LeftOut as error:
        print(f"error: {error}", file=sys.stderr)
        return 2


if __name__ == "__main__":
    sys.exit(main())
