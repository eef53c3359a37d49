"""How the row of each data set becomes (prompt, completion): all of it here.

    data set             prompt                         completion
    e2e_nlg              name[Aromi], food[Thai]        Aromi serves Thai food.
    dialogsum            (dialogue)||Summary:           _(summary)
    sql_create_context   (tables)||Question: ...||SQL:  _SELECT ...
    conversations        USER: Hi.|ASSISTANT:           _Hello!
    text_corpus                                         (a piece of the text)

with | for a line break and _ for a blank.

This project's own tokenizer puts <sep> between prompt and completion; those of
published models put nothing there, so the text itself has to. A prompt ends in
a word and a colon, and the blank behind it begins the completion:
byte-level tokenizers join a blank to the word that follows, as in the text
they were trained on, and a prompt that ended in a blank or a line break would
lose it on many a command line. Only e2e_nlg stays as it was published.

A change here is a change of the prepared data: raise VERSION of the builder.
"""

from collections.abc import Callable, Iterator, Sequence

Turn = tuple[str, str]  # (role, text)
ROLES = {"system": "", "user": "USER: ", "assistant": "ASSISTANT: "}


def e2e(meaning: str, reference: str) -> tuple[str, str]:
  return meaning.strip(), reference.strip()


def dialogsum(dialogue: str, summary: str) -> tuple[str, str]:
  return f"{dialogue.strip()}\n\nSummary:", f" {summary.strip()}"


def sql(context: str, question: str, answer: str) -> tuple[str, str]:
  prompt = f"{context.strip()}\n\nQuestion: {question.strip()}\n\nSQL:"
  return prompt, f" {answer.strip()}"


def conversation(turns: Sequence[Turn]) -> str:
  """The prompt for the assistant's next turn, for models without a template.

  turns: (role, text), role being one of ROLES; the last is the user's.
  """
  lines = [ROLES[role] + text.strip() for role, text in turns]
  return "\n".join([*lines, "ASSISTANT:"])


def conversation_pairs(
  turns: Sequence[Turn],
  render: Callable[[Sequence[Turn]], str] = conversation,
) -> Iterator[tuple[str, str]]:
  """One pair for each turn of the assistant, with all before it as prompt.

  A turn without text, or with no user's turn before it, gives no pair: there is
  nothing to learn from the one and nothing to answer in the other.

  render: prompt of a history, such as a model's own chat template.
  """
  for i, (role, text) in enumerate(turns):
    asked = any(who == "user" for who, _ in turns[:i])
    if role == "assistant" and asked and text.strip():
      yield render(turns[:i]), f" {text.strip()}"


def chunks(text: str, size: int) -> Iterator[str]:
  """Pieces of a long text, in order, each of at most `size` characters.

  A piece ends, in this order, where a paragraph, a line or a word does, if one
  ends in the second half of it; what cannot be parted is cut. Blanks at the
  ends of a piece are dropped, so joined pieces are the text but for blanks.
  """
  start, text = 0, text.rstrip()
  while start < len(text):
    if text[start].isspace():
      start += 1
      continue
    end = start + size
    if end < len(text):
      half = start + size // 2
      places = (text.rfind(mark, half, end + 1) for mark in ("\n\n", "\n", " "))
      end = next((place for place in places if place > start), end)
    yield text[start:end].rstrip()
    start = end
