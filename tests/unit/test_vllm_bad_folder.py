"""Folders of recorded vLLM runs that are damaged: each fault says where it is, what was expected, and what it got."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from longcat_sim.errors import MeasurementError, WorkloadError
from longcat_sim.studies.validate.vllm_folder import RunFolder
from longcat_sim.studies.validate.vllm_run import Recording
from tests.unit.test_vllm_folder import MOE, make, remarks

__all__ = ["make"]  # the fixture

pytestmark = pytest.mark.filterwarnings("ignore::UserWarning")


def last_cell(path: Path, value: str) -> None:
    *rows, last = path.read_text().splitlines()
    path.write_text("\n".join([*rows, ",".join([*last.split(",")[:-1], value])]) + "\n")


@pytest.mark.parametrize("table", ["dense", "per_sequence", "attention", "moe"])
@pytest.mark.parametrize("time", ["-5.0", "0", "nan", "fast"])
def test_a_time_that_is_not_positive_is_refused_with_its_line(make: Any, table: str, time: str) -> None:
    path = make("run", model=MOE) / "profile" / "tp1" / f"{table}.csv"
    last_cell(path, time)
    line = len(path.read_text().splitlines())
    with pytest.raises(MeasurementError) as caught:
        Recording.read(path.parents[2])
    assert f"{table}.csv:{line}: expected " in str(caught.value)
    assert time in str(caught.value)


@pytest.mark.parametrize(("table", "column"), [("dense", 1), ("attention", 3), ("moe", 2)])
def test_a_negative_size_is_refused_with_its_line(make: Any, table: str, column: int) -> None:
    path = make("run", model=MOE) / "profile" / "tp1" / f"{table}.csv"
    head, first, *rest = path.read_text().splitlines()
    cells = first.split(",")
    cells[column] = "-8"
    path.write_text("\n".join([head, ",".join(cells), *rest]))
    with pytest.raises(MeasurementError, match=rf"{table}\.csv:2: expected sizes of 0 or more; got '.*-8"):
        Recording.read(path.parents[2])


@pytest.mark.parametrize(
    ("row", "words"),
    [
        ("8,0,10,20,-4,", r"skew\.csv:2: expected a time above 0 us"),
        (",,,,4,[[1; 512]]", r"skew\.csv:2: expected requests_json as \[\[query, history\], ...\]"),
    ],
)
def test_a_damaged_case_of_unequal_contexts_is_refused(make: Any, row: str, words: str) -> None:
    folder = make("run")
    (folder / "profile" / "tp1" / "skew.csv").write_text(f"n,pc,t_mean_us,t_max_us,t_skew_us,requests_json\n{row}\n")
    with pytest.raises(MeasurementError, match=words):
        Recording.read(folder)


@pytest.mark.parametrize("name", ["profile/tp1/attention.csv", "profile/tp1/dense.csv", "requests.jsonl", "meta.json"])
def test_what_is_no_text_is_refused_by_name(make: Any, name: str) -> None:
    folder = make("run")
    (folder / name).write_bytes(b"\x1f\x8b\x00\xff\xfe" * 40)
    with pytest.raises(
        (MeasurementError, WorkloadError), match=rf"{name}(:\d+)?: expected (a CSV table|one JSON|JSON)"
    ):
        Recording.read(folder)


def test_a_file_or_nothing_instead_of_the_folder(make: Any) -> None:
    folder = make("run")
    for path, got in ((folder / "meta.json", "a file"), (folder / "nowhere", "no such folder")):
        with pytest.raises(MeasurementError, match=rf"expected the folder of .*requests\.jsonl.*; got {got}; give"):
            RunFolder.read(path)


@pytest.mark.parametrize("size", ["96GB", -1, True])
def test_memory_is_a_number_of_gib(make: Any, size: Any) -> None:
    instance = {"model_name": "Qwen/Qwen3-32B", "npu_mem": {"mem_size": size}}
    folder = make("run", config={"nodes": [{"instances": [instance]}]})
    with pytest.raises(MeasurementError, match=r"npu_mem\.mem_size: expected GiB as a number, such as 96; got"):
        Recording.read(folder)


@pytest.mark.parametrize(
    ("change", "says"),
    [
        ({"hardware": "H100"}, "hardware: the run had CARD, the profile is of H100"),
        (
            {"model": "meta-llama/Llama-3.1-8B"},
            "model: the run had Qwen/Qwen3-32B, the profile is of meta-llama/Llama-3.1-8B",
        ),
        ({"vllm_version": "0.19.0"}, "vllm_version: the run had 0.28.0, the profile is of 0.19.0"),
        ({"hardware": "ca-rd", "model": "Qwen3-32B", "vllm_version": "v0.28.1+cu130"}, ""),
        ({"vllm_version": "main"}, ""),  # says nothing
    ],
)
def test_a_profile_of_another_card_model_or_version_is_said(make: Any, change: dict[str, str], says: str) -> None:
    instance = {"model_name": "Qwen/Qwen3-32B", "hardware": "CARD", "npu_mem": {"mem_size": 96, "mem_util": 0.9}}
    folder = make("run", config={"nodes": [{"instances": [instance]}]})
    sheet = {"hardware": "CARD", "model": "Qwen/Qwen3-32B"} | change
    (folder / "profile" / "meta.yaml").write_text(json.dumps(sheet))
    found = [each for each in remarks(folder) if "the profile is of" in each]
    assert [says in each for each in found] == ([True] if says else [])


def test_a_local_path_of_a_model_is_no_other_model(make: Any) -> None:
    for path, says in (("/data/model", False), ("Qwen/Qwen3-30B-A3B", True)):
        folder = make(path.replace("/", "-"), model=path)
        assert any("model: the run had" in each for each in remarks(folder)) == says


@pytest.mark.parametrize("nodes", [5, [None], [{"instances": ["x"]}], [{"instances": [{"npu_mem": "96"}]}]])
def test_a_damaged_deployment_is_refused(make: Any, nodes: Any) -> None:
    with pytest.raises(MeasurementError, match=r"config\.json: nodes: expected a list such as"):
        RunFolder.read(make("run", config={"nodes": nodes}))


@pytest.mark.parametrize("damage", [lambda d: d.pop("vllm_version"), lambda d: d.update(vllm_version="nightly")])
def test_a_version_that_cannot_be_read_is_not_called_missing(make: Any, damage: Callable[[dict], Any]) -> None:
    folder = make("run")
    document = json.loads((folder / "meta.json").read_text())
    damage(document)
    (folder / "meta.json").write_text(json.dumps(document))
    said = "no release in vllm_version 'nightly'" if "vllm_version" in document else "no vllm_version:"
    assert [each for each in remarks(folder) if said in each]
