# SPDX-License-Identifier: Apache-2.0
"""Storage on disk: the cache, digests and locks."""
