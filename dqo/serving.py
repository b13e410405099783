"""How MLflow loads a registered checkpoint (models from code: this file travels with the model)."""

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import mlflow
import torch
from mlflow.pyfunc import PythonModel, PythonModelContext

if TYPE_CHECKING:
    from dqo.generation import Response
    from dqo.recipe import Sampling
    from dqo.tasks.base import Message


class ResponseGroups(PythonModel):
    """Samples a group of responses for each prompt."""

    def load_context(self, context: PythonModelContext) -> None:
        """Load the base model that the checkpoint names, and the checkpoint on it."""
        self.open(Path(context.artifacts["checkpoint"]))

    def open(self, checkpoint: Path) -> None:
        """Load a checkpoint's folder.

        Raises:
            DQOError: If it is none, or its base model cannot be loaded.
        """
        from dqo.checkpoint import CheckpointCard
        from dqo.policy import default_device, end_of_turn_ids, load_for_inference, load_tokenizer
        from dqo.recipe import Policy

        card = CheckpointCard.read(checkpoint)
        policy = Policy(model=card.base_model, revision=card.base_revision)
        self.tokenizer = load_tokenizer(policy)
        self.model = load_for_inference(policy, default_device(), checkpoint)
        self.ends = end_of_turn_ids(self.tokenizer, self.model)

    def draw(
        self, prompts: "Sequence[list[Message]]", n: int, sampling: "Sampling", seed: int
    ) -> "list[list[Response]]":
        """Sample a group of n responses for each chat prompt.

        Raises:
            DQOError: If a prompt and its response are longer than the model reads.
        """
        from dqo.errors import DQOError
        from dqo.generation import sample_texts

        longest = getattr(self.model.config.get_text_config(), "max_position_embeddings", None)
        encoded: Any = self.tokenizer.apply_chat_template(list(prompts), add_generation_prompt=True, return_dict=True)
        tokens = max(len(ids) for ids in encoded["input_ids"])
        if longest is not None and tokens + sampling.max_new_tokens > longest:
            raise DQOError(
                f"the prompt has {tokens} tokens, and its response may have {sampling.max_new_tokens}; the model reads "
                f"{longest}: expected a shorter prompt or fewer new tokens"
            )
        generator = torch.Generator(self.model.device).manual_seed(seed)
        return sample_texts(self.model, self.tokenizer, prompts, n, sampling, self.ends, generator)

    # No type hints on the input: MLflow would derive a second schema from them and warn about it.
    def predict(self, context, model_input, params=None):  # type: ignore[no-untyped-def]
        """Return n responses for each prompt, a list of lists.

        Args:
            context: Unused.
            model_input: A data frame with the column `prompt`.
            params: `n`, `temperature`, `top_p`, `max_new_tokens`, `seed`.
        """
        from dqo.recipe import Sampling

        settings = {"n": 8, "temperature": 1.0, "top_p": 1.0, "max_new_tokens": 64, "seed": 0} | (params or {})
        prompts = [[{"role": "user", "content": prompt}] for prompt in model_input["prompt"]]
        seed, n = int(settings.pop("seed")), int(settings.pop("n"))
        return [[response.text for response in group] for group in self.draw(prompts, n, Sampling(**settings), seed)]


mlflow.models.set_model(ResponseGroups())
