"""VariBAD in one file: "VariBAD: A Very Good Method for Bayes-Adaptive Deep RL" (Zintgraf et al., ICLR 2020).

A recurrent encoder turns what happened so far in a trial, τ_:t = (s_0, a_0, r_0, …, s_t), into a belief over the task:
a Gaussian q(m | τ_:t) over a latent variable m. Encoder and decoder are trained as a variational auto-encoder: from a
sample of m the decoder must predict all rewards of the trial, past and future. The policy sees the state and the
belief, so that it can act differently while it is unsure. At meta-test all weights are frozen; the belief adapts.

    python baselines/varibad.py --env HalfCheetahVel     the same flags as trmrl.py's, and the same run folder

VariBAD's paper and this file; tasks, trials, PPO, normalisation and meta-tests are trmrl.py's.
Sec. 3.2, q(m | τ_:t)      VariBAD.encode, belief      Eq. 8 to 10, ELBO     VariBAD.elbo
Sec. 3.2, p(r | m, …)      VariBAD.decoder             Eq. 11, training      VariBAD.update
Sec. 3.3, π(a | s, q)      VariBAD.act, forward

The belief is carried through all episodes of a trial, as in the paper. Smaller than in the authors' code: the networks,
the buffer of trials, and the number of (t, reward) pairs in a step. Their embeddings of s, a and r are one layer here.
"""

import sys
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import torch
from numpy.random import Generator
from torch import Tensor, nn
from torch.distributions import Normal, kl_divergence
from torch.optim import Adam, Optimizer
from tyro.conf import Fixed, Suppress

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
import trmrl  # noqa: E402 (it is in the folder above)


@dataclass
class Args(trmrl.Args):
    """VariBAD: meta-train on a distribution of tasks, then meta-test with frozen weights."""

    d_model: int = 64  # the size of the encoder's state and of each hidden layer of policy and value
    learning_rate: float = 7e-4  # Adam's learning rate for policy and value
    update_epochs: int = 10  # passes of an update over the iteration's trials, fewer if target_kl ends it
    minibatch_size: int = 400  # steps of a minibatch, drawn from all tasks
    memory_length: Suppress[Fixed[int]] = 1
    layers: Suppress[Fixed[int]] = 1
    heads: Suppress[Fixed[int]] = 1
    t_fixup: Suppress[Fixed[bool]] = False
    latent_size: int = 5  # [VAE] the numbers of m, the latent variable that stands for the task
    kl_weight: float = 0.002  # weight of the KL between successive beliefs; the error of a reward has 1
    vae_learning_rate: float = 1e-3  # Adam's learning rate for encoder and decoder
    vae_steps: int = 5  # gradient steps of encoder and decoder in each iteration
    vae_trials: int = 20  # trials in such a step, drawn from the latest 400
    vae_pairs: int = 25  # beliefs drawn from each of these trials, and rewards that each of them must predict
    own_defaults = {"PointMass": dict(vae_steps=20, vae_learning_rate=3e-3)}


class VariBAD(trmrl.Agent):
    """Trials of n or B tasks are read as the steps k that were lived, without those after a death: (T, B, S + A + 2)
    with the lived ones in front, and lived (T, B), False from where a trial has no more of them."""

    method = "VariBAD"
    refine = None  # there are no memories to analyse
    replay_trials = 400

    def build(self, args: Args) -> None:
        S, A, d, m = self.num_observations, self.num_actions, args.d_model, args.latent_size
        hidden = [nn.Linear(m + S + A + S, 64), nn.ReLU(), nn.Linear(64, 32), nn.ReLU()]
        self.vae = nn.ModuleDict()
        self.vae["embedding"] = nn.Sequential(nn.Linear(S + A + 1, 32), nn.ReLU())
        self.vae["gru"] = nn.GRU(32, d)
        self.vae["belief"] = nn.Linear(d, 2 * m)  # the mean of q, and the logarithm of its variance
        self.vae["decoder"] = nn.Sequential(*hidden, nn.Linear(32, 1))  # p(r | m, s, a, s'), of normalised rewards
        for parameter in self.vae["gru"].parameters():  # as in the authors' code
            nn.init.orthogonal_(parameter) if parameter.dim() == 2 else nn.init.zeros_(parameter)
        self.actor, self.critic = (
            nn.Sequential(nn.Linear(S + 2 * m, d), nn.Tanh(), nn.Linear(d, d), nn.Tanh()) for _ in range(2)
        )
        T = args.episodes_per_trial * self.horizon
        self.register_buffer("replay", torch.zeros(T, self.replay_trials, len(self.input_mean)))  # newest last
        self.register_buffer("replay_lived", torch.zeros(T, self.replay_trials, dtype=torch.bool))

    def experience(self, steps: Tensor) -> Tensor:
        """What the encoder reads: all (s_k+1, a_k, r_k), embedded, (T - 1, B, 32). As in the paper, η is not read."""
        s, a, r, _ = trmrl.named(self.normalise(steps), self.num_observations)
        return self.vae["embedding"](torch.cat([s[1:], a[:-1], r[:-1, :, None]], dim=2))

    def belief(self, h: Tensor) -> Normal:
        """q(m | τ_:t), with mean and std (..., m), of the encoder's states h (..., d)."""
        mean, log_variance = self.vae["belief"](h).chunk(2, dim=-1)
        return Normal(mean, (0.5 * log_variance.clamp(-10, 4)).exp(), validate_args=False)

    def beliefs(self, steps: Tensor) -> Normal:
        """The belief before each of the steps, with mean and std (T, B, m). A state of zeros gives the first one."""
        h, _ = self.vae["gru"](self.experience(steps))
        return self.belief(torch.cat([torch.zeros_like(h[:1]), h]))

    def elbo(self, steps: Tensor, lived: Tensor, rng: Generator, pairs: int) -> tuple[Tensor, Tensor]:
        """The two parts of the negative ELBO (Eq. 8 to 10), as means where the paper has sums: the squared error of the
        predicted rewards, and KL(q_k ‖ q_k-1), with q_-1 = N(0, I). Of each trial so many beliefs are drawn, and as
        many rewards, past and future ones, that each belief must predict from a sample of m. The last reward of an
        episode is never drawn, since the observation after it is not stored."""
        q = self.beliefs(steps)
        prior = Normal(torch.zeros_like(q.mean[:1]), torch.ones_like(q.mean[:1]))
        before = Normal(torch.cat([prior.mean, q.mean[:-1]]), torch.cat([prior.stddev, q.stddev[:-1]]))
        kl = kl_divergence(q, before).sum(2)[lived].mean()
        known = lived[1:] & (
            steps[:-1, :, -1] == 0
        )  # (T - 1, B): lived, and η = 0, so that s_k+1 is of the same episode
        i, j = draw(lived, pairs, rng), draw(known, pairs, rng)
        noise = torch.from_numpy(rng.standard_normal((*i.shape, q.mean.shape[2]), dtype=np.float32)).to(steps.device)
        m = q.mean.take_along_dim(i[..., None], 0) + q.stddev.take_along_dim(i[..., None], 0) * noise  # (pairs, B, m)
        s, a, r, _ = trmrl.named(self.normalise(steps), self.num_observations)
        facts = torch.cat([s[:-1], a[:-1], s[1:], r[:-1, :, None]], dim=2).take_along_dim(j[..., None], 0)
        x = torch.cat([x.expand(len(i), len(j), -1, -1) for x in (m[:, None], facts[None, ..., :-1])], dim=3)
        error = (self.vae["decoder"](x)[..., 0] - facts[..., -1]) ** 2  # (pairs, pairs, B)
        drawn = lived.take_along_dim(i, 0)[:, None] & known.take_along_dim(j, 0)  # False where there were too few
        return ((error * drawn).sum((0, 1)) / drawn.sum((0, 1)).clamp(min=1)).mean(), kl

    def forward(self, rows: Tensor, t: Tensor, task: Tensor) -> tuple[Normal, Tensor]:
        """π and V of state and belief. rows (T + 1, n, S + A + 2 + 2 m) are transitions, then the mean and the std of
        the belief before each of them. The authors' code has the log-variance, which grows to many times the other
        inputs' size once the task is known."""
        transitions, belief = rows[t, task].tensor_split([len(self.input_mean)], dim=1)
        s = self.normalise(transitions)[:, : self.num_observations]
        return self.policy_and_value(torch.cat([s, belief], dim=1))

    def policy_and_value(self, inputs: Tensor) -> tuple[Normal, Tensor]:
        policy, _ = super().policy_and_value(self.actor(inputs))
        _, value = super().policy_and_value(self.critic(inputs))
        return policy, value

    @torch.inference_mode()
    def act(self, transitions: Tensor, t: int, alive: Tensor, noise: Tensor, state) -> tuple:
        """One step on. The state: h (n, d), at first 0, and for each task the last step that was lived, (n,)."""
        n = transitions.shape[1]
        if t == 0:
            h, last = torch.zeros(n, self.vae["gru"].hidden_size), torch.zeros(n, dtype=torch.long)
        else:
            h, last = state
            steps = torch.stack([transitions[last, torch.arange(n)], transitions[t]])
            new_h, _ = self.vae["gru"](self.experience(steps), h[None])
            h, last = torch.where(alive[:, None], new_h[0], h), torch.where(alive, t, last)
        q = self.belief(h)
        rows = torch.cat([transitions[t], q.mean, q.stddev], dim=1)
        policy, value = self(rows[None], torch.zeros_like(last), torch.arange(n))
        action = policy.mean + policy.stddev * noise
        return action, policy.log_prob(action).sum(1), value, (h, last)

    def count_inputs(self, transitions: Tensor) -> None:
        super().count_inputs(transitions[:, : len(self.input_mean)])  # without the beliefs that update adds

    def optimizer(self, args: Args) -> Optimizer:
        policy = [parameter for name, parameter in self.named_parameters() if not name.startswith("vae.")]
        vae = {"params": self.vae.parameters(), "lr": args.vae_learning_rate}
        return Adam([{"params": policy}, vae], lr=args.learning_rate, eps=1e-5, fused=True)

    def update(self, optimizer: Optimizer, trial: trmrl.Trial, args: Args, rng: Generator, left: float) -> dict:
        """PPO, in which the beliefs are inputs like others (no gradient of its reaches the encoder, as in the authors'
        code), and then some steps of encoder and decoder on the latest trials (Eq. 11)."""
        order = (~trial.valid).int().argsort(dim=0, stable=True)  # the steps that were lived, then all others
        steps, lived = trial.transitions[:-1].take_along_dim(order[..., None], 0), trial.valid.take_along_dim(order, 0)
        with torch.no_grad():
            q = self.beliefs(steps)
        k = trial.valid.cumsum(0) - 1  # step t is the k-th that was lived
        beliefs = torch.cat([q.mean, q.stddev], dim=2).take_along_dim(k[..., None], 0)
        rows = torch.cat([trial.transitions, torch.cat([beliefs, torch.zeros_like(beliefs[:1])])], dim=2)
        row = super().update(optimizer, replace(trial, transitions=rows), args, rng, left)
        self.replay = torch.cat([self.replay, steps], dim=1)[:, -self.replay_trials :]
        self.replay_lived = torch.cat([self.replay_lived, lived], dim=1)[:, -self.replay_trials :]
        stored = self.replay_lived[0].nonzero()[:, 0].cpu()
        optimizer.param_groups[1]["lr"] = args.vae_learning_rate * left
        for _ in range(args.vae_steps):
            some = stored[rng.integers(len(stored), size=args.vae_trials)]
            error, kl = self.elbo(self.replay[:, some], self.replay_lived[:, some], rng, args.vae_pairs)
            optimizer.zero_grad()
            (error + args.kl_weight * kl).backward()
            nn.utils.clip_grad_norm_(self.vae.parameters(), args.max_grad_norm)
            optimizer.step()
        return row | {"reward_error": error.item(), "belief_kl": kl.item(), "belief_std": q.stddev.mean().item()}


def draw(allowed: Tensor, number: int, rng: Generator) -> Tensor:
    """Rows (number, B) where allowed (rows, B) is True, each at most once; if there are too few, others follow them."""
    chances = torch.from_numpy(rng.random(allowed.shape)).to(allowed.device) + allowed
    return chances.topk(min(number, len(allowed)), dim=0).indices


if __name__ == "__main__":
    sys.exit(trmrl.main(agent_class=VariBAD, args_class=Args))
