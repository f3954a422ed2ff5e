"""Local training data: files on the device to token batches, with every record that cannot be used named."""

from edge_runtime.data.batches import Batch, bucket_length, evaluation_batches, steps_per_epoch, training_batches
from edge_runtime.data.dataset import Dataset, DatasetReport, dataset_of_texts, load_dataset
from edge_runtime.data.errors import BadLine, BadRecordError, DataError, DataFileError, EncoderError, TextError
from edge_runtime.data.records import Purpose
from edge_runtime.data.tokenise import UNLABELLED, Example, TextEncoder

__all__ = [
    "UNLABELLED",
    "BadLine",
    "BadRecordError",
    "Batch",
    "DataError",
    "DataFileError",
    "Dataset",
    "DatasetReport",
    "EncoderError",
    "Example",
    "Purpose",
    "TextEncoder",
    "TextError",
    "bucket_length",
    "dataset_of_texts",
    "evaluation_batches",
    "load_dataset",
    "steps_per_epoch",
    "training_batches",
]
