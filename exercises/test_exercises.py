"""The answer key proves itself: each exercise's check passes on trmrl.py, and fails on every mistake below."""

import ast
import itertools
import subprocess
import sys
import types

import blank
import check
import numpy as np
import pytest
import torch

import test_trmrl

SOURCE = blank.SCRIPT.read_text(encoding="utf-8")

MISTAKES = {  # what is wrong: the exercise, the right text, the wrong one
    "sine and cosine swapped": ("1", "[angles.sin(), angles.cos()]", "[angles.cos(), angles.sin()]"),
    "one frequency": ("1", "torch.arange(0, d_model, 2) / d_model)", "torch.zeros(d_model // 2))"),
    "the model's d instead of a head's": ("2", "math.sqrt(Q.shape[3])", "math.sqrt(queries.shape[2])"),
    "the mask forgotten": ("2", " + mask).softmax(3)", ").softmax(3)"),
    "softmax over the queries": ("2", "+ mask).softmax(3)", "+ mask).softmax(2)"),
    "no residual connection": ("2", "(queries + self.output(h))", "(self.output(h))"),
    "keys for values": ("2", "self.value(memories)\n", "self.key(memories)\n"),
    "the first window's mask for all": ("2", "+ mask).softmax(3)", "+ mask[:1]).softmax(3)"),
    "the norms' places swapped": ("2", "x = self.attention_norm(", "x = self.feed_forward_norm("),
    "attention not trained": ("2", "(alpha @ V)", "(alpha.detach() @ V)"),
    "two episodes at most": ("3a", "(t // horizon * horizon)", "((t >= horizon) * horizon)"),
    "layers not trained": ("3b", "memories.append(e[:, -1])", "memories.append(e[:, -1].detach())"),
    "no causal mask": ("3b", "self.causal & filled[:, None]", "filled[:, None] & (self.causal | True)"),
    "PADs attended to": ("3b", "self.causal & filled[:, None]", "self.causal & (filled[:, None] | True)"),
    "window one short": ("3a", "steps >= start[:, None]", "steps >= torch.maximum(start, t + 2 - N)[:, None]"),
    "memory survives the episode": ("3a", "steps >= start[:, None]", "steps >= 0"),
    "current action not padded": ("3b", "x[:, -1, self.num_observations :] = 0", "x[:, -1, -2:] = 0"),
    "PADs before normalising": ("3b", "= 0  # Alg. 1: a", "= self.normalise(0 * x)[:, -1, self.num_observations :]  #"),
    "e⁰ without positions": ("3b", "attention = [e[:, -1]]", "attention = [self.working_memories(windows)[:, -1]]"),
    "e⁰ forgotten": ("3b", "memories, attention = [e[:, -1]], []", "memories, attention = [], []"),
    "attention of the oldest": ("3b", "attention.append(alpha[:, :, -1])", "attention.append(alpha[:, :, 0])"),
    "no positions": ("3b", "self.working_memories(windows) + self.positions", "self.working_memories(windows)"),
    "queries scaled too": ("4", "in (layer.value, layer.output,", "in (layer.query, layer.value, layer.output,"),
    "values not scaled": ("4", "in (layer.value, layer.output,", "in (layer.output,"),
    "embedding not scaled": ("4", "phi.weight *= (9 * L) ** -0.25", "pass"),
    "a bias drawn": ("4", "phi.weight *= (9 * L) ** -0.25", "phi.weight *= (9 * L) ** -0.25; phi.bias.normal_()"),
    "another power of L": ("4", "0.67 * L**-0.25", "0.67 * L**-0.5"),
    "cut at the episode": ("5", "lambda * advantage\n", "lambda * advantage * (1 - trial.transitions[t, :, -1])\n"),
    "no bootstrap": ("5", "next_value, advantage = trial.values[-1], 0.0", "next_value, advantage = 0.0, 0.0"),
    "λ forgotten": ("5", "gamma * gae_lambda * advantage", "gamma * advantage"),
    "γ forgotten in δ": ("5", "trial.r[t] + gamma * next_value", "trial.r[t] + next_value"),
    "returns without values": ("5", "advantages + trial.values[:-1]", "advantages"),
    "dying costs nothing": ("5", "torch.where(trial.valid[t], trial.values[t], gamma * next_value)", "trial.values[t]"),
    "unclipped": ("6", "torch.minimum(ratio * advantages, clipped * advantages)", "ratio * advantages"),
    "pessimism turned round": ("6", "torch.minimum(ratio * adv", "torch.maximum(ratio * adv"),
    "always clipped": ("6", "torch.minimum(ratio * advantages, clipped * advantages)", "clipped * advantages"),
    "clipped above only": ("6", "ratio.clamp(1 - clip_coef, 1 + clip_coef)", "ratio.clamp(max=1 + clip_coef)"),
    "another limit": ("6", "ratio.clamp(1 - clip_coef, 1 + clip_coef)", "ratio.clamp(0.8, 1.2)"),
    "half of the gradient": ("6", "ratio.clamp(1 - clip", "ratio.detach().clamp(1 - clip"),
    "clipped action remembered": ("7", "a[t, i] = action[i]", "a[t, i] = action[i].clip(-1, 1)"),
    "η never set": ("7", "(died or (t + 1) % agent.horizon == 0) and t < T - 1", "0"),
    "η at the trial's end": ("7", " == 0) and t < T - 1", " == 0)"),
    "η at deaths alone": ("7", "(died or (t + 1) % agent.horizon == 0)", "died"),
    "every episode from the same seed": ("7", "int(rng.integers(2**31)) + mine", "5 + mine"),
    "the same start for all tasks": ("7", "int(rng.integers(2**31)) + mine", "int(rng.integers(2**31)) + 0 * mine"),
    "noise only if it is used": ("7", "noise = rng", "noise = np.random.default_rng(rng if explore else 0)"),
    "a NaN kept": ("7", "not torch.isfinite(trial.transitions).all()", "False"),
    "a method's state forgotten": ("7", "values[t], state = agent.act(", "values[t], _ = agent.act("),
    "no exploration": ("7", "[mine] * explore", "[mine] * 0"),
    "a death bootstraps": ("7", "[2].numpy() * alive", "[2].numpy()"),
    "steps after a death count": ("7", "valid[t] = alive", "valid[t] = True"),
    "the dead are stepped": ("7", "alive[i] = not died", "alive[i] = True"),
    "exploration in the meta-test": ("8", '"meta-test"), explore=False', '"meta-test"), explore=True'),
    "tasks from training's stream": ("8", '(args.seed, f"{split} tasks")', '(args.seed, "train tasks", 1)'),
    "test tasks for OOD": ("8", "sample_tasks(split, args.test_tasks", 'sample_tasks("test", args.test_tasks'),
    "success of the last step only": ("8", "np.fmax.reduce(success, axis=2)", "success[:, :, -1]"),
    "fitted on all": ("9", "(features[:, fitted], rcond=1e-3) @ actions[fitted]", "(features, rcond=1e-3) @ actions"),
    "tested as fitted": ("9", "[:, ~fitted] @ weights - actions[~fitted]", "[:, fitted] @ weights - actions[fitted]"),
    "no intercept": ("9", "torch.ones_like(memories[..., :1])", "torch.zeros_like(memories[..., :1])"),
    "likeness to the working memory": ("9", "(memories, memories[-1:], dim=2)", "(memories, memories[:1], dim=2)"),
    "reward's sign": ("10", "-abs(velocity - self.task[0])", "abs(velocity - self.task[0])"),
    "velocity of the moment": ("10", "(self.data.qpos[0] - before) / self.dt", "self.data.qvel[0]"),
    "ten times the control cost": ("10", "0.05 * np.dot", "0.5 * np.dot"),
    "OOD holds training's velocities": ("10", "rng.uniform(3.0, 4.0, (n, 1))", "rng.uniform(0.0, 4.0, (n, 1))"),
}  # fmt: skip


def run_check(number: str, source: str, monkeypatch, tmp_path) -> None:
    """Runs an exercise's tests, with all their parameters, on a script's source; raises what they raise."""
    script = types.ModuleType("trmrl")
    monkeypatch.setitem(sys.modules, "trmrl", script)  # dataclasses look it up
    exec(compile(source, "trmrl.py", "exec"), vars(script))
    script.ENVS["Mortal"] = test_trmrl.Mortal
    monkeypatch.setattr(test_trmrl, "trmrl", script)
    for name in check.CHECKS[number]:
        class_name, method = name.split("::")
        test = getattr(getattr(test_trmrl, class_name)(), method)
        marks = [mark for mark in getattr(test, "pytestmark", []) if mark.name == "parametrize"]
        names = [name for mark in marks for name in mark.args[0].split(", ")]
        choices = [[value if "," in mark.args[0] else (value,) for value in mark.args[1]] for mark in marks]
        for chosen in itertools.product(*choices):
            arguments = dict(zip(names, itertools.chain(*chosen)))
            if "tmp_path" in test.__code__.co_varnames[: test.__code__.co_argcount]:
                arguments["tmp_path"] = tmp_path
            test(**arguments)


@pytest.mark.parametrize("number", check.CHECKS)
def test_a_check_passes_on_the_script(number, monkeypatch, tmp_path):
    run_check(number, SOURCE, monkeypatch, tmp_path)


@pytest.mark.parametrize("number", check.CHECKS)
def test_a_check_fails_on_the_blank(number, monkeypatch, tmp_path):
    with pytest.raises(NotImplementedError):
        run_check(number, blank.blank(SOURCE, blank.EXERCISES[number]), monkeypatch, tmp_path)


@pytest.mark.parametrize("mistake", MISTAKES)
def test_a_check_catches_the_mistake(mistake, monkeypatch, tmp_path):
    number, right, wrong = MISTAKES[mistake]
    assert SOURCE.count(right) == 1 and right not in blank.blank(SOURCE, blank.EXERCISES[number])
    with pytest.raises((AssertionError, AttributeError, pytest.fail.Exception)):  # a gradient that is None; no error
        run_check(number, SOURCE.replace(right, wrong), monkeypatch, tmp_path)


def test_the_readme_names_the_functions():
    text = (blank.FOLDER / "exercises" / "README.md").read_text(encoding="utf-8")
    for number in blank.EXERCISES.keys() - {"3"}:  # which is 3a and 3b
        _, section = text.split(f"\n## {number}. ")
        assert all(f"`{name}`" in section.split("\n## ")[0] for name in blank.EXERCISES[number])


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


def run_command(main, capsys, *words) -> tuple[int, list[str], list[str]]:
    """The exit code of a command, and the lines of its output and of its errors."""
    code, shown = main([str(word) for word in words]), capsys.readouterr()
    return code, shown.out.splitlines(), shown.err.splitlines()


def test_a_blank_is_written_checked_and_not_overwritten(monkeypatch, tmp_path, capsys):
    monkeypatch.setattr(blank, "FOLDER", tmp_path)
    path = tmp_path / "my_1.py"
    code, (line,), errors = run_command(blank.main, capsys, "1")
    assert code == 0 and not errors and str(path) in line and line.endswith("python exercises/check.py 1")
    assert list(tmp_path.iterdir()) == [path] and path.read_text() == blank.blank(SOURCE, ["sinusoidal_positions"])
    for file, code in ((path, 1), (blank.SCRIPT, 0)):
        command = [sys.executable, check.__file__, "1", file]
        ended = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True)
        assert ended.returncode == code and ended.stdout.startswith(f"checking exercise 1 in {file}\n")
        assert ("NotImplementedError" in ended.stdout) == (code == 1) and not ended.stderr
    path.write_text("an answer")
    code, lines, (error,) = run_command(blank.main, capsys, "1")
    assert code == 2 and not lines and f"{path} exists; --force" in error and path.read_text() == "an answer"
    assert run_command(blank.main, capsys, "1", "--force")[0] == 0 and path.read_text() != "an answer"


def test_several_exercises_are_left_empty_together(monkeypatch, tmp_path, capsys):
    monkeypatch.setattr(blank, "FOLDER", tmp_path)
    for words, expected in (("3", "3a 3b".split()), ("4 2", ["2", "4"]), ("3b 3", ["3"])):
        _, (line,), _ = run_command(blank.main, capsys, *words.split())
        text = max(tmp_path.iterdir(), key=lambda path: path.stat().st_mtime_ns).read_text()
        names = [name for number in expected for name in blank.EXERCISES[number]]
        assert text.count("raise NotImplementedError") == len(names) and len(text) < len(SOURCE)
        for name in names:
            assert "raise NotImplementedError" in ast.unparse(blank.find(ast.parse(text), name)) and name in line
    assert {path.name for path in tmp_path.iterdir()} == {"my_3.py", "my_2_4.py", "my_3_3b.py"}


@pytest.mark.parametrize("main", [blank.main, check.main])
@pytest.mark.parametrize("words", ["11", "two", "", "1 11", "--force"])
def test_a_wrong_number_gets_one_line(main, words, capsys):
    code, lines, (error,) = run_command(main, capsys, *words.split())
    assert code == 2 and not lines and error.startswith("error: ") and "1, 2, 3, 3a, 3b, 4" in error


def test_a_missing_file_gets_one_line(monkeypatch, tmp_path, capsys):
    monkeypatch.setattr(blank, "FOLDER", tmp_path)
    for words, name in ((["4", "2"], "my_2_4.py"), (["2", tmp_path / "other.py"], "other.py")):
        code, lines, (error,) = run_command(check.main, capsys, *words)
        assert code == 2 and not lines and f"there is no {tmp_path / name}" in error
