"""What can be asked without a sweep."""

from __future__ import annotations

import json
from typing import Annotated

import typer

from orchestrator.cli.face import JsonFlag, app, out, print_table


@app.command()
def methods(
    name: Annotated[str | None, typer.Argument(help="One method, with its knobs.")] = None, as_json: JsonFlag = False
) -> None:
    """What each method needs and can search."""
    from orchestrator.sweep.catalogue import method_facts

    facts = method_facts(name)
    if as_json:
        print(json.dumps(facts if name is None else facts[0]))
        return
    if name is None:
        print_table(
            ["method", "family", "needs", "deploys", "reference"],
            [[f["name"], f["family"], f["needs"], f["deploys"], f["paper"]] for f in facts],
        )
        return
    fact = facts[0]
    out.print(
        f"{fact['name']} ({fact['family']}): {fact['summary']}\n{fact['paper']}\nNeeds {fact['needs']}. "
        f"Serves {', '.join(fact['tasks'])}.",
        markup=False,
    )
    print_table(
        ["knob", "default", "searched by default", "allowed", "what it is"],
        [[k["knob"], str(k["default"]), k["search"], k["allowed"], k["description"]] for k in fact["knobs"]],
    )
