"""The stored cases as a pytest suite.

`pytest -p datarax_conformance.plugin --pyargs datarax_conformance.suite`.
"""
