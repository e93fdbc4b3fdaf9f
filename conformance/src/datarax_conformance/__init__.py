"""The conformance suite of Datarax: the spec as a model, golden vectors, cases for any engine."""
