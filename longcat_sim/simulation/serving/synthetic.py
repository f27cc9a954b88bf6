"""Synthetic traffic: arrival processes, lengths, closed loops and sessions, all drawn by counter."""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np
import numpy.typing as npt

from longcat_sim.simulation.serving import draws
from longcat_sim.simulation.serving.request import Request
from longcat_sim.simulation.serving.workload import trace_lengths
from longcat_sim.specs.serve import Arrivals, Delay, Serve, TokenCounts

CHUNK = 4096
NS = 1_000_000_000
REFUSED_NS = NS
"""What a looping user waits after a refusal or a failure before it asks again. Assumed."""
IntArray = npt.NDArray[np.int64]


class Lengths:
    """Draw token counts of one distribution, a chunk at a time."""

    def __init__(self, spec: TokenCounts, seed: int, stream: int) -> None:
        self.spec, self.seed, self.stream = spec, seed, stream
        self.values: IntArray | None = None
        if spec.distribution == "empirical":
            values = spec.values
            if spec.fit is not None:
                inputs, outputs = trace_lengths(spec.fit, spec.format)
                values = tuple(outputs if stream == draws.OUTPUT else inputs)
            self.values = np.array(values, dtype=np.int64)

    def draw(self, chunk: int, count: int = CHUNK) -> IntArray:
        """Return the lengths of one chunk [count]."""
        spec = self.spec
        random = draws.generator(self.seed, self.stream, chunk)
        if self.values is not None:
            lengths = self.values[random.integers(0, len(self.values), count)]
        elif spec.distribution == "uniform":
            assert spec.max is not None
            return random.integers(spec.min, spec.max + 1, count)
        else:
            assert spec.mean is not None
            if spec.distribution == "constant":
                real = np.full(count, spec.mean)
            elif spec.distribution == "exponential":
                # round up an exponential: the geometric law on 1, 2, .. whose mean is exact
                scale = -1 / np.log1p(-1 / spec.mean) if spec.mean > 1 else 0.0
                real = np.ceil(random.exponential(scale, count)) if scale else np.ones(count)
            elif spec.distribution == "gamma":
                real = random.gamma(1 / spec.cv**2, spec.mean * spec.cv**2, count)
            else:
                sigma2 = np.log1p(spec.cv**2)
                real = random.lognormal(np.log(spec.mean) - sigma2 / 2, np.sqrt(sigma2), count)
            lengths = np.rint(real).astype(np.int64)
        return np.clip(lengths, spec.min, spec.max)

    def one(self, entity: int) -> int:
        """Return the length that belongs to one entity (a turn of a session)."""
        return int(self.draw(entity + (1 << 40), 1)[0])


def delay_ns(spec: Delay, seed: int, stream: int, entity: int) -> int:
    """Return one pause in nanoseconds."""
    if spec.distribution == "constant":
        return round(spec.mean * NS)
    random = draws.generator(seed, stream, entity)
    if spec.distribution == "exponential":
        return round(random.exponential(spec.mean) * NS)
    sigma2 = float(np.log1p(spec.cv**2))
    return round(random.lognormal(float(np.log(spec.mean)) - sigma2 / 2, sigma2**0.5) * NS)


def arrival_times(arrivals: Arrivals, seed: int) -> Iterator[IntArray]:
    """Yield chunks of arrival times in nanoseconds, ascending, without end.

    ``diurnal`` thins a Poisson process of the highest rate (Lewis and Shedler, 1979).
    """
    assert arrivals.rate is not None
    now = 0.0
    chunk = 0
    scale = NS / arrivals.rate
    while True:
        random = draws.generator(seed, draws.ARRIVAL, chunk)
        chunk += 1
        if arrivals.process == "constant":
            gaps = np.full(CHUNK, scale)
        elif arrivals.process == "gamma":
            gaps = random.gamma(1 / arrivals.cv**2, scale * arrivals.cv**2, CHUNK)
        elif arrivals.process == "diurnal":
            gaps = random.exponential(scale / (1 + arrivals.amplitude), CHUNK)
        else:
            gaps = random.exponential(scale, CHUNK)
        times = now + np.cumsum(gaps)
        now = float(times[-1])
        if arrivals.process == "diurnal":
            phase = 2 * np.pi * times / (arrivals.period * NS)
            keep = random.random(CHUNK) * (1 + arrivals.amplitude) < 1 + arrivals.amplitude * np.sin(phase)
            times = times[keep]
        yield np.rint(times).astype(np.int64)


class Synthetic:
    """Iterate over requests in order of arrival; ``follow_up`` gives what an answer causes (loops, sessions)."""

    def __init__(self, serve: Serve, seed: int) -> None:
        workload = serve.workload
        assert workload.arrivals is not None
        assert workload.input_tokens
        assert workload.output_tokens
        self.workload, self.arrivals, self.seed = workload, workload.arrivals, seed
        self.block_tokens = serve.scheduler.block_tokens
        self.inputs = Lengths(workload.input_tokens, seed, draws.INPUT)
        self.outputs = Lengths(workload.output_tokens, seed, draws.OUTPUT)
        shares = np.array([level.share for level in serve.slo])
        self.class_edges = np.cumsum(shares / shares.sum())[:-1]
        self.priorities = [level.priority for level in serve.slo]
        self.until = 1 << 62 if workload.duration is None else round(workload.duration * NS)
        self.most = workload.num_requests or 1 << 62
        self.sent = 0
        self.sessions = workload.sessions
        if self.sessions:
            self.turns = Lengths(self.sessions.turns, seed, draws.SESSION)
            self.new_tokens = Lengths(self.sessions.new_tokens, seed, draws.NEW_TOKENS)
            self.tool_tokens = Lengths(self.sessions.tool_call_tokens, seed, draws.TOOL)

    @property
    def has_sessions(self) -> bool:
        """Whether requests belong to sessions or to looping users."""
        return self.sessions is not None or self.arrivals.process == "closed_loop"

    def __iter__(self) -> Iterator[Request]:
        if self.arrivals.process == "closed_loop":
            assert self.arrivals.concurrency is not None
            for user in range(min(self.arrivals.concurrency, self.most)):
                yield self._first(0, user)
            return
        for chunk, times in enumerate(self._chunks()):
            inputs = self.inputs.draw(chunk).tolist()
            outputs = self.outputs.draw(chunk).tolist()
            classes = np.searchsorted(
                self.class_edges, draws.uniforms(draws.key(self.seed, draws.CLASS), chunk * CHUNK, CHUNK)
            ).tolist()
            priorities = self.priorities
            for at, time in enumerate(times):
                if time > self.until or self.sent >= self.most:
                    return
                if self.sessions:
                    yield self._first(time, self.sent)
                else:
                    request = Request(0, time, inputs[at], outputs[at], (), priorities[classes[at]])
                    request.slo_class = classes[at]
                    self.sent += 1
                    yield request

    def _chunks(self) -> Iterator[list[int]]:
        """Yield lists of ``CHUNK`` arrival times at most."""
        for times in arrival_times(self.arrivals, self.seed):
            yield times.tolist()

    def _class(self, entity: int) -> int:
        uniform = draws.uniforms(draws.key(self.seed, draws.CLASS), entity, 1)
        return int(np.searchsorted(self.class_edges, uniform[0]))

    def _first(self, time: int, number: int) -> Request:
        """Return the first request of a session or of a looping user."""
        self.sent += 1
        system = self.sessions.system_prompt_tokens if self.sessions else 0
        request = Request(0, time, self.inputs.one(number) + system, self.outputs.one(number))
        request.session = number
        request.slo_class = self._class(number)
        request.priority = self.priorities[request.slo_class]
        if self.sessions:
            self._shape(request)
        return request

    def _shape(self, request: Request) -> None:
        """Give a turn its kind and its chain: the shared system prompt, then the session's own run."""
        sessions = self.sessions
        assert sessions is not None
        entity = request.session * 4096 + request.turn
        uniform = draws.uniforms(draws.key(self.seed, draws.TOOL), entity, 1)[0]
        if uniform < sessions.tool_call_ratio and request.turn + 1 < self.turns.one(request.session):
            request.tool = True
            request.output = self.tool_tokens.one(entity)
        system = sessions.system_prompt_tokens // self.block_tokens
        own = request.input // self.block_tokens - system
        first = (request.session + 1) << 32
        shared = [(range(system), 1)] if system else []
        request.chain = [*shared, (range(first, first + own), 1)]

    def follow_up(self, request: Request, now: int, is_answered: bool) -> Request | None:
        """Return the request that one causes, or None. A refused turn ends its session; a looping user goes on."""
        if self.sessions is not None and not is_answered:
            return None
        if self.sessions is None:
            if self.arrivals.process != "closed_loop" or self.sent >= self.most:
                return None
            turn = request.turn + 1
            number = request.session + turn * (1 << 20)
            think = self.arrivals.think_time
            time = now + (delay_ns(think, self.seed, draws.THINK, number) if think else 0)
            time += 0 if is_answered else REFUSED_NS
            if time > self.until:
                return None
            self.sent += 1
            follow = Request(0, time, self.inputs.one(number), self.outputs.one(number))
            follow.session, follow.turn = request.session, turn
            follow.slo_class, follow.priority = request.slo_class, request.priority
            return follow
        turn = request.turn + 1
        if turn >= self.turns.one(request.session):
            if self.arrivals.process == "closed_loop" and self.sent < self.most and now <= self.until:
                return self._first(now, self.sent)
            return None
        entity = request.session * 4096 + turn
        pause = self.sessions.tool_time if request.tool else self.sessions.think_time
        follow = Request(
            0,
            now + delay_ns(pause, self.seed, draws.THINK, entity),
            request.input + request.output + self.new_tokens.one(entity),
            self.outputs.one(entity),
        )
        follow.session, follow.turn = request.session, turn
        follow.slo_class, follow.priority = request.slo_class, request.priority
        self._shape(follow)
        return follow
