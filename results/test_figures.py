"""What plot.py must draw, from runs with random contents."""

import json
from pathlib import Path

import gymnasium
import numpy as np
import pandas as pd
import pytest
import scipy.stats
from PIL import Image

import plot
from test_trmrl import progress


def fake_run(folder: Path, env="HalfCheetahVel", seed=1, success=False, steps=10, shift=0, **flags) -> Path:
    """A run's files with random contents; of ten iterations to come, so that fewer steps are unfinished."""
    folder.mkdir(parents=True)
    rng = np.random.default_rng(seed)
    values = {"env": env, "seed": seed, "layers": 4, "heads": 2, "memory_length": 5, "t_fixup": True}
    values |= {"method": "TrMRL", "total_timesteps": 1000}
    (folder / "args.json").write_text(json.dumps(values | flags | {"runs_dir": str(folder), "device": seed}))
    progress = pd.DataFrame(np.nan, range(steps), plot.COLUMNS)
    progress = progress.assign(env_steps=100 * np.arange(1, steps + 1) + shift, wall_seconds=60.0, train_return=1.0)
    measured = ["test_return"] + ["test_success"] * success + ["ood_return"] * (env == "HalfCheetahVel")
    progress.loc[::3, measured] = rng.normal(size=(len(progress.loc[::3]), len(measured)))
    progress.to_csv(folder / "progress.csv", index=False)
    if steps == 10:
        tests = {"rewards": rng.normal(size=(5, 3, 4)), "tasks": rng.uniform(0, 3, (5, 1))}
        np.savez(folder / "meta_test.npz", observations=rng.normal(size=(5, 4, 17)), **tests)
        np.savez(folder / "ood.npz", **tests)
        np.savez(folder / "refinement.npz", representation_error=rng.uniform(size=5), regression_mse=np.ones(5))
        np.savez(folder / "working_memories.npz", embedding=rng.normal(size=(90, 8)), task=rng.uniform(0, 3, 90))
        np.savez(folder / "attention.npz", weights=rng.dirichlet(np.ones(5), 4))
    return folder


class TestFigures:
    def test_every_figure_is_drawn_or_misses_only_what_is_damaged(self, tmp_path, capsys, monkeypatch):
        monkeypatch.setattr(gymnasium, "make", lambda *_, **__: 1 / 0)  # as without OpenGL
        plot.plt.rcParams["savefig.dpi"] = 30  # nobody looks at these
        folders = [fake_run(tmp_path / f"{seed}", seed=seed) for seed in (1, 2)]
        folders += [fake_run(tmp_path / "deep", layers=12), fake_run(tmp_path / "ant", env="AntDir")]
        bad = [folders[1] / "attention.npz"]
        bad += [fake_run(tmp_path / f"bad {name}", seed=9) / name for name in ("args.json", "progress.csv")]
        for path in bad:
            path.write_bytes(path.read_bytes()[:50])
        assert plot.draw([*folders, bad[1].parent, bad[2].parent], tmp_path / "figures", film=True) == 1
        *damaged, no_film = capsys.readouterr().err.splitlines()
        assert f"left out: {bad[0]} is damaged" in damaged and len(damaged) == 3
        assert all(f"left out: {path.parent} has no args.json" in "".join(damaged) for path in bad[1:])
        assert no_film.startswith("film.gif: left out (") and "install libegl1" in no_film
        written = {path.name for path in (tmp_path / "figures").iterdir()}
        figures = "meta_training adaptation ood refinement working_memories online_adaptation attention ablation_layers"
        assert written == {f"{name}.png" for name in figures.split()}
        for folder, out in ((tmp_path / "nothing", tmp_path / "none"), (folders[0], folders[0] / "args.json")):
            assert plot.draw((folder,), out) == 2 and "error: " in capsys.readouterr().err
        assert not (tmp_path / "none").exists() and json.loads((folders[0] / "args.json").read_text())

    def test_film_of_every_second_step_follows_the_run(self, tmp_path, monkeypatch):
        env, positions = gymnasium.make("HalfCheetah-v5").unwrapped, []
        monkeypatch.setattr(gymnasium, "make", lambda *_, **__: env)
        monkeypatch.setattr(env, "render", lambda: positions.append(env.data.qpos.copy()) or np.zeros((160, 240, 3)))
        (run,) = plot.load_runs([fake_run(tmp_path / "run")], [])
        plot.save_film(run, plot.open_renderer(), tmp_path / "film.gif")
        with Image.open(tmp_path / "film.gif") as film:
            assert film.n_frames == 2 and film.size == (750, 340) and film.info["duration"] == 80
        observations = run.files["meta_test"]["observations"][run.files["meta_test"]["tasks"][:, 0].argmax()]
        assert positions[-1] == pytest.approx([observations[:3, 8].sum() * env.dt, *observations[2, :8]])

    def test_figure_of_meta_training_shows_the_mean_of_the_evaluations(self, tmp_path):
        """Seeds whose episodes ended early come onto common steps; two seeds have no band."""
        folders = [fake_run(tmp_path / f"{seed}", seed=seed) for seed in (1, 2, 3)]
        figure = plot.FIGURES["meta_training"][1](plot.load_runs(folders, []))
        (axes,) = figure.axes
        assert axes.get_title() == "HalfCheetahVel (seeds: 3)" and axes.get_ylabel() == "return of an episode"
        assert [label.get_text() for legend in figure.legends for label in legend.get_texts()] == ["TrMRL"]
        assert axes.lines[0].get_xdata() == pytest.approx(np.array([1, 4, 7, 10]) / 1e4)
        returns = [progress(folder)["test_return"].dropna() for folder in folders]
        assert axes.lines[0].get_ydata() == pytest.approx(np.mean(returns, axis=0))
        tests = scipy.stats.ttest_1samp(returns, 0)
        low, high = tests.confidence_interval(0.95)
        band = np.concatenate([path.vertices[:, 1] for path in axes.collections[0].get_paths()])
        assert band.min() == pytest.approx(min(low)) and band.max() == pytest.approx(max(high))
        bottom, top = axes.get_ylim()  # hold the means, and cut off the band
        assert min(low) < bottom < np.mean(returns, axis=0).min() and np.mean(returns, axis=0).max() < top < max(high)
        (axes,) = plot.FIGURES["meta_training"][1](plot.load_runs(folders[:2], [])).axes
        assert not any(len(path.vertices) for band in axes.collections for path in band.get_paths())
        reach = [fake_run(tmp_path / f"{s}", "ML1-Reach", s, success=True, shift=s) for s in (0, 30)]
        table = plot.learning_curves(plot.load_runs(reach, []))
        assert set(table["quantity"]) == {"success rate"} and table["x"].max() == pytest.approx(1000 / 1e6)
        late = table.query("seed == 30")
        expected = np.interp(1e6 * late["x"], [130, 430, 730, 1030], progress(reach[1])["test_success"].dropna())
        assert late["y"].to_numpy() == pytest.approx(expected)

    def test_titles_count_the_seeds_of_each_curve(self, tmp_path):
        folders = [fake_run(tmp_path / f"{seed}", seed=seed) for seed in (1, 2)]
        folders += [fake_run(tmp_path / "rl2", method="RL2"), fake_run(tmp_path / "ant", env="AntDir", method="RL2")]
        figure = plot.FIGURES["meta_training"][1](plot.load_runs(folders, []))
        titles = [axes.get_title() for axes in figure.axes]
        assert titles == ["HalfCheetahVel (seeds: 2, 1)", "AntDir (seeds: 0, 1)"]

    def test_many_settings_leave_the_panels_their_size(self, tmp_path):
        folders = [fake_run(tmp_path / f"{n}", layers=n, learning_rate=n / 1e4, minibatch_size=n) for n in range(1, 13)]
        for some in (folders[:1], folders):
            figure = plot.FIGURES["meta_training"][1](plot.load_runs(some, []))
            figure.draw_without_rendering()  # lays it out
            width, height = figure.axes[0].get_position().size * figure.get_size_inches()
            assert width > 2.2 and height > 1.4  # inches

    def test_figure_of_adaptation_shows_what_the_files_hold(self, tmp_path):
        folders = [fake_run(tmp_path / "rl2", method="RL2"), fake_run(tmp_path / "trmrl")]
        runs, file = plot.load_runs(folders, []), np.load(folders[1] / "meta_test.npz")
        table = plot.episode_curves(runs, "meta_test").query("setting == 'TrMRL'")
        assert table["y"].to_numpy() == pytest.approx(file["rewards"].sum((0, 2)) / 5)
        rewards, velocities = plot.draw_online_adaptation(runs).axes
        assert rewards.lines[0].get_ydata() == pytest.approx(np.mean(file["rewards"][:, 0], axis=0))
        assert velocities.get_title() == "HalfCheetahVel, TrMRL, seed 1" and velocities.get_ylabel() == "velocity (m/s)"
        assert velocities.lines[0].get_ydata() == pytest.approx(file["observations"][file["tasks"].argmin(), :, 8])

    def test_ablations_are_runs_that_differ_in_one_flag(self, tmp_path):
        variants = {"deep": dict(layers=12), "base": {}, "base2": dict(seed=2), "both": dict(layers=8, t_fixup=False)}
        variants |= {"ant": dict(env="AntDir", layers=2), "rl2": dict(method="RL2", layers=1)}
        runs = plot.load_runs([fake_run(tmp_path / name, **flags) for name, flags in variants.items()], [])
        found = {flag: [run.folder.name for run in some] for flag, some in plot.ablations(runs).items() if some}
        assert found == {"layers": ["base", "base2", "deep"]}  # 4 before 12
        labels = {run.folder.name: (run.label, run.colour) for run in runs}
        assert labels["rl2"] == ("RL²", plot.COLOURS["RL²"]) and labels["deep"][0] == "TrMRL, L = 12, T-Fixup"
        assert labels["base"] == labels["base2"] == ("TrMRL, L = 4, T-Fixup", plot.COLOURS["TrMRL"])  # the defaults
        assert labels["both"][0] == "TrMRL, L = 8, Xavier" and len(set(labels.values())) == 5
        rivals = [
            fake_run(tmp_path / name, method=method, layers=7) for name, method in (("t7", "TrMRL"), ("r7", "RL2"))
        ]
        both = plot.load_runs([*(run.folder for run in runs if run.env != "AntDir"), *rivals], [])
        assert (
            len({run.label for run in both}) == len({run.colour for run in both}) == 6
        )  # no two methods share a shade
        base, _, deep = plot.ablations(runs)["layers"]
        assert (base.label, base.colour, deep.label) == ("L = 4", plot.COLOURS["TrMRL"], "L = 12")
        assert (
            plot.ablations(plot.load_runs([fake_run(tmp_path / "long", total_timesteps=900), runs[0].folder], [])) == {}
        )

    def test_the_median_seed_stands_for_its_setting(self, tmp_path):
        runs = plot.load_runs([fake_run(tmp_path / f"{seed}", seed=seed) for seed in range(1, 6)], [])
        returns = [run.files["meta_test"]["rewards"][:, 0].sum() for run in runs]
        assert plot.median_run(runs).seed == runs[np.argsort(returns)[2]].seed
        assert plot.median_run(runs[:2]).seed == runs[np.argmin(returns[:2])].seed
        assert plot.draw_working_memories(runs).axes[0].get_title().endswith(f"seed {plot.median_run(runs).seed}")

    def test_metaworlds_equal_episodes_are_left_out(self, tmp_path):
        runs = plot.load_runs([fake_run(tmp_path / "reach", "ML1-Reach", success=True)], [])
        plot.draw_all(runs, tmp_path / "figures", film=False)
        assert not (tmp_path / "figures" / "adaptation.png").exists()
        assert (tmp_path / "figures" / "online_adaptation.png").exists()

    def test_an_interrupted_film_leaves_nothing(self, tmp_path, monkeypatch, capsys):
        def interrupt(run, renderer, path):
            path.write_bytes(b"half a film")
            raise KeyboardInterrupt

        monkeypatch.setattr(plot, "save_film", interrupt)
        monkeypatch.setattr(plot, "open_renderer", lambda: gymnasium.make("HalfCheetah-v5"))
        assert plot.draw((fake_run(tmp_path / "run"),), tmp_path / "figures", film=True) == 130
        assert not list((tmp_path / "figures").glob("film*")) and "stopped" in capsys.readouterr().err

    def test_unfinished_runs_and_the_same_seed_twice(self, tmp_path, capsys):
        half, problems = fake_run(tmp_path / "half", seed=2, steps=5), []
        new, old = (fake_run(tmp_path / f"{name}-2026010{day}-000000-000001") for name, day in (("a", 2), ("b", 1)))
        assert [run.folder for run in plot.load_runs([half, new, old], problems)] == [new]
        assert problems == [f"{half} is unfinished"]
        assert capsys.readouterr().err == f"left out: {old} has the setting and seed of {new}\n"
        assert plot.load_runs([half], problems)[0].label == "TrMRL, unfinished"
