"""Classifiers of the prompt: which problems the device will fail, told before it has begun.

`Encoder` is a Hugging Face encoder with a classification head, by name as in the paper (DeBERTa-v3-large); with no
name, a small one trained from nothing. `Boosting` is gradient boosting on the numbers and words of the prompt. Left out
on purpose: which of them validates better (the comparison's).
"""

from __future__ import annotations

import copy
import re
from collections.abc import Sequence

import numpy as np
import torch
from numpy.typing import NDArray
from sklearn.decomposition import TruncatedSVD
from sklearn.ensemble import HistGradientBoostingClassifier
from sklearn.feature_extraction.text import TfidfVectorizer
from sklearn.metrics import log_loss
from torch.nn.functional import cross_entropy
from transformers import (
    AutoModelForSequenceClassification,
    AutoTokenizer,
    BertConfig,
    BertForSequenceClassification,
    PreTrainedModel,
    PreTrainedTokenizerBase,
)

from selfroute.device.prefix import pad_right
from selfroute.errors import DeviceError
from selfroute.routers.base import Attempt, Routed, alike, scored


class Boosting:
    """Histogram gradient boosting; stops early on a part of the training problems that it holds out."""

    prompt_only = True

    NUMBERS = 8
    """Numbers of the prompt that become features, in order and sorted, -1 where there are fewer; more are left out."""
    TOPICS = 16
    """Dimensions that the prompt's words are reduced to."""

    def __init__(self, seed: int) -> None:
        self.seed = seed
        self.model = HistGradientBoostingClassifier(
            learning_rate=0.05, max_iter=400, early_stopping=True, n_iter_no_change=20, random_state=seed
        )
        self.words = TfidfVectorizer(token_pattern=r"[^\W\d_]+|\d")
        self.topics: TruncatedSVD | None = None
        self.constant: float | None = None

    def fit(self, attempts: Sequence[Attempt], correct: Sequence[bool]) -> None:
        wrong = np.array([not c for c in correct])
        self.constant = _one_kind(wrong)
        if self.constant is not None:
            return
        counts = self.words.fit_transform([a.problem.question for a in attempts])
        width = min(self.TOPICS, counts.shape[1] - 1)
        self.topics = TruncatedSVD(width, random_state=self.seed).fit(counts) if width > 0 else None
        self.model.fit(self._features(attempts), wrong)

    def route(self, attempts: Sequence[Attempt]) -> list[Routed]:
        if self.constant is not None:
            return scored(attempts, alike(attempts, self.constant))
        return scored(attempts, self.model.predict_proba(self._features(attempts))[:, 1])

    def _features(self, attempts: Sequence[Attempt]) -> NDArray[np.float64]:
        rows = []
        for a in attempts:
            text = a.problem.question
            numbers = [float(n[:15]) for n in re.findall(r"\d+", text)]
            first = (numbers + [-1.0] * self.NUMBERS)[: self.NUMBERS]
            ordered = (sorted(numbers) + [-1.0] * self.NUMBERS)[: self.NUMBERS]
            rows.append([len(text), len(text.split()), len(numbers), sum(numbers), *first, *ordered])
        features = np.array(rows)
        if self.topics is None:
            return features
        words = self.topics.transform(self.words.transform([a.problem.question for a in attempts]))
        return np.hstack([features, words])


class Encoder:
    """An encoder with a classification head, fine-tuned with early stopping on held-out training problems; the learning
    rate rises over the first epoch.

    Raises:
        DeviceError: nothing by `name` can be loaded.
    """

    prompt_only = True

    BATCH = 32
    EPOCHS = 20
    PATIENCE = 3
    """Epochs without a better validation loss after which it stops."""

    def __init__(self, seed: int, tokenizer: PreTrainedTokenizerBase, name: str | None = None) -> None:
        self.seed, self.name = seed, name
        self.constant: float | None = None
        with torch.random.fork_rng():
            torch.manual_seed(seed)
            if name is None:
                self.tokenizer: PreTrainedTokenizerBase = tokenizer
                self.model: PreTrainedModel = BertForSequenceClassification(_small(len(tokenizer)))
                self.lr = 1e-3
            else:
                try:
                    self.tokenizer = AutoTokenizer.from_pretrained(name)
                    self.model = AutoModelForSequenceClassification.from_pretrained(
                        name, num_labels=2, dtype=torch.float32
                    )
                except (OSError, ValueError, ImportError) as error:
                    raise DeviceError(
                        f"cannot load the encoder {name!r}: {' '.join(str(error).split())} (give a hub id or a folder, "
                        "or leave it out for a small encoder trained from nothing)"
                    ) from error
                self.lr = 2e-5
        self.model.to("cuda" if torch.cuda.is_available() else "cpu")

    def fit(self, attempts: Sequence[Attempt], correct: Sequence[bool]) -> None:
        wrong = np.array([not c for c in correct])
        self.constant = _one_kind(wrong)
        if self.constant is not None:
            return
        rows, labels = self._encode(attempts), torch.tensor(wrong.astype(int))
        order = np.random.default_rng(self.seed).permutation(len(rows))
        held_out, learned = order[: len(order) // 10 + 1], order[len(order) // 10 + 1 :]
        optimizer = torch.optim.AdamW(self.model.parameters(), lr=self.lr, weight_decay=0.01)
        warmup = max(1, len(learned) // self.BATCH)
        schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: min(1.0, (step + 1) / warmup))
        best, best_loss, since = copy.deepcopy(self.model.state_dict()), np.inf, 0
        with torch.random.fork_rng():
            torch.manual_seed(self.seed)
            for epoch in range(self.EPOCHS):
                self.model.train()
                shuffled = np.random.default_rng([self.seed, epoch]).permutation(learned)
                for start in range(0, len(shuffled), self.BATCH):
                    part = shuffled[start : start + self.BATCH]
                    optimizer.zero_grad(set_to_none=True)
                    loss = cross_entropy(self._logits([rows[i] for i in part]), labels[part].to(self.model.device))
                    loss.backward()
                    torch.nn.utils.clip_grad_norm_(self.model.parameters(), 1.0)
                    optimizer.step()
                    schedule.step()
                value = log_loss(wrong[held_out], self._probability([rows[i] for i in held_out]), labels=[False, True])
                if value < best_loss:
                    best, best_loss, since = copy.deepcopy(self.model.state_dict()), value, 0
                else:
                    since += 1
                    if since == self.PATIENCE:
                        break
        self.model.load_state_dict(best)

    def route(self, attempts: Sequence[Attempt]) -> list[Routed]:
        if self.constant is not None:
            return scored(attempts, alike(attempts, self.constant))
        return scored(attempts, self._probability(self._encode(attempts)))

    def _encode(self, attempts: Sequence[Attempt]) -> list[list[int]]:
        positions = getattr(getattr(self.model.base_model, "embeddings", None), "position_embeddings", None)
        padding = getattr(positions, "padding_idx", None)
        # Models of RoBERTa's kind count positions from behind that of the padding.
        first = 0 if padding is None else padding + 1
        limit = min(self.tokenizer.model_max_length, self.model.config.max_position_embeddings - first)
        return [self.tokenizer.encode(a.problem.question, truncation=True, max_length=limit) for a in attempts]

    def _logits(self, rows: Sequence[Sequence[int]]) -> torch.Tensor:
        pad = self.tokenizer.pad_token_id or 0
        ids, mask = pad_right(rows, pad, self.model.device)
        logits: torch.Tensor = self.model(input_ids=ids, attention_mask=mask).logits.float()
        return logits

    @torch.no_grad()
    def _probability(self, rows: Sequence[Sequence[int]]) -> list[float]:
        self.model.eval()
        parts = [self._logits(rows[i : i + 256]).softmax(-1)[:, 1] for i in range(0, len(rows), 256)]
        return [float(p) for p in torch.cat(parts).cpu().double()]


def _small(vocabulary: int) -> BertConfig:
    return BertConfig(
        vocab_size=vocabulary,
        hidden_size=64,
        num_hidden_layers=2,
        num_attention_heads=4,
        intermediate_size=256,
        max_position_embeddings=512,
        num_labels=2,
    )


def _one_kind(wrong: NDArray[np.bool_]) -> float | None:
    """The share of wrong answers where there are fewer than five of a kind to learn from; None where there are more."""
    return float(wrong.mean()) if min(wrong.sum(), (~wrong).sum()) < 5 else None
