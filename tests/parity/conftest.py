import pytest

from gptoss_ft.harmony.vocabulary import ranks_file_bytes


@pytest.fixture(scope="session")
def openai_encoding(tmp_path_factory):
    """openai-harmony's own encoding, reading our ranks file; it checks the file's hash itself."""
    openai_harmony = pytest.importorskip("openai_harmony")
    folder = tmp_path_factory.mktemp("ranks")
    (folder / "o200k_base.tiktoken").write_bytes(ranks_file_bytes())
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("TIKTOKEN_ENCODINGS_BASE", str(folder))
        yield openai_harmony.load_harmony_encoding("HarmonyGptOss")
