"""Adapter of PyTorch's DataLoader, in the form of torchdata's StatefulDataLoader."""

import pickle

import torch
from torchdata.stateful_dataloader import StatefulDataLoader


class Rows(torch.utils.data.Dataset):
    def __init__(self, columns):
        self.columns = {name: torch.from_numpy(column.copy()) for name, column in columns.items()}

    def __len__(self):
        return len(next(iter(self.columns.values())))

    def __getitems__(self, indices):
        return {name: column[indices] for name, column in self.columns.items()}


class Stream:
    def __init__(self, program):
        generator = None
        if program.seed is not None:
            generator = torch.Generator().manual_seed(program.seed)
        self.loader = StatefulDataLoader(
            Rows(program.columns),
            batch_size=program.batch_size,
            shuffle=program.seed is not None,
            generator=generator,
            drop_last=program.last_batch == "drop",
            collate_fn=dict,
        )

    def __iter__(self):
        return iter(self.loader)

    def __len__(self):
        return len(self.loader)

    def get_state(self):
        return pickle.dumps(self.loader.state_dict())

    def set_state(self, state):
        self.loader.load_state_dict(pickle.loads(state))


LIMITS = {
    "last_batch pad": "there are no batches with a mask",
    "records *": "records and their order are held in memory",
}


class Adapter:
    name = "torch"
    version = torch.__version__
    spec = "0.1"
    capabilities = frozenset(["iter", "shuffle.valid", "resume"])
    limits = LIMITS

    def build(self, program, ops):
        return Stream(program)

    def classify(self, exc):
        if isinstance(exc, pickle.UnpicklingError | EOFError):  # from `set_state`, which unpickles
            return "state", {}
        return "unclassified", {}
