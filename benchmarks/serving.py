"""What the server does under load; it is started here, as a process of its own.

    python benchmarks/serving.py first                   # seconds to the first image after "ready"
    python benchmarks/serving.py clients --clients 16    # images/s of clients at once, against one after the other
    python benchmarks/serving.py soak --requests 10000 --checkpoint tests/golden/edit_both/checkpoint --steps 2

`clients` asks in turns, so that all sides see the same machine, and prints CPU seconds per image beside the clock: they
depend less on what else runs. The model alone, without a server, is measured beside it: one image at a time, and as
many batches side by side as the server runs. `soak` sends good and bad requests and clients that hang up; every answer
has to have the status that its request deserves, and the memory of the process may not grow.
"""

import argparse
import asyncio
import collections
import concurrent.futures
import io
import pathlib
import random
import statistics
import subprocess
import sys
import time

import httpx
from PIL import Image

from blip3o_jax import Pipeline
from blip3o_jax.app.service import LANES
from blip3o_jax.compilation import keep_programs
from blip3o_jax.demo import embedded

ROOT = pathlib.Path(__file__).parent.parent
GENERATIONS, EDITS = "/v1/images/generations", "/v1/images/edits"
PROMPT = "a photo of a red circle left of a blue square"
TICKS = 100  # of a second, in /proc/PID/stat


class Server:
    """A server that has said that it is ready."""

    def __init__(self, args: argparse.Namespace):
        flags = ["--port=0", f"--max_batch={args.max_batch}", f"--num_inference_steps={args.steps}", "--max_queue=64"]
        flags += [f"--checkpoint={args.checkpoint}"] if args.checkpoint else []
        command = [sys.executable, "-m", "blip3o_jax.app", *flags]
        begin = time.perf_counter()
        self.process = subprocess.Popen(command, cwd=ROOT, stdout=subprocess.PIPE, text=True)
        for line in self.process.stdout:
            if line.startswith("ready: "):
                break
        else:
            sys.exit("the server has ended")
        self.seconds, self.url = time.perf_counter() - begin, line.split()[1]

    def __enter__(self) -> "Server":
        return self

    def __exit__(self, *_: object) -> None:
        self.process.terminate()
        print(f"exit code after SIGTERM: {self.process.wait()}")

    def cpu(self) -> float:
        """Seconds of CPU so far."""
        fields = pathlib.Path(f"/proc/{self.process.pid}/stat").read_text().rpartition(")")[2].split()
        return (int(fields[11]) + int(fields[12])) / TICKS

    def metric(self, name: str) -> float:
        """A value of /metrics."""
        lines = httpx.get(self.url + "/metrics").text.splitlines()
        return next(float(line.split()[1]) for line in lines if line.startswith(f"{name} "))

    def wait_for_batches(self, largest: int) -> None:
        """Returns once batches of every power of two up to `largest` are compiled, which happens between requests."""
        while self.metric("blip3o_largest_batch") * 2 <= largest:
            time.sleep(1)

    def megabytes(self) -> float:
        """Resident memory."""
        lines = pathlib.Path(f"/proc/{self.process.pid}/status").read_text().splitlines()
        return next(int(line.split()[1]) / 1024 for line in lines if line.startswith("VmRSS"))


def first(server: Server, args: argparse.Namespace) -> None:
    """Prints how long a start and its first image take."""
    begin = time.perf_counter()
    httpx.post(server.url + GENERATIONS, json={"prompt": PROMPT}, timeout=None).raise_for_status()
    print(f"ready after {server.seconds:.1f} s, first image {time.perf_counter() - begin:.2f} s later")


def clients(server: Server, args: argparse.Namespace) -> None:
    """Prints images per second of one client and of many, and of the model alone."""
    pipeline = Pipeline.from_pretrained(args.checkpoint or embedded.CHECKPOINT)
    many = f"{args.clients} clients"
    sides = {
        "one client": lambda: asyncio.run(_rate(server, 1, args.each)),
        many: lambda: asyncio.run(_rate(server, args.clients, args.each * args.clients)),
        "model, batch 1": lambda: _model_rate(pipeline, args, args.each, 1, 1),
        "model, full": lambda: _model_rate(pipeline, args, args.each * args.clients, args.max_batch, LANES),
    }
    server.wait_for_batches(args.max_batch)
    for side in sides.values():
        side()  # what is not compiled yet
    names = "blip3o_batch_images_sum", "blip3o_batch_images_count"
    before = [server.metric(name) for name in names]
    rates = collections.defaultdict(list)
    for turn in range(args.turns):
        for name, side in sides.items():
            rate, cpu = side()
            rates[name].append((rate, cpu))
            print(f"turn {turn}, {name:14} {rate:6.2f} images/s  {cpu:6.3f} CPU s/image", flush=True)
    for over, under in ((many, "one client"), ("model, full", "model, batch 1"), (many, "model, full")):
        ratio = statistics.median(a[0] / b[0] for a, b in zip(rates[over], rates[under]))
        print(f"{over} / {under}, images/s: {ratio:.2f} (median of {args.turns})")
    images, batches = (server.metric(name) - start for name, start in zip(names, before))
    alone = args.turns * args.each
    print(f"images of a batch, of {many}: {(images - alone) / (batches - alone):.1f}")


def _model_rate(
    pipeline: Pipeline, args: argparse.Namespace, images: int, batch: int, lanes: int
) -> tuple[float, float]:
    """As `_rate`, of batches that run without a server."""

    def run(seed: int) -> None:
        pipeline([PROMPT] * batch, seed=seed, batch_size=batch, num_inference_steps=args.steps)

    begin, cpu = time.perf_counter(), time.process_time()
    with concurrent.futures.ThreadPoolExecutor(lanes) as pool:
        list(pool.map(run, range(images // batch)))
    images = images // batch * batch
    return images / (time.perf_counter() - begin), (time.process_time() - cpu) / images


async def _rate(server: Server, count: int, images: int) -> tuple[float, float]:
    """Images per second of the clock, and CPU seconds per image, of `count` clients that ask one after the other."""
    left = iter(range(images))

    async def client(http: httpx.AsyncClient) -> None:
        for seed in left:
            (await http.post(GENERATIONS, json={"prompt": PROMPT, "seed": seed})).raise_for_status()

    async with httpx.AsyncClient(base_url=server.url, timeout=None) as http:
        begin, cpu = time.perf_counter(), server.cpu()
        await asyncio.gather(*(client(http) for _ in range(count)))
        return images / (time.perf_counter() - begin), (server.cpu() - cpu) / images


def soak(server: Server, args: argparse.Namespace) -> None:
    """Prints lost and wrong answers, and how the memory grew after the first tenth and in the second half."""
    server.wait_for_batches(args.max_batch)
    asyncio.run(_soak(server, args))


async def _soak(server: Server, args: argparse.Namespace) -> None:
    content = io.BytesIO()
    Image.linear_gradient("L").resize((64, 64)).save(content, "PNG")
    good = {"image": content.getvalue()}
    kinds = {  # name -> share, status, request
        "image": (30, 200, lambda: {"json": {"prompt": PROMPT, "seed": rng.randrange(2**32)}}),
        "two images": (5, 200, lambda: {"json": {"prompt": PROMPT, "n": 2}}),
        "edit": (15, 200, lambda: {"files": good, "data": {"prompt": "make it blue"}}),
        "wrong type": (10, 400, lambda: {"json": {"prompt": rng.choice([None, 3, [], {}, ""])}}),
        "wrong value": (10, 400, lambda: {"json": {"prompt": "a", rng.choice(["n", "size", "seed"]): "x"}}),
        "no JSON": (10, 400, lambda: {"content": rng.randbytes(500), "headers": {"content-type": "application/json"}}),
        "no image": (10, 400, lambda: {"files": {"image": rng.randbytes(500)}, "data": {"prompt": "make it blue"}}),
        "too large": (2, 413, lambda: {"json": {"prompt": "a" * 2**22 * 6}}),
        "hang-up": (8, None, lambda: {"json": {"prompt": PROMPT}}),
    }
    rng, answers, left = random.Random(args.seed), collections.Counter(), iter(range(args.requests))
    shares = [share for share, _, _ in kinds.values()]
    memory: dict[int, float] = {}  # number of requests -> megabytes

    async def client(http: httpx.AsyncClient) -> None:
        for number in left:
            name = rng.choices(list(kinds), shares)[0]
            _, status, make = kinds[name]
            request = make()
            try:
                patience = rng.random() / 10 if status is None else args.patience
                got = (
                    await http.post(EDITS if "files" in request else GENERATIONS, timeout=patience, **request)
                ).status_code
            except httpx.TimeoutException:
                got = None
            except httpx.TransportError as error:
                got = type(error).__name__
            good = got == status or got == 429 or (status is None and got == 200)
            answers[name, "as it should be" if good else f"WRONG: {got}"] += 1
            if number % max(1, args.requests // 20) == 0:
                memory[number] = server.megabytes()
                print(f"{number} requests, {memory[number]:.0f} MB", flush=True)

    limits = httpx.Limits(max_connections=args.clients * 2)
    async with httpx.AsyncClient(base_url=server.url, limits=limits) as http:
        await asyncio.gather(*(client(http) for _ in range(args.clients)))
    for (name, outcome), count in sorted(answers.items()):
        print(f"{name:12} {outcome:16} {count}")
    wrong = sum(count for (_, outcome), count in answers.items() if outcome.startswith("WRONG"))
    waiting, last = server.metric("blip3o_queue_images"), server.megabytes()
    print(f"{answers.total()} answers, {wrong} lost or wrong; {waiting:.0f} wait")
    for what, first in (("after a tenth", args.requests // 10), ("in the second half", args.requests // 2)):
        base = next(size for number, size in sorted(memory.items()) if number >= first)
        print(f"memory {last / base - 1:+.1%} {what}")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("command", choices=("first", "clients", "soak"))
    parser.add_argument("--checkpoint", help="default: the embedded model")
    parser.add_argument("--steps", type=int, default=30, help="of the denoising")
    parser.add_argument("--max_batch", type=int, default=8)
    parser.add_argument("--clients", type=int, default=16)
    parser.add_argument("--each", type=int, default=8, help="images of each client and turn")
    parser.add_argument("--turns", type=int, default=3)
    parser.add_argument("--requests", type=int, default=10_000)
    parser.add_argument("--patience", type=float, default=300, help="seconds until an answer is lost")
    parser.add_argument("--seed", type=int, default=0, help="of the requests")
    args = parser.parse_args()
    keep_programs()
    with Server(args) as server:
        {"first": first, "clients": clients, "soak": soak}[args.command](server, args)


if __name__ == "__main__":
    main()
