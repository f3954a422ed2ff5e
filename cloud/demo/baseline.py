"""A yardstick without any neural network: tf-idf and logistic regression on the pooled texts."""

from __future__ import annotations

from sklearn.feature_extraction.text import TfidfVectorizer
from sklearn.linear_model import LogisticRegression
from sklearn.pipeline import make_pipeline

from cloud.demo.corpus import Split


def tfidf_accuracy(split: Split) -> float:
    """Accuracy on the held-out texts, from 0 to 1."""
    model = make_pipeline(TfidfVectorizer(sublinear_tf=True), LogisticRegression(C=10.0, max_iter=2_000))
    model.fit([example.text for example in split.train], [example.label for example in split.train])
    return float(model.score([example.text for example in split.heldout], [example.label for example in split.heldout]))
