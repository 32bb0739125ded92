"""MAML-TRPO in one file: "Model-Agnostic Meta-Learning for Fast Adaptation of Deep Networks" (Finn et al., ICML 2017).

Meta-training looks for parameters θ from which one step of policy gradient on a task's own episodes gives a good policy
for that task. The outer step goes along the gradient of the adapted policies' return, through the inner step (second
order), within a trust region (TRPO, Schulman et al. 2015). At meta-test a smaller step follows each episode.

    python baselines/maml.py --env HalfCheetahVel     trmrl.py's flags, where they mean something; the same run folder

MAML's Alg. 3 (its Sec. 3.2) and this file; tasks, trials, normalisation and meta-tests are trmrl.py's.
Lines 1 to 3       θ; iterations; draw tasks         MAML.build; trmrl.train
Lines 4 and 9      for all tasks                     trmrl.collect_trial when acting, vmap when learning
Lines 5 and 8      sample trajectories D and D'      MAML.collect, with a Learner
Lines 6 and 7      θ'_i = θ - α ∇ L_i(θ), L: Eq. 4   MAML.adapt, in Learner and again in MAML.adapted_policies
Line 10            θ ← θ - β ∇ Σ L_i(θ'_i)           MAML.update: TRPO, whose line search stands for β

Half of a trial's episodes come before the inner step, half after it. Unlike in the paper: by default that is four
episodes each, where the paper has 20; two layers of 64 tanh units, where it has 100 ReLUs each; advantages by GAE; a γ
of 0.95; normalised inputs; a larger trust region; exact products with the KL's Hessian instead of finite differences.
The std has a lower bound, as without noise there is no inner gradient. The bound is enforced after the line search, so
that an outer step may exceed max_kl. At meta-test one step follows each episode, by default at a fourth of the rate. So
four of them go as far as training's inner step, and the five of a meta-test 1.25 times as far. The authors' code takes
a whole step first, then halves the rate. The episodes that are adapted from act with noise there, too; only the last
one acts by the mean.
"""

import math
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from numpy.random import Generator
from torch import Tensor, nn
from torch.distributions import Normal, kl_divergence
from torch.func import functional_call, grad, jvp, vjp, vmap
from torch.nn.utils import parameters_to_vector, vector_to_parameters
from torch.optim import SGD, Optimizer
from tyro.conf import Fixed, Suppress

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
import trmrl  # noqa: E402 (it is in the folder above)


@dataclass
class Args(trmrl.Args):
    """MAML-TRPO: meta-train; at meta-test a gradient step follows each episode but the last, which alone acts without
    noise. An evaluation during training adapts from as many episodes as training does. A word in brackets opens a group
    of flags."""

    num_tasks: int = 10  # tasks drawn in each iteration, with one trial of each
    episodes_per_trial: int = 8  # the first half of them is adapted from, the other half follows the inner step
    d_model: int = 64  # [model] the size of each of the policy's two hidden layers
    init_std: float = 0.5  # initial std of the policy (learned, at least min_std)
    min_std: float = 0.5  # [MAML] lower bound of the std in θ; an inner step may go below it
    total_timesteps: int = 10_000_000  # [training] environment steps of meta-training, rounded up to whole iterations
    inner_rate: float = 0.1  # α, the rate of an inner step; at meta-test α / (half of episodes_per_trial)
    gae_lambda: float = 0.95  # λ of generalised advantage estimation
    max_kl: float = 0.03  # [TRPO] largest mean KL between the adapted policies before and after an outer step
    cg_steps: int = 10  # steps of the conjugate gradient method
    damping: float = 1e-5  # added to the diagonal of the KL's Hessian
    line_search_steps: int = 15  # tries of the line search, each 0.8 times as long as the one before
    memory_length: Suppress[Fixed[int]] = 1
    layers: Suppress[Fixed[int]] = 1
    heads: Suppress[Fixed[int]] = 1
    t_fixup: Suppress[Fixed[bool]] = False
    anneal: Suppress[Fixed[bool]] = False
    learning_rate: Suppress[Fixed[float]] = 1.0
    clip_coef: Suppress[Fixed[float]] = 1.0
    update_epochs: Suppress[Fixed[int]] = 1
    minibatch_size: Suppress[Fixed[int]] = 1
    target_kl: Suppress[Fixed[None]] = None
    max_grad_norm: Suppress[Fixed[float]] = 1.0
    own_defaults = {
        "PointMass": dict(min_std=0.3, total_timesteps=64_000),
        "AntDir": dict(init_std=0.3, min_std=0.1, total_timesteps=4_000_000),  # noise in eight actions costs much
        "ML1-Reach": dict(total_timesteps=8_000_000),  # here and on ML1-Push, what two core-hours are enough for
        "ML1-Push": dict(total_timesteps=5_000_000),
    }


class Experience(NamedTuple):
    """k steps of each of n tasks, from which a policy gradient is computed."""

    s: Tensor  # (n, k, S), normalised
    a: Tensor  # (n, k, A)
    advantages: Tensor  # (n, k), with mean 0 and std 1 over a task's valid steps
    weights: Tensor  # (n, k), 0 where not valid, else 1 / the number of the task's valid steps


class MAML(trmrl.Agent):
    """A Gaussian policy whose parameters are one vector: θ (P,), after adapting to n tasks θ' (n, P). It acts through
    collect, which adapts it."""

    method = "MAML"
    refine = None  # there are no memories to analyse

    def __init__(self, env, args: Args):
        if args.episodes_per_trial % 2:
            raise trmrl.UserError(f"--episodes-per-trial {args.episodes_per_trial}: takes an even number")
        if args.init_std < args.min_std:
            raise trmrl.UserError(f"--init-std {args.init_std}: takes at least --min-std {args.min_std}")
        self.episodes_before = args.episodes_per_trial // 2
        self.evaluation_episodes = self.episodes_before + 1
        super().__init__(env, args)
        del self.value, self.return_mean, self.return_std  # the baseline is fitted anew to each task's episodes

    def build(self, args: Args) -> None:
        d, self.gamma, self.gae_lambda, self.inner_rate = args.d_model, args.gamma, args.gae_lambda, args.inner_rate
        self.hidden = nn.Sequential(nn.Linear(self.num_observations, d), nn.Tanh(), nn.Linear(d, d), nn.Tanh())

    def forward(self, s: Tensor) -> tuple[Tensor, Tensor]:
        """Mean and log-std at normalised observations; policy_of calls it with parameters other than its own."""
        return self.policy(self.hidden(s)), self.log_std

    def policy_of(self, theta: Tensor, s: Tensor) -> tuple[Tensor, Tensor]:
        """Mean (..., A) and log-std (A,) of the policy with parameters θ (P,), at normalised observations (..., S)."""
        shapes = {name: parameter.shape for name, parameter in self.named_parameters()}
        parts = theta.split([shape.numel() for shape in shapes.values()])
        return functional_call(self, {name: part.view(shapes[name]) for name, part in zip(shapes, parts)}, (s,))

    def experience(self, transitions: Tensor, valid: Tensor) -> Experience:
        """Of whole episodes, transitions (E · H, n, S + A + 2) and valid (E · H, n), with advantages by GAE within each
        episode, after which nothing comes, and by a linear baseline that is fitted to them (Duan et al., ICML 2016)."""
        s, a, r, _ = trmrl.named(transitions, self.num_observations)
        s = self.normalise(transitions)[..., : self.num_observations]
        r, ok = (x.unflatten(0, (-1, self.horizon)).transpose(0, 1) for x in (r, valid))  # (H, E, n)
        time = torch.arange(self.horizon, device=r.device).repeat(r.shape[1])[:, None, None] / self.horizon
        time = time.expand(*valid.shape, 1)
        features = torch.cat([s, s**2, time, time**2, time**3, torch.ones_like(time)], dim=2)  # (E · H, n, ·)
        returns = self.discounted_sum(r, self.gamma).transpose(0, 1).flatten(0, 1)
        values = linear_fit(features, returns, valid).unflatten(0, (-1, self.horizon)).transpose(0, 1) * ok
        deltas = (r + self.gamma * torch.cat([values[1:], torch.zeros_like(values[:1])]) - values) * ok
        advantages = self.discounted_sum(deltas, self.gamma * self.gae_lambda).transpose(0, 1).flatten(0, 1)
        weights = valid / valid.sum(0)
        centred = advantages - (weights * advantages).sum(0)
        advantages = centred / ((weights * centred**2).sum(0).sqrt() + 1e-8)
        return Experience(*(x.transpose(0, 1) for x in (s, a, advantages, weights)))

    @staticmethod
    def discounted_sum(x: Tensor, factor: float) -> Tensor:
        """Σ_i factor^i x_t+i of x (H, …), along its first dimension."""
        sums, following = torch.empty_like(x), torch.zeros_like(x[0])
        for t in reversed(range(len(x))):
            sums[t] = following = x[t] + factor * following
        return sums

    def adapt(self, theta: Tensor, experience: Experience, rate: float) -> Tensor:
        """The inner step of one task: θ' = θ - rate · ∇ L(θ). L is the mean over steps of -log π(a | s) · advantage."""

        def loss(theta: Tensor) -> Tensor:
            mean, log_std = self.policy_of(theta, experience.s)
            log_probs = Normal(mean, log_std.exp(), validate_args=False).log_prob(experience.a).sum(1)
            return -(experience.weights * experience.advantages * log_probs).sum()

        return theta - rate * grad(loss)(theta)

    def adapted_policies(self, theta: Tensor, before: Experience, s: Tensor) -> tuple[Tensor, Tensor]:
        """The policies that θ gives after one inner step on each task's experience before: means (n, k, A) at s
        (n, k, S), and log-stds (n, A)."""
        thetas = vmap(self.adapt, in_dims=(None, 0, None))(theta, before, self.inner_rate)
        return vmap(self.policy_of)(thetas, s)

    def collect(self, envs: list, tasks: np.ndarray, episodes: int, rng: Generator, explore: bool) -> trmrl.Trial:
        """In training with an inner step after half of the episodes; at meta-test with a smaller one after each."""
        if explore:
            learner = Learner(self, self.episodes_before, self.inner_rate, last_by_mean=False)
        else:
            learner = Learner(self, 1, self.inner_rate / self.episodes_before, last_by_mean=True)
        return trmrl.collect_trial(learner, envs, tasks, episodes, rng, explore=True)

    def optimizer(self, args: Args) -> Optimizer:
        return SGD(self.parameters(), lr=args.inner_rate)  # never used, as TRPO has no state; trmrl.py stores it

    def meta_objective(self, theta: Tensor, before: Experience, after: Experience, old: tuple) -> tuple[Tensor, Tensor]:
        """TRPO's objective of the adapted policies (to be maximised) and KL(old ‖ new), means over tasks and steps.
        old holds the adapted policies' means (n, k, A) and log-stds (n, A) where the outer step starts."""
        new = self.adapted_policies(theta, before, after.s)
        old, new = (Normal(mean, log_std.exp()[:, None], validate_args=False) for mean, log_std in (old, new))
        log_ratio = new.log_prob(after.a).sum(2) - old.log_prob(after.a).sum(2)
        gain = (after.weights * after.advantages * log_ratio.exp()).sum(1).mean()
        return gain, (after.weights * kl_divergence(old, new).sum(2)).sum(1).mean()

    def kl_hessian(self, theta: Tensor, before: Experience, after: Experience):
        """The function v ↦ H v, H the Hessian (P, P) at θ of the mean KL(old ‖ new). There KL and its gradient are 0,
        so that H = Jᵀ M J, with J the derivative of means and log-stds by θ, through the inner step, and M the KL's
        Hessian by these: 1 / σ² and 2."""
        (_, log_std), pull_back = vjp(lambda theta: self.adapted_policies(theta, before, after.s), theta)

        def product(v: Tensor) -> Tensor:
            _, (mean, log_std_) = jvp(lambda theta: self.adapted_policies(theta, before, after.s), (theta,), (v,))
            by_mean = after.weights[..., None] * mean / (2 * log_std).exp()[:, None]
            return pull_back((by_mean / len(mean), 2 * log_std_ / len(mean)))[0]

        return product

    @torch.no_grad()
    def update(self, optimizer: Optimizer, trial: trmrl.Trial, args: Args, rng: Generator, left: float) -> dict:
        """One outer step (Alg. 3, line 10), by TRPO. Returns columns of progress.csv; its own are inner_kl, from each
        task's adapted policy to the one before, and the returns before and after adapting. gradient_steps is 1, or 0 if
        the line search found no step."""
        half = self.episodes_before * self.horizon
        before = self.experience(trial.transitions[:half], trial.valid[:half])
        after = self.experience(trial.transitions[half:-1], trial.valid[half:])
        theta = parameters_to_vector(self.parameters())
        old = self.adapted_policies(theta, before, after.s)
        gradient = grad(lambda theta: self.meta_objective(theta, before, after, old)[0])(theta)
        hessian = self.kl_hessian(theta, before, after)
        direction = conjugate_gradient(lambda v: hessian(v) + args.damping * v, gradient, args.cg_steps)
        step = direction * (2 * args.max_kl / (direction @ hessian(direction)).clamp(min=1e-12)).sqrt()
        if not torch.isfinite(step).all():
            raise trmrl.RunFailed("the outer step is not finite")
        start, _ = self.meta_objective(theta, before, after, old)
        row = {"policy_loss": -start.item(), "approx_kl": 0.0, "gradient_steps": 0}
        for i in range(args.line_search_steps):
            gain, kl = self.meta_objective(theta + 0.8**i * step, before, after, old)
            if gain > start and kl <= args.max_kl:
                vector_to_parameters(theta + 0.8**i * step, self.parameters())
                row = {"policy_loss": -gain.item(), "approx_kl": kl.item(), "gradient_steps": 1}
                break
        self.log_std.clamp_(min=math.log(args.min_std))
        self.count_inputs(trial.transitions[:-1][trial.valid])
        mean, log_std = self.policy_of(theta, after.s)
        inner_kl = kl_divergence(Normal(old[0], old[1].exp()[:, None]), Normal(mean, log_std.exp())).sum(2)
        halves = trmrl.episode_results(trial, 2)[0].sum(2).mean(0)  # returns before and after the inner step
        returns = halves / self.episodes_before
        row |= {"entropy": Normal(0.0, old[1].exp()).entropy().sum(1).mean().item()}
        row |= {"inner_kl": (after.weights * inner_kl).sum(1).mean().item()}
        return row | {"return_before": returns[0].item(), "return_after": returns[1].item()}


class Learner:
    """What collect_trial acts with, through act and three sizes: a policy for each task, which takes an inner step
    after every so many episodes."""

    def __init__(self, agent: MAML, every: int, rate: float, last_by_mean: bool):
        self.agent, self.every, self.rate, self.last_by_mean = agent, every, rate, last_by_mean
        self.num_observations, self.num_actions, self.horizon = agent.num_observations, agent.num_actions, agent.horizon

    @torch.no_grad()
    def act(self, transitions: Tensor, t: int, alive: Tensor, noise: Tensor, state) -> tuple:
        """As trmrl.Agent.act, without values. The state: θ' (n, P), and where each task was alive, a list of (n,)."""
        agent, T, steps = self.agent, len(transitions) - 1, self.every * self.horizon
        thetas, lived = state or (parameters_to_vector(agent.parameters()).expand(len(alive), -1), [])
        if t % steps == 0 and 0 < t < T:
            experience = agent.experience(transitions[t - steps : t], torch.stack(lived[t - steps :]))
            thetas = vmap(agent.adapt, in_dims=(0, 0, None))(thetas, experience, self.rate)
        if self.last_by_mean and t >= T - self.horizon:
            noise = torch.zeros_like(noise)
        s = agent.normalise(transitions[t])[:, None, : self.num_observations]
        mean, log_std = vmap(agent.policy_of)(thetas, s)
        policy = Normal(mean[:, 0], log_std.exp(), validate_args=False)
        action = policy.mean + policy.stddev * noise
        return action, policy.log_prob(action).sum(1), torch.zeros(len(alive)), (thetas, [*lived, alive.clone()])


def linear_fit(features: Tensor, targets: Tensor, valid: Tensor) -> Tensor:
    """Predictions (k, n) by ridge regression of targets (k, n) on features (k, n, ·), for each of n tasks by itself,
    fitted where valid (k, n). With the authors' ridge, 1e-5, a short episode would be fitted exactly."""
    x = features.transpose(0, 1).double()  # (n, k, ·)
    xt = (features * valid[..., None]).permute(1, 2, 0).double()
    ridge = 0.1 * torch.eye(x.shape[2], dtype=x.dtype, device=x.device)
    weights = torch.linalg.solve(xt @ x + ridge, xt @ targets.T[..., None].double())
    return (x @ weights)[..., 0].T.float()


def conjugate_gradient(product, b: Tensor, steps: int) -> Tensor:
    """An approximate solution x of H x = b after so many steps. product(v) is H v; H is positive definite."""
    x, residual = torch.zeros_like(b), b.clone()
    direction, square = residual.clone(), b @ b
    for _ in range(steps):
        if square <= 1e-10 * (b @ b):
            break
        h = product(direction)
        length = square / (direction @ h)
        x, residual = x + length * direction, residual - length * h
        square, before = residual @ residual, square
        direction = residual + square / before * direction
    return x


if __name__ == "__main__":
    sys.exit(trmrl.main(agent_class=MAML, args_class=Args))
