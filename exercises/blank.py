"""Writes trmrl.py with the functions of an exercise, or of several, to be written anew.

python exercises/blank.py 3 > my_trmrl.py
"""

import ast
import sys
from pathlib import Path

SCRIPT = Path(__file__).resolve().parent.parent / "trmrl.py"
EXERCISES = {  # number: the functions and methods of trmrl.py that it asks for
    1: ["sinusoidal_positions"],
    2: ["TransformerLayer.forward"],
    3: ["retrieve", "Agent.working_memories", "Agent.refine"],
    4: ["t_fixup_"],
    5: ["advantages_and_returns"],
    6: ["clipped_objective"],
    7: ["collect_trial"],
    8: ["episode_results", "meta_test"],
    9: ["analyse_memories"],
    10: ["HalfCheetahVel.sample_tasks", "HalfCheetahVel.step"],
}


def find(tree: ast.Module, name: str) -> ast.FunctionDef:
    node = tree
    for part in name.split("."):
        node = next(child for child in node.body if getattr(child, "name", None) == part)
    return node


def blank(source: str, names: list[str]) -> str:
    """The source, with the bodies of the named functions replaced; their docstrings stay."""
    lines = source.splitlines()
    functions = [find(ast.parse(source), name) for name in names]
    for function in sorted(functions, key=lambda function: -function.lineno):  # from the end, so that numbers hold
        start = function.body[0].lineno - 1
        if ast.get_docstring(function):
            start = function.body[0].end_lineno
        indent = " " * function.body[0].col_offset
        lines[start : function.end_lineno] = [f"{indent}raise NotImplementedError"]
    return "\n".join(lines) + "\n"


def main(argv: list[str]) -> int:
    if not argv or not set(argv) <= set(map(str, EXERCISES)):
        print(f"error: python exercises/blank.py NUMBER: takes numbers from 1 to {len(EXERCISES)}", file=sys.stderr)
        return 2
    names = [name for number in sorted(set(argv)) for name in EXERCISES[int(number)]]
    sys.stdout.write(blank(SCRIPT.read_text(encoding="utf-8"), names))
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
