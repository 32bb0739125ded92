"""Runs the tests of exercise 3 on my_3.py, which exercises/blank.py has made; exit code 0: right, 1: not yet.

python exercises/check.py 3              of exercises 3 and 4 on my_3_4.py: 3 4
python exercises/check.py 3 trmrl.py     on another file
"""

import os
import sys
from pathlib import Path

import pytest
from blank import EXERCISES, FOLDER, NUMBERS, file_of

CHECKS = {  # number: its tests in test_trmrl.py, in the order in which they run
    "1": ["TestAgent::test_positions_are_vaswanis"],
    "2": [
        "TestAgent::test_layer_is_eq_1",
        "TestAgent::test_the_layer_norm_arm_is_torchs_transformer_layer",
        "TestPPO::test_the_update_is_ppos",
    ],
    "3a": ["TestTrial::test_windows_follow_algorithm_1"],
    "3b": [
        "TestTrial::test_acting_follows_algorithm_1",
        "TestMetaTests::test_refinement_against_scalar_loops",
        "TestPPO::test_the_update_is_ppos",
    ],
    "4": ["TestAgent::test_t_fixup_scales"],
    "5": ["TestPPO::test_advantages_are_the_double_sum_over_the_trial"],
    "6": ["TestPPO::test_the_update_is_ppos"],
    "7": [
        "TestTrial::test_a_trial_is_what_the_environment_did",
        "TestTrial::test_acting_follows_algorithm_1",
        "TestTrial::test_exploration_has_the_policys_deviation",
        "TestTrial::test_a_methods_state_comes_back_at_the_next_step",
    ],
    "8": [
        "TestMetaTests::test_meta_test_files",
        "TestMetaTests::test_meta_tests_take_mean_actions_on_tasks_that_training_never_draws",
    ],
    "9": ["TestMetaTests::test_refinement_against_scalar_loops"],
    "10": ["TestEnvironments::test_bodies_are_gymnasiums", "TestEnvironments::test_tasks_are_the_papers"],
}
CHECKS["3"] = CHECKS["3a"] + CHECKS["3b"]


def main(argv: list[str]) -> int:
    files = [Path(word) for word in argv if word.endswith(".py")]
    numbers = [word for word in argv if not word.endswith(".py")]
    if not numbers or not set(numbers) <= set(EXERCISES) or len(files) > 1:
        print(f"error: python exercises/check.py NUMBER ... [FILE.py]: a number is one of {NUMBERS}", file=sys.stderr)
        return 2
    file = files[0].resolve() if files else file_of(numbers)
    if not file.exists():
        print(f"error: there is no {file}; python exercises/blank.py {' '.join(numbers)} makes one", file=sys.stderr)
        return 2
    tests = [f"{FOLDER / 'test_trmrl.py'}::{test}" for number in numbers for test in CHECKS[number]]
    os.environ["TRMRL"] = str(file)
    print(f"checking exercise {', '.join(numbers)} in {file}", flush=True)
    return int(pytest.main(["-x", "-v", "--no-header", "--tb=short", *tests]) != 0)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
