"""A job on Cloud TPU VMs, by gcloud: a slice is made, used, and deleted.

  launch/cluster/tpu_vm.py --name=e2e --topology=v5e:4x4 --zone=us-west4-a \\
    --project=PROJECT --bucket=my-runs --command='launch/train.py
    --config=configs/e2e_nlg.py --config.mesh.fsdp=4
    --config.data.batch_size=16 --workdir=/data/runs/e2e'

Prints the script; --execute runs it. The project's committed files are copied
to every host and installed there, and gcsfuse mounts the bucket as /data. With
--keep the slice stays, and is used again by a second call. Generations after
v6e are not made by this interface of gcloud.
"""

import shlex

import jobs
from absl import flags

import common

_TOPOLOGY = flags.DEFINE_string(
  "topology", None, "Kind and topology of the slice, such as v5e:4x4."
)
_ZONE = flags.DEFINE_string("zone", None, "Zone of the slice.")
_PROJECT = flags.DEFINE_string("project", None, "Project that pays.")
_BUCKET = flags.DEFINE_string("bucket", "", "Cloud Storage bucket of the runs.")
_SPOT = flags.DEFINE_bool("spot", False, "A slice that may be preempted.")
_KEEP = flags.DEFINE_bool("keep", False, "Leave the slice when all is done.")
flags.mark_flags_as_required(["topology", "zone", "project"])

# On each host. The mount may be left from an earlier call.
_INSTALL = f"""set -e
mkdir -p spec_stream && tar -xzf spec_stream.tar.gz -C spec_stream
cd spec_stream
sudo apt-get update -qq
sudo apt-get install -y -qq python3-venv >/dev/null
command -v gcsfuse >/dev/null || sudo apt-get install -y -qq gcsfuse >/dev/null
SPEC_STREAM_EXTRAS=tpu bash -c '. launch/environment.sh'
if ! mountpoint -q {jobs.MOUNT}; then
  sudo mkdir -p {jobs.MOUNT} && sudo chown "$USER" {jobs.MOUNT}
  gcsfuse --implicit-dirs BUCKET {jobs.MOUNT}
fi
"""


def script(
  name: str,
  where: jobs.Slice,
  zone: str,
  project: str,
  bucket: str,
  command: list[str],
  *,
  spot: bool = False,
  keep: bool = False,
) -> str:
  """The shell script: make, install, run, and delete."""
  install = shlex.quote(_INSTALL.replace("BUCKET", bucket))
  run = shlex.quote(f"cd spec_stream && .venv/bin/python {shlex.join(command)}")
  create = " ".join(
    [
      f"tpu create {name} --accelerator-type={where.accelerator_type}",
      f"--version={where.generation.runtime}",
      *(["--spot"] if spot else []),
    ]
  )
  delete = f"tpu delete {name} --quiet"
  return "\n".join(
    [
      "#!/usr/bin/env bash",
      "set -euo pipefail",
      "tpu() {  # ACTION NAME FLAGS...",
      f'  gcloud compute tpus tpu-vm "$@" --zone={shlex.quote(zone)} '
      f"--project={shlex.quote(project)}",
      "}",
      f"tpu describe {name} >/dev/null 2>&1 || {create}",
      *([] if keep else [f"trap '{delete}' EXIT"]),
      "files=$(mktemp -d)/spec_stream.tar.gz",
      f"git -C {shlex.quote(str(common.ROOT))} archive --format=tar.gz "
      '--output="$files" HEAD',
      f'tpu scp "$files" {name}:spec_stream.tar.gz --worker=all',
      f"tpu ssh {name} --worker=all --command={install}",
      f"tpu ssh {name} --worker=all --command={run}",
      "",
    ]
  )


def main(argv):
  del argv
  jobs.check_name(jobs.NAME.value)
  where = jobs.parse_slice(_TOPOLOGY.value)
  bucket = jobs.check_bucket(_BUCKET.value)
  text = script(
    jobs.NAME.value,
    where,
    _ZONE.value,
    _PROJECT.value,
    bucket,
    jobs.parse_command(
      jobs.COMMAND.value, where.chips, where.hosts, mounted=True
    ),
    spot=_SPOT.value,
    keep=_KEEP.value,
  )
  jobs.run("script", ["bash"], text)


if __name__ == "__main__":
  common.run(main)
