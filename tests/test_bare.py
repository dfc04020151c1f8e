"""The solver, the scan and their benchmarks run where only torch, numpy and safetensors are installed."""

import json
import os
import re
import subprocess
import sys
from pathlib import Path

from places import ROOT

ALLOWED = {"torch", "numpy", "safetensors"}
# What a distribution is imported as, where that is not its own name.
IMPORTED_AS = {"pyyaml": "yaml", "lm-eval": "lm_eval", "huggingface-hub": "huggingface_hub"}

# Runs programs one after another ("--" between them) as if the packages named first were not installed.
BLOCKED = """
import importlib.machinery, itertools, runpy, sys

class Bare(importlib.machinery.PathFinder):
    @classmethod
    def find_spec(cls, name, path=None, target=None):
        return None if name.split(".")[0] in missing else super().find_spec(name, path, target)

missing, words = set(sys.argv[1].split(",")), sys.argv[2:]
sys.meta_path[:] = [Bare if finder is importlib.machinery.PathFinder else finder for finder in sys.meta_path]
for program, *arguments in (list(group) for end, group in itertools.groupby(words, "--".__eq__) if not end):
    sys.argv = [program, *arguments]
    sys.path[0] = program.rpartition("/")[0]
    runpy.run_path(program, run_name="__main__")
"""


def missing_packages() -> list[str]:
    """Every dependency of the project but torch, numpy and safetensors, by the name it is imported under."""
    text = (ROOT / "pyproject.toml").read_text()
    listed = text.split("dependencies = [", 1)[1].split("\n]", 1)[0]
    names = [*re.findall(r'^\s*"([A-Za-z0-9_-]+)', listed, flags=re.MULTILINE), "ray", "pandas", "tokenizers"]
    return sorted({IMPORTED_AS.get(name, name) for name in names} - ALLOWED)


def run_bare(*programs: list[str]) -> str:
    """The output of programs (path and arguments each) in a process in which the other dependencies are missing."""
    words = [word for program in programs for word in ["--", *program]]
    here = os.environ | {"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    command = [sys.executable, "-c", BLOCKED, ",".join(missing_packages()), *words]
    done = subprocess.run(command, capture_output=True, text=True, env=here, check=False)
    assert done.returncode == 0, done.stderr
    return done.stdout


def test_what_is_missing_is_the_rest_of_the_dependencies(tmp_path: Path) -> None:
    missing = missing_packages()
    assert {"transformers", "lm_eval", "datasets", "pydantic", "pyarrow", "yaml", "click", "scipy"} <= set(missing)
    assert not ALLOWED & set(missing)
    program = tmp_path / "imports.py"
    program.write_text("import importlib.util, sys\nprint([n for n in sys.argv[1:] if importlib.util.find_spec(n)])\n")
    assert run_bare([str(program), *missing]) == "[]\n"


SMALL = ["--device", "cpu", "--threads", "1"]
BENCHMARKS = {
    "scan": (["--neurons", "64", "--size", "16", "--vocabulary", "900"], {"ratio_to_product"}),
    "roofline": (["--neurons", "4", "--size", "16", "--vocabulary", "800"], {"outside_share"}),
    "solver": (
        ["--planted", "200", "--size", "8", "--neurons", "2", "--seeds", "1"],
        {"speedup", "projections_ratio", "loss_not_worse", "adamw_between_seeds"},
    ),
    "scaling": (["--quick"], {"workers_speedup"}),
    "support": (["--neurons", "6", "--size", "32", "--vocabulary", "800", "--channels", "5"], {"below_threshold"}),
    "choices": (["--planted", "800", "--size", "16", "--neurons", "4", "--repeats", "1"], {"variants"}),
    "atlas": (["--shape", "small", "--neurons", "48", "--adamw-steps", "5"], {"machine", "small"}),
}


def test_solver_scan_and_benchmarks_run_on_a_bare_machine(tmp_path: Path) -> None:
    programs = [
        [str(ROOT / "evals" / "benchmarks" / f"{name}.py"), *SMALL, *arguments, "--json", str(tmp_path / name)]
        for name, (arguments, _) in BENCHMARKS.items()
    ]
    output = run_bare(*programs)
    assert output.count("\n| ---") >= len(BENCHMARKS)
    for name, (_, figures) in BENCHMARKS.items():
        assert figures <= set(json.loads((tmp_path / name).read_text())), name
