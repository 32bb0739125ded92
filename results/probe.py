"""What the claims need of a trained network: C6 and Theorem 4.1. reproduce.py keeps it as probe.npz."""

import sys
from pathlib import Path

import numpy as np
import torch

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
import trmrl  # noqa: E402 (it is in the folder above)


def r_squared(features: np.ndarray, targets: np.ndarray, fitted: np.ndarray) -> float:
    """Of a linear model of the targets, fitted where fitted is True, on the others."""
    features = np.column_stack([features, np.ones(len(features))])
    weights = np.linalg.lstsq(features[fitted], targets[fitted])[0]
    errors = targets[~fitted] - features[~fitted] @ weights
    return 1 - np.square(errors).mean() / targets[~fitted].var()


def risks(alpha: torch.Tensor, values: torch.Tensor, candidates: torch.Tensor) -> torch.Tensor:
    """Bayes risks (..., C) of candidates (..., C, d): the α-weighted mean (..., N) of - cos(candidate, value_t)."""
    cosines = torch.nn.functional.cosine_similarity(candidates[..., :, None, :], values[..., None, :, :], dim=-1)
    return -(cosines * alpha[..., None, :]).sum(-1)


def violations(alpha: torch.Tensor, values: torch.Tensor) -> float:
    """How often, of all attentions α (..., N), a single value (..., N, d) has a smaller risk than their consensus."""
    consensus = risks(alpha, values, (alpha[..., None, :] @ values))
    return (risks(alpha, values, values).amin(-1) < consensus[..., 0] - 1e-5).float().mean().item()


@torch.no_grad()
def probe(run: Path) -> dict[str, np.ndarray]:
    """C6: R² of linear models from φ, and from raw transitions, to v*. T: violations of Theorem 4.1 by layer.
    Both on 60 unseen tasks, their first episodes by mean actions; the models are fitted on the first 40 tasks."""
    agent, envs, args = trmrl.load(run, test_tasks=60)
    rng = trmrl.random_stream(args.seed, "refinement")
    tasks = envs[0].sample_tasks("test", 60, rng)
    trial = trmrl.collect_trial(agent, envs, tasks, 1, rng, explore=False)
    steps, task = trial.valid.nonzero(as_tuple=True)
    full = steps >= args.memory_length - 1  # where no PAD is in sight
    steps, task = steps[full], task[full]
    projected = []
    hooks = [layer.value.register_forward_hook(lambda *call: projected.append(call[2])) for layer in agent.layers]
    _, attention = agent.refine(trial.transitions, steps, task)
    for hook in hooks:
        hook.remove()
    transitions = agent.normalise(trial.transitions[steps, task])
    result = {"violations": [], "violations_normalised": []}
    for alpha, values in zip(attention, projected):
        values = values.unflatten(2, (args.heads, -1)).transpose(1, 2)  # (B, ω, N, d/ω)
        result["violations"].append(violations(alpha, values))
        result["violations_normalised"].append(violations(alpha, torch.nn.functional.normalize(values, dim=-1)))
    for name, features in (("r2_memories", agent.phi(transitions)), ("r2_raw", trial.transitions[steps, task])):
        result[name] = r_squared(features.numpy().astype(float), tasks[task, 0], (task < 40).numpy())
    return {name: np.array(value) for name, value in result.items()}
