"""Adapter of tf.data: slices of the columns, a shuffle buffer as large as the data, batches."""

import tensorflow as tf


class Stream:
    def __init__(self, program):
        dataset = tf.data.Dataset.from_tensor_slices(dict(program.columns))
        if program.seed is not None:
            dataset = dataset.shuffle(
                len(dataset), seed=program.seed, reshuffle_each_iteration=True
            )
        self.dataset = dataset.batch(
            program.batch_size, drop_remainder=program.last_batch == "drop"
        )

    def __iter__(self):
        return self.dataset.as_numpy_iterator()

    def __len__(self):
        return len(self.dataset)


LIMITS = {
    "last_batch pad": "there are no batches with a mask",
    "records *": "records and their order are held in memory",
}


class Adapter:
    name = "tf.data"
    version = tf.__version__
    spec = "0.1"
    capabilities = frozenset(["iter", "shuffle.valid"])
    limits = LIMITS

    def build(self, program, ops):
        return Stream(program)

    def classify(self, exc):
        return "unclassified", {}
