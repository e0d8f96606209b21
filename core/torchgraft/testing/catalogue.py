"""All checks by name, in the order in which they run: basic checks come before those that depend on them."""

from __future__ import annotations

from torchgraft.testing import arithmetic, extremes, forwarding, living, merging, start, training
from torchgraft.testing.checks import Check

CHECKS: dict[str, Check] = {
    member.name: member
    for module in (start, forwarding, training, arithmetic, merging, living, extremes)
    for member in vars(module).values()
    if isinstance(member, Check)
}
