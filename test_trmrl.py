"""What must hold of trmrl.py, each against something independent: the paper's equation written out slowly, another
library, a direct sum, a perturbation.

    python -m pytest test_trmrl.py                      all but the benchmarks
    python -m pytest -m benchmark -s test_trmrl.py      the benchmarks, on a quiet machine
"""

import csv
import dataclasses
import gc
import inspect
import json
import math
import os
import pickle
import signal
import subprocess
import sys
import time
from functools import partial
from pathlib import Path

import gymnasium
import metaworld
import mujoco
import numpy as np
import pytest
import torch
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

import plot
import trmrl

plot.plt.rcParams["savefig.dpi"] = 30  # nobody looks at these
torch.set_num_threads(1)  # threads cost more than they bring on tensors this small
HERE = Path(__file__).parent
TINY = ["--num-tasks", "2", "--test-tasks", "3", "--test-episodes", "2", "--layers", "2", "--d-model", "8",
        "--heads", "2", "--minibatch-size", "100"]
TIMES = ("wall_seconds", "steps_per_second", "rollout_seconds", "update_seconds")


class PointMass:
    """A point mass on a line that must reach a hidden velocity: the toy that README.md uses to show how to add one."""

    horizon = 20
    num_observations = 1
    num_actions = 1
    splits = ("train", "test", "ood")
    has_success = True

    def __init__(self, seed):
        pass

    def sample_tasks(self, split, n, rng):
        low, high = (1.0, 1.5) if split == "ood" else (-1.0, 1.0)
        return rng.uniform(low, high, (n, 1))

    def reset(self, tasks, rng):
        self.targets = tasks[:, 0]
        self.velocities = rng.uniform(-0.1, 0.1, len(tasks))
        return self.velocities[:, None]

    def step(self, actions):
        self.velocities = self.velocities + 0.5 * actions[:, 0]
        distances = np.abs(self.velocities - self.targets)
        never = np.zeros(len(actions), dtype=bool)
        return self.velocities[:, None], -distances, never, distances < 0.1


class Mortal(PointMass):
    """Ends an episode where the velocity leaves [-0.6, 0.6]; what it returns after that is garbage on purpose."""

    def reset(self, tasks, rng):
        self.dead = np.zeros(len(tasks), dtype=bool)
        return super().reset(tasks, rng)

    def step(self, actions):
        observations, rewards, _, success = super().step(actions)
        observations, rewards = observations.copy(), np.where(self.dead, np.nan, rewards)
        observations[self.dead] = np.nan
        terminated = np.abs(self.velocities) > 0.6
        self.dead |= terminated
        return observations, rewards, terminated, success


def test_the_readme_shows_this_toy():
    source = inspect.getsource(PointMass).replace(f'    """{PointMass.__doc__}"""\n\n', "")
    assert source in (HERE / "README.md").read_text()


@pytest.fixture(autouse=True)
def toys(monkeypatch):
    monkeypatch.setitem(trmrl.ENVS, "PointMass", PointMass)
    monkeypatch.setitem(trmrl.ENVS, "Mortal", Mortal)


def make_agent(S=3, A=2, memory_length=4, keep_memory=False, layers=2, heads=2, d_model=8, t_fixup=True) -> trmrl.TrMRL:
    torch.manual_seed(0)
    return trmrl.TrMRL(S, A, d_model, 0.5, 3.0, memory_length, keep_memory, layers, heads, t_fixup)


def trial_of(env, agent, tasks=3, episodes=2, explore=True, seed=0) -> trmrl.Trial:
    rng = np.random.default_rng(seed)
    return trmrl.collect_trial(agent, env, env.sample_tasks("train", tasks, rng), episodes, rng, explore)


def run(tmp_path, *flags) -> Path:
    """A finished run's folder."""
    before = set(tmp_path.glob("*"))
    assert trmrl.main([*flags, "--runs-dir", str(tmp_path)]) == 0
    (folder,) = set(tmp_path.glob("*")) - before
    return folder


def progress(folder: Path) -> list[dict]:
    with open(folder / "progress.csv", newline="") as file:
        return list(csv.DictReader(file))


# --- tasks and environments ------------------------------------------------------------------------------------------


def test_half_cheetah_is_bit_exact_with_gymnasium():
    """The same seed and actions give the same states, bit for bit, and the reward of App. B from gymnasium's velocity."""
    env, reference = trmrl.HalfCheetahVel(1), gymnasium.make("HalfCheetah-v5")
    expected, _ = reference.reset(seed=7)
    observation = env.reset(np.array([[1.3]]), np.random.default_rng(7))
    np.testing.assert_array_equal(observation[0], expected)
    rng = np.random.default_rng(0)
    for _ in range(env.horizon):
        action = rng.uniform(-1, 1, 6)
        expected, _, _, _, info = reference.step(action)
        observation, reward, terminated, success = env.step(action[None])
        np.testing.assert_array_equal(observation[0], expected)
        assert reward[0] == pytest.approx(-abs(info["x_velocity"] - 1.3) - 0.05 * np.sum(action**2), rel=1e-12)
        assert not terminated[0] and not success[0]


def test_copies_do_not_depend_on_each_other():
    """A batch steps each copy as it would alone, also after the batch has grown and shrunk."""
    env, alone = trmrl.HalfCheetahVel(1), trmrl.HalfCheetahVel(1)
    tasks = np.linspace(0, 3, 4)[:, None]
    for n in (4, 2, 4):
        rng = np.random.default_rng(3)
        env.reset(tasks[:n], rng)
        start = env.qpos[1].copy(), env.qvel[1].copy()
        alone.reset(tasks[1:2], np.random.default_rng(0))
        trmrl.mujoco.mj_resetData(alone.model, alone.datas[0])  # forgets the solver's warm start too
        alone.qpos[0][:], alone.qvel[0][:] = start
        trmrl.mujoco.mj_forward(alone.model, alone.datas[0])
        for _ in range(20):
            actions = rng.uniform(-1, 1, (n, 6))
            together = env.step(actions)
            single = alone.step(actions[1:2])
            np.testing.assert_array_equal(together[0][1], single[0][0])
            assert together[1][1] == single[1][0]


def test_target_velocities_have_the_paper_ranges_and_splits_never_meet():
    env = trmrl.HalfCheetahVel(1)
    args = trmrl.Args(seed=3)
    test, ood = (trmrl.held_out_tasks(env, split, args) for split in ("test", "ood"))
    streams = (trmrl.random_stream(3, "train", iteration) for iteration in range(1, 400))
    train = np.concatenate([env.sample_tasks("train", 20, stream) for stream in streams])
    for tasks in (train, test):
        assert 0 <= tasks.min() and tasks.max() <= 3
    assert 3 <= ood.min() and ood.max() <= 4
    assert train.mean() == pytest.approx(1.5, abs=0.05) and train.std() == pytest.approx(3 / 12**0.5, abs=0.05)
    assert not np.isin(test, train).any()
    np.testing.assert_array_equal(test, trmrl.held_out_tasks(env, "test", args))
    assert not np.isin(test, trmrl.held_out_tasks(env, "test", trmrl.Args(seed=4))).any()


def test_ant_is_bit_exact_with_gymnasium():
    """State, termination and reward, contact cost included; backward is forward with the velocity's sign turned."""
    env, reference = trmrl.AntDir(1), gymnasium.make("Ant-v5", include_cfrc_ext_in_observation=False)
    for angle, sign in ((0.0, 1), (math.pi, -1)):
        expected, _ = reference.reset(seed=5)
        observation = env.reset(np.array([[angle], [0.0]]), np.random.default_rng(5))
        np.testing.assert_array_equal(observation[0], expected)
        rng = np.random.default_rng(0)
        contact_costs, ends = 0.0, []
        for _ in range(env.horizon):
            action = rng.uniform(-1, 1, 8)
            expected, reward, terminated, _, info = reference.step(action)
            observation, rewards, ended, _ = env.step(np.array([action, action]))
            np.testing.assert_array_equal(observation[0], expected)
            # The world's frame: sin π is 1e-16, not 0.
            assert rewards[0] == pytest.approx(reward + (sign - 1) * info["x_velocity"], abs=1e-12)
            assert ended[0] == terminated
            contact_costs -= info["reward_contact"]
            ends.append(terminated)
        assert contact_costs > 0


def test_a_falling_ant_ends_its_episode():
    env = trmrl.AntDir(1)
    env.reset(np.zeros((2, 1)), np.random.default_rng(0))
    env.qpos[1][2] = 1.5  # one jumps, the other stands
    _, rewards, terminated, _ = env.step(np.zeros((2, 8)))
    assert terminated.tolist() == [False, True]
    assert rewards[0] > 0.5 > rewards[1]  # the reward for staying alive


def test_ant_goals():
    """Each batch holds forward and backward alike (App. B); the authors' two goals share cos 1 of their way."""
    for name, cosine in (("AntDir", -1.0), ("AntDir57", math.cos(2.0))):
        env = trmrl.ENVS[name](1)
        for split in env.splits:
            tasks = env.sample_tasks(split, 20, np.random.default_rng(0))
            env.reset(tasks, np.random.default_rng(0))
            goals, counts = np.unique(env.goals.round(9), axis=0, return_counts=True)
            assert counts.tolist() == [10, 10] and np.linalg.norm(goals, axis=1) == pytest.approx([1, 1])
            assert goals[0] @ goals[1] == pytest.approx(cosine)
    assert "ood" not in env.splits


@pytest.fixture(scope="module")
def reach():
    return trmrl.ENVS["ML1-Reach"](4)


def test_meta_world_goals_are_the_benchmarks(reach):
    """Training goals are metaworld's training split, test goals its test split, disjoint, hidden from the agent."""
    benchmark = metaworld.ML1("reach-v3", seed=4)
    vectors = {split: {tuple(pickle.loads(task.data)["rand_vec"]) for task in getattr(benchmark, f"{split}_tasks")}
               for split in ("train", "test")}
    assert len(vectors["train"]) == len(vectors["test"]) == 50 and not vectors["train"] & vectors["test"]
    rng = np.random.default_rng(0)
    for split, goals in (("train", range(50)), ("test", range(50, 100))):
        tasks = reach.sample_tasks(split, 50, rng)
        assert sorted(tasks[:, 0]) == list(goals)
    # The simulator rewards the same first step as metaworld's own environment with that goal.
    for split, first in (("train", 0), ("test", 50)):
        observation = reach.reset(np.array([[first + 7], [first + 8]]), rng)
        action = rng.uniform(-1, 1, 4)
        answer = reach.step(np.array([action, action]))
        own = benchmark.train_classes["reach-v3"]()
        for slot in range(2):
            own.set_task(getattr(benchmark, f"{split}_tasks")[7 + slot])
            np.testing.assert_array_equal(observation[slot], own.reset()[0])
            expected, reward, _, _, info = own.step(action)
            np.testing.assert_array_equal(answer[0][slot], expected)
            assert answer[1][slot] == reward and answer[3][slot] == info["success"]
        assert not observation[:, 36:].any() and not answer[0][:, 36:].any()
        assert answer[1][0] != answer[1][1]


def test_meta_world_runs_to_its_horizon_and_repeats_a_task(reach):
    """500 steps and not one more; the same task and actions give the same episode again, another goal another."""
    tasks = reach.sample_tasks("train", 3, np.random.default_rng(0))
    actions = np.random.default_rng(1).uniform(-1, 1, (500, 3, 4))

    def rewards(tasks):
        reach.reset(tasks, np.random.default_rng())
        return np.array([reach.step(action)[1] for action in actions])

    first = rewards(tasks)
    assert first.shape == (500, 3) and 0 <= first.min() and first.max() <= 10
    np.testing.assert_array_equal(rewards(tasks), first)
    assert (rewards(tasks[::-1].copy())[:, 0] != first[:, 0]).any()


def test_an_episode_succeeds_if_any_of_its_steps_does():
    """metaworld's own scripted policy reaches the goal; the flag is of the moment, so the trial must collect it."""
    trial = trial_of(PointMass(1), make_agent(S=1, A=1))
    rewards, success = trmrl.episode_returns(trial, 20)
    for task in range(3):
        for episode in range(2):
            assert success[task, episode] == any(reward > -0.1 for reward in rewards[task, episode])
    assert success.any() and not trial.success.all()


def test_ml45_covers_all_environments_before_any_twice():
    env = object.__new__(trmrl.MetaWorld)  # without its processes
    env.names, env.held_out = trmrl.ENVS["ML45-Train"].args[0], False
    assert len(set(env.names)) == 45
    rng = np.random.default_rng(0)
    names = [env.task_names(env.sample_tasks("train", 25, rng)) for _ in range(20)]
    assert all(len(set(batch)) == 25 for batch in names) and len(set(np.concatenate(names))) == 45
    test = env.sample_tasks("test", 45, rng)
    assert set(env.task_names(test)) == set(env.names) and (test % 100 < 50).all()


def test_a_killed_worker_ends_the_run_and_leaves_nothing(tmp_path, monkeypatch, capsys):
    """One line that names the environment and the tasks, exit code 1, the checkpoint intact, no process left."""
    started = []

    class Watched(trmrl.MetaWorld):
        def __init__(self, seed):
            super().__init__(["reach-v3"], seed, held_out=True)
            started.extend(self.workers)

        def step(self, actions):
            self.steps = getattr(self, "steps", 0) + 1
            if self.steps == 1500:  # 500 a training trial, 500 the evaluation after the first: within iteration 2
                self.workers[0].kill()
            return super().step(actions)

    monkeypatch.setitem(trmrl.ENVS, "Watched", Watched)
    flags = ["--env", "Watched", *TINY, "--episodes-per-trial", "1", "--total-timesteps", "3000"]
    assert trmrl.main([*flags, "--runs-dir", str(tmp_path)]) == 1
    line = capsys.readouterr().err.splitlines()[-1]
    assert "iteration 2" in line and "reach-v3" in line
    (folder,) = tmp_path.iterdir()
    assert torch.load(folder / "checkpoint.pt", weights_only=True)["iteration"] == 0
    gc.collect()
    for worker in started:
        worker.join(timeout=30)
        assert not worker.is_alive()


# --- the agent -------------------------------------------------------------------------------------------------------


def literal_algorithm_1(agent, transitions, horizon, t):
    """Algorithm 1 as printed, for one task: which transitions D holds at step t, PADs included (None)."""
    N = agent.memory_length
    buffer = [None] * (N - 1)
    start = min(t // horizon * horizon, len(transitions) - 1 - horizon)
    for past in range(start, t):
        buffer = buffer + [transitions[past]]
    recent = buffer[len(buffer) - (N - 1) :]
    return recent + [transitions[t]]


@pytest.mark.parametrize("memory_length", [1, 4, 30])
def test_windows_and_forward_follow_algorithm_1(memory_length):
    """Values and log-probabilities of a collected trial, against Alg. 1 written out one step and one task at a time."""
    env = PointMass(1)
    agent = make_agent(S=1, A=1, memory_length=memory_length)
    trial = trial_of(env, agent)
    for task in range(3):
        for t in range(len(trial.transitions)):
            D = literal_algorithm_1(agent, trial.transitions[:, task], env.horizon, t)
            windows, filled = trial.windows(torch.tensor([t]), torch.tensor([task]), memory_length)
            assert filled[0].tolist() == [slot is not None for slot in D]
            for slot, expected in enumerate(D):
                if expected is not None:
                    assert torch.equal(windows[0, slot], expected)
            # With the PADs cut off instead of masked, and positions from the back, the network must say the same.
            window = torch.stack([slot for slot in D if slot is not None])
            normalised = agent.normalise(window)
            normalised[-1, 1:] = 0  # (s_next, a_PAD, r_PAD, η_PAD)
            memories = agent.phi(normalised) + agent.positions[-len(window) :]
            for layer in agent.layers:
                memories = slow_layer(layer, memories)
            value = agent.value(memories[-1]) * agent.return_deviation + agent.return_mean
            assert value.item() == pytest.approx(trial.values[t, task].item(), abs=1e-5)
            if t < len(trial.rewards):
                policy = torch.distributions.Normal(agent.policy(memories[-1]), agent.log_std.exp())
                action = trial.transitions[t, task, 1:2]
                assert policy.log_prob(action).sum().item() == pytest.approx(trial.log_probs[t, task].item(), abs=1e-5)


def slow_layer(layer, memories):
    """One transformer layer, written out position by position and head by head (Eq. 1, Eq. 4)."""
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


@pytest.mark.parametrize("keep", [True, False])
def test_memory_skips_what_follows_a_death_and_crosses_episodes_only_if_kept(keep):
    """Windows of every step that counts, against a list that each task's transitions are appended to as they happen."""
    agent = make_agent(S=1, A=1, keep_memory=keep, memory_length=6)
    trial = trial_of(Mortal(1), agent, tasks=6, episodes=3)
    assert not trial.valid.all()
    crossed = 0
    for task in range(6):
        memory = []
        for t in range(60):
            if t % 20 == 0 and not keep:
                memory = []
            if not trial.valid[t, task]:
                continue
            expected = [past for past, _ in memory[-5:]] + [trial.transitions[t, task]]
            crossed += any(episode < t // 20 for _, episode in memory[-5:])
            windows, filled = trial.windows(torch.tensor([t]), torch.tensor([task]), 6, keep)
            assert filled[0].tolist() == [False] * (6 - len(expected)) + [True] * len(expected)
            assert torch.equal(windows[0, -len(expected) :], torch.stack(expected))
            with torch.no_grad():
                assert agent(trial, torch.tensor([t]), torch.tensor([task]))[1].item() == pytest.approx(
                    trial.values[t, task].item(), abs=1e-5)
            memory.append((trial.transitions[t, task], t // 20))
    assert bool(crossed) == keep


def test_the_grus_training_pass_is_its_acting_and_torchs_own_gru():
    """RL²: log-probabilities of whole trials at once equal those of acting, and torch.nn.GRU on what was not cut off."""
    torch.manual_seed(0)
    agent = trmrl.RL2(1, 1, 8, 0.5, 10.0)
    reference = torch.nn.GRU(8, 8)
    reference.load_state_dict({f"{name}_l0": tensor for name, tensor in agent.gru.state_dict().items()})
    trial = trial_of(Mortal(1), agent, tasks=6)
    assert not trial.valid.all()
    t, task = trial.valid.nonzero(as_tuple=True)
    policy, values = agent(trial, t, task)
    log_probs = policy.log_prob(trial.transitions[t, task, 1:2]).sum(1)
    torch.testing.assert_close(log_probs, trial.log_probs[t, task], rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(values, trial.values[t, task], rtol=1e-4, atol=1e-5)
    for one in range(6):
        steps = trial.valid[:, one].nonzero()[:, 0]
        seen = agent.phi(agent.normalise(trial.transitions[steps, one]))
        for number, step in enumerate(steps):
            current = agent.normalise(trial.transitions[step, one])
            current[1:] = 0  # (s, PAD, PAD, PAD)
            memory = reference(torch.cat([seen[:number], agent.phi(current)[None]]))[0][-1]
            assert agent.value(memory).item() == pytest.approx(trial.values[step, one].item(), abs=1e-5)

    # Back-propagation reaches through the whole trial: the first transition still counts in the second episode.
    trial.transitions.requires_grad_()
    last = int(steps[-1])
    agent(trial, torch.arange(last + 1), torch.full((last + 1,), 5))[1][-1].backward()
    assert trial.transitions.grad[0, 5].abs().sum() > 0 and trial.transitions.grad[:, :5].abs().sum() == 0


@pytest.mark.parametrize("whole_trials", [True, False])
def test_minibatches_hold_every_step_that_counts_once(whole_trials):
    trial = trial_of(Mortal(1), make_agent(S=1, A=1), tasks=6)
    batches = list(trmrl.minibatches(trial, 2, 3, whole_trials, np.random.default_rng(0)))
    assert len(batches) == 6 and batches[0][0].tolist() != batches[3][0].tolist()  # the second epoch is drawn anew
    batches = batches[3:]
    pairs = [(int(t), int(task)) for batch in batches for t, task in zip(*batch)]
    assert sorted(pairs) == sorted((t, task) for t in range(40) for task in range(6) if trial.valid[t, task])
    tasks = [set(task.tolist()) for _, task in batches]
    if whole_trials:
        assert [len(some) for some in tasks] == [2, 2, 2] and len(set.union(*tasks)) == 6
    else:
        assert max(len(t) for t, _ in batches) - min(len(t) for t, _ in batches) <= 1
        assert all(len(some) > 2 for some in tasks)


def test_storage_does_not_grow_with_the_memory_length():
    def stored(memory_length):
        trial = trial_of(PointMass(1), make_agent(S=1, A=1, memory_length=memory_length))
        return sum(tensor.nbytes for tensor in vars(trial).values())

    assert stored(5) == stored(50)


def test_pad_slots_and_the_future_are_never_attended_to():
    """Changing a PAD slot, or the action, reward and η of the current step, changes nothing; any filled slot does."""
    agent = make_agent(memory_length=5)
    windows = torch.randn(1, 5, 7)
    filled = torch.tensor([[False, False, True, True, True]])
    reference = agent.refine(windows, filled)[-1]
    for slot in range(5):
        for features, matters in ((slice(0, 3), slot >= 2), (slice(3, 7), slot in (2, 3))):
            changed = windows.clone()
            changed[0, slot, features] += 1
            same = torch.equal(agent.refine(changed, filled)[-1], reference)
            assert same != matters, (slot, features)


@pytest.mark.parametrize("t_fixup", [True, False])
def test_each_position_sees_only_its_past(t_fixup):
    agent = make_agent(memory_length=6, t_fixup=t_fixup)
    layer = agent.layers[0]
    memories, weights = torch.randn(1, 6, 8, requires_grad=True), torch.randn(8)
    mask = agent.causal[None, None]
    for t in range(6):
        (gradient,) = torch.autograd.grad(layer(memories, memories, mask)[0, t] @ weights, memories)
        touched = gradient[0].abs().sum(1) > 0
        assert touched.tolist() == [past <= t for past in range(6)]


def test_the_layer_norm_arm_is_torchs_transformer_encoder():
    """--no-t-fixup gives what torch.nn.TransformerEncoder gives with the same weights, PADs and all."""
    agent = make_agent(memory_length=6, layers=3, d_model=16, heads=4, t_fixup=False)
    layer = torch.nn.TransformerEncoderLayer(16, 4, 64, dropout=0.0, activation="relu", batch_first=True)
    encoder = torch.nn.TransformerEncoder(layer, 3)
    names = {"output": "self_attn.out_proj", "feed_forward_in": "linear1", "feed_forward_out": "linear2",
             "attention_norm": "norm1", "feed_forward_norm": "norm2"}
    with torch.no_grad():
        for ours, theirs in zip(agent.layers, encoder.layers):
            for kind in ("weight", "bias"):
                packed = torch.cat([getattr(getattr(ours, part), kind) for part in ("query", "key", "value")])
                getattr(theirs.self_attn, f"in_proj_{kind}").copy_(packed)
                for name, other in names.items():
                    parameter = getattr(getattr(ours, name), kind)
                    parameter.add_(0.1 * torch.randn_like(parameter))  # biases and norms that do something
                    theirs.get_submodule(other).get_parameter(kind).copy_(parameter)
    encoder.eval()
    windows, filled = torch.randn(10, 6, 7), torch.arange(6) >= torch.arange(10)[:, None] % 6
    with torch.no_grad():
        memories = agent.working_memories(windows) + agent.positions
        attends = filled[:, None, :] | torch.eye(6, dtype=torch.bool)
        forbidden = ~(agent.causal & attends).repeat_interleave(4, 0)
        expected = encoder(memories, mask=forbidden)[:, -1]
        torch.testing.assert_close(agent.refine(windows, filled)[-1], expected)


def test_initial_scales():
    """The standard deviation of every matrix, with and without T-Fixup (Sec. 3.3)."""
    d, L = 64, 4
    for t_fixup in (True, False):
        agent = make_agent(S=17, A=6, layers=L, heads=4, d_model=d, t_fixup=t_fixup)
        xavier, xavier_ffn = (2 / (d + d)) ** 0.5, (2 / (d + 4 * d)) ** 0.5
        scale = 0.67 * L**-0.25 if t_fixup else 1.0
        expected = {"query": xavier, "key": xavier, "value": scale * xavier, "output": scale * xavier,
                    "feed_forward_in": scale * xavier_ffn, "feed_forward_out": scale * xavier_ffn}
        for layer in agent.layers:
            for name, std in expected.items():
                assert getattr(layer, name).weight.std().item() == pytest.approx(std, rel=0.05), name
                assert not getattr(layer, name).bias.any()
            assert isinstance(layer.attention_norm, torch.nn.Identity if t_fixup else torch.nn.LayerNorm)
            assert isinstance(layer.feed_forward_norm, torch.nn.Identity if t_fixup else torch.nn.LayerNorm)
        if t_fixup:
            assert agent.phi.weight.std().item() == pytest.approx(d**-0.5 * (9 * L) ** -0.25, rel=0.05)


def test_positions_are_vaswanis():
    positions = trmrl.sinusoidal_positions(7, 6)
    for pos in range(7):
        for i in range(3):
            angle = pos / 10_000 ** (2 * i / 6)
            assert positions[pos, 2 * i].item() == pytest.approx(math.sin(angle), abs=1e-6)
            assert positions[pos, 2 * i + 1].item() == pytest.approx(math.cos(angle), abs=1e-6)


def test_running_statistics_are_those_of_all_data():
    agent = make_agent()
    data = torch.randn(1000, 7) * torch.arange(1, 8) + 5
    for chunk in data.split([10, 500, 1, 489]):
        agent.update_statistics(chunk)
    torch.testing.assert_close(agent.mean, data.double().mean(0))
    torch.testing.assert_close(agent.variance, data.double().var(0, correction=0))
    deviations = torch.tensor([[-100.0, -3.1, -2.9, 0.0, 1.0, 2.9, 3.1]])
    limited = agent.normalise((agent.mean + deviations * agent.variance.sqrt()).float())
    torch.testing.assert_close(limited, torch.tensor([[-3.0, -3.0, -2.9, 0.0, 1.0, 2.9, 3.0]]), rtol=1e-3, atol=1e-3)


# --- trials and PPO --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("env", [PointMass(1), Mortal(1)], ids=["", "early termination"])
def test_advantages_are_the_double_sum_over_the_concatenated_trial(env):
    """A_t = Σ_k (γλ)^k δ_(t+k) over the valid steps of all episodes, the others passing without reward or advantage."""
    gamma, lam = 0.9, 0.8
    agent = make_agent(S=1, A=1)
    agent.log_std.data.fill_(math.log(0.6))
    trial = trial_of(env, agent, tasks=6, episodes=3)
    advantages, returns = trmrl.advantages_and_returns(trial, gamma, lam)
    endings = set()
    for task in range(6):
        steps = trial.valid[:, task].nonzero()[:, 0].tolist()
        r = [trial.rewards[t, task].item() for t in steps]
        truncated = steps[-1] == 59
        endings.add(truncated)
        bootstrap = trial.values[60, task].item() if truncated else 0.0
        v = [trial.values[t, task].item() for t in steps] + [bootstrap]
        when = steps + [60]
        delta = [r[k] + gamma ** (when[k + 1] - when[k]) * v[k + 1] - v[k] for k in range(len(r))]
        for i, t in enumerate(steps):
            direct = sum((gamma * lam) ** (when[k] - t) * delta[k] for k in range(i, len(r)))
            assert advantages[t, task].item() == pytest.approx(direct, abs=1e-4)
            assert returns[t, task].item() == pytest.approx(direct + v[i], abs=1e-4)
        assert not advantages[~trial.valid[:, task], task].any()
    if isinstance(env, Mortal):
        assert not trial.valid.all() and endings == {True, False}
    # With λ = 1 it is the discounted return of the whole trial, which has no reward after a termination.
    _, returns = trmrl.advantages_and_returns(trial, gamma, 1.0)
    for task in range(6):
        whole = gamma**60 * trial.values[60, task] + sum(gamma**t * trial.rewards[t, task] for t in range(60))
        assert returns[0, task].item() == pytest.approx(whole.item(), abs=1e-3)


def test_steps_after_an_early_termination_neither_train_nor_count(tmp_path):
    """The NaN that Mortal returns when dead reaches no return, no statistic and no gradient."""
    env, agent = Mortal(1), make_agent(S=1, A=1)
    trial = trial_of(env, agent, tasks=6)
    assert not trial.valid.all()
    rewards, _ = trmrl.episode_returns(trial, env.horizon)
    for task in range(6):
        direct = [trial.rewards[t, task].item() for t in range(40) if trial.valid[t, task]]
        assert rewards[task].sum() == pytest.approx(sum(direct), rel=1e-5)
    args = trmrl.Args(minibatch_size=16)
    optimizer = torch.optim.Adam(agent.parameters(), lr=1e-3)
    statistics = trmrl.ppo_update(agent, optimizer, trial, args, np.random.default_rng(0))
    assert all(math.isfinite(value) for value in statistics.values())
    assert all(parameter.isfinite().all() for parameter in agent.parameters())
    folder = run(tmp_path, "--env", "Mortal", *TINY, "--total-timesteps", "200")
    counted = [int(row["env_steps"]) for row in progress(folder)]
    assert all(later - earlier < 80 for earlier, later in zip([0] + counted, counted))


def test_the_update_is_ppos(monkeypatch):
    """One step on one minibatch, against the clipped objective written out sample by sample."""
    env, agent, copy = PointMass(1), make_agent(S=1, A=1), make_agent(S=1, A=1)
    trial = trial_of(env, agent)
    with torch.no_grad():
        for ours, theirs in zip(agent.parameters(), copy.parameters()):  # so that some ratios are clipped
            ours.add_(0.2 * torch.randn_like(ours))
            theirs.copy_(ours)
    args = trmrl.Args(minibatch_size=1000, update_epochs=1, max_grad_norm=0.7, target_kl=None)
    statistics = trmrl.ppo_update(agent, torch.optim.SGD(agent.parameters(), lr=0.1), trial, args,
                                  np.random.default_rng(0))
    advantages, returns = trmrl.advantages_and_returns(trial, args.gamma, args.gae_lambda)
    copy.rescale_value(returns.mean(), returns.std(correction=0) + 1e-4)
    mean, std = advantages.mean(), advantages.std(correction=0)
    policy_loss = value_loss = clipped = 0.0
    for t in range(40):
        for task in range(3):
            policy, value = copy(trial, torch.tensor([t]), torch.tensor([task]))
            ratio = (policy.log_prob(trial.transitions[t, task, 1:2]).sum() - trial.log_probs[t, task]).exp()
            advantage = (advantages[t, task] - mean) / std
            policy_loss -= min(ratio * advantage, max(min(ratio, 1.2), 0.8) * advantage) / 120
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


def test_rescaling_the_value_head_changes_no_prediction():
    agent = make_agent(S=1, A=1)
    trial = trial_of(PointMass(1), agent)
    at = torch.arange(30), torch.arange(30) % 3
    before = agent(trial, *at)[1]
    for returns in (torch.randn(100) * 30 - 200, torch.full((100,), 5.0), torch.randn(100) * 3):
        agent.rescale_value(returns.mean(), returns.std(correction=0) + 1e-4)
        torch.testing.assert_close(agent(trial, *at)[1], before, rtol=1e-3, atol=1e-3)
    assert agent.return_mean.item() == pytest.approx(np.mean(returns.numpy()), abs=1e-5)
    assert agent.return_deviation.item() == pytest.approx(np.std(returns.numpy()), rel=1e-3)


def test_a_high_kl_ends_the_update():
    def update(target_kl):
        """The steps that it made, and the mean KL divergence of its minibatches."""
        agent = make_agent(S=1, A=1)
        trial = trial_of(PointMass(1), agent)
        optimizer = torch.optim.Adam(agent.parameters(), lr=1e-2)
        args = trmrl.Args(minibatch_size=60, update_epochs=5, target_kl=target_kl)
        statistics = trmrl.ppo_update(agent, optimizer, trial, args, np.random.default_rng(0))
        return optimizer.state[agent.log_std]["step"].item(), statistics["approx_kl"]

    assert update(None)[0] == update(1e9)[0] == 10
    assert update(1e-9)[0] == 1  # what has not moved has no divergence
    steps, mean = update(0.01)
    assert 1 < steps < 10 and mean > 0.01
    assert update(1.01 * mean)[0] > steps


# --- meta-test -------------------------------------------------------------------------------------------------------


def test_meta_test_files(tmp_path):
    """Shapes and meaning of what a run writes; the weights are frozen; no new random numbers the second time."""
    folder = run(tmp_path, "--env", "PointMass", *TINY, "--total-timesteps", "200", "--test-episodes", "6")
    checkpoint = (folder / "checkpoint.pt").read_bytes()
    files = {path.name: dict(np.load(path)) for path in folder.glob("*.npz")}
    assert set(files) == {"meta_test.npz", "ood.npz", "refinement.npz", "working_memories.npz", "attention.npz"}
    for name, low, high in (("meta_test.npz", -1, 1), ("ood.npz", 1, 1.5)):
        data = files[name]
        assert data["rewards"].shape == (3, 6, 20) and data["success"].shape == (3, 6) and data["tasks"].shape == (3, 1)
        assert low <= data["tasks"].min() and data["tasks"].max() <= high
        assert (data["rewards"] <= 0).all()
        # Here an episode succeeded if the reward, minus the distance, ever exceeded -0.1.
        np.testing.assert_array_equal(data["success"], (data["rewards"] > -0.1).any(2))
    assert files["refinement.npz"]["representation_error"].shape == (3,)
    assert files["refinement.npz"]["regression_mse"].shape == (3,)
    assert files["working_memories.npz"]["embedding"].shape == (5 * 4, 8)
    assert files["working_memories.npz"]["task"].shape == (5 * 4,)

    last = progress(folder)[-1]
    assert float(last["test_return"]) < 0 and 0 <= float(last["test_success"]) <= 1
    assert trmrl.main(["--test", str(folder)]) == 0
    assert (folder / "checkpoint.pt").read_bytes() == checkpoint
    for name, data in files.items():
        again = np.load(folder / name)
        for key in data:
            np.testing.assert_array_equal(data[key], again[key])


def test_refinement_against_scalar_loops(tmp_path):
    """Fig. 7: cosines summed one by one; the regression through the normal equations."""
    env, agent = PointMass(1), make_agent(S=1, A=1, layers=3)
    agent.policy.weight.data.normal_()
    args = trmrl.Args(test_tasks=4, test_episodes=4)
    trmrl.analyse_memories(agent, env, args, tmp_path)
    data = np.load(tmp_path / "refinement.npz")
    rng = trmrl.random_stream(args.seed, "refinement")
    trial = trmrl.collect_trial(agent, env, env.sample_tasks("test", 6, rng), 2, rng, explore=False)
    with torch.no_grad():
        steps = [(t, task) for task in range(6) for t in range(40)]
        layers = [[], [], [], []]
        for t, task in steps:
            at = torch.tensor([t]), torch.tensor([task])
            for layer, memory in zip(layers, agent.episodic_memories(trial, *at)):
                layer.append(memory[0].double().numpy())
    actions = np.array([trial.transitions[t, task, 1].item() for t, task in steps])
    train = np.array([task < 4 for _, task in steps])
    for layer in range(4):
        errors = [1 - a @ b / np.linalg.norm(a) / np.linalg.norm(b) for a, b in zip(layers[layer], layers[3])]
        assert data["representation_error"][layer] == pytest.approx(np.mean(errors), abs=1e-5)
        X = np.c_[np.array(layers[layer]), np.ones(len(steps))]
        weights = np.linalg.pinv(X[train]) @ actions[train]
        mse = np.mean((X[~train] @ weights - actions[~train]) ** 2)
        assert data["regression_mse"][layer] == pytest.approx(mse, rel=1e-2, abs=1e-9)
    attention = np.load(tmp_path / "attention.npz")["weights"]
    assert attention.shape == (3, 4) and attention.sum(1) == pytest.approx(np.ones(3), rel=1e-5)
    first = agent.layers[0]
    expected = np.zeros(4)
    with torch.no_grad():
        for t, task in steps:
            windows, filled = trial.windows(torch.tensor([t]), torch.tensor([task]), 4)
            memories = (agent.working_memories(windows) + agent.positions)[0]
            for head in (slice(0, 4), slice(4, 8)):
                scores = first.key(memories)[:, head] @ first.query(memories[-1])[head] / 2
                weights = (scores.exp() * filled[0]).numpy()
                expected += weights / weights.sum() / 2 / len(steps)
    assert attention[0] == pytest.approx(expected, abs=1e-5)
    assert data["representation_error"][3] == pytest.approx(0, abs=1e-6)
    assert data["regression_mse"][3] < 1e-9 < data["regression_mse"][0]


def test_learns_a_toy_task_distribution(tmp_path):
    """Within a minute the point mass reaches unseen hidden velocities, which it can only infer from its rewards."""
    started = time.monotonic()
    folder = run(tmp_path, "--env", "PointMass", "--d-model", "16", "--layers", "2", "--heads", "2", "--num-tasks", "40",
                 "--total-timesteps", "80000", "--learning-rate", "2e-3", "--gamma", "0.9", "--update-epochs", "3")
    returns = [float(row["test_return"]) for row in progress(folder) if row["test_return"]]
    data = np.load(folder / "meta_test.npz")
    # The best policy that ignores the rewards stays at 0: E|v*| = 0.5 a step.
    assert returns[0] < -8 and returns[-1] > -4
    assert data["success"].mean() > 0.9
    print(f"{returns[0]:.1f} -> {returns[-1]:.1f} in {time.monotonic() - started:.0f} s")


# --- runs ------------------------------------------------------------------------------------------------------------


def test_a_run_folder_holds_what_others_rely_on(tmp_path, capsys):
    folder = run(tmp_path, "--env", "PointMass", *TINY, "--total-timesteps", "400", "--eval-interval", "2")
    args = json.loads((folder / "args.json").read_text())
    assert args["env"] == "PointMass" and args["layers"] == 2 and args["gamma"] == trmrl.Args.gamma
    assert set(args["versions"]) == {"torch", "mujoco", "gymnasium", "metaworld", "numpy"}
    rows = progress(folder)
    assert list(rows[0]) == (
        "iteration env_steps wall_seconds train_return train_success test_return test_success ood_return steps_per_second"
        " rollout_seconds update_seconds policy_loss value_loss entropy approx_kl clip_fraction explained_variance"
        " learning_rate").split()
    assert [row["env_steps"] for row in rows] == ["80", "160", "240", "320", "400"]
    assert [bool(row["test_return"]) for row in rows] == [True, False, True, False, True]
    assert float(rows[0]["learning_rate"]) == trmrl.Args.learning_rate
    assert float(rows[-1]["learning_rate"]) == pytest.approx(trmrl.Args.learning_rate * 0.2)
    board = EventAccumulator(str(folder)).Reload()
    for name in ("train_return", "test_return", "approx_kl"):
        expected = [float(row[name]) for row in rows if row[name]]
        assert [event.value for event in board.Scalars(name)] == pytest.approx(expected, rel=1e-5)
    checkpoint = torch.load(folder / "checkpoint.pt", weights_only=True)
    assert checkpoint["iteration"] == 5 and checkpoint["env_steps"] == 400
    assert not list(folder.glob("*.tmp"))
    output = capsys.readouterr().out
    assert "test return" in output and "ood success" in output and str(folder) in output


FOUR = ["--env", "PointMass", *TINY, "--total-timesteps", "320", "--eval-interval", "2"]


def without_times(folder: Path) -> list[dict]:
    return [{name: value for name, value in row.items() if name not in TIMES} for row in progress(folder)]


def checkpoint_state(folder: Path) -> list[torch.Tensor]:
    checkpoint = torch.load(folder / "checkpoint.pt", weights_only=True)
    moments = [entry[name] for entry in checkpoint["optimizer"]["state"].values() for name in ("exp_avg", "exp_avg_sq")]
    return [*checkpoint["agent"].values(), *moments]


def assert_same_run(one: Path, other: Path):
    assert without_times(one) == without_times(other) != []
    for a, b in zip(checkpoint_state(one), checkpoint_state(other), strict=True):
        assert torch.equal(a, b)


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_interrupt_and_resume_is_bit_for_bit_the_unbroken_run(tmp_path, monkeypatch, capsys, number):
    straight = run(tmp_path / "straight", *FOUR)

    class Interrupted(PointMass):
        resets = 0

        def reset(self, tasks, rng):
            self.resets += 1
            if self.resets == 4:  # an evaluation's after iteration 1, so within iteration 2
                signal.raise_signal(number)
            return super().reset(tasks, rng)

    monkeypatch.setitem(trmrl.ENVS, "PointMass", Interrupted)
    handler = signal.getsignal(number)
    assert trmrl.main([*FOUR, "--runs-dir", str(tmp_path / "broken")]) == 130
    assert signal.getsignal(number) == handler
    (broken,) = (tmp_path / "broken").iterdir()
    assert f"python trmrl.py --resume {broken}" in capsys.readouterr().out
    assert [row["iteration"] for row in progress(broken)] == ["1", "2"]

    monkeypatch.setitem(trmrl.ENVS, "PointMass", PointMass)
    with open(broken / "progress.csv", "a") as file:  # a row from after the checkpoint, as a crash leaves it
        file.write("3,240," + "0," * 15 + "0\n")
    assert trmrl.main(["--resume", str(broken)]) == 0
    assert_same_run(straight, broken)


def test_same_seed_same_run_other_seed_other_run(tmp_path):
    runs = [run(tmp_path / str(i), *FOUR, "--seed", seed) for i, seed in enumerate("112")]
    assert_same_run(runs[0], runs[1])
    assert without_times(runs[0]) != without_times(runs[2])


def test_the_command_line_on_the_real_environment(tmp_path):
    """Train on HalfCheetahVel, stop by SIGTERM, resume to the end, test again: as a user does it."""
    def command(*flags):
        return [sys.executable, str(HERE / "trmrl.py"), *flags]

    flags = ["--env", "HalfCheetahVel", *TINY, "--layers", "4", "--total-timesteps", "3200", "--runs-dir", "runs"]
    process = subprocess.Popen(command(*flags), cwd=tmp_path, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    errors = ""
    while "train=" not in errors:  # the progress bar's first word on an iteration
        character = process.stderr.read(1)
        assert character, errors
        errors += character
    process.send_signal(signal.SIGTERM)
    output, rest = process.communicate(timeout=120)
    assert process.returncode == 130 and "--resume runs/HalfCheetahVel-s1-" in output and "Traceback" not in errors + rest
    (folder,) = tmp_path.glob("runs/*")
    for flag in ("--resume", "--test"):
        finished = subprocess.run(command(flag, str(folder)), cwd=tmp_path, capture_output=True, text=True, timeout=300)
        assert finished.returncode == 0, finished.stderr
        assert "test return" in finished.stdout and "ood return" in finished.stdout
    assert progress(folder)[-1]["env_steps"] == "3200"
    assert np.load(folder / "ood.npz")["rewards"].shape == (3, 2, 200)


def test_every_environment_trains_resumes_and_meta_tests(tmp_path, monkeypatch):
    """A few seconds of each through the command line; ML45-Train with three of its environments."""
    handful = ["door-open-v3", "reach-wall-v3", "drawer-close-v3"]
    monkeypatch.setitem(trmrl.ENVS, "ML45-Train", partial(trmrl.MetaWorld, handful, held_out=False))
    for env in ("AntDir", "AntDir57", "ML1-Reach", "ML1-Push", "ML45-Train"):
        horizon = 500 if env.startswith("ML") else 200
        folder = run(tmp_path, "--env", env, *TINY, "--episodes-per-trial", "1",
                     "--test-episodes", "1", "--total-timesteps", "300")
        iterations = len(progress(folder))
        assert trmrl.main(["--resume", str(folder), "--total-timesteps", str(horizon * 4)]) == 0
        rows = progress(folder)
        assert len(rows) > iterations
        meta_test = np.load(folder / "meta_test.npz")
        assert meta_test["rewards"].shape == (3, 1, horizon) and meta_test["success"].shape == (3, 1)
        assert not (folder / "ood.npz").exists()
        assert all(row["ood_return"] == "" for row in rows)
        assert bool(rows[-1]["test_success"]) == bool(rows[-1]["train_success"]) == env.startswith("ML")
        if env == "ML45-Train":
            assert set(meta_test["task_names"]) == set(handful)


# --- several processes -----------------------------------------------------------------------------------------------

# What each of torchrun's processes runs: main on the command line's flags, with the toy environment. Each keeps its
# parameters in the file parameters<rank>.pt; with "die" in the environment process 1 is killed in its third iteration.
TORCHRUN_MAIN = """
import os, signal, sys
import torch
import test_trmrl
import trmrl

class Dies(test_trmrl.PointMass):
    resets = 0
    def reset(self, tasks, rng):
        self.resets += 1
        if os.environ["RANK"] == "1" and self.resets == 5:
            os.kill(os.getpid(), signal.SIGKILL)
        return super().reset(tasks, rng)

def keep(agent, *rest):
    result = train(agent, *rest)
    torch.save(agent.state_dict(), f"parameters{os.environ['RANK']}.pt")
    return result

trmrl.ENVS["PointMass"] = Dies if "die" in os.environ else test_trmrl.PointMass
train, trmrl.train = trmrl.train, keep
sys.exit(trmrl.main())
"""

# One update on every second of the tasks of a trial; process 0 keeps what came of it.
TORCHRUN_UPDATE = """
import sys
import torch
import test_trmrl
import trmrl

args = trmrl.Args(num_tasks=6, **test_trmrl.ONE_UPDATE)
trmrl.join_processes(args)
process, processes = trmrl.process_number()
agent, statistics = test_trmrl.updated(args, share=slice(process, None, processes))
if process == 0:
    torch.save((agent.state_dict(), statistics), "update.pt")
"""
ONE_UPDATE = dict(minibatch_size=1000, update_epochs=3, target_kl=None)


def updated(args: trmrl.Args, share: slice) -> tuple[trmrl.TrMRL, dict]:
    """An agent after one update on some tasks of a trial that ends early at times, and the update's statistics."""
    agent = make_agent(S=1, A=1)
    whole = trial_of(Mortal(1), agent, tasks=6)
    trial = trmrl.Trial(**{name: tensor[:, share] for name, tensor in vars(whole).items()})
    optimizer = torch.optim.SGD(agent.parameters(), lr=0.5)  # Adam would blow rounding up where a gradient is 0
    statistics = trmrl.ppo_update(agent, optimizer, trial, args, np.random.default_rng(0))
    agent.update_statistics(trial.transitions[:-1][trial.valid])
    return agent, statistics


def torchrun(folder: Path, code: str, *flags, processes: int = 2, **environment) -> int:
    (folder / "script.py").write_text(code)
    launcher = [sys.executable, "-m", "torch.distributed.run", "--standalone"]
    launcher += ["--nproc-per-node", str(processes), "script.py"]
    environment = os.environ | {"PYTHONPATH": str(HERE), "OMP_NUM_THREADS": "1"} | environment
    ended = subprocess.run([*launcher, *flags], cwd=folder, env=environment, capture_output=True, text=True)
    print(ended.stderr)  # shown if the test fails
    return ended.returncode


def test_two_processes_make_the_update_of_one(tmp_path):
    assert torchrun(tmp_path, TORCHRUN_UPDATE) == 0
    parameters, statistics = torch.load(tmp_path / "update.pt")
    agent, expected = updated(trmrl.Args(num_tasks=6, **ONE_UPDATE), share=slice(None))
    for name, tensor in agent.state_dict().items():
        torch.testing.assert_close(parameters[name], tensor, rtol=1e-4, atol=1e-5)
    assert statistics == pytest.approx(expected, rel=1e-3, abs=1e-5)
    assert expected["approx_kl"] > 1e-4  # later epochs start from what the first has made


def test_processes_stay_alike_and_another_number_resumes(tmp_path):
    flags = ["--env", "PointMass", *TINY, "--total-timesteps", "240", "--runs-dir", "runs"]
    assert torchrun(tmp_path, TORCHRUN_MAIN, *flags) == 0
    first, second = (torch.load(tmp_path / f"parameters{rank}.pt") for rank in (0, 1))
    assert all(torch.equal(first[name], second[name]) for name in first)
    (folder,) = (tmp_path / "runs").iterdir()
    assert [row["env_steps"] for row in progress(folder)] == ["80", "160", "240"]
    assert trmrl.main(["--resume", str(folder), "--total-timesteps", "400"]) == 0
    assert [row["env_steps"] for row in progress(folder)] == ["80", "160", "240", "320", "400"]
    assert torchrun(tmp_path, TORCHRUN_MAIN, "--env", "PointMass", "--num-tasks", "3") != 0  # 3 tasks in 2 processes


def test_one_process_is_as_without_torchrun(tmp_path):
    flags = ["--env", "PointMass", *TINY, "--total-timesteps", "160"]
    assert torchrun(tmp_path, TORCHRUN_MAIN, *flags, "--runs-dir", "runs", processes=1) == 0
    (folder,) = (tmp_path / "runs").iterdir()
    assert_same_run(folder, run(tmp_path / "alone", *flags))


def test_a_process_that_is_killed_ends_all(tmp_path):
    flags = ["--env", "PointMass", *TINY, "--total-timesteps", "8000", "--runs-dir", "runs"]
    assert torchrun(tmp_path, TORCHRUN_MAIN, *flags, die="yes") != 0
    (folder,) = (tmp_path / "runs").iterdir()
    assert len(progress(folder)) == 2
    assert trmrl.main(["--resume", str(folder), "--total-timesteps", "160"]) == 0


# --- mistakes --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("flags, named", [
    (["--env", "HalfCheetahVel2"], ["--env", "HalfCheetahVel"]),
    (["--heads", "3", "--d-model", "8"], ["--heads 3", "--d-model 8"]),
    (["--layers", "0"], ["--layers 0"]),
    (["--gamma", "1.5"], ["--gamma 1.5", "0 to 1"]),
    (["--learning-rate", "nan"], ["--learning-rate nan"]),
    (["--seed", "-1"], ["--seed -1"]),
    (["--input-limit", "0"], ["--input-limit 0"]),
    (["--target-kl", "0"], ["--target-kl 0"]),
    (["--memory", "gru", "--keep-memory"], ["--keep-memory", "--memory transformer"]),
    (["--device", "abacus"], ["--device abacus"]),
    (["--runs-dir", "/dev/null"], ["--runs-dir /dev/null"]),
    (["--resume", "nowhere"], ["--resume nowhere"]),
    (["--test", "nowhere"], ["--test nowhere"]),
    (["--test", "nowhere", "--resume", "nowhere"], ["--test", "--resume"]),
])
def test_a_mistake_ends_with_one_line_and_code_2(tmp_path, monkeypatch, capsys, flags, named):
    monkeypatch.chdir(tmp_path)
    assert trmrl.main(flags) == 2
    (line,) = capsys.readouterr().err.splitlines()
    for part in named:
        assert part in line
    assert not list(tmp_path.rglob("*"))


def test_flags_go_before_an_environments_defaults():
    ant = trmrl.parse(["--env", "AntDir", "--memory=gru"])
    assert (ant.init_std, ant.update_epochs, ant.minibatch_size, ant.total_timesteps) == (0.5, 6, 2000, 2_000_000)
    ant = trmrl.parse(["--env", "AntDir", "--init-std", "0.7", "--memory", "gru", "--minibatch-size", "400"])
    assert (ant.init_std, ant.update_epochs, ant.minibatch_size) == (0.7, 6, 400)
    assert trmrl.parse([]) == trmrl.Args()


def test_a_flag_that_does_not_exist_or_parse_ends_with_code_2(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    for flags in (["--layer", "4"], ["--layers", "many"]):
        with pytest.raises(SystemExit) as exit:
            trmrl.main(flags)
        assert exit.value.code == 2
        assert flags[0] in capsys.readouterr().err


@pytest.mark.parametrize("damage", ["other shape", "other flag", "no checkpoint", "half a checkpoint", "no args",
                                    "broken args", "no progress"])
@pytest.mark.parametrize("flag", ["--resume", "--test"])
def test_a_damaged_run_is_left_as_it_is(tmp_path, capsys, damage, flag):
    folder = run(tmp_path, "--env", "PointMass", *TINY, "--total-timesteps", "80")
    extra = []
    if damage == "other shape":
        args = json.loads((folder / "args.json").read_text())
        (folder / "args.json").write_text(json.dumps(args | {"d_model": 16}))
    if damage == "other flag":
        extra = ["--layers", "3"]
    if damage == "no checkpoint":
        (folder / "checkpoint.pt").unlink()
    if damage == "half a checkpoint":
        content = (folder / "checkpoint.pt").read_bytes()
        (folder / "checkpoint.pt").write_bytes(content[: len(content) // 2])
    if damage == "no args":
        (folder / "args.json").unlink()
    if damage == "broken args":
        (folder / "args.json").write_text("{")
    if damage == "no progress":
        (folder / "progress.csv").unlink()
    before = {path: path.read_bytes() for path in folder.iterdir()}
    capsys.readouterr()
    code = trmrl.main([flag, str(folder), *extra])
    if damage == "no progress" and flag == "--test":
        assert code == 0  # a meta-test needs none
        return
    assert code == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert str(folder) in line
    assert {path: path.read_bytes() for path in folder.iterdir()} == before


class Explodes(PointMass):
    """A simulator that returns a NaN in its third iteration (its fifth reset counts the evaluation's)."""

    resets = 0

    def reset(self, tasks, rng):
        self.resets += 1
        return super().reset(tasks, rng)

    def step(self, actions):
        observations, rewards, terminated, success = super().step(actions)
        return observations, np.full_like(rewards, np.nan) if self.resets > 5 else rewards, terminated, success


def test_a_nan_ends_the_run_and_keeps_the_last_good_checkpoint(tmp_path, monkeypatch, capsys):
    monkeypatch.setitem(trmrl.ENVS, "Explodes", Explodes)
    monkeypatch.setattr(trmrl, "CHECKPOINT_SECONDS", 0)
    flags = ["--env", "Explodes", *TINY, "--total-timesteps", "400", "--runs-dir", str(tmp_path)]
    assert trmrl.main(flags) == 1
    assert "iteration 3" in capsys.readouterr().err
    (folder,) = tmp_path.iterdir()
    checkpoint = torch.load(folder / "checkpoint.pt", weights_only=True)
    assert checkpoint["iteration"] == 2 and all(tensor.isfinite().all() for tensor in checkpoint["agent"].values())


def test_a_diverged_simulation_is_seen():
    """MuJoCo itself would quietly start a body anew; the trial must end instead."""
    env = trmrl.HalfCheetahVel(1)

    class Kick:
        def __getattr__(self, name):
            return getattr(env, name)

        def step(self, actions):
            env.qvel[0][:] = 1e8
            return env.step(actions)

    with pytest.raises(trmrl.RunFailed):
        trial_of(Kick(), make_agent(S=17, A=6), tasks=2)


def test_a_loss_that_is_not_finite_is_never_stepped_on(tmp_path):
    env, agent = PointMass(1), make_agent(S=1, A=1)
    trial = trial_of(env, agent)
    trial.rewards[7, 1] = math.inf
    before = [parameter.clone() for parameter in agent.parameters()]
    optimizer = torch.optim.Adam(agent.parameters())
    with pytest.raises(trmrl.RunFailed):
        trmrl.ppo_update(agent, optimizer, trial, trmrl.Args(), np.random.default_rng(0))
    for parameter, old in zip(agent.parameters(), before):
        assert torch.equal(parameter, old)

# --- figures ---------------------------------------------------------------------------------------------------------


def fake_run(folder: Path, env="HalfCheetahVel", seed=1, ood=True, success=False, steps=10, **flags) -> Path:
    """A run's files with random but known contents."""
    folder.mkdir(parents=True)
    rng = np.random.default_rng(seed)
    values = {"env": env, "seed": seed, "layers": 4, "heads": 4, "t_fixup": True, "memory": "transformer",
              "runs_dir": str(folder.parent)}
    (folder / "args.json").write_text(json.dumps(values | flags | {"versions": {"torch": str(seed)}}))
    with open(folder / "progress.csv", "w", newline="") as file:
        writer = csv.DictWriter(file, trmrl.COLUMNS)
        writer.writeheader()
        for iteration in range(1, steps + 1):
            row = {"iteration": iteration, "env_steps": 100 * iteration, "wall_seconds": 2.0 * iteration,
                   "train_return": rng.normal()}
            if iteration % 3 == 1 or iteration == steps:
                row["test_return"] = rng.normal()
                row |= {"ood_return": rng.normal()} if ood else {}
                row |= {"test_success": rng.uniform()} if success else {}
            writer.writerow(row)
    tasks, H = rng.uniform(0, 3, (20, 1)), 30
    meta_test = {"rewards": rng.normal(size=(20, 6, H)), "success": np.zeros((20, 6)), "tasks": tasks}
    velocities = {"velocities": rng.normal(size=(20, 6, H))} if env == "HalfCheetahVel" else {}
    trmrl.write_npz(folder / "meta_test.npz", **meta_test, **velocities)
    if ood:
        trmrl.write_npz(folder / "ood.npz", **meta_test | {"rewards": rng.normal(size=(20, 6, H))})
    trmrl.write_npz(folder / "refinement.npz", representation_error=rng.uniform(size=5), regression_mse=rng.uniform(size=5))
    trmrl.write_npz(folder / "working_memories.npz", embedding=rng.normal(size=(90, 8)), task=rng.uniform(0, 3, 90))
    trmrl.write_npz(folder / "attention.npz", weights=rng.dirichlet(np.ones(5), 4))
    return folder


def drawn(draw, folders):
    """The axes of a figure of these folders, colour bars left aside, and what it said of runs that it could not use."""
    runs, problems = [plot.load_run(folder) for folder in folders], []
    plot.name_settings(runs)
    figure, _ = draw(runs, plot.Palette([run.label for run in runs]), problems)
    return [axes for axes in figure.axes if axes.get_label() != "<colorbar>"], problems


def line_data(axes) -> dict[str, np.ndarray]:
    return {line.get_label(): np.array(line.get_data()) for line in axes.get_lines()}


def band(axes, number=0) -> np.ndarray:
    """The lower and upper edge of a shaded band at each x, as (2, n)."""
    vertices = axes.collections[number].get_paths()[0].vertices
    edges = {x: vertices[vertices[:, 0] == x, 1] for x in vertices[:, 0]}
    return np.array([[edges[x].min(), edges[x].max()] for x in sorted(edges)]).T


@pytest.fixture
def seeds(tmp_path):
    return [fake_run(tmp_path / f"seed{seed}", seed=seed) for seed in (1, 2, 3)]


def test_every_figure_is_drawn(tmp_path, capsys):
    folders = [fake_run(tmp_path / f"{layers}-{seed}", seed=seed, layers=layers) for layers in (2, 4) for seed in (1, 2)]
    folders.append(fake_run(tmp_path / "reach", env="ML1-Reach", ood=False, success=True))
    out = tmp_path / "figures"
    assert plot.main([*map(str, folders), "--out", str(out), "--pdf"]) == 0
    names = {"meta_training", "adaptation", "ood", "refinement", "working_memories", "online_adaptation", "attention",
             "ablation_layers"}
    assert {path.name for path in out.iterdir()} == {f"{name}.{kind}" for name in names for kind in ("png", "pdf")} | {
        "summary.md"}
    for name in names:
        assert (out / f"{name}.png").read_bytes().startswith(b"\x89PNG")
        assert (out / f"{name}.pdf").read_bytes().startswith(b"%PDF")
    lines = capsys.readouterr().out.splitlines()
    assert {line.split(":")[0] for line in lines} == names | {"summary"}
    assert "reach" in lines[0] and "2-1" in lines[0]


def test_the_interval_is_the_bootstraps():
    values = np.random.default_rng(1).normal(size=(5, 2))
    rng = np.random.default_rng(2)
    means = [[np.mean([values[rng.integers(5), column] for _ in range(5)]) for column in range(2)] for _ in range(4000)]
    low, high = plot.bootstrap_interval(values)
    assert low == pytest.approx(np.percentile(means, 2.5, axis=0), abs=0.06)
    assert high == pytest.approx(np.percentile(means, 97.5, axis=0), abs=0.06)


def test_meta_training_shows_the_mean_of_the_evaluations(seeds):
    (axes,), _ = drawn(plot.draw_meta_training, seeds)
    tables = [progress(folder) for folder in seeds]
    measured = [[float(row["test_return"]) for row in rows if row["test_return"]] for rows in tables]
    ((label, (x, y)),) = line_data(axes).items()
    assert label == "TrMRL (3 seeds)"
    assert x == pytest.approx(np.array([100, 400, 700, 1000]) / 1e6)
    assert y == pytest.approx(np.mean(measured, axis=0))
    low, high = plot.bootstrap_interval(np.array(measured))
    np.testing.assert_allclose(band(axes), [low, high])
    assert "return" in axes.get_ylabel() and "steps" in axes.get_xlabel()

    (single,), _ = drawn(plot.draw_meta_training, seeds[:1])
    assert list(line_data(single)) == ["TrMRL (1 seed)"] and not single.collections


def test_meta_world_is_judged_by_success(tmp_path):
    folder = fake_run(tmp_path / "reach", env="ML1-Reach", ood=False, success=True)
    (axes,), _ = drawn(plot.draw_meta_training, [folder])
    expected = [float(row["test_success"]) for row in progress(folder) if row["test_success"]]
    assert line_data(axes)["TrMRL (1 seed)"][1] == pytest.approx(expected) and "success" in axes.get_ylabel()


@pytest.mark.parametrize("name", ["meta_test.npz", "ood.npz"])
def test_adaptation_shows_returns_over_episodes(seeds, name):
    (axes,), _ = drawn(plot.draw_episodes(name), seeds)
    returns = [[np.load(folder / name)["rewards"][:, episode].sum() / 20 for episode in range(6)] for folder in seeds]
    x, y = line_data(axes)["TrMRL (3 seeds)"]
    assert x.tolist() == [1, 2, 3, 4, 5, 6]
    assert y == pytest.approx(np.mean(returns, axis=0))
    np.testing.assert_allclose(band(axes), plot.bootstrap_interval(np.array(returns)))


def test_refinement_latents_and_attention_show_the_files(seeds):
    axes, _ = drawn(plot.draw_refinement, seeds)
    for panel, quantity in zip(axes, ("representation_error", "regression_mse")):
        expected = np.mean([np.load(folder / "refinement.npz")[quantity] for folder in seeds], axis=0)
        x, y = line_data(panel)["TrMRL (3 seeds)"]
        assert x.tolist() == [0, 1, 2, 3, 4] and y == pytest.approx(expected)

    (axes,), _ = drawn(plot.draw_working_memories, seeds)
    data = np.load(seeds[0] / "working_memories.npz")
    (dots,) = axes.collections
    points = np.array(dots._offsets3d).T
    values, vectors = np.linalg.eigh(np.cov(data["embedding"].T))  # principal components by another way
    expected = (data["embedding"] - data["embedding"].mean(0)) @ vectors[:, ::-1][:, :3]
    np.testing.assert_allclose(np.abs(points), np.abs(expected), atol=1e-9)
    np.testing.assert_array_equal(dots.get_array(), data["task"])
    assert any("m/s" in bar.get_ylabel() for bar in axes.figure.axes)

    (axes,), _ = drawn(plot.draw_attention, seeds)
    np.testing.assert_array_equal(axes.images[0].get_array(), np.load(seeds[0] / "attention.npz")["weights"])


def test_online_adaptation_shows_rewards_and_velocities(seeds):
    (rewards, velocities), _ = drawn(plot.draw_online_adaptation, seeds)
    first = np.concatenate([np.load(folder / "meta_test.npz")["rewards"][:, 0] for folder in seeds])
    assert line_data(rewards)["TrMRL (60 tasks)"][1] == pytest.approx(first.mean(0))
    np.testing.assert_allclose(band(rewards), plot.bootstrap_interval(first))
    data = np.load(seeds[0] / "meta_test.npz")
    lines = {label: y for label, (_, y) in line_data(velocities).items() if label.startswith("target")}
    assert len(lines) == 4
    for task in (data["tasks"].argmin(), data["tasks"].argmax()):
        assert lines[f"target {data['tasks'][task, 0]:.2f} m/s"] == pytest.approx(data["velocities"][task, 0])


def test_ablations_are_runs_that_differ_in_one_flag(tmp_path):
    """A curve per value; runs that differ in two flags, or in their environment, are no ablation of each other."""
    folders = {
        "base": fake_run(tmp_path / "base"),
        "base2": fake_run(tmp_path / "base2", seed=2),
        "deep": fake_run(tmp_path / "deep", layers=8),
        "norm": fake_run(tmp_path / "norm", t_fixup=False),
        "both": fake_run(tmp_path / "both", layers=12, heads=8),
        "ant": fake_run(tmp_path / "ant", env="AntDir", layers=2, ood=False),
    }
    runs = [plot.load_run(folder) for folder in folders.values()]
    found = plot.ablations(runs)
    names = {flag: [{run.folder.name for run in members} for members in groups] for flag, groups in found.items()}
    assert names == {"layers": [{"base", "base2", "deep"}], "t_fixup": [{"base", "base2", "norm"}]}
    plot.name_settings(runs)
    palette = plot.Palette([run.label for run in runs])
    figure, _ = plot.draw_ablation("layers", found["layers"])(runs, palette, [])
    (axes,) = figure.axes
    assert list(line_data(axes)) == ["layers 4 (2 seeds)", "layers 8 (1 seed)"]
    deep = [float(row["test_return"]) for row in progress(folders["deep"]) if row["test_return"]]
    assert line_data(axes)["layers 8 (1 seed)"][1] == pytest.approx(deep)


def test_a_label_has_one_colour_in_all_figures(seeds, tmp_path):
    folders = [*seeds, fake_run(tmp_path / "deep", layers=8)]
    colours = [{line.get_label().split(" (")[0]: line.get_color() for line in drawn(draw, folders)[0][0].get_lines()}
               for draw in (plot.draw_meta_training, plot.draw_episodes("meta_test.npz"), plot.draw_refinement)]
    assert colours[0] == colours[1] == colours[2] and len(set(colours[0].values())) == 2


def test_methods_have_their_names(tmp_path):
    runs = [plot.load_run(fake_run(tmp_path / "a", memory="transformer", layers=2)),
            plot.load_run(fake_run(tmp_path / "b", memory="transformer", layers=4)),
            plot.load_run(fake_run(tmp_path / "c", memory="gru", layers=4, minibatch_size=7))]
    plot.name_settings(runs)
    assert [run.label for run in runs] == ["TrMRL, layers 2", "TrMRL, layers 4", "RL²"]


def test_summary_holds_final_results(seeds):
    runs = [plot.load_run(folder) for folder in seeds]
    plot.name_settings(runs)
    header, _, row = plot.summary_table(runs).splitlines()
    cells = dict(zip((cell.strip() for cell in header.split("|")), (cell.strip() for cell in row.split("|"))))
    finals = [float(progress(folder)[-1]["test_return"]) for folder in seeds]
    low, high = plot.bootstrap_interval(np.array(finals))
    assert cells["test return"] == f"{np.mean(finals):.1f} [{low:.1f}, {high:.1f}]"
    assert cells["environment"] == "HalfCheetahVel" and cells["seeds"] == "3" and cells["steps"] == "1,000"
    assert cells["test success"] == "" and cells["steps/s"].startswith("50 [")


@pytest.mark.parametrize("damage, lost", [
    ("no run", []), ("no rows", []), ("half a row", []), ("no meta_test.npz", ["adaptation", "online_adaptation"]),
    ("half a refinement.npz", ["refinement"]),
])
@pytest.mark.parametrize("alone", [True, False])
def test_what_is_damaged_is_left_out_and_the_rest_is_drawn(tmp_path, capsys, damage, lost, alone):
    bad = fake_run(tmp_path / "bad", seed=9)
    others = [] if alone else [fake_run(tmp_path / "good")]
    if damage == "no run":
        (bad / "args.json").unlink()
    elif damage == "no rows":
        (bad / "progress.csv").write_text("iteration,env_steps\n")
    elif damage == "half a row":
        text = (bad / "progress.csv").read_text()
        (bad / "progress.csv").write_text(text[: len(text) - 60])
    elif damage == "no meta_test.npz":
        (bad / "meta_test.npz").unlink()
    else:
        content = (bad / "refinement.npz").read_bytes()
        (bad / "refinement.npz").write_bytes(content[: len(content) // 2])
    out = tmp_path / "figures"
    code = plot.main([str(folder) for folder in (bad, *others)] + ["--out", str(out)])
    said = capsys.readouterr()
    assert "bad" in said.err and "Traceback" not in said.err
    if alone and not lost:
        assert code == 2 and not out.exists()
        return
    assert code == 1
    for name in ("meta_training", "adaptation", "ood", "refinement", "working_memories", "online_adaptation"):
        assert (out / f"{name}.png").exists() == (name not in lost or not alone), name
        assert (f"{name}: left out" in said.out) == (name in lost and alone)


def test_no_runs_at_all(tmp_path, capsys):
    assert plot.main([str(tmp_path / "nothing"), "--out", str(tmp_path / "figures")]) == 2
    assert plot.main(["--out", str(tmp_path / "figures")]) == 2
    assert "error" in capsys.readouterr().err and not (tmp_path / "figures").exists()
    good = fake_run(tmp_path / "good")
    assert plot.main([str(good), "--out", str(good / "args.json")]) == 2
    assert "--out" in capsys.readouterr().err and json.loads((good / "args.json").read_text())


def test_plot_needs_neither_torch_nor_trmrl():
    code = "import plot, sys; assert not {'torch', 'trmrl', 'gymnasium'} & set(sys.modules)"
    subprocess.run([sys.executable, "-c", code], cwd=HERE, check=True)


def test_figures_of_real_runs(tmp_path, capsys):
    """From the command line to the pictures: short runs that differ in one flag, and one of RL²."""
    flags = ["--env", "PointMass", *TINY, "--total-timesteps", "160", "--init-std", "0.5", "--input-limit", "3",
             "--update-epochs", "3", "--learning-rate", "5e-4"]
    rl2 = run(tmp_path / "runs", *flags, "--memory", "gru", "--layers", "1")
    assert plot.main([str(rl2), "--out", str(tmp_path / "rl2")]) == 0
    assert "attention: left out" in capsys.readouterr().out
    folders = [rl2, *(run(tmp_path / "runs", *flags, "--layers", layers) for layers in ("1", "2"))]
    assert plot.main([*map(str, folders), "--out", str(tmp_path / "figures")]) == 0
    assert {path.stem for path in (tmp_path / "figures").glob("*.png")} == {
        "meta_training", "adaptation", "ood", "refinement", "working_memories", "online_adaptation", "attention",
        "ablation_layers", "ablation_memory"}


# --- benchmarks ------------------------------------------------------------------------------------------------------


def seconds(work, times: int = 3) -> float:
    """The fastest of a few calls."""
    durations = []
    for _ in range(times):
        started = time.perf_counter()
        work()
        durations.append(time.perf_counter() - started)
    return min(durations)


def default_run(**flags):
    """HalfCheetahVel at the defaults but for some flags: environment, arguments, agent, optimizer and a trial.

    Without the KL limit, so that an epoch is a whole one.
    """
    args = trmrl.Args(target_kl=None, **flags)
    env = trmrl.HalfCheetahVel(1)
    agent = trmrl.make_agent(env, args)
    optimizer = torch.optim.Adam(agent.parameters(), lr=args.learning_rate, fused=True)
    return env, args, agent, optimizer, trial_of(env, agent, args.num_tasks, args.episodes_per_trial)


@pytest.mark.benchmark
def test_batched_stepping_beats_gymnasiums_vector_env():
    """20 half cheetahs, the same actions, this file's batch against SyncVectorEnv."""
    actions = np.random.default_rng(0).uniform(-1, 1, (400, 20, 6))
    env = trmrl.HalfCheetahVel(1)
    reference = gymnasium.make_vec("HalfCheetah-v5", 20, vectorization_mode="sync")
    env.reset(np.zeros((20, 1)), np.random.default_rng(0))
    reference.reset(seed=0)
    ratio = seconds(lambda: [reference.step(action) for action in actions]) / seconds(
        lambda: [env.step(action) for action in actions])
    print(f"\nbatched stepping: {ratio:.2f} times as fast as gymnasium's SyncVectorEnv")
    assert ratio >= 1.5


@pytest.mark.benchmark
def test_sampling_against_bare_physics():
    """A trial of 20 tasks (physics, reward, acting, storing) against nothing but mj_step, on one core."""
    env, args, agent, _, _ = default_run()
    datas = [mujoco.MjData(env.model) for _ in range(20)]
    ctrl = [data.ctrl for data in datas]
    actions = np.random.default_rng(0).uniform(-1, 1, (400, 20, 6))

    def bare():
        for action in actions:
            for i, data in enumerate(datas):
                ctrl[i][:] = action[i]
                mujoco.mj_step(env.model, data, nstep=env.frame_skip)

    ratio = seconds(lambda: trial_of(env, agent, 20, 2)) / seconds(bare)
    print(f"\nsampling: {ratio:.2f} times bare mj_step")


def update_flops(agent: trmrl.TrMRL, steps: int) -> float:
    """6 × parameters × tokens that must be computed: of the last layer only keys and values for all N positions."""
    layer = sum(parameter.numel() for parameter in agent.layers[0].parameters())
    keys_and_values = sum(parameter.numel() for name in ("key", "value")
                          for parameter in getattr(agent.layers[0], name).parameters())
    phi = sum(parameter.numel() for parameter in agent.phi.parameters())
    N, L = agent.memory_length, len(agent.layers)
    return 6 * steps * (N * (phi + (L - 1) * layer + keys_and_values) + layer - keys_and_values)


@pytest.mark.benchmark
@pytest.mark.parametrize("d_model, heads", [(32, 4), (128, 4), (128, 16)])
def test_update_against_large_matrix_products(d_model, heads):
    """One epoch over 8 000 steps; the fastest of a few square fp32 products is the machine."""
    for threads in (1, 2):
        torch.set_num_threads(threads)
        peak = 0.0
        for n in (512, 1024, 2048):
            a, b = torch.randn(n, n), torch.randn(n, n)
            peak = max(peak, 2 * n**3 / seconds(lambda: a @ b, 5))
        _, args, agent, optimizer, trial = default_run(d_model=d_model, heads=heads, update_epochs=1)
        duration = seconds(lambda: trmrl.ppo_update(agent, optimizer, trial, args, np.random.default_rng(0)))
        share = update_flops(agent, 8000) / duration / peak
        print(f"\nupdate, d {d_model}, {heads} heads, {threads} threads: {share:.0%} of a large matrix product's speed")
    torch.set_num_threads(1)


@pytest.mark.benchmark
@pytest.mark.parametrize("d_model, minibatch_size", [(32, 200), (128, 200), (128, 400)])
def test_two_processes_against_one(tmp_path, d_model, minibatch_size):
    """Steps a second of torchrun's two processes with one thread each, in minibatches of some steps in all, against one
    process with one thread, in minibatches of 200."""

    def seconds_per_iteration(processes: int, minibatch_size: int) -> dict[str, float]:
        folder = tmp_path / str(processes)
        folder.mkdir()
        flags = ["--d-model", d_model, "--minibatch-size", minibatch_size, "--update-epochs", 1, "--target-kl", None,
                 "--total-timesteps", 32_000, "--eval-interval", 100, "--test-tasks", 1, "--test-episodes", 1]
        assert torchrun(folder, "import sys, trmrl; sys.exit(trmrl.main())", *map(str, flags), processes=processes) == 0
        rows = progress(next(folder.glob("runs/*")))
        return {name: min(float(row[f"{name}_seconds"]) for row in rows) for name in ("rollout", "update")}

    one, two = seconds_per_iteration(1, 200), seconds_per_iteration(2, minibatch_size)
    print(f"\ntwo processes, d {d_model}, {minibatch_size // 2} steps a minibatch and process: "
          + ", ".join(f"{name} {one[name] / two[name]:.2f} times as fast as one process" for name in one))


@pytest.mark.benchmark
def test_memory_against_the_transitions_alone():
    """The trial buffer's bytes a step, whatever N: the transitions, and the little that is kept beside them."""
    for memory_length in (5, 50):
        trial = default_run(memory_length=memory_length)[-1]
        ratio = sum(tensor.nbytes for tensor in vars(trial).values()) / trial.transitions.nbytes
        print(f"\ntrial buffer at N = {memory_length}: {ratio:.2f} times the transitions")


@pytest.mark.benchmark
@pytest.mark.parametrize("flag, values", [("memory_length", (1, 5, 10, 25, 50)), ("layers", (1, 2, 4, 8, 12))])
def test_growth_of_an_iteration(flag, values):
    durations = []
    for value in values:
        env, args, agent, optimizer, trial = default_run(**{flag: value}, update_epochs=1)

        def iteration():
            trial_of(env, agent, 20, 2)
            trmrl.ppo_update(agent, optimizer, trial, args, np.random.default_rng(0))

        durations.append(seconds(iteration, 2))
    ratios = [duration / durations[0] for duration in durations]
    print(f"\nseconds an iteration against {flag} {values[0]}: "
          + ", ".join(f"{value}: {ratio:.2f}" for value, ratio in zip(values, ratios)))
    for (low, fast), (high, slow) in zip(zip(values, durations), list(zip(values, durations))[1:]):
        assert slow / fast <= high / low


@pytest.mark.benchmark
def test_evaluations_share_of_training():
    env, args, agent, optimizer, trial = default_run()
    evaluation = seconds(lambda: trmrl.evaluate(agent, env, args))
    sampling = seconds(lambda: trial_of(env, agent, 20, 2))
    epoch = seconds(lambda: trmrl.ppo_update(agent, optimizer, trial, dataclasses.replace(args, update_epochs=1),
                                             np.random.default_rng(0)))
    share = evaluation / (evaluation + args.eval_interval * (sampling + epoch))
    print(f"\nevaluation: {share:.1%} of the time, if the KL limit leaves one epoch an iteration")
    assert share <= 0.05
