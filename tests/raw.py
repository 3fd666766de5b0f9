"""Raw datasets made for tests: small files in the public formats, with numbers that a test knows."""
import struct
import sys
from pathlib import Path

import cv2
import h5py
import numpy as np

from readers.virtual_kitti_2 import VirtualKitti2

rng = np.random.default_rng(0)


def write(path, x):
    """Images and arrays by suffix; three channels are given as RGB."""
    path.parent.mkdir(parents=True, exist_ok=True)
    x = np.asarray(x)
    if path.suffix in (".png", ".jpg", ".exr"):
        assert cv2.imwrite(str(path), x[..., ::-1] if x.ndim == 3 else x)
    elif path.suffix == ".npy":
        np.save(path, x)
    elif path.suffix == ".hdf5":
        with h5py.File(path, "w") as f:
            f.create_dataset("dataset", data=x, compression="gzip")
    elif path.suffix == ".flo":
        path.write_bytes(struct.pack("<fii", 202021.25, x.shape[1], x.shape[0]) + x.astype("<f4").tobytes())
    elif path.suffix == ".pfm":
        path.write_bytes(b"Pf\n%d %d\n-1.0\n" % (x.shape[1], x.shape[0]) + x[::-1].astype("<f4").tobytes())
    return path


def picture(h, w, seed=0):
    return np.random.default_rng(seed).integers(0, 256, (h, w, 3), dtype=np.uint8)


def two_frames(h, w, f, cx, cy):
    """A random surface and its rigid motion, projected with the textbook formula -> flow (H,W,2), z0, z1, motion."""
    v, u = np.mgrid[:h, :w].astype(float)
    z0 = 14 + 4 * np.sin(u / w * 5) + 3 * np.cos(v / h * 4)
    x0 = np.stack([(u - cx) * z0 / f, (v - cy) * z0 / f, z0], -1)
    turn = cv2.Rodrigues(np.array([0.01, -0.02, 0.015]))[0]
    x1 = x0 @ turn.T + (0.2, -0.1, 0.5)
    flow = np.stack([f * x1[..., 0] / x1[..., 2] + cx - u, f * x1[..., 1] / x1[..., 2] + cy - v], -1)
    return flow, z0, x1[..., 2], x1 - x0


def hypersim(root, frames=(("ai_001_001", "cam_00", 0, "train"),), depth_nan=(), scale=2.0, h=12, w=16):
    """A wall seen frontally at 5 m; entity -1 in the first row; normals of the left half face away from the camera."""
    folder = root / "hypersim"
    rows = ["scene_name,camera_name,frame_id,included_in_public_release,exclude_reason,split_partition_name"]
    f = 886.81 * w / 1024
    y, x = np.mgrid[:h, :w] - np.array([(h - 1) / 2, (w - 1) / 2])[:, None, None]
    for scene, camera, frame, split in frames:
        rows.append(f"{scene},{camera},{frame},True,,{split}")
        entity = np.ones((h, w), np.int16)
        entity[0] = -1
        distance = (5 * np.sqrt(x * x + y * y + f * f) / f).astype(np.float16)
        if (scene, camera, frame) in depth_nan:
            distance[5, 5] = np.nan
        reflectance = np.full((h, w, 3), (0.2, 0.4, 0.1), np.float16)
        reflectance[3, 3] = 0.001
        normal = np.tile(np.float16([0, 0, 1]), (h, w, 1))  # to the viewer
        normal[:, :w // 2] *= -1                             # stored facing away
        normal[4, 4] = 0
        point = np.tile(np.float16([0, 0, -5 * 10]), (h, w, 1))  # asset units; the camera looks along -z of the world
        point[6, 6] = np.nan
        final, geometry = (folder / scene / "images" / f"scene_{camera}_{k}_hdf5" for k in ("final", "geometry"))
        for what, value in {"color": reflectance * np.float16(scale), "diffuse_reflectance": reflectance}.items():
            write(final / f"frame.{frame:04d}.{what}.hdf5", value)
        for what, value in {"render_entity_id": entity, "depth_meters": distance, "normal_cam": normal,
                            "normal_world": normal, "position": point}.items():
            write(geometry / f"frame.{frame:04d}.{what}.hdf5", value)
        write(folder / scene / "_detail" / camera / "camera_keyframe_positions.hdf5", np.zeros((frame + 1, 3)))
    rows += ["ai_001_001,cam_00,7,False,bad,train", "ai_999_001,cam_00,0,True,,train"]  # not public; not downloaded
    (folder / "metadata_images_split_scene_v1.csv").write_text("\n".join(rows))
    return folder


def virtual_kitti(root, top="", frames=3, h=16, w=11, scenes=("Scene02",), variations=("clone", "fog")):
    """-> {(variation, camera, frame): class numbers (H,W)}. top: a folder that each archive brings along."""
    colours, made = list(VirtualKitti2.colours), {}
    places = [(s, v, c, t) for s in scenes for v in variations for c in (0, 1) for t in range(frames)]
    for scene, variation, camera, t in places:
        def at(kind, file, where=(scene, variation), below=f"Camera_{camera}"):
            return root.joinpath("virtual_kitti_2", top.format(kind), *where, "frames", kind, below, file)

        write(at("rgb", f"rgb_{t:05d}.jpg"), np.full((h, w, 3), (200, 100, 10 * t), np.uint8))
        z = np.full((h, w), 1234, np.uint16)
        z[0], z[1], z[2] = 65535, 8000, 7999
        write(at("depth", f"depth_{t:05d}.png"), z)
        made[variation, camera, t] = rng.integers(0, len(colours), (h, w))
        write(at("classSegmentation", f"classgt_{t:05d}.png"), np.uint8(colours)[made[variation, camera, t]])
        if t < frames - 1:
            flow = np.empty((h, w, 3), np.uint16)
            flow[:] = 49151, 21845, 1  # 0.5 of W-1 right, a third of H-1 up
            flow[0] = 7, 9, 0          # sky
            write(at("forwardFlow", f"flow_{t:05d}.png"), flow)
            motion = np.tile(np.uint16([65535, 32768, 0]), (h, w, 1))
            write(at("forwardSceneFlow", f"sceneFlow_{t:05d}.png"), motion)
    return made


def kitti_eigen(root, sizes, level="val/", top=""):
    """Images of these sizes with depth -> their keys."""
    keys = []
    for k, (h, w) in enumerate(sizes):
        date, frame = f"2011_09_2{6 + k}", f"{10 + k:010d}"
        drive = f"{date}_drive_0010_sync"
        write(root / f"kitti_eigen/{top}{date}/{drive}/image_02/data/{frame}.png", picture(h, w, k))
        z = np.full((h, w), 2560 + k, np.uint16)
        z[200] = 0
        z[210] = 80 * 256
        write(root / f"kitti_eigen/{top}{level}{drive}/proj_depth/groundtruth/image_02/{frame}.png", z)
        keys.append((date, drive, frame))
    return keys


def kitti_2015(root, h=375, w=1242, scene="000010", f=721.5, cx=609.6, cy=172.9, baseline=0.5327):
    """-> flow, motion and the stored code of the flow."""
    top = root / "kitti_2015/training"
    flow, z0, z1, motion = two_frames(h, w, f, cx, cy)
    code = np.dstack([np.round(flow * 64) + 32768, np.ones((h, w))]).astype(np.uint16)
    code[100, :, 2] = 0
    d0, d1 = (np.round(f * baseline / z * 256).astype(np.uint16) for z in (z0, z1))
    d0[150], d1[160] = 0, 0
    write(top / f"flow_occ/{scene}_10.png", code)
    write(top / f"disp_occ_0/{scene}_10.png", d0)
    write(top / f"disp_occ_1/{scene}_10.png", d1)
    write(top / f"image_2/{scene}_10.png", picture(h, w, 1))
    write(top / f"image_2/{scene}_11.png", picture(h, w, 2))
    rows = [f"P_rect_0{c}: {f} 0 {cx} {x} 0 {f} {cy} 0.2 0 0 1 0.003" for c, x in ((2, 44.9), (3, 44.9 - f * baseline))]
    (top / "calib_cam_to_cam").mkdir(parents=True, exist_ok=True)
    text = "\n".join(["calib_time: 09-Jan-2012 13:57:47", "S_rect_02: 1 2", *rows])
    (top / f"calib_cam_to_cam/{scene}.txt").write_text(text)
    return flow, motion, code


def own_folder(root, n=2, h=6, w=8):
    """n samples p0, p1, ... with all labels as arrays -> {task: array}, classes left out."""
    values = {"normal": np.tile(np.float32([0, 0.6, 0.8]), (h, w, 1)),
              "depth": np.arange(h * w, dtype=np.float32).reshape(h, w), "scene_flow": rng.normal(size=(h, w, 3)),
              "shading": rng.uniform(size=(h, w)), "albedo": rng.uniform(size=(h, w, 3)),
              "optical_flow": rng.normal(size=(h, w, 2)).astype(np.float32)}
    ids = np.array([*range(8), 255], np.uint8)[np.arange(h * w).reshape(h, w) % 9]
    for i in range(n):
        write(root / f"images/p{i}.png", picture(h, w, i))
        write(root / f"next/p{i}.png", picture(h, w, i + 50))
        write(root / f"semantic/p{i}.png", ids)
        for task, x in values.items():
            write(root / f"{task}/p{i}.{'flo' if task == 'optical_flow' else 'npy'}", x)
    return values


def main(root):
    """Small trees of three datasets for tools/fullsize.py."""
    hypersim(root)
    virtual_kitti(root, variations=("clone",))
    kitti_2015(root)


if __name__ == "__main__":
    main(Path(sys.argv[1]))
