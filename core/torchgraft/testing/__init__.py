"""The conformance kit: checks that test a plugin's method on every kind of layer that it claims.

    def test_it() -> None:
        tg.testing.check_plugin("ia3")

The checks follow from what a method declares (`tg.Method`, and which optional hooks it has). Checks of what it does not claim are
skipped, with the reason. The command `adapt plugins check NAME` runs the same checks.
"""

from __future__ import annotations

from torchgraft.testing.catalogue import CHECKS as CHECKS
from torchgraft.testing.report import Report as Report, Result as Result
from torchgraft.testing.running import check_plugin as check_plugin, conformance as conformance, run_checks as run_checks
