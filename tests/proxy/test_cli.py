"""The command line: what is passed on, what is printed where, and the exit status."""

import os
import subprocess
import sys
import types
from pathlib import Path

import pytest

import nearhub
from nearhub.cli import main
from nearhub.config import SETTINGS, Config

PACKAGES = Path(nearhub.__file__).parents[1]


@pytest.fixture(autouse=True)
def clean_environment(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    for variable in ("XDG_CACHE_HOME", *(f"{scheme}_PROXY" for scheme in ("HTTP", "HTTPS", "NO"))):
        monkeypatch.delenv(variable, raising=False)
        monkeypatch.delenv(variable.lower(), raising=False)
    for variable in [name for name in os.environ if name.startswith("NEARHUB_")]:
        monkeypatch.delenv(variable)
    monkeypatch.setenv("HOME", str(tmp_path))


@pytest.fixture
def served(monkeypatch: pytest.MonkeyPatch) -> list[Config]:
    """What `nearhub serve` was started with; the server itself is replaced, and ends with status 7."""
    configs: list[Config] = []

    def run(config: Config) -> int:
        configs.append(config)
        return 7

    app = types.ModuleType("nearhub.web.app")
    app.run = run  # type: ignore[attr-defined]
    monkeypatch.setitem(sys.modules, "nearhub.web.app", app)
    return configs


FLAGS = {
    "--host": "0.0.0.0",
    "--port": "1",
    "--prefix": "/hub",
    "--public-url": "https://lan.example/hub",
    "--cache-dir": "/big",
    "--max-size": "500GB",
    "--upstream": "https://a.example",
    "--blob-host": "b.example:81",
    "--ref-ttl": "5s",
    "--connections": "24",
    "--ca-bundle": "",
    "--git": "tools=https://git.example/tools.git",
}


def run_python(*arguments: str) -> subprocess.CompletedProcess[str]:
    environ = {**os.environ, "PYTHONPATH": str(PACKAGES)}
    return subprocess.run([sys.executable, *arguments], env=environ, capture_output=True, text=True, timeout=60)


class TestServe:
    def test_starts_the_server(self, served: list[Config]) -> None:
        """serve hands the configuration to the server and exits with the server's status."""
        assert main(["serve", "--port", "0"]) == 7
        assert [config.server.port for config in served] == [0]

    def test_every_flag_arrives(self, served: list[Config]) -> None:
        """Each flag sets its setting."""
        assert set(FLAGS) == {setting.flag for setting in SETTINGS if setting.flag}
        main(["serve", *(word for flag in FLAGS.items() for word in flag)])
        given = {origin for origin in served[0].origins.values() if origin != "default"}
        assert given == set(FLAGS)
        assert served[0].server.host == "0.0.0.0"
        assert served[0].upstream.connections == 24

    def test_lists_repeat(self, served: list[Config]) -> None:
        """--upstream and --blob-host can be given more than once."""
        main(["serve", "--upstream", "https://a", "--blob-host", "c", "--upstream", "https://b", "--blob-host", "d:1"])
        assert [upstream.url for upstream in served[0].upstream.urls] == ["https://a", "https://b"]
        assert [host.host for host in served[0].upstream.blob_hosts if host.named] == ["c", "d"]

    def test_file_and_environment(self, served: list[Config], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        """The file of --config and the variables of the process are read."""
        (tmp_path / "n.toml").write_text("[server]\nport = 1\n")
        monkeypatch.setenv("NEARHUB_SERVER_HOST", "::1")
        main(["serve", "--config", str(tmp_path / "n.toml")])
        assert (served[0].server.port, served[0].server.host) == (1, "::1")

    def test_problems(self, served: list[Config], capsys: pytest.CaptureFixture[str]) -> None:
        """Wrong settings are told on stderr, one per line, and nothing is started."""
        assert main(["serve", "--port", "x", "--ref-ttl", "60"]) == 2
        out, err = capsys.readouterr()
        assert out == "" and served == []
        assert [line.split(":")[0] for line in err.splitlines()] == ["--port", "--ref-ttl"]


class TestCheckConfig:
    def test_prints_values_and_origins(self, capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
        """check-config prints every setting in force with its origin, and starts nothing."""
        file = tmp_path / "n.toml"
        file.write_text('[server]\nhost = "::1"\n')
        assert main(["check-config", "--config", str(file), "--port", "1"]) == 0
        out, err = capsys.readouterr()
        assert err == ""
        assert f'host = "::1"  # {file}:2\n' in out and "port = 1  # --port\n" in out
        assert f'dir = "{tmp_path}/.cache/nearhub"  # default\n' in out
        assert all(f"\n{setting.key} = " in out for setting in SETTINGS if setting.name != "git.mirrors")

    def test_problems(self, capsys: pytest.CaptureFixture[str]) -> None:
        """check-config exits with 2 where serve would."""
        assert main(["check-config", "--config", "/nowhere/n.toml"]) == 2
        assert capsys.readouterr() == ("", "/nowhere/n.toml: cannot be read: No such file or directory\n")


class TestParsing:
    @pytest.mark.parametrize(
        "arguments",
        [[], ["sevre"], ["serve", "--prot", "1"], ["serve", "--por", "1"], ["serve", "x"], ["--port", "1", "serve"]],
    )
    def test_wrong_command_lines(self, arguments: list[str], capsys: pytest.CaptureFixture[str]) -> None:
        """A command line that is not exactly right starts nothing: flags are not abbreviated either."""
        with pytest.raises(SystemExit) as caught:
            main(arguments)
        assert caught.value.code == 2
        assert "usage: nearhub" in capsys.readouterr().err

    def test_version(self, capsys: pytest.CaptureFixture[str]) -> None:
        """--version tells the version of the package."""
        with pytest.raises(SystemExit) as caught:
            main(["--version"])
        assert caught.value.code == 0
        assert capsys.readouterr().out == f"nearhub {nearhub.__version__}\n"

    def test_help(self, capsys: pytest.CaptureFixture[str]) -> None:
        """The help of serve names every flag and its variable."""
        with pytest.raises(SystemExit):
            main(["serve", "--help"])
        words = capsys.readouterr().out.split()
        for setting in SETTINGS:
            if setting.flag:
                assert setting.flag in words and f"(${setting.variable})" in words


class TestProcess:
    def test_module(self) -> None:
        """`python -m nearhub` is the command, exit status included, without a traceback."""
        assert run_python("-m", "nearhub", "--version").stdout == f"nearhub {nearhub.__version__}\n"
        wrong = run_python("-m", "nearhub", "check-config", "--port", "x")
        assert (wrong.returncode, wrong.stdout) == (2, "")
        assert wrong.stderr == "--port: 'x' is not a port (0 to 65535)\n"

    @pytest.mark.parametrize("arguments", [["--help"], ["serve", "--help"], ["check-config"]])
    def test_imports(self, arguments: list[str]) -> None:
        """Only serving loads the server: help and check-config do not wait for aiohttp, nor for ssl."""
        script = (
            "import atexit, sys\n"
            "heavy = {'aiohttp', 'asyncio', 'ssl'}\n"
            "atexit.register(lambda: print(sorted(heavy & sys.modules.keys()), file=sys.stderr))\n"
            f"from nearhub.cli import main\nmain({arguments!r})\n"
        )
        assert run_python("-c", script).stderr == "[]\n"
