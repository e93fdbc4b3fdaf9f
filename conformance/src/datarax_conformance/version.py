"""The version of the suite; its first two numbers are those of the spec it checks."""

VERSION = "0.1.0"
SPEC = VERSION.rpartition(".")[0]
