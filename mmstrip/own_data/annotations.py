"""Box annotations in COCO (JSON) or PASCAL VOC (XML) format, checked when they are read."""

import json
from collections.abc import Collection
from pathlib import Path, PurePosixPath
from reprlib import repr as brief
from typing import NamedTuple
from xml.etree import ElementTree

from .folders import (
    CONTROL,
    IMAGE_FOLDERS,
    SPLITS,
    Folder,
    check_names,
    is_single_line,
    read_lines,
    split_of,
    summarize,
)

VOC_FOLDERS = ('Annotations', 'JPEGImages')
MAX_NUMBER = 2**53  # larger integers are not exact in every JSON reader


def _is_number(value) -> bool:
    return type(value) in (int, float) and -MAX_NUMBER < value < MAX_NUMBER  # not NaN


def _is_box(value) -> bool:
    return isinstance(value, list) and len(value) == 4 and all(map(_is_number, value))


def _is_name(value) -> bool:
    return isinstance(value, str) and bool(value.strip()) and is_single_line(value) and not CONTROL.search(value)


_ID = (lambda value: type(value) is int and -MAX_NUMBER < value < MAX_NUMBER, 'a whole number')
_SIDE = (lambda value: _is_number(value) and value > 0, 'a positive number')
_FLAG = (lambda value: value in (None, 0, 1), '0 or 1')
_NAME = (_is_name, 'a name on one line')
# Fields of COCO's rows; all but two are required.
_FIELDS = {
    'images': dict(id=_ID, file_name=_NAME, width=_SIDE, height=_SIDE),
    'categories': dict(id=_ID, name=_NAME),
    'annotations': dict(
        image_id=_ID, category_id=_ID, bbox=(_is_box, 'four finite numbers'), iscrowd=_FLAG, ignore=_FLAG
    ),
}
_OPTIONAL = ('iscrowd', 'ignore')
_UNIQUE = {'images': ('id', 'file_name'), 'categories': ('id',), 'annotations': ()}


class Split(NamedTuple):
    """Images of a split with their boxes."""

    content: dict  # in COCO's format
    root: Path  # folder that image names are relative to
    file: Path | None  # JSON file with this content; None: not written yet

    @property
    def images(self) -> list[Path]:
        return [self.root / image['file_name'] for image in self.content['images']]


def read_boxes(data: Folder) -> dict[str, Split]:
    """Read the splits of a folder; the training split is always present.

    Raises:
        FileNotFoundError: An image or an annotation file is missing.
        ValueError: Annotations cannot be read, are not in COCO or VOC format, or match several image folders.
    """
    images, others = data.images()
    if all((data.path / name).is_dir() for name in VOC_FOLDERS):
        return _read_voc(data, images, others)
    return _read_coco(data, images, others)


def _read_coco(data: Folder, images: list[Path], others: list[Path]) -> dict[str, Split]:
    splits, files = {}, {}
    for file in (path for path in others if path.suffix.lower() == '.json'):
        content, encoding = _read_json(file)
        if content is None:
            data.note_items('left out, no COCO boxes', [file])
            continue
        split = split_of(file.stem) or _split_of_folders(file.relative_to(data.path)) or 'train'
        if split in splits:
            raise ValueError(f'{files[split]} and {file} are both for {split}; keep one of them in {data.path}')
        check_coco(file, content)
        root = _image_root(data, file, content, images, split)
        sizes = data.measure([root / row['file_name'] for row in content['images']])
        odd = [row for row in content['images'] if sizes[root / row['file_name']] != (row['width'], row['height'])]
        words = f'{len(odd)} images differ in size from {file}, so their boxes may be misplaced'
        data.note_items(words, [row['file_name'] for row in odd])
        changes = [*complete_annotations(content), *([] if encoding == 'utf-8' else [f'UTF-8 instead of {encoding}'])]
        data.note_items(f'{file} is rewritten', [', '.join(changes)] if changes else [])
        splits[split], files[split] = Split(content, root, None if changes else file), file
    if not splits:
        raise ValueError(
            f'{data.path} has no annotations: expected COCO JSON files with boxes, or the PASCAL VOC folders '
            'Annotations and JPEGImages'
        )
    if 'train' not in splits:
        raise ValueError(f'{data.path} has annotations for {summarize(splits)}, but none for train')
    return splits


def _read_json(file: Path) -> tuple[dict | None, str]:
    """Content of a JSON file, None if it has no boxes; and its encoding."""
    raw = file.read_bytes()
    encoding = json.detect_encoding(raw)
    try:
        content = json.loads(raw)
    except (ValueError, RecursionError) as error:
        raise ValueError(f'{file} is not JSON: {error}') from error
    if not isinstance(content, dict) or 'images' not in content or 'annotations' not in content:
        return None, encoding
    for key in ('images', 'annotations', 'categories'):
        rows = content.get(key) or []
        if not isinstance(rows, list) or not all(isinstance(row, dict) for row in rows):
            raise ValueError(f'{file}: {key} must be a list of objects, as in COCO')
    if not content.get('categories'):
        raise ValueError(f'{file} has no categories, where COCO names its classes')
    if not content['images'] or not any('bbox' in box for box in content['annotations'] or []):
        return None, encoding
    return content, encoding


def check_coco(file: Path, content: dict) -> None:
    """Raise ValueError for the first field that training cannot use; the error names its row."""
    for key, fields in _FIELDS.items():
        for i, row in enumerate(content[key]):
            for field, (holds, words) in fields.items():
                if field not in row and field not in _OPTIONAL:
                    raise ValueError(f'{file}: {key}[{i}] must have the field {field}, but has none')
                if field in row and not holds(row[field]):
                    raise ValueError(f'{file}: {key}[{i}].{field} must be {words}, but is {brief(row[field])}')
    places = {}
    for key, fields in _UNIQUE.items():
        for field in fields:
            for i, row in enumerate(content[key]):
                value = PurePosixPath(row[field]) if field == 'file_name' else row[field]
                first = places.setdefault((key, field, value), i)
                if first != i:
                    raise ValueError(f'{file}: {key}[{first}] and {key}[{i}] must not share the {field} {row[field]}')
    for i, box in enumerate(content['annotations']):
        for field, key in (('image_id', 'images'), ('category_id', 'categories')):
            if (key, 'id', box[field]) not in places:
                kind = 'image' if key == 'images' else 'category'
                raise ValueError(f'{file}: annotations[{i}] has {field} {box[field]}, but no {kind} has this id')


def complete_annotations(content: dict) -> list[str]:
    """Complete what training and COCO's evaluation read, in place; return the changes in words."""
    boxes, changes = content['annotations'], []
    used = {box['category_id'] for box in boxes}
    names = [row['name'] for row in content['categories']]
    kept = [row for row in content['categories'] if row['id'] in used or names.count(row['name']) == 1]
    if len(kept) < len(names):  # such as the root that Roboflow adds
        content['categories'] = kept
        changes.append('without duplicate categories that have no boxes')
    if len({box.get('id') for box in boxes if type(box.get('id')) is int and box['id'] > 0}) < len(boxes):
        changes.append('ids from 1')  # COCO's evaluation takes id 0 for not found
        for number, box in enumerate(boxes, 1):
            box['id'] = number
    for box in boxes:
        area, (width, height) = box.get('area'), box['bbox'][2:]
        if not _is_number(area) or (area <= 0 < min(width, height)):
            box['area'] = max(width, 0) * max(height, 0)
            changes.append('areas from boxes')
    changes += ['iscrowd'] * any(box.get('iscrowd') is None for box in boxes)
    for box in boxes:
        box['iscrowd'] = int(box.get('iscrowd') or 0)
    return list(dict.fromkeys(changes))


def _split_of_folders(path: Path) -> str | None:
    """The split that a parent folder of a file is named after."""
    return next(filter(None, map(split_of, path.parts[:-1][::-1])), None)


def _image_root(data: Folder, file: Path, content: dict, images: Collection[Path], split: str) -> Path:
    """The folder that the image names in a JSON file are relative to."""
    names = sorted({PurePosixPath(image['file_name']).as_posix() for image in content['images']})
    known = {path.as_posix() for path in images}
    found = [path.removesuffix(names[0]) for path in sorted(known) if f'/{path}'.endswith(f'/{names[0]}')]
    if not found:
        raise FileNotFoundError(f'{file} lists images that {data.path} does not contain: {names[0]}')
    lacking = {root: [name for name in names if root + name not in known] for root in found}
    nearest = min(found, key=lambda root: len(lacking[root]))
    if lacking[nearest]:
        missing = summarize(lacking[nearest])
        raise FileNotFoundError(f'{file} lists images that {Path(nearest)} does not contain: {missing}')

    def fit(root: Path) -> tuple[bool, bool, bool]:
        way = (root / names[0]).relative_to(data.path)
        named = any(part.lower() in IMAGE_FOLDERS for part in way.parts)
        return split == _split_of_folders(way), root == file.parent, named

    roots = [Path(root) for root in found if not lacking[root]]
    best, *others = sorted(roots, key=fit, reverse=True)
    if others and fit(best) == fit(others[0]):
        raise ValueError(
            f'{file} matches the images in {best} and in {others[0]}; rename the folder that it describes to images'
        )
    note = f'{split}: images of {file.name} are in {best}'
    data.notes.append(note + (f', not {summarize(others)}' if others else ''))
    return best


def _read_voc(data: Folder, images: list[Path], others: list[Path]) -> dict[str, Split]:
    annotations, root, lists = (data.path / name for name in (*VOC_FOLDERS, 'ImageSets/Main'))
    files = {path.stem: path for path in others if path.parent == annotations and path.suffix.lower() == '.xml'}
    lists = {path.stem: path for path in others if path.parent == lists and path.suffix == '.txt'}
    by_stem: dict[str, Path] = {}
    for image in (path for path in images if root in path.parents):
        if by_stem.setdefault(image.stem, image) != image:
            raise ValueError(f'{by_stem[image.stem]} and {image} share one annotation file; keep only one of them')
    chosen = {split: next((lists[name] for name in names if name in lists), None) for split, names in SPLITS.items()}
    stems = {split: _listed_stems(file, by_stem) for split, file in chosen.items() if file} or {'train': sorted(files)}
    if 'train' not in stems:
        raise ValueError(f'{data.path}/ImageSets/Main must have train.txt or trainval.txt, but has {summarize(lists)}')
    for split, members in stems.items():
        if not members:
            raise ValueError(f'{chosen[split] or annotations} must list at least one image, but is empty')
    wanted = dict.fromkeys(name for names in stems.values() for name in names)
    for name in wanted:
        if name not in by_stem:
            raise FileNotFoundError(f'{root} has no image named {name}')
        if name not in files:
            raise FileNotFoundError(f'no annotation file at {annotations / name}.xml')
    unused = [image for name, image in by_stem.items() if name not in wanted]
    data.note_items(f'left out, images {"in no list" if any(chosen.values()) else "without XML"}', unused)
    data.note_items('left out, as PASCAL VOC is read', [path for path in others if path.suffix == '.json'])
    sizes = data.measure([by_stem[name] for name in wanted])
    objects = {name: _voc_objects(files[name]) for name in wanted}
    names = sorted({name for boxes in objects.values() for name, _, _ in boxes})
    check_names(names, annotations)
    splits = {}
    for split, members in stems.items():
        content = dict(images=[], annotations=[], categories=[dict(id=i, name=name) for i, name in enumerate(names)])
        for number, stem in enumerate(dict.fromkeys(members)):
            size, file_name = sizes[by_stem[stem]], by_stem[stem].relative_to(root).as_posix()
            content['images'].append(dict(id=number, file_name=file_name, width=size[0], height=size[1]))
            for name, corners, difficult in objects[stem]:
                x1, y1, x2, y2 = (min(max(value, 0), side) for value, side in zip(corners, (*size, *size)))
                box = dict(id=len(content['annotations']) + 1, image_id=number, category_id=names.index(name))
                box.update(bbox=[x1, y1, x2 - x1, y2 - y1], area=(x2 - x1) * (y2 - y1), iscrowd=difficult)
                content['annotations'].append(box)
        splits[split] = Split(content, root, None)
    return splits


def _listed_stems(file: Path, known: Collection[str]) -> list[str]:
    """Names in a VOC list, one per line; in lists of one class a number follows each."""
    return [line if line in known else line.rsplit(maxsplit=1)[0] for line in read_lines(file) if line]


class _NoDoctype(ElementTree.TreeBuilder):
    def doctype(self, *_) -> None:
        raise ValueError('its document type may define endless entities; remove <!DOCTYPE ...>')


def _voc_objects(file: Path) -> list[tuple[str, list[float], int]]:
    """Name, corners and difficulty of each box in an XML file."""

    def text_of(node: ElementTree.Element, path: str) -> str:
        text = (node.findtext(path) or '').strip()
        if not text:
            raise ValueError(f'an object has no {path}')
        return text

    try:
        found = []
        tree = ElementTree.parse(file, ElementTree.XMLParser(target=_NoDoctype()))
        for node in tree.iter('object'):
            corners = [float(text_of(node, f'bndbox/{key}')) for key in ('xmin', 'ymin', 'xmax', 'ymax')]
            if not all(map(_is_number, corners)):
                raise ValueError(f'corners must be finite, but are {corners}')
            found.append((text_of(node, 'name'), corners, int(bool(int(node.findtext('difficult') or 0)))))
        return found
    except (ElementTree.ParseError, LookupError, ValueError) as error:  # LookupError: an unknown encoding
        raise ValueError(f'{file} is not a PASCAL VOC annotation file: {error}') from error
