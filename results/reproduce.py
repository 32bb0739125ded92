"""Makes every run behind README.md and results/README.md, then their figures and tables: python results/reproduce.py

runs.csv lists the runs in the order of their importance, with the hours that one takes on a core. Two run at a time.
What is finished is skipped, what is not is resumed. results/runs keeps of each run what claims.py draws and counts.
"""

import json
import shutil
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor, as_completed
from pathlib import Path

import numpy as np
import pandas as pd
from claims import ENVS, KEPT, MAIN, ROOT, draw, name_of, plot, write_tables
from probe import probe
from tqdm import tqdm

SHOWN = name_of("trmrl", MAIN, 0)[:-1]  # how the main runs' folders begin


def make(script: str, flags: str, seed: str) -> tuple[Path, Path, list[str]]:
    """Trains, or goes on; tests a main run on 100 tasks, or on all goals of ML1. Returns what keep takes."""
    name, folder = name_of(script, flags, seed), {"trmrl": ".", "ablations": "results"}.get(script, "baselines")
    home = ROOT / "runs" / name
    home.mkdir(parents=True, exist_ok=True)

    def call(*arguments: object) -> None:
        command = ["env", "OMP_NUM_THREADS=1", sys.executable, f"{folder}/{script}.py", *map(str, arguments)]
        with open(home / "log.txt", "a") as log:
            subprocess.run(command, cwd=ROOT, stdout=log, stderr=log, check=True)

    if checkpoint := next(home.glob("*/checkpoint.pt"), None):
        call("--resume", checkpoint.parent)
    else:
        (home / "commit.txt").write_bytes(subprocess.check_output(["git", "describe", "--always", "--dirty"], cwd=ROOT))
        call("--env", *flags.split(), "--seed", seed, "--runs-dir", home.relative_to(ROOT))
    run = next(home.glob("*/checkpoint.pt")).parent
    tests = ["meta_test", "ood"] if flags in ENVS else []
    if tests and not flags.startswith("ML45"):
        call("--test", run, "--test-tasks", 50 if flags.startswith("ML1") else 100)
    return run, KEPT / name, tests


def keep(run: Path, kept: Path, tests: list[str]) -> None:
    """Copies what figures and tables read; args.json comes last: then the run is kept."""
    kept.mkdir(parents=True, exist_ok=True)
    pd.read_csv(run / "progress.csv").dropna(subset="test_return").to_csv(kept / "progress.csv", index=False)
    shown = kept.name.removeprefix(SHOWN).isdigit()  # of these show_median leaves but one
    if shown:
        np.savez_compressed(kept / "probe.npz", **probe(run))
    for file in [*tests, *["working_memories", "attention"] * shown, "refinement"]:
        if (run / f"{file}.npz").exists():
            arrays = dict(np.load(run / f"{file}.npz"))
            if not (shown and file == "meta_test"):
                arrays.pop("observations", None)
            if file in tests:  # of the rewards the mean over tasks is kept, and of each task the returns
                arrays["returns"] = arrays["rewards"].sum(axis=2).round(1)
                arrays["rewards"] = arrays["rewards"].mean(axis=0, keepdims=True)
            for name in arrays.keys() & {"observations", "embedding"}:  # two decimals keep the files small
                arrays[name] = arrays[name].round(2)
            np.savez_compressed(kept / f"{file}.npz", **arrays)
    args = json.loads((run / "args.json").read_text())
    args["versions"] |= {"commit": (run.parent / "commit.txt").read_text().strip(), "beside": 1}  # two run at a time
    (kept / "args.json").write_text(json.dumps(args, indent=2) + "\n")


def show_median() -> None:
    """Only the median seed of HalfCheetahVel keeps what figures of one run need. It becomes results/checkpoint. If it
    was not made here, what is kept stays as it is."""
    folders = sorted(KEPT.glob(SHOWN + "[0-9]*"))
    median = plot.median_run(plot.load_runs(folders, [])).folder
    if checkpoint := next((ROOT / "runs" / median.name).glob("*/checkpoint.pt"), None):
        keep(checkpoint.parent, median, ["meta_test", "ood"])  # as it may not have been the median before
        for folder in set(folders) - {median}:
            arrays = dict(np.load(folder / "meta_test.npz"))
            arrays.pop("observations", None)
            np.savez_compressed(folder / "meta_test.npz", **arrays)
            for file in ("working_memories.npz", "attention.npz"):
                (folder / file).unlink(missing_ok=True)
        for file in (checkpoint, median / "args.json", median / "progress.csv"):
            shutil.copy(file, KEPT.parent / "checkpoint")


if __name__ == "__main__":
    table = pd.read_csv(KEPT.parent / "runs.csv", dtype=str).itertuples()
    jobs = [(*row.runs.split(" ", 1), seed, float(row.hours)) for row in table for seed in row.seeds.split()]
    jobs = [job for job in jobs if not (KEPT / name_of(*job[:3]) / "args.json").exists()]
    with ThreadPoolExecutor(2) as pool, tqdm(total=sum(hours for *_, hours in jobs), unit="core-h") as bar:
        hours = {pool.submit(make, *job[:3]): job[3] for job in jobs}
        try:
            for made in as_completed(hours):
                keep(*made.result())
                bar.update(hours[made])
        finally:  # after a failure or Ctrl-C what runs now runs to its end, and nothing else begins
            pool.shutdown(cancel_futures=True)
    show_median()
    draw(film=True)
    write_tables()
