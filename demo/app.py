"""A web page: drop an image and see the prediction of a trained classifier, segmentor or detector.

  python demo/app.py                            a classifier of handwritten digits, whose weights lie here
  python demo/app.py model.onnx                 an exported file (tools/deployment/export.py)
  python demo/app.py checkpoint.pth config.py   a checkpoint; for classifiers with Grad-CAM

Nothing leaves the machine, and no network is needed. Images are only read from the page's own upload folder.
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

import numpy as np
from mmengine.utils.dl_utils import is_norm
from PIL import Image, ImageDraw

import mmstrip
from mmstrip.deployment import load
from mmstrip.deployment.detections import values_of
from mmstrip.deployment.export import task_of
from mmstrip.deployment.formats import SUFFIXES
from mmstrip.deployment.preprocessing import read_picture, size_of
from mmstrip.utils.checkpoints import load_full_checkpoint, load_plain_weights_only
from mmstrip.utils.config import load_config
from mmstrip.utils.errors import short_errors

try:
    import gradio as gr
    from pytorch_grad_cam import GradCAM
    from pytorch_grad_cam.utils.image import show_cam_on_image
except ModuleNotFoundError as error:
    sys.exit(f"Error: the page needs {error.name}, which is not installed: pip install 'mmstrip[demo]'")

ROOT = Path(__file__).resolve().parent.parent
DIGITS = 'strip-mlp-pico_1xb64_digits-64px'  # shown by default
MAX_FILE = '10mb'
MAX_PIXELS = 25_000_000  # checked before an image is decoded
MAX_SIDE = 1024  # pixels; larger images are shrunk before prediction
SIDE = 320  # pixels, of images on the page
MIN_SCORE = 0.3  # of boxes to show, as in mmdet's inferencer
MAX_WAITING = 16  # requests in the queue; one is served at a time
Predict = Callable[[np.ndarray], object]


def parse_args() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument('model', nargs='?', help='exported file, or checkpoint (default: of handwritten digits)')
    parser.add_argument('config', nargs='?', help="the checkpoint's config file")
    parser.add_argument('--layer', help="layer for Grad-CAM (default: the backbone's last norm, else its last layer)")
    parser.add_argument('--host', default='127.0.0.1', help='address to listen on (default: this machine only)')
    parser.add_argument('--port', type=int, default=7860, help='port to listen on (default: 7860)')
    return parser.parse_args()


def open_exported(path: str) -> tuple[str, list[str], Predict]:
    """Task, class names and prediction function of an exported file; images are (H, W, 3) in BGR."""
    file = load(path)
    about = file.about
    if about['task'] not in SHOWN:
        raise ValueError(f'the page shows a {", ".join(SHOWN)}, but {path} is a {about["task"]}')
    if not about['dynamic_size'] and size_of(about['steps'], about['task'] == 'detector') is None:
        about['steps'].append(dict(type='Resize', scale=about['shape'][::-1]))
    return about['task'], about['classes'], lambda image: file(image)[0]


def open_checkpoint(path: str, config: str, layer: str | None) -> tuple[str, list[str], Predict]:
    """The same for a checkpoint, by the toolboxes' inferencers; classifiers add a Grad-CAM overlay."""
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
        raise ValueError(f'default_scope of {config} must be mmpretrain, mmseg or mmdet, but is {scope!r}')
    if layer and task != 'classifier':
        raise ValueError(f'--layer is for classifiers, but {config} is a {task}')
    load_full_checkpoint(inferencer.model, config, path)
    mmstrip.accelerate(inferencer.model)
    return task, classes, predict


def check_prediction(predict: Predict, layer: str | None) -> None:
    """Predict a black image, so that errors are reported at the start, not on the page."""
    try:
        predict(np.zeros((256, 256, 3), np.uint8))
    except Exception as error:
        if layer is None:
            raise
        raise ValueError(f'--layer must output maps (N, C, H, W), but Grad-CAM fails on {layer}: {error}') from error


def find_layer(model, name: str | None):
    layers = dict(model.named_modules())
    own = [key for key in layers if key.startswith('backbone.')]
    default = ([key for key in own if is_norm(layers[key])] or own)[-1]
    if (name or default) not in layers:
        raise ValueError(f'--layer must be the name of a layer, such as {default}, but got {name}')
    return layers[name or default]


def explain(inferencer, layer, image: np.ndarray) -> dict:
    """Scores of an image, and its preprocessed pixels (RGB) with the Grad-CAM of the best class as an overlay."""
    data = next(iter(inferencer.preprocess([image])))
    seen = np.ascontiguousarray(data['inputs'][0].numpy().transpose(1, 2, 0)[..., ::-1])
    with GradCAM(inferencer.model, [layer]) as cam:
        heat = cam(inferencer.model.data_preprocessor(data)['inputs'], None)[0]
        scores = cam.outputs[0].detach().softmax(0).numpy()
    overlay = show_cam_on_image(np.float32(seen) / 255, heat, use_rgb=True)
    return dict(pred_scores=scores, overlay=Image.fromarray(overlay).resize((SIDE, SIDE * len(seen) // len(seen[0]))))


def block_network(host: str, port: int) -> None:
    """Allow connections only to the page itself, as Gradio would fetch any URL in a request."""
    own = {host, None, '', 'localhost', '127.0.0.1', '::1', '0.0.0.0', '::'}

    def check(event: str, values: tuple) -> None:
        if event == 'socket.getaddrinfo' and values[0] not in own:
            raise PermissionError(f'the page may not look up {values[0]}')
        if event == 'socket.connect' and isinstance(values[1], tuple) and values[1][1] != port:
            raise PermissionError(f'the page may not connect to {values[1]}')

    sys.addaudithook(check)


def release_memory() -> None:
    """Make glibc release large blocks at once; it would keep hundreds of MB after a burst of requests."""
    libc = ctypes.CDLL(None) if sys.platform == 'linux' else None
    if hasattr(libc, 'mallopt'):
        libc.mallopt(-3, 2**20)  # M_MMAP_THRESHOLD, bytes


def uploaded_path(payload: object) -> str | None:
    """Path of an uploaded image in a request.

    Raises:
        gr.Error: It is not a file in the upload folder; the error does not say which files exist.
    """
    if payload is None:
        return None
    try:
        path = Path(payload['path']).resolve()
        if path.is_relative_to(Path(gr.utils.get_upload_folder()).resolve()) and path.is_file():
            return str(path)
    except (KeyError, OSError, RuntimeError, TypeError, ValueError):  # not a path
        pass
    raise gr.Error('This image was not uploaded to this page; upload it again', print_exception=False)


class Page(gr.Interface):
    """Accepts only uploaded images; Gradio itself would read any path and fetch any URL in a request."""

    async def preprocess_data(self, block_fn, inputs: list, *args, **options) -> list:
        if block_fn.inputs != self.input_components:
            return await super().preprocess_data(block_fn, inputs, *args, **options)
        return list(map(uploaded_path, inputs[:1] or [None]))


def open_picture(path: str) -> Image.Image:
    """Open an image in RGB, shrunk to :data:`MAX_SIDE`; errors are shown on the page."""
    try:
        pixels = read_picture(path)
    except ValueError as error:
        raise gr.Error(f'This file cannot be read as an image: {error.__cause__}', print_exception=False) from error
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
    """Show the boxes of each class together, with their number."""
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
    except Exception as error:  # each model has its own
        raise gr.Error(f'Prediction failed: {error}', print_exception=False) from error


def unique_names(classes: list[str]) -> list[str]:
    """Class names, with their index if a name occurs twice, like 'crane' in ImageNet."""
    counts = Counter(classes)
    names = [f'{name} ({i})' if counts[name] > 1 else name for i, name in enumerate(classes)]
    return names if len(set(names)) == len(names) else [f'{name} ({i})' for i, name in enumerate(classes)]


def build_page(task: str, classes: list[str] | None, predict: Predict, with_cam: bool) -> Page:
    classes = classes and unique_names(classes)
    picture = gr.Image(type='filepath', sources=['upload', 'clipboard'], label='Image', height=SIDE)
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
        delete_cache=(60, 600),  # seconds: interval, and age of files to delete; requests may wait that long
    )


def main() -> None:
    args = parse_args()
    if args.model is None:
        args.model, args.config = f'{ROOT}/demo/{DIGITS}.safetensors', f'{ROOT}/configs/strip_mlp/{DIGITS}.py'
    if args.port not in range(1, 65536):
        sys.exit(f'Error: --port must be from 1 to 65535, but got {args.port}')
    is_exported = Path(args.model).suffix in SUFFIXES.values()
    if Path(args.model).suffix == SUFFIXES['torch-export']:
        sys.exit(f'Error: the page opens .onnx and .xml files, not .pt2, which runs code, but got {args.model}')
    if is_exported and args.config:
        sys.exit(f'Error: an exported file needs no config, but got {args.config} besides {args.model}')
    if not is_exported and not args.config:
        sys.exit(f'Error: a checkpoint needs its config as the second argument, but got only {args.model}')
    if args.layer and is_exported:
        sys.exit(f'Error: --layer needs a checkpoint, but got {args.model}')
    Image.MAX_IMAGE_PIXELS = MAX_PIXELS // 2  # Pillow raises at twice that number
    release_memory()
    signal.signal(signal.SIGTERM, lambda *_: sys.exit())  # leave the with block below: it removes the folder
    with tempfile.TemporaryDirectory(prefix='mmstrip-page-') as folder:
        os.environ['GRADIO_TEMP_DIR'] = folder
        serve(args)


def serve(args: argparse.Namespace) -> None:
    with short_errors():
        opened = open_checkpoint(args.model, args.config, args.layer) if args.config else open_exported(args.model)
        check_prediction(opened[2], args.layer)
        block_network(args.host, args.port)
        page = build_page(*opened, with_cam=bool(args.config)).queue(max_size=MAX_WAITING, default_concurrency_limit=1)
        page.launch(
            server_name=args.host,
            server_port=args.port,
            max_file_size=MAX_FILE,
            max_threads=1,  # each thread keeps memory
            show_error=True,
            run_history=False,
            footer_links=['api', 'gradio'],
        )


if __name__ == '__main__':
    main()
