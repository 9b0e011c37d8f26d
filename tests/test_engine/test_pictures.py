"""Pictures of predictions, and names of classes and files in pictures."""

import os
import warnings
from types import SimpleNamespace

import mmcv
import numpy as np
import pytest
import torch
from fontTools.ttLib import TTFont
from matplotlib import font_manager
from mmdet.structures import DetDataSample
from mmdet.visualization import DetLocalVisualizer
from mmengine.structures import InstanceData, PixelData
from mmengine.visualization import Visualizer
from mmpretrain.structures import DataSample
from mmpretrain.visualization import UniversalVisualizer
from mmseg.structures import SegDataSample
from mmseg.visualization import SegLocalVisualizer

from mmstrip.engine.hooks.pictures import PredictionPicturesHook, picture_names
from mmstrip.utils import plots

NAMES = ['$x_', 'a_$^$', r'$\frac{$', '猫', '狗$', 'two\nlines', 'x' * 5000, '\udce9\0\x1b', '_hidden', '']


@pytest.fixture
def said(monkeypatch):
    """What is logged of fonts."""
    found = []
    monkeypatch.setattr(plots, 'print_log', lambda words, **_: found.append(words))
    plots._family_with.cache_clear()
    yield found
    plots._family_with.cache_clear()


@pytest.fixture
def font(tmp_path, monkeypatch):
    """A font with two Chinese characters, which was installed after matplotlib has listed the machine's."""
    chinese, path = TTFont(font_manager.findfont('DejaVu Sans')), str(tmp_path / 'han.ttf')
    for part in chinese['cmap'].tables:
        if part.isUnicode():
            part.cmap.update({ord('猫'): 'A', ord('狗'): 'B'})
    for name in chinese['name'].names:
        if name.nameID in (1, 4, 16):
            name.string = 'Test Han'
    chinese.save(path)
    listed = list(font_manager.fontManager.ttflist)
    monkeypatch.setattr(font_manager, 'findSystemFonts', lambda: [path, str(tmp_path / 'gone.ttf')])
    yield
    font_manager.fontManager.ttflist[:] = listed


def classified(count):
    return (
        DataSample().set_gt_label(list(range(count))).set_pred_label(0).set_pred_score(torch.full((count,), 1 / count))
    )


def detected(count):
    boxes = torch.tensor([[2.0, 2.0, 30.0, 30.0]]).repeat(count, 1)
    found = InstanceData(bboxes=boxes, labels=torch.arange(count), scores=torch.full((count,), 0.9))
    return DetDataSample(gt_instances=InstanceData(bboxes=boxes, labels=torch.arange(count)), pred_instances=found)


def segmented(count):
    labels = torch.arange(32 * 32).reshape(1, 32, 32) * count // 1024
    labels[0, 0, 0] = 255
    return SegDataSample(gt_sem_seg=PixelData(data=labels), pred_sem_seg=PixelData(data=labels))


TASKS = {
    'classification': (UniversalVisualizer, classified),
    'detection': (DetLocalVisualizer, detected),
    'segmentation': (SegLocalVisualizer, segmented),
}


def draw(task, folder, paths, names, batch=None, **options):
    """Pictures of samples at these paths, one a batch."""
    kind, sample_of = TASKS[task]
    visualizer = kind()
    visualizer.dataset_meta = meta = dict(classes=names, palette=[(i, 9 * i % 256, 99) for i in range(len(names))])
    dataset = [SimpleNamespace(img_path=str(path)) for path in paths]
    infos = type('Infos', (), dict(get_data_info=lambda self, i: vars(dataset[i]), __len__=lambda self: len(dataset)))()
    model = SimpleNamespace(data_preprocessor=SimpleNamespace(to_rgb=True))
    runner = SimpleNamespace(visualizer=visualizer, test_dataloader=SimpleNamespace(dataset=infos), model=model)
    hook = PredictionPicturesHook(str(folder), **options)
    hook.before_test(runner)
    for number, path in enumerate(paths):
        sample = sample_of(len(names))
        if path != 'none':
            sample.set_metainfo(dict(img_path=str(path), ori_shape=(32, 32)))
        hook.after_test_iter(runner, number, batch, [sample])
    assert visualizer.dataset_meta is meta and '_draw_sem_seg' not in vars(visualizer)
    return sorted(str(path.relative_to(folder)) for path in folder.rglob('*.png'))


@pytest.fixture
def images(tmp_path):
    """Four images in each of two class folders, by the same names in both."""
    paths = [tmp_path / 'data' / name / f'{i}.png' for name in ('cat', 'dog') for i in range(4)]
    for path in paths:
        mmcv.imwrite(np.full((32, 32, 3), (250, 20, 30), np.uint8), str(path))
    return paths


@pytest.mark.parametrize('task', TASKS)
def test_images_of_one_name_have_pictures_of_their_own(task, images, tmp_path):
    """The same ones in each run, whichever images are drawn."""
    every = [f'{name}/{i}.png' for name in ('cat', 'dog') for i in range(4)]
    assert draw(task, tmp_path / 'all', images, ['one', 'two']) == every
    assert draw(task, tmp_path / 'some', images, ['one', 'two'], interval=3) == [every[0], every[3], every[6]]


def test_an_image_that_is_there_twice_has_two_pictures(images, tmp_path):
    assert draw('classification', tmp_path / 'all', images[:1] * 3, ['one']) == ['0.png', '0_.png', '0__.png']


def test_pictures_stay_inside_of_their_folder():
    """Whatever a file of annotations names its images."""
    assert picture_names(['a/b/1.jpg', 'a/b/../../../c/1.jpg', '/x.png']) == {
        'a/b/1.jpg': f'{os.getcwd()[1:]}/a/b/1',
        'a/b/../../../c/1.jpg': f'{os.path.dirname(os.getcwd())[1:]}/c/1',
        '/x.png': 'x',
    }
    assert picture_names(['s3://bucket/1.jpg', 's3://bucket/a/../../1.jpg']) == {
        's3://bucket/1.jpg': 'bucket/1',
        's3://bucket/a/../../1.jpg': '1',
    }
    assert picture_names([]) == {}


def test_names_of_any_length_and_bytes(images, tmp_path):
    long = '猫' * 80  # of 240 bytes
    odd = [tmp_path / name / f'{stem}.png' for name in (long, 'b') for stem in (long, os.fsdecode(b'\xe9$'), 'a\nb')]
    for path in odd:
        path.parent.mkdir(exist_ok=True)
        path.write_bytes(images[0].read_bytes())
    found = draw('detection', tmp_path / 'all', odd, ['one', 'two'])
    assert found == sorted(str(path.relative_to(tmp_path)) for path in odd)


@pytest.mark.parametrize('task', TASKS)
def test_any_names_of_classes_are_drawn(task, images, tmp_path, said, font):
    with warnings.catch_warnings():
        warnings.simplefilter('error', UserWarning)
        warnings.filterwarnings('ignore', '.*out of bounds')
        draw(task, tmp_path / 'all', images[:1], NAMES)
    assert not said
    plain, chinese = (draw_one(task, tmp_path / name, images[0], [name, 'b']) for name in ('$$', '猫猫'))
    assert (plain != chinese).any()


def draw_one(task, folder, image, names):
    (name,) = draw(task, folder, [image], names)
    return mmcv.imread(str(folder / name))


@pytest.mark.parametrize('task', TASKS)
def test_missing_fonts_are_named_once(task, images, tmp_path, said, monkeypatch):
    monkeypatch.setattr(font_manager, 'findSystemFonts', list)
    with warnings.catch_warnings():
        warnings.simplefilter('error', UserWarning)
        draw(task, tmp_path / 'all', images[:2], ['猫', '狗'])
    (words,) = said
    assert words.startswith('Pictures show boxes in place of 狗猫: matplotlib finds no font')
    draw(task, tmp_path / 'latin', images[:1], ['Über', 'naïve'])
    assert len(said) == 1


def test_plots_draw_any_names(tmp_path, said, font):
    curve, image = ([1, 2], [3, 4]), np.zeros((4, 4, 3))
    with warnings.catch_warnings():
        warnings.simplefilter('error', UserWarning)
        plots.plot_curves({name: dict.fromkeys(NAMES, curve) for name in NAMES[:3]}, '$', tmp_path / '1.png')
        plots.plot_confusion(np.arange(10), np.arange(10), NAMES, tmp_path / '2.png')
        plots.plot_confusion(np.arange(40), np.arange(40), NAMES * 4, tmp_path / '3.png')
        plots.plot_predictions([(image, a, b) for a in NAMES for b in NAMES[:2]], '$_$' * 99, tmp_path / '4.png')
        field = np.ones((4, 4)), (2.0, 2.0), (1.0, 2.0)
        plots.plot_fields(dict.fromkeys(NAMES, field), tmp_path / '5.png')
    assert len(list(tmp_path.glob('*.png'))) == 5 and not said


def test_images_without_a_file_are_drawn_from_the_batch(tmp_path):
    """In RGB, though the network turns BGR into it."""
    blue = torch.zeros(1, 3, 300, 300)
    blue[:, 0] = 255
    names = draw('classification', tmp_path / 'out', ['none', 'digit_7.png'], ['one'], batch=dict(inputs=blue))
    assert names == ['0.png', 'digit_7.png']
    for name in names:
        assert mmcv.imread(str(tmp_path / 'out' / name))[-1, -1].tolist() == [255, 0, 0]


def test_other_visualizers_and_intervals_are_refused():
    runner = SimpleNamespace(visualizer=Visualizer())
    with pytest.raises(ValueError, match="a toolbox's visualizer, .* but the config has mmengine's Visualizer"):
        PredictionPicturesHook('out').before_test(runner)
    for interval in (0, -1, 1.5):
        with pytest.raises(ValueError, match='interval must be a positive int, but got'):
            PredictionPicturesHook('out', interval)
