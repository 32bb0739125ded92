"""Writes my_3.py beside trmrl.py: the same script, with the functions of exercise 3 left to be written.

python exercises/blank.py 3             for exercises 3 and 4 in one file, my_3_4.py: 3 4
python exercises/blank.py 3 --force     even if there is a my_3.py, whose text is then lost
"""

import ast
import sys
from pathlib import Path

FOLDER = Path(__file__).resolve().parent.parent
SCRIPT = FOLDER / "trmrl.py"
EXERCISES = {  # number: the functions and methods of trmrl.py that it asks for
    "1": ["sinusoidal_positions"],
    "2": ["TransformerLayer.forward"],
    "3": ["retrieve", "Agent.working_memories", "Agent.refine"],
    "3a": ["retrieve"],
    "3b": ["Agent.working_memories", "Agent.refine"],
    "4": ["t_fixup_"],
    "5": ["advantages_and_returns"],
    "6": ["clipped_objective"],
    "7": ["collect_trial"],
    "8": ["episode_results", "meta_test"],
    "9": ["analyse_memories"],
    "10": ["HalfCheetahVel.sample_tasks", "HalfCheetahVel.step"],
}
NUMBERS = ", ".join(EXERCISES)


def find(tree: ast.Module, name: str) -> ast.FunctionDef:
    node = tree
    for part in name.split("."):
        node = next(child for child in node.body if getattr(child, "name", None) == part)
    return node


def blank(source: str, names: list[str]) -> str:
    """The source, with the bodies of the named functions replaced; their docstrings stay."""
    lines = source.splitlines()
    functions = [find(ast.parse(source), name) for name in set(names)]
    for function in sorted(functions, key=lambda function: -function.lineno):  # from the end, so that numbers hold
        start = function.body[0].lineno - 1
        if ast.get_docstring(function):
            start = function.body[0].end_lineno
        indent = " " * function.body[0].col_offset
        lines[start : function.end_lineno] = [f"{indent}raise NotImplementedError"]
    return "\n".join(lines) + "\n"


def file_of(numbers: list[str]) -> Path:
    return FOLDER / f"my_{'_'.join(number for number in EXERCISES if number in numbers)}.py"


def main(argv: list[str]) -> int:
    numbers = [word for word in argv if word != "--force"]
    if not numbers or not set(numbers) <= set(EXERCISES):
        print(f"error: python exercises/blank.py NUMBER ... [--force]: a number is one of {NUMBERS}", file=sys.stderr)
        return 2
    path = file_of(numbers)
    if path.exists() and "--force" not in argv:
        print(f"error: {path} exists; --force empties it, and what you wrote in it is lost", file=sys.stderr)
        return 2
    names = [name for number in numbers for name in EXERCISES[number]]
    temporary = path.with_suffix(".tmp")
    temporary.write_text(blank(SCRIPT.read_text(encoding="utf-8"), names), encoding="utf-8")
    temporary.replace(path)
    check = f"python exercises/check.py {' '.join(numbers)}"
    print(f"wrote {path}: now write {', '.join(dict.fromkeys(names))} in it, then: {check}")
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
