"""The example of the README, as it stands there."""

from core import session
from core.data import cifar10
from core.runs.record import Failed
from tests.conftest import ROOT


def test_the_notebook_of_the_readme(invented, tmp_path, monkeypatch, capsys):
    """On few images, for one epoch and eager, but with the same lines; and one of the runs diverges."""
    after = (ROOT / "README.md").read_text().split("**From a notebook**")[1]
    source = after.split("```python\n")[1].split("```")[0]
    assert len([line for line in source.splitlines() if line]) <= 12
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(cifar10, "load", lambda folder: invented)
    real = session.run_experiment

    def run_experiment(name, spec, out, data):
        diverges = (spec["lr"], spec["seed"]) == (1e-3, 1)
        changes = {"epochs": 1, "lr": 1e38} if diverges else {"epochs": 1}
        return real(name, {**spec, **changes}, out, data, compiled=False)

    monkeypatch.setattr(session, "run_experiment", run_experiment)
    names = {}
    exec(source, names)
    best = names["best"]
    assert [record.seed for record in names["records"]] == [0, 0, 1, 1, 2, 2]
    assert [isinstance(record, Failed) for record in names["records"]] == [False, False, True, False, False, False]
    assert len(list(tmp_path.glob("trials/checkpoints/small-lr=*/*.json"))) == 6
    assert capsys.readouterr().out == f"{best.name} {best.seed} {best.metrics.test.accuracy}\n"
