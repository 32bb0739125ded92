"""Draws every figure of the paper that the given runs can give, from the files that trmrl.py wrote.

    python plot.py runs/*                     PNG files into figures/
    python plot.py runs/* --out DIR --pdf     elsewhere, and as PDF too

Figure                    Paper            From
meta_training.png         Fig. 4           progress.csv: test performance over environment steps
adaptation.png, ood.png   Figs. 5, 6       meta_test.npz, ood.npz: return over the episodes of a task
refinement.png            Fig. 7           refinement.npz: errors over the layers
working_memories.png      Fig. 8           working_memories.npz: their three principal components
online_adaptation.png     Fig. 9           meta_test.npz: reward over the steps of the first episode
ablation_<flag>.png       Figs. 10 to 13   progress.csv of runs that differ in just that flag
attention.png             -                attention.npz: what the current memory attends to
summary.md                -                a table of final results

Runs that differ in nothing but the seed are one setting: a curve is their mean, its band a 95 % bootstrapped confidence
interval. Exit codes: 0, 1 if a run or a figure had to be left out for something broken, 2 if there is no run at all.
"""

import csv
import json
import sys
from dataclasses import dataclass
from pathlib import Path

import matplotlib
import matplotlib.pyplot as plt
import numpy as np
import tyro

NOT_A_SETTING = {"seed", "runs_dir", "device", "versions"}  # what may differ between the seeds of one setting
UNITS = {
    "HalfCheetahVel": "target velocity (m/s)",
    "AntDir": "goal direction (rad)",
    "AntDir57": "goal direction (rad)",
}
WIDTH = 3.3  # inches, a paper's column
# Okabe and Ito's colours, which colour-blind readers tell apart, in an order of falling darkness; with each goes a dash
# pattern, for readers in grey.
COLOURS = ("#000000", "#D55E00", "#0072B2", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#F0E442")
DASHES = ("-", "--", "-.", ":", (0, (5, 1)), (0, (3, 1, 1, 1)), (0, (1, 1)), (0, (8, 2)))

matplotlib.use("Agg")
plt.rcParams.update({
    "figure.constrained_layout.use": True,
    "font.size": 8,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "legend.frameon": False,
    "savefig.dpi": 200,
})


class Unusable(Exception):
    """A run or a figure that must be left out, and why, in one line."""


class Broken(Unusable):
    """Left out because something is damaged or unfinished, rather than not there to be drawn."""
