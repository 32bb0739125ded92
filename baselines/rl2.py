"""RL² (Duan et al. 2016; Wang et al. 2017), the closest baseline (Sec. 5): a GRU in the transformer's place.

Its state is carried through all episodes of a trial. Tasks, trials, PPO, normalisation and meta-tests are trmrl.py's.

    python baselines/rl2.py --env HalfCheetahVel     the same flags, where they mean something; the same run folder
"""

import sys
from dataclasses import dataclass
from pathlib import Path

import torch
from gymnasium.vector import VectorEnv
from torch import Tensor, nn
from tyro.conf import Fixed, Suppress

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
import trmrl  # noqa: E402 (it is in the folder above)


@dataclass
class Args(trmrl.Args):
    """RL²: meta-train on a distribution of tasks, then meta-test with frozen weights."""

    learning_rate: float = 1e-3  # of Adam
    update_epochs: int = 6  # passes over an iteration's trials, at most
    minibatch_size: int = 800  # steps a gradient, drawn from all trials, each of which it runs through from the start
    memory_length: Suppress[Fixed[int]] = 1
    layers: Suppress[Fixed[int]] = 1
    heads: Suppress[Fixed[int]] = 1
    t_fixup: Suppress[Fixed[bool]] = False


class RL2(trmrl.Agent):
    """π(a_t | h_t), h_t = GRU(φ(s_t, a_t-1, r_t-1, η_t-1), h_t-1)."""

    method = "RL2"

    def __init__(self, envs: VectorEnv, args: Args):
        super().__init__(envs, args)
        self.layers = nn.GRU(args.d_model, args.d_model)  # in the transformer's place

    def embed(self, transitions: Tensor, previous: Tensor) -> Tensor:
        """φ of observations and of the previous steps' (a, r, η): (..., n, S + A + 2) twice, to (..., n, d)."""
        s = self.normalise(transitions)[..., : self.num_observations]
        return self.phi(torch.cat([s, self.normalise(previous)[..., self.num_observations :]], dim=-1))

    def refine(self, transitions: Tensor, t: Tensor, task: Tensor) -> tuple[list[Tensor], list[Tensor]]:
        """φ and the GRU's state at steps t (B,) of tasks (B,), each (B, d), run through the trials from their start."""
        before = torch.cat([torch.zeros_like(transitions[:1]), transitions[:-1]])
        x = self.embed(transitions, before)
        states, _ = self.layers(x)
        return [x[t, task], states[t, task]], []

    @torch.inference_mode()
    def act(self, transitions: Tensor, t: int, state) -> tuple[Tensor, Tensor, object]:
        """One step on from the state that the step before has left."""
        before = transitions[t - 1] if t > 0 else torch.zeros_like(transitions[0])
        output, state = self.layers(self.embed(transitions[t], before)[None], state)
        return *self.policy_and_value(output[0]), state


if __name__ == "__main__":
    sys.exit(trmrl.main(agent_class=RL2, args_class=Args))
