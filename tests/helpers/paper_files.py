"""Files with the schema of the Hub's, made of the real images that the package foolbox brings."""

from salnb._common.packages import package_folder
from salnb.data import paper

# name: photographs of foolbox, column of the image, column of the label, number of classes
SCHEMAS = {
    "cifar10": ("cifar10", "img", "label", 10),
    "cifar100": ("cifar100", "img", "fine_label", 100),
    "svhn": ("cifar10", "image", "label", 10),
    "imagenet": ("imagenet", "image", "label", 1000),
}


def put_files(name):
    """Put twenty images for training and the first five of them for the test; gives their labels."""
    import datasets

    source, image, label, classes = SCHEMAS[name]
    files = sorted((package_folder("foolbox") / "data").glob(f"{source}_*"))
    labels = [int(file.stem.rsplit("_", 1)[1]) for file in files]
    columns = {image: [{"bytes": f.read_bytes(), "path": None} for f in files], label: labels}
    names = [f"class {i}" for i in range(classes)]
    features = {image: datasets.Image(), label: datasets.ClassLabel(names=names)}
    if name == "cifar100":
        columns["coarse_label"] = [0] * len(files)
        features["coarse_label"] = datasets.ClassLabel(names=["all"])
    rows = datasets.Dataset.from_dict(columns, features=datasets.Features(features))
    folder = paper.files_folder(name)
    folder.mkdir(parents=True)
    datasets.disable_progress_bars()
    rows.to_parquet(folder / "train-00000-of-00001.parquet")
    rows.select(range(5)).to_parquet(folder / f"{paper.HUB[name].test}-00000-of-00001.parquet")
    return labels
