"""What must hold of each baseline, against something independent; its runs and files are tested with trmrl.py's."""

import numpy as np
import torch

from baselines import rl2
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
