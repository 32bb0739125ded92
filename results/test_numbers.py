"""Every number in the text of README.md, results/README.md and claims.md is measured on the kept runs, or a constant.

numbers.csv has a row for each number: its page, the text before it, and what it is. A constant stands there itself.
Else `is` says what is taken of a measure over the seeds of the settings: mean, low or high (of the interval), std,
least, most, one seed's value ("seed 29"), or how many seeds would show an effect ("seeds for 27"). Two settings,
separated by |, are compared as claims.py does. After @ stand the only seeds that count.
"""

import re
import sys
from pathlib import Path

import numpy as np
import pandas as pd
import pytest

sys.path.insert(0, str(Path(__file__).resolve().parent))
import claims  # noqa: E402 (it is beside this file)

from test_trmrl import trmrl

PAGES = ("README.md", "results/README.md", "results/claims.md")
NUMBERS = pd.read_csv(claims.KEPT.parent / "numbers.csv", keep_default_na=False)
# The number of a name, such as C7 or seeds 28 to 30, is none to check, nor is a run's setting, such as 12 layers.
NAME = r"Figs?\. (?:\d+ to )?|App\. E\.|Theorem |\bC|ML|[Ll]ayer |[NLE] = |Python |(?:[Ss]eeds?|findings) (?:\d+ to )?"
SETTING = r" layers| test tasks| tasks| M"
NUMBER = re.compile(rf"({NAME})?(−?\d+(?:,\d{{3}})*(\.\d+)?)({SETTING})?")


class Measured(claims.Run):
    """A run with measures that only the text names."""

    def hours(self) -> float:
        return self.minutes[-1] / 60

    def duration(self) -> float:
        """In minutes."""
        return self.minutes[-1]

    def start(self) -> float:
        return self.tests[0]

    def after_a_million(self) -> float:
        """Mean of the last three evaluations within the first million steps."""
        return self.tests[self.steps <= 1.01][-3:].mean()

    def adapted_closely(self) -> float:
        """As adapted, with half its margin."""
        rewards = self.files["meta_test"]["rewards"][0, 0]
        return max(step + 1 for step in range(200) if abs(rewards[step] - rewards[100:].mean()) > 0.05)

    def late_reward(self) -> float:
        return self.files["meta_test"]["rewards"][0, 0, 100:].mean()

    def sixth(self) -> float:
        return self.episodes()[5]

    def worst_episode(self) -> float:
        return self.files["meta_test"]["returns"].min()

    def worst_of_the_others(self) -> float:
        returns = self.files["meta_test"]["returns"]
        return returns[returns > -500].min()

    def all_ood(self) -> float:
        """All six episodes, those that explore, too."""
        return self.episodes("ood").mean()

    def ood_failures(self) -> float:
        """The percentage of OOD episodes that return less than −300."""
        return 100 * (self.files["ood"]["returns"] < -300).mean()

    def ood_between(self, low: float, high: float) -> float:
        """The OOD return of targets from low to high."""
        arrays = self.files["ood"]
        within = (arrays["tasks"][:, 0] >= low) & (arrays["tasks"][:, 0] <= high)
        return arrays["returns"][within].mean()

    def ood_slow(self) -> float:
        return self.ood_between(3, 3.25)

    def ood_fast(self) -> float:
        return self.ood_between(3.75, 4)

    def share(self, error: str) -> float:
        """The mean of an error of Fig. 7 over the inner layers, as a share of layer 0's."""
        errors = self.files["probe"][error]
        return errors[1:-1].mean() / errors[0]

    def targets(self) -> np.ndarray:
        """The target velocities of the 20 test tasks during training."""
        env = trmrl.ENVS[self.args["env"]](seed=0)
        return env.sample_tasks("test", 20, trmrl.random_stream(self.args["seed"], "test tasks"))[:, 0]

    def inner_representation(self) -> float:
        return self.share("representation_error")

    def untrained_inner_representation(self) -> float:
        return self.share("untrained_representation_error")

    def inner_regression(self) -> float:
        return self.share("regression_mse")

    def untrained_inner_regression(self) -> float:
        return self.share("untrained_regression_mse")

    def first_layer_differs(self) -> float:
        return self.files["probe"]["representation_error"][0]

    def untrained_first_layer_differs(self) -> float:
        return self.files["probe"]["untrained_representation_error"][0]

    def third_layer_weighs(self) -> float:
        return self.files["probe"]["weighing"][2]

    def untrained_third_layer_weighs(self) -> float:
        return self.files["probe"]["untrained_weighing"][2]

    def third_layer_gains(self) -> float:
        return self.third_layer_weighs() - self.untrained_third_layer_weighs()

    def broken_of_a_thousand(self) -> float:
        """Attentions of the worst layer that break Theorem 4.1."""
        return 1000 * self.violations().max()

    def standing_still(self) -> float:
        return -200 * self.targets().mean()

    def best_constant_speed(self) -> float:
        return -200 * np.abs(self.targets() - np.median(self.targets())).mean()


def text_of(page: str) -> str:
    """Without tables, code, links, a list's numbers, commits, and what claims.md says of earlier rules and runs."""
    text = (claims.ROOT / page).read_text().split("\n## What we changed")[0]
    text = re.sub(r"```.*?```|<!-- (\w+) -->.*?<!-- end -->|^\|.*?$|^\d+\. |^#.*?$", "", text, flags=re.S | re.M)
    text = re.sub(r"`[^`]*`|\]\([^)]*\)|_\{[^}]*\}|\b(?=\d*[a-f])[\da-f]{7}\b", "", text)
    return " ".join(text.split())


def value(what: str, measure: str, settings: str) -> float:
    """What a row of numbers.csv says, as it is measured on the kept runs."""
    settings, _, seeds = settings.partition(" @ ")
    found = [claims.find(setting) for setting in settings.split(" | ")]
    if seeds:
        found = [[run for run in runs if str(run.args["seed"]) in seeds.split()] for runs in found]
    if what in ("mean", "low", "high"):
        return getattr(claims.compare(found, measure), what)
    by_seed = [pd.Series({run.args["seed"]: getattr(run, measure)() for run in runs}) for runs in found]
    values = by_seed[0] if len(by_seed) == 1 else (by_seed[0] - by_seed[1]).dropna()
    if what.startswith("seed "):
        return values[int(what.removeprefix("seed "))]
    if what.startswith("seeds for "):
        return claims.seeds_needed(float(what.removeprefix("seeds for ")), values.std(), groups=1)
    return {"std": values.std, "least": values.min, "most": values.max}[what]()


@pytest.mark.parametrize("page", PAGES)
def test_each_number_in_the_text_is_measured_or_a_constant(page, monkeypatch):
    monkeypatch.setattr(claims, "Run", Measured)
    text, table = text_of(page), NUMBERS[NUMBERS["page"] == page]
    wrong = []
    for number in NUMBER.finditer(text):
        before = text[: number.start(2)]
        rows = [row for row in table.itertuples() if before.endswith(row[2])]
        if not (rows or number[1] or number[4]):
            wrong.append(f"no row: {before[-60:]}[{number[2]}]{text[number.end() :][:20]}")
        for row in rows:
            expected = row[3]
            if row.measure:
                digits = len((number[3] or ".")[1:])
                expected = f"{value(row[3], row.measure, row.settings):.{digits}f}".replace("-", "−")
            if number[2] != expected:
                wrong.append(f"{before[-60:]}[{number[2]}] is {expected}")
    assert not wrong, "\n".join(wrong)


def test_each_row_of_numbers_csv_is_of_a_number_in_the_text():
    texts = {page: text_of(page) for page in PAGES}
    for row in NUMBERS.itertuples():
        assert re.search(re.escape(row[2]) + r"−?\d", texts[row.page]), f"{row.page}: {row[2]}"
