"""TrMRL in one file: "Transformers are Meta-Reinforcement Learners" (Melo, ICML 2022).

At each step the agent embeds its last N transitions (s, a, r, η) as working memories, a causal transformer refines them
layer by layer into an episodic memory, and the last one conditions a Gaussian policy. PPO trains it on trials: E episodes
of one task, concatenated. At meta-test the weights are frozen; adapting is attention alone.

    python trmrl.py --env HalfCheetahVel --layers 4     train, meta-test, write runs/<name>/
    python trmrl.py --resume runs/<name>                go on from the last checkpoint
    python trmrl.py --test runs/<name>                  the meta-tests alone

Paper                                      Here, in this order
Eq. 1, Eq. 4   self-attention              TransformerLayer
Sec. 3.3       T-Fixup                     t_fixup_
Sec. 4.1       working memory φ, e⁰        Agent.working_memories
Eq. 6          episodic memories e¹ … e^L  Agent.refine
Sec. 5.1       memory write logic          retrieve
Alg. 1         acting                      collect_trial
Sec. 5.1       PPO on concatenated trials  advantages_and_returns, ppo_update
Sec. 5.2       meta-test, OOD              meta_test
Fig. 7, App. C refinement, latents         analyse_memories
App. B         tasks and environments      HalfCheetahVel, AntDir, MetaWorld
Sec. 5.1       meta-training               train
"""

import collections
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
from dataclasses import asdict, dataclass
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
from torch import distributed, nn
from torch.distributions import Normal
from torch.utils.tensorboard import SummaryWriter
from tqdm import tqdm


@dataclass
class Args:
    """TrMRL: meta-train on a distribution of tasks, then meta-test with frozen weights."""

    env: str = "HalfCheetahVel"  # task distribution (App. B), a name in ENVS
    seed: int = 1  # everything random follows from it: tasks, weights, exploration
    total_timesteps: int = 4_000_000  # environment steps of meta-training
    num_tasks: int = 20  # tasks a batch; each gives one trial an iteration (Sec. 5.1)
    episodes_per_trial: int = 2  # E, the episodes of one task that are concatenated (Sec. 5.1)
    memory_length: int = 5  # N, the working memories in sight, the current one included (Sec. 4.1)
    layers: int = 4  # L, the transformer layers, each refining the episodic memory once (Eq. 6)
    heads: int = 4  # ω, the attention heads (Eq. 1); a divisor of d_model
    d_model: int = 32  # d, the size of a memory; the feed-forward block is four times as wide
    t_fixup: bool = True  # initialise by T-Fixup, no LayerNorm (Sec. 3.3); else Xavier and LayerNorm (Fig. 10)
    init_std: float = 0.3  # initial standard deviation of the Gaussian policy; it is learned
    input_limit: float = 3.0  # normalised inputs are kept within ± this many standard deviations
    learning_rate: float = 5e-4  # of Adam
    anneal_lr: bool = True  # lower the learning rate linearly to 0
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
    runs_dir: Path = Path("runs")  # where the run's folder is made
    device: str = "cpu"  # where the network is trained, as torch names it; it always acts on the CPU
    resume: Path | None = None  # a run's folder: go on from its checkpoint; other flags replace the run's own
    test: Path | None = None  # a run's folder: only repeat the meta-tests of its checkpoint


# --- Agent: working memory (Sec. 4.1), transformer (Sec. 3.2), T-Fixup (Sec. 3.3), policy and value (Alg. 1) ----------


def xavier_linear(inputs: int, outputs: int) -> nn.Linear:
    linear = nn.Linear(inputs, outputs)
    nn.init.xavier_uniform_(linear.weight)
    nn.init.zeros_(linear.bias)
    return linear


class TransformerLayer(nn.Module):
    """Multi-head self-attention (Eq. 1), then a position-wise feed-forward block, each with a residual connection."""

    def __init__(self, d_model: int, heads: int, layer_norm: bool):
        super().__init__()
        self.heads = heads
        self.query, self.key, self.value, self.output = (xavier_linear(d_model, d_model) for _ in range(4))
        self.feed_forward_in = xavier_linear(d_model, 4 * d_model)
        self.feed_forward_out = xavier_linear(4 * d_model, d_model)
        self.attention_norm = nn.LayerNorm(d_model) if layer_norm else nn.Identity()
        self.feed_forward_norm = nn.LayerNorm(d_model) if layer_norm else nn.Identity()

    def forward(self, queries: torch.Tensor, memories: torch.Tensor, mask: torch.Tensor) -> tuple:
        """Refines queries (B, Q, d), the last Q of memories (B, N, d). Returns them and α (B, ω, Q, N) of Eq. 4.

        mask (B, 1, Q, N) is M of Eq. 1, to be added: 0 where a memory may be attended to, else a very negative number.
        """
        split = (self.heads, -1)
        Q = self.query(queries).unflatten(2, split).transpose(1, 2)  # (B, ω, Q, d/ω)
        K = self.key(memories).unflatten(2, split).transpose(1, 2)  # (B, ω, N, d/ω)
        V = self.value(memories).unflatten(2, split).transpose(1, 2)
        # Eq. 1, with the d of one head. Eq. 5 has a second 1/√d, outside of the softmax; the authors' code has not.
        alpha = (Q @ K.transpose(2, 3) / math.sqrt(Q.shape[3]) + mask).softmax(3)
        h = (alpha @ V).transpose(1, 2).flatten(2)  # Concat(h_1 … h_ω): (B, Q, d)
        x = self.attention_norm(queries + self.output(h))
        return self.feed_forward_norm(x + self.feed_forward_out(F.relu(self.feed_forward_in(x)))), alpha


@torch.no_grad()
def t_fixup_(phi: nn.Linear, layers: nn.ModuleList) -> None:
    """T-Fixup (Sec. 3.3; Huang et al. 2020), in place, on layers that are Xavier already.

    The paper's N in 0.67 N^(-1/4) is the number of layers, L here. "The linear projection matrices in each attention
    block" are W_v and W_o: queries and keys stay Xavier, as in Huang et al. (the authors' code scales them too).
    The input embedding's further (9 L)^(-1/4) is Huang et al.'s; the paper leaves it out.
    """
    L = len(layers)
    nn.init.normal_(phi.weight, std=phi.out_features**-0.5)
    phi.weight *= (9 * L) ** -0.25
    for layer in layers:
        for linear in (layer.value, layer.output, layer.feed_forward_in, layer.feed_forward_out):
            linear.weight *= 0.67 * L**-0.25


def sinusoidal_positions(length: int, d_model: int) -> torch.Tensor:
    """Positional encoding (length, d) of Vaswani et al. (2017), Sec. 3.5."""
    frequencies = torch.exp(-math.log(10_000) * torch.arange(0, d_model, 2) / d_model)
    angles = torch.arange(length)[:, None] * frequencies
    return torch.stack([angles.sin(), angles.cos()], dim=2).flatten(1)[:, :d_model]


def mean_and_std(sums: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Mean and standard deviation, at least 0.01, from the sums (3, ...) of 1, x and x²."""
    mean, square = sums[1:] / sums[0]
    return mean.float(), (square - mean**2).clamp(min=1e-4).sqrt().float()


class Agent(nn.Module):
    """φ, the transformer over the last N working memories, a Gaussian policy and a value on the last episodic memory.

    A transition is a row (s, a, r, η) of S + A + 2 numbers. A trial's transitions are (T + 1, n, S + A + 2), one row a
    step and task; the last holds the observation after the trial. t (B,) and task (B,) pick steps of it.
    """

    method = "TrMRL"  # as args.json and the figures call it

    def __init__(self, envs: VectorEnv, args: Args):
        super().__init__()
        S, A = envs.single_observation_space.shape[0], envs.single_action_space.shape[0]
        self.num_observations, self.horizon = S, envs.horizon
        self.memory_length, self.input_limit = args.memory_length, args.input_limit
        self.phi = nn.Linear(S + A + 2, args.d_model)
        nn.init.zeros_(self.phi.bias)
        layers = [TransformerLayer(args.d_model, args.heads, not args.t_fixup) for _ in range(args.layers)]
        self.layers = nn.ModuleList(layers)
        if args.t_fixup:
            t_fixup_(self.phi, self.layers)
        self.policy = xavier_linear(args.d_model, A)
        nn.init.orthogonal_(self.policy.weight, 0.01)  # start by exploring around zero
        self.log_std = nn.Parameter(torch.full((A,), math.log(args.init_std)))
        self.value = xavier_linear(args.d_model, 1)
        N = args.memory_length
        self.register_buffer("positions", sinusoidal_positions(N, args.d_model), persistent=False)
        self.register_buffer("causal", torch.ones(N, N, dtype=torch.bool).tril(), persistent=False)
        # The sums of 1, x and x² over all transitions so far, as if one with mean 0 and square 1 had been seen.
        sums = torch.tensor([1.0, 0.0, 1.0], dtype=torch.float64)
        self.register_buffer("sums", sums[:, None].repeat(1, S + A + 2))
        # What the value head's 0 and 1 stand for.
        self.register_buffer("return_mean", torch.zeros(()))
        self.register_buffer("return_std", torch.ones(()))

    def normalise(self, transitions: torch.Tensor) -> torch.Tensor:
        """Features with mean 0 and deviation 1 over what training has seen, and never beyond ± input_limit."""
        mean, std = mean_and_std(self.sums)
        return ((transitions - mean) / std).clamp(-self.input_limit, self.input_limit)

    @torch.no_grad()
    def rescale_value(self, mean: torch.Tensor, std: torch.Tensor) -> None:
        """Makes the returns' mean and deviation the value head's 0 and 1; what it predicts stays (PopArt, van Hasselt
        et al. 2016). Without it the head first has to climb to the returns' size, and learning waits for it."""
        self.value.weight *= self.return_std / std
        self.value.bias.copy_((self.value.bias * self.return_std + self.return_mean - mean) / std)
        self.return_mean.copy_(mean)
        self.return_std.copy_(std)

    def working_memories(self, windows: torch.Tensor) -> torch.Tensor:
        """φ (Sec. 4.1): windows (B, N, S + A + 2) of transitions, the current one last, to (B, N, d)."""
        x = self.normalise(windows)
        x[:, -1, self.num_observations :] = 0  # Alg. 1: the current one is (s_next, a_PAD, r_PAD, η_PAD)
        return self.phi(x)

    def refine(self, windows: torch.Tensor, filled: torch.Tensor) -> tuple[list[torch.Tensor], list[torch.Tensor]]:
        """The current memory after each layer (Eq. 6), e⁰ to e^L, each (B, d), and each layer's α from it, (B, ω, N).

        filled (B, N) is False at PAD slots of windows (B, N, S + A + 2); no filled slot attends to them.
        """
        e = self.working_memories(windows) + self.positions  # (B, N, d)
        # Finite, as a PAD slot sees nothing at all and its softmax must sum over something; nobody reads what it makes.
        mask = torch.where(self.causal & filled[:, None], 0.0, -1e9)[:, None]  # (B, 1, N, N)
        memories, attention = [e[:, -1]], []
        for layer in self.layers:
            queries = e[:, -1:] if layer is self.layers[-1] else e  # of the last layer only the current one is read
            e, alpha = layer(queries, e, mask[:, :, -queries.shape[1] :])
            memories.append(e[:, -1])
            attention.append(alpha[:, :, -1])
        return memories, attention

    def episodic_memories(self, transitions: torch.Tensor, t: torch.Tensor, task: torch.Tensor) -> tuple[list, list]:
        """What refine returns, at steps t (B,) of tasks (B,)."""
        return self.refine(*retrieve(transitions, t, task, self.memory_length, self.horizon))

    def heads(self, memory: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """The policy's mean (B, A) and the value (B,) of an episodic memory (B, d)."""
        return self.policy(memory), self.value(memory)[:, 0] * self.return_std + self.return_mean

    def forward(self, transitions: torch.Tensor, t: torch.Tensor, task: torch.Tensor) -> tuple[Normal, torch.Tensor]:
        """π(a | e^L) over (B, A) and the value (B,)."""
        memories, _ = self.episodic_memories(transitions, t, task)
        mean, value = self.heads(memories[-1])
        return Normal(mean, self.log_std.exp(), validate_args=False), value

    @torch.inference_mode()
    def act(self, transitions: torch.Tensor, t: int, state) -> tuple[torch.Tensor, torch.Tensor, object]:
        """The policy's mean and the value of all n tasks at step t, and a state to be given back at the next.

        TrMRL carries none, its memory is the window; RL² does (baselines/rl2.py)."""
        n = transitions.shape[1]
        memories, _ = self.episodic_memories(transitions, torch.full((n,), t), torch.arange(n))
        return *self.heads(memories[-1]), state


# --- A trial: the memory write logic (Sec. 5.1, Alg. 1), E episodes of one task ---------------------------------------


def retrieve(transitions: torch.Tensor, t: torch.Tensor, task: torch.Tensor, N: int, horizon: int) -> tuple:
    """The N - 1 most recent transitions of the episode and the current one (Alg. 1, Sec. 5.1: an episode starts empty).

    Returns windows (B, N, S + A + 2), the current step last, and filled (B, N), False at the PADs in front.
    """
    last_start = len(transitions) - 1 - horizon
    start = (t // horizon * horizon).clamp(max=last_start)  # the step after the trial belongs to its last episode
    steps = t[:, None] + torch.arange(1 - N, 1, device=t.device)  # (B, N)
    return transitions[steps.clamp(min=0), task[:, None]], steps >= start[:, None]


@dataclass
class Trial:
    """E episodes of H steps of each of n tasks, one after the other: T = E · H steps. Every transition is stored once."""

    transitions: torch.Tensor  # (T + 1, n, S + A + 2): (s, a, r, η); the last row holds the observation after the trial
    log_probs: torch.Tensor  # (T, n) of the actions taken
    values: torch.Tensor  # (T + 1, n)
    valid: torch.Tensor  # (T, n), False from an early termination to the end of its episode
    success: torch.Tensor  # (T, n), 1 or 0, NaN where the environment does not say

    @property
    def rewards(self) -> torch.Tensor:
        return self.transitions[:-1, :, -2]  # (T, n), 0 where not valid

    def to(self, device: str) -> "Trial":
        return Trial(*(tensor.to(device) for tensor in vars(self).values()))


@contextlib.contextmanager
def one_thread():
    """A step of acting is too small to share, and a thread of torch's that waits for more takes a simulator's core."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@one_thread()
def collect_trial(
    agent: Agent, envs: VectorEnv, tasks: np.ndarray, episodes: int, rng: np.random.Generator, explore: bool
) -> Trial:
    """Alg. 1 for n tasks (n, ·) at once; actions are the policy's mean if not explore.

    Raises RunFailed if the simulator returns a NaN or an infinity.
    """
    n, S, A = len(tasks), envs.single_observation_space.shape[0], envs.single_action_space.shape[0]
    T = episodes * envs.horizon
    transitions = np.zeros((T + 1, n, S + A + 2), dtype=np.float32)  # B of Alg. 1
    means, values = np.zeros((T, n, A), dtype=np.float32), np.zeros((T + 1, n), dtype=np.float32)
    valid, success = np.zeros((T, n), dtype=bool), np.zeros((T, n), dtype=np.float32)
    memory = torch.from_numpy(transitions)  # the same numbers, as torch sees them
    std = agent.log_std.detach().exp()
    state = None
    for t in range(T):
        if t % envs.horizon == 0:
            observations, _ = envs.reset(seed=int(rng.integers(2**31)), options={"tasks": tasks})
            alive = np.ones(n, dtype=bool)
        transitions[t, :, :S] = observations  # s_next
        means[t], values[t], state = agent.act(memory, t, state)
        actions = means[t] + explore * std.numpy() * rng.standard_normal((n, A), dtype=np.float32)
        clipped = actions.clip(envs.single_action_space.low, envs.single_action_space.high)
        observations, rewards, terminated, truncated, infos = envs.step(clipped)
        transitions[t, :, S : S + A] = actions  # B ← B ∪ (s, a, r, η)
        transitions[t, :, S + A] = rewards
        transitions[t, :, S + A + 1] = terminated | truncated
        valid[t], success[t] = alive, infos["success"]
        alive = alive & ~terminated
        observations[~alive] = 0.0  # nothing follows a termination
    transitions[T, :, :S] = observations
    # The trial's end is a truncation: what would follow is worth V. After a termination nothing would.
    values[T] = agent.act(memory, T, state)[1] * alive
    if not np.isfinite(transitions).all():
        raise RunFailed("the simulator returned a NaN or an infinity; resuming would repeat it")
    log_probs = Normal(torch.from_numpy(means), std).log_prob(memory[:-1, :, S : S + A]).sum(2)
    return Trial(memory, log_probs, *(torch.from_numpy(array) for array in (values, valid, success)))


# --- PPO over concatenated trials (Sec. 5.1) --------------------------------------------------------------------------


def all_reduce(x: torch.Tensor) -> torch.Tensor:
    """x, replaced by its sum over torchrun's processes, if there are any. Raises RunFailed if one of them is gone."""
    if distributed.is_initialized():
        try:
            distributed.all_reduce(x)
        except RuntimeError as error:
            raise RunFailed("another process of torchrun's has ended") from error
    return x


def sums_of(x: torch.Tensor) -> torch.Tensor:
    """1, x and x² summed over the first axis of all processes' x, (3, ...), for mean_and_std."""
    x = x.double()
    return all_reduce(torch.stack([torch.ones_like(x), x, x * x]).sum(1))


def advantages_and_returns(trial: Trial, gamma: float, gae_lambda: float) -> tuple[torch.Tensor, torch.Tensor]:
    """Generalised advantage estimation along the whole trial, through the episodes' ends; both (T, n).

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


def clipped_objective(ratio: torch.Tensor, advantages: torch.Tensor, clip_coef: float) -> torch.Tensor:
    """PPO's objective of each step (Schulman et al. 2017, Eq. 7), to be maximised."""
    clipped = ratio.clamp(1 - clip_coef, 1 + clip_coef)
    return torch.minimum(ratio * advantages, clipped * advantages)


def ppo_update(
    agent: Agent, optimizer: torch.optim.Optimizer, trial: Trial, args: Args, rng: np.random.Generator
) -> dict[str, float]:
    """Up to update_epochs passes over the trials' valid steps, in minibatches that mix all tasks; returns statistics.

    Raises RunFailed if returns, a loss or its gradient are not finite, before the step that they would have spoilt.
    """
    advantages, returns = advantages_and_returns(trial, args.gamma, args.gae_lambda)
    t, task = trial.valid.nonzero(as_tuple=True)
    return_sums = sums_of(returns[t, task])
    if not torch.isfinite(return_sums).all():
        raise RunFailed("the returns are not finite")
    agent.rescale_value(*mean_and_std(return_sums))
    mean, std = mean_and_std(sums_of(advantages[t, task]))
    explained_variance = 1 - (std / agent.return_std) ** 2  # an advantage is a return less its value
    advantages = (advantages - mean) / std

    S, A = agent.num_observations, len(agent.log_std)
    number = math.ceil(return_sums[0].item() / args.minibatch_size)  # of minibatches an epoch
    size = return_sums[0].float() / number  # over all processes
    epochs = [torch.from_numpy(rng.permutation(len(t))).tensor_split(number) for _ in range(args.update_epochs)]
    statistics, gradient_steps = [], 0
    for chosen in itertools.chain(*epochs):
        at = t[chosen], task[chosen]
        policy, value = agent(trial.transitions, *at)
        log_ratio = policy.log_prob(trial.transitions[at][:, S : S + A]).sum(1) - trial.log_probs[at]
        ratio = log_ratio.exp()
        policy_loss = -clipped_objective(ratio, advantages[at], args.clip_coef).sum() / size
        # In the value head's unit, so that the shared memories serve both heads whatever the rewards' scale.
        value_loss = 0.5 * ((value - returns[at]) / agent.return_std).square().sum() / size
        optimizer.zero_grad()
        (policy_loss + value_loss).backward()
        with torch.no_grad():
            approx_kl = (ratio - 1 - log_ratio).sum() / size
            clip_fraction = ((ratio - 1).abs() > args.clip_coef).sum() / size
            entropy = policy.entropy().sum() / size
            statistics.append(torch.stack([policy_loss, value_loss, entropy, approx_kl, clip_fraction]))
        if distributed.is_initialized():  # size counts all processes' steps, so that their shares add up
            shares = [parameter.grad for parameter in agent.parameters()] + [statistics[-1]]
            nn.utils.vector_to_parameters(all_reduce(nn.utils.parameters_to_vector(shares)), shares)
        # Checked at each minibatch: one trial that went very wrong can carry the policy far away within an epoch.
        if args.target_kl is not None and torch.stack(statistics)[:, 3].mean() > args.target_kl:
            break
        norm = nn.utils.clip_grad_norm_(agent.parameters(), args.max_grad_norm)
        if not torch.isfinite(norm):
            raise RunFailed("the loss or its gradient is not finite")
        optimizer.step()
        gradient_steps += 1
    names = ("policy_loss", "value_loss", "entropy", "approx_kl", "clip_fraction")
    means = dict(zip(names, torch.stack(statistics).mean(0).tolist()))
    return means | {"explained_variance": explained_variance.item(), "gradient_steps": gradient_steps}


# --- Meta-tests with frozen weights: adaptation and OOD (Sec. 5.2), refinement (Fig. 7), latents (Fig. 8) --------------


def random_stream(seed: int, purpose: str, iteration: int = 0, process: int = 0) -> np.random.Generator:
    """Random numbers that depend on nothing but the arguments, so that a resumed run draws what an unbroken one would."""
    purposes = ("train tasks", "train", "test tasks", "ood tasks", "meta-test", "refinement")
    return np.random.default_rng([seed, purposes.index(purpose), iteration, process])


def episode_results(trial: Trial, episodes: int) -> tuple[np.ndarray, np.ndarray]:
    """Rewards of every step (n, E, H), and whether each episode (n, E) ever succeeded: 1, 0 or NaN."""
    rewards = trial.rewards.T.unflatten(1, (episodes, -1))
    success = trial.success.T.unflatten(1, (episodes, -1))
    return rewards.numpy(), np.fmax.reduce(success.numpy(), axis=2)


def meta_test(agent: Agent, envs: VectorEnv, args: Args, episodes: int) -> dict[str, dict[str, np.ndarray]]:
    """Adaptation and OOD (Sec. 5.2; Figs. 5, 6, 9): episodes of each of the run's held-out tasks, by mean actions.

    Returns for "test" and, where there are such tasks, "ood": rewards (tasks, episodes, H), success (tasks, episodes),
    tasks (tasks, ·) and observations (tasks, H, S) of the first episode.
    """
    splits = [split for split in envs.splits if split != "train"]
    streams = [random_stream(args.seed, f"{split} tasks") for split in splits]  # which training never touches
    tasks = [envs.sample_tasks(split, args.test_tasks, stream) for split, stream in zip(splits, streams)]
    rng = random_stream(args.seed, "meta-test")
    trial = collect_trial(agent, envs, np.concatenate(tasks), episodes, rng, explore=False)
    rewards, success = episode_results(trial, episodes)
    observations = trial.transitions[: envs.horizon, :, : agent.num_observations].transpose(0, 1).numpy()
    results = {"rewards": rewards, "success": success, "tasks": np.concatenate(tasks), "observations": observations}
    shares = {name: np.split(array, len(splits)) for name, array in results.items()}
    return {split: {name: share[i] for name, share in shares.items()} for i, split in enumerate(splits)}


@torch.no_grad()
def analyse_memories(agent: Agent, envs: VectorEnv, args: Args) -> dict[str, dict[str, np.ndarray]]:
    """What the memories of each layer hold, for refinement.npz, working_memories.npz and attention.npz.

    Fig. 7, representation error: 1 - cos(e^l, e^L), averaged. Regression error: the mean squared error of a linear model
    from e^l to the policy's mean action, fitted on the first two thirds of the tasks, tested on the others.
    Fig. 8, latents: φ of whole transitions. Attention: what the current memory attends to, averaged over all steps.
    """
    rng = random_stream(args.seed, "refinement")
    tasks = envs.sample_tasks("test", args.test_tasks + math.ceil(args.test_tasks / 2), rng)
    trial = collect_trial(agent, envs, tasks, math.ceil(args.test_episodes / 2), rng, explore=False)
    t, task = trial.valid.nonzero(as_tuple=True)
    memories, attention = [], []
    for chosen in torch.arange(len(t)).split(4096):
        some_memories, some_attention = agent.episodic_memories(trial.transitions, t[chosen], task[chosen])
        memories.append(torch.stack(some_memories))
        if some_attention:
            attention.append(torch.stack(some_attention).mean(2))  # (L, B, N), over heads
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
    labels = tasks[task[sample].numpy(), 0]  # a task is known by its first number
    files = {
        "refinement": {
            "representation_error": representation_error.numpy(),
            "regression_mse": np.array(regression_mse),
        },
        "working_memories": {"embedding": embedding.numpy(), "task": labels},
    }
    if attention:
        files["attention"] = {"weights": torch.cat(attention, dim=1).mean(1).numpy()}  # (L, N)
    return files


# ----------------------------------------------------------------------------------------------------------------------
# Tasks and environments (App. B)
#
# A task distribution is a gymnasium.Env with Box spaces and three things more:
#   horizon                               H; every episode is cut off there
#   splits                                "train", "test" and, where there are such tasks, "ood"
#   sample_tasks(split, n, rng)           tasks (n, ·), numbers that say what is to be done
# Its attribute task, a row of those, is set before each reset. info["success"], if step gives it, is of the moment.
# ----------------------------------------------------------------------------------------------------------------------


def mujoco_env(name: str, **options) -> gymnasium.Env:
    env = gymnasium.make(name, **options).unwrapped  # the time limit is our horizon
    # A simulation that diverged must be seen as one; by default MuJoCo quietly starts it anew.
    env.model.opt.disableflags |= mujoco.mjtDisableBit.mjDSBL_AUTORESET
    return env


class HalfCheetahVel(gymnasium.Wrapper):
    """A half cheetah that must run at a hidden target velocity v*, in m/s: r = -|v - v*| - 0.05 ‖a‖²."""

    horizon = 200
    splits = ("train", "test", "ood")

    def __init__(self, seed: int):
        super().__init__(mujoco_env("HalfCheetah-v5"))

    def sample_tasks(self, split: str, n: int, rng: np.random.Generator) -> np.ndarray:
        low, high = (3.0, 4.0) if split == "ood" else (0.0, 3.0)
        return rng.uniform(low, high, (n, 1))

    def step(self, action: np.ndarray) -> tuple:
        # What gymnasium's own step does, less the reward and the info that nobody reads: a third of its time.
        before = self.env.data.qpos[0]
        self.env.do_simulation(action, self.env.frame_skip)
        velocity = (self.env.data.qpos[0] - before) / self.env.dt
        reward = -abs(velocity - self.task[0]) - 0.05 * np.dot(action, action)
        return self.env._get_obs(), reward, False, False, {}


class AntDir(gymnasium.Wrapper):
    """An ant that must run forward or backward: r = velocity along the goal + 1 - 0.5 ‖a‖² - contact cost.

    A task is the goal's angle in radians. The episode ends where the torso's height leaves [0.2, 1] m, or where the
    state is not finite.
    """

    horizon = 200
    splits = ("train", "test")
    angles = (0.0, math.pi)

    def __init__(self, seed: int):
        super().__init__(mujoco_env("Ant-v5", include_cfrc_ext_in_observation=False))

    def sample_tasks(self, split: str, n: int, rng: np.random.Generator) -> np.ndarray:
        return np.resize(self.angles, (n, 1))  # the two in turn, so that each batch holds both

    def step(self, action: np.ndarray) -> tuple:
        observation, reward, terminated, truncated, info = self.env.step(action)
        velocity = math.cos(self.task[0]) * info["x_velocity"] + math.sin(self.task[0]) * info["y_velocity"]
        reward += velocity - info["reward_forward"]
        return observation, reward if np.isfinite(reward) else 0.0, terminated, truncated, info


class AntDir57(AntDir):
    """The authors' code: goals at ±1 radian, which share cos 1 = 54 % of the way; the paper says forward or backward."""

    angles = (1.0, -1.0)


@functools.cache
def meta_world_goals(name: str, seed: int) -> list:
    """The 50 goals of training and the 50 held out of a MetaWorld environment; takes a second."""
    benchmark = metaworld.ML1(name, seed)
    return benchmark.train_tasks + benchmark.test_tasks


class MetaWorld(gymnasium.Env):
    """MetaWorld's ML1 (one environment, 50 training goals and 50 held out) and ML45-Train (45, tested as trained).

    A task is a number, 100 · environment + goal, goals from 50 on being held out. The goal's position is hidden: the
    benchmark zeroes it in the observation.
    """

    horizon = 500
    splits = ("train", "test")
    observation_space = gymnasium.spaces.Box(-np.inf, np.inf, (39,))
    action_space = gymnasium.spaces.Box(-1.0, 1.0, (4,))
    # By name, those of this process that no copy is using: one takes 24 MB, and 0.2 s to build.
    idle_simulators: dict[str, list] = collections.defaultdict(list)

    def __init__(self, names: tuple[str, ...], held_out: bool, seed: int):
        self.names, self.held_out, self.seed = names, held_out, seed
        self.name = self.simulator = None

    def sample_tasks(self, split: str, n: int, rng: np.random.Generator) -> np.ndarray:
        """No environment twice before each came once, and no goal either. In order of the environments, so that a
        process, which takes neighbours, needs few of the simulators."""
        environments = np.sort(np.resize(rng.permutation(len(self.names)), n))
        goals = np.resize(rng.permutation(50), n) + (50 if split == "test" and self.held_out else 0)
        return (100 * environments + goals)[:, None]

    def reset(self, *, seed: int | None = None, options: dict | None = None) -> tuple[np.ndarray, dict]:
        environment, goal = divmod(int(self.task[0]), 100)
        if self.name != self.names[environment]:
            if self.simulator:
                self.idle_simulators[self.name].append(self.simulator)
            self.name = self.names[environment]
            idle = self.idle_simulators[self.name]
            self.simulator = idle.pop() if idle else metaworld.env_dict.ALL_V3_ENVIRONMENTS[self.name]()
        self.simulator.set_task(meta_world_goals(self.name, self.seed)[goal])
        return self.simulator.reset()

    def step(self, action: np.ndarray) -> tuple:
        return self.simulator.step(action)


ENVS: dict[str, Callable] = {  # by name, what makes an environment from a seed
    "HalfCheetahVel": HalfCheetahVel,
    "AntDir": AntDir,
    "AntDir57": AntDir57,
    "ML1-Reach": functools.partial(MetaWorld, ("reach-v3",), True),
    "ML1-Push": functools.partial(MetaWorld, ("push-v3",), True),
    "ML45-Train": functools.partial(MetaWorld, tuple(metaworld.env_dict.ML45_V3["train"]), False),
}
# What differs from Args, whose defaults were chosen on HalfCheetahVel. MetaWorld's deviation is the authors'.
ANT = dict(total_timesteps=2_000_000)
META_WORLD = dict(init_std=1.0, total_timesteps=2_000_000)
DEFAULTS: dict[str, dict] = {
    "AntDir": ANT,
    "AntDir57": ANT,
    "ML1-Reach": META_WORLD,
    "ML1-Push": META_WORLD,
    "ML45-Train": META_WORLD | dict(num_tasks=25, test_tasks=45, eval_interval=20),  # a test task of each environment
}


class Copies:
    """Copies of an environment in one process, made when needed and stepped in turn. One that has terminated rests till
    the next reset: its observations and rewards are zero."""

    def __init__(self, make_env: Callable[[], gymnasium.Env]):
        self.make_env, self.envs = make_env, [make_env()]

    def reset(self, tasks: np.ndarray, seeds: np.ndarray) -> np.ndarray:
        while len(self.envs) < len(tasks):
            self.envs.append(self.make_env())
        self.terminated = np.zeros(len(tasks), dtype=bool)
        observations = np.zeros((len(tasks), *self.envs[0].observation_space.shape))
        for i, env in enumerate(self.envs[: len(tasks)]):
            env.task = tasks[i]
            observations[i], _ = env.reset(seed=int(seeds[i]))
        return observations

    def step(self, actions: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray, np.ndarray]:
        n = len(actions)
        observations, rewards = np.zeros((n, *self.envs[0].observation_space.shape)), np.zeros(n)
        success = np.full(n, np.nan)
        for i in np.flatnonzero(~self.terminated):
            observations[i], rewards[i], self.terminated[i], _, info = self.envs[i].step(actions[i])
            success[i] = info.get("success", np.nan)
        return observations, rewards, self.terminated.copy(), success


def serve_copies(pipe, make_env: Callable[[], gymnasium.Env]) -> None:
    """A process that resets and steps copies as it is told, until the pipe closes."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C reaches the whole group; it is the parent's to answer
    copies = Copies(make_env)
    try:
        while True:
            method, *arguments = pipe.recv()
            pipe.send(getattr(copies, method)(*arguments))
    except (EOFError, OSError):  # the parent has closed the pipe, or is gone
        return


class TaskVectorEnv(VectorEnv):
    """As many copies of an environment as reset is given tasks, in a number of processes. The first is this one, so that
    of one process there is no other to wait for."""

    metadata = {"autoreset_mode": AutoresetMode.DISABLED}

    def __init__(self, name: str, seed: int, processes: int):
        self.name = name
        make_env = functools.partial(ENVS[name], seed=seed)
        self.copies = Copies(make_env)
        env = self.copies.envs[0]
        self.single_observation_space, self.single_action_space = env.observation_space, env.action_space
        self.horizon, self.splits, self.sample_tasks = env.horizon, env.splits, env.sample_tasks
        here = "forkserver" if "forkserver" in multiprocessing.get_all_start_methods() else "spawn"
        context = multiprocessing.get_context(here)
        context.set_forkserver_preload(["__main__"])  # its imports once, not once a process
        self.pipes = []
        for _ in range(processes - 1):
            ours, theirs = context.Pipe()
            context.Process(target=serve_copies, args=(theirs, make_env), daemon=True).start()
            theirs.close()  # so that the pipe ends when either side does
            self.pipes.append(ours)

    def ask(self, method: str, *arguments: np.ndarray) -> list:
        """Each process's answer, after an equal share of the arguments. Raises RunFailed if one has died."""
        shares = list(zip(*(np.array_split(argument, len(self.pipes) + 1) for argument in arguments)))
        try:
            for pipe, share in zip(self.pipes, shares[1:]):
                pipe.send((method, *share))
            mine = getattr(self.copies, method)(*shares[0])
            return [mine] + [pipe.recv() for pipe in self.pipes]
        except (EOFError, OSError) as error:
            raise RunFailed(f"a process that simulates {self.name} has died") from error

    def reset(self, *, seed: int, options: dict) -> tuple[np.ndarray, dict]:
        """Starts an episode of each of options["tasks"] (n, ·); its copy is seeded with seed + its number."""
        self.num_envs, self.steps = len(options["tasks"]), 0
        return np.concatenate(self.ask("reset", options["tasks"], seed + np.arange(self.num_envs))), {}

    def step(self, actions: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray, np.ndarray, dict]:
        self.steps += 1
        observations, rewards, terminated, success = map(np.concatenate, zip(*self.ask("step", actions)))
        truncated = np.full(self.num_envs, self.steps >= self.horizon)
        return observations, rewards, terminated, truncated, {"success": success}


# --- A run: flags, checkpoint, outer loop -----------------------------------------------------------------------------


class UserError(Exception):
    """A mistake in what the user asked for: one line, exit code 2."""


class RunFailed(Exception):
    """A NaN in the simulator or the loss, or a process that died: the run cannot go on, exit code 1."""


COLUMNS = (  # of progress.csv
    *("iteration", "env_steps", "wall_seconds", "train_return", "train_success", "test_return", "test_success"),
    *("ood_return", "steps_per_second", "rollout_seconds", "update_seconds", "gradient_steps", "policy_loss"),
    *("value_loss", "entropy", "approx_kl", "clip_fraction", "explained_variance", "learning_rate"),
)
CHECKS = {  # what flags take, the test of it, and whose it is
    "a whole number from 0": (lambda x: x >= 0, ("seed",)),
    "a whole number from 1": (
        lambda x: x >= 1,
        ("total_timesteps", "num_tasks", "episodes_per_trial", "memory_length", "layers", "heads", "d_model")
        + ("update_epochs", "minibatch_size", "eval_interval", "test_tasks", "test_episodes"),
    ),
    "a positive number": (
        lambda x: 0 < x < math.inf,
        ("init_std", "input_limit", "learning_rate", "clip_coef", "max_grad_norm"),
    ),
    "a positive number or None": (lambda x: x is None or x > 0, ("target_kl",)),
    "a number from 0 to 1": (lambda x: 0 <= x <= 1, ("gamma", "gae_lambda")),
}


def check(args: Args) -> None:
    """Raises UserError, naming the flag and what it takes, for values that no run can use."""
    for takes, (test, names) in CHECKS.items():
        for name in names:
            if not test(getattr(args, name)):
                raise UserError(f"--{name.replace('_', '-')} {getattr(args, name)}: takes {takes}")
    if args.d_model % args.heads:
        raise UserError(f"--heads {args.heads}: takes a divisor of --d-model {args.d_model}")
    processes = int(os.environ.get("WORLD_SIZE", 1))
    if args.num_tasks % processes:
        raise UserError(f"--num-tasks {args.num_tasks}: takes a multiple of torchrun's {processes} processes")
    try:
        torch.zeros(1, device=args.device)
    except (RuntimeError, AssertionError):
        raise UserError(f"--device {args.device}: takes a device that torch finds here, such as cpu") from None


def load_checkpoint(run: Path, method: str) -> dict:
    try:
        checkpoint = torch.load(run / "checkpoint.pt", weights_only=True)
        theirs = checkpoint["args"].pop("method")
        checkpoint["args"].pop("versions")
    except (OSError, RuntimeError, EOFError, KeyError, TypeError, pickle.UnpicklingError):
        raise UserError(f"--resume, --test: take the folder of a run; {run} has no checkpoint.pt to read") from None
    if theirs != method:
        raise UserError(f"--resume, --test: {run} is a run of {theirs}, not of {method}")
    return checkpoint


def parse(argv: list[str], args_class: type[Args], method: str) -> tuple[Args, dict | None]:
    """The command line over a run's own arguments, or over its environment's defaults; and the run's checkpoint."""
    args = tyro.cli(args_class, args=argv)
    if args.resume and args.test:
        raise UserError("--resume, --test: take one of the two")
    if args.env not in ENVS:
        raise UserError(f"--env {args.env}: takes one of {', '.join(ENVS)}")
    checkpoint = None
    values = {"env": args.env} | DEFAULTS.get(args.env, {})
    if args.resume or args.test:
        checkpoint = load_checkpoint(args.resume or args.test, method)
        values = checkpoint["args"] | {"runs_dir": Path(checkpoint["args"]["runs_dir"])}
    args = tyro.cli(args_class, args=argv, default=args_class(**values))
    check(args)
    return args, checkpoint


def write(path: Path, save: Callable) -> None:
    """save(file) under a temporary name, which is then renamed, so that path is never half-written."""
    temporary = path.with_name(path.name + ".tmp")
    with open(temporary, "wb") as file:
        save(file)
    os.replace(temporary, path)


def make_run_folder(args: Args, settings: dict) -> Path:
    run = args.runs_dir / f"{args.env}-{settings['method']}-s{args.seed}-{datetime.now():%Y%m%d-%H%M%S-%f}"
    try:
        run.mkdir(parents=True)
    except OSError as error:
        raise UserError(f"--runs-dir {args.runs_dir}: takes a folder that can be written ({error.strerror})") from None
    return run


def save(run: Path, settings: dict, rows: list[dict], agent: Agent, optimizer: torch.optim.Optimizer) -> None:
    """checkpoint.pt, which is all that resuming needs, then progress.csv."""
    checkpoint = {"args": settings, "rows": rows, "agent": agent.state_dict(), "optimizer": optimizer.state_dict()}
    write(run / "checkpoint.pt", lambda file: torch.save(checkpoint, file))
    lines = [",".join(COLUMNS)] + [",".join(str(row.get(name, "")) for name in COLUMNS) for row in rows]
    write(run / "progress.csv", lambda file: file.write(("\n".join(lines) + "\n").encode()))


def train(
    agent: Agent,
    optimizer: torch.optim.Optimizer,
    envs: VectorEnv,
    args: Args,
    settings: dict,
    run: Path | None,
    rows: list[dict],
) -> None:
    """Meta-training (Sec. 5.1), from where rows, those of progress.csv, have come; adds one an iteration.

    An iteration's random numbers depend on the seed and its number alone, so that to resume is to go on.
    Under torchrun each process collects its share of the tasks, and the one that leads evaluates and writes into run.
    """
    process, processes = int(os.environ.get("RANK", 0)), int(os.environ.get("WORLD_SIZE", 1))
    env_steps, seconds = (rows[-1]["env_steps"], rows[-1]["wall_seconds"]) if rows else (0, 0.0)
    board = SummaryWriter(run, purge_step=env_steps + 1) if process == 0 else None
    scores = {}
    with tqdm(total=args.total_timesteps, initial=env_steps, unit="step", unit_scale=True, disable=process > 0) as bar:
        while env_steps < args.total_timesteps:
            started, iteration = time.monotonic(), len(rows) + 1
            learning_rate = args.learning_rate * (1 - env_steps / args.total_timesteps if args.anneal_lr else 1.0)
            for group in optimizer.param_groups:
                group["lr"] = learning_rate
            tasks = envs.sample_tasks("train", args.num_tasks, random_stream(args.seed, "train tasks", iteration))
            rng = random_stream(args.seed, "train", iteration, process)
            agent.to("cpu")  # where small batches are quick
            trial = collect_trial(agent, envs, tasks[process::processes], args.episodes_per_trial, rng, explore=True)
            collected = time.monotonic()
            agent.to(args.device)
            row = ppo_update(agent, optimizer, trial.to(args.device), args, rng)
            agent.sums += sums_of(trial.transitions[:-1][trial.valid].to(args.device))
            updated = time.monotonic()

            rewards, success = (torch.from_numpy(x) for x in episode_results(trial, args.episodes_per_trial))
            row["train_return"] = mean_and_std(sums_of(rewards.sum(2).flatten()))[0].item()
            row["train_success"] = mean_and_std(sums_of(success.flatten()))[0].item()
            new_steps = int(sums_of(trial.valid.flatten())[1])
            env_steps += new_steps
            if process == 0 and ((iteration - 1) % args.eval_interval == 0 or env_steps >= args.total_timesteps):
                for split, results in meta_test(agent.to("cpu"), envs, args, episodes=1).items():
                    scores[f"{split}_return"] = results["rewards"].sum(2).mean().item()
                    scores[f"{split}_success"] = results["success"].mean().item()
                row |= scores
            seconds += time.monotonic() - started
            row |= {"iteration": iteration, "env_steps": env_steps, "wall_seconds": seconds}
            row |= {"rollout_seconds": collected - started, "update_seconds": updated - collected}
            row |= {"steps_per_second": new_steps / (time.monotonic() - started), "learning_rate": learning_rate}
            rows.append({name: row[name] for name in COLUMNS if not math.isnan(row.get(name, math.nan))})
            if process == 0:
                save(run, settings, rows, agent, optimizer)
                for name, value in rows[-1].items():
                    board.add_scalar(name, value, env_steps)
                board.flush()
                bar.update(new_steps)
                shown = {"train": row["train_return"]} | {k: v for k, v in scores.items() if not math.isnan(v)}
                bar.set_postfix({name: f"{value:.3g}" for name, value in shown.items()})


def print_summary(args: Args, env_steps: int, results: dict[str, dict[str, np.ndarray]]) -> None:
    print(f"\n{args.env}, seed {args.seed}, {env_steps:,} steps: means over {args.test_tasks} tasks a row")
    print(f"{'episode':14}" + "".join(f"{episode:>9}" for episode in range(1, args.test_episodes + 1)))
    for split, arrays in results.items():
        print(f"{split + ' return':14}" + "".join(f"{value:9.1f}" for value in arrays["rewards"].sum(2).mean(0)))
        if not np.isnan(arrays["success"]).any():
            print(f"{split + ' success':14}" + "".join(f"{value:9.2f}" for value in arrays["success"].mean(0)))


def main(argv: list[str] | None = None, agent_class: type[Agent] = Agent, args_class: type[Args] = Args) -> int:
    """Runs a command line; returns the exit code: 2 for a user's mistake, 1 for a failed run, 130 for a stopped one."""
    signal.signal(signal.SIGTERM, signal.default_int_handler)  # stops a run as Ctrl-C does
    leads = int(os.environ.get("RANK", 0)) == 0
    run, rows = None, []
    try:
        args, checkpoint = parse(sys.argv[1:] if argv is None else argv, args_class, agent_class.method)
        if "RANK" in os.environ:
            if args.device.startswith("cuda"):
                torch.cuda.set_device(int(os.environ["LOCAL_RANK"]))
            backend = "nccl" if args.device.startswith("cuda") else "gloo"
            distributed.init_process_group(backend, timeout=timedelta(hours=6))  # the leader's meta-tests may take long
        envs = TaskVectorEnv(args.env, args.seed, min(torch.get_num_threads(), args.num_tasks))
        torch.manual_seed(args.seed)  # for the initial weights alone: all else draws from random_stream
        agent = agent_class(envs, args).to(args.device)
        optimizer = torch.optim.Adam(agent.parameters(), eps=1e-5, fused=True)
        settings = asdict(args) | {"runs_dir": str(args.runs_dir), "method": agent_class.method}
        settings["versions"] = {name: version(name) for name in ("torch", "mujoco", "gymnasium", "metaworld", "numpy")}
        del settings["resume"], settings["test"]
        if checkpoint:
            run, rows = args.resume or args.test, checkpoint["rows"]
            try:
                agent.load_state_dict(checkpoint["agent"])
                optimizer.load_state_dict(checkpoint["optimizer"])
            except (RuntimeError, ValueError) as error:
                raise UserError(
                    f"{run}: its network has another shape than --env, --layers, --d-model, ... say"
                ) from error
        elif leads:
            run = make_run_folder(args, settings)
        if not args.test:
            if leads:
                write(run / "args.json", lambda file: file.write(json.dumps(settings, indent=2).encode()))
                save(run, settings, rows, agent, optimizer)
            train(agent, optimizer, envs, args, settings, run, rows)
        if leads:
            print("meta-testing with frozen weights")
            results = meta_test(agent.to("cpu"), envs, args, args.test_episodes)
            files = {"meta_test": results["test"]} | ({"ood": results["ood"]} if "ood" in results else {})
            for name, arrays in (files | analyse_memories(agent, envs, args)).items():
                write(run / f"{name}.npz", functools.partial(np.savez, **arrays))
            print_summary(args, rows[-1]["env_steps"] if rows else 0, results)
            print(f"written to {run}; draw it with: python plot.py {run}")
        all_reduce(torch.zeros(1, device=args.device))  # nobody leaves before the leader: torchrun would end it
        return 0
    except (UserError, RunFailed) as error:
        where = f"iteration {len(rows) + 1}: " if isinstance(error, RunFailed) else ""
        print(f"error: {where}{error}", file=sys.stderr)
        return 2 if isinstance(error, UserError) else 1
    except KeyboardInterrupt:
        print(f"stopped after {len(rows)} iterations; go on with: python {sys.argv[0]} --resume {run}" if leads else "")
        return 130
    finally:
        if distributed.is_initialized():
            distributed.destroy_process_group()


if __name__ == "__main__":
    sys.exit(main())
