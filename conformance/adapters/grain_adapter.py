"""Adapter of Grain: one dataset, batched within each epoch and repeated, read by one iterator."""

import json

import grain


class Records:
    """Columns as the random-access source of dicts that Grain takes."""

    def __init__(self, columns):
        self.columns = columns

    def __len__(self):
        return len(next(iter(self.columns.values())))

    def __getitem__(self, index):
        return {name: column[index] for name, column in self.columns.items()}


class Stream:
    def __init__(self, program):
        dataset = grain.MapDataset.source(Records(program.columns))
        if program.seed is not None:
            dataset = dataset.shuffle(seed=program.seed)
        self.epoch = dataset.batch(program.batch_size, drop_remainder=program.last_batch == "drop")
        self.iterator = iter(self.epoch.repeat().to_iter_dataset(grain.ReadOptions(num_threads=0)))

    def place(self):
        # A repeated dataset does not stop after an epoch. Grain's count of batches gives the epoch.
        return self.iterator.get_state()["next_index"] // len(self.epoch)

    def __iter__(self):
        return self.rest_of(self.place())

    def rest_of(self, epoch):
        while self.place() == epoch:
            yield next(self.iterator)

    def __len__(self):
        return len(self.epoch)

    def get_state(self):
        return json.dumps(self.iterator.get_state()).encode()

    def set_state(self, state):
        self.iterator.set_state(json.loads(state))


LIMITS = {"last_batch pad": "there are no batches with a mask"}


class Adapter:
    name = "grain"
    version = grain.__version__
    spec = "0.1"
    capabilities = frozenset(["iter", "shuffle.valid", "resume"])
    limits = LIMITS

    def build(self, program, ops):
        return Stream(program)

    def classify(self, exc):
        if isinstance(exc, json.JSONDecodeError):  # from `set_state`, which reads JSON
            return "state", {}
        return "unclassified", {}
