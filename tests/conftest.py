"""Shared settings of the tests: the CPU, markers, and 64-bit arithmetic."""

import importlib.metadata
import os
import pathlib

# Before anything imports jax. `JAX_PLATFORMS=cuda,cpu pytest -m gpu` works.
os.environ.setdefault("JAX_PLATFORMS", "cpu")
# Hundreds of tiny programs: LLVM's optimiser would take most of the time, and
# half of the rest would go into a code generator for each fusion, without which
# XLA also leaves out a few of its own passes: `XLA_FLAGS= pytest` tests what
# users run. (A flag that a version does not know ends the process; the last
# two were tried with 0.10 alone.)
os.environ.setdefault(
  "XLA_FLAGS",
  "--xla_backend_optimization_level=0 --xla_llvm_disable_expensive_passes=true"
  + (
    " --xla_cpu_use_fusion_emitters=false"
    " --xla_cpu_parallel_codegen_split_count=1"
    if importlib.metadata.version("jaxlib").startswith("0.10.")
    else ""
  ),
)

# A program that a former run left would hide that it no longer compiles.
os.environ["JAX_COMPILATION_CACHE_DIR"] = ""

import hypothesis
import jax
import pytest

# A jitted function compiles at its first example, so time says nothing about
# an example; fixtures here hold no state that an example could change. The
# examples are the same in each run: a failure in CI is one on a desk.
hypothesis.settings.register_profile(
  "spec_stream",
  deadline=None,
  derandomize=True,
  suppress_health_check=[
    hypothesis.HealthCheck.function_scoped_fixture,
    hypothesis.HealthCheck.too_slow,
  ],
)
hypothesis.settings.load_profile("spec_stream")


def pytest_addoption(parser):
  parser.addoption(
    "--slow", action="store_true", help="also run the tests marked slow"
  )


def pytest_collection_modifyitems(config, items):
  """Skips what needs minutes or a device, unless it was asked for."""
  chosen = config.getoption("-m")
  run_slow = config.getoption("--slow") or "slow" in chosen
  for item in items:
    if "slow" in item.keywords and not run_slow:
      item.add_marker(pytest.mark.skip(reason="slow: run with --slow"))
    if "gpu" in item.keywords and jax.default_backend() != "gpu":
      item.add_marker(
        pytest.mark.skip(reason="no GPU: JAX_PLATFORMS=cuda,cpu pytest -m gpu")
      )


@pytest.fixture(autouse=True)
def few_memory_maps():
  """Lets go of compiled programs before they use up the process's maps.

  Linux gives a process 65,530, each program holds hundreds, and with none left
  the interpreter dies.
  """
  yield
  maps = pathlib.Path("/proc/self/maps")
  if maps.exists() and maps.read_bytes().count(b"\n") > 20_000:
    jax.clear_caches()


@pytest.fixture
def x64():
  """64-bit arithmetic within one test, where no difference is allowed."""
  before = jax.config.jax_enable_x64
  jax.config.update("jax_enable_x64", True)
  yield
  jax.config.update("jax_enable_x64", before)
