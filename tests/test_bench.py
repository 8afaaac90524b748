"""`python -m attn_gate bench` on tiny gates: it measures, refuses wrong results, and keeps what it has."""

import csv
import json

import pytest
import torch

pytest.importorskip("rich")

from attn_gate.bench import cli, measure
from attn_gate.bench.case import Case
from attn_gate.bench.memory import kept_bytes, peak_bytes
from attn_gate.bench.providers import PROVIDERS, Program, Provider, module_program
from attn_gate.bench.registry import CONFIGS, MODES, Config, select
from attn_gate.bench.results import Results, Row

from attn_gate import cli as commands

TINY = {
    "same-8": Config("same-8", "same_grid", 6, 6, 3, (8, 8)),
    "paper-8": Config("paper-8", "paper", 6, 8, 3, (8, 8)),
    "same3d-4": Config("same3d-4", "same_grid", 4, 4, 2, (4, 4, 4), batch=1),
}
FAST = ("attn_gate", "attn_gate-channels-last", "eager", "eager-channels-last", "limit")


@pytest.fixture(autouse=True)
def tiny(monkeypatch):
    monkeypatch.setattr(cli, "CONFIGS", TINY)
    monkeypatch.setattr(cli, "QUICK_REPEATS", 2)


def bench(folder, *args: str) -> int:
    return commands.main(["bench", "--quick", "--out", str(folder), *args])


def read(folder) -> dict:
    return json.loads((folder / "results.json").read_text())


def plant(monkeypatch, make) -> None:
    """A provider called "planted" that makes its programs so."""
    monkeypatch.setitem(PROVIDERS, "planted", Provider("planted", "planted", make))


def test_end_to_end(tmp_path, capsys):
    assert bench(tmp_path / "new" / "folder", "--provider", ",".join(FAST)) == 0
    results = read(tmp_path / "new" / "folder")
    rows = results["rows"]
    assert len(rows) == len(TINY) * len(MODES) * len(FAST)
    assert all(
        row["status"] == "measured" and row["q1_ms"] <= row["median_ms"] <= row["q3_ms"] for row in rows
    )
    printed = capsys.readouterr().out
    assert all(name in printed for name in (*TINY, *MODES, "attn_gate", "eager", "limit"))


@pytest.mark.slow
def test_torch_compile(tmp_path):
    assert bench(tmp_path, "--provider", "compile", "--config", "same-8", "--mode", "inference") == 0
    assert [row["status"] for row in read(tmp_path)["rows"]] == ["measured"]


@pytest.mark.parametrize("name", ["onnxruntime", "openvino"])
def test_inference_engines_match_and_say_nothing(name, tmp_path, capfd):
    if PROVIDERS[name].why_not():
        pytest.skip(PROVIDERS[name].why_not())
    assert bench(tmp_path, "--provider", name) == 0
    rows = read(tmp_path)["rows"]
    assert [row["status"] for row in rows] == ["measured"] * len(TINY)  # and no steps
    assert "arning" not in "".join(capfd.readouterr())


def test_schema(tmp_path):
    assert bench(tmp_path, "--config", "same-8", "--mode", "step", "--provider", "attn_gate") == 0
    results = read(tmp_path)
    assert set(results) == {"schema", "started", "interrupted", "machine", "settings", "configs", "rows"}
    assert results["schema"] == 1 and results["interrupted"] is False
    assert {"cpu", "cores", "threads", "load", "torch", "python"} <= set(results["machine"])
    assert results["configs"]["same-8"]["gating_size"] == [8, 8]
    (row,) = results["rows"]
    assert (row["config"], row["mode"], row["provider"]) == ("same-8", "step", "attn_gate")
    assert len(row["times_ms"]) == 2 * measure.CALLS
    assert row["error"] <= row["tolerance"] and row["worst"]
    assert row["peak_bytes"] > row["kept_bytes"] > 0
    with open(tmp_path / "results.csv") as file:
        (line,) = csv.DictReader(file)
    assert set(line) == set(row) - {"times_ms"}
    assert float(line["median_ms"]) == row["median_ms"]
    assert sorted(path.name for path in tmp_path.iterdir()) == ["results.csv", "results.json"]


def test_wrong_results_get_no_time(monkeypatch, tmp_path, capsys):
    def make(case: Case, mode: str) -> Program:
        gate = torch.nn.Module()
        gate.forward = lambda x, g: case.gate(x, g) * 1.001
        return module_program(case, mode, gate)

    plant(monkeypatch, make)
    assert bench(tmp_path, "--provider", "planted,eager", "--config", "same-8", "--mode", "inference") == 1
    rows = {row["provider"]: row for row in read(tmp_path)["rows"]}
    assert rows["eager"]["status"] == "measured"
    assert rows["planted"]["status"] == "wrong"
    assert rows["planted"]["times_ms"] == [] and rows["planted"]["median_ms"] is None
    assert "planted: wrong at same-8 inference: y is off" in capsys.readouterr().out


def test_a_wrong_gradient_gets_no_time(monkeypatch, tmp_path):
    def make(case: Case, mode: str) -> Program:
        program = PROVIDERS["eager"].make(case, mode)

        def results():
            found = program.results()
            return {**found, "d phi.weight": found["d phi.weight"] * 1.001}

        return Program(program.call, results)

    plant(monkeypatch, make)
    assert bench(tmp_path, "--provider", "planted", "--config", "paper-8", "--mode", "step") == 1
    (row,) = read(tmp_path)["rows"]
    assert (row["status"], row["worst"]) == ("wrong", "d phi.weight")


def test_a_provider_that_fails_costs_its_own_row_only(monkeypatch, tmp_path, capsys):
    def make(case: Case, mode: str) -> Program:
        raise RuntimeError("unsupported operator\nwith a long explanation")

    plant(monkeypatch, make)
    assert bench(tmp_path, "--provider", "planted,eager", "--config", "same-8", "--mode", "inference") == 1
    assert [row["status"] for row in read(tmp_path)["rows"]] == ["measured", "failed"]
    assert "RuntimeError: unsupported operator" in capsys.readouterr().out


def test_a_package_that_is_missing_is_no_failure(monkeypatch, tmp_path, capsys):
    missing = Provider("planted", "planted", lambda case, mode: None, packages=("no_such_package",))
    monkeypatch.setitem(PROVIDERS, "planted", missing)
    assert bench(tmp_path, "--provider", "planted,eager", "--config", "same-8", "--mode", "inference") == 0
    assert "planted: unavailable: pip install no_such_package" in capsys.readouterr().out


def test_interrupted_it_keeps_what_was_measured(monkeypatch, tmp_path, capsys):
    calls = []

    def make(case: Case, mode: str) -> Program:
        def call() -> None:
            calls.append(case.config.name)
            # The second config: checked without memory, then warmed up, then the second turn.
            if calls.count("paper-8") == 2 + measure.CALLS + 1:
                raise KeyboardInterrupt

        return Program(call, counts_peak=False)

    plant(monkeypatch, make)
    assert bench(tmp_path, "--provider", "planted,eager", "--mode", "inference") == 130
    results = read(tmp_path)
    assert results["interrupted"] is True
    counts = {(row["config"], row["provider"]): len(row["times_ms"]) for row in results["rows"]}
    assert counts["same-8", "planted"] == counts["same-8", "eager"] == 2 * measure.CALLS
    assert counts["paper-8", "planted"] == measure.CALLS
    assert not any(config == "same3d-4" for config, _ in counts)
    assert "interrupted" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("option", "name", "hint"),
    [
        ("--config", "smae-8", "did you mean same-8"),
        ("--provider", "eagre", "did you mean eager"),
        ("--mode", "steps", "did you mean step"),
        ("--config", "", "there are same-8, paper-8"),
    ],
)
def test_names_that_do_not_exist(option, name, hint, capsys):
    with pytest.raises(SystemExit) as exit_info:
        commands.main(["bench", option, name])
    assert exit_info.value.code == 2
    assert hint in " ".join(capsys.readouterr().err.split())


def test_names_of_families():
    assert list(select("config", ["paper-64", "same"], CONFIGS)) == [
        "same-256", "same-128", "same-64", "same-32", "paper-64",
    ]  # fmt: skip


def test_medians_speedups_and_single_samples():
    rows = [
        Row("a", "step", "attn_gate", times_ms=[2.0]),
        Row("a", "step", "eager", times_ms=[3.0, 9.0, 4.0]),
    ]
    results = Results("", {}, {}, rows=rows)
    assert results.speedup("a", "step", "attn_gate", over="eager") == 2.0
    assert results.speedup("a", "step", "attn_gate", over="compile") is None
    assert rows[0].quartiles_ms == (2.0, 2.0) and rows[1].quartiles_ms == (3.5, 6.5)


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
        peak = peak_bytes(lambda: (x + 1) * 2)
        assert 2 * x.nbytes <= peak < 2.1 * x.nbytes

    def test_peak_is_not_the_sum(self):
        x = torch.randn(2**18)

        def call():
            for _ in range(5):
                x.clone()

        assert x.nbytes <= peak_bytes(call) < 1.1 * x.nbytes
