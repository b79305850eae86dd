"""Text to tokens and back, straight from a checkpoint's files.

    tokenizer.json             the tokenizer itself (the `tokenizers` library reads it)
    tokenizer_config.json      names of the special tokens, perhaps the chat template
    special_tokens_map.json    special tokens, where the config lacks them
    chat_template.jinja        the chat template, preferred over the config's

Transformers is not imported: that would cost seconds at every start. Chat templates are programs from a checkpoint,
so they run in Jinja's immutable sandbox.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping, Sequence
from datetime import datetime
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any, NoReturn

from ..graph.json_file import read_json_object

if TYPE_CHECKING:
    import tokenizers
    from jinja2 import Template
    from jinja2.ext import Extension
    from jinja2.nodes import Node
    from jinja2.parser import Parser

_SPECIAL_NAMES = ("bos_token", "eos_token", "unk_token", "sep_token", "pad_token", "cls_token", "mask_token")
_OTHER_TOKENIZERS = ("tokenizer.model", "spiece.model", "vocab.json", "vocab.txt", "tekken.json", "tiktoken.model")


class Tokenizer:
    """A tokenizer and its chat template.

    Attributes:
        special_tokens: name ("eos_token", ...) -> the token's text.
        chat_templates: name -> Jinja source; the usual one is called "default". Empty where the model has none.
    """

    def __init__(
        self,
        backend: tokenizers.Tokenizer,
        *,
        special_tokens: Mapping[str, str] | None = None,
        chat_templates: Mapping[str, str] | None = None,
    ) -> None:
        self.backend = backend
        self.special_tokens = dict(special_tokens or {})
        self.chat_templates = dict(chat_templates or {})
        self._compiled: dict[str, Template] = {}

    @classmethod
    def from_dir(cls, path: str | Path) -> Tokenizer:
        """Reads a checkpoint's or an artifact's directory.

        Raises:
            ValueError: there is no tokenizer.json, or a file cannot be parsed.
        """
        import tokenizers

        path = Path(path)
        file = path / "tokenizer.json"
        if not file.is_file():
            others = [name for name in _OTHER_TOKENIZERS if (path / name).is_file()]
            found = f"it has {', '.join(others)}, which Camshaft does not read" if others else "nor any other tokenizer"
            raise ValueError(
                f"no tokenizer.json in {path} ({found}). Write one there with "
                f"transformers.AutoTokenizer.from_pretrained(...).save_pretrained({str(path)!r}), "
                "or pass prompts as token ids and set detokenize=False"
            )
        try:
            backend = tokenizers.Tokenizer.from_file(str(file))
        except Exception as error:  # the library raises nothing more precise
            raise ValueError(f"{file} cannot be read by tokenizers {tokenizers.__version__}: {error}") from error
        backend.no_truncation()
        backend.no_padding()
        config = {**_read_optional(path / "special_tokens_map.json"), **_read_optional(path / "tokenizer_config.json")}
        special = {name: _content(config[name]) for name in _SPECIAL_NAMES if config.get(name)}
        return cls(backend, special_tokens=special, chat_templates=_read_templates(path, config))

    @property
    def vocab_size(self) -> int:
        """Number of tokens, added ones included. A model's logits may be wider."""
        return self.backend.get_vocab_size(with_added_tokens=True)

    @cached_property
    def special_token_ids(self) -> frozenset[int]:
        """Ids that `decode` leaves out when special tokens are skipped."""
        return frozenset(i for i, token in self.backend.get_added_tokens_decoder().items() if token.special)

    @property
    def bos_token_id(self) -> int | None:
        """Id of the beginning-of-sequence token, None where there is none."""
        return self._special_id("bos_token")

    @property
    def eos_token_id(self) -> int | None:
        """Id of the end-of-sequence token, None where there is none."""
        return self._special_id("eos_token")

    def encode(self, text: str, *, add_special_tokens: bool = True) -> list[int]:
        """Token ids of a text; special tokens (such as bos) are added as the tokenizer's post-processor says."""
        return self.backend.encode(text, add_special_tokens=add_special_tokens).ids

    def encode_batch(self, texts: Sequence[str], *, add_special_tokens: bool = True) -> list[list[int]]:
        """`encode` of many texts, on several cores."""
        return [e.ids for e in self.backend.encode_batch(list(texts), add_special_tokens=add_special_tokens)]

    def decode(self, token_ids: Sequence[int], *, skip_special_tokens: bool = True) -> str:
        """Text of the tokens; bytes that are not UTF-8 become U+FFFD."""
        return self.backend.decode(list(token_ids), skip_special_tokens=skip_special_tokens)

    def id_to_token(self, token_id: int) -> str | None:
        """The token as the vocabulary writes it, None for an unknown id."""
        return self.backend.id_to_token(token_id)

    def decode_token(self, token_id: int) -> str:
        """Text of one token alone, special or not; "" for an id without a token."""
        return self.backend.decode([token_id], skip_special_tokens=False)

    def apply_chat_template(
        self,
        messages: Sequence[Mapping[str, Any]],
        *,
        add_generation_prompt: bool = True,
        tools: Sequence[Mapping[str, Any]] | None = None,
        template: str = "default",
        **variables: Any,
    ) -> list[int]:
        """Token ids of a conversation: `render_chat`, then `encode` without adding special tokens."""
        text = self.render_chat(
            messages, add_generation_prompt=add_generation_prompt, tools=tools, template=template, **variables
        )
        return self.encode(text, add_special_tokens=False)

    def render_chat(
        self,
        messages: Sequence[Mapping[str, Any]],
        *,
        add_generation_prompt: bool = True,
        tools: Sequence[Mapping[str, Any]] | None = None,
        template: str = "default",
        **variables: Any,
    ) -> str:
        """The conversation as text.

        Args:
            messages: {"role": ..., "content": ...} each, with whatever else the template reads.
            add_generation_prompt: end with the opening of the assistant's turn.
            template: name of a template, or Jinja source.
            variables: further variables for the template, such as enable_thinking.

        Raises:
            ValueError: no messages, no template, or the template refuses the conversation.
        """
        from jinja2 import TemplateError

        if not messages:
            raise ValueError("a chat needs at least one message; got an empty list")
        for number, message in enumerate(messages):
            if not isinstance(message, Mapping) or "role" not in message:
                raise ValueError(f"message {number} is {message!r}; expected {{'role': ..., 'content': ...}}")
        compiled = self._template(template)
        try:
            return compiled.render(
                messages=list(messages),
                tools=tools,
                documents=None,
                add_generation_prompt=add_generation_prompt,
                **{**self.special_tokens, **variables},
            )
        except TemplateError as error:
            raise ValueError(f"the chat template refuses this conversation: {error}") from error

    def _special_id(self, name: str) -> int | None:
        token = self.special_tokens.get(name)
        return None if token is None else self.backend.token_to_id(token)

    def _template(self, name: str) -> Template:
        source = self.chat_templates.get(name)
        if source is None and ("{%" in name or "{{" in name):
            source = name
        if source is None:
            known = ", ".join(sorted(self.chat_templates)) or "none"
            raise ValueError(
                f"this model has no chat template {name!r} (it has: {known}). Use generate() with a plain prompt, or "
                "put a chat_template.jinja next to tokenizer.json"
            )
        if source not in self._compiled:
            self._compiled[source] = _compile_template(source)
        return self._compiled[source]


def _compile_template(source: str) -> Template:
    """Compiles Jinja source in the environment that chat templates are written for."""
    import jinja2
    from jinja2.sandbox import ImmutableSandboxedEnvironment

    environment = ImmutableSandboxedEnvironment(
        trim_blocks=True, lstrip_blocks=True, extensions=["jinja2.ext.loopcontrols", _generation_extension()]
    )
    environment.filters["tojson"] = _to_json
    environment.globals["raise_exception"] = _raise_exception
    environment.globals["strftime_now"] = _strftime_now
    try:
        return environment.from_string(source)
    except jinja2.TemplateSyntaxError as error:
        raise ValueError(f"the chat template does not parse (line {error.lineno}): {error.message}") from error


def _generation_extension() -> type[Extension]:
    """A Jinja extension that ignores `{% generation %}`, which marks the assistant's tokens for training."""
    from jinja2 import nodes
    from jinja2.ext import Extension

    class Generation(Extension):
        tags = {"generation"}

        def parse(self, parser: Parser) -> Node:
            line = next(parser.stream).lineno
            body = parser.parse_statements(("name:endgeneration",), drop_needle=True)
            return nodes.Scope(body, lineno=line)

    return Generation


def _raise_exception(message: str) -> NoReturn:
    from jinja2 import TemplateError

    raise TemplateError(message)


def _strftime_now(pattern: str) -> str:
    return datetime.now().strftime(pattern)


def _to_json(
    value: Any,
    ensure_ascii: bool = False,
    indent: int | None = None,
    separators: tuple[str, str] | None = None,
    sort_keys: bool = False,
) -> str:
    """JSON as it stands; Jinja's own filter would escape it for HTML."""
    return json.dumps(value, ensure_ascii=ensure_ascii, indent=indent, separators=separators, sort_keys=sort_keys)


def _read_optional(file: Path) -> dict[str, Any]:
    """The fields of a file that a tokenizer may lack. Raises ValueError for one that is damaged."""
    if not file.is_file():
        return {}
    return read_json_object(file, fix="download the tokenizer again, or write it with save_pretrained")


def _content(token: str | Mapping[str, Any]) -> str:
    """Text of a special token, which configs write as a string or as an object."""
    return token if isinstance(token, str) else str(token["content"])


def _read_templates(path: Path, config: Mapping[str, Any]) -> dict[str, str]:
    templates: dict[str, str] = {}
    configured = config.get("chat_template")
    if isinstance(configured, str):
        templates["default"] = configured
    elif isinstance(configured, Iterable):
        templates.update((entry["name"], entry["template"]) for entry in configured)
    for file in sorted((path / "additional_chat_templates").glob("*.jinja")):
        templates[file.stem] = file.read_text(encoding="utf-8")
    main = path / "chat_template.jinja"
    if main.is_file():
        templates["default"] = main.read_text(encoding="utf-8")
    return templates
