"""The model card of an edited checkpoint or adapter: README.md with the Hub's metadata, from a run folder."""

import json
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import yaml

from rotate_edit.edits.edit import Edit
from rotate_edit.edits.edit_file import load_edit
from rotate_edit.edits.writing.patch import BASE_CARD, MODEL_CARD
from rotate_edit.errors import BadInput
from rotate_edit.files import read_json, write_atomically
from rotate_edit.reporting import content as report_content
from rotate_edit.reporting.report import fence, interval, markdown, number, without_home

KINDS = ("model", "adapter")
EVALUATION = "evaluation.json"
INHERITED = ("license", "license_name", "license_link", "language")
METRICS = {"accuracy": "accuracy", "probability": "probability", "perplexity": "perplexity"}
TAGS = ("rotate-edit", "model-editing", "knowledge-editing", "arxiv:2604.06005")
NAME_LENGTH = 96


def write_cards(folder: Path, base_model: str | None = None, name: str | None = None) -> list[Path]:
    """Write README.md into model/ and adapter/ of a run folder, where they exist.

    The base's own card stays beside it as README.base.md.

    Args:
        folder: The run folder.
        base_model: The Hub id of the base, when the run took it from a folder.
        name: The edited model's own id.

    Returns:
        The paths of the files written.

    Raises:
        BadInput: When the folder holds no edit or no readable recipe.
    """
    edit = load_edit(folder / "edit")
    result = read_json(folder, EVALUATION) if (folder / EVALUATION).is_file() else {}
    try:
        recipe = (folder / "recipe.yaml").read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise BadInput(f"{folder.name} has no readable recipe.yaml, without which no model card is written.") from error
    inherited = base_metadata(folder / "model" / BASE_CARD)
    written = []
    for kind in KINDS:
        if (folder / kind).is_dir():
            text = card(edit, result, without_home(recipe), inherited, kind=kind, base_model=base_model, name=name)
            write_atomically(folder / kind / MODEL_CARD, text)
            written.append(folder / kind / MODEL_CARD)
    return written


def base_metadata(path: Path) -> dict[str, Any]:
    """Read what an edited model inherits from its base's card: licence and language.

    Args:
        path: The base's card.

    Returns:
        Those of `INHERITED` that the card states. Empty when there is no readable card.
    """
    try:
        text = path.read_text(encoding="utf-8")
        found = re.match(r"---\s*\n(.*?)\n---\s*\n", text, flags=re.DOTALL)
        content = yaml.safe_load(found[1]) if found else None
    except (OSError, UnicodeDecodeError, yaml.YAMLError):
        # A base without a readable card passes nothing on.
        return {}
    if not isinstance(content, dict):
        return {}
    kept: dict[str, Any] = {}
    for key in INHERITED:
        value = content.get(key)
        texts: list[Any] = value if isinstance(value, list) else [value]
        if texts and all(isinstance(text, str) and text.isprintable() and len(text) <= 200 for text in texts):
            kept[key] = value
    return kept


def card(
    edit: Edit,
    result: Mapping[str, Any],
    recipe: str,
    inherited: Mapping[str, Any],
    *,
    kind: str = "model",
    base_model: str | None = None,
    name: str | None = None,
) -> str:
    """Compose the text of a card.

    Args:
        edit: The edit.
        result: Content of evaluation.json. Empty when nothing was measured.
        recipe: The recipe's text.
        inherited: What the base's card hands down (see `base_metadata`).
        kind: One of `KINDS`.
        base_model: The Hub id of the base, when the run took it from a folder.
        name: The edited model's own id.

    Returns:
        Markdown with a metadata block.
    """
    import jinja2

    base = edit.base
    hub_base = base_model or (base.get("source") if base.get("revision") else None)
    environment = jinja2.Environment(
        loader=jinja2.PackageLoader("rotate_edit.reporting"), autoescape=False, trim_blocks=True, lstrip_blocks=True
    )
    environment.filters |= {"markdown": markdown, "interval": interval, "number": number, "fence": fence}
    concepts = _concepts(edit, result)
    title = _title(concepts, str(base.get("source")))
    return environment.get_template("card.md.j2").render(
        metadata=_metadata(result, inherited, concepts, kind, hub_base, name, title),
        kind=kind,
        concepts=concepts,
        title=title,
        base=base,
        hub_base=hub_base,
        name=name,
        edit=edit,
        licence=inherited.get("license_name") or inherited.get("license"),
        tiles=report_content.tiles(result) if result else [],
        rows=report_content.variant_of(result).get("rows", []),
        words=report_content.variant_of(result).get("words", []),
        items=result.get("items"),
        versions=(result.get("provenance") or {}).get("versions") or {},
        recipe=recipe,
    )


def _concepts(edit: Edit, result: Mapping[str, Any]) -> list[dict[str, Any]]:
    """Each edited concept: name, what was done, strengths, words, and how many vectors in which layers."""
    found: list[dict[str, Any]] = []
    known = {entry["name"]: entry for entry in result.get("concepts") or []}
    for name in dict.fromkeys(change.concept for change in edit.changes):
        changes = [change for change in edit.changes if change.concept == name]
        layers: dict[int, int] = {}
        for change in changes:
            if change.layer is not None:
                layers[change.layer] = layers.get(change.layer, 0) + len(change.rows)
        strengths = sorted({change.strength for change in changes})
        found.append(
            {
                "name": name,
                "verb": "amplified" if all(strength < 0 for strength in strengths) else "suppressed",
                "strengths": strengths,
                "words": known.get(name, {}).get("words", []),
                "matrices": sorted({change.matrix for change in changes}),
                "vectors": sum(len(change.rows) for change in changes),
                "layers": sorted(layers.items()),
            }
        )
    return found


def _title(concepts: list[dict[str, Any]], base: str) -> str:
    done = ", ".join(f"{concept['name']} {concept['verb']}" for concept in concepts)
    return f"{base} with {done}" if done else base


def _metadata(
    result: Mapping[str, Any],
    inherited: Mapping[str, Any],
    concepts: list[dict[str, Any]],
    kind: str,
    hub_base: str | None,
    name: str | None,
    title: str,
) -> str:
    from huggingface_hub import ModelCardData

    relation: dict[str, Any] = (
        {"base_model_relation": "adapter" if kind == "adapter" else "finetune"} if hub_base else {}
    )
    verbs = sorted({f"concept-{concept['verb']}" for concept in concepts})
    data = ModelCardData(
        base_model=hub_base,
        library_name="peft" if kind == "adapter" else "transformers",
        pipeline_tag="text-generation",
        tags=[*TAGS, *verbs, *(["lora"] if kind == "adapter" else [])],
        model_name=name or title[:NAME_LENGTH],
        eval_results=_evaluation_results(result) or None,
        **inherited,
        **relation,
    )
    # Plain YAML with every foreign text quoted where it needs it.
    return yaml.safe_dump(data.to_dict(), sort_keys=False, allow_unicode=True).strip()


def _evaluation_results(result: Mapping[str, Any]) -> list[Any]:
    from huggingface_hub import EvalResult

    items = str(result.get("items") or "lm-eval")
    found = []
    for tile in report_content.tiles(result) if result else []:
        measure = tile["measure"]
        found.append(
            EvalResult(
                task_type="text-generation",
                dataset_type=items,
                dataset_name=f"items {items}",
                metric_type=tile["name"],
                metric_value=measure["value"],
                metric_name=f"{tile['title']}: {tile['note']} ({interval(measure)}; "
                f"base {number(measure.get('baseline'))}, n = {measure['n']})",
            )
        )
    for row in report_content.variant_of(result).get("rows", []):
        if row["edited"]["value"] is not None:
            found.append(
                EvalResult(
                    task_type="text-generation",
                    dataset_type=str(row["task"]),
                    # Without it rows of one task would be taken for one set of data.
                    dataset_config=str(row["title"]),
                    dataset_name=str(row["title"]),
                    metric_type=METRICS.get(row["scale"], str(row["metric"])),
                    metric_value=row["edited"]["value"],
                    metric_name=f"{row['metric']} ({interval(row['edited'])}; base {number(row['base']['value'])}, "
                    f"n = {row['n']})",
                )
            )
    return found


def card_metadata(text: str) -> dict[str, Any]:
    """Read the metadata block of a card.

    Args:
        text: The card.

    Returns:
        The metadata as plain JSON values.

    Raises:
        BadInput: When there is no block that can be read.
    """
    from huggingface_hub import ModelCard

    try:
        return dict(json.loads(json.dumps(ModelCard(text, ignore_metadata_errors=True).data.to_dict())))
    except (ValueError, TypeError, yaml.YAMLError) as error:
        raise BadInput("the model card has no metadata block that can be read.") from error
