"""The tokenizer of a published directory: tokenizer.json, and what other files say about it."""

import json
from pathlib import Path

import tokenizers

from transformer.data.tokenizer import FILE_NAME, Tokenizer, read_backend
from transformer.files import write_json, write_text
from transformer.storage.formats.huggingface import read_json

_CONFIG, _GENERATION = "tokenizer_config.json", "generation_config.json"
_TEMPLATE = "chat_template.jinja"
_NAMES = ("bos_token", "eos_token", "pad_token", "unk_token")


def read(directory: Path, values: dict) -> Tokenizer | None:
    """Reads a tokenizer; None where the directory has none.

    Args:
      directory: of the model.
      values: its config.json.

    Raises:
      ValueError: a file is damaged, or the tokenizer is of a kind that is not supported.
    """
    if not (directory / FILE_NAME).is_file():
        return None
    backend = read_backend(directory / FILE_NAME)
    settings, generation = (_optional(directory / name) for name in (_CONFIG, _GENERATION))
    older = _optional(directory / "special_tokens_map.json")
    names = {name: _content(settings.get(name, older.get(name))) for name in _NAMES}
    names = {name: text for name, text in names.items() if text is not None}
    ends = [backend.token_to_id(names.get("eos_token", ""))]
    ends += _ids(generation.get("eos_token_id")) + _ids(values.get("eos_token_id"))
    ends = list(dict.fromkeys(end for end in ends if end is not None))
    try:
        return Tokenizer(
            backend,
            begin=_begin(backend),
            ends=ends,
            chat_template=_template(directory, settings),
            names=names,
        )
    except ValueError as error:
        raise ValueError(f"{directory / FILE_NAME}: {error}") from error


def _optional(path):
    return read_json(path) if path.is_file() else {}


def _content(token):
    """The text of a token, which a file gives as text or as an object."""
    text = token.get("content") if isinstance(token, dict) else token
    return text if isinstance(text, str) else None


def _ids(value):
    """One id or a list of them, as a list."""
    values = value if isinstance(value, list) else [value]
    return [x for x in values if isinstance(x, int) and not isinstance(x, bool)]


def _begin(backend: tokenizers.Tokenizer) -> list[int]:
    """What the tokenizer puts before a text."""
    plain = backend.encode("a", add_special_tokens=False).ids
    whole = backend.encode("a", add_special_tokens=True).ids
    starts = [n for n in range(len(whole)) if whole[n : n + len(plain)] == plain]
    return whole[: starts[0]] if starts else []


def _template(directory, settings):
    """The chat template, in a file of its own or among the settings."""
    if (directory / _TEMPLATE).is_file():
        return (directory / _TEMPLATE).read_text(encoding="utf-8")
    template = settings.get("chat_template")
    if isinstance(template, list):  # several, by names
        default = (x for x in template if isinstance(x, dict) and x.get("name") == "default")
        template = next(default, {}).get("template")
    return template if isinstance(template, str) else None


def write(directory: Path, tokenizer: Tokenizer, max_length: int) -> dict:
    """Writes the files of a tokenizer, and returns what config.json says about it."""
    write_text(directory / FILE_NAME, _with_begin(tokenizer))
    names = {"eos_token": tokenizer.token(tokenizer.ends[0])} if tokenizer.ends else {}
    if tokenizer.begin:
        names["bos_token"] = tokenizer.token(tokenizer.begin[0])
    settings = {"tokenizer_class": "PreTrainedTokenizerFast", "model_max_length": max_length}
    settings |= {"clean_up_tokenization_spaces": False} | names | tokenizer.names
    if tokenizer.chat_template is not None:
        settings["chat_template"] = tokenizer.chat_template
    write_json(directory / _CONFIG, settings)
    ends = list(tokenizer.ends)
    ids = {"eos_token_id": ends[0] if len(ends) == 1 else ends} if ends else {}
    if tokenizer.begin:
        ids["bos_token_id"] = tokenizer.begin[0]
    write_json(directory / _GENERATION, ids)
    return ids


def _with_begin(tokenizer):
    """tokenizer.json, which puts before a text what `Tokenizer.begin` says."""
    text = tokenizer.to_json()
    backend = tokenizers.Tokenizer.from_str(text)
    if _begin(backend) == list(tokenizer.begin):
        return text
    begin = [(tokenizer.token(i), i) for i in tokenizer.begin]
    template = " ".join([*(token for token, _ in begin), "$A"])
    backend.post_processor = tokenizers.processors.TemplateProcessing(
        single=template, pair=f"{template} $B", special_tokens=begin
    )
    return json.dumps(json.loads(backend.to_str()), ensure_ascii=False)
