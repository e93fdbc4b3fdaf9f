"""The cases as they are declared.

`datarax-conformance cases build` stores them with their values.
"""

from . import (
    dag,
    errors,
    iter,
    library,
    library_mesh,
    library_sources,
    library_stages,
    scan,
    shuffle,
    state,
    step,
)

TABLES = (
    step.table,
    iter.table,
    shuffle.table,
    dag.table,
    state.table,
    scan.table,
    errors.table,
    library.table,
    library_sources.table,
    library_stages.table,
    library_mesh.table,
)


def declared_cases():
    return [case for table in TABLES for case in table.cases]
