"""What must hold, against something independent: an equation written out slowly, another library, a perturbation."""

import contextlib
import errno
import functools
import itertools
import json
import math
import os
import pickle
import shutil
import signal
import subprocess
import sys
import threading
import timeit
from pathlib import Path

import gymnasium
import metaworld
import numpy as np
import pandas as pd
import pytest
import torch
from gymnasium.utils.env_checker import check_env
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

import trmrl  # or a student's own script: conftest.py
from baselines import rl2

HERE = Path(__file__).parent
TINY = "--num-tasks 2 --test-tasks 3 --test-episodes 2 --layers 2 --d-model 8 --heads 2 --minibatch-size 100".split()
FOUR = ["--env", "PointMass", *TINY, "--total-timesteps", "320", "--eval-interval", "2"]  # four iterations
main_rl2 = functools.partial(trmrl.main, agent_class=rl2.RL2, args_class=rl2.Args)


class Mortal(trmrl.PointMass):
    """Ends an episode where the velocity leaves ±0.6; what is observed then must not be looked at, NaN or not."""

    def __init__(self, seed):
        self.log = []  # what happened: (velocity before, action, reward, dead, success)

    def reset(self, *, seed=None, options=None):
        self.dead = False
        return super().reset(seed=seed)

    def step(self, action):
        assert not self.dead, "stepped after its end"
        before = self.velocity[0]
        velocity, reward, _, truncated, info = super().step(action[:1])  # a second one does nothing
        self.dead = abs(velocity[0]) > 0.6
        self.log.append((before, action[0], reward, self.dead, info["success"]))
        return np.array([np.nan]) if velocity[0] < -0.6 else velocity, reward, self.dead, truncated, info


trmrl.ENVS["Mortal"] = Mortal


def copies(env=trmrl.PointMass, n=12) -> list[gymnasium.Env]:
    return [env(seed=1) for _ in range(n)]


def make_agent(envs=None, **flags) -> trmrl.Agent:
    torch.manual_seed(0)
    sizes = dict(memory_length=4, layers=2, heads=2, d_model=8, init_std=0.5)
    return trmrl.Agent((envs or copies(n=1))[0], trmrl.Args(**sizes | flags))


def trial_of(envs, agent, tasks=3, episodes=2, explore=True) -> trmrl.Trial:
    rng = np.random.default_rng(0)
    return agent.collect(envs, envs[0].sample_tasks("train", tasks, rng), episodes, rng, explore)


def update(agent, trial, optimizer=None, **flags) -> dict:
    """ppo_update in one minibatch and epoch with plain gradient descent, if not told otherwise."""
    args = trmrl.Args(**dict(minibatch_size=1000, update_epochs=1, target_kl=None) | flags)
    optimizer = optimizer or torch.optim.SGD(agent.parameters(), lr=0.1)
    return trmrl.ppo_update(agent, optimizer, trial, args, np.random.default_rng(0))


def run(tmp_path, *flags, main=None) -> Path:
    before = set(tmp_path.glob("*"))
    assert (main or trmrl.main)([*flags, "--runs-dir", str(tmp_path)]) == 0
    (folder,) = set(tmp_path.glob("*")) - before
    return folder


@pytest.fixture(scope="module")
def finished(tmp_path_factory) -> Path:
    return run(tmp_path_factory.mktemp("runs"), *FOUR)


@pytest.fixture
def folder(finished, tmp_path) -> Path:
    return Path(shutil.copytree(finished, tmp_path / "run"))


def content_of(folder: Path) -> dict:
    return {path: path.read_bytes() for path in folder.iterdir()}


def error(capsys, code: int, *flags, main=None) -> str:
    """The one line with which a command ends; before a user's mistake there is no other, not even a bar."""
    capsys.readouterr()
    assert (main or trmrl.main)([str(flag) for flag in flags]) == code
    *others, line = capsys.readouterr().err.splitlines()
    assert line.startswith("error: ") and not (others and code == 2)
    return line.removeprefix("error: ")


def progress(folder: Path) -> pd.DataFrame:
    return pd.read_csv(folder / "progress.csv")


def slow_layer(layer, memories):
    """One transformer layer, position by position and head by head: Eq. 1; and its α (ω, n, n): Eq. 4."""
    n, d = len(memories), memories.shape[1] // layer.heads
    refined, alpha = [], torch.zeros(layer.heads, n, n)
    for t in range(n):
        heads = []
        for head in range(layer.heads):
            part = slice(head * d, (head + 1) * d)
            query = layer.query(memories[t])[part]
            weights = torch.stack([(query @ layer.key(memories[i])[part] / math.sqrt(d)).exp() for i in range(t + 1)])
            values = torch.stack([layer.value(memories[i])[part] for i in range(t + 1)])
            alpha[head, t, : t + 1] = weights = weights / weights.sum()
            heads.append((weights[:, None] * values).sum(0))
        x = layer.attention_norm(memories[t] + layer.output(torch.cat(heads)))
        hidden = layer.feed_forward_in(x)
        refined.append(layer.feed_forward_norm(x + layer.feed_forward_out(hidden * (hidden > 0))))
    return torch.stack(refined), alpha


class TestAgent:
    @pytest.mark.parametrize("layer_norm", [True, False])
    def test_layer_is_eq_1(self, layer_norm):
        layer = trmrl.TransformerLayer(8, 2, layer_norm)
        memories = torch.randn(3, 5, 8)
        mask = torch.full((3, 1, 5, 5), -1e9).triu(1)
        mask[1, :, :, 0] = -1e9  # a PAD in front, which is as if it were not there
        refined, alpha = layer(memories, memories, mask)
        for batch, start in enumerate((0, 1, 0)):
            ours = refined[batch, start:], alpha[batch, :, start:, start:]
            torch.testing.assert_close(ours, slow_layer(layer, memories[batch, start:]), rtol=1e-4, atol=1e-5)
        torch.testing.assert_close(alpha.sum(3), torch.ones(3, 2, 5))
        last, _ = layer(memories[:, -2:], memories, mask[:, :, -2:])
        torch.testing.assert_close(last, refined[:, -2:])

    @torch.no_grad()
    def test_the_layer_norm_arm_is_torchs_transformer_layer(self):
        layer = trmrl.TransformerLayer(16, 4, layer_norm=True)
        theirs = torch.nn.TransformerEncoderLayer(16, 4, 64, dropout=0.0, batch_first=True)
        names = {"output": "self_attn.out_proj", "feed_forward_in": "linear1", "feed_forward_out": "linear2"}
        names |= {"attention_norm": "norm1", "feed_forward_norm": "norm2"}
        for parameter in layer.parameters():
            parameter += 0.1 * torch.randn_like(parameter)  # biases and norms that do something
        for name, other in names.items():
            theirs.get_submodule(other).load_state_dict(layer.get_submodule(name).state_dict())
        for kind in ("weight", "bias"):
            packed = torch.cat([getattr(getattr(layer, part), kind) for part in ("query", "key", "value")])
            getattr(theirs.self_attn, f"in_proj_{kind}").copy_(packed)
        memories, mask = torch.randn(3, 5, 16), torch.full((5, 5), -1e9).triu(1)
        torch.testing.assert_close(layer(memories, memories, mask)[0], theirs(memories, src_mask=mask))

    @pytest.mark.parametrize("t_fixup", [True, False])
    def test_t_fixup_scales(self, t_fixup):
        """The standard deviation of every matrix (Sec. 3.3): Xavier, × 0.67 L^-1/4 for values, outputs and both FFN."""
        d, L = 64, 4
        agent = make_agent(layers=L, heads=4, d_model=d, t_fixup=t_fixup)
        xavier, xavier_ffn = (2 / (d + d)) ** 0.5, (2 / (d + 4 * d)) ** 0.5
        scale = 0.67 * L**-0.25 if t_fixup else 1.0
        expected = {"query": xavier, "key": xavier, "value": scale * xavier, "output": scale * xavier}
        expected |= {"feed_forward_in": scale * xavier_ffn, "feed_forward_out": scale * xavier_ffn}
        norm = torch.nn.Identity if t_fixup else torch.nn.LayerNorm
        for layer in agent.layers:
            for name, std in expected.items():
                assert getattr(layer, name).weight.std().item() == pytest.approx(std, rel=0.05), name
                assert not getattr(layer, name).bias.any()
            assert isinstance(layer.attention_norm, norm) and isinstance(layer.feed_forward_norm, norm)
        assert not agent.phi.bias.any()
        if t_fixup:
            phi = torch.nn.Linear(500, d)  # wide enough to tell
            trmrl.t_fixup_(phi, agent.layers)
            assert phi.weight.std().item() == pytest.approx(d**-0.5 * (9 * L) ** -0.25, rel=0.05)

    def test_positions_are_vaswanis(self):
        pos, i = np.ogrid[:7, :3]
        angles = pos / 10_000 ** (2 * i / 6)
        expected = np.stack([np.sin(angles), np.cos(angles)], axis=2).reshape(7, 6)
        np.testing.assert_allclose(trmrl.sinusoidal_positions(7, 6), expected, atol=1e-6)

    def test_inputs_are_normalised_by_what_was_seen(self):
        agent = make_agent()
        data = torch.randn(20_000, 4) * torch.tensor([0.1, 1.0, 2.0, 30.0]) + 5
        for chunk in data.split([5000, 1, 14_999]):
            agent.count_inputs(chunk)
        torch.testing.assert_close(agent.input_mean, data.mean(0), rtol=1e-3, atol=1e-3)
        torch.testing.assert_close(agent.input_var, data.var(0), rtol=1e-2, atol=0.02)  # it starts with a step of 0s
        limited = agent.normalise(data.mean(0) + torch.tensor([[1.0, -2.9, 0.0, 3.1]]) * data.std(0))
        torch.testing.assert_close(limited, torch.tensor([[0.2, -2.9, 0.0, 3.0]]), rtol=1e-2, atol=1e-2)


class TestTrial:
    @pytest.mark.parametrize("N", [1, 4, 30])
    def test_windows_follow_algorithm_1(self, N):
        """Against Alg. 1 as printed: at first a buffer of N - 1 PADs, to which each transition is appended."""
        transitions = torch.randn(61, 2, 4)  # of three episodes, and what is observed after them
        for t in range(61):
            if t in (0, 20, 40):
                buffer = [None] * (N - 1)
            D = buffer[len(buffer) - (N - 1) :] + [transitions[t, 1]]
            windows, filled = trmrl.retrieve(transitions, torch.tensor([t]), torch.tensor([1]), N, 20)
            assert filled[0].tolist() == [slot is not None for slot in D], f"t = {t}"
            assert all(slot is None or torch.equal(window, slot) for window, slot in zip(windows[0], D)), f"t = {t}"
            buffer = buffer + [transitions[t, 1]]

    @torch.no_grad()
    def test_acting_follows_algorithm_1(self):
        """Values and log-probabilities of a trial, one step and task at a time, PADs cut off instead of masked."""
        envs = copies(Mortal)
        agent = make_agent(envs, init_std=0.6)  # which clips some actions
        agent.return_mean.fill_(0.3)  # what the value head's 0 stands for
        agent.count_inputs(torch.randn(100, 4) + 0.5)  # so that a PAD's 0 is not the raw one
        trial = trial_of(envs, agent, tasks=6)
        for t, task in trial.valid.nonzero().tolist():
            window = trial.transitions[max(t // 20 * 20, t - 3) : t + 1, task]
            normalised = agent.normalise(window)
            normalised[-1, 1:] = 0  # (s_next, a_PAD, r_PAD, η_PAD)
            e_0 = memories = agent.phi(normalised) + agent.positions[-len(window) :]
            for layer in agent.layers:
                memories, _ = slow_layer(layer, memories)
            policy = torch.distributions.Normal(agent.policy(memories[-1]), agent.log_std.exp())
            refined, _ = agent.refine(trial.transitions, torch.tensor([t]), torch.tensor([task]))  # as it is trained
            for layer, slow in ((0, e_0), (-1, memories)):  # first what comes from φ and positions, then from the mask
                torch.testing.assert_close(refined[layer][0], slow[-1], rtol=1e-4, atol=1e-5, msg=f"e, {t=}, {task=}")
            expected = agent.value(memories[-1]).item() + 0.3, policy.log_prob(trial.transitions[t, task, 1:2]).item()
            acted = trial.values[t, task].item(), trial.log_probs[t, task].item()
            assert acted == pytest.approx(expected, abs=1e-5), f"value, log-probability, t = {t}, task {task}"

    def test_a_trial_is_what_the_environment_did(self):
        """States, actions, rewards, η, success and death, against what each copy of the environment wrote down."""
        envs = copies(Mortal)
        trial = trial_of(envs, make_agent(envs, init_std=0.4), tasks=12)
        for task, env in enumerate(envs):
            for (t,), (s, a, r, dead, success) in zip(trial.valid[:, task].nonzero().tolist(), env.log, strict=True):
                row = trial.transitions[t, task].tolist()
                assert [row[0], np.clip(row[1], -1, 1), row[2]] == pytest.approx([s, a, r], abs=1e-6)
                assert (row[3], trial.success[t, task]) == ((dead or t % 20 == 19) and t < 39, success), f"t = {t}"
        assert 0 < sum(dead for env in envs for *_, dead, _ in env.log) < 24
        assert len({float(env.task[0]) for env in envs}) == 12, "each task in an environment of its own"
        assert not trial.transitions[:-1][~trial.valid].any()  # nothing happens after a death
        s, a, r, eta = trmrl.named(trial.transitions, 1)
        assert torch.equal(torch.cat([s, a, r[..., None], eta[..., None]], dim=2), trial.transitions)
        assert torch.equal(trial.a, a[:-1]) and torch.equal(trial.r, r[:-1])
        alive = trial.valid[-1] & (trial.transitions[-1, :, 0] != 0)
        assert 0 < alive.sum() < 12 and torch.equal(trial.values[-1] != 0, alive)  # its end is a truncation, no death
        assert trial.transitions[:, :, 1].abs().max() > 1  # the action that was drawn, not the clipped one

    @torch.no_grad()
    def test_exploration_has_the_policys_deviation(self):
        agent = make_agent(init_std=0.4)
        trial = trial_of(copies(n=50), agent, tasks=50)
        t, task = trial.valid.nonzero(as_tuple=True)
        noise = trial.transitions[t, task, 1:2] - agent(trial.transitions, t, task)[0].mean
        assert noise.std().item() == pytest.approx(0.4, rel=0.05) and abs(noise.mean().item()) < 0.03
        starts = [some.transitions[[0, 20], :, 0] for some in (trial, trial_of(copies(n=50), agent, 50, explore=False))]
        assert torch.equal(*starts) and len(starts[0].unique()) == 100  # the same, explored or not; each episode's own
        agent.policy.bias.fill_(math.nan)
        with pytest.raises(trmrl.RunFailed):
            trial_of(copies(), agent)

    def test_a_methods_state_comes_back_at_the_next_step(self):
        """With an agent that keeps something from step to step, as RL² does: here how often each task has lived."""

        def count(transitions, t, alive, noise, state):
            lived = (torch.zeros(len(alive)) if state is None else state) + alive
            return noise, noise.sum(1), lived, lived

        agent, envs = make_agent(), copies(Mortal, n=6)
        agent.act = count
        trial = trial_of(envs, agent, tasks=6)
        assert not trial.valid.all()
        torch.testing.assert_close(trial.values[:-1], trial.valid.cumsum(0).float())


class TestPPO:
    def test_advantages_are_the_double_sum_over_the_trial(self):
        """A_t = Σ_k (γλ)^k δ_(t+k) over the valid steps of all episodes; others pass without reward."""
        gamma, lam, envs = 0.9, 0.8, copies(Mortal)
        trial = trial_of(envs, make_agent(envs, init_std=0.2), tasks=6, episodes=3)
        assert trial.valid[:20].all(0).any() and not trial.valid.all()
        advantages, returns = trmrl.advantages_and_returns(trial, gamma, lam)
        direct = torch.zeros(2, 60, 6)
        for task in range(6):
            when = [*trial.valid[:, task].nonzero()[:, 0].tolist(), 60]
            r, v = trial.r[when[:-1], task].tolist(), trial.values[when, task].tolist()
            delta = [r[k] + gamma ** (when[k + 1] - when[k]) * v[k + 1] - v[k] for k in range(len(r))]
            for i, t in enumerate(when[:-1]):
                advantage = sum((gamma * lam) ** (when[k] - t) * delta[k] for k in range(i, len(r)))
                direct[:, t, task] = torch.tensor([advantage, advantage + v[i]])
        torch.testing.assert_close(torch.stack([advantages, returns]) * trial.valid, direct, rtol=0, atol=1e-4)
        # With λ = 1 it is the discounted return of the whole trial, which has no reward after a termination.
        _, returns = trmrl.advantages_and_returns(trial, gamma, 1.0)
        whole = gamma**60 * trial.values[60] + sum(gamma**t * trial.r[t] for t in range(60))
        torch.testing.assert_close(returns[0], whole, rtol=0, atol=1e-3)

    def test_the_update_is_ppos(self):
        """One step on one minibatch, against the clipped objective written out sample by sample."""
        envs = copies()
        agent, copy = make_agent(envs), make_agent(envs)
        trial = trial_of(envs, agent)
        with torch.no_grad():
            for ours, theirs in zip(agent.parameters(), copy.parameters()):  # so that some ratios are clipped
                ours += 0.2 * torch.randn_like(ours)
                theirs.copy_(ours)
        statistics = update(agent, trial, gamma=0.95, gae_lambda=0.9, clip_coef=0.3, max_grad_norm=0.7)
        advantages, returns = trmrl.advantages_and_returns(trial, 0.95, 0.9)
        copy.rescale_value(returns)
        advantages = (advantages - advantages.mean()) / advantages.std(correction=0)
        policy_loss = value_loss = clipped = 0.0
        for t, task in trial.valid.nonzero().tolist():
            mean = copy.policy(copy.refine(trial.transitions, torch.tensor([t]), torch.tensor([task]))[0][-1])
            _, value = copy(trial.transitions, torch.tensor([t]), torch.tensor([task]))
            policy = torch.distributions.Normal(mean, copy.log_std.exp())
            ratio = (policy.log_prob(trial.transitions[t, task, 1:2]).sum() - trial.log_probs[t, task]).exp()
            objectives = ratio * advantages[t, task], max(min(ratio, 1.3), 0.7) * advantages[t, task]
            policy_loss -= min(objectives) / 120
            value_loss += 0.5 * (value[0] - returns[t, task]) ** 2 / returns.var(correction=0) / 120
            clipped += float(ratio < 0.7 or ratio > 1.3) / 120
        assert 0 < clipped < 1 and statistics["clip_fraction"] == pytest.approx(clipped)
        assert statistics["policy_loss"] == pytest.approx(policy_loss.item(), rel=1e-4)
        assert statistics["value_loss"] == pytest.approx(value_loss.item(), rel=1e-4)
        (policy_loss + value_loss).backward()
        norm = torch.stack([parameter.grad.norm() for parameter in copy.parameters()]).norm()
        for ours, theirs in zip(agent.parameters(), copy.parameters()):
            expected = theirs - 0.1 * theirs.grad * min(1.0, 0.7 / norm)
            torch.testing.assert_close(ours, expected, rtol=0, atol=1e-6)

    def test_minibatches_hold_every_valid_step_once_an_epoch(self, monkeypatch):
        envs = copies(Mortal)
        agent = make_agent(envs)
        trial = trial_of(envs, agent, tasks=6)
        seen, forward = [], agent.forward
        monkeypatch.setattr(agent, "forward", lambda *at: seen.append(at[1:]) or forward(*at))
        statistics = update(agent, trial, minibatch_size=50, update_epochs=2)
        number = math.ceil(trial.valid.sum().item() / 50)
        assert len(seen) == statistics["gradient_steps"] == 2 * number
        for epoch in (seen[:number], seen[number:]):
            steps = torch.cat([torch.stack(at, dim=1) for at in epoch])
            assert sorted(steps.tolist()) == trial.valid.nonzero().tolist()
            assert all(len(task.unique()) > 2 for _, task in epoch)  # Sec. 5.1: data batches mix tasks

    def test_rescaling_the_value_head_changes_no_prediction(self):
        agent = make_agent()
        trial = trial_of(copies(), agent)
        at = torch.arange(30), torch.arange(30) % 3
        before = agent(trial.transitions, *at)[1]
        for returns in (torch.randn(100) * 30 - 200, torch.full((100,), 5.0), torch.randn(100) * 3):
            agent.rescale_value(returns)
            torch.testing.assert_close(agent(trial.transitions, *at)[1], before, rtol=1e-3, atol=1e-2)
        moments = agent.return_mean.item(), agent.return_std.item()
        assert moments == pytest.approx((np.mean(returns.numpy()), np.std(returns.numpy())), rel=1e-3, abs=1e-5)

    def test_a_high_kl_ends_the_update(self):
        rows = {}
        for kl in (None, 1e9, 1e-9, 0.008, 0.012):
            agent = make_agent()
            optimizer, trial = torch.optim.Adam(agent.parameters(), lr=1e-2), trial_of(copies(), agent)
            row = rows[kl] = update(agent, trial, optimizer, minibatch_size=60, update_epochs=5, target_kl=kl)
            assert row["gradient_steps"] == optimizer.state[agent.log_std]["step"].item()
        steps = [row["gradient_steps"] for row in rows.values()]
        assert steps[:3] == [10, 10, 1]  # what has not moved has no divergence
        assert 1 < steps[3] < steps[4] < 10 and rows[0.008]["approx_kl"] > 0.008

    @pytest.mark.parametrize("late, at_most", [(1.5, 101), (1.0, 103), (0.2, 120)])
    def test_a_policy_that_is_lost_late_ends_the_update_soon(self, monkeypatch, late, at_most):
        """100 minibatches have log-ratios whose KL, e^x - 1 - x, is 0.005 to 0.07, on average 0.03; then it jumps."""
        agent = make_agent()
        trial, forward = trial_of(copies(), agent, tasks=12), agent.forward
        log_ratios = iter([0.1, 0.2, 0.2, 0.35] * 25 + [late] * 20)

        def shifted(transitions, t, task):
            policy, value = forward(transitions, t, task)
            log_prob = (trial.log_probs[t, task] + next(log_ratios))[:, None] + 0 * policy.mean
            monkeypatch.setattr(policy, "log_prob", lambda action: log_prob)
            return policy, value

        monkeypatch.setattr(agent, "forward", shifted)
        steps = update(agent, trial, minibatch_size=4, target_kl=0.04)["gradient_steps"]
        assert 100 <= steps <= at_most and (steps == 120) == (late == 0.2)

    def test_a_gradient_that_is_not_finite_is_never_stepped_on(self):
        agent = make_agent()
        trial = trial_of(copies(), agent)
        trial.r[7, 1] = math.inf
        before = {name: parameter.clone() for name, parameter in agent.named_parameters() if "value" not in name[:6]}
        with pytest.raises(trmrl.RunFailed):
            update(agent, trial)
        assert all(torch.equal(agent.get_parameter(name), parameter) for name, parameter in before.items())


class TestMetaTests:
    def test_meta_test_files(self, tmp_path):
        """Shapes and meaning of what a run writes; frozen weights; the same again by --test."""
        folder = run(tmp_path, "--env", "PointMass", *TINY, "--total-timesteps", "200")
        checkpoint = (folder / "checkpoint.pt").read_bytes()
        files = {path.stem: dict(np.load(path)) for path in folder.glob("*.npz")}
        last = progress(folder).iloc[-1]  # whose evaluation is the meta-test's first episode
        for name, split, low, high in (("meta_test", "test", -1, 1), ("ood", "ood", 1, 1.5)):
            data = files[name]
            assert low <= data["tasks"].min() and data["tasks"].max() <= high
            # An episode succeeded if any step did: here, if the reward, minus the distance, ever exceeded -0.1.
            np.testing.assert_array_equal(data["success"], (data["rewards"] > -0.1).any(2))
            expected = -np.abs(data["observations"][:, 1:, 0] - data["tasks"])
            np.testing.assert_allclose(data["rewards"][:, 0, :-1], expected, atol=1e-5)
            assert last[f"{split}_return"] == pytest.approx(data["rewards"][:, 0].sum(1).mean(), rel=1e-5)
        assert last["test_success"] == pytest.approx(files["meta_test"]["success"][:, 0].mean())
        for data in files.values():  # each says what it was made with
            assert (data.pop("seed"), data.pop("env_steps")) == (1, last["env_steps"])
        shapes = {f"{name} {key}": array.shape for name, data in files.items() for key, array in data.items()}
        tests = {"rewards": (3, 2, 20), "success": (3, 2), "tasks": (3, 1), "observations": (3, 20, 1)}
        expected = {f"{name} {key}": shape for name in ("meta_test", "ood") for key, shape in tests.items()}
        expected |= {"refinement representation_error": (3,), "refinement regression_mse": (3,)}
        expected |= {"working_memories embedding": (20, 8), "working_memories task": (20,), "attention weights": (2, 5)}
        assert shapes == expected
        assert trmrl.main(["--test", str(folder)]) == 0 and (folder / "checkpoint.pt").read_bytes() == checkpoint
        for name, data in files.items():
            np.testing.assert_equal(dict(np.load(folder / f"{name}.npz")) | data, dict(np.load(folder / f"{name}.npz")))
        assert trmrl.main(["--test", str(folder), "--seed", "2"]) == 0  # other tasks, and the files say so
        other = np.load(folder / "meta_test.npz")
        assert other["seed"] == 2 and not np.isin(other["tasks"], files["meta_test"]["tasks"]).any()
        assert json.loads((folder / "args.json").read_text())["seed"] == 1

    def test_meta_tests_take_mean_actions_on_tasks_that_training_never_draws(self):
        envs = copies(n=30)
        agent = make_agent(envs, init_std=1.0)
        args = trmrl.Args(test_tasks=30, seed=3)
        results = trmrl.meta_test(agent, envs, args, 1)
        agent.log_std.data.fill_(-20.0)  # an agent that cannot explore does the same
        for split, arrays in trmrl.meta_test(agent, envs, args, 1).items():
            np.testing.assert_array_equal(arrays["rewards"], results[split]["rewards"])
        drawn = [trmrl.meta_test(agent, envs, trmrl.Args(test_tasks=30, seed=4), 1)["test"]["tasks"]]
        for purpose in ("train tasks", "train"):
            streams = [trmrl.random_stream(3, purpose, iteration) for iteration in range(300)]
            drawn += [envs[0].sample_tasks("train", 30, stream) for stream in streams]
        assert len(np.unique(drawn)) == np.size(drawn) and not np.isin(results["test"]["tasks"], drawn).any()

    @torch.no_grad()
    def test_refinement_against_scalar_loops(self):
        """Fig. 7: cosines one by one; the regression by the pseudo-inverse; attention from keys and queries."""
        envs = copies()
        agent = make_agent(envs, layers=3)
        agent.policy.weight.data.normal_()
        files = trmrl.analyse_memories(agent, envs, trmrl.Args(test_tasks=4, test_episodes=4))
        rng = trmrl.random_stream(1, "refinement")
        trial = trmrl.collect_trial(agent, envs, envs[0].sample_tasks("test", 6, rng), 2, rng, explore=False)
        layers, attention = [[], [], [], []], np.zeros(4)
        steps = [(t, task) for task in range(6) for t in range(0, 40, 5)]
        for t, task in steps:
            at = torch.tensor([t]), torch.tensor([task])
            for layer, memory in zip(layers, agent.refine(trial.transitions, *at)[0]):
                layer.append(memory[0].double().numpy())
            windows, filled = trmrl.retrieve(trial.transitions, *at, 4, 20)
            memories = (agent.working_memories(windows) + agent.positions)[0]
            for head in (slice(0, 4), slice(4, 8)):
                scores = agent.layers[0].key(memories)[:, head] @ agent.layers[0].query(memories[-1])[head] / 2
                weights = (scores.exp() * filled[0]).numpy()
                attention += weights / weights.sum() / 2 / len(steps)
        actions = np.array([trial.transitions[t, task, 1].item() for t, task in steps])
        fitted = np.array([task not in (2, 5) for _, task in steps])
        errors = files["refinement"]
        for layer in range(4):
            distances = [1 - a @ b / np.linalg.norm(a) / np.linalg.norm(b) for a, b in zip(layers[layer], layers[3])]
            assert errors["representation_error"][layer] == pytest.approx(np.mean(distances), abs=1e-5)
            X = np.c_[np.array(layers[layer]), np.ones(len(steps))]
            mse = np.mean((X[~fitted] @ np.linalg.pinv(X[fitted], 1e-3) @ actions[fitted] - actions[~fitted]) ** 2)
            assert errors["regression_mse"][layer] == pytest.approx(mse, rel=1e-2, abs=1e-9)
        embedding = files["working_memories"]["embedding"].reshape(4, 6, 8)  # every fifth step of the first episode
        np.testing.assert_allclose(embedding, agent.phi(agent.normalise(trial.transitions[0:20:5])), 1e-4, 1e-6)
        assert errors["regression_mse"][3] < 1e-5 < errors["regression_mse"][0]
        assert files["attention"]["weights"][0] == pytest.approx(attention, abs=1e-5)
        assert files["attention"]["weights"].sum(1) == pytest.approx(np.ones(3), rel=1e-5)

    def test_learns_a_toy_task_distribution(self, tmp_path):
        """The point mass reaches unseen hidden velocities, which it can only infer from its rewards."""
        folder = run(tmp_path, "--env", "PointMass")
        returns = progress(folder)["test_return"].dropna()
        # The best policy that ignores the rewards stays at 0: E|v*| = 0.5 a step.
        assert returns.iloc[0] < -8 and returns.iloc[-1] > -4.5
        assert np.load(folder / "meta_test.npz")["success"].mean() > 0.8


class TestEnvironments:
    @pytest.mark.parametrize("name", trmrl.ENVS)
    def test_gymnasium_finds_nothing_wrong(self, name):
        check_env(trmrl.ENVS[name](seed=1), skip_render_check=True)

    @pytest.mark.parametrize("name, task", [("HalfCheetah-v5", 1.3), ("Ant-v5", 0.0), ("Ant-v5", math.pi)])
    def test_bodies_are_gymnasiums(self, name, task):
        """The same seed and actions give the same states, bit for bit, and ends; rewards follow from its velocities."""
        env, reference = (trmrl.AntDir if name == "Ant-v5" else trmrl.HalfCheetahVel)(1), gymnasium.make(name)
        env.task = np.array([task])
        ours, theirs = env.reset(seed=5)[0], reference.reset(seed=5)[0]
        rng, terminated = np.random.default_rng(0), False
        for _ in range(env.horizon):
            np.testing.assert_array_equal(ours, theirs[: len(ours)])  # Ant-v5 appends contact forces
            if terminated:
                break
            action = rng.uniform(-1, 1, env.action_space.shape)
            theirs, reward, ended, _, info = reference.step(action)
            ours, our_reward, terminated, _, _ = env.step(action)
            if name == "HalfCheetah-v5":
                reward = -abs(info["x_velocity"] - task) - 0.05 * np.sum(action**2)
            elif task:
                reward -= 2 * info["x_velocity"]  # its sign is turned; costs are not
            assert our_reward == pytest.approx(reward, rel=1e-12) and terminated == ended
        assert terminated == (name == "Ant-v5")

    def test_tasks_are_the_papers(self):
        """Velocities are uniform in [0, 3], OOD in [3, 4]; a batch has as many ants forward as backward (App. B)."""
        env, rng = trmrl.HalfCheetahVel(1), np.random.default_rng(0)
        for split, low, high in (("train", 0, 3), ("test", 0, 3), ("ood", 3, 4)):
            tasks = env.sample_tasks(split, 5000, rng)
            quantiles = np.quantile(tasks, [0, 0.25, 0.5, 0.75, 1])
            assert tasks.shape == (5000, 1) and quantiles == pytest.approx(np.linspace(low, high, 5), abs=0.1)
        for split in trmrl.AntDir.splits:
            angles, counts = np.unique(trmrl.AntDir(1).sample_tasks(split, 20, rng), return_counts=True)
            assert counts.tolist() == [10, 10] and np.cos(angles) == pytest.approx([1, -1])

    def test_an_ant_whose_state_is_not_finite_ends_its_episode(self):
        env = trmrl.AntDir(1)
        env.reset(seed=0)
        env.data.qvel[:] = 1e30
        _, reward, terminated, _, _ = env.step(np.zeros(8))
        assert terminated and np.isfinite(reward)

    def test_meta_world_is_metaworlds(self):
        """Training goals are metaworld's training split, test goals its test split, disjoint and hidden."""
        env, rng = trmrl.ENVS["ML1-Reach"](seed=4), np.random.default_rng(0)
        benchmark = metaworld.ML1("reach-v3", seed=4)
        goals = {}
        for split, numbers in (("train", range(50)), ("test", range(50, 100))):
            goals[split] = {tuple(pickle.loads(task.data)["rand_vec"]) for task in getattr(benchmark, f"{split}_tasks")}
            assert sorted(env.sample_tasks(split, 50, rng)[:, 0]) == list(numbers)
        assert len(goals["train"]) == len(goals["test"]) == 50 and not goals["train"] & goals["test"]
        for split, number in (("train", 7), ("test", 57), ("train", 7)):
            env.task = np.array([number])
            own = benchmark.train_classes["reach-v3"]()
            own.set_task(getattr(benchmark, f"{split}_tasks")[7])
            np.testing.assert_array_equal(env.reset(seed=0)[0], own.reset()[0])
            for action in rng.uniform(-1, 1, (20, 4)):
                expected, reward, _, _, info = own.step(action)
                observation, ours, _, _, our_info = env.step(action)
                np.testing.assert_array_equal(observation, expected)
                assert ours == reward and our_info["success"] == info["success"] and not observation[36:].any()

    def test_ml45_covers_all_environments_and_keeps_their_simulators(self, monkeypatch):
        env, rng = trmrl.ENVS["ML45-Train"](seed=1), np.random.default_rng(0)
        batches = [env.sample_tasks("train", 25, rng)[:, 0] for _ in range(20)]
        assert all(len(set(batch // 100)) == 25 and (np.diff(batch) > 0).all() for batch in batches)
        assert len(set(np.concatenate(batches) // 100)) == len(set(env.names)) == 45
        test = env.sample_tasks("test", 45, rng)[:, 0]
        assert len(set(test // 100)) == 45 and (test % 100 < 50).all()
        monkeypatch.setattr(trmrl.MetaWorld, "idle", {})
        envs, starts = copies(trmrl.MetaWorld, n=2), []
        for order in ([3, 104], [104, 3], [3, 104]):
            for env, task in zip(envs, order):
                env.task = np.array([task])
            starts.append([env.reset(seed=0)[0] for env in envs])
        assert not np.array_equal(*starts[0])
        np.testing.assert_equal([starts[1][::-1], starts[2]], [starts[0]] * 2)  # a goal is the same in whichever copy
        assert sum(len(idle) for name, idle in trmrl.MetaWorld.idle.items() if name) == 2  # made for the swap alone


def contents(folder: Path, without=()) -> list:
    """The table, but for the times, and every number of the checkpoint."""
    checkpoint = torch.load(folder / "checkpoint.pt", weights_only=True)
    times = ["wall_seconds", "steps_per_second", "rollout_seconds", "update_seconds"]
    table = progress(folder).drop(columns=[*times, *without])
    return [torch.from_numpy(table.to_numpy()), checkpoint["agent"], checkpoint["optimizer"]["state"]]


class TestRuns:
    def test_a_run_folder_holds_what_others_rely_on(self, tmp_path):
        flags = [*TINY, "--env", "HalfCheetahVel", "--total-timesteps", "4000", "--eval-interval", "2"]
        command = [sys.executable, HERE / "trmrl.py", *flags]
        ended = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True)
        assert ended.returncode == 0 and "train_return=" in ended.stderr, ended.stderr
        (folder,) = tmp_path.glob("runs/*")
        assert "test return" in ended.stdout and "ood return" in ended.stdout and "success" not in ended.stdout
        assert folder.name.startswith("HalfCheetahVel-TrMRL-") and "-d-model-8-layers-2-" in folder.name
        size = sum(x.numel() for x in trmrl.load(folder)[0].parameters())
        start = f"runs/{folder.name}: {size:,} parameters, cpu, processes 1, standing still returns -300\n"
        assert ended.stdout.startswith(start)
        assert f"written to runs/{folder.name}" in ended.stdout and not list(folder.glob("*.tmp"))
        args = json.loads((folder / "args.json").read_text())
        assert {"layers": 2, "gamma": trmrl.Args.gamma, "method": "TrMRL"}.items() <= args.items()
        assert set(args["versions"]) == {"torch", "mujoco", "gymnasium", "metaworld", "numpy"}
        rows = progress(folder)
        columns = """iteration env_steps wall_seconds train_return train_success test_return test_success ood_return
            steps_per_second rollout_seconds update_seconds gradient_steps policy_loss value_loss entropy approx_kl
            clip_fraction explained_variance learning_rate gradient_norm policy_std"""
        assert list(rows) == columns.split() and list(rows["env_steps"]) == [800, 1600, 2400, 3200, 4000]
        assert rows["test_return"].notna().tolist() == [True, False, True, False, True]
        assert list(rows["learning_rate"] / trmrl.Args.learning_rate) == pytest.approx([1.0, 0.8, 0.6, 0.4, 0.2])
        board = EventAccumulator(str(folder)).Reload()
        assert "layers = 2" in board.Tensors("flags/text_summary")[0].tensor_proto.string_val[0].decode()
        for name in ("train_return", "test_return", "approx_kl", "policy_std", "gradient_norm"):
            assert [event.value for event in board.Scalars(name)] == pytest.approx(list(rows[name].dropna()), rel=1e-5)
        checkpoint = torch.load(folder / "checkpoint.pt", weights_only=True)
        assert set(checkpoint) == {"args", "rows", "agent", "optimizer"}
        assert checkpoint["agent"]["log_std"].exp().max() <= 0.4473 * trmrl.Args.init_std  # a fifth is left

    def test_interrupt_and_resume_is_the_unbroken_run(self, tmp_path, monkeypatch, capsys):
        """Ctrl-C in the third iteration, SIGTERM in the fourth, then on to the end; another seed is another run."""
        straight, other = (run(tmp_path / seed, *FOUR, "--seed", seed) for seed in "12")
        ppo_update, signals = trmrl.ppo_update, [None, None, signal.SIGINT, None, signal.SIGTERM]

        def interrupted(*arguments):
            if number := signals.pop(0) if signals else None:
                signal.raise_signal(number)
            return ppo_update(*arguments)

        def from_a_terminal(*flags) -> int:
            monkeypatch.setattr(sys, "argv", ["trmrl.py", *flags])
            return trmrl.main()

        monkeypatch.setattr(trmrl, "ppo_update", interrupted)
        signal.signal(signal.SIGINT, signal.default_int_handler)  # which a shell's background job ignores
        assert trmrl.main([*FOUR, "--runs-dir", str(tmp_path / "broken")]) == 130
        (broken,) = (tmp_path / "broken").iterdir()
        for iterations, code in ((2, 130), (3, 0)):
            assert f"--resume {broken}" in capsys.readouterr().out and len(progress(broken)) == iterations
            assert from_a_terminal("--resume", str(broken)) == code
        monkeypatch.setattr(trmrl, "meta_test", lambda *_: signal.raise_signal(signal.SIGINT))
        assert trmrl.main(["--test", str(broken)]) == 130 and "--resume" not in capsys.readouterr().out
        torch.testing.assert_close(contents(broken), contents(straight), rtol=0, atol=0, equal_nan=True)
        assert contents(other)[0][-1].tolist() != contents(straight)[0][-1].tolist()

    @pytest.mark.parametrize("env", ["AntDir", "ML45-Train"])
    def test_other_environments_train_and_meta_test(self, tmp_path, monkeypatch, capsys, env):
        """A few seconds of each; ML45-Train with two of its environments."""
        handful = {"train": {name: None for name in ("drawer-close-v3", "reach-wall-v3")}}
        monkeypatch.setattr(metaworld.env_dict, "ML45_V3", handful)
        flags = [*TINY, "--test-tasks", "2", "--test-episodes", "1", "--episodes-per-trial", "1"]
        folder = run(tmp_path, "--env", env, *flags, "--total-timesteps", "100")
        meta_test, last, succeeds = np.load(folder / "meta_test.npz"), progress(folder).iloc[-1], env != "AntDir"
        assert meta_test["rewards"].shape == (2, 1, 500 if succeeds else 200)
        assert np.isnan(meta_test["success"]).all() == (not succeeds)
        assert np.isfinite(last["test_success"]) == np.isfinite(last["train_success"]) == succeeds
        assert not (folder / "ood.npz").exists() and np.isnan(last["ood_return"])
        monkeypatch.delitem(trmrl.ENVS, env)  # a run of an environment that the script does not have
        assert trmrl.main(["--test", str(folder)]) == 2 and f"--env {env}: takes" in capsys.readouterr().err

    def test_what_the_columns_count(self, tmp_path, monkeypatch):
        """Against the trials that a run collected and its meta-tests, with deaths. PPO's own are tested with PPO."""
        trials, tests = [], []

        def logged(log, function):
            return lambda *given, **more: log.append(function(*given, **more)) or log[-1]

        monkeypatch.setattr(trmrl, "collect_trial", logged(trials, trmrl.collect_trial))
        monkeypatch.setattr(trmrl, "meta_test", logged(tests, trmrl.meta_test))
        flags = [*TINY, "--num-tasks", "6", "--total-timesteps", "1500", "--eval-interval", "3"]
        rows = progress(run(tmp_path, "--env", "Mortal", *flags))
        training = [trial for trial in trials if trial.valid.shape == (40, 6)]
        steps = [int(trial.valid.sum()) for trial in training]
        assert list(rows["env_steps"]) == np.cumsum(steps).tolist() and min(steps) < 240  # not those after a death
        assert list(rows["iteration"]) == list(range(1, len(rows) + 1))
        for row, trial in zip(rows.itertuples(), training, strict=True):
            rewards = trial.r.unflatten(0, (2, 20)).sum(1)  # of each episode, undiscounted
            assert row.train_return == pytest.approx(rewards.mean().item(), rel=1e-5)
            reached = trial.success.nan_to_num().unflatten(0, (2, 20)).amax(1)
            assert row.train_success == pytest.approx(reached.mean().item())
        evaluated = rows[(rows["iteration"] % 3 == 1) | (rows["iteration"] == len(rows))]
        assert rows["test_return"].notna().sum() == len(evaluated) == len(tests) - 1  # the last is the meta-test
        for row, test in zip(evaluated.itertuples(), tests):
            assert row.test_return == pytest.approx(test["test"]["rewards"].sum((1, 2)).mean(), rel=1e-5)
            assert row.ood_return == pytest.approx(test["ood"]["rewards"].sum((1, 2)).mean(), rel=1e-5)
            assert row.test_success == pytest.approx(test["test"]["success"].mean())
        seconds = rows["wall_seconds"].diff().fillna(rows["wall_seconds"].iloc[0])
        assert (rows["rollout_seconds"] + rows["update_seconds"] <= seconds + 1e-6).all()
        assert rows["steps_per_second"].to_numpy() == pytest.approx(steps / seconds.to_numpy())

    def test_a_methods_own_episodes_and_columns(self, tmp_path, monkeypatch):
        """What a baseline may say: evaluations of three episodes, of which the last counts; columns; no memories."""

        class Other(trmrl.Agent):
            method, evaluation_episodes, refine = "Other", 3, None

            def collect(self, envs, tasks, episodes, rng, explore):
                trial = trmrl.collect_trial(self, envs, tasks, episodes, rng, explore)
                trial.r[:] = torch.arange(episodes).repeat_interleave(20)[:, None] / 20  # returns 0, 1, 2, ...
                return trial

            def forward(self, transitions, t, task):
                return self.policy_and_value(self.phi(transitions[t, task]))

            def update(self, optimizer, trial, args, rng, left):
                return {"learning_rate": left, "inner_kl": 0.5}

        folder = run(tmp_path, *FOUR, main=functools.partial(trmrl.main, agent_class=Other))
        rows = progress(folder)
        assert rows["test_return"].dropna().to_numpy() == pytest.approx(2.0, rel=1e-5) and "inner_kl" in rows
        assert rows["inner_kl"].to_list() == [0.5] * 4 and rows["approx_kl"].isna().all()
        assert {path.name for path in folder.glob("*.npz")} == {"meta_test.npz", "ood.npz"}

    def test_a_run_is_loaded_in_python(self, folder, monkeypatch):
        agent, envs, args = trmrl.load(folder, test_tasks=7, test_episodes=2)
        assert (args.layers, args.test_tasks, args.test_episodes) == (2, 7, 2)
        rewards = trmrl.meta_test(agent, envs, args, 2)["test"]["rewards"]
        assert trmrl.main(["--test", str(folder), "--test-tasks", "7"]) == 0
        np.testing.assert_array_equal(np.load(folder / "meta_test.npz")["rewards"], rewards)
        trial = trmrl.collect_trial(agent, envs, np.array([[0.3]]), 1, np.random.default_rng(0), explore=False)
        assert trial.r[:-1, 0].numpy() == pytest.approx(-abs(trial.transitions[1:-1, 0, 0].numpy() - 0.3), abs=1e-6)
        with pytest.raises(trmrl.UserError, match="--heads 1: "):
            trmrl.load(folder, heads=1)
        made = []  # another seed's tasks, but the environments of the run's own: ML1's held-out goals are theirs
        monkeypatch.setitem(trmrl.ENVS, "PointMass", lambda seed: made.append(seed) or trmrl.PointMass(seed))
        assert trmrl.load(folder, seed=2)[2].seed == 2 and set(made) == {1}


def torchrun(tmp_path, code: str) -> tuple[subprocess.CompletedProcess, Path]:
    """FOUR on Mortal by two processes, after a line of code; and the run's folder."""
    lines = f"import os, signal, sys, test_trmrl, trmrl\n{code}\nsys.exit(trmrl.main(sys.argv[1:]))"
    (tmp_path / "script.py").write_text(lines)
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2", "script.py"]
    environment = os.environ | {"PYTHONPATH": str(HERE), "OMP_NUM_THREADS": "1"}
    command += [*FOUR, "--env", "Mortal", "--num-tasks", "5"]  # 3 and 2
    ended = subprocess.run(command, cwd=tmp_path, env=environment, capture_output=True, text=True)
    return ended, next((tmp_path / "runs").iterdir())


def test_two_processes_do_what_one_does(tmp_path):
    ended, two = torchrun(tmp_path, "")
    assert ended.returncode == 0 and "processes 2" in ended.stdout, ended.stderr
    one = run(tmp_path / "one", *FOUR, "--env", "Mortal", "--num-tasks", "5")
    torch.testing.assert_close(contents(two), contents(one), rtol=1e-3, atol=1e-4, equal_nan=True)
    np.testing.assert_allclose(*(np.load(folder / "meta_test.npz")["rewards"] for folder in (one, two)), atol=1e-3)


DIES = """
def update(self, *others):
    if os.environ["RANK"] == "1" and len(steps) == 2:
        os.kill(os.getpid(), signal.SIGKILL)
    steps.append(0)
    return agents_update(self, *others)
steps, agents_update, trmrl.Agent.update = [], trmrl.Agent.update, update
"""


def test_when_a_process_is_killed_all_end(tmp_path):
    ended, folder = torchrun(tmp_path, DIES)
    assert ended.returncode != 0 and len(progress(folder)) == 2 and not (folder / "meta_test.npz").exists()
    assert "Traceback" not in ended.stdout and "None" not in ended.stdout


class TestMistakes:
    @pytest.mark.parametrize(
        "flags, named",
        [
            ("--env HalfCheetahVel2", "--env HalfCheetahVel2: takes one of PointMass, HalfCheetahVel"),
            ("--env Antdir --help", "--env Antdir: takes one of PointMass, HalfCheetahVel"),
            ("--heads 3 --d-model 8", "--heads 3: takes a divisor of --d-model 8"),
            ("--layers 0", "--layers 0: takes a number from 1"),
            ("--gamma 1.5", "--gamma 1.5: takes a number from 0 to 1"),
            ("--seed -1", "--seed -1: takes a number from 0"),
            ("--target-kl 0", "--target-kl 0"),
            *((x, x) for x in ("--learning-rate nan", "--device abacus", "--device meta", "--seed 4294967295")),
            ("--runs-dir /dev/null", "--runs-dir /dev/null"),
            ("--resume nowhere", "--resume, --test: nowhere is no run's folder"),
            ("--test=", "--resume, --test:  is no run's folder"),  # of "$RUN", unset
            ("--memory-length 1e9", "--memory-length 1000000000: takes a number from 1 to 10000"),
        ],
    )
    def test_a_mistake_ends_with_one_line_and_code_2(self, tmp_path, monkeypatch, capsys, flags, named):
        monkeypatch.chdir(tmp_path)
        assert error(capsys, 2, *flags.split()).startswith(named) and not list(tmp_path.rglob("*"))

    @pytest.mark.parametrize("flags", [["--layer", "4"], ["--layers", "many"], ["--layers", "1.5e0"]])
    def test_a_flag_that_does_not_exist_or_parse_ends_with_code_2(self, capsys, flags):
        with pytest.raises(SystemExit) as exit:
            trmrl.main(flags)
        assert exit.value.code == 2 and flags[0] in capsys.readouterr().err

    def test_flags_go_before_a_methods_own_defaults_and_those_before_an_environments(self):
        assert trmrl.set_up([], trmrl.Agent, trmrl.Args)[2:4] == (trmrl.Args(), {})
        _, _, reach, *_ = trmrl.set_up(["--env", "ML1-Reach", "--total-timesteps", "3e6"], rl2.RL2, rl2.Args)
        assert (reach.init_std, reach.minibatch_size, reach.memory_length, reach.total_timesteps) == (1.0, 800, 1, 3e6)
        assert trmrl.set_up(["--env", "ML1-Reach", "--init-std", "0.7"], rl2.RL2, rl2.Args)[2].init_std == 0.7

    @pytest.mark.parametrize("action, own", [("--resume", "--seed 2"), ("--test", "--eval-interval 1")])
    def test_a_run_can_be_changed_only_in_what_leaves_it_the_same(self, folder, capsys, action, own):
        """Not even made longer: its policy's std and its learning rate have gone to 0 by 320 steps."""
        before = content_of(folder)
        for flag in (own, "--heads 1", "--gae-lambda 0.5", "--env Mortal", "--runs-dir x", "--total-timesteps 640"):
            line = error(capsys, 2, action, folder, *flag.split())
            assert line.startswith(flag) and "test-tasks" in line
        assert error(capsys, 2, action, folder, "--no-t-fixup").startswith("--t-fixup False")
        assert error(capsys, 2, "--resume", folder, "--test", "other").startswith("--test other")
        assert content_of(folder) == before

    def test_a_run_that_is_not_annealed_goes_on_as_if_it_had_been_longer(self, tmp_path):
        short, long = (run(tmp_path, *FOUR, "--no-anneal", "--total-timesteps", steps) for steps in ("160", "320"))
        assert trmrl.main(["--resume", str(short), "--total-timesteps", "320"]) == 0
        scores = ["test_return", "test_success", "ood_return", "ood_success"]  # its former end was evaluated too
        pair = contents(short, without=scores), contents(long, without=scores)
        torch.testing.assert_close(*pair, rtol=0, atol=0, equal_nan=True)

    def test_a_damaged_run_is_left_as_it_is(self, folder, tmp_path, capsys):
        checkpoint, before, rng = folder / "checkpoint.pt", content_of(folder), np.random.default_rng(0)
        whole, (expected_args, expected) = checkpoint.read_bytes(), trmrl.read_run(folder, trmrl.Args, "TrMRL")
        torch.save({"agent": {}}, tmp_path / "other")
        for content in (b"", whole[:5000], (tmp_path / "other").read_bytes()):
            checkpoint.write_bytes(content)
            assert str(folder) in error(capsys, 2, "--resume", folder)
        for position in [*rng.integers(6000, size=20), *rng.integers(len(whole), size=20)]:
            flipped = bytearray(whole)
            flipped[position] ^= 1 << rng.integers(8)
            checkpoint.write_bytes(flipped)
            with contextlib.suppress(trmrl.UserError):
                args, loaded = trmrl.read_run(folder, trmrl.Args, "TrMRL")  # a bit between the records: it says nothing
                torch.testing.assert_close(loaded["agent"], expected["agent"], rtol=0, atol=0)
                assert (args, loaded["rows"]) == (expected_args, expected["rows"])
        checkpoint.write_bytes(whole)
        assert "is a run of TrMRL, not of RL2" in error(capsys, 2, "--test", folder, main=main_rl2)
        assert content_of(folder) == before

    def test_a_run_of_older_or_newer_flags(self, folder, capsys):
        checkpoint = torch.load(folder / "checkpoint.pt", weights_only=True)
        del checkpoint["args"]["min_input_std"]
        torch.save(checkpoint, folder / "checkpoint.pt")
        assert trmrl.load(folder)[2].min_input_std == 0.5
        for change, says in (({"d_model": 16}, "has another network"), ({"dropout": 0.1}, "dropout")):
            checkpoint["args"] |= change
            torch.save(checkpoint, folder / "checkpoint.pt")
            assert says in error(capsys, 2, "--test", folder)

    def test_what_surrounds_a_run(self, tmp_path, monkeypatch, capsys):
        """A thread, variables that a torchrun has left behind, a folder's name with a space."""
        for name, value in (("RANK", "0"), ("WORLD_SIZE", "2")):
            monkeypatch.setenv(name, value)
        flags, codes = [*FOUR, "--runs-dir", str(tmp_path / "my runs")], []
        thread = threading.Thread(target=lambda: codes.append(trmrl.main(flags)))
        thread.start()
        thread.join()
        (folder,) = (tmp_path / "my runs").iterdir()
        assert codes == [0] and f"python plot.py '{folder}'" in capsys.readouterr().out

    def test_a_terminal_without_greek_and_a_reader_who_leaves(self, tmp_path):
        command = f"set -o pipefail; {sys.executable} {HERE / 'trmrl.py'}"
        environment = os.environ | {"PYTHONIOENCODING": "ascii", "COLUMNS": "80"}
        shell = functools.partial(subprocess.run, cwd=tmp_path, env=environment, capture_output=True, text=True)
        shown = shell(["bash", "-c", f"{command} --help"])
        assert shown.returncode == 0 and "?, the attention heads" in shown.stdout and not shown.stderr
        assert all(f"[{group}]" in shown.stdout for group in ("task", "model", "PPO", "evaluation", "run"))
        left = shell(["bash", "-c", f"{command} {' '.join(FOUR)} | head -0"])
        assert "Error" not in left.stderr and "Exception" not in left.stderr
        silent = "import sys, trmrl; sys.exit('metaworld' in sys.modules or trmrl.torch.get_num_threads() > 1)"
        assert shell([sys.executable, "-c", silent], cwd=HERE).returncode == 0

    def test_a_disk_that_fails_ends_with_one_line_and_harms_nothing(self, folder, tmp_path, monkeypatch, capsys):
        before, full = content_of(folder), OSError(errno.ENOSPC, "No space left on device")
        monkeypatch.setattr(Path, "write_bytes", lambda *_: (_ for _ in ()).throw(full))
        assert trmrl.main(["--test", str(folder)]) == 1
        assert "test return" in capsys.readouterr().out  # worth its minutes
        for flags in (["--test", folder], [*FOUR, "--runs-dir", tmp_path / "b"]):
            assert "No space left on device" in error(capsys, 1, *flags)
        assert content_of(folder) == before

    def test_a_loss_that_explodes_ends_with_one_line(self, tmp_path, capsys):
        line = error(capsys, 1, *FOUR, "--learning-rate", "1e3", "--target-kl", "None", "--runs-dir", tmp_path)
        assert ("gradient is not finite" in line or "infinity" in line) and line.endswith("holds what came before")


def test_a_failed_simulation_ends_the_run_and_spoils_nothing(tmp_path, monkeypatch, capsys):
    """In the second iteration a cheetah is thrown out of this world; MuJoCo itself would quietly start it anew."""
    number, step = itertools.count(), trmrl.HalfCheetahVel.step

    def thrown(self, action):
        self.data.qvel[:] += 1e8 * (next(number) == 2100)  # after 800 steps of training and 1200 of an evaluation
        return step(self, action)

    monkeypatch.setattr(trmrl.HalfCheetahVel, "step", thrown)
    line = error(capsys, 1, *TINY, "--total-timesteps", "2400", "--runs-dir", tmp_path)
    assert line.startswith("the simulator") and line.endswith("holds what came before")
    checkpoint = torch.load(*tmp_path.glob("*/checkpoint.pt"), weights_only=True)
    assert len(checkpoint["rows"]) == 1 and all(tensor.isfinite().all() for tensor in checkpoint["agent"].values())


@pytest.mark.benchmark
@pytest.mark.parametrize("flag, values", [("memory_length", (1, 5, 10, 25, 50)), ("layers", (1, 2, 4, 8, 12))])
def test_growth_of_an_iteration(flag, values):
    """Collecting and one whole epoch on HalfCheetahVel, in seconds against those of the first value."""
    envs, durations = copies(trmrl.HalfCheetahVel, n=20), []
    for value in values:
        agent = make_agent(envs, heads=4, d_model=32, **{"memory_length": 5, "layers": 4} | {flag: value})
        work = functools.partial(lambda agent: update(agent, trial_of(envs, agent, 20), minibatch_size=200), agent)
        durations.append(min(timeit.repeat(work, number=1, repeat=3)))
    print(f"\n{flag} {values}: {np.round(np.divide(durations, durations[0]), 2)}")
