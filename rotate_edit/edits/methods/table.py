"""What every registered edit method says of itself, as a Markdown table."""

from rotate_edit.edits.methods.base import declaration, method_names


def method_table() -> str:
    """One row for each method: its name, what it does, what it reads and writes, and what strength 1 means."""
    lines = ["| name | what it does | reads | writes | strength 1 is |", "|---|---|---|---|---|"]
    for name in sorted(method_names()):
        about = declaration(name)
        reads = ", ".join(sorted(need.replace("_", " ") for need in about.reads)) or "weights"
        title = f"{about.title} (while the model runs only)" if about.live else about.title
        lines.append(f"| `{name}` | {title} | {reads} | {', '.join(sorted(about.writes))} | {about.unit} |")
    return "\n".join(lines)
