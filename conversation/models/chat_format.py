"""How a merged model speaks to chat programs: its chat template, for the names of its own vocabulary, and how its
answers are read back into tool calls."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import TYPE_CHECKING

from conversation.format import calls
from conversation.format.control_tokens import END_CALL, END_OF_TURN, ESCAPE, START_CALL, START_OF_TURN
from conversation.models.tokenizer import RESTATES, control_names
from conversation.runs.files import write_json

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

CHAT_TEMPLATE = Path(calls.__file__).with_name("chat_template.jinja")
_NAMES = re.compile(r"(?<=set control_tokens = )\[.*\]")


def chat_template(tokenizer: PreTrainedTokenizerBase, restates: bool = False) -> str:
    """The chat template that renders the prompts of the training, and keeps the vocabulary's control tokens text.

    `restates`: it declares restate before the tools that it is given.
    """
    names = json.dumps(control_names(tokenizer), ensure_ascii=False)
    template = _NAMES.sub(lambda _: names, CHAT_TEMPLATE.read_text(encoding="utf-8"), count=1)
    return template.replace("set restates = false", "set restates = true") if restates else template


RESPONSE_TEMPLATE = {
    "defaults": {"role": "assistant"},
    "start_anchor": f"{START_OF_TURN}model\n",
    "fields": {
        "tool_calls": {
            "open_pattern": rf"\s*{START_CALL}\s*call:(?P<name>\w+)",
            "close_pattern": rf"\s*{END_CALL}",
            "repeats": True,
            "content": "json",
            "content_args": {"unquoted_keys": True, "string_delims": [[ESCAPE, ESCAPE]]},
            "transform": {"type": "function", "function": {"name": "{name}", "arguments": "{content}"}},
        },
        "content": {"close_pattern": rf"\s*{END_OF_TURN}", "content": "text"},
    },
}
"""For `tokenizer.parse_response` and `transformers serve`: an answer's calls as OpenAI tool calls. Values are strings;
where tools are given, a confidence becomes a number."""


def write_chat_format(folder: Path, tokenizer: PreTrainedTokenizerBase, restates: bool = False) -> None:
    """Write a model folder's chat template, and into its tokenizer_config.json the response template and whether the
    model `restates` questions."""
    (folder / "chat_template.jinja").write_text(chat_template(tokenizer, restates), encoding="utf-8")
    path = folder / "tokenizer_config.json"
    settings = json.loads(path.read_text(encoding="utf-8")) if path.exists() else {}
    for name in ("chat_template", RESTATES):  # the base's own
        settings.pop(name, None)
    write_json(path, {**settings, "response_template": RESPONSE_TEMPLATE, **({RESTATES: True} if restates else {})})
