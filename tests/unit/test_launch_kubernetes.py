"""`hlat launch kubernetes`: valid manifests, hostile values, exit codes that the cluster understands."""

from __future__ import annotations

import re
import signal
import subprocess
import time
from pathlib import Path
from typing import Any

import kubernetes_validate
import pytest
import yaml
from hypothesis import given, settings
from hypothesis import strategies as st

from hlat import cli
from hlat.launch import kubernetes
from hlat.launch.plan import Plan
from hlat.launch.template import read
from hlat.recipe import Recipe, load

# The fields of a PyTorchJob, from the API reference of Kubeflow's training operator (kubeflow.org/v1): a
# type, the values that are allowed, or the fields below. A pod template is checked as that of a Job.
RUN_POLICY: dict[str, Any] = {
    "activeDeadlineSeconds": int,
    "backoffLimit": int,
    "cleanPodPolicy": {"All", "Running", "None"},
    "managedBy": str,
    "schedulingPolicy": dict,
    "suspend": bool,
    "ttlSecondsAfterFinished": int,
}
REPLICA: dict[str, Any] = {
    "replicas": int,
    "restartPolicy": {"Always", "OnFailure", "Never", "ExitCode"},
    "template": "pod",
}
PYTORCHJOB: dict[str, Any] = {
    "apiVersion": {"kubeflow.org/v1"},
    "kind": {"PyTorchJob"},
    "metadata": dict,
    "spec": {
        "elasticPolicy": dict,
        "nprocPerNode": str,
        "pytorchReplicaSpecs": {"Master": REPLICA, "Worker": REPLICA},
        "runPolicy": RUN_POLICY,
    },
}
WORDS = [
    "--nodes",
    "4",
    "--nproc-per-node",
    "8",
    "--image",
    "registry.example.com/hlat:1",
    "--shared-volume",
    "fsx",
]


@pytest.fixture
def recipe(launch_stubs, tmp_path: Path, monkeypatch) -> str:
    """A recipe; a kubectl in place of any real one."""
    monkeypatch.chdir(tmp_path)
    (tmp_path / "small.yaml").write_text(launch_stubs.RECIPE)
    (tmp_path / "text").write_text("what is trained on\n")
    (tmp_path / "bin").mkdir()
    (tmp_path / "bin/kubectl").write_text(
        '#!/bin/bash\nprintf "%s\\n" "$@" >"$0.calls"; echo "job created"\n'
    )
    (tmp_path / "bin/kubectl").chmod(0o755)
    monkeypatch.setenv("PATH", f"{tmp_path / 'bin'}:/usr/bin:/bin")
    return "small.yaml"


def dry(capsys, *words: str) -> list[dict[str, Any]]:
    assert cli.main(["launch", "kubernetes", *words, "--dry-run"]) == 0
    return list(yaml.safe_load_all(capsys.readouterr().out))


def validate(document: dict[str, Any]) -> None:
    """Against Kubernetes' own schemas, older and newer ones."""
    for version in ("1.31", "1.35"):
        kubernetes_validate.validate(document, version, strict=True)


def problems(value: Any, wanted: Any, at: str = "") -> list[str]:
    """Where a PyTorchJob is not as documented."""
    if wanted == "pod":
        job = {
            "apiVersion": "batch/v1",
            "kind": "Job",
            "metadata": {"name": "x"},
            "spec": {"template": value},
        }
        validate(job)
        return [] if value["spec"]["containers"][0]["name"] == "pytorch" else [f"{at}: no container pytorch"]
    if isinstance(wanted, set):
        return [] if value in wanted else [f"{at}: {value}"]
    if isinstance(wanted, type):
        return [] if type(value) is wanted else [f"{at}: {value!r}"]
    found = [f"{at}.{key}: unknown" for key in value.keys() - wanted.keys()]
    return found + [
        line
        for key in value.keys() & wanted.keys()
        for line in problems(value[key], wanted[key], f"{at}.{key}")
    ]


def test_an_indexed_job(recipe, tmp_path, capsys) -> None:
    before = set(tmp_path.rglob("*"))
    config, service, job = dry(
        capsys, recipe, *WORDS, "run.name=My_Run.1", "--namespace", "ml", "--max-requeues", "5"
    )
    assert set(tmp_path.rglob("*")) == before
    for document in (config, service, job):
        validate(document)
        assert document["metadata"]["name"] == "my-run-1" and document["metadata"]["namespace"] == "ml"
    spec = job["spec"]
    assert (spec["completionMode"], spec["completions"], spec["parallelism"]) == ("Indexed", 4, 4)
    assert spec["backoffLimit"] == 20
    assert spec["podFailurePolicy"]["rules"][0]["onExitCodes"]["values"] == [1, 2, 3, 77]
    pod = spec["template"]
    assert (
        service["spec"]["clusterIP"] == "None"
        and service["spec"]["selector"].items() <= pod["metadata"]["labels"].items()
    )
    assert pod["spec"]["subdomain"] == "my-run-1" and pod["spec"]["restartPolicy"] == "Never"
    (container,) = pod["spec"]["containers"]
    assert spec["podFailurePolicy"]["rules"][0]["onExitCodes"]["containerName"] == container["name"]
    assert container["command"] == [
        "python", "-P", "-m", "hlat", "supervise", "/etc/hlat/recipe.yaml", "--nproc-per-node", "8",
        "--grace", "300", "--nnodes", "4", "--node-rank", "$(NODE_RANK)",
        "--master-addr", "my-run-1-0.my-run-1", "--master-port", "29500",
    ]  # fmt: skip
    (tmp_path / "again.yaml").write_text(config["data"]["recipe.yaml"])
    assert load("again.yaml") == load(recipe, ["run.name=My_Run.1"])
    assert container["resources"]["limits"] == {"nvidia.com/gpu": 8}


def test_trainium_and_efa(recipe, capsys, monkeypatch) -> None:
    for name in ("NEURON_CC_FLAGS", "FI_PROVIDER", "MALLOC_ARENA_MAX"):
        monkeypatch.delenv(name, raising=False)
    words = [*WORDS[:3], "32", *WORDS[4:], "backend=nxd", "data.global_batch=128", "--memory", "440Gi"]
    words += ["--secret", "tokens", "--service-account", "trainer", "--mount-path", "/fsx"]
    *_, job = dry(capsys, recipe, *words, "--instance-type", "trn1.32xlarge")
    validate(job)
    pod = job["spec"]["template"]["spec"]
    (container,) = pod["containers"]
    wanted = {"aws.amazon.com/neuron": 16, "vpc.amazonaws.com/efa": 8, "hugepages-2Mi": "5120Mi"}
    wanted |= {"cpu": "32", "memory": "440Gi"}
    assert container["resources"] == {"limits": wanted, "requests": wanted}
    assert pod["tolerations"] == [
        {"key": "aws.amazon.com/neuron", "operator": "Exists", "effect": "NoSchedule"}
    ]
    assert pod["nodeSelector"] == {"node.kubernetes.io/instance-type": "trn1.32xlarge"}
    assert {"name": "FI_PROVIDER", "value": "efa"} in container["env"]
    mounts = {mount["mountPath"]: mount["name"] for mount in container["volumeMounts"]}
    volumes = {volume["name"]: volume for volume in pod["volumes"]}
    assert volumes[mounts["/dev/shm"]]["emptyDir"] == {"medium": "Memory"}
    assert volumes[mounts["/fsx"]]["persistentVolumeClaim"] == {"claimName": "fsx"}
    assert container["workingDir"] == "/fsx" and pod["serviceAccountName"] == "trainer"
    assert container["envFrom"] == [{"secretRef": {"name": "tokens"}}]


@pytest.mark.parametrize("nodes", [1, 4])
def test_a_pytorchjob(recipe, capsys, nodes: int) -> None:
    config, job = dry(capsys, recipe, "--nodes", str(nodes), *WORDS[2:], "--kind", "pytorchjob")
    validate(config)
    assert problems(job, PYTORCHJOB) == []
    replicas = job["spec"]["pytorchReplicaSpecs"]
    assert {kind: replica["replicas"] for kind, replica in replicas.items()} == (
        {"Master": 1} if nodes == 1 else {"Master": 1, "Worker": 3}
    )
    command = replicas["Master"]["template"]["spec"]["containers"][0]["command"]
    assert command[-6:] == [
        "--node-rank",
        "$(RANK)",
        "--master-addr",
        "$(MASTER_ADDR)",
        "--master-port",
        "$(MASTER_PORT)",
    ]
    assert expand(command)[2] == read("exitcode.sh")


def test_the_table_of_fields_can_fail(recipe, capsys) -> None:
    _, job = dry(capsys, recipe, *WORDS, "--kind", "pytorchjob")
    job["spec"]["nprocPerNode"] = 8
    job["spec"]["runPolicy"]["cleanPodPolicy"] = "Some"
    job["spec"]["backoff"] = 1
    assert len(problems(job, PYTORCHJOB)) == 3


@pytest.mark.parametrize(
    ("words", "message"),
    [
        ([*WORDS[:4], *WORDS[6:]], "--image: is missing"),
        (WORDS[:6], "--shared-volume: is missing"),
        ([*WORDS, "--namespace", "A b"], "--namespace"),
        ([*WORDS, "--image", "x\n  privileged: true"], "--image"),
        ([*WORDS, "--job-name", "_._"], "--job-name"),
        ([*WORDS, "--job-name", "x" * 60], "--job-name"),
        ([*WORDS, "--job-name", "160m"], "--job-name: '160m' makes no name"),
        ([*WORDS, "--job-name", "160m", "--kind", "pytorchjob"], "--job-name"),
        ([*WORDS, f"run.name={'x' * 60}"], "--job-name"),
        ([*WORDS, "--namespace", "n" * 64], "--namespace"),
        ([*WORDS, "--secret", "a..b"], "--secret"),
        ([*WORDS, "--instance-type", "trn1."], "--instance-type"),
        ([*WORDS, "--memory", "lots"], "--memory"),
        ([*WORDS, "--mount-path", "fsx"], "--mount-path"),
        ([*WORDS, "run.dir=/elsewhere/run"], "not on the shared volume"),
        ([*WORDS, "optim.lrr=1"], "unknown key"),
    ],
)
def test_mistakes_are_one_line(recipe, tmp_path, capsys, words, message) -> None:
    before = set(tmp_path.rglob("*"))
    assert cli.main(["launch", "kubernetes", recipe, *words]) == 2
    said = capsys.readouterr()
    assert message in said.err and said.err.count("\n") == 1 and not said.out
    assert set(tmp_path.rglob("*")) == before


def test_submission(recipe, tmp_path, monkeypatch, capsys) -> None:
    assert cli.main(["launch", "kubernetes", recipe, *WORDS]) == 0
    file = tmp_path / "runs/small/launch/job.yaml"
    assert (tmp_path / "bin/kubectl.calls").read_text().splitlines() == ["apply", "--filename", str(file)]
    assert capsys.readouterr().out == "job created\n" and len(list(yaml.safe_load_all(file.read_text()))) == 3
    monkeypatch.setenv("PATH", str(tmp_path))
    assert cli.main(["launch", "kubernetes", recipe, *WORDS]) == 2
    said = capsys.readouterr().err
    assert "no command kubectl" in said and str(file) in said and said.count("\n") == 1


@pytest.mark.parametrize("kind", ["job", "pytorchjob"])
@pytest.mark.parametrize(
    ("words", "name"),
    [
        (["run.name=160m"], "hlat-160m"),
        (["run.name=1_B.v2"], "hlat-1-b-v2"),
        (["run.name=Llama-1B"], "llama-1b"),
        (["run.name=160m", "--job-name", "b160"], "b160"),
        ([f"run.name={'x' * 53}"], "x" * 53),
        ([f"run.name=1{'x' * 47}"], f"hlat-1{'x' * 47}"),
    ],
)
def test_names_of_services_begin_with_a_letter(recipe, capsys, kind, words, name) -> None:
    """RFC 1035, with what the names of pods have behind it."""
    documents = dry(capsys, recipe, *WORDS, *words, "--kind", kind)
    assert {document["metadata"]["name"] for document in documents} == {name}
    label = r"[a-z]([-a-z0-9]*[a-z0-9])?"
    for pod in (f"{name}-3", f"{name}-3-abcde", f"{name}-master-0", f"{name}-worker-3"):
        assert re.fullmatch(label, pod) and len(pod) <= 63


def expand(words: list[str], **values: str) -> list[str]:
    """What Kubernetes makes of a container's command: $$ is $, $(NAME) the value of a known variable."""
    out = []
    for word in words:
        text, rest = "", word
        while rest:
            name = rest[2:].partition(")")[0] if rest.startswith("$(") and ")" in rest else None
            if rest.startswith("$$"):
                text, rest = text + "$", rest[2:]
            elif name is not None and name in values:
                text, rest = text + values[name], rest[len(name) + 3 :]
            else:
                text, rest = text + rest[0], rest[1:]
        out.append(text)
    return out


TEXT = st.text(
    st.characters(exclude_categories=["Cs"], exclude_characters="\0"), max_size=30
) | st.sampled_from(
    [
        "$(NODE_RANK)",
        "$$(NODE_RANK)",
        "a: b",
        "- x",
        "{{ a }}",
        "---\n",
        "a\n\n  b\n",
        "!!python/object:os.system x",
        "\ufeff",
    ]
)


@settings(max_examples=60, deadline=None)
@given(TEXT, TEXT)
def test_any_text_arrives(launch_stubs, python: str, tokenizer: str) -> None:
    values = yaml.safe_load(launch_stubs.RECIPE)
    values["data"]["tokenizer"] = f"x{tokenizer}"
    made = Recipe.from_dict(values)
    plan = Plan(made, "r", (), nodes=2, processes=1, python=python, job_name="j")
    for kind in ("job", "pytorchjob"):
        text = kubernetes.manifest(plan, kubernetes.Options("i", "c", kind=kind))
        config, *_, job = yaml.safe_load_all(text)
        if kind == "job":
            pod, start = job["spec"]["template"], 0
        else:
            pod, start = job["spec"]["pytorchReplicaSpecs"]["Worker"]["template"], 4
        words = expand(pod["spec"]["containers"][0]["command"], NODE_RANK="1", RANK="1")
        assert words[start] == python and words[words.index("--node-rank") + 1] == "1"
        assert Recipe.from_dict(yaml.safe_load(config["data"]["recipe.yaml"])) == made


@pytest.mark.parametrize(
    ("code", "shown"), [(0, 0), (1, 1), (2, 2), (3, 3), (75, 143), (76, 143), (137, 137)]
)
def test_exit_codes_for_the_operator(code: int, shown: int) -> None:
    words = ["bash", "-c", read("exitcode.sh"), "hlat", "bash", "-c", f"exit {code}"]
    assert subprocess.run(words).returncode == shown


def test_sigterm_reaches_the_supervisor(tmp_path) -> None:
    program = "trap 'exit 75' TERM; touch ready; while :; do sleep 0.05; done"
    words = ["bash", "-c", read("exitcode.sh"), "hlat", "bash", "-c", program]
    process = subprocess.Popen(words, cwd=tmp_path)
    end = time.monotonic() + 20
    while not (tmp_path / "ready").exists() and time.monotonic() < end:
        time.sleep(0.02)
    process.send_signal(signal.SIGTERM)
    assert process.wait(20) == 143
