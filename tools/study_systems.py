"""The suite "systems" of tools.study: StableMTL, the other systems of the papers (docs/systems.md) and label discovery
in one table.

Every row that starts from nothing sees --steps times --batch images, and so does a student, whose teacher saw as many
before; each row says how many that is, and how many labels: a step of another system takes every label an image has.
There are two zero lines, which nothing mixes: the UNet's single-task models for all rows, and the trunk's for what is
built on it (what each paper claims of its own method).
"""
from readers.toyworld import ALL
from tasks import TASKS
from tools.study_variants import Claim, Suite, Variant, Zero

THREE = "semantic,normal,depth"         # all that the original JTR and DiffusionMTL know
GEOMETRY, INTRINSIC = "normal,depth", "shading,albedo"
STILL = ",".join(t for t in ALL if TASKS[t].frames == 1)      # learned whether or not motion has left its plateau
CLASSES = ",".join(t for t in ALL if TASKS[t].categorical)
DEPTH = ",".join(t for t in ALL if TASKS[t].dense_loss == "scale-shift")
DDIM_STEPS = 10     # of a prediction; each costs what a prediction of the others costs
PIXEL, DIFFUSE = "--stage 1 --space pixel", f"--objective diffuse --ddim-steps {DDIM_STEPS}"
SCRATCH = "--widths 32,32,48,64"        # a UNet as wide as the toy base's, with random weights
GENERALIST = f"{PIXEL} {DIFFUSE} --condition features"


# ---- rows ----

def trunk(title, flags, parent="", length="", tasks=""):
    """A system built on the trunk (baselines/), a student's parent being its teacher. Nothing is encoded, so the cache
    has images."""
    teacher = " --teacher {parent}" if parent else ""
    return Variant(title, f"--stage 1 --system {flags}{teacher}", parent, length=length or "whole", tasks=tasks,
                   cache="cache-images")


def with_truth(title, system, parent=""):
    """A trunk that is given the labels there could be to discover; they are in its cache."""
    return trunk(title, f"{system} --discover true", parent)._replace(cache="cache-truth")


def student(title, flags, parent="labels"):
    """A single stream that learns discovered labels as well."""
    return Variant(title, f"--stage 1 --pseudo {{parent}}/labels --pseudo-mask {flags}", parent, length="whole")


def generalist(title, flags, seen="cache-features"):
    """A single stream of the Generalist's axes; rows of the same cache see images and label them alike."""
    return Variant(title, flags, cache=seen)


VARIANTS = {
    # trunks: no row but their own needs them
    "stl": trunk("STL trunk", "stl"),
    "mtl": trunk("MTL", "mtl"),
    "mtl-twice": trunk("MTL, twice the steps", "mtl --discover light", length="twice"),
    "mtl-pseudo": trunk("MTL + naive pseudo labels", "mtl", "mtl"),
    "jtr-3": trunk("JTR, 3 tasks", "jtr", tasks=THREE),
    "jtr": trunk("JTR", "jtr"),
    "diffusionmtl-3": trunk("DiffusionMTL, 3 tasks", "diffusionmtl", tasks=THREE),
    "diffusionmtl": trunk("DiffusionMTL", "diffusionmtl"),
    "hitts": trunk("HiTTs w/o discovery", "hitts"),
    "hitts-features": trunk("HiTTs + features", "hitts --discover features", "hitts"),
    "hitts-labels": trunk("HiTTs + labels", "hitts --discover labels", "hitts"),
    "hitts-both": trunk("HiTTs + both", "hitts --discover both", "hitts"),
    # UNets, which start from a base that has seen images before; but one, to tell how much that is worth
    "single-task": Variant("single-task UNets", "--stage 1 --tasks {task}"),
    "single": Variant("StableMTL-S", "--stage 1"),
    "single-scratch": Variant("StableMTL-S from scratch", f"--stage 1 {SCRATCH}"),
    "single-3": Variant("StableMTL-S, 3 tasks", "--stage 1", tasks=THREE),
    "multi": Variant("StableMTL", "--stage 2 --rho 0.4", "single"),
    "labels": Variant("labels by StableMTL-S", "--to {out}/labels", "single", "tools.discover"),
    "pseudo-all": student("StableMTL-S + labels, all", "none"),
    "pseudo-half": student("StableMTL-S + labels, surest half", "half"),
    "pseudo-weighted": student("StableMTL-S + labels, weighted", "weighted"),
    "truth": Variant("true labels in their place", "--truth --to {out}/labels", "single", "tools.discover"),
    "pseudo-true": student("StableMTL-S + true labels", "none", "truth"),
    # the Generalist's axes, one at a time: space, objective, then condition
    "pixel-regress": generalist("pixel, regress", PIXEL, "cache-pixel"),
    "latent-diffuse": generalist("latent, diffuse", f"--stage 1 {DIFFUSE}", "cache"),
    "pixel-diffuse": generalist("pixel, diffuse", f"{PIXEL} {DIFFUSE}", "cache-pixel"),
    "generalist": generalist("Generalist: pixel, diffuse, features", GENERALIST),
    # named by --only alone
    "stl-pseudo": trunk("STL trunk + naive pseudo labels", "stl", "stl"),
    "mtl-true": with_truth("MTL + true labels", "mtl"),
    "hitts-no-oe": trunk("HiTTs w/o orthogonal embedding", "hitts --options oe=no"),
    "hitts-no-inter": trunk("HiTTs w/o inter-task attention", "hitts --options inter=no"),
    "hitts-no-intra": trunk("HiTTs w/o intra-task attention", "hitts --options intra=no"),
    "hitts-twice": trunk("HiTTs w/o discovery, twice the steps", "hitts --discover light", length="twice"),
    "hitts-true": with_truth("HiTTs + both, true labels", "hitts", "hitts"),
    "diffusionmtl-own": trunk("DiffusionMTL, own condition", "diffusionmtl --options condition=own"),
    "diffusionmtl-maps": trunk("DiffusionMTL of predictions", "diffusionmtl --options diffuse=predictions"),
    "single-twice": Variant("StableMTL-S, twice the steps", "--stage 1", length="twice"),
    "raw": generalist("Generalist, raw frames", f"{PIXEL} {DIFFUSE} --condition raw"),
    "scratch": generalist("Generalist from scratch", f"{GENERALIST} {SCRATCH}"),
    "scale-0.1": generalist("Generalist, b = 0.1", f"{GENERALIST} --input-scale 0.1"),
    "scale-0.5": generalist("Generalist, b = 0.5", f"{GENERALIST} --input-scale 0.5"),
    "scale-1": generalist("Generalist, b = 1", f"{GENERALIST} --input-scale 1"),
    "pixel-spaced": generalist("pixel, regress, palette spaced", f"{PIXEL} --palette spaced", "cache-spaced"),
    "pixel-corners": generalist("pixel, regress, palette corners", f"{PIXEL} --palette corners", "cache-corners"),
}
EXTRA = tuple(VARIANTS)[list(VARIANTS).index("stl-pseudo"):]
TRUNKS = tuple(name for name, v in VARIANTS.items() if "--system " in v.flags)
# whose losses one picture shows
CURVES = "stl", "mtl", "jtr", "diffusionmtl", "hitts", "single", "single-scratch", "pixel-regress"

# ---- claims ----

# Numbers about HiTTs are its Delta_m on NYUD, one label per image (main paper); about JTR and DiffusionMTL those of
# StableMTL's Table 2, or if so marked of HiTTs' Table 1; about the Generalist its ablations at 64 pixels.
OWN = 1         # against the trunk's STL, as each paper of a trunk system has it

CLAIMS = [
    Claim("the shared trunk beats single-task trunks", "mtl", "stl", 5.61, zero=OWN),
    Claim("naive pseudo labels help the shared trunk", "mtl-pseudo", "mtl", 11.36 - 5.61, zero=OWN),
    Claim("naive pseudo labels beat as many steps without them", "mtl-pseudo", "mtl-twice", zero=OWN),
    Claim("task tokens beat the shared trunk", "hitts", "mtl", 9.98 - 5.61, zero=OWN),
    Claim("HiTTs: following features helps", "hitts-features", "hitts", 12.88 - 9.98, zero=OWN),
    Claim("HiTTs: labels beat features", "hitts-labels", "hitts-features", 15.49 - 12.88, zero=OWN),
    Claim("HiTTs: both beat labels alone", "hitts-both", "hitts-labels", 16.91 - 15.49, zero=OWN),
    Claim("HiTTs with discovery beats the shared trunk with naive pseudo labels", "hitts-both", "mtl-pseudo",
          16.91 - 11.36, zero=OWN),
    Claim("JTR beats the shared trunk", "jtr", "mtl", 8.25 - 5.61, zero=OWN),                       # HiTTs' Table 1
    Claim("DiffusionMTL beats the shared trunk", "diffusionmtl", "mtl", 3.65 + 2.85, zero=OWN),     # there, PASCAL
    # of the paper's numbers on normals and depth: 40.23, 26.39 / 66.39 against 50.91, 39.27 / 73.14, and 35.64,
    # 21.10 / 45.19 against 44.56, 24.83 / 58.17
    Claim("further tasks hurt JTR on normals and depth", "jtr-3", "jtr", 51.82, GEOMETRY),
    Claim("further tasks hurt DiffusionMTL on normals and depth", "diffusionmtl-3", "diffusionmtl", 36.56, GEOMETRY),
    Claim("they hurt JTR more than StableMTL-S", "jtr-3 + single", "jtr + single-3", tasks=GEOMETRY),
    Claim("they hurt DiffusionMTL more than StableMTL-S", "diffusionmtl-3 + single", "diffusionmtl + single-3",
          tasks=GEOMETRY),
    Claim("StableMTL-S beats JTR", "single", "jtr", 106.87 - 1.57),
    Claim("StableMTL-S beats DiffusionMTL", "single", "diffusionmtl", 78.76 - 1.57),
    Claim("StableMTL beats DiffusionMTL", "multi", "diffusionmtl", 78.76 + 4.78),
    Claim("StableMTL beats StableMTL-S", "multi", "single", 4.78 + 1.57),
    Claim("StableMTL beats the single-task models", "multi", "single-task", 4.78),
    # ours: no paper has them
    Claim("StableMTL-S beats the shared trunk on tasks of one frame", "single", "mtl", tasks=STILL),
    Claim("StableMTL-S beats JTR on tasks of one frame", "single", "jtr", tasks=STILL),
    Claim("StableMTL-S beats DiffusionMTL on tasks of one frame", "single", "diffusionmtl", tasks=STILL),
    Claim("StableMTL-S from scratch beats JTR", "single-scratch", "jtr"),
    Claim("StableMTL-S from scratch beats DiffusionMTL", "single-scratch", "diffusionmtl"),
    Claim("StableMTL-S beats the shared trunk", "single", "mtl"),
    Claim("StableMTL-S from scratch beats the shared trunk", "single-scratch", "mtl"),
    Claim("what has seen images beats scratch", "single", "single-scratch"),
    Claim("discovered labels help StableMTL-S on shading and albedo", "pseudo-half", "single", tasks=INTRINSIC),
    Claim("the surest half is worth more than all", "pseudo-half", "pseudo-all"),
    Claim("weighing is worth more than taking all", "pseudo-weighted", "pseudo-all"),
    Claim("true labels are worth more than discovered ones", "pseudo-true", "pseudo-half", tasks=INTRINSIC),
    # the Generalist
    Claim("pixels: diffusing beats regressing on classes", "pixel-diffuse", "pixel-regress", "48.0, 42.4 mIoU",
          CLASSES),
    Claim("pixels: regressing beats diffusing on depth", "pixel-regress", "pixel-diffuse", "0.443, 0.511 RMSE", DEPTH),
    Claim("diffusing: pixels beat latents on classes", "pixel-diffuse", "latent-diffuse", "48.0, 17.1 mIoU", CLASSES),
    Claim("regressing: pixels beat latents on classes", "pixel-regress", "single", tasks=CLASSES),
    # those of rows that --only has to name
    Claim("naive pseudo labels help single-task trunks", "stl-pseudo", "stl", 3.93, zero=OWN),
    Claim("true labels beat naive pseudo labels", "mtl-true", "mtl-pseudo", zero=OWN),
    Claim("HiTTs needs its orthogonal embedding", "hitts", "hitts-no-oe", 9.98 - 2.66, zero=OWN),
    Claim("HiTTs: attention between tasks helps", "hitts", "hitts-no-inter", 9.98 - 7.79, zero=OWN),
    Claim("HiTTs: attention within a task helps", "hitts", "hitts-no-intra", 9.98 - 8.42, zero=OWN),
    Claim("HiTTs: discovery beats as many steps without it", "hitts-both", "hitts-twice", zero=OWN),
    Claim("HiTTs: true labels beat discovered ones", "hitts-true", "hitts-both", zero=OWN),
    Claim("DiffusionMTL: all tasks' maps beat the own", "diffusionmtl", "diffusionmtl-own", zero=OWN),
    Claim("DiffusionMTL: features beat predictions", "diffusionmtl", "diffusionmtl-maps", 3.65 - 3.23, zero=OWN),
    Claim("discovered labels beat as many steps without them", "pseudo-half", "single-twice", tasks=INTRINSIC),
    Claim("features beat raw frames on classes", "generalist", "raw", "48.0, 37.6 mIoU", CLASSES),
    Claim("raw frames beat features on depth", "raw", "generalist", "0.476, 0.511 RMSE", DEPTH),
    Claim("what has seen images beats scratch on classes", "generalist", "scratch", "48.0, 46.6 mIoU", CLASSES),
    Claim("what has seen images beats scratch on depth", "generalist", "scratch", "0.511, 0.528 RMSE", DEPTH),
    Claim("b = 0.3 beats 1 on classes", "generalist", "scale-1", "48.0, 40.3 mIoU", CLASSES),
    Claim("b = 0.5 beats 0.3 on classes", "scale-0.5", "generalist", "49.3, 48.0 mIoU", CLASSES),
    Claim("b = 0.1 beats 0.3 on depth", "scale-0.1", "generalist", tasks=DEPTH),
    Claim("class colours further apart beat spaced ones", "pixel-corners", "pixel-spaced", tasks=CLASSES),
]

SUITE = Suite("systems", VARIANTS, EXTRA, CLAIMS, (
    Zero("single-task", "delta_m", "Delta_m % ↑, single-task UNets: 0", "delta_m.png"),
    Zero("stl", "delta_m of trunks", "Delta_m % ↑, STL trunk: 0", "delta_m_trunks.png", TRUNKS)), "systems.md")
