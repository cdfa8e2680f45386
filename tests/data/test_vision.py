import subprocess
import sys
import textwrap

from batchens.data.vision import import_datasets
from batchens.files import ROOT

ASKS_FOR_AN_OPERATOR = """
from . import left_behind
from torch import library as operators
operators.register_fake("torchvision::nms")(lambda dets, scores, iou_threshold: dets)
operators.register_fake("torchvision::qnms")(lambda dets, scores, iou_threshold: dets)
from . import datasets
"""


def test_imports_the_installed_torchvision_and_does_so_again():
    assert import_datasets().CIFAR10.__name__ == "CIFAR10"
    assert import_datasets() is import_datasets()


def run_with_torchvision(folder, package, code):
    (folder / "torchvision").mkdir()
    for name, text in package.items():
        (folder / "torchvision" / name).write_text(text)
    preamble = f"import sys; sys.path.insert(0, {str(folder)!r})\n"
    code = preamble + "from batchens.data.vision import import_datasets\n" + textwrap.dedent(code)
    return subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=60, cwd=ROOT)


def test_declares_missing_operators_and_runs_every_submodule_again(tmp_path):
    package = {
        "__init__.py": ASKS_FOR_AN_OPERATOR,
        "left_behind.py": "import builtins\nbuiltins.runs = getattr(builtins, 'runs', 0) + 1",
        "datasets.py": "CIFAR10 = 'here'",
    }
    ran = run_with_torchvision(
        tmp_path,
        package,
        """
        import builtins
        assert import_datasets().CIFAR10 == "here"
        assert builtins.runs == 2, builtins.runs
        """,
    )
    assert ran.returncode == 0, ran.stderr


def test_other_failures_of_torchvision_are_not_hidden(tmp_path):
    package = {"__init__.py": "raise RuntimeError('compiled with different CUDA major versions')"}
    ran = run_with_torchvision(tmp_path, package, "import_datasets()")
    assert ran.returncode != 0
    assert "RuntimeError: compiled with different CUDA major versions" in ran.stderr
