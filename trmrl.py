"""TrMRL in one file: "Transformers are Meta-Reinforcement Learners" (Melo, ICML 2022).

At each step the agent embeds its last N transitions (s, a, r, η) as working memories, a causal transformer refines them
layer by layer into an episodic memory, and the last one conditions a Gaussian policy. PPO trains it on trials: E
episodes of one task, concatenated. At meta-test the weights are frozen; adapting is attention alone.

    python trmrl.py --env HalfCheetahVel --layers 4     train, meta-test, write runs/<name>/
    python trmrl.py --resume runs/<name>                go on from the last checkpoint
    python trmrl.py --test runs/<name>                  the meta-tests alone

Paper                                      Here, in this order
Eq. 1, 3 to 5  self-attention              TransformerLayer
Sec. 3.3       T-Fixup                     t_fixup_
Sec. 4.1       working memory φ            Agent.working_memories
Eq. 6          episodic memories e⁰ … e^L  Agent.refine
Sec. 5.1       memory write logic          retrieve
Alg. 1, App. G acting                      collect_trial, Agent.act
Sec. 5.1       PPO on concatenated trials  advantages_and_returns, ppo_update
Sec. 5.2       meta-test, OOD              meta_test
Fig. 7, Fig. 8 refinement, latents         analyse_memories
App. B         tasks and environments      HalfCheetahVel, AntDir, MetaWorld
Sec. 5.1       meta-training               train
"""

import contextlib
import functools
import itertools
import json
import math
import multiprocessing
import os
import pickle
import signal
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass
from datetime import datetime, timedelta
from importlib.metadata import version
from pathlib import Path

import gymnasium
import metaworld
import mujoco
import numpy as np
import torch
import torch.nn.functional as F
import tyro
from gymnasium.vector import AutoresetMode, VectorEnv
from numpy.random import Generator
from torch import Tensor, distributed, nn
from torch.distributions import Normal
from torch.optim import Adam, Optimizer
from torch.utils.tensorboard import SummaryWriter
from tqdm import tqdm


@dataclass
class Args:
    """TrMRL: meta-train on a distribution of tasks, then meta-test with frozen weights."""

    env: str = "HalfCheetahVel"  # tasks (App. B): HalfCheetahVel, AntDir, AntDir57, ML1-Reach, ML1-Push or ML45-Train
    seed: int = 1  # everything random follows from it: tasks, weights, exploration
    total_timesteps: int = 4_000_000  # environment steps of meta-training, rounded up to whole iterations
    num_tasks: int = 20  # tasks a batch; each gives one trial an iteration (Sec. 5.1)
    episodes_per_trial: int = 2  # E, the episodes of one task that are concatenated (Sec. 5.1)
    memory_length: int = 5  # N, the working memories in sight, the current one included (Sec. 4.1)
    layers: int = 4  # L, the transformer layers, each refining the episodic memory once (Eq. 6)
    heads: int = 4  # ω, the attention heads (Eq. 1); a divisor of d_model
    d_model: int = 32  # d, the size of a memory
    t_fixup: bool = True  # initialise by T-Fixup, no LayerNorm (Sec. 3.3); else Xavier layers with LayerNorm (Fig. 10)
    init_std: float = 0.3  # initial standard deviation of the Gaussian policy, and its largest; it is learned
    input_limit: float = 3.0  # normalised inputs are kept within ± this many standard deviations
    learning_rate: float = 5e-4  # of Adam
    anneal: bool = True  # lower the learning rate linearly to 0, and the policy's largest deviation as its root
    gamma: float = 0.95  # discount factor
    gae_lambda: float = 0.9  # λ of generalised advantage estimation
    clip_coef: float = 0.2  # PPO's clipping range of the probability ratio
    update_epochs: int = 3  # passes over an iteration's trials, at most
    minibatch_size: int = 200  # steps a gradient, drawn from all tasks
    target_kl: float | None = 0.04  # ends an update once the mean approx_kl of its minibatches exceeds it
    max_grad_norm: float = 0.5  # gradients are clipped to this norm
    eval_interval: int = 10  # iterations between two evaluations on test and OOD tasks, one episode each
    test_tasks: int = 20  # tasks of a meta-test (Sec. 5.2); the refinement analysis takes half as many again
    test_episodes: int = 6  # episodes a task in the meta-test (Fig. 5); the refinement analysis takes half of them
    runs_dir: str = "runs"  # where the run's folder is made
    device: str = "cpu"  # where the network is trained, as torch names it; it always acts on the CPU
    resume: str | None = None  # a run's folder: go on from its checkpoint; other flags replace the run's own
    test: str | None = None  # a run's folder: only repeat the meta-tests of its checkpoint


# --- Agent: working memory (Sec. 4.1), transformer (Sec. 3.2), T-Fixup (Sec. 3.3), policy (Alg. 1), value -------------
def xavier_linear(inputs: int, outputs: int) -> nn.Linear:
    linear = nn.Linear(inputs, outputs)
    nn.init.xavier_uniform_(linear.weight)
    nn.init.zeros_(linear.bias)
    return linear


class TransformerLayer(nn.Module):
    """Multi-head self-attention (Eq. 1), then a feed-forward block, four times as wide, each with a residual sum."""

    def __init__(self, d_model: int, heads: int, layer_norm: bool):
        super().__init__()
        self.heads = heads
        self.query, self.key, self.value, self.output = (xavier_linear(d_model, d_model) for _ in range(4))
        self.feed_forward_in = xavier_linear(d_model, 4 * d_model)
        self.feed_forward_out = xavier_linear(4 * d_model, d_model)
        self.attention_norm = nn.LayerNorm(d_model) if layer_norm else nn.Identity()
        self.feed_forward_norm = nn.LayerNorm(d_model) if layer_norm else nn.Identity()

    def forward(self, queries: Tensor, memories: Tensor, mask: Tensor) -> tuple:
        """Refines queries (B, C, d), the last C of memories (B, N, d); returns them and α (B, ω, C, N) of Eq. 4.
        mask (B, 1, C, N) is M of Eq. 1, in logarithms: 0 where a query may attend, else a very negative number."""
        split = (self.heads, -1)
        Q = self.query(queries).unflatten(2, split).transpose(1, 2)  # (B, ω, C, d/ω)
        K = self.key(memories).unflatten(2, split).transpose(1, 2)  # (B, ω, N, d/ω)
        V = self.value(memories).unflatten(2, split).transpose(1, 2)
        # Eq. 1, with the d of one head. Eq. 5 has a second 1/√d, outside of the softmax; the authors' code has not.
        alpha = (Q @ K.transpose(2, 3) / math.sqrt(Q.shape[3]) + mask).softmax(3)
        h = (alpha @ V).transpose(1, 2).flatten(2)  # μ of Eq. 3 and 5 by head; Concat(h_1 … h_ω): (B, C, d)
        x = self.attention_norm(queries + self.output(h))
        return self.feed_forward_norm(x + self.feed_forward_out(F.relu(self.feed_forward_in(x)))), alpha


@torch.no_grad()
def t_fixup_(phi: nn.Linear, layers: nn.ModuleList) -> None:
    """T-Fixup (Sec. 3.3), in place, on layers that are Xavier already. N in the paper's 0.67 N^(-1/4) is L, the layers.
    As in Huang et al. (2020), not the paper, queries and keys stay Xavier, and the embedding is × (9 L)^(-1/4)."""
    L = len(layers)
    nn.init.normal_(phi.weight, std=phi.out_features**-0.5)
    phi.weight *= (9 * L) ** -0.25
    for layer in layers:
        for linear in (layer.value, layer.output, layer.feed_forward_in, layer.feed_forward_out):
            linear.weight *= 0.67 * L**-0.25


def sinusoidal_positions(length: int, d_model: int) -> Tensor:
    """Positional encoding (length, d) of Vaswani et al. (2017), Sec. 3.5."""
    frequencies = torch.exp(-math.log(10_000) * torch.arange(0, d_model, 2) / d_model)
    angles = torch.arange(length)[:, None] * frequencies
    return torch.stack([angles.sin(), angles.cos()], dim=2).flatten(1)[:, :d_model]


def mean_and_std(sums: Tensor) -> tuple[Tensor, Tensor]:
    """Mean and standard deviation, at least 0.01, from the sums (3, ...) of 1, x and x²."""
    mean, square = sums[1:] / sums[0]
    return mean.float(), (square - mean**2).clamp(min=1e-4).sqrt().float()


class Agent(nn.Module):
    """φ, the transformer over the last N working memories, a Gaussian policy and a value on the last episodic memory.

    A transition is a row (s, a, r, η) of S + A + 2 numbers. A trial's transitions are (T + 1, n, S + A + 2), one row a
    step and task; the last holds the observation after the trial. t (B,) and task (B,) pick steps of it."""

    method = "TrMRL"  # as args.json and the figures call it

    def __init__(self, envs: VectorEnv, args: Args):
        super().__init__()
        S, A = envs.single_observation_space.shape[0], envs.single_action_space.shape[0]
        self.num_observations, self.horizon = S, envs.horizon
        self.memory_length, self.input_limit = args.memory_length, args.input_limit
        self.phi = nn.Linear(S + A + 2, args.d_model)
        nn.init.zeros_(self.phi.bias)
        layers = (TransformerLayer(args.d_model, args.heads, layer_norm=not args.t_fixup) for _ in range(args.layers))
        self.layers = nn.ModuleList(layers)
        if args.t_fixup:
            t_fixup_(self.phi, self.layers)
        self.policy = xavier_linear(args.d_model, A)
        nn.init.orthogonal_(self.policy.weight, 0.01)  # start by exploring around zero
        self.log_std = nn.Parameter(torch.full((A,), math.log(args.init_std)))
        self.value = xavier_linear(args.d_model, 1)
        self.register_buffer("positions", sinusoidal_positions(args.memory_length, args.d_model))
        self.register_buffer("causal", torch.ones(args.memory_length, args.memory_length, dtype=torch.bool).tril())
        # Sums of 1, x and x² over all transitions so far; they start as those of a single one, of mean 0 and square 1.
        self.register_buffer("sums", torch.tensor([[1.0], [0.0], [1.0]], dtype=torch.float64).repeat(1, S + A + 2))
        self.register_buffer("return_mean", torch.zeros(()))  # what the value head's 0 stands for,
        self.register_buffer("return_std", torch.ones(()))  # and its 1

    def normalise(self, transitions: Tensor) -> Tensor:
        """Features with mean 0 and deviation 1 over what training has seen, never beyond ± input_limit. A deviation
        below 0.5 counts as 0.5, or else an object's place, a matter of centimetres, would tell each training goal."""
        mean, std = mean_and_std(self.sums)
        return ((transitions - mean) / std.clamp(min=0.5)).clamp(-self.input_limit, self.input_limit)

    @torch.no_grad()
    def rescale_value(self, mean: Tensor, std: Tensor) -> None:
        """Makes these returns' mean and deviation the value head's 0 and 1; what it predicts stays (PopArt, van Hasselt
        et al. 2016). Without it the head first has to climb to the returns' size, and learning waits for it."""
        self.value.weight *= self.return_std / std
        self.value.bias.copy_((self.value.bias * self.return_std + self.return_mean - mean) / std)
        self.return_mean.copy_(mean)
        self.return_std.copy_(std)

    def working_memories(self, windows: Tensor) -> Tensor:
        """φ (Sec. 4.1): windows (B, N, S + A + 2) of transitions, the current one last, to (B, N, d)."""
        x = self.normalise(windows)
        x[:, -1, self.num_observations :] = 0  # Alg. 1: (a, r, η) are PADs, 0 once normalised; training knows them
        return self.phi(x)

    def refine(self, transitions: Tensor, t: Tensor, task: Tensor) -> tuple[list[Tensor], list[Tensor]]:
        """The current memory, e⁰ (φ, positioned) to e^L (Eq. 6), each (B, d); each layer's α from it, (B, ω, N)."""
        windows, filled = retrieve(transitions, t, task, self.memory_length, self.horizon)
        e = self.working_memories(windows) + self.positions  # Alg. 1: e⁰ ← φ, with a position (Sec. 3.2): (B, N, d)
        # A PAD is never attended to. Its own row, which nothing reads, would be 0 / 0 if the mask were not finite.
        mask = torch.where(self.causal & filled[:, None], 0.0, -1e9)[:, None]  # (B, 1, N, N)
        memories, attention = [e[:, -1]], []
        for layer in self.layers:  # Alg. 1: refine episodic memories
            queries = e[:, -1:] if layer is self.layers[-1] else e  # of the last layer only the current one is read
            e, alpha = layer(queries, e, mask[:, :, -queries.shape[1] :])
            memories.append(e[:, -1])
            attention.append(alpha[:, :, -1])
        return memories, attention

    def policy_and_value(self, memory: Tensor) -> tuple[Tensor, Tensor]:
        """The mean of the policy π(a | e^L), (B, A), and the value (B,), of episodic memories (B, d)."""
        return self.policy(memory), self.value(memory)[:, 0] * self.return_std + self.return_mean

    def forward(self, transitions: Tensor, t: Tensor, task: Tensor) -> tuple[Tensor, Tensor]:
        memories, _ = self.refine(transitions, t, task)
        return self.policy_and_value(memories[-1])

    @torch.inference_mode()
    def act(self, transitions: Tensor, t: int, state) -> tuple[Tensor, Tensor, object]:
        """The means and values of all n tasks at step t, and a state, at first None, to be given back at the next step.
        TrMRL carries none, its memory is the window; RL² does (baselines/rl2.py)."""
        n = transitions.shape[1]
        return *self(transitions, torch.full((n,), t), torch.arange(n)), state


# --- A trial: the memory write logic (Sec. 5.1, Alg. 1), E episodes of one task ---------------------------------------
def retrieve(transitions: Tensor, t: Tensor, task: Tensor, N: int, horizon: int) -> tuple:
    """The N - 1 most recent transitions of the episode and the current one (Alg. 1; Sec. 5.1: an episode starts empty).
    Returns windows (B, N, S + A + 2) and filled (B, N), False at the PADs in front. t = T is of the last episode."""
    start = (t // horizon * horizon).clamp(max=len(transitions) - 1 - horizon)
    steps = t[:, None] + torch.arange(1 - N, 1, device=t.device)  # (B, N)
    return transitions[steps.clamp(min=0), task[:, None]], steps >= start[:, None]


@dataclass
class Trial:
    """E episodes of H steps of each of n tasks, one after the other: T = E · H steps. A transition is stored once."""

    transitions: Tensor  # (T + 1, n, S + A + 2): (s, a, r, η), s and r 0 after a death; at T the s after the trial
    log_probs: Tensor  # (T, n) of the actions taken
    values: Tensor  # (T + 1, n); the last is V after the trial, 0 if the last episode ended in a death
    valid: Tensor  # (T, n), False after a death, to the end of its episode
    success: Tensor  # (T, n), 1 or 0, NaN where the environment does not say

    @property
    def rewards(self) -> Tensor:
        return self.transitions[:-1, :, -2]  # (T, n), 0 where not valid


def collect_trial(agent: Agent, envs: VectorEnv, tasks: np.ndarray, E: int, rng: Generator, explore: bool) -> Trial:
    """Alg. 1 for n tasks (n, ·) at once, E episodes of each; actions are the policy's mean if not explore.
    Raises RunFailed if the simulator or the policy gives a NaN or an infinity."""
    n, S, A = len(tasks), envs.single_observation_space.shape[0], envs.single_action_space.shape[0]
    T = E * envs.horizon
    transitions = np.zeros((T + 1, n, S + A + 2), dtype=np.float32)  # B of Alg. 1; its PADs are in retrieve
    means, values = np.zeros((T, n, A), dtype=np.float32), np.zeros((T + 1, n), dtype=np.float32)
    valid, success = np.zeros((T, n), dtype=bool), np.zeros((T, n), dtype=np.float32)
    buffer = torch.from_numpy(transitions)  # the same numbers, as torch sees them
    std, state = agent.log_std.detach().exp(), None
    threads = torch.get_num_threads()
    torch.set_num_threads(1)  # a step of acting is too small to share, and a waiting thread takes a simulator's core
    for t in range(T):  # Alg. 1: while episode not done
        if t % envs.horizon == 0:
            observations, _ = envs.reset(seed=int(rng.integers(2**31)), options={"tasks": tasks})
            alive = np.ones(n, dtype=bool)
        transitions[t, :, :S] = observations  # s_next
        means[t], values[t], state = agent.act(buffer, t, state)
        actions = means[t] + explore * std.numpy() * rng.standard_normal((n, A), dtype=np.float32)  # a_t ∼ π
        clipped = actions.clip(envs.single_action_space.low, envs.single_action_space.high)
        observations, rewards, terminated, truncated, infos = envs.step(clipped)  # collect (s_{t+1}, r_t, η_t)
        transitions[t, :, S : S + A] = actions  # B ← B ∪ (s, a, r, η), a before clipping
        transitions[t, :, S + A] = rewards
        transitions[t, :, S + A + 1] = (terminated | truncated) & (t < T - 1)  # not at the trial's end: V looks past it
        valid[t], success[t] = alive, infos["success"]
        alive = alive & ~terminated
        observations[~alive] = 0.0  # till the episode's end
    torch.set_num_threads(threads)
    transitions[T, :, :S] = observations
    values[T] = agent.act(buffer, T, state)[1].numpy() * alive  # V goes on after the trial, but not after a death
    if not np.isfinite(transitions).all():
        raise RunFailed("the simulator or the policy returned a NaN or an infinity; resuming would repeat it")
    log_probs = Normal(torch.from_numpy(means), std).log_prob(buffer[:-1, :, S : S + A]).sum(2)
    return Trial(buffer, log_probs, *(torch.from_numpy(array) for array in (values, valid, success)))


# --- PPO over concatenated trials (Sec. 5.1) --------------------------------------------------------------------------
def all_reduce(x: Tensor) -> Tensor:
    """x, replaced by its sum over torchrun's processes, if there are any. Raises RunFailed if one is gone."""
    if distributed.is_initialized():
        try:
            distributed.all_reduce(x)
        except RuntimeError as error:
            raise RunFailed("another process of torchrun's has ended") from error
    return x


def sums_of(x: Tensor) -> Tensor:
    """1, x and x² summed over the first axis, and over all processes: (3, ...), for mean_and_std."""
    x = x.double()
    return all_reduce(torch.stack([torch.ones_like(x), x, x * x]).sum(1))


def advantages_and_returns(trial: Trial, gamma: float, gae_lambda: float) -> tuple[Tensor, Tensor]:
    """Generalised advantage estimation along the whole trial, through the episodes' ends; both (T, n).

    "We concatenate these episodes to form a single trajectory and we maximize the discounted cumulative reward of this
    trajectory" (Sec. 5.1). What a death cuts off passes as steps without reward: else dying would cost nothing."""
    advantages = torch.zeros_like(trial.rewards)
    next_value, advantage = trial.values[-1], 0.0
    for t in reversed(range(len(advantages))):
        value = torch.where(trial.valid[t], trial.values[t], gamma * next_value)
        delta = trial.rewards[t] + gamma * next_value - value
        advantage = delta + gamma * gae_lambda * advantage
        advantages[t], next_value = advantage, value
    return advantages, advantages + trial.values[:-1]


def clipped_objective(ratio: Tensor, advantages: Tensor, clip_coef: float) -> Tensor:
    """PPO's objective of each step (Schulman et al. 2017, Eq. 7), to be maximised."""
    clipped = ratio.clamp(1 - clip_coef, 1 + clip_coef)
    return torch.minimum(ratio * advantages, clipped * advantages)


def ppo_update(agent: Agent, optimizer: Optimizer, trial: Trial, args: Args, rng: Generator) -> dict:
    """Up to update_epochs passes over the trials' valid steps, in minibatches that mix all tasks; returns statistics.
    Raises RunFailed if a gradient is not finite, before the step that it would have spoilt."""
    advantages, returns = advantages_and_returns(trial, args.gamma, args.gae_lambda)
    t, task = trial.valid.nonzero(as_tuple=True)
    return_sums = sums_of(returns[t, task])
    agent.rescale_value(*mean_and_std(return_sums))
    mean, std = mean_and_std(sums_of(advantages[t, task]))
    explained_variance = 1 - (std / agent.return_std) ** 2  # an advantage is a return less its value
    advantages = (advantages - mean) / std
    actions = trial.transitions[:-1, :, agent.num_observations : -2]
    number = math.ceil(return_sums[0].item() / args.minibatch_size)  # of minibatches an epoch
    size = return_sums[0].float() / number  # over all processes
    epochs = [torch.from_numpy(rng.permutation(len(t))).tensor_split(number) for _ in range(args.update_epochs)]
    statistics, gradient_steps = [], 0
    for chosen in itertools.chain(*epochs):
        at = t[chosen], task[chosen]
        mean, value = agent(trial.transitions, *at)
        policy = Normal(mean, agent.log_std.exp())
        log_ratio = policy.log_prob(actions[at]).sum(1) - trial.log_probs[at]
        ratio = log_ratio.exp()
        policy_loss = -clipped_objective(ratio, advantages[at], args.clip_coef).sum() / size
        # In the value head's unit, so that the shared memories serve both heads whatever the rewards' scale.
        value_loss = 0.5 * ((value - returns[at]) / agent.return_std).square().sum() / size
        optimizer.zero_grad()
        (policy_loss + value_loss).backward()
        approx_kl, clipped = (ratio - 1 - log_ratio).sum(), ((ratio - 1).abs() > args.clip_coef).sum()
        losses = policy_loss, value_loss, policy.entropy().sum() / size, approx_kl / size, clipped / size
        statistics.append(torch.stack(losses).detach())
        if distributed.is_initialized():  # size counts all processes' steps, so that their shares add up
            shares = [parameter.grad for parameter in agent.parameters()] + [statistics[-1]]
            nn.utils.vector_to_parameters(all_reduce(nn.utils.parameters_to_vector(shares)), shares)
        # Checked at each minibatch: one trial that went very wrong can carry the policy far away within an epoch.
        if args.target_kl is not None and torch.stack(statistics)[:, 3].mean() > args.target_kl:
            break
        norm = nn.utils.clip_grad_norm_(agent.parameters(), args.max_grad_norm)
        if not torch.isfinite(norm):
            raise RunFailed("the gradient is not finite")
        optimizer.step()
        gradient_steps += 1
    names = ("policy_loss", "value_loss", "entropy", "approx_kl", "clip_fraction")
    row = dict(zip(names, torch.stack(statistics).mean(0).tolist()))
    return row | {"explained_variance": explained_variance.item(), "gradient_steps": gradient_steps}


# --- Meta-tests with frozen weights: adaptation and OOD (Sec. 5.2), refinement (Fig. 7), latents (Fig. 8) -------------
def random_stream(seed: int, purpose: str, iteration: int = 0, process: int = 0) -> Generator:
    """Random numbers that depend on the arguments alone, so that a resumed run draws what an unbroken one would."""
    purposes = ("train tasks", "train", "test tasks", "ood tasks", "meta-test", "refinement")
    return np.random.default_rng([seed, purposes.index(purpose), iteration, process])


def episode_results(trial: Trial, episodes: int) -> tuple[np.ndarray, np.ndarray]:
    """Rewards of every step (n, E, H), and whether each episode (n, E) ever succeeded: 1, 0 or NaN."""
    rewards, success = (x.T.unflatten(1, (episodes, -1)).cpu().numpy() for x in (trial.rewards, trial.success))
    return rewards, np.fmax.reduce(success, axis=2)


def meta_test(agent: Agent, envs: VectorEnv, args: Args, episodes: int) -> dict[str, dict[str, np.ndarray]]:
    """Adaptation and OOD (Sec. 5.2; Figs. 5, 6, 9): episodes of each of the run's held-out tasks, by mean actions.

    Returns for "test" and, where there are such tasks, "ood": rewards (tasks, episodes, H), success (tasks, episodes),
    tasks (tasks, ·) and observations (tasks, H, S) of the first episode."""
    results = {}
    for split in envs.splits[1:]:
        tasks = envs.sample_tasks(split, args.test_tasks, random_stream(args.seed, f"{split} tasks"))
        trial = collect_trial(agent, envs, tasks, episodes, random_stream(args.seed, "meta-test"), explore=False)
        rewards, success = episode_results(trial, episodes)
        observations = trial.transitions[: envs.horizon, :, : agent.num_observations].transpose(0, 1).numpy()
        results[split] = dict(rewards=rewards, success=success, tasks=tasks, observations=observations)
    return results


@torch.no_grad()
def analyse_memories(agent: Agent, envs: VectorEnv, args: Args) -> dict[str, dict[str, np.ndarray]]:
    """What the memories of each layer hold, for refinement.npz, working_memories.npz and attention.npz.

    Fig. 7, representation error: 1 - cos(e^l, e^L), averaged. Regression error: the mean squared error of a linear
    model from e^l to the policy's mean action, fitted on the first two thirds of the tasks, tested on the others.
    Fig. 8, latents: φ of whole transitions. Attention: what the current memory attends to, averaged over all steps."""
    rng = random_stream(args.seed, "refinement")
    tasks = envs.sample_tasks("test", args.test_tasks + math.ceil(args.test_tasks / 2), rng)
    trial = collect_trial(agent, envs, tasks, math.ceil(args.test_episodes / 2), rng, explore=False)
    t, task = trial.valid.nonzero(as_tuple=True)
    memories, attention = [], []
    for chosen in torch.arange(len(t)).split(4096):
        some_memories, some_attention = agent.refine(trial.transitions, t[chosen], task[chosen])
        memories.append(torch.stack(some_memories))
        if some_attention:
            attention.append(torch.stack(some_attention).mean(2))  # (L, B, N): the mean over heads
    memories = torch.cat(memories, dim=1)  # (L + 1, steps, d)
    representation_error = 1 - F.cosine_similarity(memories, memories[-1:], dim=2).mean(1)
    experts = agent.policy(memories[-1]).double().numpy()  # (steps, A)
    fitted = task.numpy() < args.test_tasks
    regression_mse = []
    for memory in memories.double().numpy():
        features = np.concatenate([memory, np.ones((len(memory), 1))], axis=1)
        weights = np.linalg.lstsq(features[fitted], experts[fitted])[0]
        regression_mse.append(np.square(features[~fitted] @ weights - experts[~fitted]).mean())
    sample = (t < envs.horizon) & (t % 5 == 0)  # enough for a picture
    embedding = agent.phi(agent.normalise(trial.transitions[t[sample], task[sample]]))
    files = {"working_memories": {"embedding": embedding.numpy(), "task": tasks[task[sample].numpy(), 0]}}
    errors = {"representation_error": representation_error.numpy(), "regression_mse": np.array(regression_mse)}
    if attention:
        files["attention"] = {"weights": torch.cat(attention, dim=1).mean(1).numpy()}  # (L, N)
    return files | {"refinement": errors}


# --- Tasks and environments (App. B) ----------------------------------------------------------------------------------
# A task distribution is a gymnasium.Env with Box spaces and three things more: horizon, the steps of an episode;
# splits, ("train", "test") and perhaps "ood"; sample_tasks(split, n, rng), rows of numbers (n, ·) that say what to do.
# task, one such row, is set before each reset. info["success"], if there is one, is of that step.
class HalfCheetahVel(gymnasium.Wrapper):
    """A half cheetah that must run at a hidden target velocity v*, in m/s: r = -|v - v*| - 0.05 ‖a‖²."""

    horizon, splits = 200, ("train", "test", "ood")

    def __init__(self, seed: int):
        super().__init__(gymnasium.make("HalfCheetah-v5").unwrapped)  # without its own horizon
        self.env.model.opt.disableflags |= mujoco.mjtDisableBit.mjDSBL_AUTORESET  # a diverged simulation must be seen

    def sample_tasks(self, split: str, n: int, rng: Generator) -> np.ndarray:
        return rng.uniform(3.0, 4.0, (n, 1)) if split == "ood" else rng.uniform(0.0, 3.0, (n, 1))

    def step(self, action: np.ndarray) -> tuple:
        before = self.env.data.qpos[0]  # gymnasium's own step, but for its reward and info, a third of its time
        self.env.do_simulation(action, self.env.frame_skip)
        velocity = (self.env.data.qpos[0] - before) / self.env.dt
        reward = -abs(velocity - self.task[0]) - 0.05 * np.dot(action, action)
        return self.env._get_obs(), reward, False, False, {}


class AntDir(gymnasium.Wrapper):
    """An ant that must run forward or backward: r = velocity along the goal + 1 - 0.5 ‖a‖² - contact cost.

    A task is the goal's angle (rad). An episode ends where the torso leaves [0.2, 1] m or the state is not finite."""

    horizon, splits = 200, ("train", "test")

    def __init__(self, seed: int, angles: tuple[float, float] = (0.0, math.pi)):
        super().__init__(gymnasium.make("Ant-v5", include_cfrc_ext_in_observation=False).unwrapped)
        self.env.model.opt.disableflags |= mujoco.mjtDisableBit.mjDSBL_AUTORESET
        self.angles = angles

    def sample_tasks(self, split: str, n: int, rng: Generator) -> np.ndarray:
        return np.resize(self.angles, (n, 1))  # the two in turn, so that each batch holds both

    def step(self, action: np.ndarray) -> tuple:
        observation, reward, terminated, truncated, info = self.env.step(action)
        velocity = math.cos(self.task[0]) * info["x_velocity"] + math.sin(self.task[0]) * info["y_velocity"]
        reward += velocity - info["reward_forward"]
        return observation, reward if np.isfinite(reward) else 0.0, terminated, truncated, info


class MetaWorld(gymnasium.Env):
    """MetaWorld's ML1 (one environment, 50 training goals and 50 held out) and ML45-Train (45, tested as trained).

    A task is a number, 100 · environment + goal, goals from 50 on being held out. The observation hides the goal."""

    horizon, splits = 500, ("train", "test")
    observation_space = gymnasium.spaces.Box(-np.inf, np.inf, (39,))
    action_space = gymnasium.spaces.Box(-1.0, 1.0, (4,))
    idle: dict[str, list] = {}  # this process's simulators that no copy is using, by name: 24 MB and 0.2 s each

    def __init__(self, names: tuple[str, ...], held_out: bool, seed: int):
        self.names, self.held_out, self.seed = names, held_out, seed
        self.name = self.simulator = None

    @staticmethod
    @functools.cache
    def goals(name: str, seed: int) -> list:
        """An environment's 50 goals of training, then the 50 held out; takes a second."""
        benchmark = metaworld.ML1(name, seed)
        return benchmark.train_tasks + benchmark.test_tasks

    def sample_tasks(self, split: str, n: int, rng: Generator) -> np.ndarray:
        """No environment or goal twice before each came once; in order, as neighbours share a process's simulators."""
        environments = np.sort(np.resize(rng.permutation(len(self.names)), n))
        goals = np.resize(rng.permutation(50), n) + (50 if split == "test" and self.held_out else 0)
        return (100 * environments + goals)[:, None]

    def reset(self, *, seed: int | None = None, options: dict | None = None) -> tuple[np.ndarray, dict]:
        environment, goal = divmod(int(self.task[0]), 100)
        if self.name != self.names[environment]:
            self.idle.setdefault(self.name, []).append(self.simulator)
            self.name = self.names[environment]
            idle = self.idle.get(self.name)
            self.simulator = idle.pop() if idle else metaworld.env_dict.ALL_V3_ENVIRONMENTS[self.name]()
        self.simulator.set_task(self.goals(self.name, self.seed)[goal])
        return self.simulator.reset()

    def step(self, action: np.ndarray) -> tuple:
        return self.simulator.step(action)


ENVS: dict[str, Callable[..., gymnasium.Env]] = {  # each made with a seed
    "HalfCheetahVel": HalfCheetahVel,
    "AntDir": AntDir,
    "AntDir57": functools.partial(AntDir, angles=(1.0, -1.0)),  # the authors'
    "ML1-Reach": functools.partial(MetaWorld, ("reach-v3",), True),
    "ML1-Push": functools.partial(MetaWorld, ("push-v3",), True),
    "ML45-Train": functools.partial(MetaWorld, tuple(metaworld.env_dict.ML45_V3["train"]), False),
}
DEFAULTS: dict[str, dict] = {  # Args' values were chosen on HalfCheetahVel; why these: results/README.md
    "AntDir": dict(num_tasks=10, update_epochs=6, target_kl=None),
    "AntDir57": dict(num_tasks=10, update_epochs=6, target_kl=None),
    "ML1-Reach": dict(init_std=1.0, learning_rate=1e-3, memory_length=30, minibatch_size=400),
    "ML1-Push": dict(init_std=1.0, update_epochs=6, target_kl=None, total_timesteps=3_000_000),
    "ML45-Train": dict(
        init_std=1.0, update_epochs=6, target_kl=None, num_tasks=25, total_timesteps=6_000_000, test_tasks=45
    ),
}


def serve(pipe, make_env: Callable[[], gymnasium.Env]) -> None:
    """A process, spawned as any platform can, that steps its share of a TaskVectorEnv as told, until the pipe ends."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C reaches the whole group; it is the parent's to answer
    envs = TaskVectorEnv(make_env)
    with contextlib.suppress(EOFError, OSError):  # the parent has closed the pipe, or is gone
        while True:
            method, share = pipe.recv()
            pipe.send(getattr(envs, method)(*share))


class TaskVectorEnv(VectorEnv):
    """A copy of an environment for each of the tasks that reset is given, shared among processes: this one and others
    with a TaskVectorEnv of their own. A copy that has terminated rests, at zeros, till the next reset."""

    metadata = {"autoreset_mode": AutoresetMode.DISABLED}

    def __init__(self, make_env: Callable[[], gymnasium.Env], processes: int = 1):
        self.make_env, self.envs, self.pipes = make_env, [make_env()], []
        env = self.envs[0]
        self.single_observation_space, self.single_action_space = env.observation_space, env.action_space
        self.horizon, self.splits, self.sample_tasks = env.horizon, env.splits, env.sample_tasks
        for _ in range(processes - 1):
            ours, theirs = multiprocessing.Pipe()
            multiprocessing.get_context("spawn").Process(target=serve, args=(theirs, make_env), daemon=True).start()
            theirs.close()  # so that the pipe ends when either side does
            self.pipes.append(ours)

    def share(self, method: str, *arrays: np.ndarray) -> list[np.ndarray]:
        """What method makes of each process's share of the arrays, joined. Raises RunFailed if a process has died."""
        mine, *theirs = zip(*(np.array_split(array, len(self.pipes) + 1) for array in arrays))
        try:
            for pipe, share in zip(self.pipes, theirs):
                pipe.send((method, share))
            answers = [getattr(self, method)(*mine), *(pipe.recv() for pipe in self.pipes)]
        except (EOFError, OSError) as error:
            raise RunFailed("a process that simulates it has died") from error
        return [np.concatenate(parts) for parts in zip(*answers)]

    def reset(self, *, seed: int, options: dict) -> tuple[np.ndarray, dict]:
        """Starts an episode of each of options["tasks"] (n, ·); its copies are seeded with seed, seed + 1, ..."""
        self.num_envs, self.steps = len(options["tasks"]), 0
        (observations,) = self.share("reset_copies", options["tasks"], seed + np.arange(self.num_envs))
        return observations, {}

    def step(self, actions: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray, np.ndarray, dict]:
        self.steps += 1
        observations, rewards, terminated, success = self.share("step_copies", actions)
        truncated = np.full(self.num_envs, self.steps == self.horizon)
        return observations, rewards, terminated, truncated, {"success": success}

    def reset_copies(self, tasks: np.ndarray, seeds: np.ndarray) -> tuple[np.ndarray]:
        self.envs += [self.make_env() for _ in range(len(tasks) - len(self.envs))]
        self.terminated = np.zeros(len(tasks), dtype=bool)
        observations = np.zeros((len(tasks), *self.single_observation_space.shape))
        for i in range(len(tasks)):
            self.envs[i].task = tasks[i]
            observations[i], _ = self.envs[i].reset(seed=int(seeds[i]))
        return (observations,)

    def step_copies(self, actions: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray, np.ndarray]:
        n = len(actions)
        observations, rewards = np.zeros((n, *self.single_observation_space.shape)), np.zeros(n)
        success = np.full(n, np.nan)
        for i in np.flatnonzero(~self.terminated):
            observations[i], rewards[i], self.terminated[i], _, info = self.envs[i].step(actions[i])
            success[i] = info.get("success", np.nan)
        return observations, rewards, self.terminated.copy(), success


# --- A run: flags, checkpoint, outer loop -----------------------------------------------------------------------------
class UserError(Exception):
    """A mistake in what the user asked for: one line, exit code 2."""


class RunFailed(Exception):
    """A NaN in the simulator or the loss, or a process that died: the run cannot go on, exit code 1."""


def parse(argv: list[str], args_class: type[Args], method: str) -> tuple[Args, dict]:
    """The command line over its environment's defaults, or over a run's own arguments; and that run's checkpoint."""
    args, checkpoint = tyro.cli(args_class, args=[flag for flag in argv if flag not in ("-h", "--help")]), {}
    values = {"env": args.env}
    for name, value in DEFAULTS.get(args.env, {}).items():
        if getattr(args_class, name) == getattr(Args, name):  # else the method has its own
            values[name] = value
    if args.resume and args.test:
        raise UserError("--resume, --test: take one of the two")
    if run := args.resume or args.test:
        try:
            checkpoint = torch.load(Path(run) / "checkpoint.pt", map_location="cpu", weights_only=True)
            values = {name: checkpoint["args"][name] for name in vars(args) if name not in ("resume", "test")}
        except (OSError, RuntimeError, EOFError, KeyError, TypeError, pickle.UnpicklingError):
            raise UserError(f"--resume, --test: take a run's folder; {run} has no checkpoint.pt to be read") from None
        if checkpoint["args"]["method"] != method:
            raise UserError(f"--resume, --test: {run} is a run of {checkpoint['args']['method']}, not of {method}")
    if unknown := {args.env, values["env"]} - set(ENVS):
        raise UserError(f"--env {unknown.pop()}: takes one of {', '.join(ENVS)}")
    args = tyro.cli(args_class, args=argv, default=args_class(**values))
    limits = {"seed": (0, 2**32), "gamma": (0, 1), "gae_lambda": (0, 1)}  # of others: 1 of whole numbers, else above 0
    for name, value in vars(args).items():
        low, high = limits.get(name, (1, 10**12) if type(value) is int else (1e-9, 1e9))
        if type(value) in (int, float) and not low <= value <= high:
            raise UserError(f"--{name.replace('_', '-')} {value}: takes a number from {low:g} to {high:g}")
    if args.d_model % args.heads:
        raise UserError(f"--heads {args.heads}: takes a divisor of --d-model {args.d_model}")
    if args.num_tasks % int(os.environ.get("WORLD_SIZE", 1)):
        raise UserError(f"--num-tasks {args.num_tasks}: takes a multiple of torchrun's processes")
    try:
        torch.zeros(1, device=args.device)
    except (RuntimeError, AssertionError):
        raise UserError(f"--device {args.device}: takes a device that torch finds here, such as cpu") from None
    return args, checkpoint


def write(path: Path, save: Callable) -> None:
    """save(file) under a temporary name, which is then renamed, so that path is never half-written."""
    temporary = path.with_name(path.name + ".tmp")
    with open(temporary, "wb") as file:
        save(file)
    os.replace(temporary, path)


def save_run(run: Path, args: Args, agent: Agent, optimizer: Optimizer, rows: list[dict]) -> None:
    """checkpoint.pt, which is all that resuming needs; args.json and progress.csv, for all others."""
    values = {name: value for name, value in vars(args).items() if name not in ("resume", "test")}
    values["method"] = agent.method
    values["versions"] = {name: version(name) for name in ("torch", "mujoco", "gymnasium", "metaworld", "numpy")}
    checkpoint = {"args": values, "rows": rows, "agent": agent.state_dict(), "optimizer": optimizer.state_dict()}
    write(run / "checkpoint.pt", lambda file: torch.save(checkpoint, file))
    write(run / "args.json", lambda file: file.write(json.dumps(values, indent=2).encode()))
    columns = (
        "iteration env_steps wall_seconds train_return train_success test_return test_success ood_return "
        "steps_per_second rollout_seconds update_seconds gradient_steps policy_loss value_loss entropy approx_kl "
        "clip_fraction explained_variance learning_rate"
    ).split()
    table = [columns] + [[str(row.get(name, "")) for name in columns] for row in rows]
    write(run / "progress.csv", lambda file: file.writelines((",".join(line) + "\n").encode() for line in table))


def train(agent: Agent, optimizer: Optimizer, envs: VectorEnv, args: Args, run: Path | None, rows: list[dict]) -> None:
    """Meta-training (Sec. 5.1), from where rows, those of progress.csv, have come; adds one an iteration.

    An iteration's random numbers depend on the seed and its number alone, so that to resume is to go on.
    Under torchrun each process collects its share of the tasks, and the first evaluates and writes."""
    process, processes = int(os.environ.get("RANK", 0)), int(os.environ.get("WORLD_SIZE", 1))
    env_steps, seconds = (rows[-1]["env_steps"], rows[-1]["wall_seconds"]) if rows else (0, 0.0)
    board = SummaryWriter(run) if process == 0 else None
    scores = {}  # of the last evaluation
    with tqdm(total=args.total_timesteps, initial=env_steps, unit="step", unit_scale=True, disable=process > 0) as bar:
        while env_steps < args.total_timesteps:
            started, iteration = time.monotonic(), len(rows) + 1
            tasks = envs.sample_tasks("train", args.num_tasks, random_stream(args.seed, "train tasks", iteration))
            rng = random_stream(args.seed, "train", iteration, process)
            agent.to("cpu")  # where small batches are quick
            trial = collect_trial(agent, envs, tasks[process::processes], args.episodes_per_trial, rng, explore=True)
            collected = time.monotonic()
            left = 1 - env_steps / args.total_timesteps if args.anneal else 1.0
            optimizer.param_groups[0]["lr"] = learning_rate = args.learning_rate * left
            agent.to(args.device)
            trial = Trial(*(tensor.to(args.device) for tensor in vars(trial).values()))
            row = ppo_update(agent, optimizer, trial, args, rng)
            agent.log_std.data.clamp_(max=math.log(args.init_std * math.sqrt(left)))  # meta-tests have no noise
            agent.sums += sums_of(trial.transitions[:-1][trial.valid])  # now: the update saw what acting saw
            updated = time.monotonic()
            rewards, success = episode_results(trial, args.episodes_per_trial)
            row["train_return"] = mean_and_std(sums_of(torch.from_numpy(rewards.sum(2).ravel())))[0].item()
            row["train_success"] = mean_and_std(sums_of(torch.from_numpy(success.ravel())))[0].item()
            new_steps = int(sums_of(trial.valid.flatten())[1])
            env_steps += new_steps
            if process == 0 and ((iteration - 1) % args.eval_interval == 0 or env_steps >= args.total_timesteps):
                for split, results in meta_test(agent.to("cpu"), envs, args, episodes=1).items():
                    scores[f"{split}_return"] = results["rewards"].sum(2).mean().item()
                    scores[f"{split}_success"] = results["success"].mean().item()
                scores = {name: value for name, value in scores.items() if not math.isnan(value)}
                row |= scores
            elapsed = time.monotonic() - started
            seconds += elapsed
            row |= {"iteration": iteration, "env_steps": env_steps, "learning_rate": learning_rate}
            row |= {"rollout_seconds": collected - started, "update_seconds": updated - collected}
            row |= {"wall_seconds": seconds, "steps_per_second": new_steps / elapsed}
            rows.append({name: value for name, value in row.items() if not math.isnan(value)})
            if process == 0:
                save_run(run, args, agent, optimizer, rows)
                for name, value in rows[-1].items():
                    board.add_scalar(name, value, env_steps)
                board.flush()
                bar.update(new_steps)
                bar.set_postfix({"train_return": row["train_return"]} | scores)


def finish(agent: Agent, envs: VectorEnv, args: Args, run: Path, env_steps: int) -> None:
    """Meta-tests the run and analyses its memories: writes the npz files, prints the summary table."""
    print("meta-testing with frozen weights")
    tests = meta_test(agent, envs, args, args.test_episodes)
    files = {"meta_test" if split == "test" else split: arrays for split, arrays in tests.items()}
    for name, arrays in (files | analyse_memories(agent, envs, args)).items():
        write(run / f"{name}.npz", functools.partial(np.savez, **arrays))
    print(f"\n{args.env}, seed {args.seed}, {env_steps:,} steps: means over {args.test_tasks} tasks a row")
    print("episode       " + "".join(f"{episode:>9}" for episode in range(1, args.test_episodes + 1)))
    for split, arrays in tests.items():
        for name, values in (("return", arrays["rewards"].sum(2)), ("success", arrays["success"])):
            if not np.isnan(values).any():
                print(f"{split + ' ' + name:14}" + "".join(f"{value:9.2f}" for value in values.mean(0)))
    print(f"written to {run}; draw it with: python plot.py {run}")


def main(argv: list[str] | None = None, agent_class: type[Agent] = Agent, args_class: type[Args] = Args) -> int:
    """Runs a command line; returns the exit code: 2 for a user's mistake, 1 for a failed run, 130 for a stopped one."""
    signal.signal(signal.SIGTERM, signal.default_int_handler)  # stops a run as Ctrl-C does
    first = int(os.environ.get("RANK", 0)) == 0
    run, rows = None, []
    try:
        args, checkpoint = parse(sys.argv[1:] if argv is None else argv, args_class, agent_class.method)
        make_env = functools.partial(ENVS[args.env], seed=args.seed)
        envs = TaskVectorEnv(make_env, processes=min(torch.get_num_threads(), args.num_tasks))
        torch.manual_seed(args.seed)  # for the initial weights alone: all else draws from random_stream
        agent = agent_class(envs, args).to(args.device)
        optimizer = Adam(agent.parameters(), eps=1e-5, fused=True)
        if "RANK" in os.environ:  # after Adam: its imports would keep the group's threads alive, to abort the exit
            distributed.init_process_group(timeout=timedelta(hours=6))  # the meta-tests of the first may take long
        if checkpoint:
            run, rows = Path(args.resume or args.test), checkpoint["rows"]
            try:
                agent.load_state_dict(checkpoint["agent"])
                optimizer.load_state_dict(checkpoint["optimizer"])
            except (RuntimeError, ValueError) as error:
                raise UserError(f"{run}: its network has another shape than --env, --layers, ... say") from error
        elif first:
            run = Path(args.runs_dir, f"{args.env}-{agent.method}-s{args.seed}-{datetime.now():%Y%m%d-%H%M%S-%f}")
            try:
                run.mkdir(parents=True)
            except OSError:
                raise UserError(f"--runs-dir {args.runs_dir}: takes a folder that can be written") from None
        if not args.test:
            if first:
                save_run(run, args, agent, optimizer, rows)
            train(agent, optimizer, envs, args, run, rows)
        if first:
            finish(agent.to("cpu"), envs, args, run, rows[-1]["env_steps"] if rows else 0)
        all_reduce(torch.zeros(1, device=args.device))  # nobody leaves before the first is done: torchrun would end it
        return 0
    except UserError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    except RunFailed as error:
        print(f"error: {args.env}, iteration {len(rows) + 1}: {error}; {run} holds what came before", file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        print(f"\nstopped; go on with: python {sys.argv[0]} --resume {run}" if run and not args.test else "\nstopped")
        return 130
    finally:
        if distributed.is_initialized():
            distributed.destroy_process_group()


if __name__ == "__main__":
    sys.exit(main())
