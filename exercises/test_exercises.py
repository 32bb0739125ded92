"""The answer key proves itself: each exercise's check passes on trmrl.py, and fails on every mistake below."""

import ast
import itertools
import subprocess
import sys
import types

import numpy as np
import pytest
import torch

import test_trmrl
from exercises import blank

CHECKS = {  # an exercise's number: the tests that its command runs
    1: ["TestAgent.test_positions_are_vaswanis"],
    2: [
        "TestAgent.test_layer_is_eq_1",
        "TestAgent.test_the_layer_norm_arm_is_torchs_transformer_encoder",
        "TestPPO.test_the_update_is_ppos",
    ],
    3: [
        "TestTrial.test_windows_follow_algorithm_1",
        "TestTrial.test_acting_follows_algorithm_1",
        "TestMetaTests.test_refinement_against_scalar_loops",
        "TestPPO.test_the_update_is_ppos",
    ],
    4: ["TestAgent.test_t_fixup_scales"],
    5: ["TestPPO.test_advantages_are_the_double_sum_over_the_trial"],
    6: ["TestPPO.test_the_update_is_ppos"],
    7: [
        "TestTrial.test_a_trial_is_what_the_environment_did",
        "TestTrial.test_acting_follows_algorithm_1",
        "TestTrial.test_exploration_has_the_policys_deviation",
        "TestTrial.test_a_methods_state_comes_back_at_the_next_step",
    ],
    8: [
        "TestMetaTests.test_meta_test_files",
        "TestMetaTests.test_meta_tests_take_mean_actions_on_tasks_that_training_never_draws",
    ],
    9: ["TestMetaTests.test_refinement_against_scalar_loops"],
    10: ["TestEnvironments.test_bodies_are_gymnasiums", "TestEnvironments.test_tasks_are_the_papers"],
}
SOURCE = blank.SCRIPT.read_text(encoding="utf-8")

MISTAKES = {  # what is wrong: the exercise, the right text, the wrong one
    "sine and cosine swapped": (1, "[angles.sin(), angles.cos()]", "[angles.cos(), angles.sin()]"),
    "one frequency": (1, "torch.arange(0, d_model, 2) / d_model)", "torch.zeros(d_model // 2))"),
    "the model's d instead of a head's": (2, "math.sqrt(Q.shape[3])", "math.sqrt(queries.shape[2])"),
    "the mask forgotten": (2, " + mask).softmax(3)", ").softmax(3)"),
    "softmax over the queries": (2, "+ mask).softmax(3)", "+ mask).softmax(2)"),
    "no residual connection": (2, "(queries + self.output(h))", "(self.output(h))"),
    "keys for values": (2, "self.value(memories)\n", "self.key(memories)\n"),
    "the first window's mask for all": (2, "+ mask).softmax(3)", "+ mask[:1]).softmax(3)"),
    "the norms' places swapped": (2, "x = self.attention_norm(", "x = self.feed_forward_norm("),
    "attention not trained": (2, "(alpha @ V)", "(alpha.detach() @ V)"),
    "two episodes at most": (3, "(t // horizon * horizon)", "((t >= horizon) * horizon)"),
    "layers not trained": (3, "memories.append(e[:, -1])", "memories.append(e[:, -1].detach())"),
    "no causal mask": (3, "self.causal & filled[:, None]", "filled[:, None] & (self.causal | True)"),
    "PADs attended to": (3, "self.causal & filled[:, None]", "self.causal & (filled[:, None] | True)"),
    "window one short": (3, "steps >= start[:, None]", "steps >= torch.maximum(start, t + 2 - N)[:, None]"),
    "memory survives the episode": (3, "steps >= start[:, None]", "steps >= 0"),
    "current action not padded": (3, "x[:, -1, self.num_observations :] = 0", "x[:, -1, -2:] = 0"),
    "PADs before normalising": (3, "= 0  # Alg. 1: a", "= self.normalise(0 * x)[:, -1, self.num_observations :]  #"),
    "e⁰ without positions": (3, "attention = [e[:, -1]]", "attention = [self.working_memories(windows)[:, -1]]"),
    "e⁰ forgotten": (3, "memories, attention = [e[:, -1]], []", "memories, attention = [], []"),
    "attention of the oldest": (3, "attention.append(alpha[:, :, -1])", "attention.append(alpha[:, :, 0])"),
    "no positions": (3, "self.working_memories(windows) + self.positions", "self.working_memories(windows)"),
    "queries scaled too": (4, "in (layer.value, layer.output,", "in (layer.query, layer.value, layer.output,"),
    "values not scaled": (4, "in (layer.value, layer.output,", "in (layer.output,"),
    "embedding not scaled": (4, "phi.weight *= (9 * L) ** -0.25", "pass"),
    "a bias drawn": (4, "phi.weight *= (9 * L) ** -0.25", "phi.weight *= (9 * L) ** -0.25; phi.bias.normal_()"),
    "another power of L": (4, "0.67 * L**-0.25", "0.67 * L**-0.5"),
    "cut at the episode's end": (5, "lambda * advantage\n", "lambda * advantage * (1 - trial.transitions[t, :, -1])\n"),
    "no bootstrap": (5, "next_value, advantage = trial.values[-1], 0.0", "next_value, advantage = 0.0, 0.0"),
    "λ forgotten": (5, "gamma * gae_lambda * advantage", "gamma * advantage"),
    "γ forgotten in δ": (5, "trial.r[t] + gamma * next_value", "trial.r[t] + next_value"),
    "returns without values": (5, "advantages + trial.values[:-1]", "advantages"),
    "dying costs nothing": (5, "torch.where(trial.valid[t], trial.values[t], gamma * next_value)", "trial.values[t]"),
    "unclipped": (6, "torch.minimum(ratio * advantages, clipped * advantages)", "ratio * advantages"),
    "pessimism turned round": (6, "torch.minimum(ratio * adv", "torch.maximum(ratio * adv"),
    "always clipped": (6, "torch.minimum(ratio * advantages, clipped * advantages)", "clipped * advantages"),
    "clipped above only": (6, "ratio.clamp(1 - clip_coef, 1 + clip_coef)", "ratio.clamp(max=1 + clip_coef)"),
    "another limit": (6, "ratio.clamp(1 - clip_coef, 1 + clip_coef)", "ratio.clamp(0.8, 1.2)"),
    "half of the gradient": (6, "ratio.clamp(1 - clip", "ratio.detach().clamp(1 - clip"),
    "clipped action remembered": (7, "a[t, i] = action[i]", "a[t, i] = action[i].clip(-1, 1)"),
    "η never set": (7, "= (died or last_step) and t < T - 1", "= 0"),
    "η at the trial's end": (7, "= (died or last_step) and t < T - 1", "= died or last_step"),
    "η at deaths alone": (7, "(died or last_step)", "died"),
    "every episode from the same seed": (7, "int(rng.integers(2**31)) + mine", "5 + mine"),
    "the same start for all tasks": (7, "int(rng.integers(2**31)) + mine", "int(rng.integers(2**31)) + 0 * mine"),
    "noise only if it is used": (7, "noise = rng", "noise = np.random.default_rng(rng if explore else 0)"),
    "a NaN kept": (7, "not torch.isfinite(trial.transitions).all()", "False"),
    "a method's state forgotten": (7, "values[t], state = agent.act(", "values[t], _ = agent.act("),
    "no exploration": (7, "[mine] * explore", "[mine] * 0"),
    "a death bootstraps": (7, "[2].numpy() * alive", "[2].numpy()"),
    "steps after a death count": (7, "valid[t], last_step = alive,", "valid[t], last_step = True,"),
    "the dead are stepped": (7, "alive[i] = not died", "alive[i] = True"),
    "exploration in the meta-test": (8, '"meta-test"), explore=False', '"meta-test"), explore=True'),
    "tasks from training's stream": (8, '(args.seed, f"{split} tasks")', '(args.seed, "train tasks", 1)'),
    "test tasks for OOD": (8, "sample_tasks(split, args.test_tasks", 'sample_tasks("test", args.test_tasks'),
    "success of the last step only": (8, "np.fmax.reduce(success, axis=2)", "success[:, :, -1]"),
    "fit on all tasks": (9, "(features[:, fitted], rcond=1e-3) @ actions[fitted]", "(features, rcond=1e-3) @ actions"),
    "tested where fitted": (9, "[:, ~fitted] @ weights - actions[~fitted]", "[:, fitted] @ weights - actions[fitted]"),
    "no intercept": (9, "torch.ones_like(memories[..., :1])", "torch.zeros_like(memories[..., :1])"),
    "likeness to the working memory": (9, "(memories, memories[-1:], dim=2)", "(memories, memories[:1], dim=2)"),
    "reward's sign": (10, "-abs(velocity - self.task[0])", "abs(velocity - self.task[0])"),
    "velocity of the moment": (10, "(self.data.qpos[0] - before) / self.dt", "self.data.qvel[0]"),
    "ten times the control cost": (10, "0.05 * np.dot", "0.5 * np.dot"),
    "OOD holds training's velocities": (10, "rng.uniform(3.0, 4.0, (n, 1))", "rng.uniform(0.0, 4.0, (n, 1))"),
}  # fmt: skip


def run_check(number: int, source: str, monkeypatch, tmp_path) -> None:
    """Runs an exercise's tests, with all their parameters, on a script's source; raises what they raise."""
    script = types.ModuleType("trmrl")
    monkeypatch.setitem(sys.modules, "trmrl", script)  # dataclasses look it up
    exec(compile(source, "trmrl.py", "exec"), vars(script))
    script.ENVS["Mortal"] = test_trmrl.Mortal
    monkeypatch.setattr(test_trmrl, "trmrl", script)
    for name in CHECKS[number]:
        class_name, method = name.split(".")
        test = getattr(getattr(test_trmrl, class_name)(), method)
        marks = [mark for mark in getattr(test, "pytestmark", []) if mark.name == "parametrize"]
        names = [name for mark in marks for name in mark.args[0].split(", ")]
        choices = [[value if "," in mark.args[0] else (value,) for value in mark.args[1]] for mark in marks]
        for chosen in itertools.product(*choices):
            arguments = dict(zip(names, itertools.chain(*chosen)))
            if "tmp_path" in test.__code__.co_varnames[: test.__code__.co_argcount]:
                arguments["tmp_path"] = tmp_path
            test(**arguments)


@pytest.mark.parametrize("number", CHECKS)
def test_a_check_passes_on_the_script(number, monkeypatch, tmp_path):
    run_check(number, SOURCE, monkeypatch, tmp_path)


@pytest.mark.parametrize("number", CHECKS)
def test_a_check_fails_on_the_blank(number, monkeypatch, tmp_path):
    with pytest.raises(NotImplementedError):
        run_check(number, blank.blank(SOURCE, blank.EXERCISES[number]), monkeypatch, tmp_path)


@pytest.mark.parametrize("mistake", MISTAKES)
def test_a_check_catches_the_mistake(mistake, monkeypatch, tmp_path):
    number, right, wrong = MISTAKES[mistake]
    assert SOURCE.count(right) == 1 and right not in blank.blank(SOURCE, blank.EXERCISES[number])
    with pytest.raises((AssertionError, AttributeError, pytest.fail.Exception)):  # a gradient that is None; no error
        run_check(number, SOURCE.replace(right, wrong), monkeypatch, tmp_path)


def test_the_readme_names_the_checks():
    text = (blank.SCRIPT.parent / "exercises" / "README.md").read_text(encoding="utf-8")
    for names in CHECKS.values():
        assert " or ".join(name.split(".test_")[1] for name in names) in text


def test_theorem_4_1():
    """Exercise 9: the α-weighted mean of normalised values has no larger Bayes risk than any single one of them."""
    agent = test_trmrl.make_agent(memory_length=8, d_model=16)
    trial = test_trmrl.trial_of(test_trmrl.copies(), agent)
    t, task = torch.arange(10, 20), torch.zeros(10, dtype=torch.long)
    _, attention = agent.refine(trial.transitions, t, task)
    rng = np.random.default_rng(0)
    for alpha in torch.cat(attention).flatten(0, 1).detach().double().numpy():
        values = rng.normal(size=(8, 16))
        values /= np.linalg.norm(values, axis=1, keepdims=True)

        def risk(estimate, alpha=alpha, values=values):
            return -sum(a * estimate @ v / np.linalg.norm(estimate) for a, v in zip(alpha, values))

        assert risk(alpha @ values) <= min(map(risk, values)) + 1e-12


def test_several_exercises_are_left_empty_together(capsys):
    assert blank.main(["4", "2"]) == 0
    text = capsys.readouterr().out
    assert text.count("raise NotImplementedError") == 2 and len(text) < len(SOURCE)
    for name in ("TransformerLayer.forward", "t_fixup_"):
        assert "raise NotImplementedError" in ast.unparse(blank.find(ast.parse(text), name))


@pytest.mark.parametrize("argument", ["11", "two"])
def test_a_wrong_number_gets_one_line(argument):
    command = [sys.executable, blank.__file__, argument]
    ended = subprocess.run(command, capture_output=True, text=True)
    assert ended.returncode == 2 and len(ended.stderr.splitlines()) == 1 and "from 1 to 10" in ended.stderr
