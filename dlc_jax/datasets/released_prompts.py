"""What the authors' released code for instructions makes of a row, blank for blank.

Its lines are indented as they stand in its source. What it scores and what it trains on differ: an
empty line before the response where there is an input, and a line behind the response.
"""

from __future__ import annotations

from dlc_jax.datasets.chat import Conversation
from dlc_jax.datasets.rows import Row, Unfit

_LINE = "\n" + 12 * " "
# also where no input follows
_OPENING = (
    "Below is an instruction that describes a task, paired with an input that provides further "
    "context. Write a response that appropriately completes the request."
)
_RESPONSE = f"### Response:{_LINE}"
_AFTER_INPUT = f"### Response:\n{_LINE}"


def scored_as_released(talk: Conversation, fields: Row) -> tuple[str, str]:
    """Returns prompt and response of a sample as they are scored.

    Args:
      talk: Its first two messages are the question and the answer.
      fields: Instruction and input, where a layout has them apart; none: the question is both.
    Raises:
      Unfit: it begins otherwise.
    """
    if talk.messages[0]["role"] != "user" or talk.answers[:1] != [1]:
        raise Unfit("do not begin with a question and its answer, which the released code reads")
    question, answer = (message["content"] for message in talk.messages[:2])
    instruction, given = fields.get("instruction", question), fields.get("input") or ""
    context, response = "", _RESPONSE
    if len(given) >= 2:
        context, response = f"### Input:{_LINE}{given}{_LINE}{_LINE}", _AFTER_INPUT
    prompt = f"{_OPENING}{_LINE}{_LINE}### Instruction:{_LINE}{instruction}{_LINE}{_LINE}"
    return prompt + context + response, answer


def trained_as_released(prompt: str, response: str) -> tuple[str, str]:
    """Returns what is trained on of a prompt and response that were scored."""
    begin = prompt.removesuffix(_AFTER_INPUT).removesuffix(_RESPONSE)
    return begin + _RESPONSE, response + _LINE
