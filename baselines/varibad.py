"""VariBAD in one file: "VariBAD: A Very Good Method for Bayes-Adaptive Deep RL" (Zintgraf et al., ICLR 2020).

A recurrent encoder turns what happened so far in a trial, τ_:t = (s_0, a_0, r_0, …, s_t), into a belief over the task:
a Gaussian q(m | τ_:t) over a latent variable m. Encoder and decoder are trained as a variational auto-encoder: from a
sample of m the decoder must predict all rewards of the trial, past and future. The policy sees the state and the
belief, so that it can act differently while it is unsure. At meta-test all weights are frozen; the belief adapts.

    python baselines/varibad.py --env HalfCheetahVel     trmrl.py's flags, where they mean something; the same folder

VariBAD's paper (its Sec. 3) and this file; tasks, trials, PPO, normalisation and meta-tests are trmrl.py's. Its r_k+1,
the reward of step k, is r_k here.
the encoder q(m | τ_:t)                                  VariBAD.embed, q_of, encode
the decoder p(r | m, s, a, s'), of rewards alone         VariBAD.vae["decoder"], made in build
ELBO_t: all rewards, past and future, and the KL         VariBAD.elbo
the policy π(a | s, q(m | τ_:t)), and a value            VariBAD.forward
acting, while the belief adapts                          VariBAD.act
the objective: PPO, then the ELBO over a buffer          VariBAD.update

The belief is carried through all episodes of a trial, as in the paper. As in the authors' code, m decodes rewards
alone; the first belief is that of a zero state, so that s_0 is not encoded; and the policy's gradient does not reach
the encoder, so that the objective needs no weight λ. Unlike in their code: networks, buffer and the number of
(t, reward) pairs are smaller; one layer embeds s, a and r together, and the decoder has no such layer; rewards are
normalised, and kept within input_limit; the policy sees the belief's std instead of its log-variance; the gradients of
encoder and decoder are clipped, and their learning rate is annealed; PPO is trmrl.py's, without a bonus for entropy.
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

# On ML1 as many VAE steps for each environment step as on HalfCheetahVel. ML45-Train's length takes two core-hours.
# The KL limit holds in all environments, as an update may have 10 epochs.
METAWORLD = dict(learning_rate=2e-3, vae_learning_rate=3e-3, vae_steps=50, target_kl=trmrl.Args.target_kl)


@dataclass
class Args(trmrl.Args):
    """VariBAD: meta-train, then meta-test with frozen weights. A word in brackets opens a group of flags."""

    d_model: int = 64  # [model] the size of the encoder's state and of each hidden layer of policy and value
    learning_rate: float = 7e-4  # Adam's learning rate for policy and value
    update_epochs: int = 10  # passes of an update over the iteration's trials, fewer if target_kl ends it
    minibatch_size: int = 400  # steps of a minibatch, drawn from all tasks
    memory_length: Suppress[Fixed[int]] = 1
    layers: Suppress[Fixed[int]] = 1
    heads: Suppress[Fixed[int]] = 1
    t_fixup: Suppress[Fixed[bool]] = False
    latent_size: int = 5  # [VAE] how many numbers m has, the latent variable that stands for the task
    kl_weight: float = 0.002  # weight of the KL of successive beliefs; the authors' 0.1 goes with sums of 50 errors
    vae_learning_rate: float = 1e-3  # Adam's learning rate for encoder and decoder
    vae_steps: int = 20  # gradient steps of encoder and decoder in each iteration
    vae_trials: int = 20  # trials in such a step, drawn from the latest 400
    vae_pairs: int = 25  # beliefs drawn from each of these trials, and rewards that each of them must predict
    own_defaults = {
        "ML1-Reach": METAWORLD,
        "ML1-Push": METAWORLD,
        "ML45-Train": METAWORLD | dict(total_timesteps=4_000_000),
        "PointMass": dict(num_tasks=20, total_timesteps=32_000, vae_steps=10, vae_pairs=10, vae_learning_rate=5e-3),
    }


class VariBAD(trmrl.Agent):
    """Encoder and decoder read a trial without the steps after its deaths. steps (T, B, S + A + 2) has the steps that
    were lived in front, k = 0, 1, …; lived (T, B), a trial's valid in this order, is True there, else False."""

    method = "VariBAD"
    refine = None  # there are no memories to analyse
    replay_trials = 400

    def build(self, args: Args) -> None:
        S, A, d, m = self.num_observations, self.num_actions, args.d_model, args.latent_size
        hidden = [nn.Linear(m + S + A + S, 64), nn.ReLU(), nn.Linear(64, 32), nn.ReLU()]  # of m, s, a and s'
        self.vae = nn.ModuleDict()
        self.vae["embedding"] = nn.Sequential(nn.Linear(S + A + 1, 32), nn.ReLU())
        self.vae["gru"] = nn.GRU(32, d)
        self.vae["belief"] = nn.Linear(d, 2 * m)  # the mean of q, and the logarithm of its variance
        self.vae["decoder"] = nn.Sequential(*hidden, nn.Linear(32, 1))  # p(r | m, s, a, s'), of normalised rewards
        for parameter in self.vae["gru"].parameters():  # as in the authors' code
            nn.init.orthogonal_(parameter) if parameter.dim() == 2 else nn.init.zeros_(parameter)
        self.actor, self.critic = (  # of s and the belief's mean and std
            nn.Sequential(nn.Linear(S + 2 * m, d), nn.Tanh(), nn.Linear(d, d), nn.Tanh()) for _ in range(2)
        )
        T = args.episodes_per_trial * self.horizon
        self.register_buffer("replay", torch.zeros(T, self.replay_trials, len(self.input_mean)))  # newest last
        self.register_buffer("replay_lived", torch.zeros(T, self.replay_trials, dtype=torch.bool))

    def embed(self, steps: Tensor) -> Tensor:
        """What the GRU reads: all (s_k+1, a_k, r_k), embedded, (T - 1, B, 32). η is not read, as in the paper. At an
        episode's end s_k+1 is the first observation of the next episode, in acting as in training."""
        s, a, r, _ = trmrl.named(self.normalise(steps), self.num_observations)
        return self.vae["embedding"](torch.cat([s[1:], a[:-1], r[:-1, :, None]], dim=2))

    def q_of(self, h: Tensor) -> Normal:
        """The belief q(m | τ_:t), with mean and std (..., m), that the GRU's states h (..., d) stand for."""
        mean, log_variance = self.vae["belief"](h).chunk(2, dim=-1)
        return Normal(mean, (0.5 * log_variance.clamp(-10, 4)).exp(), validate_args=False)

    def encode(self, steps: Tensor) -> Normal:
        """The belief before each of the steps, with mean and std (T, B, m). A state of zeros gives the first one."""
        h, _ = self.vae["gru"](self.embed(steps))
        return self.q_of(torch.cat([torch.zeros_like(h[:1]), h]))

    def elbo(self, steps: Tensor, lived: Tensor, rng: Generator, pairs: int) -> tuple[Tensor, Tensor]:
        """The two parts of the negative ELBO, as means where the paper has sums: the squared error of the predicted
        rewards, and KL(q_k ‖ q_k-1), with q_-1 = N(0, I). From each of the B trials it draws pairs beliefs and pairs
        rewards, past and future ones. Each belief must predict each of these rewards from a sample of m. The last
        reward of an episode is never drawn, since the observation after it is not stored. There is no term for the
        belief after the last step."""
        q = self.encode(steps)
        first = torch.zeros_like(q.mean[:1])
        before = torch.cat([first, q.mean[:-1]]), torch.cat([first + 1, q.stddev[:-1]])
        before = Normal(*before, validate_args=False)
        kl = kl_divergence(q, before).sum(2)[lived].mean()
        known = lived[1:] & (steps[:-1, :, -1] == 0)  # (T - 1, B): where η is 0, s_k+1 is of the same episode
        t, i = draw(lived, pairs, rng), draw(known, pairs, rng)  # of ELBO_t, and of the rewards r_i
        noise = torch.from_numpy(rng.standard_normal((*t.shape, q.mean.shape[2]), dtype=np.float32)).to(steps.device)
        m = q.mean.take_along_dim(t[..., None], 0) + q.stddev.take_along_dim(t[..., None], 0) * noise  # (pairs, B, m)
        s, a, r, _ = trmrl.named(self.normalise(steps), self.num_observations)
        facts = torch.cat([s[:-1], a[:-1], s[1:]], dim=2).take_along_dim(i[..., None], 0)
        x = torch.cat([x.expand(len(t), len(i), -1, -1) for x in (m[:, None], facts[None])], dim=3)
        error = (self.vae["decoder"](x)[..., 0] - r[:-1].take_along_dim(i, 0)) ** 2  # (pairs, pairs, B)
        drawn = lived.take_along_dim(t, 0)[:, None] & known.take_along_dim(i, 0)  # False where there were too few
        return ((error * drawn).sum((0, 1)) / drawn.sum((0, 1)).clamp(min=1)).mean(), kl

    def forward(self, rows: Tensor, t: Tensor, task: Tensor) -> tuple[Normal, Tensor]:
        """π and V of state and belief. rows (T + 1, n, S + A + 2 + 2 m) are transitions, each followed by mean and std
        of the belief before it. The log-variance would outgrow the other inputs as soon as the task is known."""
        transitions, belief = rows[t, task].tensor_split([len(self.input_mean)], dim=1)
        s = self.normalise(transitions)[:, : self.num_observations]
        return self.policy_and_value(torch.cat([s, belief], dim=1))

    def policy_and_value(self, inputs: Tensor) -> tuple[Normal, Tensor]:
        policy = Normal(self.policy(self.actor(inputs)), self.log_std.exp(), validate_args=False)
        return policy, self.value(self.critic(inputs))[:, 0] * self.return_std + self.return_mean

    @torch.inference_mode()
    def act(self, transitions: Tensor, t: int, alive: Tensor, noise: Tensor, state) -> tuple:
        """One step on. The state: h (n, d), at first 0, and for each task the last step that was lived, (n,)."""
        n = transitions.shape[1]
        if t == 0:
            h, last = torch.zeros(n, self.vae["gru"].hidden_size), torch.zeros(n, dtype=torch.long)
        else:
            h, last = state
            steps = torch.stack([transitions[last, torch.arange(n)], transitions[t]])
            new_h, _ = self.vae["gru"](self.embed(steps), h[None])
            h, last = torch.where(alive[:, None], new_h[0], h), torch.where(alive, t, last)
        q = self.q_of(h)
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
        """PPO, to which beliefs are inputs like others: its gradient does not reach the encoder. Then vae_steps steps
        of encoder and decoder on the latest trials. Returns columns of progress.csv; its own are reward_error and
        belief_kl, the two parts of the ELBO, and belief_std, the beliefs' mean std."""
        order = (~trial.valid).int().argsort(dim=0, stable=True)  # the steps that were lived, then all others
        steps, lived = trial.transitions[:-1].take_along_dim(order[..., None], 0), trial.valid.take_along_dim(order, 0)
        with torch.no_grad():
            q = self.encode(steps)
        k = trial.valid.cumsum(0) - 1  # step t is the k-th that was lived
        beliefs = torch.cat([q.mean, q.stddev], dim=2).take_along_dim(k[..., None], 0)
        rows = torch.cat([trial.transitions, torch.cat([beliefs, torch.zeros_like(beliefs[:1])])], dim=2)
        row = super().update(optimizer, replace(trial, transitions=rows), args, rng, left)
        self.replay = torch.cat([self.replay, steps], dim=1)[:, -self.replay_trials :].clone()
        self.replay_lived = torch.cat([self.replay_lived, lived], dim=1)[:, -self.replay_trials :].clone()
        stored = self.replay_lived[0].nonzero()[:, 0].cpu()
        optimizer.param_groups[1]["lr"] = args.vae_learning_rate * left
        parts = []
        for _ in range(args.vae_steps):
            some = stored[rng.integers(len(stored), size=args.vae_trials)]
            error, kl = self.elbo(self.replay[:, some], self.replay_lived[:, some], rng, args.vae_pairs)
            optimizer.zero_grad()
            (error + args.kl_weight * kl).backward()
            if not nn.utils.clip_grad_norm_(self.vae.parameters(), args.max_grad_norm).isfinite():
                raise trmrl.RunFailed("the gradient of encoder and decoder is not finite")
            optimizer.step()
            parts.append(torch.stack([error, kl]).detach())
        error, kl = torch.stack(parts).mean(0).tolist()
        return row | {"reward_error": error, "belief_kl": kl, "belief_std": q.stddev[lived].mean().item()}


def draw(allowed: Tensor, number: int, rng: Generator) -> Tensor:
    """Rows (number, B) where allowed (rows, B) is True, each at most once; if there are too few, others follow them."""
    keys = torch.from_numpy(rng.random(allowed.shape)).to(allowed.device) + allowed
    return keys.topk(min(number, len(allowed)), dim=0).indices


if __name__ == "__main__":
    sys.exit(trmrl.main(agent_class=VariBAD, args_class=Args))
