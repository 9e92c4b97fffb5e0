"""`hlat launch slurm`: the script, how it is submitted, what hostile values do not do."""

from __future__ import annotations

import subprocess
import sys
import tempfile
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from hlat import cli
from hlat.errors import UserError
from hlat.launch import slurm
from hlat.recipe import load

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
]
HOSTILE += ["{{ run_dir }}", "'\"'\"'"]


def dry(capsys, *words: str) -> str:
    assert cli.main(["launch", "slurm", *words, "--dry-run"]) == 0
    return str(capsys.readouterr().out)


def test_dry_run_prints_a_script_and_writes_nothing(small_recipe, tmp_path, capsys) -> None:
    before = set(tmp_path.rglob("*"))
    words = ["--nodes", "2", "--nproc-per-node", "4", "--partition", "gpu", "--account", "me"]
    words += ["--time", "1-12", "--sbatch", "gres=gpu:4", "--grace", "120", "optim.lr=1e-3"]
    text = dry(capsys, small_recipe, *words)
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
    small_recipe, stub_cluster, tmp_path, capsys, words, message
) -> None:
    before = set(tmp_path.rglob("*"))
    assert cli.main(["launch", "slurm", small_recipe, *words]) == 2
    said = capsys.readouterr()
    assert message in said.err and said.err.count("\n") == 1 and not said.out
    assert set(tmp_path.rglob("*")) == before


@pytest.mark.parametrize(
    ("text", "seconds"),
    [
        *(("30", 1800), ("1:30", 90), ("2:00:00", 7200), ("1-0", 86400), ("1-2:30", 95400)),
        *(("1-2:30:10", 95410), ("0:30", 30), ("0-1", 3600), ("90:00", 5400), ("0:0:1", 1)),
        *((text, None) for text in ("0", "0:00", "00:00:00", "0-0", "UNLIMITED", "infinite", "Unlimited")),
    ],
)
def test_time_limits(text: str, seconds: int | None) -> None:
    assert slurm.seconds(text) == seconds


@pytest.mark.parametrize(
    "text", ["", "-1", "1:", "1-", "1:2:3:4", "1-2:3:4:5", "1h", "١", "30 ", "never", "1.5"]
)
def test_no_time_limits(text: str) -> None:
    with pytest.raises(UserError, match="is no time limit"):
        slurm.seconds(text)


@pytest.mark.parametrize("text", ["0", "UNLIMITED", "INFINITE"])
def test_a_job_without_a_time_limit(small_recipe, capsys, text: str) -> None:
    words = [small_recipe, "--nodes", "1", "--nproc-per-node", "1", "--time", text, "--dry-run"]
    assert cli.main(["launch", "slurm", *words]) == 0
    assert f"\n#SBATCH --time={text}\n" in capsys.readouterr().out


def test_submission(small_recipe, stub_cluster, tmp_path, capsys) -> None:
    words = [
        "launch",
        "slurm",
        small_recipe,
        "--nodes",
        "2",
        "--nproc-per-node",
        "2",
        "run.dir=a b/$(touch x)",
    ]
    assert cli.main(words) == 0
    file = tmp_path / "a b/$(touch x)/launch/train.sbatch"
    assert capsys.readouterr().out == f"submitted job 41: {file}\n"
    assert stub_cluster.words("sbatch") == ["--parsable", str(file)]
    assert file.read_text().startswith("#!/bin/bash\n")
    assert cli.main([*words, "--dry-run"]) == 0
    assert capsys.readouterr().out == file.read_text()


def test_a_missing_or_failing_sbatch_is_one_line(
    small_recipe, stub_cluster, tmp_path, monkeypatch, capsys
) -> None:
    words = ["launch", "slurm", small_recipe, "--nodes", "1", "--nproc-per-node", "1"]
    stub_cluster.write("sbatch", "echo 'sbatch: error: invalid partition' >&2; exit 1")
    assert cli.main(words) == 2
    file = tmp_path / "runs/small/launch/train.sbatch"
    said = capsys.readouterr().err
    assert said.count("\n") == 1 and "invalid partition" in said and str(file) in said
    (stub_cluster.commands / "sbatch").unlink()
    monkeypatch.setenv("PATH", str(stub_cluster.commands))
    assert cli.main(words) == 2
    said = capsys.readouterr().err
    assert said.count("\n") == 1 and "no command sbatch" in said and str(file) in said and file.is_file()


@pytest.fixture
def neuron(small_recipe, monkeypatch) -> list[str]:
    """Words of a launch on trn1, without the variables of another test's machine."""
    for name in ("NEURON_CC_FLAGS", "FI_PROVIDER", "MALLOC_ARENA_MAX"):
        monkeypatch.delenv(name, raising=False)
    return [small_recipe, "--nodes", "2", "backend=nxd", "data.global_batch=64"]


def test_trn1_compiles_ahead(neuron, stub_cluster, tmp_path, capsys) -> None:
    assert cli.main(["launch", "slurm", *neuron]) == 0
    folder = tmp_path / "runs/small/launch"
    first, second = (
        line.split("\0")[:-1] for line in (stub_cluster.record / "sbatch").read_text().splitlines()
    )
    assert first == ["--parsable", str(folder / "precompile.sbatch")]
    assert second[1:-1] == ["--dependency=afterok:41", "--kill-on-invalid-dep=yes"]
    assert second[-1] == str(folder / "train.sbatch")
    done = stub_cluster.run(
        (folder / "precompile.sbatch").read_text().replace(f"{sys.executable} ", f"{stub_cluster.python} ")
    )
    assert done.returncode == 0, done.stderr
    wanted = ["-P", "-m", "hlat", "train", *neuron[:1], *neuron[3:], "--precompile"]
    assert stub_cluster.words("argv-1") == wanted
    environ = dict(item.split("=", 1) for item in stub_cluster.words("environ-1"))
    wanted = {"NODES": "2", "NODE_RANK": "1", "MASTER_ADDR": "node1", "MASTER_PORT": "10014", "CORES": "32"}
    wanted |= {"FI_PROVIDER": "efa", "MALLOC_ARENA_MAX": "64"}
    assert wanted.items() <= environ.items()
    assert "set compile_cache" in capsys.readouterr().err
    for more in (
        ["compile_cache=s3://bucket/cache"],
        ["--sbatch", "nodelist=trn1-[1-2]"],
        ["--no-precompile"],
    ):
        assert cli.main(["launch", "slurm", *neuron, *more]) == 0
        assert not capsys.readouterr().err
    assert cli.main(["launch", "slurm", *neuron, "--no-precompile", "--dry-run"]) == 0
    assert "--precompile" not in capsys.readouterr().out


def test_without_sbatch_all_scripts_are_written_and_the_line_submits_them(
    neuron, stub_cluster, tmp_path, monkeypatch, capsys
) -> None:
    path = f"{stub_cluster.commands}:/usr/bin:/bin"
    monkeypatch.setenv("PATH", str(tmp_path))
    assert cli.main(["launch", "slurm", *neuron, "--no-precompile"]) == 2
    assert "where sbatch is, run: sbatch " in capsys.readouterr().err
    assert cli.main(["launch", "slurm", *neuron]) == 2
    said = capsys.readouterr().err.splitlines()[-1]
    folder = tmp_path / "runs/small/launch"
    assert {file.name for file in folder.iterdir()} == {"precompile.sbatch", "train.sbatch"}
    assert "the scripts are written; where sbatch is, run: job=$(" in said
    done = subprocess.run(
        ["bash", "-c", said.partition("run: ")[2]], env={**stub_cluster.environ, "PATH": path}
    )
    assert done.returncode == 0
    second = (stub_cluster.record / "sbatch").read_text().splitlines()[1].split("\0")[:-1]
    assert second == ["--dependency=afterok:41", "--kill-on-invalid-dep=yes", str(folder / "train.sbatch")]


def test_paths_that_are_not_here_are_noted_and_not_refused(small_recipe, capsys) -> None:
    more = ["data.sources=[{path: nowhere}]", "data.tokenizer=/none/t.model", "--nodes", "1"]
    assert cli.main(["launch", "slurm", small_recipe, *more, "--nproc-per-node", "1", "--dry-run"]) == 0
    shown = capsys.readouterr()
    assert shown.out.startswith("#!/bin/bash")
    assert [line.split(": ")[:3] for line in shown.err.splitlines()] == [
        ["hlat", "note", "data.sources[0].path"], ["hlat", "note", "data.tokenizer"],
    ]  # fmt: skip


def test_a_failed_compilation_is_a_failed_job(neuron, stub_cluster, capsys) -> None:
    text = dry(capsys, *neuron, "--python", stub_cluster.python).split("#!/bin/bash\n")[1]
    assert stub_cluster.run(text, CODES="0 5").returncode == 5


def test_a_sweep_is_a_job_array(small_recipe, stub_cluster, tmp_path, capsys) -> None:
    words = ["optim.lr=[1e-3, 2e-3]", "run.steps=7", "--seeds", "2", "--nodes", "2", "--nproc-per-node", "2"]
    text = dry(
        capsys, small_recipe, *words, "--out", "grid", "--at-once", "3", "--python", stub_cluster.python
    )
    assert "#SBATCH --array=0-3%3\n" in text and "#SBATCH --job-name=grid\n" in text
    assert f'#SBATCH --output="{tmp_path}/grid/launch/train-%A_%a.out"\n' in text
    seen = []
    for task in range(4):
        array = {"SLURM_ARRAY_JOB_ID": "7", "SLURM_ARRAY_TASK_ID": str(task)}
        assert stub_cluster.run(text, CODES="75 75", **array).returncode == 75
        argv = stub_cluster.words("argv-1")
        overrides = argv[5 : argv.index("--nproc-per-node")]
        made = load(small_recipe, overrides)
        seen.append((made.optim.lr, made.run.seed, made.run.steps))
        assert (
            tmp_path / made.run.dir / f"logs/slurm/job-7_{task}/attempt-0/exit-code-1"
        ).read_text() == "75\n"
        assert f"scontrol requeue 7_{task}" in stub_cluster.calls("scontrol requeue")
    assert seen == [(1e-3, 0, 7), (1e-3, 1, 7), (2e-3, 0, 7), (2e-3, 1, 7)]
    assert stub_cluster.run(text, SLURM_ARRAY_JOB_ID="7", SLURM_ARRAY_TASK_ID="4").returncode == 2


def test_each_node_gets_its_number_and_the_first_node(small_recipe, stub_cluster) -> None:
    plan = stub_cluster.plan(small_recipe, "run.steps=3", grace=77)
    done = stub_cluster.run(
        slurm.train_script(plan, slurm.Options(), stub_cluster.folder), SLURM_JOB_ID="123456"
    )
    assert done.returncode == 0, done.stderr
    for node in range(2):
        assert stub_cluster.words(f"argv-{node}") == [
            "-P", "-m", "hlat", "supervise", small_recipe, "run.steps=3", "--nproc-per-node", "2",
            "--grace", "77", "--nnodes", "2", "--master-addr", "node1", "--master-port", "16912",
            "--node-rank", str(node),
        ]  # fmt: skip
        assert (plan.run_dir / f"logs/slurm/job-123456/attempt-0/node-{node}-node{node + 1}.txt").exists()


def test_the_interface_binds_rendezvous_and_collectives(small_recipe, stub_cluster) -> None:
    stub_cluster.write(
        "ip", "[[ $* == *-4* ]] && echo '2: ens5    inet 10.0.0.7/20 brd 10.0.15.255 scope global'; exit 0"
    )
    plan = stub_cluster.plan(small_recipe, interface="ens5")
    assert stub_cluster.run(slurm.train_script(plan, slurm.Options(), stub_cluster.folder)).returncode == 0
    argv, environ = stub_cluster.words("argv-1"), stub_cluster.words("environ-1")
    assert argv[argv.index("--master-addr") + 1] == "10.0.0.7"
    assert {f"{name}_SOCKET_IFNAME=ens5" for name in ("GLOO", "NCCL", "CCOM")} <= set(environ)
    stub_cluster.write("ip", "echo 'Device \"ens5\" does not exist.' >&2; exit 1")
    assert stub_cluster.run(slurm.train_script(plan, slurm.Options(), stub_cluster.folder)).returncode == 1


def test_hostile_words_arrive_and_do_nothing(tmp_path, launch_stubs, stub_cluster, monkeypatch) -> None:
    name = "$(touch x); 'a' \"b\".yaml"
    monkeypatch.chdir(stub_cluster.folder)
    (stub_cluster.folder / name).write_text(launch_stubs.RECIPE)
    overrides = [f"data.tokenizer={text}" for text in HOSTILE]
    plan = stub_cluster.plan(name, *overrides)
    before = set(stub_cluster.folder.rglob("*"))
    folder = stub_cluster.folder / "it's $(touch x) 100%"
    script = slurm.train_script(plan, slurm.Options(), folder)
    assert script.count("%%/train-%j.out") == 1 and "\r" not in script and "\x1b" not in script
    done = stub_cluster.run(script)
    assert done.returncode == 0, done.stderr
    assert stub_cluster.words("argv-1")[4 : 5 + len(overrides)] == [name, *overrides]
    new = {file.name for file in set(stub_cluster.folder.rglob("*")) - before}
    assert "x" not in new and not (tmp_path / "x").exists()


TEXT = st.text(st.characters(exclude_categories=["Cs"], exclude_characters="\0"), max_size=20)


@settings(max_examples=12, deadline=None)
@given(st.lists(TEXT, max_size=12), TEXT)
def test_any_words_arrive(launch_stubs, words: list[str], folder: str) -> None:
    with tempfile.TemporaryDirectory() as place:
        cluster = launch_stubs.Cluster(Path(place) / "cluster")
        base = Path(place) / "r.yaml"
        base.write_text(launch_stubs.RECIPE)
        plan = cluster.plan(str(base), *words)
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
            assert cluster.words("argv-0")[5 : 5 + len(words)] == words
        assert (run_dir / "logs/slurm/job-7_0/attempt-0/exit-code-0").read_text() == "0\n"


def test_a_run_folder_that_no_option_can_carry(small_recipe, stub_cluster) -> None:
    with pytest.raises(UserError, match=r"run\.dir"):
        slurm.train_script(stub_cluster.plan(small_recipe), slurm.Options(), Path("a\\b"))
