"""`python -m attn_gate verify` finds what is wrong, and says where."""

import sys

import pytest
import torch

from attn_gate import backends, cases, cli, functional, operators, verify
from attn_gate.judge import judge, worst

FEW = ("same grid 2D", "paper 2D", "keras 2D")


@pytest.fixture(autouse=True)
def few_cases(monkeypatch):
    """Enough to see the command work; that the kernels are right is what the other tests are for."""
    monkeypatch.setattr(verify, "CASES", [case for case in cases.CASES if case.name in FEW])


@pytest.fixture(params=["with rich", "without rich"])
def output(request, monkeypatch):
    if request.param == "with rich":
        pytest.importorskip("rich")
    else:
        for name in ("rich.console", "rich.progress"):
            monkeypatch.setitem(sys.modules, name, None)


def wrong_rows(printed: str) -> list[str]:
    return [line for line in printed.splitlines() if line.startswith("WRONG: ")]


def test_every_operator_preset_and_dtype_has_a_row(output, capsys):
    assert cli.main(["verify", "--backend", "cpu"]) == 0
    printed = capsys.readouterr().out
    assert printed.count(" right ") == (len(cases.OPERATORS) + len(verify.MODULES)) * len(verify.DTYPES)
    assert all(name in printed for name in (*cases.OPERATORS, *verify.MODULES, *verify.DTYPES))


def test_a_wrong_output_is_found_and_named(output, monkeypatch, capsys):
    right = functional.gate

    def wrong(*args, **kwargs):
        y, alpha = right(*args, **kwargs)
        return y, alpha * 1.01

    wrong.__name__ = "gate"
    monkeypatch.setattr(functional, "gate", wrong)
    assert cli.main(["verify", "--dtype", "float32"]) == 1
    printed = capsys.readouterr().out
    (row,) = wrong_rows(printed)
    assert row.startswith("WRONG: gate, float32, cpu: alpha is off by ") and "2D, " in row
    assert printed.count(" WRONG ") == 1 and printed.count(" right ") == len(cases.OPERATORS) - 1 + len(
        verify.MODULES
    )


def test_a_wrong_gradient_is_found_and_named(monkeypatch, capsys):
    right = functional.run_whole

    class Slightly(torch.autograd.Function):
        @staticmethod
        def forward(ctx, x):
            return x.clone()

        @staticmethod
        def backward(ctx, grad):
            grad = grad.clone()
            grad[..., -1] *= 1.001  # as a kernel that forgets part of the last column
            return grad

    def wrong(op, x, *args):
        return right(op, Slightly.apply(x) if op is operators.ATTENTION_GATE else x, *args)

    monkeypatch.setattr(functional, "run_whole", wrong)
    assert cli.main(["verify", "--dtype", "float64"]) == 1
    rows = wrong_rows(capsys.readouterr().out)
    # The operator, and the module's presets, which all run it.
    assert len(rows) == 4 and all(": d x is off by" in row for row in rows)


def test_an_exception_is_a_row_not_a_crash(monkeypatch, capsys):
    def broken(*args, **kwargs):
        raise RuntimeError("no kernel image")

    monkeypatch.setattr(functional, "apply_attention", broken)
    assert cli.main(["verify", "--quick"]) == 1
    rows = wrong_rows(capsys.readouterr().out)
    assert len(rows) == len(verify.QUICK_DTYPES)
    assert all("RuntimeError: no kernel image" in row for row in rows)


def test_a_backend_that_does_not_work_here_is_refused_with_its_reason(monkeypatch, capsys):
    monkeypatch.setattr(backends, "report", lambda: [("cpu", True, ""), ("triton", False, "no GPU here")])
    assert cli.main(["verify", "--backend", "triton"]) == 2
    assert "triton can't be used: no GPU here" in capsys.readouterr().err


@pytest.mark.parametrize("seed", ["99999999999999999999", "-9223372036854775809", "1.5", "x"])
def test_a_seed_that_there_is_not_is_refused(seed, capsys):
    with pytest.raises(SystemExit) as caught:
        cli.main(["verify", f"--seed={seed}"])
    assert caught.value.code == 2
    assert f"N must be an integer from -2^63 to 2^64 - 1; got '{seed}'" in capsys.readouterr().err


def test_products_of_float32_are_in_float32(monkeypatch, capsys):
    """On a GPU whose convolutions take TF32; and afterwards all is as it was."""
    switches = torch.backends.cudnn.conv, torch.backends.cuda.matmul
    before = [switch.fp32_precision for switch in switches]
    assert "tf32" in before
    seen, results = set(), verify._results
    monkeypatch.setattr(
        verify, "_results", lambda *args: seen.update(s.fp32_precision for s in switches) or results(*args)
    )
    assert cli.main(["verify", "--quick"]) == 0
    assert seen == {"ieee"} and [switch.fp32_precision for switch in switches] == before


class TestJudge:
    exact = {"y": torch.tensor([1.0, -2.0], dtype=torch.float64)}

    def judge(self, found, dtype=torch.float32):
        return worst(judge({"y": torch.tensor(found, dtype=dtype)}, self.exact, self.exact, dtype))

    def test_a_few_ulp_are_allowed(self):
        assert self.judge([1.0, -2.0 + 1e-6]).ok

    def test_more_is_not(self):
        result = self.judge([1.0, -2.0 + 1e-5])
        assert not result.ok
        assert result.error == pytest.approx(0.5e-5, rel=0.1)  # relative to the scale, 2

    def test_nan_and_another_shape_are_wrong(self):
        assert not self.judge([1.0, float("nan")]).ok
        assert not self.judge([1.0]).ok

    def test_all_of_a_large_result_is_looked_at(self):
        exact = {"y": torch.ones(3 * 2**18 + 5, dtype=torch.float64)}
        for wrong in (1.01, float("nan"), float("inf")):
            for at in (0, 2**18, -1):
                found = torch.ones(3 * 2**18 + 5)
                found[at] = wrong
                assert not worst(judge({"y": found}, exact, exact, torch.float32)).ok
        assert worst(judge({"y": torch.ones(3 * 2**18 + 5)}, exact, exact, torch.float32)).error == 0

    def test_twice_the_error_of_eager_is_allowed(self):
        eager = {"y": self.exact["y"].float() + 1e-3}
        (result,) = judge({"y": self.exact["y"].float() + 1.9e-3}, eager, self.exact, torch.float32)
        assert result.ok
        (result,) = judge({"y": self.exact["y"].float() + 2.1e-3}, eager, self.exact, torch.float32)
        assert not result.ok

    def test_a_bias_is_judged_on_the_scale_of_its_layer(self):
        exact = {"d psi_weight": torch.tensor([3.0]).double(), "d psi_bias": torch.tensor([1e-6]).double()}
        found = {"d psi_weight": torch.tensor([3.0]), "d psi_bias": torch.tensor([2e-6])}
        assert all(result.ok for result in judge(found, exact, exact, torch.float32))

    def test_names_must_be_those_of_the_reference(self):
        with pytest.raises(ValueError, match="got alpha"):
            judge({"alpha": self.exact["y"]}, self.exact, self.exact, torch.float32)
