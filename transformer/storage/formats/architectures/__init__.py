"""The published architectures, one table for each."""

from transformer.storage.formats.architectures.gemma import GEMMA, GEMMA2, GEMMA3
from transformer.storage.formats.architectures.gpt2 import GPT2
from transformer.storage.formats.architectures.llama import LLAMA, MISTRAL, OLMO2
from transformer.storage.formats.architectures.qwen import QWEN2, QWEN3
from transformer.storage.formats.family import Family

FAMILIES: dict[str, Family] = {
    family.model_type: family
    for family in (LLAMA, MISTRAL, QWEN2, QWEN3, GEMMA, GEMMA2, GEMMA3, OLMO2, GPT2)
}
