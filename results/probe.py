"""What claims about Figs. 7 and 8, attention and Theorem 4.1 need of a network; reproduce.py keeps it as probe.npz."""

import sys
from pathlib import Path

import numpy as np
import torch
from torch import Tensor
from torch.nn.functional import cosine_similarity, normalize

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
import trmrl  # noqa: E402 (it is in the folder above)


def guesses(features: Tensor, targets: np.ndarray, fitted: np.ndarray) -> np.ndarray:
    """Of the targets by a linear model, fitted where fitted is True, on the others."""
    inputs = np.column_stack([features.double().numpy(), np.ones(len(features))])
    return inputs[~fitted] @ (np.linalg.pinv(inputs[fitted], rcond=1e-3) @ targets[fitted])


def risks(alpha: Tensor, values: Tensor, candidates: Tensor) -> Tensor:
    """Bayes risks (..., C) of candidates (..., C, d): the α-weighted mean (..., N) of - cos(candidate, value_t)."""
    cosines = cosine_similarity(candidates[..., :, None, :], values[..., None, :, :], dim=-1)
    return -(cosines * alpha[..., None, :]).sum(-1)


def share_broken(alpha: Tensor, values: Tensor) -> float:
    """Of attentions α (..., N), how many break Theorem 4.1: a single value (..., N, d) has a smaller risk than their
    consensus, by more than rounding."""
    consensus = risks(alpha, values, (alpha[..., None, :] @ values))
    return (risks(alpha, values, values).amin(-1) < consensus[..., 0] - 1e-5).float().mean().item()


def double_centred(x: np.ndarray) -> np.ndarray:
    """x (windows, memories) less each window's mean and each position's: what is left is of the memory alone."""
    return x - x.mean(0) - x.mean(1, keepdims=True) + x.mean()


def violations(agent: trmrl.Agent, transitions: Tensor, steps: Tensor, task: Tensor) -> dict[str, list[float]]:
    """Violations of Theorem 4.1 at these steps, by layer: by the network's values, and by normalised ones."""
    projected, result = [], {"violations": [], "violations_normalised": []}
    hooks = [layer.value.register_forward_hook(lambda *call: projected.append(call[2])) for layer in agent.layers]
    _, attention = agent.refine(transitions, steps, task)
    for hook in hooks:
        hook.remove()
    for alpha, values in zip(attention, projected):
        values = values.unflatten(2, (alpha.shape[1], -1)).transpose(1, 2)  # (B, ω, N, d/ω)
        result["violations"].append(share_broken(alpha, values))
        result["violations_normalised"].append(share_broken(alpha, normalize(values, dim=-1)))
    return result


def weighing(agent: trmrl.Agent, transitions: Tensor, error: np.ndarray) -> list[float]:
    """By layer, the correlation of a past memory's α, a mean over heads, with minus the error (T, n) of a guess of the
    task from this memory alone; both without what depends on the memory's place in the window, or on the window. Where
    the error is NaN there is no guess."""
    ages = torch.arange(agent.memory_length - 1, 0, -1)  # of the past memories, the oldest first
    steps, task = torch.from_numpy(~np.isnan(error)).nonzero(as_tuple=True)
    whole = ~np.isnan(error[(steps[:, None] - ages).clamp(min=0), task[:, None]]).any(1) & (steps >= ages[0]).numpy()
    steps, task = steps[whole], task[whole]
    closeness = double_centred(-error[steps[:, None] - ages, task[:, None]])  # (windows, N - 1)
    _, attention = agent.refine(transitions, steps, task)
    weights = [double_centred(alpha[:, :, :-1].mean(1).double().numpy()) for alpha in attention]
    return [np.corrcoef(x.ravel(), closeness.ravel())[0, 1] for x in weights]


@torch.no_grad()
def probe(run: Path) -> dict[str, np.ndarray]:
    """On the first episodes of 60 unseen tasks, by mean actions. Linear models are fitted on the first 40 tasks and
    judged on the others. Returns the R² of models from φ and from raw transitions to v*, and what violations returns;
    for this network and, as untrained_…, for itself before training also the two errors of Fig. 7, (L + 1,), of this
    network's actions, and what weighing returns, (L,)."""
    agent, envs, args = trmrl.load(run, test_tasks=60)
    rng = trmrl.random_stream(args.seed, "refinement")
    tasks = envs[0].sample_tasks("test", 60, rng)
    trial = trmrl.collect_trial(agent, envs, tasks, 1, rng, explore=False)
    steps, task = trial.valid.nonzero(as_tuple=True)
    full = steps >= args.memory_length - 1  # where no PAD is in sight
    steps, task = steps[full], task[full]
    raw, targets, fitted = trial.transitions[steps, task], tasks[task, 0], (task < 40).numpy()
    result, others = violations(agent, trial.transitions, steps, task), targets[~fitted]
    from_memories = guesses(agent.phi(agent.normalise(raw)), targets, fitted)
    for name, guessed in (("r2_memories", from_memories), ("r2_raw", guesses(raw, targets, fitted))):
        result[name] = 1 - np.square(others - guessed).mean() / others.var()
    error = np.full(trial.valid.shape, np.nan)
    error[steps[~fitted], task[~fitted]] = np.abs(from_memories - others)
    torch.manual_seed(args.seed)
    untrained = trmrl.Agent(envs[0], args)
    untrained.load_state_dict(dict(agent.named_buffers()), strict=False)
    refined, _ = agent.refine(trial.transitions, steps, task)
    actions = agent.policy(refined[-1]).double().numpy()
    for prefix, network in (("", agent), ("untrained_", untrained)):
        memories, _ = network.refine(trial.transitions, steps, task)
        distances = [1 - cosine_similarity(memory, memories[-1]).mean() for memory in memories]
        result[f"{prefix}representation_error"] = torch.stack(distances).numpy()
        errors = [np.square(guesses(memory, actions, fitted) - actions[~fitted]).mean() for memory in memories]
        result[f"{prefix}regression_mse"] = errors
        result[f"{prefix}weighing"] = weighing(network, trial.transitions, error)
    return {name: np.array(value) for name, value in result.items()}
