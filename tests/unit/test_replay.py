"""The command that simulates a search's winner: what it prints is the winner's scenario."""

from __future__ import annotations

import shlex
from pathlib import Path

from longcat_sim.capacity.replay import replay_command
from longcat_sim.cli.output import load
from longcat_sim.specs.base import ParsedFloat
from longcat_sim.specs.scenario import scenario

POOLS = {
    "serve.prefill.replicas": 4, "serve.prefill.deployment": {"num_gpus": 16, "ep_size": 16, "dense_tp_size": None},
    "serve.decode.replicas": 1, "serve.decode.deployment": {"num_gpus": 32, "ep_size": 32, "overlap": "sbo"},
    "serve.decode.hardware": "h200-sxm",
}  # fmt: skip


def test_the_command_simulates_the_fleet_in_the_scenario_as_it_was_changed() -> None:
    name = "longcat-flash-serve-capacity"
    asked = load(name, ["serve.workload.arrivals.rate=40 /s", "search.ep_size=[16]", "draws=1"])
    command = replay_command(asked, POOLS)
    assert command is not None
    *head, verb, source = shlex.split(command)[:5]
    assert (head, verb, source) == (["python", "-m", "longcat_sim"], "simulate", name)
    replayed = load(source, shlex.split(command)[6::2])
    fleet = asked.what_if(POOLS)
    assert replayed.serve == fleet.serve
    assert (replayed.draws, replayed.deployment, replayed.hardware) == (1, fleet.deployment, fleet.hardware)
    assert replayed.serve is not None
    assert "search" not in command


def test_a_file_is_named_as_it_was_given_and_what_has_none_has_no_command(tmp_path: Path) -> None:
    made = load("longcat-flash-h800-decode", ["step.sequences_per_gpu=32"])
    path = tmp_path / "with space.yaml"
    command = replay_command(made, {"deployment.overlap": "tbo"}, str(path))
    assert command is not None
    assert shlex.split(command)[4] == str(path)
    assert replay_command(made.what_if({"hardware.scale_out.bandwidth": ParsedFloat(1e11)}), {}) is None
    assert replay_command(scenario(made._document), {}) is None
