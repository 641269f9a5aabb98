"""A directory keeps the Store promises, and nothing in it leads anywhere else."""

from pathlib import Path

import pytest

from bucketward.stores.file import FileStore
from bucketward.testing.store import StoreSuite


class TestFileStore(StoreSuite):
    objects_past_one_page = 120

    @pytest.fixture
    def store(self, tmp_path: Path):
        (tmp_path / "one").mkdir()
        store = FileStore(tmp_path / "one", page_size=50)
        yield store
        store.close()

    @pytest.fixture
    def other_store(self, tmp_path: Path):
        (tmp_path / "other").mkdir()
        store = FileStore(tmp_path / "other", page_size=50)
        yield store
        store.close()

    def reopen(self, store: FileStore) -> FileStore:
        return FileStore(Path(store._path), page_size=50)


class TestFileStoreWithoutAttributes(TestFileStore):
    has_metadata = False

    @pytest.fixture
    def store(self, tmp_path: Path):
        (tmp_path / "one").mkdir()
        store = FileStore(tmp_path / "one", page_size=50, has_tags=False)
        yield store
        store.close()

    @pytest.fixture
    def other_store(self, tmp_path: Path):
        (tmp_path / "other").mkdir()
        store = FileStore(tmp_path / "other", page_size=50, has_tags=False)
        yield store
        store.close()
