"""Scripts of the experiments as modules."""

import importlib.util
import pathlib

ROOT = pathlib.Path(__file__).parent.parent


def script(*path):
  """Of experiments/ the one at `path`."""
  path = ROOT.joinpath("experiments", *path)
  spec = importlib.util.spec_from_file_location(path.stem, path)
  module = importlib.util.module_from_spec(spec)
  spec.loader.exec_module(module)
  return module
