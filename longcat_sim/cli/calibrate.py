"""``calibrate``: fit operator times to measurements and write them into a hardware profile."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer


def run(
    name: Annotated[str, typer.Option(help="Name of the hardware profile.")],
    measurements: Annotated[
        Path | None, typer.Argument(help="A file that `profile` wrote, or published records (.yaml).")
    ] = None,
    out: Annotated[Path | None, typer.Option(help="The profile; hardware_profiles/NAME.yaml unless given.")] = None,
    tables: Annotated[Path | None, typer.Option(help="aiconfigurator-core's tables, if it is not installed.")] = None,
    backend: Annotated[
        str, typer.Option(help="Fit published kernels of this engine: trtllm, sglang or vllm. Needs --out.")
    ] = "",
) -> None:
    """Fit operator times to measurements and write them into a hardware profile.

    Lines that cannot be read are left out and named; a file with more than 5 % of them is refused. With --backend no
    file is needed: the tables are those of aiconfigurator-core (`pip install aiconfigurator-core pyarrow`).
    """
    from longcat_sim.calibration.published import engines_of
    from longcat_sim.cli.output import say
    from longcat_sim.errors import MeasurementError
    from longcat_sim.records.measurement import load_measurements, skipped_lines
    from longcat_sim.studies.measure import calibrate, calibrate_published, error_table

    is_published = measurements is None or measurements.suffix in (".yaml", ".yml")
    if backend and not is_published:
        raise MeasurementError(f"--backend {backend}: expected published tables; got {measurements}; leave one out")
    if tables is not None and not is_published:
        raise MeasurementError(f"--tables {tables}: expected published tables; got {measurements}; leave one out")
    if measurements is None and not backend:
        raise MeasurementError("MEASUREMENTS: expected a file that `profile` wrote, such as m.jsonl; got none")
    if measurements is None or is_published:
        times = calibrate_published(measurements, name, tables, out, backend)
    else:
        times = calibrate(measurements, name, out)
        skipped = load_measurements(measurements).skipped
        if skipped:
            say(f"{measurements}{skipped_lines(skipped)}")
    print(f"{'kind':18} {'dtype':6} {'split':20} {'MAPE':>7} {'90 % covers':>12} {'points':>7}")
    for kind, dtype, variant, split, mape, coverage, count in error_table(times):
        covers = "" if coverage is None else f"{coverage:.0%}"
        print(f"{kind + (' ' + variant if variant else ''):18} {dtype:6} {split:20} {mape:7.1%} {covers:>12} {count:7}")
    if times.collectives_ is not None:
        curves = times.collectives_.curves_
        kinds, ranks = (sorted({getattr(curve, name) for curve in curves}) for name in ("kind", "ranks"))
        print(f"collectives: {', '.join(kinds)} over {', '.join(map(str, ranks))} ranks")
    others = [
        f"{' '.join(filter(None, law.key))} ({' and '.join(sorted(engines_of(law)))})"
        for law in times.laws_.values() if backend and engines_of(law) != {backend}
    ]  # fmt: skip
    if others:
        print(f"not of {backend} alone, which has no such table: {', '.join(others)}")
    for reason, count in times.provenance.get("left_out", {}).items():
        print(f"left out: {count} rows of {reason}")
    beside = times.provenance.get("contention")
    if beside:
        print(
            f"side by side: {beside['ops']} ops at {beside['measured_rate']:.2f} of their speed alone on average, "
            f"predicted {beside['predicted_rate']:.2f}, each off by {beside['mean_difference']:.2f}"
        )
    say(f"fit written to {out or f'hardware_profiles/{name}.yaml'}")
