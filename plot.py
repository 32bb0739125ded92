"""Draws every figure of the paper that the given runs can give, from the files that trmrl.py wrote.

    python plot.py runs/* [--out DIR]     PNG files, film.gif and summary.md into DIR, else figures/

Runs that differ in the seed alone are one setting: a curve is their mean, a band the 95 % bootstrap interval. What is
damaged or unfinished is left out, with a line that says why. Exit codes: 0; 1 if any was; 2 if no run can be read.
"""

import json
import os
import sys
import zipfile
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import matplotlib.pyplot as plt
import numpy as np
import pandas as pd
import seaborn as sns
import tyro
from matplotlib.animation import PillowWriter
from tqdm import tqdm

NOT_A_SETTING = {"seed", "eval_interval", "test_tasks", "test_episodes", "runs_dir", "device", "versions"}
COLUMNS = ["env_steps", "wall_seconds", "train_return", "test_return", "test_success", "ood_return"]
TASKS = {"HalfCheetahVel": "target velocity (m/s)", "AntDir": "goal direction (rad)"}
plt.switch_backend("Agg")  # there may be no screen
sns.set_theme(context="paper", style="ticks", rc={"savefig.dpi": 160, "savefig.bbox": "tight"})
plt.rcParams["axes.formatter.useoffset"] = False  # else ticks are differences from a number in the corner


# --- Runs and settings ------------------------------------------------------------------------------------------------
@dataclass
class Run:
    folder: Path
    args: dict
    files: dict  # progress.csv as a table and each npz file as a dictionary of arrays, by name without ending
    env: str
    method: str
    seed: int
    unfinished: bool
    label: str = ""  # its setting's name in legends
    colour: str = ""  # its setting's colour in all figures

    def title(self) -> str:
        return f"{self.env}, {self.label}, seed {self.seed}"

    def setting(self, without: str = "") -> str:
        """A key of all runs that differ in NOT_A_SETTING alone, or in one more flag."""
        ignored = NOT_A_SETTING | {without}
        return json.dumps({name: value for name, value in self.args.items() if name not in ignored}, sort_keys=True)


def load_run(folder: Path, problems: list[str]) -> Run:
    args = json.loads((folder / "args.json").read_text())
    progress = pd.read_csv(folder / "progress.csv", usecols=COLUMNS, dtype=float)
    if progress["env_steps"].isna().any() or progress["test_return"].isna().all():
        raise ValueError("cells are missing")
    files = {"progress": progress}
    for path in folder.glob("*.npz"):
        try:
            with np.load(path) as file:
                files[path.stem] = dict(file)
        except (OSError, ValueError, EOFError, zipfile.BadZipFile):
            problems.append(f"{path} is damaged")
    unfinished = progress["env_steps"].iloc[-1] < args["total_timesteps"] or not (folder / "refinement.npz").exists()
    return Run(folder, args, files, args["env"], args["method"].replace("RL2", "RL²"), args["seed"], unfinished)


def select(runs: list[Run], problems: list[str]) -> list[Run]:
    """Leaves out what would skew a setting: unfinished runs, unless all are, and the same seed twice."""
    finished = {run.setting() for run in runs if not run.unfinished}
    newest = {}
    for run in sorted(runs, key=lambda run: run.folder.name[-22:]):  # by time: RL2-s1-20261124-053359-756920
        key = (run.setting(), run.seed)
        if run.unfinished and run.setting() in finished:
            problems.append(f"{run.folder} is unfinished")
            continue
        if key in newest:
            print(f"left out: {newest[key].folder} has the setting and seed of {run.folder}", file=sys.stderr)
        newest[key] = run
    return list(newest.values())


def differing_flags(runs: list[Run]) -> list[str]:
    flags = pd.DataFrame([run.args for run in runs]).drop(columns=NOT_A_SETTING, errors="ignore")
    return [name for name in flags if flags[name].astype(str).nunique(dropna=False) > 1]


def label_settings(runs: list[Run]) -> None:
    """Sorts by label: the method and the flags that differ within the same environment and method."""
    for run in runs:
        flags = differing_flags([other for other in runs if (other.env, other.method) == (run.env, run.method)])
        run.label = run.method + "".join(f", {flag.replace('_', ' ')} {run.args.get(flag)}" for flag in flags)
        run.label += ", unfinished" if run.unfinished else ""
    runs.sort(key=lambda run: (len(run.label), run.label, run.seed))  # layers 4 before layers 12
    labels = list(dict.fromkeys(run.label for run in runs))
    palette = sns.color_palette("colorblind" if len(labels) <= 10 else "husl", len(labels)).as_hex()
    for run in runs:
        run.colour = palette[labels.index(run.label)]


def load_runs(folders: list[Path], problems: list[str]) -> list[Run]:
    """The runs to draw, those first that the paper shows."""
    runs = []
    for folder in folders:
        try:
            runs.append(load_run(folder, problems))
        except (OSError, ValueError, KeyError, TypeError):
            problems.append(f"{folder} has no args.json and progress.csv, or they are empty or damaged")
    runs = select(runs, problems)
    label_settings(runs)
    return sorted(runs, key=lambda run: (run.env != "HalfCheetahVel", run.env, run.method != "TrMRL"))


def ablations(runs: list[Run]) -> dict[str, list[Run]]:
    """For each flag the runs that have another which differs in this flag alone."""
    found = {}
    for flag in sorted(set(differing_flags(runs)) - {"env", "method"}):
        rivals = Counter(rest for rest, _ in {(run.setting(without=flag), run.setting()) for run in runs})
        found[flag] = [run for run in runs if rivals[run.setting(without=flag)] > 1]
    return found


def curve(run: Run, what: str, y: np.ndarray, x: np.ndarray | None = None) -> pd.DataFrame:
    """A row a point, over x, else 1, 2, ... There is one y a run and x, so that bands are over the seeds alone."""
    row = {"panel": f"{run.env}: {what}", "setting": run.label, "colour": run.colour, "seed": run.seed}
    return pd.DataFrame(row | {"x": np.arange(1, len(y) + 1) if x is None else x, "y": y})


def common_steps(curves: pd.DataFrame) -> pd.DataFrame:
    """Episodes that end early shift the steps between seeds: interpolates, up to the end of the shortest curve."""
    end = curves.groupby("seed")["x"].max().min()
    wide = curves.pivot_table(index="x", columns="seed", values="y")
    return wide.interpolate("index").bfill().loc[:end].stack().rename("y").reset_index()


def learning_curves(runs: list[Run], x: str = "env_steps", unit: float = 1e6) -> pd.DataFrame:
    """Test success, or else return, over millions of environment steps, or another column."""
    judged_by_success = {run.env for run in runs if run.files["progress"]["test_success"].notna().any()}
    curves = []
    for run in runs:
        column = "test_success" if run.env in judged_by_success else "test_return"
        tests = run.files["progress"].dropna(subset=column)
        curves.append(curve(run, column.replace("_", " "), tests[column], tests[x] / unit))
    return pd.concat(curves).groupby(["panel", "setting", "colour"], sort=False).apply(common_steps).reset_index()


def episode_curves(runs: list[Run], file: str) -> pd.DataFrame:
    """Returns of successive episodes of the same task, as means over the tasks."""
    returns = [(run, run.files[file]["rewards"].sum(axis=2).mean(axis=0)) for run in runs]
    return pd.concat([curve(run, f"{file.replace('_', ' ')} return", y) for run, y in returns])


def refinement_curves(runs: list[Run]) -> pd.DataFrame:
    """Two errors of what each layer makes of the working memories."""
    errors = [(run, name) for run in runs for name in ("representation_error", "regression_mse")]
    values = [(run, name.replace("_", " "), run.files["refinement"][name]) for run, name in errors]
    return pd.concat([curve(run, name, y, np.arange(len(y))) for run, name, y in values])


def draw_curves(table: pd.DataFrame, xlabel: str, empty_panels: tuple[str, ...] = ()) -> plt.Figure:
    """A panel for each in the table, in each a curve a setting, n seeds of each; then the empty ones."""
    table = table.reset_index(drop=True)
    seeds = table.groupby(["panel", "setting"], sort=False)["seed"].nunique().groupby("panel").unique()
    table["panel"] = [f"{name}, n = {', '.join(map(str, seeds[name]))}" for name in table["panel"]]
    panels = [*table["panel"].unique(), *empty_panels]
    grid = sns.relplot(
        table, kind="line", x="x", y="y", errorbar=("ci", 95), seed=0, col="panel", col_order=panels,
        col_wrap=min(3, len(panels)), hue="setting", palette=dict(zip(table["setting"], table["colour"])),
        height=2.7, aspect=1.3, marker="o" if table["x"].nunique() <= 20 else None,
        facet_kws={"sharex": False, "sharey": False, "legend_out": False},
    )  # fmt: skip
    grid.set_titles("{col_name}").set_axis_labels(xlabel, "").figure.subplots_adjust(wspace=0.3, hspace=0.5)
    sns.move_legend(grid, "upper center", bbox_to_anchor=(0.5, 0), title=None, frameon=False, ncol=min(2, len(panels)))
    for axes in grid.axes.flat:
        axes.xaxis.set_major_locator(plt.MaxNLocator(5, integer=table["x"].dtype == int))
    return grid.figure


# --- Figures ----------------------------------------------------------------------------------------------------------
def draw_working_memories(runs: list[Run]) -> plt.Figure:
    """Fig. 8: the first run's working memories on their three principal components, coloured by task."""
    run, memories = runs[0], runs[0].files["working_memories"]
    centred = memories["embedding"] - memories["embedding"].mean(axis=0)
    _, _, components = np.linalg.svd(centred, full_matrices=False)
    figure, axes = plt.subplots(figsize=(5, 4), subplot_kw={"projection": "3d"})
    dots = axes.scatter(*components[:3] @ centred.T, c=memories["task"], cmap="viridis", s=4, linewidth=0)
    axes.set(xlabel="PC 1", ylabel="PC 2", zlabel="PC 3", title=run.title())
    axes.set(xticklabels=[], yticklabels=[], zticklabels=[])
    figure.colorbar(dots, label=TASKS.get(run.env, "task"), shrink=0.6, pad=0.2)
    return figure


def draw_online_adaptation(runs: list[Run]) -> plt.Figure:
    """Fig. 9: rewards in the first episode and, for HalfCheetahVel, velocities in four tasks of the first run."""
    rewards = [run.files["meta_test"]["rewards"][:, 0].mean(axis=0) for run in runs]
    table = pd.concat([curve(run, "reward in episode 1", y) for run, y in zip(runs, rewards)])
    shown = [run for run in runs if run.env == "HalfCheetahVel" and "observations" in run.files["meta_test"]]
    if not shown:
        return draw_curves(table, "time step")
    figure = draw_curves(table, "time step", (f"{shown[0].title()}:\nvelocity (m/s)",))
    axes, test = figure.axes[-1], shown[0].files["meta_test"]
    targets, velocities = test["tasks"][:, 0], test["observations"][:, :, 8]
    from_slow_to_fast = np.linspace(0, len(targets) - 1, 4).round().astype(int)
    for colour, task in zip(sns.color_palette("viridis", 4), np.argsort(targets)[from_slow_to_fast]):
        axes.plot(velocities[task], color=colour, label=f"target {targets[task]:.2f}")  # step 0 is the start
        axes.axhline(targets[task], color=colour, linestyle=":")
    axes.legend(loc="center left", bbox_to_anchor=(1, 0.5), frameon=False)
    return figure


def draw_attention(runs: list[Run]) -> plt.Figure:
    """How the current memory of the first run divides its attention over the working memories, layer by layer."""
    weights = runs[0].files["attention"]["weights"]
    figure, axes = plt.subplots(figsize=(5, 3))
    extent = (0.5 - weights.shape[1], 0.5, len(weights) + 0.5, 0.5)
    picture = axes.imshow(weights, aspect="auto", cmap="viridis", extent=extent)
    axes.set(xlabel="working memory, in steps from now", ylabel="layer", title=runs[0].title())
    axes.locator_params(integer=True)
    figure.colorbar(picture, label="attention weight")
    return figure


FIGURES = {  # the file that each needs, and what draws it from the runs that have this file
    "meta_training": ("progress", lambda runs: draw_curves(learning_curves(runs), "million environment steps")),
    "adaptation": ("meta_test", lambda runs: draw_curves(episode_curves(runs, "meta_test"), "episode")),
    "ood": ("ood", lambda runs: draw_curves(episode_curves(runs, "ood"), "episode")),
    "refinement": ("refinement", lambda runs: draw_curves(refinement_curves(runs), "layer")),
    "working_memories": ("working_memories", draw_working_memories),
    "online_adaptation": ("meta_test", draw_online_adaptation),
    "attention": ("attention", draw_attention),
}


# --- Film -------------------------------------------------------------------------------------------------------------
def open_renderer(env: str):
    """gymnasium's own environment, seen by a camera that follows; None, and a line why, where there is no OpenGL."""
    if sys.platform == "linux" and not os.environ.get("DISPLAY"):
        os.environ.setdefault("MUJOCO_GL", "egl")  # needs no screen
    name = "Ant-v5" if env == "AntDir" else "HalfCheetah-v5"
    try:
        import gymnasium

        renderer = gymnasium.make(name, render_mode="rgb_array", camera_name="track", width=240, height=160).unwrapped
        renderer.render()
        return renderer
    except Exception as error:  # without OpenGL one of four kinds, by the driver
        print(f"film.gif: left out ({error}); for OpenGL, install libegl1 and set MUJOCO_GL=egl", file=sys.stderr)


def save_film(run: Run, renderer, path: Path) -> None:
    """A slow, a middle and a fast task, or both directions, in the first episode; below, the velocity as it happens."""
    observations, tasks = run.files["meta_test"]["observations"], run.files["meta_test"]["tasks"]
    ant = run.env == "AntDir"
    velocities = observations[:, :, 13:15] if ant else observations[:, :, 8:9]  # along x and y, or x
    states = np.append(velocities.cumsum(axis=1) * renderer.dt, observations, axis=2)  # places are not observed
    speeds = np.cos(tasks) * velocities[..., 0] + np.sin(tasks) * velocities[..., -1] if ant else velocities[..., 0]
    good = speeds > 0.25 if ant else np.abs(speeds - tasks) <= 0.25  # held: for 20 steps
    chosen = tasks[:, 0].argsort()[(np.linspace(0.1, 0.9, 2 if ant else 3) * len(tasks)).astype(int)]
    limits = min(speeds[chosen].min(), 0) - 0.1, max(speeds[chosen].max(), 0 if ant else tasks.max()) + 0.1
    figure, writer = plt.Figure(figsize=(7.5, 3.4), layout="constrained"), PillowWriter(fps=12.5)
    with writer.saving(figure, path, dpi=100):
        for step in tqdm(range(0, speeds.shape[1], 2), "film.gif"):
            figure.clear()
            for task, above, below in zip(chosen, *figure.subplots(2, len(chosen), sharey="row")):
                renderer.set_state(*np.split(states[task, step], [renderer.model.nq]))
                above.imshow(renderer.render()[50:] // 32 * 32, interpolation="nearest")  # few colours: a small file
                above.set(title=f"{TASKS[run.env]}: {tasks[task, 0]:.2f}", xticks=[], yticks=[])
                below.hlines(0.0 if ant else tasks[task, 0], 0, speeds.shape[1], "black", ":")
                below.plot(speeds[task, : step + 1], color=run.colour)
                held = [f", held from step {t}" for t in range(step + 1) if good[task, t : t + 20].sum() == 20]
                below.set(xlabel=f"step {step}" + "".join(held[:1]), ylabel="velocity (m/s)", ylim=limits)
            writer.grab_frame()


def mean_and_interval(values: pd.Series) -> str:
    measured = values.dropna()
    if len(measured) < 2:
        return "".join(f"{value:.2f}" for value in measured)
    low, high = sns.utils.ci(sns.algorithms.bootstrap(measured, seed=0))
    return f"{measured.mean():.2f} [{low:.2f}, {high:.2f}]"


def summary(runs: list[Run]) -> str:
    """The last results as a Markdown table, a row a setting: mean and, of several seeds, 95 % interval."""
    last = [run.files["progress"].ffill().iloc[-1] for run in runs]
    table = pd.DataFrame([{"environment": run.env, "setting": run.label, **row} for run, row in zip(runs, last)])
    table["million steps"] = table.pop("env_steps") / 1e6
    table["minutes"] = table.pop("wall_seconds") / 60
    settings = table.groupby(["environment", "setting"], sort=False)
    table = settings.agg(mean_and_interval).assign(seeds=settings.size().astype(str)).reset_index()
    rows = [[name.replace("_", " ") for name in table], ["---"] * table.shape[1], *table.to_numpy()]
    return "".join(f"| {' | '.join(row)} |\n" for row in rows)


def write(path: Path, save: Callable) -> None:
    """Under a temporary name, which is then changed, so that path is never half-written; prints path."""
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_stem(path.stem + ".tmp")  # the ending names the format
    save(temporary)
    temporary.replace(path)
    print(path)


def draw_all(runs: list[Run], out: Path) -> None:
    write(out / "summary.md", lambda path: path.write_text(summary(runs), encoding="utf-8"))
    figures = [(name, [run for run in runs if file in run.files], draw) for name, (file, draw) in FIGURES.items()]
    figures += [(f"ablation_{flag}", members, FIGURES["meta_training"][1]) for flag, members in ablations(runs).items()]
    for name, members, draw in figures:
        if members:
            figure = draw(members)
            write(out / f"{name}.png", figure.savefig)
            plt.close(figure)
    run = next((run for run in runs if run.env in TASKS and "observations" in run.files.get("meta_test", ())), None)
    if run and (renderer := open_renderer(run.env)):
        write(out / "film.gif", lambda path: save_film(run, renderer, path))
        renderer.close()


def draw(runs: tyro.conf.Positional[tuple[Path, ...]] = (), out: Path = Path("figures")) -> int:
    """Draws every figure that runs, the folders that trmrl.py has written, can give; out is where they go."""
    problems: list[str] = []
    loaded = load_runs(sorted(set(runs)), problems)
    for problem in problems:
        print(f"left out: {problem}", file=sys.stderr)
    if not loaded:
        print("error: no run at all: give runs/<name> folders that trmrl.py has written", file=sys.stderr)
        return 2
    try:
        draw_all(loaded, out)
    except OSError as reason:
        print(f"error: --out {out}: takes a folder that can be written ({reason.strerror})", file=sys.stderr)
        return 2
    return int(bool(problems))


if __name__ == "__main__":
    sys.exit(tyro.cli(draw, description=__doc__))
