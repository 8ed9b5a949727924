"""The sources of the site, put together beside the executed chapters."""

from tools import site


def test_what_belongs_to_no_chapter_goes(tmp_path, monkeypatch):
    source = tmp_path / "_build" / "source"
    monkeypatch.setattr(site, "ROOT", tmp_path)
    monkeypatch.setattr(site, "SOURCE", source)
    for name in ("_config.yml", "_toc.yml", "CHANGELOG.md", "LICENSE"):
        (tmp_path / name).write_text(name)
    for folder in (tmp_path / "book", tmp_path / "notebooks", source / "notebooks"):
        folder.mkdir(parents=True)
    (tmp_path / "notebooks" / "01-kept.ipynb").touch()
    for name in ("01-kept.ipynb", "02-renamed.ipynb"):
        (source / "notebooks" / name).touch()
    left_by_a_killed_run = source / "notebooks" / "tmpabc"
    left_by_a_killed_run.mkdir()
    (left_by_a_killed_run / "01-kept.ipynb").touch()
    site.assemble()
    assert [path.name for path in (source / "notebooks").iterdir()] == ["01-kept.ipynb"]
    assert (source / "LICENSE").read_text() == "LICENSE"
