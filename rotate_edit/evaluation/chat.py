"""A conversation with a base model and edited ones beside it, each of which remembers its own answers."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from transformers.generation.streamers import BaseStreamer

from rotate_edit.edits.edit import Edit
from rotate_edit.errors import BadInput
from rotate_edit.evaluation.variants import Variant, opened
from rotate_edit.models.generation import first_token, padding_token

# Is told an answer as far as it is written.
Tell = Callable[[str], None]


@dataclass(frozen=True)
class Speaker:
    """One model of a chat.

    Attributes:
        name: Its name.
        variant: How it differs from the base. None for the base.
        factor: What the edit's strengths are multiplied by. 0 switches it off.
        factors: What single concepts' or channels' strengths are multiplied by in place of `factor`.
        turns: What the user said and what it answered, oldest first.
    """

    name: str
    variant: Variant | None = None
    factor: float = 1.0
    factors: Mapping[str, float] = field(default_factory=dict)
    turns: tuple[tuple[str, str], ...] = ()

    @property
    def title(self) -> str:
        """Its name, and how strong its edit is where that is not as it was written."""
        own = [f"{name} x {factor:g}" for name, factor in self.factors.items()]
        every = [] if self.factor == 1 else ["off" if self.factor == 0 else f"x {self.factor:g}"]
        return f"{self.name} ({', '.join(every + own)})" if every + own else self.name

    @property
    def now(self) -> Variant | None:
        """The variant at the strengths of the chat. None where it changes nothing."""
        variant = self.variant
        if variant is None or (self.factor == 0 and not self.factors):
            return None
        if variant.edit is None:
            return variant
        return replace(variant, edit=scaled(variant.edit, self.factor, self.factors))


def scaled(edit: Edit, factor: float, factors: Mapping[str, float]) -> Edit:
    """An edit with its strengths multiplied.

    Args:
        edit: The edit.
        factor: For all concepts and channels that have no factor of their own.
        factors: By concept or channel.
    """
    changes = tuple(change.at(change.strength * factors.get(change.concept, factor)) for change in edit.changes)
    clamps = tuple(clamp.at(clamp.strength * factors.get(clamp.concept, factor)) for clamp in edit.clamps)
    return replace(edit, changes=changes, clamps=clamps)


def with_factor(speakers: Sequence[Speaker], factor: float, concept: str | None = None) -> list[Speaker]:
    """The speakers with their edits at another strength.

    Args:
        speakers: The speakers. The base stays as it is.
        factor: What the edits' own strengths are multiplied by.
        concept: One concept or channel, in the edits that have it. None means all of every edit.

    Raises:
        BadInput: A model is no edit, whose strength could be changed, or no edit has such a concept.
    """
    if concept is None:
        whole = [speaker.name for speaker in speakers if speaker.variant is not None and speaker.variant.edit is None]
        if whole and factor not in (0, 1):
            raise BadInput(f"{whole[0]} is an adapter or a checkpoint, which can only be switched on and off.")
        return [
            speaker if speaker.variant is None else replace(speaker, factor=factor, factors={}) for speaker in speakers
        ]
    known = sorted({name for speaker in speakers for name in _concepts(speaker)})
    if concept not in known:
        raise BadInput(f"no edit here is of {concept}; there are {', '.join(known) or 'none'}.")
    return [
        replace(speaker, factors={**speaker.factors, concept: factor}) if concept in _concepts(speaker) else speaker
        for speaker in speakers
    ]


def _concepts(speaker: Speaker) -> tuple[str, ...]:
    """The concepts and channels whose strength can be changed."""
    variant = speaker.variant
    return () if variant is None or variant.edit is None else variant.edit.concepts


def answer(
    model: Any,
    tokenizer: Any,
    speaker: Speaker,
    message: str,
    *,
    chat: bool = True,
    new_tokens: int = 200,
    seed: int | None = None,
    temperature: float = 1.0,
    tell: Tell = lambda text: None,
) -> Speaker:
    """Let a model answer a message, with all that was said before.

    Args:
        model: The loaded base model.
        tokenizer: Its tokenizer.
        speaker: Who answers.
        message: What the user says.
        chat: Whether the tokenizer's chat template is used, where it has one.
        new_tokens: Most tokens of the answer.
        seed: Seed of the draw. None takes the most probable token each time.
        temperature: Of the draw.
        tell: Is told the answer each time it grows.

    Returns:
        The speaker with the message and its answer. An answer that was interrupted counts as far as it came.
    """
    ids = _prompt(tokenizer, speaker, message, chat)
    choice: dict[str, Any] = {"do_sample": False, "temperature": None, "top_k": None, "top_p": None}
    if seed is not None:
        choice = {"do_sample": True, "temperature": temperature, "top_k": 0, "top_p": 1.0}
    written = _Written(tokenizer, tell)
    changed = speaker.now
    device = next(model.parameters()).device
    with torch.random.fork_rng(devices=[device] if device.type == "cuda" else []), torch.no_grad():
        if seed is not None:
            torch.manual_seed(seed)
        try:
            if changed is None:
                _write(model, ids, written, new_tokens, padding_token(tokenizer), choice)
            else:
                with opened(model, changed) as other:
                    _write(other, ids, written, new_tokens, padding_token(tokenizer), choice)
        except KeyboardInterrupt:
            written.text += " …"
    return replace(speaker, turns=(*speaker.turns, (message, written.text)))


def _prompt(tokenizer: Any, speaker: Speaker, message: str, chat: bool) -> torch.Tensor:
    """Token ids of all that was said, int64 [1, n]."""
    if chat and getattr(tokenizer, "chat_template", None):
        said = [part for turn in speaker.turns for part in _messages(*turn)]
        try:
            text = tokenizer.apply_chat_template(
                [*said, {"role": "user", "content": message}], tokenize=False, add_generation_prompt=True
            )
        except Exception as error:
            # A template is code of whoever made the model, and may end in any error.
            reason = " ".join(f"{type(error).__name__}: {error}".split())[:200]
            raise BadInput(f"the chat template cannot be filled in ({reason}); go without it with --plain.") from error
        ids = tokenizer(str(text), add_special_tokens=False)["input_ids"]
    else:
        text = "".join(f"{asked}{answered}\n" for asked, answered in speaker.turns) + message
        ids = tokenizer(text)["input_ids"]
    return torch.tensor([list(ids) or [first_token(tokenizer)]], dtype=torch.int64)


def _messages(asked: str, answered: str) -> tuple[dict[str, str], dict[str, str]]:
    return {"role": "user", "content": asked}, {"role": "assistant", "content": answered}


def _write(
    model: Any, ids: torch.Tensor, streamer: "_Written", new_tokens: int, padding: int, choice: dict[str, Any]
) -> None:
    ids = ids.to(next(model.parameters()).device)
    model.generate(
        input_ids=ids,
        attention_mask=torch.ones_like(ids),
        max_new_tokens=new_tokens,
        num_beams=1,
        repetition_penalty=1.0,
        pad_token_id=padding,
        streamer=streamer,
        **choice,
    )


class _Written(BaseStreamer):
    """What a model has written so far: it is decoded as a whole each time, since a token may end inside a character."""

    def __init__(self, tokenizer: Any, tell: Tell) -> None:
        self.tokenizer, self.tell = tokenizer, tell
        self.ids: list[int] = []
        self.text = ""
        self.prompt_seen = False

    def put(self, value: torch.Tensor) -> None:
        """Take the next tokens. The first that come are the prompt."""
        if not self.prompt_seen:
            self.prompt_seen = True
            return
        self.ids += value.reshape(-1).tolist()
        self.text = self.tokenizer.decode(self.ids, skip_special_tokens=True)
        self.tell(self.text)

    def end(self) -> None:
        """Nothing is held back."""
