"""What must hold, each against something independent: the paper's equation written out slowly, another library, a
direct sum, a perturbation.

    python -m pytest                        all but the benchmarks
    python -m pytest -m benchmark -s        speeds as ratios, on a quiet machine
"""

import csv
import functools
import inspect
import json
import math
import os
import pickle
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path

import gymnasium
import metaworld
import numpy as np
import pandas as pd
import pytest
import torch
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

import plot
import trmrl
from baselines import rl2

torch.set_num_threads(1)  # threads cost more than they bring on tensors this small
HERE = Path(__file__).parent
TINY = "--num-tasks 2 --test-tasks 3 --test-episodes 2 --layers 2 --d-model 8 --heads 2 --minibatch-size 100".split()


class PointMass(gymnasium.Env):
    """A point mass on a line that must reach a hidden velocity."""

    horizon, splits = 20, ("train", "test", "ood")
    observation_space = gymnasium.spaces.Box(-np.inf, np.inf, (1,))
    action_space = gymnasium.spaces.Box(-1.0, 1.0, (1,))

    def __init__(self, seed):
        pass

    def sample_tasks(self, split, n, rng):
        return rng.uniform(1.0, 1.5, (n, 1)) if split == "ood" else rng.uniform(-1.0, 1.0, (n, 1))

    def reset(self, *, seed=None, options=None):
        super().reset(seed=seed)
        self.velocity = self.np_random.uniform(-0.1, 0.1, 1)
        return self.velocity, {}

    def step(self, action):
        self.velocity = self.velocity + 0.5 * action
        distance = abs(self.velocity[0] - self.task[0])
        return self.velocity, -distance, False, False, {"success": distance < 0.1}


class Mortal(PointMass):
    """Ends an episode where the velocity leaves [-0.6, 0.6], with an observation that must not be looked at."""

    def __init__(self, seed):
        self.log = []  # what happened: (velocity before, action, reward, dead, success)

    def reset(self, *, seed=None, options=None):
        self.dead = False
        return super().reset(seed=seed)

    def step(self, action):
        assert not self.dead, "stepped after its end"
        before = self.velocity[0]
        velocity, reward, _, truncated, info = super().step(action)
        self.dead = abs(velocity[0]) > 0.6
        self.log.append((before, action[0], reward, self.dead, info["success"]))
        return np.array([np.nan]) if self.dead else velocity, reward, self.dead, truncated, info


def test_the_readme_shows_this_toy():
    assert inspect.getsource(PointMass) in (HERE / "README.md").read_text()


@pytest.fixture(autouse=True)
def toys(monkeypatch):
    monkeypatch.setitem(trmrl.ENVS, "PointMass", PointMass)
    monkeypatch.setitem(trmrl.ENVS, "Mortal", Mortal)


def vector(env=PointMass, processes=1) -> trmrl.TaskVectorEnv:
    return trmrl.TaskVectorEnv(functools.partial(env, seed=1), processes)


def make_agent(envs=None, **flags) -> trmrl.Agent:
    torch.manual_seed(0)
    sizes = dict(memory_length=4, layers=2, heads=2, d_model=8, init_std=0.5)
    return trmrl.Agent(envs or vector(), trmrl.Args(**sizes | flags))


def trial_of(envs, agent, tasks=3, episodes=2, explore=True, seed=0) -> trmrl.Trial:
    rng = np.random.default_rng(seed)
    return trmrl.collect_trial(agent, envs, envs.sample_tasks("train", tasks, rng), episodes, rng, explore)


def update(agent, trial, optimizer=None, **flags) -> dict:
    """ppo_update in one minibatch and epoch with plain gradient descent, if not told otherwise."""
    args = trmrl.Args(**dict(minibatch_size=1000, update_epochs=1, target_kl=None) | flags)
    optimizer = optimizer or torch.optim.SGD(agent.parameters(), lr=0.1)
    return trmrl.ppo_update(agent, optimizer, trial, args, np.random.default_rng(0))


def run(tmp_path, *flags, main=trmrl.main) -> Path:
    """A finished run's folder."""
    before = set(tmp_path.glob("*"))
    assert main([*flags, "--runs-dir", str(tmp_path)]) == 0
    (folder,) = set(tmp_path.glob("*")) - before
    return folder


def progress(folder: Path) -> pd.DataFrame:
    return pd.read_csv(folder / "progress.csv")


main_rl2 = functools.partial(trmrl.main, agent_class=rl2.RL2, args_class=rl2.Args)


# --- the agent --------------------------------------------------------------------------------------------------------
def slow_layer(layer, memories):
    """One transformer layer, position by position and head by head: Eq. 1, Eq. 4."""
    d = memories.shape[1] // layer.heads
    refined = []
    for t in range(len(memories)):
        heads = []
        for head in range(layer.heads):
            part = slice(head * d, (head + 1) * d)
            query = layer.query(memories[t])[part]
            weights = torch.stack([(query @ layer.key(memories[i])[part] / math.sqrt(d)).exp() for i in range(t + 1)])
            values = torch.stack([layer.value(memories[i])[part] for i in range(t + 1)])
            heads.append((weights[:, None] * values).sum(0) / weights.sum())
        x = layer.attention_norm(memories[t] + layer.output(torch.cat(heads)))
        hidden = layer.feed_forward_in(x)
        refined.append(layer.feed_forward_norm(x + layer.feed_forward_out(hidden * (hidden > 0))))
    return torch.stack(refined)


@pytest.mark.parametrize("layer_norm", [True, False])
def test_layer_is_eq_1(layer_norm):
    layer = trmrl.TransformerLayer(8, 2, layer_norm)
    memories = torch.randn(3, 5, 8)
    mask = torch.where(torch.ones(5, 5, dtype=torch.bool).tril(), 0.0, -1e9)[None, None]
    refined, alpha = layer(memories, memories, mask)
    for batch in range(3):
        torch.testing.assert_close(refined[batch], slow_layer(layer, memories[batch]), rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(alpha.sum(3), torch.ones(3, 2, 5))
    last, _ = layer(memories[:, -2:], memories, mask[:, :, -2:])
    torch.testing.assert_close(last, refined[:, -2:])


def test_the_layer_norm_arm_is_torchs_transformer_encoder():
    """Without T-Fixup the layers are torch.nn.TransformerEncoder with the same weights."""
    agent = make_agent(layers=3, d_model=16, heads=4, t_fixup=False)
    layer = torch.nn.TransformerEncoderLayer(16, 4, 64, dropout=0.0, activation="relu", batch_first=True)
    encoder = torch.nn.TransformerEncoder(layer, 3).eval()
    names = {"output": "self_attn.out_proj", "feed_forward_in": "linear1", "feed_forward_out": "linear2"}
    names |= {"attention_norm": "norm1", "feed_forward_norm": "norm2"}
    with torch.no_grad():
        for ours, theirs in zip(agent.layers, encoder.layers):
            for parameter in ours.parameters():
                parameter += 0.1 * torch.randn_like(parameter)  # biases and norms that do something
            for name, other in names.items():
                theirs.get_submodule(other).load_state_dict(ours.get_submodule(name).state_dict())
            for kind in ("weight", "bias"):
                packed = torch.cat([getattr(getattr(ours, part), kind) for part in ("query", "key", "value")])
                getattr(theirs.self_attn, f"in_proj_{kind}").copy_(packed)
        trial = trial_of(vector(), agent)
        t, task = torch.arange(3, 20), torch.zeros(17, dtype=torch.long)  # whose windows are full
        windows, _ = trmrl.retrieve(trial.transitions, t, task, 4, 20)
        expected = encoder(agent.working_memories(windows) + agent.positions, mask=~agent.causal)[:, -1]
        torch.testing.assert_close(agent.refine(trial.transitions, t, task)[0][-1], expected)


@pytest.mark.parametrize("t_fixup", [True, False])
def test_t_fixup_scales(t_fixup):
    """The standard deviation of every matrix (Sec. 3.3): Xavier, times 0.67 L^-1/4 for values, outputs and both FFN."""
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
    if t_fixup:
        phi = torch.nn.Linear(500, d)  # wide enough to tell
        trmrl.t_fixup_(phi, agent.layers)
        assert phi.weight.std().item() == pytest.approx(d**-0.5 * (9 * L) ** -0.25, rel=0.05)


def test_positions_are_vaswanis():
    positions = trmrl.sinusoidal_positions(7, 6)
    for pos in range(7):
        angles = [pos / 10_000 ** (2 * i / 6) for i in range(3)]
        expected = [f(angle) for angle in angles for f in (math.sin, math.cos)]
        assert positions[pos].tolist() == pytest.approx(expected, abs=1e-6)


def test_inputs_are_normalised_by_what_was_seen():
    agent = make_agent()
    data = torch.randn(20_000, 4) * torch.arange(1, 5) + 5
    for chunk in data.split([5000, 1, 14_999]):
        agent.sums += trmrl.sums_of(chunk)
    deviations = torch.tensor([[-100.0, -2.9, 0.0, 3.1]])
    limited = agent.normalise(data.mean(0) + deviations * data.std(0))
    torch.testing.assert_close(limited, torch.tensor([[-3.0, -2.9, 0.0, 3.0]]), rtol=1e-2, atol=1e-2)


def test_pads_and_the_future_are_never_attended_to():
    """At step 2 of the second episode: only it and two steps before count, and of it only the observation."""
    agent = make_agent(memory_length=5)
    transitions = torch.randn(41, 1, 4)
    t, task = torch.tensor([22]), torch.tensor([0])
    reference, attention = agent.refine(transitions, t, task)
    for step in range(41):
        for features, matters in ((slice(0, 1), step in (20, 21, 22)), (slice(1, 4), step in (20, 21))):
            changed = transitions.clone()
            changed[step, 0, features] += 1
            assert torch.equal(agent.refine(changed, t, task)[0][-1], reference[-1]) != matters, (step, features)
    for alpha in attention:
        assert not alpha[..., :2].any() and (alpha[..., 2:] > 0).all()


# --- the memory and the trial -----------------------------------------------------------------------------------------
@pytest.mark.parametrize("N", [1, 4, 30])
def test_windows_follow_algorithm_1(N):
    """Against Alg. 1 as printed: a buffer of N - 1 PADs at an episode's start, to which each transition is appended."""
    transitions = torch.randn(41, 2, 4)
    for task in range(2):
        for t in range(41):
            if t in (0, 20):
                buffer = [None] * (N - 1)
            D = buffer[len(buffer) - (N - 1) :] + [transitions[t, task]]
            windows, filled = trmrl.retrieve(transitions, torch.tensor([t]), torch.tensor([task]), N, 20)
            assert filled[0].tolist() == [slot is not None for slot in D]
            for slot, expected in enumerate(D):
                assert expected is None or torch.equal(windows[0, slot], expected)
            buffer = buffer + [transitions[t, task]]


@pytest.mark.parametrize("env", [PointMass, Mortal])
@torch.no_grad()
def test_acting_follows_algorithm_1(env):
    """Values and log-probabilities of a trial, one step and task at a time, PADs cut off instead of masked."""
    envs = vector(env)
    agent = make_agent(envs)
    agent.return_mean.fill_(0.3)  # what the value head's 0 stands for
    trial = trial_of(envs, agent, tasks=4)
    for t, task in trial.valid.nonzero().tolist():
        window = trial.transitions[max(t // 20 * 20, t - 3) : t + 1, task]
        normalised = agent.normalise(window)
        normalised[-1, 1:] = 0  # (s_next, a_PAD, r_PAD, η_PAD)
        memories = agent.phi(normalised) + agent.positions[-len(window) :]
        for layer in agent.layers:
            memories = slow_layer(layer, memories)
        assert agent.value(memories[-1]).item() + 0.3 == pytest.approx(trial.values[t, task].item(), abs=1e-5)
        policy = torch.distributions.Normal(agent.policy(memories[-1]), agent.log_std.exp())
        log_prob = policy.log_prob(trial.transitions[t, task, 1:2]).sum().item()
        assert log_prob == pytest.approx(trial.log_probs[t, task].item(), abs=1e-5)


def test_a_trial_is_what_the_environment_did():
    """States, actions, rewards, η, success and death, against what each copy of the environment itself wrote down."""
    envs = vector(Mortal)
    trial = trial_of(envs, make_agent(envs, init_std=0.4), tasks=12)
    deaths = 0
    for task, env in enumerate(envs.envs):
        steps = trial.valid[:, task].nonzero()[:, 0].tolist()
        for t, (s, a, r, dead, success) in zip(steps, env.log, strict=True):
            row = trial.transitions[t, task].tolist()
            assert [row[0], np.clip(row[1], -1, 1), row[2]] == pytest.approx([s, a, r], abs=1e-6)
            assert row[3] == (dead or t % 20 == 19) and trial.success[t, task] == success
            deaths += dead
        resting = trial.transitions[:-1, task][~trial.valid[:, task]]
        assert not resting[:, [0, 2]].any()  # nothing is observed and no reward given after a death
    assert 0 < deaths < 24
    assert trial.transitions[:, :, 1].abs().max() > 1  # the memory holds the action that was drawn, not the clipped one


@torch.no_grad()
def test_exploration_has_the_policys_deviation_and_meta_tests_have_none():
    envs = vector()
    agent = make_agent(envs, init_std=0.4)
    for explore, std in ((True, 0.4), (False, 0.0)):
        trial = trial_of(envs, agent, tasks=50, explore=explore)
        t, task = trial.valid.nonzero(as_tuple=True)
        noise = trial.transitions[t, task, 1:2] - agent(trial.transitions, t, task)[0]
        assert noise.std().item() == pytest.approx(std, rel=0.05, abs=1e-6) and abs(noise.mean().item()) < 0.03


@pytest.mark.parametrize("env", [PointMass, Mortal])
@torch.no_grad()
def test_rl2_is_torchs_gru(env):
    """Values of acting and of training, against torch.nn.GRUCell run by hand over (s, a, r, η of the step before)."""
    envs = vector(env)
    agent = rl2.RL2(envs, rl2.Args(d_model=8))
    cell = torch.nn.GRUCell(8, 8)
    cell.load_state_dict({name.removesuffix("_l0"): tensor for name, tensor in agent.layers.state_dict().items()})
    trial = trial_of(envs, agent, tasks=4)
    t, task = trial.valid.nonzero(as_tuple=True)
    mean, values = agent(trial.transitions, t, task)
    torch.testing.assert_close(values, trial.values[t, task], rtol=1e-4, atol=1e-5)
    log_probs = torch.distributions.Normal(mean, agent.log_std.exp()).log_prob(trial.transitions[t, task, 1:2]).sum(1)
    torch.testing.assert_close(log_probs, trial.log_probs[t, task], rtol=1e-4, atol=1e-5)
    state, before = torch.zeros(4, 8), torch.zeros(4, 4)
    for step in range(40):
        x = torch.cat([trial.transitions[step, :, :1], before[:, 1:]], dim=1)
        state = cell(agent.phi(agent.normalise(x)), state)
        valid = trial.valid[step]
        torch.testing.assert_close(agent.value(state)[valid, 0], trial.values[step, valid], rtol=1e-4, atol=1e-5)
        before = trial.transitions[step]


# --- PPO --------------------------------------------------------------------------------------------------------------
@pytest.mark.parametrize("env", [PointMass, Mortal])
def test_advantages_are_the_double_sum_over_the_trial(env):
    """A_t = Σ_k (γλ)^k δ_(t+k) over the valid steps of all episodes, the others passing without reward or advantage."""
    gamma, lam = 0.9, 0.8
    envs = vector(env)
    trial = trial_of(envs, make_agent(envs, init_std=0.6), tasks=6, episodes=3)
    assert trial.valid.all() == (env is PointMass)
    advantages, returns = trmrl.advantages_and_returns(trial, gamma, lam)
    for task in range(6):
        when = [*trial.valid[:, task].nonzero()[:, 0].tolist(), 60]
        r, v = trial.rewards[when[:-1], task].tolist(), trial.values[when, task].tolist()
        delta = [r[k] + gamma ** (when[k + 1] - when[k]) * v[k + 1] - v[k] for k in range(len(r))]
        for i, t in enumerate(when[:-1]):
            direct = sum((gamma * lam) ** (when[k] - t) * delta[k] for k in range(i, len(r)))
            assert advantages[t, task].item() == pytest.approx(direct, abs=1e-4)
            assert returns[t, task].item() == pytest.approx(direct + v[i], abs=1e-4)
    # With λ = 1 it is the discounted return of the whole trial, which has no reward after a termination.
    _, returns = trmrl.advantages_and_returns(trial, gamma, 1.0)
    for task in range(6):
        whole = gamma**60 * trial.values[60, task] + sum(gamma**t * trial.rewards[t, task] for t in range(60))
        assert returns[0, task].item() == pytest.approx(whole.item(), abs=1e-3)


def test_the_trials_end_is_a_truncation_and_a_death_is_not():
    envs = vector(Mortal)
    agent = make_agent(envs, init_std=0.6)
    agent.value.bias.data.fill_(1.0)
    trial = trial_of(envs, agent, tasks=12)
    alive = trial.valid[-1] & (trial.transitions[-1, :, 0] != 0)
    assert alive.any() and not alive.all() and ((trial.values[-1] != 0) == alive).all()


def test_the_update_is_ppos():
    """One step on one minibatch, against the clipped objective written out sample by sample."""
    envs = vector()
    agent, copy = make_agent(envs), make_agent(envs)
    trial = trial_of(envs, agent)
    with torch.no_grad():
        for ours, theirs in zip(agent.parameters(), copy.parameters()):  # so that some ratios are clipped
            ours += 0.2 * torch.randn_like(ours)
            theirs.copy_(ours)
    statistics = update(agent, trial, gamma=0.95, gae_lambda=0.9, clip_coef=0.2, max_grad_norm=0.7)
    advantages, returns = trmrl.advantages_and_returns(trial, 0.95, 0.9)
    copy.rescale_value(returns.mean(), returns.std(correction=0))
    advantages = (advantages - advantages.mean()) / advantages.std(correction=0)
    policy_loss = value_loss = clipped = 0.0
    for t, task in trial.valid.nonzero().tolist():
        mean, value = copy(trial.transitions, torch.tensor([t]), torch.tensor([task]))
        policy = torch.distributions.Normal(mean, copy.log_std.exp())
        ratio = (policy.log_prob(trial.transitions[t, task, 1:2]).sum() - trial.log_probs[t, task]).exp()
        objectives = ratio * advantages[t, task], max(min(ratio, 1.2), 0.8) * advantages[t, task]
        policy_loss -= min(objectives) / 120
        value_loss += 0.5 * (value[0] - returns[t, task]) ** 2 / returns.var(correction=0) / 120
        clipped += float(ratio < 0.8 or ratio > 1.2) / 120
    assert 0 < clipped < 1 and statistics["clip_fraction"] == pytest.approx(clipped)
    assert statistics["policy_loss"] == pytest.approx(policy_loss.item(), rel=1e-4)
    assert statistics["value_loss"] == pytest.approx(value_loss.item(), rel=1e-4)
    (policy_loss + value_loss).backward()
    norm = torch.stack([parameter.grad.norm() for parameter in copy.parameters()]).norm()
    for ours, theirs in zip(agent.parameters(), copy.parameters()):
        expected = theirs - 0.1 * theirs.grad * min(1.0, 0.7 / norm)
        torch.testing.assert_close(ours, expected, rtol=1e-3, atol=1e-5)


def test_minibatches_hold_every_valid_step_once_an_epoch(monkeypatch):
    envs = vector(Mortal)
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


def test_rescaling_the_value_head_changes_no_prediction():
    agent = make_agent()
    trial = trial_of(vector(), agent)
    at = torch.arange(30), torch.arange(30) % 3
    before = agent(trial.transitions, *at)[1]
    for returns in (torch.randn(100) * 30 - 200, torch.full((100,), 5.0), torch.randn(100) * 3):
        agent.rescale_value(*trmrl.mean_and_std(trmrl.sums_of(returns)))
        torch.testing.assert_close(agent(trial.transitions, *at)[1], before, rtol=1e-3, atol=1e-2)
    assert agent.return_mean.item() == pytest.approx(np.mean(returns.numpy()), abs=1e-5)
    assert agent.return_std.item() == pytest.approx(np.std(returns.numpy()), rel=1e-3)


def test_a_high_kl_ends_the_update():
    envs = vector()

    def steps_and_kl(target_kl) -> tuple[int, float]:
        agent = make_agent(envs)
        optimizer = torch.optim.Adam(agent.parameters(), lr=1e-2)
        row = update(agent, trial_of(envs, agent), optimizer, minibatch_size=60, update_epochs=5, target_kl=target_kl)
        assert row["gradient_steps"] == optimizer.state[agent.log_std]["step"].item()
        return row["gradient_steps"], row["approx_kl"]

    assert steps_and_kl(None)[0] == steps_and_kl(1e9)[0] == 10
    assert steps_and_kl(1e-9)[0] == 1  # what has not moved has no divergence
    steps, mean = steps_and_kl(0.01)
    assert 1 < steps < 10 and mean > 0.01 and steps_and_kl(1.01 * mean)[0] > steps


def test_a_gradient_that_is_not_finite_is_never_stepped_on():
    agent = make_agent()
    trial = trial_of(vector(), agent)
    trial.transitions[7, 1, -2] = math.inf
    before = {name: parameter.clone() for name, parameter in agent.named_parameters() if "value" not in name[:6]}
    with pytest.raises(trmrl.RunFailed):
        update(agent, trial)
    assert all(torch.equal(agent.get_parameter(name), parameter) for name, parameter in before.items())


# --- meta-tests -------------------------------------------------------------------------------------------------------
def test_meta_test_files(tmp_path):
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
    shapes = {f"{name} {key}": array.shape for name, data in files.items() for key, array in data.items()}
    tests = {"rewards": (3, 2, 20), "success": (3, 2), "tasks": (3, 1), "observations": (3, 20, 1)}
    expected = {f"{name} {key}": shape for name in ("meta_test", "ood") for key, shape in tests.items()}
    expected |= {"refinement representation_error": (3,), "refinement regression_mse": (3,)}
    expected |= {"working_memories embedding": (20, 8), "working_memories task": (20,), "attention weights": (2, 5)}
    assert shapes == expected
    assert trmrl.main(["--test", str(folder)]) == 0
    assert (folder / "checkpoint.pt").read_bytes() == checkpoint
    for name, data in files.items():
        again = np.load(folder / f"{name}.npz")
        assert all(np.array_equal(data[key], again[key]) for key in data)


def test_meta_tests_take_mean_actions_on_tasks_that_training_never_draws():
    envs = vector()
    agent = make_agent(envs, init_std=1.0)
    args = trmrl.Args(test_tasks=30, seed=3)
    results = trmrl.meta_test(agent, envs, args, 1)
    agent.log_std.data.fill_(-20.0)
    for split, arrays in trmrl.meta_test(agent, envs, args, 1).items():  # an agent that cannot explore does the same
        np.testing.assert_array_equal(arrays["rewards"], results[split]["rewards"])
    drawn = [trmrl.meta_test(agent, envs, trmrl.Args(test_tasks=30, seed=4), 1)["test"]["tasks"]]
    for purpose in ("train tasks", "train"):
        streams = [trmrl.random_stream(3, purpose, iteration) for iteration in range(300)]
        drawn += [envs.sample_tasks("train", 30, stream) for stream in streams]
    assert not np.isin(results["test"]["tasks"], drawn).any()


@torch.no_grad()
def test_refinement_against_scalar_loops():
    """Fig. 7: cosines summed one by one; the regression through the pseudo-inverse; attention from keys and queries."""
    envs = vector()
    agent = make_agent(envs, layers=3)
    agent.policy.weight.data.normal_()
    files = trmrl.analyse_memories(agent, envs, trmrl.Args(test_tasks=4, test_episodes=4))
    rng = trmrl.random_stream(1, "refinement")
    trial = trmrl.collect_trial(agent, envs, envs.sample_tasks("test", 6, rng), 2, rng, explore=False)
    layers, attention = [[], [], [], []], np.zeros(4)
    steps = [(t, task) for task in range(6) for t in range(40)]
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
    fitted = np.array([task < 4 for _, task in steps])
    errors = files["refinement"]
    for layer in range(4):
        distances = [1 - a @ b / np.linalg.norm(a) / np.linalg.norm(b) for a, b in zip(layers[layer], layers[3])]
        assert errors["representation_error"][layer] == pytest.approx(np.mean(distances), abs=1e-5)
        X = np.c_[np.array(layers[layer]), np.ones(len(steps))]
        mse = np.mean((X[~fitted] @ np.linalg.pinv(X[fitted]) @ actions[fitted] - actions[~fitted]) ** 2)
        assert errors["regression_mse"][layer] == pytest.approx(mse, rel=1e-2, abs=1e-9)
    assert errors["regression_mse"][3] < 1e-9 < errors["regression_mse"][0]
    assert files["attention"]["weights"][0] == pytest.approx(attention, abs=1e-5)
    assert files["attention"]["weights"].sum(1) == pytest.approx(np.ones(3), rel=1e-5)


@pytest.mark.parametrize("main", [trmrl.main, main_rl2])
def test_learns_a_toy_task_distribution(tmp_path, main):
    """The point mass reaches unseen hidden velocities, which it can only infer from its rewards."""
    flags = "--env PointMass --d-model 16 --num-tasks 40 --total-timesteps 80000 --learning-rate 2e-3 --gamma 0.9"
    extra = "--update-epochs 3 --layers 2 --heads 2" if main is trmrl.main else "--minibatch-size 400 --target-kl None"
    folder = run(tmp_path, *flags.split(), *extra.split(), main=main)
    returns = progress(folder)["test_return"].dropna()
    # The best policy that ignores the rewards stays at 0: E|v*| = 0.5 a step.
    assert returns.iloc[0] < -8 and returns.iloc[-1] > -4.5
    assert np.load(folder / "meta_test.npz")["success"].mean() > 0.8
    assert json.loads((folder / "args.json").read_text())["method"] in folder.name


# --- tasks and environments -------------------------------------------------------------------------------------------
def cheetah_reward(info, reward, action, target):
    return -abs(info["x_velocity"] - target) - 0.05 * np.sum(action**2)


def ant_reward(
    info, reward, action, angle
):  # contact cost included; backward is forward with the velocity's sign turned
    return reward if angle == 0.0 else reward - 2 * info["x_velocity"]


ANT = ("Ant-v5", dict(include_cfrc_ext_in_observation=False), trmrl.AntDir, ant_reward)


@pytest.mark.parametrize(
    "name, options, env, expected_reward, task",
    [("HalfCheetah-v5", {}, trmrl.HalfCheetahVel, cheetah_reward, 1.3), (*ANT, 0.0), (*ANT, math.pi)],
)
def test_bodies_are_gymnasiums(name, options, env, expected_reward, task):
    """The same seed and actions give the same states, bit for bit, and ends; rewards are those of App. B."""
    env, reference = env(1), gymnasium.make(name, **options)
    env.task = np.array([task])
    np.testing.assert_array_equal(env.reset(seed=5)[0], reference.reset(seed=5)[0])
    rng = np.random.default_rng(0)
    for _ in range(env.horizon):
        action = rng.uniform(-1, 1, env.action_space.shape)
        expected, reward, ended, _, info = reference.step(action)
        observation, ours, terminated, _, _ = env.step(action)
        np.testing.assert_array_equal(observation, expected)
        assert ours == pytest.approx(expected_reward(info, reward, action, task), rel=1e-12) and terminated == ended
        if ended:
            break
    assert ended == (name == "Ant-v5")


def test_tasks_are_the_papers():
    """Velocities are uniform in [0, 3], OOD in [3, 4]; a batch has as many ants forward as backward (App. B)."""
    env, rng = trmrl.HalfCheetahVel(1), np.random.default_rng(0)
    for split, low, high in (("train", 0, 3), ("test", 0, 3), ("ood", 3, 4)):
        tasks = env.sample_tasks(split, 5000, rng)
        quantiles = np.quantile(tasks, [0, 0.25, 0.5, 0.75, 1])
        assert tasks.shape == (5000, 1) and quantiles == pytest.approx(np.linspace(low, high, 5), abs=0.1)
    for name, cosine in (("AntDir", -1.0), ("AntDir57", math.cos(2.0))):  # the authors' goals are 2 radians apart
        env = trmrl.ENVS[name](seed=1)
        for split in env.splits:
            angles, counts = np.unique(env.sample_tasks(split, 20, rng), return_counts=True)
            assert counts.tolist() == [10, 10] and math.cos(angles[0] - angles[1]) == pytest.approx(cosine)


def test_an_ant_whose_state_is_not_finite_ends_its_episode():
    envs = vector(trmrl.AntDir)
    envs.reset(seed=0, options={"tasks": np.zeros((2, 1))})
    envs.envs[1].unwrapped.data.qvel[:] = 1e30
    for _ in range(2):
        observations, rewards, terminated, _, _ = envs.step(np.zeros((2, 8)))
        assert terminated.tolist() == [False, True] and np.isfinite(rewards).all()
    assert not observations[1].any() and rewards[1] == 0


def test_a_diverged_simulation_is_seen(monkeypatch):
    """MuJoCo itself would quietly start a body anew; the trial must end instead."""
    envs = vector(trmrl.HalfCheetahVel)
    simulate = envs.envs[0].unwrapped.do_simulation

    def kick(action, frames):
        envs.envs[0].unwrapped.data.qvel[:] = 1e8
        simulate(action, frames)

    monkeypatch.setattr(envs.envs[0].unwrapped, "do_simulation", kick)
    with pytest.raises(trmrl.RunFailed, match="NaN"):
        trial_of(envs, make_agent(envs), tasks=2, episodes=1)


def test_meta_world_is_metaworlds():
    """Training goals are metaworld's training split, test goals its test split, disjoint and hidden from the agent."""
    env, rng = trmrl.ENVS["ML1-Reach"](seed=4), np.random.default_rng(0)
    benchmark = metaworld.ML1("reach-v3", seed=4)
    goals = {}
    for split, numbers in (("train", range(50)), ("test", range(50, 100))):
        goals[split] = {tuple(pickle.loads(task.data)["rand_vec"]) for task in getattr(benchmark, f"{split}_tasks")}
        assert sorted(env.sample_tasks(split, 50, rng)[:, 0]) == list(numbers)
    assert len(goals["train"]) == len(goals["test"]) == 50 and not goals["train"] & goals["test"]
    rewards = []
    for split, number, steps in (("train", 7, 20), ("test", 57, 20), ("train", 7, 500)):  # past 500 metaworld raises
        env.task = np.array([number])
        own = benchmark.train_classes["reach-v3"]()
        own.set_task(getattr(benchmark, f"{split}_tasks")[7])
        np.testing.assert_array_equal(env.reset(seed=0)[0], own.reset()[0])
        for action in np.random.default_rng(1).uniform(-1, 1, (steps, 4)):
            expected, reward, _, _, info = own.step(action)
            observation, ours, _, _, our_info = env.step(action)
            np.testing.assert_array_equal(observation, expected)
            assert ours == reward and our_info["success"] == info["success"] and not observation[36:].any()
        rewards.append(ours)
    assert rewards[0] != rewards[1]


def test_ml45_covers_all_environments_and_keeps_their_simulators():
    env, rng = trmrl.ENVS["ML45-Train"](seed=1), np.random.default_rng(0)
    batches = [env.sample_tasks("train", 25, rng)[:, 0] for _ in range(20)]
    assert all(len(set(batch // 100)) == 25 and (np.diff(batch) > 0).all() for batch in batches)
    assert len(set(np.concatenate(batches) // 100)) == len(set(env.names)) == 45
    test = env.sample_tasks("test", 45, rng)[:, 0]
    assert len(set(test // 100)) == 45 and (test % 100 < 50).all()
    envs = vector(functools.partial(trmrl.MetaWorld, ("door-open-v3", "reach-wall-v3"), False))
    firsts = [envs.reset(seed=0, options={"tasks": np.array([[a], [b]])})[0] for a, b in ((3, 104), (104, 3), (3, 104))]
    assert not np.array_equal(*firsts[0])
    np.testing.assert_array_equal(firsts[0], firsts[1][::-1])  # a goal is the same in whichever copy
    np.testing.assert_array_equal(firsts[0], firsts[2])


# --- the vector environment and its processes -------------------------------------------------------------------------
def test_processes_share_the_copies():
    """Two processes do what one does, whatever the number of tasks."""
    alone, shared = vector(trmrl.HalfCheetahVel), vector(trmrl.HalfCheetahVel, processes=2)
    rng = np.random.default_rng(0)
    for n in (5, 2, 5):
        tasks, actions = alone.sample_tasks("train", n, rng), rng.uniform(-1, 1, (10, n, 6))
        for action in [None, *actions]:
            ours, theirs = (
                envs.reset(seed=3, options={"tasks": tasks}) if action is None else envs.step(action)
                for envs in (alone, shared)
            )
            assert all(np.array_equal(a, b) for a, b in zip(ours[:-1], theirs[:-1]))
    assert alone.num_envs == 5 and alone.metadata["autoreset_mode"] is gymnasium.vector.AutoresetMode.DISABLED


DIES = """
import os, signal, sys
import trmrl

class Dies(trmrl.HalfCheetahVel):
    def step(self, action):
        if os.getpid() != int(os.environ["MAIN"]):
            os.kill(os.getpid(), signal.SIGKILL)
        return super().step(action)

if __name__ == "__main__":
    os.environ["MAIN"] = str(os.getpid())
    trmrl.ENVS["Dies"] = Dies
    trmrl.torch.set_num_threads(2)
    sys.exit(trmrl.main())
"""


def test_a_process_that_dies_ends_the_run_with_one_line(tmp_path):
    (tmp_path / "script.py").write_text(DIES)
    environment = os.environ | {"PYTHONPATH": str(HERE)}
    command = [sys.executable, "script.py", "--env", "Dies", *TINY]
    ended = subprocess.run(command, cwd=tmp_path, env=environment, capture_output=True, text=True)
    assert ended.returncode == 1 and "Traceback" not in ended.stderr
    line = ended.stderr.splitlines()[-1]
    assert line.startswith("error: Dies, iteration 1") and "has died" in line
    (folder,) = (tmp_path / "runs").iterdir()
    assert torch.load(folder / "checkpoint.pt", weights_only=True)["rows"] == []


# --- runs -------------------------------------------------------------------------------------------------------------
def test_a_run_folder_holds_what_others_rely_on(tmp_path, capsys):
    folder = run(tmp_path, "--env", "PointMass", *TINY, "--total-timesteps", "400", "--eval-interval", "2")
    args = json.loads((folder / "args.json").read_text())
    assert (args["env"], args["layers"], args["gamma"], args["method"]) == ("PointMass", 2, trmrl.Args.gamma, "TrMRL")
    assert set(args["versions"]) == {"torch", "mujoco", "gymnasium", "metaworld", "numpy"}
    rows = progress(folder)
    columns = (
        "iteration env_steps wall_seconds train_return train_success test_return test_success ood_return"
        " steps_per_second rollout_seconds update_seconds gradient_steps policy_loss value_loss entropy approx_kl"
        " clip_fraction explained_variance learning_rate"
    )
    assert list(rows) == columns.split() and list(rows["env_steps"]) == [80, 160, 240, 320, 400]
    assert list(rows["test_return"].notna()) == [True, False, True, False, True]
    assert list(rows["learning_rate"] / trmrl.Args.learning_rate) == pytest.approx([1.0, 0.8, 0.6, 0.4, 0.2])
    board = EventAccumulator(str(folder)).Reload()
    for name in ("train_return", "test_return", "approx_kl"):
        assert [event.value for event in board.Scalars(name)] == pytest.approx(list(rows[name].dropna()), rel=1e-5)
    assert set(torch.load(folder / "checkpoint.pt", weights_only=True)) == {"args", "rows", "agent", "optimizer"}
    output = capsys.readouterr().out
    assert "test return" in output and "ood success" in output and str(folder) in output
    assert not list(folder.glob("*.tmp"))


FOUR = ["--env", "PointMass", *TINY, "--total-timesteps", "320", "--eval-interval", "2"]
TIMES = ["wall_seconds", "steps_per_second", "rollout_seconds", "update_seconds"]


def same_run(one: Path, other: Path) -> bool:
    """Are the tables, but for the times, and every number of the checkpoints the same?"""
    checkpoints = [torch.load(folder / "checkpoint.pt", weights_only=True) for folder in (one, other)]
    tensors = []
    for checkpoint in checkpoints:
        states = [checkpoint["agent"], *checkpoint["optimizer"]["state"].values()]
        tensors.append([tensor for state in states for tensor in state.values()])
    tables = [progress(folder).drop(columns=TIMES) for folder in (one, other)]
    return tables[0].equals(tables[1]) and all(map(torch.equal, *tensors))


def test_the_seed_decides(tmp_path):
    runs = [run(tmp_path / str(i), *FOUR, "--seed", seed) for i, seed in enumerate("112")]
    assert same_run(runs[0], runs[1]) and not same_run(runs[0], runs[2])


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_interrupt_and_resume_is_the_unbroken_run(tmp_path, monkeypatch, capsys, number):
    straight = run(tmp_path / "straight", *FOUR)
    ppo_update, calls = trmrl.ppo_update, []

    def interrupted(*arguments):
        calls.append(arguments)
        if len(calls) == 3:
            signal.raise_signal(number)
        return ppo_update(*arguments)

    monkeypatch.setattr(trmrl, "ppo_update", interrupted)
    assert trmrl.main([*FOUR, "--runs-dir", str(tmp_path / "broken")]) == 130
    (broken,) = (tmp_path / "broken").iterdir()
    assert f"--resume {broken}" in capsys.readouterr().out and list(progress(broken)["iteration"]) == [1, 2]
    assert trmrl.main(["--resume", str(broken)]) == 0
    assert same_run(straight, broken)


def test_the_command_line_on_the_real_environment(tmp_path):
    """Train on HalfCheetahVel, kill it, resume to the end: as a user does it."""
    script = [sys.executable, str(HERE / "trmrl.py")]
    flags = ["--env", "HalfCheetahVel", *TINY, "--layers", "4", "--total-timesteps", "2400"]
    here = dict(cwd=tmp_path, text=True, env=os.environ | {"OMP_NUM_THREADS": "1"})
    process = subprocess.Popen(script + flags, stdout=subprocess.PIPE, stderr=subprocess.PIPE, **here)
    errors = ""
    while "train_return=" not in errors:  # the progress bar's first word on an iteration
        character = process.stderr.read(1)
        assert character, errors
        errors += character
    process.kill()
    process.communicate()
    (folder,) = tmp_path.glob("runs/*")
    ended = subprocess.run([*script, "--resume", str(folder)], capture_output=True, **here)
    assert ended.returncode == 0, ended.stderr
    assert "test return" in ended.stdout and "ood return" in ended.stdout and "success" not in ended.stdout
    assert progress(folder)["env_steps"].iloc[-1] == 2400 and progress(folder)["test_success"].isna().all()


@pytest.mark.parametrize("env", ["AntDir", "ML45-Train"])
def test_other_environments_train_and_meta_test(tmp_path, monkeypatch, env):
    """A few seconds of each; ML45-Train with two of its environments."""
    handful = functools.partial(trmrl.MetaWorld, ("drawer-close-v3", "reach-wall-v3"), False)
    monkeypatch.setitem(trmrl.ENVS, "ML45-Train", handful)
    flags = [*TINY, "--test-tasks", "2", "--test-episodes", "1", "--episodes-per-trial", "1"]
    folder = run(tmp_path, "--env", env, *flags, "--total-timesteps", "100")
    meta_test, last, succeeds = np.load(folder / "meta_test.npz"), progress(folder).iloc[-1], env != "AntDir"
    assert meta_test["rewards"].shape == (2, 1, 500 if succeeds else 200)
    assert np.isnan(meta_test["success"]).all() == (not succeeds)
    assert np.isfinite(last["test_success"]) == np.isfinite(last["train_success"]) == succeeds
    assert not (folder / "ood.npz").exists() and np.isnan(last["ood_return"])


# --- several processes ------------------------------------------------------------------------------------------------
def test_two_processes_make_the_update_of_one(monkeypatch):
    """Two threads play the processes, each with every second task; sums that they exchange meet at a barrier."""
    envs = vector(Mortal)
    whole = trial_of(envs, make_agent(envs), tasks=6)

    def updated(agent, share) -> dict:
        trial = trmrl.Trial(**{name: tensor[:, share] for name, tensor in vars(whole).items()})
        statistics = update(agent, trial, update_epochs=3)
        agent.sums += trmrl.sums_of(trial.transitions[:-1][trial.valid])
        return agent.state_dict() | statistics

    expected = updated(make_agent(envs), slice(None))
    barrier, parts, results = threading.Barrier(2, timeout=60), {}, {}

    def all_reduce(x):
        parts[threading.get_ident()] = x.clone()
        barrier.wait()
        x.copy_(sum(parts.values()))
        barrier.wait()
        return x

    def process(agent, rank):
        results[rank] = updated(agent, slice(rank, None, 2))

    monkeypatch.setattr(trmrl, "all_reduce", all_reduce)
    monkeypatch.setattr(trmrl.distributed, "is_initialized", lambda: True)
    threads = [threading.Thread(target=process, args=(make_agent(envs), rank)) for rank in (0, 1)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    for name, value in expected.items():
        torch.testing.assert_close(torch.as_tensor(results[0][name]), torch.as_tensor(value), rtol=1e-3, atol=1e-5)
        torch.testing.assert_close(results[0][name], results[1][name], rtol=0, atol=0)
    assert expected["approx_kl"] > 1e-5  # later epochs start from what the first has made


# What each of torchrun's processes runs; with "die" in the environment process 1 is killed in its third iteration.
TORCHRUN = """
import os, signal, sys
import test_trmrl, trmrl

def update(*arguments):
    calls.append(arguments)
    if "die" in os.environ and os.environ["RANK"] == "1" and len(calls) == 3:
        os.kill(os.getpid(), signal.SIGKILL)
    row = ppo_update(*arguments)
    trmrl.torch.save(arguments[0].state_dict(), f"parameters{os.environ['RANK']}.pt")
    return row

trmrl.ENVS["PointMass"] = test_trmrl.PointMass
calls, ppo_update, trmrl.ppo_update = [], trmrl.ppo_update, update
sys.exit(trmrl.main())
"""


@pytest.mark.parametrize("dies", [False, True])
def test_torchrun(tmp_path, dies):
    """Processes stay alike; when one is killed all end; one process can go on from what two have done."""
    (tmp_path / "script.py").write_text(TORCHRUN)
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2", "script.py"]
    environment = os.environ | {"PYTHONPATH": str(HERE), "OMP_NUM_THREADS": "1"} | ({"die": "yes"} if dies else {})
    ended = subprocess.run([*command, *FOUR], cwd=tmp_path, env=environment, capture_output=True, text=True)
    assert (ended.returncode != 0) == dies, ended.stderr
    (folder,) = (tmp_path / "runs").iterdir()
    assert list(progress(folder)["env_steps"]) == ([80, 160] if dies else [80, 160, 240, 320])
    assert (folder / "meta_test.npz").exists() != dies
    first, second = (torch.load(tmp_path / f"parameters{rank}.pt") for rank in (0, 1))
    assert all(torch.equal(first[name], second[name]) for name in first)
    assert trmrl.main(["--resume", str(folder), "--total-timesteps", "400"]) == 0
    assert list(progress(folder)["env_steps"]) == [80, 160, 240, 320, 400]


# --- mistakes ---------------------------------------------------------------------------------------------------------
@pytest.mark.parametrize(
    "flags, named",
    [
        ("--env HalfCheetahVel2", "--env HalfCheetahVel2: takes one of HalfCheetahVel"),
        ("--heads 3 --d-model 8", "--heads 3: takes a divisor of --d-model 8"),
        ("--layers 0", "--layers 0: takes a number from 1"),
        ("--gamma 1.5", "--gamma 1.5: takes a number from 0 to 1"),
        ("--learning-rate nan", "--learning-rate nan"),
        ("--seed -1", "--seed -1: takes a number from 0"),
        ("--target-kl 0", "--target-kl 0"),
        ("--device abacus", "--device abacus"),
        ("--runs-dir /dev/null", "--runs-dir /dev/null"),
        ("--resume nowhere", "--resume, --test: take a run's folder; nowhere"),
        ("--test nowhere --resume nowhere", "--resume, --test: take one"),
        ("--num-tasks 3", "--num-tasks 3: takes a multiple"),  # of two processes
    ],
)
def test_a_mistake_ends_with_one_line_and_code_2(tmp_path, monkeypatch, capsys, flags, named):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("WORLD_SIZE", "2")
    assert trmrl.main(flags.split()) == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith(f"error: {named}") and not list(tmp_path.rglob("*"))


@pytest.mark.parametrize("flags", [["--layer", "4"], ["--layers", "many"]])
def test_a_flag_that_does_not_exist_or_parse_ends_with_code_2(capsys, flags):
    with pytest.raises(SystemExit) as exit:
        trmrl.main(flags)
    assert exit.value.code == 2 and flags[0] in capsys.readouterr().err


def test_flags_go_before_an_environments_defaults_and_those_before_a_methods():
    assert trmrl.parse([], trmrl.Args, "TrMRL") == (trmrl.Args(), {})
    reach, _ = trmrl.parse(["--env", "ML1-Reach", "--minibatch-size", "400"], rl2.Args, "RL2")
    assert (reach.init_std, reach.learning_rate, reach.minibatch_size) == (1.0, rl2.Args.learning_rate, 400)
    assert trmrl.parse(["--env", "ML1-Reach", "--init-std", "0.7"], rl2.Args, "RL2")[0].init_std == 0.7


def test_a_damaged_run_is_left_as_it_is(tmp_path, capsys):
    folder = run(tmp_path, "--env", "PointMass", *TINY, "--total-timesteps", "80")
    path = folder / "checkpoint.pt"
    whole = path.read_bytes()

    def assert_left_alone(main, *flags):
        before = {path: path.read_bytes() for path in folder.iterdir()}
        capsys.readouterr()
        for flag in ("--resume", "--test"):
            assert main([flag, str(folder), *flags]) == 2
            (line,) = capsys.readouterr().err.splitlines()
            assert str(folder) in line
        assert {path: path.read_bytes() for path in folder.iterdir()} == before

    assert_left_alone(trmrl.main, "--d-model", "16")  # a network of another shape
    assert_left_alone(main_rl2)
    path.write_bytes(whole[:5000])
    assert_left_alone(trmrl.main)
    torch.save({"agent": {}}, path)
    assert_left_alone(trmrl.main)
    path.unlink()
    assert_left_alone(trmrl.main)


class Explodes(PointMass):
    """Returns a NaN from the sixth batch of tasks on, which an iteration after the first draws."""

    batches = 0

    def sample_tasks(self, split, n, rng):
        self.batches += 1
        return np.full((n, 1), math.nan if self.batches > 5 else 1.0)


def test_a_nan_ends_the_run_and_keeps_the_last_good_checkpoint(tmp_path, monkeypatch, capsys):
    monkeypatch.setitem(trmrl.ENVS, "Explodes", Explodes)
    assert trmrl.main(["--env", "Explodes", *TINY, "--runs-dir", str(tmp_path)]) == 1
    line = capsys.readouterr().err.splitlines()[-1]
    assert "Explodes, iteration" in line and "resuming would repeat it" in line
    (folder,) = tmp_path.iterdir()
    checkpoint = torch.load(folder / "checkpoint.pt", weights_only=True)
    assert len(checkpoint["rows"]) > 0 and all(tensor.isfinite().all() for tensor in checkpoint["agent"].values())


# --- figures ----------------------------------------------------------------------------------------------------------
def fake_run(folder: Path, env="HalfCheetahVel", seed=1, ood=True, success=False, steps=10, shift=0, **flags) -> Path:
    """A run's files with random but known contents; of ten iterations to come, so that fewer steps are unfinished."""
    folder.mkdir(parents=True)
    rng = np.random.default_rng(seed)
    values = {"env": env, "seed": seed, "layers": 4, "t_fixup": True, "method": "TrMRL", "total_timesteps": 1000}
    (folder / "args.json").write_text(json.dumps(values | flags | {"runs_dir": str(folder), "device": seed}))
    columns = "env_steps wall_seconds train_return test_return test_success ood_return".split()
    with open(folder / "progress.csv", "w", newline="") as file:
        writer = csv.DictWriter(file, columns, lineterminator="\n")
        writer.writeheader()
        for i in range(1, steps + 1):
            row = {"env_steps": 100 * i + shift, "wall_seconds": 60 * i, "train_return": rng.normal()}
            if i % 3 == 1:
                row["test_return"] = rng.normal()
                row |= {"ood_return": rng.normal()} if ood else {}
                row |= {"test_success": rng.uniform()} if success else {}
            writer.writerow(row)
    if steps == 10:
        tests = {"rewards": rng.normal(size=(5, 6, 30)), "tasks": rng.uniform(0, 3, (5, 1))}
        np.savez(folder / "meta_test.npz", observations=rng.normal(size=(5, 30, 17)), **tests)
        if ood:
            np.savez(folder / "ood.npz", **tests | {"rewards": rng.normal(size=(5, 6, 30))})
        np.savez(
            folder / "refinement.npz", representation_error=rng.uniform(size=5), regression_mse=rng.uniform(size=5)
        )
        np.savez(folder / "working_memories.npz", embedding=rng.normal(size=(90, 8)), task=rng.uniform(0, 3, 90))
        np.savez(folder / "attention.npz", weights=rng.dirichlet(np.ones(5), 4))
    return folder


def selected(*folders) -> list:
    runs = plot.select([plot.load_run(folder) for folder in folders], [])
    plot.label_settings(runs)
    return runs


def evaluations(folder: Path, column="test_return") -> list[float]:
    with open(folder / "progress.csv") as file:
        return [float(row[column]) for row in csv.DictReader(file) if row[column]]


def draw(tmp_path, capsys, *folders) -> tuple:
    plot.plt.rcParams["savefig.dpi"] = 30  # nobody looks at these
    code = plot.main([*map(str, folders), "--out", str(tmp_path / "figures")])
    said = capsys.readouterr()
    return code, said.out, said.err, {path.stem for path in (tmp_path / "figures").glob("*.png")}


FIGURES = set("meta_training adaptation ood refinement working_memories online_adaptation attention".split())


def test_every_figure_is_drawn(tmp_path, capsys):
    folders = [fake_run(tmp_path / f"{seed}", seed=seed) for seed in (1, 2)]
    folders += [fake_run(tmp_path / "deep", layers=12), fake_run(tmp_path / "ant", env="AntDir", ood=False)]
    code, out, err, names = draw(tmp_path, capsys, *folders)
    assert (code, err) == (0, "") and names == FIGURES | {"ablation_layers"}
    assert "meta_training: drawn from ant, 1, 2, deep" in out and "ablation_layers: drawn from 1, 2, deep" in out
    table = (tmp_path / "figures" / "summary.md").read_text()
    assert "| HalfCheetahVel | TrMRL, layers 4 | 2 | 1,000 | " in table
    assert f"{evaluations(folders[2])[-1]:.2f}" in table


def test_meta_training_shows_the_mean_of_the_evaluations(tmp_path):
    """Seeds whose episodes ended early come onto the steps of the run that ends first; one seed has no band."""
    folders = [fake_run(tmp_path / f"{seed}", seed=seed) for seed in (1, 2, 3)]
    table = plot.learning_table(selected(*folders))
    figure, _ = plot.draw_curves(table, "steps")
    (axes,) = figure.axes
    assert axes.get_title() == "HalfCheetahVel: test return"
    assert [text.get_text() for text in figure.legends[0].get_texts()] == ["TrMRL (3 seeds)"]
    assert axes.lines[0].get_xdata() == pytest.approx(np.array([1, 4, 7, 10]) / 1e4)
    assert axes.lines[0].get_ydata() == pytest.approx(np.mean([evaluations(folder) for folder in folders], axis=0))
    figure, _ = plot.draw_curves(plot.learning_table(selected(folders[0])), "steps")
    assert not any(len(path.vertices) for band in figure.axes[0].collections for path in band.get_paths())
    late = fake_run(tmp_path / "late", seed=4, shift=30)
    table = plot.learning_table(selected(folders[0], late))
    moved = np.interp([100, 400, 700, 1000], [130, 430, 730, 1030], evaluations(late))
    assert table.loc[table["run"] == "late", "y"].to_numpy() == pytest.approx(moved)


def test_meta_world_is_judged_by_success(tmp_path):
    folder = fake_run(tmp_path / "reach", env="ML1-Reach", ood=False, success=True)
    table = plot.learning_table(selected(folder))
    assert set(table["panel"]) == {"ML1-Reach: test success rate"}
    assert table["y"].to_numpy() == pytest.approx(evaluations(folder, "test_success"))


def test_adaptation_shows_what_the_files_hold(tmp_path):
    folders = [fake_run(tmp_path / f"{seed}", seed=seed) for seed in (1, 2)]
    runs, files = selected(*folders), [np.load(folder / "meta_test.npz") for folder in folders]
    returns = [[np.sum(file["rewards"][:, episode]) / 5 for episode in range(6)] for file in files]
    table = plot.file_table(runs, [], "meta_test.npz", plot.RETURNS)
    assert table["y"].to_numpy() == pytest.approx(np.ravel(returns))
    rewards, velocities = plot.draw_online_adaptation(runs, [])[0].axes
    expected = np.mean([np.mean(file["rewards"][:, 0], axis=0) for file in files], axis=0)
    assert rewards.lines[0].get_ydata() == pytest.approx(expected)
    assert velocities.get_title() == "HalfCheetahVel, TrMRL, seed 1: velocity (m/s)"
    slowest = files[0]["tasks"].argmin()
    assert velocities.lines[0].get_ydata() == pytest.approx(files[0]["observations"][slowest, :, 8])


def test_ablations_are_runs_that_differ_in_one_flag(tmp_path):
    base, base2 = fake_run(tmp_path / "base"), fake_run(tmp_path / "base2", seed=2)
    deep, both = fake_run(tmp_path / "deep", layers=12), fake_run(tmp_path / "both", layers=8, t_fixup=False)
    other = [fake_run(tmp_path / "ant", env="AntDir", layers=2), fake_run(tmp_path / "rl2", method="RL2", layers=1)]
    runs = selected(base, base2, deep, both, *other)
    tables = plot.ablations(runs)
    assert {flag: set(table["run"]) for flag, table in tables.items()} == {"layers": {"base", "base2", "deep"}}
    labels = {run.folder.name: run.label for run in runs}
    assert labels["rl2"] == "RL²" and labels["deep"] == "TrMRL, layers 12, t fixup True"
    assert len({run.number for run in runs}) == 5  # a colour a label, the same in all figures


def test_an_unfinished_run_is_left_out_or_drawn_alone(tmp_path, capsys):
    half, whole = fake_run(tmp_path / "half", seed=2, steps=5), fake_run(tmp_path / "whole")
    code, out, err, names = draw(tmp_path, capsys, half, whole)
    assert (
        names == FIGURES and code == 1 and "half is unfinished (0.0005 M of 0.001 M steps)" in err and "half" not in out
    )
    (run,) = selected(half)
    assert run.label == "TrMRL, unfinished" and len(plot.learning_table([run])) == 2


def test_the_same_seed_twice_counts_once(tmp_path, capsys):
    new, old = (fake_run(tmp_path / f"{name}-2026010{day}-000000-000001") for name, day in (("a", 2), ("b", 1)))
    code, out, err, _ = draw(tmp_path, capsys, old, new)
    assert code == 0 and f"left out: {old} has the setting and seed of {new}" in err and old.name not in out


@pytest.mark.parametrize("name", ["args.json", "progress.csv", "meta_test.npz", "refinement.npz", "attention.npz"])
def test_what_is_damaged_is_left_out_and_the_rest_is_drawn(tmp_path, capsys, name):
    bad, good = fake_run(tmp_path / "bad", seed=9), fake_run(tmp_path / "good")
    content = (bad / name).read_bytes()
    (bad / name).write_bytes(content[: len(content) // 2])
    code, out, err, names = draw(tmp_path, capsys, bad, good)
    assert code == 1 and "left out" in err and "bad" in err and "Traceback" not in err
    assert names == FIGURES and out.count("good") >= 5


def test_no_runs_at_all(tmp_path, capsys):
    for argv in ([], [str(tmp_path / "nothing")], [str(tmp_path), "--pdf"]):
        assert plot.main([*argv, "--out", str(tmp_path / "figures")]) == 2
        assert "error: " in capsys.readouterr().err and not (tmp_path / "figures").exists()
    good = fake_run(tmp_path / "good")
    assert plot.main([str(good), "--out", str(good / "args.json")]) == 2
    assert "--out" in capsys.readouterr().err and json.loads((good / "args.json").read_text())


def test_plot_needs_neither_torch_nor_trmrl():
    code = "import plot, sys; assert not {'torch', 'trmrl', 'gymnasium'} & set(sys.modules)"
    assert not subprocess.call([sys.executable, "-c", code], cwd=HERE)


# --- benchmarks -------------------------------------------------------------------------------------------------------


def seconds(work, times: int = 3) -> float:
    """The fastest of a few calls."""
    durations = []
    for _ in range(times):
        started = time.perf_counter()
        work()
        durations.append(time.perf_counter() - started)
    return min(durations)


@pytest.mark.benchmark
@pytest.mark.parametrize("flag, values", [("memory_length", (1, 5, 10, 25, 50)), ("layers", (1, 2, 4, 8, 12))])
def test_growth_of_an_iteration(flag, values):
    """Collecting and one whole epoch on HalfCheetahVel; at most in proportion to N and to L."""
    envs, durations = trmrl.TaskVectorEnv(functools.partial(trmrl.HalfCheetahVel, seed=1)), []
    for value in values:
        args = trmrl.Args(target_kl=None, update_epochs=1, **{flag: value})
        agent = trmrl.Agent(envs, args)
        optimizer = torch.optim.Adam(agent.parameters(), lr=args.learning_rate, fused=True)
        rng = np.random.default_rng(0)
        durations.append(
            seconds(lambda: trmrl.ppo_update(agent, optimizer, trial_of(envs, agent, 20), args, rng), 2)  # noqa: B023
        )
    ratios = [f"{value}: {duration / durations[0]:.2f}" for value, duration in zip(values, durations)]
    print(f"\nseconds an iteration against {flag} {values[0]}: {', '.join(ratios)}")
    for i in range(1, len(values)):
        assert durations[i] / durations[i - 1] <= values[i] / values[i - 1]


@pytest.mark.benchmark
def test_sampling_against_bare_physics():
    """A trial of 20 tasks (physics, reward, acting, storing) against gymnasium's physics alone, in one process."""
    envs = trmrl.TaskVectorEnv(functools.partial(trmrl.HalfCheetahVel, seed=1))
    agent = trmrl.Agent(envs, trmrl.Args())
    actions = np.random.default_rng(0).uniform(-1, 1, (400, 20, 6))
    trial_of(envs, agent, 20)

    def bare():
        for action in actions:
            for env, one in zip(envs.envs, action):
                env.unwrapped.do_simulation(one, 5)

    print(f"\nsampling: {seconds(lambda: trial_of(envs, agent, 20)) / seconds(bare):.2f} times bare physics")
