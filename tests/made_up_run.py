"""A run folder of made-up numbers that holds hostile text wherever text may stand."""

import json
from pathlib import Path
from typing import Any

HOSTILE = "<script>alert(1)</script>|`*[x](javascript:1)\x1b[31m ```` &amp; {{ 7*7 }}"


def measure(value: float) -> dict[str, Any]:
    """A measure with an interval."""
    return {"value": value, "low": value / 2, "high": value * 2, "n": 40, "standard_error": value / 4}


def run_folder(folder: Path, name: str = HOSTILE, **changes: Any) -> Path:
    """Write evaluation.json and recipe.yaml, with other values at its keys where `changes` has them."""
    points = [
        {"strength": s, "mass": measure(1 / (1 + s)), "collateral_kl": measure(0.001 * s), "first_token_kl": None}
        for s in (1.0, 2.0, 4.0)
    ]
    rows = [
        {
            "title": f"{group} {name}",
            "group": group,
            "scale": scale,
            "n": 40,
            "p_holm": p,
            "used": True,
            "sentence": f"{name}: no difference was shown.",
            **{k: measure(0.5) for k in ("base", "edited", "difference")},
        }
        for group, scale, p in (
            ("concept", "accuracy", 0.01),
            ("neighbour", "probability", 0.4),
            ("general", "perplexity", None),
        )
    ]
    result = {
        "concepts": [
            {
                "name": name,
                "strength": 2.0,
                "words": [name, "dog"],
                "tokens": [" dog", name],
                "warnings": [name],
                "candidates": 3,
                "channels": 5,
                "fdr": 0.05,
                "located_channels": 2,
                "located_neurons": 2,
            }
        ],
        "model": {
            "source": name,
            "layers": 3,
            "neurons": 10,
            "hidden_size": 4,
            "vocabulary_size": 9,
            "tied": True,
            "family": name,
        },
        "neurons": [
            {
                "address": address,
                "matrix": matrix,
                "concept": name,
                "cosine": 0.5,
                "norm_before": 1.0,
                "norm_after": 1.5,
            }
            for address, matrix in (("L0.N3", "out"), ("L2.N9", "gate"), ("unembedding.T4", "unembedding"))
        ],
        "chosen_method": "channel-located",
        "curves": {name: {"channel-located": points, "direction-everywhere": points, name: points}},
        "matched": {
            name: {
                "target": 0.1,
                "rows": [
                    {"method": "channel-located", "strength": 2.0, "collateral_kl": 0.01, "ratio": 1.0},
                    {"method": name, "strength": None, "collateral_kl": None, "ratio": None},
                ],
            }
        },
        "summary": {"efficacy": measure(0.9), "specificity": measure(0.8), "harmonic": {"value": None, "n": 0}},
        "variants": {"edited": {"rows": rows, "words": [name], "measures": {"leak_rate_asked": measure(0.25)}}},
        "selected_channels": [
            {
                "name": f"L1.N2.out#{place}",
                "concept": name,
                "support": 3.0 + place,
                "p_value": None if place == 9 else 0.5**place / 1000,
                "cosine": 0.8,
                "kurtosis": 9.0,
                "tokens": [" dog", name, "\u202e", f" x{place}"],
                "z_scores": [-9.0, -7.0, -3.0, -1.0],
            }
            for place in range(10)
        ],
        "generations": [{"prompt": name, "about": name, "base": f"a DOG, two dogs\n{name}", "edited": "a hotdog"}],
        "cost": {"seconds": {"locate": 3.0, "evaluate": 1.0}, "peak_memory_mb": 512.0},
        "provenance": {"base": {"source": name, "tensors": {"a": "0" * 64}}, "seed": 7, "device": "cpu", "threads": 2},
        "definitions": {"demo_choice": {"version": "1", "content": "c" * 64}},
    }
    folder.mkdir()
    (folder / "evaluation.json").write_text(json.dumps(result | changes))
    (folder / "recipe.yaml").write_text(f"model: {Path.home()}/models/demo # {name}\n")
    return folder
