"""No module hides a public name, and neither `import torchgraft` nor its version costs an import of torch."""

from __future__ import annotations

import subprocess
import sys


def in_a_fresh_interpreter(program: str) -> None:
    """Run `program`, which must succeed without a warning."""
    done = subprocess.run([sys.executable, "-W", "ignore", "-c", program], capture_output=True, text=True, timeout=300, check=False)
    assert (done.returncode, done.stderr) == (0, "")


def test_no_module_hides_a_public_name() -> None:
    """Importing a module sets an attribute of its package, so a module called like a public name would replace it."""
    in_a_fresh_interpreter("""
import importlib, pkgutil, torchgraft
before = {name: getattr(torchgraft, name) for name in torchgraft.__all__}
modules = [module.name for module in pkgutil.walk_packages(torchgraft.__path__, "torchgraft.")]
assert len(modules) > 50, modules
for module in modules:
    importlib.import_module(module)
hidden = [name for name in torchgraft.__all__ if getattr(torchgraft, name) is not before[name]]
assert not hidden, hidden
""")


def test_the_package_and_its_version_import_no_torch() -> None:
    in_a_fresh_interpreter("""
import sys, torchgraft
assert "torch" not in sys.modules, "import torchgraft"
assert torchgraft.__version__
assert "torch" not in sys.modules, "torchgraft.__version__"
""")
