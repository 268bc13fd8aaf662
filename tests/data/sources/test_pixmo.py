import datasets
import pytest

from perception_r1.data.samples import load
from perception_r1.data.sources import DataError, Download, PixMoCount
from perception_r1.tasks.counting import Counting
from tests.public_data import hub_pixmo


@pytest.fixture
def make(tmp_path):
    """A source of four rows, changed as told; the picture of the last one is not there."""

    def make(change=lambda table: table, *, has_points=True, **options) -> PixMoCount:
        path = tmp_path / f"{len(list(tmp_path.glob('*.parquet')))}.parquet"
        change(hub_pixmo(tmp_path, has_points=has_points)).to_parquet(path)
        return PixMoCount(tmp_path, path=str(path), **options)

    return make


def test_points_are_fractions_and_pictures_lie_under_their_digests(make, tmp_path):
    samples = load(make(), Counting(), on_bad_row="skip")
    assert [sample.id for sample in samples] == ["1", "2", "3"]
    assert {(sample.query, sample.target.count, sample.target.points) for sample in samples} == {
        ("dogs", 2, ((0.1, 0.1), (0.5, 0.5)))
    }
    assert {sample.image.parent for sample in samples} == {tmp_path}
    assert len(samples[0].image.name) == 64


def test_a_picture_that_was_not_fetched_is_named(make):
    with pytest.raises(DataError, match=r"parquet:4: image: no such file: .*/[0-9a-f]{64}$"):
        load(make(), Counting())


@pytest.mark.parametrize("points", ["empty", "null", "null lists", "no column"])
def test_counts_without_points_are_known_by_number_only(make, points):
    def change(table: datasets.Dataset) -> datasets.Dataset:
        if points == "no column":
            return table.remove_columns("points")
        cell = {"empty": {"x": [], "y": []}, "null": None, "null lists": {"x": None, "y": None}}[points]
        return table.map(lambda row: {"points": cell}, features=table.features)

    source = make(change)
    prints = [source.fingerprint()]
    samples = load(source, Counting(), on_bad_row="skip")
    assert [(sample.target.count, sample.target.points) for sample in samples] == [(2, None)] * 3
    assert source.fingerprint() == prints[0]


def test_points_as_pairs_of_x_and_y_are_the_same(make):
    def change(table: datasets.Dataset) -> datasets.Dataset:
        rows = [row | {"points": [{"x": 20.0, "y": 10.0}, {"x": 100.0, "y": 50.0}]} for row in table]
        return datasets.Dataset.from_list(rows)

    assert load(make(change), Counting(), on_bad_row="skip")[0].target.points == ((0.1, 0.1), (0.5, 0.5))


def test_another_number_of_points_than_the_count_spoils_the_row(make):
    source = make(lambda table: table.map(lambda row: {"count": 3}))
    with pytest.raises(DataError, match=r"parquet:1: points: must tell the same number of objects"):
        load(source, Counting())


def test_downloads_name_each_picture_of_the_rows_taken_once(make, tmp_path):
    source = make(lambda table: datasets.concatenate_datasets([table, table]))
    found = list(source.downloads())
    assert [item.url for item in found] == [f"https://example.org/{k}.png" for k in range(4)]
    assert found[0] == Download(url=found[0].url, sha256=found[0].sha256, path=tmp_path / found[0].sha256)
    assert [item.url for item in make(take="last:1").downloads()] == ["https://example.org/3.png"]


@pytest.mark.parametrize("digest", ["../../etc/passwd", "/etc/passwd", "", None, "..", "A" * 64])
def test_a_digest_that_is_none_leads_to_no_other_folder(make, tmp_path, digest):
    source = make(lambda table: table.map(lambda row: {"image_sha256": digest}, features=table.features))
    (found,) = source.downloads()
    assert found.sha256 == (digest or "")
    assert found.path == tmp_path / "malformed-1"


def test_missing_columns_are_named(make):
    with pytest.raises(DataError, match="has no column 'label', only"):
        len(make(lambda table: table.remove_columns("label")))
    with pytest.raises(DataError, match="has no column 'image_url', so there is nothing to fetch"):
        list(make(lambda table: table.remove_columns("image_url")).downloads())
    with pytest.raises(DataError, match="has no column 'image_sha256'"):
        list(make(lambda table: table.remove_columns("image_sha256")).downloads())


def test_an_address_that_is_no_text_is_none(make):
    (found,) = make(
        lambda table: table.remove_columns("image_url").add_column("image_url", [7] * len(table)), take="first:1"
    ).downloads()
    assert found.url == ""
