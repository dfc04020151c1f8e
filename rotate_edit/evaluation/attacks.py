"""Ways to get a removed concept back: a little fine-tuning, one steering vector, rounded weights, a hint in the prompt.

Every attack changes the model inside a `with` block, or for as long as a measurement takes, and puts every weight back
bit for bit. What is measured under an attack is compared with the base under the same attack.
"""

import random
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from typing import Any, TypeVar

import torch
from torch import Tensor

from rotate_edit.errors import BadInput
from rotate_edit.evaluation.relearn import put_back
from rotate_edit.models.batches import Passages, pass_through, real_positions
from rotate_edit.models.hooks import layer_modules, recorded

Value = TypeVar("Value")
STEPS = (1, 5, 25, 100)


@dataclass(frozen=True)
class Relearning:
    """How an attacker fine-tunes: AdamW at a constant learning rate, one paragraph a step.

    Attributes:
        rank: Rank of LoRA adapters on all linear matrices but the output head. None trains every parameter.
        learning_rate: AdamW's learning rate.
        steps: After how many steps the model is measured.
        tokens: At most this many tokens of each paragraph.
        weight_decay: AdamW's weight decay.
        seed: Seed of the paragraphs' order, of the adapters and of dropout.
    """

    rank: int | None = None
    learning_rate: float = 1e-5
    steps: tuple[int, ...] = STEPS
    tokens: int = 256
    weight_decay: float = 0.01
    seed: int = 0


FULL = Relearning()
LORA = Relearning(rank=16, learning_rate=1e-4)


def relearn_steps(
    model: Any, tokenizer: Any, paragraphs: Sequence[str], how: Relearning, measure: Callable[[], Value]
) -> dict[int, Value]:
    """Fine-tune the model as it stands and measure it after certain numbers of steps.

    Args:
        model: The loaded model. Its weights come back when this ends, also by an exception.
        tokenizer: Its tokenizer.
        paragraphs: Texts about the concept that hold nothing of what is measured. They are gone through in a shuffled
            order, again and again.
        how: The learning rate, the steps and so on.
        measure: Called after each of the steps, with the model in evaluation mode.

    Returns:
        By the number of steps, what `measure` returned.

    Raises:
        BadInput: There is no text to train on.
    """
    device = next(model.parameters()).device
    encoded = tokenizer(list(paragraphs))["input_ids"] if paragraphs else []
    rows = [torch.tensor([ids[: how.tokens]], device=device) for ids in encoded if len(ids) > 1]
    if not rows:
        raise BadInput("there are no paragraphs to relearn from.")
    shuffled, order = random.Random(how.seed), list[Tensor]()
    while len(order) < max(how.steps):
        order += shuffled.sample(rows, len(rows))
    found: dict[int, Value] = {}
    with ExitStack() as stack:
        stack.enter_context(torch.random.fork_rng(devices=[device] if device.type == "cuda" else []))
        torch.manual_seed(how.seed)
        trained = stack.enter_context(_trainable(model) if how.rank is None else _with_adapters(model, how.rank))
        optimizer = torch.optim.AdamW(trained, lr=how.learning_rate, weight_decay=how.weight_decay, foreach=False)
        for step, row in enumerate(order[: max(how.steps)], start=1):
            model.train()
            loss = model(input_ids=row, labels=row, use_cache=False).loss
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            model.eval()
            if step in how.steps:
                optimizer.zero_grad()
                found[step] = measure()
    return found


@contextmanager
def _trainable(model: Any) -> Iterator[list[Tensor]]:
    with put_back(model):
        model.requires_grad_(True)
        yield list(model.parameters())


@contextmanager
def _with_adapters(model: Any, rank: int) -> Iterator[list[Tensor]]:
    from peft import LoraConfig, get_peft_model

    kept = {name: parameter.requires_grad for name, parameter in model.named_parameters()}
    with warnings.catch_warnings():
        # PEFT still uses a name that transformers has deprecated; the user cannot change that.
        warnings.simplefilter("ignore", FutureWarning)
        wrapped = get_peft_model(model, LoraConfig(r=rank, lora_alpha=rank, target_modules="all-linear"))
    try:
        yield [parameter for parameter in wrapped.parameters() if parameter.requires_grad]
    finally:
        # The adapters stood beside the weights and were never merged.
        wrapped.unload()
        model.eval()
        for name, parameter in model.named_parameters():
            parameter.requires_grad_(kept[name])
            parameter.grad = None


# One steering vector.


def residual_means(model: Any, passages: Passages, layers: Sequence[int]) -> dict[int, Tensor]:
    """The mean residual stream after each of some layers, over all positions of texts but the first of each.

    Args:
        model: A loaded model.
        passages: Texts about the concept.
        layers: Indices of the layers.

    Returns:
        By layer, float64 [d_model]. A text's first position is left out: many models keep a vector there that is a
        hundred times longer than others.

    Raises:
        BadInput: A layer is a mixture of experts, or no text has a second token.
    """
    sums = {layer: torch.zeros((), dtype=torch.float64) for layer in layers}
    count = 0
    with recorded(model, layers) as kept:
        for index, batch in enumerate(pass_through(model, passages)):
            real = real_positions(batch, passages.lengths[index])[:, 1:]
            count += int(real.sum())
            for layer in layers:
                residual = kept[layer]["residual"][:, 1:]
                sums[layer] = sums[layer] + residual[real.to(residual.device)].double().sum(dim=0).cpu()
    if not count:
        raise BadInput("there is no text to read a steering vector from.")
    return {layer: total / count for layer, total in sums.items()}


@contextmanager
def steered(model: Any, layer: int, vector: Tensor) -> Iterator[None]:
    """Add a vector to the residual stream after a layer, at every position.

    Args:
        model: A loaded model.
        layer: The layer.
        vector: What is added, [d_model].
    """

    def add(_module: Any, _inputs: Any, output: Any) -> Any:
        states = output[0] if isinstance(output, tuple) else output
        moved = states + vector.to(states.device, states.dtype)
        return (moved, *output[1:]) if isinstance(output, tuple) else moved

    handle = layer_modules(model, layer)[1].register_forward_hook(add)
    try:
        yield
    finally:
        handle.remove()


def best_layer(model: Any, vectors: Mapping[int, Tensor], loss: Callable[[], float]) -> int:
    """The layer at which its vector lowers a loss most, for instance the loss on text about the concept.

    Args:
        model: The loaded edited model.
        vectors: By layer, the base's mean residual less the edited model's.
        loss: What the attacker can measure without the questions.
    """

    def under(layer: int) -> float:
        with steered(model, layer, vectors[layer]):
            return loss()

    return min(vectors, key=under)


# Rounded weights.


def rounded_to_bits(weight: Tensor, bits: int = 4, group: int = 64) -> Tensor:
    """Round to the nearest of evenly spaced values, with one scale for each group of a row.

    `scale = max |w| / (2^(bits - 1) - 1)` and `w <- scale round(w / scale)`. This is plain absmax rounding; it needs no
    text, and is coarser than methods that do.

    Args:
        weight: A matrix, or several, [..., columns].
        bits: Bits of a value.
        group: How many neighbouring values of a row share a scale. The last group of a row may be smaller.

    Returns:
        The rounded weights, in the shape and dtype of the weights.
    """
    columns = weight.shape[-1]
    values = torch.nn.functional.pad(weight.float(), (0, -columns % group)).unflatten(-1, (-1, group))
    scale = values.abs().amax(dim=-1, keepdim=True) / (2 ** (bits - 1) - 1)
    rounded = (values / scale.clamp_min(torch.finfo(torch.float32).tiny)).round() * scale
    return rounded.flatten(-2)[..., :columns].to(weight.dtype)


@contextmanager
def quantised(model: Any, bits: int = 4, group: int = 64) -> Iterator[None]:
    """Round every matrix but the embedding and the output head (`rounded_to_bits`); they come back afterwards."""
    tables = {id(module.weight) for module in model.modules() if isinstance(module, torch.nn.Embedding)}
    head = model.get_output_embeddings()
    tables |= {id(head.weight)} if head is not None else set()
    saved = [
        (parameter, parameter.detach().clone())
        for parameter in model.parameters()
        if parameter.dim() >= 2 and id(parameter) not in tables
    ]
    try:
        with torch.no_grad():
            for parameter, original in saved:
                parameter.copy_(rounded_to_bits(original, bits, group))
        yield
    finally:
        with torch.no_grad():
            for parameter, original in saved:
                parameter.copy_(original)
