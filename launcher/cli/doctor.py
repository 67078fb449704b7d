"""doctor: what this machine has and what works on it."""

from __future__ import annotations

import dataclasses
import sys

import typer

from launcher.cli.app import JsonOption, app, print_json


@app.command()
def doctor(as_json: JsonOption = False) -> None:
    """Look at versions, devices, memory, disks and networks, and say what works here and what does not."""
    from launcher.doctor import examine, list_abilities
    from launcher.view import print_findings

    findings, abilities = examine(), list_abilities()
    broken = [finding.name for finding in findings if finding.health == "broken"]
    if as_json:
        facts = {"findings": [dataclasses.asdict(f) for f in findings], "abilities": [dataclasses.asdict(a) for a in abilities]}
        print_json({"ok": not broken} | facts)
    else:
        print_findings(findings, abilities, sys.stdout)
    raise typer.Exit(1 if broken else 0)
