"""Loading images from files."""

from mmcv.transforms import LoadImageFromFile

from ..registry import TRANSFORMS
from ..utils.seeding import UnreadableImageError


@TRANSFORMS.register_module()
class LoadImage(LoadImageFromFile):
    """Load an image file as mmcv does, with the file's name in every error.

    Takes the arguments of :class:`mmcv.transforms.LoadImageFromFile`.

    Raises:
        FileNotFoundError: There is no such file.
        UnreadableImageError: The file cannot be read as an image; a ValueError.
    """

    def transform(self, results: dict) -> dict:
        try:
            return super().transform(results)
        except FileNotFoundError:
            raise FileNotFoundError(f'no image file at {results["img_path"]}') from None
        except Exception as error:
            reason = str(error).strip().split('\n')[0] or type(error).__name__
            raise UnreadableImageError(f'{results["img_path"]} is not a readable image: {reason}') from error
