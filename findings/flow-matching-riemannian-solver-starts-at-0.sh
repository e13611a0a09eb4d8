#!/usr/bin/env bash
# flow_matching (Meta), RiemannianODESolver.sample(step_size=..., time_grid=[0.5, 1.0]): the solution begins at time 0, not
# at 0.5. With a velocity of 1 a point moves by 1.0 instead of 0.5; from 0.8 on it moves by 1.0 instead of 0.2, with two
# calls, at the times 0 and 0.1, where the second step is 0.9 long. ODESolver and the discrete solver of the same library,
# with the same arguments, begin at 0.5. With step_size=None, or when the grid begins at 0, all agree.
# The number of steps is that of the interval; the times are step_size * i without the time of the beginning, and the end is
# appended. So the model is asked at times that are not the sample's, and the last step jumps over the rest in one Euler
# step.
# The documentation: "The process is solved in the interval [min(time_grid), max(time_grid)]". A reader expects the same of
# both solvers, whose arguments have the same names and text. It is met by whoever begins with a sample between noise and
# data: edits in the way of SDEdit, a stage that takes over from another model, a trajectory that is continued in two calls.
# Nothing is raised, points stay on the manifold, and with many steps the result looks like a sample of a model with little
# training.
# Right is step_size=None and all times in time_grid. Here with flow_matching 1.0.10. Exits 0 while that is so.
# Matters to: flow matching on spheres, tori and other manifolds, as for hues, directions and latents of norm 1.
set -euo pipefail
python=$(command -v python3.11 || command -v python3.12 || command -v python3)
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
"$python" -m venv "$folder/venv"
"$folder/venv/bin/pip" install --quiet 'torch==2.13.0' 'torchdiffeq==0.2.5' 'numpy' 'tqdm' 2>/dev/null
"$folder/venv/bin/pip" install --quiet --no-deps 'flow_matching==1.0.10' 2>/dev/null
cat >"$folder/start.py" <<'PYTHON'
import importlib.metadata
import sys

import torch
from flow_matching.solver import ODESolver, RiemannianODESolver
from flow_matching.utils.manifolds import Euclidean, FlatTorus

print("flow_matching", importlib.metadata.version("flow_matching"), "torch", torch.__version__)
calls = []


def velocity(x, t, **extras):
    calls.append(round(float(t), 3))
    return torch.ones_like(x)


SOLVERS = {
    "ODESolver": ODESolver(velocity),
    "RiemannianODESolver, Euclidean": RiemannianODESolver(Euclidean(), velocity),
    "RiemannianODESolver, FlatTorus": RiemannianODESolver(FlatTorus(), velocity),
}


def move(solver, times, step_size):
    """How far the velocity of 1 moves a point, and the times at which it was asked for."""
    calls.clear()
    x = solver.sample(torch.zeros(2, 2), step_size=step_size, time_grid=torch.tensor(times), method="euler")
    return round(x[0, 0].item(), 3), list(calls)


ok = []
for start in (0.0, 0.5, 0.8):
    print(f"from {start} to 1, step_size 0.1: the point should move by {1 - start:.1f}")
    for name, solver in SOLVERS.items():
        distance, times = move(solver, [start, 1.0], 0.1)
        print(f"  {name:<31} moves by {distance}, asks the model at {times}")
        expected = 1 - start if name == "ODESolver" else 1.0
        ok.append(abs(distance - expected) < 1e-3 and times[0] == (start if name == "ODESolver" else 0.0))
print("from 0.5 to 1, step_size None and all times")
for name, solver in SOLVERS.items():
    distance, times = move(solver, [0.5, 0.6, 0.7, 0.8, 0.9, 1.0], None)
    print(f"  {name:<31} moves by {distance}, asks the model at {times}")
    ok.append(abs(distance - 0.5) < 1e-3)
sys.exit(0 if all(ok) else 1)
PYTHON
"$folder/venv/bin/python" "$folder/start.py" 2>"$folder/log" || { cat "$folder/log"; exit 1; }
