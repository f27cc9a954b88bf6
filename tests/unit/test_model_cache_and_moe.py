"""The latent cache's bytes and pages, what zero-computation experts cost, the routing trace, and wrong inputs."""

import numpy as np
import pytest

torch = pytest.importorskip("torch")

from longcat_sim.errors import MeasurementError, ModelError  # noqa: E402
from longcat_sim.model import LatentCache, LongcatFlash  # noqa: E402
from longcat_sim.model.loading import hf_state_dict  # noqa: E402
from longcat_sim.model.moe import Routing, sort_rows, zero_experts  # noqa: E402
from longcat_sim.model.ops_of import Pass, layer_ops, segment_ops  # noqa: E402
from longcat_sim.records.routing import RoutingTrace  # noqa: E402
from longcat_sim.specs.model import model_spec  # noqa: E402

torch.set_num_threads(1)
TINY = model_spec("longcat-tiny")


@pytest.mark.parametrize(("dtype", "width"), [(torch.float32, 4), (torch.bfloat16, 2)])
def test_cache_bytes_are_the_specs(dtype, width):
    cache = LatentCache(TINY, num_sequences=3, max_tokens=128, block_tokens=16, dtype=dtype)
    assert cache.nbytes == 3 * 128 * TINY.kv_bytes_per_token(width)
    full = model_spec("longcat-flash")
    meta = LatentCache(full, num_sequences=1, max_tokens=64, dtype=torch.bfloat16, device="meta")
    assert meta.nbytes == 64 * 64512


def test_pages_are_freed_truncated_and_refused():
    cache = LatentCache(TINY, num_sequences=3, num_blocks=5, block_tokens=4)
    cache.extend([0], 5)
    cache.extend([1], 4)
    assert cache.free_tokens == 8
    with pytest.raises(ModelError, match="cache full: sequence 2 with 0 tokens needs 3 more blocks of 4 tokens for 9"):
        cache.extend([2], 9)
    assert cache.lengths == [5, 4, 0]
    cache.truncate(0, 2)
    with pytest.raises(ModelError, match=r"expected 0..2 for sequence 0; got 3"):
        cache.truncate(0, 3)
    cache.release(0)
    assert cache.free_tokens == 16
    cache.extend([2], 9)
    with pytest.raises(ModelError, match=r"sequence: expected 0..2; got 3"):
        cache.reserve(3, 1)
    with pytest.raises(ModelError, match="both or neither"):
        LatentCache(TINY, num_sequences=1)


def test_scattered_pages_read_as_side_by_side():
    torch.manual_seed(0)
    scattered = LatentCache(TINY, num_sequences=2, num_blocks=12, block_tokens=4)
    together = LatentCache(TINY, num_sequences=2, max_tokens=24, block_tokens=4)
    for _ in range(9):  # one token at a time to each in turn: their pages interleave
        latent = torch.randn(2, together.width)
        for cache in (scattered, together):
            plan = cache.extend([0, 1], 1)
            cache.write(1, plan, latent)
    assert plan.pages_BP is None
    other = scattered.at_end([0, 1], 1)
    assert other.pages_BP is not None
    torch.testing.assert_close(scattered.read(1, other), together.read(1, plan))
    assert together.read(1, plan).data_ptr() == together.pool[1].data_ptr()  # in place, nothing gathered


def test_zero_computation_experts_cost_nothing():
    routing = Routing(torch.tensor([[0.5, 0.25], [0.3, 0.2]]), torch.tensor([[1, 5], [4, 5]]))
    rows = sort_rows(routing, 4)  # experts 4 and 5 are zero-computation ones
    assert rows.counts == [0, 1, 0, 0]
    assert rows.token_N.tolist() == [0]
    x = torch.randn(2, 8)
    torch.testing.assert_close(zero_experts(x, routing, 4), x * torch.tensor([[0.25], [0.5]]))
    # only zero experts: no row, no message, and the ops say so
    nothing = Pass(2, 1, ep_size=2, sent_rows=0.0)
    assert segment_ops(TINY, "dispatch", nothing)[-1].message_bytes == 0
    assert sum(op.flop for op in segment_ops(TINY, "experts", nothing)) == 0


def test_ops_add_up_to_the_specs_flop():
    # The matrix products of all segments are those of the spec; the rest is small and listed apart.
    spec = model_spec("longcat-cpu-64e")
    step = Pass(8, 1, 2047, attention="absorbed", cached=True)
    products = {"gemm", "bmm", "grouped_gemm", "mla_decode", "router"}
    flop = sum(op.flop for ops in layer_ops(spec, step).values() for op in ops if op.kind in products)
    by_part = spec.flop_per_token(2048)
    norms = 2 * 8 * 2 * (spec.q_lora_rank + spec.kv_lora_rank)  # norm weights are parameters but no product
    expected = 8 * (sum(by_part.values()) - by_part["head"]) / spec.num_layers - norms
    assert flop == pytest.approx(expected, rel=1e-12)
    with pytest.raises(ModelError, match="segment: expected one of mla0"):
        segment_ops(spec, "mla2", step)


def test_segments_run_alone_give_the_layer():
    from longcat_sim.model.layer import LayerState

    model = LongcatFlash(TINY, seed=0)
    x = torch.randn(6, TINY.hidden_size)
    with torch.inference_mode():
        step = model.step(2, 3)
        layer = model.layers[0]
        state = LayerState(x)
        for name in (
            "mla0",
            "ffn0",
            "mla1_proj",
            "router",
            "mla1_core",
            "dispatch",
            "experts",
            "ffn1",
            "combine",
            "add",
        ):
            layer.segments[name](state, step)
        torch.testing.assert_close(state.x_TH, layer(x, step))


def test_gradients_equal_with_and_without_the_fast_path():
    model = LongcatFlash(TINY, seed=0)
    tokens = torch.randint(0, 512, (2, 9))
    with torch.inference_mode():
        fast = model(tokens)
    slow = model(tokens)
    torch.testing.assert_close(fast, slow.detach(), atol=1e-5, rtol=0)
    slow.square().mean().backward()
    assert all(p.grad is not None and torch.isfinite(p.grad).all() for p in model.parameters())


def test_a_range_of_experts_holds_the_weights_of_the_whole():
    whole, part = LongcatFlash(TINY, seed=7), LongcatFlash(TINY, seed=7, experts=range(4, 8))
    assert torch.equal(whole.layers[1].experts.down[4:8], part.layers[1].experts.down)
    assert torch.equal(whole.head.weight, part.head.weight)
    other = LongcatFlash(TINY, seed=8, experts=range(4, 8))
    other.load_hf_state_dict(hf_state_dict(whole))  # published names: the other ranks' experts are let pass
    assert all(torch.equal(a, b) for a, b in zip(other.parameters(), part.parameters(), strict=True))


def test_routing_trace_round_trip(tmp_path):
    model = LongcatFlash(TINY, seed=0)
    with torch.inference_mode(), model.record_routing() as trace:
        model(torch.randint(0, 512, (2, 100)))
        model(torch.randint(0, 512, (1, 50)))
    recorded = trace()
    assert (recorded.num_layers, recorded.num_tokens, recorded.moe_topk) == (2, 250, 6)
    # an untrained router chooses evenly: 6 x 16 / 24 = 4 FFN experts per token
    assert recorded.ffn_experts().mean() == pytest.approx(4.0, abs=0.3)
    assert (recorded.tokens_per_expert().sum(1) == 250 * 6).all()
    assert (recorded.tokens_per_rank(4).sum(1) == recorded.ffn_experts().sum(1)).all()
    assert (recorded.imbalance(4) >= 1).all()
    recorded.save(tmp_path / "routing.npz")
    again = RoutingTrace.load(tmp_path / "routing.npz")
    assert np.array_equal(again.experts, recorded.experts)
    assert (again.n_routed_experts, again.zero_expert_num) == (16, 8)
    with pytest.raises(MeasurementError, match="16 % 5 = 1"):
        recorded.tokens_per_rank(5)
    with pytest.raises(MeasurementError, match=r"ids 0..23"):
        RoutingTrace(np.full((1, 1, 1), 24, dtype=np.int32), 16, 8)
    with model.record_routing() as trace, pytest.raises(ModelError, match="at least one pass"):
        trace()


def test_a_damaged_routing_trace_is_no_routing_trace(tmp_path, monkeypatch):
    recorded = RoutingTrace(np.arange(24, dtype=np.int32).reshape(2, 4, 3), 16, 8, "note")
    good, bad = tmp_path / "good", tmp_path / "bad"
    recorded.save(good)
    assert np.array_equal(RoutingTrace.load(good).experts, recorded.experts)  # under the very name it was saved under
    whole = good.read_bytes()
    np.savez(tmp_path / "vector.npz", experts=recorded.experts, n_routed_experts=[16, 16], zero_expert_num=8, note="")
    np.save(tmp_path / "plain.npy", recorded.experts)
    damaged = bytearray(whole)
    damaged[whole.index(b"experts.npy") + 40] ^= 255  # within the packed array
    others = ((tmp_path / name).read_bytes() for name in ("vector.npz", "plain.npy"))
    for content in (b"", b"no", whole[:100], whole[: len(whole) // 2], whole[:-1], bytes(damaged), *others):
        bad.write_bytes(content)
        with pytest.raises(MeasurementError, match="bad: expected a routing trace"):
            RoutingTrace.load(bad)

    def interrupt(*_: object, **__: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr("os.replace", interrupt)
    with pytest.raises(KeyboardInterrupt):
        RoutingTrace(recorded.experts[:1], 16, 8).save(good)
    assert good.read_bytes() == whole


def test_wrong_tokens_and_models():
    model = LongcatFlash(TINY, seed=0)
    for tokens, says in (
        (torch.zeros(3, dtype=torch.long), r"shape \[sequences, tokens\]"),
        (torch.zeros(1, 0, dtype=torch.long), r"got \[1, 0\]"),
        (torch.zeros(1, 2), "int32 or int64"),
        (torch.tensor([[512]]), "0..511 .vocab_size.; got 512"),
        (torch.tensor([[-1]]), "got -1"),
    ):
        with pytest.raises(ModelError, match=says):
            model(tokens)
    with pytest.raises(ModelError, match="longcat_flash spec"):
        LongcatFlash("llama-3.1-8b", device="meta")
    with pytest.raises(ModelError, match="rope_type"):
        LongcatFlash(TINY.replace(rope_type="yarn"), device="meta")
    cache = LatentCache(TINY, num_sequences=2, max_tokens=8)
    with pytest.raises(ModelError, match="slots: expected one per row"):
        model.prefill(torch.zeros(2, 3, dtype=torch.long), cache, [0])
