"""lepton-launch: one short function a verb.

Nothing heavy is imported here: `lepton-launch --help` answers before torch would have loaded.
"""

from __future__ import annotations

import gc
import sys

from launcher.cli import calibrate, checkpoints, doctor, jobs, models, recipes, run  # noqa: F401  verbs join the app as they are imported
from launcher.cli.app import VERBS, app

__all__ = ["VERBS", "app", "main"]


def main() -> None:
    """The entry point. A terminal that cannot show a character shows a question mark, not an error."""
    gc.set_threshold(100_000)  # a plan makes many small objects and few cycles; scanning for those took a tenth of a dry run
    for stream in (sys.stdout, sys.stderr):
        if hasattr(stream, "reconfigure"):
            stream.reconfigure(errors="replace")
    app(prog_name="lepton-launch")
