"""Small folders of images as users bring them."""

import json
from pathlib import Path
from xml.etree import ElementTree

import numpy as np
from mmengine.config import Config
from mmengine.registry import DATASETS
from PIL import Image

PIXELS = np.full((48, 64, 3), 40, np.uint8)
PIXELS[10:30, 20:50] = 200, 30, 30
PICTURE = Image.fromarray(PIXELS)
BOX = [20, 10, 30, 20]  # x, y, width and height of the red field


def write_picture(path: Path, picture: Image.Image = PICTURE, **saving) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    picture.save(path, **saving)
    return path


def write_classes(root: Path, names, count: int = 4) -> Path:
    for name in names:
        for i in range(count):
            write_picture(root / name / f'{i}.png')
    return root


def write_coco(root: Path, file: str = 'a.json', count: int = 4, edit=None, encoding: str = 'utf-8') -> Path:
    """Pictures with a box each, category cell with id 1."""
    content = dict(
        images=[dict(id=i, file_name=f'{i}.jpg', width=64, height=48) for i in range(1, count + 1)],
        categories=[dict(id=1, name='cell')],
        annotations=[dict(id=i, image_id=i, category_id=1, bbox=BOX, area=600, iscrowd=0) for i in range(1, count + 1)],
    )
    if edit:
        edit(content)
    for image in content['images']:
        if image.get('file_name'):
            write_picture(root / image['file_name'])
    write_text(root / file, json.dumps(content, ensure_ascii='\\ud8' in json.dumps(content)), encoding)
    return root


def write_text(path: Path, text: str, encoding: str = 'utf-8') -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(text, encoding=encoding)
    return path


def write_voc(root: Path, boxes: dict, picture: Image.Image = PICTURE, suffix: str = '.jpg', **saving) -> Path:
    """A picture of each name with a box, its class and four corners."""
    for name, (label, *corners) in boxes.items():
        write_picture(root / f'JPEGImages/{name}{suffix}', picture, **saving)
        annotation = ElementTree.Element('annotation')
        node = ElementTree.SubElement(annotation, 'object')
        ElementTree.SubElement(node, 'name').text = label
        box = ElementTree.SubElement(node, 'bndbox')
        for key, value in zip(('xmin', 'ymin', 'xmax', 'ymax'), corners):
            ElementTree.SubElement(box, key).text = str(value)
        write_text(root / f'Annotations/{name}.xml', ElementTree.tostring(annotation, encoding='unicode'))
    return root


def write_pairs(root: Path, images, masks=None, values=(0, 1), classes: str | None = None) -> Path:
    """Images and masks of these names, of the first value and, in the red field, the others side by side."""
    labels = np.full((48, 64), values[0], np.uint8)
    labels[10:30, 20:50] = np.resize(values[1:], 30)
    for name in images:
        write_picture(root / f'images/{name}.png')
    for name in images if masks is None else masks:
        write_picture(root / f'masks/{name}.png', Image.fromarray(labels))
    if classes is not None:
        write_text(root / 'classes.txt', classes)
    return root


def read_splits(config: Path | Config) -> dict[str, tuple[tuple, list[dict]]]:
    """Classes and samples of each dataset of a config, through the toolbox's own class."""
    config = Config.fromfile(config) if isinstance(config, Path) else config
    found = {}
    for split in ('train', 'val', 'test'):
        dataset = DATASETS.build(dict(config[f'{split}_dataloader'].dataset, pipeline=[], serialize_data=False))
        found[split] = tuple(dataset.metainfo['classes']), [dataset.get_data_info(i) for i in range(len(dataset))]
    return found
