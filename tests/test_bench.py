"""`python -m attn_gate bench` on tiny gates: it measures, refuses wrong results, and keeps what it has."""

import copy
import csv
import dataclasses
import json
import math
import os
import random
import re
import shutil
import subprocess
import sys
from functools import partial
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

pytest.importorskip("rich")

from attn_gate.bench import (
    baseline,
    case,
    charts,
    cli,
    fits,
    gains,
    gates,
    measure,
    modelled,
    network_case,
    networks,
    outputs,
    plan,
    report,
    resident,
    tables,
    traffic,
)
from attn_gate.bench.case import Case
from attn_gate.bench.device import CudaDevice, Device
from attn_gate.bench.memory import allocated_peak, kept_bytes, runs_operators
from attn_gate.bench.providers import PROVIDERS, PYTORCH, Program, Provider, Work, module_program
from attn_gate.bench.registry import CONFIGS, MODES, Config, NetworkConfig, select
from attn_gate.bench.results import Results, Row, read
from attn_gate.bench.run import Run
from attn_gate.bench.summary import ENOUGH, summarise
from rich.console import Console

from attn_gate import backends, functional, fuse_gates, keep_memory, pointwise
from attn_gate import cli as commands
from attn_gate.page import theme

TINY = {
    "same-8": Config("same-8", "tiny", "same_grid", 6, 6, 3, (8, 8)),
    "paper-8": Config("paper-8", "tiny", "paper", 6, 8, 3, (8, 8)),
    "lee-8": Config("lee-8", "tiny", "same_grid_norms", 6, 6, 3, (8, 8)),
    "oktay-4": Config("oktay-4", "tiny", "paper_output", 4, 6, 4, (4, 4, 4), batch=1),
    "keras-8": Config("keras-8", "tiny", "keras", 6, 6, 6, (8, 8)),
}
PEAK = Device.peak_gflops  # not the one of the tests
FAST = ("attn_gate", "attn_gate-channels-last", "eager", "eager-channels-last", "limit")


@pytest.fixture(autouse=True)
def tiny(monkeypatch):
    """Tiny gates, two repeats, in place of all plans."""
    monkeypatch.setattr(cli, "CONFIGS", TINY)
    monkeypatch.setattr(plan, "CONFIGS", TINY)
    group = plan.Group(tuple(TINY), tuple(TINY), measure.Patience(2, 2, 60), providers=FAST)
    monkeypatch.setattr(plan, "quick", lambda: [group])
    monkeypatch.setattr(theme, "DPI", 40)
    monkeypatch.setattr(Device, "copy_gbps", lambda self: 10.0)
    monkeypatch.setattr(Device, "peak_gflops", lambda self: 100.0)


def bench(folder, *args: str) -> int:
    return commands.main(["bench", "--quick", "--out", str(folder), *args])


def load(folder) -> dict:
    return json.loads((folder / "results.json").read_text())


def plant(monkeypatch, make) -> None:
    """A provider called "planted" that makes its programs so."""
    monkeypatch.setitem(PROVIDERS, "planted", Provider("planted", "planted", make))


def _interrupt():
    raise KeyboardInterrupt


class TestRun:
    @pytest.mark.slow
    def test_end_to_end(self, tmp_path, capsys):
        folder = tmp_path / "new" / "folder"
        modes = ("inference", "forward", "backward", "step")
        assert bench(folder, "--mode", ",".join(modes)) == 0
        rows = load(folder)["rows"]
        assert len(rows) == len(TINY) * len(MODES) * len(FAST)
        assert all(row["status"] == "measured" for row in rows)
        assert all(row["p10_ms"] <= row["q1_ms"] <= row["median_ms"] <= row["q3_ms"] for row in rows)
        printed = capsys.readouterr().out
        assert all(name in printed for name in (*TINY, *MODES, "attn_gate", "eager", "limit"))

    @pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
    def test_16_bit_types(self, dtype, tmp_path):
        names = "attn_gate,eager,limit"
        assert bench(tmp_path, "--dtype", dtype, "--provider", names, "--config", "same-8,paper-8") == 0
        rows = load(tmp_path)["rows"]
        assert {row["dtype"] for row in rows} == {dtype} and len(rows) == 12
        full = traffic.needed_bytes(TINY["same-8"], "step", "float32")
        step = next(row for row in rows if row["config"] == "same-8" and row["mode"] == "step")
        assert 2 * step["needed_bytes"] == full

    def test_thread_counts(self, tmp_path):
        args = ("--threads", "1,2", "--config", "same-8", "--mode", "inference", "--provider", "attn_gate")
        assert bench(tmp_path, *args) == 0
        assert [row["threads"] for row in load(tmp_path)["rows"]] == [1, 2]
        assert torch.get_num_threads() == 1  # as it was

    @pytest.mark.slow
    def test_torch_compile(self, tmp_path):
        names = "compile,attn_gate-compile"
        assert bench(tmp_path, "--provider", names, "--config", "same-8") == 0
        assert [row["status"] for row in load(tmp_path)["rows"]] == ["measured"] * 4

    @pytest.mark.parametrize("name", ["onnxruntime", "openvino"])
    def test_inference_engines_match_and_say_nothing(self, name, tmp_path, capfd):
        if reason := PROVIDERS[name].why_not("cpu", "float32"):
            pytest.skip(reason)
        assert bench(tmp_path, "--provider", name) == 0
        rows = load(tmp_path)["rows"]
        assert [row["status"] for row in rows] == ["measured"] * len(TINY)  # and no steps
        assert "arning" not in "".join(capfd.readouterr())

    def test_wrong_results_get_no_time(self, monkeypatch, tmp_path, capsys):
        def make(case: Case, training: bool) -> Program:
            gate = torch.nn.Module()
            gate.forward = lambda x, g: case.module.eval()(x, g) * 1.001
            return module_program(case, training, gate)

        plant(monkeypatch, make)
        args = ("--provider", "planted,eager", "--config", "same-8", "--mode", "inference")
        assert bench(tmp_path, *args) == 1
        rows = {row["provider"]: row for row in load(tmp_path)["rows"]}
        assert rows["eager"]["status"] == "measured"
        assert rows["planted"]["status"] == "wrong"
        assert rows["planted"]["times_ms"] == [] and rows["planted"]["median_ms"] is None
        assert "planted: wrong at same-8 inference: y is off" in capsys.readouterr().out

    @pytest.mark.parametrize("layout, code", [("", 1), ("-channels-last", 0)])
    def test_what_pytorch_has_wrong_in_a_layout_is_nobodys_failure(self, layout, code, monkeypatch, tmp_path):
        def make(case: Case, training: bool) -> Program:
            program = eager(case, training)
            return Program(program.works, lambda: {**program.results(), "y": program.results()["y"] * 1.001})

        eager = PROVIDERS["eager"].make
        names = [f"eager{layout}", f"attn_gate{layout}"]
        for name in names:
            monkeypatch.setitem(PROVIDERS, name, dataclasses.replace(PROVIDERS[name], make=make))
        args = ("--config", "same-8", "--mode", "inference")
        assert bench(tmp_path, "--provider", ",".join([*names, "limit"]), *args) == code
        assert [row["status"] for row in load(tmp_path)["rows"]] == ["wrong", "wrong", "measured"]
        assert bench(tmp_path / "alone", "--provider", names[1], *args) == 1

    @pytest.mark.parametrize("config", ["paper-8", "lee-8"])
    def test_a_wrong_gradient_gets_no_time(self, config, monkeypatch, tmp_path):
        def make(case: Case, training: bool) -> Program:
            program = PROVIDERS["eager"].make(case, training)

            def results():
                found = program.results()
                return {**found, "d phi.weight": found["d phi.weight"] * 1.001}

            return Program(program.works, results)

        plant(monkeypatch, make)
        assert bench(tmp_path, "--provider", "planted", "--config", config, "--mode", "backward") == 1
        (row,) = load(tmp_path)["rows"]
        assert (row["status"], row["worst"]) == ("wrong", "d phi.weight")

    def test_a_provider_that_fails_costs_its_own_row_only(self, monkeypatch, tmp_path, capsys):
        def make(case: Case, training: bool) -> Program:
            raise RuntimeError("unsupported operator\nwith a long explanation")

        plant(monkeypatch, make)
        args = ("--provider", "planted,eager", "--config", "same-8", "--mode", "inference")
        assert bench(tmp_path, *args) == 1
        found = {row["provider"]: row["status"] for row in load(tmp_path)["rows"]}
        assert found == {"eager": "measured", "planted": "failed"}
        assert "RuntimeError: unsupported operator" in capsys.readouterr().out

    @pytest.mark.parametrize(
        "last", [2, measure.WARM_UP_CALLS + measure.CALLS + 2], ids=["warming up", "measured"]
    )
    def test_a_provider_that_fails_later_gets_no_time(self, monkeypatch, tmp_path, capsys, last):
        calls = []

        def call() -> None:
            calls.append(1)
            if len(calls) == last:
                raise RuntimeError("out of something")

        plant(monkeypatch, lambda case, training: Program({"inference": Work(call)}, counts_peak=False))
        args = ("--provider", "planted,eager", "--config", "same-8", "--mode", "inference")
        assert bench(tmp_path, *args) == 1
        found = {row["provider"]: row for row in load(tmp_path)["rows"]}
        assert found["planted"]["status"] == "failed" and found["planted"]["times_ms"] == []
        assert len(found["eager"]["times_ms"]) == 2 * measure.CALLS
        assert (
            "planted: failed at same-8 inference: RuntimeError: out of something" in capsys.readouterr().out
        )

    def test_what_is_missing_is_no_failure(self, monkeypatch, tmp_path, capsys):
        missing = Provider("planted", "planted", lambda case, training: None, packages=("no_such_package",))
        monkeypatch.setitem(PROVIDERS, "planted", missing)
        args = ("--provider", "planted,eager,attn_gate-cuda", "--config", "same-8", "--mode", "inference")
        assert bench(tmp_path, *args) == 0
        printed = capsys.readouterr().out
        assert "planted: unavailable: pip install no_such_package" in printed
        assert "attn_gate-cuda: unavailable: " in printed

    def test_interrupted_it_keeps_what_was_measured(self, monkeypatch, tmp_path, capsys):
        calls = []

        def make(case: Case, training: bool) -> Program:
            def call() -> None:
                calls.append(case.config.name)
                # The second config: warmed up, a turn with a call before it, then the second turn.
                if calls.count("paper-8") == measure.WARM_UP_CALLS + 1 + measure.CALLS + 1:
                    raise KeyboardInterrupt

            return Program({"inference": Work(call)}, counts_peak=False)

        plant(monkeypatch, make)
        assert bench(tmp_path, "--provider", "planted,eager", "--mode", "inference") == 130
        results = load(tmp_path)
        assert results["interrupted"] is True
        counts = {(row["config"], row["provider"]): len(row["times_ms"]) for row in results["rows"]}
        assert counts["same-8", "planted"] == counts["same-8", "eager"] == 2 * measure.CALLS
        assert counts["paper-8", "planted"] == measure.CALLS
        assert not any(config == "lee-8" for config, _ in counts)
        assert "interrupted" in capsys.readouterr().out

    def test_add_keeps_other_rows_and_replaces_the_same(self, tmp_path):
        only = ("--mode", "inference", "--provider", "limit")
        assert bench(tmp_path, "--config", "same-8,paper-8", *only) == 0
        before = {row["config"]: row for row in load(tmp_path)["rows"]}
        assert bench(tmp_path, "--add", "--config", "paper-8,lee-8", *only) == 0
        after = {row["config"]: row for row in load(tmp_path)["rows"]}
        assert set(after) == {"same-8", "paper-8", "lee-8"}
        assert after["same-8"] == before["same-8"] and after["paper-8"] != before["paper-8"]

    def test_the_results_before_are_kept_and_their_plots_are_not(self, tmp_path):
        args = ("--config", "same-8", "--provider", "attn_gate,eager")
        assert bench(tmp_path, *args) == 0
        before = load(tmp_path)
        (tmp_path / "plots" / "mine.png").write_bytes(b"")
        assert (tmp_path / "plots" / "speed_step-dark.png").exists()
        assert bench(tmp_path, *args, "--mode", "inference") == 0
        (kept,) = tmp_path.glob("results.*-*.json")
        assert json.loads(kept.read_text()) == before
        plots = {path.name for path in (tmp_path / "plots").iterdir()}
        assert {"mine.png", "speed_inference.png"} <= plots and "speed_step-dark.png" not in plots

    def test_no_result_is_lost_however_often_runs_are_interrupted(self, monkeypatch, tmp_path):
        args = ("--config", "same-8", "--mode", "inference", "--provider", "limit")
        assert bench(tmp_path, *args) == 0
        before = load(tmp_path)
        os.utime(tmp_path / "results.json", (0, 0))  # long ago
        monkeypatch.setattr(cli.machine, "rates", lambda where: _interrupt())
        assert bench(tmp_path, *args) == 130
        assert load(tmp_path) == before
        monkeypatch.setattr(cli.machine, "rates", lambda where: {"copy_gbps": 10.0, "peak_gflops": 100.0})
        monkeypatch.setattr(Case, "settle", lambda self: _interrupt())
        for _ in range(2):
            assert bench(tmp_path, *args) == 130
            assert load(tmp_path)["rows"] == []
        assert before in [json.loads(path.read_text()) for path in tmp_path.glob("results.*-*.json")]

    def test_interrupted_while_it_writes_the_report(self, monkeypatch, tmp_path, capsys):
        monkeypatch.setattr(outputs.report, "html", lambda *args: _interrupt())
        args = ("--config", "same-8", "--mode", "inference", "--provider", "limit")
        assert bench(tmp_path, *args) == 130
        assert len(load(tmp_path)["rows"]) == 1
        assert f"{tmp_path / 'results.json'} has all" in capsys.readouterr().out.replace("\n", "")

    def test_nothing_measured_is_no_success(self, monkeypatch, tmp_path, capsys):
        absent = dataclasses.replace(PROVIDERS["limit"], name="absent", packages=("not_on_earth",))
        monkeypatch.setitem(PROVIDERS, "absent", absent)
        args = ("--config", "same-8", "--mode", "inference")
        assert bench(tmp_path, *args, "--provider", "limit") == 0
        for more in ((), ("--add",)):  # whatever there was before
            assert bench(tmp_path, *args, "--provider", "absent", *more) == 1
            printed = capsys.readouterr().out
            assert "nothing could be measured" in printed and "pip install not_on_earth" in printed
        assert bench(tmp_path, *args, "--provider", "absent,limit") == 0

    def test_inputs_that_cannot_be_made_cost_their_own_config_only(self, monkeypatch, tmp_path, capsys):
        def settle(self) -> None:
            if self.config.name == "paper-8":
                raise MemoryError("too large\nby far")

        monkeypatch.setattr(Case, "settle", settle)
        args = ("--config", "same-8,paper-8,keras-8", "--mode", "inference", "--provider", "eager,limit")
        assert bench(tmp_path, *args) == 1
        found = {(row["config"], row["provider"]): row["status"] for row in load(tmp_path)["rows"]}
        assert found.pop(("paper-8", "eager")) == found.pop(("paper-8", "limit")) == "failed"
        assert len(found) == 4 and set(found.values()) == {"measured"}
        assert "eager: failed at paper-8 inference: MemoryError: too large" in capsys.readouterr().out

    def test_after_an_error_there_is_a_report_of_what_was_measured(self, monkeypatch, tmp_path):
        whole = Run.measure

        def measure_some(self, jobs) -> None:
            whole(self, jobs[:1])
            raise OSError("no space left")

        monkeypatch.setattr(Run, "measure", measure_some)
        with pytest.raises(OSError, match="no space left"):
            bench(
                tmp_path, "--config", "same-8,paper-8", "--mode", "inference", "--provider", "attn_gate,eager"
            )
        assert {row["config"] for row in load(tmp_path)["rows"]} == {"same-8"}
        assert "Interrupted" in (tmp_path / "report.html").read_text()
        assert "`same-8`" in (tmp_path / "table.md").read_text()

    def test_rows_say_whether_an_operator_of_ours_ran(self, monkeypatch, tmp_path, capsys):
        left = dataclasses.replace(PROVIDERS["eager"], name="attn_gate-left")
        monkeypatch.setitem(PROVIDERS, "attn_gate-left", left)
        names = ("attn_gate", "attn_gate-left", "eager")
        assert bench(tmp_path, "--config", "same-8", "--provider", ",".join(names)) == 0
        found = {(row["mode"], row["provider"]): row["fused"] for row in load(tmp_path)["rows"]}
        expected = dict(zip(names, (True, False, None), strict=True))
        assert found == {(mode, name): expected[name] for mode in ("inference", "step") for name in names}
        assert "=: PyTorch's layers" in capsys.readouterr().out

    @pytest.mark.parametrize("training", [False, True])
    def test_the_limit_takes_no_new_memory(self, training):
        made = Case(Config("paper-64", "", "paper", 6, 8, 3, (64, 64)))
        program = PROVIDERS["limit"].make(made, training)
        for work in program.works.values():
            assert allocated_peak(work.call) < made.inputs[1].nbytes


@pytest.mark.slow
def test_pytest_benchmark_over_the_same_registry():
    root = Path(__file__).parent.parent
    command = [sys.executable, "-m", "pytest", "bench/", "--benchmark-only", "-q", "-p", "no:cacheprovider"]
    chosen = ["-k", "size-32-inference and (attn_gate or limit)"]
    # In a worker of pytest-xdist, which this test may run in, pytest-benchmark measures nothing.
    env = {name: value for name, value in os.environ.items() if not name.startswith("PYTEST_XDIST")}
    done = subprocess.run([*command, *chosen], cwd=root, env=env, capture_output=True, timeout=300)
    assert done.returncode == 0, done.stdout.decode() + done.stderr.decode()
    assert b"2 passed" in done.stdout


class TestArguments:
    @pytest.mark.parametrize(
        ("option", "name", "hint"),
        [
            ("--config", "smae-8", "did you mean same-8"),
            ("--provider", "eagre", "did you mean eager"),
            ("--mode", "steps", "did you mean step"),
            ("--dtype", "bfloat61", "did you mean bfloat16"),
            ("--device", "cdua", "did you mean cuda"),
            ("--config", "", "there are same-8, paper-8"),
            ("--threads", "1,none", "whole numbers of at least 1"),
            ("--threads", "1,100000", "at most"),
            ("--memory", "lots", "a size of 1M at least, such as 512M"),
            ("--memory", "0.0000001M", "a size of 1M at least, such as 512M"),
            ("--baseline", "no/such/folder", "no/such/folder can't be read"),
        ],
    )
    def test_what_does_not_exist(self, option, name, hint, capsys):
        with pytest.raises(SystemExit) as exit_info:
            commands.main(["bench", option, name])
        assert exit_info.value.code == 2
        assert hint in " ".join(capsys.readouterr().err.split())

    @pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
    def test_a_device_that_is_not_here(self, capsys):
        assert commands.main(["bench", "--device", "cuda"]) == 2
        assert "torch sees no GPU" in capsys.readouterr().err

    def refused(self, folder, capsys, monkeypatch, *args: str) -> str:
        """What it says, in one line, when it refuses before it measures anything."""
        monkeypatch.setattr(Device, "time_ms", lambda *args: pytest.fail("it has begun to measure"))
        assert bench(folder, *args) == 2
        (line,) = capsys.readouterr().err.splitlines()
        return line

    def test_a_quick_run_looks_for_no_largest_batch(self, tmp_path, capsys, monkeypatch):
        said = self.refused(tmp_path, capsys, monkeypatch, "--memory", "2M")
        assert "leave --quick or --memory out" in said

    def test_plots_that_cannot_be_written(self, tmp_path, capsys, monkeypatch):
        (tmp_path / "plots").write_text("")
        said = self.refused(tmp_path, capsys, monkeypatch)
        assert f"--out: {tmp_path} must be a folder to write to" in said

    def test_a_folder_that_is_a_file(self, tmp_path, capsys, monkeypatch):
        for name in ("file", "file/below"):
            (tmp_path / "file").write_text("")
            said = self.refused(tmp_path / name, capsys, monkeypatch)
            assert f"--out: {tmp_path / name} must be a folder to write to" in said

    @pytest.mark.parametrize(
        ("args", "said"),
        [
            (("--provider", "onnxruntime", "--mode", "step"), "onnxruntime has inference;"),
            (
                ("--provider", "limit", "--config", "net-8"),
                "limit has inference, forward, backward, step of gate",
            ),
        ],
    )
    def test_nothing_to_measure(self, args, said, tmp_path, capsys, monkeypatch):
        monkeypatch.setitem(TINY, "net-8", NetworkConfig("net-8", "", "oktay", (16, 16, 32)))
        monkeypatch.setattr(plan, "quick", lambda: [plan.Group((), tuple(TINY), measure.Patience(1, 1, 1))])
        found = self.refused(tmp_path, capsys, monkeypatch, *args)
        assert found.startswith("nothing to measure: ") and said in found

    @pytest.mark.parametrize(
        ("content", "said"),
        [
            ("half a fi", "isn't a results.json of this benchmark"),
            ('{"schema": 1}', "has schema 1"),
            ({"processor": "Z80"}, "(processor Z80 there, "),
            ({"torch": "1.0"}, "(torch 1.0 there, "),
            ({"attn_gate": "0.0"}, "(attn_gate 0.0 there, "),
        ],
    )
    def test_what_nothing_can_be_added_to(self, content, said, tmp_path, capsys, monkeypatch):
        args = ("--config", "same-8", "--mode", "inference", "--provider", "limit")
        if isinstance(content, dict):
            assert bench(tmp_path, *args) == 0
            capsys.readouterr()
            earlier = load(tmp_path)
            content = json.dumps({**earlier, "machine": {**earlier["machine"], **content}})
        (tmp_path / "results.json").write_text(content)
        found = self.refused(tmp_path, capsys, monkeypatch, "--add", *args)
        assert found.startswith("--add: ") and said in found and "leave --add out" in found
        assert (tmp_path / "results.json").read_text() == content

    def test_a_baseline_from_another_device(self, tmp_path, capsys, monkeypatch):
        old = made_up_results()
        old.machine["device"] = "cuda"
        old.write(tmp_path / "old")
        said = self.refused(tmp_path / "new", capsys, monkeypatch, "--baseline", str(tmp_path / "old"))
        assert "that run was on cuda, this one would be on cpu" in said
        assert not (tmp_path / "new").exists()

    def test_names_of_families(self):
        assert list(select("config", ["paper-64", "same"], CONFIGS)) == [
            "same-256", "same-128", "same-64", "same-32", "paper-64",
        ]  # fmt: skip

    def test_a_name_stands_for_itself_before_its_family(self):
        assert list(select("provider", ["attn_gate"], PROVIDERS)) == ["attn_gate"]

    def test_every_backend_is_a_provider(self):
        names = {f"attn_gate-{name}" for name, _, _ in backends.report() if name != "eager"}
        assert names <= set(PROVIDERS)


class TestPlan:
    @pytest.fixture(autouse=True)
    def real(self, monkeypatch, tiny):
        monkeypatch.setattr(plan, "CONFIGS", CONFIGS)

    def test_the_full_one_covers_all_configs(self):
        jobs = list(plan.jobs(plan.full(), plan.Wanted(), "cpu"))
        assert {job.config.name for job in jobs} == set(CONFIGS)
        assert {mode for job in jobs for mode in job.modes} == set(MODES)

    def test_everything_gets_enough_turns_for_an_interval(self):
        assert min(group.patience.least for group in plan.full() if group.patience) >= ENOUGH

    def test_pytorchs_strongest_is_always_beside_us(self):
        assert all("eager-channels-last" in group.providers for group in plan.quick())
        timed = [job for job in plan.jobs(plan.full(), plan.Wanted(), "cpu") if job.patience]
        for family in {config.family for config in CONFIGS.values() if config.kind == "gate"}:
            finest = next(job for job in timed if job.config.family == family)
            assert {"eager", "eager-channels-last", "compile"} <= set(finest.providers)
            only = [job for job in timed if job.config.family == family and "compile" in job.providers]
            assert {job.config.name for job in only} == {finest.config.name}  # compiling takes minutes
        wanted = plan.Wanted(configs=["lee-64"])
        assert any("compile" in job.providers for job in plan.jobs(plan.full(), wanted, "cpu"))

    def test_kept_memory_is_told_apart_at_the_finest_gates(self):
        jobs = [job for job in plan.jobs(plan.full(), plan.Wanted(), "cpu") if job.patience]
        found = {job.config.name for job in jobs if "attn_gate-unkept" in job.providers}
        assert found == {"same-256", "paper-256", "lee-256", "monai-96", "oktay-80", "keras-256"}
        assert all({"attn_gate", "eager"} <= set(job.providers) for job in jobs if job.config.name in found)

    def test_filters_replace_that_part_of_each_group(self):
        wanted = plan.Wanted(configs=["same-256"], dtypes=["float16"], modes=["step"], providers=["eager"])
        jobs = [job for job in plan.jobs(plan.full(), wanted, "cpu") if job.patience is not None]
        found = {(job.config.name, job.dtype, job.modes, job.providers) for job in jobs}
        assert found == {("same-256", "float16", ("step",), ("eager",))}

    def test_nothing_is_measured_twice(self):
        jobs = plan.jobs(plan.full(), plan.Wanted(dtypes=["bfloat16"], thread_counts=[1]), "cpu")
        timed = [job for job in jobs if job.patience is not None]
        rows = [
            (job.config.name, mode, name) for job in timed for mode in job.modes for name in job.providers
        ]
        assert len(set(rows)) == len(rows)


class TestResults:
    def test_the_documentation_names_every_field(self, tmp_path):
        assert bench(tmp_path, "--config", "same-8", "--mode", "step", "--provider", "attn_gate") == 0
        results = load(tmp_path)
        text = (Path(__file__).parent.parent / "docs" / "benchmark.md").read_text()
        documented = set(re.findall(r"`(\w+)`", text))
        row, modelled_row = results["rows"][0], results["modelled"]["rows"][0]
        fields = {*results, *row, *modelled_row, *results["modelled"], *results["configs"]["same-8"]}
        assert fields <= documented, fields - documented

    def test_rows(self, tmp_path):
        assert bench(tmp_path, "--config", "same-8", "--mode", "step", "--provider", "attn_gate") == 0
        results = load(tmp_path)
        assert results["schema"] == 2 and results["interrupted"] is False
        facts = {"processor", "cores", "threads", "load", "torch", "python", "pinning", "copy_gbps"}
        assert facts <= set(results["machine"])
        assert results["configs"]["same-8"]["gating_size"] == [8, 8]
        (row,) = results["rows"]
        assert (row["config"], row["mode"], row["provider"]) == ("same-8", "step", "attn_gate")
        assert len(row["times_ms"]) == 2 * measure.CALLS
        assert row["error"] <= row["tolerance"] and row["worst"]
        assert row["peak_bytes"] > row["kept_bytes"] > 0
        assert row["gbps"] == pytest.approx(row["needed_bytes"] / row["median_ms"] / 1e6)
        with open(tmp_path / "results.csv") as file:
            (line,) = csv.DictReader(file)
        assert set(line) == set(row) - {"times_ms"}
        assert float(line["median_ms"]) == row["median_ms"]

    def test_what_is_read_is_what_was_written(self, tmp_path):
        assert bench(tmp_path, "--config", "same-8,oktay-4", "--provider", "limit") == 0
        again = read(tmp_path)
        assert again.configs == {name: TINY[name] for name in ("same-8", "oktay-4")}
        assert json.loads(json.dumps(again.to_json())) == load(tmp_path)

    @pytest.mark.parametrize(
        "content",
        [
            "",
            "[]",
            "{}",
            '{"schema": 1}',
            '{"schema": 2}',
            '{"schema": 2, "configs": []}',
            '{"schema": 2, "configs": {"a": {"kind": "gate"}}}',
            '{"schema": 2, "configs": {}, "rows": [{}]}',
            '{"schema": 2, "configs": {}, "rows": [], "started": "", "machine": {}}',
        ],
    )
    def test_other_files_are_refused(self, content, tmp_path):
        path = tmp_path / "results.json"
        path.write_text(content)
        with pytest.raises(ValueError, match="results.json (isn't a results.json|has schema 1)"):
            read(path)

    def test_speedups(self):
        rows = [
            Row("a", "float32", 2, "step", "attn_gate", times_ms=[2.0]),
            Row("a", "float32", 2, "step", "eager", times_ms=[3.0, 9.0, 4.0]),
            Row("a", "float32", 1, "step", "eager", times_ms=[30.0]),
        ]
        results = Results("", {"threads": 2}, {}, rows=rows)
        assert results.speedup("a", "step", "attn_gate", over="eager") == 2.0
        assert results.speedup("a", "step", "attn_gate", over="compile") is None

    def test_what_goes_without_saying_is_what_there_is(self):
        rows = [Row("a", "bfloat16", n, "step", "eager", times_ms=[float(n)]) for n in (1, 4)]
        results = Results("", {"threads": 2}, {}, rows=rows)
        assert (results.dtype, results.threads) == ("bfloat16", 4)
        assert results.find("a", "step", "eager").median_ms == 4.0
        results.add([Row("a", "float32", 2, "step", "eager", times_ms=[2.0])])
        assert (results.dtype, results.threads) == ("float32", 2)

    def test_configs_are_in_the_order_of_the_registry(self):
        results = Results("", {"threads": 2}, {})
        for name in ("keras-256", "lee-32", "lee-256"):
            results.describe(CONFIGS[name])
        assert list(results.configs) == ["lee-256", "lee-32", "keras-256"]

    def test_gains_are_of_what_is_fused_over_the_fastest_that_matched(self):
        times = {"attn_gate": 1.0, "eager": 8.0, "eager-channels-last": 2.0, "compile": 4.0}
        rows = [
            Row(name, "float32", 2, "step", provider, times_ms=[time], fused=fused)
            for name, fused in (("same-256", True), ("lee-32", False))
            for provider, time in times.items()
        ]
        results = Results("", {"threads": 2}, {}, rows=rows)
        configs = [CONFIGS["same-256"], CONFIGS["lee-32"]]
        assert gains.gain(results, configs, "step", ("eager",)) == gains.Gain((8.0,), (8.0,))
        assert gains.gain(results, configs, "step", PYTORCH).mean == pytest.approx(2)
        results.find("same-256", "step", "eager-channels-last").times_ms.clear()  # it was wrong
        assert gains.gain(results, configs, "step", PYTORCH).mean == pytest.approx(4)
        assert gains.gain(results, configs, "inference", PYTORCH) is None
        assert gains.gain(results, configs[1:], "step", PYTORCH) is None

    def test_a_mean_says_of_what_it_is_and_of_what_not(self):
        found = gains.Gain((2.0, 3.0, 6.0), (0.91, 0.94, 0.97))
        assert found.mean == pytest.approx(36 ** (1 / 3)) and gains.span(found.fused) == "2.00 to 6.00"
        assert found.without == "without 3 left to PyTorch's layers (0.91 to 0.97)"
        assert gains.Gain((2.0,), (0.98,)).without == "without 1 left to PyTorch's layers (0.98)"
        assert gains.Gain((2.0,)).without == ""


class TestSummary:
    def test_one_sample_is_everything(self):
        s = summarise([2.0])
        assert (s.median, s.q1, s.q3, s.low, s.high, s.outliers) == (2.0, 2.0, 2.0, 2.0, 2.0, 0)

    def test_quartiles_and_outliers(self):
        s = summarise([5.0, 1.0, 2.0, 3.0, 4.0, 100.0])
        assert (s.q1, s.median, s.q3, s.outliers) == (2.25, 3.5, 4.75, 1)
        assert s.noisy and not summarise([1.0, 1.01, 1.02]).noisy

    def test_few_samples_are_noisy_by_their_range(self):
        assert summarise([403.0, 555.0]).noisy and summarise([403.0, 555.0]).few
        s = summarise([1.0, 2.0, 2.01, 2.02, 2.03, 3.0])
        assert not s.noisy and not s.few

    def test_the_spread_is_half_of_what_lies_between_the_quartiles(self):
        assert summarise([8.0, 9.0, 9.0, 10.0, 10.0, 11.0, 11.0, 12.0]).spread == pytest.approx(0.1)
        assert summarise([8.0, 10.0, 12.0]).spread == pytest.approx(0.2)  # the extremes of so few

    def test_the_median_is_within_its_interval_in_19_of_20_cases(self):
        generator = torch.Generator().manual_seed(0)
        samples = torch.randn((2000, 21), generator=generator).exp()
        inside = sum(s.low <= 1.0 <= s.high for s in map(summarise, samples.tolist()))
        assert 0.93 <= inside / 2000 <= 0.99


class TestBaseline:
    @staticmethod
    def results(scale: float, ours: float, spread: float = 0.01, names=("a", "b")) -> Results:
        def times(median: float) -> list[float]:
            return [median * (1 + spread * step) for step in range(-5, 6)]

        rows = [
            Row(name, "float32", 2, "step", "attn_gate", times_ms=times(10 * ours * scale)) for name in names
        ]
        rows += [
            Row(name, "float32", 2, "step", "eager", times_ms=times(20 * scale)) for name in (*names, "z")
        ]
        return Results("then", {"threads": 2}, {}, rows=rows)

    @pytest.mark.parametrize(
        ("ours", "verdict"), [(1.3, "slower"), (0.7, "faster"), (1.0, "same"), (1.02, "same")]
    )
    def test_verdicts_without_the_machines_own_change(self, ours, verdict):
        results = partial(self.results, spread=0.002, names=range(40))
        compared = baseline.compare(results(1.5, ours), results(1.0, 1.0))
        assert [row["verdict"] for row in compared["rows"]] == [verdict] * 40
        assert compared["drift"] == pytest.approx(0.5)
        assert compared["rows"][0]["change"] == pytest.approx(ours - 1)
        assert baseline.is_slower(compared) == (verdict == "slower")

    def test_noise_is_no_change(self):
        compared = baseline.compare(self.results(1.0, 1.15, spread=0.1), self.results(1.0, 1.0, spread=0.1))
        assert {row["verdict"] for row in compared["rows"]} == {"unclear"}

    @staticmethod
    def drawn(generator: random.Random, counts: tuple[int, ...], sigma: float = 0.1) -> Results:
        """100 rows of ours and 40 of others, of samples from one distribution."""
        rows = []
        for provider, number in (("attn_gate", 100), ("eager", 40)):
            for i in range(number):
                times = [10 * math.exp(generator.gauss(0, sigma)) for _ in range(counts[i % len(counts)])]
                rows.append(Row(f"c{i}", "float32", 2, "step", provider, times_ms=times))
        return Results("then", {"threads": 2}, {}, rows=rows)

    def test_two_runs_of_one_program_are_rarely_called_slower(self):
        generator = random.Random(0)
        slower = 0
        for _ in range(200):
            pair = self.drawn(generator, (15, 4)), self.drawn(generator, (15, 4))
            slower += baseline.is_slower(baseline.compare(*pair))
        assert slower <= 0.05 * 200

    def test_one_slower_row_among_many_is_found(self):
        generator = random.Random(0)
        new, old = (self.drawn(generator, (21,), sigma=0.03) for _ in range(2))
        new.find("c7", "step", "attn_gate").times_ms[:] = [
            1.3 * t for t in new.find("c7", "step", "attn_gate").times_ms
        ]
        rows = baseline.compare(new, old)["rows"]
        assert [row["config"] for row in rows if row["verdict"] == "slower"] == ["c7"]

    def test_of_few_samples_nothing_is_said(self):
        new, old = self.results(1.0, 3.0), self.results(1.0, 1.0)
        for row in old.rows:
            if row.config == "a":
                del row.times_ms[5:]
        verdicts = {row["config"]: row["verdict"] for row in baseline.compare(new, old)["rows"]}
        assert verdicts == {"a": "unclear", "b": "slower"}
        new, old = (self.results(1.0, 1.0, spread=0.002, names=range(40)) for _ in range(2))
        del new.find(7, "step", "attn_gate").times_ms[5:]
        verdicts = {row["config"]: row["verdict"] for row in baseline.compare(new, old)["rows"]}
        assert verdicts.pop(7) == "unclear" and set(verdicts.values()) == {"same"}

    @staticmethod
    def scattered(
        generator: random.Random,
        number: int = 20,
        ours: float = 0.05,
        others: float = 0.2,
        slow: float = 0.02,
    ) -> Results:
        """A run in a mood of its own, whose medians scatter more than its samples say; the limit's most.

        A row takes a third longer with a probability of `slow`.
        """
        mood, rows = generator.gauss(0, 0.1), []
        scatters = {"attn_gate": ours, "eager": others, "eager-channels-last": others / 2, "limit": 0.5}
        for provider, scatter in scatters.items():
            for i in range(number):
                # As between two runs, of which each has its part.
                median = 10 * math.exp(mood + generator.gauss(0, scatter / math.sqrt(2)))
                median *= 4 / 3 if generator.random() < slow else 1
                times = [median * math.exp(generator.gauss(0, 0.03)) for _ in range(12)]
                rows.append(Row(f"c{i}", "float32", 2, "step", provider, times_ms=times))
        return Results("then", {"threads": 2}, {}, rows=rows)

    @staticmethod
    def slow_down(results: Results, factor: float, *configs: str) -> None:
        for row in results.rows:
            if row.is_ours and (not configs or row.config in configs):
                row.times_ms[:] = [factor * t for t in row.times_ms]

    @pytest.mark.parametrize("number", [3, 10, 20])
    def test_scatter_between_runs_is_no_change(self, number):
        generator = random.Random(number)
        wrong = 0
        for _ in range(200):
            compared = baseline.compare(self.scattered(generator, number), self.scattered(generator, number))
            wrong += any(row["verdict"] in ("slower", "faster") for row in compared["rows"])
        assert wrong <= 0.05 * 200

    @pytest.mark.parametrize(("factor", "verdict"), [(1.3, "slower"), (1 / 1.3, "faster")])
    def test_what_has_changed_all_rows_is_found_in_most(self, factor, verdict):
        generator = random.Random(0)
        found, remarks = 0, 0
        for _ in range(50):
            new, old = self.scattered(generator), self.scattered(generator)
            self.slow_down(new, factor)
            compared = baseline.compare(new, old)
            found += sum(row["verdict"] == verdict for row in compared["rows"])
            remarks += "rows have changed together" in "".join(map(str, baseline.tables(compared)))
        assert found >= 0.8 * 50 * 20
        assert remarks >= 10

    def test_what_has_changed_most_rows_is_not_said_of_the_rest(self):
        generator = random.Random(0)
        slowed, found, wrong = {f"c{i}" for i in range(12)}, 0, 0
        for _ in range(50):
            new, old = self.scattered(generator), self.scattered(generator)
            self.slow_down(new, 1.5, *slowed)
            rows = baseline.compare(new, old)["rows"]
            slower = {row["config"] for row in rows if row["verdict"] == "slower"}
            found += len(slower & slowed)
            wrong += len(slower - slowed)
        assert found >= 0.8 * 50 * 12 and wrong <= 0.1 * 50 * 8

    def test_one_slower_row_is_found_though_all_scatter_and_only_that(self):
        generator = random.Random(0)
        found, wrong = 0, 0
        for _ in range(50):
            new, old = (self.scattered(generator, ours=0.02, others=0.1, slow=0.0) for _ in range(2))
            self.slow_down(new, 1.5, "c7")
            verdicts = {row["config"]: row["verdict"] for row in baseline.compare(new, old)["rows"]}
            found += verdicts.pop("c7") == "slower"
            wrong += not {"slower", "faster"}.isdisjoint(verdicts.values())
        assert found >= 0.9 * 50 and wrong <= 0.05 * 50

    def test_the_more_others_the_better_the_machines_change_is_known(self):
        def noise(number: int, others: float) -> float:
            new, old = (self.results(1.0, 1.0, spread=0.0, names=range(number)) for _ in range(2))
            eager = [row for row in new.rows if row.provider == "eager"]
            for i, row in enumerate(eager):
                row.times_ms[:] = [t * math.exp(others * (i % 5 - 2)) for t in row.times_ms]
            return baseline.compare(new, old)["rows"][0]["noise"]

        assert noise(24, 0.3) > 2 * noise(24, 0.0)
        assert noise(6, 0.3) > 1.5 * noise(24, 0.3)

    def test_the_memory_limit_says_nothing_about_the_machine(self):
        new, old = self.results(1.0, 1.3), self.results(1.0, 1.0)
        compared = baseline.compare(new, old)
        for results, factor in ((new, 3.0), (old, 1.0)):
            results.add(
                [Row(n, "float32", 2, "step", "limit", times_ms=[factor + i for i in range(9)]) for n in "ab"]
            )
        assert baseline.compare(new, old) == compared
        for results in (new, old):
            results.rows = [row for row in results.rows if row.provider != "eager"]
        compared = baseline.compare(new, old)
        assert compared["others"] == 0 and compared["drift"] == 0.0
        said = "how much the machine itself has changed is not known"
        assert baseline.machines_change(compared).startswith(said)
        assert said in "".join(map(str, baseline.tables(compared)))

    def test_other_sizes_are_not_compared_and_other_machines_are_named(self, capsys):
        new, old = self.results(1.0, 1.3), self.results(1.0, 1.0)
        new.configs = {name: Config(name, "", "paper", 8, 8, 4, (8, 8)) for name in ("a", "b")}
        old.configs = {**new.configs, "a": dataclasses.replace(new.configs["a"], batch=1)}
        old.machine.update(processor="Z80", torch="2", load=0.0)
        new.machine.update(processor="6502", torch="2", load=1.0)
        compared = baseline.compare(new, old)
        assert {row["config"] for row in compared["rows"]} == {"b"}
        said = "not the machine that it was then: processor Z80, now 6502; not compared, since they aren't "
        assert baseline.cautions(compared) == said + "what they were: a"
        assert said in "".join(map(str, baseline.tables(compared)))

    def test_end_to_end(self, tmp_path, capsys):
        args = ("--config", "same-8", "--mode", "inference", "--provider", "attn_gate,limit")
        assert bench(tmp_path / "old", *args) == 0
        content = load(tmp_path / "old")
        for row in content["rows"]:
            if row["provider"] == "attn_gate":
                row["times_ms"] = [t / 100 for t in row["times_ms"]]
        (tmp_path / "old" / "results.json").write_text(json.dumps(content))
        assert bench(tmp_path / "new", *args, "--baseline", str(tmp_path / "old")) == 1
        assert load(tmp_path / "new")["compared"]["rows"][0]["verdict"] == "slower"
        assert "slower" in capsys.readouterr().out


class TestCase:
    def test_no_preactivation_is_left_where_rounding_decides(self, monkeypatch):
        monkeypatch.setattr(case, "_MARGIN", 1e-3)  # so that there is work to do
        made = Case(TINY["lee-8"])
        before = made.inputs[0].clone()
        made.settle()
        assert 0 < (made.inputs[0] != before).any(1).sum() < 64
        close = []
        double = made.module.double()
        double.relu.register_forward_pre_hook(lambda m, args: close.append(args[0].abs().min()))
        for training in (False, True):
            double.train(training)(*(t.double() for t in made.inputs))
        assert min(close) >= case._MARGIN

    def test_norms_count(self):
        made = Case(TINY["lee-8"])
        assert gates.has_norms(made.module) and not gates.has_norms(Case(TINY["same-8"]).module)
        assert (made.module.theta_norm.running_var != 1).all()


class TestNetworks:
    tiny = NetworkConfig("net-oktay", "tiny", "oktay", (16, 16, 32))

    @pytest.fixture(autouse=True)
    def only_this(self, monkeypatch, tiny):
        monkeypatch.setitem(TINY, "net-oktay", self.tiny)
        group = plan.Group(("net-oktay",), tuple(TINY), measure.Patience(1, 1, 60))
        monkeypatch.setattr(plan, "quick", lambda: [group])

    def test_they_have_as_many_parameters_as_the_originals(self):
        for network, count in ((networks.LeeNetwork(3), 34_878_573), (networks.OktayNetwork(), 6_214_151)):
            assert sum(p.numel() for p in network.parameters()) == count

    def test_eager_and_fused(self, tmp_path):
        assert bench(tmp_path) == 0
        results = load(tmp_path)
        assert len(results["rows"]) == 4 and {row["status"] for row in results["rows"]} == {"measured"}
        kept = {row["provider"]: row["kept_bytes"] for row in results["rows"] if row["mode"] == "step"}
        assert 0 < kept["attn_gate"] < kept["eager"]
        assert all(row["needed_bytes"] is None for row in results["rows"])
        page = (tmp_path / "report.html").read_text()
        assert all(f"<span>{mode}</span>" in page for mode in ("inference", "training step"))
        assert page.count(">net-oktay</th><td>1 × ") == 2

    def test_the_limit_of_a_network_is_no_row(self, tmp_path):
        assert bench(tmp_path, "--mode", "inference", "--provider", "eager,limit") == 0
        assert [row["provider"] for row in load(tmp_path)["rows"]] == ["eager"]

    def test_every_gate_is_fused_or_there_is_no_row(self, monkeypatch, tmp_path, capsys):
        monkeypatch.setattr(networks.GridAttention3d, "forward", lambda self, x, g: (self.W(x), x))
        assert bench(tmp_path, "--mode", "inference") == 1
        found = {row["provider"]: row["status"] for row in load(tmp_path)["rows"]}
        assert found == {"eager": "measured", "attn_gate": "failed"}
        assert "not all gates were fused: gates.0" in capsys.readouterr().out

    def test_gates_that_only_training_leaves_alone_count_as_fused(self, monkeypatch):
        monkeypatch.setattr(pointwise, "_HAS_MKL", False)
        net = network_case.NetworkCase(NetworkConfig("net-lee", "tiny", "lee", (16, 16))).fused()
        assert len(fuse_gates(net.train()).skipped) == 2

    def test_a_wrong_gradient_gets_no_time(self, monkeypatch, tmp_path):
        def make(case, training: bool) -> Program:
            program = PROVIDERS["eager"].make(case, training)

            def results():
                found = program.results()
                # A large one: a ReLU that rounding turned may cost eager itself 0.2 % of all gradients here.
                wrong = "d encoders.4.0.weight"
                return {**found, wrong: -found[wrong]}

            return Program(program.works, results)

        plant(monkeypatch, make)
        assert bench(tmp_path, "--provider", "planted", "--mode", "step") == 1
        (row,) = load(tmp_path)["rows"]
        assert (row["status"], row["worst"]) == ("wrong", "d parameters")

    def test_a_package_that_is_missing_is_no_failure(self, monkeypatch, tmp_path, capsys):
        def make(axes: int):
            raise ModuleNotFoundError("No module named 'nets'", name="nets")

        monkeypatch.setitem(networks.NETWORKS, "oktay", make)
        names = "net-oktay,same-8"
        assert bench(tmp_path, "--config", names, "--mode", "inference") == 0
        assert "unavailable: pip install nets" in capsys.readouterr().out


class TestDevice:
    def test_the_peak_is_that_of_the_best_product(self, monkeypatch):
        monkeypatch.setattr(Device, "_product_gflops", lambda self, *shape: shape[0] / 10)
        assert PEAK(Device()) == max(rows for rows, _, _ in Device.products) / 10
        assert len(Device.products) > 1

    def test_rates_are_of_the_operations(self, monkeypatch):
        monkeypatch.setattr(Device, "time_ms", lambda self, prepare, call: call() is None or 2.0)
        assert Device()._product_gflops(10, 20, 30) == pytest.approx(2 * 10 * 20 * 30 / 2e-3 / 1e9)


class TestCudaDevice:
    """Which calls it makes, in which order; a GPU's own answers need one."""

    @pytest.fixture
    def log(self, monkeypatch):
        log = []

        def event(enable_timing):
            calls = {name: partial(log.append, name) for name in ("record", "synchronize")}
            return SimpleNamespace(**calls, elapsed_time=lambda end: 1.25)

        memory = iter((100, 900))  # allocated before, at the peak
        monkeypatch.setattr(torch.cuda, "Event", event)
        monkeypatch.setattr(torch.cuda, "synchronize", lambda: log.append("synchronize"))
        monkeypatch.setattr(torch.cuda, "reset_peak_memory_stats", lambda: log.append("reset"))
        monkeypatch.setattr(torch.cuda, "memory_allocated", lambda: next(memory))
        monkeypatch.setattr(torch.cuda, "max_memory_allocated", lambda: next(memory))
        return log

    def test_the_cache_is_flushed_and_only_the_call_is_timed(self, log):
        gpu = object.__new__(CudaDevice)
        gpu._flush = SimpleNamespace(zero_=partial(log.append, "flush"))
        assert gpu.time_ms(lambda: log.append("prepare"), lambda: log.append("call")) == 1.25
        assert log == ["prepare", "synchronize", "flush", "record", "call", "record", "synchronize"]

    def test_the_peak_is_beyond_what_was_there(self, log):
        assert object.__new__(CudaDevice).peak_bytes(lambda: log.append("call")) == 800
        assert log == ["synchronize", "reset", "call", "synchronize"]

    @pytest.mark.gpu
    @pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
    def test_on_a_gpu(self, tmp_path):
        names = "attn_gate,attn_gate-cuda,attn_gate-triton,eager,limit"
        assert bench(tmp_path, "--device", "cuda", "--provider", names) == 0
        rows = load(tmp_path)["rows"]
        assert {row["status"] for row in rows if row["provider"] in ("attn_gate", "eager")} == {"measured"}


class TestMemory:
    x = torch.randn(1024, requires_grad=True)

    def test_kept_counts_each_storage_once(self):
        def forward():
            y = self.x.exp()  # keeps y
            return y * y  # keeps it again

        assert kept_bytes(forward, []) == self.x.nbytes

    def test_kept_leaves_out_what_is_held(self):
        assert kept_bytes(lambda: self.x[3:] * self.x[3:], [self.x]) == 0

    def test_peak_counts_temporaries_and_the_result(self):
        x = torch.randn(2**18)
        peak = allocated_peak(lambda: (x + 1) * 2)
        assert 2 * x.nbytes <= peak < 2.1 * x.nbytes

    def test_peak_is_not_the_sum(self):
        x = torch.randn(2**18)

        def call():
            for _ in range(5):
                x.clone()

        assert x.nbytes <= allocated_peak(call) < 1.1 * x.nbytes

    def test_nothing_is_kept_in_a_call_of_unkept_and_the_limit_stays(self, monkeypatch):
        limits = []
        limit = keep_memory(12345)
        try:
            program = PROVIDERS["attn_gate-unkept"].make(Case(TINY["same-8"]), True)
            for work in program.works.values():
                work.prepare()
                limits.append(keep_memory(0))
                work.call()
                limits.append(keep_memory(12345))
            monkeypatch.setattr(torch.Tensor, "backward", lambda *args: 1 / 0)
            work.prepare()
            with pytest.raises(ZeroDivisionError):
                work.call()
            limits.append(keep_memory(12345))
        finally:
            keep_memory(limit)
        assert limits == [0, 12345] * 3 + [12345]

    def test_others_find_what_is_kept_full_again(self, monkeypatch):
        log = []
        work = Work(*(partial(log.append, name) for name in ("call", "prepare", "leave")))
        patience, device = measure.Patience(1, 1, 60), Device()
        assert list(measure.interleave({"a": (work, False)}, device, patience, {"a": []}, None)) == [1.0]
        assert log.count("leave") == 2 and log[-1] == "leave"  # after its warm-up and after its turn

    def test_our_operators_are_told_from_pytorchs_layers(self):
        x, alpha = torch.randn(1, 2, 4, 4), torch.rand(1, 1, 4, 4)
        assert runs_operators(lambda: functional.apply_attention(x, alpha))
        assert not runs_operators(lambda: x * alpha)

    @pytest.mark.skipif(not Path("/proc/self/clear_refs").exists(), reason="reads /proc, which Linux has")
    def test_resident_counts_what_was_freed_again(self):
        code = """import torch; from attn_gate.bench.memory import resident_growth
print(resident_growth(lambda: torch.ones(2**24).sum()))"""
        done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
        grown = int(done.stdout)
        assert 0.8 * 2**26 <= grown <= 1.5 * 2**26

    @pytest.mark.skipif(not Path("/proc/self/clear_refs").exists(), reason="reads /proc, which Linux has")
    def test_resident_in_a_process_of_its_own(self):
        least = 4 * math.prod(CONFIGS["same-32"].x_shape)
        assert resident.resident_bytes("same-32", "float32", 1, "inference", "eager") > least
        with pytest.raises(RuntimeError, match="KeyError"):
            resident.resident_bytes("no-such", "float32", 1, "inference", "eager")

    def test_the_largest_batch_fits_and_one_more_does_not(self):
        limit = 100_000
        found = fits.largest_batch(Case, TINY["same-8"], "float32", "eager", Device(), limit)
        assert found["batch"] > 1 and found["bytes"] <= limit < found["more_bytes"]

    def test_not_even_one_fits(self):
        found = fits.largest_batch(Case, TINY["same-8"], "float32", "eager", Device(), 10)
        assert found["batch"] == 0 and found["more_bytes"] > 10


class TestModel:
    def test_eager_moves_what_the_design_counts(self):
        config = Config("same-64", "", "same_grid", 64, 64, 32, (64, 64), batch=1)
        channel = 64 * 64
        moved = sum(kernel.elements for kernel in modelled.eager_kernels(config, "inference"))
        assert moved == pytest.approx(16 * 32 * channel, rel=0.02)
        assert traffic.needed_bytes(config, "inference", "float32") == 4 * 6 * 32 * channel

    def test_operations_are_those_of_the_projections(self):
        config = Config("paper-64", "", "paper", 8, 16, 4, (64, 64), batch=1)
        coarse = 32 * 32
        expected = 2 * coarse * 4 * (4 * 8 + 16 + 1) + 64 * 64 * 8
        assert traffic.needed_flops(config, "inference") == expected
        assert traffic.needed_flops(config, "step") == 3 * expected

    def test_memory_binds_the_finest_level(self):
        config, gpu = CONFIGS["same-256"], modelled.GPUS[0]
        seconds = traffic.needed_bytes(config, "inference", "bfloat16") / (gpu.gbps * 1e9)
        assert modelled.fused_ms(config, "inference", "bfloat16", gpu) == pytest.approx(1e3 * seconds)

    def test_it_is_labelled_and_apart(self, tmp_path):
        assert bench(tmp_path, "--config", "same-8", "--mode", "inference", "--provider", "limit") == 0
        content = load(tmp_path)["modelled"]
        assert "not measured" in content["label"]
        assert {row["gpu"] for row in content["rows"]} == {gpu.name for gpu in modelled.GPUS}
        assert all(row["eager_ms"] > row["attn_gate_ms"] > 0 for row in content["rows"])


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """The files of a run with everything: all kinds of rows, a comparison, largest batches, failures."""
    folder = tmp_path_factory.mktemp("bench")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(theme, "DPI", 60)
        outputs.write_all(made_up_results(), folder)
    return folder


class TestOutputs:
    def test_everything_is_written(self, folder):
        plots = {f"{name}{look}.png" for name in charts.FIGURES for look in ("", "-dark")}
        assert {path.name for path in (folder / "plots").iterdir()} == plots
        files = {"results.json", "results.csv", "report.html", "table.md", "plots"}
        assert {path.name for path in folder.iterdir()} == files

    def test_the_page_needs_nothing_but_itself(self, folder):
        text = (folder / "report.html").read_text(encoding="utf-8")
        assert text.count("<img") == len(charts.FIGURES) and text.count("srcset=") == len(charts.FIGURES)
        for foreign in ("http:", "https:", "url(", "@import", "<link", "<script", "<iframe"):
            assert foreign not in text
        for said in (
            "not measured",
            "failed at lee-32 step: broken",
            "slower",
            "Largest batch",
            "Interrupted",
        ):
            assert said in text

    def test_16_bit_types_and_threads_are_compared_with_float32_and_one_thread(self):
        results = made_up_results()
        half = copy.deepcopy(results.find("same-256", "step", "attn_gate"))
        half.dtype, half.times_ms = "bfloat16", [half.median_ms / 1.6]
        results.add([half])
        found = {grid.title: grid for grid in tables.grids(results)}
        (line,) = found["How many times faster than in float32"].lines
        assert line == ("step, bfloat16", "same-256", ["1.60x"])
        lines = found["How many times faster than on one thread"].lines
        assert ("step", "same-256", ["2.00x"] * 5) in lines

    def test_the_markdown_table_has_the_numbers(self, folder):
        lines = (folder / "table.md").read_text().splitlines()
        (line,) = [line for line in lines if "`same-256`" in line]
        cells = [cell.strip() for cell in line.strip("|").split("|")]
        assert cells[1] == "2 × 64 × 256²"
        assert cells[2].startswith("2.0 / 1.50 / 1.25 ")  # eager, torch.compile, ONNX Runtime
        assert len({line.count("|") for line in lines}) == 1
        assert "`size-" not in "".join(lines)

    def test_a_run_without_anything_has_a_page_too(self, tmp_path):
        empty = Results("2026-01-01T00:00:00+00:00", {**made_up_results().machine}, {})
        outputs.write_all(empty, tmp_path)
        assert "<img" not in (tmp_path / "report.html").read_text()
        assert not (tmp_path / "table.md").exists()

    def test_what_has_no_rows_of_ours_has_no_table(self, tmp_path, capsys):
        assert bench(tmp_path, "--config", "same-8", "--mode", "inference", "--provider", "attn_gate") == 0
        assert "table.md" in capsys.readouterr().out and (tmp_path / "table.md").exists()
        assert bench(tmp_path, "--config", "same-8", "--mode", "inference", "--provider", "limit") == 0
        assert "table.md" not in capsys.readouterr().out and not (tmp_path / "table.md").exists()

    def test_another_dtype_and_number_of_threads_have_tables_too(self, tmp_path):
        args = ("--config", "same-8", "--mode", "step", "--provider", "attn_gate,eager")
        assert bench(tmp_path, *args, "--threads", "2", "--dtype", "bfloat16") == 0  # the tests' own is 1
        head, _, line, *_ = (tmp_path / "table.md").read_text().splitlines()
        assert head.startswith("| gate or network (bfloat16, 2 threads) |") and "`same-8`" in line
        titles = [grid.title for grid in tables.grids(read(tmp_path))]
        assert titles[0].startswith("Milliseconds, median, bfloat16, 2 threads")

    def test_what_is_left_to_pytorch_is_marked_and_in_no_mean(self, tmp_path):
        results = made_up_results()
        results.find("lee-32", "step", "attn_gate").fused = False
        outputs.write_all(results, tmp_path)
        lines = (tmp_path / "table.md").read_text().splitlines()
        (line,) = [line for line in lines if "`lee-32`" in line]
        assert " (=3.00 ms)" in line and lines[-1].startswith("=: PyTorch's layers")
        left = "without 1 left to PyTorch's layers"
        assert f"2.0 (eager) {left} (2.00), 1.50 (the fastest of PyTorch's own) {left} (1.50) |" in lines[-3]
        page = (tmp_path / "report.html").read_text()
        assert "=3.00" in page and "3 of them<" in page
        assert f"geometric mean; 2.00, 2 of them, {left} (2.00)<" in page

    def test_what_has_no_time_says_why(self, tmp_path):
        results = made_up_results()
        wrong = results.find("same-256", "inference", "compile")
        wrong.status, wrong.times_ms = "wrong", []
        results.find("same-256", "inference", "onnxruntime").times_ms.clear()
        outputs.write_all(results, tmp_path)
        lines = (tmp_path / "table.md").read_text().splitlines()
        (line,) = [line for line in lines if "`same-256`" in line]
        assert "| 2.0 / ✗ / – (" in line
        assert lines[-1] == "✗: doesn't match float64, so has no time; –: not measured."
        times = next(tables.grids(results))
        (cells,) = [cells for head, name, cells in times.lines if (head, name) == ("inference", "same-256")]
        assert dict(zip(times.columns, cells, strict=True)) == {
            "attn_gate": "0.50 ±2%", "eager": "1.00 ±2%", "compile": "✗",
            "onnxruntime": "", "limit": "0.40 ±2%",
        }  # fmt: skip
        assert "✗: doesn't match float64" in times.legend and "~" not in times.legend
        assert "✗" not in next(tables.grids(made_up_results())).legend

    def test_the_page_says_sizes_and_the_fastest_of_pytorchs_own(self, folder):
        text = (folder / "report.html").read_text(encoding="utf-8")
        for config in made_up_results().configs.values():
            assert f"<td>{config.shape_text}</td>" in text
        assert "1.50×<small>the fastest of PyTorch's own" in text

    def test_the_page_says_what_kept_memory_gives(self):
        results = made_up_results()
        assert "kept memory" not in report.html(results, {})
        row = copy.deepcopy(results.find("same-256", "step", "attn_gate"))
        row.provider, row.times_ms = "attn_gate-unkept", [2.5 * t for t in row.times_ms]
        results.add([row])
        assert "2.50 times in a training step of 1 gate" in report.html(results, {})

    def test_logs_have_room_for_all_columns(self, capsys):
        results = of_all_providers()
        for part in tables.rich_tables(results):
            Console(width=cli.LOG_WIDTH).print(part)
        printed = capsys.readouterr().out
        assert "~2500 ±20% of 2" in printed and "…" not in printed

    @pytest.mark.parametrize("width", [40, 60, 80, 200])
    def test_every_number_is_whole_in_a_narrow_terminal(self, width, capsys):
        results = of_all_providers()
        for grid in tables.grids(results):
            Console(width=width).print(grid)
            printed = capsys.readouterr().out
            assert "…" not in printed and max(map(len, printed.splitlines())) <= width
            for cell in {cell for *_, cells in grid.lines for cell in cells}:
                assert cell in printed
            parts = self.parts(printed)
            assert printed.count(" same-256 ") >= parts  # the names are there again in each
            assert parts > 1 or len(grid.columns) < 8 or width > 80
        Console(width=width).print(tables.live(results, "same-256"))
        assert "…" not in capsys.readouterr().out

    @staticmethod
    def parts(printed: str) -> int:
        """How many tables there are: each has a line under its head."""
        return sum(set(line.strip()) == {"─"} for line in printed.splitlines())

    def test_a_part_of_a_table_has_as_many_columns_as_fit(self, capsys):
        lines = [("", "a", ["1", "2", ""]), ("", "b", ["", "", "3"])]
        grid = tables.Grid("", ["attn_gate", "eager", "limit"], lines)
        for width, parts in ((40, 1), (24, 2)):
            Console(width=width).print(grid)
            printed = capsys.readouterr().out
            assert self.parts(printed) == parts
        assert printed.count(" a ") == printed.count(" b ") == 1  # where they have cells

    def test_few_samples_are_counted(self):
        row = made_up_results().rows[0]
        assert tables.time_and_spread(row) == "1.00 ±2%"
        row.times_ms = [1.0, 1.2]
        assert tables.time_and_spread(row) == "1.10 ±9% of 2"
        row.times_ms = [1.0]
        assert tables.time_and_spread(row) == "1.00 of 1"

    def test_the_roofs_of_a_run_are_not_those_of_earlier_rows(self):
        results = made_up_results()
        share = "GB/s relative to this machine's copy bandwidth"
        whole = {grid.title: grid for grid in tables.grids(results)}[share]
        assert tables.earlier_note(results) == ""
        gates = [row for row in results.rows if row.config in ("same-256", "lee-32")]
        for row in gates:
            row.measured = "2025-12-31T22:10:00+00:00"
        for row in results.rows:
            row.measured = row.measured or results.started
        (left,) = [grid for grid in tables.grids(results) if grid.title == share]
        names = [{name for _, name, _ in grid.lines} for grid in (whole, left)]
        assert names[0] - names[1] == {"same-256", "lee-32"}
        _, *points = charts.roofline(results, theme.LIGHT).axes[0].lines
        assert [len(line.get_xdata()) for line in points] == [2, 2]  # of monai-96 alone
        note = tables.earlier_note(results)
        count = f"{len(gates) - 1} of {len(results.rows) - 1} rows"  # one has no time
        assert note.startswith(f"{count} are from earlier runs (2025-12-31 22:10 UTC)")
        assert note in report.html(results, {})
        assert str(next(tables.rich_tables(results))) == note

    def test_a_comparison_without_others_knows_nothing_of_the_machine(self):
        results = made_up_results()
        assert "that isn't attn_gate's" not in report.html(results, {})
        results.compared = baseline.compare(
            Results("", results.machine, {}, rows=[row for row in results.rows if row.is_ours]), results
        )
        assert results.compared["others"] == 0 and results.compared["rows"]
        page = report.html(results, {})
        assert "is not known" in page and "+0%" not in page

    @pytest.mark.parametrize("name", charts.FIGURES)
    def test_titles_are_within_their_figures(self, name):
        figure = charts.FIGURES[name][0](made_up_results(), theme.LIGHT)
        figure.draw_without_rendering()
        assert figure._suptitle.get_window_extent().x1 <= figure.bbox.x1

    def test_axes_of_speeds_have_ticks_on_both_sides_of_1(self):
        results = made_up_results()
        eager = results.find("net-lee", "step", "eager").median_ms
        results.find("net-lee", "step", "attn_gate").times_ms[:] = [eager / 1.02]
        results.find("net-lee", "step", "compile").times_ms[:] = [eager * 1.05]
        figure = charts.speedups(results, theme.LIGHT, "step", ("network",))
        ticks = list(figure.axes[0].get_xticks())
        assert {0.9, 1.0, 1.1} <= set(ticks)
        results.find("same-256", "step", "compile").times_ms[:] = [
            1.6 * results.find("same-256", "step", "eager").median_ms
        ]
        results.find("same-256", "step", "attn_gate").times_ms[:] = [0.2]
        ticks = charts.speedups(results, theme.LIGHT, "step", ("gate",)).axes[0].get_xticks()
        assert min(ticks) < 1 < max(ticks)

    def test_curves_of_threads_have_all_that_was_measured(self):
        results = made_up_results()
        for row in [row for row in results.rows if row.config == "same-256" and row.threads == 1]:
            for threads in (4, 8)[: 1 if row.provider == "eager" else 2]:
                more = copy.deepcopy(row)
                more.threads, more.times_ms = threads, [t / threads**0.5 for t in row.times_ms]
                results.add([more])
        figure = charts.thread_scaling(results, theme.LIGHT)
        panels = {axes.get_title(loc="left"): axes for axes in figure.axes}
        ideal, *lines = panels["same-256, step"].lines
        assert list(ideal.get_xdata()) == list(ideal.get_ydata()) == [1, 2, 4, 8]
        found = {line.get_color(): line.get_xydata().tolist() for line in lines}
        assert found == {
            theme.LIGHT.eager: [[1, 1], [2, 2], [4, pytest.approx(2)]],
            theme.LIGHT.fused: [[1, 1], [2, 2], [4, pytest.approx(2)], [8, pytest.approx(8**0.5)]],
        }
        assert [line.get_xdata()[-1] for line in panels["lee-32, step"].lines] == [8, 2, 2]

    def test_numbers_at_the_ends_of_curves_do_not_touch(self):
        figure = charts.thread_scaling(made_up_results(), theme.LIGHT)
        figure.draw_without_rendering()
        for axes in figure.axes:
            one, other = (text.get_window_extent() for text in axes.texts)
            assert not one.overlaps(other)
            assert max(one.x1, other.x1) <= axes.bbox.x1 + 1

    @pytest.mark.parametrize("width", [360, 1280])
    @pytest.mark.parametrize("look", ["light", "dark"])
    def test_in_a_browser(self, width, look, folder, tmp_path):
        """Nothing is wider than the screen, all pictures show, and the colours are those of the look."""
        seen = browse(folder / "report.html", width, look, tmp_path)
        assert seen["width"] <= width, f"{seen['width']} pixels wide"
        assert seen["loaded"] == len(charts.FIGURES)
        assert (sum(seen["background"]) < 3 * 60) == (look == "dark")
        assert seen["narrowest"] >= min(width - 70, 280)
        assert seen["names"] and all(seen["names"]), "names that scroll out of sight"

    def test_a_desks_screen_has_room_for_all_providers(self, tmp_path):
        results, page = of_all_providers(), tmp_path / "report.html"
        for row in results.rows:
            row.times_ms *= 3  # so that they aren't few
        page.write_text(report.html(results, {}), encoding="utf-8")
        assert browse(page, 1280, "light", tmp_path)["cut"] == []


def made_up_results() -> Results:
    """Rows of several configs, providers and modes with invented times, for pages and plots."""
    speed = {"attn_gate": 1.0, "eager": 2.0, "compile": 1.5, "onnxruntime": 1.25, "limit": 0.8}
    names = ("same-256", "lee-32", "monai-96", "size-32", "size-64", "channels-16", "channels-32", "net-lee")
    results = Results(
        "2026-01-01T00:00:00+00:00",
        {"processor": "P", "cores": 2, "threads": 2, "load": 3.0, "instructions": "avx2", "torch": "2",
         "copy_gbps": 20.0, "peak_gflops": 200.0},
        {"quick": True, "command": ["bench"]},
        configs={name: CONFIGS[name] for name in names},
        interrupted=True,
    )  # fmt: skip
    for number, name in enumerate(names):
        for mode in ("inference", "step"):
            for threads in (1, 2):
                for provider, factor in speed.items():
                    base = factor * (number + 1) * (3 if mode == "step" else 1) / threads
                    row = Row(name, "float32", threads, mode, provider)
                    row.times_ms = [base * (1 + 0.01 * i) for i in range(-3, 4)]
                    row.kept_bytes, row.peak_bytes = int(factor * 2**20), int(factor * 2**24)
                    if isinstance(CONFIGS[name], Config):
                        row.needed_bytes = traffic.needed_bytes(CONFIGS[name], mode, "float32")
                    results.add([row])
    results.add([Row("lee-32", "float32", 2, "step", "openvino", "failed", "broken")])
    fit = {"limit_bytes": 2**30, "batch": 3, "bytes": 2**29, "more_bytes": 2**31}
    results.fits = [{"config": "same-256", "dtype": "float32", "provider": "eager", **fit}]
    slow = copy.deepcopy(results)
    for row in slow.rows:
        row.times_ms = [t / 2 if row.provider == "attn_gate" else t for t in row.times_ms]
    results.compared = baseline.compare(results, slow)
    return results


def of_all_providers() -> Results:
    """With long numbers from everybody in the full plan."""
    results = made_up_results()
    for provider in plan.full()[0].providers:
        row = copy.deepcopy(results.find("same-256", "step", "attn_gate"))
        row.provider, row.times_ms = provider, [2000.0, 3000.0]
        results.add([row])
    return results


def browse(page: Path, width: int, look: str, folder: Path) -> dict:
    """What a browser makes of the page in a window of this width; skips where there is none."""
    browsers = ("chromium", "chromium-browser", "google-chrome", "chrome", "headless_shell")
    command = next(filter(None, map(shutil.which, browsers)), None)
    if command is None:
        pytest.skip(f"no browser to look at the page with: none of {', '.join(browsers)}")
    # The window of a headless browser has a least width; a frame has none.
    wrapper = folder / "wrapper.html"
    wrapper.write_text(f"""<!doctype html><body><iframe id="f" style="border:0;width:{width}px;height:900px"
    src="{page.as_uri()}"></iframe><pre id="seen"></pre><script>
    onload = () => {{
      const page = document.getElementById("f").contentDocument, view = page.defaultView;
      const images = [...page.images];
      page.querySelectorAll("details").forEach(d => d.open = true);
      const tables = [...page.querySelectorAll(".table")].filter(t => t.scrollWidth > t.clientWidth);
      page.querySelectorAll(".table").forEach(t => t.scrollLeft = 1000);
      const names = [...page.querySelectorAll("th.name")].map(
        th => th.getBoundingClientRect().left >= th.closest(".table").getBoundingClientRect().left);
      document.getElementById("seen").textContent = JSON.stringify({{
        width: page.documentElement.scrollWidth,
        loaded: images.filter(i => i.complete && i.naturalWidth > 0).length,
        names: names, cut: tables.map(t => t.textContent.slice(0, 60)),
        narrowest: Math.min(...images.map(i => i.clientWidth)),
        background: view.getComputedStyle(page.body).backgroundColor.match(/\\d+/g).slice(0, 3).map(Number),
      }});
    }}</script>""")
    options = ["--headless", "--no-sandbox", "--disable-gpu", "--allow-file-access-from-files", "--dump-dom"]
    options += ["--virtual-time-budget=5000", f"--user-data-dir={folder / 'profile'}"]
    options += ["--blink-settings=preferredColorScheme=0"] if look == "dark" else []
    done = subprocess.run(
        [command, *options, wrapper.as_uri()], capture_output=True, text=True, timeout=120, check=True
    )
    return json.loads(re.search(r'<pre id="seen">(.*?)</pre>', done.stdout)[1])
