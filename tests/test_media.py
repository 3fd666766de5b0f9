"""Photos, animations and videos in the wild: what can be read is read as it was stored, the rest is named."""
import struct

import numpy as np
import pytest
from PIL import Image, ImageOps
from raw import write

from readers.folder import Folder
from readers.media import frame_reader, read_animation, read_image, read_video

rng = np.random.default_rng(0)


def noise(height, width):
    return Image.fromarray(rng.integers(0, 256, (height, width, 3), np.uint8))


# ---- images ----

def test_modes_become_rgb(tmp_path):
    """Grey, palette, 1-bit, CMYK and RGB files give the colours that were stored; transparency is put on white."""
    grey = np.array([[0, 128, 255]], np.uint8)
    expected = np.repeat(grey[..., None], 3, 2).astype(int)
    for name in ("L.png", "P.png", "RGB.png", "CMYK.tif", "L.bmp", "L.pgm"):
        mode = name.split(".")[0]
        rgb = Image.fromarray(grey).convert("RGB")
        rgb.convert(mode, palette=Image.Palette.ADAPTIVE).save(tmp_path / name)
        assert np.abs(read_image(tmp_path / name) - expected).max() <= 1, name
    Image.fromarray(grey).convert("1", dither=Image.Dither.NONE).save(tmp_path / "1.png")
    assert read_image(tmp_path / "1.png")[0, :, 0].tolist() == [0, 255, 255]
    for mode in ("RGBA", "LA"):
        image = Image.fromarray(grey).convert(mode)
        image.putalpha(Image.fromarray(np.array([[255, 0, 255]], np.uint8)))
        image.save(tmp_path / "a.png")
        assert read_image(tmp_path / "a.png")[0, :, 1].tolist() == [0, 255, 255], mode
    palette = Image.fromarray(grey).convert("RGB").quantize(4)
    palette.save(tmp_path / "t.png", transparency=palette.getpixel((0, 0)))
    assert read_image(tmp_path / "t.png")[0, :, 2].tolist() == [255, 128, 255]


def test_16_bit_grey_is_scaled(tmp_path):
    """16-bit grey uses its full range: 65535 is white, 257 * n is n, in PNG and TIFF; floating point is refused."""
    for name in ("deep.png", "deep.tif"):
        Image.fromarray(np.array([[0, 257 * 77, 65535]], np.uint16)).save(tmp_path / name)
        assert read_image(tmp_path / name)[0, :, 0].tolist() == [0, 77, 255]
    Image.fromarray(np.ones((2, 2), np.float32)).save(tmp_path / "float.tif")
    with pytest.raises(ValueError, match=r"float\.tif.*16-bit"):
        read_image(tmp_path / "float.tif")


@pytest.mark.parametrize("orientation", range(1, 9))
def test_photos_are_turned_upright(tmp_path, orientation):
    """Each of EXIF's orientations gives the picture that Pillow's own exif_transpose gives."""
    exif = Image.Exif()
    exif[0x0112] = orientation
    noise(4, 8).save(tmp_path / "x.png", exif=exif)
    with Image.open(tmp_path / "x.png") as stored:
        expected = np.array(ImageOps.exif_transpose(stored))
    assert np.array_equal(read_image(tmp_path / "x.png"), expected)
    assert expected.shape == ((4, 8, 3) if orientation < 5 else (8, 4, 3))


def exif_bytes(*entries):
    """EXIF with entries (tag, type, count, four bytes)."""
    body = b"".join(struct.pack("<HHI", tag, kind, count) + value for tag, kind, count, value in entries)
    return b"Exif\0\0II*\0" + struct.pack("<IH", 8, len(entries)) + body + bytes(4)


@pytest.mark.parametrize("odd", [(0x011A, 2, 4, b"abc\0"), (0x8769, 4, 1, b"\xff\xff\0\0"), (0x0132, 99, 1, bytes(4))])
def test_only_the_orientation_matters(tmp_path, recwarn, odd):
    """A photo that is to be turned was refused over another, odd entry of its EXIF: all entries were encoded again."""
    turned = (0x0112, 3, 1, struct.pack("<HH", 6, 0))
    noise(4, 8).save(tmp_path / "x.jpg", exif=exif_bytes(turned, odd))
    assert read_image(tmp_path / "x.jpg").shape == (8, 4, 3)
    noise(4, 8).save(tmp_path / "y.jpg", exif=b"Exif\0\0nonsense")
    assert read_image(tmp_path / "y.jpg").shape == (4, 8, 3)
    assert not recwarn


def test_broken_files_are_named(tmp_path, monkeypatch):
    """Missing, empty, cut-off, not-an-image and dangerously large files: one sentence each, with the file's name."""
    noise(64, 64).save(tmp_path / "cut.png")
    (tmp_path / "cut.png").write_bytes((tmp_path / "cut.png").read_bytes()[:2000])
    (tmp_path / "empty.jpg").touch()
    (tmp_path / "text.jpg").write_text("this is no image")
    for name in ("cut.png", "empty.jpg", "text.jpg"):
        with pytest.raises(ValueError, match=name) as caught:
            read_image(tmp_path / name)
        assert "\n" not in str(caught.value)
    with pytest.raises(FileNotFoundError, match=r"absent\.png"):
        read_image(tmp_path / "absent.png")
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 100)
    for size in ((11, 10), (40, 40)):       # Pillow's warning, and its error
        noise(*size).save(tmp_path / "large.png")
        with pytest.raises(ValueError, match=r"large\.png.*100 pixels"):
            read_image(tmp_path / "large.png")


# ---- animations and videos ----

@pytest.mark.parametrize("name", ["x.gif", "x.webp", "x.png"])
def test_animations(tmp_path, name):
    """All frames of an animated GIF, WebP or PNG come with their numbers and colours; a still one is an image."""
    frames = [Image.new("RGB", (12, 10), (80 * i, 0, 255 - 80 * i)) for i in range(4)]
    exactly = {"lossless": True} if name == "x.webp" else {}
    frames[0].save(tmp_path / name, save_all=True, append_images=frames[1:], **exactly)
    assert frame_reader(tmp_path / name) is read_animation
    for stride in (1, 3):
        read = list(read_animation(tmp_path / name, stride))
        assert [i for i, _ in read] == list(range(0, 4, stride))
        for i, frame in read:
            assert np.abs(frame[0, 0].astype(int) - (80 * i, 0, 255 - 80 * i)).max() <= 3
    frames[0].save(tmp_path / name)
    assert frame_reader(tmp_path / name) is None


@pytest.mark.parametrize("name", ["x.gif", "x.png"])
def test_a_damaged_animation_gives_what_can_be_read(tmp_path, name):
    """A cut-off animation ends in a sentence after the frames that are whole, not in a traceback before the first."""
    frames = [noise(40, 60) for _ in range(10)]
    frames[0].save(tmp_path / name, save_all=True, append_images=frames[1:])
    data = (tmp_path / name).read_bytes()
    (tmp_path / name).write_bytes(data[:int(0.6 * len(data))])
    read = []
    with pytest.raises(ValueError, match=f"{name} cannot be read"):
        read.extend(i for i, _ in read_animation(tmp_path / name))
    assert read == list(range(len(read))) and 4 <= len(read) <= 6


@pytest.fixture
def video(tmp_path):
    """A function that writes n noisy frames to a video; -> its path."""
    cv2 = pytest.importorskip("cv2")

    def make(n, name="clip.avi"):
        writer = cv2.VideoWriter(str(tmp_path / name), cv2.VideoWriter_fourcc(*"MJPG"), 10, (48, 32))
        if not writer.isOpened():
            pytest.skip("this OpenCV cannot write MJPG")
        for _ in range(n):
            writer.write(rng.integers(0, 256, (32, 48, 3), np.uint8))
        writer.release()
        return tmp_path / name
    return make


@pytest.mark.parametrize("name", ["clip.avi", "clip.mkv"])
def test_a_damaged_video_is_not_silently_short(video, name):
    """A video cut at 60% ended after about half of its frames as if that were all of them."""
    path = video(30, name)
    assert [i for i, _ in read_video(path, 7)] == [0, 7, 14, 21, 28]
    path.write_bytes(path.read_bytes()[:int(0.6 * path.stat().st_size)])
    read = []
    with pytest.raises(ValueError, match=rf"{name} is damaged, \d\d of 30 frames could be read"):
        read.extend(i for i, _ in read_video(path))
    assert read == list(range(len(read))) and 10 < len(read) < 20


@pytest.mark.parametrize("declared", [4, 5, 7, 8, -9e16, 0])
def test_a_declared_number_of_frames_may_be_an_estimate(video, monkeypatch, declared):
    """Containers that state a duration are off by a frame or two, and some state nothing."""
    path = video(5)
    cv2 = pytest.importorskip("cv2")

    class Estimating:
        def __init__(self, path):
            self.video = real(path)

        def read(self):
            return self.video.read()

        def get(self, key):
            assert key == cv2.CAP_PROP_FRAME_COUNT
            return declared

    real = cv2.VideoCapture
    monkeypatch.setattr(cv2, "VideoCapture", Estimating)
    frames = read_video(path)
    assert [next(frames)[0] for _ in range(5)] == [0, 1, 2, 3, 4]
    if declared == 8:
        with pytest.raises(ValueError, match="5 of 8 frames"):
            next(frames)
    else:
        assert next(frames, None) is None


def test_what_is_no_video_is_named(tmp_path):
    """A file that does not decode at all."""
    pytest.importorskip("cv2")
    (tmp_path / "x.mp4").write_bytes(b"no video" * 99)
    with pytest.raises(ValueError, match=r"x\.mp4 cannot be decoded as a video"):
        next(read_video(tmp_path / "x.mp4"))


def test_training_reads_images_as_prediction_does(tmp_path):
    """What is transparent is on white for both. (Training saw what lay beneath.) 16 bits become 8 alike."""
    rgba = np.full((20, 30, 4), 9, np.uint8)
    rgba[:5, :, 3], rgba[5:10, :, 3] = 0, 255
    for i, pixels in enumerate((rgba, np.arange(600, dtype=np.uint16).reshape(20, 30) * 109)):
        write(tmp_path / f"depth/{i}.npy", np.ones((20, 30)))
        (tmp_path / "images").mkdir(exist_ok=True)
        Image.fromarray(pixels).save(tmp_path / f"images/{i}.png")
    reader = Folder(tmp_path, "train")
    for i in range(2):
        assert np.array_equal(reader.load(i, [])["image"], read_image(tmp_path / f"images/{i}.png"))
    assert reader.load(0, [])["image"][[0, 7], 0, 0].tolist() == [255, 9]
