"""What must hold of each baseline, against something independent; its runs and files are tested with trmrl.py's."""

import functools
from copy import deepcopy
from types import SimpleNamespace

import numpy as np
import torch
from torch.distributions import Normal, TanhTransform, TransformedDistribution, kl_divergence
from torch.func import grad, hessian
from torch.nn.utils import parameters_to_vector
from torch.testing import assert_close as close

from baselines import maml, pearl, rl2, varibad
from test_trmrl import Mortal, copies, progress, run, trial_of, trmrl

AGENTS = {rl2: rl2.RL2, varibad: varibad.VariBAD, pearl: pearl.PEARL, maml: maml.MAML}


def main_of(method):
    return functools.partial(trmrl.main, agent_class=AGENTS[method], args_class=method.Args)


def made(method, prepare=lambda agent: None, tasks=6, episodes=2, actions=1, **flags):
    """A small agent, the same at each call, prepared, and a trial of it with deaths in both halves."""
    envs = copies(Mortal)
    envs[0].action_space = trmrl.Box(-1.0, 1.0, (actions,))
    torch.manual_seed(0)
    agent = AGENTS[method](envs[0], method.Args(**dict(d_model=8) | flags))
    with torch.no_grad():
        prepare(agent)
    trial, half = trial_of(envs, agent, tasks, episodes), 10 * episodes
    assert not trial.valid[:half].all() and not trial.valid[half:].all()
    return agent, trial


class TestRL2:
    @torch.no_grad()
    def test_values_and_policy_are_of_torchs_gru(self):
        """Of acting and of training, against torch.nn.GRUCell over (s, a, r, η of the step before) of lived steps."""
        agent, trial = made(rl2, lambda agent: setattr(agent, "chunk", 7), tasks=8)  # 40 steps: five chunks, and 5 more
        cell = torch.nn.GRUCell(8, 8)
        cell.load_state_dict({name.removesuffix("_l0"): tensor for name, tensor in agent.layers.state_dict().items()})
        policy, values = agent(trial.transitions, *trial.valid.nonzero(as_tuple=True))
        close(values, trial.values[:-1][trial.valid], rtol=1e-4, atol=1e-5)
        close(policy.log_prob(trial.a[trial.valid]).sum(1), trial.log_probs[trial.valid])
        for task in range(8):
            state, before = torch.zeros(1, 8), torch.zeros(4)
            for t in trial.valid[:, task].nonzero()[:, 0]:
                x = torch.cat([trial.transitions[t, task, :1], before[1:]])
                state, before = cell(agent.phi(agent.normalise(x))[None], state), trial.transitions[t, task]
                close(agent.value(state)[0, 0], trial.values[t, task], rtol=1e-4, atol=1e-5)

    def test_gradients_stay_within_a_chunk(self):
        agent, _ = made(rl2, lambda agent: setattr(agent, "chunk", 7))
        transitions = torch.rand(41, 2, 4) * torch.tensor([1.0, 1.0, 1.0, 0.0])  # no η: nobody dies
        transitions.requires_grad_()
        _, value = agent(transitions, torch.tensor([16]), torch.tensor([1]))
        gradient = torch.autograd.grad(value.sum(), transitions)[0]
        # Steps 14 to 16 of the third chunk; of step 13 the action and the reward enter at 14, its observation does not.
        assert gradient[:, 1].any(1).nonzero()[:, 0].tolist() == [13, 14, 15, 16]
        assert not gradient[13, 1, 0] and not gradient[:, 0].any()

    def test_learns_a_toy_task_distribution(self, tmp_path):
        """The point mass reaches unseen hidden velocities; it was trained on two episodes in a row."""
        folder = run(tmp_path, "--env", "PointMass", main=main_of(rl2))
        returns = progress(folder)["test_return"].dropna()
        assert returns.iloc[0] < -8 and returns.iloc[-1] > -4.5 and "-RL2-" in folder.name
        assert np.load(folder / "meta_test.npz")["success"][:, :2].mean() > 0.8
        assert isinstance(trmrl.load(folder, rl2.RL2, rl2.Args)[0], rl2.RL2) and not (folder / "attention.npz").exists()


class TestVariBAD:
    made = staticmethod(functools.partial(made, varibad, lambda agent: agent.input_mean.add_(0.1), latent_size=3))

    @staticmethod
    def lived(trial):
        """The lived steps of a trial in front, by a loop, and which rows they are."""
        T, n, _ = trial.transitions[:-1].shape
        steps, lived = torch.zeros_like(trial.transitions[:-1]), torch.zeros(T, n, dtype=torch.bool)
        for task in range(n):
            of_task = trial.transitions[:-1, task][trial.valid[:, task]]
            steps[: len(of_task), task], lived[: len(of_task), task] = of_task, True
        return steps, lived

    def slow_belief(self, agent, steps, k, task):
        """q_k by torch's GRUCell, one step after the other."""
        cell, h = torch.nn.GRUCell(32, 8), torch.zeros(1, 8)
        cell.load_state_dict({name.removesuffix("_l0"): x for name, x in agent.vae["gru"].state_dict().items()})
        for i in range(k):
            now, after = agent.normalise(steps[i, task]), agent.normalise(steps[i + 1, task])
            h = cell(agent.vae["embedding"](torch.cat([after[:1], now[1:3]]))[None], h)
        mean, log_variance = agent.vae["belief"](h)[0].tensor_split(2)
        return mean, log_variance.exp().sqrt()

    @torch.no_grad()
    def test_acting_follows_the_belief_and_so_does_training(self):
        """Step by step through deaths and into the second episode, against torch.nn.GRUCell, which has read the past
        alone; π and V too."""
        agent, trial = self.made()
        steps, lived = self.lived(trial)
        q = agent.encode(steps)
        for task in range(6):
            for k, t in enumerate(trial.valid[:, task].nonzero()[:, 0]):
                mean, std = self.slow_belief(agent, steps, k, task)
                close(q.mean[k, task], mean, rtol=1e-4, atol=1e-5)
                close(q.stddev[k, task], std, rtol=1e-4, atol=1e-5)
                x = torch.cat([agent.normalise(trial.transitions[t, task])[:1], mean, std])[None]
                value = agent.value(agent.critic(x))[0, 0]
                close(value, trial.values[t, task], rtol=1e-4, atol=1e-5)
                policy = Normal(agent.policy(agent.actor(x))[0], agent.log_std.exp())
                close(policy.log_prob(trial.a[t, task]).sum(), trial.log_probs[t, task])

    def test_ppo_sees_what_acting_saw_and_its_loss_does_not_reach_the_encoder(self, monkeypatch):
        agent, trial = self.made()
        updates = []

        def ppo_update(agent, optimizer, rows, *_):
            policy, value = agent(rows.transitions, *trial.valid.nonzero(as_tuple=True))
            log_probs = policy.log_prob(trial.a[trial.valid]).sum(1)
            close(log_probs, trial.log_probs[trial.valid])
            close(value, trial.values[:-1][trial.valid], rtol=1e-4, atol=1e-5)
            (log_probs.sum() + value.sum()).backward()
            assert all(parameter.grad is None for parameter in agent.vae.parameters())
            assert all(parameter.grad.any() for parameter in [*agent.actor.parameters(), *agent.critic.parameters()])
            updates.append({name: parameter.clone() for name, parameter in agent.named_parameters()})
            return {}

        monkeypatch.setattr(trmrl, "ppo_update", ppo_update)
        args = varibad.Args(vae_steps=1)
        agent.update(agent.optimizer(args), trial, args, np.random.default_rng(0), 1.0)
        for name, parameter in agent.named_parameters():  # then the ELBO moves encoder and decoder, and nothing else
            assert torch.equal(parameter, updates[0][name]) != name.startswith("vae."), name

    @torch.no_grad()
    def test_elbo_is_a_double_sum_over_beliefs_and_all_rewards(self):
        agent, trial = self.made()
        steps, lived = self.lived(trial)
        noise = SimpleNamespace(random=np.zeros, standard_normal=lambda shape, dtype: np.full(shape, 0.7, dtype))
        error, kl = agent.elbo(steps, lived, noise, pairs=1000)
        errors, divergences = [], []
        for task in range(6):
            of_task = []
            for k in range(int(lived[:, task].sum())):
                mean, std = self.slow_belief(agent, steps, k, task)
                past = self.slow_belief(agent, steps, k - 1, task) if k else (torch.zeros(3), torch.ones(3))
                ratio, shift = std / past[1], (mean - past[0]) / past[1]
                divergences.append(0.5 * (ratio**2 + shift**2 - 1 - 2 * ratio.log()).sum())
                goes_on = trial.valid[:-1, task] & trial.valid[1:, task] & (torch.arange(39) != 19)
                for t in goes_on.nonzero()[:, 0]:  # where the observation after it is known
                    s, a, r, _ = agent.normalise(trial.transitions[t, task])
                    s_next = agent.normalise(trial.transitions[t + 1, task])[0]
                    x = torch.cat([mean + 0.7 * std, torch.stack([s, a, s_next])])
                    of_task.append((agent.vae["decoder"](x) - r) ** 2)
            errors.append(torch.stack(of_task).mean())
        close(error, torch.stack(errors).mean(), rtol=1e-4, atol=1e-6)
        close(kl, torch.stack(divergences).mean(), rtol=1e-4, atol=1e-6)

    @torch.no_grad()
    def test_elbo_of_a_few_pairs_is_on_average_that_of_all(self):
        (agent, trial), rng = self.made(), np.random.default_rng(0)
        draws = [[agent.elbo(*self.lived(trial), rng, pairs)[0] for _ in range(400)] for pairs in (2, 1000)]
        few, whole = torch.tensor(draws)
        assert abs(few.mean() - whole.mean()) < 4 * few.std() / 20 < 0.1 * whole.mean()

    def test_learns_a_toy_task_distribution(self, tmp_path):
        """Later episodes beat the first, and the belief tells the goal."""
        folder = run(tmp_path, "--env", "PointMass", main=main_of(varibad))
        rewards, table = np.load(folder / "meta_test.npz")["rewards"].sum(2).mean(0), progress(folder)
        assert rewards[1] > rewards[0] + 0.5 and rewards[1] > -3, rewards
        assert table["reward_error"].iloc[-5:].mean() < 0.5 * table["reward_error"].iloc[:5].mean()
        agent, envs, args = trmrl.load(folder, varibad.VariBAD, varibad.Args)
        tasks, rng = envs[0].sample_tasks("test", 20, np.random.default_rng(0)), np.random.default_rng(0)
        trial = agent.collect(envs, tasks, 2, rng, explore=False)
        mean = agent.encode(trial.transitions[:-1]).mean[20].detach()  # after one episode
        _, squares, *_ = np.linalg.lstsq(np.column_stack([mean, np.ones(20)]), tasks[:, 0])
        assert squares[0] / 20 < 0.1 * tasks.var()


class TestPEARL:
    @staticmethod
    def made():
        """Trials in which a step's observation is its number; inputs are left as they are."""
        agent, trial = made(pearl, tasks=8, episodes=4, latent_size=3, input_limit=1e9)
        trial.transitions[..., 0] = torch.arange(81.0)[:, None]
        return agent, trial

    @torch.no_grad()
    def test_posterior_is_the_product_of_its_gaussian_factors(self):
        """Against the normalised product of densities on a grid; without a context it is the prior."""
        agent, _ = self.made()
        context = (*torch.randn(4, 6, 2, 1), None)
        counts = torch.tensor([6, 4])
        q, z = agent.posterior(context, counts), torch.linspace(-20, 20, 40_001)[:, None, None].double()
        for task in range(2):
            x = torch.cat([part[: counts[task], task] for part in context[:4]], dim=1)
            mean, spread = agent.encoder(x).tensor_split(2, dim=1)
            log_density = Normal(mean, torch.nn.functional.softplus(spread).sqrt()).log_prob(z).sum(1)
            density = (log_density - log_density.amax(0)).exp()
            density, z_ = density / density.sum(0), z[:, 0]
            expected = (z_ * density).sum(0)
            std = ((z_ - expected) ** 2 * density).sum(0).sqrt()
            close(
                torch.stack([q.mean[task], q.stddev[task]]).double(), torch.stack([expected, std]), rtol=1e-4, atol=1e-4
            )
        shuffled = agent.posterior(tuple(part[[3, 1, 0, 5, 4, 2]] for part in context[:4]) + (None,))
        close(shuffled.mean, agent.posterior(context).mean)
        assert (agent.posterior(context).stddev < agent.posterior(context, counts - 1).stddev).all()
        none = agent.posterior(context, torch.zeros(2))
        assert (none.mean == 0).all() and (none.stddev == 1).all()

    @torch.no_grad()
    def test_actions_are_those_of_a_tanh_gaussian(self):
        agent, _ = self.made()
        s, z, noise = torch.randn(50, 1), torch.randn(50, 3), torch.randn(50, 1)
        actions, log_probs = agent.act_with(s, z, noise)
        mean, log_std = agent.actor(torch.cat([s, z], dim=1)).tensor_split(2, dim=1)
        squashed = TransformedDistribution(Normal(mean, log_std.exp()), TanhTransform())
        close(actions, torch.tanh(mean + log_std.exp() * noise))
        close(log_probs, squashed.log_prob(actions), rtol=1e-4, atol=1e-4)
        assert torch.isfinite(agent.act_with(s, z, noise + 30)[1]).all()

    @torch.no_grad()
    def test_experience_ends_with_deaths_but_not_at_the_time_limit_and_context_is_of_prior_episodes(self):
        agent, trial = self.made()
        agent.remember(trial)
        trials, rng = agent.replay_trials - 8 + torch.arange(8), np.random.default_rng(0)
        for kind, last in ((0, 40), (1, 80)):
            s, a, r, s_next, died = (part[..., 0] for part in agent.draw(trials, 2000, kind, rng))
            for task in range(8):
                lived = {t for t in range(last) if trial.valid[t, task] and t % 20 != 19}
                assert set(s[:, task].int().tolist()) == lived
            at = s.long(), torch.arange(8)
            assert torch.equal(a, trial.a[at][..., 0]) and torch.equal(s_next, s + 1)
            close(r, trial.r[at])  # the std is 1
            assert torch.equal(died == 1, ~trial.valid[at[0] + 1, at[1]]) and died.any()

    @torch.no_grad()
    def test_targets_bootstrap_but_for_deaths(self):
        """The loss of Q-functions that are 0 is the mean of y², with y computed transition by transition."""
        agent, _ = self.made()
        args = pearl.Args(gamma=0.9, kl_weight=0.5)
        for parameter in agent.q_functions.parameters():
            parameter.zero_()
        died = (torch.rand(7, 4, 1) < 0.4).float()
        context, batch = ((*torch.randn(4, 7, 4, 1), died) for _ in range(2))
        z_noise, noise = torch.randn(4, 3), torch.randn(2, 7, 4, 1)
        losses = agent.losses(context, batch, z_noise, noise, args)
        q, squares = agent.posterior(context), []
        z = q.mean + q.stddev * z_noise
        for i in range(7):
            for task in range(4):
                s, a, r, s_next, died = (part[i, task] for part in batch)
                a_next, log_prob = agent.act_with(s_next, z[task], noise[0, i, task])
                values = [target(torch.cat([s_next, a_next, z[task]])) for target in agent.q_targets]
                y = r if died else r + 0.9 * (min(values) - 0.2 * log_prob)  # 0.2 is the first temperature
                squares.append(y**2)
        kl = (0.5 * (q.mean**2 + q.stddev**2 - 1) - q.stddev.log()).sum()
        close(losses["value_loss"], 2 * torch.cat(squares).mean() + 0.5 * kl)

    def test_each_loss_moves_its_own_parameters(self):
        """The encoder learns from the Q-functions and the KL; the policy alone learns from its own loss."""
        args = pearl.Args(gradient_steps=1, batch_trials=4, batch_steps=4, latent_size=3)
        moved = {"value_loss": {"encoder", "q_functions", "q_targets"}, "policy_loss": {"actor"}}
        for name, expected in (moved | {"temperature_loss": {"log_temperature"}}).items():
            agent, trial = self.made()
            before, losses = deepcopy(dict(agent.named_parameters())), agent.losses
            agent.losses = lambda *x, one=name, all=losses: {key: y * (key == one) for key, y in all(*x).items()}
            agent.update(agent.optimizer(args), trial, args, np.random.default_rng(0), 1.0)
            changed = {key.split(".")[0] for key, x in agent.named_parameters() if not torch.equal(x, before[key])}
            assert changed == expected, name

    @torch.no_grad()
    def test_z_is_of_the_prior_in_two_episodes_and_then_of_the_posterior(self):
        agent, _ = self.made()
        seen, rngs = [], [np.random.default_rng(0) for _ in range(2)]
        agent.act_with = lambda s, z, noise: (seen.append(z), (0.3 * noise, noise))[1]
        trial = agent.collect(copies(Mortal), np.zeros((8, 1)), 4, rngs[0], explore=True)
        expected = torch.from_numpy(rngs[1].standard_normal((4, 8, 3))).float()
        for episode in (2, 3):
            for task in range(8):
                steps = [t for t in range(20 * episode) if trial.valid[t, task] and t % 20 != 19]
                context = agent.experience(trial.transitions, torch.tensor(steps)[:, None], torch.tensor([task]))
                q = agent.posterior(context)
                expected[episode, task] = q.mean[0] + q.stddev[0] * expected[episode, task]
        z = torch.stack(seen[:80]).unflatten(0, (4, 20))
        close(z, expected[:, None].expand_as(z), rtol=1e-4, atol=1e-5)

    def test_the_third_episode_beats_the_first(self, tmp_path):
        folder = run(tmp_path, "--env", "PointMass", main=main_of(pearl))
        rewards = np.load(folder / "meta_test.npz")["rewards"].sum(2).mean(0)
        assert rewards[2:].mean() > rewards[:2].mean() + 4, rewards


class TestMAML:
    @staticmethod
    def made(precision=torch.double):
        """Agent, trial, θ, what comes before and after the inner step, and the adapted policies."""
        curved = functools.partial(made, maml, lambda agent: agent.policy.weight.mul_(100))  # the second order shows
        agent, trial = curved(tasks=3, episodes=4, actions=2, inner_rate=0.5, episodes_per_trial=4)
        halves = [agent.experience(trial.transitions[i : i + 40], trial.valid[i : i + 40]) for i in (0, 40)]
        before, after = (maml.Experience(*(part.to(precision) for part in half)) for half in halves)
        theta = parameters_to_vector(agent.to(precision).parameters()).detach()
        return agent, trial, theta, before, after, [x.detach() for x in agent.adapted_policies(theta, before, after.s)]

    @torch.no_grad()
    def test_advantages_are_gae_within_an_episode_with_a_fitted_baseline(self):
        agent, trial, _, before, *_ = self.made(torch.float)
        for task in range(3):
            lived, r = trial.valid[:40, task].numpy(), trial.r[:40, task].tolist()
            s, time = agent.normalise(trial.transitions[:40, task])[:, 0].numpy(), np.arange(40) % 20 / 20
            x = np.column_stack([s, s**2, time, time**2, time**3, np.ones(40)])
            y = [sum(0.95 ** (i - t) * r[i] for i in range(t, t // 20 * 20 + 20)) for t in range(40)]
            rows, targets = np.concatenate([x[lived], 0.1**0.5 * np.eye(6)]), [*np.array(y)[lived], *np.zeros(6)]
            values = x @ np.linalg.lstsq(rows, targets)[0] * lived
            advantages = np.zeros(41)
            for t in reversed(np.flatnonzero(lived)):
                goes_on = 0.95 * (t % 20 != 19)
                delta = r[t] + goes_on * np.append(values, 0)[t + 1] - values[t]
                advantages[t] = delta + goes_on * 0.95 * advantages[t + 1]
            expected = (advantages[:-1][lived] - advantages[:-1][lived].mean()) / advantages[:-1][lived].std()
            np.testing.assert_allclose(before.advantages[task].numpy()[lived], expected, rtol=1e-2, atol=1e-3)
            np.testing.assert_allclose(before.weights[task], lived / lived.sum(), rtol=1e-6)

    def test_inner_steps_are_those_of_gradient_descent(self):
        """Against torch.optim.SGD on the policy gradient's loss, averaged over the valid steps. Training has a step
        after half of the episodes. A meta-test has one after each, at half of the rate; the last acts by the mean."""
        agent, *_ = self.made(torch.float)
        for explore, episodes, steps, rate in ((True, 4, 40, 0.5), (False, 3, 20, 0.25)):
            trial = agent.collect(copies(Mortal), np.zeros((3, 1)), episodes, np.random.default_rng(0), explore)
            for task in range(3):
                other = deepcopy(agent)
                optimizer = torch.optim.SGD(other.parameters(), lr=rate)
                for start in range(0, 20 * episodes, steps):
                    now = slice(start, start + steps)
                    part, valid = agent.experience(trial.transitions[now], trial.valid[now]), trial.valid[now, task]
                    policy = Normal(other.policy(other.hidden(part.s[task][valid])), other.log_std.exp())
                    log_probs = policy.log_prob(part.a[task][valid]).sum(1)
                    close(log_probs, trial.log_probs[now, task][valid], rtol=1e-3, atol=1e-3)
                    optimizer.zero_grad()
                    (-log_probs * part.advantages[task][valid]).mean().backward()
                    optimizer.step()
                assert explore != torch.allclose(policy.mean, part.a[task][valid], atol=1e-4)

    def test_the_meta_gradient_goes_through_the_inner_step(self):
        """Against central differences in float64, from which the first-order gradient differs."""
        agent, _, theta, before, after, old = self.made()

        def gain(theta):
            return agent.meta_objective(theta, before, after, old)[0]

        gradient = grad(gain)(theta)
        numeric = [(gain(theta + 1e-6 * e) - gain(theta - 1e-6 * e)) / 2e-6 for e in torch.eye(len(theta)).double()]
        close(gradient, torch.stack(numeric).detach(), rtol=1e-4, atol=1e-7)
        adapt = agent.adapt
        agent.adapt = lambda theta, x, rate: theta + (adapt(theta, x, rate) - theta).detach()  # first order
        assert (grad(gain)(theta) - gradient).norm() > 0.05 * gradient.norm()

    def test_the_products_with_the_kls_hessian_are_those_of_the_dense_one(self):
        agent, _, theta, before, after, old = self.made()
        dense = hessian(lambda theta: agent.meta_objective(theta, before, after, old)[1])(theta)
        product = agent.kl_hessian(theta, before, after)
        for v in torch.randn(3, len(theta), dtype=torch.double):
            close(product(v), dense @ v, rtol=1e-6, atol=1e-9)

    def test_conjugate_gradient_solves(self):
        root = torch.randn(12, 12, dtype=torch.double)
        matrix, b = root @ root.T + torch.eye(12), torch.randn(12, dtype=torch.double)
        close(maml.conjugate_gradient(lambda v: matrix @ v, b, 12), torch.linalg.solve(matrix, b), rtol=1e-4, atol=1e-6)

    def test_an_outer_step_stays_in_the_trust_region_or_is_not_taken(self):
        agent, trial, theta, before, after, old = self.made(torch.float)
        log_probs = Normal(old[0], old[1].exp()[:, None]).log_prob(after.a).sum(2).T  # as it acted: the ratio is 1
        close(log_probs[trial.valid[40:]], trial.log_probs[40:][trial.valid[40:]], rtol=1e-3, atol=1e-3)
        start, kl = agent.meta_objective(theta, before, after, old)
        assert abs(kl) < 1e-6
        args, optimizer = maml.Args(min_std=0.01, episodes_per_trial=4), agent.optimizer(maml.Args())
        moments = {name: x.clone() for name, x in agent.named_buffers()}
        row = agent.update(optimizer, trial, args, np.random.default_rng(0), 1.0)
        agent.load_state_dict(moments, strict=False)  # the inputs' scale is as it was
        gain, kl = agent.meta_objective(parameters_to_vector(agent.parameters()), before, after, old)
        assert row["gradient_steps"] == 1 and gain > start and 0.003 < kl <= args.max_kl + 1e-6
        new = agent.adapted_policies(parameters_to_vector(agent.parameters()), before, after.s)
        policies = (Normal(mean, log_std.exp()[:, None]) for mean, log_std in (old, new))
        divergence = kl_divergence(*policies).sum(2)  # over actions
        of_tasks = [x[valid].mean() for x, valid in zip(divergence, trial.valid[40:].T)]
        close(kl, torch.stack(of_tasks).mean(), rtol=1e-3, atol=1e-5)
        refused, theirs = deepcopy(agent), [x.clone() for x in agent.parameters()]
        refused.meta_objective = lambda theta, *_: (theta.sum(), torch.tensor(1.0))  # each try is too far
        assert refused.update(optimizer, trial, args, np.random.default_rng(0), 1.0)["gradient_steps"] == 0
        assert all(torch.equal(x, y) for x, y in zip(refused.parameters(), theirs))

    def test_adapting_pays_on_a_toy_task_distribution(self, tmp_path):
        folder = run(tmp_path, "--env", "PointMass", "--total-timesteps", "48000", main=main_of(maml))
        rewards, last = np.load(folder / "meta_test.npz")["rewards"].sum(2).mean(0), progress(folder).iloc[-5:]
        assert rewards[1:].mean() > rewards[0] + 2, rewards
        assert (last["return_after"] - last["return_before"]).mean() > 1
