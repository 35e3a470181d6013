from __future__ import annotations

import functools
import hashlib
import http.client
import http.server
import io
import ssl
import threading
import zipfile
from collections.abc import Iterator
from pathlib import Path

import pytest

from plum.data import download, download_movielens, read_movielens
from plum.data.download import ARCHIVES, Archive
from plum.errors import InvalidArgument, InvalidData

MEMBERS = {
    "ml-1m/movies.dat": b"7::Up (1964)::Drama\n",
    "ml-1m/ratings.dat": b"1::7::5::3\n",
    "__MACOSX/ml-1m/._movies.dat": b"x",
}


def zipped(members: dict[str, bytes]) -> bytes:
    buffer = io.BytesIO()
    with zipfile.ZipFile(buffer, "w") as archive:
        for name, data in members.items():
            archive.writestr(name, data)
    return buffer.getvalue()


def publish(monkeypatch: pytest.MonkeyPatch, data: bytes, **digests: str) -> None:
    """Makes ``data`` the archive whose checksums are expected."""
    real = {kind: hashlib.new(kind, data).hexdigest() for kind in ("md5", "sha256")}
    monkeypatch.setitem(ARCHIVES, "ml-1m", Archive("ml-1m", **{**real, **digests}))


class Handler(http.server.SimpleHTTPRequestHandler):
    """Serves a folder; a file ``<name>.length`` says what length to claim."""

    def log_message(self, *args: object) -> None:
        pass

    def send_header(self, keyword: str, value: str) -> None:
        claim = Path(self.translate_path(self.path) + ".length")
        if keyword == "Content-Length" and claim.is_file():
            value = claim.read_text()
        super().send_header(keyword, value)


@pytest.fixture
def site(tmp_path) -> Iterator[tuple[Path, str]]:
    folder = tmp_path / "site"
    folder.mkdir()
    handler = functools.partial(Handler, directory=str(folder))
    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), handler) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        yield folder, f"http://127.0.0.1:{server.server_port}"
        server.shutdown()


def left_in(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir()) if folder.is_dir() else []


def test_two_processes_may_unpack_at_once(tmp_path) -> None:
    (tmp_path / "ml-1m.zip").write_bytes(zipped(MEMBERS))
    for _ in range(2):
        download._unpack(tmp_path / "ml-1m.zip", "ml-1m")
    assert left_in(tmp_path) == ["ml-1m", "ml-1m.zip"]
    assert left_in(tmp_path / "ml-1m") == ["movies.dat", "ratings.dat"]


def test_download_verify_unpack_read(site, tmp_path, monkeypatch) -> None:
    folder, url = site
    data = zipped(MEMBERS)
    (folder / "ml-1m.zip").write_bytes(data)
    publish(monkeypatch, data)
    calls: list[tuple[int, int]] = []
    cache = tmp_path / "cache"
    got = download_movielens("ml-1m", cache, lambda *done: calls.append(done), base_url=url)
    assert got == cache / "ml-1m"
    assert calls[-1] == (len(data), len(data))
    assert left_in(cache) == ["ml-1m", "ml-1m.zip"]
    assert left_in(got) == ["movies.dat", "ratings.dat"]
    assert read_movielens("ml-1m", got).texts() == ["Up (1964) | Drama"]
    # What is there is used without a connection.
    again = download_movielens("ml-1m", cache, base_url="http://127.0.0.1:9")
    assert again == got


@pytest.mark.parametrize("kind", ["md5", "sha256"])
def test_wrong_checksum_is_refused_and_leaves_nothing(site, tmp_path, monkeypatch, kind) -> None:
    folder, url = site
    data = zipped(MEMBERS)
    (folder / "ml-1m.zip").write_bytes(data)
    publish(monkeypatch, data, **{kind: "0" * 32})
    with pytest.raises(InvalidData) as caught:
        download_movielens("ml-1m", tmp_path / "cache", base_url=url)
    message = str(caught.value)
    got = hashlib.new(kind, data).hexdigest()
    assert message.startswith(f"{url}/ml-1m.zip: expected {kind} {'0' * 32}, got {got}; ")
    assert "--data-dir" in message
    assert left_in(tmp_path / "cache") == []


def test_cut_off_download_is_refused_and_can_be_repeated(site, tmp_path, monkeypatch) -> None:
    folder, url = site
    data = zipped(MEMBERS)
    publish(monkeypatch, data)
    (folder / "ml-1m.zip").write_bytes(data[:50])
    (folder / "ml-1m.zip.length").write_text(str(len(data)))
    with pytest.raises(InvalidData, match=f"expected {len(data)} bytes, got only 50"):
        download_movielens("ml-1m", tmp_path / "cache", base_url=url)
    assert left_in(tmp_path / "cache") == []
    (folder / "ml-1m.zip.length").unlink()
    (folder / "ml-1m.zip").write_bytes(data)
    assert download_movielens("ml-1m", tmp_path / "cache", base_url=url).is_dir()


@pytest.mark.parametrize("base_url", ["http://127.0.0.1:9", "file:///no/such/folder"])
def test_no_connection_says_what_to_do(tmp_path, base_url: str) -> None:
    with pytest.raises(InvalidData, match=rf"^{base_url}/ml-1m\.zip: .*--data-dir"):
        download_movielens("ml-1m", tmp_path / "cache", base_url=base_url)
    assert left_in(tmp_path / "cache") == []


def test_a_connection_that_breaks_is_named(site, tmp_path, monkeypatch) -> None:
    def broken(*_: object) -> bytes:
        raise ssl.SSLEOFError("EOF occurred in violation of protocol")

    (site[0] / "ml-1m.zip").write_bytes(b"x")
    monkeypatch.setattr(http.client.HTTPResponse, "read", broken)
    with pytest.raises(InvalidData, match=r"ml-1m\.zip: .*EOF occurred.*--data-dir"):
        download_movielens("ml-1m", tmp_path / "cache", base_url=site[1])
    assert left_in(tmp_path / "cache") == []


def test_missing_page_is_named(site, tmp_path) -> None:
    with pytest.raises(InvalidData, match=r"ml-1m\.zip: .*HTTP Error 404"):
        download_movielens("ml-1m", tmp_path, base_url=site[1])


def test_archive_put_there_by_hand_is_verified(tmp_path, monkeypatch) -> None:
    data = zipped(MEMBERS)
    publish(monkeypatch, data)
    (tmp_path / "ml-1m.zip").write_bytes(data[:-5])
    with pytest.raises(InvalidData, match=r"ml-1m\.zip: expected md5 .*; delete it and run again"):
        download_movielens("ml-1m", tmp_path, base_url="http://127.0.0.1:9")
    assert left_in(tmp_path) == ["ml-1m.zip"]
    (tmp_path / "ml-1m.zip").write_bytes(data)
    folder = download_movielens("ml-1m", tmp_path, base_url="http://127.0.0.1:9")
    assert left_in(folder) == ["movies.dat", "ratings.dat"]


@pytest.mark.parametrize("name", ["../evil.txt", "ml-1m/../../evil.txt", "/evil.txt"])
def test_members_outside_the_folder_are_refused(tmp_path, monkeypatch, name: str) -> None:
    data = zipped({**MEMBERS, name: b"x"})
    publish(monkeypatch, data)
    cache = tmp_path / "a" / "cache"
    cache.mkdir(parents=True)
    (cache / "ml-1m.zip").write_bytes(data)
    with pytest.raises(InvalidData, match=r"ml-1m\.zip: .*evil\.txt.*do not use"):
        download_movielens("ml-1m", cache)
    assert left_in(cache) == ["ml-1m.zip"]
    assert left_in(tmp_path / "a") == ["cache"]


@pytest.mark.parametrize("data", [b"<html>not a zip</html>", zipped({"other/x": b"1"})])
def test_archive_of_another_shape_is_refused(tmp_path, monkeypatch, data: bytes) -> None:
    publish(monkeypatch, data)
    (tmp_path / "ml-1m.zip").write_bytes(data)
    with pytest.raises(InvalidData, match=r"ml-1m\.zip: expected a (zip archive|folder ml-1m)"):
        download_movielens("ml-1m", tmp_path)
    assert left_in(tmp_path) == ["ml-1m.zip"]


def test_unknown_release_is_refused(tmp_path) -> None:
    with pytest.raises(InvalidArgument, match=r"^name: .*'ml-2m'"):
        download_movielens("ml-2m", tmp_path)


def test_every_release_has_well_formed_checksums() -> None:
    assert set(ARCHIVES) == {f"ml-{size}" for size in ("100k", "1m", "10m", "20m", "25m", "32m")}
    for archive in download.ARCHIVES.values():
        assert len(bytes.fromhex(archive.md5)) == 16
        assert archive.sha256 is None or len(bytes.fromhex(archive.sha256)) == 32
