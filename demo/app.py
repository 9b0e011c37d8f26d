"""A page for the browser: drop a picture, see what a trained classifier, segmentor or detector makes of it.

  python demo/app.py                            a classifier of handwritten digits, whose weights lie here
  python demo/app.py model.onnx                 an exported file (tools/deployment/export.py)
  python demo/app.py checkpoint.pth config.py   a checkpoint; of classifiers with Grad-CAM

Nothing leaves the machine, and no network is needed. Pictures are read from the page's own folder alone.
"""

import argparse
import ctypes
import os
import signal
import sys
import tempfile
from collections import Counter
from collections.abc import Callable
from functools import partial
from pathlib import Path

import gradio as gr
import numpy as np
from mmengine.utils.dl_utils import is_norm
from PIL import Image, ImageDraw
from pytorch_grad_cam import GradCAM
from pytorch_grad_cam.utils.image import show_cam_on_image

import mmstrip
from mmstrip.deployment import load
from mmstrip.deployment.detections import values_of
from mmstrip.deployment.export import task_of
from mmstrip.deployment.formats import SUFFIXES
from mmstrip.deployment.preprocessing import read_picture, size_of
from mmstrip.utils.checkpoints import fill_model, load_plain_weights_only
from mmstrip.utils.config import load_config

ROOT = Path(__file__).resolve().parent.parent
DIGITS = 'strip-mlp-pico_1xb64_digits-64px'  # shown by default
MAX_FILE = '10mb'
MAX_PIXELS = 25_000_000  # counted before a picture is decoded
MAX_SIDE = 1024  # larger pictures are shrunk before they are looked at
SIDE = 320  # of pictures on the page
MIN_SCORE = 0.3  # of boxes that are shown, as in mmdet's inferencer
MAX_WAITING = 16  # requests; one is served at a time
Predict = Callable[[np.ndarray], object]


def parse_args() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument('model', nargs='?', help='exported file, or checkpoint (default: of handwritten digits)')
    parser.add_argument('config', nargs='?', help="the checkpoint's config file")
    parser.add_argument('--layer', help="whose maps Grad-CAM weighs (default: the backbone's last norm)")
    parser.add_argument('--host', default='127.0.0.1', help='address to listen at (default: this machine alone)')
    parser.add_argument('--port', type=int, default=7860, help='(default: 7860)')
    return parser.parse_args()


def open_exported(path: str) -> tuple[str, list[str], Predict]:
    """An exported file's task, names of classes, and what predicts a picture (H, W, 3) in BGR."""
    file = load(path)
    about = file.about
    if about['task'] not in SHOWN:
        raise ValueError(f'the page shows {", ".join(SHOWN)}, but {path} holds a {about["task"]}')
    if not about['dynamic_size'] and size_of(about['steps'], about['task'] == 'detector') is None:
        about['steps'].append(dict(type='Resize', scale=about['shape'][::-1]))
    return about['task'], about['classes'], lambda image: file(image)[0]


def open_checkpoint(path: str, config: str, layer: str | None) -> tuple[str, list[str], Predict]:
    """The same of a checkpoint, as the toolboxes' inferencers predict; classifiers say where they look, too."""
    load_plain_weights_only()
    scope = load_config(config).get('default_scope')
    if scope == 'mmpretrain':
        from mmpretrain import ImageClassificationInferencer

        inferencer = ImageClassificationInferencer(config, pretrained=path, device='cpu')
        task, classes = task_of(inferencer.model, 'whole'), inferencer.classes
        predict = partial(explain, inferencer, find_layer(inferencer.model, layer))
    elif scope == 'mmseg':
        from mmseg.apis import MMSegInferencer

        inferencer = MMSegInferencer(config, path, device='cpu', show_progress=False)
        task, classes = 'segmentor', inferencer.model.dataset_meta['classes']

        def predict(image: np.ndarray) -> np.ndarray:
            return inferencer(image)['predictions']

    elif scope == 'mmdet':
        from mmdet.apis import DetInferencer

        inferencer = DetInferencer(config, path, device='cpu', show_progress=False)
        task, classes = 'detector', inferencer.model.dataset_meta['classes']

        def predict(image: np.ndarray) -> dict:
            (found,) = inferencer(image, return_datasamples=True)['predictions']
            return values_of(found.pred_instances)

    else:
        raise ValueError(f'the page shows models of mmpretrain, mmseg and mmdet, but {config} is of {scope}')
    if layer and task != 'classifier':
        raise ValueError(f'--layer is for classifiers, but {config} is of a {task}')
    fill_model(inferencer.model, config, path)
    mmstrip.accelerate(inferencer.model)
    return task, classes, predict


def find_layer(model, name: str | None):
    layers = dict(model.named_modules())
    norms = [key for key, layer in layers.items() if key.startswith('backbone.') and is_norm(layer)]
    if (name or norms[-1]) not in layers:
        raise ValueError(f'--layer must name a layer, such as {norms[-1]}, but got {name}')
    return layers[name or norms[-1]]


def explain(inferencer, layer, image: np.ndarray) -> dict:
    """Scores of a picture, and what of it the network saw with the Grad-CAM of the best class over it, RGB."""
    data = next(iter(inferencer.preprocess([image])))
    seen = np.ascontiguousarray(data['inputs'][0].numpy().transpose(1, 2, 0)[..., ::-1])
    with GradCAM(inferencer.model, [layer]) as cam:
        heat = cam(inferencer.model.data_preprocessor(data)['inputs'], None)[0]
        scores = cam.outputs[0].detach().softmax(0).numpy()
    overlay = show_cam_on_image(np.float32(seen) / 255, heat, use_rgb=True)
    return dict(pred_scores=scores, overlay=Image.fromarray(overlay).resize((SIDE, SIDE * len(seen) // len(seen[0]))))


def stay_local(host: str, port: int) -> None:
    """Let this process connect to nothing but the page itself, as Gradio fetches the addresses that it is sent."""
    own = {host, None, '', 'localhost', '127.0.0.1', '::1', '0.0.0.0', '::'}

    def check(event: str, values: tuple) -> None:
        if event == 'socket.getaddrinfo' and values[0] not in own:
            raise PermissionError(f'the page asks no network for {values[0]}')
        if event == 'socket.connect' and isinstance(values[1], tuple) and values[1][1] != port:
            raise PermissionError(f'the page connects to nothing, but was asked for {values[1]}')

    sys.addaudithook(check)


def return_memory() -> None:
    """Let glibc give large blocks back at once; it would keep some hundred MB for each burst of requests."""
    libc = ctypes.CDLL(None) if sys.platform == 'linux' else None
    if hasattr(libc, 'mallopt'):
        libc.mallopt(-3, 2**20)  # M_MMAP_THRESHOLD, bytes


def uploaded(payload: object) -> str | None:
    """Path of a picture that was uploaded, from what a request says.

    Raises:
        gr.Error: It lies outside of the page's folder, or nowhere, which is not told apart.
    """
    if payload is None:
        return None
    try:
        path = Path(payload['path']).resolve()
        if path.is_relative_to(Path(gr.utils.get_upload_folder()).resolve()) and path.is_file():
            return str(path)
    except (KeyError, OSError, RuntimeError, TypeError, ValueError):  # of what is no path
        pass
    raise gr.Error('Only pictures that were uploaded to this page are read: upload it again', print_exception=False)


class Page(gr.Interface):
    """Takes uploaded pictures alone, where Gradio reads and fetches paths and addresses that it is sent."""

    async def preprocess_data(self, block_fn, inputs: list, *args, **options) -> list:
        if block_fn.inputs != self.input_components:
            return await super().preprocess_data(block_fn, inputs, *args, **options)
        return list(map(uploaded, inputs[:1] or [None]))


def open_picture(path: str) -> Image.Image:
    """A picture in RGB, shrunk to :data:`MAX_SIDE`; what is wrong with it is said on the page."""
    try:
        pixels = read_picture(path)
    except ValueError as error:
        raise gr.Error(f'This file cannot be read as a picture: {error.__cause__}', print_exception=False) from error
    picture = Image.fromarray(np.ascontiguousarray(pixels[..., ::-1]))
    picture.thumbnail((MAX_SIDE, MAX_SIDE))
    return picture


def name_of(label: int, classes: list[str] | None) -> str:
    return classes[label] if classes and label < len(classes) else str(label)


def show_classes(picture: Image.Image, result: dict, classes: list[str] | None):
    scores = enumerate(result['pred_scores'].tolist())
    return {name_of(i, classes): score for i, score in scores}, result.get('overlay')


def show_masks(picture: Image.Image, labels: np.ndarray, classes: list[str] | None):
    found = np.unique(labels).tolist()
    return picture, [((labels == i).astype(float), name_of(i, classes)) for i in found]


def show_boxes(picture: Image.Image, found: dict, classes: list[str] | None):
    """Those of a class together, with how many they are."""
    labels = np.where(found['scores'] < MIN_SCORE, -1, found['labels'])
    shown = []
    for i in np.unique(labels[labels >= 0]).tolist():
        mine = labels == i
        masks = found['masks'][mine].any(0) if 'masks' in found else np.zeros(picture.size[::-1], bool)
        drawn = Image.fromarray(np.uint8(128 * masks))
        pen = ImageDraw.Draw(drawn)
        for box in found['bboxes'][mine]:
            pen.rectangle(box.tolist(), outline=255, width=2)
        shown.append((np.asarray(drawn) / 255, f'{name_of(i, classes)}: {mine.sum()}'))
    return picture, shown


SHOWN = dict(classifier=show_classes, segmentor=show_masks, detector=show_boxes)


def show(task: str, predict: Predict, classes: list[str] | None, path: str | None):
    if path is None:
        return (None, None) if task == 'classifier' else None
    picture = open_picture(path)
    try:
        return SHOWN[task](picture, predict(np.asarray(picture)[..., ::-1].copy()), classes)
    except Exception as error:  # of any model
        raise gr.Error(f'This picture cannot be predicted: {error}', print_exception=False) from error


def distinct(classes: list[str]) -> list[str]:
    """Names of classes, those that several have with their numbers: ImageNet has two of the name 'crane'."""
    counts = Counter(classes)
    names = [f'{name} ({i})' if counts[name] > 1 else name for i, name in enumerate(classes)]
    return names if len(set(names)) == len(names) else [f'{name} ({i})' for i, name in enumerate(classes)]


def build_page(task: str, classes: list[str] | None, predict: Predict, with_cam: bool) -> Page:
    classes = classes and distinct(classes)
    picture = gr.Image(type='filepath', sources=['upload', 'clipboard'], label='Picture', height=SIDE)
    if task == 'classifier':
        shown = [
            gr.Label(num_top_classes=5, label='Classes'),
            gr.Image(label='Grad-CAM', visible=with_cam, height=SIDE, buttons=['download', 'fullscreen']),
        ]
    else:
        shown = gr.AnnotatedImage(label='Segmentation' if task == 'segmentor' else 'Objects')
    return Page(
        partial(show, task, predict, classes),
        picture,
        shown,
        title=f'{task.capitalize()} of {len(classes)} classes' if classes else task.capitalize(),
        api_name='predict',
        live=True,
        flagging_mode='never',
        analytics_enabled=False,
        delete_cache=(60, 600),  # seconds: how often to look for files, and how old they may be; some wait that long
    )


def main() -> None:
    args = parse_args()
    if args.model is None:
        args.model, args.config = f'{ROOT}/demo/{DIGITS}.safetensors', f'{ROOT}/configs/strip_mlp/{DIGITS}.py'
    if args.port not in range(1, 65536):
        sys.exit(f'Error: --port must be from 1 to 65535, but got {args.port}')
    is_exported = Path(args.model).suffix in SUFFIXES.values()
    if Path(args.model).suffix == SUFFIXES['torch-export']:
        sys.exit(f'Error: the page shows .onnx and .xml, as .pt2 files run code, but got {args.model}')
    if is_exported == bool(args.config):
        needed = (
            'exported files have no config beside them' if is_exported else 'a checkpoint needs its config after it'
        )
        sys.exit(f'Error: {needed}, but got {args.model} and {args.config}')
    if args.layer and is_exported:
        sys.exit(f'Error: --layer is for checkpoints, but got {args.model}')
    Image.MAX_IMAGE_PIXELS = MAX_PIXELS // 2  # Pillow refuses twice as many
    return_memory()
    signal.signal(signal.SIGTERM, lambda *_: sys.exit())  # so that the folder is removed
    with tempfile.TemporaryDirectory(prefix='mmstrip-page-') as folder:
        os.environ['GRADIO_TEMP_DIR'] = folder
        serve(args)


def serve(args: argparse.Namespace) -> None:
    try:
        opened = open_checkpoint(args.model, args.config, args.layer) if args.config else open_exported(args.model)
        opened[2](np.zeros((256, 256, 3), np.uint8))  # what cannot be is said here, not on the page
        stay_local(args.host, args.port)
        page = build_page(*opened, with_cam=bool(args.config)).queue(max_size=MAX_WAITING, default_concurrency_limit=1)
        page.launch(
            server_name=args.host,
            server_port=args.port,
            max_file_size=MAX_FILE,
            max_threads=1,  # each keeps memory of its own
            show_error=True,
            run_history=False,
            footer_links=['api', 'gradio'],
        )
    except (ImportError, OSError, ValueError) as error:
        sys.exit(f'Error: {error}')


if __name__ == '__main__':
    main()
