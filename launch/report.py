"""Writes one self-contained HTML page about a run, and prints its path.

  launch/report.py --workdir=runs/quickstart [--out=page.html]

It shows what lies in the workdir: the training curves, the newest benchmark
and the older ones, tokens per call along the output, what a larger tree costs,
and one prompt call by call. What was not run is said on the page.
"""

from absl import flags

import common
from spec_stream import report

_WORKDIR = flags.DEFINE_string("workdir", None, "Directory of the run.")
_OUT = flags.DEFINE_string(
  "out", None, "Where to write the page (default: <workdir>/report.html)."
)
flags.mark_flag_as_required("workdir")


def main(_):
  print(report.write(_WORKDIR.value, _OUT.value))


if __name__ == "__main__":
  common.run(main)
