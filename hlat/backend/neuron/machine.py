"""Whether this machine has Neuron devices and EFA, read from /sys and /dev alone."""

from __future__ import annotations

from pathlib import Path

AMAZON = "0x1d0f"  # PCI vendor of Neuron and EFA devices
# Instance type: (Neuron devices, EFA devices). AWS, trn1 architecture page.
INSTANCES = {
    "trn1.2xlarge": (1, 0),
    "trn1.32xlarge": (16, 8),
    "trn1n.32xlarge": (16, 16),
}


def instance_type(root: Path = Path("/")) -> str:
    """The EC2 instance type, which Nitro machines give as their product name; empty elsewhere."""
    name = _text(root / "sys/devices/virtual/dmi/id/product_name")
    return name if "." in name and " " not in name else ""


def neuron_devices(root: Path = Path("/")) -> int:
    """Neuron devices (chips) that the driver offers."""
    try:
        return sum(path.name[6:].isdigit() for path in (root / "dev").glob("neuron*"))
    except OSError:
        return 0


def platform(root: Path = Path("/")) -> str:
    """'trn1', 'trn2' (also for trn3), or 'native' for a machine without Neuron devices."""
    family = instance_type(root).partition(".")[0]
    if family.startswith(("trn2", "trn3")):
        return "trn2"
    return "trn1" if family.startswith("trn1") or neuron_devices(root) else "native"


def efa_devices(root: Path = Path("/")) -> int:
    """EFA devices that the kernel offers."""
    try:
        devices = list((root / "sys/class/infiniband").iterdir())
    except OSError:
        return 0
    return sum(_text(device / "device/vendor") == AMAZON for device in devices)


def _text(path: Path) -> str:
    try:
        return path.read_text(encoding="utf-8", errors="replace").strip()
    except OSError:
        return ""
