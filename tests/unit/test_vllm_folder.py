"""Folders of recorded vLLM runs, made here: every form they come in, and what they may lack."""

import csv
import json
import warnings
from pathlib import Path
from typing import Any

import pytest

from longcat_sim.calibration.active_experts import ActiveExperts
from longcat_sim.calibration.engine_links import PCIE5_PAIR, Collective, MeasuredLink, RingLaws, law_link, measured_link
from longcat_sim.calibration.engine_times import EngineTimes
from longcat_sim.calibration.layer_profile import LayerProfile
from longcat_sim.errors import MeasurementError, WorkloadError
from longcat_sim.specs.model import model_spec
from longcat_sim.studies.validate.vllm_files import read_measured
from longcat_sim.studies.validate.vllm_folder import RunFolder
from longcat_sim.studies.validate.vllm_run import Recording, run

TOKENS = (1, 8, 64, 256, 2048)
MOE = "Qwen/Qwen3-30B-A3B-Instruct-2507"
DENSE = "Qwen/Qwen3-32B"


def table(path: Path, header: str, rows: list[tuple]) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("w", newline="") as file:
        writer = csv.writer(file)
        writer.writerow(header.split(","))
        writer.writerows(rows)


def profile(folder: Path, names: tuple[str, ...], *, is_new: bool, extra: dict[str, float] | None = None) -> None:
    cost = {name: 5.0 for name in names} | {"layernorm": 2.0, "qk_norm": 4.0 if is_new else 2.0} | (extra or {})
    table(folder / "dense.csv", "layer,tokens,time_us", [(n, t, c + 0.01 * t) for n, c in cost.items() for t in TOKENS])
    rows = [(name, n, 20 + 0.1 * n) for name in ("lm_head", "sampler") for n in (1, 64, 256)]
    table(folder / "per_sequence.csv", "layer,sequences,time_us", rows)
    cells = [(0, 0, n, kv, 2 + n * kv * 1e-3) for n in (1, 8, 64, 128) for kv in (16, 1024, 8192)]
    for chunk in (16, 512, 2048):
        for past in (0, 1024, 8192):
            alone = 2 + chunk * (past + chunk / 2) * 1e-4
            cells.append((chunk, past, 0, 0, alone))
            cells += [(chunk, past, n, kv, alone + n * kv * 2e-3) for n in (1, 64, 128) for kv in (16, 1024, 8192)]
    if is_new:
        new = [("attention", c, k + c / 2 if c else 0, n, kv, 1, t) for c, k, n, kv, t in cells]
        new += [("attention", 0, 0, 1, 16, 4, 1e6)]  # speculative verification: another kernel shape
        table(folder / "attention.csv", "layer,prefill_chunk,prefill_key,n_decode,kv_decode,decode_q_len,time_us", new)
    else:
        table(folder / "attention.csv", "prefill_chunk,kv_prefill,n_decode,kv_decode,time_us", cells)


def moe(folder: Path, *, has_ep: bool) -> None:
    rows = [(ep, t, a, 10 + 6 * a + 0.1 * t) for ep in (1, 2) for t in TOKENS for a in (4, 16, 64 if ep == 2 else 128)]
    if has_ep:
        table(folder / "moe.csv", "ep,tokens,activated_experts,time_us", rows)
    else:
        table(folder / "moe.csv", "tokens,activated_experts,time_us", [row[1:] for row in rows if row[0] == 1])


ATTENTION = ("embedding", "qkv_proj", "qk_norm", "rotary_emb", "o_proj", "final_layernorm")
FFN = ("gate_up_proj", "act_fn", "down_proj")


@pytest.fixture
def make(tmp_path: Path) -> Any:
    def build(
        name: str,
        *,
        model: str = DENSE,
        settings: dict[str, Any] | None = None,
        config: dict[str, Any] | None = None,
        is_new: bool = True,
        rows: list[dict[str, Any]] | None = None,
        clock: float = 1.79e9,
        **meta: Any,
    ) -> Path:
        folder = tmp_path / name
        folder.mkdir()
        settings = {"max_num_seqs": 128, "max_num_batched_tokens": 2048, "max_model_len": None} | (settings or {})
        tp = settings.get("tensor_parallel_size", 1)
        is_moe = "A3B" in model
        profile(folder / "profile" / f"tp{tp}", ATTENTION if is_moe else ATTENTION + FFN, is_new=is_new)
        if is_moe:
            moe(folder / "profile" / "tp1", has_ep=is_new)
        (folder / "profile" / "meta.yaml").write_text(f"hardware: CARD\nmodel: {DENSE}\n")
        document = {"model": model, "vllm_version": "0.28.0", "engine_kwargs": settings} | meta
        (folder / "meta.json").write_text(json.dumps(document))
        instance = {"model_name": DENSE, "npu_mem": {"mem_size": 96, "mem_util": 0.9}, "tp_size": tp}
        (folder / "config.json").write_text(json.dumps({"nodes": [{"instances": [instance]}]} | (config or {})))
        rows = rows if rows is not None else requests(40, clock)
        (folder / "requests.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
        return folder

    return build


def requests(count: int, clock: float = 1.79e9, monotonic: float = 500.0) -> list[dict[str, Any]]:
    rows = []
    for i in range(count):
        at = 0.05 * i
        times = {"queued_ts": at + 0.001 * (i % 3), "first_token_ts": at + 0.1, "last_token_ts": at + 2}
        rows.append(
            {"request_id": f"bench-{i}", "input_toks": 100 + 37 * (i % 11), "output_toks": 30 + i % 7}
            | {"arrival_time": clock + at, "scheduled_ts": monotonic + at, "e2e": None, "status": "ok"}
            | {key: monotonic + value for key, value in times.items()}
        )
    return rows


def quiet(folder: Path) -> Any:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return Recording.read(folder).simulate()


# -- links --------------------------------------------------------------------------------------------------------
def test_measured_collectives_are_joined_and_longer_rings_hop_more_often() -> None:
    times = {"all_reduce": (10, 14), "all_gather": (6, 8), "reduce_scatter": (5, 9)}
    link = MeasuredLink({op: ((1e3, 2e3), pair) for op, pair in times.items()})
    assert link.all_reduce_us(1500, 2) == pytest.approx(12)
    assert link.all_reduce_us(4000, 2) == pytest.approx(22)  # the last slope goes on
    # four ranks: six hops of a quarter; the pair's 2 hops of 1000 bytes took 14
    assert link.all_reduce_us(4000, 4) == pytest.approx(3 * 14)
    assert link.all_gather_us(10, 2) == 6
    assert link.exchange_us(2000) == 8
    # unequal parts: the rank that receives 2000 sets the pace; groups follow one another
    assert link.gather_group_us([[2000, 500], [100, 100]]) == pytest.approx(8 + 6)
    assert link.scatter_parts_us([2000, 500]) == pytest.approx(9)


def test_law_of_a_deployment_has_binary_units_dimensions_and_own_collectives() -> None:
    link = law_link({"link_bw": 16, "link_latency": 20000}, 0)
    assert isinstance(link, Collective)
    assert link.all_reduce_us(2 * 16 * 2**30, 2) == pytest.approx(2 * (20 + 1e6))
    # a group waits once; both directions share the link: parts of 3 and 1 take the time of 2 and 2
    assert link.gather_group_us([[3e6, 1e6], [30, 10]]) == pytest.approx(link.all_gather_us(2e6 + 20, 2))
    assert law_link({"link_bw": [900, 100], "link_latency": [0, 2000]}, -1) == Collective(100 * 2**30, 2e-6)
    own = law_link({"link_bw": 10, "link_latency": 1000, "collective_links": {"all_gather": {"link_bw": 5}}}, 0)
    assert isinstance(own, RingLaws)
    assert own.all_gather_us(2**30, 2) == pytest.approx(1 + 0.2e6)
    assert own.reduce_scatter_us(2**30, 2) == pytest.approx(1 + 0.1e6)
    assert law_link({"link_bw": 16}, 0) is None


def test_hardware_sheet_gives_samples_or_its_fitted_pair() -> None:
    sample = [
        {"collective": op, "bytes": size, "us": 5 + size / 1e4, "us_graphed": 4 + size / 1e4}
        for op in ("all_reduce", "all_gather", "reduce_scatter")
        for size in (1000, 9000)
    ]
    link = measured_link({"measured": {"interconnect": {"npus": 2, "samples": sample}}}, "hardware.yaml")
    assert isinstance(link, MeasuredLink)
    assert link.all_gather_us(5000, 2) == pytest.approx(4.5)
    pair = {"link_bw": {"value": 16}, "link_latency": {"value": 6600}}
    assert measured_link({"measured": None, "defaults": pair}, "x") == Collective(16 * 2**30, 6.6e-6)
    with pytest.raises(MeasurementError, match=r"interconnect\.samples: expected entries"):
        measured_link({"measured": {"interconnect": {"samples": [{"collective": "all_reduce"}]}}}, "x")


# -- experts ------------------------------------------------------------------------------------------------------
def test_popular_experts_are_reached_as_counted_and_one_rank_has_more() -> None:
    whole, half = ActiveExperts(128, 8), ActiveExperts(128, 8, 2)
    assert whole.mean(1) == pytest.approx(8)
    share = {t: whole.mean(t) / (128 * (1 - (1 - 8 / 128) ** t)) for t in (16, 24, 32, 96, 2048)}
    assert min(share.values()) == pytest.approx(0.87, abs=0.01)
    assert share[96] == pytest.approx(0.94, abs=0.02)
    assert share[2048] == pytest.approx(1, abs=1e-3)
    for tokens in (1, 4, 32, 256, 4096):
        assert half.mean(tokens) <= half.busiest(tokens) <= 64
    # 8 of 128 fall on two halves: the fuller one holds E max(X, 8 - X) of a hypergeometric X
    assert half.busiest(1) == pytest.approx(5.1, abs=0.2)


# -- requests -----------------------------------------------------------------------------------------------------
def test_failed_requests_are_counted_out_and_contradictions_refused(make: Any) -> None:
    rows = requests(10)
    rows[3] |= {"first_token_ts": None, "last_token_ts": None, "output_toks": 0}
    folder = make("failed", rows=rows)
    with pytest.warns(UserWarning, match="1 requests have no times"):
        assert len(read_measured(folder / "requests.jsonl")) == 9
    rows = requests(3)
    rows[1]["last_token_ts"] = rows[1]["first_token_ts"] - 1
    rows[2]["input_toks"] = 0
    folder = make("contradiction", rows=rows)
    with pytest.raises(WorkloadError, match=r"jsonl:2: expected queued_ts <= .*\n.*jsonl:3: expected input_toks"):
        read_measured(folder / "requests.jsonl")
    every = [row | {"first_token_ts": None} for row in requests(2)]
    with pytest.raises(WorkloadError, match="one completed request"):
        read_measured(make("all", rows=every) / "requests.jsonl")


def test_clock_of_arrivals_does_not_matter(make: Any) -> None:
    epoch, same = quiet(make("epoch")), quiet(make("same", clock=500.0))
    for name in ("first", "last"):
        assert (abs(epoch.records.numpy(name) - same.records.numpy(name)) < 1000).all()  # ns: floats of an epoch


# -- engine settings ----------------------------------------------------------------------------------------------
def test_blocks_of_a_rank_are_found_in_every_report(make: Any) -> None:
    model = model_spec("qwen3-30b-a3b")
    dp = {"data_parallel_size": 2, "enable_expert_parallel": True}

    def blocks(name: str, **meta: Any) -> tuple[int, int]:
        return RunFolder.read(make(name, model=MOE, settings=dp, **meta)).kv_blocks(model, 1, 2)

    # vLLM's client adds up the ranks; the token count is one rank's
    assert blocks("total", kv_cache={"num_gpu_blocks": 75638, "block_size": 16}) == (37818, 16)
    assert blocks("rank", kv_cache={"num_gpu_blocks": 30000}) == (29999, 16)
    resolved = {"cache_config": {"kv_cache_size_tokens": 605104, "num_gpu_blocks": 75638, "block_size": 32}}
    assert blocks("tokens", kv_cache=None, resolved_config=resolved) == (18908, 32)
    by_memory, _ = blocks("memory", kv_cache=None)
    assert by_memory == pytest.approx(38000, rel=0.03)
    bare = {"nodes": [{"instances": [{"npu_mem": {"mem_util": 0.9}}]}]}
    folder = make("named", model=MOE, settings=dp, kv_cache=None, config=bare)
    (folder / "profile" / "meta.yaml").write_text("gpu: NVIDIA RTX PRO 6000 Blackwell Server Edition\n")
    with pytest.warns(UserWarning, match="the memory of rtx-pro-6000 is taken, 95.6 GiB"):
        assert RunFolder.read(folder).kv_blocks(model, 1, 2)[0] == pytest.approx(by_memory, rel=0.01)
    folder = make("unknown", config={"nodes": [{"instances": [{"npu_mem": {"mem_util": 0.9}}]}]})
    with pytest.raises(MeasurementError, match=r"expected kv_cache\.num_gpu_blocks .*mem_size"):
        RunFolder.read(folder).kv_blocks(model_spec("qwen3-32b"), 1, 1)


def remarks(folder: Path) -> list[str]:
    with warnings.catch_warnings(record=True) as found:
        warnings.simplefilter("always")
        Recording.read(folder)
    return [str(each.message) for each in found]


@pytest.mark.parametrize(
    ("key", "says"),
    [
        ("max_num_seqs", "no max_num_seqs: 1024, vLLM's default, is taken"),
        ("max_num_batched_tokens", "no max_num_batched_tokens: 8192, vLLM's default, is taken"),
        ("block_size", "no block_size: 16, vLLM's default, is taken"),
    ],
)
def test_a_default_is_never_taken_without_a_word(make: Any, key: str, says: str) -> None:
    folder = make("run", settings={"block_size": 16}, kv_cache={"num_gpu_blocks": 30000})
    assert not [each for each in remarks(folder) if "vLLM's default" in each]
    document = json.loads((folder / "meta.json").read_text())
    del document["engine_kwargs"][key]
    (folder / "meta.json").write_text(json.dumps(document))
    assert [each for each in remarks(folder) if says in each and "meta.json" in each]


def test_defaults_depend_on_the_card_and_on_what_is_known_of_it(make: Any) -> None:
    small = {"nodes": [{"instances": [{"model_name": DENSE, "npu_mem": {"mem_size": 68}}]}]}
    found = remarks(make("small", settings={"max_num_seqs": None}, config=small))
    assert any("no max_num_seqs: 256," in each for each in found)
    assert any("no gpu_memory_utilization: 0.9," in each for each in found)
    assert any("no vllm_version" in each for each in remarks(make("bare", vllm_version=None)))


def test_a_misspelled_setting_is_named_with_the_likely_one(make: Any) -> None:
    folder = make("run", settings={"max_num_sequences": 64})
    assert not [each for each in remarks(folder) if "meant" in each]  # max_num_seqs is given beside it
    document = json.loads((folder / "meta.json").read_text())
    del document["engine_kwargs"]["max_num_seqs"]
    (folder / "meta.json").write_text(json.dumps(document))
    assert any("engine_kwargs.max_num_sequences: not used; is max_num_seqs meant?" in each for each in remarks(folder))


def test_what_the_engine_resolved_has_the_last_word(make: Any) -> None:
    resolved = {
        "scheduler_config": {"async_scheduling": False, "max_num_seqs": 8},
        "compilation_config": {"cudagraph_capture_sizes": [1, 4, 8], "cudagraph_mode": [2, 1]},
    }
    folder = RunFolder.read(make("resolved", resolved_config=resolved))
    assert not folder.is_async
    assert not folder.is_eager
    assert folder.count("scheduler_config", "max_num_seqs", 256) == 8
    assert RunFolder.read(make("old", vllm_version="0.19.1.dev3+gabc")).is_async
    assert RunFolder.read(make("eager", settings={"enforce_eager": True})).is_eager
    with pytest.raises(MeasurementError, match="tensor_parallel_size: expected a whole number"):
        run(make("half", resolved_config={"parallel_config": {"tensor_parallel_size": 1.5}}))
    with pytest.raises(MeasurementError, match="pipelined"):
        run(make("pp", settings={"pipeline_parallel_size": 2}))


def test_models_are_known_by_name_by_path_and_by_the_deployment(make: Any) -> None:
    assert RunFolder.read(make("path", model="/data/model/Qwen3-32B/")).model().name == "qwen3-32b"
    assert RunFolder.read(make("snapshot", model="/models/snapshots/8a1f")).model().name == "qwen3-32b"
    with pytest.raises(MeasurementError, match=r"shape of 'someone/else-7B' in model_config\.json"):
        RunFolder.read(make("else", model="someone/else-7B")).model()


# -- profiles -----------------------------------------------------------------------------------------------------
def test_old_and_new_profiles_say_the_same(make: Any) -> None:
    old = LayerProfile.read(make("old", is_new=False) / "profile", 1)
    new = LayerProfile.read(make("new", is_new=True) / "profile", 1)
    for args in (([500] * 20, []), ([500] * 20, [(700, 100)]), ([], [(2048, 0)])):
        assert old.attention_us(*args) == pytest.approx(new.attention_us(*args))
    assert (old.calls_of("qk_norm"), new.calls_of("qk_norm")) == (2, 1)
    assert old.calls_of("o_proj") == 1


def test_several_short_prompts_cost_less_than_one_long_one(make: Any) -> None:
    profile = LayerProfile.read(make("x") / "profile", 1)
    one, four = profile.attention_us([], [(2048, 0)]), profile.attention_us([], [(512, 0)] * 4)
    # four times a prompt of 512, with one launch: a quarter of the tokens x keys
    assert one == pytest.approx(2 + 2048 * 1024 * 1e-4)
    assert four == pytest.approx(2 + 0.25 * 2048 * 1024 * 1e-4, rel=0.03)
    beside = [1024] * 64
    more = profile.attention_us(beside, [(512, 0)] * 4) - four
    assert more == pytest.approx(profile.attention_us(beside, [(2048, 0)]) - one)


def test_unknown_kernels_count_once_per_layer_and_missing_ones_are_named(make: Any) -> None:
    folder = make("x")
    model = model_spec("qwen3-32b")
    before = EngineTimes(LayerProfile.read(folder / "profile", 1), model, 128).step_ns([100], ())
    profile(folder / "profile" / "tp1", ATTENTION + FFN, is_new=True, extra={"attn_glue": 1.0})
    after = EngineTimes(LayerProfile.read(folder / "profile", 1), model, 128).step_ns([100], ())
    assert after - before == pytest.approx(model.num_layers * 1010)
    profile(folder / "profile" / "tp1", ATTENTION, is_new=True)
    with pytest.raises(MeasurementError, match="got none of gate_up_proj, down_proj"):
        LayerProfile.read(folder / "profile", 1)


@pytest.mark.parametrize("lacks", ["attention.csv", "per_sequence.csv", "dense.csv"])
def test_missing_tables_are_named(make: Any, lacks: str) -> None:
    folder = make("x")
    (folder / "profile" / "tp1" / lacks).unlink()
    with pytest.raises(MeasurementError, match="got none of " + lacks.replace(".", r"\.")):
        run(folder)


def test_faulty_cells_and_foreign_kernels_are_refused(make: Any) -> None:
    folder = make("x")
    path = folder / "profile" / "tp1" / "attention.csv"
    text = path.read_text()
    path.write_text(text + "sparse_attention,0,0,1,16,1,3\n")
    with pytest.raises(MeasurementError, match=r"one attention kernel.*sparse_attention"):
        run(folder)
    path.write_text(text + "attention,0,0,1,16,1,fast\n")
    with pytest.raises(MeasurementError, match="expected numbers; got '0, 0, 1, 16, fast'"):
        run(folder)


def test_run_needs_tables_of_its_own_degree_and_of_its_experts(make: Any) -> None:
    folder = make("tp")
    meta = json.loads((folder / "meta.json").read_text())
    meta["engine_kwargs"]["tensor_parallel_size"] = 2
    (folder / "meta.json").write_text(json.dumps(meta))
    with pytest.raises(MeasurementError, match="tensor parallelism 2 in tp2/; got tp1"):
        run(folder)
    folder = make("moe", model=MOE)
    (folder / "profile" / "tp1" / "moe.csv").unlink()
    with pytest.raises(MeasurementError, match="gate_up_proj, down_proj"):
        run(folder)


def test_contexts_of_unequal_length_are_read_with_and_without_controls(make: Any) -> None:
    folder = make("x") / "profile" / "tp1"
    with pytest.warns(UserWarning, match=r"no skew\.csv"):
        Recording.read(folder.parent.parent)
    attention = LayerProfile.read(folder.parent, 1).attention
    low, high = attention.us(0, 0, 8, 1000), attention.us(0, 0, 8, 4500)
    pairs = json.dumps([[1, 4500]] + [[1, 500]] * 7)
    time = low + 0.3 * (high - low)
    # the newest rows hold the requests only; older ones their controls
    bare = [("attention", "", "", "", "", pairs, time)] * 7
    table(folder / "skew.csv", "layer,n,pc,t_mean_us,t_max_us,requests_json,t_skew_us", bare)
    assert LayerProfile.read(folder.parent, 1).skew.share(0, 8, high / low - 1) == pytest.approx(0.3)
    table(folder / "skew.csv", "n,pc,t_mean_us,t_max_us,t_skew_us", [(8, 0, 10, 20, 14)] * 7)
    assert LayerProfile.read(folder.parent, 1).skew.share(0, 8, 1.0) == pytest.approx(0.4)
    table(folder / "skew.csv", "n,t_skew_us", [(8, 14)])
    with pytest.raises(MeasurementError, match=r"skew\.csv:1: expected columns"):
        LayerProfile.read(folder.parent, 1)


# -- whole predictions --------------------------------------------------------------------------------------------
def test_two_ranks_reduce_in_one_stage_unless_that_is_disabled(make: Any) -> None:
    model, law = model_spec("qwen3-32b"), Collective(16e9, 20e-6)
    folder = make("tp2", settings={"tensor_parallel_size": 2})
    tables = LayerProfile.read(folder / "profile", 2)
    own = EngineTimes(tables, model, 128, tp_size=2, link=law, has_one_shot=True)
    nccl = EngineTimes(tables, model, 128, tp_size=2, link=law)
    hidden = 64 * model.hidden_size * 2
    gain = (2 * model.num_layers + 1) * (2 * (20e-6 + hidden / 2 / 16e9) - (20e-6 + hidden / 16e9))
    assert nccl.step_ns([100] * 64, ()) - own.step_ns([100] * 64, ()) == pytest.approx(gain * 1e9, rel=1e-6)
    # 2048 tokens make a message beyond vLLM's own buffers
    assert nccl.step_ns([], [(2048, 0)]) == own.step_ns([], [(2048, 0)])
    law_of, two = {"link_bw": 12, "link_latency": 20000}, {"tensor_parallel_size": 2}
    disabled = make("off", settings=two | {"disable_custom_all_reduce": True}, config=law_of)
    default = make("on", settings=two, config=law_of)
    assert quiet(disabled).duration_s > quiet(default).duration_s


def test_link_comes_from_the_sheet_the_deployment_or_the_published_pair(make: Any) -> None:
    folder = make("tp2", settings={"tensor_parallel_size": 2})
    with pytest.warns(UserWarning, match="PCIe 5 x16"):
        assert RunFolder.read(folder).link() is PCIE5_PAIR
    (folder / "hardware.yaml").write_text("defaults: {link_bw: {value: 1}, link_latency: {value: 5000}}\n")
    assert RunFolder.read(folder).link() == Collective(2**30, 5e-6)
    config = json.loads((folder / "config.json").read_text()) | {"link_bw": 64, "link_latency": 1000}
    (folder / "config.json").write_text(json.dumps(config))
    assert RunFolder.read(folder).link() == Collective(64 * 2**30, 1e-6)
    # the example deployments' pair says nothing of this card: NCCL was measured, vLLM's own kernel was not
    law = {"link_bw": 16, "link_latency": 20000}
    two = {"tensor_parallel_size": 2}
    assert RunFolder.read(make("own", settings=two, config=law)).link() == Collective(16 * 2**30, 20e-6)
    with pytest.warns(UserWarning, match="only the template's"):
        assert (
            RunFolder.read(make("nccl", settings=two | {"disable_custom_all_reduce": True}, config=law)).link()
            is PCIE5_PAIR
        )


@pytest.mark.parametrize("is_new", [True, False])
def test_expert_parallel_ranks_run_with_either_table(make: Any, is_new: bool) -> None:
    settings = {"tensor_parallel_size": 1, "data_parallel_size": 2, "enable_expert_parallel": True}
    result = quiet(make("ep", model=MOE, settings=settings, is_new=is_new))
    assert result.checks["completed"] == 40
    assert len(set(result.records.numpy("replica"))) == 2


def test_older_expert_tables_lack_the_kernel_that_picks_the_experts(make: Any) -> None:
    folder = make("routing", model=MOE, is_new=False) / "profile"
    bare = 10 + 6 * 16 + 0.1 * 64
    shortest = 2.0 + 0.01 * TOKENS[0]
    assert LayerProfile.read(folder, 1).moe_us(1, 64, 16) == pytest.approx(bare + shortest)
    path = folder / "tp1" / "moe.csv"
    head, *rows = path.read_text().splitlines()
    path.write_text("\n".join([f"{head},measurement_protocol", *(f"{row},v4" for row in rows)]))
    assert LayerProfile.read(folder, 1).moe_us(1, 64, 16) == pytest.approx(bare)


def test_few_experts_are_not_read_from_the_cache(make: Any) -> None:
    folder = make("cache", model=MOE, is_new=False) / "profile"
    path = folder / "tp1" / "moe.csv"
    head, *rows = path.read_text().splitlines()
    # four experts fit in a cache of five: measured at half their time with few rows, rightly with many
    cells = [row.split(",") for row in rows]
    cells = [(t, a, str(float(us) / 2) if a == "4" and float(t) < 2048 else us) for t, a, us in cells]
    path.write_text("\n".join([head, *map(",".join, cells)]))
    cached = LayerProfile.read(folder, 1)
    cold = cached.with_experts_in_memory(1e6, 5e6)
    for tokens in (1, 64, 2048):
        truth = 10 + 6 * 4 + 0.1 * tokens
        assert cold.moe_us(1, tokens, 4) - cold.routing_us == pytest.approx(truth, rel=0.001)
    assert cached.moe_us(1, 64, 4) < 0.6 * cold.moe_us(1, 64, 4)
    assert cached.moe_us(1, 64, 16) == cold.moe_us(1, 64, 16)
    # nothing to draw a line through: as measured
    assert cached.with_experts_in_memory(1e6, 1e9).moe_us(1, 64, 4) == cached.moe_us(1, 64, 4)


def test_parts_of_an_expert_layer_are_preferred_to_the_whole(make: Any) -> None:
    settings = {"data_parallel_size": 2, "enable_expert_parallel": True}
    folder = make("parts", model=MOE, settings=settings) / "profile"
    whole = LayerProfile.read(folder, 1, 2)
    target = {"tp": 1, "dp": 2, "ep": 2, "rank": 0}
    index = {"schema": "moe-components-v1", "entries": [{"target": target, "path": "moe_components/a"}]}
    (folder / "tp1" / "moe_components.json").write_text(json.dumps(index))
    rows = []
    for mode, cost in (("eager", 200), ("graph", 100)):
        rows += [(part, mode, t, -1, -1, 3.0) for part in ("gate_routing", "finalize_copy") for t in (1, 2048)]
        rows += [("experts", mode, t, a, 0, cost + a + t / 100) for t in (1, 4096) for a in (0, 4, 64)]
    header = "component,mode,tokens,activated_experts,local_assignments,time_us"
    table(folder / "tp1" / "moe_components" / "a" / "components.csv", header, rows)
    parts = LayerProfile.read(folder, 1, 2)
    assert whole.components is None
    assert LayerProfile.read(folder, 1).components is None
    assert parts.components is not None
    assert parts.components.us([60, 40], 34, True) == pytest.approx(2 * 3 + 100 + 34 + 1)
    assert parts.components.us([600, 400], 34, False) == pytest.approx(2 * 3 + 200 + 34 + 10)
    times = EngineTimes(parts, model_spec("qwen3-30b-a3b"), 128, dp_size=2, is_expert_parallel=True)
    assert times._expert_us([64, 64]) == pytest.approx(6 + 100 + times.active.busiest(128) + 1.28)
    # a table of whole layers lacks the rows of other ranks' experts: zeros written and read again
    model = model_spec("qwen3-30b-a3b")
    times = EngineTimes(whole, model, 128, dp_size=2, is_expert_parallel=True)
    speed = model.vocab_size * model.hidden_size * 2 / 20.1
    zeros = 2 * 128 * 8 / 2 * model.hidden_size * 2 / speed
    assert times._expert_us([64, 64]) == pytest.approx(whole.moe_us(2, 128, times.active.busiest(128)) + zeros)
    (folder / "tp1" / "moe_components.json").write_text("[]")
    with pytest.raises(MeasurementError, match=r"moe_components\.json: expected"):
        LayerProfile.read(folder, 1, 2)


def test_tokens_found_in_the_cache_are_not_computed_again(make: Any) -> None:
    plain, cached = make("plain"), make("cached")
    header = "t,prompt_throughput,prompt_compute_throughput,prompt_cached_throughput,gen_throughput\n"
    (cached / "timeseries.csv").write_text(header + "1.0,9000,8000,1000,5\n2.0,1000,0,1000,5\n")
    (plain / "timeseries.csv").write_text("t,prompt_throughput,gen_throughput\n1.0,9000,5\n")
    with pytest.warns(UserWarning, match="prefix hits, if the run had any, are taken as none"):
        assert RunFolder.read(plain).cached_share() == 0
    assert RunFolder.read(cached).cached_share() == pytest.approx(0.2)
    with_cache, without = quiet(cached), quiet(plain)
    tokens = without.pools["shared"].prefilled_tokens
    # the share in whole blocks of 16, but for the last one of a prompt, and the first to come computes it
    assert 0.78 < with_cache.pools["shared"].prefilled_tokens / tokens < 0.9
    assert with_cache.checks["completed"] == 40
    (cached / "timeseries.csv").write_text(header + "1.0,many,1,1,5\n")
    with pytest.raises(MeasurementError, match=r"timeseries\.csv: expected numbers"):
        RunFolder.read(cached).cached_share()


def test_resolved_settings_that_are_no_mapping_are_passed_over(make: Any) -> None:
    for number, resolved in enumerate(({"hash": 12}, [1], None)):
        assert remarks(make(f"odd{number}", resolved_config=resolved)) is not None
