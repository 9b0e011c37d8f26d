"""scikit-learn's handwritten digits in a fixed split."""

from functools import lru_cache

import numpy as np

try:
    from sklearn.datasets import load_digits
    from sklearn.model_selection import train_test_split
except ModuleNotFoundError as error:
    raise ImportError(
        "the digits come with scikit-learn, which is not installed: pip install 'mmstrip[tools]'"
    ) from error

DIGITS = tuple(str(digit) for digit in range(10))
NUM_TEST = 360
SPLIT_SEED = 0


@lru_cache(maxsize=1)
def split_digits() -> dict:
    """The 1,797 digits in a fixed split, stratified by class: 1,437 to train, 360 to test.

    Returns:
        'train' and 'test', each (images, labels, ids): uint8 (N, 8, 8), int (N, ), index in scikit-learn's data (N, ).
    """
    digits = load_digits()
    images = np.round(digits.images * (255 / 16)).astype(np.uint8)
    train, test = train_test_split(
        np.arange(len(images)), test_size=NUM_TEST, stratify=digits.target, random_state=SPLIT_SEED
    )
    return {
        split: (images[ids], digits.target[ids], ids)
        for split, ids in (('train', np.sort(train)), ('test', np.sort(test)))
    }
