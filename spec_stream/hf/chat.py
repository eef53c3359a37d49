"""Chat templates: messages to the text that a chat model was trained on.

A template is a small Jinja program that comes with a checkpoint. It runs in
jinja2's immutable sandbox, with the names that published templates use.
"""

import datetime
import json
from collections.abc import Mapping, Sequence

from spec_stream import json_text
from spec_stream.errors import UserError


def find(files: Mapping[str, bytes], config: dict) -> str | None:
  """The default template of a checkpoint; None if it has none.

  files: contents by name; config: what tokenizer_config.json holds. A file of
  its own goes before the entry in the config.

  Raises: UserError, one line, for a template that is no text.
  """
  name, found = "tokenizer_config.json", config.get("chat_template")
  if "chat_template.json" in files:
    name = "chat_template.json"
    try:
      found = json_text.parse(files[name])["chat_template"]
    except (ValueError, TypeError, KeyError) as e:
      raise UserError(
        f'{name} must be JSON with the text "chat_template": {e!r:.80}'
      ) from e
  if "chat_template.jinja" in files:
    name = "chat_template.jinja"
    found = files[name].decode("utf-8", "replace")
  try:
    if isinstance(found, list):  # several, by name
      found = {entry["name"]: entry["template"] for entry in found}
    if isinstance(found, dict):
      found = found.get("default")
  except (TypeError, KeyError) as e:
    raise UserError(
      f"{name}: a list of chat templates needs entries with name and template"
    ) from e
  if not isinstance(found, str | None):
    raise UserError(f"{name}: a chat template must be text: {found!r:.60}")
  return found


def render(
  template: str,
  messages: Sequence[Mapping],
  add_generation_prompt: bool,
  special_tokens: Mapping[str, str],
) -> str:
  """The text of a conversation.

  messages: {"role": ..., "content": ...}, the oldest first.
  add_generation_prompt: end with what opens the assistant's answer.
  special_tokens: {"bos_token": "<s>", ...} for the template.

  Raises: UserError, one line: bad messages, a template that does not parse, or
  one that refuses these messages (with its own words).
  """
  import jinja2

  if not messages or not all(
    isinstance(m, Mapping) and "role" in m for m in messages
  ):
    raise UserError(
      'a chat is a list of messages such as {"role": "user", "content": "Hi"}'
    )
  try:
    return (
      _environment()
      .from_string(template)
      .render(
        messages=list(messages),
        tools=None,
        documents=None,
        add_generation_prompt=add_generation_prompt,
        **special_tokens,
      )
    )
  except jinja2.TemplateSyntaxError as e:
    raise UserError(
      f"the chat template does not parse, line {e.lineno}: {one_line(e)}"
    ) from e
  except Exception as e:  # a template is a program: it can fail in any way
    raise UserError(
      f"the chat template refuses these messages: {one_line(e)}"
    ) from e


def _environment():
  import jinja2.ext
  import jinja2.sandbox

  class Generation(jinja2.ext.Extension):
    """`generation` blocks mark the answers for training; here, no more."""

    tags = {"generation"}

    def parse(self, parser):
      next(parser.stream)
      return parser.parse_statements(["name:endgeneration"], drop_needle=True)

  def refuse(message):
    raise jinja2.TemplateError(message)

  def to_json(value, ensure_ascii=False, **how):
    # Jinja's own would write < and & as HTML does.
    return json.dumps(value, ensure_ascii=ensure_ascii, **how)

  environment = jinja2.sandbox.ImmutableSandboxedEnvironment(
    trim_blocks=True,
    lstrip_blocks=True,
    extensions=[Generation, "jinja2.ext.loopcontrols"],
  )
  environment.filters["tojson"] = to_json
  environment.globals["raise_exception"] = refuse
  environment.globals["strftime_now"] = lambda form: (
    datetime.datetime.now().strftime(form)
  )
  return environment


def one_line(error: Exception, limit: int = 200) -> str:
  """What an error says, for a UserError; its kind if it says nothing."""
  text = " ".join(str(error).split()) or type(error).__name__
  return text if len(text) <= limit else text[: limit - 3] + "..."
