"""python -m benchmarks.serving

Measure the gain from batching requests. The same responses are scored one after the other and by 64 clients at once, over
loopback, through `qlora-rm serve` as a user starts it. The model is a random Llama in NF4 with a LoRA adapter, fp32, one thread.
Every answer is compared with the offline score of its own text. Ratios go to benchmarks/results/serving.json and into
docs/performance.md.

    offline one by one   a separate forward pass for each response, no server
    offline together     every response at once, as `qlora-rm score` does
    server one by one    one client, one response per request
    groups               64 clients; a request is a prompt with its responses (/score)
    samples              64 clients; a request is one response's text (/get_reward), as OpenRLHF sends them

Server and clients share the machine's cores. Besides wall-clock seconds, the results give CPU seconds of the scoring process (the
server or, offline, this process), which do not depend on other work on the machine.
"""

import asyncio
import json
import os
import random
import re
import shutil
import signal
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Awaitable, Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import httpx2
import torch

from benchmarks.performance_page import write_page
from benchmarks.prefix_sharing import RESULTS, ROOT, machine, make_bench
from qlora_rm.artifacts.load import RewardModel
from qlora_rm.config import ScoringConfig
from qlora_rm.preferences import Candidates
from tests.reward_models_for_tests import make_reward_model

CLIENTS, ROUNDS, PROMPTS = 64, 3, 96
WORDS = ["the", "fox", "sea", "salt", "honey", "winter", "capital", "France", "water", "boil", "ask", "lazy", "quick"]
TIMEOUT = 600


@dataclass(frozen=True)
class Work:
    """A prompt, its responses, their decoded texts, and their offline scores."""

    prompt: str
    responses: list[str]
    texts: list[str]
    scores: list[float]


def make_work(model: RewardModel) -> list[Work]:
    """Make prompts of 20 to 120 words with 1 to 8 responses of 5 to 30 words, most often 4 responses. Seeded."""
    draw = random.Random(0)

    def words(least: int, most: int) -> str:
        return " ".join(draw.choices(WORDS, k=draw.randint(least, most)))

    work = []
    for number in range(PROMPTS):
        prompt, count = f"{number}: {words(20, 120)}", draw.choice([1, 2, 4, 4, 4, 8])
        responses = [words(5, 30) for _ in range(count)]
        turns = tuple([{"role": "assistant", "content": response}] for response in responses)
        candidates = Candidates([{"role": "user", "content": prompt}], turns)
        [scores] = model.score_candidates([candidates])
        work.append(Work(prompt, responses, model.tokenization.texts(candidates), scores))
    return work


class Server:
    """`qlora-rm serve` in its own process."""

    def __init__(self, folder: Path, log: Path) -> None:
        self.log = log
        command = [sys.executable, "-m", "qlora_rm.cli", "serve", str(folder), "--port", "0"]
        with log.open("w") as file:
            self.process = subprocess.Popen(command, cwd=ROOT, stderr=file)
        end = time.monotonic() + TIMEOUT
        while not (found := re.search(r"listening on (\S+)", log.read_text())):
            assert self.process.poll() is None and time.monotonic() < end, log.read_text()
            time.sleep(0.1)
        self.url = found[1]

    def metrics(self) -> dict[str, float]:
        """Return the metrics without labels."""
        lines = httpx2.get(f"{self.url}/metrics", timeout=TIMEOUT).text.splitlines()
        return {
            name: float(value) for name, value in (line.split() for line in lines if line[0] != "#" and "{" not in line)
        }

    def stop(self) -> int:
        self.process.send_signal(signal.SIGTERM)
        return self.process.wait(TIMEOUT)


@dataclass
class Answers:
    """The answers to one round's clients: seconds of each request, and the largest difference from the offline scores."""

    seconds: list[float]
    largest: float = 0.0
    scores: int = 0

    def add(self, began: float, scores: list[float], wanted: list[float]) -> None:
        self.seconds.append(time.perf_counter() - began)
        assert len(scores) == len(wanted), "an answer is lost"
        self.scores += len(scores)
        self.largest = max([self.largest, *(abs(a - b) for a, b in zip(scores, wanted, strict=True))])


Ask = Callable[[httpx2.AsyncClient, Answers], Awaitable[None]]


def group(work: Work) -> Ask:
    async def ask(client: httpx2.AsyncClient, answers: Answers) -> None:
        began = time.perf_counter()
        answer = await client.post("/score", json={"prompt": work.prompt, "responses": work.responses})
        answers.add(began, answer.raise_for_status().json()["scores"], work.scores)

    return ask


def sample(work: Work, index: int) -> Ask:
    async def ask(client: httpx2.AsyncClient, answers: Answers) -> None:
        began = time.perf_counter()
        body = {"query": [work.texts[index]], "prompts": [work.prompt], "labels": [None]}
        answer = await client.post("/get_reward", json=body)
        answers.add(began, answer.raise_for_status().json()["rewards"], [work.scores[index]])

    return ask


async def by_clients(url: str, asks: list[Ask], clients: int) -> Answers:
    """Run `clients` clients at once. Each takes the next request when it has its answer."""
    answers, waiting = Answers([]), iter(asks)
    limits = httpx2.Limits(max_connections=clients, max_keepalive_connections=clients)
    async with httpx2.AsyncClient(base_url=url, limits=limits, timeout=TIMEOUT) as client:

        async def run() -> None:
            for ask in waiting:
                await ask(client, answers)

        await asyncio.gather(*(run() for _ in range(clients)))
    return answers


def measure(server: Server, model: RewardModel, work: list[Work]) -> dict[str, Any]:
    """Return each side's best round by CPU seconds. Sides alternate, so that none has a quieter machine."""
    sequences = [
        ids for one in work for text in one.texts for ids in model.tokenization.encode([text], add_special_tokens=False)
    ]
    groups = [group(one) for one in work]
    samples = [sample(one, index) for one in work for index in range(len(one.texts))]

    def offline(score: Callable[[], Any]) -> Callable[[], Answers]:
        def run() -> Answers:
            score()
            return Answers([], scores=len(sequences))

        return run

    def online(asks: list[Ask], clients: int) -> Callable[[], Answers]:
        return lambda: asyncio.run(by_clients(server.url, asks, clients))

    sides = {
        "offline one by one": offline(lambda: [model.score_token_ids([ids]) for ids in sequences]),
        "offline together": offline(lambda: model.score_token_ids(sequences)),
        "server one by one": online(samples, 1),
        "groups": online(groups, CLIENTS),
        "samples": online(samples, CLIENTS),
    }
    best: dict[str, dict[str, Any]] = {}
    for turn in range(ROUNDS):
        for side, run in sides.items():
            before, own = server.metrics(), time.process_time()
            began = time.perf_counter()
            answers = run()
            seconds, own = time.perf_counter() - began, time.process_time() - own
            grown = {name: value - before.get(name, 0.0) for name, value in server.metrics().items()}
            assert answers.scores == len(sequences), "answers are lost"
            assert answers.largest < 1e-4, "an answer is another's"
            found: dict[str, Any] = {"seconds": seconds, "cpu_seconds": own}
            if answers.seconds:
                cuts = statistics.quantiles(answers.seconds, n=100)
                found |= {
                    "cpu_seconds": grown["process_cpu_seconds_total"],
                    "requests": len(answers.seconds),
                    "requests_per_batch": grown["qlora_rm_batch_requests_sum"] / grown["qlora_rm_batch_requests_count"],
                    "computed_of_asked": grown["qlora_rm_tokens_computed_total"] / grown["qlora_rm_tokens_asked_total"],
                    "latency_p50": cuts[49],
                    "latency_p99": cuts[98],
                    "largest_difference": answers.largest,
                }
            print(f"{turn + 1}  {side:20} {seconds:7.2f} s  {found['cpu_seconds']:7.2f} s of CPU", flush=True)
            if side not in best or found["cpu_seconds"] < best[side]["cpu_seconds"]:
                best[side] = found
    speedup = {
        f"{side} over {other}": {unit: best[other][unit] / best[side][unit] for unit in ("seconds", "cpu_seconds")}
        for side in ("groups", "samples")
        for other in ("server one by one", "offline one by one", "offline together")
    }
    for name, ratio in speedup.items():
        print(f"   {name}: {ratio['seconds']:.2f}x, {ratio['cpu_seconds']:.2f}x in CPU seconds", flush=True)
    return {
        "prompts": len(work),
        "responses": len(sequences),
        "tokens": sum(map(len, sequences)),
        "clients": CLIENTS,
        "sides": best,
        "speedup": speedup,
    }


def main() -> int:
    os.environ["OMP_NUM_THREADS"] = "1"  # for the server
    torch.set_num_threads(1)
    scratch = Path(tempfile.mkdtemp(prefix="qlora_rm_serving_"))
    try:
        bench = make_bench(scratch / "base", 256, 4, [" ".join(WORDS)], 8)
        bench.tokenizer.save_pretrained(bench.folder)
        folder = make_reward_model(scratch, tokenizer=bench.tokenizer, max_length=1024, backbone=bench.folder)  # type: ignore[arg-type]
        model = RewardModel.load(str(folder), **vars(ScoringConfig()))
        work = make_work(model)
        server = Server(folder, scratch / "log")
        try:
            result = measure(server, model, work)
        finally:
            status = server.stop()
        assert status == 0, (scratch / "log").read_text()
        content = {"benchmark": "serving", "machine": machine(), "result": result}
        (RESULTS / "serving.json").write_text(json.dumps(content, indent=1) + "\n", encoding="utf-8")
    finally:
        shutil.rmtree(scratch, ignore_errors=True)
    write_page()
    return 0


if __name__ == "__main__":
    sys.exit(main())
