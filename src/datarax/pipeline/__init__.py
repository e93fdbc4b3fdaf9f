from ._pipeline import Pipeline as Pipeline
