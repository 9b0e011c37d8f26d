"""Own images: folders as users have them become configs that train, test and predict, in our tools and in theirs."""

import json
import re
import shutil
import xml.etree.ElementTree as ElementTree

import numpy as np
import pytest
import torch
from helpers.configs import build_model
from helpers.runs import call_tool
from mmengine.config import Config
from mmengine.registry import DATASETS, init_default_scope
from PIL import Image
from sklearn.datasets import load_digits

from mmstrip.datasets.digit_scenes import write_digit_scenes
from mmstrip.models import StripMLP
from mmstrip.own_data import write_classification, write_detection, write_segmentation
from mmstrip.own_data.segmentation import MODELS
from mmstrip.utils.samples import read_sample

TOOL = 'misc/own_data.py'
NAMES = ('one', 'two', 'zero')


@pytest.fixture(scope='module')
def init(tmp_path_factory):
    """The checkpoint of a small classifier."""
    path = tmp_path_factory.mktemp('init') / 'classifier.pth'
    weights = StripMLP(dict(embed_dims=16, depths=(1, 1, 1, 1)), img_size=32).state_dict()
    torch.save(dict(state_dict={f'backbone.{key}': value for key, value in weights.items()}), path)
    return path


@pytest.fixture(scope='module')
def digits(tmp_path_factory):
    """Folders of three classes, 20 images each, with what else lies in folders."""
    root = tmp_path_factory.mktemp('digits') / 'my digits'
    images, labels = load_digits(return_X_y=True)
    for label, name in enumerate(('zero', 'one', 'two')):
        (root / name).mkdir(parents=True)
        for i, image in enumerate(images[labels == label][:20]):
            picture = Image.fromarray((image.reshape(8, 8) * 15).astype(np.uint8)).convert('RGB')
            picture.resize((40 + i, 40)).save(root / name / f'{name} {i}.png')
    (root / 'one' / 'notes.txt').write_text('none')
    (root / 'one' / 'broken.jpg').write_bytes(b'no image')
    return root


@pytest.fixture(scope='module')
def scenes(tmp_path_factory):
    """Scenes of digits as COCO has them, and as images and label maps with a void number."""
    root = tmp_path_factory.mktemp('scenes')
    write_digit_scenes(root / 'coco', num_train=8, num_val=4)
    for split in ('train', 'val'):
        shutil.copytree(root / 'coco' / split, root / 'maps' / 'images' / split)
        shutil.copytree(root / 'coco' / 'labels' / split, root / 'maps' / 'labels' / split)
    shutil.move(root / 'coco' / 'labels', root / 'unused')
    void = sorted((root / 'maps' / 'labels' / 'train').iterdir())[0]
    labels = np.array(Image.open(void))
    labels[:4] = 11
    Image.fromarray(labels).save(void)
    (root / 'maps' / 'classes.txt').write_text('\n'.join(['background', *'0123456789', '']))
    return root


def call(folder, *arguments):
    """What the tool prints, run in a folder; its config."""
    done = call_tool(TOOL, *arguments, folder=folder, cwd=folder)
    assert done.returncode == 0, done.stdout
    return done.stdout, folder / re.search(r'wrote (\S+)', done.stdout)[1]


def train(config, folder, *options):
    """By the commands that the tool has printed; the work dir."""
    quick = ['train_dataloader.num_workers=0', 'train_dataloader.persistent_workers=False']
    quick += [option.replace('train', 'val') for option in quick] + [
        option.replace('train', 'test') for option in quick
    ]
    work = folder / 'work_dirs' / config.stem
    relative = config.relative_to(folder)
    done = call_tool('train.py', relative, '--cfg-options', *quick, *options, folder=folder, cwd=folder)
    assert done.returncode == 0 and 'Failed to search registry' not in done.stdout, done.stdout[-3000:]
    last = (work / 'last_checkpoint').read_text()
    done = call_tool('test.py', relative, last, '--cfg-options', *quick, folder=folder, cwd=folder)
    assert done.returncode == 0, done.stdout[-3000:]
    return last, done.stdout


def test_classification(digits, init, tmp_path, monkeypatch):
    """By the commands that are printed, and from the dump of the config, with a name that mmengine would replace."""
    from mmpretrain import ImageClassificationInferencer

    root = shutil.copytree(digits, tmp_path / 'disk' / 'my digits')
    (root / 'two').rename(root / '{{$HOME:two}}')
    names = ('one', 'zero', '{{$HOME:two}}')
    (tmp_path / 'data').mkdir()
    (tmp_path / 'data' / 'digits').symlink_to(root)
    options = ['--init', init, '--size', '32', '--epochs', '2', '--batch-size', '8']
    output, path = call(tmp_path, 'classification', 'data/digits', *options)
    for words in ('60 images of 3 classes', '48 train, 12 val', 'notes.txt', 'broken.jpg'):
        assert words in output
    last, printed = train(path, tmp_path)
    assert 'accuracy/top1' in printed
    dumped = tmp_path / 'work_dirs' / path.stem / path.name
    done = call_tool('test.py', dumped, last, '--work-dir', 'again', folder=tmp_path, cwd=tmp_path)
    assert done.returncode == 0, done.stdout[-3000:]
    accuracy = re.compile(r'accuracy/top1: [\d.]+')
    assert accuracy.search(done.stdout)[0] == accuracy.search(printed)[0]
    monkeypatch.chdir(tmp_path)
    inferencer = ImageClassificationInferencer(str(path), pretrained=last, device='cpu')
    assert inferencer.classes == list(names)
    assert inferencer('data/digits/zero/zero 3.png')[0]['pred_class'] in names
    samples = [line.rsplit(' ', 1) for line in (path.parent / 'train.txt').read_text().splitlines()]
    assert all(name.split('/')[0] == names[int(label)] for name, label in samples)


def test_classification_from_scratch_in_theirs(digits, tmp_path, monkeypatch):
    """Folders of splits, the recipe as it is; read by mmpretrain's own tool, which prints it."""
    import mmpretrain

    for split, numbers in (('train', range(8)), ('valid', range(8, 10)), ('test', range(10, 12))):
        for name in NAMES[: 3 if split == 'train' else 2]:  # a class may be missing in validation
            (tmp_path / 'set' / split / name).mkdir(parents=True)
            for i in numbers:
                shutil.copy(digits / name / f'{name} {i}.png', tmp_path / 'set' / split / name)
    output, path = call(tmp_path, 'classification', 'set')
    assert '24 train, 4 val, 4 test' in output
    config = Config.fromfile(path)
    assert config.train_cfg.max_epochs == 300 and config.model.head.num_classes == 3
    assert config.test_dataloader.dataset.ann_file.endswith('test.txt')
    tool = f'{mmpretrain.__path__[0]}/.mim/tools/misc/print_config.py'
    done = call_tool(tool, path, folder=tmp_path, cwd=tmp_path)
    assert done.returncode == 0 and "arch='tiny-light'" in done.stdout.replace('"', "'"), done.stdout


def test_detection(scenes, init, tmp_path, monkeypatch):
    from mmdet.apis import inference_detector, init_detector

    options = ['--init', init, '--size', '64', '--epochs', '1']
    output, path = call(tmp_path, 'detection', scenes / 'coco', *options)
    assert '12 images, 96 x 96: 8 train, 4 val' in output
    last, printed = train(path, tmp_path, 'train_dataloader.batch_size=4')
    assert 'coco/bbox_mAP' in printed
    detector = init_detector(str(path), last, device='cpu')
    assert detector.dataset_meta['classes'] == Config.fromfile(path).classes
    result = inference_detector(detector, str(next((scenes / 'coco' / 'val').iterdir())))
    assert result.pred_instances.bboxes.shape[1] == 4


def write_voc(folder, boxes, size=(60, 50), **saving):
    for name in ('Annotations', 'JPEGImages'):
        (folder / name).mkdir(parents=True, exist_ok=True)
    for i, (label, *corners) in enumerate(boxes):
        Image.new('RGB', size).save(folder / 'JPEGImages' / f'{i}.jpg', **saving)
        root = ElementTree.Element('annotation')
        node = ElementTree.SubElement(root, 'object')
        ElementTree.SubElement(node, 'name').text = label
        box = ElementTree.SubElement(node, 'bndbox')
        for key, value in zip(('xmin', 'ymin', 'xmax', 'ymax'), corners):
            ElementTree.SubElement(box, key).text = str(value)
        ElementTree.ElementTree(root).write(folder / 'Annotations' / f'{i}.xml')
    return folder


def test_detection_from_voc(tmp_path, monkeypatch):
    """Boxes are cut to their images, those without area are counted, a fifth is held out."""
    monkeypatch.chdir(tmp_path)
    boxes = [('cell', 5, 5, 30, 40), ('dot', 10, 10, 10, 20), ('dot', -9, 2, 70, 20), *[('cell', 1, 2, 3, 4)] * 7]
    written = write_detection(write_voc(tmp_path / 'voc', boxes))
    assert any('1 boxes without area' in line and '1.jpg' in line for line in written.found)
    parts = [json.loads((written.config.parent / f'{split}.json').read_text()) for split in ('train', 'val')]
    assert [len(part['images']) for part in parts] == [8, 2]
    found = {box['image_id']: box['bbox'] for part in parts for box in part['annotations']}
    assert found[2] == [0, 2, 60, 18] and found[0] == [5, 5, 25, 35]
    config = Config.fromfile(written.config)
    assert config.classes == ['cell', 'dot'] and config.model.roi_head.bbox_head.num_classes == 2
    assert min(box['id'] for part in parts for box in part['annotations']) == 1  # COCO's evaluation misses one of 0


def lying(orientation=6) -> Image.Exif:
    exif = Image.Exif()
    exif[0x0112] = orientation
    return exif


def test_pictures_that_lie_on_their_side(tmp_path, monkeypatch):
    """Boxes and label maps belong to pictures as they are shown."""
    monkeypatch.chdir(tmp_path)
    written = write_detection(write_voc(tmp_path / 'voc', [('cell', 5, 5, 30, 58)] * 5, exif=lying()))
    content = json.loads((written.config.parent / 'train.json').read_text())
    assert content['images'][0]['width'] == 50 and content['annotations'][0]['bbox'] == [5, 5, 25, 53]
    for i in range(2):
        for name in ('images', 'masks'):
            (tmp_path / 'maps' / name).mkdir(parents=True, exist_ok=True)
        Image.new('RGB', (60, 50)).save(tmp_path / 'maps' / 'images' / f'{i}.jpg', exif=lying())
        Image.fromarray(np.eye(60, 50, dtype=np.uint8)).save(tmp_path / 'maps' / 'masks' / f'{i}.png')
    config = Config.fromfile(write_segmentation('maps').config)
    init_default_scope('mmseg')
    sample = read_sample(DATASETS.build(config.val_dataloader.dataset), 0)
    assert sample['data_samples'].gt_sem_seg.shape == (60, 50)


def test_boxes_that_lack_what_evaluation_reads(tmp_path, monkeypatch):
    """Folders of splits below a folder that has a split's name itself."""
    monkeypatch.chdir(tmp_path)
    boxes = [dict(id=7, image_id=i, category_id=1, area=600, bbox=[1, 1, 20, 30]) for i in range(2)]
    root = tmp_path / 'test' / 'cells'
    for split in ('train', 'val'):
        coco(annotations=boxes)(root / split)
    written = write_detection(root)
    assert any('written anew' in line for line in written.found) and any(
        '3 images without' in line for line in written.found
    )
    config = Config.fromfile(written.config)
    for split, loader in (('train', config.train_dataloader), ('val', config.val_dataloader)):
        assert loader.dataset.data_prefix.img == f'{root}/{split}'
        content = json.loads((tmp_path / loader.dataset.ann_file).read_text())
        assert content['annotations'] == [dict(box, id=i, iscrowd=0) for i, box in enumerate(boxes, 1)]


def test_images_beside_others_of_their_names(tmp_path, monkeypatch):
    """Depth maps, previews and linked folders; what is turned by EXIF is noted."""
    monkeypatch.chdir(tmp_path)
    coco()(tmp_path / 'data')
    (tmp_path / 'disk').mkdir()
    for folder in ('depth', 'previews'):
        (tmp_path / 'data' / folder).mkdir()
    for i in range(3):
        shutil.copy(tmp_path / 'data' / f'{i}.png', tmp_path / 'data' / 'depth')
        shutil.move(tmp_path / 'data' / f'{i}.png', tmp_path / 'disk')
    shutil.copy(tmp_path / 'disk' / '0.png', tmp_path / 'data' / 'previews')
    (tmp_path / 'data' / 'colour').symlink_to(tmp_path / 'disk')
    (tmp_path / 'data' / 'above').symlink_to(tmp_path / 'data')
    with pytest.raises(ValueError, match='fits the images in data/.* call one of these folders images'):
        write_detection('data')
    (tmp_path / 'data' / 'colour').rename(tmp_path / 'data' / 'images')
    Image.new('RGB', (8, 9)).save(tmp_path / 'disk' / '2.png', exif=lying())
    written = write_detection('data')
    assert Config.fromfile(written.config).train_dataloader.dataset.data_prefix.img == 'data/images'
    found = '\n'.join(written.found)
    assert 'images of annotations.json: in data/images, not data/depth' in found
    assert '1 images are not of the size in data/annotations.json' in found


def test_segmentation(scenes, init, tmp_path, monkeypatch):
    from mmseg.apis import inference_model, init_model

    options = ['--init', init, '--size', '64', '--epochs', '2']
    output, path = call(tmp_path, 'segmentation', scenes / 'maps', *options)
    assert '12 images with label maps, 96 x 96: 8 train, 4 val' in output and 'pixels of 11 are ignored' in output
    last, printed = train(path, tmp_path)
    assert 'mIoU' in printed
    segmentor = init_model(str(path), last, device='cpu')
    result = inference_model(segmentor, str(next((scenes / 'maps' / 'images' / 'val').iterdir())))
    assert segmentor.dataset_meta['classes'][0] == 'background'
    assert result.pred_sem_seg.data.shape == (1, 96, 96)
    monkeypatch.chdir(tmp_path)
    config = Config.fromfile(path)
    data = dict(config.train_dataloader.dataset, pipeline=config.val_dataloader.dataset.pipeline)
    for wrapper in (dict(type='RepeatDataset', times=2, dataset=data), dict(type='ConcatDataset', datasets=[data] * 2)):
        dataset = DATASETS.build(dict(_scope_='mmseg', **wrapper))
        labels = [read_sample(dataset, i)['data_samples'].gt_sem_seg.data for i in range(len(dataset))]
        assert len(labels) == 16 and any(11 in part for part in labels)


@pytest.mark.parametrize(
    'writer, data, model', [(write_detection, 'coco', 'dino'), *((write_segmentation, 'maps', m) for m in MODELS)]
)
def test_other_models(writer, data, model, scenes, init, tmp_path):
    """Their configs build, with the channels of the checkpoint's arch and the classes of the data."""
    config = Config.fromfile(writer(scenes / data, tmp_path, init, model=model).config)
    built = build_model(config)
    head = built.bbox_head if data == 'coco' else built.decode_head
    assert head.num_classes == len(config.classes) and built.backbone.embed_dims == 16
    assert config.train_dataloader.dataset.data_prefix


def test_label_maps_of_other_names(tmp_path, monkeypatch):
    """Names that go on after what they share; classes are counted, and 255 is ignored."""
    monkeypatch.chdir(tmp_path)
    for split in ('train', 'val'):
        for folder, end, picture in (('leftImg8bit', 'left.png', 99), ('gtFine', 'ids.png', 1)):
            (tmp_path / 'streets' / folder / split / 'town').mkdir(parents=True)
            for i in range(3):
                values = np.full((32, 32), picture, np.uint8)
                values[:, :9] = 0 if end == 'ids.png' else 5
                values[0] = 255
                Image.fromarray(values).save(tmp_path / 'streets' / folder / split / 'town' / f'{i}_{end}')
    written = write_segmentation('streets')
    config = Config.fromfile(written.config)
    assert config.classes == ['0', '1'] and config.model.decode_head.ignore_index == 255
    assert config.train_dataloader.dataset.seg_map_suffix == '_ids.png'
    assert (written.config.parent / 'val.txt').read_text().split() == ['town/0', 'town/1', 'town/2']


def empty_class(root):
    (root / 'one').mkdir(parents=True)
    (root / 'two').mkdir()
    Image.new('RGB', (8, 8)).save(root / 'one' / 'a.png')
    Image.new('RGB', (8, 8)).save(root / 'one' / 'b.png')


def few_images(root):
    for name in ('one', 'two'):
        (root / name).mkdir(parents=True)
        for i in range(2):
            Image.new('RGB', (8, 8)).save(root / name / f'{i}.png')


def test_batches_of_few_images(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    few_images(tmp_path / 'few')
    assert Config.fromfile(write_classification('few').config).train_dataloader.batch_size == 2


def loose_image(root):
    root.mkdir()
    Image.new('RGB', (8, 8)).save(root / 'a.png')


COCO = dict(
    images=[dict(id=i, file_name=f'{i}.png', width=8, height=8) for i in range(3)],
    annotations=[dict(id=0, image_id=0, category_id=1, bbox=[1, 1, 4, 4], area=16, iscrowd=0)],
    categories=[dict(id=1, name='cell')],
)


def coco(twice=False, **changes):
    def write(root):
        root.mkdir(parents=True)
        for i in range(3):
            Image.new('RGB', (8, 8)).save(root / f'{i}.png')
        for name in ('a', 'annotations') if twice else ('annotations',):
            (root / f'{name}.json').write_text(json.dumps({**COCO, **changes}))

    return write


def maps(values, size=(8, 8), mode=None, classes=None):
    def write(root):
        for name in ('images', 'masks'):
            (root / name).mkdir(parents=True)
        for i in range(2):
            Image.new('RGB', (8, 8)).save(root / 'images' / f'{i}.png')
            labels = np.resize(np.array(values, np.uint16 if max(values) > 255 else np.uint8), size)
            Image.fromarray(labels).convert(mode or None).save(root / 'masks' / f'{i}.png')
        if classes:
            (root / 'classes.txt').write_text('\n'.join(classes))

    return write


@pytest.mark.parametrize(
    'writer, make, options, words',
    [
        (write_classification, lambda root: None, {}, 'no folder'),
        (write_classification, empty_class, {}, r'two must hold images that can be read, at least 2, but has 0'),
        (write_classification, few_images, dict(batch_size=5), 'at most the 2 training images of data, but got 5'),
        (write_classification, loose_image, {}, 'must be in the folder of its class'),
        (write_classification, empty_class, dict(epochs=1), 'epochs must be at least 2'),
        (write_detection, lambda root: root.mkdir(), {}, 'has no annotations'),
        (write_detection, coco(categories=[]), {}, 'has no categories'),
        (write_detection, coco(twice=True), {}, r'a.json and .*annotations.json are both for train; keep one'),
        (write_detection, coco(annotations=[]), {}, 'has no annotations'),
        (
            write_detection,
            coco(images=[*COCO['images'], dict(COCO['images'][0], id=9, file_name='9.png')]),
            {},
            'lists 9.png, but data does not contain',
        ),
        (write_detection, coco(annotations=[dict(image_id=0, bbox=[1, 1, 2, 2])]), {}, 'must have category_id in each'),
        (write_detection, coco(categories=[dict(id=2, name='x')]), {}, 'category_id 1, which no category has'),
        (write_detection, coco(), dict(model='yolo'), "model must be one of faster-rcnn, dino, but got 'yolo'"),
        (write_detection, coco(), dict(model='dino', size=64), 'size must be at least 320 for dino'),
        (write_detection, coco(), dict(batch_size=0), 'batch_size must be positive, but got 0'),
        (write_segmentation, lambda root: root.mkdir(), {}, 'must have a folder of images'),
        (write_segmentation, maps([0, 255]), {}, 'is a mask of 0 and 255'),
        (write_segmentation, maps([0, 3, 7]), {}, 'class numbers from 0 without gaps'),
        (write_segmentation, maps([0, 1, 2, 3], classes=['a', 'b']), {}, 'names 2 classes, and at most one more'),
        (write_segmentation, maps([0, 1], size=(9, 8)), {}, 'must have the 8 x 8 pixels of its image, but has 8 x 9'),
        (write_segmentation, maps([0, 1, 256]), {}, 'must hold numbers from 0 to 255, but has 256'),
        (write_segmentation, maps([0, 0]), {}, 'at least two classes, as all label maps together'),
        (write_segmentation, maps([255, 255]), {}, 'at least two classes, as all label maps together, .* have 255$'),
        (write_segmentation, maps([0, 128], classes=['a', 'b']), {}, 'have 0, 128, one of them to be ignored$'),
        (write_segmentation, maps([1, 255], classes=['a', 'b']), {}, 'have 1, 255, one of them to be ignored$'),
        (write_segmentation, maps([0, 1], classes=['a']), {}, 'at least two classes, the background among them'),
        (write_segmentation, maps([0, 1], mode='RGB'), {}, r'has colours \(mode RGB\)'),
        (write_segmentation, maps([0, 1]), dict(arch='huge'), "arch must be one of .* but got 'huge'"),
        (write_segmentation, maps([0, 1]), dict(init='none.pth'), 'no checkpoint at none.pth'),
    ],
)
def test_wrong_folders(writer, make, options, words, tmp_path, monkeypatch):
    """One sentence each, and nothing is written."""
    monkeypatch.chdir(tmp_path)
    make(tmp_path / 'data')
    with pytest.raises((ValueError, FileNotFoundError), match=words) as error:
        writer('data', **options)
    assert '\n' not in str(error.value)
    assert not (tmp_path / 'own_data').exists() or not list((tmp_path / 'own_data').rglob('*.*'))


@pytest.mark.parametrize(
    'arguments',
    [
        dict(arch=dict(embed_dims=48, depths=(1, 1, 1, 1), num_patches=(6, 12, 24, 48), mlp_ratio=2), strip_width=5),
        dict(arch=dict(embed_dims=16, depths=(1, 2, 1, 1)), branches='cgsmm'),
        dict(arch=dict(embed_dims=10, depths=(1, 1, 1, 1)), num_patches=5),
    ],
)
def test_checkpoints_of_any_arch(arguments, digits, tmp_path):
    torch.save(StripMLP(**arguments, img_size=32).state_dict(), tmp_path / 'weights.pth')
    config = Config.fromfile(write_classification(digits, tmp_path / 'out', init=tmp_path / 'weights.pth').config)
    settings = {
        key: value for key, value in config.model.backbone.items() if key not in ('type', '_scope_', 'init_cfg')
    }
    StripMLP(**settings).load_state_dict(torch.load(tmp_path / 'weights.pth'))


@pytest.mark.parametrize('prefix', ['', '_orig_mod.'])
def test_checkpoints_of_other_projects_and_compiled_models(prefix, digits, tmp_path):
    model = StripMLP(dict(embed_dims=16, depths=(1, 1, 1, 1)), img_size=32)
    weights = {f'{prefix}backbone.{key}': value for key, value in model.state_dict().items()}
    torch.save(dict(model=weights), tmp_path / 'weights.pth')
    config = Config.fromfile(write_classification(digits, tmp_path / 'out', init=tmp_path / 'weights.pth').config)
    init = dict(type='Pretrained', checkpoint=str(tmp_path / 'weights.pth'), prefix='backbone.')
    assert config.model.backbone.init_cfg == init


def test_checkpoints_of_others(digits, tmp_path):
    weights = tmp_path / 'resnet.pth'
    torch.save(dict(state_dict={'conv1.weight': torch.zeros(1)}), weights)
    with pytest.raises(ValueError, match=r'resnet.pth: it holds no Strip-MLP .* conv1.weight'):
        write_classification(digits, tmp_path / 'out', init=weights)
    torch.save([1], weights)
    with pytest.raises(ValueError, match='resnet.pth: it holds no Strip-MLP'):
        write_classification(digits, tmp_path / 'out', init=weights)
    part = StripMLP(dict(embed_dims=16, depths=(1, 1, 1, 1)), img_size=32).state_dict()
    part.pop('stages.0.0.channel_mixing.fc1.weight')
    torch.save(part, weights)
    with pytest.raises(ValueError, match='resnet.pth: it has no whole Strip-MLP: KeyError.*fc1.weight'):
        write_classification(digits, tmp_path / 'out', init=weights)
    short = tmp_path / 'short.pth'
    torch.save(StripMLP(dict(embed_dims=16, depths=(1, 1, 1, 1)), img_size=32, out_indices=(1, 2)).state_dict(), short)
    with pytest.raises(ValueError, match=r'short.pth: it must have blocks in all 4 stages, but has \(1, 1, 1, 0\)'):
        write_classification(digits, tmp_path / 'out', init=short)
    done = call_tool(TOOL, 'classification', digits, '--init', weights, folder=tmp_path, cwd=tmp_path)
    assert done.returncode == 1 and done.stdout.startswith('Error: init: '), done.stdout
