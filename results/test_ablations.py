"""ablations.py against trmrl.py where both can do the same, and against sums written out where they cannot."""

import functools
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from torch.testing import assert_close as close

sys.path.insert(0, str(Path(__file__).resolve().parent))
from ablations import Ablation, Args, trmrl  # noqa: E402 (it is beside this file)

from test_trmrl import Mortal, copies, run, trial_of  # noqa: E402

SHORT = ("--env", "PointMass", "--total-timesteps", "6400")


def made(**flags) -> tuple[Ablation, Args, trmrl.Trial]:
    """A small agent of 20-step episodes, and a trial of it with deaths."""
    envs, args = copies(Mortal), Args(**dict(d_model=8, memory_length=3, layers=2) | flags)
    torch.manual_seed(0)
    agent = Ablation(envs[0], args)
    agent.input_mean += 0.3  # as training would change them
    agent.input_var *= 4
    return agent, args, trial_of(envs, agent, 6)


@pytest.mark.parametrize("flags", [(), ("--no-t-fixup",)])
def test_without_its_own_flags_it_is_trmrl(tmp_path, flags):
    main = functools.partial(trmrl.main, agent_class=Ablation, args_class=Args)
    folders = run(tmp_path, *SHORT, *flags, main=main), run(tmp_path, *SHORT, *flags)
    weights = [torch.load(folder / "checkpoint.pt")["agent"] for folder in folders]
    close(*weights, rtol=0, atol=0)


@pytest.mark.parametrize("t_fixup", [True, False])
@pytest.mark.parametrize("swap", [True, False])
def test_t_fixup_and_layer_norm_are_independent(t_fixup, swap):
    agent, _, _ = made(t_fixup=t_fixup, swap_layer_norm=swap)
    memories, _ = agent.refine(torch.rand(41, 6, 4), torch.arange(40) % 20, torch.arange(40) % 6)
    normalised = memories[-1].mean(1).abs().max() < 1e-5
    assert normalised == (t_fixup == swap)
    spread = agent.layers[0].feed_forward_in.weight.std().item()  # Xavier's, or 0.67 · 2^(-1/4) = 0.56 of it
    assert spread == pytest.approx((2 / 40) ** 0.5 * (0.563 if t_fixup else 1), rel=0.1)


def test_plain_leaves_inputs_and_advantages_as_they_are():
    agent, args, trial = made(plain=True, update_epochs=1, minibatch_size=10_000)
    close(agent.normalise(trial.transitions), trial.transitions, rtol=0, atol=0)
    expected = -trmrl.advantages_and_returns(trial, args.gamma, args.gae_lambda)[0][trial.valid].mean()
    row = agent.update(agent.optimizer(args), trial, args, np.random.default_rng(0), left=1.0)
    assert row["policy_loss"] == pytest.approx(expected.item(), rel=1e-4)  # all ratios are 1 before the first step
    usual, args, trial = made(update_epochs=1, minibatch_size=10_000)
    row = usual.update(usual.optimizer(args), trial, args, np.random.default_rng(0), left=1.0)
    assert abs(row["policy_loss"]) < 1e-5 < abs(expected)


@torch.no_grad()
def test_the_authors_token_has_the_previous_steps_action_and_reward():
    agent, _, _ = made(authors_token=True)
    transitions = torch.rand(41, 6, 4)  # s, a, r, η of two episodes of 20 steps, and the s after them
    for t in (0, 1, 19, 20, 21, 39, 40):
        begin = 20 if t >= 20 else 0
        first = max(begin, t - 2)  # of N = 3 memories
        before = [torch.zeros(3) if k == begin else transitions[k - 1, 4, 1:] for k in range(first, t + 1)]
        tokens = torch.stack([torch.cat([transitions[first + k, 4, :1], x]) for k, x in enumerate(before)])
        x = agent.phi(agent.normalise(tokens)) + agent.positions[-len(tokens) :]
        mask = torch.full((len(x), len(x)), -1e9).triu(1)
        for layer in agent.layers:
            x, _ = layer(x[None], x[None], mask[None, None])
            x = x[0]
        memories, _ = agent.refine(transitions, torch.tensor([t]), torch.tensor([4]))
        close(memories[-1][0], x[-1])
