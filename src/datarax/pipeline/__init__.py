from .._types import Cursor as Cursor
from ._pipeline import Pipeline as Pipeline
