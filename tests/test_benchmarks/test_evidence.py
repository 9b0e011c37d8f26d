"""The queue of the evidence: each part's smallest case, on digits, from the runs to the page."""

import json
import re
from dataclasses import replace
from unittest import mock

import numpy as np
import pytest
import torch
from helpers import ROOT
from helpers.runs import ForkedRun
from PIL import Image

from benchmarks import CONFIGS
from benchmarks.evidence.__main__ import parse_args
from benchmarks.evidence.experiments import EPOCHS, PARTS, RATE, RATES, TOP1, planned_runs, rate_runs, with_best_rate
from benchmarks.evidence.page import TABLES, write_page
from benchmarks.evidence.paired import count_needed, half_width, interval, paired_differences
from benchmarks.evidence.queue import Queue
from benchmarks.evidence.run import Run, is_done, read_results, set_data_root
from benchmarks.results import write_json
from mmstrip.datasets.digit_scenes import write_digit_scenes
from mmstrip.engine.launch import build_runner
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
    choosing = rate_runs(replace(DIGITS, options={**SHORT, EPOCHS: 2}), 'strip-mlp-tiny-light', (1e-3,), 1)
    whole = with_best_rate(DIGITS, choosing, results)
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
    assert 'started' not in capsys.readouterr().out
    # A result that nobody waited for is taken over.
    file = queue.results / f'{DIGITS.key}.json'
    file.unlink()
    assert Queue(smallest, queue.results, queue.work_dir, queue.data_root).work() == 0
    assert file.is_file() and 'started' not in capsys.readouterr().out


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
    assert '| resnet50 | not yet run |' in text and '| strip width: 7 | not yet run |' in text
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
    with pytest.raises(ValueError, match='the mark "results: wrong" must name one of caltech101'):
        write_page(queue.results, page, queue.work_dir)


def ablation_results(values):
    return {
        f'ablations/{name}_seed{seed}': {'top-1': value / 100, 'params': 1}
        for name, found in values.items()
        for seed, value in enumerate(found)
    }


def test_paired_differences_and_their_intervals():
    differences = paired_differences({0: 80.0, 1: 81.0, 2: 82.0, 5: 90.0}, {0: 79.0, 1: 79.0, 2: 79.0, 4: 1.0})
    assert differences == [1.0, 2.0, 3.0]
    # t = 4.303 with 2 degrees of freedom, a standard deviation of 1
    assert interval(differences) == pytest.approx((2.0, 2.484), abs=1e-3)
    assert half_width(1.0, 6) == pytest.approx(1.049, abs=1e-3)
    assert [count_needed(0.5, points) for points in (0.7, 0.5, 0.01)] == [5, 7, None]


def test_claims_are_judged_by_paired_differences_once_all_seeds_are_there(tmp_path):
    shared = [80.0, 82.0, 84.0, 80.0, 82.0, 84.0]  # the spread of the seeds is paired away
    values = {
        'shared': shared,
        'channel-patches-1': [value - shift for value, shift in zip(shared, (1, 2, 3, 1, 2, 3))],
        'branches-lsmm': [value + shift for value, shift in zip(shared, (1, 2, 3, 1, 2, 3))],
        'branches-cgsmm': [value + shift for value, shift in zip(shared, (1, -2, 3, -1, 2, -3))],
        'strip-width-1': [70.0, 70.0, 70.0],
    }
    results = ablation_results(values)
    text = TABLES['ablations'](results)
    assert '| channel patches: 1 | 80.00 ± 0.89 | 6 | 0.00 M | +2.00 ± 0.94 | +1.16, +1.47 |' in text
    assert 'C/4 channel patches are better than one: confirmed.' in text
    assert 'Both branches are better than LSMM alone: contradicted.' in text
    assert 'Both branches are better than CGSMM alone: not decided at this budget.' in text
    assert '| strip width: 1 | 70.00 ± 0.00 | 3 | 0.00 M | +12.00 ± 4.97 | better |' in text
    assert 'width 1:' not in text.partition('Pilot')[2] and '| strip width: 7 | not yet run |' in text
    # The pilot's first three seeds differ by 1, 2 and 3.
    assert 'deviation of 1.00 points' in text and '± 2.48 with 3 seeds and ± 1.05 with 6' in text
    assert '7 for 1.0, 11 for 0.7, more than 16 for 0.5.' in text
    page = tmp_path / 'page.md'
    page.write_text('<!-- results: ablations -->\n<!-- end -->')
    for key, result in results.items():
        write_json(tmp_path / 'results' / f'{key}.json', result)
    write_page(tmp_path / 'results', page, tmp_path)
    assert '![Paired differences' in page.read_text()
    assert Image.open(tmp_path / 'images/results_ablations.png').width > 500


def test_gains_at_both_resolutions_stand_side_by_side():
    values = {'shared': [80.0, 82.0], 'channel-patches-1': [79.0, 82.5]}
    small = ablation_results(values)
    large = {key.replace('/', '-128px/'): result for key, result in small.items() if key.endswith('0')}
    text = TABLES['ablations-128px']({**small, **large})
    assert '| 64 px | 81.00 ± 1.41 | 80.75 ± 2.47 | +1.00, -0.50 |' in text
    assert '| 128 px | 80.00 | 79.00 | +1.00 |' in text


def test_variants_of_an_ablation_see_the_same_samples(tmp_path):
    """Each seed gives all variants the same batches and augmentations, so that their differences are paired."""
    for number in range(64):
        file = tmp_path / f'cifar10_jpeg/train/{number % 2}/{number}.jpg'
        file.parent.mkdir(parents=True, exist_ok=True)
        noise = np.random.default_rng(number).integers(0, 256, (32, 32, 3), np.uint8)
        Image.fromarray(noise).save(file)
    runs = {run.key: run for run in planned_runs(['ablations', 'ablations-128px'], {})}

    def batches(name):
        run = runs[name]
        small = {
            'model.backbone.arch.depths': [1, 1, 1, 1],
            'train_dataloader.batch_size': 8,
            **{f'{split}_{part}': None for split in ('val', 'test') for part in ('dataloader', 'cfg', 'evaluator')},
        }
        config = load_config(str(CONFIGS / run.config), {**run.options, **small, 'randomness.seed': run.seed})
        set_data_root(config, str(tmp_path))
        config.work_dir = str(tmp_path / name)
        runner = build_runner(config)
        runner.train_loop.dataloader.sampler.set_epoch(1)
        return torch.stack([image for batch in runner.train_loop.dataloader for image in batch['inputs']])

    shared = batches('ablations/shared_seed1')
    assert shared.shape == (56, 3, 64, 64)
    assert torch.equal(shared, batches('ablations/branches-lsmm_seed1'))
    assert not torch.equal(shared, batches('ablations/shared_seed2'))
    large = batches('ablations-128px/shared_seed1')
    assert large.shape == (56, 3, 128, 128)
    assert torch.equal(large, batches('ablations-128px/channel-patches-1_seed1'))


def test_a_run_without_its_data_fails_and_says_why(tmp_path, capsys):
    run = replace(DIGITS, config='strip_mlp/strip-mlp-nano_1xb32_caltech101-64px.py')
    assert Queue(lambda results: [run], tmp_path / 'results', tmp_path / 'work', str(tmp_path / 'no')).work() == 1
    assert f'no folder {tmp_path}/no/caltech101_96px' in capsys.readouterr().out


def test_declared_runs_exist_and_are_unique():
    runs = planned_runs(PARTS, {})
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
    for run in (run for run in planned_runs(['caltech101'], {}) if run.choosing):
        results[run.key] = dict(settings=run.settings, **{'top-1': run.options[RATE]})
    firsts = [run for run in planned_runs(['caltech101'], results) if run.name.endswith('_seed0')]
    assert len(firsts) == 5 and all(run.options[RATE] == max(RATES) and not run.waits for run in firsts)
    for i, run in enumerate(firsts):
        results[run.key] = dict(settings=run.settings, curve=[{'top-1': i / 10}], **{'top-1': 1 - i / 10})
    further = [run for run in planned_runs(['caltech101'], results) if not is_done(run, results)]
    assert {run.name for run in further} == {f'{m}_seed{s}' for m in ('convnext-tiny', 'swin-tiny') for s in (1, 2)}
    write_json(tmp_path / 'caltech101' / 'a.json', {})
    assert read_results(tmp_path) == {'caltech101/a': {}}


def test_a_number_of_cores_is_checked(capsys):
    with mock.patch('sys.argv', ['evidence', '--jobs', '0']), pytest.raises(SystemExit):
        parse_args()
    assert '--jobs must be at least 1, but got 0' in capsys.readouterr().err
