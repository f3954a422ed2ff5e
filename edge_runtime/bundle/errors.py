"""What can be wrong with a bundle or an adapter file.

BundleError                 the artifact is bad: fetch or export it again
├── BundleMissingError      a file the manifest names is not there
├── BundleDigestError       a file's bytes are not the ones the manifest (or the plan) names
├── ManifestError           manifest.json cannot be read as a manifest, or contradicts itself
└── TensorFileError         a tensor file has a bad header, other tensors, shapes or dtypes than expected
"""


class BundleError(Exception):
    """The artifact is bad; fetching or exporting it again is the way out."""


class BundleMissingError(BundleError):
    """A file the manifest names is not there."""


class BundleDigestError(BundleError):
    """A file's bytes are not the ones that were promised."""


class ManifestError(BundleError):
    """``manifest.json`` cannot be read as a manifest, or contradicts itself."""


class TensorFileError(BundleError):
    """A tensor file has a bad header, or other tensors, shapes or dtypes than expected."""
