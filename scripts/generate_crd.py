"""Writes job_templates/install/crd.yaml from tuner/cluster/crd.py.

    python scripts/generate_crd.py

Run it after changing what a Workspace may say; a test says when the file is not what the code makes.
"""

from pathlib import Path

from tuner.cluster.crd import custom_resource_definition
from tuner.cluster.templates import dump_manifests

TARGET = Path(__file__).parent.parent / "job_templates" / "install" / "crd.yaml"
HEADER = """\
# Generated from tuner/cluster/crd.py, do not edit: python scripts/generate_crd.py
# For clusters without KAITO. Where KAITO's CRD is, leave this one out.
"""


def main() -> None:
    TARGET.write_text(HEADER + dump_manifests([custom_resource_definition()]), encoding="utf-8")


if __name__ == "__main__":
    main()
