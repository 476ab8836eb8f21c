"""Makes the vault storage known to every process of a test that has this folder on its PYTHONPATH."""

import fsspec

fsspec.register_implementation("vault", "tests.security.vault.VaultFileSystem", clobber=True)
