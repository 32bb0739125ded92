"""Draws every figure of the paper that the given runs can give, from the files that trmrl.py wrote.

    python plot.py runs/* [--out DIR] [--film]     PNG files into DIR, else figures/; film.gif takes a minute more

Runs that differ in the seed alone are one setting: a curve is their mean, a band the 95 % interval by Student's t,
given from three seeds on. Where one run is shown, it is the setting's median seed by test return. What is damaged or
unfinished is left out, with a line that says why. Exit codes: 0; 1 if any was; 2 if no run can be read.
"""

import json
import os
import re
import sys
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import gymnasium
import matplotlib.pyplot as plt
import numpy as np
import pandas as pd
import seaborn as sns
import tyro
from matplotlib.animation import PillowWriter
from scipy import stats
from tqdm import tqdm

import trmrl

NOT_A_SETTING = {"seed", "eval_interval", "test_tasks", "test_episodes", "runs_dir", "device", "versions"}
COLUMNS = ["env_steps", "wall_seconds", "train_return", "test_return", "test_success", "ood_return"]
TASKS = {"HalfCheetahVel": "target velocity (m/s)", "AntDir": "goal direction (rad)"}
RETURN, SUCCESS, REWARD = "return of an episode", "success rate", "reward of a step"
SCORED = {"PEARL": ", episode 3", "MAML": ", adapted"}  # by evaluations in training; of the others, episode 1
COLOURS = {"TrMRL": "#0173b2", "RL²": "#de8f05", "VariBAD": "#029e73", "PEARL": "#949494", "MAML": "#cc78bc"}
plt.switch_backend("Agg")  # there may be no screen
sns.set_theme("paper", "ticks", rc={"savefig.dpi": 160, "savefig.bbox": "tight", "axes.formatter.useoffset": False})


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
    colour: str = ""  # its setting's colour

    def setting(self, without: str = "") -> str:
        """A key of all runs that differ in NOT_A_SETTING alone, or in one more flag."""
        ignored = NOT_A_SETTING | {without}
        return json.dumps({name: value for name, value in self.args.items() if name not in ignored}, sort_keys=True)

    def changed(self) -> int:
        """The number of flags that are not at the environment's defaults, those of TrMRL."""
        defaults = vars(trmrl.Args()) | trmrl.DEFAULTS.get(self.env, {})
        compared = defaults.keys() & self.args.keys() - NOT_A_SETTING - {"env"}
        return sum(self.args[name] != defaults[name] for name in compared)


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
        except Exception:  # of many kinds, by what is damaged
            problems.append(f"{path} is damaged")
    if args["env"] == "HalfCheetahVel" and "observations" in files.get("meta_test", ()):
        files["velocities"] = files["meta_test"]["observations"][:, :, 8]  # (tasks, H), of the first episode
    unfinished = progress["env_steps"].iloc[-1] < args["total_timesteps"] or not any(folder.glob("*.npz"))
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


def name_of(flag: str, value: object) -> str:
    """A setting as people call it: N = 5, T-Fixup, learning rate = 0.001."""
    if flag == "t_fixup":
        return "T-Fixup" if value else "Xavier"
    symbol = {"memory_length": "N", "layers": "L"}.get(flag, flag.replace("_", " "))
    return f"{symbol} = {value}"


def by_numbers(label: str) -> list:
    """A key that sorts L = 4 before L = 12: text and numbers in turn."""
    parts = re.split(r"(\d[\d.]*(?:e-?\d+)?)", label)
    return [float(part) if place % 2 else part for place, part in enumerate(parts)]


def label_settings(runs: list[Run], ablation: bool = False) -> list[Run]:
    """Sorted copies, each with its setting's label, which is the method and the flags that differ within environment
    and method, or in an ablation of one method the flags alone. A method's setting that is closest to TrMRL's defaults
    has the method's colour; the others have shades, in the order of their values."""
    runs = [replace(run) for run in runs]
    for run in runs:
        flags = differing_flags([other for other in runs if (other.env, other.method) == (run.env, run.method)])
        names = [name_of(flag, run.args.get(flag)) for flag in flags]
        names = names if ablation and len({run.method for run in runs}) == 1 else [run.method, *names]
        run.label = ", ".join([*names, "unfinished"] if run.unfinished else names)
    closest = {run.method: run.label for run in sorted(runs, key=Run.changed, reverse=True)}
    others = sorted({run.label for run in runs} - {*closest.values()}, key=by_numbers)
    shades = dict(zip(others, sns.color_palette("magma_r", len(others)).as_hex()))
    for run in runs:
        run.colour = shades.get(run.label, COLOURS.get(run.method, "black"))
    methods = {method: place for place, method in enumerate(COLOURS)}
    shown_first = ["HalfCheetahVel", "AntDir", *sorted(run.env for run in runs)]
    return sorted(runs, key=lambda run: (shown_first.index(run.env), methods.get(run.method, 9), by_numbers(run.label)))


def load_runs(folders: list[Path], problems: list[str]) -> list[Run]:
    """The runs to draw, those first that the paper shows."""
    runs = []
    for folder in folders:
        try:
            runs.append(load_run(folder, problems))
        except (OSError, ValueError, KeyError, TypeError):
            problems.append(f"{folder} has no args.json and progress.csv, or they are empty or damaged")
    return label_settings(select(runs, problems))


def ablations(runs: list[Run]) -> dict[str, list[Run]]:
    """For each flag but the budget the runs that have another which differs in this flag alone."""
    found = {}
    for flag in sorted(set(differing_flags(runs)) - {"env", "method", "total_timesteps"}):
        rivals = Counter(rest for rest, _ in {(run.setting(without=flag), run.setting()) for run in runs})
        members = [run for run in runs if rivals[run.setting(without=flag)] > 1]
        found[flag] = label_settings(members, ablation=True)
    return found


def median_run(runs: list[Run]) -> Run:
    """Of the setting closest to the defaults the seed in the middle by test return, the lower one of two."""
    same = [run for run in runs if run.setting() == min(runs, key=Run.changed).setting()]
    return sorted(same, key=lambda run: run.files["meta_test"]["rewards"][:, 0].sum(1).mean())[(len(same) - 1) // 2]


# --- Tables of curves, and how they are drawn -------------------------------------------------------------------------
def curve(run: Run, quantity: str, y: np.ndarray, x: np.ndarray | None = None) -> pd.DataFrame:
    """A row a point, over x, else 1, 2, ... There is one y a run and x, so that bands are over the seeds alone."""
    row = {"env": run.env, "quantity": quantity, "setting": run.label, "colour": run.colour, "seed": run.seed}
    return pd.DataFrame(row | {"x": np.arange(1, len(y) + 1) if x is None else x, "y": y})


def common_steps(curves: pd.DataFrame) -> pd.DataFrame:
    """Episodes that end early shift the steps between seeds: interpolates, up to the end of the shortest curve."""
    end = curves.groupby("seed")["x"].max().min()
    wide = curves.pivot_table(index="x", columns="seed", values="y")
    return wide.interpolate("index").bfill().loc[:end].stack().rename("y").reset_index()


def learning_curves(runs: list[Run]) -> pd.DataFrame:
    """Test return, on MetaWorld success, over millions of environment steps."""
    curves = []
    for run in runs:
        column, quantity = ("test_success", SUCCESS) if run.env.startswith("ML") else ("test_return", RETURN)
        tests = run.files["progress"].dropna(subset=column)
        scored = replace(run, label=run.label + SCORED.get(run.method, ""))
        curves.append(curve(scored, quantity, tests[column], tests["env_steps"] / 1e6))
    groups = pd.concat(curves).groupby(["env", "quantity", "setting", "colour"], sort=False)
    return groups.apply(common_steps).reset_index()


def episode_curves(runs: list[Run], file: str) -> pd.DataFrame:
    """Returns of successive episodes of the same task, means over the tasks."""
    return pd.concat([curve(run, RETURN, run.files[file]["rewards"].sum(axis=2).mean(axis=0)) for run in runs])


def refinement_curves(runs: list[Run]) -> pd.DataFrame:
    """Two errors of what each layer makes of the working memories."""
    names = {"representation_error": "representation error", "regression_mse": "regression error"}
    errors = [(run, names[name], run.files["refinement"][name]) for run in runs for name in names]
    return pd.concat([curve(run, quantity, y, np.arange(len(y))) for run, quantity, y in errors])


def interval(values: Sequence[float]) -> tuple[float, float]:
    """95 % by Student's t over seeds, given from three on; else NaNs."""
    half = stats.t.ppf(0.975, len(values) - 1) * stats.sem(values) if len(values) > 2 else np.nan
    return np.mean(values) - half, np.mean(values) + half


def draw_curves(table: pd.DataFrame, xlabel: str, columns: int = 3, empty: int = 0) -> plt.Figure:
    """A panel for each environment and quantity, in each a curve a setting with its band; then empty panels."""
    panels = list(table.groupby(["env", "quantity"], sort=False))
    columns, few = min(columns, len(panels) + empty), xlabel in ("episode", "layer")
    rows = int(np.ceil((len(panels) + empty) / columns))
    colours = dict(zip(table["setting"], table["colour"]))
    above = len(colours) > 8 or max(map(len, colours)) > 24  # else the legend stands beside
    size = 3 * columns + 1.5, 2.4 * rows + 0.2 * above * len(colours)
    figure, grid = plt.subplots(rows, columns, figsize=size, squeeze=False, layout="constrained")
    for axes, ((env, quantity), part) in zip(grid.flat, panels):
        style = dict(hue="setting", palette=dict(zip(part["setting"], part["colour"])), legend=False, ax=axes)
        sns.lineplot(part, x="x", y="y", errorbar=None, marker="o" if few or len(part) < 9 else None, **style)
        limits = (0, 1) if quantity == SUCCESS else axes.get_ylim()  # a band may leave the panel, a mean never
        sns.lineplot(part, x="x", y="y", errorbar=interval, linewidth=0, **style)
        seeds = ", ".join(str(part["seed"][part["setting"] == setting].nunique()) for setting in colours)
        gap = " " if above or len(colours) < 7 else "\n"  # a long title would run into the legend beside it
        ends = part.groupby("setting")["x"].max()
        axes.set(title=f"{env}{gap}(seeds: {seeds})", xlabel=xlabel, ylabel=quantity, ylim=limits)
        axes.xaxis.set_major_locator(plt.MaxNLocator(6 if few else 5, integer=few))
        if not few and ends.max() > 3 * ends.min():  # some methods train for far longer than others
            axes.set(xscale="log", xlabel=f"{xlabel}, log scale", xlim=(ends.max() / 200, ends.max()))
    for axes in grid.flat[len(panels) + empty :]:
        axes.remove()
    handles = [plt.Line2D([], [], color=colour, label=label) for label, colour in colours.items()]
    figure.legend(handles=handles, loc="outside upper left" if above else "outside right upper", frameon=False)
    figure.supxlabel("seeds in the legend's order; 95 % intervals from three on", fontsize="small", color="gray")
    return figure


# --- Figures ----------------------------------------------------------------------------------------------------------
def draw_working_memories(runs: list[Run]) -> plt.Figure:
    """Fig. 8: the working memories of the median seed on their three principal components, coloured by task."""
    run = median_run(runs)
    memories = run.files["working_memories"]
    centred = memories["embedding"] - memories["embedding"].mean(axis=0)
    _, _, components = np.linalg.svd(centred, full_matrices=False)
    figure, axes = plt.subplots(figsize=(5, 4), subplot_kw={"projection": "3d"})
    dots = axes.scatter(*components[:3] @ centred.T, c=memories["task"], cmap="viridis", s=4, linewidth=0)
    axes.set(xlabel="PC 1", ylabel="PC 2", zlabel="PC 3", xticklabels=[], yticklabels=[], zticklabels=[])
    axes.set_title(f"{run.env}, {run.label}, seed {run.seed}")
    figure.colorbar(dots, label=TASKS.get(run.env, "task"), shrink=0.6, pad=0.2)
    return figure


def draw_online_adaptation(runs: list[Run]) -> plt.Figure:
    """Fig. 9: rewards in the first episode and, for HalfCheetahVel, velocities in four tasks of the median seed."""
    table = pd.concat([curve(run, REWARD, run.files["meta_test"]["rewards"][:, 0].mean(axis=0)) for run in runs])
    shown = [run for run in runs if "velocities" in run.files]
    figure = draw_curves(table, "step of the first episode", empty=bool(shown))
    if not shown:
        return figure
    run, axes = median_run(shown), figure.axes[-1]
    targets, velocities = run.files["meta_test"]["tasks"][:, 0], run.files["velocities"]
    from_slow_to_fast = np.linspace(0, len(targets) - 1, 4).round().astype(int)
    for colour, task in zip(sns.color_palette("viridis", 4), np.argsort(targets)[from_slow_to_fast]):
        axes.plot(velocities[task], color=colour)  # step 0 is the start
        axes.axhline(targets[task], color=colour, linestyle=":")
        axes.annotate(f" {targets[task]:.2f}", (1, targets[task]), xycoords=axes.get_yaxis_transform(), color=colour)
    axes.set(title=f"{run.env}, {run.label}, seed {run.seed}", xlabel="step of episode 1", ylabel="velocity (m/s)")
    return figure


def draw_attention(runs: list[Run]) -> plt.Figure:
    """How the current memory of the median seed divides its attention over the working memories, layer by layer."""
    run = median_run(runs)
    weights = run.files["attention"]["weights"]
    figure, axes = plt.subplots(figsize=(5, 3))
    extent = (0.5 - weights.shape[1], 0.5, len(weights) + 0.5, 0.5)
    picture = axes.imshow(weights, aspect="auto", cmap="viridis", vmin=0, extent=extent)
    axes.set(xlabel="memory, in steps from now", ylabel="layer", title=f"{run.env}, {run.label}, seed {run.seed}")
    axes.locator_params(integer=True)
    figure.colorbar(picture, label="attention weight, mean over heads")
    return figure


FIGURES = {  # the files that a run must have, and what draws the figure from all runs that have them
    "meta_training": (set(), lambda runs: draw_curves(learning_curves(runs), "million environment steps")),
    "adaptation": ({"meta_test"}, lambda runs: draw_curves(episode_curves(runs, "meta_test"), "episode")),
    "ood": ({"ood"}, lambda runs: draw_curves(episode_curves(runs, "ood"), "episode")),
    "refinement": ({"refinement"}, lambda runs: draw_curves(refinement_curves(runs), "layer", columns=2)),
    "working_memories": ({"meta_test", "working_memories"}, draw_working_memories),
    "online_adaptation": ({"meta_test"}, draw_online_adaptation),
    "attention": ({"meta_test", "attention"}, draw_attention),
}


def open_renderer():
    """gymnasium's own cheetah, seen by a camera that follows; None, and a line why, where there is no OpenGL."""
    if sys.platform == "linux" and not os.environ.get("DISPLAY"):
        os.environ.setdefault("MUJOCO_GL", "egl")  # needs no screen
    try:
        cheetah = gymnasium.make("HalfCheetah-v5", render_mode="rgb_array", camera_name="track", width=240, height=160)
        cheetah.unwrapped.render()
        return cheetah.unwrapped
    except Exception as error:  # without OpenGL one of four kinds, by the driver
        print(f"film.gif: left out ({error}); for OpenGL, install libegl1 and set MUJOCO_GL=egl", file=sys.stderr)


def save_film(run: Run, renderer, path: Path) -> None:
    """A slow, a middle and a fast target in the first episode of HalfCheetahVel; below, the velocity as it happens."""
    observations, targets = run.files["meta_test"]["observations"], run.files["meta_test"]["tasks"]
    velocities = run.files["velocities"]
    states = np.append(velocities.cumsum(1)[..., None] * renderer.dt, observations, axis=2)  # places are not observed
    near = np.abs(velocities - targets) <= 0.25  # held: for 20 steps
    chosen = targets[:, 0].argsort()[[len(targets) // 10, len(targets) // 2, len(targets) * 9 // 10]]
    limits = velocities[chosen].min() - 0.1, velocities[chosen].max() + 0.1
    figure, writer = plt.Figure(figsize=(7.5, 3.4), layout="constrained"), PillowWriter(fps=12.5)
    with writer.saving(figure, path, dpi=100):
        for step in tqdm(range(0, velocities.shape[1], 2), "film.gif"):
            figure.clear()
            for task, above, below in zip(chosen, *figure.subplots(2, len(chosen), sharey="row")):
                renderer.set_state(*np.split(states[task, step], [renderer.model.nq]))
                above.imshow(renderer.render()[50:] // 32 * 32, interpolation="nearest")  # few colours: a small file
                above.set(title=f"target velocity {targets[task, 0]:.2f} m/s", xticks=[], yticks=[])
                below.axhline(targets[task, 0], color="black", linestyle=":")
                below.plot(velocities[task, : step + 1], color=run.colour)
                held = [f", first held at step {t}" for t in range(step + 1) if near[task, t : t + 20].sum() == 20]
                below.set(xlim=(0, velocities.shape[1]), ylim=limits, ylabel="velocity (m/s)")
                below.set_xlabel(f"step {step}" + "".join(held[:1]))
            writer.grab_frame()


def write(path: Path, save: Callable) -> None:
    """Under a temporary name, which is then changed, so that path is never half-written; prints path."""
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_stem(path.stem + ".tmp")  # the ending names the format
    try:
        save(temporary)
        temporary.replace(path)
    finally:
        temporary.unlink(missing_ok=True)
    print(path)


def draw_all(runs: list[Run], out: Path, film: bool) -> None:
    jobs = [(name, draw, [run for run in runs if files <= run.files.keys()]) for name, (files, draw) in FIGURES.items()]
    jobs += [(f"ablation_{flag}", FIGURES["meta_training"][1], members) for flag, members in ablations(runs).items()]
    for name, draw, members in jobs:
        if name == "adaptation":  # an agent that acts by its mean repeats itself on MetaWorld, where all starts are one
            members = [run for run in members if not run.env.startswith("ML")]
        if members:
            figure = draw(members)
            write(out / f"{name}.png", figure.savefig)
            plt.close(figure)
    shown = [run for run in runs if "velocities" in run.files]
    if film and shown and (renderer := open_renderer()):
        write(out / "film.gif", lambda path: save_film(median_run(shown), renderer, path))
        renderer.close()


def draw(runs: tyro.conf.Positional[tuple[Path, ...]] = (), out: Path = Path("figures"), film: bool = False) -> int:
    """Draws every figure that runs, the folders that trmrl.py has written, can give; out is where they go."""
    problems: list[str] = []
    loaded = load_runs(sorted(set(runs)), problems)
    for problem in problems:
        print(f"left out: {problem}", file=sys.stderr)
    if not loaded:
        print("error: no run at all: give runs/<name> folders that trmrl.py has written", file=sys.stderr)
        return 2
    try:
        draw_all(loaded, out, film)
    except OSError as reason:
        print(f"error: --out {out}: takes a folder that can be written ({reason.strerror})", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print("\nstopped", file=sys.stderr)
        return 130
    return int(bool(problems))


if __name__ == "__main__":
    sys.exit(tyro.cli(draw, description=__doc__))
