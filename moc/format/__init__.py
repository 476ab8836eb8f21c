"""Pure codecs of the repository format, version 1 (docs/format.md)."""
