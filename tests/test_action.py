"""The GitHub Action: its description fits its script, and the script does what it says in a real git repository."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
import yaml

ROOT = Path(__file__).parents[1]
SCRIPT = ROOT / "scripts" / "diff-in-ci.sh"
SIZES = "--layers 3 --hidden 32 --heads 4 --ffn 48 --visual-tokens 16"
BASE, HEAD = (f"passes:\n  - cut-visual: {{from_layer: {layer}}}\n" for layer in (1, 2))


def test_every_input_reaches_the_script_as_a_variable_and_never_as_code() -> None:
    action = yaml.safe_load((ROOT / "action.yml").read_text())
    (step,) = action["runs"]["steps"]
    assert "${{" not in step["run"]
    assert set(re.findall(r"inputs\.([\w-]+)", str(step["env"]))) == set(action["inputs"])
    used = set(re.findall(r"\bFOVEATE_\w+", SCRIPT.read_text()))
    assert used == set(step["env"]) - {"FOVEATE_ACTION"}
    assert (ROOT / "scripts" / "diff-in-ci.sh").name in step["run"]


def test_our_own_workflow_gives_the_inputs_that_there_are() -> None:
    action = yaml.safe_load((ROOT / "action.yml").read_text())
    workflow = yaml.safe_load((ROOT / ".github" / "workflows" / "ci.yml").read_text())
    (step,) = (s for s in workflow["jobs"]["graphs"]["steps"] if s.get("uses") == "./")
    assert set(step["with"]) <= set(action["inputs"])
    required = {name for name, entry in action["inputs"].items() if entry.get("required")}
    assert required <= set(step["with"])


@pytest.fixture
def repository(tmp_path: Path) -> Path:
    """A recipe at two commits."""
    folder = tmp_path / "repository"
    folder.mkdir()
    git(folder, "init", "--quiet")
    git(folder, "config", "user.email", "a@b.c")
    git(folder, "config", "user.name", "A")
    for text in (BASE, HEAD):
        (folder / "recipe.yaml").write_text(text)
        git(folder, "add", ".")
        git(folder, "commit", "--quiet", "-m", "recipe")
    return folder


def git(folder: Path, *words: str) -> str:
    return subprocess.run(["git", *words], cwd=folder, check=True, capture_output=True, text=True).stdout.strip()


def act(repository: Path, **variables: str) -> tuple[subprocess.CompletedProcess[str], str]:
    """Run the script as the action does; its result and the job summary."""
    summary = repository.parent / "summary.md"
    variables = {
        "FOVEATE_MODEL": "random:llava",
        "FOVEATE_PASSES": "recipe.yaml",
        "FOVEATE_OPTIONS": SIZES,
        "FOVEATE_BASE": git(repository, "rev-parse", "HEAD~1"),
        "FOVEATE_INSTALL": "",
        "GITHUB_STEP_SUMMARY": str(summary),
        "PATH": f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}",
        **variables,
    }
    done = subprocess.run(
        ["bash", str(SCRIPT)], cwd=repository, env={**os.environ, **variables}, capture_output=True, text=True
    )
    return done, summary.read_text() if summary.exists() else ""


@pytest.mark.slow
def test_a_change_is_told_and_gates_are_applied(repository: Path) -> None:
    done, summary = act(repository, FOVEATE_GATES="kv_bytes>+1000%\n\nprefill.flops>+1%\n")
    assert done.returncode == 1, done.stderr
    assert "gate failed: prefill.flops>+1%" in done.stderr
    assert "prefill FLOPs" in summary
    assert "<details>" in summary
    made = {path.name for path in (repository / "foveate-diff").iterdir()}
    assert made == {"base.json", "head.json", "diff.md", "diff.html"}
    assert git(repository, "worktree", "list").count("\n") == 0, "the base's checkout is taken away"


@pytest.mark.slow
def test_a_recipe_that_is_new_has_nothing_to_be_compared_with(repository: Path) -> None:
    (repository / "other.yaml").write_text(HEAD)
    done, summary = act(repository, FOVEATE_PASSES="other.yaml", FOVEATE_GATES="kv_bytes>0")
    assert done.returncode == 0, done.stderr
    assert "is new" in summary and "no gate was checked" in summary


@pytest.mark.slow
def test_inputs_are_words_and_not_code(repository: Path) -> None:
    done, _ = act(repository, FOVEATE_MODEL="$(touch pwned); `touch pwned`")
    assert done.returncode == 2
    assert "error: " in done.stderr
    assert not list(repository.rglob("pwned"))
