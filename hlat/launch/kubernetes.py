"""Kubernetes: an Indexed Job, or a PyTorchJob of Kubeflow's training operator.

The resolved recipe travels in a ConfigMap, so the manifest needs no file of this machine. Sources: the API
references of batch/v1 and kubeflow.org/v1; AWS's EKS guides for Neuron and EFA.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from copy import deepcopy
from dataclasses import dataclass
from pathlib import PurePosixPath
from typing import Any

import yaml

from hlat.errors import UserError
from hlat.host.python import module
from hlat.launch.plan import Plan, allowed
from hlat.launch.template import read

RECIPE = "/etc/hlat/recipe.yaml"
PORT = 29500
_LABEL = re.compile(r"(?=.{1,63}$)[a-z0-9]([a-z0-9-]*[a-z0-9])?")  # a DNS label: RFC 1123
_CLAIM = re.compile(r"(?=.{1,253}$)[a-z0-9]([a-z0-9-]*[a-z0-9])?(\.[a-z0-9]([a-z0-9-]*[a-z0-9])?)*")
_LABEL_VALUE = re.compile(r"(?=.{1,63}$)[A-Za-z0-9]([A-Za-z0-9._-]*[A-Za-z0-9])?")
_IMAGE = re.compile(r"[A-Za-z0-9][A-Za-z0-9._:/@-]*")
_MEMORY = re.compile(r"[1-9][0-9]*[KMGT]i")
_LONGEST = 63
_PREFIX = "hlat-"  # before the name of a run that begins with a digit, as 160m
_CORES = 2  # of a Trainium1 chip
_INDEX = "metadata.annotations['batch.kubernetes.io/job-completion-index']"


@dataclass(frozen=True)
class Options:
    """What is Kubernetes' own.

    kind: 'job' or 'pytorchjob'. claim: a PersistentVolumeClaim that all nodes can write, mounted at `mount`.
    accelerator: 'neuron', 'gpu' or 'none'. efa: EFA devices of a node. memory: of a node, as 440Gi; empty:
    not requested. instance: EC2 type to run on; empty: any. secret: its entries become environment variables.
    account: service account of the pods, such as one with access to object storage.
    """

    image: str
    claim: str
    kind: str = "job"
    namespace: str = "default"
    mount: str = "/shared"
    accelerator: str = "none"
    efa: int = 0
    memory: str = ""
    instance: str = ""
    secret: str = ""
    account: str = ""

    def check(self) -> None:
        """Raise UserError for a value that Kubernetes would refuse."""
        for option, value in (("--image", self.image), ("--shared-volume", self.claim)):
            if not value:
                raise UserError("is missing", where=option, fix=f"add {option} {option[2:].upper()}")
        allowed("--image", self.image, _IMAGE)
        allowed("--shared-volume", self.claim, _CLAIM)
        allowed("--namespace", self.namespace, _LABEL)
        allowed("--memory", self.memory, _MEMORY)
        allowed("--instance-type", self.instance, _LABEL_VALUE)
        allowed("--secret", self.secret, _CLAIM)
        allowed("--service-account", self.account, _CLAIM)
        if self.efa < 0:
            raise UserError(f"{self.efa} is out of range", where="--efa", fix="write 0 or more")
        if not PurePosixPath(self.mount).is_absolute():
            raise UserError(
                f"{self.mount!r} is not absolute", where="--mount-path", fix="write for example /shared"
            )


def manifest(plan: Plan, options: Options) -> str:
    """The manifest as YAML. Raises UserError for names that Kubernetes would refuse."""
    options.check()
    name = _job_name(plan)
    run_dir = PurePosixPath(plan.recipe.run.dir)
    mount = PurePosixPath(options.mount)
    if run_dir.is_absolute() and not run_dir.is_relative_to(mount):
        fix = f"write a path in it or a relative one, or --mount-path {run_dir.parent}"
        raise UserError(
            f"{run_dir} is not on the shared volume, which is at {mount}", where="run.dir", fix=fix
        )
    documents = list(yaml.safe_load_all(read(f"{options.kind}.yaml")))
    for document in documents:
        document["metadata"] = {"name": name, "namespace": options.namespace, "labels": _labels(name)}
    documents[0]["data"] = {"recipe.yaml": plan.recipe.to_yaml()}
    if options.kind == "job":
        _fill_job(documents[1], documents[2], plan, options, name)
    else:
        _fill_pytorchjob(documents[1], plan, options, name)
    head = (
        f"# {plan.title}\n# Written by `hlat launch kubernetes`; to submit it again: kubectl apply -f FILE\n"
    )
    return head + yaml.dump_all(documents, Dumper=_Readable, sort_keys=False, allow_unicode=True, width=100)


def _fill_job(service: dict[str, Any], job: dict[str, Any], plan: Plan, options: Options, name: str) -> None:
    service["spec"]["selector"] = _labels(name)
    spec = job["spec"]
    spec["completions"] = spec["parallelism"] = plan.nodes
    spec["backoffLimit"] = (
        plan.max_requeues * plan.nodes
    )  # Kubernetes counts pods, and all of them end together
    pod = _pod(plan, options, name)
    pod["spec"]["subdomain"] = name
    container = pod["spec"]["containers"][0]
    container["env"].append({"name": "NODE_RANK", "valueFrom": {"fieldRef": {"fieldPath": _INDEX}}})
    meeting = [
        "--node-rank",
        _Variable("NODE_RANK"),
        "--master-addr",
        f"{name}-0.{name}",
        "--master-port",
        str(PORT),
    ]
    container["command"] = _expandable([*_supervise(plan), *meeting])
    spec["template"] = pod


def _fill_pytorchjob(job: dict[str, Any], plan: Plan, options: Options, name: str) -> None:
    spec = job["spec"]
    spec["nprocPerNode"] = str(plan.processes)
    spec["runPolicy"]["backoffLimit"] = plan.max_requeues * plan.nodes
    replicas = spec["pytorchReplicaSpecs"]
    pod = _pod(plan, options, name)
    pod["spec"].pop("restartPolicy")  # the operator sets it from the replica's
    container = pod["spec"]["containers"][0]
    container["name"] = "pytorch"  # the operator sets its variables in the container of this name
    # The operator's variables; it counts the master as 0.
    meeting = ["--node-rank", _Variable("RANK"), "--master-addr", _Variable("MASTER_ADDR")]
    meeting += ["--master-port", _Variable("MASTER_PORT")]
    program = ["bash", "-c", read("exitcode.sh"), "hlat"]
    container["command"] = _expandable([*program, *_supervise(plan), *meeting])
    replicas["Master"]["template"] = pod
    replicas["Worker"]["template"] = deepcopy(pod)
    replicas["Worker"]["replicas"] = plan.nodes - 1
    if plan.nodes == 1:
        del replicas["Worker"]


def _pod(plan: Plan, options: Options, name: str) -> dict[str, Any]:
    pod: dict[str, Any] = yaml.safe_load(read("pod.yaml"))
    spec = pod["spec"]
    pod = {"metadata": {"labels": _labels(name)}, "spec": spec}
    spec["terminationGracePeriodSeconds"] = (
        plan.grace + 30
    )  # the supervisor kills what is left after the grace
    container = spec["containers"][0]
    container["image"], container["workingDir"] = options.image, options.mount
    container["volumeMounts"][0]["mountPath"] = options.mount
    spec["volumes"][0]["persistentVolumeClaim"]["claimName"] = options.claim
    spec["volumes"][1]["configMap"]["name"] = name
    container["env"] += _environment(plan)
    devices, taint = _devices(plan, options)
    container["resources"] = {"requests": dict(devices), "limits": dict(devices)}
    if options.memory:
        container["resources"]["requests"]["memory"] = options.memory
        container["resources"]["limits"]["memory"] = options.memory
    if taint:
        spec["tolerations"] = [{"key": taint, "operator": "Exists", "effect": "NoSchedule"}]
    else:
        del spec["tolerations"]
    if options.secret:
        container["envFrom"] = [{"secretRef": {"name": options.secret}}]
    if options.account:
        spec["serviceAccountName"] = options.account
    if options.instance:
        spec["nodeSelector"] = {"node.kubernetes.io/instance-type": options.instance}
    return pod


def _devices(plan: Plan, options: Options) -> tuple[dict[str, Any], str]:
    """Devices of a node, and the taint of nodes that have such."""
    found: dict[str, Any] = {}
    taint = ""
    if options.accelerator == "neuron":
        taint = "aws.amazon.com/neuron"
        found[taint] = -(-plan.processes // _CORES)
    elif options.accelerator == "gpu":
        taint = "nvidia.com/gpu"
        found[taint] = plan.processes
    if options.efa:
        found["vpc.amazonaws.com/efa"] = options.efa
        found["hugepages-2Mi"] = "5120Mi"  # libfabric's buffers: what AWS's guide to EFA on EKS reserves
        # Kubernetes gives huge pages only to pods that also ask for cpu or memory.
        found["cpu"] = str(plan.processes)
    return found, taint


def _environment(plan: Plan) -> list[dict[str, str]]:
    return [{"name": item.name, "value": item.value} for item in plan.before_python()]


def _supervise(plan: Plan) -> list[str]:
    """The recipe is the resolved one: it has the overrides in it."""
    own = ("supervise", RECIPE, "--nproc-per-node", str(plan.processes))
    command = module("hlat", *own, python=plan.python)
    return [*command, "--grace", str(plan.grace), "--nnodes", str(plan.nodes)]


class _Variable(str):
    """The name of a variable that Kubernetes shall fill in."""


def _expandable(words: Sequence[str]) -> list[str]:
    """Words of a container's command: Kubernetes fills in $(NAME), and reads $$ as $."""
    return [f"$({word})" if isinstance(word, _Variable) else word.replace("$", "$$") for word in words]


def _labels(name: str) -> dict[str, str]:
    return {"app.kubernetes.io/name": "hlat", "app.kubernetes.io/instance": name}


def _job_name(plan: Plan) -> str:
    """A label of RFC 1035, as the names of a Service and a PyTorchJob must be: it begins with a letter, and
    is so short that what pods and their services have behind it fits. A run's name that begins with a digit
    gets a word before it; one that was given for the job is refused.
    """
    name = re.sub(r"[^a-z0-9]+", "-", plan.job_name.lower()).strip("-")
    if name[:1].isdigit() and plan.job_name == plan.recipe.run.name:
        name = f"{_PREFIX}{name}"
    longest = _LONGEST - len(f"-worker-{plan.nodes}")
    if not name or len(name) > longest or name[0].isdigit():
        fix = f"give --job-name with 1 to {longest} letters, digits and dashes, a letter first"
        raise UserError(f"{plan.job_name!r} makes no name for a Kubernetes job", where="--job-name", fix=fix)
    return name


class _Readable(yaml.SafeDumper):
    """Texts of several lines as blocks, no aliases."""

    def ignore_aliases(self, data: Any) -> bool:
        """Write everything out."""
        return True


def _text(dumper: yaml.SafeDumper, value: str) -> yaml.ScalarNode:
    style = "|" if "\n" in value else None
    return dumper.represent_scalar("tag:yaml.org,2002:str", value, style=style)


_Readable.add_representer(str, _text)
