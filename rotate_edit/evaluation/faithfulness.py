"""Do vocabulary channels do what they claim? Remove one from its neuron and measure, with three controls.

A `gate` or `in` channel claims to hold inputs that the neuron responds to. Without it the neuron must respond less
where the text has the channel's tokens. It must respond no less where the text has those of the neuron's other
channels. An `out` channel claims to promote its tokens. Without it they must be promoted less, and those of the other
channels no less. Removing a channel `v` from a vector `w` means `w - (w·v/|v|²) v`.

The published claim (arXiv 2604.06005) comes without its formulas, so these are this package's own. Every effect stands
beside three controls. The first is a random direction at the same angle to the neuron. The second is another channel of
the same neuron. The third is the same channel removed from another neuron.
"""

import io
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Tensor

from rotate_edit.channels.channel_set import Channel
from rotate_edit.console import Report, silent
from rotate_edit.errors import BadInput, Failure
from rotate_edit.evaluation import statistics
from rotate_edit.models import batches
from rotate_edit.models.batches import Passages
from rotate_edit.models.layout import neuron_rows
from rotate_edit.models.parameters import live_parameter

if TYPE_CHECKING:
    from matplotlib.figure import Figure

CONDITIONS = ("channel", "random direction", "other channel", "other neuron")
FEWEST_POSITIONS = 5
STRONG_ACTIVATION = 0.999
TOKENS_OF_TEXT = 8192
PROMPTS = 16
LABELS = {"own": "the channel's tokens", "others": "the other channels' tokens"}


@dataclass(frozen=True)
class Trial:
    """One channel's test.

    For `gate` and `in`, an effect is how much of the response `w·x` to the tokens is lost. Its unit is standard
    deviations over the text. For `out`, it is how much of the tokens' promotion is lost. Its unit is standard
    deviations over the vocabulary.

    Attributes:
        name: Name of the channel.
        matrix: "gate", "in" or "out".
        layer: Layer of the neuron.
        kurtosis: Excess kurtosis, as stored with the channel.
        support: Support, as stored with the channel.
        cosine: Cosine with the neuron's vector, as stored with the channel.
        where: "at" the tokens or "before" them, whichever the whole neuron responds to more. "after prompts" for `out`.
        places: Number of positions or prompts.
        before: The response or promotion with the whole neuron, in the unit of the effect.
        own: Effect on the channel's own tokens, by condition (see `CONDITIONS`).
        others: Effect on the tokens of the neuron's other channels, by condition.
        activation_own: How far the mean activation at the own tokens moves, by condition. In standard deviations,
            without a sign. Empty for `out`.
        activation_others: The same at the other channels' tokens.
    """

    name: str
    matrix: str
    layer: int
    kurtosis: float
    support: float
    cosine: float
    where: str
    places: int
    before: float
    own: Mapping[str, float]
    others: Mapping[str, float]
    activation_own: Mapping[str, float]
    activation_others: Mapping[str, float]

    def selectivity(self, condition: str) -> float:
        """Return the effect on the own tokens minus the effect on the others.

        Args:
            condition: One of `CONDITIONS`.

        Returns:
            The difference, in standard deviations.
        """
        return self.own[condition] - self.others[condition]


@dataclass(frozen=True)
class Activity:
    """What the MLPs of some layers read on a text.

    Attributes:
        tokens: int64 [P], the token at each position.
        following: int64 [P], the token after each position, -1 where the text ends.
        inputs: float32 [P, d_model] by layer, the MLP's input at each position.
    """

    tokens: Tensor
    following: Tensor
    inputs: Mapping[int, Tensor]


def without(vectors: Tensor, direction: Tensor) -> Tensor:
    """Remove the component along a direction from vectors: `w - (w·v/|v|²) v`.

    Args:
        vectors: Float [..., d].
        direction: Float [d], of any length but zero.

    Returns:
        Float [..., d].
    """
    unit = direction / direction.norm()
    return vectors - (vectors @ unit)[..., None] * unit


def random_at_same_angle(vector: Tensor, direction: Tensor, generator: torch.Generator) -> Tensor:
    """Draw a random direction with the same cosine to a vector as a given direction has.

    Args:
        vector: Float [d].
        direction: Float [d], the direction whose cosine is kept.
        generator: Source of the random numbers.

    Returns:
        Float [d], of unit length.
    """
    unit = vector / vector.norm()
    cosine = (direction @ unit) / direction.norm()
    noise = torch.randn(vector.shape, generator=generator)
    noise = noise - (noise @ unit) * unit
    return cosine * unit + (1 - cosine**2).clamp(min=0).sqrt() * noise / noise.norm()


def faithfulness(
    model: Any,
    tokenizer: Any,
    channels: Sequence[Channel],
    texts: Sequence[str],
    *,
    prompts: Sequence[str] = (),
    tokens: int = TOKENS_OF_TEXT,
    neurons: int | None = None,
    seed: int = 0,
    report: Report = silent,
) -> list[Trial]:
    """Test every channel that can be tested.

    A channel can be tested when its neuron has another one and its tokens occur in the texts.

    Args:
        model: The loaded base model.
        tokenizer: Its tokenizer.
        channels: The channels with their vectors, whole neurons at a time.
        texts: What `gate` and `in` channels are tested on.
        prompts: What `out` channels are tested after. By default the beginnings of the texts.
        tokens: At most this many tokens of the texts are used.
        neurons: Test at most this many neurons of each matrix, drawn by the seed. None tests all.
        seed: Seed of the draws and of the random directions.
        report: Called with progress.

    Returns:
        One trial per tested channel.

    Raises:
        BadInput: When channels have no vectors or belong to a mixture of experts.
        Failure: When no channel can be tested.
    """
    if any(channel.vector is None for channel in channels):
        raise BadInput("the channel set was written without vectors; decompose again and keep them.")
    if any(channel.expert is not None for channel in channels):
        raise BadInput("the channels of experts cannot be tested: which expert reads a token depends on the router.")
    config = model.config.get_text_config()
    sizes = {"vocabulary_size": config.vocab_size, "longest": getattr(config, "max_position_embeddings", None)}
    passages = batches.tokenise(tokenizer, texts, token_limit=tokens, **sizes)
    activity = read_activity(model, passages, sorted({channel.layer for channel in channels}))
    openings = list(prompts) or [" ".join(text.split()[:6]) for text in texts if len(text.split()) >= 6]
    asked = batches.tokenise(tokenizer, openings[:PROMPTS] or list(texts[:PROMPTS]), **sizes)
    generator = torch.Generator().manual_seed(seed)
    groups = _by_neuron(channels, neurons, generator)
    trials: list[Trial] = []
    for done, own in enumerate(groups):
        report("faithfulness", done, len(groups))
        for place, channel in enumerate(own):
            rest = own[place + 1 :] + own[:place]
            if rest:
                test = _test_write if channel.matrix == "out" else _test_read
                trial = test(model, channel, rest, activity, asked, generator)
                trials += [trial] if trial else []
    report("faithfulness", len(groups), len(groups))
    if not trials:
        raise Failure("no channel could be tested: each needs a second channel of its neuron, and tokens in the texts.")
    return trials


def _by_neuron(channels: Sequence[Channel], most: int | None, generator: torch.Generator) -> list[list[Channel]]:
    found: dict[tuple[str, int, int], list[Channel]] = {}
    for channel in channels:
        found.setdefault((channel.matrix, channel.layer, channel.neuron), []).append(channel)
    chosen: list[list[Channel]] = []
    for matrix in ("gate", "in", "out"):
        groups = [group for (kind, _, _), group in sorted(found.items()) if kind == matrix and len(group) > 1]
        order = torch.randperm(len(groups), generator=generator).tolist()[:most]
        chosen += [groups[place] for place in sorted(order)]
    return chosen


# The read side.


def read_activity(model: Any, passages: Passages, layers: Sequence[int]) -> Activity:
    """Run the texts once and keep what the MLPs of the layers read at every real position.

    Args:
        model: The loaded model.
        passages: The tokenised texts.
        layers: The layers to read.

    Returns:
        Tokens and MLP inputs, in the order of the batches.
    """
    inputs: dict[int, list[Tensor]] = {layer: [] for layer in layers}
    modules = {layer: _module(model, "in", layer) for layer in layers}
    latest: dict[int, Tensor] = {}
    handles = [
        module.register_forward_pre_hook(lambda _, values, layer=layer: latest.__setitem__(layer, values[0]))
        for layer, module in modules.items()
    ]
    tokens: list[Tensor] = []
    following: list[Tensor] = []
    try:
        for index, _ in enumerate(batches.log_probabilities(model, passages)):
            batch, lengths = passages.batches[index], passages.lengths[index]
            real = torch.arange(batch.shape[1])[None, :] < lengths[:, None]
            after = torch.where(real, batch, -1).roll(-1, dims=1)
            after[:, -1] = -1
            tokens.append(batch[real])
            following.append(after[real])
            for layer in layers:
                inputs[layer].append(latest[layer].reshape(*batch.shape, -1).cpu()[real].float())
    finally:
        for handle in handles:
            handle.remove()
    read = {layer: torch.cat(parts) for layer, parts in inputs.items()}
    return Activity(torch.cat(tokens), torch.cat(following), read)


def _module(model: Any, matrix: str, layer: int) -> Any:
    _, place = live_parameter(model, matrix, layer)
    return model.get_submodule(place.name.rpartition(".")[0])


def _vectors(model: Any, matrix: str, layer: int) -> Tensor:
    parameter, place = live_parameter(model, matrix, layer)
    return neuron_rows(parameter.detach(), place)


def _bias(model: Any, matrix: str, layer: int, neuron: int) -> float:
    _, place = live_parameter(model, matrix, layer)
    bias = getattr(model.get_submodule(place.name.rpartition(".")[0]), "bias", None)
    if bias is None:
        return 0.0
    return float(bias.detach()[place.part * (len(bias) // place.parts) + neuron])


def _gated(model: Any, layer: int) -> bool:
    try:
        live_parameter(model, "gate", layer)
    except BadInput:
        return False
    return True


def activations(model: Any, layer: int, neuron: int, inputs: Tensor, replaced: Mapping[str, Tensor] = {}) -> Tensor:
    """Compute a neuron's activation on MLP inputs: `act(gate·x) (in·x)`, or `act(in·x)` without a gate.

    Args:
        model: The loaded model.
        layer: Layer of the neuron.
        neuron: Index of the neuron in the layer.
        inputs: float32 [P, d_model], the MLP's inputs.
        replaced: Vectors [d_model] that stand in for the neuron's own, by matrix.

    Returns:
        float32 [P].
    """
    from transformers.activations import ACT2FN

    config = model.config.get_text_config()
    names = [getattr(config, key, None) for key in ("hidden_activation", "hidden_act", "activation_function")]
    activation = ACT2FN[next(name for name in names if name)]
    matrices = ("gate", "in") if _gated(model, layer) else ("in",)
    sums = {}
    for matrix in matrices:
        vector = replaced[matrix] if matrix in replaced else _vectors(model, matrix, layer)[neuron]
        sums[matrix] = inputs @ vector.float().cpu() + _bias(model, matrix, layer, neuron)
    return activation(sums["gate"]) * sums["in"] if "gate" in sums else activation(sums["in"])


def _test_read(
    model: Any,
    channel: Channel,
    rest: Sequence[Channel],
    activity: Activity,
    _: Passages,
    generator: torch.Generator,
) -> Trial | None:
    inputs = activity.inputs[channel.layer]
    other_ids = {index for other in rest for index in other.token_ids} - set(channel.token_ids)
    whole = inputs @ _vectors(model, channel.matrix, channel.layer)[channel.neuron].float().cpu()
    found = []
    for where, tokens in (("at", activity.tokens), ("before", activity.following)):
        own = torch.isin(tokens, torch.tensor(channel.token_ids))
        others = torch.isin(tokens, torch.tensor(sorted(other_ids), dtype=torch.int64))
        if min(int(own.sum()), int(others.sum())) >= FEWEST_POSITIONS:
            found.append((channel.sign * _response(whole, own, whole), where, own, others))
    if not found:
        return None
    before, where, own, others = max(found, key=lambda one: one[0])
    lost: dict[str, list[float]] = {}
    moved: dict[str, list[float]] = {}
    for condition, (neuron, vector) in _conditions(model, channel, rest[0], generator).items():
        read = inputs @ _vectors(model, channel.matrix, channel.layer)[neuron].float().cpu()
        left = inputs @ vector
        lost[condition] = [channel.sign * _response(read - left, places, read) for places in (own, others)]
        active = activations(model, channel.layer, neuron, inputs)
        quieter = activations(model, channel.layer, neuron, inputs, {channel.matrix: vector})
        moved[condition] = [abs(_response(active - quieter, places, active)) for places in (own, others)]
    return _trial(channel, lost, moved, where, int(own.sum()), before)


def _response(values: Tensor, places: Tensor, whole: Tensor) -> float:
    """How far values [P] at some places lie above their mean, in standard deviations of `whole` [P]."""
    return float((values[places].mean() - values.mean()) / whole.std().clamp(min=1e-12))


def _conditions(
    model: Any, channel: Channel, other: Channel, generator: torch.Generator
) -> dict[str, tuple[int, Tensor]]:
    """For each condition the neuron that is changed and its vector afterwards, float32 [d_model]."""
    rows = _vectors(model, channel.matrix, channel.layer)
    vector = rows[channel.neuron].float().cpu()
    assert channel.vector is not None  # checked by the caller
    assert other.vector is not None
    own = channel.vector.float().cpu()
    step = int(torch.randint(1, len(rows), (1,), generator=generator))
    stranger = (channel.neuron + step) % len(rows)
    return {
        "channel": (channel.neuron, without(vector, own)),
        "random direction": (channel.neuron, without(vector, random_at_same_angle(vector, own, generator))),
        "other channel": (channel.neuron, without(vector, other.vector.float().cpu())),
        "other neuron": (stranger, without(rows[stranger].float().cpu(), own)),
    }


# The write side.


def _test_write(
    model: Any,
    channel: Channel,
    rest: Sequence[Channel],
    activity: Activity,
    prompts: Passages,
    generator: torch.Generator,
) -> Trial | None:
    rows = _vectors(model, "out", channel.layer)
    conditions = _conditions(model, channel, rest[0], generator)
    strength = activations(model, channel.layer, channel.neuron, activity.inputs[channel.layer]).abs()
    amount = channel.sign * float(torch.quantile(strength, STRONG_ACTIVATION))
    if amount == 0:
        return None
    stranger = conditions["other neuron"][0]
    whole = [rows[channel.neuron].float().cpu(), rows[stranger].float().cpu()]
    vectors = torch.stack([*whole, *(vector for _, vector in conditions.values())])
    # The token sets that are watched, with the side on which each stands relative to the channel's.
    watched = [(channel.token_ids, 1), *((other.token_ids, other.sign * channel.sign) for other in rest)]
    promoted = promotion(model, channel.layer, amount * vectors, prompts, [ids for ids, _ in watched])
    sides = torch.tensor([side for _, side in watched])
    effects = {}
    for place, condition in enumerate(conditions):
        before = promoted[1 if condition == "other neuron" else 0]
        lost = (before - promoted[2 + place]) * sides
        effects[condition] = [float(lost[0]), float(lost[1:].mean())]
    return _trial(channel, effects, {}, "after prompts", prompts.texts, float(promoted[0, 0]))


def promotion(model: Any, layer: int, added: Tensor, prompts: Passages, token_sets: Sequence[Sequence[int]]) -> Tensor:
    """Measure how much vectors promote sets of tokens when they are added to an MLP's output after prompts.

    It is the change of a set's mean logit minus that of the mean logit of all tokens. The unit is standard deviations
    of the first vector's change over the vocabulary. The result is the mean over prompts.

    Args:
        model: The loaded model.
        layer: Layer of the MLP.
        added: Float [n, d_model]. Each vector is added alone, at the last position.
        prompts: The tokenised prompts.
        token_sets: Token ids of each set.

    Returns:
        float32 [n, sets].
    """
    total = torch.zeros(len(added), len(token_sets))
    sets = [torch.tensor(ids) for ids in token_sets]
    for batch, lengths in zip(prompts.batches, prompts.lengths, strict=True):
        for row in range(len(batch)):
            ids = batch[row : row + 1, : int(lengths[row])]
            with torch.no_grad():
                plain = _last_logits(model, ids)
                with _added_at_the_end(model, layer, added):
                    moved = _last_logits(model, ids.expand(len(added), -1)) - plain
            moved = moved - moved.mean(dim=1, keepdim=True)
            scale = moved[0].std()
            total += torch.stack([moved[:, chosen].mean(dim=1) for chosen in sets], dim=1) / scale
    return total / prompts.texts


def _last_logits(model: Any, ids: Tensor) -> Tensor:
    device = next(model.parameters()).device
    return model(input_ids=ids.to(device), use_cache=False).logits[:, -1].float().cpu()


@contextmanager
def _added_at_the_end(model: Any, layer: int, added: Tensor) -> Iterator[None]:
    def add(_: Any, __: Any, output: Tensor) -> Tensor:
        # Some families (OPT) hand their MLP all positions in one dimension.
        flat = output.reshape(len(added), -1, output.shape[-1]).clone()
        flat[:, -1] += added.to(output)
        return flat.reshape(output.shape)

    handle = _module(model, "out", layer).register_forward_hook(add)
    try:
        yield
    finally:
        handle.remove()


def _trial(
    channel: Channel,
    lost: Mapping[str, Sequence[float]],
    moved: Mapping[str, Sequence[float]],
    where: str,
    places: int,
    before: float,
) -> Trial:
    return Trial(
        name=channel.name,
        matrix=channel.matrix,
        layer=channel.layer,
        kurtosis=channel.kurtosis,
        support=channel.support,
        cosine=channel.cosine,
        where=where,
        places=places,
        before=before,
        own={condition: effect[0] for condition, effect in lost.items()},
        others={condition: effect[1] for condition, effect in lost.items()},
        activation_own={condition: effect[0] for condition, effect in moved.items()},
        activation_others={condition: effect[1] for condition, effect in moved.items()},
    )


# The table.


def table(trials: Sequence[Trial], *, support: float | None = None) -> list[dict[str, Any]]:
    """Summarise trials: one row for each matrix and condition, plain JSON.

    Each row has `own`, `others`, `before` and `selectivity` (own minus others). For `gate` and `in` it also has
    `activation_own` and `activation_others`. All are means over channels with their intervals. A control's row also has
    `difference`, the paired difference of selectivities (channel minus control). `p` is its p-value and `p_holm` the
    Holm-corrected one. `wins` is the share of channels that are more selective than the control.

    Args:
        trials: The trials.
        support: Use only channels with at least this support.

    Returns:
        The rows.
    """
    rows: list[dict[str, Any]] = []
    for matrix in ("gate", "in", "out"):
        chosen = [t for t in trials if t.matrix == matrix and (support is None or t.support >= support)]
        if not chosen:
            continue
        selective = {condition: [trial.selectivity(condition) for trial in chosen] for condition in CONDITIONS}
        for condition in CONDITIONS:
            row: dict[str, Any] = {"matrix": matrix, "condition": condition, "channels": len(chosen)}
            row["own"] = statistics.mean([trial.own[condition] for trial in chosen]).plain()
            row["others"] = statistics.mean([trial.others[condition] for trial in chosen]).plain()
            row["selectivity"] = statistics.mean(selective[condition]).plain()
            row["before"] = statistics.mean([trial.before for trial in chosen]).plain()
            if matrix != "out":
                for name in ("activation_own", "activation_others"):
                    row[name] = statistics.mean([getattr(trial, name)[condition] for trial in chosen]).plain()
            if condition != "channel":
                change = statistics.paired_bootstrap(selective[condition], selective["channel"])
                wins = int(np.sum(np.array(selective["channel"]) > np.array(selective[condition])))
                row |= {"difference": change.measure.plain(), "p": change.p}
                row["wins"] = statistics.wilson(wins, len(chosen)).plain()
            rows.append(row)
    tested = [row for row in rows if "p" in row]
    for row, p in zip(tested, statistics.holm([row["p"] for row in tested]), strict=True):
        row["p_holm"] = p
    return rows


def plain_trials(trials: Sequence[Trial]) -> list[dict[str, Any]]:
    """Return the trials as plain JSON.

    Args:
        trials: The trials.

    Returns:
        One dictionary per trial, its fields by name.
    """
    return [asdict(trial) for trial in trials]


def figure(rows: Sequence[Mapping[str, Any]]) -> "Figure":
    """Draw the effect on the own tokens and on the others, for every matrix and condition, with intervals.

    Args:
        rows: Rows of `table`.

    Returns:
        A figure with one panel per matrix. Effects are in standard deviations.
    """
    from matplotlib.figure import Figure

    matrices = list(dict.fromkeys(row["matrix"] for row in rows))
    drawn = Figure(figsize=(3.6 * len(matrices), 3.4), layout="constrained")
    panels = drawn.subplots(1, len(matrices), squeeze=False)[0]
    for panel, matrix in zip(panels, matrices, strict=True):
        of_matrix = [row for row in rows if row["matrix"] == matrix]
        for offset, key, mark in ((-0.12, "own", "o"), (0.12, "others", "s")):
            values = [row[key] for row in of_matrix]
            centre = [value["value"] for value in values]
            spread = [
                [value["value"] - value["low"] for value in values],
                [value["high"] - value["value"] for value in values],
            ]
            places = [place + offset for place in range(len(values))]
            panel.errorbar(
                places,
                centre,
                yerr=spread,
                fmt=mark,
                capsize=3,
                label="own tokens" if key == "own" else "other channels' tokens",
            )
        panel.axhline(0, linewidth=0.8, color="0.5")
        panel.set_xticks(range(len(of_matrix)), [row["condition"].replace(" ", "\n") for row in of_matrix])
        unit = "promotion lost (sd)" if matrix == "out" else "response lost (sd)"
        panel.set_title(f"{matrix}: {unit}, {of_matrix[0]['channels']} channels", fontsize=9)
    panels[0].legend(fontsize=8)
    return drawn


def picture(rows: Sequence[Mapping[str, Any]]) -> bytes:
    """Draw `figure` as a PNG.

    Args:
        rows: Rows of `table`.

    Returns:
        The file's content.
    """
    stream = io.BytesIO()
    figure(rows).savefig(stream, format="png", dpi=144, facecolor="white", metadata={"Software": None})
    return stream.getvalue()
