"""Time of one step of reinforcement learning on image tokens: ours, and a PyTorch loop of the same size.

    python benchmarks/rl_step.py                  # preset mid, one prompt, 4 samples, 4 denoising steps
    python benchmarks/rl_step.py --geometry tiny --repeats 1

A step: sample G images' tokens of every prompt, render them with guidance, judge them by redness, log-probabilities of
a frozen reference decoder, clipped policy loss with its divergence, AdamW. Each side runs in a process of its own with
the same number of threads, on the same random weights; steps alternate, the table shows medians and how they split.
The other side is transformers' `generate` (keys and values cached), a second forward pass for the states, diffusers'
transformer and autoencoder, and the same loss over the whole vocabulary, as the reference trains; see rl_reference.py.
"""

import argparse
import json
import os
import pathlib
import statistics
import sys
import tempfile
import time

import numpy as np
from measure import Row, Side

sys.path.insert(0, str(pathlib.Path(__file__).parent.parent))  # configs, in every process
PROMPT = "a red cube on a wooden table"
PROMPT_LENGTH = 192  # positions that ours makes room for
STAGES = ("decode", "log_probs", "render", "reward", "update")


def main() -> None:
    """Runs the comparison."""
    flags = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    flags.add_argument("--geometry", default="mid", help="a preset")
    flags.add_argument("--dtype", default="float32", choices=("float32", "bfloat16"))
    flags.add_argument("--prompts", type=int, default=1)
    flags.add_argument("--group", type=int, default=4, help="samples of a prompt")
    flags.add_argument("--steps", type=int, default=4, help="of denoising")
    flags.add_argument("--repeats", type=int, default=3)
    flags.add_argument("--json", type=pathlib.Path, default=pathlib.Path("rl_step.json"), help="file to write")
    args = flags.parse_args()
    os.environ.setdefault("XLA_PYTHON_CLIENT_PREALLOCATE", "false")  # an accelerator is shared by the sides
    import rl_reference
    from compare_torch import PAUSE, _random_checkpoint, _threads

    with tempfile.TemporaryDirectory() as scratch:
        checkpoint = _random_checkpoint(args.geometry, pathlib.Path(scratch) / "weights")
        job = {"checkpoint": checkpoint, "prompts": args.prompts, "group": args.group, "steps": args.steps}
        job |= {"geometry": args.geometry, "dtype": args.dtype}
        sides = {"ours": Side(make_ours, job, scratch), "torch": Side(rl_reference.make, job, _threads())}
        measured: dict[str, list] = {name: [] for name in sides}
        for number in range(1 + args.repeats):
            for name, side in sides.items():
                time.sleep(PAUSE)
                measured[name].append(side.measure("step"))
                print(f"{name}, run {number}: {measured[name][-1].seconds:.2f} s", file=sys.stderr, flush=True)
        for side in sides.values():
            side.close()
    totals = {name: statistics.median(one.seconds for one in runs[1:]) for name, runs in measured.items()}
    splits = {name: np.median([one.value for one in runs[1:]], axis=0) for name, runs in measured.items()}
    print(
        f"{args.geometry}, {args.dtype}, {args.prompts} x {args.group} samples, {args.steps} denoising steps, medians"
    )
    print(f"{'':12}{'step':>9}" + "".join(f"{stage:>11}" for stage in STAGES))
    for name in sides:
        print(f"{name:12}{totals[name]:8.2f}s" + "".join(f"{seconds:10.2f}s" for seconds in splits[name]))
    print(f"PyTorch / ours: {totals['torch'] / totals['ours']:.2f}")
    record = {"totals": totals, "splits": {name: dict(zip(STAGES, split.tolist())) for name, split in splits.items()}}
    record |= {"settings": {name: str(value) for name, value in vars(args).items()}, "load": os.getloadavg()[0]}
    args.json.write_text(json.dumps(record, indent=2) + "\n")
    print(f"wrote {args.json}; load average at the end {record['load']:.1f}")


def make_ours(job: dict, scratch: str):
    """The row `step`, the device's kind, and None."""
    import jax

    from blip3o_jax import experiment
    from blip3o_jax.train.optimizer import make_optimizer
    from blip3o_jax.train.step import abstract_state, compile_step, init_state, make_train_step
    from configs import grpo

    prompts = pathlib.Path(scratch) / "prompts.txt"
    prompts.write_text(f"{PROMPT}\n" * job["prompts"])
    config = grpo.get_config("general")
    config.init_from, config.row.length = str(job["checkpoint"]), 0
    config.numerics.update({"dtype": job["dtype"], "frozen_dtype": job["dtype"]})
    settings = config.to_dict()
    settings["data"] |= {
        "sources": ({"kind": "prompts", "path": str(prompts)},),
        "batch_size": job["prompts"] * job["group"],
    }
    settings["rl"] |= {"rewards": ({"name": "redness"},), "group_size": job["group"], "groups_every": 0}
    settings["rl"]["update_parts"] = 1  # the update of the other side leaves out no samples
    settings["rl"]["token_decoding"] = "sequential"  # random weights say nothing about what of a window is accepted
    settings["rl"]["render"] |= {"num_inference_steps": job["steps"]}
    settings["row"]["length"] = (
        experiment.open_start(experiment.from_settings(settings)).model.num_image_tokens + PROMPT_LENGTH
    )
    config = experiment.from_settings(settings)
    run = experiment.build(config, settings, scratch, jax.devices()[:1])
    optimizer = make_optimizer(run.optimizer, run.abstract_params, config.loop.num_steps)
    layout = abstract_state(run.abstract_params, optimizer, None)
    update = compile_step(make_train_step(run.loss_fn, optimizer, 0), layout, None)
    held = {"state": init_state(run.init_params(), optimizer, layout, None), "step": 0}

    def step(_):
        held["step"] += 1
        params = run.whole(held["state"].params)
        batch = run.source.next(params, jax.random.key(held["step"]))
        begin = time.perf_counter()
        held["state"], _ = jax.block_until_ready(update(held["state"], run.frozen, jax.device_put(batch)))
        took = time.perf_counter() - begin
        return np.array([*(run.source.measured[f"seconds_{stage}"] for stage in STAGES[:-1]), took])

    return {"step": Row(step, value=lambda split: split)}, jax.devices()[0].device_kind, None


if __name__ == "__main__":
    main()
