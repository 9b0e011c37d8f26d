import functools

import pytest
from mmengine.config import Config


@pytest.fixture(autouse=True, scope='module')
def remembered_paths():
    """Where the toolboxes' base configs are: mmengine reads all of their metafiles to find each."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Config, '_get_cfg_path', staticmethod(functools.cache(Config._get_cfg_path)))
        yield
