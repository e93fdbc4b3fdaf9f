"""`python -m datarax_conformance.vectors build|check`."""

import argparse
import sys

from . import build, check, manifest

parser = argparse.ArgumentParser(prog="datarax_conformance.vectors")
parser.add_argument("command", choices=["build", "check"])
if parser.parse_args().command == "build":
    build()
faults = check()
print(*faults, sep="\n", end="\n" if faults else "")
print(f"vectors: {len(manifest())} files, {len(faults)} faults")
sys.exit(bool(faults))
