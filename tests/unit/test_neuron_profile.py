"""The Neuron profile: what is set for which recipe, that the user wins, and what is refused."""

from __future__ import annotations

import argparse
import importlib.util
import json
import os
import subprocess
import sys
from importlib import metadata
from pathlib import Path
from types import ModuleType

import pytest

from hlat.backend.neuron import machine, release
from hlat.backend.neuron.profile import (
    apply,
    cluster,
    compile_cache,
    conflicts,
    flash_attention,
    merged,
    parse_flags,
    prepare,
    preview,
    profile,
)
from hlat.backend.neuron.release import FORWARD, PRIMARY, choose, matches
from hlat.backend.neuron.table import LEFT_ALONE, TABLE, Row
from hlat.cli import main
from hlat.errors import UserError
from hlat.recipe import load

ROOT = Path(__file__).resolve().parents[2]


def values(name: str = "hlat-7b", *overrides: str, **case) -> dict[str, str]:
    return {item.name: item.value for item in profile(load(name, overrides), **case)}


def test_hlat_7b_on_sixteen_nodes() -> None:
    found = values(nodes=16)
    assert found["NEURON_RT_STOCHASTIC_ROUNDING_EN"] == "1"
    assert found["NEURON_RT_STOCHASTIC_ROUNDING_SEED"] == "12349"
    assert found["NEURON_RT_ASYNC_EXEC_MAX_INFLIGHT_REQUESTS"] == "3"
    assert found["MALLOC_ARENA_MAX"] == "64"
    assert found["NEURON_RT_EXEC_TIMEOUT"] == "3600"
    assert found["FI_PROVIDER"] == "efa" and found["FI_EFA_USE_DEVICE_RDMA"] == "1"
    assert found["NEURON_RT_NUM_CORES"] == found["TPU_NUM_DEVICES"] == "32"
    assert "XLA_DISABLE_FUNCTIONALIZATION" not in found and "XLA_USE_DUMMY_STORE" not in found
    flags = "--model-type=transformer --distribution-strategy=llm-training --auto-cast=none"
    assert found["NEURON_CC_FLAGS"] == f"{flags} --retry_failed_compilation"


def test_hlat_70b_differs_where_pipeline_and_masters_do() -> None:
    found = values("hlat-70b", nodes=32)
    assert found["NEURON_RT_STOCHASTIC_ROUNDING_EN"] == "0"
    assert "NEURON_RT_STOCHASTIC_ROUNDING_SEED" not in found
    assert found["NEURON_RT_ASYNC_EXEC_MAX_INFLIGHT_REQUESTS"] == "7"
    assert found["MALLOC_ARENA_MAX"] == "128"
    assert found["XLA_DISABLE_FUNCTIONALIZATION"] == "0"
    assert found["XLA_USE_DUMMY_STORE"] == "1" and found["TORCH_DIST_INIT_BARRIER"] == "0"


def test_one_node_needs_no_network_variables() -> None:
    assert not [name for name in values(nodes=1) if name.startswith("FI_")]


def test_a_later_release_drops_what_it_removed() -> None:
    name = "NEURON_RT_ASYNC_EXEC_MAX_INFLIGHT_REQUESTS"
    assert name in values(sdk="2.30") and name not in values(sdk="2.31.1")


def test_trn2_gets_only_what_is_sure() -> None:
    assert set(values(platform="trn2", nodes=2)) == {
        "FI_PROVIDER",
        "FI_EFA_USE_DEVICE_RDMA",
        "FI_EFA_FORK_SAFE",
    }


@pytest.mark.parametrize(
    ("overrides", "flash"),
    [
        (("model.attention=plain",), False),
        (("model.attention=flash",), True),
        (("model.attention=auto",), True),
        (("model.attention=auto", "data.seq_len=3072"), False),
        (("model.attention=auto", "data.document_mask=true"), False),
    ],
)
def test_flash_attention_goes_without_llm_training(overrides: tuple[str, ...], flash: bool) -> None:
    assert flash_attention(load("hlat-7b", overrides)) is flash
    assert ("llm-training" in values("hlat-7b", *overrides)["NEURON_CC_FLAGS"]) is not flash


def test_every_row_says_why_and_by_whom() -> None:
    assert len({row.name for row in TABLE}) == len(TABLE)
    for row in TABLE:
        assert row.why and row.source and row.when and row.shown, row.name
        assert set(row.platforms) <= {"trn1", "trn2"}
    left = {name.strip() for names, _ in LEFT_ALONE for name in names.split(",")}
    assert not left & {row.name for row in TABLE}


def test_rows_know_their_releases() -> None:
    row = Row("X", lambda facts: "1", "1", "always", "why", "source", since="2.28", until="2.31")
    assert [row.covers(sdk) for sdk in ("2.27.1", "2.28.0", "2.30.9", "2.31.0")] == [False, True, True, False]
    assert row.releases == "from 2.28 before 2.31"


def test_apply_sets_what_is_missing_and_keeps_the_users_values() -> None:
    environ = {"MALLOC_ARENA_MAX": "8", "NEURON_FUSE_SOFTMAX": "1"}
    report = {item.name: item for item in apply(profile(load("hlat-7b"), nodes=16), environ)}
    assert environ["MALLOC_ARENA_MAX"] == "8" and environ["FI_PROVIDER"] == "efa"
    assert (report["MALLOC_ARENA_MAX"].origin, report["MALLOC_ARENA_MAX"].hlat) == ("user", "64")
    assert report["NEURON_FUSE_SOFTMAX"].origin == "hlat"  # the same value: nothing to report
    again = dict(environ)
    assert apply(profile(load("hlat-7b"), nodes=16), environ) == list(report.values())
    assert environ == again


def test_compiler_flags_are_merged_flag_by_flag() -> None:
    environ = {"NEURON_CC_FLAGS": "--model-type generic -O1 --cache_dir=/scratch/cache"}
    report = {item.name: item for item in apply(profile(load("hlat-7b")), environ)}
    assert environ["NEURON_CC_FLAGS"] == (
        "--model-type=generic --optlevel=1 --cache_dir=/scratch/cache"
        " --distribution-strategy=llm-training --auto-cast=none --retry_failed_compilation"
    )
    assert (report["--model-type"].origin, report["--model-type"].value) == ("user", "generic")
    assert report["--auto-cast"].origin == "hlat" and report["NEURON_CC_FLAGS"].origin == "user"
    assert compile_cache(environ) == "/scratch/cache"


def test_the_cache_is_found_where_the_wrapper_finds_it() -> None:
    assert compile_cache({}) == "/var/tmp/neuron-compile-cache"
    assert compile_cache({"NEURON_COMPILE_CACHE_URL": "s3://bucket/cache"}) == "s3://bucket/cache"


def test_flags_in_every_spelling() -> None:
    assert parse_flags("") == {}
    text = "--model-type transformer --auto-cast=none -O2 --retry_failed_compilation"
    assert parse_flags(text) == {
        "--model-type": "transformer",
        "--auto-cast": "none",
        "--optlevel": "2",
        "--retry_failed_compilation": "",
    }
    with pytest.raises(UserError, match="cannot be read"):
        parse_flags("--logfile='a")


def check(*overrides: str, nodes: int = 1, efa_devices: int | None = None, **environ: str) -> None:
    recipe = load("hlat-7b", overrides)
    after = preview(profile(recipe, nodes=nodes), environ)
    conflicts(recipe, after, nodes=nodes, efa_devices=efa_devices)


def test_the_shipped_recipes_have_no_conflict() -> None:
    for name in ("hlat-7b", "hlat-70b"):
        for nodes in (16, 32, 64):
            environ: dict[str, str] = {}
            prepare(load(name), environ, nodes=nodes, efa_devices=8)
            assert environ["FI_PROVIDER"] == "efa"


@pytest.mark.parametrize(
    ("overrides", "environ", "nodes", "message"),
    [
        (["model.attention=flash"], {"NEURON_CC_FLAGS": "--model-type=llm-training"}, 1, "flash attention"),
        (
            ["model.attention=auto"],
            {"NEURON_CC_FLAGS": "--distribution-strategy llm-training"},
            1,
            "flash attention",
        ),
        (["parallel.tp=16"], {}, 1, r"parallel.tp: trn1 has no ring of 16 cores; take tp 8"),
        ([], {"FI_PROVIDER": "tcp"}, 16, "FI_PROVIDER: is tcp, and several nodes need efa"),
        ([], {"FI_EFA_USE_DEVICE_RDMA": "0"}, 16, "FI_EFA_USE_DEVICE_RDMA: is 0"),
        ([], {"XLA_USE_BF16": "1"}, 1, "XLA_USE_BF16: is deprecated"),
        ([], {"XLA_DOWNCAST_BF16": "0"}, 1, "XLA_DOWNCAST_BF16: is deprecated"),
        ([], {"NEURON_CC_FLAGS": "--auto-cast=all"}, 1, "--auto-cast=all"),
        ([], {"NEURON_RT_STOCHASTIC_ROUNDING_EN": "0"}, 1, "contradicts precision.rounding stochastic"),
    ],
)
def test_contradictions_are_refused(
    overrides: list[str], environ: dict[str, str], nodes: int, message: str
) -> None:
    check(nodes=nodes)
    with pytest.raises(UserError, match=message):
        check(*overrides, nodes=nodes, **environ)


def test_missing_variables_of_several_nodes_are_refused() -> None:
    with pytest.raises(UserError, match="FI_PROVIDER: is not set"):
        conflicts(load("hlat-7b"), {}, nodes=2)


@pytest.mark.parametrize(("nodes", "fine"), [(1, False), (16, False)])
def test_no_efa_device_is_refused(nodes: int, fine: bool) -> None:
    check(nodes=nodes, efa_devices=8)
    check(nodes=nodes, efa_devices=None)
    with pytest.raises(UserError, match="no EFA device"):
        check(nodes=nodes, efa_devices=0)
    conflicts(load("hlat-7b"), {}, cores=2, efa_devices=0)  # the smallest instance has none


def test_prepare_refuses_before_it_sets() -> None:
    environ = {"XLA_USE_BF16": "1"}
    with pytest.raises(UserError):
        prepare(load("hlat-7b"), environ)
    assert environ == {"XLA_USE_BF16": "1"}


def test_too_late_after_torch_xla(monkeypatch: pytest.MonkeyPatch) -> None:
    settings = profile(load("hlat-7b"))
    monkeypatch.setitem(sys.modules, "torch_xla", ModuleType("torch_xla"))
    with pytest.raises(RuntimeError, match="torch_xla was imported before"):
        apply(settings)
    for item in settings:
        if item.kind == "variable":
            monkeypatch.setenv(item.name, item.value)
    apply(settings)  # all of it is there already


def test_neither_profile_nor_doctor_needs_other_packages() -> None:
    """They run before torch is imported, and on machines where packages are missing."""
    modules = "hlat.backend.neuron.profile, hlat.commands.doctor, hlat.doctor.collective, hlat.doctor.host"
    modules += ", hlat.doctor.devices, hlat.doctor.software, hlat.doctor.system"
    probe = (
        f"import {modules}, sys; sys.exit(bool({{'torch', 'rich', 'pydantic', 'numpy'}} & set(sys.modules)))"
    )
    assert subprocess.run([sys.executable, "-c", probe], cwd=ROOT).returncode == 0


def test_cluster_as_torchrun_and_slurm_tell_it() -> None:
    assert cluster({}) == (1, 32)
    assert cluster({"GROUP_WORLD_SIZE": "4", "LOCAL_WORLD_SIZE": "32", "SLURM_NNODES": "9"}) == (4, 32)
    assert cluster({"SLURM_NNODES": "16"}) == (16, 32)


def test_versions_with_a_build_are_the_pinned_ones() -> None:
    assert matches("2.23.6484.0+3b612583", "2.23.6484") and matches("0.17.26814", "0.17.26814")
    assert not matches("2.23.64840", "2.23.6484") and not matches("", "2.9")


def test_the_installed_release_is_recognised(monkeypatch: pytest.MonkeyPatch) -> None:
    assert choose("trn1", {}) is PRIMARY
    assert choose("trn1", {"torch": "2.9.1", "torch-neuronx": "2.9.0.2.15.32035"}) is FORWARD

    def version(name: str) -> str:
        if name == "torch":
            raise metadata.PackageNotFoundError(name)
        return f"{FORWARD.packages[name]}+abc"

    monkeypatch.setattr(release.metadata, "version", version)
    assert release.installed("trn1") is FORWARD


def device(root: Path, name: str, vendor: str) -> None:
    folder = root / "sys/class/infiniband" / name / "device"
    folder.mkdir(parents=True)
    (folder / "vendor").write_text(f"{vendor}\n")


def test_what_the_machine_looks_like(tmp_path: Path) -> None:
    assert machine.platform(tmp_path) == "native" and machine.efa_devices(tmp_path) == 0
    (tmp_path / "dev").mkdir()
    for index in range(16):
        (tmp_path / f"dev/neuron{index}").touch()
    (tmp_path / "dev/neuron_other").touch()
    assert machine.neuron_devices(tmp_path) == 16 and machine.platform(tmp_path) == "trn1"
    for kind, platform in (("trn2.48xlarge", "trn2"), ("trn1n.32xlarge", "trn1"), ("trn3.48xlarge", "trn2")):
        product = tmp_path / "sys/devices/virtual/dmi/id/product_name"
        product.parent.mkdir(parents=True, exist_ok=True)
        product.write_text(f"{kind}\n")
        assert (machine.instance_type(tmp_path), machine.platform(tmp_path)) == (kind, platform)
    device(tmp_path, "rdmap16s27", machine.AMAZON)
    device(tmp_path, "mlx5_0", "0x15b3")
    assert machine.efa_devices(tmp_path) == 1


def test_the_run_records_its_profile(monkeypatch: pytest.MonkeyPatch) -> None:
    from hlat.commands import train
    from hlat.observe.environment import describe

    def wanted(recipe: str) -> argparse.Namespace:
        return argparse.Namespace(recipe=recipe, overrides=[])

    for name in list(os.environ):
        if name.startswith(
            ("NEURON_", "XLA_", "FI_", "TPU_", "NUM_NEURON", "MALLOC_", "TORCH_DIST", "NXD", "PJRT")
        ):
            monkeypatch.delenv(name)
    fake = dict(os.environ) | {"NEURON_COMPILE_CACHE_URL": "https://user:secret@host/cache"}
    monkeypatch.setattr(os, "environ", fake)
    assert train._prepare_neuron(wanted("tiny")) == []
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: name)
    monkeypatch.setitem(fake, "NXD_CPU_MODE", "1")
    assert train._prepare_neuron(wanted("hlat-7b")) == []
    del fake["NXD_CPU_MODE"]
    facts = json.loads(json.dumps(describe(train._prepare_neuron(wanted("hlat-7b")))))
    found = {item["name"]: item for item in facts["neuron_profile"]}
    assert found["NEURON_COMPILE_CACHE_URL"]["value"] == "https://host/cache"
    assert found["NEURON_COMPILE_CACHE_URL"]["origin"] == "user"
    assert found["--auto-cast"]["value"] == "none" and found["--auto-cast"]["why"]
    assert facts["variables"]["MALLOC_ARENA_MAX"] == "64"
    assert "neuron_profile" not in describe()


def test_profile_on_the_command_line(capsys: pytest.CaptureFixture[str], monkeypatch) -> None:
    monkeypatch.setenv("MALLOC_ARENA_MAX", "8")
    assert main(["doctor", "--profile", "hlat-7b", "--nodes", "16"]) == 0
    text = capsys.readouterr().out
    assert "MALLOC_ARENA_MAX=8  (yours; HLAT would take 64)" in text and "--auto-cast=none\n" in text
    assert main(["doctor", "--profile", "hlat-7b", "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert (found["schema"], found["platform"], found["nodes"]) == (1, "trn1", 1)
    assert {item["name"] for item in found["neuron_profile"]} >= {"NEURON_CC_FLAGS", "--model-type"}
    assert main(["doctor", "--profile", "hlat-7b", "--for", "trn2", "--nodes", "1"]) == 0
    assert "nothing is set" in capsys.readouterr().out
    assert main(["doctor", "--profile", "hlat-7b", "parallel.tp=16"]) == 2
    assert "take tp 8" in capsys.readouterr().err
    assert main(["doctor", "--profile"]) == 2
    assert main(["doctor", "--profile", "hlat-7b", "--for", "native"]) == 2


def test_the_documented_table_is_current() -> None:
    spec = importlib.util.spec_from_file_location("neuron_reference", ROOT / "docs" / "neuron_reference.py")
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    page = (ROOT / "docs" / "trainium.md").read_text(encoding="utf-8")
    assert module.page(page) == page, "run: python docs/neuron_reference.py"
    assert all(f"`{row.name}`" in page for row in TABLE)


def test_the_first_step_of_the_page_fits_a_node() -> None:
    page = (ROOT / "docs" / "trainium.md").read_text(encoding="utf-8").replace("\\\n", " ")
    line = next(line for line in page.splitlines() if "-m hlat train tiny" in line)
    words = line.split("hlat train")[1].split()
    recipe = load(words[0], words[1:])
    assert recipe.backend == "nxd" and "--nproc-per-node 32" in line
    assert recipe.layout(32).tp == 2 and recipe.accumulate(32) >= 1


def test_merged_changes_nothing() -> None:
    environ = {"NEURON_CC_FLAGS": "-O1"}
    merged(profile(load("hlat-7b")), environ)
    assert environ == {"NEURON_CC_FLAGS": "-O1"}
