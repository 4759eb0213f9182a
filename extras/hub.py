"""Where a checkpoint is: a folder, or a repository of the Hugging Face hub that is downloaded."""

from pathlib import Path
from typing import Any

# Arguments of `from_pretrained` that huggingface_hub understands; a local folder needs none of them.
HUB_OPTIONS = ("revision", "token", "cache_dir", "local_files_only", "force_download")
FILES = ["*.json", "*.jinja", "*.safetensors", "tokenizer.model"]


def find_folder(name: str | Path, **options: Any) -> Path:  # noqa: ANN401
    """The folder called `name`, or the local copy of the hub repository of that name, downloaded if necessary.

    `options` are some of HUB_OPTIONS. Raises a FileNotFoundError that says what to do if there is neither.
    """
    folder = Path(name)
    if folder.is_dir():
        return folder
    if folder.exists():
        raise FileNotFoundError(f"{name} is a file; give the folder that contains it")
    if str(name).count("/") != 1 or str(name).startswith((".", "/", "~")):
        raise FileNotFoundError(f"there is no folder {name}")
    try:
        from huggingface_hub import snapshot_download
    except ImportError:
        raise FileNotFoundError(
            f"there is no folder {name}; to download the repository of that name from the Hugging Face hub, "
            "run: pip install huggingface_hub"
        ) from None
    try:
        return Path(snapshot_download(str(name), allow_patterns=FILES, **options))
    except Exception as error:  # network, authorisation, no such repository, disk full: the library has dozens of kinds
        reason = str(error).partition("\n")[0] or type(error).__name__
        raise FileNotFoundError(f"{name} is not a folder and could not be downloaded from the hub: {reason}") from error
