import ast
import os
import re
import subprocess
import sys
import tarfile
import tomllib
import zipfile
from collections.abc import Callable
from importlib import metadata
from pathlib import Path

import pytest
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

import fedbasin
from fedbasin.server.extras import EXTRAS
from tests.quickstart_app import write_app

ROOT = Path(__file__).parent.parent
PYPROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())
ADDRESS = "https://github.com/fedbasin/fedbasin"
GENERATORS = {"deploy/metrics_page.py", "proto/generate.py"}  # run in a checkout, with what `dev` has

Run = Callable[..., subprocess.CompletedProcess[str]]


def tracked(*patterns: str) -> list[str]:
    command = ["git", "ls-files", "-z", *patterns]
    names = subprocess.run(command, cwd=ROOT, capture_output=True, check=True, text=True).stdout
    return [name for name in names.split("\0") if name and (ROOT / name).is_file()]


def in_package(name: str) -> bool:
    return not name.startswith(("tests/", "docs/", "deploy/digits/"))


def distributions(requirements: list[str]) -> set[str]:
    return {canonicalize_name(Requirement(text).name) for text in requirements}


@pytest.fixture(scope="module")
def dist(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The sdist, and the wheel that is built from it, of a clean copy: no build folder is left in the tree."""
    folder = tmp_path_factory.mktemp("dist")
    for name in tracked():
        copy = folder / "source" / name
        copy.parent.mkdir(parents=True, exist_ok=True)
        copy.write_bytes((ROOT / name).read_bytes())
    command = [sys.executable, "-m", "build", "--no-isolation", "--outdir", str(folder)]
    build = subprocess.run([*command, str(folder / "source")], capture_output=True, text=True)
    assert build.returncode == 0, build.stdout + build.stderr
    return folder


@pytest.fixture(scope="module")
def wheel(dist: Path) -> Path:
    (path,) = dist.glob("*.whl")
    return path


@pytest.fixture(scope="module")
def run_base(wheel: Path, tmp_path_factory: pytest.TempPathFactory) -> Run:
    """Runs code where the wheel is installed, the checkout cannot be imported, and no extra is there."""
    venv = tmp_path_factory.mktemp("base") / "venv"
    subprocess.run([sys.executable, "-m", "venv", "--without-pip", str(venv)], check=True)
    python = venv / "bin" / "python"
    install = [sys.executable, "-m", "pip", "--python", str(python), "install", "--quiet"]
    subprocess.run([*install, "--no-index", "--no-deps", str(wheel)], check=True)
    # As paths: a .pth file of the environment that runs the tests, such as that of the checkout, is then not read.
    paths = [path for path in sys.path if path.endswith(("site-packages", "dist-packages"))]
    (site,) = venv.glob("lib/python*/site-packages")
    (site / "dependencies.pth").write_text("\n".join(paths))

    def run(code: str, *arguments: str, missing: tuple[str, ...] = tuple(EXTRAS)) -> object:
        hide = f"import sys; sys.modules.update(dict.fromkeys({missing!r}))\n"
        environment = {k: v for k, v in os.environ.items() if not k.startswith("PYTHON")}
        return subprocess.run(
            [str(python), "-c", hide + code, *arguments],
            cwd=venv.parent,
            env={**environment, "PATH": f"{python.parent}{os.pathsep}{os.environ['PATH']}"},
            capture_output=True,
            text=True,
        )

    return run


class TestTheDistribution:
    def test_lists_every_folder_with_code_once(self) -> None:
        folders = [Path(name).parent for name in tracked("*__init__.py") if in_package(name)]
        packages = [".".join(("fedbasin", *folder.parts)) for folder in folders]
        assert PYPROJECT["tool"]["setuptools"]["packages"] == sorted(packages)

    def test_has_every_module_and_nothing_else(self, wheel: Path) -> None:
        packed = {name for name in zipfile.ZipFile(wheel).namelist() if name.endswith(".py")}
        assert packed == {f"fedbasin/{name}" for name in tracked("*.py") if in_package(name)}

    def test_has_types_the_wire_format_and_what_the_page_shows(self, wheel: Path) -> None:
        data = ["py.typed", *tracked("proto/*.proto", "proto/*.pyi", "server/*/static/*", "*.css")]
        assert {f"fedbasin/{name}" for name in data} <= set(zipfile.ZipFile(wheel).namelist())

    def test_has_sources_without_tests(self, dist: Path) -> None:
        (path,) = dist.glob("*.tar.gz")
        with tarfile.open(path) as archive:
            names = {name.partition("/")[2] for name in archive.getnames()}
        assert {"LICENSE", "README.md", "pyproject.toml"} <= names
        assert not any(name.startswith("tests") for name in names)

    def test_can_be_uploaded(self, dist: Path) -> None:
        files = [str(path) for path in dist.iterdir() if path.is_file()]
        command = [sys.executable, "-m", "twine", "check", "--strict", *files]
        check = subprocess.run(command, capture_output=True, text=True)
        assert check.returncode == 0, check.stdout

    def test_leads_to_the_project(self, wheel: Path) -> None:
        (name,) = (n for n in zipfile.ZipFile(wheel).namelist() if n.endswith("/METADATA"))
        text = zipfile.ZipFile(wheel).read(name).decode()
        urls = dict(re.findall(r"^Project-URL: (\w+), (.*)$", text, re.MULTILINE))
        assert set(urls) == {"Homepage", "Documentation", "Changelog", "Issues"}
        assert all(url.startswith(ADDRESS) for url in urls.values())
        assert text.endswith((ROOT / "README.md").read_text())


class TestDependencies:
    def test_are_those_that_the_code_imports(self) -> None:
        imported = set()
        for name in tracked("*.py"):
            if in_package(name) and name not in GENERATORS:
                for node in ast.walk(ast.parse((ROOT / name).read_text())):
                    if isinstance(node, ast.Import):
                        imported |= {alias.name.partition(".")[0] for alias in node.names}
                    elif isinstance(node, ast.ImportFrom) and not node.level:
                        imported.add(str(node.module).partition(".")[0])
        imported -= {*sys.stdlib_module_names, "fedbasin"}
        owners = metadata.packages_distributions()
        # The package `google` is shared.
        used = {"protobuf" if n == "google" else canonicalize_name(owners[n][0]) for n in imported}
        extras = PYPROJECT["project"]["optional-dependencies"]
        declared = [*PYPROJECT["project"]["dependencies"]]
        for extra in ("examples", "files", "observe"):
            declared += extras[extra]
        assert used == distributions(declared) - {"scikit-learn"}

    def test_of_every_extra_are_named_where_one_is_missing(self) -> None:
        extras = PYPROJECT["project"]["optional-dependencies"]
        for extra in set(EXTRAS.values()):
            modules = [module for module, name in EXTRAS.items() if name == extra]
            owners = {canonicalize_name(metadata.packages_distributions()[m][0]) for m in modules}
            assert owners == distributions(extras[extra])

    def test_of_all_extras_come_with_all(self) -> None:
        extras = PYPROJECT["project"]["optional-dependencies"]
        (everything,) = map(Requirement, extras["all"])
        assert everything.extras == set(extras) - {"all", "dev"}
        assert "fedbasin[all]" in extras["dev"]


class TestTheBaseInstallation:
    @pytest.mark.parametrize("option", ["--help", "--version", "version"])
    def test_has_the_command(self, run_base: Run, option: str) -> None:
        done = run_base("from fedbasin.server.cli import main; main()", option)
        assert (done.returncode, done.stderr) == (0, "")
        script = run_base("import subprocess; subprocess.run(['fedbasin', *sys.argv[1:]])", option)
        assert "fedbasin" in script.stdout or fedbasin.__version__ in script.stdout

    def test_names_the_extra_of_a_command(self, run_base: Run) -> None:
        done = run_base("from fedbasin.server.cli import main; main()", "observe")
        message = 'fedbasin observe needs the extra: pip install "fedbasin[observe]"\n'
        assert (done.returncode, done.stderr) == (2, message)

    def test_runs_the_lines_of_the_readme(self, run_base: Run) -> None:
        source = (ROOT / "README.md").read_text()
        for code in re.findall(r"```python\n(.*?)```", source, re.DOTALL):
            done = run_base(code)
            assert done.returncode == 0, done.stderr

    def test_runs_the_quickstart(self, run_base: Run, tmp_path: Path) -> None:
        write_app(tmp_path)
        for name in ("federation.py", "server/fake_grid.py"):
            copy = tmp_path / "tests" / name
            copy.parent.mkdir(parents=True, exist_ok=True)
            copy.write_bytes((ROOT / "tests" / name).read_bytes())
        code = (
            f"import os; os.chdir({str(tmp_path)!r}); sys.path.insert(0, os.getcwd())\n"
            "import tomllib; from pathlib import Path\n"
            "from quickstart import client_app, server_app; from tests.federation import Federation\n"
            "app = tomllib.loads(Path('pyproject.toml').read_text())['tool']['flwr']['app']\n"
            "settings = app['config'].pop('fedbasin') | {'recipe': 'regmean'}\n"
            "config = app['config'] | {f'fedbasin.{k}': v for k, v in settings.items()}\n"
            "federation = Federation(client_app.app, config, clients=2)\n"
            "server_app.app(federation.grid(), federation.server_context())\n"
            "files = {m.__file__ for n, m in sys.modules.items() if n.partition('.')[0] == 'fedbasin'}\n"
            "assert all(file.startswith(sys.prefix) for file in files), files\n"
        )
        done = run_base(code)
        assert done.returncode == 0, done.stderr
        assert (tmp_path / "final_model.pt").is_file()
        (reports,) = tmp_path.glob("runs/*/rounds.jsonl")
        assert len(reports.read_text().splitlines()) == 2


class TestThePublicNames:
    def test_are_sorted_and_can_be_imported(self) -> None:
        assert fedbasin.__all__ == sorted(fedbasin.__all__) == dir(fedbasin)
        assert all(getattr(fedbasin, name) is not None for name in fedbasin.__all__)

    def test_have_types(self) -> None:
        tree = ast.parse((ROOT / "__init__.py").read_text())
        (block,) = (node for node in tree.body if isinstance(node, ast.If))
        imported = {alias.asname for n in block.body if isinstance(n, ast.ImportFrom) for alias in n.names}
        assigned = {n.targets[0].id for n in block.body if isinstance(n, ast.Assign)}
        assert (imported - {None}) | assigned == set(fedbasin.__all__) - {"__version__"}

    def test_are_documented(self) -> None:
        page = (ROOT / "docs" / "reference" / "python.md").read_text()
        assert re.findall(r"^\| `(\w+)` \|", page, re.MULTILINE) == fedbasin.__all__
        described = set(fedbasin.__all__) - {"RECIPES", "__version__"}  # a mapping and a string
        assert all(getattr(fedbasin, name).__doc__ for name in described)

    def test_are_imported_when_they_are_used(self, run_base: Run) -> None:
        done = run_base("import fedbasin; print(*{n.partition('.')[0] for n in sys.modules})")
        assert {"fedbasin"} == {"fedbasin", "flwr", "numpy", "torch"} & set(done.stdout.split())

    def test_of_a_client_load_no_server(self, run_base: Run) -> None:
        done = run_base(
            # Flower itself loads gRPC and its command line.
            "import flwr.app, flwr.clientapp; flowers = set(sys.modules)\n"
            "from fedbasin import basin; print(*(set(sys.modules) - flowers))",
            missing=(),
        )
        loaded = done.stdout.split()
        rooms = {".".join(name.split(".")[:2]) for name in loaded if name.startswith("fedbasin.")}
        assert rooms == {"fedbasin.client", "fedbasin.proto", "fedbasin.strategies"}
        unwanted = {*EXTRAS, "grpc", "httpx", "pydantic", "rich", "safetensors", "typer"}
        assert unwanted.isdisjoint(name.partition(".")[0] for name in loaded)
        assert "fedbasin.proto.fedbasin_pb2_grpc" not in loaded
