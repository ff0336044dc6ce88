# SPDX-License-Identifier: Apache-2.0
"""Published latencies (a CSV of rows) and what the models amount to, as rows for a fit.

The columns are those of ``published_latency.csv`` (device, soc, cores_used, runtime, precision, model, input_shape, latency_ms, note) and
``model_macs.csv`` (model, input_shape, MACs, parameters, and for some models MACs by operator class, activations and operators). Models of
which only MACs are published get the shares of a model of their family of which more is known.
"""

from __future__ import annotations

import csv
import functools
import math
import re
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING

from edgekd.estimate.model import Row, Setting

if TYPE_CHECKING:
    from collections.abc import Iterable, Mapping, Sequence

HERE = Path(__file__).parent
RUNTIMES = {"XNNPACK end2end_bench": "XNNPACK", "onnx (CPU)": "ONNX Runtime", "tflite (CPU)": "TFLite", "TFLite (PINTO build)": "TFLite"}
# reasons to leave a row out, by what its columns say
EXCLUDED = {
    "an NPU's, not the CPU's": lambda record: "NPU" in record["runtime"] + record["precision"],
    "of a translation, not of one inference": lambda record: "fairseq" in record["runtime"],
    "of low confidence": lambda record: "LOW CONFIDENCE" in record["note"],
    "no latency": lambda record: not float(record["latency_ms"] or 0) > 0,
}
FAMILIES = {
    "mobilenet_v2": r"mobilenet[ _-]?v2|mobilenetv2",
    "mobilenet_v3": r"mobilenet[ _-]?v3",
    "mobilenet_v1": r"^mobilenet(?![ _-]?v?[4-9])",
    "mnasnet": r"mnas|proxyless|fbnet",
    "efficientnet": r"efficientnet|tinynet",
    "squeezenet": r"squeeze",
    "shufflenet": r"shuffle",
    "inception": r"inception|googlenet",
    "resnet": r"resnet|resnext",
    "yolo-fastest": r"yolo-?fastest|fastestdet",
    "transformer": r"vit\b|vision_transformer|deit|swin|bert",
    **{name: name for name in ("vgg", "regnet", "densenet", "nanodet", "picodet", "yolo", "alexnet", "blazeface", "convnext")},
}
# names of models in the rows, and in the table of MACs
ALIASES = {
    "mobilenetv1": "mobilenet",
    "mobilenetv2": "mobilenet_v2",
    "mobilenetv21.0x": "mobilenet_v2",
    "mobilenetv3large": "MobilenetV3 Large dm=1",
    "mobilenetv3smallx10": "MobilenetV3 Small dm=1",
    "mobilenetv3small": "MobilenetV3 Small dm=1",
    "resnet50v1": "resnet50",
    "resnet50v2": "resnet50",
    "densenet": "densenet121",
    "inceptionv1": "googlenet",
    "squeezenetv1.0": "squeezenet1_0",
    "squeezenet1.0": "squeezenet",  # as fast as 1.1 in its source, so the graph of 1.1
    "squeezenet1.1": "squeezenet",
    "squeezenet11": "squeezenet",
    "shufflenetv2x10": "shufflenet_v2",
    "mnasnet1.3": "mnasnet",
    "vit": "vit_base_patch16_224",
    "regnety800mf": "regnety_008",
    "mobilenetv3largex10": "MobilenetV3 Large dm=1",
    "mnasnet1.0": "mnasnet",
    "nasnetlarge": "nasnetalarge",
    "resnext101": "resnext101_32x8d",
    "resnetv2101": "resnet101",
    "yolov8det": "yolov8n",
}


@dataclass(frozen=True, slots=True)
class Model:
    """What is known of a model: input size in pixels; MACs, parameters and activation elements (inputs and outputs) in millions."""

    name: str
    size: int | None
    macs: float
    parameters: float | None
    depthwise: float | None = None
    pointwise: float | None = None
    conv3x3: float | None = None
    activations: float | None = None
    operators: float | None = None

    @property
    def is_complete(self) -> bool:
        """Return whether the MACs by class, activations and operators are known."""
        return None not in (self.pointwise, self.activations, self.operators)


# Published where the rows are not, or counted from published graphs. Counted: blazeface, FastestDet and vision_transformer (32x32 patches)
# of ncnn (benchmark/models/*.param). The others: MACs and parameters of torchvision's and ultralytics' model tables, and of the papers.
FURTHER = (
    Model("blazeface", 128, 29.4, 0.086, 3.76, 18.2, 0.0, 5.86, 84),
    Model("FastestDet", 352, 121.5, 0.236, 14.95, 86.5, 0.0, 12.96, 121),
    Model("vision_transformer", 384, 13040.0, 88.0, 0.0, 12700.0, 0.0, 40.0, 105),
    Model("squeezenet1_0", 224, 819.0, 1.25, 0.0, 330.0, 300.0, 15.0, 39),
    Model("efficientnet-lite0", 224, 407.0, 4.65, 33.0, 365.0, 0.0, 13.5, 66),
    Model("MobilenetV3 Small dm=1", 224, 66.0, 2.9, 5.5, 55.0, 0.0, 5.5, 100),
    Model("yolov8n", 640, 4350.0, 3.2),
    Model("yolov8s", 640, 14300.0, 11.2),
    Model("yolov6n", 640, 5700.0, 4.7),
    Model("yolov7-tiny", 640, 6900.0, 6.2),
    Model("yolox-s", 640, 13400.0, 9.0),
    Model("yolov9c", 640, 51050.0, 25.3),
    Model("YoloV4", 608, 64200.0, 64.4),
    Model("mnasnet05", 224, 100.0, 2.2),
    Model("MnasNet_0.75", 224, 227.0, 2.9),
    Model("Inception_V2", 224, 2000.0, 11.2),
    Model("NASNet mobile", 224, 564.0, 5.3),
    Model("ResNet-152 V2", 224, 11500.0, 60.2),
    Model("efficientnet_v2_s", 384, 8370.0, 21.5),
    Model("efficientnet_b4", 380, 4390.0, 19.3),
    Model("resnext50", 224, 4230.0, 25.0),
    Model("resnext101_32x8d", 224, 16410.0, 88.8),
    Model("wideresnet50", 224, 11400.0, 68.9),
    Model("regnet", 224, 3180.0, 15.3),
    Model("convnext_base", 224, 15360.0, 88.6),
)
_UNLIKE_THEIR_FAMILY = r"yolo-?v?(?:[5-9]|1\d|x)|pp-yolo|mobilenet_(?:ssd|yolo)|mobilenetv2_yolo"  # no donors, and nobody's


def family(name: str) -> str:
    """Return the family of a model, by its name: what is held out at once."""
    lower = name.lower()
    matches = (label for label, pattern in FAMILIES.items() if re.search(pattern, lower))
    return next(matches, re.sub(r"[^a-z].*", "", lower) or lower)


def read_rows(path: Path, macs: Path, *, average: bool = False) -> tuple[list[Row], list[dict[str, str]], dict[str, int]]:
    """Return the rows with their amounts, the records whose model is not known, and how many rows are left out, by reason."""
    models, rows, unknown, excluded = _models(macs), [], [], dict.fromkeys(EXCLUDED, 0)
    with path.open(newline="", encoding="utf-8") as file:
        for record in csv.DictReader(file):
            reason = next((reason for reason, applies in EXCLUDED.items() if applies(record)), None)
            if reason is not None:
                excluded[reason] += 1
                continue
            model, setting = _find_model(record, models), _setting(record)
            if model is None:
                unknown.append(record)
                continue
            ms = float(record["latency_ms"]) if average else milliseconds(record)
            rows.append(Row(setting, family(record["model"]), _amounts(model, models), ms, record["source"].partition(":")[0]))
    return rows, unknown, excluded


def milliseconds(record: Mapping[str, str]) -> float:
    """Return the latency of a record: the smallest where its note has that, as an average includes what else the device did."""
    smallest = re.match(r"min=([\d.]+)", record["note"])
    return float(smallest.group(1)) if smallest and float(smallest.group(1)) > 0 else float(record["latency_ms"])


def threads(record: Mapping[str, str]) -> str:
    """Return the number of threads of a record, or ``default`` where its source does not name it."""
    return record["cores_used"] if record["cores_used"] not in {"", "0"} else "default"


def _setting(record: Mapping[str, str]) -> Setting:
    """Return the setting of a record; a CPU that is not in the table is like no other, and its clock is the first that is printed."""
    clock = re.search(r"([\d.]+) ?GHz", record["soc"])
    unlisted = {
        "core": record["soc"],
        "simd": "unknown",
        "mhz": str(round(1000 * float(clock.group(1)))) if clock else "2000",
        "targets": "",
    }
    cpu = next((cpu for cpu in _cpus() if cpu["soc"] in record["soc"]), unlisted)
    little = "powersave=1" in record["note"]  # the sources name no clock of theirs
    device = record["device"] + (" (overclocked)" if "overclock" in record["soc"] else "") + (" (little cores)" if little else "")
    precision = record["precision"]
    precision = "fp32" if "effective fp32" in precision else precision.split(" ")[0]
    core = f"{cpu['core']} (little cores)" if little else cpu["core"]
    return Setting(
        device,
        core,
        cpu["simd"],
        int(cpu["mhz"]),
        RUNTIMES.get(record["runtime"], record["runtime"]),
        precision,
        threads(record),
        "" if little else cpu["targets"],
    )


@functools.cache
def _cpus() -> list[dict[str, str]]:
    lines = (HERE / "socs.csv").read_text(encoding="utf-8").splitlines()
    return list(csv.DictReader(line for line in lines if not line.startswith("#")))


def _models(path: Path) -> dict[str, list[Model]]:
    """Return the models of a table of MACs, by their plain names; some names have several input sizes."""
    models: dict[str, list[Model]] = {}
    with path.open(newline="", encoding="utf-8") as file:
        for record in csv.DictReader(file):
            number = functools.partial(_number, record)
            # timm counts the outputs of convolutions only: about half of what all operators read and write
            scale = 2.0 if "pytorch-image-models" in record["source"] else 1.0
            activations = number("activation_elements_millions")
            model = Model(
                record["model"],
                _size(record["input_shape"]),
                number("macs_millions") or math.nan,
                number("params_millions"),
                number("dw_macs_millions"),
                number("pointwise_macs_millions"),
                number("conv3x3s1_macs_millions"),
                None if activations is None else scale * activations,
                number("n_ops"),
            )
            models.setdefault(_plain(model.name), []).append(model)
    return models | {_plain(model.name): [model] for model in FURTHER}


def _number(record: Mapping[str, str], column: str) -> float | None:
    return float(record[column]) if record.get(column) else None


def _plain(name: str) -> str:
    return re.sub(r"[^a-z0-9.+]", "", name.lower())


def _size(shape: str) -> int | None:
    sizes = [int(text) for text in re.findall(r"\d+", shape)]
    return max(sizes) if len(sizes) == 4 else None  # noqa: PLR2004  (batch, channels and two axes)


def _find_model(record: Mapping[str, str], models: Mapping[str, Sequence[Model]]) -> Model | None:
    """Return the model of a record, scaled to its input size; None if it is not in the tables."""
    name = re.sub("int8$", "", _plain(record["model"].split("/")[0]))
    if name == "squeezenet" and record["runtime"].startswith("TFLite"):
        name = "squeezenet1_0"  # the 5 MB file of the TFLite pages
    candidates = models.get(_plain(ALIASES.get(name, name)), ())
    size = _size(record["input_shape"])
    if not candidates:
        return None
    if size is None:
        return next((model for model in candidates if model.size == 224), candidates[0])  # noqa: PLR2004  (what sources mean that do not say)
    nearest = min(candidates, key=lambda model: abs(math.log((model.size or size) / size)))
    return nearest if nearest.size in {None, size} else _scaled(nearest, size)


def _scaled(model: Model, size: int) -> Model:
    factor = (size / (model.size or size)) ** 2
    per_pixel = ("macs", "depthwise", "pointwise", "conv3x3", "activations")
    values = {name: getattr(model, name) for name in per_pixel}
    return replace(model, size=size, **{name: None if value is None else factor * value for name, value in values.items()})


def _amounts(model: Model, models: Mapping[str, Sequence[Model]]) -> tuple[float, ...]:
    """Return the amounts of a model in the order of ``AMOUNTS``."""
    model = model if model.is_complete else _completed(model, [item for items in models.values() for item in items])
    depthwise, pointwise, conv3x3 = model.depthwise or 0.0, model.pointwise or 0.0, model.conv3x3 or 0.0
    other = max(model.macs - depthwise - pointwise - conv3x3, 0.0)
    return (pointwise, conv3x3, depthwise, other, model.activations or 0.0, model.parameters or 4.0, model.operators or 80.0)


def _completed(model: Model, models: Iterable[Model]) -> Model:
    """Return a model with the shares of the nearest of its family, or with typical ones where its family has none."""
    donors = [
        item
        for item in models
        if item.is_complete and family(item.name) == family(model.name) and not re.search(_UNLIKE_THEIR_FAMILY, item.name.lower())
    ]
    if not donors or re.search(_UNLIKE_THEIR_FAMILY, model.name.lower()):
        activations = 0.33 * model.macs**0.6 if model.activations is None else model.activations
        return replace(model, depthwise=0.0, pointwise=0.6 * model.macs, conv3x3=0.3 * model.macs, activations=activations, operators=80.0)
    donor = min(donors, key=lambda item: abs(math.log(item.macs / model.macs)))
    pixels = (model.size / donor.size) ** 2 if model.size and donor.size else 1.0
    linear = pixels * math.sqrt(model.macs / donor.macs / pixels)  # in the width, where MACs are quadratic in it
    depthwise = min((donor.depthwise or 0.0) * linear, 0.3 * model.macs)
    scale = (model.macs - depthwise) / (donor.macs - (donor.depthwise or 0.0))
    return replace(
        model,
        depthwise=depthwise,
        pointwise=scale * (donor.pointwise or 0.0),
        conv3x3=scale * (donor.conv3x3 or 0.0),
        activations=linear * (donor.activations or 0.0) if model.activations is None else model.activations,
        operators=donor.operators,
    )
