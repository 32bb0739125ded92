"""TrMRL with flags that only ablations need: python results/ablations.py --env HalfCheetahVel --swap-layer-norm

Everything else is trmrl.py's: its other flags, its training and what a run writes.
"""

import sys
from dataclasses import dataclass
from pathlib import Path
from unittest.mock import patch

from numpy.random import Generator
from torch import Tensor, nn
from torch.optim import Optimizer

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
import trmrl  # noqa: E402 (it is in the folder above)


@dataclass
class Args(trmrl.Args):
    """TrMRL's ablations: meta-train, then meta-test with frozen weights. A word in brackets opens a group of flags."""

    swap_layer_norm: bool = False  # [ablations] T-Fixup gets LayerNorm, and --no-t-fixup, which is Xavier, loses it
    plain: bool = False  # inputs are not normalised or clipped, and advantages not normalised, as in the authors' code
    authors_token: bool = False  # a token is (s_t, a_{t-1}, r_{t-1}, η_{t-1}), as in the authors' code, without PADs


class Ablation(trmrl.Agent):
    """TrMRL, changed by the flags above. Its method has another name, so that trmrl.py does not go on with its runs."""

    method = "Ablation"

    def build(self, args: Args) -> None:
        super().build(args)
        if args.swap_layer_norm:
            norm = nn.LayerNorm if args.t_fixup else nn.Identity  # trmrl.py has the other one
            for layer in self.layers:
                layer.attention_norm, layer.feed_forward_norm = norm(args.d_model), norm(args.d_model)
        self.plain, self.authors_token = args.plain, args.authors_token

    def normalise(self, transitions: Tensor) -> Tensor:
        return transitions.clone() if self.plain else super().normalise(transitions)

    def refine(self, transitions: Tensor, t: Tensor, task: Tensor) -> tuple[list[Tensor], list[Tensor]]:
        """Shapes as in trmrl.py. With the authors' token each step has the a, r and η of the step before it, and an
        episode's first step has zeros. The embeddings that are stored for Fig. 8 still have the paper's tokens."""
        if self.authors_token:
            previous = transitions.roll(1, dims=0)
            previous[: -1 : self.horizon] = 0  # not in the last row, which still belongs to the last episode
            previous[..., : self.num_observations] = transitions[..., : self.num_observations]
            transitions = previous
        return super().refine(transitions, t, task)

    def working_memories(self, windows: Tensor) -> Tensor:
        if self.authors_token:
            return self.phi(self.normalise(windows))  # the current token has no PADs
        return super().working_memories(windows)

    def update(self, optimizer: Optimizer, trial: trmrl.Trial, args: Args, rng: Generator, left: float) -> dict:
        """As trmrl.py's. With plain, the objective undoes ppo_update's normalisation, by the same mean and std."""
        if not args.plain:
            return super().update(optimizer, trial, args, rng, left)
        advantages = trmrl.advantages_and_returns(trial, args.gamma, args.gae_lambda)[0][trial.valid]
        mean, std = advantages.mean(), advantages.std(correction=0).clamp(min=0.01)
        objective = trmrl.clipped_objective

        def plain_objective(ratio: Tensor, normalised: Tensor, clip_coef: float) -> Tensor:
            return objective(ratio, normalised * std + mean, clip_coef)

        with patch.object(trmrl, "clipped_objective", plain_objective):
            return super().update(optimizer, trial, args, rng, left)


if __name__ == "__main__":
    sys.exit(trmrl.main(agent_class=Ablation, args_class=Args))
