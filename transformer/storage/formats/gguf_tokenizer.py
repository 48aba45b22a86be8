"""The tokenizer in a file of GGUF, rebuilt as the library `tokenizers` has it."""

import tokenizers
from tokenizers import AddedToken, Regex, decoders, models, normalizers, pre_tokenizers

from transformer.data.tokenizer import Tokenizer, refused

_NORMAL, _UNKNOWN, _CONTROL, _USER, _UNUSED, _BYTE = range(1, 7)

_LLAMA3 = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}"
    r"| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)
_QWEN2 = _LLAMA3.replace(r"\p{N}{1,3}", r"\p{N}")


def _split(pattern):
    return [
        pre_tokenizers.Split(Regex(pattern), "isolated"),
        pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
    ]


_GPT2 = [pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=True)]
_DIGITS = [pre_tokenizers.Digits(individual_digits=True), *_GPT2]
# Where a text may be cut before merging, by the name in tokenizer.ggml.pre.
_PRE_TOKENIZERS = {
    "gpt-2": _GPT2,
    "olmo": _GPT2,
    "phi-2": _GPT2,
    "smollm": _DIGITS,
    "starcoder": _DIGITS,
    "refact": _DIGITS,
    "codeshell": _DIGITS,
    "exaone": _DIGITS,
    "llama-bpe": _split(_LLAMA3),
    "llama3": _split(_LLAMA3),
    "smaug-bpe": _split(_LLAMA3),
    "dbrx": _split(_LLAMA3),
    "qwen2": _split(_QWEN2),
    "deepseek-r1-qwen": _split(_QWEN2),
    "stablelm2": _split(_QWEN2),
}
_COMPOSED = {"qwen2", "deepseek-r1-qwen"}  # whose texts are in Unicode's form NFC
_WHOLE_WORDS = {"llama-bpe", "llama3"}  # where a word that is a token is never merged from parts


def read_tokenizer(metadata: dict) -> Tokenizer | None:
    """Rebuilds the tokenizer of a file; None where it has none.

    Args:
      metadata: that of the file.

    Raises:
      ValueError: the tokenizer is of a kind that is not supported.
    """
    get = lambda name, default=None: metadata.get(f"tokenizer.ggml.{name}", default)
    kind = get("model", "no_vocab")
    if kind in ("none", "no_vocab"):
        return None
    tokens, types = get("tokens"), get("token_type")
    if not isinstance(tokens, list) or not all(isinstance(x, str) for x in tokens):
        raise ValueError("tokenizer.ggml.tokens is missing, or is not a list of texts.")
    types = types if types is not None else [_NORMAL] * len(tokens)
    if kind == "gpt2":
        backend = _byte_level(tokens, get("merges", []), get("pre", "gpt-2"))
    elif kind == "llama":
        backend = _sentence_piece(tokens, types, get("scores"), get("add_space_prefix", True))
    else:
        raise ValueError(
            f"tokenizer.ggml.model={kind!r} is not supported; it must be gpt2 or llama."
        )
    added = [
        AddedToken(token, special=type_ == _CONTROL, normalized=False)
        for token, type_ in zip(tokens, types, strict=True)
        if type_ in (_CONTROL, _USER)
    ]
    backend.add_tokens([token for token in added if not token.special])
    backend.add_special_tokens([token for token in added if token.special])
    named = {
        name: get(f"{short}_token_id")
        for name, short in (("bos_token", "bos"), ("eos_token", "eos"), ("unk_token", "unknown"))
    }
    ends = [get("eos_token_id"), get("eot_token_id"), get("eom_token_id")]
    begins = get("add_bos_token", kind == "llama") and named["bos_token"] is not None
    return Tokenizer(
        backend,
        begin=[named["bos_token"]] if begins else [],
        ends=list(dict.fromkeys(end for end in ends if end is not None)),
        chat_template=metadata.get("tokenizer.chat_template"),
        names={name: tokens[i] for name, i in named.items() if i is not None},
    )


def _byte_level(tokens, merges, pre):
    if pre not in _PRE_TOKENIZERS:
        raise ValueError(
            f"tokenizer.ggml.pre={pre!r}: how it cuts texts is not known here; known are "
            f"{', '.join(_PRE_TOKENIZERS)}."
        )
    with refused("tokenizer.ggml.merges do not fit the tokens"):
        model = models.BPE(
            vocab={token: i for i, token in enumerate(tokens)},
            merges=[tuple(merge.split(" ", 1)) for merge in merges],
            ignore_merges=pre in _WHOLE_WORDS,
        )
    backend = tokenizers.Tokenizer(model)
    if pre in _COMPOSED:
        backend.normalizer = normalizers.NFC()
    backend.pre_tokenizer = pre_tokenizers.Sequence(_PRE_TOKENIZERS[pre])
    backend.decoder = decoders.ByteLevel()
    return backend


def _sentence_piece(tokens, types, scores, space_prefix):
    """The BPE of SentencePiece, whose merges are all ways to cut a token in two that are tokens."""
    vocabulary = {token: i for i, token in enumerate(tokens)}
    merges = []
    for token, type_ in zip(tokens, types, strict=True):
        if type_ in (_CONTROL, _BYTE, _UNKNOWN):
            continue
        cuts = ((token[:n], token[n:]) for n in range(1, len(token)))
        known = [cut for cut in cuts if cut[0] in vocabulary and cut[1] in vocabulary]
        known.sort(key=lambda cut: (vocabulary[cut[0]], vocabulary[cut[1]]))
        merges += [(scores[vocabulary[token]], cut) for cut in known]
    merges.sort(key=lambda merge: merge[0], reverse=True)  # stable: ties as they came
    unknown = next((t for t, kind in zip(tokens, types, strict=True) if kind == _UNKNOWN), None)
    backend = tokenizers.Tokenizer(
        models.BPE(
            vocab=vocabulary,
            merges=[cut for _, cut in merges],
            unk_token=unknown,
            fuse_unk=True,
            byte_fallback=True,
        )
    )
    spaces = [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse()]
    if space_prefix:
        backend.normalizer = normalizers.Sequence(
            [normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")]
        )
        spaces.append(decoders.Strip(" ", 1, 0))
    else:
        backend.normalizer = normalizers.Replace(" ", "▁")
    backend.decoder = decoders.Sequence(spaces)
    return backend
