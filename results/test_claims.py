"""claims.py on two tiny runs: tables, verdicts and figures, checked against sums written out here."""

import json
import sys
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pandas as pd
import pytest
import scipy.stats
import torch

sys.path.insert(0, str(Path(__file__).resolve().parent))
import claims  # noqa: E402 (they are beside this file)
import probe  # noqa: E402
import reproduce  # noqa: E402
from test_figures import fake_run  # noqa: E402

from test_trmrl import run as trained  # noqa: E402
from test_trmrl import trmrl

ERRORS = ("representation_error", "regression_mse")


@pytest.fixture
def kept(tmp_path, monkeypatch) -> Path:
    """A repository's results with one run of TrMRL and one of PEARL."""
    folder = tmp_path / "results" / "runs"
    for number, (name, method) in enumerate((("trmrl", "TrMRL"), ("pearl", "PEARL"))):
        run = folder / f"{name}-HalfCheetahVel-s1"
        fake_run(run, method=method, versions={"commit": "1234567", "beside": 1})
        rewards = np.random.default_rng(number).normal(size=(5, 6, 200))
        np.savez(run / "ood.npz", rewards=rewards, tasks=np.zeros((5, 1)))
        np.savez(run / "meta_test.npz", rewards=2 * rewards, tasks=np.zeros((5, 1)))
        probes = {f"untrained_{name}": np.array([2.0, 1.0, 0.5, 0.5, 0.0]) for name in ERRORS}
        probes |= {name: np.array([4.0, 4.0, 4.0, 4.0, 0.0]) for name in ERRORS}
        probes |= {"weighing": np.array([0.2, 0.4]), "untrained_weighing": np.array([0.1, -0.3]), "r2_memories": 0.9}
        np.savez(run / "probe.npz", violations=[0.0, 0.25], violations_normalised=[0.0, 0.0], **probes)
    for file in ("README.md", "results/README.md", "results/claims.md", "results/claims.csv"):
        (tmp_path / file).write_text((claims.ROOT / file).read_text())
    monkeypatch.setattr(claims, "KEPT", folder)
    monkeypatch.setattr(claims, "ROOT", tmp_path)
    return folder


def test_tables_and_figures_of_two_tiny_runs(kept):
    claims.draw()
    claims.write_tables()
    figures = {path.name for path in (kept.parent / "figures").iterdir()}
    assert {"meta_training.png", "adaptation.png", "ood.png", "refinement.png"} <= figures
    readme = (claims.ROOT / "README.md").read_text()
    rows = [
        [cell.strip() for cell in line.split("|")[1:-1]] for line in readme.splitlines() if line.startswith("| Half")
    ]
    expected = {"return": ("meta_test", slice(0, 1), slice(2, 3)), "OOD return": ("ood", slice(0, 6), slice(2, 6))}
    for _, what, ours, rl2, varibad, pearls, maml in rows:  # PEARL's third episode is the first that is adapted
        file, *episodes = expected.pop(what)
        for cell, name, some in zip((ours, pearls), ("trmrl", "pearl"), episodes):
            returns = np.load(kept / f"{name}-HalfCheetahVel-s1" / f"{file}.npz")["rewards"].sum(2)[:, some].mean()
            mean, count = cell.split()
            assert float(mean) == pytest.approx(returns, rel=0.01) and count == "(1)"
        assert (rl2, varibad, maml) == ("", "", "")
    assert not expected
    assert "| HalfCheetahVel | M steps; minutes | 0.001; 1 |" in (kept.parent / "claims.md").read_text()
    seeds = pd.read_csv(kept.parent / "seeds.csv")
    assert seeds["run"].tolist() == ["pearl-HalfCheetahVel-s1", "trmrl-HalfCheetahVel-s1"]
    judged = claims.judged().set_index("measure")["result"]
    assert judged["actions_emerge"] == "-0.67"  # a third of layer 0's error, less a trained network's, which stays
    assert judged["attention_weighs"] == "0.40"  # 0.3, less -0.1
    verdicts = claims.judged().set_index("claim")["verdict"]
    assert verdicts["the return is high from the first episode on"] == "open"  # one seed decides nothing
    assert verdicts["Theorem 4.1, with the network's own values, which are not normalised"] == "does not hold"
    assert verdicts["TrMRL ends above RL² on HalfCheetahVel"] == "not run"


def test_what_must_be_so_in_all_seeds(kept):
    table = pd.read_csv(kept.parent / "claims.csv", keep_default_na=False).set_index("measure", drop=False)
    fake_run(kept / "trmrl-HalfCheetahVel-s2", seed=2)
    falls, stays = [4, 3, 2, 1, 0], [4, 3, 3, 1, 0]
    for second, result, verdict in ((falls, "2 of 2 seeds", "holds"), (stays, "1 of 2 seeds", "does not hold")):
        for seed, errors in ((1, falls), (2, second)):
            np.savez(kept / f"trmrl-HalfCheetahVel-s{seed}" / "refinement.npz", **dict.fromkeys(ERRORS, errors))
        assert claims.judge(table.loc["regression_mse_falls"]) == (result, verdict)
        assert claims.judge(table.loc["representation_error_falls"]) == (result, "says nothing")


def test_figures_of_ablations_tell_apart_what_ablations_py_changes(tmp_path):
    flags = [{}, dict(seed=2), dict(t_fixup=False), dict(layers=12)]
    flags += [dict(method="Ablation", swap_layer_norm=True, t_fixup=x, plain=y) for x in (True, False) for y in (0, 1)]
    folders = [fake_run(tmp_path / f"{number}", **values) for number, values in enumerate(flags)]
    poor = folders[-1] / "progress.csv"  # a plain run's
    pd.read_csv(poor).assign(test_return=-200).to_csv(poor, index=False)
    folders += [fake_run(tmp_path / "ant", env="AntDir")]
    figure = claims.draw_ablation(claims.plot.load_runs(folders, []), "t_fixup")
    four = ["T-Fixup", "T-Fixup + LayerNorm", "Xavier", "Xavier + LayerNorm"]
    assert [text.get_text() for text in figure.legends[0].get_texts()] == four
    assert figure.legends[0].get_lines()[0].get_color() == claims.plot.COLOURS["TrMRL"]
    seeds = {"L = 4": (2, 1, 1, 1), "L = 4, plain": (0, 1, 1, 0), "L = 12": (1, 0, 0, 0)}
    titles = [f"HalfCheetahVel\n{name} (seeds: {', '.join(map(str, some))})" for name, some in seeds.items()]
    assert [axes.get_title() for axes in figure.axes] == [*titles, "AntDir\nL = 4 (seeds: 1, 0, 0, 0)"]
    assert [axes.get_ylim()[0] == -150 for axes in figure.axes] == [True, False, True, False]
    assert [axes.get_ylim()[1] == 0 for axes in figure.axes] == [True, True, True, False]


def test_figure_of_memory_lengths_names_the_token_and_has_its_title_beside_the_legend(tmp_path):
    runs = [fake_run(tmp_path / f"N{n}", memory_length=n) for n in (1, 2, 5, 10, 25, 50)]
    runs += [fake_run(tmp_path / "token", memory_length=1, method="Ablation", authors_token=True)]
    figure = claims.draw_ablation(claims.plot.load_runs(runs, []), "memory_length")
    names = ["N = 1", "N = 1, authors' token", "N = 2", "N = 5", "N = 10", "N = 25", "N = 50"]
    assert [text.get_text() for text in figure.legends[0].get_texts()] == names
    figure.draw_without_rendering()  # lays it out
    assert not figure.axes[0].title.get_window_extent().overlaps(figure.legends[0].get_window_extent())


def test_what_is_kept_measures_as_the_whole_run(kept, tmp_path):
    run = kept / "pearl-HalfCheetahVel-s1"
    (kept / "commit.txt").write_text("1234567")  # which reproduce.py writes beside a run
    np.savez(run / "refinement.npz", **dict.fromkeys(ERRORS, np.ones(5)))
    reproduce.keep(run, tmp_path / run.name, ["meta_test", "ood"])
    whole, short = claims.Run(run), claims.Run(tmp_path / run.name)
    for measure in ("first", "ood", "adapted", "later", "final", "area"):
        assert getattr(short, measure)() == pytest.approx(getattr(whole, measure)()), measure
    for split in ("meta_test", "ood"):
        returns = whole.files[split]["rewards"].sum(2)  # of each task and episode
        assert short.files[split]["returns"] == pytest.approx(returns, abs=0.051)


def test_only_the_median_seed_keeps_what_figures_of_one_run_need(tmp_path, monkeypatch):
    keeps, runs = tmp_path / "results" / "runs", tmp_path / "runs"
    monkeypatch.setattr(reproduce, "KEPT", keeps)
    monkeypatch.setattr(reproduce, "ROOT", tmp_path)
    monkeypatch.setattr(reproduce, "probe", lambda run: {})
    checkpoint = tmp_path / "results" / "checkpoint"
    checkpoint.mkdir(parents=True)
    for seed, reward in ((1, -2), (2, -1), (3, -3)):
        run = fake_run(runs / f"{reproduce.SHOWN}{seed}" / "run", seed=seed, versions={})
        tests = {"rewards": np.full((5, 6, 4), reward), "observations": np.zeros((5, 4, 17))}
        np.savez(run / "meta_test.npz", tasks=np.zeros((5, 1)), **tests)
        (run / "checkpoint.pt").write_text(f"{seed}")
        (run.parent / "commit.txt").write_text("1234567")
        reproduce.keep(run, keeps / run.parent.name, ["meta_test", "ood"])
    for _ in range(2):  # a second call changes nothing
        reproduce.show_median()
        for seed in (1, 2, 3):
            folder = keeps / f"{reproduce.SHOWN}{seed}"
            files = {path.stem for path in folder.glob("*.npz")}
            assert (files >= {"working_memories", "attention"}) == (seed == 1)
            assert ("observations" in np.load(folder / "meta_test.npz")) == (seed == 1)
        assert (checkpoint / "checkpoint.pt").read_text() == "1"
        assert json.loads((checkpoint / "args.json").read_text())["seed"] == 1


def test_a_setting_is_of_runs_with_the_same_flags_that_are_wholly_kept(kept):
    setting = "maml HalfCheetahVel"
    runs = [fake_run(kept / f"maml-HalfCheetahVel-s{seed}", seed=seed, method="MAML") for seed in (1, 2, 3)]
    (runs[2] / "args.json").unlink()  # which reproduce.py writes last
    assert [run.args["seed"] for run in claims.find(setting)] == [1, 2]
    fake_run(kept / "maml-HalfCheetahVel-s4", seed=4, method="MAML", layers=3)
    with pytest.raises(ValueError, match=setting):
        claims.find(setting)


def test_costs_are_the_median_and_the_worst_seeds_until_a_return(kept):
    for seed, minutes, returns in ((1, 1, (-99, -50, -20)), (2, 2, (-59, -99, -29)), (3, 3, (-99, -70, -61))):
        run = fake_run(kept / f"maml-HalfCheetahVel-s{seed}", method="MAML", seed=seed)
        table = pd.DataFrame({"env_steps": [5e5, 1e6, 2e6], "test_return": returns})
        table["wall_seconds"] = minutes * np.array([60, 120, 180])
        table.reindex(columns=claims.plot.COLUMNS).to_csv(run / "progress.csv", index=False)
    assert "| MAML | 1 (—) M; 2 (—) min | 2 (—) M; 6 (—) min | 2 (—) M; 6 (—) min |" in claims.costs_table()


def test_intervals_are_students_and_welchs():
    a, b = np.array([1.0, 2.0, 4.0, 9.0]), np.array([0.0, 1.0, 5.0])
    mean = claims.Interval(a)
    assert (mean.low, mean.high) == pytest.approx(scipy.stats.t.interval(0.95, 3, a.mean(), scipy.stats.sem(a)))
    both, (v, w) = claims.Interval(a, b), (a.var(ddof=1) / 4, b.var(ddof=1) / 3)
    freedom = (v + w) ** 2 / (v**2 / 3 + w**2 / 2)  # Welch and Satterthwaite
    half = scipy.stats.t.ppf(0.975, freedom) * np.sqrt(v + w)
    assert (both.high - both.mean, both.mean - both.low) == pytest.approx((half, half))
    assert both.mean == pytest.approx(2.0)
    assert np.isnan(claims.Interval(a[:2]).low) and np.isnan(claims.Interval(a, b[:2]).low)
    share = claims.Interval([0.9, 1.0, 1.0], success=True)
    assert share.high == 1 and 0 <= share.low < 0.9


@pytest.mark.parametrize("rule, low, high, wanted", [
    ("above −9, or so", -8, 99, "holds"), ("above −9", -10, 99, "open"), ("above −9", -99, -10, "does not hold"),
    ("above 0", 1, 9, "holds"), ("above 0", -9, 9, "open"), ("above 0", -9, 4, "at most small"),
    ("above 0", 1, 4, "at most small"), ("above 0", -9, -1, "does not hold"), ("below 30 steps", 20, 29, "holds"),
    ("below 30", 31, 40, "does not hold"), ("within 5 of 0", -4, 4, "holds"), ("within 5 of 0", 1, 4, "holds"),
    ("within 5 of 0", -6, 4, "open"), ("within 5 of 0", 6, 9, "does not hold"),
])  # fmt: skip
def test_verdicts(rule, low, high, wanted):
    """By where the interval lies; the effect is 5."""
    number = claims.Interval([0.0])
    number.low, number.high = low, high
    assert claims.verdict(number, rule, 5.0) == wanted


def test_seeds_needed_are_those_of_the_t_tests_power():
    """Cohen's tables (1988) have 17 and 26 for two groups and effects of 1 and 0.8. For what is within, simulated."""
    assert claims.seeds_needed(3.0, 3.0, groups=2) == 17 and claims.seeds_needed(0.8, 1.0, groups=2) == 26
    assert claims.seeds_needed(0.1, 1.0, groups=1) == "over 100"
    n, rng = claims.seeds_needed(1.0, 1.0, groups=2, within=True), np.random.default_rng(0)
    for seeds, enough in ((n, True), (n - 2, False)):
        a, b = rng.normal(size=(2, 20_000, seeds))
        pairs = scipy.stats.ttest_ind(a, b, axis=1).confidence_interval()
        assert (np.mean((pairs.low > -1) & (pairs.high < 1)) > 0.8) == enough


def test_settings_with_the_same_seeds_are_compared_seed_by_seed():
    def setting(seeds, values):
        return [SimpleNamespace(args={"seed": seed}, area=lambda x=x: x) for seed, x in zip(seeds, values)]

    one, other = setting((1, 2, 3), (10.0, 30.0, 50.0)), setting((1, 2, 3), (9.0, 29.0, 47.0))
    paired, welch = claims.compare([one, other], "area"), claims.compare([one, setting((1, 2, 4), (9, 29, 47))], "area")
    assert (paired.low, paired.high) == scipy.stats.ttest_rel([10, 30, 50], [9, 29, 47]).confidence_interval()
    assert paired.mean == pytest.approx(welch.mean) and welch.high - welch.low > 10 * (paired.high - paired.low)
    more = claims.compare([one, other + setting((4, 5), (0, 1000))], "area")
    assert (more.mean, more.low, more.high) == (paired.mean, paired.low, paired.high)  # by the seeds that both have
    settings = [setting((1, 2, 3), k + 5 * np.arange(3)) for k in (1, 2, 3, 4)]
    settings[1] += setting((9,), (1000,))  # a seed that the others do not have
    grows = claims.compare(settings, "area")
    assert (grows.mean, grows.low, grows.high) == pytest.approx((1, 1, 1))  # by one from setting to setting


def test_probe_of_a_tiny_run(tmp_path, monkeypatch):
    folder = trained(tmp_path, "--env", "PointMass", "--total-timesteps", "16000", "--memory-length", "4")
    probed = probe.probe(folder)
    for prefix in ("", "untrained_"):
        assert np.abs(probed[f"{prefix}weighing"]).max() <= 1 and probed[f"{prefix}weighing"].shape == (2,)
        assert probed[f"{prefix}representation_error"][-1] < 1e-6 < probed[f"{prefix}representation_error"][0]
    exact, others = probed["regression_mse"][-1], probed["untrained_regression_mse"][-1]  # of the trained one's actions
    assert exact < 0.01 * others
    agent, _, _ = trmrl.load(folder)
    transitions, error = torch.rand(21, 5, 4), np.random.default_rng(0).random((20, 5))
    error[:2], error[:, 3] = np.nan, np.nan

    def refine(transitions, t, task):
        """Attention that falls with the error, and beside it depends on place and window."""
        assert t.min() == 5 and set(task.tolist()) == {0, 1, 2, 4}  # windows whose memories all have a guess
        past = np.stack([error[np.asarray(t) - age, np.asarray(task)] for age in (3, 2, 1, 0)], axis=1)
        alpha = torch.from_numpy([1.0, 2.0, 5.0, 9.0] - past + np.arange(len(t))[:, None])
        return None, [alpha[:, None], -alpha[:, None]]

    monkeypatch.setattr(agent, "refine", refine)
    np.testing.assert_allclose(probe.weighing(agent, transitions, error), [1, -1])
    values = torch.tensor([[1.0, 0.0], [0.0, 1.0], [-1.0, 0.0]])
    assert probe.share_broken(torch.tensor([[0.4, 0.2, 0.4]]), values[None]) == 0  # the consensus is the second value
    loud = torch.tensor([[1.0, 0.0], [0.0, 9.0], [0.0, 9.0]])  # the consensus follows two values of little weight
    assert probe.share_broken(torch.tensor([[0.6, 0.3, 0.1]]), loud[None]) == 1
