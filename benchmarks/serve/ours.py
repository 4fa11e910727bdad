"""lorad's InferenceEngine, driven as the generator process drives it: a thread per request reads its stream."""

import json
import time
from collections.abc import Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from statistics import median
from typing import Any

from benchmarks.serve import loads
from benchmarks.serve.data import adapter_path, read_prompts, version_id
from benchmarks.serve.loads import Heard
from benchmarks.serve.plan import SCENARIOS, Plan, Row, adapter_names, pairs
from benchmarks.train.meter import peak_bytes
from shared.config import Settings
from shared.specs import AdapterShare, Chunk, GeneratedToken, GenerationRequest
from worker.base_model import load_base_model
from worker.inference import logprobs
from worker.inference.engine import InferenceEngine
from worker.inference.tokens import TokenTable
from worker.kernels.memory import keep_freed_memory
from worker.lora.format import StoredAdapter

Asked = tuple[list[int], str | None]


def measure(request: dict[str, Any]) -> dict[str, Any]:
    """What `run_row` finds, in a process that is set up as the generator's is."""
    keep_freed_memory()
    return run_row(request)


def run_row(request: dict[str, Any]) -> dict[str, Any]:
    """The row's answers as token ids, or its figures: tokens per second of each scenario, and those of its loads."""
    plan, row = Plan(**request["plan"]), Row.from_json(request["row"])
    work = Path(request["work"])
    client = Client(work, plan, row)
    prompts = read_prompts(work)
    scenarios = {name: pairs(SCENARIOS[name], prompts) for name in row.scenarios}
    try:
        if request["mode"] == "answers":
            return {"answers": {name: client.answers(asked) for name, asked in scenarios.items()}}
        answer: dict[str, Any] = {"dtype": client.dtype, "rates": {}, "seconds": {}}
        for name in row.timed:
            asked = scenarios[name]
            client.ask_all(asked, new_tokens=8)
            seconds = loads.timed(lambda asked=asked: client.seconds(asked), plan)
            answer["seconds"][name] = seconds
            answer["rates"][name] = len(asked) * plan.new_tokens / median(seconds)
        for load in row.loads:
            answer[load] = {"cold": cold, "zipf": zipf, "open": open_loop}[load](
                client, plan, prompts, request["number"]
            )
    finally:
        client.close()
    return {**answer, "peak_bytes": peak_bytes(plan.device)}


class Client:
    """Callers of one engine, over the adapters of the prepared store. `new_tokens` counts unless said otherwise."""

    def __init__(self, work: Path, plan: Plan, row: Row) -> None:
        self._plan = plan
        stored = {version_id(name): _stored(work, name) for name in adapter_names(plan.store_size)}
        base = load_base_model(work / "base", name="base", digest="0" * 64, device=plan.device, dtype=row.dtype)
        self.dtype = str(base.dtype).removeprefix("torch.")
        self._tokenizer = base.tokenizer
        self._engine = InferenceEngine(
            base,
            locate=stored.__getitem__,
            adapter_cache_bytes=Settings.adapter_cache_bytes,
            max_rows=plan.num_prompts,
            kv_cache_bytes=Settings.kv_cache_bytes,
        )
        self._callers = ThreadPoolExecutor(256)
        self._num_asked = 0

    def close(self) -> None:
        self._callers.shutdown()
        self._engine.close()

    def submit(self, asked: Asked, *, new_tokens: int | None = None, due_s: float | None = None) -> "Future[Heard]":
        """Ask now, as if at `due_s` where that is given; what the caller will have heard."""
        prompt, adapter = asked
        request = self._request(prompt, adapter, new_tokens or self._plan.new_tokens)
        heard = Heard(time.perf_counter() if due_s is None else due_s)

        def read(stream: Any) -> Heard:
            for chunk in stream:
                heard.came_s.append(time.perf_counter())
                heard.num_tokens = _completed(chunk) or heard.num_tokens
            assert heard.num_tokens == request.max_tokens, f"{heard.num_tokens} of {request.max_tokens} tokens came"
            return heard

        return self._callers.submit(read, self._engine.submit(request))

    def ask_all(self, asked: Sequence[Asked], *, new_tokens: int | None = None) -> list[Heard]:
        """All at once; what each caller heard."""
        return [future.result() for future in [self.submit(one, new_tokens=new_tokens) for one in asked]]

    def seconds(self, asked: Sequence[Asked]) -> float:
        """From the first submission to the last token, all at once."""
        heard = self.ask_all(asked)
        return max(one.came_s[-1] for one in heard) - heard[0].asked_s

    def in_turn(self, asked: Sequence[Asked], *, new_tokens: int | None = None) -> list[Heard]:
        """As many at a time as there are prompts; each caller asks again as soon as it has its answer."""
        with ThreadPoolExecutor(self._plan.num_prompts) as callers:
            return list(callers.map(lambda one: self.submit(one, new_tokens=new_tokens).result(), asked))

    def answers(self, asked: Sequence[Asked]) -> list[list[int]]:
        """Token ids of the answers, all asked at once; read off what logprobs say of each token."""
        table = TokenTable.of(self._tokenizer)
        ids = {_shown(logprobs.told(table, number, 0.0, ())): number for number in range(len(self._tokenizer))}
        streams = [
            self._engine.submit(self._request(prompt, adapter, self._plan.new_tokens, num_logprobs=0))
            for prompt, adapter in asked
        ]
        return [[ids[_shown(token)] for chunk in stream for token in _tokens(chunk)] for stream in streams]

    def _request(
        self, prompt: list[int], adapter: str | None, new_tokens: int, *, num_logprobs: int | None = None
    ) -> GenerationRequest:
        self._num_asked += 1
        return GenerationRequest(
            request_id=f"bench-{self._num_asked}",
            base_model_id="base",
            adapters=[] if adapter is None else [AdapterShare(version_id=version_id(adapter))],
            prompt=prompt,
            max_tokens=new_tokens,
            temperature=0,
            ignore_eos=True,
            logprobs=num_logprobs,
            deadline_unix_s=time.time() + 600,
        )


def cold(client: Client, plan: Plan, prompts: list[list[int]], number: int) -> dict[str, Any]:
    """Times to first token, in ms, of single requests: over a resident adapter, and over one never asked for before."""
    client.ask_all([(prompts[0], "qv-0")], new_tokens=2)
    warm_ms, cold_ms = [], []
    for k in range(plan.cold_requests):
        prompt = prompts[k % len(prompts)]
        for adapter, times_ms in (("qv-0", warm_ms), (f"qv-{plan.store_size - 1 - k}", cold_ms)):
            [heard] = client.ask_all([(prompt, adapter)], new_tokens=2)
            times_ms.append(1e3 * heard.first_s)
    return {"warm_ms": warm_ms, "cold_ms": cold_ms}


def zipf(client: Client, plan: Plan, prompts: list[list[int]], number: int) -> dict[str, Any]:
    """Tokens per second of a closed loop over one adapter, and over the store by Zipf's law: when nothing of what is
    drawn was asked for before, and, once warm, of the same requests again.
    """

    def asked(draws: Sequence[int]) -> list[Asked]:
        return [(prompts[k % len(prompts)], f"qv-{draw}") for k, draw in enumerate(draws)]

    def rate(draws: Sequence[int]) -> float:
        started_s = time.perf_counter()
        heard = client.in_turn(asked(draws))
        return sum(one.num_tokens for one in heard) / (time.perf_counter() - started_s)

    draws = loads.zipf(plan.zipf_requests, size=plan.store_size, exponent=plan.zipf_exponent, seed=number)
    return {
        "one_tokens_per_second": rate([0] * plan.zipf_requests),
        "first_tokens_per_second": rate(draws),
        "tokens_per_second": rate(draws),
        "distinct": len(set(draws)),
    }


def open_loop(client: Client, plan: Plan, prompts: list[list[int]], number: int) -> dict[str, Any]:
    """Latencies at each rate of arrivals, over the adapters of the scenario `eight`."""
    asked = pairs(SCENARIOS["eight"], prompts)
    client.ask_all(asked, new_tokens=2)
    found = {}
    for rate in plan.rates:
        arrivals = loads.poisson_arrivals(rate, seconds=plan.open_s, seed=plan.seed + number)
        start_s = time.perf_counter()
        waited_for = []
        for k, arrival_s in enumerate(arrivals):
            time.sleep(max(0.0, start_s + arrival_s - time.perf_counter()))
            waited_for.append(client.submit(asked[k % len(asked)], due_s=start_s + arrival_s))
        found[f"{rate:g}"] = loads.latencies([future.result() for future in waited_for])
        if loads.has_fallen_behind(found[f"{rate:g}"]):
            break
    return found


def _stored(work: Path, name: str) -> StoredAdapter:
    """As the generator process finds an adapter in the database: its directory, and the checksums of its files."""
    directory = adapter_path(work, name)
    manifest = json.loads((directory / "manifest.json").read_text())
    return StoredAdapter(directory, {filename: file["sha256"] for filename, file in manifest["files"].items()})


def _completed(chunk: Chunk) -> int:
    """Tokens of the answer that a last chunk counts, else 0; raises what the engine says went wrong."""
    if chunk.error is not None:
        raise RuntimeError(f"the engine answered {chunk.error.code}: {chunk.error.message}")
    return chunk.usage.completion_tokens if chunk.usage else 0


def _tokens(chunk: Chunk) -> Sequence[GeneratedToken]:
    _completed(chunk)
    return chunk.logprobs or ()


def _shown(token: GeneratedToken) -> tuple[bytes, str]:
    """What tells a token from all others: its bytes, or the name of a special one, which has none."""
    return bytes(token.bytes), "" if token.bytes else token.token
