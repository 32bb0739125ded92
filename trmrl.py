"""TrMRL in one file: "Transformers are Meta-Reinforcement Learners" (Melo, ICML 2022).

At each step the agent embeds its last N transitions (s, a, r, η) as working memories. A causal transformer refines them
layer by layer into episodic memories, and that of the current step conditions a Gaussian policy. PPO trains the agent
on trials: E episodes of one task, concatenated. At meta-test the weights are frozen, and attention alone adapts.

    python trmrl.py --env HalfCheetahVel --layers 4     train, meta-test, write runs/<name>/
    python trmrl.py --env PointMass                     the same on a small example, within a minute
    python trmrl.py --resume runs/<name>                go on from the last checkpoint; --test: the meta-tests alone

Paper and code, in the order of this file: first the left half of the table, then the right one.
Eq. 1, 3 to 5   self-attention      TransformerLayer          Sec. 5.1    PPO on trials  ppo_update
Sec. 3.3        T-Fixup             t_fixup_                  Sec. 5.2    meta-test      meta_test
Sec. 5.1        memory write logic  retrieve                  Figs. 7, 8  refinement     analyse_memories
Sec. 4.1        working memory φ    Agent.working_memories    App. B      tasks          HalfCheetahVel to MetaWorld
Eq. 6           episodic memories   Agent.refine              Sec. 5.1    meta-training  train
Alg. 1, App. G  acting              Agent.act, collect_trial
"""

import io
import json
import math
import os
import re
import shlex
import signal
import sys
import time
import zipfile
from dataclasses import dataclass, replace
from datetime import datetime
from importlib.metadata import version
from pathlib import Path

import gymnasium
import mujoco
import numpy as np
import torch
import tyro
from gymnasium.envs.mujoco import ant_v5, half_cheetah_v5
from gymnasium.spaces import Box
from numpy.random import Generator
from torch import Tensor, distributed, nn
from torch.distributions import Normal
from torch.optim import Adam, Optimizer
from torch.utils.tensorboard import SummaryWriter
from tqdm import tqdm

torch.set_num_threads(1)  # more threads gain nothing at these sizes, and lose much beside other programs


@dataclass
class Args:
    """TrMRL: meta-train, then meta-test with frozen weights. A word in brackets opens a group of flags."""

    env: str = "HalfCheetahVel"  # [task] HalfCheetahVel, AntDir, ML1-Reach, ML1-Push, ML45-Train or PointMass
    num_tasks: int = 20  # tasks drawn in each iteration, with one trial of each (Sec. 5.1)
    episodes_per_trial: int = 2  # E, the episodes of one task that are concatenated (Sec. 5.1)
    d_model: int = 32  # [model] d, the size of a memory
    memory_length: int = 5  # N, the number of working memories, the current one included (Sec. 4.1)
    layers: int = 4  # L, the transformer layers, each of which refines the episodic memory once (Eq. 6)
    heads: int = 2  # ω, the attention heads (Eq. 1); a divisor of d_model
    t_fixup: bool = True  # T-Fixup without LayerNorm (Sec. 3.3); else Xavier layers with LayerNorm (Fig. 10)
    init_std: float = 0.3  # initial std of the policy (learned, never above this)
    input_limit: float = 3.0  # normalised inputs are clipped to ± this many standard deviations
    min_input_std: float = 0.5  # an input that varies less is divided by this instead of its own std
    total_timesteps: int = 2_000_000  # [PPO] environment steps of meta-training, rounded up to whole iterations
    learning_rate: float = 5e-4  # Adam's learning rate
    anneal: bool = True  # lower the learning rate linearly to 0, and the policy's largest std with its square root
    gamma: float = 0.95  # discount factor
    gae_lambda: float = 0.9  # λ of generalised advantage estimation
    clip_coef: float = 0.2  # the probability ratio is clipped to 1 ± this
    update_epochs: int = 3  # passes of an update over the iteration's trials, fewer if target_kl ends it
    minibatch_size: int = 200  # steps of a minibatch, drawn from all tasks
    target_kl: float | None = 0.04  # an update ends if its minibatches' mean KL exceeds this, or the last 5's 5 × this
    max_grad_norm: float = 0.5  # the gradient is scaled down to this norm if it is larger
    eval_interval: int = 10  # [evaluation] an evaluation on test and OOD tasks every this many iterations
    test_tasks: int = 20  # tasks of a meta-test (Sec. 5.2); the refinement analysis takes 1.5 times as many
    test_episodes: int = 6  # episodes of each task in a meta-test (Fig. 5); the refinement analysis takes half as many
    seed: int = 1  # [run] fixes all that is random: tasks, initial weights, exploration
    runs_dir: str = "runs"  # the folder in which the run's own folder is made
    device: str = "cpu"  # where the network is trained, as torch names it; acting is always on the CPU
    resume: str | None = None  # a run's folder: go on from its checkpoint
    test: str | None = None  # a run's folder: repeat its meta-tests, replacing their files; --seed gives other tasks


class UserError(Exception): ...  # a mistake in what the user asked for: printed as one line, the exit code is 2


class RunFailed(Exception): ...  # the simulator, the loss or another process failed: one line, the exit code is 1


# --- The transformer (Sec. 3.2) and its initialisation (Sec. 3.3) -----------------------------------------------------
def xavier_linear(inputs: int, outputs: int) -> nn.Linear:
    linear = nn.Linear(inputs, outputs)
    nn.init.xavier_uniform_(linear.weight)
    nn.init.zeros_(linear.bias)
    return linear


class TransformerLayer(nn.Module):
    """Multi-head self-attention (Eq. 1), then a feed-forward block of width 4 d; each adds to its input."""

    def __init__(self, d_model: int, heads: int, layer_norm: bool):
        super().__init__()
        self.heads = heads
        self.query, self.key, self.value, self.output = (xavier_linear(d_model, d_model) for _ in range(4))
        self.feed_forward_in = xavier_linear(d_model, 4 * d_model)
        self.feed_forward_out = xavier_linear(4 * d_model, d_model)
        self.attention_norm = nn.LayerNorm(d_model) if layer_norm else nn.Identity()
        self.feed_forward_norm = nn.LayerNorm(d_model) if layer_norm else nn.Identity()

    def forward(self, queries: Tensor, memories: Tensor, mask: Tensor) -> tuple[Tensor, Tensor]:
        """Refines the last C memories, the queries (B, C, d), by all memories (B, N, d). Also returns α (B, ω, C, N) of
        Eq. 4. mask (B, 1, C, N), Eq. 1's M, is added: 0 where a query may attend, else a large negative number."""
        projected = self.query(queries), self.key(memories), self.value(memories)
        Q, K, V = (x.unflatten(2, (self.heads, -1)).transpose(1, 2) for x in projected)  # (B, ω, C or N, d/ω)
        # Eq. 1, where d is that of one head. Eq. 5 has another 1/√d outside of the softmax; the authors' code has none.
        alpha = (Q @ K.transpose(2, 3) / math.sqrt(Q.shape[3]) + mask).softmax(3)
        h = (alpha @ V).transpose(1, 2).flatten(2)  # Concat(h_1, …, h_ω), each the μ of Eq. 3 and 5: (B, C, d)
        x = self.attention_norm(queries + self.output(h))
        return self.feed_forward_norm(x + self.feed_forward_out(torch.relu(self.feed_forward_in(x)))), alpha


@torch.no_grad()
def t_fixup_(phi: nn.Linear, layers: nn.ModuleList) -> None:
    """T-Fixup (Sec. 3.3), in place, of layers that start as Xavier. The N of the paper's 0.67 N^(-1/4) is L here.
    As in Huang et al. (2020) and unlike the paper, queries and keys stay Xavier and the embedding is × (9 L)^(-1/4)."""
    L = len(layers)
    nn.init.normal_(phi.weight, std=phi.out_features**-0.5)  # the paper's N(0, d^(-1/2)) names the std
    phi.weight *= (9 * L) ** -0.25
    for layer in layers:
        for linear in (layer.value, layer.output, layer.feed_forward_in, layer.feed_forward_out):
            linear.weight *= 0.67 * L**-0.25


def sinusoidal_positions(length: int, d_model: int) -> Tensor:
    """The positional encoding (length, d) of Vaswani et al. (2017), Sec. 3.5."""
    frequencies = torch.exp(-math.log(10_000) * torch.arange(0, d_model, 2) / d_model)
    angles = torch.arange(length)[:, None] * frequencies
    return torch.stack([angles.sin(), angles.cos()], dim=2).flatten(1)[:, :d_model]


# --- Trials of E episodes, and the memories that the agent retrieves from them (Sec. 5.1, Alg. 1) ---------------------
def named(transitions, S: int) -> tuple:
    """s (…, S), a (…, A), r (…) and η (…) of transitions (…, S + A + 2), as views, through which it can be written."""
    return transitions[..., :S], transitions[..., S:-2], transitions[..., -2], transitions[..., -1]


@dataclass
class Trial:
    """E episodes of H steps of each of n tasks, one after the other: T = E · H steps."""

    transitions: Tensor  # (T + 1, n, S + A + 2), rows (s, a, r, η); the last has the s after the trial, and zeros
    a: Tensor  # (T, n, A), those of transitions once more
    r: Tensor  # (T, n), likewise
    log_probs: Tensor  # (T, n), log π(a | s, memory) when a was drawn
    values: Tensor  # (T + 1, n); the last is V after the trial, 0 if the last episode ended in a death
    valid: Tensor  # (T, n), False after a death till its episode ends: there s, a, r and η are 0, the rest meaningless
    success: Tensor  # (T, n), 1 or 0; NaN where not valid, or where the environment does not say


def retrieve(transitions: Tensor, t: Tensor, task: Tensor, N: int, horizon: int) -> tuple[Tensor, Tensor]:
    """D of Alg. 1: the N - 1 most recent transitions of the episode, fewer at its start, and then the current one.
    t (B,) and task (B,) name steps of the transitions (T + 1, n, S + A + 2); t = T is in the last episode. Returns
    windows (B, N, S + A + 2) and filled (B, N), False at PADs: in front, as in Alg. 1, unlike Sec. 5.1. What windows
    hold there must not be read. No memory reaches back beyond the episode's start, so TrMRL never sees an η of 1."""
    start = (t // horizon * horizon).clamp(max=len(transitions) - 1 - horizon)
    steps = t[:, None] + torch.arange(1 - N, 1, device=t.device)  # (B, N)
    return transitions[steps.clamp(min=0), task[:, None]], steps >= start[:, None]


# --- The agent: working memory (Sec. 4.1), refinement (Eq. 6), policy and value (Alg. 1) ------------------------------
class Agent(nn.Module):
    """φ, the transformer over the last N working memories, a Gaussian policy and a value on the last episodic memory.
    Shapes, with HalfCheetahVel's numbers: B = 200 steps in a minibatch (20 tasks when acting), N = 5 memories of d = 32
    numbers, S = 17 observations, A = 6 actions, T = 2 · 200 steps of n = 20 tasks. Unlike in language models, no keys
    or values are kept from step to step: a memory's position is its place in the window, which changes at each step.
    Another method is a subclass (baselines/) that overrides build, and those methods below that differ."""

    method = "TrMRL"  # its name in args.json and in figures
    evaluation_episodes = 1  # how many an evaluation during training has; the last one is scored

    def __init__(self, env: gymnasium.Env, args: Args):
        super().__init__()
        self.num_observations, self.num_actions = env.observation_space.shape[0], env.action_space.shape[0]
        self.horizon, self.input_limit, self.min_input_std = env.horizon, args.input_limit, args.min_input_std
        # Mean and variance of all transitions so far. They start as if there had been one, with mean 0 and variance 1.
        self.register_buffer("input_count", torch.ones(()))
        self.register_buffer("input_mean", torch.zeros(self.num_observations + self.num_actions + 2))
        self.register_buffer("input_var", torch.ones_like(self.input_mean))
        self.build(args)  # the network up to e^L; then its heads
        self.policy = xavier_linear(args.d_model, self.num_actions)
        nn.init.orthogonal_(self.policy.weight, 0.01)  # unlike Sec. 3.3: exploration starts around zero
        self.log_std = nn.Parameter(torch.full((self.num_actions,), math.log(args.init_std)))
        self.value = xavier_linear(args.d_model, 1)
        self.register_buffer("return_mean", torch.zeros(()))  # the return that an output of 0 of the value head means
        self.register_buffer("return_std", torch.ones(()))  # how much more return an output of 1 means

    def build(self, args: Args) -> None:
        self.memory_length = args.memory_length
        self.phi = nn.Linear(len(self.input_mean), args.d_model)
        nn.init.zeros_(self.phi.bias)
        layers = (TransformerLayer(args.d_model, args.heads, layer_norm=not args.t_fixup) for _ in range(args.layers))
        self.layers = nn.ModuleList(layers)
        if args.t_fixup:
            t_fixup_(self.phi, self.layers)
        self.register_buffer("positions", sinusoidal_positions(args.memory_length, args.d_model))
        self.register_buffer("causal", torch.ones(args.memory_length, args.memory_length, dtype=torch.bool).tril())

    def normalise(self, transitions: Tensor) -> Tensor:
        """Scales inputs to mean 0 and std 1 over all that training has seen, and clips them to ± input_limit. A std
        below min_input_std is raised to it. Else MetaWorld's objects, whose places differ by centimetres from goal to
        goal, would be as loud as all other inputs, and the agent would learn the training goals by heart."""
        std = self.input_var.sqrt().clamp(min=self.min_input_std)
        return ((transitions - self.input_mean) / std).clamp(-self.input_limit, self.input_limit)

    @torch.no_grad()
    def count_inputs(self, transitions: Tensor) -> None:
        """Updates mean and variance by transitions (steps, S + A + 2) (Chan et al. 1979)."""
        share = len(transitions) / (self.input_count + len(transitions))
        difference = transitions.mean(0) - self.input_mean
        self.input_var += share * (transitions.var(0, correction=0) - self.input_var + (1 - share) * difference**2)
        self.input_mean += share * difference
        self.input_count += len(transitions)

    @torch.no_grad()
    def rescale_value(self, returns: Tensor) -> None:
        """Rescales the value head: its output 0 now means these returns' mean, and 1 a std more. What it predicts stays
        (PopArt, van Hasselt et al. 2016). Else learning would wait till the head has grown to the returns' size."""
        mean, std = returns.mean(), returns.std(correction=0).clamp(min=0.01)
        self.value.weight *= self.return_std / std
        self.value.bias.copy_((self.value.bias * self.return_std + self.return_mean - mean) / std)
        self.return_mean.copy_(mean)
        self.return_std.copy_(std)

    def working_memories(self, windows: Tensor) -> Tensor:
        """φ(s, a, r, η) of Sec. 4.1: windows (B, N, S + A + 2) of transitions, the current one last, to (B, N, d)."""
        x = self.normalise(windows)
        x[:, -1, self.num_observations :] = 0  # Alg. 1: a, r, η are PADs; when acting they are still to come
        return self.phi(x)

    def refine(self, transitions: Tensor, t: Tensor, task: Tensor) -> tuple[list[Tensor], list[Tensor]]:
        """The current step's memories e⁰ … e^L (Eq. 6), each (B, d), and in each layer its α, (B, ω, N), of all N.
        t (B,) and task (B,) name steps of the transitions. A method without memories sets refine = None."""
        windows, filled = retrieve(transitions, t, task, self.memory_length, self.horizon)
        e = self.working_memories(windows) + self.positions  # Alg. 1: e⁰ ← φ, with a position (Sec. 3.2): (B, N, d)
        # Causal, j ≤ i (Eq. 4 prints i ≤ j), and without PADs. A PAD's own row, which nobody reads, stays finite.
        mask = torch.where(self.causal & filled[:, None], 0.0, -1e9)[:, None]  # (B, 1, N, N)
        memories, attention = [e[:, -1]], []
        for layer in self.layers:  # Alg. 1: refine episodic memories
            queries = e[:, -1:] if layer is self.layers[-1] else e  # the last layer's other rows are not read
            e, alpha = layer(queries, e, mask[:, :, -queries.shape[1] :])
            memories.append(e[:, -1])
            attention.append(alpha[:, :, -1])
        return memories, attention

    def policy_and_value(self, memory: Tensor) -> tuple[Normal, Tensor]:
        """The policy π(a | e^L), with actions (B, A), and the value, (B,), of episodic memories e^L (B, d)."""
        policy = Normal(self.policy(memory), self.log_std.exp(), validate_args=False)  # collect_trial looks for NaNs
        return policy, self.value(memory)[:, 0] * self.return_std + self.return_mean

    def forward(self, transitions: Tensor, t: Tensor, task: Tensor) -> tuple[Normal, Tensor]:
        return self.policy_and_value(self.refine(transitions, t, task)[0][-1])

    @torch.inference_mode()
    def act(self, transitions: Tensor, t: int, alive: Tensor, noise: Tensor, state) -> tuple:
        """Draws a_t ∼ π(· | e^L): returns actions (n, A), log-probabilities (n,), values (n,) and a state. transitions
        (T + 1, n, S + A + 2) hold the trial up to s_t, alive (n,) is False after a death, noise (n, A) is normal, or 0
        for the mean action. state is what the last call returned, at first None: RL² keeps its GRU's state in it."""
        policy, value = self(transitions, torch.full((len(alive),), t), torch.arange(len(alive)))
        action = policy.mean + policy.stddev * noise
        return action, policy.log_prob(action).sum(1), value, state

    def collect(self, envs: list, tasks: np.ndarray, episodes: int, rng: Generator, explore: bool) -> Trial:
        return collect_trial(self, envs, tasks, episodes, rng, explore)

    def optimizer(self, args: Args) -> Optimizer:
        return Adam(self.parameters(), lr=args.learning_rate, eps=1e-5, fused=True)

    def update(self, optimizer: Optimizer, trial: Trial, args: Args, rng: Generator, left: float) -> dict:
        """Learns from a trial; returns columns of progress.csv. left is the share of training to come, 1 at first."""
        optimizer.param_groups[0]["lr"] = args.learning_rate * left
        row = ppo_update(self, optimizer, trial, args, rng)
        self.log_std.data.clamp_(max=math.log(args.init_std * math.sqrt(left)))  # noise must go: meta-tests have none
        self.count_inputs(trial.transitions[:-1][trial.valid])  # not before the update, which must see what acting saw
        return row | {"learning_rate": args.learning_rate * left, "policy_std": self.log_std.exp().mean().item()}


# --- Collecting E episodes of each task (Alg. 1), shared among torchrun's processes -----------------------------------
def rank_and_processes() -> tuple[int, int]:
    """This process's number among torchrun's, and how many there are; 0 and 1 without torchrun."""
    return (distributed.get_rank(), distributed.get_world_size()) if distributed.is_initialized() else (0, 1)


def gather(mine: object) -> list:
    """What each of torchrun's processes has, in order; without torchrun, [mine]. Raises RunFailed if one is gone."""
    if not distributed.is_initialized():
        return [mine]
    everyones = [None] * distributed.get_world_size()
    try:
        distributed.all_gather_object(everyones, mine)
    except RuntimeError as error:
        raise RunFailed("another process of torchrun's has ended") from error
    return everyones


def collect_trial(agent: Agent, envs: list, tasks: np.ndarray, E: int, rng: Generator, explore: bool) -> Trial:
    """Alg. 1 for n tasks (n, ·) at once, each in its own environment for E episodes; with mean actions unless explore.
    Between "retrieve" and "sample" stands Agent.refine. In row t of B a, r and η are still 0 when it runs: the PADs.
    Raises RunFailed at a NaN or an infinity."""
    S, A, T, (rank, processes) = agent.num_observations, agent.num_actions, E * agent.horizon, rank_and_processes()
    mine = np.array_split(np.arange(len(tasks)), processes)[rank]
    transitions = np.zeros((T + 1, len(mine), S + A + 2), dtype=np.float32)  # B of Alg. 1, but for its PADs
    s, a, r, eta = named(transitions, S)
    log_probs, values = np.zeros_like(r[:-1]), np.zeros_like(r)
    valid, success = np.zeros_like(r[:-1], dtype=bool), np.full_like(r[:-1], np.nan)
    alive, box, state = np.ones(len(mine), dtype=bool), envs[0].action_space, None
    buffer, living = torch.from_numpy(transitions), torch.from_numpy(alive)  # the same memory, as torch sees it
    for t in tqdm(range(T), "testing", leave=False, delay=1, disable=explore or rank > 0):  # Alg. 1: while not done
        if t % agent.horizon == 0:
            seeds = int(rng.integers(2**31)) + mine
            for i, task in enumerate(mine):
                envs[i].task = tasks[task]
                s[t, i], _ = envs[i].reset(seed=int(seeds[i]))  # s_next ← s_0
            alive[:] = True
        noise = rng.standard_normal((len(tasks), A), dtype=np.float32)[mine] * explore  # drawn for all tasks
        action, log_probs[t], values[t], state = agent.act(buffer, t, living, torch.from_numpy(noise), state)  # a_t ∼ π
        valid[t] = alive
        for i in np.flatnonzero(alive):
            a[t, i] = action[i]  # B ← B ∪ (s, a, r, η), with a as it was drawn
            s_next, r[t, i], died, _, info = envs[i].step(a[t, i].clip(box.low, box.high))  # collect s_{t+1}, r_t, η_t
            success[t, i] = info.get("success", np.nan)
            alive[i] = not died
            eta[t, i] = (died or (t + 1) % agent.horizon == 0) and t < T - 1  # not at the trial's end: V looks past it
            s[t + 1, i] = 0.0 if died else s_next  # s_next ← s_{t+1}; the observation at a death is never used
    values[T] = agent.act(buffer, T, living, torch.zeros(len(mine), A), state)[2].numpy() * alive  # 0 after a death
    arrays = transitions, a[:-1], r[:-1], log_probs, values, valid, success
    trial = Trial(*(torch.from_numpy(np.concatenate(parts, axis=1)) for parts in zip(*gather(arrays))))
    if not torch.isfinite(trial.transitions).all():
        raise RunFailed("the simulator or the policy returned a NaN or an infinity; resuming would repeat it")
    return trial


# --- PPO over concatenated trials (Sec. 5.1) --------------------------------------------------------------------------
def advantages_and_returns(trial: Trial, gamma: float, gae_lambda: float) -> tuple[Tensor, Tensor]:
    """Generalised advantage estimation along the whole trial, across episodes' ends; two (T, n), for valid steps.
    "We concatenate these episodes to form a single trajectory and we maximize the discounted cumulative reward of this
    trajectory" (Sec. 5.1). The steps after a death pass without reward; if they were left out, the next episode would
    begin at once, and dying would cost nothing. For example, an episode of 8 steps dies at t = 5. Then V_7 = γ V_8 and
    V_6 = γ V_7, where V_8 is the value of the next episode's start; δ_6 = δ_7 = 0, and δ_5 = r_5 + γ³ V_8 - V_5."""
    advantages = torch.zeros_like(trial.r)
    next_value, advantage = trial.values[-1], 0.0
    for t in reversed(range(len(advantages))):
        value = torch.where(trial.valid[t], trial.values[t], gamma * next_value)
        delta = trial.r[t] + gamma * next_value - value
        advantage = delta + gamma * gae_lambda * advantage
        advantages[t], next_value = advantage, value
    return advantages, advantages + trial.values[:-1]


def clipped_objective(ratio: Tensor, advantages: Tensor, clip_coef: float) -> Tensor:
    """PPO's objective of each step (Schulman et al. 2017, Eq. 7), to be maximised."""
    clipped = ratio.clamp(1 - clip_coef, 1 + clip_coef)
    return torch.minimum(ratio * advantages, clipped * advantages)


def ppo_update(agent: Agent, optimizer: Optimizer, trial: Trial, args: Args, rng: Generator) -> dict:
    """Up to update_epochs passes over the trial's valid steps, in minibatches that mix all tasks; returns statistics.
    Under torchrun each process takes its share of every minibatch, and gradients are summed.
    Raises RunFailed if a gradient is not finite, before it is applied."""
    rank, processes = rank_and_processes()
    advantages, returns = advantages_and_returns(trial, args.gamma, args.gae_lambda)
    t, task = trial.valid.nonzero(as_tuple=True)
    agent.rescale_value(returns[t, task])
    mean, std = advantages[t, task].mean(), advantages[t, task].std(correction=0).clamp(min=0.01)
    explained_variance = 1 - (std / agent.return_std) ** 2  # as advantage = return - value
    advantages = (advantages - mean) / std
    number = math.ceil(len(t) / args.minibatch_size)  # of minibatches in an epoch
    size = len(t) / number  # of a minibatch, on average
    epochs = [torch.from_numpy(rng.permutation(len(t))).tensor_split(number) for _ in range(args.update_epochs)]
    statistics, norms = [], []
    for minibatch in [minibatch[rank::processes] for epoch in epochs for minibatch in epoch]:
        at = t[minibatch], task[minibatch]
        policy, value = agent(trial.transitions, *at)
        log_ratio = policy.log_prob(trial.a[at]).sum(1) - trial.log_probs[at]
        ratio = log_ratio.exp()
        policy_loss = -clipped_objective(ratio, advantages[at], args.clip_coef).sum() / size
        value_loss = 0.5 * ((value - returns[at]) / agent.return_std).square().sum() / size  # in the value head's unit
        optimizer.zero_grad()
        (policy_loss + value_loss).backward()
        approx_kl, clipped = (ratio - 1 - log_ratio).sum(), ((ratio - 1).abs() > args.clip_coef).sum()
        numbers = policy_loss, value_loss, policy.entropy().sum() / size, approx_kl / size, clipped / size
        statistics.append(torch.stack(numbers).detach())
        if processes > 1:
            shares = [*(x.grad for x in agent.parameters() if x.grad is not None), statistics[-1]]
            total = sum(gather(nn.utils.parameters_to_vector(shares).cpu().numpy()))
            nn.utils.vector_to_parameters(torch.from_numpy(total).to(args.device), shares)
        kl = torch.stack(statistics)[:, 3]  # one minibatch's is noisy; the last 5 show a policy that is suddenly lost
        if args.target_kl is not None and (kl.mean() > args.target_kl or kl[-5:].mean() > 5 * args.target_kl):
            break
        norms.append(nn.utils.clip_grad_norm_(agent.parameters(), args.max_grad_norm).item())
        if not math.isfinite(norms[-1]):
            raise RunFailed("the gradient is not finite")
        optimizer.step()
    names = ("policy_loss", "value_loss", "entropy", "approx_kl", "clip_fraction")
    row = dict(zip(names, torch.stack(statistics).mean(0).tolist())) | {"gradient_steps": len(norms)}
    return row | {"explained_variance": explained_variance.item(), "gradient_norm": torch.tensor(norms).mean().item()}


# --- Meta-tests with frozen weights: adaptation and OOD (Sec. 5.2), refinement (Fig. 7), latents (Fig. 8) -------------
def random_stream(seed: int, purpose: str, iteration: int = 0) -> Generator:
    """Random numbers that depend on the arguments alone, so that a resumed run draws what an unbroken one would."""
    purposes = ("train tasks", "train", "test tasks", "ood tasks", "meta-test", "refinement")
    return np.random.default_rng([seed, purposes.index(purpose), iteration])


def episode_results(trial: Trial, episodes: int) -> tuple[np.ndarray, np.ndarray]:
    """The rewards of every step (n, E, H), and whether each episode (n, E) succeeded at any step: 1, 0 or NaN."""
    rewards, success = (x.T.unflatten(1, (episodes, -1)).cpu().numpy() for x in (trial.r, trial.success))
    return rewards, np.fmax.reduce(success, axis=2)


def meta_test(agent: Agent, envs: list, args: Args, episodes: int) -> dict[str, dict[str, np.ndarray]]:
    """Adaptation and OOD (Sec. 5.2; Figs. 5, 6, 9): test_tasks tasks, so many episodes of each, with mean actions.
    Returns for "test" and, where there are such tasks, "ood": rewards (tasks, episodes, H), success (tasks, episodes),
    tasks (tasks, ·) and observations (tasks, H, S) of the first episode. A seed has its own tasks and starts."""
    results = {}
    for split in envs[0].splits[1:]:
        tasks = envs[0].sample_tasks(split, args.test_tasks, random_stream(args.seed, f"{split} tasks"))
        trial = agent.collect(envs, tasks, episodes, random_stream(args.seed, "meta-test"), explore=False)
        rewards, success = episode_results(trial, episodes)
        s = named(trial.transitions[: agent.horizon], agent.num_observations)[0].transpose(0, 1).numpy()
        results[split] = dict(rewards=rewards, success=success, tasks=tasks, observations=s)
    return results


@torch.no_grad()
def analyse_memories(agent: Agent, envs: list, args: Args) -> dict[str, dict[str, np.ndarray]]:
    """What each layer's memories hold, for refinement.npz, working_memories.npz and attention.npz; of every fifth step.
    Fig. 7, representation error: 1 - cos(e^l, e^L), averaged. Regression error: the mean squared error of a linear
    model from e^l to the policy's mean action, fitted on two tasks of every three, tested on the third. Both are 0 in
    the last layer by construction. Fig. 8: φ of the first episode. Attention: the current step's, a mean over steps."""
    rng = random_stream(args.seed, "refinement")
    tasks = envs[0].sample_tasks("test", math.ceil(1.5 * args.test_tasks), rng)
    trial = agent.collect(envs, tasks, math.ceil(args.test_episodes / 2), rng, explore=False)
    trial.valid[torch.arange(len(trial.valid)) % 5 > 0] = False
    t, task = trial.valid.nonzero(as_tuple=True)
    memories, attention = agent.refine(trial.transitions, t, task)
    memories = torch.stack(memories)  # (L + 1, steps, d)
    actions = agent.policy(memories[-1]).double().numpy()  # (steps, A)
    fitted = task.numpy() % 3 < 2  # not the first two thirds, as ML45's tasks are sorted by environment
    errors = {"representation_error": 1 - torch.cosine_similarity(memories, memories[-1:], dim=2).mean(1).numpy()}
    features = torch.cat([memories, torch.ones_like(memories[..., :1])], dim=2).double().numpy()  # with an intercept
    weights = np.linalg.pinv(features[:, fitted], rcond=1e-3) @ actions[fitted]  # without directions that hardly vary
    errors["regression_mse"] = np.square(features[:, ~fitted] @ weights - actions[~fitted]).mean((1, 2))
    t, task = t[t < agent.horizon], task[t < agent.horizon]
    embedding = agent.phi(agent.normalise(trial.transitions[t, task])).numpy()
    files = {"refinement": errors, "working_memories": {"embedding": embedding, "task": tasks[task.numpy(), 0]}}
    if attention:
        files["attention"] = {"weights": torch.stack(attention).mean((1, 2)).numpy()}  # (L, N), means over steps, heads
    return files


# --- Tasks and environments (App. B) ----------------------------------------------------------------------------------
class PointMass(gymnasium.Env):
    """A point mass on a line that must reach a hidden velocity: the smallest example of a task distribution.
    A task distribution is a gymnasium.Env that is made with a seed and has, besides reset and step:
    horizon, the steps of an episode, which no truncation ends; splits, ("train", "test") and, if there is one, "ood";
    sample_tasks(split, n, rng), which returns n tasks as rows of numbers (n, ·); task, one such row, set before reset.
    Optional: info["success"] of each step; standing_still, the mean return of an agent that does not move."""

    horizon, splits, task, standing_still = 20, ("train", "test", "ood"), np.zeros(1), -10.0
    observation_space, action_space = Box(-np.inf, np.inf, (1,), np.float64), Box(-1.0, 1.0, (1,))

    def __init__(self, seed: int): ...

    def sample_tasks(self, split: str, n: int, rng: Generator) -> np.ndarray:
        return rng.uniform(1.0, 1.5, (n, 1)) if split == "ood" else rng.uniform(-1.0, 1.0, (n, 1))

    def reset(self, *, seed: int | None = None, options: dict | None = None) -> tuple[np.ndarray, dict]:
        super().reset(seed=seed)
        self.velocity = self.np_random.uniform(-0.1, 0.1, 1)
        return self.velocity, {}

    def step(self, action: np.ndarray) -> tuple:
        self.velocity = self.velocity + 0.5 * action
        distance = abs(self.velocity[0] - self.task[0])
        return self.velocity, -distance, False, False, {"success": distance < 0.1}


class HalfCheetahVel(half_cheetah_v5.HalfCheetahEnv):
    """A half cheetah that must run at a hidden target velocity v*, in m/s: r = -|v - v*| - 0.05 ‖a‖²."""

    horizon, splits, task, standing_still = 200, ("train", "test", "ood"), np.zeros(1), -300.0

    def __init__(self, seed: int):
        super().__init__()
        self.model.opt.disableflags |= mujoco.mjtDisableBit.mjDSBL_AUTORESET  # so that a diverged simulation shows

    def sample_tasks(self, split: str, n: int, rng: Generator) -> np.ndarray:
        return rng.uniform(3.0, 4.0, (n, 1)) if split == "ood" else rng.uniform(0.0, 3.0, (n, 1))

    def step(self, action: np.ndarray) -> tuple:
        before = self.data.qpos[0]  # as gymnasium's step, without its reward and info, a third of its time
        self.do_simulation(action, self.frame_skip)
        velocity = (self.data.qpos[0] - before) / self.dt
        reward = -abs(velocity - self.task[0]) - 0.05 * np.dot(action, action)
        return self._get_obs(), reward, False, False, {}


class AntDir(ant_v5.AntEnv):
    """An ant that must run forward or backward: r = velocity along the goal + 1 - 0.5 ‖a‖² - contact cost.
    A task is the goal's angle (rad). A torso outside of [0.2, 1] m or a state that is not finite ends an episode."""

    horizon, splits, task, standing_still = 200, ("train", "test"), np.zeros(1), 200.0

    def __init__(self, seed: int):
        super().__init__(include_cfrc_ext_in_observation=False)
        self.model.opt.disableflags |= mujoco.mjtDisableBit.mjDSBL_AUTORESET

    def sample_tasks(self, split: str, n: int, rng: Generator) -> np.ndarray:
        return np.resize([0.0, math.pi], (n, 1))  # the two in turn, so that each batch holds both

    def step(self, action: np.ndarray) -> tuple:
        observation, reward, terminated, truncated, info = super().step(action)
        reward += math.cos(self.task[0]) * info["x_velocity"] - info["reward_forward"]
        return observation, reward if np.isfinite(reward) else 0.0, terminated, truncated, info


class MetaWorld(gymnasium.Env):
    """MetaWorld's ML1 (one environment, 50 training goals, 50 held out) or ML45-Train (45, tested on training's goals).
    A task is a number, 100 · environment + goal, goals from 50 on being held out. The observation hides the goal."""

    horizon, splits, task = 500, ("train", "test"), np.zeros(1)
    observation_space, action_space = Box(-np.inf, np.inf, (39,), np.float64), Box(-1.0, 1.0, (4,))
    goals: dict[tuple, list] = {}  # by environment and seed: 50 for training, then 50 held out
    idle: dict[str, list] = {}  # by name: simulators that no copy of this class is using; 24 MB and 0.2 s each

    def __init__(self, seed: int, name: str | None = None):
        import metaworld  # here, as it takes a second and only MetaWorld needs it

        self.names = [name] if name else list(metaworld.env_dict.ML45_V3["train"])
        self.held_out, self.seed, self.name, self.simulator = name is not None, seed, None, None
        self.make_benchmark, self.classes = metaworld.ML1, metaworld.env_dict.ALL_V3_ENVIRONMENTS

    def sample_tasks(self, split: str, n: int, rng: Generator) -> np.ndarray:
        """Each environment and each goal comes once before any comes again. Sorted, so that a process needs few."""
        environments = np.sort(np.resize(rng.permutation(len(self.names)), n))
        goals = np.resize(rng.permutation(50), n) + (50 if split == "test" and self.held_out else 0)
        return (100 * environments + goals)[:, None]

    def reset(self, *, seed: int | None = None, options: dict | None = None) -> tuple[np.ndarray, dict]:
        super().reset(seed=seed)
        name, goal = self.names[int(self.task[0]) // 100], int(self.task[0]) % 100
        if (name, self.seed) not in self.goals:
            benchmark = self.make_benchmark(name, self.seed)
            self.goals[name, self.seed] = benchmark.train_tasks + benchmark.test_tasks
        if name != self.name:
            self.idle.setdefault(self.name, []).append(self.simulator)
            self.simulator = self.idle[name].pop() if self.idle.get(name) else self.classes[name]()
            self.name = name
        self.simulator.set_task(self.goals[name, self.seed][goal])
        return self.simulator.reset()

    def step(self, action: np.ndarray) -> tuple:
        return self.simulator.step(action)


ENVS = {"PointMass": PointMass, "HalfCheetahVel": HalfCheetahVel, "AntDir": AntDir, "ML45-Train": MetaWorld}
ENVS |= {"ML1-Reach": lambda seed: MetaWorld(seed, "reach-v3"), "ML1-Push": lambda seed: MetaWorld(seed, "push-v3")}
ANT_AND_ML1 = dict(heads=4, learning_rate=7e-4, minibatch_size=400, update_epochs=10)
DEFAULTS = {  # Args has HalfCheetahVel's values; results/tuning.md has the reasons for these
    "PointMass": dict(num_tasks=40, layers=2, d_model=16, gamma=0.9, learning_rate=3e-3, total_timesteps=64_000),
    "AntDir": ANT_AND_ML1 | dict(num_tasks=10, total_timesteps=4_000_000),
    "ML1-Reach": ANT_AND_ML1 | dict(init_std=1.0, memory_length=10, update_epochs=3, total_timesteps=4_000_000),
    "ML1-Push": ANT_AND_ML1 | dict(init_std=1.0, target_kl=None, total_timesteps=3_000_000),
    "ML45-Train": dict(
        heads=4, init_std=1.0, num_tasks=25, update_epochs=6, target_kl=None, total_timesteps=9_000_000, test_tasks=45
    ),
}


# --- A run: flags checked, checkpoint, outer loop ---------------------------------------------------------------------
def default_args(args_class: type[Args], env: str) -> Args:
    """DEFAULTS of an environment, less what args_class sets itself, and its own_defaults. Raises UserError."""
    if env not in ENVS:
        raise UserError(f"--env {env}: takes one of {', '.join(ENVS)}")
    values = {name: x for name, x in DEFAULTS.get(env, {}).items() if getattr(args_class, name) == getattr(Args, name)}
    return args_class(env=env, **values | getattr(args_class, "own_defaults", {}).get(env, {}))


def read_run(folder: str, args_class: type[Args], method: str) -> tuple[Args, dict]:
    """A stored run's flags, and its checkpoint. Raises UserError unless it is a whole run of this method."""
    path, problem = Path(folder, "checkpoint.pt"), f"--resume, --test: {folder} "
    try:
        if zipfile.ZipFile(path).testzip():  # a checksum is wrong, which torch.load would not notice
            raise zipfile.BadZipFile
        checkpoint = torch.load(path, map_location="cpu", weights_only=True)
        values = dict(checkpoint["args"])
        made_by, *_ = values.pop("method"), values.pop("versions"), values["env"], checkpoint["rows"]
    except Exception as error:  # of many kinds, as the file may be missing, damaged or something else
        raise UserError(problem + "is no run's folder, or its checkpoint.pt is damaged") from error
    if made_by != method:
        raise UserError(problem + f"is a run of {made_by}, not of {method}")
    if unknown := set(values) - set(vars(args_class())):
        raise UserError(problem + f"was made with flags that are not known here: {', '.join(unknown)}")
    return replace(default_args(args_class, values["env"]), **values), checkpoint  # flags newer than the run: defaults


def set_up(argv: list[str], agent_class: type[Agent], args_class: type[Args]) -> tuple[Agent, list, Args, dict, Path]:
    """Returns the agent and environments that the flags ask for, the flags, the checkpoint of --resume or --test (else
    {}) and the run's folder. Raises UserError for an impossible value, or one that would make a stored run another."""
    argv = [re.sub(r"(^|=)(\d+e\d\d?)$", lambda x: x[1] + str(int(float(x[2]))), word) for word in argv]  # 1e6 is whole
    asked = tyro.cli(args_class, args=[flag for flag in argv if flag not in ("-h", "--help")])
    folder = asked.test if asked.resume is None else asked.resume
    before, checkpoint = default_args(args_class, asked.env), {}
    if folder is not None:
        before, checkpoint = read_run(folder, args_class, agent_class.method)
    args, changed = tyro.cli(args_class, args=argv, default=before), ""
    may_change = ["device", "test_tasks", "test_episodes", "seed" if args.test else "eval_interval"]
    may_change += ["total_timesteps"] if args.resume and not args.anneal else []  # annealing depends on the total
    limits = {"seed": (0, 2**31 - 1), "gamma": (0, 1), "gae_lambda": (0, 1), "minibatch_size": (1, 10**9)}
    limits |= {"test_tasks": (2, 10**4), "total_timesteps": (before.total_timesteps if checkpoint else 1, 10**12)}
    for name, value in vars(args).items():
        flag = f"--{name.replace('_', '-')} {value}"
        if checkpoint and name not in may_change and value not in (getattr(before, name), folder):
            changes = ", ".join(may_change).replace("_", "-")
            raise UserError(f"{flag}: {folder} has {getattr(before, name)}, and only {changes} can change")
        low, high = limits.get(name, (1, 10**4) if type(value) is int else (1e-9, 1e9))
        if type(value) in (int, float) and not low <= value <= high:
            raise UserError(f"{flag}: takes a number from {low:g} to {high:g}")
        if value != getattr(before, name) and name not in ("seed", "runs_dir", "device"):
            changed += flag[1:].replace(" ", "-")  # becomes part of the folder's name
    if args.d_model % args.heads:
        raise UserError(f"--heads {args.heads}: takes a divisor of --d-model {args.d_model}")
    try:
        torch.zeros(1, device=args.device).item()
    except (RuntimeError, AssertionError, ImportError):
        raise UserError(f"--device {args.device}: takes a device that torch finds here, such as cpu") from None
    seed = before.seed if checkpoint else args.seed  # of ML1's goals, which a test's own seed must not change
    envs = [ENVS[args.env](seed=seed) for _ in range(max(args.num_tasks, math.ceil(1.5 * args.test_tasks)))]
    torch.manual_seed(args.seed)  # for the initial weights alone: all else draws from random_stream
    agent = agent_class(envs[0], args)
    try:
        agent.load_state_dict(checkpoint.get("agent", agent.state_dict()))
    except RuntimeError as error:
        raise UserError(f"--resume, --test: {folder} has another network than its flags make here") from error
    name = f"{args.env}-{agent.method}{changed[:150]}-s{args.seed}-{datetime.now():%Y%m%d-%H%M%S-%f}"
    return agent, envs, args, checkpoint, Path(folder or Path(args.runs_dir, name))


def load(run: str | Path, agent_class: type[Agent] = Agent, args_class: type[Args] = Args, **changes) -> tuple:
    """A stored run's agent, environments and args, for notebooks and scripts. Raises UserError.
    changes are what --test takes: test_tasks, test_episodes, and seed for other tasks. A run of another method needs
    its two classes: load(run, rl2.RL2, rl2.Args)."""
    flags = [f"--{name.replace('_', '-')}={value}" for name, value in changes.items()]
    return set_up(["--test", str(Path(run)), *flags], agent_class, args_class)[:3]


def write(path: Path, save) -> None:
    """Writes to path what save(file) does, by way of a temporary file, so that path is never half-written."""
    content, temporary = io.BytesIO(), path.with_name(path.name + ".tmp")
    save(content)
    try:
        temporary.write_bytes(content.getvalue())
        os.replace(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)


def save_run(run: Path, args: Args, agent: Agent, optimizer: Optimizer, rows: list[dict]) -> None:
    """Writes checkpoint.pt, which is all that resuming needs, and for plots and people args.json and progress.csv."""
    values = {name: value for name, value in vars(args).items() if name not in ("resume", "test")}
    libraries = {name: version(name) for name in ("torch", "mujoco", "gymnasium", "metaworld", "numpy")}
    values |= {"method": agent.method, "versions": libraries}
    checkpoint = {"args": values, "rows": rows, "agent": agent.state_dict(), "optimizer": optimizer.state_dict()}
    write(run / "checkpoint.pt", lambda file: torch.save(checkpoint, file))
    write(run / "args.json", lambda file: file.write(json.dumps(values, indent=2).encode()))
    columns = """iteration env_steps wall_seconds train_return train_success test_return test_success ood_return
        steps_per_second rollout_seconds update_seconds gradient_steps policy_loss value_loss entropy approx_kl
        clip_fraction explained_variance learning_rate""".split()
    columns = list(dict.fromkeys([*columns, *(name for row in rows for name in row)]))  # then those of a method's own
    table = [columns] + [[str(row.get(name, "")) for name in columns] for row in rows]
    write(run / "progress.csv", lambda file: file.writelines((",".join(line) + "\n").encode() for line in table))


def train(agent: Agent, optimizer: Optimizer, envs: list, args: Args, run: Path | None, rows: list[dict]) -> None:
    """Meta-training (Sec. 5.1), going on where rows, those of progress.csv, end; adds a row for each iteration.
    An iteration's random numbers depend only on the seed and its number, so that a resumed run equals an unbroken one.
    Torchrun's processes all do the same, except in collect_trial and ppo_update; only the first has a run to write."""
    env_steps, seconds = (rows[-1]["env_steps"], rows[-1]["wall_seconds"]) if rows else (0, 0.0)
    scores = {}  # the latest ones, shown beside the progress bar
    if run:
        save_run(run, args, agent, optimizer, rows)
        board = SummaryWriter(run)
        board.add_text("flags", "".join(f"    {name} = {value}\n" for name, value in vars(args).items()))
    with tqdm(total=args.total_timesteps, initial=env_steps, unit="step", unit_scale=True, disable=not run) as bar:
        while env_steps < args.total_timesteps:
            started, iteration = time.monotonic(), len(rows) + 1
            left = 1 - env_steps / args.total_timesteps if args.anneal else 1.0
            tasks = envs[0].sample_tasks("train", args.num_tasks, random_stream(args.seed, "train tasks", iteration))
            rng = random_stream(args.seed, "train", iteration)
            trial = agent.to("cpu").collect(envs, tasks, args.episodes_per_trial, rng, explore=True)
            collected = time.monotonic()
            trial = Trial(*(tensor.to(args.device) for tensor in vars(trial).values()))
            row = agent.to(args.device).update(optimizer, trial, args, rng, left)
            updated = time.monotonic()
            rewards, success = episode_results(trial, args.episodes_per_trial)
            row |= {"train_return": rewards.sum(2).mean().item(), "train_success": success.mean().item()}
            new_steps = int(trial.valid.sum())
            env_steps += new_steps
            if (iteration - 1) % args.eval_interval == 0 or env_steps >= args.total_timesteps:
                for split, results in meta_test(agent.to("cpu"), envs, args, agent.evaluation_episodes).items():
                    row[f"{split}_return"] = results["rewards"][:, -1].sum(1).mean().item()
                    row[f"{split}_success"] = results["success"][:, -1].mean().item()
            elapsed = time.monotonic() - started
            seconds += elapsed
            row |= dict(iteration=iteration, env_steps=env_steps, steps_per_second=new_steps / elapsed)
            row |= dict(wall_seconds=seconds, rollout_seconds=collected - started, update_seconds=updated - collected)
            rows.append({name: value for name, value in row.items() if not math.isnan(value)})
            if run:
                save_run(run, args, agent, optimizer, rows)
                for name, value in rows[-1].items():
                    board.add_scalar(name, value, env_steps)
                board.flush()
                bar.update(new_steps)
                scores |= {name: value for name, value in rows[-1].items() if name.endswith(("_return", "_success"))}
                bar.set_postfix(scores)


def finish(agent: Agent, envs: list, args: Args, run: Path | None, rows: list[dict]) -> None:
    """Meta-tests the run and analyses its memories. The process that has a run prints a table and writes the files."""
    tests = meta_test(agent, envs, args, args.test_episodes)
    env_steps = rows[-1]["env_steps"] if rows else 0
    if run:  # before all that may fail, as the table is worth its minutes
        print(f"\n{args.env}, seed {args.seed}, {env_steps:,} steps: means over {args.test_tasks} tasks a row")
        print("episode       " + "".join(f"{episode:>9}" for episode in range(1, args.test_episodes + 1)))
        for split, arrays in tests.items():
            for name, values in (("return", arrays["rewards"].sum(2)), ("success", arrays["success"])):
                if not np.isnan(values).any():
                    print(f"{split + ' ' + name:14}" + "".join(f"{value:9.2f}" for value in values.mean(0)))
    files = {"meta_test" if split == "test" else split: arrays for split, arrays in tests.items()}
    files |= analyse_memories(agent, envs, args) if agent.refine is not None else {}
    if not run:
        return
    for name, arrays in files.items():
        arrays |= {"seed": args.seed, "env_steps": env_steps}  # what the file was made with
        write(run / f"{name}.npz", lambda file, arrays=arrays: np.savez(file, **arrays))
    print(f"\nwritten to {run}; draw it with: {shlex.join(['python', 'plot.py', str(run)])}")


def main(argv: list[str] | None = None, agent_class: type[Agent] = Agent, args_class: type[Args] = Args) -> int:
    """Runs a command line; returns the exit code: 2 for a user's mistake, 1 for a failure, 130 for an interruption."""
    under_torchrun, run, rows = distributed.is_torchelastic_launched(), None, []
    if argv is None:  # from a terminal, which may not know η, and where | head -1 may end the output
        sys.stdout.reconfigure(errors="replace")
        signal.signal(signal.SIGPIPE, signal.SIG_DFL)
        signal.signal(signal.SIGTERM, signal.default_int_handler)  # stops a run as Ctrl-C does
    try:
        agent, envs, args, checkpoint, run = set_up(sys.argv[1:] if argv is None else argv, agent_class, args_class)
        if under_torchrun and args.device == "cuda":
            torch.cuda.set_device(int(os.environ["LOCAL_RANK"]) % torch.cuda.device_count())
        optimizer = agent.to(args.device).optimizer(args)
        if under_torchrun:  # after Adam, whose imports would keep the group's threads alive and make the exit abort
            distributed.init_process_group("gloo")
            run = run if distributed.get_rank() == 0 else None  # the others write nothing
        if checkpoint:
            optimizer.load_state_dict(checkpoint["optimizer"])
            rows = checkpoint["rows"]
        elif run:
            try:
                run.mkdir(parents=True)
            except OSError:
                raise UserError(f"--runs-dir {args.runs_dir}: takes a folder that can be written") from None
        if run:
            size = sum(parameter.numel() for parameter in agent.parameters())
            still = f", standing still returns {envs[0].standing_still:g}" if hasattr(envs[0], "standing_still") else ""
            print(f"{run}: {size:,} parameters, {args.device}, processes {rank_and_processes()[1]}{still}", flush=True)
        if not args.test:
            train(agent, optimizer, envs, args, run, rows)
        finish(agent.to("cpu"), envs, args, run, rows)
        return 0
    except UserError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    except (RunFailed, OSError, MemoryError) as error:
        print(f"error: {error}" + (f"; {run} holds what came before" if run else ""), file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        go_on = f"; go on with: {shlex.join(['python', sys.argv[0], '--resume', str(run)])}"
        print("\nstopped" + (go_on if run and (run / "checkpoint.pt").exists() and not args.test else ""))
        return 130
    finally:
        if distributed.is_initialized():
            distributed.destroy_process_group()


if __name__ == "__main__":
    sys.exit(main())
