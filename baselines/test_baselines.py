"""What must hold of each baseline, against something independent; its runs and files are tested with trmrl.py's."""

import functools
from types import SimpleNamespace

import numpy as np
import torch

from baselines import rl2, varibad
from test_trmrl import Mortal, copies, main_rl2, progress, run, trial_of, trmrl


class TestRL2:
    @torch.no_grad()
    def test_values_and_policy_are_of_torchs_gru(self):
        """Of acting and of training, against torch.nn.GRUCell over (s, a, r, η of the step before) of lived steps."""
        envs = copies(Mortal)
        agent = rl2.RL2(envs[0], rl2.Args(d_model=8))
        agent.chunk = 7  # of 41 steps: five chunks, and a shorter one
        cell = torch.nn.GRUCell(8, 8)
        cell.load_state_dict({name.removesuffix("_l0"): tensor for name, tensor in agent.layers.state_dict().items()})
        trial = trial_of(envs, agent, tasks=8)
        assert not trial.valid[:20].all() and not trial.valid[20:].all()
        policy, values = agent(trial.transitions, *trial.valid.nonzero(as_tuple=True))
        torch.testing.assert_close(values, trial.values[:-1][trial.valid], rtol=1e-4, atol=1e-5)
        torch.testing.assert_close(policy.log_prob(trial.a[trial.valid]).sum(1), trial.log_probs[trial.valid])
        for task in range(8):
            state, before = torch.zeros(1, 8), torch.zeros(4)
            for t in trial.valid[:, task].nonzero()[:, 0]:
                x = torch.cat([trial.transitions[t, task, :1], before[1:]])
                state, before = cell(agent.phi(agent.normalise(x))[None], state), trial.transitions[t, task]
                torch.testing.assert_close(agent.value(state)[0, 0], trial.values[t, task], rtol=1e-4, atol=1e-5)

    def test_gradients_stay_within_a_chunk(self):
        envs = copies(Mortal)
        agent = rl2.RL2(envs[0], rl2.Args(d_model=8))
        agent.chunk = 7
        transitions = torch.rand(41, 2, 4) * torch.tensor([1.0, 1.0, 1.0, 0.0])  # no η: nobody dies
        transitions.requires_grad_()
        _, value = agent(transitions, torch.tensor([16]), torch.tensor([1]))
        gradient = torch.autograd.grad(value.sum(), transitions)[0]
        # Steps 14 to 16 of the third chunk; of step 13 the action and the reward enter at 14, its observation does not.
        assert gradient[:, 1].any(1).nonzero()[:, 0].tolist() == [13, 14, 15, 16]
        assert not gradient[13, 1, 0] and not gradient[:, 0].any()

    def test_learns_a_toy_task_distribution(self, tmp_path):
        """The point mass reaches unseen hidden velocities; it was trained on two episodes in a row."""
        flags = "--env PointMass --total-timesteps 80000 --minibatch-size 400 --target-kl None --learning-rate 4e-3"
        folder = run(tmp_path, *flags.split(), "--init-std", "0.5", main=main_rl2)
        returns = progress(folder)["test_return"].dropna()
        assert returns.iloc[0] < -8 and returns.iloc[-1] > -4.5 and "-RL2-" in folder.name
        assert np.load(folder / "meta_test.npz")["success"][:, :2].mean() > 0.8
        assert isinstance(trmrl.load(folder, rl2.RL2, rl2.Args)[0], rl2.RL2)
        assert not (folder / "attention.npz").exists()


class TestVariBAD:
    @staticmethod
    def agent_and_trial(env=Mortal, tasks=6, **flags):
        envs = copies(env)
        torch.manual_seed(0)
        agent = varibad.VariBAD(envs[0], varibad.Args(**dict(d_model=8, latent_size=3) | flags))
        agent.input_mean += 0.1  # so that a test sees where inputs are normalised
        return agent, trial_of(envs, agent, tasks=tasks)

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
        """Step by step through deaths and into the second episode, against torch.nn.GRUCell; π and V too."""
        agent, trial = self.agent_and_trial()
        steps, lived = self.lived(trial)
        assert not trial.valid[:20].all() and not trial.valid[20:].all()
        q = agent.beliefs(steps)
        for task in range(6):
            for k, t in enumerate(trial.valid[:, task].nonzero()[:, 0]):
                mean, std = self.slow_belief(agent, steps, k, task)
                torch.testing.assert_close(q.mean[k, task], mean, rtol=1e-4, atol=1e-5)
                torch.testing.assert_close(q.stddev[k, task], std, rtol=1e-4, atol=1e-5)
                x = torch.cat([agent.normalise(trial.transitions[t, task])[:1], mean, std])[None]
                value = agent.value(agent.critic(x))[0, 0]
                torch.testing.assert_close(value, trial.values[t, task], rtol=1e-4, atol=1e-5)
                policy = torch.distributions.Normal(agent.policy(agent.actor(x))[0], agent.log_std.exp())
                torch.testing.assert_close(policy.log_prob(trial.a[t, task]).sum(), trial.log_probs[t, task])

    def test_ppo_sees_what_acting_saw_and_its_loss_does_not_reach_the_encoder(self, monkeypatch):
        agent, trial = self.agent_and_trial()
        updates = []

        def ppo_update(agent, optimizer, rows, *_):
            policy, value = agent(rows.transitions, *trial.valid.nonzero(as_tuple=True))
            log_probs = policy.log_prob(trial.a[trial.valid]).sum(1)
            torch.testing.assert_close(log_probs, trial.log_probs[trial.valid])
            torch.testing.assert_close(value, trial.values[:-1][trial.valid], rtol=1e-4, atol=1e-5)
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
        agent, trial = self.agent_and_trial()
        steps, lived = self.lived(trial)
        noise = SimpleNamespace(random=np.zeros, standard_normal=lambda shape, dtype: np.full(shape, 0.7, dtype))
        error, kl = agent.elbo(steps, lived, noise, pairs=1000)
        errors, divergences = [], []
        for task in range(6):
            of_task = []
            for k in range(int(lived[:, task].sum())):
                mean, std = self.slow_belief(agent, steps, k, task)
                old_mean, old_std = (
                    (torch.zeros(3), torch.ones(3)) if k == 0 else self.slow_belief(agent, steps, k - 1, task)
                )
                ratio = std / old_std
                divergences.append(0.5 * (ratio**2 + ((mean - old_mean) / old_std) ** 2 - 1 - 2 * ratio.log()).sum())
                for t in trial.valid[:, task].nonzero()[:, 0]:
                    if t == 39 or t == 19 or not trial.valid[t + 1, task]:  # the observation after it is not known
                        continue
                    s, a, r, _ = agent.normalise(trial.transitions[t, task])
                    s_next = agent.normalise(trial.transitions[t + 1, task])[0]
                    x = torch.cat([mean + 0.7 * std, torch.stack([s, a, s_next])])
                    of_task.append((agent.vae["decoder"](x) - r) ** 2)
            errors.append(torch.stack(of_task).mean())
        torch.testing.assert_close(error, torch.stack(errors).mean(), rtol=1e-4, atol=1e-6)
        torch.testing.assert_close(kl, torch.stack(divergences).mean(), rtol=1e-4, atol=1e-6)

    @torch.no_grad()
    def test_elbo_of_a_few_pairs_is_on_average_that_of_all(self):
        agent, trial = self.agent_and_trial(env=trmrl.PointMass)
        steps, lived = self.lived(trial)
        whole, _ = agent.elbo(steps, lived, np.random.default_rng(0), pairs=1000)
        rng = np.random.default_rng(1)
        few = torch.stack([agent.elbo(steps, lived, rng, pairs=3)[0] for _ in range(400)])
        assert abs(few.mean() - whole) < 4 * few.std() / 20 < 0.1 * whole

    @torch.no_grad()
    def test_a_belief_knows_the_past_alone(self):
        agent, trial = self.agent_and_trial(env=trmrl.PointMass)
        steps, _ = self.lived(trial)
        before, changed = agent.beliefs(steps), steps.clone()
        changed[25, :, 1:] += 1  # the action and the reward at 25, and all that comes later
        changed[26:] += 1
        after = agent.beliefs(changed)
        assert (
            torch.equal(before.mean[:26], after.mean[:26]) and not torch.isclose(before.mean[26], after.mean[26]).any()
        )

    def test_learns_a_toy_task_distribution(self, tmp_path):
        """Later episodes beat the first, and the belief tells the goal."""
        main_varibad = functools.partial(trmrl.main, agent_class=varibad.VariBAD, args_class=varibad.Args)
        folder = run(tmp_path, "--env", "PointMass", main=main_varibad)
        rewards, table = np.load(folder / "meta_test.npz")["rewards"].sum(2).mean(0), progress(folder)
        assert rewards[1] > rewards[0] + 0.5 and rewards[1] > -3, rewards
        assert table["reward_error"].iloc[-5:].mean() < 0.5 * table["reward_error"].iloc[:5].mean()
        agent, envs, args = trmrl.load(folder, varibad.VariBAD, varibad.Args)
        tasks = envs[0].sample_tasks("test", 20, np.random.default_rng(0))
        trial = trmrl.collect_trial(agent, envs, tasks, 2, np.random.default_rng(0), explore=False)
        with torch.no_grad():
            mean = agent.beliefs(trial.transitions[:-1]).mean[20].numpy()  # after one episode
        features = np.column_stack([mean, np.ones(20)])
        residual = tasks[:, 0] - features @ np.linalg.lstsq(features, tasks[:, 0], rcond=None)[0]
        assert residual.var() < 0.1 * tasks.var()
