"""Names of the files in a checkpoint folder, and which of them may go into a patched copy."""

import fnmatch

WEIGHTS = "model.safetensors"
INDEX = "model.safetensors.index.json"
EDIT_RECORD = "rotate_edit.json"
# Where transformers keeps chat templates by name, each a .jinja file.
CHAT_TEMPLATES = "additional_chat_templates"
TOKENIZER_FILES = (
    "tokenizer.json",
    "tokenizer_config.json",
    "tokenizer.model",
    "special_tokens_map.json",
    "added_tokens.json",
    "vocab.json",
    "vocab.txt",
    "merges.txt",
)
# Files beside the weights that may go into a patched folder. None of them runs, and none is hidden.
COMPANIONS = (
    "config.json",
    "generation_config.json",
    INDEX,
    *TOKENIZER_FILES,
    "tekken.json",
    "sentencepiece.bpe.model",
    "chat_template.json",
    "chat_template.jinja",
    "preprocessor_config.json",
    "processor_config.json",
    "LICENSE*",
    "LICENCE*",
    "NOTICE*",
    "USE_POLICY.md",
    "README.md",
    "README.base.md",
)


def may_be_copied(name: str) -> bool:
    """Tell whether a file beside the weights may go into a patched folder.

    An allow-list decides. Of the files in subfolders only chat templates are copied.

    Args:
        name: Name of the file, relative to the checkpoint folder.

    Returns:
        True if it may be copied.
    """
    folder, slash, file = name.partition("/")
    if slash:
        plain = "/" not in file and not file.startswith(".")
        return folder == CHAT_TEMPLATES and plain and fnmatch.fnmatchcase(file, "*.jinja")
    return any(fnmatch.fnmatchcase(name, pattern) for pattern in COMPANIONS)
