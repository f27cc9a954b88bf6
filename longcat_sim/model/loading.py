"""Weights in and out: names of transformers 5 and of the published shards; safetensors files, never pickles."""

from __future__ import annotations

import json
import mmap
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from longcat_sim.errors import ModelError
from longcat_sim.specs.model import ModelSpec

if TYPE_CHECKING:
    from longcat_sim.model.longcat import LongcatFlash

_DTYPES = {
    "F64": torch.float64, "F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16,
    "I64": torch.int64, "I32": torch.int32, "I16": torch.int16, "I8": torch.int8, "U8": torch.uint8, "BOOL": torch.bool,
    "F8_E4M3": torch.float8_e4m3fn, "F8_E5M2": torch.float8_e5m2,
}  # fmt: skip


@dataclass(frozen=True)
class Piece:
    """One published tensor and the rows of ours that it fills."""

    source: str
    target: Tensor
    spare_rows: bool = False
    """Whether the published tensor may hold further rows (transformers keeps empty ones for zero experts)."""


def _attention(theirs: str, mla: Any) -> Iterator[Piece]:
    spec: ModelSpec = mla.spec
    rank = spec.q_lora_rank
    yield Piece(f"{theirs}.q_a_proj.weight", mla.down.weight[:rank])
    yield Piece(f"{theirs}.kv_a_proj_with_mqa.weight", mla.down.weight[rank:])
    for name, module in (
        ("q_a_layernorm", mla.q_norm),
        ("kv_a_layernorm", mla.kv_norm),
        ("q_b_proj", mla.q_up),
        ("kv_b_proj", mla.kv_up),
        ("o_proj", mla.out),
    ):
        yield Piece(f"{theirs}.{name}.weight", module.weight)


def _ffn(theirs: str, ffn: Any) -> Iterator[Piece]:
    gate, up = ffn.gate_up.weight.chunk(2)
    yield Piece(f"{theirs}.gate_proj.weight", gate)
    yield Piece(f"{theirs}.up_proj.weight", up)
    yield Piece(f"{theirs}.down_proj.weight", ffn.down.weight)


def pieces(model: LongcatFlash, *, packed_experts: bool) -> Iterator[Piece]:
    """Yield every published tensor that the model takes; ``packed_experts`` as transformers 5 names experts."""
    yield Piece("model.embed_tokens.weight", model.embedding.weight)
    yield Piece("model.norm.weight", model.norm.weight)
    if not model.spec.tie_word_embeddings:
        yield Piece("lm_head.weight", model.head.weight)
    layer: Any
    for i, layer in enumerate(model.layers):
        at = f"model.layers.{i}"
        for j in range(2):
            yield Piece(f"{at}.input_layernorm.{j}.weight", layer.input_norm[j].weight)
            yield Piece(f"{at}.post_attention_layernorm.{j}.weight", layer.post_norm[j].weight)
            yield from _attention(f"{at}.self_attn.{j}", layer.attention[j])
            yield from _ffn(f"{at}.mlps.{j}", layer.ffn[j])
        yield Piece(f"{at}.mlp.router.classifier.weight", layer.router.weight)
        yield Piece(f"{at}.mlp.router.e_score_correction_bias", layer.router.e_score_correction_bias)
        experts = layer.experts
        if packed_experts:
            yield Piece(f"{at}.mlp.experts.gate_up_proj", experts.gate_up, spare_rows=True)
            yield Piece(f"{at}.mlp.experts.down_proj", experts.down, spare_rows=True)
        else:
            for e in range(experts.count):
                name = f"{at}.mlp.experts.{experts.first + e}"
                gate, up = experts.gate_up[e].chunk(2)
                yield Piece(f"{name}.gate_proj.weight", gate)
                yield Piece(f"{name}.up_proj.weight", up)
                yield Piece(f"{name}.down_proj.weight", experts.down[e])
    if model.mtp is not None:
        # Source of the names: SGLang, python/sglang/srt/models/longcat_flash_nextn.py
        at, mtp = "model.mtp.layers.0", model.mtp
        yield Piece("model.mtp.norm.weight", mtp.norm.weight)
        yield Piece(f"{at}.eh_proj.weight", mtp.join.weight)
        yield Piece(f"{at}.enorm.m.weight", mtp.embed_norm.weight)
        yield Piece(f"{at}.hnorm.m.weight", mtp.hidden_norm.weight)
        yield Piece(f"{at}.input_layernorm.weight", mtp.input_norm.weight)
        yield Piece(f"{at}.post_attention_layernorm.weight", mtp.post_norm.weight)
        yield from _attention(f"{at}.self_attn", mtp.attention)
        yield from _ffn(f"{at}.transformer_layer.mlp", mtp.ffn)


@torch.no_grad()
def load_hf_state_dict(model: LongcatFlash, state: Mapping[str, Tensor], *, strict: bool = True) -> None:
    """Copy published weights into ``model``; nothing is copied unless all of it can be.

    Names of MTP are ignored by a model without the head, experts of other ranks by a model that holds a range.
    With ``strict=False`` missing and unknown names are let pass; wrong shapes are not.

    Raises:
        ModelError: every missing name, unknown name and wrong shape.
    """
    if model.device.type == "meta":
        raise ModelError("load: expected a model with memory; got one on the meta device; build it on cpu or cuda")
    packed = any(name.endswith("mlp.experts.gate_up_proj") for name in state)
    wanted = list(pieces(model, packed_experts=packed))
    faults = []
    for piece in wanted:
        if piece.source not in state:
            if strict:
                faults.append(f"load: {piece.source}: expected shape {list(_whole(model, piece))}; it is missing")
            continue
        got, expected = tuple(_shape(state, piece.source)), _whole(model, piece)
        fits = got[1:] == expected[1:] and got[:1] >= expected[:1] if piece.spare_rows else got == expected
        if not fits:
            faults.append(f"load: {piece.source}: expected shape {list(expected)}; got {list(got)}")
    if strict:
        known = {piece.source for piece in wanted}
        for name in state:
            if name not in known and not _ignored(model, name):
                faults.append(f"load: {name}: expected no such tensor in a longcat_flash model; got one; remove it")
    if faults:
        raise ModelError(faults)
    for piece in wanted:
        if piece.source in state:
            rows = state[piece.source]
            if piece.spare_rows:
                rows = rows[model.held_experts.start : model.held_experts.stop]
            piece.target.copy_(rows)


def _whole(model: LongcatFlash, piece: Piece) -> tuple[int, ...]:
    """Return the shape that a published tensor has at least: of packed experts, all of them."""
    shape = tuple(piece.target.shape)
    return (model.spec.n_routed_experts, *shape[1:]) if piece.spare_rows else shape


def _shape(state: Mapping[str, Tensor], name: str) -> tuple[int, ...]:
    return state.shape_of(name) if isinstance(state, SafetensorsFolder) else tuple(state[name].shape)


def _ignored(model: LongcatFlash, name: str) -> bool:
    if name.startswith("model.mtp."):
        return model.mtp is None or "embed_tokens" in name or "shared_head" in name
    if name == "lm_head.weight":
        return model.spec.tie_word_embeddings
    if ".mlp.experts." in name:  # experts of other ranks
        number = name.split(".mlp.experts.")[1].split(".")[0]
        return number.isdigit() and int(number) < model.spec.n_routed_experts and int(number) not in model.held_experts
    return name.endswith("rotary_emb.inv_freq")


def hf_state_dict(model: LongcatFlash) -> dict[str, Tensor]:
    """Return the weights by the names of the published shards (views, not copies)."""
    return {piece.source: piece.target.detach() for piece in pieces(model, packed_experts=False)}


class SafetensorsFolder(Mapping[str, Tensor]):
    """The tensors of all ``*.safetensors`` files of a folder, mapped from disk when they are asked for.

    Source of the format: safetensors, README "Format": 8 bytes length, a JSON header, then the data.
    """

    def __init__(self, folder: Path) -> None:
        self._where: dict[str, tuple[Path, str, list[int], int, int]] = {}
        self._maps: dict[Path, mmap.mmap] = {}
        files = sorted(folder.glob("*.safetensors"))
        if not files:
            other = sorted(p.name for pattern in ("*.bin", "*.pt", "*.pth") for p in folder.glob(pattern))
            got = f"got {', '.join(other)}, which are pickles and are not read" if other else "got none"
            raise ModelError(f"{folder}: expected *.safetensors files; {got}; convert or download safetensors")
        faults: list[str] = []
        for path in files:
            self._read_header(path, faults)
        if faults:
            raise ModelError(faults)

    def _read_header(self, path: Path, faults: list[str]) -> None:
        size = path.stat().st_size
        with path.open("rb") as file:
            length = int.from_bytes(file.read(8), "little")
            if size < 8 or length > size - 8:
                faults.append(f"{path}: expected a safetensors header; got a file cut short; download it again")
                return
            try:
                header = json.loads(file.read(length))
            except ValueError:
                faults.append(f"{path}: expected a safetensors header in JSON; got something else")
                return
        for name, entry in header.items():
            if name == "__metadata__":
                continue
            start, stop = (8 + length + at for at in entry["data_offsets"])
            dtype, shape = _DTYPES.get(entry["dtype"]), entry["shape"]
            if dtype is None:
                faults.append(f"{path}: {name}: expected one of {', '.join(_DTYPES)}; got {entry['dtype']}")
            elif stop > size or stop - start != torch.Size(shape).numel() * dtype.itemsize:
                faults.append(f"{path}: {name}: expected {shape} {entry['dtype']} inside the file; it is cut short")
            else:
                self._where[name] = (path, entry["dtype"], shape, start, stop)

    def shape_of(self, name: str) -> tuple[int, ...]:
        """Return a tensor's shape without reading it."""
        return tuple(self._where[name][2])

    def __getitem__(self, name: str) -> Tensor:
        path, dtype, shape, start, stop = self._where[name]
        if stop == start:
            return torch.empty(shape, dtype=_DTYPES[dtype])
        if path not in self._maps:
            with path.open("rb") as file:
                self._maps[path] = mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_COPY)
        view = memoryview(self._maps[path])[start:stop]
        return torch.frombuffer(view, dtype=torch.uint8).clone().view(_DTYPES[dtype]).view(shape)

    def __iter__(self) -> Iterator[str]:
        return iter(self._where)

    def __len__(self) -> int:
        return len(self._where)


def save_pretrained(model: LongcatFlash, folder: Path, config: Mapping[str, Any]) -> None:
    """Write ``config.json`` and one ``model.safetensors`` with the published names."""
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "config.json").write_text(json.dumps(dict(config), indent=1), encoding="utf-8")
    names = {dtype: name for name, dtype in _DTYPES.items()}
    header, at = {}, 0
    state = {name: tensor.contiguous().cpu() for name, tensor in hf_state_dict(model).items()}
    for name, tensor in state.items():
        header[name] = {
            "dtype": names[tensor.dtype],
            "shape": list(tensor.shape),
            "data_offsets": [at, at + tensor.nbytes],
        }
        at += tensor.nbytes
    text = json.dumps(header).encode()
    text += b" " * (-len(text) % 8)
    with (folder / "model.safetensors").open("wb") as file:
        file.write(len(text).to_bytes(8, "little") + text)
        for tensor in state.values():
            file.write(tensor.view(-1).view(torch.uint8).numpy().tobytes())


def from_pretrained(cls: type[LongcatFlash], folder: Path, **kwargs: Any) -> LongcatFlash:
    """Return a model with the weights of ``folder``; MTP is built where the shards hold it, unless ``mtp`` says."""
    spec = ModelSpec.from_hf_config(folder)
    state = SafetensorsFolder(folder)
    kwargs.setdefault("mtp", any(name.startswith("model.mtp.") for name in state))
    model = cls(spec, **kwargs)
    load_hf_state_dict(model, state)
    return model
