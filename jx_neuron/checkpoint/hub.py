"""The Hugging Face Hub: from the name of a model to a local path."""

import os
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

from jx_neuron.errors import CheckpointError

FILES = (".bin", ".gguf", ".json", ".safetensors")  # a name with such a suffix is a path
ID = r"[\w-][\w.-]*(/[\w-][\w.-]*)?"


def local_path(
    model: str | os.PathLike[str],
    select: Callable[[str, list[str]], list[str]],
    *,
    revision: str | None,
    token: str | bool | None,
    local_files_only: bool | None,
    cache_dir: str | os.PathLike[str] | None,
) -> Path:
    """The path `model` where it exists, else the folder of the Hub repository of that id.

    Only the files that `select(id, all files)` returns are downloaded. Without a network, with `local_files_only` and
    with HF_HUB_OFFLINE, the Hub's cache has to hold them.

    Raises CheckpointError, which says what failed, and how to do without the Hub.
    """
    name, why = os.fspath(model), ""
    try:
        path = Path(name).expanduser()
        path.stat()
        return path
    except (FileNotFoundError, NotADirectoryError):
        pass
    except (OSError, RuntimeError, ValueError) as error:  # a name too long, no permission, no such user, a NUL in it
        why = f" ({getattr(error, 'strerror', None) or error})"
    if why or not isinstance(model, str) or not re.fullmatch(ID, name) or path.suffix in FILES:
        shown = repr(name) if len(name) <= 300 else f"{name[:300]!r}…"
        raise CheckpointError(
            f"no such folder or file: {shown}{why}. Legal are the folder of a checkpoint, a file of "
            "weights, and the id of a repository on the Hugging Face Hub, such as 'openai-community/gpt2'."
        )
    from huggingface_hub import HfApi, constants, snapshot_download
    from huggingface_hub.errors import (
        GatedRepoError,
        RepositoryNotFoundError,
        RevisionNotFoundError,
    )

    cache = None if cache_dir is None else Path(cache_dir)
    common: dict[str, Any] = {"revision": revision, "token": token}
    why = "HF_HUB_OFFLINE is set" if constants.HF_HUB_OFFLINE else "local_files_only was asked for"
    if not (local_files_only or constants.HF_HUB_OFFLINE):
        try:
            files = [file.rfilename for file in HfApi().model_info(name, **common).siblings or ()]
            patterns = select(name, files)
            return Path(snapshot_download(name, cache_dir=cache, allow_patterns=patterns, **common))
        except CheckpointError:
            raise
        except GatedRepoError as error:
            raise CheckpointError(
                f"{name} on the Hub is gated: accept its terms at https://huggingface.co/{name}, and log in "
                "with `hf auth login`, set HF_TOKEN, or give token=."
            ) from error
        except RevisionNotFoundError as error:
            raise CheckpointError(
                f"{name} on the Hub has no revision {revision!r}: give a branch, tag or commit."
            ) from error
        except RepositoryNotFoundError as error:
            raise CheckpointError(
                f"there is no folder {name!r} here, and no repository of that name on the Hub that this "
                "token may see. Check the spelling; for a private one log in with `hf auth login`, set "
                "HF_TOKEN, or give token=."
            ) from error
        except Exception as error:  # the Hub's HTTP client, and so its errors, differ between its versions
            why = f"the Hub cannot be reached ({error})"
    try:
        # no patterns: files that were not selected, and so are not in the cache, do not make it incomplete
        return Path(snapshot_download(name, cache_dir=cache, local_files_only=True, allow_patterns=[], **common))
    except (OSError, ValueError) as error:
        raise CheckpointError(
            f"there is no folder {name!r} here, {why}, and the Hub's cache does not hold {name}. Give the "
            f"path of a local folder, or run `hf download {name}` where there is a network."
        ) from error
