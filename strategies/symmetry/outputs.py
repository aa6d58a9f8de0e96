"""The tensors that a model returns to its user, which a symmetry must not change."""

from collections.abc import Iterator, Mapping

from torch import Tensor


def answers(output: object) -> list[Tensor]:
    """Return the floating tensors of an output that a symmetry must keep.

    Of a mapping these are logits, embeddings of a projection and losses, if there are any: hidden states, caches and
    attention weights belong to the parametrisation. A model that returns hidden states alone is bound by the last of
    them, and any other model by all that it returns.
    """
    if not isinstance(output, Mapping):
        return list(_floating(output))
    answered = [value for name, value in output.items() if _is_answer(str(name))]
    states = [value for name, value in output.items() if str(name).startswith(("last_hidden_state", "pooler_output"))]
    return list(_floating(answered)) or list(_floating(states)) or list(_floating(output))


def _is_answer(name: str) -> bool:
    return name.endswith(("logits", "_embeds", "loss", "reconstruction")) or name.startswith(("logits", "loss"))


def _floating(output: object) -> Iterator[Tensor]:
    if isinstance(output, Tensor):
        if (output.is_floating_point() or output.is_complex()) and output.numel():
            yield output
    elif isinstance(output, Mapping):
        for value in output.values():
            yield from _floating(value)
    elif isinstance(output, list | tuple):
        for value in output:
            yield from _floating(value)
