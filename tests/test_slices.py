"""The scripts of experiments/slices."""

import json
import os
import subprocess

import pytest
from scripts import ROOT, script


def test_each_slice_is_compiled_for_once(tmp_path):
  """With a compiler that notes what it was asked for, and fails once."""
  fake = tmp_path / "python"
  fake.write_text(f"""#!/usr/bin/env bash
echo "$*" >> {tmp_path}/asked
for word in "$@"; do
  case $word in
    *v6e_2x2-llama2_70b-J7-train*) [ -e {tmp_path}/well ] || exit 1 ;;&
    --out=*) echo '{{}}' > "${{word#--out=}}" ;;
  esac
done
""")
  fake.chmod(0o755)
  asked = tmp_path / "asked"

  def call(*args):
    asked.write_text("")
    command = [ROOT / "experiments" / "slices" / "run.sh", *args]
    environ = {**os.environ, "PYTHON": str(fake)}
    done = subprocess.run(command, capture_output=True, text=True, env=environ)
    return done, asked.read_text().splitlines()

  out = tmp_path / "rows"
  _, few = call(out, "v5e_4x4-llama3_8b-J3")
  assert len(few) == 2 and all("--streams=3 " in line for line in few)
  assert "--config.mesh.fsdp=2 --config.mesh.tensor=8" in few[0]
  assert "--config.mesh.fsdp=16 --config.data.batch_size=16" in few[1]
  done, rest = call(out)
  assert len(rest) == 94 and done.returncode == 1
  assert "v6e_2x2-llama2_70b-J7-train.log" in done.stderr
  (tmp_path / "well").touch()
  done, again = call(out)
  assert len(again) == 1 and done.returncode == 0
  assert len(list(out.glob("*.jsonl"))) == 96
  assert call()[0].returncode == 2


def test_rows_of_slices_become_two_tables(tmp_path, capsys):
  tables = script("slices", "table.py")
  about = {"topology": "v5e:4x4", "shape": "llama3_8b"}
  plain = about | {
    "program": "decode 1 x 2048, 1 nodes",
    "num_streams": 0,
    "fits": True,
    "memory": {"arguments": 1.5e9, "temporaries": 2.5e8, "total": 1.75e9},
    "flops": 2e9,
    "bytes": 9e8,
    "collectives": {"all-reduce": [3, 2e6], "all-gather": [1, 5e5]},
    "roofline_ms": 1.25,
    "bound": "memory",
  }
  fast = plain | {
    "program": "decode 1 x 2048, 16 nodes",
    "num_streams": 3,
    "flops": 3.6e10,
    "bytes": 9.9e8,
    "bound": "FLOPs",
  }
  large = about | {
    "program": "train 4 x 1024",
    "num_streams": 1,
    "fits": False,
    "used": "33.9G",
  }
  unread = about | {
    "program": "train 4 x 1024",
    "num_streams": 7,
    "fits": True,
    "memory": plain["memory"],
    "flops": 5e12,
  }
  alone = unread | {
    "num_streams": 3,
    "bytes": 2e9,
    "collectives": {},
    "roofline_ms": 250.4,
    "bound": "links",
  }
  for i, row in enumerate((fast, plain, large, unread, alone)):
    (tmp_path / f"{i}.jsonl").write_text(json.dumps(row) + "\n")
  assert tables.main([str(tmp_path)]) == 0
  lines = capsys.readouterr().out.splitlines()
  assert [line for line in lines if line.startswith("| ")][1:] == [
    "| v5e 4x4, Llama-3.1-8B | 0 | 1.50 + 0.25 | 2 | 0.9 | 4, 2.5 MB | "
    "1.25, memory |",
    "|  | 3 | 1.50 + 0.25 | 36, 18.00 | 0.99, 1.10 | 4, 2.5 MB | "
    "1.25, arithmetic |",
    "| slice, shape | J | held + temporaries, GB | GFLOP | bytes, GB | "
    "collectives | roofline, ms |",
    "| v5e 4x4, Llama-3.1-8B | 1 | does not fit: 33.9G |  |  |  |  |",
    "|  | 3 | 1.50 + 0.25 | 5,000 | 2 | 0, 0.0 MB | 250, links |",
    "|  | 7 | 1.50 + 0.25 | 5,000 | unread | unread | "
    "at least 25.4, arithmetic |",
  ]
  assert tables.main(["nowhere"]) == 2
  other = json.dumps(plain | {"topology": "v4:2x2x1"})
  (tmp_path / "9.jsonl").write_text(other)
  with pytest.raises(SystemExit, match="9.jsonl: v4:2x2x1, llama3_8b is no"):
    tables.main([str(tmp_path)])
