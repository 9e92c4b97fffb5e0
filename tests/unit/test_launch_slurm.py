"""`hlat launch slurm`: the script, what it does with signals and exit codes, what hostile values do not."""

from __future__ import annotations

import importlib.util
import signal
import subprocess
import tempfile
import time
from pathlib import Path
from types import ModuleType

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from hlat import cli
from hlat.errors import UserError
from hlat.launch import slurm
from hlat.launch.plan import Plan
from hlat.recipe import load


def load_stubs() -> ModuleType:
    """Test modules do not import each other."""
    spec = importlib.util.spec_from_file_location("launch_stubs", Path(__file__).with_name("launch_stubs.py"))
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    import sys

    sys.modules["launch_stubs"] = module
    spec.loader.exec_module(module)
    return module


STUBS = load_stubs()
RECIPE = """
run: {steps: 3}
model: {layers: 1, hidden: 16, heads: 2, kv_heads: 2, ffn: 32, vocab: 257, max_seq_len: 16}
data: {sources: [{path: text}], tokenizer: bytes, micro_batch: 1, global_batch: 8}
compile: false
"""
HOSTILE = [
    "a b",
    "$(touch x)",
    "`touch x`",
    "'; touch x; '",
    '"; touch x; "',
    "a\nb",
    "\\",
    "*",
    "-n",
    "#x",
    "",
]
HOSTILE += [
    "$HOME",
    "!!",
    "~",
    "\t",
    "\r\n#SBATCH --uid=0\n",
    "\x1b[1m\x7f",
    "{a,b}",
    "a;b&c|d>x",
    "é – 日本",
    "{{ run_dir }}",
    "'\"'\"'",
]


@pytest.fixture
def cluster(tmp_path: Path, monkeypatch):
    """Stand-ins for SLURM's commands; the test's own calls find them too."""
    made = STUBS.Cluster(tmp_path / "cluster")
    for name in ("PATH", "RECORD"):
        monkeypatch.setenv(name, made.environ[name])
    return made


@pytest.fixture
def recipe(tmp_path: Path, monkeypatch) -> str:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "small.yaml").write_text(RECIPE)
    return "small.yaml"


def dry(capsys, *words: str) -> str:
    assert cli.main(["launch", "slurm", *words, "--dry-run"]) == 0
    return str(capsys.readouterr().out)


def plan_of(recipe: str, cluster, *overrides: str, **more) -> Plan:
    return Plan(
        load(recipe), recipe, overrides, nodes=2, processes=2, python=cluster.python, job_name="j",
        work_dir=cluster.folder, **more,
    )  # fmt: skip


def test_dry_run_prints_a_script_and_writes_nothing(recipe, tmp_path, capsys) -> None:
    before = set(tmp_path.rglob("*"))
    words = ["--nodes", "2", "--nproc-per-node", "4", "--partition", "gpu", "--account", "me"]
    words += ["--time", "1-12", "--sbatch", "gres=gpu:4", "--grace", "120", "optim.lr=1e-3"]
    text = dry(capsys, recipe, *words)
    assert set(tmp_path.rglob("*")) == before
    subprocess.run(["bash", "-n"], input=text, text=True, check=True)
    lines = text.splitlines()
    assert lines[0] == "#!/bin/bash"
    directives = [line.removeprefix("#SBATCH --") for line in lines if line.startswith("#SBATCH")]
    assert directives == [
        "job-name=small", "nodes=2", "ntasks-per-node=1", "exclusive", "mem=0", "requeue",
        "signal=B:USR1@120", "open-mode=append", f'output="{tmp_path}/runs/small/launch/train-%j.out"',
        "partition=gpu", "account=me", "time=1-12", "gres=gpu:4",
    ]  # fmt: skip
    body = [line for line in lines if not line.startswith("#")]
    assert body[0] == "set -euo pipefail" and "{{" not in text
    assert "    optim.lr=1e-3" in lines and "| tee" not in text


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--nodes", "3", "--nproc-per-node", "3"], "global_batch"),
        (["parallel.tp=3", "--nodes", "1", "--nproc-per-node", "1"], "tp"),
        (["optim.lrr=1", "--nodes", "1", "--nproc-per-node", "1"], "unknown key 'lrr'"),
        (["optim.lr=[1, 2]", "--nodes", "1", "--nproc-per-node", "1"], "add --seeds 1"),
        (["--nodes", "1"], "how many processes"),
        (["--nodes", "0", "--nproc-per-node", "1"], "--nodes: 0 is out of range"),
        (["--nodes", "1", "--nproc-per-node", "1", "--partition", "a b"], "--partition"),
        (["--nodes", "1", "--nproc-per-node", "1", "--job-name", "a\n#SBATCH --uid=0"], "--job-name"),
        (["--nodes", "1", "--nproc-per-node", "1", "--sbatch", "gres=x\n"], "--sbatch"),
        (["--nodes", "1", "--nproc-per-node", "1", "--time", "soon"], "no time limit"),
        (["--nodes", "1", "--nproc-per-node", "1", "--time", "5:00"], "within --grace 300"),
        (["--nodes", "1", "--nproc-per-node", "1", "--out", "x"], "--out is for sweeps"),
        (["--nodes", "1", "--nproc-per-node", "1", "--interface", "$(id)"], "--interface"),
        (["--nodes", "1", "--nproc-per-node", "1", "--max-requeues", "-1"], "--max-requeues"),
        (['run.dir="a\\nb"', "--nodes", "1", "--nproc-per-node", "1"], "run.dir"),
        (["run.dir=a\\b", "--nodes", "1", "--nproc-per-node", "1"], "run.dir"),
    ],
)
def test_mistakes_are_one_line_and_nothing_is_written(
    recipe, cluster, tmp_path, capsys, words, message
) -> None:
    before = set(tmp_path.rglob("*"))
    assert cli.main(["launch", "slurm", recipe, *words]) == 2
    said = capsys.readouterr()
    assert message in said.err and said.err.count("\n") == 1 and not said.out
    assert set(tmp_path.rglob("*")) == before


@pytest.mark.parametrize(
    ("text", "seconds"),
    [("30", 1800), ("1:30", 90), ("2:00:00", 7200), ("1-0", 86400), ("1-2:30", 95400), ("1-2:30:10", 95410)],
)
def test_time_limits(text: str, seconds: int) -> None:
    assert slurm.seconds(text) == seconds


def test_submission(recipe, cluster, tmp_path, capsys) -> None:
    words = ["launch", "slurm", recipe, "--nodes", "2", "--nproc-per-node", "2", "run.dir=a b/$(touch x)"]
    assert cli.main(words) == 0
    file = tmp_path / "a b/$(touch x)/launch/train.sbatch"
    assert capsys.readouterr().out == f"submitted job 41: {file}\n"
    assert cluster.words("sbatch") == ["--parsable", str(file)]
    assert file.read_text().startswith("#!/bin/bash\n")
    assert cli.main([*words, "--dry-run"]) == 0
    assert capsys.readouterr().out == file.read_text()


def test_a_missing_or_failing_sbatch_is_one_line(recipe, cluster, tmp_path, monkeypatch, capsys) -> None:
    words = ["launch", "slurm", recipe, "--nodes", "1", "--nproc-per-node", "1"]
    cluster.write("sbatch", "echo 'sbatch: error: invalid partition' >&2; exit 1")
    assert cli.main(words) == 2
    file = tmp_path / "runs/small/launch/train.sbatch"
    said = capsys.readouterr().err
    assert said.count("\n") == 1 and "invalid partition" in said and str(file) in said
    (cluster.commands / "sbatch").unlink()
    monkeypatch.setenv("PATH", str(cluster.commands))
    assert cli.main(words) == 2
    said = capsys.readouterr().err
    assert said.count("\n") == 1 and "no command sbatch" in said and str(file) in said and file.is_file()


@pytest.fixture
def neuron(recipe, monkeypatch) -> list[str]:
    """Words of a launch on trn1, without the variables of another test's machine."""
    for name in ("NEURON_CC_FLAGS", "FI_PROVIDER", "MALLOC_ARENA_MAX"):
        monkeypatch.delenv(name, raising=False)
    return [recipe, "--nodes", "2", "backend=nxd", "data.global_batch=64"]


def test_trn1_compiles_ahead(neuron, cluster, tmp_path, capsys) -> None:
    assert cli.main(["launch", "slurm", *neuron]) == 0
    folder = tmp_path / "runs/small/launch"
    first, second = (line.split("\0")[:-1] for line in (cluster.record / "sbatch").read_text().splitlines())
    assert first == ["--parsable", str(folder / "precompile.sbatch")]
    assert second[1:-1] == ["--dependency=afterok:41", "--kill-on-invalid-dep=yes"]
    assert second[-1] == str(folder / "train.sbatch")
    done = cluster.run(
        (folder / "precompile.sbatch").read_text().replace(f"{STUBS.sys.executable} ", f"{cluster.python} ")
    )
    assert done.returncode == 0, done.stderr
    assert cluster.words("argv-1") == ["-m", "hlat", "train", *neuron[:1], *neuron[3:], "--precompile"]
    environ = dict(item.split("=", 1) for item in cluster.words("environ-1"))
    wanted = {"NODES": "2", "NODE_RANK": "1", "MASTER_ADDR": "node1", "MASTER_PORT": "10014", "CORES": "32"}
    wanted |= {"FI_PROVIDER": "efa", "MALLOC_ARENA_MAX": "64"}
    assert wanted.items() <= environ.items()
    assert cli.main(["launch", "slurm", *neuron, "--no-precompile", "--dry-run"]) == 0
    assert "--precompile" not in capsys.readouterr().out


def test_a_failed_compilation_is_a_failed_job(neuron, cluster, capsys) -> None:
    text = dry(capsys, *neuron, "--python", cluster.python).split("#!/bin/bash\n")[1]
    assert cluster.run(text, CODES="0 5").returncode == 5


def test_a_sweep_is_a_job_array(recipe, cluster, tmp_path, capsys) -> None:
    words = ["optim.lr=[1e-3, 2e-3]", "run.steps=7", "--seeds", "2", "--nodes", "2", "--nproc-per-node", "2"]
    text = dry(capsys, recipe, *words, "--out", "grid", "--at-once", "3", "--python", cluster.python)
    assert "#SBATCH --array=0-3%3\n" in text and "#SBATCH --job-name=grid\n" in text
    assert f'#SBATCH --output="{tmp_path}/grid/launch/train-%A_%a.out"\n' in text
    seen = []
    for task in range(4):
        array = {"SLURM_ARRAY_JOB_ID": "7", "SLURM_ARRAY_TASK_ID": str(task)}
        assert cluster.run(text, CODES="75 75", **array).returncode == 75
        argv = cluster.words("argv-1")
        overrides = argv[4 : argv.index("--nproc-per-node")]
        made = load(recipe, overrides)
        seen.append((made.optim.lr, made.run.seed, made.run.steps))
        assert (
            tmp_path / made.run.dir / f"logs/slurm/job-7_{task}/attempt-0/exit-code-1"
        ).read_text() == "75\n"
        assert f"scontrol requeue 7_{task}" in cluster.calls("scontrol requeue")
    assert seen == [(1e-3, 0, 7), (1e-3, 1, 7), (2e-3, 0, 7), (2e-3, 1, 7)]
    assert cluster.run(text, SLURM_ARRAY_JOB_ID="7", SLURM_ARRAY_TASK_ID="4").returncode == 2


def test_each_node_gets_its_number_and_the_first_node(recipe, cluster) -> None:
    plan = plan_of(recipe, cluster, "run.steps=3", grace=77)
    done = cluster.run(slurm.train_script(plan, slurm.Options(), cluster.folder), SLURM_JOB_ID="123456")
    assert done.returncode == 0, done.stderr
    for node in range(2):
        assert cluster.words(f"argv-{node}") == [
            "-m", "hlat", "supervise", recipe, "run.steps=3", "--nproc-per-node", "2", "--grace", "77",
            "--nnodes", "2", "--master-addr", "node1", "--master-port", "16912", "--node-rank", str(node),
        ]  # fmt: skip
        assert (plan.run_dir / f"logs/slurm/job-123456/attempt-0/node-{node}-node{node + 1}.txt").exists()


def test_the_interface_binds_rendezvous_and_collectives(recipe, cluster) -> None:
    cluster.write(
        "ip", "[[ $* == *-4* ]] && echo '2: ens5    inet 10.0.0.7/20 brd 10.0.15.255 scope global'; exit 0"
    )
    plan = plan_of(recipe, cluster, interface="ens5")
    assert cluster.run(slurm.train_script(plan, slurm.Options(), cluster.folder)).returncode == 0
    argv, environ = cluster.words("argv-1"), cluster.words("environ-1")
    assert argv[argv.index("--master-addr") + 1] == "10.0.0.7"
    assert {f"{name}_SOCKET_IFNAME=ens5" for name in ("GLOO", "NCCL", "CCOM")} <= set(environ)
    cluster.write("ip", "echo 'Device \"ens5\" does not exist.' >&2; exit 1")
    assert cluster.run(slurm.train_script(plan, slurm.Options(), cluster.folder)).returncode == 1


@pytest.mark.parametrize(
    ("codes", "exit_code", "requeued"),
    [
        ("0 0", 0, False),
        ("2 2", 2, False),
        ("3 1", 3, False),
        ("1 3", 3, False),
        ("75 2", 2, False),
        ("1 75", 1, False),
        ("1 143", 1, False),
        ("127 127", 127, False),
        ("130 130", 130, False),
        ("75 75", 75, True),
        ("75 0", 75, True),
        ("137 75", 75, True),
        ("137 0", 137, True),
        ("76 1", 76, True),
    ],
)
def test_exit_codes(recipe, cluster, codes: str, exit_code: int, requeued: bool) -> None:
    script = slurm.train_script(plan_of(recipe, cluster), slurm.Options(), cluster.folder)
    done = cluster.run(script, CODES=codes)
    assert done.returncode == exit_code, done.stderr
    assert cluster.calls("scontrol requeue") == ["scontrol requeue 7"] * requeued


def test_a_step_that_does_not_start_is_tried_again(recipe, cluster) -> None:
    cluster.write("srun", "echo 'srun: error: Unable to create step' >&2; exit 1")
    done = cluster.run(slurm.train_script(plan_of(recipe, cluster), slurm.Options(), cluster.folder))
    assert done.returncode == 1 and cluster.calls("scontrol requeue") == ["scontrol requeue 7"]
    assert "no node could start (exit code 1); requeue 1 of 50" in done.stderr


def test_the_restart_budget(recipe, cluster) -> None:
    script = slurm.train_script(plan_of(recipe, cluster, max_requeues=3), slurm.Options(), cluster.folder)
    done = cluster.run(script, CODES="75 75", SLURM_RESTART_COUNT="2")
    assert "requeue 3 of 3" in done.stderr and len(cluster.calls("scontrol requeue")) == 1
    done = cluster.run(script, CODES="75 75", SLURM_RESTART_COUNT="3")
    assert done.returncode == 75 and "all 3 requeues are used up" in done.stderr
    assert len(cluster.calls("scontrol requeue")) == 1


def test_bad_nodes_are_excluded_besides_the_others(recipe, cluster) -> None:
    plan = plan_of(recipe, cluster)
    script = slurm.train_script(plan, slurm.Options(), cluster.folder)
    bad = plan.run_dir / "logs/supervisor/bad-nodes.txt"
    bad.parent.mkdir(parents=True)
    bad.write_text("node2\n$(touch x)\n--help\nip-10-0-0-7.cluster.internal\nnode8.x")
    assert cluster.run(script, CODES="1 76", EXCLUDED="node[5-6]").returncode == 76
    assert cluster.calls("scontrol update") == [
        "scontrol update JobId=7 ExcNodeList=node[5-6],node2,q-7,node8"
    ]
    order = [
        line.split()[1] for line in cluster.calls("scontrol") if line.split()[1] in ("requeue", "update")
    ]
    assert order == ["requeue", "update"]  # SLURM refuses to exclude nodes from a job that runs


def wait_for_nodes(cluster) -> None:
    end = time.monotonic() + 30
    while len(list(cluster.record.glob("pid-*"))) < 2:
        assert time.monotonic() < end
        time.sleep(0.02)


@pytest.mark.parametrize("signalled", ["pid", "task"])  # every process, or a task's first as with cgroups
def test_before_the_time_limit_the_state_is_saved(recipe, cluster, signalled: str) -> None:
    script = slurm.train_script(plan_of(recipe, cluster), slurm.Options(), cluster.folder)
    process = cluster.start(script, CODES="wait wait", SIGNALLED=signalled)
    wait_for_nodes(cluster)
    process.send_signal(signal.SIGUSR1)
    assert process.wait(30) == 75
    assert cluster.calls("scancel") == ["scancel --signal=TERM 7"]
    assert cluster.calls("scontrol requeue") == ["scontrol requeue 7"]


@pytest.mark.parametrize(("reason", "requeued"), [("None", False), ("TimeLimit", True)])
def test_a_cancelled_job_is_not_requeued(recipe, cluster, reason: str, requeued: bool) -> None:
    script = slurm.train_script(plan_of(recipe, cluster), slurm.Options(), cluster.folder)
    process = cluster.start(script, CODES="wait wait", REASON=reason)
    wait_for_nodes(cluster)
    process.send_signal(signal.SIGTERM)
    time.sleep(0.2)
    for file in cluster.record.glob("pid-*"):  # SLURM signals the step as well
        STUBS.os.kill(int(file.read_text()), signal.SIGTERM)
    assert process.wait(30) == 75
    assert len(cluster.calls("scontrol requeue")) == requeued


def test_hostile_words_arrive_and_do_nothing(tmp_path, cluster, monkeypatch) -> None:
    name = "$(touch x); 'a' \"b\".yaml"
    monkeypatch.chdir(cluster.folder)
    (cluster.folder / name).write_text(RECIPE)
    overrides = [f"data.tokenizer={text}" for text in HOSTILE]
    plan = plan_of(name, cluster, *overrides)
    before = set(cluster.folder.rglob("*"))
    folder = cluster.folder / "it's $(touch x) 100%"
    script = slurm.train_script(plan, slurm.Options(), folder)
    assert script.count("%%/train-%j.out") == 1 and "\r" not in script and "\x1b" not in script
    done = cluster.run(script)
    assert done.returncode == 0, done.stderr
    assert cluster.words("argv-1")[3 : 4 + len(overrides)] == [name, *overrides]
    new = {file.name for file in set(cluster.folder.rglob("*")) - before}
    assert "x" not in new and not (tmp_path / "x").exists()


TEXT = st.text(st.characters(exclude_categories=["Cs"], exclude_characters="\0"), max_size=20)


@settings(max_examples=12, deadline=None)
@given(st.lists(TEXT, max_size=12), TEXT)
def test_any_words_arrive(words: list[str], folder: str) -> None:
    with tempfile.TemporaryDirectory() as place:
        cluster = STUBS.Cluster(Path(place) / "cluster")
        base = Path(place) / "r.yaml"
        base.write_text(RECIPE)
        plan = plan_of(str(base), cluster, *words)
        run_dir = cluster.folder / folder.strip("./") / "run"
        task = slurm.Task(tuple(words), run_dir)
        try:
            run_dir.mkdir(parents=True, exist_ok=True)
        except OSError:
            return  # no name of a folder
        for script, environ in (
            (slurm.train_script(plan, slurm.Options(), cluster.folder), {}),
            (
                slurm.train_script(plan, slurm.Options(), cluster.folder, [task]),
                {"SLURM_ARRAY_JOB_ID": "7", "SLURM_ARRAY_TASK_ID": "0"},
            ),
        ):
            done = cluster.run(script, **environ)
            assert done.returncode == 0, done.stderr
            assert cluster.words("argv-0")[4 : 4 + len(words)] == words
        assert (run_dir / "logs/slurm/job-7_0/attempt-0/exit-code-0").read_text() == "0\n"


def test_a_run_folder_that_no_option_can_carry(recipe, cluster) -> None:
    with pytest.raises(UserError, match=r"run\.dir"):
        slurm.train_script(plan_of(recipe, cluster), slurm.Options(), Path("a\\b"))
