"""PEARL in one file: "Efficient Off-Policy Meta-RL via Probabilistic Context Variables" (Rakelly et al., ICML 2019).

From transitions c_n = (s, a, r, s') of a task, an encoder infers the posterior q(z | c) over a latent task variable z:
each transition gives one Gaussian factor, and the posterior is their product. Policy and Q-functions see a sample of z
beside the state, and learn off-policy by SAC from a replay buffer. A task is explored by posterior sampling: z is drawn
once an episode, in the first two episodes from the prior, later from the posterior. So the third episode is the first
that is adapted, and evaluations score it.

    python baselines/pearl.py --env HalfCheetahVel     trmrl.py's flags, where they mean something; the same run folder

PEARL's paper and this file; tasks, trials, normalisation and meta-tests are trmrl.py's.
Sec. 4, q(z | c)                             PEARL.posterior
Sec. 5, SAC with z                           PEARL.losses
Alg. 1, collecting data into the buffers     PEARL.collect with an Explorer, PEARL.remember
Alg. 1, the training steps                   PEARL.update
Alg. 2, meta-testing                         PEARL.collect with an Explorer

As in the authors' code, but unlike Alg. 2, the second episode is not adapted yet. At meta-test the context holds all
episodes so far. In training it is context_size transitions of a trial's first two episodes.
Unlike in their code: each iteration draws tasks anew, and the latest trials are the replay buffer, each with a context
of its own; a trial's fourth episode, too, acts on a context of all before it; there is no V network, as targets come
from the target Q-functions; the temperature is learned, and there is no penalty on the policy's mean and std; inputs
are normalised by the first iteration's moments, and rewards divided by their std; the context has s', as in the paper;
networks and batches are smaller; gradient steps are fewer, at a higher learning rate; γ is lower.
Actions must lie in (-1, 1).
"""

import math
import sys
from copy import deepcopy
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from numpy.random import Generator
from torch import Tensor, distributed, nn
from torch.distributions import Normal, kl_divergence
from torch.nn.functional import softplus
from torch.optim import Adam, Optimizer
from tyro.conf import Fixed, Suppress

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
import trmrl  # noqa: E402 (it is in the folder above)


@dataclass
class Args(trmrl.Args):
    """PEARL: meta-train, then meta-test with frozen weights. A meta-test's first two episodes explore, with z from the
    prior. The third is adapted: test_return is its return. A word in brackets opens a group of flags."""

    num_tasks: int = 10  # tasks drawn in each iteration, with one trial of each
    episodes_per_trial: int = 4  # the first two with z from the prior, the others with z from the posterior
    d_model: int = 128  # [model] the size of each hidden layer of policy and Q-functions
    input_limit: float = 10.0  # normalised inputs are clipped to ± this many standard deviations
    total_timesteps: int = 1_000_000  # [training] environment steps of meta-training, rounded up to whole iterations
    learning_rate: float = 1e-3  # Adam's learning rate
    gamma: float = 0.97  # discount factor
    gradient_steps: int = 500  # [SAC] gradient steps in each iteration
    batch_trials: int = 16  # trials in a gradient step, drawn from the latest 500; each counts as a task
    batch_steps: int = 32  # transitions of each of these trials, for policy and Q-functions
    target_rate: float = 0.01  # τ, the share of the way that the target Q-functions go in a gradient step
    latent_size: int = 5  # [context] how many numbers z has
    context_size: int = 64  # transitions of a trial's first two episodes from which z is inferred in a gradient step
    kl_weight: float = 0.0005  # weight of KL(q(z | c) ‖ N(0, I)); the authors' is 0.1, beside rewards 5 times as large
    memory_length: Suppress[Fixed[int]] = 1
    layers: Suppress[Fixed[int]] = 1
    heads: Suppress[Fixed[int]] = 1
    t_fixup: Suppress[Fixed[bool]] = False
    init_std: Suppress[Fixed[float]] = 1.0
    anneal: Suppress[Fixed[bool]] = False
    gae_lambda: Suppress[Fixed[float]] = 1.0
    clip_coef: Suppress[Fixed[float]] = 1.0
    update_epochs: Suppress[Fixed[int]] = 1
    minibatch_size: Suppress[Fixed[int]] = 1
    target_kl: Suppress[Fixed[None]] = None
    max_grad_norm: Suppress[Fixed[float]] = 1.0
    own_defaults = {
        "PointMass": dict(total_timesteps=12_800, gradient_steps=150, batch_steps=16, gamma=0.9),
        "AntDir": dict(total_timesteps=4_000_000),
        # On MetaWorld as many gradient steps for each environment step as on HalfCheetahVel, in at most two core-hours.
        "ML1-Reach": dict(total_timesteps=4_000_000, gradient_steps=1250),
        "ML1-Push": dict(total_timesteps=3_000_000, gradient_steps=1250),
        "ML45-Train": dict(total_timesteps=4_000_000, gradient_steps=1250),
    }


def mlp(*sizes: int) -> nn.Sequential:
    """Linear layers of these sizes, with ReLUs between them."""
    layers = []
    for inputs, outputs in zip(sizes, sizes[1:]):
        layers += [nn.Linear(inputs, outputs), nn.ReLU()]
    return nn.Sequential(*layers[:-1])


class PEARL(trmrl.Agent):
    """Encoder, policy and Q-functions. It acts through collect, which gives it a z for each episode."""

    method = "PEARL"
    refine = None  # there are no memories to analyse
    evaluation_episodes = 3
    prior_episodes = 2  # of a trial: they act on z ∼ p(z), and training draws its contexts from them alone
    replay_trials = 500

    def __init__(self, env, args: Args):
        if distributed.is_torchelastic_launched():
            raise trmrl.UserError("torchrun: PEARL trains in one process, so start it with python")
        if args.episodes_per_trial <= self.prior_episodes:
            raise trmrl.UserError(f"--episodes-per-trial {args.episodes_per_trial}: takes 3 or more, the third adapts")
        if args.target_rate > 1:
            raise trmrl.UserError(f"--target-rate {args.target_rate}: takes a share, at most 1")
        super().__init__(env, args)
        del self.policy, self.value, self.log_std, self.return_mean, self.return_std  # SAC's are in build

    def build(self, args: Args) -> None:
        S, A, d, m = self.num_observations, self.num_actions, args.d_model, args.latent_size
        self.encoder = mlp(S + A + 1 + S, 64, 64, 2 * m)
        self.actor = mlp(S + m, d, d, 2 * A)
        self.q_functions = nn.ModuleList(mlp(S + A + m, d, d, 1) for _ in range(2))
        self.q_targets = deepcopy(self.q_functions).requires_grad_(False)
        self.log_temperature = nn.Parameter(torch.tensor(math.log(0.2)))
        T, trials = args.episodes_per_trial * self.horizon, self.replay_trials
        self.register_buffer("replay", torch.zeros(T + 1, trials, len(self.input_mean)))  # newest last
        self.register_buffer("replay_order", torch.zeros(T, trials, dtype=torch.int32))  # steps, the usable ones first
        self.register_buffer("replay_counts", torch.zeros(2, trials))  # usable steps: of the first two episodes, of all

    def usable(self, valid: Tensor) -> Tensor:
        """The steps of valid (steps, B) that are learned from. The last step of an episode is not among them, since the
        observation s' after it is not stored. So no s' is at the time limit, and where η is 1, there was a death."""
        steps = torch.arange(len(valid), device=valid.device)
        return valid & ((steps + 1) % self.horizon != 0)[:, None]

    def experience(self, transitions: Tensor, t: Tensor, trial: Tensor) -> tuple:
        """s, a, r, s' and η of steps t (C, B) of trials (B,): (C, B, S), (C, B, A), (C, B, 1), (C, B, S), (C, B, 1).
        s and s' are normalised; after a death s' is not known, and an observation of zeros stands for it. r is divided
        by its std alone: to add to rewards would change what a death costs."""
        now, after = transitions[t, trial], transitions[t + 1, trial]
        s, a, r, eta = trmrl.named(now, self.num_observations)
        std = self.input_var[-2].sqrt().clamp(min=self.min_input_std)
        s, s_next = (self.normalise(x)[..., : self.num_observations] for x in (now, after))
        return s, a, r[..., None] / std, s_next, eta[..., None]

    # --- The posterior (Sec. 4) ---------------------------------------------------------------------------------------
    def posterior(self, context: tuple, counts: Tensor | None = None) -> Normal:
        """q(z | c), with mean and std (B, m), of the first counts (B,), else all, of C transitions of B tasks: the
        product of their Gaussian factors, 1/σ² = Σ 1/σ_n², μ = σ² Σ μ_n/σ_n². Without any it is the prior N(0, I)."""
        s, a, r, s_next, _ = context
        mean, raw_variance = self.encoder(torch.cat([s, a, r, s_next], dim=2)).chunk(2, dim=2)  # (C, B, m)
        precision = 1 / softplus(raw_variance).clamp(min=1e-7)
        if counts is not None:
            precision = precision * (torch.arange(len(s), device=s.device)[:, None] < counts)[..., None]
        total = precision.sum(0)
        total = torch.where(total > 0, total, 1.0)
        return Normal((precision * mean).sum(0) / total, total**-0.5, validate_args=False)

    # --- Policy and Q-functions, SAC (Haarnoja et al. 2018) -----------------------------------------------------------
    def act_with(self, s: Tensor, z: Tensor, noise: Tensor) -> tuple[Tensor, Tensor]:
        """Actions (..., A) in (-1, 1) and their log-probabilities (..., 1): tanh of a Gaussian."""
        mean, log_std = self.actor(torch.cat([s, z], dim=-1)).chunk(2, dim=-1)
        log_std = log_std.clamp(-20, 2)
        u = mean + log_std.exp() * noise
        log_prob = -0.5 * noise**2 - log_std - 0.5 * math.log(2 * math.pi)
        log_slope = 2 * (math.log(2) - u - softplus(-2 * u))  # log(1 - tanh² u)
        return u.tanh(), (log_prob - log_slope).sum(-1, keepdim=True)

    def losses(self, context: tuple, batch: tuple, z_noise: Tensor, noise: Tensor, args: Args) -> dict[str, Tensor]:
        """The losses of one gradient step, each of which update minimises by its own parameters. context and batch are
        experience of the same B trials; z_noise (B, m) and noise (2, rows, B, A) are normal."""
        s, a, r, s_next, died = batch
        q = self.posterior(context)
        z = (q.mean + q.stddev * z_noise).expand(len(s), -1, -1)
        temperature = self.log_temperature.exp().detach()
        with torch.no_grad():
            a_next, log_prob = self.act_with(s_next, z, noise[0])
            x = torch.cat([s_next, a_next, z], dim=2)
            value = torch.minimum(*(target(x) for target in self.q_targets)) - temperature * log_prob
            y = r + args.gamma * (1 - died) * value
        q_error = sum((function(torch.cat([s, a, z], dim=2)) - y).square().mean() for function in self.q_functions)
        kl = kl_divergence(q, Normal(0.0, 1.0)).sum()  # over tasks and dimensions, as in the authors' code
        actions, log_prob = self.act_with(s, z.detach(), noise[1])
        x = torch.cat([s, actions, z.detach()], dim=2)
        best = torch.minimum(*(function(x) for function in self.q_functions))
        entropy = -log_prob.detach().mean()
        return {
            "value_loss": q_error + args.kl_weight * kl,
            "policy_loss": (temperature * log_prob - best).mean(),
            "temperature_loss": self.log_temperature * (entropy + self.num_actions),  # its aim: an entropy of -A
            "entropy": entropy,
            "context_kl": kl.detach(),
        }

    def optimizer(self, args: Args) -> Optimizer:
        trained = [parameter for parameter in self.parameters() if parameter.requires_grad]
        return Adam(trained, lr=args.learning_rate, fused=True)

    # --- Meta-training (Alg. 1) and meta-test (Alg. 2) ----------------------------------------------------------------
    def collect(self, envs: list, tasks: np.ndarray, episodes: int, rng: Generator, explore: bool) -> trmrl.Trial:
        z_noise = rng.standard_normal((episodes, len(tasks), self.actor[0].in_features - self.num_observations))
        return trmrl.collect_trial(Explorer(self, z_noise), envs, tasks, episodes, rng, explore)

    def remember(self, trial: trmrl.Trial) -> None:
        """Appends trials to the replay buffer. Usable steps come first in replay_order, and among them those of the
        first two episodes, so that the counts say from how many to draw."""
        usable = self.usable(trial.valid)
        order = (~usable).int().argsort(dim=0, stable=True).int()
        counts = torch.stack([usable[: self.prior_episodes * self.horizon].sum(0), usable.sum(0)])
        for name, new in (("replay", trial.transitions), ("replay_order", order), ("replay_counts", counts)):
            setattr(self, name, torch.cat([getattr(self, name), new], dim=1)[:, -self.replay_trials :].clone())

    def draw(self, trials: Tensor, number: int, kind: int, rng: Generator) -> tuple:
        """number usable steps of each of the trials (B,), with replacement: kind 0 draws from a trial's first two
        episodes, kind 1 from all."""
        uniform = torch.from_numpy(rng.random((number, len(trials)), dtype=np.float32)).to(trials.device)
        i = (uniform * self.replay_counts[kind, trials]).long()
        return self.experience(self.replay, self.replay_order[i, trials].long(), trials)

    def update(self, optimizer: Optimizer, trial: trmrl.Trial, args: Args, rng: Generator, left: float) -> dict:
        """gradient_steps steps of SAC on the latest trials. Returns columns of progress.csv. Its own are
        context_kl, the KL of posterior and prior summed over a step's trials, and SAC's temperature and its loss.
        value_loss is the Q-functions' error and the weighted KL."""
        if self.input_count == 1:  # once: what was learned before would be lost on inputs that are scaled anew
            self.count_inputs(trial.transitions[:-1][trial.valid])
        self.remember(trial)
        learners = {"value_loss": [*self.encoder.parameters(), *self.q_functions.parameters()]}  # by each loss
        learners |= {"policy_loss": [*self.actor.parameters()], "temperature_loss": [self.log_temperature]}
        stored = self.replay_counts[0].nonzero()[:, 0]  # trials
        shapes = (args.batch_trials, args.latent_size), (2, args.batch_steps, args.batch_trials, self.num_actions)
        statistics = []
        for _ in range(args.gradient_steps):
            trials = stored[rng.integers(len(stored), size=args.batch_trials)]
            context, batch = self.draw(trials, args.context_size, 0, rng), self.draw(trials, args.batch_steps, 1, rng)
            noises = (torch.from_numpy(rng.standard_normal(shape, dtype=np.float32)) for shape in shapes)
            z_noise, noise = (noise.to(trials.device) for noise in noises)
            losses = self.losses(context, batch, z_noise, noise, args)
            optimizer.zero_grad()
            for name, parameters in learners.items():
                losses[name].backward(inputs=parameters)
            optimizer.step()
            with torch.no_grad():
                for target, parameter in zip(self.q_targets.parameters(), self.q_functions.parameters()):
                    target.lerp_(parameter, args.target_rate)
            statistics.append(torch.stack([loss.detach() for loss in losses.values()]))
        row = dict(zip(losses, torch.stack(statistics).mean(0).tolist()))
        if not all(map(math.isfinite, row.values())):
            raise trmrl.RunFailed("a loss is not finite")
        row |= {"gradient_steps": args.gradient_steps, "learning_rate": args.learning_rate}
        return row | {"temperature": self.log_temperature.exp().item()}


class Explorer:
    """What collect_trial acts with, through act and three sizes: PEARL with z drawn for each task at each episode's
    start, from the prior in the first two episodes, later from the posterior that all episodes so far give (Alg. 2)."""

    def __init__(self, agent: PEARL, z_noise: np.ndarray):
        self.agent, self.z_noise = agent, torch.from_numpy(z_noise).float()  # (episodes, n, m)
        self.num_observations, self.num_actions, self.horizon = agent.num_observations, agent.num_actions, agent.horizon

    @torch.inference_mode()
    def act(self, transitions: Tensor, t: int, alive: Tensor, noise: Tensor, state) -> tuple:
        """As trmrl.Agent.act, without values. The state: z (n, m), and where each task was alive, a list of (n,)."""
        z, lived = state or (None, [])
        if t % self.horizon == 0 and t < len(transitions) - 1:
            z = self.z_noise[t // self.horizon]
            if t // self.horizon >= self.agent.prior_episodes:
                usable = self.agent.usable(torch.stack(lived))
                order = (~usable).int().argsort(dim=0, stable=True)
                context = self.agent.experience(transitions, order, torch.arange(len(alive)))
                q = self.agent.posterior(context, usable.sum(0))
                z = q.mean + q.stddev * z
        s = self.agent.normalise(transitions[t])[:, : self.num_observations]
        action, log_prob = self.agent.act_with(s, z, noise)
        return action, log_prob[:, 0], torch.zeros(len(alive)), (z, [*lived, alive.clone()])


if __name__ == "__main__":
    sys.exit(trmrl.main(agent_class=PEARL, args_class=Args))
