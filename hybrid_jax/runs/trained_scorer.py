"""A scorer of texts that a run has trained: what a reward loads by ``path``."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from hybrid_jax.core.config import local_path
from hybrid_jax.data.tokenizer import Tokenizer
from hybrid_jax.models.base import Params
from hybrid_jax.parallel import hosts
from hybrid_jax.runs.policy import claim_export_folder


@dataclass(frozen=True)
class TrainedScorer:
    """A scorer with its tokenizer, and what its phases say of its numbers."""

    scorer: Any
    params: Params
    tokenizer: Tokenizer
    step: int  # of the run that it comes from
    extra: Mapping[str, Any]

    def save(self, folder: str | Path) -> Path:
        """Writes weights, settings and tokenizer; returns the folder.

        Raises:
            UserError: the folder holds something that we did not export, or cannot be written.
        """
        from hybrid_jax.models.folders.scorer import save_scorer

        folder = local_path(folder, "the folder to export to")
        if hosts.is_first():
            claim_export_folder(folder, self.step)
            self.tokenizer.save(folder)
        save_scorer(folder, self.scorer, self.params, extra={**self.extra, "step": self.step})
        return folder
