"""Own images: folders as users have them become configs that train, test and predict, in our tools and in theirs."""

import re
import shutil

import numpy as np
import pytest
import torch
from helpers.own_data import read_splits, write_classes, write_coco, write_pairs, write_picture, write_text, write_voc
from helpers.runs import call_tool
from mmengine.config import Config
from mmengine.registry import DATASETS, PARAM_SCHEDULERS, init_default_scope
from PIL import Image

from mmstrip.models import StripMLP
from mmstrip.own_data import write_classification, write_detection, write_segmentation
from mmstrip.utils.samples import ORIENTATION, read_sample

TOOL = 'misc/own_data.py'
ARCH = dict(embed_dims=16, depths=(1, 1, 1, 1))


def write_weights(path, weights):
    torch.save(weights, path)
    return path


def weights_of(arch=ARCH, prefix='', **arguments):
    model = StripMLP(arch, img_size=32, **arguments)
    return {f'{prefix}{key}': value for key, value in model.state_dict().items()}


def call(folder, *arguments):
    """What the tool prints, run in a folder; its config."""
    done = call_tool(TOOL, *arguments, folder=folder, cwd=folder)
    assert done.returncode == 0, done.stdout
    return done.stdout, folder / re.search(r'wrote (\S+)', done.stdout)[1]


@pytest.mark.parametrize('task', ['classification', 'detection', 'segmentation'])
def test_a_few_steps_reach_the_full_learning_rate(task, tmp_path):
    """In two to four steps of training: mmengine's LinearLR over one step keeps its factor."""
    if task == 'classification':
        written = write_classification(write_classes(tmp_path / 'data', 'ab'), epochs=2)
    elif task == 'detection':
        written = write_detection(write_coco(tmp_path / 'data'), epochs=2)
    else:
        written = write_segmentation(write_pairs(tmp_path / 'data', 'abcde'), epochs=4)
    settings = Config.fromfile(written.config).param_scheduler[0].copy()
    settings.pop('convert_to_iter_based', None)  # one step per epoch
    optimizer = torch.optim.SGD([torch.nn.Parameter(torch.zeros(1))], lr=1.0)
    scheduler = PARAM_SCHEDULERS.build(dict(settings, optimizer=optimizer))
    for _ in range(2):
        optimizer.step()
        scheduler.step()
    assert optimizer.param_groups[0]['lr'] == pytest.approx(1)


def test_the_printed_commands(tmp_path):
    """Train and test, also from the dump of the config, with a name that mmengine would replace."""
    from mmpretrain import ImageClassificationInferencer

    names = ('one', 'zero', '{{$HOME:two}}')
    write_classes(tmp_path / 'disk/my digits', names, 10)
    write_text(tmp_path / 'disk/my digits/one/notes.txt', 'none')
    write_text(tmp_path / 'disk/my digits/one/broken.jpg', 'no image')
    (tmp_path / 'data').mkdir()
    (tmp_path / 'data/digits').symlink_to(tmp_path / 'disk/my digits')
    init = write_weights(tmp_path / 'classifier.pth', dict(state_dict=weights_of(prefix='backbone.')))
    options = ['--init', init, '--size', '32', '--epochs', '2', '--batch-size', '8']
    output, path = call(tmp_path, 'classification', 'data/digits', *options)
    for words in ('30 images of 3 classes', '24 train, 6 val', 'notes.txt', 'broken.jpg'):
        assert words in output
    quick = [f'{part}_dataloader.{key}' for part in ('train', 'val', 'test') for key in ('num_workers=0',)]
    quick += [f'{part}_dataloader.persistent_workers=False' for part in ('train', 'val', 'test')]
    work = tmp_path / 'work_dirs' / path.stem
    printed = []
    for arguments in (
        ['train.py', path.relative_to(tmp_path), '--cfg-options', *quick],
        ['test.py', path.relative_to(tmp_path), work / 'epoch_2.pth', '--cfg-options', *quick],
        ['test.py', work / path.name, work / 'epoch_2.pth', '--work-dir', 'again', '--cfg-options', *quick],
    ):
        done = call_tool(*arguments, folder=tmp_path, cwd=tmp_path)
        assert done.returncode == 0 and 'Failed to search registry' not in done.stdout, done.stdout[-3000:]
        printed += re.findall(r'accuracy/top1: [\d.]+', done.stdout)[-1:]
    assert len(printed) == 3 and printed[1] == printed[2]
    inferencer = ImageClassificationInferencer(str(path), pretrained=str(work / 'epoch_2.pth'), device='cpu')
    assert inferencer.classes == list(names)
    assert inferencer('data/digits/zero/3.png')[0]['pred_class'] in names
    samples = [line.rsplit(' ', 1) for line in (path.parent / 'train.txt').read_text().splitlines()]
    assert all(name.split('/')[0] == names[int(label)] for name, label in samples)


def test_classification_from_scratch_in_theirs(tmp_path):
    """Folders of splits, the recipe as it is; read by mmpretrain's own tool, which prints it."""
    import mmpretrain

    write_classes(tmp_path / 'set/train', ('one', 'two', 'zero'), 8)
    for split in ('valid', 'test'):  # a class may be missing there
        write_classes(tmp_path / 'set' / split, ('one', 'two'), 2)
    output, path = call(tmp_path, 'classification', 'set')
    assert '24 train, 4 val, 4 test' in output
    config = Config.fromfile(path)
    assert config.train_cfg.max_epochs == 300 and config.model.head.num_classes == 3
    assert config.test_dataloader.dataset.ann_file.endswith('test.txt')
    tool = f'{mmpretrain.__path__[0]}/.mim/tools/misc/print_config.py'
    done = call_tool(tool, path, folder=tmp_path, cwd=tmp_path)
    assert done.returncode == 0 and "arch='tiny-light'" in done.stdout.replace('"', "'"), done.stdout


def test_boxes_of_voc_are_cut_to_their_images(tmp_path):
    """Those without area are counted, a fifth is held out."""
    boxes = [('cell', 5, 5, 30, 40), ('dot', 10, 10, 10, 20), ('dot', -9, 2, 70, 20), *[('cell', 1, 2, 3, 4)] * 7]
    written = write_detection(write_voc(tmp_path / 'voc', {str(i): box for i, box in enumerate(boxes)}))
    assert any('1 boxes without area' in line and '1.jpg' in line for line in written.found)
    parts = [part for split, part in read_splits(written.config).items() if split != 'test']
    assert [len(samples) for _, samples in parts] == [8, 2] and parts[0][0] == ('cell', 'dot')
    boxes = {
        sample['img_path'][-5]: [box['bbox'] for box in sample['instances']] for _, part in parts for sample in part
    }
    assert boxes['0'] == [[5, 5, 30, 40]] and boxes['1'] == [] and boxes['2'] == [[0, 2, 64, 20]]


def test_label_maps_of_pictures_that_lie_on_their_side(tmp_path):
    """They belong to pictures as they are shown."""
    exif = Image.Exif()
    exif[ORIENTATION] = 6
    for i in range(2):
        write_picture(tmp_path / f'maps/images/{i}.jpg', exif=exif)
        write_picture(tmp_path / f'maps/masks/{i}.png', Image.fromarray(np.eye(64, 48, dtype=np.uint8)))
    config = Config.fromfile(write_segmentation('maps').config)
    init_default_scope('mmseg')
    sample = read_sample(DATASETS.build(config.val_dataloader.dataset), 0)
    assert sample['data_samples'].gt_sem_seg.shape == (64, 48)


def test_images_beside_others_of_their_names(tmp_path):
    """Depth maps, previews and linked folders; what is turned by EXIF is noted."""
    write_coco(tmp_path / 'data')
    (tmp_path / 'disk').mkdir()
    for folder in ('depth', 'previews'):
        (tmp_path / 'data' / folder).mkdir()
    shutil.copy(tmp_path / 'data/1.jpg', tmp_path / 'data/previews')
    for i in range(1, 5):
        shutil.copy(tmp_path / f'data/{i}.jpg', tmp_path / 'data/depth')
        shutil.move(tmp_path / f'data/{i}.jpg', tmp_path / 'disk')
    (tmp_path / 'data/colour').symlink_to(tmp_path / 'disk')
    (tmp_path / 'data/above').symlink_to(tmp_path / 'data')
    with pytest.raises(ValueError, match='matches the images in data/.* and in .* to images'):
        write_detection('data')
    (tmp_path / 'data/colour').rename(tmp_path / 'data/images')
    write_picture(tmp_path / 'disk/2.jpg', Image.new('RGB', (48, 64)))
    written = write_detection('data')
    assert Config.fromfile(written.config).train_dataloader.dataset.data_prefix.img == 'data/images'
    found = '\n'.join(written.found)
    assert 'images of a.json are in data/images, not data/depth' in found
    assert '1 images differ in size from data/a.json' in found


def test_ignored_numbers_in_wrapped_datasets(tmp_path):
    """The number above the classes' is ignored where transforms and checks read it."""
    write_pairs(tmp_path / 'maps', '012345', values=(0, 1, 2), classes='background\nroad')
    written = write_segmentation('maps', size=64)
    assert any('pixels of 2 are ignored' in line for line in written.found)
    config = Config.fromfile(written.config)
    data = dict(config.train_dataloader.dataset, pipeline=config.val_dataloader.dataset.pipeline)
    for wrapper in (dict(type='RepeatDataset', times=2, dataset=data), dict(type='ConcatDataset', datasets=[data] * 2)):
        dataset = DATASETS.build(dict(_scope_='mmseg', **wrapper))
        labels = [read_sample(dataset, i)['data_samples'].gt_sem_seg.data for i in range(len(dataset))]
        assert len(labels) == 10 and all(2 in part for part in labels)


def test_label_maps_of_other_names(tmp_path):
    """Names that go on after what they share; classes are counted, and 255 is ignored."""
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


def few(root):
    write_classes(root, ('one', 'two'), 2)


def test_batches_of_few_images(tmp_path):
    few(tmp_path / 'few')
    assert Config.fromfile(write_classification('few').config).train_dataloader.batch_size == 2


@pytest.mark.parametrize(
    'arguments',
    [
        dict(arch=dict(embed_dims=48, depths=(1, 1, 1, 1), num_patches=(6, 12, 24, 48), mlp_ratio=2), strip_width=5),
        dict(arch=dict(embed_dims=16, depths=(1, 2, 1, 1)), branches='cgsmm'),
        dict(arch=dict(embed_dims=10, depths=(1, 1, 1, 1)), num_patches=5),
    ],
)
def test_checkpoints_of_any_arch(arguments, tmp_path):
    weights = write_weights(tmp_path / 'weights.pth', weights_of(**arguments))
    few(tmp_path / 'few')
    backbone = Config.fromfile(write_classification('few', init=weights).config).model.backbone
    settings = {key: value for key, value in backbone.items() if key not in ('type', '_scope_', 'init_cfg')}
    StripMLP(**settings).load_state_dict(torch.load(weights))


@pytest.mark.parametrize('prefix', ['', '_orig_mod.'])
def test_checkpoints_of_other_projects_and_compiled_models(prefix, tmp_path):
    weights = write_weights(tmp_path / 'weights.pth', dict(model=weights_of(prefix=f'{prefix}backbone.')))
    few(tmp_path / 'few')
    config = Config.fromfile(write_classification('few', init=weights).config)
    assert config.model.backbone.init_cfg == dict(type='Pretrained', checkpoint=str(weights), prefix='backbone.')


PART = weights_of()
PART.pop('stages.0.0.channel_mixing.fc1.weight')


@pytest.mark.parametrize(
    'content, words',
    [
        (
            dict(state_dict={'conv1.weight': torch.zeros(1)}),
            'it must hold one Strip-MLP .* 0; first keys: conv1.weight',
        ),
        ([1], 'it must hold one Strip-MLP'),
        (PART, 'its Strip-MLP is incomplete: KeyError.*fc1.weight'),
        (weights_of(out_indices=(1, 2)), r'it must have blocks in all 4 stages, but their numbers are \(1, 1, 1, 0\)'),
    ],
)
def test_checkpoints_of_others(content, words, tmp_path):
    few(tmp_path / 'few')
    with pytest.raises(ValueError, match=f'^init: weights.pth: {words}'):
        write_classification('few', init=write_weights('weights.pth', content))


def test_errors_of_the_command(tmp_path):
    few(tmp_path / 'few')
    done = call_tool(TOOL, 'classification', 'few', '--init', 'none.pth', folder=tmp_path, cwd=tmp_path)
    assert done.returncode == 1 and done.stdout.startswith('Error: no checkpoint at none.pth'), done.stdout
