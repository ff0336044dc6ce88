# SPDX-License-Identifier: Apache-2.0
"""What lies on disk: the cache, digests and locks."""
