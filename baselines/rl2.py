"""RL² (Duan et al. 2016; Wang et al. 2017), the closest baseline (Sec. 5): a GRU in the transformer's place.

Its state is carried through all episodes of a trial. Tasks, trials, PPO, normalisation and meta-tests are trmrl.py's,
and so are the flags, where they mean something, and the run folder: python baselines/rl2.py --env HalfCheetahVel
"""

import sys
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor, nn
from tyro.conf import Fixed, Suppress

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
import trmrl  # noqa: E402 (it is in the folder above)


@dataclass
class Args(trmrl.Args):
    """RL²: meta-train, then meta-test with frozen weights. A word in brackets opens a group of flags."""

    d_model: int = 64  # d, the size of an embedding and of the state
    learning_rate: float = 2e-3  # Adam's learning rate
    update_epochs: int = 6  # an update passes over the iteration's trials at most this many times
    minibatch_size: int = 800  # steps of a minibatch, drawn from all trials, each of which it runs through whole
    memory_length: Suppress[Fixed[int]] = 1
    layers: Suppress[Fixed[int]] = 1
    heads: Suppress[Fixed[int]] = 1
    t_fixup: Suppress[Fixed[bool]] = False
    own_defaults = {"PointMass": dict(minibatch_size=400, target_kl=None), "ML1-Reach": dict(input_limit=10.0)}
    own_defaults |= {"ML1-Push": dict(input_limit=10.0), "ML45-Train": dict(input_limit=10.0, minibatch_size=2000)}


class RL2(trmrl.Agent):
    """π(a_t | h_t), h_t = GRU(φ(s_t, a_t-1, r_t-1, η_t-1), h_t-1). After a death h rests till the episode ends."""

    method = "RL2"
    chunk = 100  # the steps that a gradient goes back; through whole trials an update takes 1.4 times as long

    def build(self, args: Args) -> None:
        super().build(args)
        self.layers = nn.GRU(args.d_model, args.d_model)  # in the transformer's place

    def embed(self, transitions: Tensor, previous: Tensor) -> Tensor:
        """φ of observations and of the previous steps' (a, r, η): (..., n, S + A + 2) twice, to (..., n, d)."""
        s = self.normalise(transitions)[..., : self.num_observations]
        return self.phi(torch.cat([s, self.normalise(previous)[..., self.num_observations :]], dim=-1))

    def refine(self, transitions: Tensor, t: Tensor, task: Tensor) -> tuple[list[Tensor], list[Tensor]]:
        """φ and the GRU's state at steps t (B,) of tasks (B,), each (B, d), run through the trials from their start.
        A first pass, without gradients, finds the state before each chunk of steps; a second one starts there."""
        eta = transitions[:-1, :, -1].unflatten(0, (-1, self.horizon))  # (E, H, n)
        lived = (eta.cumsum(1) == eta).flatten(0, 1)  # no η in the episode before: (T, n)
        order = (~lived).int().argsort(dim=0, stable=True)  # the steps that were lived, then all others: (T, n)
        steps = transitions[:-1].take_along_dim(order[..., None], 0)
        x = self.embed(steps, torch.cat([torch.zeros_like(steps[:1]), steps[:-1]]))
        with torch.no_grad():
            states, _ = self.layers(x)
        starts = torch.cat([torch.zeros_like(states[:1]), states[self.chunk - 1 : -1 : self.chunk]])  # (chunks, n, d)
        chunks = nn.utils.rnn.pad_sequence(x.split(self.chunk)).flatten(1, 2)  # (chunk, chunks · n, d)
        states, _ = self.layers(chunks, starts.flatten(0, 1)[None])
        states = states.unflatten(1, (-1, x.shape[1])).transpose(0, 1).flatten(0, 1)  # (chunks · chunk, n, d)
        at = lived.cumsum(0)[t, task] - 1, task
        return [x[at], states[at]], []

    @torch.inference_mode()
    def act(self, transitions: Tensor, t: int, alive: Tensor, noise: Tensor, state) -> tuple:
        """One step on from the state: h (1, n, d), and for each task the last step that was lived (n,), at first -1."""
        h, last = state or (torch.zeros(1, len(alive), self.layers.hidden_size), torch.full(alive.shape, -1))
        previous = transitions[last, torch.arange(len(alive))] * (last >= 0)[:, None]
        _, new_h = self.layers(self.embed(transitions[t], previous)[None], h)
        h, last = torch.where(alive[:, None], new_h, h), torch.where(alive, t, last)
        policy, value = self.policy_and_value(h[0])
        action = policy.mean + policy.stddev * noise
        return action, policy.log_prob(action).sum(1), value, (h, last)


if __name__ == "__main__":
    sys.exit(trmrl.main(agent_class=RL2, args_class=Args))
