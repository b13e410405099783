"""How MLflow loads a registered checkpoint (models from code: this file travels with the model)."""

from pathlib import Path

import mlflow
import torch
from mlflow.pyfunc import PythonModel, PythonModelContext


class ResponseGroups(PythonModel):
    """Samples a group of responses for each prompt."""

    def load_context(self, context: PythonModelContext) -> None:
        """Load the base model that the checkpoint names, and the checkpoint on it."""
        from dqo.policy import (
            CheckpointCard,
            default_device,
            end_of_turn_ids,
            load_for_inference,
            load_tokenizer,
        )
        from dqo.recipe import Policy

        checkpoint = Path(context.artifacts["checkpoint"])
        card = CheckpointCard.read(checkpoint)
        policy = Policy(model=card.base_model, revision=card.base_revision)
        self.tokenizer = load_tokenizer(policy)
        self.model = load_for_inference(policy, default_device(), checkpoint)
        self.ends = end_of_turn_ids(self.tokenizer, self.model)

    # No type hints on the input: MLflow would derive a second schema from them and warn about it.
    def predict(self, context, model_input, params=None):  # type: ignore[no-untyped-def]
        """Return n responses for each prompt, a list of lists.

        Args:
            context: Unused.
            model_input: A data frame with the column `prompt`.
            params: `n`, `temperature`, `top_p`, `max_new_tokens`, `seed`.
        """
        from dqo.generation import sample_texts
        from dqo.recipe import Sampling

        settings = {"n": 8, "temperature": 1.0, "top_p": 1.0, "max_new_tokens": 64, "seed": 0} | (params or {})
        prompts = list(model_input["prompt"])
        generator = torch.Generator(self.model.device).manual_seed(int(settings.pop("seed")))
        n = int(settings.pop("n"))
        drawn = sample_texts(
            self.model,
            self.tokenizer,
            [[{"role": "user", "content": prompt}] for prompt in prompts],
            n,
            Sampling(**settings),
            self.ends,
            generator,
        )
        return [[response.text for response in group] for group in drawn]


mlflow.models.set_model(ResponseGroups())
