"""Conversations -> prompts, by the chat template that comes with a checkpoint.

    [{"role": "user", "content": [{"type": "image"}, {"type": "text", "text": "What is this?"}]}]
        ->  "USER: <image>\\nWhat is this? ASSISTANT:"

A chat template is a Jinja program. LLaVA-1.5's is recognised and rendered by a few lines of Python, so that it needs no
further package; any other is rendered by jinja2, sandboxed, because it comes from strangers.

Source: transformers' utils/chat_template_utils.py and ProcessorMixin.apply_chat_template.
"""

import datetime
import functools
import json
import re
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from extras.files import read_json, write_json

Template = str | dict[str, str]  # one, or several by name
SOURCES = ("image", "url", "path", "base64")  # keys of an image part
_FIRST = (
    "{% for message in messages %}{% if message['role'] != 'system' %}{{ message['role'].upper() + ': '}}{% endif %}"
    "{# Render all images first #}{% for content in message['content'] | selectattr('type', 'equalto', 'image') %}"
    "{{ '<image>\n' }}{% endfor %}{# Render all text next #}"
)
_TEXTS = "{% for content in message['content'] | selectattr('type', 'equalto', 'text') %}"
_LAST = "{% endfor %}{% if add_generation_prompt %}{{ 'ASSISTANT:' }}{% endif %}"
# The template of the hub's LLaVA-1.5 checkpoints; the second form also marks the answers, for training.
LLAVA = (
    _FIRST + _TEXTS + "{{ content['text'] + ' '}}{% endfor %}" + _LAST,
    _FIRST
    + "{% if message['role'] != 'assistant' %}"
    + (_TEXTS + "{{ content['text'] + ' '}}{% endfor %}{% else %}")
    + (_TEXTS + "{% generation %}{{ content['text'] + ' '}}{% endgeneration %}{% endfor %}{% endif %}")
    + _LAST,
)
LLAVA_VARIABLES = {"messages", "add_generation_prompt"}
CONTINUE = "CONTINUE_FINAL_MESSAGE_TAG "  # marks where a message is cut that the model continues


# The files


def read_chat_template(folder: Path) -> Template | None:
    """The template in the files of a checkpoint, in transformers' order of precedence; None if there is none.

    Last comes that of the tokenizer, which transformers' processor ignores. Raises a ValueError for a malformed one.
    """
    named = {file.stem: _text(file) for file in sorted((folder / "additional_chat_templates").glob("*.jinja"))}
    if (folder / "chat_template.jinja").is_file():
        named["default"] = _text(folder / "chat_template.jinja")
    for name in ("processor_config.json", "chat_template.json", "", "tokenizer_config.json"):
        found = read_json(folder / name, missing={}).get("chat_template") if name else named
        if name == "tokenizer_config.json" and isinstance(found, list):
            try:
                found = {one["name"]: one["template"] for one in found}
            except (KeyError, TypeError) as error:
                raise ValueError(f"{folder / name} has malformed chat templates: {error!r}") from error
        if found:
            texts = found.values() if isinstance(found, dict) else [found]
            if not all(isinstance(text, str) for text in texts):
                raise ValueError(f"{folder / name}: chat_template must be a text, not {str(found)[:100]}")
            return found["default"] if isinstance(found, dict) and set(found) == {"default"} else found
    return None


def write_chat_template(folder: Path, template: Template) -> None:
    """Writes a template to the files that transformers 5 reads, and removes it from those that take precedence."""
    for name, text in (template if isinstance(template, dict) else {"default": template}).items():
        if not re.fullmatch(r"\w[\w.-]*", name):
            raise ValueError(f"a chat template cannot be saved under the name {name!r}")
        file = "chat_template.jinja" if name == "default" else f"additional_chat_templates/{name}.jinja"
        (folder / file).parent.mkdir(exist_ok=True)
        (folder / file).write_text(text, encoding="utf-8")
    (folder / "chat_template.json").unlink(missing_ok=True)
    if "chat_template" in (config := read_json(folder / "processor_config.json", missing={})):
        write_json(folder / "processor_config.json", {k: v for k, v in config.items() if k != "chat_template"})


def _text(file: Path) -> str:
    try:
        return file.read_text(encoding="utf-8")
    except UnicodeDecodeError as error:
        raise ValueError(f"{file} is not a text in UTF-8: {error}") from error


def pick_template(own: Template | None, wanted: str | None) -> str:
    """The template to render: `wanted` (one, or the name of one), or the checkpoint's `own`, or LLaVA-1.5's."""
    named = own if isinstance(own, dict) else {}
    if wanted is None:
        if isinstance(own, dict) and "default" not in own:
            raise ValueError(f"there are several chat templates: choose one with chat_template=, of {', '.join(own)}")
        return LLAVA[0] if own is None else named.get("default", own)  # type: ignore[arg-type, return-value]
    if not isinstance(wanted, str) or ("{" not in wanted and wanted not in named):
        raise ValueError(f"chat_template is {wanted!r}; expected a Jinja template, or a name of {list(named)}")
    return named.get(wanted, wanted)


def is_llava(template: str) -> bool:
    """Whether this is LLaVA-1.5's template. Its line break may be written as a character or as backslash and n."""
    return template.strip().replace("\\n", "\n") in LLAVA


# The conversations


def read_conversations(conversation: Any) -> tuple[list[list[dict]], bool]:  # noqa: ANN401
    """One conversation or several -> several, in a uniform format, and whether there were several.

    OpenAI's "image_url" parts become "image" parts; keys without a value are dropped. The arguments are not changed.
    """
    several = isinstance(conversation, list | tuple) and len(conversation) > 0 and not isinstance(conversation[0], dict)
    conversations = []
    for messages in conversation if several else [conversation]:
        if not isinstance(messages, list | tuple) or not messages:
            raise ValueError("a conversation must be a list of messages such as {'role': 'user', 'content': ...}")
        conversations.append([_read_message(message) for message in messages])
    return conversations, several


def _read_message(message: object) -> dict:
    if not isinstance(message, Mapping) or not isinstance(message.get("role"), str):
        raise ValueError(f"a message must be an object with a role, not {str(message)[:100]}")
    read = {key: value for key, value in message.items() if value is not None}
    content = read.get("content", "")
    if isinstance(content, str):
        return read
    if not isinstance(content, list | tuple) or not all(isinstance(part, Mapping) for part in content):
        raise ValueError(f"the content of a message must be a text or a list of parts, not {str(content)[:100]}")
    return read | {"content": [_read_part(part) for part in content]}


def _read_part(part: Mapping) -> dict:
    kind = part.get("type")
    if kind == "image_url":
        url = part.get("image_url")
        return {"type": "image", "url": url.get("url") if isinstance(url, Mapping) else url}
    if kind not in ("text", "image"):
        raise ValueError(f"a part of a message is of type {kind!r}; expected 'text' or 'image'")
    if kind == "text" and not isinstance(part.get("text"), str):
        raise ValueError(f"a part of type 'text' needs a text, not {str(part.get('text'))[:100]}")
    return dict(part)


def conversation_images(messages: Sequence[dict]) -> list[Any]:
    """The sources of a conversation's images, in order. A part without one stands for an image passed separately."""
    images = []
    for message in messages:
        content = message.get("content", "")
        for part in [] if isinstance(content, str) else content:
            keys = [key for key in SOURCES if part["type"] == "image" and part.get(key) is not None]
            if len(keys) > 1:
                raise ValueError(f"an image part has both {keys[0]} and {keys[1]}; expected one of them")
            images += [part[key] if key != "base64" else f"data:image/;base64,{part[key]}" for key in keys]
    return images


# The prompt


def render(template: str, messages: Sequence[dict], variables: Mapping[str, Any], continued: bool = False) -> str:
    """Renders one conversation.

    Args:
        template: a Jinja template.
        messages: from `read_conversations`.
        variables: of the template, such as `add_generation_prompt`.
        continued: the prompt ends with the text of the last message, for the model to continue it.

    Raises:
        ValueError: the template fails, or refuses the conversation.
        ImportError: jinja2 is needed and not installed.
    """
    plain = is_llava(template)
    messages = [_as_parts(message) for message in messages] if plain else [_inert(message) for message in messages]
    final = _mark_end(messages[-1]) if continued else ""
    text = (_render_llava if plain else functools.partial(_render_jinja, template))(messages, variables)
    if not continued:
        return text
    if final.strip() not in text or CONTINUE.strip() not in text:
        raise ValueError(
            "continue_final_message: the chat template changes the last message, so it cannot be continued"
        )
    cut = text.rindex(CONTINUE.strip())
    return text[:cut] if text.startswith(CONTINUE, cut) else text[:cut].rstrip()


def _as_parts(message: dict) -> dict:
    """A message whose content is a list of parts: a plain text, which LLaVA's template would drop, becomes one part."""
    content = message.get("content", [])
    parts = [{"type": "text", "text": content}] if isinstance(content, str) else [dict(part) for part in content]
    return message | {"content": parts}


def _mark_end(message: dict) -> str:
    """Appends the mark to the last text of a message, in place, and returns the text without it."""
    content = message.get("content")
    if isinstance(content, str):
        message["content"] = content + CONTINUE
        return content
    for part in reversed(content or []):
        if part["type"] == "text":
            text, part["text"] = part["text"], part["text"] + CONTINUE
            return text
    raise ValueError("continue_final_message: the last message has no text to continue")


def _render_llava(messages: Sequence[dict], variables: Mapping[str, Any]) -> str:
    """What LLaVA-1.5's template says: images precede the text of their message, wherever they stand in it."""
    prompt = ""
    for message in messages:
        prompt += "" if message["role"] == "system" else f"{message['role'].upper()}: "
        prompt += "".join("<image>\n" for part in message["content"] if part["type"] == "image")
        prompt += "".join(f"{part['text']} " for part in message["content"] if part["type"] == "text")
    return prompt + ("ASSISTANT:" if variables.get("add_generation_prompt") else "")


def template_variables(template: str) -> set[str]:
    """The names that a template reads and does not define itself."""
    if is_llava(template):
        return LLAVA_VARIABLES
    compiled = _compiled(template)
    from jinja2 import meta

    return meta.find_undeclared_variables(compiled.environment.parse(template))


def _render_jinja(template: str, messages: Sequence[dict], variables: Mapping[str, Any]) -> str:
    try:
        return _compiled(template).render(_inert({**variables, "messages": messages}))
    except ImportError:
        raise
    except Exception as error:  # a template can raise anything
        raise ValueError(
            f"the chat template cannot render this conversation: {error or type(error).__name__}"
        ) from error


def _inert(value: Any) -> Any:  # noqa: ANN401
    """A copy of what a template may see, in JSON's types only: the methods of images and tensors could write files."""
    if isinstance(value, Mapping):
        return {_inert(key): _inert(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return type(value)(_inert(item) for item in value) if type(value) in (list, tuple) else list(map(_inert, value))
    if isinstance(value, str):
        return str.__str__(value)
    return value if value is None or type(value) in (int, float, bool) else f"<{type(value).__name__}>"


@functools.lru_cache
def _compiled(template: str) -> Any:  # noqa: ANN401
    """A template compiled by jinja2, with the settings and functions that transformers gives its templates.

    Raises:
        ImportError: jinja2 is not installed, or has known holes in its sandbox.
        ValueError: the template is not valid Jinja.
    """
    try:
        import jinja2
        import jinja2.ext
        from jinja2 import nodes
        from jinja2.sandbox import ImmutableSandboxedEnvironment
    except ImportError:
        raise ImportError(
            "the chat template of this checkpoint is not LLaVA-1.5's; to render it, run: pip install jinja2"
        ) from None
    if [int(number) for number in re.findall(r"\d+", jinja2.__version__)[:3]] < [3, 1, 6]:
        raise ImportError(
            f"templates can escape the sandbox of jinja2 {jinja2.__version__}; run: pip install --upgrade jinja2"
        )

    class Generation(jinja2.ext.Extension):
        """`{% generation %}...{% endgeneration %}` around an answer, for training, leaves the text as it is."""

        tags = {"generation"}  # noqa: RUF012

        def parse(self, parser: Any) -> Any:  # noqa: ANN401
            line = next(parser.stream).lineno
            return nodes.Scope(parser.parse_statements(("name:endgeneration",), drop_needle=True)).set_lineno(line)

    class Namespace(jinja2.utils.Namespace):
        """Jinja's namespace() without names that begin with an underscore, which lead into Python's own objects."""

        def __init__(*args: Any, **names: Any) -> None:  # noqa: ANN401
            for name in (attributes := dict(*args[1:], **names)):
                _check_name(name)
            jinja2.utils.Namespace.__init__(args[0], attributes)

        def __setitem__(self, name: str, value: Any) -> None:  # noqa: ANN401
            _check_name(name)
            super().__setitem__(name, value)

    def _check_name(name: str) -> None:
        if str(name).startswith("_"):
            raise jinja2.exceptions.SecurityError(f"a namespace cannot have the attribute {name!r}")

    class Dict:
        """The template's `dict`: the two uses of it, without its type."""

        def __call__(self, *args: Any, **items: Any) -> dict:  # noqa: ANN401
            return dict(*args, **items)

        def fromkeys(self, *args: Any) -> dict:  # noqa: ANN401
            return dict.fromkeys(*args)

    def raise_exception(message: str) -> None:
        raise jinja2.exceptions.TemplateError(message)

    def strftime_now(form: str) -> str:
        return datetime.datetime.now().strftime(form)

    def tojson(
        value: Any,  # noqa: ANN401
        ensure_ascii: bool = False,
        indent: int | None = None,
        separators: tuple[str, str] | None = None,
        sort_keys: bool = False,
    ) -> str:  # Jinja's own escapes HTML
        return json.dumps(value, ensure_ascii=ensure_ascii, indent=indent, separators=separators, sort_keys=sort_keys)

    functions: dict[str, Callable] = {"raise_exception": raise_exception, "strftime_now": strftime_now}
    environment = ImmutableSandboxedEnvironment(
        trim_blocks=True, lstrip_blocks=True, extensions=[Generation, jinja2.ext.loopcontrols]
    )
    environment.filters["tojson"] = tojson
    environment.globals.update(functions, dict=Dict(), namespace=Namespace)
    try:
        return environment.from_string(template)
    except jinja2.exceptions.TemplateError as error:
        raise ValueError(f"the chat template is not valid Jinja: {error}") from error
