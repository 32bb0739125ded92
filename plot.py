"""Draws every figure of the paper that the given runs can give, from the files that trmrl.py wrote.

    python plot.py runs/*                     PNG files into figures/
    python plot.py runs/* --out DIR --pdf     elsewhere, and as PDF too

Figure                    Paper            From
meta_training.png         Fig. 4           progress.csv: test performance over environment steps
adaptation.png, ood.png   Figs. 5, 6       meta_test.npz, ood.npz: return over the episodes of a task
refinement.png            Fig. 7           refinement.npz: errors over the layers
working_memories.png      Fig. 8           working_memories.npz: their three principal components
online_adaptation.png     Fig. 9           meta_test.npz: rewards and velocities over the first episode
ablation_<flag>.png       Figs. 10 to 13   progress.csv of runs that differ in just that flag
attention.png             -                attention.npz: what the current memory attends to
summary.md                -                progress.csv: a table of final results

Runs that differ in the seed alone are one setting: a curve is its mean over the seeds, a band its 95 % bootstrapped
confidence interval. A run that a figure cannot use is left out of it, with a line that says why. Exit codes: 0, 1 if
anything had to be left out because it is damaged or unfinished, 2 if there is no run at all or the flags are wrong.
"""

import csv
import json
import math
import os
import sys
import zipfile
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

import matplotlib
import numpy as np
import tyro

matplotlib.use("Agg")
import matplotlib.pyplot as plt  # noqa: E402 (the backend comes first: there may be no screen)
from matplotlib.figure import Figure  # noqa: E402
from matplotlib.transforms import ScaledTranslation  # noqa: E402

NOT_A_SETTING = ("seed", "runs_dir", "device", "versions")  # what the runs of one setting may differ in
METHODS = {"transformer": "TrMRL", "gru": "RL²"}  # by --memory
TASK_UNITS = {
    "HalfCheetahVel": "target velocity (m/s)",
    "AntDir": "goal direction (rad)",
    "AntDir57": "goal direction (rad)",
}
# Okabe and Ito's colours, which colour-blind readers tell apart; a dash pattern goes with each, for readers in grey.
COLOURS = ("#000000", "#D55E00", "#0072B2", "#009E73", "#CC79A7", "#E69F00", "#56B4E9")
DASHES = ("-", "--", "-.", ":", (0, (5, 1)), (0, (3, 1, 1, 1)), (0, (1, 1)))
COLUMN = 3.3  # inches, the width of a paper's column
plt.rcParams.update({
    "figure.constrained_layout.use": True,
    "font.size": 8,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "legend.frameon": False,
    "savefig.dpi": 200,
})


class LeftOut(Exception):
    """A run or a figure that is left out, and why, in one line."""


class Damaged(LeftOut):
    """The same, because something is broken or unfinished: exit code 1."""


# ---------------------------------------------------------------------------------------------------------------------
# Runs and settings
# ---------------------------------------------------------------------------------------------------------------------


@dataclass
class Run:
    """A run's folder, its arguments and progress.csv's columns, NaN where nothing was measured."""

    folder: Path
    args: dict
    progress: dict[str, np.ndarray]
    label: str = ""  # its setting in the legends; the same for all seeds

    def arrays(self, name: str, needed: Sequence[str]) -> dict[str, np.ndarray]:
        """Reads an npz file of the run. Raises Damaged if it is not there or not whole."""
        path = self.folder / name
        if not path.exists():
            raise Damaged(f"{self.folder} has no {name}: it is unfinished")
        try:
            with np.load(path) as file:
                return {array: file[array] for array in (*needed, *(set(file) - set(needed)))}
        except (OSError, ValueError, KeyError, EOFError, zipfile.BadZipFile) as error:
            raise Damaged(f"{path} cannot be read ({error})") from error

    @property
    def env(self) -> str:
        return self.args["env"]

    @property
    def method(self) -> str:
        return METHODS[self.args["memory"]]

    def setting(self, *but: str) -> str:
        """What all seeds of a setting have in common, as a key; without the flags named."""
        flags = {name: value for name, value in self.args.items() if name not in (*NOT_A_SETTING, *but)}
        return json.dumps(flags, sort_keys=True)


def load_run(folder: Path) -> Run:
    """Raises Damaged if the folder is no run, or its tables are not whole."""
    try:
        args = json.loads((folder / "args.json").read_text())
        args["env"], args["seed"], METHODS[args["memory"]]
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise Damaged(f"{folder} is no run: it has no args.json that can be read") from error
    try:
        with open(folder / "progress.csv", newline="") as file:
            rows = list(csv.DictReader(file))
        columns = {name: np.array([float("nan" if row[name] == "" else row[name]) for row in rows]) for name in rows[0]}
        columns["env_steps"], columns["test_return"]
    except (OSError, ValueError, KeyError, TypeError, IndexError) as error:
        raise Damaged(f"{folder}/progress.csv has no rows yet, or is not whole") from error
    return Run(folder, args, columns)


def differing_flags(runs: list[Run]) -> list[str]:
    """The flags that differ between these runs, leaving aside what the seeds of a setting may differ in."""
    names = sorted({name for run in runs for name in run.args if name not in NOT_A_SETTING})
    return [name for name in names if len({json.dumps(run.args.get(name)) for run in runs}) > 1]


def flag_text(run: Run, flags: list[str]) -> str:
    return ", ".join(f"{flag.replace('_', ' ')} {run.args.get(flag)}" for flag in flags)


def name_settings(runs: list[Run]) -> None:
    """Gives each run the label that tells its setting from the others of its environment: its method, and what differs."""
    for run in runs:
        flags = differing_flags([other for other in runs if (other.env, other.method) == (run.env, run.method)])
        run.label = run.method
        if flags:
            run.label += f", {flag_text(run, flags)}"


def group(runs: list[Run], key: Callable[[Run], str]) -> dict[str, list[Run]]:
    groups: dict[str, list[Run]] = {}
    for run in sorted(runs, key=lambda run: (run.env, str(key(run)), run.args["seed"], str(run.folder))):
        groups.setdefault(key(run), []).append(run)
    return groups


# ---------------------------------------------------------------------------------------------------------------------
# Statistics and drawing
# ---------------------------------------------------------------------------------------------------------------------


def bootstrap_interval(values: np.ndarray, draws: int = 2000) -> tuple[np.ndarray, np.ndarray]:
    """The 95 % bootstrapped confidence interval of the mean over the first axis: values (n, ...) to two (...)."""
    picks = np.random.default_rng(0).integers(len(values), size=(draws, len(values)))
    means = np.array([values[pick].mean(axis=0) for pick in picks])
    return np.percentile(means, 2.5, axis=0), np.percentile(means, 97.5, axis=0)


class Palette:
    """The same colour and dashes for the same label in every figure."""

    def __init__(self, labels: Sequence[str]):
        self.labels = sorted(set(labels))

    def style(self, label: str) -> dict:
        number = self.labels.index(label)
        return {"color": COLOURS[number % len(COLOURS)], "linestyle": DASHES[number % len(DASHES)]}


def draw_curve(axes, x: np.ndarray, values: np.ndarray, label: str, style: dict, what: str = "seed", **line) -> None:
    """The mean over values (n, len(x)) and, of more than one, its interval; the legend says how many there are."""
    n = len(values)
    axes.plot(x, values.mean(axis=0), label=f"{label} ({n} {what}{'s' if n > 1 else ''})", **style, **line)
    if n > 1:
        low, high = bootstrap_interval(values)
        axes.fill_between(x, low, high, color=style["color"], alpha=0.2, linewidth=0)


def panels(titles: Sequence[str]) -> tuple[Figure, list]:
    """Axes in rows of at most three, a column wide each."""
    across = min(len(titles), 3)
    down = math.ceil(len(titles) / across)
    figure, grid = plt.subplots(down, across, figsize=(COLUMN * across, 2.4 * down), squeeze=False)
    axes = list(grid.flat)
    for unused in axes[len(titles) :]:
        unused.remove()
    for ax, title in zip(axes, titles):
        ax.set_title(title)
    return figure, axes[: len(titles)]


def legend(axes) -> None:
    """Below the axes and their label, where it covers no data."""
    below = axes.transAxes + ScaledTranslation(0, -0.36, axes.figure.dpi_scale_trans)
    axes.legend(loc="upper center", bbox_to_anchor=(0.5, 0), bbox_transform=below, fontsize=7)


def performance(run: Run) -> tuple[str, str]:
    """What a run is judged by: progress.csv's column and the axis's label."""
    if np.isfinite(run.progress["test_success"]).any():
        return "test_success", "test success rate"
    return "test_return", "test return (per episode)"


def draw_learning_curves(axes, runs: list[Run], label: str, style: dict) -> None:
    """Test performance over environment steps, on the evaluations up to where the shortest run has come."""
    column, ylabel = performance(runs[0])
    curves = []
    for run in runs:
        measured = np.isfinite(run.progress[column])
        curves.append((run.progress["env_steps"][measured], run.progress[column][measured]))
    longest = min(steps[-1] for steps, _ in curves)
    x = curves[0][0][curves[0][0] <= longest]
    draw_curve(axes, x / 1e6, np.array([np.interp(x, steps, values) for steps, values in curves]), label, style)
    axes.set(xlabel="environment steps (millions)", ylabel=ylabel)


# ---------------------------------------------------------------------------------------------------------------------
# Figures: each takes the runs and the palette and returns (figure, runs drawn), or raises LeftOut
# ---------------------------------------------------------------------------------------------------------------------

def usable(runs: list[Run], name: str, needed: Sequence[str], problems: list[str]) -> list[tuple[Run, dict]]:
    """The runs with their arrays of one npz file; the others' reasons go into problems. Raises LeftOut if none is left."""
    found = []
    for run in runs:
        try:
            found.append((run, run.arrays(name, needed)))
        except Damaged as reason:
            problems.append(str(reason))
    if not found:
        raise LeftOut(f"no run has a {name} that can be read")
    return found


def draw_meta_training(runs: list[Run], palette: Palette, problems: list[str]) -> tuple[Figure, list[Run]]:
    """Fig. 4: a panel per environment, a curve per setting."""
    environments = group(runs, lambda run: run.env)
    figure, axes = panels(list(environments))
    for ax, members in zip(axes, environments.values()):
        for seeds in group(members, Run.setting).values():
            draw_learning_curves(ax, seeds, seeds[0].label, palette.style(seeds[0].label))
        legend(ax)
    return figure, runs


def draw_episodes(name: str) -> Callable:
    """Figs. 5 and 6: the return of each episode, averaged over the tasks, from meta_test.npz or ood.npz."""

    def draw(runs: list[Run], palette: Palette, problems: list[str]) -> tuple[Figure, list[Run]]:
        if name == "ood.npz":
            runs = [run for run in runs if np.isfinite(run.progress["ood_return"]).any()]
            if not runs:
                raise LeftOut("no run's environment has out-of-distribution tasks")
        arrays = {id(run): data for run, data in usable(runs, name, ("rewards",), problems)}
        drawn = [run for run in runs if id(run) in arrays]
        environments = group(drawn, lambda run: run.env)
        figure, axes = panels(list(environments))
        for ax, members in zip(axes, environments.values()):
            for seeds in group(members, Run.setting).values():
                returns = np.array([arrays[id(run)]["rewards"].sum(axis=2).mean(axis=0) for run in seeds])
                episodes = np.arange(1, returns.shape[1] + 1)
                draw_curve(ax, episodes, returns, seeds[0].label, palette.style(seeds[0].label), marker="o", markersize=3)
            ax.set(xlabel="episode", ylabel="average return", xticks=episodes)
            legend(ax)
        return figure, drawn

    return draw


def draw_refinement(runs: list[Run], palette: Palette, problems: list[str]) -> tuple[Figure, list[Run]]:
    """Fig. 7: both errors over the layers, 0 being the working memory. One environment: the first by name."""
    found = usable(runs, "refinement.npz", ("representation_error", "regression_mse"), problems)
    found = one_environment(found)
    figure, axes = panels(["representation error", "regression error"])
    arrays = {id(run): data for run, data in found}
    for seeds in group([run for run, _ in found], Run.setting).values():
        for ax, quantity in zip(axes, ("representation_error", "regression_mse")):
            errors = np.array([arrays[id(run)][quantity] for run in seeds])
            layers = np.arange(errors.shape[1])
            draw_curve(ax, layers, errors, seeds[0].label, palette.style(seeds[0].label), marker="o", markersize=3)
    axes[0].set(xlabel="layer", ylabel=r"1 − cos($e^l$, $e^L$)", ylim=(0, None))
    axes[1].set(xlabel="layer", ylabel="mean squared error of the action", ylim=(0, None))
    for ax in axes:
        ax.xaxis.get_major_locator().set_params(integer=True)
        legend(ax)
    return figure, [run for run, _ in found]


def one_environment(found: list[tuple[Run, dict]]) -> list[tuple[Run, dict]]:
    """Those of HalfCheetahVel, which the paper shows, or else of the first environment by name."""
    environments = {run.env for run, _ in found}
    chosen = "HalfCheetahVel" if "HalfCheetahVel" in environments else min(environments)
    return [(run, data) for run, data in found if run.env == chosen]


def draw_working_memories(runs: list[Run], palette: Palette, problems: list[str]) -> tuple[Figure, list[Run]]:
    """Fig. 8: the working memories of one run on their three principal components, coloured by task."""
    run, data = one_environment(usable(runs, "working_memories.npz", ("embedding", "task"), problems))[0]
    centred = data["embedding"] - data["embedding"].mean(axis=0)
    _, scales, components = np.linalg.svd(centred, full_matrices=False)
    points = centred @ components[:3].T
    share = scales[:3] ** 2 / (scales**2).sum()
    figure = plt.figure(figsize=(COLUMN * 1.3, COLUMN))
    axes = figure.add_subplot(projection="3d")
    dots = axes.scatter(*points.T, c=data["task"], cmap="viridis", s=3, linewidth=0)
    for name, part in zip("xyz", share):
        axes.set(**{f"{name}label": f"PC {'xyz'.index(name) + 1} ({part:.0%})", f"{name}ticklabels": []})
        getattr(axes, f"{name}axis").labelpad = -12  # where the tick labels would be
    figure.colorbar(dots, label=TASK_UNITS.get(run.env, "task"), shrink=0.6, pad=0.12)
    axes.set_title(f"{run.env}, seed {run.args['seed']}")
    return figure, [run]


def draw_online_adaptation(runs: list[Run], palette: Palette, problems: list[str]) -> tuple[Figure, list[Run]]:
    """Fig. 9: the reward at each step of the first episode; beside it, where a run has them, velocities of a few tasks."""
    found = one_environment(usable(runs, "meta_test.npz", ("rewards", "tasks"), problems))
    with_velocities = [(run, data) for run, data in found if "velocities" in data]
    figure, axes = panels(["reward in the first episode", "velocity reached"][: 1 + bool(with_velocities)])
    arrays = {id(run): data for run, data in found}
    for seeds in group([run for run, _ in found], Run.setting).values():
        rewards = np.concatenate([arrays[id(run)]["rewards"][:, 0] for run in seeds])  # (tasks of all seeds, H)
        style = palette.style(seeds[0].label)
        draw_curve(axes[0], np.arange(rewards.shape[1]), rewards, seeds[0].label, style, what="task")
    axes[0].set(xlabel="time step", ylabel="reward")
    legend(axes[0])
    if with_velocities:
        run, data = with_velocities[0]
        order = np.argsort(data["tasks"][:, 0])
        chosen = order[np.linspace(0, len(order) - 1, 4).round().astype(int)]
        for number, task in enumerate(chosen):
            target = data["tasks"][task, 0]
            axes[1].plot(data["velocities"][task, 0], color=COLOURS[number], label=f"target {target:.2f} m/s")
            axes[1].axhline(target, color=COLOURS[number], linestyle=":", linewidth=1)
        axes[1].set(xlabel="time step", ylabel="velocity (m/s)")
        legend(axes[1])
    return figure, [run for run, _ in found]


def draw_attention(runs: list[Run], palette: Palette, problems: list[str]) -> tuple[Figure, list[Run]]:
    """How the current memory divides its attention over the working memories, per layer, in one run."""
    attending = [run for run in runs if run.method == "TrMRL"]
    if not attending:
        raise LeftOut("a GRU has no attention")
    run, data = one_environment(usable(attending, "attention.npz", ("weights",), problems))[0]
    weights = data["weights"]  # (L, N)
    layers, length = weights.shape
    figure, (axes,) = panels([f"{run.env}, seed {run.args['seed']}"])
    picture = axes.imshow(weights, aspect="auto", cmap="viridis", vmin=0)
    axes.set(xlabel="working memory (steps back)", ylabel="layer", yticks=range(layers), yticklabels=range(1, layers + 1))
    ticks = np.unique(np.linspace(0, length - 1, min(length, 6)).round().astype(int))
    axes.set_xticks(ticks, [str(length - 1 - tick) if tick < length - 1 else "now" for tick in ticks])
    figure.colorbar(picture, label="attention weight")
    return figure, [run]


def ablations(runs: list[Run]) -> dict[str, list[list[Run]]]:
    """Figs. 10 to 13: for each flag the groups of runs of one environment that differ in nothing else, seeds aside."""
    found: dict[str, list[list[Run]]] = {}
    for flag in differing_flags(runs):
        if flag == "env":
            continue
        groups = [members for members in group(runs, lambda run: run.setting(flag)).values()
                  if differing_flags(members) == [flag]]
        if groups:
            found[flag] = groups
    return found


def draw_ablation(flag: str, groups: list[list[Run]]) -> Callable:
    """A panel per group of runs that differ in the flag alone, a curve per value."""

    def draw(runs: list[Run], palette: Palette, problems: list[str]) -> tuple[Figure, list[Run]]:
        figure, axes = panels([members[0].env for members in groups])
        for ax, members in zip(axes, groups):
            for seeds in group(members, Run.setting).values():
                draw_learning_curves(ax, seeds, flag_text(seeds[0], [flag]), palette.style(seeds[0].label))
            legend(ax)
        return figure, [run for members in groups for run in members]

    return draw


def summary_table(runs: list[Run]) -> str:
    """Final results per environment and setting, as Markdown: means over the seeds with their intervals."""
    columns = ("train_return", "test_return", "ood_return", "train_success", "test_success")
    lines = ["| environment | setting | seeds | steps | " + " | ".join(name.replace("_", " ") for name in columns)
             + " | minutes | steps/s |", "|---" * (4 + len(columns) + 2) + "|"]
    for seeds in group(runs, lambda run: run.env + run.setting()).values():
        cells = [seeds[0].env, seeds[0].label, str(len(seeds)),
                 f"{np.mean([run.progress['env_steps'][-1] for run in seeds]):,.0f}"]
        for name in columns:
            measured = [run.progress[name][np.isfinite(run.progress[name])] for run in seeds]
            finals = np.array([values[-1] for values in measured if len(values)])
            digits = 2 if name.endswith("success") else 1
            cells.append(interval_text(finals, digits) if len(finals) == len(seeds) else "")
        minutes = np.array([run.progress["wall_seconds"][-1] / 60 for run in seeds])
        speeds = np.array([run.progress["env_steps"][-1] / run.progress["wall_seconds"][-1] for run in seeds])
        cells += [interval_text(minutes, 1), interval_text(speeds, 0)]
        lines.append("| " + " | ".join(cells) + " |")
    return "\n".join(lines) + "\n"


def interval_text(values: np.ndarray, digits: int) -> str:
    text = f"{values.mean():.{digits}f}"
    if len(values) > 1:
        low, high = bootstrap_interval(values)
        text += f" [{low:.{digits}f}, {high:.{digits}f}]"
    return text


# ---------------------------------------------------------------------------------------------------------------------
# The command line
# ---------------------------------------------------------------------------------------------------------------------


def write(path: Path, save: Callable[[Path], None]) -> None:
    """save(temporary) beside path, then rename, so that path is never half-written."""
    temporary = path.with_name(f".{path.name}")
    save(temporary)
    os.replace(temporary, path)


def draw_all(folders: list[Path], out: Path, pdf: bool) -> int:
    """Draws what the folders can give and says a line a figure; returns the exit code."""
    runs, problems = [], []
    for folder in folders:
        try:
            runs.append(load_run(folder))
        except Damaged as reason:
            problems.append(str(reason))
    for reason in problems:
        print(f"left out: {reason}", file=sys.stderr)
    if not runs:
        print("error: none of the folders is a run; give runs/<name> folders that trmrl.py has written", file=sys.stderr)
        return 2
    name_settings(runs)
    palette = Palette([run.label for run in runs])
    figures = {
        "meta_training": draw_meta_training,
        "adaptation": draw_episodes("meta_test.npz"),
        "ood": draw_episodes("ood.npz"),
        "refinement": draw_refinement,
        "working_memories": draw_working_memories,
        "online_adaptation": draw_online_adaptation,
        "attention": draw_attention,
    }
    groups = ablations(runs)
    figures |= {f"ablation_{flag}": draw_ablation(flag, members) for flag, members in groups.items()}
    try:
        out.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        print(f"error: --out {out}: takes a folder that can be written ({error.strerror})", file=sys.stderr)
        return 2
    damaged = bool(problems)
    for name, draw in figures.items():
        problems = []
        try:
            figure, drawn = draw(runs, palette, problems)
            for kind in ("png", "pdf")[: 1 + pdf]:
                write(out / f"{name}.{kind}", lambda path: figure.savefig(path, format=kind))
            plt.close(figure)
            print(f"{name}: drawn from {', '.join(run.folder.name for run in drawn)}")
        except LeftOut as reason:
            print(f"{name}: left out, {reason}")
        for reason in problems:
            print(f"{name}: without a run, as {reason}", file=sys.stderr)
        damaged |= bool(problems)
    if not groups:
        print("ablation_<flag>: left out, no two runs of one environment differ in just one flag")
    write(out / "summary.md", lambda path: path.write_text(summary_table(runs)))
    print(f"summary: a table of {len(runs)} runs")
    return int(damaged)


def main(argv: list[str] | None = None) -> int:
    def flags(
        runs: Annotated[tuple[Path, ...], tyro.conf.Positional],
        out: Path = Path("figures"),
        pdf: bool = False,
    ) -> tuple[list[Path], Path, bool]:
        """Draws every figure that runs can give.

        Args:
            runs: folders that trmrl.py has written
            out: where the figures go
            pdf: as PDF too
        """
        return sorted(runs), out, pdf

    return draw_all(*tyro.cli(flags, args=argv, prog="plot.py"))


if __name__ == "__main__":
    sys.exit(main())
