"""The queue of the evidence: each part's smallest case, on digits, from the runs to the page."""

import json
import re
from dataclasses import replace

import pytest
from helpers import ROOT
from helpers.runs import ForkedRun
from PIL import Image

from benchmarks import CONFIGS
from benchmarks.evidence.experiments import EPOCHS, PARTS, RATE, RATES, TOP1, choose_rate, declared, with_rate
from benchmarks.evidence.page import TABLES, write_page
from benchmarks.evidence.queue import Queue
from benchmarks.evidence.run import Run, is_done, read_results
from benchmarks.results import write_json
from mmstrip.datasets.digit_scenes import write_digit_scenes
from mmstrip.utils.config import load_config

SPLITS = ('train', 'val', 'test')
SHORT = {
    EPOCHS: 1,
    'param_scheduler': None,
    'model.backbone.arch.depths': [1, 1, 1, 1],
    'train_dataloader.batch_size': 16,
    **{f'{split}_dataloader.dataset.indices': 32 for split in SPLITS},
}
DIGITS = Run('caltech101', 'strip-mlp-tiny-light_seed0', 'strip_mlp/strip-mlp-nano_1xb64_digits-64px.py', TOP1, SHORT)
SCENES = 'segmentation/strip-mlp-nano_fpn_1xb8_digit-scenes.py'


class ForkedQueue(Queue):
    """Its processes share their imports."""

    def _launch(self, folder, log, threads):
        return ForkedRun(folder, log)


def smallest(results):
    """A learning rate chosen, a classifier with it, an ablation, and a segmentor from the classifier."""
    choosing = choose_rate(replace(DIGITS, options={**SHORT, EPOCHS: 2}), 'strip-mlp-tiny-light', (1e-3,), 1)
    whole = with_rate(DIGITS, choosing, results)
    narrow = {**SHORT, 'model.backbone.strip_width': 1}
    ablation = replace(DIGITS, part='ablations', name='strip-width-1_seed0', options=narrow)
    segmentor = Run('transfer', 'camvid_strip-mlp-tiny-light_from-classifier', SCENES, {'mIoU': ('mIoU', 100)}, SHORT)
    return [*choosing, replace(segmentor, start=whole.key), whole, ablation]


@pytest.fixture(scope='module')
def queue(tmp_path_factory):
    """What the queue leaves after the smallest case of each kind."""
    folder = tmp_path_factory.mktemp('evidence')
    write_digit_scenes(folder / 'data/digit_scenes', num_train=32, num_val=32, size=64)
    queue = ForkedQueue(smallest, folder / 'results', folder / 'work', str(folder / 'data'), jobs=2)
    left = queue.work()
    assert left == 0, [file.read_text()[-2000:] for file in folder.glob('work/*/*/log.txt')]
    return queue


def test_each_kind_of_run_leaves_its_result(queue):
    results = read_results(queue.results)
    runs = smallest(results)
    assert set(results) == {run.key for run in runs} and all(is_done(run, results) for run in runs)
    for run in runs:
        result = results[run.key]
        (metric,) = run.metrics
        assert 0 <= result[metric] <= 1
        assert [point['epoch'] for point in result['curve']] == [1] and metric in result['curve'][0]
        assert result['core_minutes'] > 0 and result['images_per_second'] > 0 and result['flops'] > 1e6
        assert result['machine']['threads'] == 1
    assert results[DIGITS.key]['settings']['options'][RATE] == 1e-3
    run = results['transfer/camvid_strip-mlp-tiny-light_from-classifier']
    assert list(run['padding']) == ['1', '32', '128'] and list(run['padding_ignored']) == ['32', '128']
    assert all(0 <= found['mIoU'] <= 1 for found in [*run['padding'].values(), *run['padding_ignored'].values()])
    narrow, shared = results['ablations/strip-width-1_seed0'], results[DIGITS.key]
    assert narrow['params'] < shared['params']
    log = (queue.work_dir / 'transfer/camvid_strip-mlp-tiny-light_from-classifier/log.txt').read_text()
    assert 'load backbone. in model from:' in log and f'{DIGITS.key}/epoch_1.pth' in log


def test_a_run_that_chooses_reads_no_test_image(queue):
    folder = queue.work_dir / 'caltech101/choose_strip-mlp-tiny-light_lr0.001'
    assert 'Epoch(test)' not in (folder / 'log.txt').read_text()
    (dumped,) = folder.glob('*.py')
    assert load_config(str(dumped)).test_dataloader is None
    assert (queue.work_dir / DIGITS.key / 'log.txt').read_text().count('Epoch(test) [1/') <= 1


def test_what_has_its_result_is_not_run_again(queue, capsys):
    assert Queue(smallest, queue.results, queue.work_dir, queue.data_root).work() == 0
    assert 'begins' not in capsys.readouterr().out
    # A result that nobody waited for is taken over.
    file = queue.results / f'{DIGITS.key}.json'
    file.unlink()
    assert Queue(smallest, queue.results, queue.work_dir, queue.data_root).work() == 0
    assert file.is_file() and 'begins' not in capsys.readouterr().out


def test_a_classifier_whose_checkpoint_is_gone_is_trained_again(queue, tmp_path):
    again = ForkedQueue(smallest, tmp_path / 'results', tmp_path / 'work', queue.data_root)
    for key, result in read_results(queue.results).items():
        if 'transfer' not in key:
            write_json(tmp_path / 'results' / f'{key}.json', result)
    assert again._next().key == DIGITS.key
    again.failed.add(DIGITS.key)
    assert again._next() is None


def test_other_settings_are_another_run(queue):
    results = read_results(queue.results)
    run = smallest(results)[2]
    assert is_done(run, results)
    assert not is_done(replace(run, seed=1), results)
    assert not is_done(replace(run, options={**run.options, EPOCHS: 2}), results)


def test_a_stopped_run_resumes(tmp_path):
    run = replace(DIGITS, options={**SHORT, EPOCHS: 20, 'train_cfg.val_interval': 20})
    folder = tmp_path / 'work' / run.key
    stopped = []

    def runs(results):
        if not stopped and list(folder.glob('epoch_*.pth')):
            stopped.append(True)
            raise KeyboardInterrupt
        return [run]

    queue = ForkedQueue(runs, tmp_path / 'results', tmp_path / 'work', 'nowhere', jobs=2)
    with pytest.raises(KeyboardInterrupt):
        queue.work()
    assert not (tmp_path / 'results').exists()
    assert ForkedQueue(runs, tmp_path / 'results', tmp_path / 'work', 'nowhere').work() == 0
    assert 'Resuming from' in (folder / 'log.txt').read_text()
    result = json.loads((tmp_path / 'results' / f'{run.key}.json').read_text())
    assert result['epochs'] == 20 and result['images_per_second'] > 0


def test_the_page_is_drawn_from_the_results(queue, tmp_path):
    page = tmp_path / 'results.md'
    page.write_text((ROOT / 'docs/results.md').read_text())
    files = write_page(queue.results, page, queue.work_dir)
    text = page.read_text()
    accuracy = 100 * read_results(queue.results)[DIGITS.key]['top-1']
    (row,) = re.findall(rf'\| strip-mlp-tiny-light \| {accuracy:.2f} \| 1 \|.*', text)
    assert row.endswith('| not yet measured | not yet measured |')
    assert '| resnet50 | not yet run |' in text and '| strip width | 7 | not yet run |' in text
    assert {file.name for file in files} >= {
        'results.md',
        'results_caltech101.png',
        'results_transfer.png',
        'results_camvid.jpg',
    }
    assert 'results_caltech101_confusion_matrix.png' in {file.name for file in files}
    assert Image.open(tmp_path / 'images/results_caltech101.png').width > 500
    assert Image.open(tmp_path / 'images/results_camvid.jpg').width == 1400
    # The minutes are those of a speed that was measured in common.
    speed = dict(label='strip-mlp-tiny-light', images_per_second=8.0)
    write_json(tmp_path / 'results' / 'speed' / 'benchmark.json', dict(results=[speed]))
    write_json(tmp_path / 'results' / f'{DIGITS.key}.json', read_results(queue.results)[DIGITS.key])
    write_page(tmp_path / 'results', page, queue.work_dir)
    assert '| 0.1 | 8.0 |' in page.read_text()  # 32 images
    page.write_text('<!-- results: wrong -->\n<!-- end -->')
    with pytest.raises(ValueError, match='caltech101.*wrong'):
        write_page(queue.results, page, queue.work_dir)


def test_directions_are_judged_by_the_spread_of_the_seeds():
    values = {'shared': (0.5, 0.51, 0.52), 'strip-width-1': (0.40, 0.42, 0.41), 'branches-lsmm': (0.49, 0.53, 0.50)}
    values['rows-and-columns-parallel'] = (0.6, 0.61, 0.62)
    results = {
        f'ablations/{name}_seed{seed}': {'top-1': value, 'params': 1}
        for name, found in values.items()
        for seed, value in enumerate(found)
    }
    text = TABLES['ablations'](results)
    assert "strip width, 3 over 1: +10.00 ± 0.82 points; the paper's direction holds." in text
    assert re.search(r'cascade over parallel: -10\.00 .* is reversed\.', text)
    assert re.search(r'both over LSMM: .* is within the noise of the seeds\.', text)
    assert 'over CGSMM' not in text


def test_a_run_without_its_data_fails_and_says_why(tmp_path, capsys):
    run = replace(DIGITS, config='strip_mlp/strip-mlp-nano_1xb32_caltech101-64px.py')
    assert Queue(lambda results: [run], tmp_path / 'results', tmp_path / 'work', str(tmp_path / 'no')).work() == 1
    assert f'no folder {tmp_path}/no/caltech101_96px' in capsys.readouterr().out


def test_declared_runs_exist_and_are_unique():
    runs = declared(PARTS, {})
    assert len({run.key for run in runs}) == len(runs) > 60
    for run in {run.config: run for run in runs}.values():
        config = load_config(str(CONFIGS / run.config), run.options)
        assert config.train_cfg.max_epochs == run.options[EPOCHS]
        # Nothing is chosen, nor a curve drawn, on test images.
        loaders = [config[f'{split}_dataloader'].dataset for split in SPLITS]
        images = {str(loader.get('split') or loader.get('ann_file') or loader.data_prefix) for loader in loaders}
        assert len(images) == (2 if 'digit-scenes' in run.config else 3)
    assert all(run.choosing or run.waits for run in runs)  # learning rates first


def test_places_and_rates_follow_the_results(tmp_path):
    """Seeds 1 and 2 of the two best models on held-out images, at the rates that were best there."""
    results = {}
    for run in (run for run in declared(['caltech101'], {}) if run.choosing):
        results[run.key] = dict(settings=run.settings, **{'top-1': run.options[RATE]})
    firsts = [run for run in declared(['caltech101'], results) if run.name.endswith('_seed0')]
    assert len(firsts) == 5 and all(run.options[RATE] == max(RATES) and not run.waits for run in firsts)
    for i, run in enumerate(firsts):
        results[run.key] = dict(settings=run.settings, curve=[{'top-1': i / 10}], **{'top-1': 1 - i / 10})
    further = [run for run in declared(['caltech101'], results) if not is_done(run, results)]
    assert {run.name for run in further} == {f'{m}_seed{s}' for m in ('convnext-tiny', 'swin-tiny') for s in (1, 2)}
    write_json(tmp_path / 'caltech101' / 'a.json', {})
    assert read_results(tmp_path) == {'caltech101/a': {}}
