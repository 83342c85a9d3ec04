"""A Modelfile for Ollama: the prompt of the training as a Go template, greedy, stopped at the end of the turn.

The template is written from the constants of `calls`. Ollama puts the tokenizer's <bos> before it. It joins
neighbouring messages of one role with an empty line; a line of the history has none, so a client sends an answer's
fragments as tool calls, or in one message. What stands between two calls, a line break, Ollama's parser returns as
content; a client sends it back beside the calls, and the template leaves it out.
"""

from __future__ import annotations

from conversation.format.calls import HISTORY_HEADING, INSTRUCTION, TIMESTAMP, declarations
from conversation.format.control_tokens import (
    END_DECLARATION,
    END_OF_TURN,
    START_DECLARATION,
    START_OF_TURN,
)
from conversation_config import MAX_NEW_TOKENS


def modelfile(gguf_name: str, restates: bool = False) -> str:
    """The Modelfile beside a GGUF file of that name. `restates`: the model begins with the question in full."""
    developer = f"{START_OF_TURN}developer\n{INSTRUCTION.format(timestamp=TIMESTAMP)}"
    developer += "".join(f"{START_DECLARATION}{each}{END_DECLARATION}\n\n" for each in declarations(restates))
    last = "eq (len (slice $.Messages $i)) 1"
    each = "{{ range $i, $m := .Messages }}"  # without hyphens: they would take the line breaks away
    history = (
        each
        + f"{{{{ if not ({last}) }}}}"
        + '{{ if eq .Role "user" }}  User: "{{ .Content }}"\n{{ end }}'
        + '{{ if eq .Role "assistant" }}'
        + '{{ if not .ToolCalls }}{{ if .Content }}  AI: "{{ .Content }}"\n{{ end }}{{ end }}'
        + '{{ range .ToolCalls }}{{ if eq .Function.Name "add_text" }}  AI: "{{ .Function.Arguments.content }}"\n'
        + "{{ end }}{{ end }}{{ end }}{{ end }}{{ end }}"
    )
    question = f"{each}{{{{ if {last} }}}}{{{{ .Content }}}}{{{{ end }}}}{{{{ end }}}}"
    template = (
        f"{developer}{{{{ if gt (len .Messages) 1 }}}}{HISTORY_HEADING}{history}\n{{{{ end }}}}"
        f"{END_OF_TURN}\n{START_OF_TURN}user\n{question}\n{END_OF_TURN}\n{START_OF_TURN}model\n"
    )
    return (
        f"FROM ./{gguf_name}\n"
        f'TEMPLATE """{template}"""\n'
        "PARSER functiongemma\n"
        f"PARAMETER stop {END_OF_TURN}\n"
        "PARAMETER temperature 0\n"
        "PARAMETER repeat_penalty 1.0\n"
        f"PARAMETER num_predict {MAX_NEW_TOKENS}\n"
    )
