"""The command line: what is passed on, what is printed where, and the exit status."""

import json
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
    "--offline": "true",
    "--max-rate": "50MB",
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


RULES = """\
[access]
contact = "ml@lab.example"
[[rules]]
name = "our owners"
action = "deny"
not_repos = ["org/*"]
[[rules]]
name = "try licences"
action = "deny"
not_licences = ["mit"]
dry_run = true
[[rules]]
name = "no pickles"
action = "deny"
formats = ["pickle"]
not_groups = ["trusted"]
[[rules]]
name = "a week"
action = "deny"
younger_than = "7d"
larger_than = "1GB"
"""


@pytest.fixture
def ruled(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> list[str]:
    """check-config with a file of rules, in the working directory."""
    monkeypatch.chdir(tmp_path)
    Path("n.toml").write_text(RULES)
    return ["check-config", "--config", "n.toml"]


class TestExplain:
    def test_a_refusal(self, ruled: list[str], capsys: pytest.CaptureFixture[str]) -> None:
        """Rule by rule, why it matches or not, up to the one that decides, and the sentence that the client gets."""
        assert main([*ruled, "--explain", "org/model", "a.bin", "--licence", "GPL-3.0", "--group", "staff"]) == 0
        out, err = capsys.readouterr()
        assert err == ""
        assert out == (
            "org/model a.bin\n"
            "  kind: models; format: pickle; licence: gpl-3.0; caller's groups: staff\n"
            "  not known: size, commit's age\n"
            "\n"
            "1. our owners (deny; n.toml:3): no match\n"
            "     - not_repos org/*: the repo is org/model\n"
            "2. try licences (deny, dry run; n.toml:7): matches\n"
            "     + not_licences mit: the licence is gpl-3.0\n"
            "3. no pickles (deny; n.toml:12): matches\n"
            "     + not_groups trusted: the caller is in none of them\n"
            "     + formats pickle: the format is pickle\n"
            "4. a week (deny; n.toml:17): not reached\n"
            "\n"
            'REFUSED: The rule "no pickles" of this mirror refuses this: the format is pickle. Contact: ml@lab.example\n'
            'DRY RUN: "try licences" would refuse it\n'
        )

    def test_what_is_not_known(self, ruled: list[str], capsys: pytest.CaptureFixture[str]) -> None:
        """Facts without a flag are unknown, and what the answer depends on is named with its flag."""
        assert main([*ruled, "--explain", "datasets/org/model", "--group", "trusted", "--size", "5GB"]) == 0
        out = capsys.readouterr().out
        assert "  kind: datasets; size: 5GB; caller's groups: trusted\n  not known: format, licence, commit's age\n" in out
        assert (
            "2. try licences (deny, dry run; n.toml:7): cannot say\n     ? not_licences mit: the licence is not known\n" in out
        )
        assert "3. no pickles (deny; n.toml:12): no match\n     - not_groups trusted: the caller is in trusted\n" in out
        assert out.endswith(
            'UNDETERMINED: The rule "a week" of this mirror may refuse this: the commit\'s age is not known here. '
            "Contact: ml@lab.example\n"
            "It depends on the commit's age (--age).\n"
            "DRY RUN: what would refuse it depends on the licence (--licence)\n"
        )

    @pytest.mark.parametrize(
        ("given", "answer"),
        [
            (["org/m", "a.safetensors", "--licence", "mit", "--age", "7d", "--size", "2GB"], "ALLOWED: no rule refuses it"),
            (["org/m", "a.safetensors", "--licence", "mit", "--age", "8d", "--size", "1GB"], "ALLOWED: no rule refuses it"),
            (
                ["evil/m"],
                'REFUSED: The rule "our owners" of this mirror refuses this: the repo is evil/m. Contact: ml@lab.example',
            ),
        ],
    )
    def test_answers(self, ruled: list[str], capsys: pytest.CaptureFixture[str], given: list[str], answer: str) -> None:
        """The last line is the answer."""
        assert main([*ruled, "--explain", *given]) == 0
        assert capsys.readouterr().out.splitlines()[-1] == answer

    def test_an_allowing_rule(self, capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
        """What allows is named, too; a rule without conditions says so."""
        (tmp_path / "n.toml").write_text('[[rules]]\nname = "all of it"\naction = "allow"\n')
        assert main(["check-config", "--config", str(tmp_path / "n.toml"), "--explain", "a/b"]) == 0
        out = capsys.readouterr().out
        assert f"1. all of it (allow; {tmp_path}/n.toml:1): matches\n     without conditions\n" in out
        assert out.endswith('ALLOWED by "all of it"\n')

    def test_without_rules(self, capsys: pytest.CaptureFixture[str]) -> None:
        """Everything may be had."""
        assert main(["check-config", "--explain", "gpt2", "a.bin"]) == 0
        assert capsys.readouterr().out.splitlines()[-1] == "ALLOWED: no rule refuses it"

    def test_json(self, ruled: list[str], capsys: pytest.CaptureFixture[str]) -> None:
        """The same as JSON, the conditions of rules behind the decisive one included."""
        assert main([*ruled, "--explain", "org/model", "a.bin", "--licence", "x", "--json"]) == 0
        told = json.loads(capsys.readouterr().out)
        assert (told["repo"], told["file"], told["outcome"], told["rule"]) == ("org/model", "a.bin", "denied", "no pickles")
        assert told["facts"] == {
            "kind": "models",
            "format": "pickle",
            "size": None,
            "licences": ["x"],
            "age_s": None,
            "groups": [],
        }
        assert [rule["match"] for rule in told["rules"]] == ["no", "yes", "yes", "not reached"]
        assert [rule["dry_run"] for rule in told["rules"]] == [False, True, False, False]
        assert told["rules"][3]["conditions"][1] == {
            "condition": "younger_than",
            "value": "7d",
            "holds": None,
            "told": "the commit's age is not known",
        }
        assert told["message"].startswith('The rule "no pickles" ') and told["would_refuse"] == ["try licences"]
        assert told["missing"] == told["dry_run_missing"] == []
        main([*ruled, "--explain", "org/model", "a.txt", "--json"])
        told = json.loads(capsys.readouterr().out)
        assert (told["outcome"], told["missing"], told["dry_run_missing"]) == ("undetermined", ["size", "age"], ["licence"])

    def test_problems(self, ruled: list[str], capsys: pytest.CaptureFixture[str]) -> None:
        """All wrong facts are told at once, each with its flag."""
        assert main([*ruled, "--explain", "a/b/c", "f", "--size", "5", "--age", "x"]) == 2
        out, err = capsys.readouterr()
        assert out == ""
        assert [line.split(":")[0] for line in err.splitlines()] == ["--explain", "--size", "--age"]

    @pytest.mark.parametrize(
        ("arguments", "complaint"),
        [
            (["--explain"], "expected at least one argument"),
            (["--explain", "a/b", "c", "d"], "--explain takes a repo and at most one file: what is d?"),
            (["--size", "5GB"], "--size is for --explain REPO FILE"),
            (["--json"], "--json is for --explain REPO FILE"),
            (["--group", "x"], "--group is for --explain REPO FILE"),
        ],
    )
    def test_wrong_command_lines(
        self, ruled: list[str], capsys: pytest.CaptureFixture[str], arguments: list[str], complaint: str
    ) -> None:
        """Facts without a question, and a question about two files."""
        with pytest.raises(SystemExit) as caught:
            main([*ruled, *arguments])
        assert caught.value.code == 2 and complaint in capsys.readouterr().err


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

    @pytest.mark.parametrize(
        "arguments", [["--help"], ["serve", "--help"], ["check-config"], ["check-config", "--explain", "a/b"]]
    )
    def test_imports(self, arguments: list[str]) -> None:
        """Only serving loads the server: help and check-config do not wait for aiohttp, nor for ssl."""
        script = (
            "import atexit, sys\n"
            "heavy = {'aiohttp', 'asyncio', 'ssl'}\n"
            "atexit.register(lambda: print(sorted(heavy & sys.modules.keys()), file=sys.stderr))\n"
            f"from nearhub.cli import main\nmain({arguments!r})\n"
        )
        assert run_python("-c", script).stderr == "[]\n"


class TestAhead:
    """prefetch, pin, unpin, offline: what is asked of them, and what cannot be asked."""

    @pytest.fixture
    def asked(self, monkeypatch: pytest.MonkeyPatch) -> list[tuple[str, dict[str, object]]]:
        """What came to run_verb."""
        calls: list[tuple[str, dict[str, object]]] = []

        def run_verb(config: Config, verb: str, arguments: dict[str, object], *, as_json: bool) -> int:
            calls.append((verb, arguments))
            return 0

        monkeypatch.setattr("nearhub.verbs.run_verb", run_verb)
        return calls

    def test_what_is_asked(self, asked: list[tuple[str, dict[str, object]]], tmp_path: Path) -> None:
        listed = tmp_path / "repos"
        listed.write_text("# base models\norg/b@v1  # tagged\n\n")
        for line in (
            f"prefetch org/a --list {listed} --include *.json --include sub/ --exclude x --git --max-rate 5MB/s",
            "pin org/a@main --last 2 --group g",
            "pin --list",
            "unpin --group g",
            "offline on",
        ):
            assert main([*line.split(), "--cache-dir", str(tmp_path)]) == 0
        assert asked == [
            (
                "prefetch",
                {
                    "repos": ["org/a", "org/b@v1"],
                    "include": ["*.json", "sub/"],
                    "exclude": ["x"],
                    "with_git": True,
                    "rate": 5_000_000,
                },
            ),
            ("pin", {"repo": "org/a", "revision": "main", "last": 2, "group": "g"}),
            ("pins", {}),
            ("unpin", {"repo": "", "revision": "", "group": "g"}),
            ("offline", {"mode": "on"}),
        ]

    @pytest.mark.parametrize(
        ("line", "complaint"),
        [
            ("prefetch", "name a REPO[@REV]"),
            ("prefetch --list /nowhere/at/all", "cannot be read"),
            ("pin org/a --last 0", "--last must be 1 or more"),
            ("pin", "one of the arguments"),
            ("offline maybe", "invalid choice"),
        ],
    )
    def test_what_cannot_be_asked(
        self, asked: list[tuple[str, dict[str, object]]], line: str, complaint: str, capsys: pytest.CaptureFixture[str]
    ) -> None:
        with pytest.raises(SystemExit) as caught:
            main(line.split())
        assert caught.value.code == 2 and complaint in capsys.readouterr().err
        assert asked == []
