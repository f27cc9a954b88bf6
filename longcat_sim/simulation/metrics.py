"""Figures of a serving run, derived from its records: TTFT, TPOT, ITL, goodput, what price needs, intervals.

Symbols of one request's life: arrival a, first token f, last token l, n tokens. TTFT = f - a, TPOT = (l - f)/(n - 1),
E2E = l - a. Requests that arrive during the warm-up are served, not counted; but ITL, which pools the gaps of all
tokens, and preemptions are of the whole run. Rates are over ``window_s`` (``counted_work``), so that rate x price is
what an hour costs; ``duration_s`` goes on to the last token.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np
import numpy.typing as npt

from longcat_sim.simulation.serving.request import COMPLETED

if TYPE_CHECKING:
    from longcat_sim.simulation.serving.request import GapHistogram
    from longcat_sim.simulation.serving.simulate import ServingResult

FloatArray = npt.NDArray[np.float64]
Summary = dict[str, float] | None
PERCENTILES = (50, 90, 95, 99)
GROWTH = 0.02
"""Share of the arrivals by which a queue may grow before it is one without bound: what goes unsaid overstates rates by
no more. Assumed."""
FEWEST_STAYS = 100
"""Requests that must come and go while all queues last for their stays to tell the speed of full batches. Assumed."""


def summary(values: npt.NDArray[Any], scale: float = 1e-9) -> Summary:
    """Return mean and percentiles of nanoseconds, in seconds; None if there are none."""
    if not len(values):
        return None
    ranks = np.percentile(values, PERCENTILES)
    return {"mean": float(values.mean()) * scale} | {
        f"p{p}": float(v) * scale for p, v in zip(PERCENTILES, ranks, strict=True)
    }


def gap_summary(gaps: GapHistogram) -> Summary:
    """Return mean and percentiles of the pooled gaps."""
    mean = gaps.mean_s()
    if mean is None:
        return None
    return {"mean": mean} | {f"p{p}": gaps.percentile_s(p) or 0.0 for p in PERCENTILES}


class CountedWork(NamedTuple):
    """The work that rates and prices are of."""

    window_s: tuple[float, float]
    """(start, end) over which rates are taken and a fleet is paid."""
    done: npt.NDArray[np.bool_]
    """Requests of that work [N]."""
    prompt_ratio: FloatArray
    """Share of the prompt of each of them that belongs to it [done]."""
    answer_ratio: FloatArray
    """The same of its answer [done]."""
    is_unstable: bool
    sustainable_requests_per_s: float | None
    """As ``stability`` has it."""


def counted_work(result: ServingResult) -> CountedWork:
    """Return what rates are taken of, and a fleet is paid for.

    The window starts with the end of the warm-up, or with the first arrival. It ends with the last arrival, for what
    the fleet does while it drains belongs to no load; where requests take longer than they come (a batch, a single
    request), there is no steady state, and it ends with the last token. The work is that of the requests that arrived
    in between. Where the queue grew without bound it is what the fleet did in the window, whoever asked for it: of what
    arrives then, the fleet does but a part, and before that what the warm-up left waiting.
    """
    columns, warm_up_s = result.records, result.serve.workload.warm_up
    arrival, last = columns.numpy("arrival"), columns.numpy("last")
    is_unstable, sustainable = stability(result)
    completed = columns.numpy("status") == COMPLETED
    done = completed & (arrival >= round(warm_up_s * 1e9))
    ones = np.broadcast_to(1.0, int(done.sum()))
    if not is_unstable or not done.any():
        window = counted_window_s(arrival[done], last[done], (last - arrival)[done], warm_up_s=warm_up_s)
        return CountedWork(window, done, ones, ones, is_unstable, sustainable)
    scheduled, first = columns.numpy("scheduled"), columns.numpy("first")
    window = counted_window_s(arrival[done], last[done], (last - scheduled)[done], warm_up_s=warm_up_s)
    low, high = (round(edge * 1e9) for edge in window)
    done = completed & (last > low) & (scheduled < high)

    def ratio(begin: FloatArray, end: FloatArray) -> FloatArray:
        inside = np.maximum(np.minimum(end, high) - np.maximum(begin, low), 0)
        return np.where(end > begin, inside / np.maximum(end - begin, 1), (begin >= low) & (begin <= high))

    prompt, answer = ratio(scheduled[done], first[done]), ratio(first[done], last[done])
    return CountedWork(window, done, prompt, answer, is_unstable, sustainable)


def counted_window_s(
    arrival: FloatArray, last: FloatArray, stay: FloatArray, *, warm_up_s: float = 0.0
) -> tuple[float, float]:
    """Return the window of ``counted_work`` in seconds, of the arrivals, last tokens and stays of its requests [N], in
    nanoseconds."""
    if not len(arrival):
        return warm_up_s, warm_up_s
    start = warm_up_s if warm_up_s > 0 else float(arrival.min()) * 1e-9
    end = float(arrival.max()) * 1e-9
    if end - start < float(np.median(stay)) * 1e-9:
        end = float(last.max()) * 1e-9
    return start, end


def serving_metrics(result: ServingResult) -> dict[str, Any]:
    """Return every figure of the ``serve:`` JSON document but prices; units in the keys."""
    columns, serve = result.records, result.serve
    warm_up = round(serve.workload.warm_up * 1e9)
    arrival = columns.numpy("arrival")
    counted = arrival >= warm_up
    status = columns.numpy("status")
    done = counted & (status == COMPLETED)
    first, last = columns.numpy("first"), columns.numpy("last")
    inputs, outputs, cached = columns.numpy("input"), columns.numpy("output"), columns.numpy("cached")
    span = done & (outputs > 1)
    # summed up at once: of a million requests each takes 8 MB, and twice that while it is made
    ttft_s, e2e_s = summary((first - arrival)[done]), summary((last - arrival)[done])
    tpot_s = summary((last - first)[span] / (outputs[span] - 1))
    work = result.counted
    begin, end = work.window_s
    seconds = max(end - begin, 1e-9)
    input_sum = float(inputs[work.done] @ work.prompt_ratio)
    cached_sum = float(cached[work.done] @ work.prompt_ratio)
    output_sum = float(outputs[work.done] @ work.answer_ratio)
    prefix = cached_sum / input_sum if input_sum else 0.0
    classes, goodput = _goodput(result, counted, seconds)
    session_s, tool_s = _sessions(result, done)
    steps = sum(pool.num_steps for pool in result.pools.values())
    outside = sum(pool.outside_steps for pool in result.pools.values())
    figures: dict[str, Any] = {
        "requests": int(counted.sum()),
        "completed": int(done.sum()),
        "rejected": int((counted & (status == 2)).sum()),
        "failed": int((counted & (status == 3)).sum()),
        "retried": int((columns.numpy("retries")[counted] > 0).sum()),
        "skipped_rows": result.skipped_rows,
        "unstable": work.is_unstable,
        "sustainable_requests_per_s": work.sustainable_requests_per_s,
        "extrapolated": outside > 0,
        "extrapolated_step_ratio": outside / steps if steps else 0.0,
        "duration_s": (int(last[done].max()) * 1e-9 if done.any() else end) - begin,
        "window_s": (begin, end),
        "ttft_s": ttft_s,
        "tpot_s": tpot_s,
        "itl_s": gap_summary(result.gaps),
        "e2e_s": e2e_s,
        "session_s": session_s,
        "tool_call_s": tool_s,
        "input_tokens_per_s": input_sum / seconds,
        "output_tokens_per_s": output_sum / seconds,
        "goodput_requests_per_s": goodput,
        "slo": classes,
        "prefix_hit_ratio": prefix,
        "preemptions": result.preemptions,
        "gpu_hours": sum(pool.gpu_hours for pool in result.pools.values()),
        "gpu_hours_by_pool": {name: pool.gpu_hours for name, pool in result.pools.items()},
        "busy_s_by_pool": {name: pool.busy_s for name, pool in result.pools.items()},
        "idle_s_by_pool": {name: pool.idle_s for name, pool in result.pools.items()},
        "uncached_input_tokens": round(input_sum - cached_sum),
        "cached_input_tokens": round(cached_sum),
        "output_tokens": round(output_sum),
        "interpolation_error": result.interpolation_error,
    }
    return figures


def _goodput(result: ServingResult, counted: npt.NDArray[np.bool_], seconds: float) -> tuple[dict[str, Any], float]:
    """Return attainment per class, and completed requests within their level per second.

    ``attained_ratio`` is of all counted requests of the class (``offered``): one that was rejected or failed was not
    served within any level.
    """
    columns = result.records
    done = counted & (columns.numpy("status") == COMPLETED)
    arrival, first, last = (columns.numpy(name) for name in ("arrival", "first", "last"))
    outputs, of_class = columns.numpy("output"), columns.numpy("slo_class")
    classes = {}
    good_sum = 0
    for at, level in enumerate(result.serve.slo):
        mine = done & (of_class == at)
        good = mine.copy()
        if level.ttft is not None:
            good &= first - arrival <= level.ttft * 1e9
        if level.tpot is not None:
            good &= last - first <= level.tpot * 1e9 * np.maximum(outputs - 1, 0)
        if level.e2e is not None:
            good &= last - arrival <= level.e2e * 1e9
        offered, met = int((counted & (of_class == at)).sum()), int(good.sum())
        good_sum += met
        classes[level.name] = {
            "offered": offered,
            "completed": int(mine.sum()),
            "attained_ratio": met / offered if offered else None,
            "goodput_requests_per_s": met / seconds,
        }
    return classes, good_sum / seconds


def _sessions(result: ServingResult, done: npt.NDArray[np.bool_]) -> tuple[Summary, Summary]:
    """Return first arrival to last token per session, and arrival to last token per tool call."""
    columns = result.records
    if not columns.has_sessions or result.serve.workload.sessions is None:
        return None, None
    arrival, last = columns.numpy("arrival"), columns.numpy("last")
    session, tool = columns.numpy("session"), columns.numpy("tool")
    count = int(session.max()) + 1 if len(session) else 0
    begin = np.full(count, np.iinfo(np.int64).max)
    end = np.full(count, -1)
    np.minimum.at(begin, session[done], arrival[done])
    np.maximum.at(end, session[done], last[done])
    whole = end >= 0
    calls = done & (tool == 1)
    return summary((end - begin)[whole]), summary((last - arrival)[calls])


def stability(result: ServingResult) -> tuple[bool, float | None]:
    """Return whether the queue grew without bound while requests came, and the rate that could be kept up.

    In the second half of the arrivals, the number waiting for admission must not grow by more than four standard
    deviations of a Poisson count and 2 % of the half's arrivals. Nor may so many of all wait for the decode pool when
    the last one arrives. Closed loops cannot overload.

    The rate is what the fleet completes with a queue that is never empty, whatever the service level, of requests that
    are not refused. It is rough where requests stay longer than the queue lasts.
    """
    columns = result.records
    arrivals = result.serve.workload.arrivals
    scheduled = columns.numpy("scheduled")
    refused = (columns.numpy("status") != COMPLETED) & (scheduled < 0)  # they never waited for long
    arrival = np.sort(columns.numpy("arrival")[~refused])
    if len(arrival) < 20 or (arrivals is not None and arrivals.process == "closed_loop"):
        return False, None
    end = int(arrival[-1])
    middle = (int(arrival[0]) + end) // 2
    started = np.sort(scheduled[scheduled >= 0])

    def waiting(time: int) -> int:
        return int(np.searchsorted(arrival, time, "right") - np.searchsorted(started, time, "right"))

    def is_growth(number: int, came: int) -> bool:
        return number > max(GROWTH * came, 4 * came**0.5)

    if is_growth(result.between_pools, len(arrival)):  # decode lags behind: what it completes is what it can
        ends = columns.numpy("last")[columns.numpy("status") == COMPLETED]
        return True, float(((ends > middle) & (ends <= end)).sum()) / max((end - middle) * 1e-9, 1e-9)
    came = len(arrival) - int(np.searchsorted(arrival, middle, "right"))
    if not is_growth(waiting(end) - waiting(middle), came):
        return False, None
    return True, _full_rate(result, middle, end)


def _full_rate(result: ServingResult, begin: int, end: int) -> float:
    """Return the requests per second that the replicas complete from ``begin`` on while all have a queue: until the
    last arrival (``end``), or the first replica has admitted its last one.

    By Little's law: those in service on average, over the stay of a mean request of the whole traffic at the speed of
    that time. Completions would not do: long requests are the last to leave batches that have just filled up, and equal
    ones leave in waves. Nor would stays that end later, when batches drain and steps get shorter.
    """
    columns = result.records
    scheduled, first, last, replica = (columns.numpy(name) for name in ("scheduled", "first", "last", "replica"))
    done = columns.numpy("status") == COMPLETED
    gaps = np.maximum(columns.numpy("output") - 1, 0)
    if not done.any():
        return 0.0
    queued = [int(scheduled[done & (replica == one)].max()) for one in np.unique(replica[done])]
    end = max(end, min(queued))
    for chosen in (done & (scheduled >= begin) & (last <= end), done & (last > begin) & (last <= end), done):
        if chosen.sum() >= FEWEST_STAYS:
            break
    prefill_s = float((first - scheduled)[chosen].mean()) * 1e-9
    per_token_s = float((last - first)[chosen].sum()) * 1e-9 / max(int(gaps[chosen].sum()), 1)
    in_service = np.maximum(np.minimum(last, end) - np.maximum(scheduled, begin), 0)[done].sum() / max(end - begin, 1)
    return float(in_service) / (prefill_s + float(gaps[done].mean()) * per_token_s)


def intervals(
    centre: Mapping[str, Any], draws: Sequence[Mapping[str, Any]], relative_error: float = 0.0
) -> dict[str, Any]:
    """Return {p5, p95} of every figure over several runs (seeds, quantiles, draws of the fit).

    An interval holds the ``centre``: of a few draws, all may lie on one side of it. ``relative_error`` (of the
    interpolation of step times) widens the interval of every time.
    """
    result: dict[str, Any] = {}
    for name in draws[0]:
        middle = centre.get(name)
        kept = [draw[name] for draw in draws if draw.get(name) is not None]
        if not kept or isinstance(kept[0], bool) or middle is None:
            continue
        if isinstance(kept[0], Mapping):
            inner = intervals(middle, kept, relative_error if name.endswith("_s") else 0.0)
            if inner:
                result[name] = inner
        elif isinstance(kept[0], int | float):
            low, high = np.percentile(np.array(kept, dtype=float), [5, 95])
            widen = relative_error if name in ("mean", "p50", "p90", "p95", "p99") else 0.0
            result[name] = {
                "p5": min(float(low) * (1 - widen), middle), "p95": max(float(high) * (1 + widen), middle),
            }  # fmt: skip
    return result
