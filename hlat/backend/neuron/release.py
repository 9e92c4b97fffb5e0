"""The Neuron releases HLAT is written for: exact versions of every package, and the lines that install them.

Source: AWS's release manifest (aws-neuron-sdk, src/helperscripts/n2-manifest.json) and release notes. 2.28.1
is the release AWS tells users of NeuronX Distributed to stay on; 2.31.1 is the last with a release of it.
From 2.32 on there is none for trn1, and from 2.33 on torch-neuronx is another package of the same name
(native PyTorch, trn2 and trn3 only).
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from importlib import metadata

PIP_INDEX = "https://pip.repos.neuron.amazonaws.com"
APT_REPOSITORY = "https://apt.repos.neuron.amazonaws.com"
YUM_REPOSITORY = "https://yum.repos.neuron.amazonaws.com"
EFA_INSTALLER = "https://efa-installer.amazonaws.com"
KEY_FILE = "GPG-PUB-KEY-AMAZON-AWS-NEURON.PUB"

# Names that PyPI gives to empty packages, which fail when imported; the real ones are in PIP_INDEX alone.
PLACEHOLDERS = (
    "torch-neuronx",
    "neuronx-distributed",
    "neuronx-cc",
    "libneuronxla",
    "nki",
    "nrtpy",
    "nkipy",
    "nki-library",
)


@dataclass(frozen=True)
class Release:
    """One release of the Neuron SDK.

    python: the first and the last minor release of Python 3 that it and HLAT support.
    packages: Python packages by name, with the leading parts of their version.
    system: operating-system packages, likewise. The driver (aws-neuronx-dkms) may be newer.
    """

    name: str
    role: str
    python: tuple[int, int]
    packages: Mapping[str, str] = field(default_factory=dict)
    system: Mapping[str, str] = field(default_factory=dict)
    efa_installer: str = "1.47.0"


PRIMARY = Release(
    "2.28.1",
    "primary",
    (11, 12),
    {
        "torch": "2.9",
        "torch-xla": "2.9",
        "torch-neuronx": "2.9.0.2.12.22436",
        "neuronx-cc": "2.23.6484",
        "libneuronxla": "2.2.15515",
        "nki": "0.2.0",
        "neuronx-distributed": "0.17.26814",
    },
    {
        "aws-neuronx-dkms": "2.26.10.0",
        "aws-neuronx-collectives": "2.30.59.0",
        "aws-neuronx-runtime-lib": "2.30.51.0",
        "aws-neuronx-tools": "2.28.23.0",
    },
)
FORWARD = Release(
    "2.31.1",
    "forward",
    (11, 13),
    {
        "torch": "2.9",
        "torch-xla": "2.9",
        "torch-neuronx": "2.9.0.2.15.32035",
        "neuronx-cc": "2.26.6360",
        "libneuronxla": "2.2.17544",
        "nki": "0.5.0",
        "neuronx-distributed": "0.19.28492",
    },
    {
        "aws-neuronx-dkms": "2.29.0.0",
        "aws-neuronx-collectives": "2.33.10.0",
        "aws-neuronx-runtime-lib": "2.33.10.0",
        "aws-neuronx-tools": "2.31.15.0",
    },
)
NATIVE = Release(
    "2.33.0",
    "native PyTorch",
    (12, 14),
    {
        "torch": "2.13",
        "torch-neuronx": "2.13.3",
        "neuronx-cc": "2.28.7631",
        "nki": "0.7.0",
    },
    {
        "aws-neuronx-dkms": "2.31.7.0",
        "aws-neuronx-collectives": "2.35.43.0",
        "aws-neuronx-runtime-lib": "2.35.30.0",
        "aws-neuronx-tools": "2.33.38.0",
    },
)
BY_PLATFORM: Mapping[str, tuple[Release, ...]] = {"trn1": (PRIMARY, FORWARD), "trn2": (NATIVE,)}


def matches(installed: str, pinned: str) -> bool:
    """Whether an installed version is the pinned one or a build of it: 2.23.6484.0+3b61 is 2.23.6484."""
    public = installed.split("+")[0]
    return public == pinned or public.startswith(f"{pinned}.")


def choose(platform: str, installed: Mapping[str, str]) -> Release:
    """The tested release most installed packages belong to; the first of the platform when none does."""
    releases = BY_PLATFORM[platform]

    def agreeing(release: Release) -> int:
        return sum(matches(installed.get(name, ""), pinned) for name, pinned in release.packages.items())

    return max(releases, key=agreeing)  # the first of equals


def installed(platform: str) -> Release:
    """The tested release that is installed here, by its packages' versions; else the platform's first."""
    versions = {}
    for name in BY_PLATFORM[platform][0].packages:
        try:
            versions[name] = metadata.version(name)
        except metadata.PackageNotFoundError:
            continue
    return choose(platform, versions)


def requirement(name: str, pinned: str) -> str:
    """What pip is asked for: every build of the pinned version."""
    return f"{name}=={pinned}.*"


def pip_line(requirements: list[str], python: str = "python") -> str:
    """The command that installs Neuron packages. Versions are exact: PyPI has packages of the same names."""
    quoted = " ".join(f"'{item}'" for item in requirements)
    return f"{python} -m pip install --extra-index-url {PIP_INDEX} {quoted}"
