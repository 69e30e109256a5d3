"""Which files pytest takes where no path is given, and how many processes: tests in two, benchmarks in one."""

from pathlib import Path

import pytest

BENCHMARKS = Path(__file__).resolve().parent / "benchmarks"


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--long", action="store_true", help="benchmarks: the rounds of the published tables")


@pytest.hookimpl(tryfirst=True)
def pytest_cmdline_main(config: pytest.Config) -> None:
    """With --benchmark-only and no path, the benchmarks take the place of the tests."""
    if config.option.benchmark_only and config.args_source is pytest.Config.ArgsSource.TESTPATHS:
        config.args = [str(BENCHMARKS)]


def pytest_xdist_auto_num_workers(config: pytest.Config) -> int:
    """No workers where there are benchmarks, as a second process spoils each measurement; otherwise two, each with one
    half of the tests. The worker that is done first takes over some tests of the other."""
    paths = [Path(argument.split("::")[0]).resolve() for argument in config.args]
    if config.option.benchmark_only or any(path.is_relative_to(BENCHMARKS) for path in paths):
        return 0
    config.option.dist = "worksteal"
    return 2
