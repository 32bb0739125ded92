"""TrMRL with flags that only ablations need: python results/ablations.py --env HalfCheetahVel --layer-norm

Everything else is trmrl.py's: its other flags, its training and what a run writes.
"""

import sys
from dataclasses import dataclass, replace
from pathlib import Path
from unittest.mock import patch

from numpy.random import Generator
from torch import Tensor, nn
from torch.optim import Optimizer

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
import trmrl  # noqa: E402 (it is in the folder above)


@dataclass
class Args(trmrl.Args):
    """TrMRL's ablations: meta-train, then meta-test with frozen weights."""

    t_fixup: bool = True  # initialise by T-Fixup (Sec. 3.3), else by Xavier, with or without LayerNorm
    layer_norm: bool = False  # LayerNorm after each block, as Vaswani et al. (2017) have it
    plain: bool = False  # inputs and advantages are not normalised, as in the authors' code
    authors_token: bool = False  # the current token is (s_t, a_{t-1}, r_{t-1}, η_{t-1}), as in the authors' code


class Ablation(trmrl.Agent):
    """TrMRL, changed by the flags above. Its method has another name, so that trmrl.py does not go on with its runs."""

    method = "Ablation"

    def build(self, args: Args) -> None:
        super().build(replace(args, t_fixup=False))  # Xavier, with LayerNorm
        if not args.layer_norm:
            for layer in self.layers:
                layer.attention_norm, layer.feed_forward_norm = nn.Identity(), nn.Identity()
        if args.t_fixup:
            trmrl.t_fixup_(self.phi, self.layers)
        self.plain, self.authors_token = args.plain, args.authors_token

    def normalise(self, transitions: Tensor) -> Tensor:
        if self.plain:
            return transitions.clone()  # working_memories writes PADs into what it gets
        return super().normalise(transitions)

    def refine(self, transitions: Tensor, t: Tensor, task: Tensor) -> tuple[list[Tensor], list[Tensor]]:
        """Shapes as in trmrl.py. With the authors' token each step has the a, r and η of the step before it, and an
        episode's first step has zeros."""
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
        """As trmrl.py's. ppo_update normalises advantages; with plain, the objective takes that back."""
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
