"""A recipe, opened: its model, its words and its items, and what can be done with them.

This module and `pipeline` read the recipe. Everything below them is given tensors and small settings.
"""

import logging
import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from rotate_edit.channels.decompose import claim_threshold
from rotate_edit.channels.locate import (
    ConceptGroup,
    SearchSettings,
    Site,
    by_concept,
    divide_tokens,
    locate_concept,
    sites_of,
)
from rotate_edit.channels.locators import find_locator
from rotate_edit.channels.solver import SolverSettings
from rotate_edit.console import Report, silent
from rotate_edit.edits.build import build_edits, describe_vectors
from rotate_edit.edits.edit import Edit
from rotate_edit.edits.material import BuildSettings, Concept, Material
from rotate_edit.edits.methods import (
    Choice,
    Decimal,
    Distribution,
    EditMethod,
    Whole,
    make_control,
    make_method,
)
from rotate_edit.edits.methods.defaults import ROWS_AT_MOST, ROWS_METHOD
from rotate_edit.errors import BadInput, Failure
from rotate_edit.estimate import Job, job_cost, locating_cost
from rotate_edit.evaluation import measures
from rotate_edit.evaluation.compare import Plan
from rotate_edit.evaluation.evaluate import Evaluation, evaluate
from rotate_edit.evaluation.harness import Settings
from rotate_edit.evaluation.items import texts_about
from rotate_edit.evaluation.measures import Reference
from rotate_edit.evaluation.provenance import weights_hash
from rotate_edit.evaluation.strength import Solved, cost_of_removal, solve_strength
from rotate_edit.evaluation.tasks import Items, open_items
from rotate_edit.evaluation.text_tasks import items_from_text
from rotate_edit.evaluation.variants import Variant
from rotate_edit.evaluation.written_items import stand_in_items, written_items
from rotate_edit.files import cache_folder, check_output_outside
from rotate_edit.machine import Cost, check_cost, pick_device
from rotate_edit.models.batches import Passages, tokenise
from rotate_edit.models.checkpoint import Checkpoint, identity, load_model, load_tokenizer, open_checkpoint
from rotate_edit.models.cost import SMALL_MODEL, parameters, size_of
from rotate_edit.recipe import ConceptRecipe, Recipe, parse_recipe, read_recipe
from rotate_edit.vocabulary.concept import TokenSet, find_tokens
from rotate_edit.vocabulary.projection import (
    Projections,
    Vocabulary,
    VocabularyRules,
    read_projections,
    read_vocabulary,
)

# Is told what the user should know before anything long begins, one sentence each.
Tell = Callable[[Sequence[str]], None]

# Divisions of a concept into groups that `group_distance: auto` tries; the first keeps it whole.
GROUP_DISTANCES = (2.0, 0.7, 0.5)
# The samples of each prompt that a large model gets.
FEWER_SAMPLES = 4


def untold(sentences: Sequence[str]) -> None:
    """Ignore what the user should know.

    Args:
        sentences: What it is.
    """


@dataclass(frozen=True)
class Session:
    """A recipe, opened and checked. Nothing was written yet.

    Attributes:
        recipe: Without controls that cannot work on this model or on these matrices. `notes` names them.
        checkpoint: The base.
        tokenizer: Its tokenizer.
        vocabulary: Its vocabulary under the recipe's rules.
        tokens: For each concept its token set.
        given_items: What the recipe gives to measure the edit on, or None.
        device: Where the work is done.
        notes: What was left out, one sentence each.
        kept: What was read or computed so far, by its name.
    """

    recipe: Recipe
    checkpoint: Checkpoint
    tokenizer: Any
    vocabulary: Vocabulary
    tokens: tuple[TokenSet, ...]
    given_items: Items | None
    device: str
    notes: tuple[str, ...] = ()
    kept: dict[str, Any] = field(default_factory=dict)

    # What the recipe says.

    @property
    def method(self) -> EditMethod:
        """The recipe's edit method."""
        return make_method(self.recipe.method, self.recipe.edit.settings)

    @property
    def controls(self) -> tuple[EditMethod, ...]:
        """The methods that are drawn beside it."""
        names = dict.fromkeys(self.recipe.evaluate.controls or ())
        return tuple(make_control(name, self.recipe.edit.settings) for name in names if name != self.recipe.method)

    @property
    def sites(self) -> tuple[Site, ...]:
        """The neuron matrices that may be edited."""
        return tuple(sites_of(self.checkpoint, matrices_of(self.recipe, self.checkpoint), self.recipe.locate.layers))

    @property
    def search_settings(self) -> SearchSettings:
        """How channels are looked for."""
        return search_settings(self.recipe, self.checkpoint)

    @property
    def warnings(self) -> list[str]:
        """Everything the user should know about the words, one sentence each."""
        return [warning for tokens in self.tokens for warning in tokens.warnings]

    # The model.

    @property
    def model(self) -> Any:
        """The live base model, loaded when it is first asked for.

        It is in bfloat16 on a CUDA GPU, which the memory check counts on, and in float32 elsewhere.
        """
        if "model" not in self.kept:
            dtype = torch.bfloat16 if self.device == "cuda" else torch.float32
            self.kept["model"] = load_model(self.checkpoint, device=self.device, dtype=dtype)
        return self.kept["model"]

    @property
    def items(self) -> Items | None:
        """What the edit is measured on: what the recipe gives, or what is made from text that the model writes itself.

        That text is written when it is first asked for. None where the recipe wants neither. None too where the model
        does not name a concept in its own text about it, and the recipe gives every strength.

        Raises:
            BadInput: The model does not name a concept often enough, and the edit cannot be made without.
        """
        wanted = self.recipe.evaluate
        if self.given_items is not None or not wanted.written_texts:
            return self.given_items
        if "items" not in self.kept:
            words, near, plurals = _words_of(self.recipe)
            how: dict[str, Any] = {"texts": wanted.written_texts, "seed": self.recipe.seed, "plurals": plurals}
            try:
                self.kept["items"] = written_items(self.model, self.tokenizer, words, near, **how)
            except BadInput as error:
                needed = {need for method in (self.method, *self.controls) for need in method.about.reads}
                if self.seeks_strengths or "text" in needed:
                    raise
                self.kept["items"], self.kept["unmeasured"] = None, f"Nothing is measured: {error}"
        return self.kept["items"]

    @property
    def seeks_strengths(self) -> bool:
        """Whether some concept's strength is to be found, and not given by the recipe."""
        return any(concept.goal.kind != "strength" for concept in self.recipe.concepts)

    @property
    def remarks(self) -> list[str]:
        """What was left out so far, one sentence each."""
        return [*self.notes, *([self.kept["unmeasured"]] if "unmeasured" in self.kept else [])]

    @property
    def writes_items(self) -> bool:
        """Whether the model writes the text itself that the edit is measured on."""
        return self.given_items is None and self.recipe.evaluate.written_texts > 0

    @property
    def projections(self) -> Projections:
        """What vectors are projected on, read when it is first asked for."""
        if "projections" not in self.kept:
            self.kept["projections"] = read_projections(self.checkpoint, self.vocabulary, self.device)
        found: Projections = self.kept["projections"]
        return found

    @property
    def is_large(self) -> bool:
        """Whether the model has so many parameters that less is measured of it."""
        return parameters(self.checkpoint) > SMALL_MODEL

    def forget(self, *names: str) -> None:
        """Let go of what was read or computed, to have its memory back. It is read again when it is asked for.

        Args:
            names: "projections" (the vocabulary's tables) or "material" (what edit methods read, such as gradients).
        """
        for name in names:
            self.kept.pop(name, None)

    def reference(self, concept: str, split: str, *, damage: bool = True) -> Reference | None:
        """The base's answers on one split of the items' texts. None when they hold nothing about the concept.

        Args:
            concept: The concept's name.
            split: "validation" (for choosing) or "test" (for reporting).
            damage: Whether damage will be measured; without it most of the work is spared.
        """
        items = self.items
        if items is None:
            return None
        own, others = texts_about(items, [concept], split)
        if not own or not others:
            return None
        return measures.reference(
            self.model,
            self.tokenizer,
            self._tokens_of(concept).ids,
            concept_texts=own,
            other_texts=others,
            prompts=items.prompts,
            longest=self._longest,
            token_limit=self.recipe.evaluate.tokens,
            damage=damage,
        )

    @property
    def _longest(self) -> int | None:
        return getattr(self.model.config.get_text_config(), "max_position_embeddings", None)

    def _tokens_of(self, concept: str) -> TokenSet:
        return next(tokens for tokens in self.tokens if tokens.name == concept)

    # Locate.

    def locate(self, methods: Sequence[EditMethod] | None = None, report: Report = silent) -> tuple[ConceptGroup, ...]:
        """Find the neurons that carry each concept: one entry for each group of a concept's tokens.

        Only what the methods read is looked for. A method that needs no channels triggers no channel search.

        `group_distance: auto` takes the division into groups whose edit does least damage on the validation texts.
        Without such texts a concept is one group. So it is for methods that read self-generated text, which fit every
        place where the concept comes next.

        Args:
            methods: The methods that are to be built. The recipe's own when left out.
            report: Is told how far the search is.
        """
        wanted = tuple(methods) if methods is not None else (self.method,)
        reads = frozenset(need for method in wanted for need in method.about.reads)
        found: list[ConceptGroup] = []
        for place in range(len(self.tokens)):
            divisions = [self._divided(place, distance, reads, report) for distance in self._distances()]
            found += divisions[0] if len(divisions) == 1 else self._least_damage(divisions)
        return tuple(found)

    def locate_channels(self, report: Report = silent) -> tuple[ConceptGroup, ...]:
        """The channels that carry each concept, whatever the recipe's method reads; each concept is one group.

        Args:
            report: Is told how far the search is.
        """
        return self.divided(self.distances[0], frozenset({"channels"}), report)

    def _distances(self) -> tuple[float, ...]:
        return self.distances if tries_groups(self.method) and self.items is not None else self.distances[:1]

    @property
    def distances(self) -> tuple[float, ...]:
        """The cosine distances at which a concept's tokens may fall into groups, the whole concept first."""
        wanted = self.recipe.locate.group_distance
        return GROUP_DISTANCES if wanted == "auto" else (float(wanted),)

    @property
    def edits_token_rows(self) -> bool:
        """Whether embedding rows or output head rows are edited beside neurons."""
        return self.recipe.edit.embeddings or bool(self.plan.amplified)

    def divided(self, distance: float, reads: frozenset[str], report: Report = silent) -> tuple[ConceptGroup, ...]:
        """Every concept's tokens in groups at one distance, with what methods that read so much need.

        Args:
            distance: The cosine distance at which tokens fall into groups.
            reads: What is looked for: "channels", "scores", both or neither.
            report: Is told how far the search is.
        """
        return tuple(
            group for place in range(len(self.tokens)) for group in self._divided(place, distance, reads, report)
        )

    def _divided(self, place: int, distance: float, reads: frozenset[str], report: Report) -> list[ConceptGroup]:
        tokens = self.tokens[place]
        if distance >= 2:
            groups = [ConceptGroup(tokens, 0, tokens.ids, {}, {})]
        else:
            groups = divide_tokens(self.projections, self.vocabulary, tokens, distance)
        if not reads & {"channels", "scores"}:
            return groups

        def named(step: str, done: int, total: int) -> None:
            report(f"{step} {tokens.name}, groups at {distance:g}", done, total)

        return locate_concept(
            self.checkpoint,
            self.sites,
            self.projections,
            self.vocabulary,
            groups,
            self.search_settings,
            place=place,
            channels="channels" in reads,
            report=named,
        )

    def _least_damage(self, divisions: Sequence[list[ConceptGroup]]) -> list[ConceptGroup]:
        """The division of one concept into groups whose edit costs least on the validation texts, at equal removal.

        Groups must at least halve the damage to be preferred to the whole concept, which needs fewer ranks and neurons.
        """
        name = divisions[0][0].name
        known, goal = self.reference(name, "validation"), self._recipe_of(name).goal
        costs = []
        for groups in divisions:
            cost = math.inf
            if known is not None and any(group.chosen for group in groups):
                edit = build_edits(self.material(groups), [self.method])[self.method.about.name]
                share = goal.value if goal.kind == "remaining" else 0.1
                cost = cost_of_removal(self.model, known, edit, share) if edit.does_something else math.inf
            costs.append(cost if groups is divisions[0] else 2 * cost)
        return divisions[costs.index(min(costs))]

    def _recipe_of(self, concept: str) -> ConceptRecipe:
        return next(entry for entry in self.recipe.concepts if entry.name == concept)

    # Edit.

    def material(self, groups: Sequence[ConceptGroup], shared: dict[Any, Any] | None = None) -> Material:
        """What edit methods are given.

        Args:
            groups: What was located.
            shared: What was computed for another material of this session, to be used again.
        """
        edit, found = self.recipe.edit, by_concept(groups)
        kept = self._kept()
        concepts = []
        for name, own in found.items():
            goal = self._recipe_of(name).goal
            remaining = goal.value if goal.kind == "remaining" else 0.1
            concepts.append(Concept(tuple(own), tuple(kept[name]), remaining, goal.amplifies))
        settings = BuildSettings(
            direction=edit.direction,
            ridge=edit.ridge,
            fold_norm=edit.fold_norm,
            least_score=self.recipe.select.lm_head_z,
            self_text_tokens=edit.self_text,
            layer_strengths=edit.layer_strengths,
            seed=self.recipe.seed,
        )
        if shared is None:
            shared = self.kept.setdefault("material", {})
        return Material(
            checkpoint=self.checkpoint,
            tokenizer=self.tokenizer,
            untrained=self.vocabulary.untrained,
            sites=self.sites,
            concepts=tuple(concepts),
            settings=settings,
            load=lambda: self.model,
            texts=self._texts,
            kept=shared,
        )

    def _texts(self, concept: str) -> tuple[Passages, Passages]:
        """Validation texts about a concept and without it. Raises BadInput when there are none."""
        items = self.items
        if items is None:
            raise BadInput(
                "some methods need text about the concept; give evaluate.items, evaluate.text or "
                "evaluate.written_texts."
            )
        about, free = texts_about(items, [concept], "validation")
        if not about or not free:
            raise BadInput(f"the items hold no validation texts with and without {concept}; give others, or more text.")
        sizes: dict[str, Any] = {
            "vocabulary_size": self.model.config.get_text_config().vocab_size,
            "longest": self._longest,
            "token_limit": self.recipe.evaluate.tokens,
        }
        return tokenise(self.tokenizer, about, **sizes), tokenise(self.tokenizer, free, **sizes)

    def _kept(self) -> dict[str, list[Tensor]]:
        """By concept the token sets that its edit leaves alone."""
        texts = list(self.vocabulary.texts)

        def ids_of(where: str, words: Sequence[str], plurals: bool = False) -> Tensor:
            return find_tokens(where, list(words), self.tokenizer, texts, plurals=plurals, required=False).ids

        protected = [ids_of("protect", [entry] if isinstance(entry, str) else entry) for entry in self.recipe.protect]
        kept: dict[str, list[Tensor]] = {}
        for concept, tokens in zip(self.recipe.concepts, self.tokens):
            words = [ids_of(f"{concept.name}.keep", [word], concept.plurals) for word in concept.keep]
            others = [other.ids for other in self.tokens if other.name != concept.name]
            every = words + self.neighbours(concept, tokens.ids) + others + protected
            kept[concept.name] = [ids for ids in every if len(ids)]
        return kept

    def neighbours(self, concept: ConceptRecipe, own: Tensor) -> list[Tensor]:
        """The neighbour words that a concept's direction leaves alone, each by itself, int64.

        Many together, above a sixteenth of the model's width, count as one. Little room would be left for the direction
        otherwise.

        Args:
            concept: The concept.
            own: Its tokens, int64.
        """
        texts = list(self.vocabulary.texts)
        found = [
            find_tokens("neighbours", [word], self.tokenizer, texts, plurals=concept.plurals, required=False).ids
            for word in concept.neighbour_words
        ]
        apart = [ids[~torch.isin(ids, own)] for ids in found]
        kept = [ids for ids in apart if len(ids)]
        many = len(kept) > self.checkpoint.hidden_size // 16
        return [torch.cat(kept).unique()] if many else kept

    def build(
        self, methods: Sequence[EditMethod], groups: Sequence[ConceptGroup], shared: dict[Any, Any] | None = None
    ) -> dict[str, Edit]:
        """The edits of some methods at strength 1, by name.

        Args:
            methods: The methods.
            groups: What was located for them.
            shared: What was computed for another material of this session, to be used again.

        Raises:
            Failure: The recipe's own method is among them and would change nothing.
        """
        material = self.material(groups, shared)
        found = build_edits(material, methods)
        own = self.recipe.method
        if own in found and self.recipe.edit.embeddings and own != ROWS_METHOD:
            found[own] = self._with_rows(material, found[own])
        if own in found and not found[own].does_something:
            raise Failure(
                f"the method {own} found no neuron to change; raise select.fdr, lower select.share or "
                "select.lm_head_z, raise locate.candidates, or set edit.method to rank-one, which needs none located."
            )
        settings = self.recipe.edit.model_dump() | {
            "select": self.recipe.select.model_dump(),
            "seed": self.recipe.seed,
        }
        changed = found[own].changes if own in found else ()
        places = {self.checkpoint.place(made.matrix, made.layer, made.expert).name for made in changed}
        base = identity(self.checkpoint, places, full=self.recipe.save.full_hash or None)
        return {name: replace(edit, base=base, settings=settings) for name, edit in found.items()}

    def _with_rows(self, material: Material, edit: Edit) -> Edit:
        """The edit with the embedding rows of the suppressed concepts. An amplified concept keeps its rows: what they
        say without its direction is no step upwards."""
        suppressed = tuple(concept for concept in material.concepts if not concept.amplified)
        rows = build_edits(replace(material, concepts=suppressed), [make_method(ROWS_METHOD)])[ROWS_METHOD]
        capped = tuple(replace(change, most=ROWS_AT_MOST).at(change.strength) for change in rows.changes)
        return replace(edit, changes=(*capped, *edit.changes))

    def solve(self, edit: Edit) -> dict[str, Solved]:
        """Each concept's strength: the number that the recipe gives, or the one that reaches its goal.

        It is solved on validation texts, never on those of the report. Where no strength reaches a goal, it is the one
        that comes nearest, and `missed` says so.

        Args:
            edit: At strength 1.

        Raises:
            BadInput: A goal is to be reached, and no validation text is about the concept.
            Failure: No strength does anything, or every one exceeds the budget.
        """
        return {concept.name: self.solve_one(concept.name, edit) for concept in self.recipe.concepts}

    def strengths(self, edit: Edit) -> dict[str, float]:
        """Each concept's strength, as `solve` finds it. A goal that is missed is logged as a warning.

        Args:
            edit: At strength 1.

        Raises:
            BadInput: As `solve`.
            Failure: As `solve`.
        """
        solved = self.solve(edit)
        for sentence in missed_goals(solved):
            logging.getLogger(__name__).warning(sentence)
        return {name: found.strength for name, found in solved.items()}

    def solve_one(self, concept: str, edit: Edit) -> Solved:
        """One concept's strength, as `solve` finds it.

        Args:
            concept: The concept's name.
            edit: At strength 1. The parts of other concepts do not count.

        Raises:
            BadInput: As `solve`.
            Failure: As `solve`.
        """
        goal = self._recipe_of(concept).goal
        if goal.kind == "strength":
            return Solved(goal.value)
        known = self.reference(concept, "validation", damage=goal.kind != "remaining")
        if known is None:
            raise BadInput(
                f"concepts.{concept}.{goal.kind}: the items hold no validation text about it; give other items, or a "
                "strength."
            )
        return solve_strength(self.model, known, edit.only(concept), goal)

    def edit(self, strength: float | None = None, report: Report = silent) -> Edit:
        """The recipe's edit, located, built and at its strength.

        Args:
            strength: One strength for all concepts, in the method's unit. The recipe's goals when left out.
            report: Is told how far it is.

        Raises:
            Failure: Nothing was located, or no strength reaches the goal.
        """
        groups = self.locate(report=report)
        self.check_located(groups)
        unit = self.build([self.method], groups)[self.recipe.method]
        return self.described(unit.at(strength if strength is not None else self.strengths(unit)), groups)

    def described(self, edit: Edit, groups: Sequence[ConceptGroup]) -> Edit:
        """The edit with what becomes of every neuron that it changes.

        Args:
            edit: At its strength.
            groups: What was located.
        """
        vectors = describe_vectors(self.material(groups), edit, self.projections)
        return replace(edit, vectors=vectors)

    def check_located(self, groups: Sequence[ConceptGroup]) -> None:
        """Raises Failure when the recipe's method needs channels and no channel carries some concept."""
        why = self.why_not_located(groups)
        if why:
            raise Failure(why)

    def why_not_located(self, groups: Sequence[ConceptGroup]) -> str | None:
        """Why the recipe's method has nothing to do, in words. None where it has."""
        if "channels" not in self.method.about.reads:
            return None
        parts = []
        for name, own in by_concept(groups).items():
            if any(group.chosen for group in own):
                continue
            channels = {channel.name: channel for group in own for channel in group.channels}
            neurons = {(c.layer, c.expert, c.neuron, c.matrix) for c in channels.values()}
            strongest = max(float(scores.abs().max()) for group in own for scores in group.scores.values())
            parts.append(
                f"No channel of the {len(neurons)} candidate neurons carries {name}: {len(channels)} channels were "
                "found, none of them with enough of the concept's words among its strongest tokens and more support "
                "than chance gives "
                f"(strongest LM-head z-score {strongest:.2f})."
            )
        if not parts:
            return None
        advice = "Raise select.fdr, lower select.share, raise locate.candidates, or name more words."
        return f"{' '.join(parts)} {advice}"

    # Evaluate.

    @property
    def plan(self) -> Plan:
        """What is asked of the edited model."""
        return plan_of(self.recipe, self.checkpoint)

    def evaluate(self, edit: Edit, report: Report = silent) -> Evaluation:
        """Measure an edit against the base: lm-eval's tasks, the metrics, and what both models write.

        Args:
            edit: At its strength.
            report: Is told how far it is.
        """
        plan = self.plan
        suppressed = [tokens.ids for tokens in self.tokens if tokens.name in (plan.suppressed or plan.concepts)]
        amplified = [tokens.ids for tokens in self.tokens if plan.amplifies(tokens.name)]
        return evaluate(
            self.model,
            self.tokenizer,
            [Variant("edited", edit)],
            plan,
            self.items,
            concept_ids=torch.cat(suppressed).unique(),
            amplified_ids=torch.cat(amplified).unique() if amplified else None,
            weights_hash=weights_hash(self.checkpoint),
            cache=cache_folder(),
            report=report,
        )

    # Search.

    def with_settings(self, settings: Mapping[str, Any]) -> "Session":
        """The session with other values of its recipe. The model and what was read off it are shared.

        Args:
            settings: By dotted keys such as `edit.ridge` or `edit.settings.rank`. "first layer" and "last layer" bound
                the layers. Keys without a dot are the search's own, and left out.

        Raises:
            BadInput: A value is not possible.
        """
        content = self.recipe.model_dump(mode="json", by_alias=True)
        method = settings.get("edit.method", self.recipe.method)
        if method != self.recipe.method:
            content["edit"]["settings"] = make_control(method, self.recipe.edit.settings).settings
        for key, value in settings.items():
            *sections, name = key.split(".")
            if sections:
                place = content
                for section in sections:
                    place = place[section]
                place[name] = value.split("+") if key == "locate.matrices" else value
        if "last layer" in settings:
            first, last = settings.get("first layer", 0), settings["last layer"]
            content["locate"]["layers"] = [layer for layer in self._layers if first <= layer <= last]
        return replace(self, recipe=parse_recipe(content))

    @property
    def _layers(self) -> list[int]:
        return sorted(self.recipe.locate.layers or range(self.checkpoint.layers))

    @property
    def search_methods(self) -> tuple[EditMethod, ...]:
        """The methods that a search tries: the recipe's own, and those that it names.

        Where a concept is amplified it is the own one alone, since strengths have other units beside it.
        """
        own = self.method
        beside = () if self.plan.amplified else own.about.search_beside
        return (own, *(make_control(name, self.recipe.edit.settings) for name in beside))

    def search_space(self, method: EditMethod) -> dict[str, Distribution]:
        """What a search may vary with a method, by the keys of `with_settings`."""
        about, size = method.about, size_of(self.checkpoint)
        own = method.finest(size).search_space(size)
        space: dict[str, Distribution] = {f"edit.settings.{name}": values for name, values in own.items()}
        if about.last_layer_alone:
            return space
        layers, matrices = self._layers, matrices_of(self.recipe, self.checkpoint)
        last = layers[-about.search_layers :] if about.search_layers else layers[len(layers) // 2 :]
        space["last layer"] = Choice(tuple(last))
        if "activations" not in about.reads:
            space["first layer"] = Whole(layers[0], last[0])
        if len(matrices) > 1:
            space["locate.matrices"] = Choice(("+".join(matrices), *matrices))
        reads = find_locator(about.locator).reads
        if "scores" in reads:
            space["select.lm_head_z"] = Decimal(0.2, 3.0, log=True)
        if "channels" in reads:
            space |= {
                "select.share": Decimal(0.05, 0.9),
                "select.fdr": Decimal(0.001, 1.0, log=True),
                "select.top": Whole(3, 20),
            }
        if about.name == self.recipe.method:
            # What the least-divergence direction needs is not read for a method that is tried beside another.
            other = "least-divergence" if "activations" in about.reads else "mean"
            directions = dict.fromkeys(("least-collateral", other, self.recipe.edit.direction))
            space["edit.direction"] = Choice(tuple(directions))
        space["edit.ridge"] = Decimal(0.003, 30.0, log=True)
        space["edit.fold_norm"] = Choice((True, False))
        return space

    @property
    def own_settings(self) -> dict[str, Any]:
        """The recipe's own values at the keys that a search may vary."""
        content = self.recipe.model_dump(mode="json")
        values: dict[str, Any] = {}
        for section in ("select", "edit"):
            values |= {f"{section}.{key}": value for key, value in content[section].items()}
        values |= {f"edit.settings.{name}": value for name, value in self.method.settings.items()}
        return values | {
            "edit.method": self.recipe.method,
            "locate.matrices": "+".join(matrices_of(self.recipe, self.checkpoint)),
            "first layer": self._layers[0],
            "last layer": self._layers[-1],
        }

    def recipe_at(self, strengths: Mapping[str, float]) -> Recipe:
        """The recipe with strengths in place of its goals."""
        concepts = [
            concept.model_copy(
                update={"remaining": None, "budget": None, "odds": None, "strength": round(strengths[concept.name], 4)}
            )
            for concept in self.recipe.concepts
        ]
        return self.recipe.model_copy(update={"concepts": concepts})

    # Cost.

    @property
    def job(self) -> Job:
        """What the session's cost is counted from."""
        return job_of(self.recipe, self.checkpoint)


def missed_goals(solved: Mapping[str, Solved]) -> list[str]:
    """One sentence for each concept whose goal no strength reaches."""
    return [f"Goal missed: {name}: {found.missed}" for name, found in solved.items() if found.missed]


def open_session(
    recipe: Recipe | str | Path,
    *,
    output: Path | None = None,
    measured: bool = True,
    allow_code: bool = False,
    tell: Tell = untold,
) -> Session:
    """Open everything that a recipe names.

    Args:
        recipe: A recipe, or the file or the bundled name of one.
        output: Where a run will write. A run that does not fit this machine's memory or disk is then refused first.
            Without it only locating is.
        measured: Whether the edit is evaluated.
        allow_code: Let the definitions of the items run code that they bring along.
        tell: Is told what the user should know of the words, and what was left out.

    Raises:
        BadInput: Something cannot work. Nothing was written.
    """
    recipe = recipe if isinstance(recipe, Recipe) else read_recipe(recipe)
    checkpoint = open_checkpoint(recipe.model, recipe.revision)
    if output is not None:
        check_output_outside(output, checkpoint.folder)
    sites_of(checkpoint, matrices_of(recipe, checkpoint), recipe.locate.layers)
    recipe, notes = _suited(recipe, checkpoint)
    device = pick_device(recipe.decompose.device)
    job = job_of(recipe, checkpoint)
    if output is not None:
        check_cost(job_cost(job, checkpoint, None, device=device, measured=measured), output)
    else:
        check_cost(locating_cost(job, checkpoint, device=device), Path())
    tokenizer = load_tokenizer(checkpoint)
    rules = VocabularyRules(
        projection=recipe.locate.projection,
        words_only=recipe.decompose.words_only,
        ignore_undertrained=recipe.decompose.ignore_undertrained,
        remove_frequency=recipe.decompose.remove_frequency,
    )
    vocabulary = read_vocabulary(checkpoint, rules, tokenizer)
    texts = list(vocabulary.texts)
    tokens = tuple(
        find_tokens(concept.name, concept.words, tokenizer, texts, plurals=concept.plurals)
        for concept in recipe.concepts
    )
    notes += tuple(_unkept(recipe, tokenizer, texts))
    tell([*(warning for found in tokens for warning in found.warnings), *notes])
    items = _open_items(recipe, tokenizer, allow_code)
    if output is not None:
        _check_validation_texts(recipe, items)
    return Session(recipe, checkpoint, tokenizer, vocabulary, tokens, items, device, notes)


def _unkept(recipe: Recipe, tokenizer: Any, texts: list[str]) -> Iterator[str]:
    """One sentence for each list of words to be left alone that holds words of which no form is one token."""
    protected = [word for entry in recipe.protect for word in ([entry] if isinstance(entry, str) else entry)]
    lists = [("protect", protected, False)]
    for concept in recipe.concepts:
        lists.append((f"concepts.{concept.name}.keep", concept.keep, concept.plurals))
        lists.append((f"concepts.{concept.name}.neighbour_words", concept.neighbour_words, concept.plurals))
    for where, words, plurals in lists:
        known = find_tokens(where, list(words), tokenizer, texts, plurals=plurals, required=False).words
        lost = [word for word in words if word not in known]
        if lost:
            yield f"{where}: an edit cannot leave {', '.join(map(repr, lost))} alone, for want of a token of its own."


def _check_validation_texts(recipe: Recipe, items: Items | None) -> None:
    """Refuse a goal that nothing can be measured for, before anything long. Raises BadInput."""
    for concept in recipe.concepts:
        if (
            concept.goal.kind != "strength"
            and items is not None
            and not all(texts_about(items, [concept.name], "validation"))
        ):
            raise BadInput(
                f"concepts.{concept.name}.{concept.goal.kind}: the items hold no validation text with and without it; "
                "give other items, or a strength."
            )


def estimate(recipe: Recipe, *, measured: bool = True) -> tuple[Cost, str]:
    """What a run of a recipe takes, and on which device. No weight is read.

    Args:
        recipe: The recipe.
        measured: Whether the edit is evaluated too.
    """
    checkpoint = open_checkpoint(recipe.model, recipe.revision)
    recipe, _ = _suited(recipe, checkpoint)
    device = pick_device(recipe.decompose.device)
    items = _stand_in(recipe, checkpoint) if _writes_text(recipe) else _given_items(recipe, checkpoint)
    return job_cost(job_of(recipe, checkpoint), checkpoint, items, device=device, measured=measured), device


def _writes_text(recipe: Recipe) -> bool:
    wanted = recipe.evaluate
    return bool(recipe.concepts and wanted.written_texts and not wanted.items and not wanted.text)


def _stand_in(recipe: Recipe, checkpoint: Checkpoint) -> Items | None:
    """Items of about the size of those that the model would write. None without a tokenizer to make them with."""
    words, _, plurals = _words_of(recipe)
    try:
        tokenizer = load_tokenizer(checkpoint)
    except BadInput:
        # The estimate tells first what does not fit; the job itself says that the tokenizer is missing.
        return None
    return stand_in_items(tokenizer, words, texts=recipe.evaluate.written_texts, plurals=plurals)


def _given_items(recipe: Recipe, checkpoint: Checkpoint) -> Items | None:
    return _open_items(recipe, load_tokenizer(checkpoint) if recipe.evaluate.text is not None else None)


def search_settings(recipe: Recipe, checkpoint: Checkpoint) -> SearchSettings:
    """How a recipe's channels are looked for, with the family's threshold for masking tokens where it gives none."""
    wanted, select = recipe.decompose, recipe.select
    solver = SolverSettings(
        solver=wanted.solver,
        channels=wanted.channels,
        moments=wanted.moments,
        claim_threshold=wanted.claim_threshold or claim_threshold(checkpoint),
        top_tokens=select.top,
        unsupported_limit=wanted.unsupported_limit,
        seed=recipe.seed,
    )
    return SearchSettings(solver, recipe.locate.candidates, wanted.tilted_start, select.top, select.share, select.fdr)


def plan_of(recipe: Recipe, checkpoint: Checkpoint) -> Plan:
    """What is asked of a recipe's edited model. A large one is sampled less, since that takes most of the time."""
    amplified = tuple(concept.name for concept in recipe.concepts if concept.goal.amplifies)
    suppressed = [concept for concept in recipe.concepts if concept.name not in amplified] or recipe.concepts
    return Plan(
        concepts=tuple(concept.name for concept in recipe.concepts),
        neighbours=tuple(name for concept in recipe.concepts for name in concept.neighbours),
        tasks=tuple(recipe.evaluate.tasks),
        items=recipe.evaluate.limit or Plan.items,
        settings=Settings(batch_size=recipe.evaluate.batch_size, limit=recipe.evaluate.limit),
        amplified=amplified,
        words=tuple(word for concept in suppressed for word in concept.words),
        samples=Plan.samples if parameters(checkpoint) <= SMALL_MODEL else FEWER_SAMPLES,
        seed=recipe.seed,
    )


def tries_groups(method: EditMethod) -> bool:
    """Whether a concept's tokens are divided into groups for a method, where a recipe leaves it open.

    What was located decides, and a method that reads self-generated text fits every place where the concept comes next.

    Args:
        method: The method.
    """
    return "channels" in method.about.reads and "self_text" not in method.about.reads


def matrices_of(recipe: Recipe, checkpoint: Checkpoint) -> tuple[str, ...]:
    """The kinds of matrices that a recipe's edit may change: those it names, or those that suit its method."""
    if recipe.locate.matrices is not None:
        return tuple(recipe.locate.matrices)
    about = make_method(recipe.method, recipe.edit.settings).about
    return tuple(kind for kind in checkpoint.matrices if kind in about.writes) if about.removes_knowledge else ("out",)


def job_of(recipe: Recipe, checkpoint: Checkpoint) -> Job:
    """What a recipe's cost is counted from."""
    method = make_method(recipe.method, recipe.edit.settings)
    names = dict.fromkeys(recipe.evaluate.controls or ())
    return Job(
        goals={concept.name: concept.goal for concept in recipe.concepts},
        plan=plan_of(recipe, checkpoint),
        method=method,
        controls=tuple(make_control(name, recipe.edit.settings) for name in names if name != recipe.method),
        matrices=matrices_of(recipe, checkpoint),
        search=search_settings(recipe, checkpoint),
        words_only=recipe.decompose.words_only,
        tries_groups=recipe.locate.group_distance == "auto" and tries_groups(method),
        self_text=recipe.edit.self_text,
        texts=bool(recipe.evaluate.items or recipe.evaluate.text or recipe.evaluate.written_texts),
        tokens=recipe.evaluate.tokens,
        points=len(set(recipe.evaluate.strengths)) + 1,
        limit=recipe.evaluate.limit,
        checkpoint=recipe.save.checkpoint,
        undo=recipe.save.undo,
        written_texts=recipe.evaluate.written_texts if _writes_text(recipe) else 0,
        sparse=parameters(checkpoint) > SMALL_MODEL,
    )


def _suited(recipe: Recipe, checkpoint: Checkpoint) -> tuple[Recipe, tuple[str, ...]]:
    """The recipe without controls that cannot work here, and what to say about them.

    Raises BadInput where the recipe's own method cannot."""
    controls = recipe.evaluate.controls or []
    reasons = {
        name: _why_unsuited(make_control(name, recipe.edit.settings), recipe, checkpoint)
        for name in (recipe.method, *controls)
    }
    own = reasons[recipe.method]
    if own:
        raise BadInput(
            f"edit.method: methods such as {recipe.method} {own}; set edit.method to channel-located, or to "
            "direction-everywhere."
        )
    left_out = [name for name in controls if reasons[name]]
    if not left_out:
        return recipe, ()
    notes = tuple(
        f"Controls left out: {', '.join(name for name in left_out if reasons[name] == why)}; they {why}."
        for why in dict.fromkeys(reasons[name] for name in left_out)
    )
    kept = [name for name in controls if name not in left_out]
    return recipe.model_copy(update={"evaluate": recipe.evaluate.model_copy(update={"controls": kept})}), notes


def _why_unsuited(method: EditMethod, recipe: Recipe, checkpoint: Checkpoint) -> str:
    """Why a method cannot work on this model and these matrices, as the end of a sentence. Empty where it can."""
    kinds = method.about.writes & {"gate", "in", "out"}
    if kinds and not kinds & set(matrices_of(recipe, checkpoint)):
        return f"rewrite {' and '.join(sorted(kinds))} matrices, which locate.matrices leaves out"
    layers = recipe.locate.layers
    if method.about.last_layer_alone and layers is not None and checkpoint.layers - 1 not in layers:
        return f"rewrite the last layer, {checkpoint.layers - 1}, which locate.layers leaves out"
    if checkpoint.experts is not None and method.about.reads & {"activations", "text"}:
        return "read activations of dense layers, and this model has experts"
    return ""


def _open_items(recipe: Recipe, tokenizer: Any, allow_code: bool = False) -> Items | None:
    if recipe.evaluate.items is not None:
        return open_items(recipe.evaluate.items, allow_code=allow_code)
    if recipe.evaluate.text is not None:
        words, near, plurals = _words_of(recipe)
        return items_from_text(recipe.evaluate.text, words, near, tokenizer, plurals=plurals)
    return None


def _words_of(recipe: Recipe) -> tuple[dict[str, list[str]], dict[str, list[str]], bool]:
    """By concept its words and its neighbours' words, and whether plurals are looked for too."""
    return (
        {concept.name: concept.words for concept in recipe.concepts},
        {concept.name: concept.neighbour_words for concept in recipe.concepts},
        any(concept.plurals for concept in recipe.concepts),
    )
