"""The fields of a ``config.json``, every one of which is either read or known not to change what a model computes."""

import re
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from magma_jax.foreign import shown

# Hugging Face's activation name -> ours.
ACTIVATION_NAMES = {
    "gelu": "gelu",
    "gelu_new": "gelu_tanh",
    "gelu_fast": "gelu_tanh",
    "gelu_pytorch_tanh": "gelu_tanh",
    "relu": "relu",
}

# Fields that no model's logits depend on: settings of training, of sampling, of the library, and special tokens, which
# are the tokenizer's.
WITHOUT_EFFECT = re.compile(
    r"""model_type|architectures|auto_map|_?name_or_path|transformers_version|transformers\.js_config|torch_dtype|dtype
    |use_cache|cache_implementation|return_dict|output_attentions|output_hidden_states|id2label|label2id|problem_type
    |task_specific_params|tokenizer_class|(bos|eos|pad|sep|decoder_start)_token_id|prefix|max_length|min_length
    |do_sample|temperature|top_k|top_p|initializer_range|init_std|gradient_checkpointing|layerdrop|pretraining_tp
    |is_decoder|is_llama_config|chunk_size_feed_forward|_?attn_implementation(_autoset)?|unsloth_\w+
    |(\w+_)?(dropout|dropout_prob|pdrop)|summary_\w+""",
    re.VERBOSE,
)
# As many unread fields as one message names.
_NAMED = 5


class LanguageModelError(ValueError):
    """Unsupported language model; one line with the file and the unsupported setting."""


class Fields(Mapping):
    """Values of a ``config.json``, which remember the names that were asked for."""

    def __init__(self, values: Mapping[str, Any]):
        self._values = values
        self._read: set[str] = set()

    def __getitem__(self, name: str) -> Any:
        self._read.add(name)
        return self._values[name]

    def __iter__(self) -> Iterator[str]:
        return iter(self._values)

    def __len__(self) -> int:
        return len(self._values)

    def size(self, name: str) -> int:
        """A size that others are computed from.

        Raises:
            LanguageModelError: no positive whole number.
        """
        value = self[name]
        if type(value) is not int or value < 1:
            raise LanguageModelError(f"{name} {shown(value)} is no size")
        return value

    def skip(self, *names: str) -> None:
        """Marks fields as read that repeat others, or that the model's own code does not read."""
        self._read |= set(names)

    def require(self, **settings: tuple[Any, Any]) -> None:
        """Checks settings, each given as (required value, default).

        Raises:
            LanguageModelError: another value.
        """
        for name, (wanted, default) in settings.items():
            if (found := self.get(name, default)) != wanted:
                raise LanguageModelError(f"{name} {shown(found)} is not offered here, only {wanted!r}")

    def check_all_read(self) -> None:
        """Raises LanguageModelError if a field was not asked for and may have an effect."""
        unread = sorted(str(name) for name in self._values if name not in self._read)
        unread = [name for name in unread if not WITHOUT_EFFECT.fullmatch(name)]
        if unread:
            more = f" and {len(unread) - _NAMED} more" if len(unread) > _NAMED else ""
            names = ", ".join(shown(name) for name in unread[:_NAMED])
            raise LanguageModelError(f"settings that are not known here: {names}{more}; they may change the model")


def activation(name: Any) -> str:
    """Our name of an activation. Raises LanguageModelError."""
    if not isinstance(name, str) or name not in ACTIVATION_NAMES:
        raise LanguageModelError(f"activation {shown(name)} is none of {', '.join(ACTIVATION_NAMES)}")
    return ACTIVATION_NAMES[name]


def shortest_period(values: Sequence[Any]) -> tuple[Any, ...]:
    """Shortest pattern whose repetition begins with ``values``."""
    periods = (n for n in range(1, len(values) + 1) if all(values[i] == values[i % n] for i in range(len(values))))
    period = next(periods, 0)
    return tuple(values[:period])


def of_layers(name: str, values: Any, kinds: Sequence[Any], layers: Any) -> list[Any]:
    """A list with one of ``kinds`` for every layer. Raises LanguageModelError."""
    if not isinstance(values, list) or len(values) != layers or any(value not in kinds for value in values):
        names = ", ".join(map(str, kinds))
        raise LanguageModelError(f"{name} {shown(values)} do not fit {shown(layers)} layers of {names}")
    return values
