"""What identifies a trained checkpoint in lineage: the card beside its weights, and the digest of the weights."""

import hashlib
import json
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from dqo.errors import DQOError
from dqo.files import write_text

CHECKPOINT_CARD = "checkpoint.json"


@dataclass(frozen=True)
class CheckpointCard:
    """What a trained checkpoint is and where it comes from; `checkpoint.json` beside the weights.

    Attributes:
        model: Name in the run: `sft`, `reward_only`, `dqo`.
        weights: `adapter` (needs the base model) or `full`.
        base_model: The recipe's name of the base model.
        base_revision: Its hub revision or package version, `None` for a local directory.
        stage_key: Digest over everything the stage read (recipe sections, data, parent checkpoint, library version).
        data_digest: Digest of the training and evaluation rows.
        recipe_digest: Digest of the whole recipe.
        parent: `stage_key` of the checkpoint it was trained from, `None` for the base model.
        steps: Optimiser steps.
        mlflow_run_id: The run that trained it.
        stopped: The health rule that ended training early (`dqo.health.Finding.to_dict`), `None` where none did.
    """

    model: str
    weights: str
    base_model: str
    base_revision: str | None
    stage_key: str
    data_digest: str
    recipe_digest: str
    parent: str | None
    steps: int
    mlflow_run_id: str
    stopped: dict[str, Any] | None = None

    def write(self, folder: Path) -> None:
        """Write the card into a checkpoint folder."""
        write_text(folder / CHECKPOINT_CARD, json.dumps(asdict(self), indent=2) + "\n")

    @classmethod
    def read(cls, folder: Path) -> "CheckpointCard":
        """Read the card of a checkpoint folder.

        Raises:
            DQOError: If there is none, or it is not one of ours.
        """
        path = folder / CHECKPOINT_CARD
        try:
            return cls(**json.loads(path.read_text(encoding="utf-8")))
        except FileNotFoundError:
            raise DQOError(f"{path}: missing; expected a checkpoint written by a training stage") from None
        except (TypeError, ValueError) as error:
            raise DQOError(f"{path}: not a checkpoint card ({error})") from None


def weights_digest(folder: Path) -> str:
    """First 16 hex digits of the SHA-256 over a checkpoint's safetensors files, in name order."""
    digest = hashlib.sha256()
    for path in sorted(folder.glob("*.safetensors")):
        with path.open("rb") as stream:
            digest.update(hashlib.file_digest(stream, "sha256").digest())
    return digest.hexdigest()[:16]
