"""The README's snippets run as they stand, on a run trained for a few steps."""

import os
import pathlib
import re
import shlex
import subprocess
import sys

import pytest

ROOT = pathlib.Path(__file__).parent.parent
README = (ROOT / "README.md").read_text()
# What makes a snippet short enough for a test; nothing else is changed.
SHORTER = {
  "train.py": ["--config.train.steps=3", "--config.data.batch_size=4"],
  "evaluate.py": ["--prompts=2", "--max_new_tokens=8"],
  "benchmark.py": ["--prompts=2", "--max_new_tokens=8"],
}


def blocks(language: str) -> list[str]:
  return re.findall(rf"^```{language}\n(.*?)^```", README, re.S | re.M)


def run(command: list[str], folder: pathlib.Path):
  links = {name: folder / name for name in ("launch", "configs")}
  for name, link in links.items():
    if not link.exists():
      link.symlink_to(ROOT / name)
  env = dict(os.environ, PYTHONPATH=str(ROOT), JAX_PLATFORMS="cpu")
  return subprocess.run(
    command, cwd=folder, env=env, capture_output=True, text=True, timeout=300
  )


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
  """The shell snippet's commands, run in order in a folder of their own."""
  folder = tmp_path_factory.mktemp("readme")
  (lines,) = blocks("sh")
  outputs = {}
  for line in lines.splitlines():
    command = shlex.split(line)
    assert command[0] == "python"
    name = pathlib.Path(command[1]).name
    done = run([sys.executable, *command[1:], *SHORTER.get(name, [])], folder)
    assert done.returncode == 0, f"{line}\n{done.stdout}\n{done.stderr}"
    outputs[name] = done.stdout
  return folder, outputs


@pytest.mark.slow
def test_shell_snippet(folder):
  folder, outputs = folder
  assert set(outputs) >= {"train.py", "generate.py", "benchmark.py"}
  assert "streams" in outputs["benchmark.py"]
  assert (folder / "runs/restaurants/report.html").stat().st_size > 1000


@pytest.mark.slow
def test_python_snippet(folder):
  (code,) = blocks("python")
  assert len(code.strip().splitlines()) <= 10
  done = run([sys.executable, "-c", code], folder[0])
  assert done.returncode == 0, done.stderr
  assert "tokens per call" in done.stdout


def test_scripts_of_the_readme_exist():
  for script in re.findall(r"launch/\w+\.(?:sh|py)", README):
    assert os.access(ROOT / script, os.R_OK), script


@pytest.mark.parametrize(
  "page",
  [
    path.relative_to(ROOT).as_posix()
    for pattern in ("*.md", "docs/*.md", "experiments/*/*.md")
    for path in sorted(ROOT.glob(pattern))
  ],
)
def test_links_lead_somewhere(page):
  text = (ROOT / page).read_text()
  for link in re.findall(r"\]\(([^)#:\s]+)\)", text):
    assert ((ROOT / page).parent / link).exists(), link
