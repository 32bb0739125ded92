"""TrMRL in one file: "Transformers are Meta-Reinforcement Learners" (Melo, ICML 2022).

At each step the agent embeds its last N transitions (s, a, r, η) as working memories, a causal transformer refines them
layer by layer into an episodic memory, and the last one conditions a Gaussian policy. PPO trains it on trials: E episodes
of one task, concatenated. At meta-test the weights are frozen; adapting is attention alone.

    python trmrl.py --env HalfCheetahVel --layers 4     train, meta-test, write runs/<name>/
    python trmrl.py --resume runs/<name>                go on from the last checkpoint
    python trmrl.py --test runs/<name>                  the meta-tests alone

Paper                                      Here
App. B     tasks and environments          HalfCheetahVel, ENVS
Sec. 4.1   working memory φ, e⁰            Agent.working_memories
Eq. 1      multi-head self-attention       TransformerLayer
Sec. 3.3   T-Fixup                         t_fixup_
Eq. 6      episodic memories e¹ … e^L      TrMRL.refine
Sec. 5     the closest baseline, RL²       RL2
Sec. 5.1   memory write logic              Trial.windows
Alg. 1     acting                          collect_trial
Sec. 5.1   PPO on E concatenated episodes  advantages_and_returns, ppo_update
Sec. 5.2   meta-test, OOD, Figs. 5, 6, 9   meta_test
Fig. 7, 8  refinement, latents             analyse_memories
"""

import argparse
import collections
import contextlib
import copy
import csv
import dataclasses
import json
import math
import multiprocessing
import os
import pickle
import signal
import sys
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from functools import partial
from importlib.metadata import version
from pathlib import Path
from typing import Literal

import gymnasium
import metaworld
import mujoco
import numpy as np
import torch
import torch.nn.functional as F
import tyro
from torch import distributed, nn
from torch.distributions import Normal
from torch.utils.tensorboard import SummaryWriter
from tqdm import tqdm

CHECKPOINT_SECONDS = 120  # what a crash can cost
VERSIONED = ("torch", "mujoco", "gymnasium", "metaworld", "numpy")


class UserError(Exception):
    """A mistake in what the user asked for: one line, exit code 2."""


class RunFailed(Exception):
    """A NaN in the simulator or the loss, or a simulator that died: the run cannot go on, exit code 1."""


# --- Arguments -------------------------------------------------------------------------------------------------------


@dataclass
class Args:
    """TrMRL: train on a distribution of tasks, then meta-test with frozen weights."""

    env: str = "HalfCheetahVel"
    """the task distribution (App. B), a name in ENVS"""
    seed: int = 1
    """everything random follows from it: tasks, weights, exploration"""
    num_tasks: int = 20
    """tasks a batch; each contributes one trial an iteration (Sec. 5.1)"""
    episodes_per_trial: int = 2
    """E, the episodes of one task that are concatenated to a trial (Sec. 5.1)"""
    memory: Literal["transformer", "gru"] = "transformer"
    """what the memories go through: TrMRL's transformer, or the GRU of its closest baseline, RL² (Duan et al. 2016)"""
    keep_memory: bool = False
    """the transformer's working memory survives an episode's end within a trial, as the GRU's state always does"""
    memory_length: int = 5
    """N, the working memories that the transformer sees, the current one included (Sec. 4.1)"""
    layers: int = 4
    """L, the transformer layers, each refining the episodic memory once (Eq. 6)"""
    heads: int = 4
    """ω, the attention heads (Eq. 1); must divide d_model"""
    d_model: int = 32
    """d, the size of a memory; the feed-forward block is four times as wide"""
    t_fixup: bool = True
    """T-Fixup initialisation without LayerNorm (Sec. 3.3); otherwise Xavier and LayerNorm, the arm of Fig. 10"""
    init_std: float = 0.3
    """initial standard deviation of the Gaussian policy; it is learned"""
    input_limit: float = 3.0
    """inputs, normalised by their running mean and deviation, are kept within ± this many deviations"""
    total_timesteps: int = 4_000_000
    """environment steps of training"""
    learning_rate: float = 5e-4
    """of Adam"""
    anneal_lr: bool = True
    """lower the learning rate linearly, to 0 at the end"""
    gamma: float = 0.95
    """discount factor"""
    gae_lambda: float = 0.9
    """λ of generalised advantage estimation"""
    clip_coef: float = 0.2
    """PPO's clipping range of the probability ratio"""
    update_epochs: int = 3
    """passes over an iteration's trials, at most"""
    minibatch_size: int = 200
    """steps a gradient, drawn from all tasks; for the GRU whole trials, at least one"""
    target_kl: float | None = 0.04
    """an iteration's updates end once their minibatches' mean KL divergence from the old policy exceeds it"""
    max_grad_norm: float = 0.5
    """gradients are clipped to this norm"""
    eval_interval: int = 10
    """iterations between two evaluations on test and OOD tasks, one episode each"""
    test_tasks: int = 20
    """tasks of a meta-test (Sec. 5.2); the refinement analysis takes half as many again"""
    test_episodes: int = 6
    """episodes a task in the meta-test (Fig. 5); the refinement analysis takes half of them"""
    runs_dir: Path = Path("runs")
    """where the run's folder is made"""
    device: str = "cuda" if torch.cuda.is_available() else "cpu"
    """where the network is trained, as torch names it; it acts on the CPU, where small batches are quick"""
    resume: Path | None = None
    """a run's folder: go on from its checkpoint; flags given beside it replace the run's own"""
    test: Path | None = None
    """a run's folder: only repeat the meta-tests of its checkpoint"""


# Per environment, and for the GRU, what differs from the above, which was chosen on HalfCheetahVel. MetaWorld's deviation
# is the authors'. The GRU's minibatches are whole trials: larger ones cost hardly more, and each may take a larger step;
# with its inputs within ±3 it hardly learned.
ANT = dict(total_timesteps=2_000_000)
META_WORLD = dict(init_std=1.0, total_timesteps=2_000_000)
DEFAULTS: dict[str, dict] = {
    "AntDir": ANT,
    "AntDir57": ANT,
    "ML1-Reach": META_WORLD,
    "ML1-Push": META_WORLD,
    "ML45-Train": META_WORLD | dict(num_tasks=25, test_tasks=45, eval_interval=20),  # a test task of each environment
    "gru": dict(init_std=0.5, input_limit=10.0, update_epochs=6, minibatch_size=2000, learning_rate=1e-3),
}


def check(args: Args) -> None:
    """Raises UserError, naming the flag, for values that no run can use."""
    for name in ("num_tasks", "episodes_per_trial", "memory_length", "layers", "heads", "d_model", "total_timesteps",
                 "update_epochs", "minibatch_size", "eval_interval", "test_tasks", "test_episodes"):
        if getattr(args, name) < 1:
            raise UserError(f"--{name.replace('_', '-')} {getattr(args, name)}: takes a whole number from 1")
    for name in ("init_std", "input_limit", "learning_rate", "clip_coef", "max_grad_norm"):
        if not 0 < getattr(args, name) < math.inf:
            raise UserError(f"--{name.replace('_', '-')} {getattr(args, name)}: takes a positive number")
    for name in ("gamma", "gae_lambda"):
        if not 0 <= getattr(args, name) <= 1:
            raise UserError(f"--{name.replace('_', '-')} {getattr(args, name)}: takes a number from 0 to 1")
    if args.seed < 0:
        raise UserError(f"--seed {args.seed}: takes a whole number from 0")
    if args.env not in ENVS:
        raise UserError(f"--env {args.env}: takes one of {', '.join(ENVS)}")
    if args.d_model % args.heads:
        raise UserError(f"--heads {args.heads}: takes a divisor of --d-model {args.d_model}")
    if args.keep_memory and args.memory == "gru":
        raise UserError("--keep-memory: takes --memory transformer; a GRU's state always survives the episode's end")
    if args.target_kl is not None and not args.target_kl > 0:
        raise UserError(f"--target-kl {args.target_kl}: takes a positive number or None")
    try:
        torch.zeros(1, device=args.device)
    except (RuntimeError, AssertionError):
        raise UserError(f"--device {args.device}: takes a device that torch finds here, such as cpu") from None


def random_stream(seed: int, purpose: str, iteration: int = 0, process: int = 0) -> np.random.Generator:
    """Random numbers that depend on nothing but the arguments, so that a resumed run draws what an unbroken one would."""
    purposes = ("train tasks", "train", "test tasks", "ood tasks", "evaluation", "meta-test", "refinement")
    return np.random.default_rng([seed, purposes.index(purpose), iteration, process])


# --- Processes: alone, or one of several that torchrun has started ---------------------------------------------------


def join_processes(args: Args) -> None:
    """Under torchrun, makes the functions below speak for all processes. Raises UserError if the tasks do not divide."""
    if "TORCHELASTIC_RUN_ID" not in os.environ:
        return
    processes = int(os.environ["WORLD_SIZE"])
    if args.num_tasks % processes:
        raise UserError(f"--num-tasks {args.num_tasks}: takes a multiple of the {processes} processes")
    if args.device.startswith("cuda"):
        torch.cuda.set_device(int(os.environ["LOCAL_RANK"]))
    distributed.init_process_group("nccl" if args.device.startswith("cuda") else "gloo")


def process_number() -> tuple[int, int]:
    """This process's number, 0 leading, and how many there are."""
    if not distributed.is_initialized():
        return 0, 1
    return distributed.get_rank(), distributed.get_world_size()


def cores() -> int:
    """The machine's cores, shared among torchrun's processes on it."""
    return max(1, os.cpu_count() // int(os.environ.get("LOCAL_WORLD_SIZE", 1)))


def summed(x: torch.Tensor) -> torch.Tensor:
    """x, replaced by its sum over all processes. Raises RunFailed if one of them is gone."""
    if distributed.is_initialized():
        try:
            distributed.all_reduce(x)
        except RuntimeError as error:
            raise RunFailed("another process of torchrun's has ended") from error
    return x


def moments(x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Length, mean and variance along the first axis of all processes' x together."""
    count = summed(torch.tensor(float(len(x)), device=x.device))
    mean = summed(x.sum(0)) / count
    return count, mean, summed((x - mean).square().sum(0)) / count


# ---------------------------------------------------------------------------------------------------------------------
# Tasks and environments (Sec. 5.1, App. B)
#
# An environment is made with the run's seed and steps a batch of n independent copies, each under its own task. It has
#   horizon, num_observations, num_actions                      H, S, A
#   splits, has_success                                         what sample_tasks takes; whether success means anything
#   sample_tasks(split, n, rng) -> tasks (n, k)
#   reset(tasks, rng) -> observations (n, S)                    starts an episode of each task
#   step(actions (n, A)) -> observations (n, S), rewards (n,), terminated (n,), success (n,)
#   task_names(tasks) -> names (n,)                             only if tasks have names
#   velocity_observation                                        only if Fig. 9 shall show it: its index, in m/s
# Actions lie in [-1, 1].
# ---------------------------------------------------------------------------------------------------------------------


class MujocoBody:
    """Copies of a gymnasium MuJoCo environment's body that share one model, with an MjData each.

    Physics and resets are bit-exact with gymnasium's environment, in less than two thirds of its vector environments'
    time: nothing but the simulator runs per copy, observations and rewards are computed for all copies at once.
    """

    gym_id: str
    gym_options: dict = {}
    horizon = 200
    has_success = False
    threads = 1  # that step the copies

    def __init__(self, seed: int):
        env = gymnasium.make(self.gym_id, **self.gym_options).unwrapped
        self.model, self.frame_skip, self.dt = env.model, env.frame_skip, env.dt
        self.reset_noise = env._reset_noise_scale
        self.init_qpos, self.init_qvel = env.init_qpos, env.init_qvel
        self.num_actions = self.model.nu
        # A simulation that diverged must be seen as one; by default MuJoCo quietly starts it anew.
        self.model.opt.disableflags |= mujoco.mjtDisableBit.mjDSBL_AUTORESET
        self.datas = []
        self.qpos, self.qvel, self.ctrl = [], [], []  # views into the datas: making one costs as much as a short step
        self.map = map if self.threads == 1 else ThreadPoolExecutor(self.threads).map

    def reset_bodies(self, n: int, rng: np.random.Generator) -> None:
        """Puts the first n copies into random initial states, as gymnasium's reset_model does."""
        while len(self.datas) < n:
            data = mujoco.MjData(self.model)
            self.datas.append(data)
            self.qpos.append(data.qpos)
            self.qvel.append(data.qvel)
            self.ctrl.append(data.ctrl)
        for i in range(n):
            mujoco.mj_resetData(self.model, self.datas[i])
            noise = rng.uniform(-self.reset_noise, self.reset_noise, self.model.nq)
            self.qpos[i][:] = self.init_qpos + noise
            self.qvel[i][:] = self.init_qvel + self.reset_noise * rng.standard_normal(self.model.nv)
            mujoco.mj_forward(self.model, self.datas[i])

    def step_bodies(self, actions: np.ndarray) -> None:
        def step_share(first: int) -> None:
            for i in range(first, len(actions), self.threads):
                self.ctrl[i][:] = actions[i]
                mujoco.mj_step(self.model, self.datas[i], nstep=self.frame_skip)
                mujoco.mj_rnePostConstraint(self.model, self.datas[i])  # contact forces, which mj_step leaves out

        for _ in self.map(step_share, range(self.threads)):
            pass


class HalfCheetahVel(MujocoBody):
    """A half cheetah that must run at a hidden target velocity v*, in m/s: r = -|v - v*| - 0.05 ‖a‖²."""

    gym_id = "HalfCheetah-v5"
    num_observations = 17
    splits = ("train", "test", "ood")
    velocity_observation = 8  # qvel[0], which follows eight positions

    def sample_tasks(self, split: str, n: int, rng: np.random.Generator) -> np.ndarray:
        low, high = (3.0, 4.0) if split == "ood" else (0.0, 3.0)
        return rng.uniform(low, high, (n, 1))

    def reset(self, tasks: np.ndarray, rng: np.random.Generator) -> np.ndarray:
        self.target_velocities = tasks[:, 0]
        self.reset_bodies(len(tasks), rng)
        return self.observe(len(tasks))[0]

    def observe(self, n: int) -> tuple[np.ndarray, np.ndarray]:
        """Observations (n, 17), which leave the position x out, and x (n,) in metres."""
        qpos = np.array(self.qpos[:n])
        return np.concatenate([qpos[:, 1:], np.array(self.qvel[:n])], axis=1), qpos[:, 0]

    def step(self, actions: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray, np.ndarray]:
        n = len(actions)
        before = np.array([qpos[0] for qpos in self.qpos[:n]])
        self.step_bodies(actions)
        observations, after = self.observe(n)
        velocities = (after - before) / self.dt
        rewards = -np.abs(velocities - self.target_velocities) - 0.05 * np.square(actions).sum(axis=1)
        never = np.zeros(n, dtype=bool)
        return observations, rewards, never, never


class AntDir(MujocoBody):
    """An ant that must run forward or backward: r = velocity along the goal + 1 - 0.5 ‖a‖² - contact cost.

    A task is the goal's angle in radians. The episode ends where the torso's height leaves [0.2, 1] m.
    """

    gym_id = "Ant-v5"
    gym_options = {"include_cfrc_ext_in_observation": False}
    num_observations = 27
    splits = ("train", "test")
    angles = (0.0, math.pi)
    threads = cores()  # an ant's step is six times a half cheetah's, and threads pay

    def sample_tasks(self, split: str, n: int, rng: np.random.Generator) -> np.ndarray:
        return np.resize(self.angles, (n, 1))  # the two in turn, so that each batch holds both

    def reset(self, tasks: np.ndarray, rng: np.random.Generator) -> np.ndarray:
        self.goals = np.concatenate([np.cos(tasks), np.sin(tasks)], axis=1)
        self.reset_bodies(len(tasks), rng)
        return self.observe(len(tasks))

    def observe(self, n: int) -> np.ndarray:
        return np.concatenate([np.array(self.qpos[:n])[:, 2:], np.array(self.qvel[:n])], axis=1)

    def torso_positions(self, n: int) -> np.ndarray:
        """x and y (n, 2) in metres, as of the last evaluation of the kinematics: gymnasium's velocity is of these."""
        return np.array([data.xpos[1, :2] for data in self.datas[:n]])

    def step(self, actions: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray, np.ndarray]:
        n = len(actions)
        before = self.torso_positions(n)
        self.step_bodies(actions)
        velocities = (self.torso_positions(n) - before) / self.dt
        observations = self.observe(n)
        healthy = (0.2 <= observations[:, 0]) & (observations[:, 0] <= 1.0)
        forces = np.array([data.cfrc_ext for data in self.datas[:n]]).clip(-1, 1)
        rewards = (velocities * self.goals).sum(axis=1) + healthy
        rewards -= 0.5 * np.square(actions).sum(axis=1) + 5e-4 * np.square(forces).sum(axis=(1, 2))
        return observations, rewards, ~healthy, np.zeros(n, dtype=bool)


class AntDir57(AntDir):
    """The authors' code: goals at ±1 radian, which share cos 1 = 54 % of the way; the paper says forward or backward."""

    angles = (1.0, -1.0)


def meta_world_worker(pipe, seed: int) -> None:
    """A process that holds MetaWorld simulators and resets or steps them as it is told, until the pipe closes."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C reaches the whole group; it is the parent's to answer
    benchmarks, simulators = {}, collections.defaultdict(list)
    try:
        while True:
            command, argument = pipe.recv()
            if command == "reset":
                chosen, used = [], collections.Counter()
                for name, goal in argument:
                    if name not in benchmarks:
                        benchmarks[name] = metaworld.ML1(name, seed)
                    if used[name] == len(simulators[name]):
                        simulators[name].append(benchmarks[name].train_classes[name]())
                    simulator = simulators[name][used[name]]
                    simulator.set_task((benchmarks[name].train_tasks + benchmarks[name].test_tasks)[goal])
                    chosen.append(simulator)
                    used[name] += 1
                pipe.send(np.array([simulator.reset()[0] for simulator in chosen]))
            else:
                steps = [simulator.step(action) for simulator, action in zip(chosen, argument)]
                observations, rewards, _, _, infos = zip(*steps)
                success = [info["success"] > 0 for info in infos]
                pipe.send((np.array(observations), np.array(rewards), np.array(success)))
    except (EOFError, OSError):  # the parent has closed the pipe, or is gone
        return


class MetaWorld:
    """MetaWorld's ML1 (one environment, 50 training goals and 50 held out) and ML45-Train (45, tested as trained).

    A task is a number, 100 · environment + goal, goals from 50 on being held out. The goal's position is hidden: the
    benchmark zeroes it in the observation. An episode succeeds if any of its steps does.
    The simulator is Python, so it runs in processes, one per core, that hold several copies each: on two cores 1.4 to 1.7
    times as fast as gymnasium's AsyncVectorEnv, which has a process per copy.
    """

    horizon = 500
    num_observations = 39
    num_actions = 4
    splits = ("train", "test")
    has_success = True

    def __init__(self, names: list[str], seed: int, held_out: bool):
        self.names, self.held_out = names, held_out
        if len(names) > 1:
            print(f"building each of {len(names)} MetaWorld simulators when it is first drawn, about a second each")
        context = multiprocessing.get_context("forkserver")
        context.set_forkserver_preload([__name__])  # this file's imports once, not once a worker
        self.workers, self.pipes = [], []
        for _ in range(cores()):
            ours, theirs = context.Pipe()
            worker = context.Process(target=meta_world_worker, args=(theirs, seed), daemon=True)
            worker.start()
            theirs.close()  # so that the pipe ends when either side does
            self.workers.append(worker)
            self.pipes.append(ours)

    def sample_tasks(self, split: str, n: int, rng: np.random.Generator) -> np.ndarray:
        """No environment twice before each came once, and no goal either."""
        environments = np.resize(rng.permutation(len(self.names)), n)
        goals = np.resize(rng.permutation(50), n)
        if split == "test" and self.held_out:
            goals = goals + 50
        return (100 * environments + goals)[:, None]

    def task_names(self, tasks: np.ndarray) -> np.ndarray:
        return np.array([self.names[task // 100] for task in tasks[:, 0]])

    def reset(self, tasks: np.ndarray, rng: np.random.Generator) -> np.ndarray:
        self.tasks = tasks
        # A simulator takes 24 MB and, with its goals, a second: of many environments each has one worker.
        share = tasks[:, 0] // 100 if len(self.names) > 1 else np.arange(len(tasks))
        self.slots = [np.flatnonzero(share % len(self.pipes) == i) for i in range(len(self.pipes))]
        observations = np.empty((len(tasks), self.num_observations))
        wanted = list(zip(self.task_names(tasks), tasks[:, 0] % 100))
        for slots, answer in self.ask("reset", [[wanted[i] for i in slots] for slots in self.slots]):
            observations[slots] = answer
        return observations

    def step(self, actions: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray, np.ndarray]:
        n = len(actions)
        observations, rewards = np.empty((n, self.num_observations)), np.empty(n)
        success, never = np.empty(n, dtype=bool), np.zeros(n, dtype=bool)
        for slots, answer in self.ask("step", [actions[slots] for slots in self.slots]):
            observations[slots], rewards[slots], success[slots] = answer
        return observations, rewards, never, success

    def ask(self, command: str, arguments: list) -> list[tuple[np.ndarray, object]]:
        """Each worker's slots and its answer, of those that have any. Raises RunFailed if one has died."""
        busy = [worker for worker, slots in enumerate(self.slots) if len(slots)]
        answers = []
        try:
            for worker in busy:
                self.pipes[worker].send((command, arguments[worker]))
            for worker in busy:
                answers.append((self.slots[worker], self.pipes[worker].recv()))
        except (EOFError, OSError) as error:
            tasks = self.tasks[self.slots[worker]]
            names = sorted({f"{name} {task}" for name, task in zip(self.task_names(tasks), tasks[:, 0])})
            raise RunFailed(f"the process died that simulated {', '.join(names)}") from error
        return answers


ENVS = {
    "HalfCheetahVel": HalfCheetahVel,
    "AntDir": AntDir,
    "AntDir57": AntDir57,
    "ML1-Reach": partial(MetaWorld, ["reach-v3"], held_out=True),
    "ML1-Push": partial(MetaWorld, ["push-v3"], held_out=True),
    "ML45-Train": partial(MetaWorld, list(metaworld.env_dict.ML45_V3["train"]), held_out=False),
}


# --- The agent: working memory (Sec. 4.1), transformer (Sec. 3.2), T-Fixup (Sec. 3.3), policy and value heads (Alg. 1) 


class TransformerLayer(nn.Module):
    """Multi-head self-attention (Eq. 1), then a position-wise feed-forward block, each with a residual connection.

    With T-Fixup there is no LayerNorm; the ablation's arm (Fig. 10) has it after each residual, as usual.
    """

    def __init__(self, d_model: int, heads: int, layer_norm: bool):
        super().__init__()
        self.heads = heads
        self.query = nn.Linear(d_model, d_model)
        self.key = nn.Linear(d_model, d_model)
        self.value = nn.Linear(d_model, d_model)
        self.output = nn.Linear(d_model, d_model)  # W_o of Eq. 1
        self.feed_forward_in = nn.Linear(d_model, 4 * d_model)
        self.feed_forward_out = nn.Linear(4 * d_model, d_model)
        self.attention_norm = nn.LayerNorm(d_model) if layer_norm else nn.Identity()
        self.feed_forward_norm = nn.LayerNorm(d_model) if layer_norm else nn.Identity()

    def forward(self, queries: torch.Tensor, memories: torch.Tensor, mask: torch.Tensor) -> torch.Tensor:
        """Refines queries (B, Q, d), the last Q of memories (B, N, d); mask (B, 1, Q, N): 0 to attend, or -∞."""
        q = self.split_heads(self.query(queries))  # (B, ω, Q, d/ω)
        k = self.split_heads(self.key(memories))  # (B, ω, N, d/ω)
        v = self.split_heads(self.value(memories))
        # Eq. 1: softmax(QKᵀ/√d · M) V, the d of one head. Eq. 5 has a second 1/√d, outside; the authors' code has not.
        attended = F.scaled_dot_product_attention(q, k, v, attn_mask=mask)
        x = self.attention_norm(queries + self.output(attended.transpose(1, 2).flatten(2)))
        return self.feed_forward_norm(x + self.feed_forward_out(F.relu(self.feed_forward_in(x))))

    def attention(self, queries: torch.Tensor, memories: torch.Tensor, mask: torch.Tensor) -> torch.Tensor:
        """The weights α (B, ω, Q, N) of Eq. 4 that forward applies; only to be looked at."""
        q, k = self.split_heads(self.query(queries)), self.split_heads(self.key(memories))
        return (q @ k.transpose(2, 3) / math.sqrt(q.shape[3]) + mask).softmax(3)

    def split_heads(self, x: torch.Tensor) -> torch.Tensor:
        return x.unflatten(2, (self.heads, -1)).transpose(1, 2)  # (B, N, d) -> (B, ω, N, d/ω)


def t_fixup_(phi: nn.Linear, layers: nn.ModuleList) -> None:
    """T-Fixup (Sec. 3.3; Huang et al. 2020), in place, on parameters that are Xavier already.

    The paper's N in 0.67 N^(-1/4) is the number of layers, L here. "The linear projection matrices in each attention
    block" are W_v and W_o: queries and keys stay Xavier, as in Huang et al. (the authors' code scales them too).
    The input embedding's further (9 L)^(-1/4) is Huang et al.'s; the paper leaves it out.
    """
    nn.init.normal_(phi.weight, std=phi.out_features**-0.5)
    with torch.no_grad():
        phi.weight *= (9 * len(layers)) ** -0.25
        for layer in layers:
            for linear in (layer.value, layer.output, layer.feed_forward_in, layer.feed_forward_out):
                linear.weight *= 0.67 * len(layers) ** -0.25


def sinusoidal_positions(length: int, d_model: int) -> torch.Tensor:
    """Positional encoding (length, d) of Vaswani et al. (2017), Sec. 3.5."""
    frequencies = torch.exp(-math.log(10_000) * torch.arange(0, d_model, 2) / d_model)
    angles = torch.arange(length)[:, None] * frequencies
    return torch.stack([angles.sin(), angles.cos()], dim=2).flatten(1)[:, :d_model]


class Agent(nn.Module):
    """What TrMRL and RL² share: φ in front of the memory; a Gaussian policy and a value behind it.

    Args: S observations, A actions, and the fields of Args of the same names.
    """

    state_size: int  # of what acting carries from step to step, if anything; training then takes whole trials

    def __init__(self, num_observations: int, num_actions: int, d_model: int, init_std: float, input_limit: float):
        super().__init__()
        features = num_observations + num_actions + 2  # (s, a, r, η)
        self.num_observations, self.input_limit = num_observations, input_limit
        self.phi = nn.Linear(features, d_model)
        self.policy = nn.Linear(d_model, num_actions)
        self.log_std = nn.Parameter(torch.full((num_actions,), math.log(init_std)))
        self.value = nn.Linear(d_model, 1)
        # Running mean and variance of each feature. In double precision: they sum over millions of steps.
        self.register_buffer("count", torch.zeros((), dtype=torch.float64))
        self.register_buffer("mean", torch.zeros(features, dtype=torch.float64))
        self.register_buffer("variance", torch.ones(features, dtype=torch.float64))
        # What the value head's 0 and 1 stand for.
        self.register_buffer("return_mean", torch.zeros(()))
        self.register_buffer("return_deviation", torch.ones(()))

        nn.init.zeros_(self.phi.bias)
        nn.init.orthogonal_(self.policy.weight, 0.01)  # start by exploring around zero
        nn.init.zeros_(self.policy.bias)
        nn.init.orthogonal_(self.value.weight, 1.0)
        nn.init.zeros_(self.value.bias)

    def normalise(self, transitions: torch.Tensor) -> torch.Tensor:
        """Features with mean 0 and variance 1 over what training has seen, and never beyond ± input_limit.

        The limit keeps a task outside of the training distribution inside of what the network knows: the reward of a
        far target reads as that of the farthest in training, instead of as something never seen.
        """
        mean, deviation = self.mean.float(), (self.variance + 1e-4).sqrt().float()
        return ((transitions - mean) / deviation).clamp(-self.input_limit, self.input_limit)

    @torch.no_grad()
    def update_statistics(self, transitions: torch.Tensor) -> None:
        """Takes transitions (n, S + A + 2) into the running mean and variance (Chan et al. 1979)."""
        count, mean, variance = moments(transitions.double())
        total = self.count + count
        difference = mean - self.mean
        spread = self.variance * self.count + variance * count
        self.variance.copy_((spread + difference**2 * self.count * count / total) / total)
        self.mean += difference * count / total
        self.count.copy_(total)

    @torch.no_grad()
    def rescale_value(self, mean: torch.Tensor, deviation: torch.Tensor) -> None:
        """Makes mean and deviation of the returns the value head's 0 and 1; what it predicts stays (PopArt,
        van Hasselt et al. 2016).

        Without it the head first has to climb to the returns' size, and learning waits for it.
        """
        self.value.weight *= self.return_deviation / deviation
        self.value.bias.copy_((self.value.bias * self.return_deviation + self.return_mean - mean) / deviation)
        self.return_mean.copy_(mean)
        self.return_deviation.copy_(deviation)

    def working_memories(self, windows: torch.Tensor) -> torch.Tensor:
        """φ (Sec. 4.1): windows (B, N, S + A + 2) of transitions, the current one last, to (B, N, d)."""
        x = self.normalise(windows)
        x[:, -1, self.num_observations :] = 0  # Alg. 1: the current one is (s_next, a_PAD, r_PAD, η_PAD)
        return self.phi(x)

    def episodic_memories(self, trial: "Trial", t: torch.Tensor, task: torch.Tensor) -> list[torch.Tensor]:
        """The memory of each task (B,) at its step t (B,): e⁰, its working memory, and what becomes of it, each (B, d)."""
        raise NotImplementedError

    def forward(self, trial: "Trial", t: torch.Tensor, task: torch.Tensor) -> tuple[Normal, torch.Tensor]:
        """The policy π(a | e^L) over (B, A) and the value (B,) at steps t (B,) of tasks (B,)."""
        memory = self.episodic_memories(trial, t, task)[-1]
        policy = Normal(self.policy(memory), self.log_std.exp(), validate_args=False)
        return policy, self.value(memory)[:, 0] * self.return_deviation + self.return_mean


class TrMRL(Agent):
    """The paper's agent: a transformer over the last N transitions. Args as above."""

    state_size = 0

    def __init__(self, num_observations: int, num_actions: int, d_model: int, init_std: float, input_limit: float,
                 memory_length: int, keep_memory: bool, layers: int, heads: int, t_fixup: bool):
        super().__init__(num_observations, num_actions, d_model, init_std, input_limit)
        self.memory_length, self.keep_memory = memory_length, keep_memory
        self.layers = nn.ModuleList(TransformerLayer(d_model, heads, layer_norm=not t_fixup) for _ in range(layers))
        self.register_buffer("positions", sinusoidal_positions(memory_length, d_model), persistent=False)
        self.register_buffer("causal", torch.ones(memory_length, memory_length, dtype=torch.bool).tril(), False)
        for linear in (module for module in self.layers.modules() if isinstance(module, nn.Linear)):
            nn.init.xavier_uniform_(linear.weight)
            nn.init.zeros_(linear.bias)
        if t_fixup:
            t_fixup_(self.phi, self.layers)

    def episodic_memories(self, trial: "Trial", t: torch.Tensor, task: torch.Tensor) -> list[torch.Tensor]:
        return self.refine(*trial.windows(t, task, self.memory_length, self.keep_memory))

    def refine(self, windows: torch.Tensor, filled: torch.Tensor) -> list[torch.Tensor]:
        """The current step's memory after each layer (Eq. 6): e⁰ to e^L, each (B, d).

        filled (B, N) is False at PAD slots of windows (B, N, S + A + 2); no filled slot attends to them.
        """
        memories = self.working_memories(windows) + self.positions  # (B, N, d)
        # A PAD slot sees itself alone, since a softmax needs something to sum over; nothing reads what it makes of it.
        attends = filled[:, None, :] | torch.eye(self.memory_length, dtype=torch.bool, device=filled.device)
        mask = torch.where(self.causal & attends, 0.0, -math.inf)[:, None]  # (B, 1, N, N): Eq. 1's M
        current = [memories[:, -1]]
        for layer in self.layers[:-1]:
            memories = layer(memories, memories, mask)
            current.append(memories[:, -1])
        # Of the last layer only the current memory is read: the other positions need no query there.
        last = self.layers[-1](memories[:, -1:], memories, mask[:, :, -1:])
        return current + [last[:, 0]]


class RL2(Agent):
    """RL² (Duan et al. 2016): a GRU in the transformer's place, its state carried through all episodes of a trial.

    h_t = GRU(φ(s, a, r, η of step t - 1), h_{t-1}), and the memory at step t is GRU(φ(s_t, PAD, PAD, PAD), h_t).
    """

    def __init__(self, num_observations: int, num_actions: int, d_model: int, init_std: float, input_limit: float):
        super().__init__(num_observations, num_actions, d_model, init_std, input_limit)
        self.state_size = d_model
        self.gru = nn.GRUCell(d_model, d_model)

    def episodic_memories(self, trial: "Trial", t: torch.Tensor, task: torch.Tensor) -> list[torch.Tensor]:
        tasks, column = task.unique(return_inverse=True)
        first, last = int(t.min()), int(t.max())
        # Acting goes on from the state that it has left in the trial; training runs through the trial from its start.
        before = max(first - 1, 0)
        state = trial.states[before, tasks]  # zeros at the start
        states = [state]
        seen = self.phi(self.normalise(trial.transitions[before:last, tasks]))
        for x, valid in zip(seen, trial.valid[before:last, tasks, None]):
            state = torch.where(valid, self.gru(x, state), state)
            states.append(state)
        states = torch.stack(states[first - before :])
        if not torch.is_grad_enabled():
            trial.states[first : last + 1, tasks] = states
        current = self.working_memories(trial.transitions[t, task][:, None])[:, 0]
        return [current, self.gru(current, states[t - first, column])]


def make_agent(env, args: Args) -> Agent:
    """The agent that args name, on their device; its initial weights follow from their seed."""
    torch.manual_seed(args.seed)  # for the weights alone: all else draws from random_stream
    shared = (env.num_observations, env.num_actions, args.d_model, args.init_std, args.input_limit)
    if args.memory == "gru":
        agent = RL2(*shared)
    else:
        agent = TrMRL(*shared, args.memory_length, args.keep_memory, args.layers, args.heads, args.t_fixup)
    return agent.to(args.device)


# --- Collecting a trial: the memory write logic (Sec. 5.1, Alg. 1), E episodes of one task ---------------------------


@dataclass
class Trial:
    """E episodes of H steps of each of n tasks, one after the other: T = E · H steps. Every transition is stored once."""

    transitions: torch.Tensor  # (T + 1, n, S + A + 2): (s, a, r, η); the last row holds the observation after the trial
    log_probs: torch.Tensor  # (T, n) of the actions taken
    values: torch.Tensor  # (T + 1, n)
    rewards: torch.Tensor  # (T, n)
    valid: torch.Tensor  # (T, n) False from an early termination to the end of its episode
    success: torch.Tensor  # (T, n)
    written: torch.Tensor  # (T + 1, n) the valid steps in order, then the current one: what memory is read from
    count: torch.Tensor  # (T + 1, n) the valid steps before each step
    episode_count: torch.Tensor  # (T + 1, n) the same, before the step's episode
    states: torch.Tensor  # (T + 1, n, d) RL²'s, before each step; TrMRL carries none, (T + 1, n, 0)

    @staticmethod
    def empty(steps: int, n: int, features: int, state_size: int) -> "Trial":
        return Trial(
            transitions=torch.zeros(steps + 1, n, features),
            log_probs=torch.zeros(steps, n),
            values=torch.zeros(steps + 1, n),
            rewards=torch.zeros(steps, n),
            valid=torch.zeros(steps, n, dtype=torch.bool),
            success=torch.zeros(steps, n, dtype=torch.bool),
            written=torch.zeros(steps + 1, n, dtype=torch.long),
            count=torch.zeros(steps + 1, n, dtype=torch.long),
            episode_count=torch.zeros(steps + 1, n, dtype=torch.long),
            states=torch.zeros(steps + 1, n, state_size),
        )

    def to(self, device: str) -> "Trial":
        return Trial(**{name: tensor.to(device) for name, tensor in vars(self).items()})

    def windows(self, t: torch.Tensor, task: torch.Tensor, length: int,
                keep: bool = False) -> tuple[torch.Tensor, torch.Tensor]:
        """What the memory of a task holds at step t: its N - 1 most recent transitions and the current one (Alg. 1).

        t (B,), task (B,), length N; keep: also of earlier episodes of the trial. Sec. 5.1: an episode starts empty.
        Returns windows (B, N, S + A + 2) and filled (B, N), False at the PADs in front.
        """
        slots = self.count[t, task][:, None] + torch.arange(1 - length, 1, device=t.device)  # (B, N)
        filled = slots >= (0 if keep else self.episode_count[t, task][:, None])
        steps = self.written[slots.clamp(min=0), task[:, None]]
        return self.transitions[steps, task[:, None]], filled


def collect_trial(agent: Agent, env, tasks: np.ndarray, episodes: int, rng: np.random.Generator, explore: bool) -> Trial:
    """Alg. 1 for n tasks at once: actions are sampled from the policy, or its mean if not explore.

    Raises RunFailed if the simulator returns a NaN or an infinity.
    """
    n, horizon, S, A = len(tasks), env.horizon, env.num_observations, env.num_actions
    steps = episodes * horizon
    trial = Trial.empty(steps, n, S + A + 2, agent.state_size)
    all_tasks = torch.arange(n)

    def policy_at(t: int) -> tuple[Normal, torch.Tensor]:
        with torch.inference_mode():
            return agent(trial, torch.full((n,), t), all_tasks)

    for t in range(steps):
        if t % horizon == 0:
            observations = env.reset(tasks, rng)
            alive = np.ones(n, dtype=bool)
            trial.episode_count[t : t + horizon + 1] = trial.count[t]
        trial.written[trial.count[t], all_tasks] = t
        trial.transitions[t, :, :S] = torch.from_numpy(observations)
        policy, trial.values[t] = policy_at(t)
        actions = policy.mean
        if explore:
            noise = torch.from_numpy(rng.standard_normal((n, A), dtype=np.float32))
            actions = actions + policy.stddev * noise
        trial.log_probs[t] = policy.log_prob(actions).sum(1)
        observations, rewards, terminated, success = env.step(actions.clamp(-1, 1).double().numpy())
        if not (np.isfinite(observations[alive]).all() and np.isfinite(rewards[alive]).all()):
            raise RunFailed(f"the simulator returned a NaN or an infinity at step {t % horizon} of an episode")
        rewards = np.where(alive, rewards, 0.0)  # what comes after a termination is not kept
        trial.transitions[t, :, S : S + A] = actions
        trial.transitions[t, :, S + A] = torch.from_numpy(rewards)
        trial.transitions[t, :, S + A + 1] = torch.from_numpy(terminated | ((t + 1) % horizon == 0))  # η
        trial.rewards[t] = torch.from_numpy(rewards)
        trial.valid[t] = torch.from_numpy(alive)
        trial.count[t + 1] = trial.count[t] + trial.valid[t]
        trial.success[t] = torch.from_numpy(success & alive)
        alive = alive & ~terminated
        observations = np.where(alive[:, None], observations, 0.0)
    trial.written[trial.count[steps], all_tasks] = steps
    trial.transitions[steps, :, :S] = torch.from_numpy(observations)
    # The trial's end is a truncation: what would follow is worth V. After a termination nothing would follow.
    trial.values[steps] = policy_at(steps)[1] * torch.from_numpy(alive)
    return trial


def episode_returns(trial: Trial, horizon: int) -> tuple[np.ndarray, np.ndarray]:
    """Rewards of every step (n, E, H), zero after a termination, and whether each episode (n, E) ever succeeded."""
    rewards = trial.rewards.T.unflatten(1, (-1, horizon))
    success = trial.success.T.unflatten(1, (-1, horizon)).any(2)
    return rewards.numpy(), success.numpy()


# --- PPO over concatenated trials (Sec. 5.1) -------------------------------------------------------------------------


def advantages_and_returns(trial: Trial, gamma: float, gae_lambda: float) -> tuple[torch.Tensor, torch.Tensor]:
    """Generalised advantage estimation along the trial's valid steps, through the episodes' ends; both (T, n).

    "We concatenate these episodes to form a single trajectory and we maximize the discounted cumulative reward of this
    trajectory" (Sec. 5.1). What an early termination cuts off counts as steps without reward: if the trial's clock
    stopped there, the next episode would begin at once, and to die would cost nothing.
    """
    advantages = torch.zeros_like(trial.rewards)
    next_value, next_advantage = trial.values[-1], torch.zeros_like(trial.values[-1])
    for t in reversed(range(len(trial.rewards))):
        valid = trial.valid[t]
        delta = trial.rewards[t] + gamma * next_value - trial.values[t]
        advantages[t] = torch.where(valid, delta + gamma * gae_lambda * next_advantage, 0.0)
        next_advantage = torch.where(valid, advantages[t], gamma * gae_lambda * next_advantage)
        next_value = torch.where(valid, trial.values[t], gamma * next_value)
    return advantages, advantages + trial.values[:-1]


def minibatches(trial: Trial, epochs: int, number: int, whole_trials: bool,
                rng: np.random.Generator) -> Iterator[tuple[torch.Tensor, torch.Tensor]]:
    """The valid steps, once an epoch, in a number of pairs t (B,), task (B,): drawn from all tasks, or whole trials."""
    t, task = trial.valid.nonzero(as_tuple=True)
    items = trial.valid.shape[1] if whole_trials else len(t)
    for _ in range(epochs):
        for chosen in torch.from_numpy(rng.permutation(items)).to(t.device).tensor_split(number):
            if whole_trials:
                chosen = torch.isin(task, chosen)
            yield t[chosen], task[chosen]


def ppo_update(agent: Agent, optimizer: torch.optim.Optimizer, trial: Trial, args: Args,
               rng: np.random.Generator) -> dict[str, float]:
    """Up to update_epochs passes over the trials' valid steps, in minibatches; returns mean statistics.

    Raises RunFailed if returns, a loss or its gradient are not finite, before the step that they would have spoilt.
    """
    advantages, returns = advantages_and_returns(trial, args.gamma, args.gae_lambda)
    count, mean, variance = moments(returns[trial.valid])
    if not torch.isfinite(mean):
        raise RunFailed("the returns are not finite")
    agent.rescale_value(mean, variance.sqrt() + 1e-4)
    _, mean, variance = moments(advantages[trial.valid])
    explained_variance = 1 - variance / agent.return_deviation**2  # an advantage is a return less its value
    advantages = (advantages - mean) / (variance.sqrt() + 1e-8)

    S, A = agent.num_observations, len(agent.log_std)
    whole_trials = agent.state_size > 0
    number = math.ceil(count.item() / args.minibatch_size)  # of minibatches an epoch
    if whole_trials:
        number = min(number, trial.valid.shape[1])
    size = count / number  # over all processes
    statistics, divergence = [], 0.0
    for t, task in minibatches(trial, args.update_epochs, number, whole_trials, rng):
        policy, value = agent(trial, t, task)
        actions = trial.transitions[t, task, S : S + A]
        log_ratio = policy.log_prob(actions).sum(1) - trial.log_probs[t, task]
        ratio = log_ratio.exp()
        advantage = advantages[t, task]
        clipped = ratio.clamp(1 - args.clip_coef, 1 + args.clip_coef)
        policy_loss = -torch.minimum(ratio * advantage, clipped * advantage).sum() / size
        # In the value head's unit, so that the shared memories serve both heads whatever the rewards' scale.
        value_loss = 0.5 * ((value - returns[t, task]) / agent.return_deviation).square().sum() / size
        with torch.no_grad():
            statistics.append(torch.stack([
                policy_loss, value_loss, policy.entropy().sum() / size, (ratio - 1 - log_ratio).sum() / size,
                ((ratio - 1).abs() > args.clip_coef).sum() / size,
            ]))
        optimizer.zero_grad()
        (policy_loss + value_loss).backward()
        if distributed.is_initialized():  # size counts all processes' steps, so that their shares add up
            shares = [parameter.grad for parameter in agent.parameters()] + [statistics[-1]]
            total = summed(nn.utils.parameters_to_vector(shares))
            nn.utils.vector_to_parameters(total, shares)
        # Checked at each minibatch: one trial that went very wrong can carry the policy far away within an epoch.
        divergence += statistics[-1][3]
        if args.target_kl is not None and divergence > args.target_kl * len(statistics):
            break
        norm = nn.utils.clip_grad_norm_(agent.parameters(), args.max_grad_norm)
        if not torch.isfinite(norm):
            raise RunFailed("the loss or its gradient is not finite")
        optimizer.step()
    names = ("policy_loss", "value_loss", "entropy", "approx_kl", "clip_fraction")
    means = dict(zip(names, torch.stack(statistics).mean(0).tolist()))
    return means | {"explained_variance": explained_variance.item()}


# --- Meta-testing with frozen weights: adaptation and OOD (Sec. 5.2), refinement (Fig. 7), latents (Fig. 8) ----------


def held_out_tasks(env, split: str, args: Args) -> np.ndarray:
    """The run's test or OOD tasks (n, k): drawn once, from a stream that training never touches."""
    return env.sample_tasks(split, args.test_tasks, random_stream(args.seed, f"{split} tasks"))


def evaluate(agent: Agent, env, args: Args) -> dict[str, float]:
    """First-episode return and success rate on all held-out tasks, for the columns of progress.csv."""
    splits = [split for split in ("test", "ood") if split in env.splits]
    tasks = np.concatenate([held_out_tasks(env, split, args) for split in splits])
    trial = collect_trial(agent, env, tasks, 1, random_stream(args.seed, "evaluation"), explore=False)
    rewards, success = episode_returns(trial, env.horizon)
    returns = dict(zip(splits, rewards.sum((1, 2)).reshape(len(splits), -1).mean(1)))
    scores = {f"{split}_return": value for split, value in returns.items()}
    if env.has_success:
        scores["test_success"] = success[: args.test_tasks].mean()
    return scores


def meta_test(agent: Agent, env, args: Args, run: Path) -> list[tuple[str, np.ndarray]]:
    """Adaptation and OOD (Figs. 5, 6, 9): test_episodes on each of test_tasks, writes meta_test.npz and ood.npz.

    Returns rows for the summary: a label and its mean over the tasks for each episode.
    """
    rows = []
    for split, name in (("test", "meta_test.npz"), ("ood", "ood.npz")):
        if split not in env.splits:
            continue
        tasks = held_out_tasks(env, split, args)
        rng = random_stream(args.seed, "meta-test")
        trial = collect_trial(agent, env, tasks, args.test_episodes, rng, explore=False)
        rewards, success = episode_returns(trial, env.horizon)
        results = {"rewards": rewards, "success": success, "tasks": tasks}
        if hasattr(env, "task_names"):
            results["task_names"] = env.task_names(tasks)
        if hasattr(env, "velocity_observation"):
            velocities = trial.transitions[:-1, :, env.velocity_observation].T.unflatten(1, (-1, env.horizon))
            results["velocities"] = velocities.numpy()
        write_npz(run / name, **results)
        rows.append((f"{split} return", rewards.sum(2).mean(0)))
        if env.has_success:
            rows.append((f"{split} success", success.mean(0)))
    return rows


def analyse_memories(agent: Agent, env, args: Args, run: Path) -> None:
    """What the memories of each layer hold; writes refinement.npz, working_memories.npz and attention.npz.

    Fig. 7, representation error: 1 - cos(e^l, e^L), averaged. Regression error: the mean squared error of a linear model
    from e^l to the policy's mean action, fitted on the first two thirds of the tasks, tested on the others.
    Fig. 8, latents: φ of whole transitions. Attention: what the current memory attends to, averaged over all steps.
    """
    rng = random_stream(args.seed, "refinement")
    tasks = env.sample_tasks("test", args.test_tasks + math.ceil(args.test_tasks / 2), rng)
    trial = collect_trial(agent, env, tasks, math.ceil(args.test_episodes / 2), rng, explore=False)
    t, task = trial.valid.nonzero(as_tuple=True)
    memories, attention = [], []

    def keep_attention(layer, inputs, output):
        attention.append(layer.attention(*inputs)[:, :, -1].mean(1))  # (B, N): of the current memory, over heads

    hooks = [layer.register_forward_hook(keep_attention) for layer in agent.modules()
             if isinstance(layer, TransformerLayer)]
    with torch.inference_mode():
        for batch in torch.arange(len(t)).split(4096):
            memories.append(torch.stack(agent.episodic_memories(trial, t[batch], task[batch])))
        memories = torch.cat(memories, dim=1)  # (L + 1, steps, d)
        representation_error = 1 - F.cosine_similarity(memories, memories[-1:], dim=2).mean(1)
        experts = agent.policy(memories[-1]).double().numpy()  # (steps, A)
        attention = [torch.cat(attention[layer :: len(hooks)]).mean(0) for layer in range(len(hooks))]
        sample = (t < env.horizon) & (t % 5 == 0)  # enough for a picture
        embedding = agent.phi(agent.normalise(trial.transitions[t[sample], task[sample]]))
    for hook in hooks:
        hook.remove()

    fitted = task.numpy() < args.test_tasks
    regression_mse = []
    for memory in memories.double().numpy():
        features = np.concatenate([memory, np.ones((len(memory), 1))], axis=1)
        weights = np.linalg.lstsq(features[fitted], experts[fitted])[0]
        regression_mse.append(np.square(features[~fitted] @ weights - experts[~fitted]).mean())

    labels = tasks[task[sample].numpy(), 0]  # a task is known by its first number
    write_npz(run / "refinement.npz", representation_error=representation_error.numpy(),
              regression_mse=np.array(regression_mse))
    write_npz(run / "working_memories.npz", embedding=embedding.numpy(), task=labels)
    if attention:
        write_npz(run / "attention.npz", weights=torch.stack(attention).numpy())  # (L, N)


# --- A run: its folder, its checkpoints, and the outer loop ----------------------------------------------------------

COLUMNS = (
    "iteration", "env_steps", "wall_seconds", "train_return", "train_success", "test_return", "test_success",
    "ood_return", "steps_per_second", "rollout_seconds", "update_seconds", "policy_loss", "value_loss", "entropy",
    "approx_kl", "clip_fraction", "explained_variance", "learning_rate",
)  # of progress.csv


def write_file(path: Path, write) -> None:
    """Calls write(file) on a temporary file beside path and renames it, so that path is never half-written."""
    temporary = path.with_name(path.name + ".tmp")
    with open(temporary, "wb") as file:
        write(file)
    os.replace(temporary, path)


def write_npz(path: Path, **arrays: np.ndarray) -> None:
    write_file(path, lambda file: np.savez(file, **arrays))


def parse(argv: list[str]) -> Args:
    """The command line over the run's own arguments (--resume, --test) or over the environment's defaults."""
    peek = argparse.ArgumentParser(add_help=False, allow_abbrev=False)
    peek.add_argument("--env", default=Args.env)
    peek.add_argument("--memory", default=Args.memory)
    peek.add_argument("--resume")
    peek.add_argument("--test")
    known = peek.parse_known_args(argv)[0]
    if known.resume and known.test:
        raise UserError("--resume, --test: take one of the two")
    if known.resume or known.test:
        defaults = read_args(known)
    else:
        special = DEFAULTS.get(known.env, {}) | DEFAULTS.get(known.memory, {})
        defaults = Args(env=known.env, **special)
    args = tyro.cli(Args, args=argv, default=defaults)
    check(args)
    return args


def read_args(known: argparse.Namespace) -> Args:
    flag, folder = ("--resume", known.resume) if known.resume else ("--test", known.test)
    try:
        values = json.loads((Path(folder) / "args.json").read_text())
        fields = {field.name for field in dataclasses.fields(Args)}
        values = {name: value for name, value in values.items() if name in fields}
        return Args(**values | {"runs_dir": Path(values["runs_dir"])})
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise UserError(f"{flag} {folder}: takes the folder of a run, with args.json and checkpoint.pt") from error


def write_args(args: Args, run: Path) -> None:
    values = {name: value for name, value in dataclasses.asdict(args).items() if name not in ("resume", "test")}
    values["versions"] = {package: version(package) for package in VERSIONED}
    text = json.dumps(values, indent=2, default=str)
    write_file(run / "args.json", lambda file: file.write(text.encode()))


def make_run_folder(args: Args) -> Path:
    """runs/<environment>-s<seed>-<time>, which is never one that exists."""
    name = f"{args.env}-s{args.seed}-{time.strftime('%Y%m%d-%H%M%S')}"
    try:
        args.runs_dir.mkdir(parents=True, exist_ok=True)
        for suffix in ("", *(f"-{i}" for i in range(2, 100))):
            if not (args.runs_dir / (name + suffix)).exists():
                (args.runs_dir / (name + suffix)).mkdir()
                return args.runs_dir / (name + suffix)
    except OSError as error:
        raise UserError(f"--runs-dir {args.runs_dir}: takes a folder that can be written ({error.strerror})") from None


def load_checkpoint(run: Path, agent: Agent, optimizer: torch.optim.Optimizer, device: str) -> dict:
    """Loads weights and optimizer in place; returns the run's state so far: iteration, env_steps, wall_seconds."""
    path = run / "checkpoint.pt"
    try:
        checkpoint = torch.load(path, map_location=device, weights_only=True)
        state = {name: checkpoint[name] for name in ("iteration", "env_steps", "wall_seconds")}
        agent_state, optimizer_state = checkpoint["agent"], checkpoint["optimizer"]
    except (OSError, RuntimeError, EOFError, KeyError, TypeError, pickle.UnpicklingError) as error:
        raise UserError(f"{path}: takes a checkpoint that trmrl.py wrote; this one cannot be read") from error
    try:
        agent.load_state_dict(agent_state)
        optimizer.load_state_dict(optimizer_state)
    except (RuntimeError, ValueError) as error:
        raise UserError(f"{path}: its network has another shape than the run's --env, --layers, --d-model, ...; "
                        "takes the flags that it was trained with") from error
    return state


def save_checkpoint(run: Path, agent: Agent, optimizer: torch.optim.Optimizer, state: dict) -> None:
    checkpoint = {**state, "agent": agent.state_dict(), "optimizer": optimizer.state_dict()}
    write_file(run / "checkpoint.pt", lambda file: torch.save(checkpoint, file))


def start_progress(path: Path, iteration: int) -> None:
    """Makes progress.csv, or drops from it the rows after the checkpoint: resuming writes them again."""
    rows = []
    if iteration > 0:
        try:
            with open(path, newline="") as file:
                rows = [row for row in csv.DictReader(file) if int(row["iteration"]) <= iteration]
        except (OSError, KeyError, TypeError, ValueError) as error:
            raise UserError(f"{path}: takes the table that trmrl.py wrote; this one cannot be read") from error
    with open(path.with_name(path.name + ".tmp"), "w", newline="") as file:
        writer = csv.DictWriter(file, COLUMNS)
        writer.writeheader()
        writer.writerows(rows)
    os.replace(file.name, path)


def append_progress(path: Path, row: dict) -> None:
    with open(path, "a", newline="") as file:
        csv.DictWriter(file, COLUMNS).writerow(row)


@contextlib.contextmanager
def stop_requests():
    """Within it the first Ctrl-C or SIGTERM is only noted, in the list that it yields; a second one acts as ever."""
    requests = []

    def note(number, frame):
        requests.append(number)
        tqdm.write("stopping after this iteration; once more to stop at once")
        signal.signal(number, signal.SIG_DFL)

    handlers = {number: signal.signal(number, note) for number in (signal.SIGINT, signal.SIGTERM)}
    try:
        yield requests
    finally:
        for number, handler in handlers.items():
            signal.signal(number, handler)


def acting_copy(agent: Agent) -> Agent:
    """The agent on the CPU, where it acts: itself, if it lives there."""
    if agent.log_std.device.type == "cpu":
        return agent
    return copy.deepcopy(agent).cpu()


def train(agent: Agent, optimizer: torch.optim.Optimizer, env, args: Args, run: Path, state: dict) -> bool:
    """The outer loop (Sec. 5.1), from state on; returns whether it came to its end, rather than to a signal.

    An iteration's random numbers depend on the seed and its number alone, so that to resume is to go on.
    Under torchrun each process collects its share of the tasks, and the one that leads evaluates, reports and saves.
    """
    process, processes = process_number()
    leads = process == 0
    saved = time.monotonic()
    scores = {}
    stopped = False
    with (
        stop_requests() as requests,
        SummaryWriter(run, purge_step=state["env_steps"] + 1) if leads else contextlib.nullcontext() as board,
        tqdm(total=args.total_timesteps, initial=state["env_steps"], unit="step", unit_scale=True,
             disable=not leads) as bar,
    ):
        while state["env_steps"] < args.total_timesteps and not stopped:
            started = time.monotonic()
            iteration = state["iteration"] + 1
            remaining = 1 - state["env_steps"] / args.total_timesteps
            learning_rate = args.learning_rate * (remaining if args.anneal_lr else 1.0)
            for group in optimizer.param_groups:
                group["lr"] = learning_rate
            tasks = env.sample_tasks("train", args.num_tasks, random_stream(args.seed, "train tasks", iteration))
            rng = random_stream(args.seed, "train", iteration, process)
            try:
                actor = acting_copy(agent)
                trial = collect_trial(actor, env, tasks[process::processes], args.episodes_per_trial, rng, explore=True)
                collected = time.monotonic()
                losses = ppo_update(agent, optimizer, trial.to(args.device), args, rng)
                agent.update_statistics(trial.transitions[:-1][trial.valid].to(args.device))
                updated = time.monotonic()
                rewards, success = episode_returns(trial, env.horizon)
                totals = torch.tensor([trial.valid.sum(), rewards.sum(2).mean(), success.mean(), len(requests)])
                env_steps, returns, successes, stopped = summed(totals.double().to(args.device)).tolist()
            except RunFailed as error:
                raise RunFailed(f"iteration {iteration}: {error}; {run} holds the last good checkpoint") from error

            state["iteration"] = iteration
            state["env_steps"] += int(env_steps)
            done = state["env_steps"] >= args.total_timesteps
            if leads:
                row = {
                    "train_return": returns / processes,
                    "rollout_seconds": collected - started,
                    "update_seconds": updated - collected,
                    "learning_rate": learning_rate,
                    **losses,
                }
                if env.has_success:
                    row["train_success"] = successes / processes
                if (iteration - 1) % args.eval_interval == 0 or done:
                    scores = evaluate(acting_copy(agent), env, args)
                    row |= scores
                row["steps_per_second"] = env_steps / (time.monotonic() - started)
                state["wall_seconds"] += time.monotonic() - started
                append_progress(run / "progress.csv", state | row)
                for name, value in row.items():
                    board.add_scalar(name, value, state["env_steps"])
                bar.update(int(env_steps))
                shown = {"train": row["train_return"]} | scores
                bar.set_postfix({name: f"{value:.3g}" for name, value in shown.items()})
                if done or stopped or time.monotonic() - saved > CHECKPOINT_SECONDS:
                    save_checkpoint(run, agent, optimizer, state)
                    saved = time.monotonic()
    return not stopped


def print_summary(args: Args, state: dict, rows: list[tuple[str, np.ndarray]]) -> None:
    print(f"\n{args.env}, seed {args.seed}, {state['env_steps']:,} steps: means over {args.test_tasks} tasks a row")
    print(f"{'episode':14}" + "".join(f"{episode:>9}" for episode in range(1, args.test_episodes + 1)))
    for label, values in rows:
        digits = 2 if label.endswith("success") else 1
        print(f"{label:14}" + "".join(f"{value:9.{digits}f}" for value in values))


def main(argv: list[str] | None = None) -> int:
    """Runs a command line; returns the exit code: 2 for a user's mistake, 1 for a failed run, 130 for a stopped one."""
    try:
        args = parse(sys.argv[1:] if argv is None else argv)
        join_processes(args)
        leads = process_number()[0] == 0
        env = ENVS[args.env](args.seed)
        agent = make_agent(env, args)
        optimizer = torch.optim.Adam(agent.parameters(), lr=args.learning_rate, eps=1e-5, fused=True)
        run = args.resume or args.test
        if run:
            state = load_checkpoint(run, agent, optimizer, args.device)
        else:
            state = {"iteration": 0, "env_steps": 0, "wall_seconds": 0.0}
            if leads:
                run = make_run_folder(args)
                save_checkpoint(run, agent, optimizer, state)
        if not args.test:
            if leads:
                start_progress(run / "progress.csv", state["iteration"])
                write_args(args, run)
            if not train(agent, optimizer, env, args, run, state):
                if leads:
                    print(f"stopped at {state['env_steps']:,} steps; go on with: python trmrl.py --resume {run}")
                return 130
        if not leads:
            return 0
        agent = acting_copy(agent)
        print("meta-testing with frozen weights")
        rows = meta_test(agent, env, args, run)
        analyse_memories(agent, env, args, run)
        print_summary(args, state, rows)
        print(f"written to {run}; draw it with: python plot.py {run}")
        return 0
    except UserError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    except RunFailed as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        print("interrupted; the run's checkpoint is whole: --resume goes on, --test repeats the meta-tests")
        return 130


if __name__ == "__main__":
    sys.exit(main())
