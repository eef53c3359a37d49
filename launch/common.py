"""How every launcher starts: flags, help, and one line for a user's mistake.

`run(main)` is absl's `app.run` with three promises. A mistake of the user (a
wrong flag, config key, path or value) ends in one line `error: ...` on stderr
and exit code 1. Ctrl-C ends in one line and exit code 130. Anything else is a
bug and keeps its traceback.
"""

import difflib
import errno
import os
import pathlib
import re
import sys
import textwrap

from absl import app, flags, logging
from ml_collections import ConfigDict
from ml_collections.config_flags import config_flags

ROOT = pathlib.Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))  # a checkout runs without being installed

from spec_stream.errors import UserError  # noqa: E402

# The machine's refusals: no bug of ours, so no traceback.
_REFUSED = (
  errno.EACCES,
  errno.EPERM,
  errno.EROFS,
  errno.ENOSPC,
  errno.EDQUOT,
  errno.ENOTDIR,
)


def run(main):
  """Parses the flags and calls `main(argv)`; exits with its return value."""
  keep_programs(os.environ)
  app.run(lambda argv: _guard(main, argv), flags_parser=_parse)


def keep_programs(environ):
  """Compiled programs are kept for the next call, in the user's cache folder;
  before jax is imported. JAX's own variables say where else, or not at all."""
  cache = environ.get("XDG_CACHE_HOME") or os.path.expanduser("~/.cache")
  place = os.path.join(cache, "spec_stream", "programs")
  if "JAX_COMPILATION_CACHE_DIR" in environ:
    return
  try:
    os.makedirs(place, exist_ok=True)
  except OSError:
    return
  if os.access(place, os.W_OK):
    environ["JAX_COMPILATION_CACHE_DIR"] = place


def _guard(function, *args):
  """Calls `function(*args)`; what is not a bug becomes one line."""
  try:
    return function(*args)
  except UserError as error:
    _stop(str(error))
  except BrokenPipeError:  # `... | head` has read enough
    os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
    sys.exit(1)
  except OSError as error:
    if error.errno not in _REFUSED:
      raise
    _stop(f"{error.filename or 'writing'}: {error.strerror}")
  except KeyboardInterrupt:
    _stop("stopped by Ctrl-C", prefix="", code=130)


def _stop(message, prefix="error: ", code=1):
  sys.stdout.flush()
  print(prefix + " ".join(message.split()), file=sys.stderr)
  sys.exit(code)


# -- flags -------------------------------------------------------------------


def _parse(argv):
  """argv -> what is left of it; a wrong flag raises nothing but SystemExit."""
  return _guard(_parse_flags, argv)


def _parse_flags(argv):
  configs = _load_configs(argv)
  if {"--help", "-help", "-h", "--helpfull"} & set(argv[1:]):
    print(_help(argv[0], configs))
    sys.exit(0)
  _check_overrides(argv, configs)
  try:
    rest = flags.FLAGS(argv)
  except flags.Error as error:
    raise UserError(_explain(error)) from error
  if not flags.FLAGS["verbosity"].present:  # libraries tell much at INFO
    logging.set_verbosity(logging.WARNING)
  if len(rest) > 1:
    raise UserError(f"unexpected argument {rest[1]!r}: flags begin with --")
  return rest


def _load_configs(argv):
  """-> {flag name: ConfigDict} of the config files that argv names."""
  configs = {}
  for name in filter(lambda n: _is_config(flags.FLAGS[n]), flags.FLAGS):
    value = flags.FLAGS[name].default
    for this, following in zip(argv[1:], [*argv[2:], ""]):
      found = re.fullmatch(rf"--?{name}(?:=(.*))?", this)
      if found:
        value = following if found[1] is None else found[1]
    if not value or not isinstance(value, str):
      continue  # not given: where it is needed, absl says so
    path = value.split(":")[0]
    if not os.path.isfile(path):
      known = sorted(ROOT.glob("configs/**/[!_]*.py"))
      near = ", ".join(os.path.relpath(p) for p in known) or "none found"
      raise UserError(f"--{name}={value}: no such file; configs are: {near}")
    try:
      configs[name] = flags.FLAGS[name].parser.parse(value)
    except UserError as error:  # what get_config raised, in a long wrapping
      raise UserError(f"--{name}={value}: {error.__context__}") from error
  return configs


def _is_config(flag):
  return isinstance(flag.parser, config_flags.ConfigFileFlagParser)


def _check_overrides(argv, configs):
  """Each --config.a.b must name a key of the config; else says what is near."""
  for name, config in configs.items():
    for argument in argv[1:]:
      found = re.match(rf"--?(?:no)?{name}\.([\w.]+)", argument)
      at, path = config, name
      for key in found[1].split(".") if found else ():
        if not isinstance(at, ConfigDict):
          raise UserError(f"--{name}.{found[1]}: {path} is a value, no group")
        if key not in at:
          near = difflib.get_close_matches(key, at, 1)
          hint = f"did you mean {near[0]!r}? " if near else ""
          keys = ", ".join(sorted(at))
          raise UserError(
            f"--{name}.{found[1]}: {path} has no key {key!r}; {hint}"
            f"its keys are: {keys}"
          )
        at, path = at[key], f"{path}.{key}"


def _explain(error):
  """absl's message for a bad flag, in the words of a user."""
  text = str(error)
  missing = re.search(r"Flag --(\S+) must have a value other than None", text)
  if missing:
    return f"--{missing[1]} is needed: {flags.FLAGS[missing[1]].help}"
  if isinstance(error, flags.UnrecognizedFlagError):
    name = error.flagname
    if "." in name and name.split(".")[0] in flags.FLAGS:
      first = name.split(".")[0]
      return f"--{name} needs --{first}=FILE before it"
    near = difflib.get_close_matches(name, list(flags.FLAGS), 1)
    hint = f"did you mean --{near[0]}?" if near else "see --help"
    return f"--{name} is not a flag of {os.path.basename(sys.argv[0])}; {hint}"
  text = re.sub(r"^flag (?=--)", "", text)
  text = re.sub(r"invalid literal for int\(\).*", "must be an integer", text)
  return re.sub(
    r"could not convert string to float.*", "must be a number", text
  )


# -- help --------------------------------------------------------------------


def _help(program, configs):
  """The launcher's docstring, its flags, and the keys of a given config."""
  lines = [(sys.modules["__main__"].__doc__ or "").strip(), "", "Flags:"]
  for flag in sorted(_own_flags(program), key=lambda flag: flag.name):
    unset = flag.default in (None, "", [])
    default = "" if unset else f" (default {flag.default})"
    words = re.sub(r";\s+repeat this option.*", "", flag.help)  # added by absl
    lines.append(f"  --{flag.name}")
    lines += textwrap.wrap(
      f"{words}{default}",
      width=80,
      initial_indent=" " * 6,
      subsequent_indent=" " * 6,
    )
    if _is_config(flag) and flag.name not in configs:
      lines.append(f"      --{flag.name}=FILE --help also lists its keys")
  for name, config in configs.items():
    lines += ["", f"Keys of the given --{name}, with their values:"]
    lines += [f"  --{name}.{key}={value}" for key, value in _leaves(config)]
  return "\n".join(lines)


def _own_flags(program):
  """The flags that files below this folder define, not those of libraries."""
  here = pathlib.Path(__file__).resolve().parent
  own = []
  for module, defined in flags.FLAGS.flags_by_module_dict().items():
    file = getattr(sys.modules.get(module), "__file__", None) or ""
    if module == program or here in pathlib.Path(file).resolve().parents:
      own += defined
  return own


def _leaves(config, prefix=""):
  for key, value in config.items():
    if isinstance(value, ConfigDict):
      yield from _leaves(value, f"{prefix}{key}.")
    else:
      yield prefix + key, value
