"""The command line: one file per verb. Exit codes: 0 done, 2 the input was wrong (all faults at once), 1 our bug."""

from __future__ import annotations

import importlib
import sys

# verb -> (module, one line of help); a verb's module is imported only when the verb runs
VERBS: dict[str, str] = {
    "quickstart": "Measure this machine, fit, simulate 128 GPUs, price a token, and check every prediction.",
    "profile": "Time operators, collectives and contention on this machine.",
    "calibrate": "Fit operator times to measurements and write them into a hardware profile.",
    "simulate": "Simulate a scenario: one step, or an hour of traffic.",
    "capacity": "Search deployments: the cheapest that keeps the service level, what binds it, and why.",
    "train": "Train a small LongCat-Flash by the published recipe, or study the recipe's claims.",
    "topk-study": "Study top-k sparse attention on a real language model and from scratch.",
    "validate": "Print predictions beside published and measured results.",
}


def build(verbs: list[str]):
    """Return the typer application with ``verbs`` loaded."""
    import typer

    app = typer.Typer(
        name="longcat_sim",
        add_completion=False,
        no_args_is_help=True,
        help="An executable LongCat-Flash, its measured operator times, and a simulator of overlap, serving and cost.",
        pretty_exceptions_enable=False,
    )

    @app.callback()
    def _root() -> None:
        """Keep the verbs sub-commands even where only one is loaded."""

    for verb in verbs:
        module = importlib.import_module(f"longcat_sim.cli.{verb.replace('-', '_')}")
        app.command(verb, help=VERBS[verb])(module.run)
    return app


def main(arguments: list[str] | None = None) -> None:
    """Run the command line and exit with its code."""
    from longcat_sim.errors import UserError

    arguments = sys.argv[1:] if arguments is None else arguments
    wanted = next((argument for argument in arguments if not argument.startswith("-")), None)
    app = build([wanted] if wanted in VERBS else list(VERBS))
    try:
        app(args=arguments, prog_name="longcat_sim")
    except UserError as error:
        for fault in error.faults:
            print(f"error: {fault}", file=sys.stderr)
        sys.exit(2)
    except KeyboardInterrupt:
        print("interrupted: nothing half-written was left", file=sys.stderr)
        sys.exit(130)
