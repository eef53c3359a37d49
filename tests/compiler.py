"""A mark for tests of the kernels that are compiled where they run."""

import pytest

from spec_stream.models import native

# One that is there and cannot compile them makes these fail.
compiled = pytest.mark.skipif(
  not native.find_compiler(), reason="there is no C++ compiler"
)
