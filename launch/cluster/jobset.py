"""A job on a TPU slice of Google Kubernetes Engine, as a JobSet.

  launch/cluster/jobset.py --name=e2e --topology=v5e:4x4 --bucket=my-runs \\
    --image=IMAGE --command='launch/train.py --config=configs/e2e_nlg.py
    --config.mesh.fsdp=4 --config.data.batch_size=16 --workdir=/data/runs/e2e'

Prints the manifest; --execute gives it to `kubectl apply`. The cluster needs
the JobSet controller, a node pool of that topology, and the Cloud Storage FUSE
driver, by which all hosts see the bucket as /data. A bucket with a hierarchical
namespace renames directories in one step, as checkpoints want it.

A preempted pod saves, ends with code 143, and the JobSet starts all of them
again, --max_restarts times: the training goes on from its last checkpoint.
"""

import jobs
import yaml
from absl import flags

import common

_TOPOLOGY = flags.DEFINE_string(
  "topology", None, "Kind and topology of the slice, such as v5e:4x4."
)
_BUCKET = flags.DEFINE_string("bucket", "", "Cloud Storage bucket of the runs.")
_IMAGE = flags.DEFINE_string(
  "image", None, "Container image, as launch/cluster/Dockerfile makes it."
)
_NAMESPACE = flags.DEFINE_string("namespace", "default", "Of the cluster.")
_ACCOUNT = flags.DEFINE_string(
  "service_account", "default", "Kubernetes account that may use the bucket."
)
_SPOT = flags.DEFINE_bool("spot", False, "On nodes that may be preempted.")
_RESTARTS = flags.DEFINE_integer(
  "max_restarts", 20, "Times that a stopped job is started again.", 0
)
_GRACE = flags.DEFINE_integer(
  "grace_seconds", 300, "From SIGTERM to SIGKILL: time to save.", 1
)
flags.mark_flags_as_required(["topology", "image"])


def manifest(
  name: str,
  where: jobs.Slice,
  bucket: str,
  image: str,
  command: list[str],
  *,
  namespace: str = "default",
  service_account: str = "default",
  spot: bool = False,
  max_restarts: int = 20,
  grace_seconds: int = 300,
) -> dict:
  """The JobSet: a pod for each host of the slice."""
  chips = where.chips // where.hosts
  nodes = {
    "cloud.google.com/gke-tpu-accelerator": where.generation.gke,
    "cloud.google.com/gke-tpu-topology": where.topology,
  }
  if spot:
    nodes["cloud.google.com/gke-spot"] = "true"
  container = {
    "name": "spec-stream",
    "image": image,
    "command": ["python", *command],
    "ports": [{"containerPort": 8471}, {"containerPort": 8476}],
    "resources": {
      "requests": {"google.com/tpu": chips},
      "limits": {"google.com/tpu": chips},
    },
    "volumeMounts": [{"name": "runs", "mountPath": jobs.MOUNT}],
  }
  pod = {
    "restartPolicy": "Never",
    "serviceAccountName": service_account,
    "terminationGracePeriodSeconds": grace_seconds,
    "nodeSelector": nodes,
    "containers": [container],
    "volumes": [
      {
        "name": "runs",
        "csi": {
          "driver": "gcsfuse.csi.storage.gke.io",
          "volumeAttributes": {
            "bucketName": bucket,
            "mountOptions": "implicit-dirs",
          },
        },
      }
    ],
  }
  exclusive = "alpha.jobset.sigs.k8s.io/exclusive-topology"
  return {
    "apiVersion": "jobset.x-k8s.io/v1alpha2",
    "kind": "JobSet",
    "metadata": {
      "name": name,
      "namespace": namespace,
      "annotations": {exclusive: "cloud.google.com/gke-nodepool"},
    },
    "spec": {
      "failurePolicy": {"maxRestarts": max_restarts},
      "replicatedJobs": [
        {
          "name": "slice",
          "replicas": 1,
          "template": {
            "spec": {
              "parallelism": where.hosts,
              "completions": where.hosts,
              "backoffLimit": 0,
              "template": {
                "metadata": {"annotations": {"gke-gcsfuse/volumes": "true"}},
                "spec": pod,
              },
            }
          },
        }
      ],
    },
  }


def main(argv):
  del argv
  jobs.check_name(jobs.NAME.value)
  where = jobs.parse_slice(_TOPOLOGY.value)
  bucket = jobs.check_bucket(_BUCKET.value)
  command = jobs.parse_command(
    jobs.COMMAND.value, where.chips, where.hosts, mounted=True
  )
  made = manifest(
    jobs.NAME.value,
    where,
    bucket,
    _IMAGE.value,
    command,
    namespace=_NAMESPACE.value,
    service_account=_ACCOUNT.value,
    spot=_SPOT.value,
    max_restarts=_RESTARTS.value,
    grace_seconds=_GRACE.value,
  )
  text = yaml.safe_dump(made, sort_keys=False, width=10**6)
  jobs.run("kubectl apply", ["kubectl", "apply", "-f", "-"], text)


if __name__ == "__main__":
  common.run(main)
