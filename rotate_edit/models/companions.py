"""Names of the files in a checkpoint folder, and which of them may go into a patched copy."""

import fnmatch

WEIGHTS = "model.safetensors"
INDEX = "model.safetensors.index.json"
EDIT_RECORD = "rotate_edit.json"
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

    An allow-list decides. A file in a subfolder is never copied.

    Args:
        name: Name of the file, relative to the checkpoint folder.

    Returns:
        True if it may be copied.
    """
    return "/" not in name and any(fnmatch.fnmatchcase(name, pattern) for pattern in COMPANIONS)
