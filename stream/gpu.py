"""Where the frames of a pack are put together: on the GPU, where its engines run there and torch is at hand."""

from __future__ import annotations

import logging
from collections.abc import Sequence

from engines.errors import BackendUnavailable
from engines.manifest import Branch
from stream.samples import HostPictures, Pictures

log = logging.getLogger(__name__)


def pictures_on(device: str, branches: Sequence[Branch]) -> Pictures:
    """What puts the frames of these branches together for engines on ``device`` (``cpu`` or ``cuda``).

    Without torch, or where it sees no GPU, frames stay in host memory, and each batch takes its way to the GPU anew.
    """
    if device != "cuda" or all(branch.video is None for branch in branches):
        return HostPictures()
    try:
        from stream.gpu_pictures import DevicePictures

        return DevicePictures(branches, device)
    except ImportError as error:
        cause = f"torch cannot be imported ({error}); pip install 'sightwire[gpu]'"
    except BackendUnavailable as error:
        cause = str(error)
    log.warning("frames stay in host memory and are uploaded with every batch: %s", cause)
    return HostPictures()
