"""The conformance kit: checks that prove a plugin's method right, on every kind of layer that it claims.

    def test_it() -> None:
        tg.testing.check_plugin("ia3")

Checks follow what a method declares (`tg.Method`, and which optional hooks it has); what is not claimed is skipped, with
the reason. On the command line it is `adapt plugins check NAME`.
"""

from __future__ import annotations

from torchgraft.testing.catalogue import CHECKS as CHECKS
from torchgraft.testing.report import Report as Report, Result as Result
from torchgraft.testing.running import check_plugin as check_plugin, conformance as conformance, run_checks as run_checks
