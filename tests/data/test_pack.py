import errno
import os
import pickle
import shutil
import struct
from collections import namedtuple
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from handpose.data import pack as pack_module
from handpose.data.pack import PackedImages, pack, resize_intrinsics
from handpose.data.sample import Annotations, ImageFiles
from handpose.errors import UserError
from tests.builders import make_cameras, write_images, write_jpeg


def annotate(images: Path, intrinsics: np.ndarray | None = None) -> Annotations:
    files = ImageFiles.from_paths(sorted(images.glob("*.jpg")))
    intrinsics = make_cameras(len(files)) if intrinsics is None else intrinsics
    return Annotations(files, intrinsics, None, None, np.arange(len(files)))


@pytest.fixture
def images(tmp_path) -> Path:
    write_images(tmp_path / "rgb", 5)
    return tmp_path / "rgb"


def pack_images(images: Path, image_size: int | None = None) -> PackedImages:
    return pack(annotate(images), image_size=image_size, folder=images.parent / "packed", progress=False)


def read_with_pillow(file: Path) -> np.ndarray:
    return np.asarray(Image.open(file).convert("RGB")).astype(int)


def test_packed_images_are_the_decoded_files_in_order(tmp_path):
    write_images(tmp_path / "rgb", 150)  # more than one task of a thread
    store = pack_images(tmp_path / "rgb")
    assert store.images.shape == (150, 32, 32, 3)
    for image, file in zip(store.images, sorted((tmp_path / "rgb").iterdir()), strict=True):
        assert np.abs(image - read_with_pillow(file)).max() <= 1
    np.testing.assert_array_equal(store.intrinsics, make_cameras(150).astype(np.float32))
    assert store.intrinsics.dtype == np.float32


def test_a_grey_jpeg_becomes_rgb(images):
    Image.fromarray(np.full((32, 32), 90, np.uint8)).save(images / "00000002.jpg")
    assert np.abs(pack_images(images).images[2].astype(int) - 90).max() <= 1


@pytest.mark.parametrize("image_size", [48, 96, 144])
def test_a_projected_point_stays_on_its_spot_of_the_image(tmp_path, image_size):
    """The centroid of a painted spot, pixel centres at integers, is where the packed camera projects its 3-D point."""
    intrinsics = np.array([[[200.0, 0, 45.3], [0, 190.0, 51.2], [0, 0, 1]]])
    point = np.array([0.02, -0.05, 0.6])
    u, v, _ = intrinsics[0] @ point / point[2]
    rows, columns = np.mgrid[:96, :96]
    spot = 255 * np.exp(-((columns - u) ** 2 + (rows - v) ** 2) / (2 * 5.0**2))
    (tmp_path / "rgb").mkdir()
    write_jpeg(tmp_path / "rgb/0.jpg", np.repeat(spot.round().astype(np.uint8)[..., None], 3, axis=2))
    store = pack(annotate(tmp_path / "rgb", intrinsics), image_size=image_size, folder=tmp_path, progress=False)
    weight = store.images[0, ..., 0].astype(float)
    weight[weight < 8] = 0
    rows, columns = np.mgrid[:image_size, :image_size]
    seen = np.array([(weight * columns).sum(), (weight * rows).sum()]) / weight.sum()
    projected = (store.intrinsics[0].astype(float) @ point / point[2])[:2]
    np.testing.assert_allclose(seen, projected, atol=0.06)


def test_resized_intrinsics_follow_the_pixel_centres():
    halved = resize_intrinsics(np.array([[[100.0, 2, 111.5], [0, 90, 0.5], [0, 0, 1]]]), np.array([0.5]))
    np.testing.assert_array_equal(halved, [[[50, 1, 55.5], [0, 45, 0], [0, 0, 1]]])


def test_shrinking_does_not_alias(images):
    chequers = np.indices((32, 32)).sum(axis=0) % 2 * 255
    write_jpeg(images / "00000000.jpg", np.repeat(chequers[..., None], 3, axis=2).astype(np.uint8))
    inner = pack_images(images, image_size=16).images[0, 2:-2, 2:-2].astype(float)
    assert np.abs(inner - 127.5).max() < 8


def test_images_of_several_sizes_get_each_their_own_camera(images):
    write_jpeg(images / "00000004.jpg", np.full((64, 64, 3), 200, np.uint8))
    store = pack_images(images, image_size=16)
    np.testing.assert_allclose(store.intrinsics[3, 0, 0], make_cameras(5)[3, 0, 0] / 2, rtol=1e-6)
    np.testing.assert_allclose(store.intrinsics[4, 0, 0], make_cameras(5)[4, 0, 0] / 4, rtol=1e-6)


def test_a_store_is_made_once(images, monkeypatch):
    first = pack_images(images)
    decodes_no_more = pack_module._IMAGES._replace(decode=lambda path: pytest.fail(f"decoded {path} again"))
    monkeypatch.setattr(pack_module, "_IMAGES", decodes_no_more)
    second = pack_images(images)
    assert second.store == first.store
    np.testing.assert_array_equal(second.images, first.images)


def test_labels_may_change_without_packing_again(images):
    folder = images.parent / "packed"
    first = pack_images(images)
    second = pack(annotate(images, 2 * make_cameras(5)), image_size=None, folder=folder, progress=False)
    assert second.store == first.store
    np.testing.assert_array_equal(second.intrinsics, 2 * first.intrinsics)


def test_a_changed_file_gets_a_new_store(images):
    first = pack_images(images)
    write_jpeg(images / "00000001.jpg", np.full((32, 32, 3), 7, np.uint8))
    second = pack_images(images)
    assert second.store != first.store
    assert second.contents != first.contents
    assert np.abs(second.images[1].astype(int) - 7).max() <= 1


def test_a_file_of_the_same_size_that_was_written_later_gets_a_new_store(images):
    first = pack_images(images)
    stat = (images / "00000001.jpg").stat()
    os.utime(images / "00000001.jpg", ns=(stat.st_atime_ns, stat.st_mtime_ns + 1_000_000_000))
    assert pack_images(images).store != first.store


def test_another_image_size_gets_another_store(images):
    assert len({pack_images(images, size).store for size in (None, 16, 24)}) == 3


def test_a_moved_data_set_keeps_its_store(images, tmp_path):
    first = pack_images(images)
    images.rename(tmp_path / "moved")
    assert pack_images(tmp_path / "moved").store == first.store


def test_a_copy_has_the_same_contents_whatever_its_times(images, tmp_path):
    shutil.copytree(images, tmp_path / "copy", copy_function=shutil.copyfile)
    os.utime(tmp_path / "copy/00000000.jpg", (0, 0))
    assert pack_images(tmp_path / "copy").contents == pack_images(images).contents


@pytest.mark.parametrize(
    "break_it",
    [
        lambda store: os.truncate(store / "images.npy", 1000),
        lambda store: (store / "images.npy").unlink(),
        lambda store: (store / "sides.npy").write_bytes(b""),
        lambda store: (store / "sides.npy").unlink(),
        lambda store: (store / "manifest.json").unlink(),
        lambda store: (store / "manifest.json").write_text("{"),
        lambda store: (store / "manifest.json").write_text("[]"),
    ],
)
def test_a_broken_store_is_made_again(images, break_it):
    first = pack_images(images)
    whole = first.images.copy()
    break_it(first.store)
    second = pack_images(images)
    assert second.store == first.store
    np.testing.assert_array_equal(second.images, whole)


def test_what_a_killed_process_left_is_in_nobodys_way(images):
    store = pack_images(images).store
    shutil.rmtree(store)
    (store.parent / f".{store.name}.partial").mkdir()
    (store.parent / f".{store.name}.partial/images.npy").write_bytes(b"half")
    assert len(pack_images(images).images) == 5
    assert [path for path in store.parent.iterdir() if path.is_dir()] == [store]


def test_of_many_callers_at_once_one_packs(images, monkeypatch):
    decoded = []
    kind = pack_module._IMAGES
    counted = kind._replace(decode=lambda path: (decoded.append(path), kind.decode(path))[1])
    monkeypatch.setattr(pack_module, "_IMAGES", counted)
    with ThreadPoolExecutor(4) as pool:
        stores = list(pool.map(lambda _: pack_images(images, 16), range(4)))
    assert len(decoded) == 5
    for store in stores:
        np.testing.assert_array_equal(store.images, stores[0].images)


def test_a_store_travels_to_another_process_as_its_path(images):
    store = pack_images(images)
    carried = pickle.dumps(store)
    assert len(carried) < store.images.nbytes
    np.testing.assert_array_equal(pickle.loads(carried).images, store.images)
    np.testing.assert_array_equal(pickle.loads(carried).intrinsics, store.intrinsics)


def test_packed_images_cannot_be_written(images):
    with pytest.raises(ValueError, match="read-only"):
        pack_images(images).images[0] = 0


def cut_short(path: Path) -> None:
    path.write_bytes(path.read_bytes()[:-20])


def write_png(path: Path) -> None:
    Image.new("RGB", (32, 32)).save(path, format="png")


@pytest.mark.parametrize(
    ("break_it", "words"),
    [
        (cut_short, ["00000003.jpg", "cannot be decoded as a JPEG", "remature end"]),
        (write_png, ["00000003.jpg", "cannot be decoded as a JPEG"]),
        (lambda path: path.write_bytes(b""), ["00000003.jpg", "cannot be decoded as a JPEG"]),
        (lambda path: (path.unlink(), path.symlink_to("nowhere")), ["00000003.jpg", "cannot be read"]),
        (lambda path: write_jpeg(path, np.zeros((32, 24, 3), np.uint8)), ["00000003.jpg", "24 x 32", "square"]),
        (
            lambda path: write_jpeg(path, np.zeros((64, 64, 3), np.uint8)),
            ["00000000.jpg is 32 x 32", "00000003.jpg is 64 x 64", "data.image_size"],
        ),
    ],
)
def test_a_bad_image_is_told_with_its_path_and_leaves_no_store(images, break_it, words):
    break_it(images / "00000003.jpg")
    with pytest.raises(UserError) as error:
        pack_images(images)
    message = str(error.value)
    assert not [word for word in words if word not in message], message
    assert "\n" not in message
    assert not [path for path in images.parent.glob("packed/*") if path.is_dir()]


def write_orientation(path: Path, orientation: int) -> None:
    exif = Image.Exif()
    exif[0x0112] = orientation
    with Image.open(path) as picture:
        picture.save(path, quality=98, exif=exif)


@pytest.mark.parametrize("orientation", range(2, 9))
def test_an_image_that_is_to_be_turned_is_refused_with_its_path_and_a_remedy(images, orientation):
    write_orientation(images / "00000003.jpg", orientation)
    with pytest.raises(UserError, match=rf"00000003\.jpg has the EXIF orientation {orientation},.*remove the tag"):
        pack_images(images)


def test_other_exif_data_do_not_matter(images):
    plain = pack_images(images).images[3].copy()
    with Image.open(images / "00000003.jpg") as picture:
        exif = Image.Exif()
        exif[0x0112], exif[0x010F] = 1, "a maker"
        picture.save(images / "00000003.jpg", quality="keep", exif=exif)
    np.testing.assert_array_equal(pack_images(images).images[3], plain)


def test_a_pack_folder_that_cannot_be_made_is_told(images, tmp_path):
    (tmp_path / "file").touch()
    with pytest.raises(UserError, match=r"packed in .*file/packed .*set paths.packed"):
        pack(annotate(images), image_size=None, folder=tmp_path / "file/packed", progress=False)


def test_too_small_a_disk_is_told_before_packing(images, monkeypatch):
    usage = namedtuple("usage", "total used free")
    monkeypatch.setattr(shutil, "disk_usage", lambda folder: usage(10**9, 10**9, 10_000))
    with pytest.raises(UserError, match=r"5 images of 1000 px needs 15 MB but .* has 10 kB free; .*paths.packed"):
        pack_images(images, image_size=1000)


def test_a_disk_that_fills_up_while_packing_is_told(images, monkeypatch):
    def full(*args: object, **options: object) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(np.lib.format, "open_memmap", full)
    with pytest.raises(UserError, match=r"No space left on device.*set paths.packed"):
        pack_images(images)
    assert not [path for path in images.parent.glob("packed/*") if path.is_dir()]


def test_a_store_in_a_folder_that_cannot_be_written_is_used(images, monkeypatch):
    first = pack_images(images)
    monkeypatch.setattr(pack_module, "hold_write_lock", lambda *args, **more: pytest.fail("asked for the lock"))
    assert pack_images(images).store == first.store


def test_an_image_size_of_nothing_is_told(images):
    with pytest.raises(UserError, match=r"data.image_size=0 must be positive"):
        pack_images(images, image_size=0)


def test_files_are_decoded_by_as_many_threads_as_the_container_has_cores(images, monkeypatch):
    pools = []

    class Pool(ThreadPoolExecutor):
        def __init__(self, num_threads, *arguments, **more):
            pools.append(num_threads)
            super().__init__(num_threads, *arguments, **more)

    monkeypatch.setattr(pack_module, "ThreadPoolExecutor", Pool)
    monkeypatch.setattr(os, "cpu_count", lambda: 64)
    monkeypatch.setattr(os, "sched_getaffinity", lambda pid: {0}, raising=False)
    pack_images(images)
    assert pools[-1] == 1


def test_packing_says_one_line_where_stderr_is_no_terminal(images, capsys):
    pack(annotate(images), image_size=None, folder=images.parent / "packed")
    said = capsys.readouterr()
    assert said.out == ""
    assert said.err.count("\n") == 1
    assert "Packed 5 images of 32 px" in said.err
    pack(annotate(images), image_size=None, folder=images.parent / "packed")
    assert capsys.readouterr().err == ""


def test_a_header_that_claims_a_huge_image_is_told_with_the_file(images):
    file = images / "00000002.jpg"
    content = file.read_bytes()
    frame = content.index(b"\xff\xc0")  # start of frame: length, precision, height, width
    file.write_bytes(content[: frame + 5] + struct.pack(">HH", 65500, 65500) + content[frame + 9 :])
    with pytest.raises(UserError, match=r"00000002\.jpg has 65500 x 65500 pixels according to its header"):
        pack_images(images, 32)
    assert not list(images.parent.glob("packed/*/"))


def test_a_folder_that_another_user_has_made_in_a_public_place_is_refused(images, monkeypatch):
    """Its images, or the links in it, would be that user's."""
    public = images.parent / "public"
    (public / "me" / "packed").mkdir(parents=True)
    public.chmod(0o1777)
    folder = public / "me" / "packed"
    pack(annotate(images), image_size=32, folder=folder, progress=False)
    owner, is_root = (public / "me").stat().st_uid, os.getuid() == 0
    if is_root:
        os.chown(public / "me", 4321, -1)
    else:
        monkeypatch.setattr(os, "getuid", lambda: owner + 1)
    with pytest.raises(UserError, match=r"public/me belongs to another user"):
        pack(annotate(images), image_size=32, folder=folder, progress=False)
    public.chmod(0o755)  # a folder that colleagues share
    pack(annotate(images), image_size=32, folder=folder, progress=False)
