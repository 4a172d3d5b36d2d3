"""The real COMET, BLEURT and Detoxify, where their packages are installed; without them a clear error.

None of them is an extra of ours: unbabel-comet and its pins (numpy below 2, transformers below 5) do not go
with this program's packages, BLEURT is not on PyPI, and Detoxify's weights are not in its package.
COMET and Detoxify unpickle their checkpoints, which can run code: name only one that you trust.
"""

from __future__ import annotations

import functools
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from hybrid_jax.core.errors import UserError
from hybrid_jax.core.ranges import BatchSize, Natural, settings
from hybrid_jax.metrics.packages import import_package
from hybrid_jax.rewards.base import REWARDS
from hybrid_jax.rewards.model_based import texts_of_rows


@REWARDS.register("comet", risk="unpickles its checkpoint")
@settings
class Comet:
    """COMET's score of the response as a translation (Rei et al. 2020, arXiv:2009.09025): the best reference's.

    The columns are ``source`` and ``references``.

    Attributes:
        checkpoint: File of a COMET model, ``*.ckpt``; nothing is downloaded.
        batch_size: Rows that it reads at a time.
        gpus: How many it may use.

    Raises:
        UserError: unbabel-comet is not installed, or there is no such file.
    """

    checkpoint: Path
    batch_size: BatchSize = 8
    gpus: Natural = 0

    def __call__(
        self, prompts: Sequence[str], responses: Sequence[str], references: Sequence[Any], source: Sequence[Any]
    ) -> list[float]:
        sources, accepted = texts_of_rows(source, "source"), texts_of_rows(references, "references")
        rows = [
            {"src": "\n".join(origin), "mt": response, "ref": reference}
            for response, origin, texts in zip(responses, sources, accepted, strict=True)
            for reference in texts
        ]
        model = _comet(_existing(self.checkpoint))
        return _best(
            model.predict(rows, batch_size=self.batch_size, gpus=self.gpus).scores if rows else [], accepted
        )


@REWARDS.register("bleurt", risk="runs the program in its checkpoint")
@settings
class Bleurt:
    """BLEURT's score of the response (Sellam et al. 2020, arXiv:2004.04696), of the best of ``references``.

    Attributes:
        checkpoint: Folder of a BLEURT model; nothing is downloaded.

    Raises:
        UserError: bleurt is not installed, or there is no such folder.
    """

    checkpoint: Path

    def __call__(
        self, prompts: Sequence[str], responses: Sequence[str], references: Sequence[Any]
    ) -> list[float]:
        accepted = texts_of_rows(references, "references")
        candidates = [r for r, texts in zip(responses, accepted, strict=True) for _ in texts]
        flat = [text for texts in accepted for text in texts]
        scorer = _bleurt(_existing(self.checkpoint))
        return _best(scorer.score(references=flat, candidates=candidates) if flat else [], accepted)


@REWARDS.register("detoxify", risk="unpickles its checkpoint")
@settings
class Detoxify:
    """Detoxify's probability that the response has a label, in [0, 1]: give it a negative weight.

    Attributes:
        checkpoint: File of a Detoxify model; nothing is downloaded.
        label: Such as ``toxicity``.
        model_type: What the checkpoint is: original, unbiased, multilingual.

    Raises:
        UserError: detoxify is not installed, or there is no such file or label.
    """

    checkpoint: Path
    label: str = "toxicity"
    model_type: str = "original"

    def __call__(self, prompts: Sequence[str], responses: Sequence[str]) -> list[float]:
        model = _detoxify(_existing(self.checkpoint), self.model_type)
        found = model.predict(list(responses)) if responses else {self.label: []}
        if self.label not in found:
            raise UserError(f"label must be one of {', '.join(sorted(found))}, got {self.label!r}")
        return [float(value) for value in found[self.label]]


@functools.cache
def _comet(checkpoint: str) -> Any:
    comet = import_package("comet", "the reward comet", "pip install unbabel-comet")
    return comet.load_from_checkpoint(checkpoint)


@functools.cache
def _bleurt(checkpoint: str) -> Any:
    install = "pip install git+https://github.com/google-research/bleurt"
    return import_package("bleurt.score", "the reward bleurt", install).BleurtScorer(checkpoint)


@functools.cache
def _detoxify(checkpoint: str, model_type: str) -> Any:
    detoxify = import_package("detoxify", "the reward detoxify", "pip install detoxify")
    return detoxify.Detoxify(model_type, checkpoint=checkpoint)


def _existing(path: Path) -> str:
    if not path.exists():
        raise UserError(
            f"checkpoint must be that of a model on this machine, got {str(path)!r}, which is not there"
        )
    return str(path.resolve())


def _best(values: Sequence[float], accepted: Sequence[Sequence[str]]) -> list[float]:
    """Takes the largest of each row's values, which has one for each reference."""
    left = iter(values)
    return [max(float(next(left)) for _ in texts) for texts in accepted]
