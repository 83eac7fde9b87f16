"""Everything that can go wrong between a pack on disk and a prediction.

``EngineError`` is the root. Each backend maps its own library's exceptions onto this tree in one
place (its adapter), so nothing above ever catches an onnxruntime or openvino exception.
"""

from __future__ import annotations


class EngineError(Exception):
    """Root of every error raised by this package; the message names the pack or graph and the remedy."""


class PackNotFound(EngineError):
    """No pack of that name or path exists."""


class ManifestError(EngineError):
    """A manifest is missing, malformed, or disagrees with itself or with its graphs."""


class PackIntegrityError(EngineError):
    """A file of the pack is missing or its sha256 is not the one in the manifest."""


class BackendUnavailable(EngineError):
    """The backend's library is not installed, or it has no usable device on this machine."""


class GraphLoadError(EngineError):
    """A backend refused to load or compile a graph."""


class ConversionError(EngineError):
    """A graph cannot be converted to another precision, or what it is converted to cannot be kept."""


class ParityMissing(EngineError):
    """The pack carries no parity report for the engine that was asked for."""


class ParityFailed(EngineError):
    """The engine's outputs are further from PyTorch's than the manifest allows."""


class InferenceError(EngineError):
    """A loaded engine failed on a batch, or was given inputs that do not fit its specification."""


class NotFinite(InferenceError):
    """A loaded engine answered with NaN or infinity."""
