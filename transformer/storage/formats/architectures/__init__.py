"""The published architectures, one table for each."""

from transformer.storage.formats.architectures.deepseek import DEEPSEEK_V2, DEEPSEEK_V3
from transformer.storage.formats.architectures.gemma import GEMMA, GEMMA2, GEMMA3
from transformer.storage.formats.architectures.gpt2 import GPT2
from transformer.storage.formats.architectures.llama import LLAMA, MISTRAL, OLMO2
from transformer.storage.formats.architectures.mixtures import GPT_OSS, MIXTRAL, OLMOE, QWEN3_MOE
from transformer.storage.formats.architectures.neox import GPT_NEOX
from transformer.storage.formats.architectures.opt import OPT
from transformer.storage.formats.architectures.phi import PHI3
from transformer.storage.formats.architectures.qwen import QWEN2, QWEN2_MOE, QWEN3, QWEN3_NEXT
from transformer.storage.formats.family import Family

# A model is saved as the first of them that it is.
FAMILIES: dict[str, Family] = {
    family.model_type: family
    for family in (
        *(LLAMA, MISTRAL, QWEN2, QWEN3, GEMMA, GEMMA2, GEMMA3, OLMO2, PHI3, GPT2, GPT_NEOX, OPT),
        *(MIXTRAL, OLMOE, QWEN3_MOE, QWEN2_MOE, GPT_OSS, DEEPSEEK_V2, DEEPSEEK_V3, QWEN3_NEXT),
    )
}
